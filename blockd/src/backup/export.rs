//! A snapshot, or what changed between two, to a stream in the RBD diff format (S003-31, S003-32).

use super::diff::{Changed, Changes};
use super::error::BackupError;
use super::rbd::{DiffFormat, Head, Record, encode_head, encode_record};
use super::{PIECES_IN_FLIGHT, pieces};
use crate::client::{ClientError, Since, Volume};
use bytes::Bytes;
use futures_util::stream::{self, Stream, TryStreamExt};
use std::io::Write;
use std::pin::pin;
use tokio::sync::{mpsc, oneshot};

/// What an export has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    pub data_bytes: u64,
    pub zero_bytes: u64,
    /// Bytes of the whole stream.
    pub stream_bytes: u64,
}

/// What the stream says of a part of the volume.
pub(super) enum Piece {
    Zero(Changed),
    Data(u64, Bytes),
}

impl Piece {
    /// The offset behind it.
    pub(super) fn end(&self) -> u64 {
        match self {
            Self::Zero(range) => range.end(),
            Self::Data(offset, data) => offset + data.len() as u64,
        }
    }

    fn record(&self) -> Record {
        match self {
            Self::Zero(range) => Record::Zero {
                offset_bytes: range.offset_bytes,
                len_bytes: range.len_bytes,
            },
            Self::Data(offset_bytes, data) => Record::Data {
                offset_bytes: *offset_bytes,
                len_bytes: data.len() as u64,
            },
        }
    }

    /// The record with its data.
    pub(super) fn encode(self, format: DiffFormat) -> [Bytes; 2] {
        let record = Bytes::from(encode_record(format, self.record()));
        match self {
            Self::Zero(_) => [record, Bytes::new()],
            Self::Data(_, data) => [record, data],
        }
    }
}

/// The changed ranges with their data, read ahead, in order.
pub(super) fn read_changes<'a>(
    volume: &'a Volume,
    changes: Changes<'a>,
) -> impl Stream<Item = Result<Piece, ClientError>> + 'a {
    let ranges = stream::try_unfold(changes, async |mut changes| {
        Ok::<_, ClientError>(changes.next().await?.map(|range| (range, changes)))
    });
    read_ranges(volume, ranges)
}

/// Ranges with their data, read ahead, in order.
pub(super) fn read_ranges<'a>(
    volume: &'a Volume,
    ranges: impl Stream<Item = Result<Changed, ClientError>> + 'a,
) -> impl Stream<Item = Result<Piece, ClientError>> + 'a {
    let wanted = ranges.map_ok(|range| stream::iter(wanted(range).map(Ok)));
    let reads = wanted.try_flatten().map_ok(move |(range, len)| async move {
        if range.zero {
            return Ok(Piece::Zero(range));
        }
        let data = volume.read(range.offset_bytes, len).await?;
        Ok(Piece::Data(range.offset_bytes, data))
    });
    reads.try_buffered(PIECES_IN_FLIGHT)
}

/// Zeros are one piece; data is cut.
fn wanted(range: Changed) -> impl Iterator<Item = (Changed, u32)> {
    let zeros = range.zero.then_some((range, 0));
    let data = (!range.zero).then(|| pieces(range.offset_bytes, range.len_bytes));
    let data = data.into_iter().flatten().map(move |(offset_bytes, len)| {
        let piece = Changed {
            offset_bytes,
            len_bytes: u64::from(len),
            zero: false,
        };
        (piece, len)
    });
    zeros.into_iter().chain(data)
}

/// Writes the snapshot `volume`, or what changed since its snapshot `from`, to `out`; `progress` gets
/// the bytes of the volume that are done.
///
/// # Errors
/// The servers, or `out`; what was written then is incomplete and a reader notices.
pub async fn export(
    volume: &Volume,
    from: Option<&str>,
    format: DiffFormat,
    out: impl Write + Send + 'static,
    progress: impl Fn(u64),
) -> Result<Exported, BackupError> {
    let since = since(volume, from).await?;
    let mut sink = Sink::start(out);
    let head = Head {
        from: from.map(str::to_owned),
        to: volume
            .name()
            .split_once('@')
            .map(|(_, name)| name.to_owned()),
        size_bytes: Some(volume.size_bytes()),
    };
    sink.put(encode_head(format, &head).into()).await?;
    let mut exported = Exported::default();
    let mut reads = pin!(read_changes(volume, Changes::new(volume, since)));
    while let Some(piece) = reads.try_next().await? {
        match &piece {
            Piece::Zero(range) => exported.zero_bytes += range.len_bytes,
            Piece::Data(_, data) => exported.data_bytes += data.len() as u64,
        }
        let end = piece.end();
        for bytes in piece.encode(format) {
            sink.put(bytes).await?;
        }
        progress(end);
    }
    sink.put(encode_record(format, Record::End).into()).await?;
    exported.stream_bytes = sink.finish().await?;
    Ok(exported)
}

/// The snapshot `from` of the volume, to compare with.
///
/// # Errors
/// There is none of this name, or it is the volume's own.
pub(super) async fn since(
    volume: &Volume,
    from: Option<&str>,
) -> Result<Option<Since>, BackupError> {
    let Some(from) = from else {
        return Ok(None);
    };
    if volume
        .name()
        .split_once('@')
        .is_some_and(|(_, to)| to == from)
    {
        let text = format!("nothing changes from {from} to {from}: name an older snapshot");
        return BackupError::refused(text);
    }
    Ok(Some(volume.since(from).await?))
}

/// A thread that writes: a slow reader of a pipe does not stop the connections to the servers.
pub(super) struct Sink {
    bytes: mpsc::Sender<Bytes>,
    ended: oneshot::Receiver<std::io::Result<u64>>,
}

impl Sink {
    pub(super) fn start(mut out: impl Write + Send + 'static) -> Self {
        let (bytes, mut taken) = mpsc::channel::<Bytes>(2 * PIECES_IN_FLIGHT);
        let (end, ended) = oneshot::channel();
        std::thread::spawn(move || {
            let mut write_all = || {
                let mut total = 0;
                while let Some(bytes) = taken.blocking_recv() {
                    out.write_all(&bytes)?;
                    total += bytes.len() as u64;
                }
                out.flush().map(|()| total)
            };
            let written = write_all();
            drop(taken);
            end.send(written)
        });
        Self { bytes, ended }
    }

    pub(super) async fn put(&mut self, bytes: Bytes) -> Result<(), BackupError> {
        if bytes.is_empty() || self.bytes.send(bytes).await.is_ok() {
            return Ok(());
        }
        Err(failed((&mut self.ended).await))
    }

    /// Bytes written, once they all are.
    pub(super) async fn finish(self) -> Result<u64, BackupError> {
        drop(self.bytes);
        match self.ended.await {
            Ok(Ok(bytes)) => Ok(bytes),
            ended => Err(failed(ended)),
        }
    }
}

fn failed(ended: Result<std::io::Result<u64>, oneshot::error::RecvError>) -> BackupError {
    let source = match ended {
        Ok(Err(source)) => source,
        Ok(Ok(_)) | Err(_) => std::io::Error::other("the writer stopped"),
    };
    BackupError::Io {
        what: "writing the stream",
        source,
    }
}
