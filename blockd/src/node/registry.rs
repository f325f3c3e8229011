//! The handle of the registry that the rest of a node uses.

use crate::control::registry::{Command, Outcome, Refusal, RegistryState, Transaction};
use crate::id::{NodeNo, Revision};
use crate::io::device::Device;
use crate::io::raft::{
    self, CallError, Engine, LogStore, Network, Published, Reply, Request, Server, StateMachine,
    Store, StoreError,
};
use crate::io::state_dir::StateDir;
use crate::limits::{REGISTRY_SNAPSHOT_CHUNK_BYTES, REGISTRY_UPDATE_TRIES, TRANSACTION_BYTES_MAX};
use openraft::error::{InitializeError, RaftError};
use openraft::{BasicNode, Config, SnapshotPolicy};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

pub use crate::io::raft::RaftTransport;

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
    inner: Arc<Inner>,
}

struct Inner {
    me: NodeNo,
    options: RegistryOptions,
    transport: RaftTransport,
    server: Server,
    store: Arc<Store>,
    published: Published,
    /// Upper half of the ids of this handle's commands, chosen at random at each start.
    id_prefix: u64,
    proposals: AtomicU64,
    my_address: String,
}

/// What became of one request at the leader, besides an answer.
enum Missed {
    /// No leader took it.
    NotSent,
    /// It was sent, the answer is missing.
    Unanswered,
}

