//! Why an IO on a volume failed, with the one mapping to wire status, and from there to errno.

use crate::id::Epoch;
use crate::io::wire::{Frame, Status};

/// Error of the data plane, equal for local and forwarded requests.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DataError {
    /// This server does not own the page at the epoch of the request; it is at this epoch.
    #[error("routing table is at epoch {0}")]
    Stale(Epoch),
    #[error("no space left in the store of the owner")]
    NoSpace,
    #[error("{0}")]
    Damaged(String),
    #[error("the target is read-only")]
    ReadOnly,
    #[error("request outside the volume")]
    OutOfRange,
    #[error("the volume or snapshot does not exist")]
    Gone,
    /// A snapshot holds the writes of the volume.
    #[error("a snapshot is being taken")]
    Held,
    #[error("{0}")]
    Unavailable(String),
    /// The exclusive lease of the volume is another one's, or nobody's any more.
    #[error("{0}")]
    Leased(String),
    #[error("malformed request: {0}")]
    Malformed(&'static str),
}

impl DataError {
    /// An owner answered something that does not cover what was asked.
    pub const BAD_COVER: Self = Self::Malformed("the owner's reply does not cover the range");

    #[must_use]
    pub fn status(&self) -> Status {
        match self {
            Self::Stale(_) => Status::Stale,
            Self::NoSpace => Status::NoSpace,
            Self::Damaged(_) => Status::Damaged,
            Self::ReadOnly => Status::ReadOnly,
            Self::OutOfRange => Status::OutOfRange,
            Self::Gone => Status::Gone,
            Self::Held => Status::Held,
            Self::Unavailable(_) => Status::Unavailable,
            Self::Leased(_) => Status::Leased,
            Self::Malformed(_) => Status::Malformed,
        }
    }

    /// The answer to `request` that says this error.
    #[must_use]
    pub fn reply_to(&self, request: &Frame) -> Frame {
        let mut reply = request.refuse(self.status(), self.to_string());
        if let Self::Stale(epoch) = self {
            reply.epoch = *epoch;
        }
        reply
    }

    /// The error that a reply carries, if it is one.
    #[must_use]
    pub fn of_reply(reply: &Frame) -> Option<Self> {
        Some(match reply.status {
            Status::Ok => return None,
            Status::Stale => Self::Stale(reply.epoch),
            Status::NoSpace => Self::NoSpace,
            Status::Damaged => Self::Damaged(reply.text()),
            Status::ReadOnly => Self::ReadOnly,
            Status::OutOfRange => Self::OutOfRange,
            Status::Gone => Self::Gone,
            Status::Held => Self::Held,
            Status::Leased => Self::Leased(reply.text()),
            Status::Malformed => Self::Malformed("refused by the owner"),
            Status::WrongCluster | Status::BadVersion | Status::Unavailable => {
                Self::Unavailable(reply.text())
            }
        })
    }
}
