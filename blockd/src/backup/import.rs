//! A stream in the RBD diff format to a volume (S003-31).
//!
//! A volume is changed only after the stream's head and the volume's base are found to fit. What is
//! wrong behind the head is found when it comes: then the error says that the volume is partly
//! changed, and a volume that was made for the stream is deleted again.

use super::PIECES_IN_FLIGHT;
use super::base::check_base;
use super::error::BackupError;
use super::rbd::{Head, Reader, Record, StreamError, StreamErrorKind};
use crate::admin::{
    AdminError, AdminErrorKind, AdminReply, AdminRequest, SnapshotName, VolumeCreate,
};
use crate::client::{Client, ClientError, Volume};
use crate::id::{BLOCK_BYTES, DEFAULT_PAGE_BLOCKS};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::io::Read;
use tokio::sync::mpsc;

/// Where a stream goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImportTarget {
    /// A volume that has what the stream rests on.
    Existing { volume: String, allow_shrink: bool },
    /// A volume that is made for a full stream.
    New(String),
}

impl ImportTarget {
    fn volume(&self) -> &str {
        match self {
            Self::Existing { volume, .. } | Self::New(volume) => volume,
        }
    }
}

/// What an import has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    pub head: Head,
    pub size_bytes: u64,
    pub data_bytes: u64,
    pub zero_bytes: u64,
}

/// What the reader's thread finds in the stream.
enum Found {
    Head(Head),
    Data(u64, Bytes),
    Zero(u64, u64),
    End,
}

type Stream = mpsc::Receiver<Result<(Found, u64), StreamError>>;

/// Reads the stream into the target; `progress` gets the bytes of the stream that are read.
///
/// # Errors
/// The stream does not fit the target or is damaged, or the servers.
pub async fn import(
    client: &Client,
    target: &ImportTarget,
    input: impl Read + Send + 'static,
    progress: impl Fn(u64),
) -> Result<Imported, BackupError> {
    let mut stream = read_ahead(input);
    let head = match next(&mut stream).await? {
        (Found::Head(head), _) => head,
        _ => return BackupError::refused("the stream has no head".to_owned()),
    };
    let volume = prepare(client, target, &head).await?;
    let imported = fill(client, &volume, target, &head, stream, progress).await;
    match imported {
        Ok(imported) => Ok(imported),
        Err(error) => Err(after_failure(client, target, &head, error).await),
    }
}

/// A thread that reads and checks: a slow writer of a pipe stops nothing else.
fn read_ahead(input: impl Read + Send + 'static) -> Stream {
    let (sender, receiver) = mpsc::channel(PIECES_IN_FLIGHT);
    std::thread::spawn(move || {
        let give = |found| sender.blocking_send(found).is_ok();
        if let Err(error) = read_all(input, &give) {
            give(Err(error));
        }
    });
    receiver
}

/// Gives away what the stream has, until that is no longer wanted.
fn read_all(
    input: impl Read,
    give: &impl Fn(Result<(Found, u64), StreamError>) -> bool,
) -> Result<(), StreamError> {
    let (mut reader, head) = Reader::open(input)?;
    let mut wanted = give(Ok((Found::Head(head), reader.at_bytes())));
    while wanted {
        wanted = match reader.record()? {
            Record::End => {
                give(Ok((Found::End, reader.at_bytes())));
                return Ok(());
            }
            Record::Zero {
                offset_bytes,
                len_bytes,
            } => give(Ok((
                Found::Zero(offset_bytes, len_bytes),
                reader.at_bytes(),
            ))),
            Record::Data { offset_bytes, .. } => {
                let mut at = offset_bytes;
                let mut wanted = true;
                while wanted && let Some(piece) = reader.data()? {
                    let next = at.saturating_add(piece.len() as u64);
                    wanted = give(Ok((Found::Data(at, piece), reader.at_bytes())));
                    at = next;
                }
                wanted
            }
        };
    }
    Ok(())
}

