//! A raw NBD client that says anything and believes nothing: every reply is checked against the
//! form that the protocol prescribes (NetworkBlockDevice/nbd, doc/proto.md).

mod reply;

pub use reply::{Content, Reply};

use std::fmt::Debug;
use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// A server that answers nothing for so long has hung.
const SILENCE: Duration = Duration::from_secs(30);
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;

/// Handshake options, their replies, commands, their flags and error numbers, by number.
pub mod wire {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const PEEK: u32 = 4;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META: u32 = 9;
    pub const SET_META: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;

    pub const REP_ACK: u32 = 1;
    pub const REP_SERVER: u32 = 2;
    pub const REP_INFO: u32 = 3;
    pub const REP_META: u32 = 4;
    const REP_ERROR: u32 = 1 << 31;
    pub const UNSUP: u32 = REP_ERROR + 1;
    pub const POLICY: u32 = REP_ERROR + 2;
    pub const INVALID: u32 = REP_ERROR + 3;
    pub const TLS_REQD: u32 = REP_ERROR + 5;
    pub const UNKNOWN: u32 = REP_ERROR + 6;
    pub const SHUTDOWN: u32 = REP_ERROR + 7;
    pub const TOO_BIG: u32 = REP_ERROR + 9;
    pub const EXT_HEADER_REQD: u32 = REP_ERROR + 10;

    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const ZEROES: u16 = 6;
    pub const STATUS: u16 = 7;
    pub const RESIZE: u16 = 8;

    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 2;
    pub const DF: u16 = 4;
    pub const REQ_ONE: u16 = 8;
    pub const FAST_ZERO: u16 = 16;
    pub const PAYLOAD_LEN: u16 = 32;

    pub const EPERM: u32 = 1;
    pub const EINVAL: u32 = 22;
    pub const ENOSPC: u32 = 28;
    pub const EOVERFLOW: u32 = 75;
    pub const ENOTSUP: u32 = 95;
    pub const ESHUTDOWN: u32 = 108;
}

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Address {
    /// `HOST:PORT`.
    Tcp(String),
    Unix(PathBuf),
}

/// An export and the way to it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    pub at: Address,
    pub export: String,
}

impl Endpoint {
    #[must_use]
    pub fn new(at: Address, export: &str) -> Self {
        let export = export.to_owned();
        Self { at, export }
    }

    /// The URI that libnbd and QEMU understand.
    #[must_use]
    pub fn uri(&self) -> String {
        match &self.at {
            Address::Tcp(address) => format!("nbd://{address}/{}", self.export),
            Address::Unix(path) => {
                format!("nbd+unix:///{}?socket={}", self.export, path.display())
            }
        }
    }

    /// # Errors
    /// Nobody listens there.
    pub fn connect(&self) -> io::Result<Box<dyn Stream>> {
        match &self.at {
            Address::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(SILENCE))?;
                stream.set_write_timeout(Some(SILENCE))?;
                Ok(Box::new(stream))
            }
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(SILENCE))?;
                stream.set_write_timeout(Some(SILENCE))?;
                Ok(Box::new(stream))
            }
        }
    }
}

pub trait Stream: Read + Write + Send + Debug {}
impl<T: Read + Write + Send + Debug> Stream for T {}

/// The form of requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Simple,
    Structured,
    Extended,
}

impl Mode {
    pub const ALL: [Self; 3] = [Self::Simple, Self::Structured, Self::Extended];
}

/// A request as it was sent.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    pub kind: u16,
    pub flags: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len_bytes: u64,
}

/// One option reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionReply {
    pub kind: u32,
    pub data: Vec<u8>,
}

impl OptionReply {
    /// Whether nothing more follows to the same option.
    #[must_use]
    pub fn is_final(&self) -> bool {
        self.kind == wire::REP_ACK || self.kind >> 31 == 1
    }
}

/// What INFO and GO say of an export.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExportFacts {
    pub size_bytes: u64,
    pub flags: u16,
    pub name: Option<String>,
    pub description: Option<String>,
    /// Minimum, preferred and maximum.
    pub block_bytes: Option<[u32; 3]>,
}

/// A connection in any state.
#[derive(Debug)]
pub struct RawNbd {
    pub stream: Box<dyn Stream>,
    pub mode: Mode,
    cookie: u64,
}

impl RawNbd {
    /// Connects, takes the greeting and sends these client flags.
    #[must_use]
    pub fn greeted(endpoint: &Endpoint, flags: u32) -> Self {
        Self::try_greeted(endpoint, flags).unwrap()
    }

    /// # Errors
    /// Nobody listens, or the server closes instead of greeting.
    pub fn try_greeted(endpoint: &Endpoint, flags: u32) -> io::Result<Self> {
        Self::greeted_over(endpoint.connect()?, flags)
    }

