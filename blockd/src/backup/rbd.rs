//! The RBD diff format, v1 and v2, of Ceph's document "RBD Incremental Backup" (`dev/rbd-diff`):
//! what `rbd export-diff` writes and `rbd import-diff` and `rbd merge-diff` read. All integers are
//! little-endian.
//!
//! ```text
//! banner   "rbd diff v1\n" or "rbd diff v2\n"
//! head     f  u32 length, name       snapshot on which the stream rests; not in a full one
//!          t  u32 length, name       snapshot that it shows; not in one of a head
//!          s  u64 size in bytes
//! body     w  u64 offset, u64 length, data
//!          z  u64 offset, u64 length
//! end      e
//! ```
//!
//! Each record begins with its letter. In v2 every letter but `e` is followed by a u64, the bytes of
//! the record behind it, so that a reader can pass over records that it does not know.

use super::PIECE_BYTES;
use bytes::Bytes;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};

const BANNER_BYTES: usize = 12;
/// Bytes of a snapshot's name that are read at all; ours are shorter, RBD's as a file name.
const NAME_BYTES_MAX: u32 = 4096;

/// The versions of the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiffFormat {
    /// What `rbd export-diff` writes.
    V1,
    /// With the length of each record in front of it; what `rbd import-diff` reads, too.
    V2,
}

impl DiffFormat {
    fn banner(self) -> &'static [u8; BANNER_BYTES] {
        match self {
            Self::V1 => b"rbd diff v1\n",
            Self::V2 => b"rbd diff v2\n",
        }
    }
}

/// What stands in front of the data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Head {
    /// Snapshot on which the stream rests; `None`: a full one.
    pub from: Option<String>,
    /// Snapshot that the stream shows; `None`: it was no snapshot.
    pub to: Option<String>,
    /// Size of the volume at the end.
    pub size_bytes: Option<u64>,
}

/// A record of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Record {
    /// So many bytes of data follow; [`Reader::data`] gives them.
    Data { offset_bytes: u64, len_bytes: u64 },
    /// Reads as zeros.
    Zero { offset_bytes: u64, len_bytes: u64 },
    /// Nothing comes behind it.
    End,
}

/// What is wrong with a stream, and where.
#[derive(Debug, thiserror::Error)]
#[error("byte {at_bytes} of the stream: {kind}")]
pub struct StreamError {
    pub at_bytes: u64,
    pub kind: StreamErrorKind,
}

/// What is wrong with a stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamErrorKind {
    #[error("this is no RBD diff: it does not begin with \"rbd diff v1\" or \"rbd diff v2\"")]
    Banner,
    #[error("it ends here, without its end record: it is incomplete")]
    Truncated,
    #[error("a name of {0} bytes: {NAME_BYTES_MAX} are possible")]
    NameTooLong(u32),
    #[error("a name that is no UTF-8 text")]
    NameNotText,
    #[error("record {0:?} comes twice")]
    Twice(char),
    #[error("record {0:?} is unknown")]
    Unknown(char),
    #[error("record {0:?} stands behind the first data")]
    Misplaced(char),
    #[error("record {0:?} says that it has {1} bytes, which cannot be")]
    Length(char, u64),
    #[error("{len_bytes} bytes at {offset_bytes} lie beyond the end of the volume, {end_bytes}")]
    Beyond {
        offset_bytes: u64,
        len_bytes: u64,
        end_bytes: u64,
    },
    #[error("there is more behind the end record")]
    Trailing,
    #[error("{0}")]
    Io(std::io::Error),
}

/// The banner and the head, as bytes.
#[must_use]
pub(super) fn encode_head(format: DiffFormat, head: &Head) -> Vec<u8> {
    let mut out = format.banner().to_vec();
    for (tag, name) in [(b'f', &head.from), (b't', &head.to)] {
        if let Some(name) = name {
            let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
            begin(&mut out, format, tag, 4 + u64::from(len));
            out.extend_from_slice(&len.to_le_bytes());
            out.extend_from_slice(name.as_bytes());
        }
    }
    if let Some(size_bytes) = head.size_bytes {
        begin(&mut out, format, b's', 8);
        out.extend_from_slice(&size_bytes.to_le_bytes());
    }
    out
}

/// A record without the data that follows it.
#[must_use]
pub(super) fn encode_record(format: DiffFormat, record: Record) -> Vec<u8> {
    let mut out = Vec::new();
    let (tag, offset_bytes, len_bytes, data_bytes) = match record {
        Record::Data {
            offset_bytes,
            len_bytes,
        } => (b'w', offset_bytes, len_bytes, len_bytes),
        Record::Zero {
            offset_bytes,
            len_bytes,
        } => (b'z', offset_bytes, len_bytes, 0),
        Record::End => return vec![b'e'],
    };
    begin(&mut out, format, tag, 16 + data_bytes);
    out.extend_from_slice(&offset_bytes.to_le_bytes());
    out.extend_from_slice(&len_bytes.to_le_bytes());
    out
}

