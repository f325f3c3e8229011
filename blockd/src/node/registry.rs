//! The handle of the registry that the rest of a node uses.

use crate::control::registry::{Outcome, Refusal, RegistryState, Transaction};
use crate::id::NodeNo;
use futures_util::future::BoxFuture;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;

/// Carries one message to the peer at an address and its answer back; the caller gives it.
pub type RaftTransport =
    Arc<dyn Fn(String, Vec<u8>) -> BoxFuture<'static, io::Result<Vec<u8>>> + Send + Sync>;

/// Times and sizes of a registry server.
#[derive(Clone, Debug)]
pub struct RegistryOptions {
    /// Interval of the leader's heartbeats.
    pub heartbeat: Duration,
    /// Shortest time without a heartbeat after which a server stands for election.
    pub election_min: Duration,
    /// Longest such time.
    pub election_max: Duration,
    /// How long `propose`, `barrier` and `add_voter` look for a leader.
    pub deadline: Duration,
    /// Log entries between two snapshots of the state.
    pub entries_per_snapshot: u64,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(250),
            election_min: Duration::from_millis(1000),
            election_max: Duration::from_millis(2000),
            deadline: Duration::from_secs(10),
            entries_per_snapshot: 1000,
        }
    }
}

/// Why the registry did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The file cannot be opened or is damaged.
    #[error("registry file {path}: {reason}")]
    File {
        /// The file.
        path: PathBuf,
        /// What redb or the format check says, and what to do.
        reason: String,
    },
    /// No leader answered within the deadline; nothing was changed.
    #[error(
        "no leader of the registry answered for {0:?}: is a majority of the registry servers up?"
    )]
    NoLeader(Duration),
    /// The transaction was sent but no answer came: it may or may not have been executed.
    #[error(
        "the registry did not answer for {0:?}: the change may or may not have been made; read it again"
    )]
    UnknownOutcome(Duration),
    /// The transaction is malformed.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Somebody else changed the same objects too often in a row.
    #[error("the registry objects were changed by others {0} times in a row: try again")]
    Contention(u32),
    /// This registry server stopped.
    #[error("the registry of this node has stopped: {0}")]
    Stopped(String),
}

/// What [`Registry::update`] may return besides success.
#[derive(Debug, thiserror::Error)]
pub enum UpdateError<E> {
    /// The closure refused.
    #[error(transparent)]
    Refused(E),
    /// The registry failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// How far the registry of this node is, as document 004 numbers it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// 1: readable, unconfirmed.
    Readable = 1,
    /// 2: writable.
    Writable = 2,
}

/// What this registry server knows about the group of registry servers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RegistryStatus {
    /// The leader, if one is known.
    pub leader: Option<NodeNo>,
    /// The election term.
    pub term: u64,
    /// Index of the last log entry in the state; 0: none.
    pub last_applied: u64,
    /// Servers that vote, sorted.
    pub voters: Vec<NodeNo>,
    /// Whether changes are possible.
    pub phase: Phase,
}

/// A running registry server. Clones are handles of the same server.
#[derive(Clone)]
pub struct Registry {
    state: watch::Receiver<Arc<RegistryState>>,
}

impl Registry {
    /// Opens `registry.redb` in `dir` (made if absent) and starts the server on the current tokio runtime.
    ///
    /// # Errors
    /// The file cannot be opened, is of another node or of a newer version.
    pub async fn open(
        dir: &Path,
        me: NodeNo,
        my_address: String,
        transport: RaftTransport,
        options: RegistryOptions,
    ) -> Result<Registry, RegistryError> {
        let _ = (dir, me, my_address, transport, options);
        unimplemented!()
    }

    /// Makes this server the only voter of a new group; nothing if there is a group already.
    ///
    /// # Errors
    /// The server has stopped.
    pub async fn initialize(&self) -> Result<(), RegistryError> {
        unimplemented!()
    }

    /// Adds a voter through the leader; it first gets all of the log. Nothing if it votes already.
    ///
    /// # Errors
    /// No leader within the deadline, or the new server does not answer.
    pub async fn add_voter(&self, node: NodeNo, address: String) -> Result<(), RegistryError> {
        let _ = (node, address);
        unimplemented!()
    }

    /// Executes a transaction, exactly once, through the leader.
    ///
    /// # Errors
    /// See [`RegistryError`]; only `UnknownOutcome` leaves open whether it was executed.
    pub async fn propose(&self, transaction: Transaction) -> Result<Outcome, RegistryError> {
        let _ = transaction;
        unimplemented!()
    }

    /// The state, at least as new as every transaction that was answered before the call.
    ///
    /// # Errors
    /// No leader within the deadline.
    pub async fn barrier(&self) -> Result<Arc<RegistryState>, RegistryError> {
        unimplemented!()
    }

    /// Reads, builds a transaction, executes it; reads again after a conflict, a bounded number of times.
    ///
    /// # Errors
    /// The closure's error, or the registry's.
    pub async fn update<T, E>(
        &self,
        f: impl FnMut(&RegistryState) -> Result<(Transaction, T), E>,
    ) -> Result<T, UpdateError<E>> {
        let _ = f;
        unimplemented!()
    }

    /// The state as this server has it; may be old.
    #[must_use]
    pub fn state(&self) -> Arc<RegistryState> {
        self.state.borrow().clone()
    }

    /// Follows the state as this server has it.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<RegistryState>> {
        self.state.clone()
    }

    /// What this server knows about the group.
    #[must_use]
    pub fn status(&self) -> RegistryStatus {
        unimplemented!()
    }

    /// Answers a message of another registry server. Any bytes give an answer.
    pub async fn handle_rpc(&self, message: Vec<u8>) -> Vec<u8> {
        let _ = message;
        unimplemented!()
    }

    /// Stops the server and closes its file.
    pub async fn shutdown(&self) {
        unimplemented!()
    }
}
