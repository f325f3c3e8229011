//! The client's side of the handshake, for who then hands the socket to something else (the kernel): one GO, no TLS, no contexts.
//!
//! ```text
//! server  "NBDMAGIC" "IHAVEOPT" u16 flags
//! client  u32 flags, "IHAVEOPT" u32 7 GO, u32 len, (u32 name_len, name, u16 1, u16 3 BLOCK_SIZE)
//! server  replies u64 magic, u32 7, u32 type, u32 len, data: INFO EXPORT, INFO BLOCK_SIZE, any other INFO, then ACK or an error
//! ```

use std::io;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

use crate::wire::{self, info, option, reply};

/// The largest option reply that is read; the texts of errors are far smaller.
const REPLY_BYTES_MAX: u32 = 64 << 10;
/// Replies to one GO that are read before the server is taken for mad.
const REPLIES_MAX: usize = 64;

/// What a server says of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerInfo {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Transmission flags, as `kernel::ConnectRequest::flags` wants them.
    pub flags: u16,
    /// Requests must be multiples of so many bytes.
    pub min_block_bytes: u32,
    /// Requests should be multiples of so many bytes.
    pub preferred_block_bytes: u32,
    /// The largest payload that the server takes, in bytes.
    pub max_payload_bytes: u32,
}

impl ServerInfo {
    /// Whether writes are refused.
    #[must_use]
    pub const fn is_read_only(&self) -> bool {
        self.flags & wire::transmission::READ_ONLY != 0
    }

    /// Whether a flush on one connection covers the writes of all.
    #[must_use]
    pub const fn can_multi_conn(&self) -> bool {
        self.flags & wire::transmission::CAN_MULTI_CONN != 0
    }
}

/// Why an export was not opened.
#[derive(Debug, Error)]
pub enum OpenExportError {
    /// The socket failed, or the server closed it.
    #[error("the connection failed in the handshake: {0}")]
    Io(#[from] io::Error),
    /// Whoever answers is no NBD server of today.
    #[error("the server does not speak fixed newstyle NBD; is this the NBD port?")]
    NotNbd,
    /// The server knows EXPORT_NAME only.
    #[error("the server does not know NBD_OPT_GO; it is too old to be used here")]
    NoGo,
    /// There is no such export.
    #[error("the server has no such export: {0}")]
    Unknown(String),
    /// The server goes down and opens nothing; another one may.
    #[error("the server is shutting down: {0}")]
    ShuttingDown(String),
    /// TLS is required, and the kernel speaks none.
    #[error(
        "the server wants TLS, which cannot be handed to the kernel; use --ha proxy, or let the server take this host without TLS: {0}"
    )]
    NeedsTls(String),
    /// Any other refusal.
    #[error("the server refused (error {code:#x}): {text}")]
    Refused {
        /// Type of the option reply.
        code: u32,
        /// The server's reason.
        text: String,
    },
    /// The server breaks the protocol.
    #[error("the server's answer makes no sense: {0}")]
    BadReply(&'static str),
}

/// Opens an export on a fresh connection; afterwards the transmission phase begins, with simple replies.
///
/// Reads no byte beyond the handshake. The caller sets a time limit.
pub async fn open_export<S>(stream: &mut S, name: &str) -> Result<ServerInfo, OpenExportError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let flags = read_greeting(stream).await?;
    stream.write_all(&go(flags & wire::NO_ZEROES, name)).await?;
    let mut found = Found::default();
    for _ in 0..REPLIES_MAX {
        let (kind, data) = read_reply(stream).await?;
        match kind {
            reply::INFO => found.take(&data)?,
            reply::ACK => return found.finish(),
            error => return Err(refusal(error, &data)),
        }
    }
    Err(OpenExportError::BadReply("it does not end"))
}

/// The server's handshake flags.
async fn read_greeting<S: AsyncRead + Unpin>(stream: &mut S) -> Result<u16, OpenExportError> {
    let magic = stream.read_u64().await?;
    if magic != wire::GREETING_MAGIC || stream.read_u64().await? != wire::OPTION_MAGIC {
        return Err(OpenExportError::NotNbd);
    }
    let flags = stream.read_u16().await?;
    if flags & wire::FIXED_NEWSTYLE == 0 {
        return Err(OpenExportError::NotNbd);
    }
    Ok(flags)
}

/// The client's flags and GO.
fn go(no_zeroes: u16, name: &str) -> Vec<u8> {
    // Names are cut far below 4 GiB by the command line and by the protocol (4,096 bytes).
    let name_len = u32::try_from(name.len()).unwrap_or(u32::MAX);
    let data_len = name_len.saturating_add(8);
    let mut bytes = u32::from(wire::FIXED_NEWSTYLE | no_zeroes)
        .to_be_bytes()
        .to_vec();
    bytes.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    bytes.extend_from_slice(&option::GO.to_be_bytes());
    bytes.extend_from_slice(&data_len.to_be_bytes());
    bytes.extend_from_slice(&name_len.to_be_bytes());
    bytes.extend_from_slice(name.as_bytes());
    bytes.extend_from_slice(&1_u16.to_be_bytes());
    bytes.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    bytes
}

/// Type and data of the next reply to GO.
async fn read_reply<S: AsyncRead + Unpin>(
    stream: &mut S,
) -> Result<(u32, Vec<u8>), OpenExportError> {
    if stream.read_u64().await? != wire::OPTION_REPLY_MAGIC {
        return Err(OpenExportError::BadReply("no option reply"));
    }
    if stream.read_u32().await? != option::GO {
        return Err(OpenExportError::BadReply("it is for another option"));
    }
    let kind = stream.read_u32().await?;
    let len_bytes = stream.read_u32().await?;
    if len_bytes > REPLY_BYTES_MAX {
        return Err(OpenExportError::BadReply("it is too long"));
    }
    let mut data = vec![0; len_bytes as usize];
    stream.read_exact(&mut data).await?;
    Ok((kind, data))
}