fn begin(out: &mut Vec<u8>, format: DiffFormat, tag: u8, record_bytes: u64) {
    out.push(tag);
    if format == DiffFormat::V2 {
        out.extend_from_slice(&record_bytes.to_le_bytes());
    }
}

/// Reads a stream record by record. Nothing of it is trusted: no length allocates memory beyond
/// [`PIECE_BYTES`].
pub struct Reader<R> {
    input: R,
    format: DiffFormat,
    /// Bytes read so far.
    at: u64,
    /// The first letter of the body, once it has been seen behind the head.
    first: Option<u8>,
    /// Bytes of the current record's data that have not been read.
    left: u64,
}

impl<R: Read> Reader<R> {
    /// Reads the banner and the head.
    ///
    /// # Errors
    /// It is no RBD diff, or ends, or its head is malformed.
    pub fn open(input: R) -> Result<(Self, Head), StreamError> {
        let mut reader = Self {
            input,
            format: DiffFormat::V1,
            at: 0,
            first: None,
            left: 0,
        };
        let banner: [u8; BANNER_BYTES] = reader.array().map_err(|error| match error.kind {
            StreamErrorKind::Truncated => reader.wrong(StreamErrorKind::Banner),
            _ => error,
        })?;
        let formats = [DiffFormat::V1, DiffFormat::V2];
        let format = formats.into_iter().find(|f| *f.banner() == banner);
        reader.format = format.ok_or_else(|| reader.wrong(StreamErrorKind::Banner))?;
        let head = reader.head()?;
        Ok((reader, head))
    }

    /// Bytes read so far.
    pub fn at_bytes(&self) -> u64 {
        self.at
    }

    fn head(&mut self) -> Result<Head, StreamError> {
        let mut head = Head::default();
        loop {
            let tag = self.byte()?;
            match tag {
                b'f' => head.from = Some(self.name(tag, head.from.is_some())?),
                b't' => head.to = Some(self.name(tag, head.to.is_some())?),
                b's' => {
                    self.once(tag, head.size_bytes.is_some())?;
                    self.length(tag, 8, 8)?;
                    head.size_bytes = Some(u64::from_le_bytes(self.array()?));
                }
                _ => {
                    self.first = Some(tag);
                    return Ok(head);
                }
            }
        }
    }

    fn name(&mut self, tag: u8, twice: bool) -> Result<String, StreamError> {
        self.once(tag, twice)?;
        let record = self.length(tag, 4, 4 + u64::from(NAME_BYTES_MAX))?;
        let len = u32::from_le_bytes(self.array()?);
        if len > NAME_BYTES_MAX {
            return Err(self.wrong(StreamErrorKind::NameTooLong(len)));
        }
        if record.is_some_and(|bytes| bytes != 4 + u64::from(len)) {
            let kind = StreamErrorKind::Length(char::from(tag), u64::from(len));
            return Err(self.wrong(kind));
        }
        let mut name = vec![0; len as usize];
        self.fill(&mut name)?;
        String::from_utf8(name).map_err(|_| self.wrong(StreamErrorKind::NameNotText))
    }

    /// The next record of the body, once all data of the last one has been read.
    ///
    /// # Errors
    /// The stream ends or is malformed.
    pub fn record(&mut self) -> Result<Record, StreamError> {
        loop {
            let first = self.first.take();
            let tag = first.map_or_else(|| self.byte(), Ok)?;
            match tag {
                b'w' | b'z' => return self.range(tag),
                b'e' => return self.end(),
                b'f' | b't' | b's' => {
                    return Err(self.wrong(StreamErrorKind::Misplaced(char::from(tag))));
                }
                _ if self.format == DiffFormat::V2 => self.pass_over()?,
                _ => return Err(self.wrong(StreamErrorKind::Unknown(char::from(tag)))),
            }
        }
    }

    fn range(&mut self, tag: u8) -> Result<Record, StreamError> {
        let record = self.length(tag, 16, u64::MAX)?;
        let offset_bytes = u64::from_le_bytes(self.array()?);
        let len_bytes = u64::from_le_bytes(self.array()?);
        self.left = if tag == b'w' { len_bytes } else { 0 };
        if let Some(bytes) = record
            && bytes - 16 != self.left
        {
            return Err(self.wrong(StreamErrorKind::Length(char::from(tag), bytes)));
        }
        Ok(match tag {
            b'w' => Record::Data {
                offset_bytes,
                len_bytes,
            },
            _ => Record::Zero {
                offset_bytes,
                len_bytes,
            },
        })
    }

