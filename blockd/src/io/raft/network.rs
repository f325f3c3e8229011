//! Sending messages to other registry servers over the transport that the node gives.

use super::codec::{decode, encode};
use super::message::{Envelope, Reply, Request};
use super::{RaftTransport, TypeConfig};
use crate::limits::REGISTRY_MESSAGE_BYTES_MAX;
use openraft::error::{
    InstallSnapshotError, PayloadTooLarge, RPCError, RaftError, RemoteError, SnapshotMismatch,
    Unreachable,
};
use openraft::network::{Backoff, RPCOption, RaftNetwork, RaftNetworkFactory};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse,
    VoteRequest, VoteResponse,
};
use openraft::{AnyError, BasicNode, SnapshotSegmentId};
use std::time::Duration;

/// Pause before a server that could not be reached is tried again.
const UNREACHABLE_PAUSE: Duration = Duration::from_millis(200);

type Rpc<E = openraft::error::Infallible> = RPCError<u64, BasicNode, RaftError<u64, E>>;

/// Why a server gave no usable answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    /// The message is over the limit; nothing was sent.
    #[error("a message of {0} bytes is over the limit of {REGISTRY_MESSAGE_BYTES_MAX}")]
    TooLarge(usize),
    /// Not reached, no answer in time, or an answer that makes no sense.
    #[error("registry server {address}: {reason}")]
    NoAnswer {
        /// Address of the server.
        address: String,
        /// What happened.
        reason: String,
    },
}

/// Asks a server and waits for the answer.
pub(crate) async fn call(
    transport: &RaftTransport,
    to: u64,
    address: &str,
    request: Request,
    patience: Duration,
) -> Result<Reply, CallError> {
    let failed = |reason: String| CallError::NoAnswer {
        address: address.to_owned(),
        reason,
    };
    let message = encode(&Envelope { to, request }).map_err(|e| failed(e.to_string()))?;
    if message.len() > REGISTRY_MESSAGE_BYTES_MAX {
        return Err(CallError::TooLarge(message.len()));
    }
    let answer = tokio::time::timeout(patience, transport(address.to_owned(), message)).await;
    let answer = answer.map_err(|_| failed(format!("no answer in {patience:?}")))?;
    let bytes = answer.map_err(|e| failed(e.to_string()))?;
    decode(&bytes).map_err(|e| failed(format!("the answer {e}")))
}

/// Makes a [`Peer`] for every other registry server.
pub(crate) struct Network {
    pub(crate) transport: RaftTransport,
}

/// One other registry server.
pub(crate) struct Peer {
    id: u64,
    address: String,
    transport: RaftTransport,
}

impl RaftNetworkFactory<TypeConfig> for Network {
    type Network = Peer;

    async fn new_client(&mut self, id: u64, node: &BasicNode) -> Peer {
        Peer {
            id,
            address: node.addr.clone(),
            transport: self.transport.clone(),
        }
    }
}

impl Peer {
    async fn ask<E: std::error::Error>(
        &self,
        request: Request,
        option: RPCOption,
    ) -> Result<Reply, Rpc<E>> {
        let answer = call(
            &self.transport,
            self.id,
            &self.address,
            request,
            option.hard_ttl(),
        );
        match answer.await {
            Ok(Reply::Failed(reason)) => Err(self.unusable(&reason)),
            Ok(reply) => Ok(reply),
            Err(e) => Err(RPCError::Unreachable(Unreachable::new(&e))),
        }
    }

    fn unusable<E: std::error::Error>(&self, what: &str) -> Rpc<E> {
        let text = format!("registry server {} answered: {what}", self.address);
        RPCError::Unreachable(Unreachable::new(&AnyError::error(text)))
    }
}

impl RaftNetwork<TypeConfig> for Peer {
    async fn append_entries(
        &mut self,
        rpc: AppendEntriesRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Rpc> {
        let entries = rpc.entries.len() as u64;
        let answer = call(
            &self.transport,
            self.id,
            &self.address,
            Request::Append(rpc),
            option.hard_ttl(),
        );
        match answer.await {
            Ok(Reply::Append(response)) => Ok(response),
            Ok(other) => Err(self.unusable(&format!("{other:?}"))),
            Err(CallError::TooLarge(_)) if entries > 1 => {
                Err(PayloadTooLarge::new_entries_hint(entries / 2).into())
            }
            Err(e) => Err(RPCError::Unreachable(Unreachable::new(&e))),
        }
    }

    async fn install_snapshot(
        &mut self,
        rpc: InstallSnapshotRequest<TypeConfig>,
        option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Rpc<InstallSnapshotError>> {
        let (id, offset) = (rpc.meta.snapshot_id.clone(), rpc.offset);
        match self.ask(Request::Snapshot(rpc), option).await? {
            Reply::Snapshot(response) => Ok(response),
            Reply::SnapshotOutOfStep => {
                let expect = SnapshotSegmentId {
                    id: id.clone(),
                    offset: 0,
                };
                let mismatch = SnapshotMismatch {
                    expect,
                    got: SnapshotSegmentId { id, offset },
                };
                let error = RaftError::APIError(InstallSnapshotError::from(mismatch));
                Err(RPCError::RemoteError(RemoteError::new(self.id, error)))
            }
            other => Err(self.unusable(&format!("{other:?}"))),
        }
    }

    async fn vote(
        &mut self,
        rpc: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, Rpc> {
        match self.ask(Request::Vote(rpc), option).await? {
            Reply::Vote(response) => Ok(response),
            other => Err(self.unusable(&format!("{other:?}"))),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(UNREACHABLE_PAUSE))
    }
}
