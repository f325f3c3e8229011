//! The procedure `hold` of a distributed snapshot (document 003, FIG. 7) as two state machines.
//!
//! A [`Coordinator`] asks every server that owns a page of the volumes to prepare; each
//! [`Participant`] holds the writes of its volume and answers `ready` once none is executing. When
//! all are ready the coordinator says `take`, each takes its part and releases its writes. Only if
//! all answered `taken` is the outcome committed, by one registry transaction.
//!
//! A participant decides a ticket once and locally, `taken` or `expired`, and never waits for the
//! coordinator to release writes (U-08). Time is given with every event, in milliseconds of any
//! clock that does not go back; the machines compare it only with their own earlier values.

mod coordinator;
mod participant;

#[cfg(test)]
mod enumeration;

pub use coordinator::{
    Abort, Action, CommitResult, Coordinator, CoordinatorEvent, Part, Plan, Verdict,
};
pub use participant::{Output, Participant, ParticipantEvent};

use crate::id::{Epoch, SnapshotId};
use serde::{Deserialize, Serialize};

/// What the coordinator tells a participant, under a ticket.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Hold the writes and answer when none is executing.
    Prepare {
        /// The snapshot to be taken.
        snapshot: SnapshotId,
        /// Epoch of the volume's routing table that the coordinator works with.
        epoch: Epoch,
        /// Hold for this long at the most, counted from the arrival.
        hold_max_ms: u64,
    },
    /// Take the snapshot.
    Take {
        /// From the participant's [`Answer::Ready`].
        incarnation: u64,
    },
    /// It is off: release the writes; drop the snapshot if it was taken.
    Release,
}

/// What a participant answers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// No write executes; this many are held (S003-37).
    Ready {
        /// Writes held.
        held: u32,
        /// Which start of the server holds them: a hold does not survive a restart.
        incarnation: u64,
    },
    /// The part is taken; final.
    Taken,
    /// The deadline passed, or it was released, before the part was taken; final.
    Expired,
    /// The ticket was never seen here, or before a restart.
    Unknown,
    /// The volume takes part in another snapshot at the moment.
    Busy,
    /// The routing table has this other epoch here (S003-34).
    OtherEpoch(Epoch),
    /// The store could not take the part.
    Failed,
}