fn refusal(kind: u32, data: &[u8]) -> OpenExportError {
    let text = String::from_utf8_lossy(data).into_owned();
    match kind {
        reply::ERR_UNSUP => OpenExportError::NoGo,
        reply::ERR_UNKNOWN => OpenExportError::Unknown(text),
        reply::ERR_SHUTDOWN => OpenExportError::ShuttingDown(text),
        reply::ERR_TLS_REQD => OpenExportError::NeedsTls(text),
        code if code & 0x8000_0000 != 0 => OpenExportError::Refused { code, text },
        _ => OpenExportError::BadReply("a reply of an unknown type"),
    }
}

/// What the INFO replies have told so far.
#[derive(Default)]
struct Found {
    export: Option<(u64, u16)>,
    /// Minimum, preferred, maximum payload in bytes.
    blocks: Option<(u32, u32, u32)>,
}

impl Found {
    fn take(&mut self, data: &[u8]) -> Result<(), OpenExportError> {
        let (kind, item) = wire::take_u16(data).ok_or(BAD_INFO)?;
        match kind {
            info::EXPORT => self.export = Some(export_of(item).ok_or(BAD_INFO)?),
            info::BLOCK_SIZE => self.blocks = Some(blocks_of(item).ok_or(BAD_INFO)?),
            _ => {}
        }
        Ok(())
    }

    fn finish(&self) -> Result<ServerInfo, OpenExportError> {
        let (size_bytes, flags) = self.export.ok_or(OpenExportError::BadReply(
            "it opened an export without a size",
        ))?;
        // What the protocol sets for a server that says nothing.
        let (min, preferred, max) = self.blocks.unwrap_or((1, 4096, 32 << 20));
        Ok(ServerInfo {
            size_bytes,
            flags,
            min_block_bytes: min,
            preferred_block_bytes: preferred,
            max_payload_bytes: max,
        })
    }
}

const BAD_INFO: OpenExportError = OpenExportError::BadReply("an INFO of the wrong length");

fn export_of(item: &[u8]) -> Option<(u64, u16)> {
    let (size_bytes, rest) = wire::take_u64(item)?;
    let (flags, rest) = wire::take_u16(rest)?;
    rest.is_empty().then_some((size_bytes, flags))
}

fn blocks_of(item: &[u8]) -> Option<(u32, u32, u32)> {
    let (min, rest) = wire::take_u32(item)?;
    let (preferred, rest) = wire::take_u32(rest)?;
    let (max, rest) = wire::take_u32(rest)?;
    rest.is_empty().then_some((min, preferred, max))
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::*;

    /// Plays a server that says `replies` and hands back what the client said.
    async fn play(replies: &[u8]) -> (Result<ServerInfo, OpenExportError>, Vec<u8>) {
        let (mut ours, mut theirs) = duplex(1 << 20);
        theirs.write_all(b"NBDMAGICIHAVEOPT\0\x03").await.unwrap();
        theirs.write_all(replies).await.unwrap();
        theirs.shutdown().await.unwrap();
        let opened = open_export(&mut ours, "vol").await;
        drop(ours);
        let mut said = Vec::new();
        theirs.read_to_end(&mut said).await.unwrap();
        (opened, said)
    }

    fn reply(kind: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = wire::OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&option::GO.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    #[tokio::test]
    async fn an_export_is_opened() {
        let replies = [
            reply(reply::INFO, &[0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 0x2d]),
            reply(reply::INFO, b"\0\x02some text"),
            reply(reply::INFO, &[0, 3, 0, 0, 2, 0, 0, 0, 16, 0, 2, 0, 0, 0]),
            reply(reply::ACK, &[]),
        ];
        let (opened, said) = play(&replies.concat()).await;
        let golden = ServerInfo {
            size_bytes: 65_536,
            flags: 0x12d,
            min_block_bytes: 512,
            preferred_block_bytes: 4096,
            max_payload_bytes: 32 << 20,
        };
        let opened = opened.unwrap();
        assert_eq!(opened, golden);
        assert!(opened.can_multi_conn() && !opened.is_read_only());
        let go = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0b\0\0\0\x03vol\0\x01\0\x03";
        assert_eq!(said, go);
    }

    #[tokio::test]
    async fn refusals_keep_the_words_of_the_server() {
        let (refused, _) = play(&reply(reply::ERR_UNKNOWN, b"no vol here")).await;
        let refused = refused.unwrap_err();
        assert!(matches!(refused, OpenExportError::Unknown(_)), "{refused}");
        assert!(refused.to_string().contains("no vol here"));
        let (draining, _) = play(&reply(reply::ERR_SHUTDOWN, b"")).await;
        assert!(matches!(draining, Err(OpenExportError::ShuttingDown(_))));
    }

    #[tokio::test]
    async fn nonsense_is_refused_and_costs_little() {
        let huge = [&reply(reply::INFO, &[])[..16], &[0xff; 4]].concat();
        let nonsense = [
            reply(reply::ACK, &[]),
            reply(reply::INFO, &[0]),
            reply(reply::INFO, &[0, 0, 1]),
            reply(7, &[]),
            huge,
            vec![0; 100],
            reply(reply::INFO, b"\0\x01name").repeat(REPLIES_MAX + 1),
        ];
        for replies in nonsense {
            let (refused, _) = play(&replies).await;
            assert!(
                matches!(refused, Err(OpenExportError::BadReply(_))),
                "{refused:?}"
            );
        }
        let (ended, _) = play(&[]).await;
        assert!(matches!(ended, Err(OpenExportError::Io(_))));
    }
}