async fn next(stream: &mut Stream) -> Result<(Found, u64), BackupError> {
    match stream.recv().await {
        Some(found) => Ok(found?),
        None => Err(BackupError::Io {
            what: "reading the stream",
            source: std::io::Error::other("the reader stopped"),
        }),
    }
}

/// Opens the target, which fits the head, with the size that the head wants.
async fn prepare(
    client: &Client,
    target: &ImportTarget,
    head: &Head,
) -> Result<Volume, BackupError> {
    if let Some(size_bytes) = head.size_bytes
        && !size_bytes.is_multiple_of(BLOCK_BYTES)
    {
        let text = format!(
            "the stream is of a volume of {size_bytes} bytes, which is no multiple of {BLOCK_BYTES}"
        );
        return BackupError::refused(text);
    }
    match target {
        ImportTarget::New(name) => create(client, name, head).await,
        ImportTarget::Existing {
            volume,
            allow_shrink,
        } => {
            let volume = client.open(volume).await?;
            check_free(&volume, head).await?;
            check_base(client, &volume, head.from.as_deref()).await?;
            resize(client, &volume, head, *allow_shrink).await?;
            Ok(volume)
        }
    }
}

async fn create(client: &Client, name: &str, head: &Head) -> Result<Volume, BackupError> {
    if let Some(from) = &head.from {
        return BackupError::refused(format!(
            "the stream rests on a snapshot {from:?}: import it into the volume that has it, \
             without --create"
        ));
    }
    let Some(size_bytes) = head.size_bytes else {
        return BackupError::refused("the stream does not say how large the volume is".to_owned());
    };
    let create = AdminRequest::VolumeCreate(VolumeCreate {
        name: name.to_owned(),
        size_bytes,
        servers: Vec::new(),
        page_blocks: DEFAULT_PAGE_BLOCKS,
        format: None,
    });
    client.admin(create).await?;
    Ok(client.open(name).await?)
}

/// The snapshot that the stream shows must not be there yet.
async fn check_free(volume: &Volume, head: &Head) -> Result<(), BackupError> {
    let Some(to) = &head.to else {
        return Ok(());
    };
    match volume.since(to).await {
        Err(ClientError::Refused(refusal)) if refusal.kind == AdminErrorKind::NotFound => Ok(()),
        Err(error) => Err(error.into()),
        Ok(_) => {
            let name = volume.name();
            let text = format!("{name}@{to} is there already: the stream is imported");
            Err(ClientError::Refused(AdminError {
                kind: AdminErrorKind::Exists,
                message: text,
            })
            .into())
        }
    }
}

async fn resize(
    client: &Client,
    volume: &Volume,
    head: &Head,
    allow_shrink: bool,
) -> Result<(), BackupError> {
    let (now, name) = (volume.size_bytes(), volume.name());
    let Some(size_bytes) = head.size_bytes.filter(|size| *size != now) else {
        return Ok(());
    };
    client
        .admin(AdminRequest::VolumeResize {
            name: name.to_owned(),
            size_bytes,
            allow_shrink,
        })
        .await?;
    Ok(volume.refresh().await?)
}

/// Applies the body, makes it durable and takes the snapshot that the stream shows.
async fn fill(
    client: &Client,
    volume: &Volume,
    target: &ImportTarget,
    head: &Head,
    mut stream: Stream,
    progress: impl Fn(u64),
) -> Result<Imported, BackupError> {
    let mut imported = Imported {
        head: head.clone(),
        size_bytes: volume.size_bytes(),
        data_bytes: 0,
        zero_bytes: 0,
    };
    let mut changes = ChangesInOrder::new(volume);
    loop {
        let (found, at_bytes) = next(&mut stream).await?;
        match found {
            Found::End => break,
            Found::Data(offset, data) => {
                imported.data_bytes += data.len() as u64;
                changes.data(offset, data, at_bytes).await?;
            }
            Found::Zero(offset, len) => {
                imported.zero_bytes = imported.zero_bytes.saturating_add(len);
                changes.zero(offset, len, at_bytes).await?;
            }
            Found::Head(_) => {}
        }
        progress(at_bytes);
    }
    changes.finish().await?;
    volume.flush().await?;
    if let Some(to) = &head.to {
        take_snapshot(client, target.volume(), to).await?;
    }
    Ok(imported)
}

