//! Agreement on the order of registry transactions: openraft over one redb file.
//!
//! `store` is the file, `log_store` (with `recent` in memory) and `state_machine` are what openraft asks for, `message` is
//! what registry servers say to each other, `network` sends it and `server` answers it. `offline` is
//! the file while no server uses it.

mod codec;
mod log_store;
mod message;
mod network;
pub mod offline;
mod recent;
mod server;
mod state_machine;
mod store;

use crate::control::registry::{Command, Outcome, Refusal};
use crate::id::NodeNo;
use futures_util::future::BoxFuture;
use serde::{Deserialize, Serialize};
use std::io::{self, Cursor};
use std::sync::Arc;

pub use log_store::LogStore;
pub(crate) use message::{Reply, Request};
pub(crate) use network::{CallError, Network, call};
pub(crate) use server::Server;
pub use state_machine::{Published, StateMachine};
pub use store::{Store, StoreError};

/// Carries one message to the peer at an address and its answer back; the caller gives it.
pub type RaftTransport =
    Arc<dyn Fn(String, Vec<u8>) -> BoxFuture<'static, io::Result<Vec<u8>>> + Send + Sync>;

/// What applying a log entry gave.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Applied {
    /// The entry was openraft's own: a new leader or a new membership.
    Nothing,
    /// The entry was a transaction.
    Decided(Result<Outcome, Refusal>),
}

openraft::declare_raft_types!(
    /// The types that openraft works with here. Node ids are [`NodeNo`] widened.
    pub TypeConfig:
        D = Command,
        R = Applied,
        NodeId = u64,
        Node = openraft::BasicNode,
        SnapshotData = Cursor<Vec<u8>>,
);

/// The consensus engine of one registry server.
pub(crate) type Engine = openraft::Raft<TypeConfig>;

/// The number of a node as openraft has it.
pub(crate) fn raft_id(node: NodeNo) -> u64 {
    u64::from(node.0)
}

/// The number of a node from openraft's; 0 (no node) if it is none.
pub(crate) fn node_no(id: u64) -> NodeNo {
    NodeNo(u16::try_from(id).unwrap_or(0))
}

/// Checks the encoded size of a command.
///
/// # Errors
/// Its size in bytes, if over `bytes_max`.
pub(crate) fn check_size(command: &Command, bytes_max: usize) -> Result<(), usize> {
    let bytes = codec::encode(command).map_or(usize::MAX, |bytes| bytes.len());
    if bytes <= bytes_max {
        Ok(())
    } else {
        Err(bytes)
    }
}