    fn end(&mut self) -> Result<Record, StreamError> {
        match self.byte() {
            Ok(_) => Err(self.wrong(StreamErrorKind::Trailing)),
            Err(StreamError {
                kind: StreamErrorKind::Truncated,
                ..
            }) => Ok(Record::End),
            Err(error) => Err(error),
        }
    }

    /// The next piece of the current record's data; `None` behind its end.
    ///
    /// # Errors
    /// The stream ends.
    pub fn data(&mut self) -> Result<Option<Bytes>, StreamError> {
        if self.left == 0 {
            return Ok(None);
        }
        let len = self.left.min(PIECE_BYTES);
        let mut piece = vec![0; usize::try_from(len).unwrap_or_default()];
        self.fill(&mut piece)?;
        self.left -= len;
        Ok(Some(Bytes::from(piece)))
    }

    /// An error at the place up to which the stream has been read.
    pub fn wrong(&self, kind: StreamErrorKind) -> StreamError {
        StreamError {
            at_bytes: self.at,
            kind,
        }
    }

    fn once(&self, tag: u8, twice: bool) -> Result<(), StreamError> {
        match twice {
            true => Err(self.wrong(StreamErrorKind::Twice(char::from(tag)))),
            false => Ok(()),
        }
    }

    /// In v2 the length that stands behind the letter, which must lie between these.
    fn length(&mut self, tag: u8, min: u64, max: u64) -> Result<Option<u64>, StreamError> {
        if self.format == DiffFormat::V1 {
            return Ok(None);
        }
        let bytes = u64::from_le_bytes(self.array()?);
        match (min..=max).contains(&bytes) {
            true => Ok(Some(bytes)),
            false => Err(self.wrong(StreamErrorKind::Length(char::from(tag), bytes))),
        }
    }

    fn pass_over(&mut self) -> Result<(), StreamError> {
        self.left = u64::from_le_bytes(self.array()?);
        while self.data()?.is_some() {}
        Ok(())
    }

    fn byte(&mut self) -> Result<u8, StreamError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], StreamError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), StreamError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.input.read(&mut bytes[filled..]) {
                Ok(0) => return Err(self.wrong(StreamErrorKind::Truncated)),
                Ok(len) => {
                    filled += len;
                    self.at += len as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.wrong(StreamErrorKind::Io(error))),
            }
        }
        Ok(())
    }
}

/// Reads a whole file but for its data, and goes back to its start: a file that is cut off or
/// malformed is refused before anything is done with it.
///
/// # Errors
/// What is wrong with it, and where.
pub fn check_file(file: &mut File) -> Result<(), StreamError> {
    let in_file = |error| StreamError {
        at_bytes: 0,
        kind: StreamErrorKind::Io(error),
    };
    let len_bytes = file.metadata().map_err(in_file)?.len();
    let (mut reader, head) = Reader::open(BufReader::new(&mut *file))?;
    let end_bytes = head.size_bytes.unwrap_or(u64::MAX);
    loop {
        match reader.record()? {
            Record::End => break,
            Record::Data {
                offset_bytes,
                len_bytes: data_bytes,
            } => {
                reader.check_within(offset_bytes, data_bytes, end_bytes)?;
                reader.skip_data(len_bytes)?;
            }
            Record::Zero {
                offset_bytes,
                len_bytes,
            } => reader.check_within(offset_bytes, len_bytes, end_bytes)?,
        }
    }
    file.seek(SeekFrom::Start(0)).map(drop).map_err(in_file)
}

impl<R: Read> Reader<R> {
    fn check_within(&self, offset_bytes: u64, len_bytes: u64, end: u64) -> Result<(), StreamError> {
        self.check_between(0, end, offset_bytes, len_bytes)
    }

    /// Fails unless the range lies between `start` and `end`.
    pub(super) fn check_between(
        &self,
        start: u64,
        end: u64,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<(), StreamError> {
        match offset_bytes.checked_add(len_bytes) {
            Some(behind) if start <= offset_bytes && behind <= end => Ok(()),
            _ => Err(self.wrong(StreamErrorKind::Beyond {
                offset_bytes,
                len_bytes,
                end_bytes: end,
            })),
        }
    }
}

impl<R: Read + Seek> Reader<R> {
    /// Passes over the data of the current record, in a stream of so many bytes.
    fn skip_data(&mut self, stream_bytes: u64) -> Result<(), StreamError> {
        if self.left > stream_bytes.saturating_sub(self.at) {
            self.at = stream_bytes;
            return Err(self.wrong(StreamErrorKind::Truncated));
        }
        let by = i64::try_from(self.left).unwrap_or(i64::MAX);
        let skipped = self.input.seek_relative(by);
        skipped.map_err(|error| self.wrong(StreamErrorKind::Io(error)))?;
        self.at += self.left;
        self.left = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