pub(super) async fn take_snapshot(
    client: &Client,
    volume: &str,
    snapshot: &str,
) -> Result<(), ClientError> {
    let targets = vec![SnapshotName {
        volume: volume.to_owned(),
        snapshot: snapshot.to_owned(),
    }];
    match client
        .admin(AdminRequest::SnapshotCreate { targets })
        .await?
    {
        AdminReply::Refused(refusal) => Err(refusal.into()),
        _ => Ok(()),
    }
}

async fn after_failure(
    client: &Client,
    target: &ImportTarget,
    head: &Head,
    error: BackupError,
) -> BackupError {
    let aftermath = match target {
        ImportTarget::New(name) => delete_again(client, name).await,
        ImportTarget::Existing { volume, .. } => match &head.from {
            Some(from) => format!(
                "volume {volume} has a part of the stream: `blockctl snapshot rollback \
                 {volume}@{from}` before another try"
            ),
            None => format!("volume {volume} has a part of the stream: delete it, or trim it"),
        },
    };
    BackupError::Partly {
        source: Box::new(error),
        aftermath,
    }
}

/// A volume that was made for a stream that failed.
pub(super) async fn delete_again(client: &Client, name: &str) -> String {
    let delete = AdminRequest::VolumeDelete {
        name: name.to_owned(),
    };
    match client.admin(delete).await {
        Ok(_) => format!("volume {name} was deleted again"),
        Err(error) => format!(
            "volume {name} is incomplete and could not be deleted again ({error}): \
             `blockctl volume delete {name} --force`"
        ),
    }
}

/// Changes of a volume, several at once; those that may overlap one after the other.
pub(super) struct ChangesInOrder<'a> {
    volume: &'a Volume,
    running: FuturesUnordered<BoxFuture<'a, Result<(), ClientError>>>,
    /// What runs lies below this byte.
    end: u64,
}

impl<'a> ChangesInOrder<'a> {
    pub(super) fn new(volume: &'a Volume) -> Self {
        Self {
            volume,
            running: FuturesUnordered::new(),
            end: 0,
        }
    }

    pub(super) async fn data(
        &mut self,
        offset: u64,
        data: Bytes,
        at_bytes: u64,
    ) -> Result<(), BackupError> {
        let len = data.len() as u64;
        self.make_room(offset, len, at_bytes).await?;
        let volume = self.volume;
        self.running.push(match data.iter().all(|byte| *byte == 0) {
            true => Box::pin(volume.zero(offset, len, false)),
            false => Box::pin(volume.write(offset, data)),
        });
        Ok(())
    }

    pub(super) async fn zero(
        &mut self,
        offset: u64,
        len: u64,
        at_bytes: u64,
    ) -> Result<(), BackupError> {
        self.make_room(offset, len, at_bytes).await?;
        if len > 0 {
            let zero = self.volume.zero(offset, len, false);
            self.running.push(Box::pin(zero));
        }
        Ok(())
    }

    /// Waits until a change of this range, found at this byte of its stream, may begin.
    async fn make_room(&mut self, offset: u64, len: u64, at_bytes: u64) -> Result<(), BackupError> {
        let end_bytes = self.volume.size_bytes();
        let end = offset.checked_add(len).filter(|end| *end <= end_bytes);
        let Some(end) = end else {
            let kind = StreamErrorKind::Beyond {
                offset_bytes: offset,
                len_bytes: len,
                end_bytes,
            };
            return Err(StreamError { at_bytes, kind }.into());
        };
        let most = match offset < self.end {
            true => 0,
            false => PIECES_IN_FLIGHT - 1,
        };
        while self.running.len() > most
            && let Some(done) = self.running.next().await
        {
            done?;
        }
        self.end = self.end.max(end);
        Ok(())
    }

    pub(super) async fn finish(mut self) -> Result<(), ClientError> {
        while let Some(done) = self.running.next().await {
            done?;
        }
        Ok(())
    }
}
