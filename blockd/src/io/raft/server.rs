//! Answering messages of other registry servers, and the leader's part of every request.

use super::codec::{decode, encode};
use super::message::{Envelope, Reply, Request};
use super::{Applied, Command, Engine, TypeConfig, raft_id};
use crate::id::NodeNo;
use crate::limits::{REGISTRY_MESSAGE_BYTES_MAX, REGISTRY_SNAPSHOT_BYTES_MAX};
use openraft::error::{ClientWriteError, InstallSnapshotError, RaftError};
use openraft::raft::InstallSnapshotRequest;
use openraft::{BasicNode, ChangeMembers};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::time::Instant;

/// The answering side of one registry server. Clones are the same server.
#[derive(Clone)]
pub(crate) struct Server {
    pub(crate) engine: Engine,
    pub(crate) me: NodeNo,
    /// When a leader last spoke to this server since it started.
    heard: Arc<Mutex<Option<Instant>>>,
}

impl Server {
    pub(crate) fn new(engine: Engine, me: NodeNo) -> Self {
        Self {
            engine,
            me,
            heard: Arc::default(),
        }
    }

    /// When a leader last spoke to this server since it started.
    pub(crate) fn leader_heard(&self) -> Option<Instant> {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers the bytes of a message; any bytes give an answer.
    pub(crate) async fn answer(&self, message: &[u8]) -> Vec<u8> {
        let reply = match self.open(message) {
            Ok(request) => self.execute(request).await,
            Err(reason) => Reply::Failed(reason),
        };
        encode(&reply).unwrap_or_default()
    }

    fn open(&self, message: &[u8]) -> Result<Request, String> {
        if message.len() > REGISTRY_MESSAGE_BYTES_MAX {
            return Err(format!(
                "a message of {} bytes is over the limit",
                message.len()
            ));
        }
        let envelope: Envelope = decode(message).map_err(|e| format!("the message {e}"))?;
        if envelope.to != raft_id(self.me) {
            return Err(format!(
                "this is node {}, not node {}",
                self.me, envelope.to
            ));
        }
        Ok(envelope.request)
    }

    /// Does what a request asks.
    pub(crate) async fn execute(&self, request: Request) -> Reply {
        match request {
            Request::Append(rpc) => {
                let answer = self.engine.append_entries(rpc).await;
                self.note_leader(answer.as_ref().is_ok_and(|a| !is_refusal(a)));
                answer.map_or_else(failed, Reply::Append)
            }
            Request::Vote(rpc) => self.engine.vote(rpc).await.map_or_else(failed, Reply::Vote),
            Request::Snapshot(rpc) => self.install(rpc).await,
            Request::Propose(command) => self.propose(command).await,
            Request::ReadIndex => self.read_index().await,
            Request::AddVoter { node, address } => self.add_voter(node, address).await,
            Request::RemoveVoter { node } => self.remove_voter(node).await,
        }
    }

    fn note_leader(&self, spoke: bool) {
        if spoke {
            *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    }

    /// The end of a part is bounded here because openraft seeks to any offset and writes there.
    async fn install(&self, rpc: InstallSnapshotRequest<TypeConfig>) -> Reply {
        let end = rpc.offset.saturating_add(rpc.data.len() as u64);
        if end > REGISTRY_SNAPSHOT_BYTES_MAX as u64 {
            return Reply::Failed(format!("a snapshot of {end} bytes is over the limit"));
        }
        match self.engine.install_snapshot(rpc).await {
            Ok(response) => {
                self.note_leader(true);
                Reply::Snapshot(response)
            }
            Err(RaftError::APIError(InstallSnapshotError::SnapshotMismatch(_))) => {
                Reply::SnapshotOutOfStep
            }
            Err(e) => failed(e),
        }
    }

    fn leads(&self) -> bool {
        self.engine.metrics().borrow().current_leader == Some(raft_id(self.me))
    }

    /// `NotLeader` only if the command did not enter the log.
    async fn propose(&self, command: Command) -> Reply {
        if !self.leads() {
            return Reply::NotLeader;
        }
        if let Err(refusal) = command.transaction.check() {
            return Reply::Proposed(Err(refusal));
        }
        match self
            .engine
            .client_write(command)
            .await
            .map(|response| response.data)
        {
            Ok(Applied::Decided(outcome)) => Reply::Proposed(outcome),
            Ok(Applied::Nothing) => Reply::Failed("the entry was no transaction".to_owned()),
            Err(e) => failed(e),
        }
    }

    async fn read_index(&self) -> Reply {
        if !self.leads() {
            return Reply::NotLeader;
        }
        match self.engine.get_read_log_id().await {
            Ok((id, _)) => {
                // A leader that was killed and leads on in the same term forgets how far its log
                // was committed, and openraft names the first entry of the term; whatever was
                // acknowledged is in the leader's log.
                let in_log = self.engine.metrics().borrow().last_log_index;
                Reply::ReadIndex(id.map_or(0, |id| id.index).max(in_log.unwrap_or(0)))
            }
            Err(e) => failed(e),
        }
    }

    async fn add_voter(&self, node: u64, address: String) -> Reply {
        if !self.leads() {
            return Reply::NotLeader;
        }
        match self.change_voters(node, BasicNode::new(address)).await {
            Ok(()) => Reply::VoterAdded,
            Err(e) => failed(e),
        }
    }

    async fn remove_voter(&self, node: u64) -> Reply {
        if !self.leads() {
            return Reply::NotLeader;
        }
        let removed = ChangeMembers::RemoveVoters(BTreeSet::from([node]));
        match self.engine.change_membership(removed, false).await {
            Ok(_) => Reply::VoterRemoved,
            Err(e) => failed(e),
        }
    }

    /// First a learner, until it has the log; then a voter.
    async fn change_voters(
        &self,
        id: u64,
        node: BasicNode,
    ) -> Result<(), RaftError<u64, ClientWriteError<u64, BasicNode>>> {
        let (known, votes) = {
            let metrics = self.engine.metrics();
            let metrics = metrics.borrow();
            let membership = metrics.membership_config.membership();
            let joint = membership.get_joint_config();
            let votes = joint.len() == 1 && membership.voter_ids().any(|voter| voter == id);
            (membership.get_node(&id).cloned(), votes)
        };
        if known.as_ref().is_some_and(|known| *known != node) {
            let moved = ChangeMembers::SetNodes(BTreeMap::from([(id, node.clone())]));
            self.engine.change_membership(moved, true).await?;
        }
        if !votes {
            self.engine.add_learner(id, node, true).await?;
            let voter = ChangeMembers::AddVoterIds(BTreeSet::from([id]));
            self.engine.change_membership(voter, true).await?;
        }
        Ok(())
    }
}

fn is_refusal(answer: &openraft::raft::AppendEntriesResponse<u64>) -> bool {
    matches!(answer, openraft::raft::AppendEntriesResponse::HigherVote(_))
}

fn failed(error: impl std::fmt::Display) -> Reply {
    Reply::Failed(error.to_string())
}
