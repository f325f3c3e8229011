//! What registry servers say to each other: one version byte, then postcard of these types.

use super::TypeConfig;
use crate::control::registry::{Command, Outcome, Refusal};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use serde::{Deserialize, Serialize};

/// A request with the server it is for, so that one that moved to another address is not confused.
#[derive(Serialize, Deserialize)]
pub(crate) struct Envelope {
    pub(crate) to: u64,
    pub(crate) request: Request,
}

/// A question to another registry server.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) enum Request {
    Append(AppendEntriesRequest<TypeConfig>),
    Vote(VoteRequest<u64>),
    Snapshot(InstallSnapshotRequest<TypeConfig>),
    /// To the leader: execute.
    Propose(Command),
    /// To the leader: which log index has to be in a state that is fresh now?
    ReadIndex,
    /// To the leader: let this server vote.
    AddVoter {
        node: u64,
        address: String,
    },
    /// To the leader: this server is none of the group any more.
    RemoveVoter {
        node: u64,
    },
}

/// The answer.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    Append(AppendEntriesResponse<u64>),
    Vote(VoteResponse<u64>),
    Snapshot(InstallSnapshotResponse<u64>),
    /// The part does not follow what came before: begin the snapshot again.
    SnapshotOutOfStep,
    Proposed(Result<Outcome, Refusal>),
    ReadIndex(u64),
    VoterAdded,
    /// Nothing was done: another server leads, or none.
    NotLeader,
    /// Not answered; a proposal may or may not be executed.
    Failed(String),
    VoterRemoved,
}