impl Registry {
    /// Opens `registry.redb` in `dir` (made if absent) and starts the server on the current tokio
    /// runtime. `my_address` is where the other registry servers reach this one.
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
        let path = dir.join("registry.redb");
        let at = path.clone();
        let open = move || Store::open(&at, me);
        Self::start(
            open,
            path,
            Device::Blocking,
            me,
            my_address,
            transport,
            options,
        )
        .await
    }

    /// As [`Self::open`], with the registry file of a state directory.
    ///
    /// # Errors
    /// As [`Self::open`].
    pub async fn open_in(
        state: Arc<dyn StateDir>,
        me: NodeNo,
        my_address: String,
        transport: RaftTransport,
        options: RegistryOptions,
    ) -> Result<Registry, RegistryError> {
        let (path, device) = (state.path().join("registry/registry.redb"), state.device());
        let at = path.clone();
        let open = move || Store::of(state.registry()?, &at, state.device(), me);
        Self::start(open, path, device, me, my_address, transport, options).await
    }

    async fn start(
        open: impl FnOnce() -> Result<Arc<Store>, StoreError> + Send + 'static,
        path: PathBuf,
        device: Device,
        me: NodeNo,
        my_address: String,
        transport: RaftTransport,
        options: RegistryOptions,
    ) -> Result<Registry, RegistryError> {
        let bad = |reason: String| RegistryError::File {
            path: path.clone(),
            reason,
        };
        let opened = open_file(open, &device)
            .await
            .map_err(|e| bad(e.to_string()))?;
        let (store, machine, published) = opened;
        let config = Arc::new(config_of(&options).map_err(bad)?);
        let network = Network {
            transport: transport.clone(),
        };
        let log = LogStore::new(Arc::clone(&store));
        let engine = Engine::new(raft::raft_id(me), config, network, log, machine).await;
        let server = Server::new(engine.map_err(|e| bad(e.to_string()))?, me);
        let (id_prefix, proposals) = (
            RandomState::new().build_hasher().finish(),
            AtomicU64::new(0),
        );
        let inner = Inner {
            me,
            options,
            transport,
            server,
            store,
            published,
            id_prefix,
            proposals,
            my_address,
        };
        Ok(Registry {
            inner: Arc::new(inner),
        })
    }

    /// Makes this server the only voter of a new group; nothing if it is in a group already.
    ///
    /// # Errors
    /// The server has stopped.
    pub async fn initialize(&self) -> Result<(), RegistryError> {
        let inner = &self.inner;
        let me = (raft::raft_id(inner.me), BasicNode::new(&inner.my_address));
        match inner.server.engine.initialize(BTreeMap::from([me])).await {
            Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(e) => Err(RegistryError::Stopped(e.to_string())),
        }
    }

    /// Adds a voter through the leader; it first gets all of the log. Nothing if it votes already
    /// at this address.
    ///
    /// # Errors
    /// No leader, or the new server does not answer, within the deadline.
    pub async fn add_voter(&self, node: NodeNo, address: String) -> Result<(), RegistryError> {
        let request = Request::AddVoter {
            node: raft::raft_id(node),
            address,
        };
        let inner = &self.inner;
        let answered = self.ask_leader(&request, inner.options.deadline, |reply| match reply {
            Reply::VoterAdded => Some(()),
            _ => None,
        });
        answered.await.map_err(|missed| self.missed(&missed))
    }

    /// Takes a server out of the group through the leader: one that has lost its log must not vote or
    /// acknowledge as the one that it was.
    ///
    /// # Errors
    /// No leader within the deadline.
    pub async fn remove_voter(&self, node: NodeNo) -> Result<(), RegistryError> {
        let node = raft::raft_id(node);
        let request = Request::RemoveVoter { node };
        let deadline = self.inner.options.deadline;
        let answered = self.ask_leader(&request, deadline, |reply| match reply {
            Reply::VoterRemoved => Some(()),
            _ => None,
        });
        answered.await.map_err(|missed| self.missed(&missed))
    }

    /// Executes a transaction, exactly once, through the leader. When it returns `Committed`, the
    /// state of this server has it, unless the server was cut off meanwhile.
    ///
    /// # Errors
    /// See [`RegistryError`]; only `UnknownOutcome` leaves open whether it was executed.
    pub async fn propose(&self, transaction: Transaction) -> Result<Outcome, RegistryError> {
        transaction.check()?;
        let command = Command {
            id: self.inner.next_id(),
            transaction,
        };
        raft::check_size(&command, TRANSACTION_BYTES_MAX).map_err(Refusal::TooLarge)?;
        let request = Request::Propose(command);
        let answered =
            self.ask_leader(
                &request,
                self.inner.options.election_max,
                |reply| match reply {
                    Reply::Proposed(outcome) => Some(outcome),
                    _ => None,
                },
            );
        let outcome = answered.await.map_err(|missed| self.missed(&missed))??;
        if let Outcome::Committed(revision) = outcome {
            self.wait_revision(revision).await;
        }
        Ok(outcome)
    }

    /// The state, at least as new as every transaction that was answered before the call.
    ///
    /// # Errors
    /// No leader with a majority within the deadline, or this server is cut off.
    pub async fn barrier(&self) -> Result<Arc<RegistryState>, RegistryError> {
        let until = Instant::now() + self.inner.options.deadline;
        let patience = self.inner.options.election_max;
        let answered = self.ask_leader(&Request::ReadIndex, patience, |reply| match reply {
            Reply::ReadIndex(index) => Some(index),
            _ => None,
        });
        let no_leader = || RegistryError::NoLeader(self.inner.options.deadline);
        let index = answered.await.map_err(|_| no_leader())?;
        let mut applied = self.inner.published.applied.clone();
        match timeout_at(until, applied.wait_for(|applied| *applied >= index)).await {
            Ok(Ok(_)) => Ok(self.state()),
            Ok(Err(_)) => Err(self.inner.stopped()),
            Err(_) => Err(no_leader()),
        }
    }

    /// Reads, builds a transaction, executes it; reads again after a conflict, a bounded number of
    /// times. Gives what the closure gave with the transaction that was executed.
    ///
    /// # Errors
    /// The closure's error, or the registry's.
    pub async fn update<T, E>(
        &self,
        mut f: impl FnMut(&RegistryState) -> Result<(Transaction, T), E>,
    ) -> Result<T, UpdateError<E>> {
        for _ in 0..REGISTRY_UPDATE_TRIES {
            let state = self.barrier().await?;
            let (transaction, value) = f(&state).map_err(UpdateError::Refused)?;
            if let Outcome::Committed(_) = self.propose(transaction).await? {
                return Ok(value);
            }
        }
        Err(RegistryError::Contention(REGISTRY_UPDATE_TRIES).into())
    }

    /// As [`Self::update`], but builds the transaction from the state as this server has it at first,
    /// which saves a round trip to the leader. For transactions that expect everything that they rest
    /// on: an old state is then a conflict or a refusal, and both are tried again.
    ///
    /// # Errors
    /// As [`Self::update`].
    pub async fn update_at_once<T, E>(
        &self,
        mut f: impl FnMut(&RegistryState) -> Result<(Transaction, T), E>,
    ) -> Result<T, UpdateError<E>> {
        if let Ok((transaction, value)) = f(&self.state())
            && let Outcome::Committed(_) = self.propose(transaction).await?
        {
            return Ok(value);
        }
        self.update(f).await
    }

    /// The state as this server has it; may be old.
    #[must_use]
    pub fn state(&self) -> Arc<RegistryState> {
        self.inner.published.state.borrow().clone()
    }

    /// Follows the state as this server has it.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<Arc<RegistryState>> {
        self.inner.published.state.clone()
    }

    /// What this server knows about the group. A leader that did not speak since the start, or not
    /// of late, is not named.
    #[must_use]
    pub fn status(&self) -> RegistryStatus {
        let inner = &self.inner;
        let metrics = inner.server.engine.metrics();
        let metrics = metrics.borrow();
        let leader = metrics.current_leader.map(raft::node_no);
        let quorum_ms = metrics.millis_since_quorum_ack;
        let leader = leader.filter(|leader| inner.confirmed(*leader, quorum_ms));
        RegistryStatus {
            leader,
            term: metrics.current_term,
            last_applied: *inner.published.applied.borrow(),
            voters: metrics
                .membership_config
                .voter_ids()
                .map(raft::node_no)
                .collect(),
            phase: if leader.is_some() {
                Phase::Writable
            } else {
                Phase::Readable
            },
        }
    }

    /// Waits until the status is as `wanted`; checks at every change and every heartbeat.
    ///
    /// # Errors
    /// It was not within `patience`; carries the last status.
    pub async fn wait_status(
        &self,
        patience: Duration,
        wanted: impl Fn(&RegistryStatus) -> bool,
    ) -> Result<RegistryStatus, RegistryStatus> {
        let until = Instant::now() + patience;
        let mut changes = self.inner.server.engine.metrics();
        loop {
            let status = self.status();
            if wanted(&status) {
                return Ok(status);
            }
            if Instant::now() >= until {
                return Err(status);
            }
            let next = until.min(Instant::now() + self.inner.options.heartbeat);
            if matches!(timeout_at(next, changes.changed()).await, Ok(Err(_))) {
                return Err(status);
            }
        }
    }

    /// Answers a message of another registry server. Any bytes give an answer.
    pub async fn handle_rpc(&self, message: Vec<u8>) -> Vec<u8> {
        self.inner.server.answer(&message).await
    }

    /// Stops the server and closes its file.
    pub async fn shutdown(&self) {
        if let Err(e) = self.inner.server.engine.shutdown().await {
            tracing::warn!(error = %e, "the registry task ended badly");
        }
        let store = Arc::clone(&self.inner.store);
        let device = store.device().clone();
        if let Err(e) = device.run(move || store.close()).await {
            tracing::warn!(error = %e, "the registry file was not closed");
        }
    }

    /// Asks whoever leads, again after every failure, until the deadline.
    async fn ask_leader<T>(
        &self,
        request: &Request,
        patience: Duration,
        wanted: impl Fn(Reply) -> Option<T>,
    ) -> Result<T, Missed> {
        let until = Instant::now() + self.inner.options.deadline;
        let mut changes = self.inner.server.engine.metrics();
        let mut missed = Missed::NotSent;
        while Instant::now() < until {
            changes.mark_unchanged();
            match self.ask_once(request, patience, until).await {
                Some(Reply::NotLeader) | None => {}
                Some(Reply::Failed(reason)) => {
                    tracing::debug!(reason, "the registry leader failed to answer");
                    missed = Missed::Unanswered;
                }
                Some(reply) => match wanted(reply) {
                    Some(value) => return Ok(value),
                    None => missed = Missed::Unanswered,
                },
            }
            // The metrics change with every message; without a pause a leader that has lost its
            // majority would be asked again and again at once.
            sleep(self.inner.options.heartbeat / 10).await;
            let next = until.min(Instant::now() + self.inner.options.heartbeat);
            if matches!(timeout_at(next, changes.changed()).await, Ok(Err(_))) {
                break;
            }
        }
        Err(missed)
    }

    /// Asks the leader once; `None` if none is known or nothing was sent.
    async fn ask_once(
        &self,
        request: &Request,
        patience: Duration,
        until: Instant,
    ) -> Option<Reply> {
        let inner = &self.inner;
        let (id, address) = inner.leader_address()?;
        let patience = patience.min(until.saturating_duration_since(Instant::now()));
        if id == raft::raft_id(inner.me) {
            let done = tokio::time::timeout(patience, inner.server.execute(request.clone()));
            let late = |_| Reply::Failed(format!("not done in {patience:?}"));
            return Some(done.await.unwrap_or_else(late));
        }
        match raft::call(&inner.transport, id, &address, request.clone(), patience).await {
            Ok(reply) => Some(reply),
            Err(CallError::TooLarge(_)) => None,
            Err(e) => Some(Reply::Failed(e.to_string())),
        }
    }

    /// Waits, within the deadline, until the state of this server has the revision.
    async fn wait_revision(&self, revision: Revision) {
        let mut state = self.watch();
        let caught_up = state.wait_for(|state| state.revision() >= revision);
        if tokio::time::timeout(self.inner.options.deadline, caught_up)
            .await
            .is_err()
        {
            tracing::warn!(%revision, "the change is made, but this server does not hear of it");
        }
    }

    fn missed(&self, missed: &Missed) -> RegistryError {
        let inner = &self.inner;
        match (
            missed,
            &inner.server.engine.metrics().borrow().running_state,
        ) {
            (Missed::Unanswered, _) => RegistryError::UnknownOutcome(inner.options.deadline),
            (Missed::NotSent, Err(e)) => RegistryError::Stopped(e.to_string()),
            (Missed::NotSent, Ok(())) => RegistryError::NoLeader(inner.options.deadline),
        }
    }
}