    /// # Errors
    /// The server closes instead of greeting.
    pub fn greeted_over(stream: Box<dyn Stream>, flags: u32) -> io::Result<Self> {
        let mut raw = Self {
            stream,
            mode: Mode::Simple,
            cookie: 0x5eed_c00c_1e00_0000,
        };
        let mut greeting = [0; 18];
        raw.stream.read_exact(&mut greeting)?;
        assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
        let offered = u16::from_be_bytes([greeting[16], greeting[17]]);
        assert_eq!(offered & 1, 1, "FIXED_NEWSTYLE must be offered");
        raw.stream.write_all(&flags.to_be_bytes())?;
        Ok(raw)
    }

    /// Opens the export in a mode, with what was said of it.
    #[must_use]
    pub fn opened(endpoint: &Endpoint, mode: Mode) -> Self {
        Self::opened_with(endpoint, mode, &[]).0
    }

    /// Opens the export in a mode with these contexts; the ids that they got, in order.
    #[must_use]
    pub fn opened_with(endpoint: &Endpoint, mode: Mode, contexts: &[&str]) -> (Self, Vec<u32>) {
        let mut raw = Self::greeted(endpoint, 3);
        raw.agree(mode);
        let selected = match contexts {
            [] => vec![],
            _ => raw.contexts(wire::SET_META, &endpoint.export, contexts),
        };
        raw.go(&endpoint.export);
        (raw, selected.into_iter().map(|(id, _)| id).collect())
    }

    /// Negotiates a mode.
    pub fn agree(&mut self, mode: Mode) {
        let option = match mode {
            Mode::Simple => return,
            Mode::Structured => wire::STRUCTURED_REPLY,
            Mode::Extended => wire::EXTENDED_HEADERS,
        };
        assert_eq!(self.option(option, b""), wire::REP_ACK, "{mode:?}");
        self.mode = mode;
    }

    /// GO without asking for anything.
    pub fn go(&mut self, export: &str) -> ExportFacts {
        self.facts(wire::GO, export, &[])
    }

    /// INFO or GO that must succeed, and what it says.
    pub fn facts(&mut self, option: u32, export: &str, items: &[u16]) -> ExportFacts {
        let replies = self.option_replies(option, &info_payload(export.as_bytes(), items));
        let (last, infos) = replies.split_last().unwrap();
        assert_eq!(last.kind, wire::REP_ACK, "option {option} of {export:?}");
        reply::export_facts(infos)
    }

    /// LIST_META or SET_META that must succeed: ids and names.
    pub fn contexts(&mut self, option: u32, export: &str, queries: &[&str]) -> Vec<(u32, String)> {
        let queries: Vec<&[u8]> = queries.iter().map(|query| query.as_bytes()).collect();
        let replies = self.option_replies(option, &meta_payload(export.as_bytes(), &queries));
        let (last, found) = replies.split_last().unwrap();
        assert_eq!(last.kind, wire::REP_ACK, "option {option} with {queries:?}");
        found.iter().map(reply::context).collect()
    }

    pub fn send_option(&mut self, option: u32, data: &[u8]) {
        self.try_send_option(option, data).unwrap();
    }

