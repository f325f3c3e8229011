//! The distributed snapshot (document 003) as two state machines, with three procedures.
//!
//! A [`Coordinator`] asks every server that owns a page of the volumes to prepare, says `take` when
//! all are ready, and commits the outcome by one registry transaction if all answered `taken`. Each
//! [`Participant`] does for its volume what the procedure asks for:
//!
//! ```text
//!            from prepare to ready           from ready to take             at take
//! barrier    spans wait; mark the log        completions of later           completions go
//!            when none executes              writes are parked
//! hold       writes wait (FIG. 7)            writes wait                    mark; writes go on
//! stamp      spans wait; every write         writes go on and are           name the mark before the
//!            gets a stamp (FIG. 8)           acknowledged at once           first stamp of T or later
//! ```
//!
//! A span is a request over several pages. It waits at its owners in all procedures, so it is on one
//! side of the cut everywhere: no owner is ready while it executes, and none lets it begin before it
//! has heard `take`, so before all were ready (S003-33).
//!
//! A participant decides a ticket once and locally, `taken` or `expired`, and never waits for the
//! coordinator to release writes (U-08). Time is given with every event, in milliseconds of any
//! clock that does not go back; the machines compare it only with their own earlier values.

mod coordinator;
mod participant;
mod unfinished;

#[cfg(test)]
mod enumeration;

pub use coordinator::{
    Abort, Action, CommitResult, Coordinator, CoordinatorEvent, Limits, Part, Plan, Verdict,
};
pub use participant::{Gate, Output, Participant, ParticipantEvent, Run};
pub use unfinished::UnfinishedWatch;

pub use crate::control::registry::Procedure;

use crate::id::{Epoch, NodeNo, SnapshotId, Stamp};
use serde::{Deserialize, Serialize};

/// What the coordinator tells a participant, under a ticket.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Order {
    /// Prepare by procedure `hold`, as servers said it that knew no other.
    Prepare {
        /// The snapshot to be taken.
        snapshot: SnapshotId,
        /// Epoch of the volume's routing table that the coordinator works with.
        epoch: Epoch,
        /// Hold for this long at the most, counted from the arrival.
        hold_max_ms: u64,
    },
    /// Take the snapshot, by `barrier` or `hold`.
    Take {
        /// From the participant's [`Answer::Ready`].
        incarnation: u64,
    },
    /// It is off: release the writes; drop the snapshot if it was taken.
    Release,
    /// Prepare by a procedure, and answer when ready.
    PrepareBy(Preparation),
    /// Take the snapshot of what was stamped before `at`.
    TakeAt {
        /// From the participant's [`Answer::ReadyAt`].
        incarnation: u64,
        /// Later than the stamps of all `ready` answers.
        at: Stamp,
    },
}

/// What a participant is to prepare for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Preparation {
    /// How.
    pub procedure: Procedure,
    /// The server that coordinates, for people (X-10).
    pub coordinator: NodeNo,
    /// The snapshot to be taken.
    pub snapshot: SnapshotId,
    /// Epoch of the volume's routing table that the coordinator works with (S003-34).
    pub epoch: Epoch,
    /// The ticket expires so many milliseconds after the arrival.
    pub hold_max_ms: u64,
    /// `barrier`: the ticket expires so many milliseconds after the log was marked instead.
    pub park_max_ms: u64,
}

/// What a participant answers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// `barrier`: the log is marked. `hold`: no write executes; this many are held (S003-37).
    Ready {
        /// Requests that wait at the gate.
        held: u32,
        /// Which start of the server holds them: a hold does not survive a restart.
        incarnation: u64,
    },
    /// The part is taken, durably; final.
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
    /// `stamp`: every later write has a later stamp than `now`.
    ReadyAt {
        /// As in [`Answer::Ready`].
        incarnation: u64,
        /// The participant's clock.
        now: Stamp,
    },
}
