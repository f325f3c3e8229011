//! Forwarding: one request passed to the owner of its page, over one hop (S003-07, S003-18).
//!
//! A forwarded frame says the epoch at which the entry routed it. The receiver executes it or
//! answers `stale`; it never forwards it again, so loops are impossible.

use super::error::DataError;
use super::router::Part;
use crate::id::{Epoch, SnapshotId, VolumeId};
use crate::io::link::{Link, LinkError};
use crate::io::wire::{Frame, Kind, flags};
use bytes::Bytes;

/// What to do with the range of a part.
#[derive(Clone, Debug)]
pub enum PartIo {
    Read(Option<SnapshotId>),
    Extents(Option<SnapshotId>),
    Write { data: Bytes, fua: bool },
    Zero { keep_allocated: bool, fua: bool },
}

/// The frame that asks the owner of `part` to do `io`; `span` is the id of a span begun there.
#[must_use]
pub fn request(
    volume: VolumeId,
    epoch: Epoch,
    part: &Part,
    io: &PartIo,
    span: Option<u64>,
) -> Frame {
    let mut frame = Frame::request(io.kind(), volume);
    frame.epoch = epoch;
    frame.page = part.page;
    frame.offset_bytes = part.offset_bytes;
    frame.len_bytes = part.len_bytes;
    if let Some(span) = span {
        frame.aux = span;
        frame.flags |= flags::SPAN;
    }
    match io {
        PartIo::Read(snapshot) | PartIo::Extents(snapshot) => {
            frame.snapshot = snapshot.unwrap_or_default();
        }
        PartIo::Write { data, fua } => {
            let at = usize::try_from(part.at_bytes).unwrap_or(usize::MAX);
            frame.payload = data.slice(at..at + part.len_bytes as usize).into();
            frame.flags |= if *fua { flags::FUA } else { 0 };
        }
        PartIo::Zero {
            keep_allocated,
            fua,
        } => {
            frame.flags |= if *fua { flags::FUA } else { 0 };
            frame.flags |= if *keep_allocated {
                flags::KEEP_ALLOCATED
            } else {
                0
            };
        }
    }
    frame
}

impl PartIo {
    fn kind(&self) -> Kind {
        match self {
            Self::Read(_) => Kind::Read,
            Self::Extents(_) => Kind::Extents,
            Self::Write { .. } => Kind::Write,
            Self::Zero { .. } => Kind::Zero,
        }
    }

    /// Whether the range is changed, so that a snapshot must have all of the request or nothing.
    #[must_use]
    pub fn changes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. })
    }
}

/// Why one try of a forwarded request did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The owner cannot be reached now: try again.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The owner answered an error.
    #[error(transparent)]
    Data(#[from] DataError),
}

impl ForwardError {
    /// Whether the owner may not know a span that it has agreed to: its connection has ended, or
    /// it says so. After any other error the span goes on, and its id is not free.
    #[must_use]
    pub fn ends_span(&self) -> bool {
        matches!(self, Self::Link(_) | Self::Data(DataError::Held))
    }
}

/// One try.
///
/// # Errors
/// [`ForwardError`].
pub async fn call(link: &Link, request: Frame) -> Result<Frame, ForwardError> {
    let reply = link.call(request).await?;
    match DataError::of_reply(&reply) {
        Some(error) => Err(error.into()),
        None => Ok(reply),
    }
}
