//! Forwarding: one request passed to the owner of its page, over one hop (S003-07, S003-18).
//!
//! A forwarded frame says the epoch at which the entry routed it. The receiver executes it or
//! answers `stale`; it never forwards it again, so loops are impossible.

use super::error::DataError;
use super::router::Part;
use crate::id::{Epoch, LayerRun, PageNo, SnapshotId, VolumeId};
use crate::io::link::{Link, LinkError};
use crate::io::wire::{Frame, Kind, decode_layers, flags};
use crate::limits::{SPAN_TURN_PARTS, SPAN_TURN_WRITTEN_ZERO_BYTES, SPAN_TURN_ZERO_BYTES};
use bytes::Bytes;

/// What to do with the range of a part.
#[derive(Clone, Debug)]
pub enum PartIo {
    Read(Option<SnapshotId>),
    Extents(Option<SnapshotId>),
    Layers {
        snapshot: Option<SnapshotId>,
        since: Option<Since>,
    },
    Write {
        data: Bytes,
        fua: bool,
    },
    Zero {
        keep_allocated: bool,
        fua: bool,
    },
}

/// The snapshot with which a view is compared.
///
/// Pages behind its end did not exist in it, and their owners may not know it: what has data there
/// has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Since {
    snapshot: SnapshotId,
    page_count: u64,
}

impl Since {
    /// A snapshot and its size in bytes, of a volume with pages of `page_bytes`.
    #[must_use]
    pub fn new(snapshot: SnapshotId, size_bytes: u64, page_bytes: u32) -> Self {
        Self {
            snapshot,
            page_count: size_bytes.div_ceil(u64::from(page_bytes)),
        }
    }

    /// The snapshot, if it has the page.
    #[must_use]
    pub fn on(&self, page: PageNo) -> Option<SnapshotId> {
        (u64::from(page.0) < self.page_count).then_some(self.snapshot)
    }
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
        PartIo::Layers { snapshot, since } => {
            let since = since.and_then(|since| since.on(part.page));
            frame.snapshot = snapshot.unwrap_or_default();
            frame.aux = u64::from(since.unwrap_or_default().0);
            frame.flags |= flags::LAYERS;
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
            Self::Extents(_) | Self::Layers { .. } => Kind::Extents,
            Self::Write { .. } => Kind::Write,
            Self::Zero { .. } => Kind::Zero,
        }
    }

    /// Parts of one request that are sent before others get a turn.
    #[must_use]
    pub fn turn_parts(&self, page_bytes: u32) -> usize {
        let bytes = match self {
            Self::Zero {
                keep_allocated: true,
                ..
            } => SPAN_TURN_WRITTEN_ZERO_BYTES,
            Self::Zero { .. } => SPAN_TURN_ZERO_BYTES,
            _ => return SPAN_TURN_PARTS,
        };
        let pages = usize::try_from(bytes / u64::from(page_bytes)).unwrap_or(usize::MAX);
        pages.clamp(1, SPAN_TURN_PARTS)
    }

    /// Whether the range is changed, so that a snapshot must have all of the request or nothing.
    #[must_use]
    pub fn changes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. })
    }
}

/// The layers that an owner answered for a part of `len_bytes`.
///
/// # Errors
/// [`DataError::Unavailable`] if the owner does not know layers yet.
pub fn layers_of(reply: Frame, len_bytes: u32) -> Result<Vec<LayerRun>, DataError> {
    if reply.flags & flags::LAYERS == 0 {
        let text = "the owner runs an older version, which cannot tell changes: upgrade it";
        return Err(DataError::Unavailable(text.to_owned()));
    }
    decode_layers(reply, len_bytes).map_err(|_| DataError::BAD_COVER)
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