impl Inner {
    fn next_id(&self) -> u128 {
        let low = self.proposals.fetch_add(1, Ordering::Relaxed);
        u128::from(self.id_prefix) << 64 | u128::from(low)
    }

    fn stopped(&self) -> RegistryError {
        let state = self.server.engine.metrics().borrow().running_state.clone();
        RegistryError::Stopped(
            state
                .err()
                .map_or_else(|| "closed".to_owned(), |e| e.to_string()),
        )
    }

    fn leader_address(&self) -> Option<(u64, String)> {
        let metrics = self.server.engine.metrics();
        let metrics = metrics.borrow();
        let id = metrics.current_leader?;
        let node = metrics.membership_config.membership().get_node(&id)?;
        Some((id, node.addr.clone()))
    }

    /// Whether a majority (for this server as the leader) or the leader was heard of late.
    fn confirmed(&self, leader: NodeNo, quorum_ms: Option<u64>) -> bool {
        let silent = if leader == self.me {
            quorum_ms.map(Duration::from_millis)
        } else {
            self.server.leader_heard().map(|heard| heard.elapsed())
        };
        silent.is_some_and(|silent| silent <= self.options.election_max)
    }
}

async fn open_file(
    open: impl FnOnce() -> Result<Arc<Store>, StoreError> + Send + 'static,
    device: &Device,
) -> Result<(Arc<Store>, StateMachine, Published), StoreError> {
    let opened = device.run(move || {
        let store = open()?;
        let (machine, published) = StateMachine::open(Arc::clone(&store))?;
        Ok((store, machine, published))
    });
    opened
        .await
        .unwrap_or_else(|e| Err(StoreError::Redb(e.to_string())))
}

fn config_of(options: &RegistryOptions) -> Result<Config, String> {
    let ms = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
    let config = Config {
        cluster_name: "blockd".to_owned(),
        heartbeat_interval: ms(options.heartbeat),
        election_timeout_min: ms(options.election_min),
        election_timeout_max: ms(options.election_max),
        install_snapshot_timeout: ms(options.deadline),
        snapshot_policy: SnapshotPolicy::LogsSinceLast(options.entries_per_snapshot),
        max_in_snapshot_log_to_keep: options.entries_per_snapshot,
        replication_lag_threshold: options.entries_per_snapshot.saturating_mul(2),
        snapshot_max_chunk_size: REGISTRY_SNAPSHOT_CHUNK_BYTES,
        ..Config::default()
    };
    config.validate().map_err(|e| e.to_string())
}