    /// # Errors
    /// The connection is closed.
    pub fn try_send_option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let head = option_head(option, u32::try_from(data.len()).unwrap());
        self.stream.write_all(&[&head, data].concat())
    }

    /// All replies to an option; the last one is final.
    pub fn option_replies(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.send_option(option, data);
        let mut replies = vec![self.option_reply(option)];
        while !replies.last().is_some_and(OptionReply::is_final) {
            replies.push(self.option_reply(option));
        }
        replies
    }

    /// Type of the final reply to an option.
    pub fn option(&mut self, option: u32, data: &[u8]) -> u32 {
        self.option_replies(option, data).last().unwrap().kind
    }

    /// The next option reply. An error carries a text for humans.
    pub fn option_reply(&mut self, option: u32) -> OptionReply {
        let head = self.take(20);
        assert_eq!(be64(&head[..8]), OPTION_REPLY_MAGIC);
        assert_eq!(be32(&head[8..12]), option, "a reply to another option");
        let reply = OptionReply {
            kind: be32(&head[12..16]),
            data: self.take(be32(&head[16..]) as usize),
        };
        if reply.kind >> 31 == 1 {
            let text = std::str::from_utf8(&reply.data).unwrap();
            assert!(!text.is_empty(), "option {option}: an error without text");
            assert!(text.len() <= 4096);
        }
        reply
    }

    /// Exactly so many bytes.
    pub fn take(&mut self, len_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes];
        let taken = self.stream.read_exact(&mut bytes);
        taken.unwrap_or_else(|error| panic!("{len_bytes} bytes of a reply: {error}"));
        bytes
    }

    /// Sends a request with its payload; WRITE says PAYLOAD_LEN where the mode wants it.
    ///
    /// # Errors
    /// The connection is closed.
    pub fn try_send(
        &mut self,
        kind: u16,
        flags: u16,
        offset: u64,
        len_bytes: u64,
        payload: &[u8],
    ) -> io::Result<Asked> {
        let needed = match (self.mode, kind) {
            (Mode::Extended, wire::WRITE) => wire::PAYLOAD_LEN,
            _ => 0,
        };
        self.try_send_exactly(kind, flags | needed, offset, len_bytes, payload)
    }

    /// Sends a request with exactly these flags.
    ///
    /// # Errors
    /// The connection is closed.
    pub fn try_send_exactly(
        &mut self,
        kind: u16,
        flags: u16,
        offset: u64,
        len_bytes: u64,
        payload: &[u8],
    ) -> io::Result<Asked> {
        self.cookie += 1;
        let asked = Asked {
            kind,
            flags,
            cookie: self.cookie,
            offset,
            len_bytes,
        };
        self.stream.write_all(&asked.bytes(self.mode))?;
        self.stream.write_all(payload)?;
        Ok(asked)
    }

    pub fn send(&mut self, kind: u16, flags: u16, offset: u64, len_bytes: u64) -> Asked {
        self.try_send(kind, flags, offset, len_bytes, b"").unwrap()
    }

    /// A request without payload and the reply to it.
    pub fn ask(&mut self, kind: u16, flags: u16, offset: u64, len_bytes: u64) -> Reply {
        let asked = self.send(kind, flags, offset, len_bytes);
        self.reply(&asked)
    }

    /// Data that must be there.
    pub fn read(&mut self, offset: u64, len_bytes: u64) -> Vec<u8> {
        let reply = self.ask(wire::READ, 0, offset, len_bytes);
        assert_eq!(reply.errno, 0, "read at {offset}: {}", reply.text);
        reply.data
    }

    /// Error number of a WRITE.
    pub fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        let len_bytes = data.len() as u64;
        let asked = self.try_send(wire::WRITE, flags, offset, len_bytes, data);
        self.reply(&asked.unwrap()).errno
    }

    /// The whole reply to a request, which must be the next one, in its prescribed form.
    pub fn reply(&mut self, asked: &Asked) -> Reply {
        reply::receive(&mut self.stream, self.mode, asked)
    }

    /// Whether the server closes now, without another word.
    #[must_use]
    pub fn is_closed(&mut self) -> bool {
        match self.stream.read(&mut [0]) {
            Ok(0) => true,
            Ok(_) => false,
            // Closing with unread bytes shows as a reset.
            Err(error) if error.kind() == ErrorKind::ConnectionReset => true,
            Err(error) => panic!("the server neither answers nor closes: {error}"),
        }
    }
}

impl Asked {
    /// The request on the wire, without payload.
    #[must_use]
    pub fn bytes(&self, mode: Mode) -> Vec<u8> {
        let magic = match mode {
            Mode::Extended => EXTENDED_REQUEST_MAGIC,
            _ => REQUEST_MAGIC,
        };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend(self.flags.to_be_bytes());
        bytes.extend(self.kind.to_be_bytes());
        bytes.extend(self.cookie.to_be_bytes());
        bytes.extend(self.offset.to_be_bytes());
        match mode {
            Mode::Extended => bytes.extend(self.len_bytes.to_be_bytes()),
            _ => bytes.extend(u32::try_from(self.len_bytes).unwrap().to_be_bytes()),
        }
        bytes
    }
}

/// Takes the reply to a request from bytes that were received already.
#[must_use]
pub fn receive(mut bytes: Box<dyn Stream>, mode: Mode, asked: &Asked) -> Reply {
    reply::receive(&mut bytes, mode, asked)
}

/// Head of an option with any length.
#[must_use]
pub fn option_head(option: u32, len_bytes: u32) -> Vec<u8> {
    let parts = [option.to_be_bytes(), len_bytes.to_be_bytes()];
    [&b"IHAVEOPT"[..], &parts[0], &parts[1]].concat()
}

/// Payload of INFO and GO.
#[must_use]
pub fn info_payload(name: &[u8], items: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend(u16::try_from(items.len()).unwrap().to_be_bytes());
    data.extend(items.iter().flat_map(|item| item.to_be_bytes()));
    data
}

/// Payload of LIST_META and SET_META.
#[must_use]
pub fn meta_payload(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = string(name);
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query)));
    data
}

fn string(text: &[u8]) -> Vec<u8> {
    let len_bytes = u32::try_from(text.len()).unwrap();
    [&len_bytes.to_be_bytes(), text].concat()
}

fn be16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes(bytes.try_into().unwrap())
}

fn be32(bytes: &[u8]) -> u32 {
    u32::from_be_bytes(bytes.try_into().unwrap())
}

fn be64(bytes: &[u8]) -> u64 {
    u64::from_be_bytes(bytes.try_into().unwrap())
}
