//! The owner: what a server does with requests for pages that it owns.
//!
//! Every request passes the same gates, whether it came from a local NBD connection or from
//! a peer: the routing epoch must match (S003-18), the page must be ours, a write must not
//! run while a snapshot holds the volume (`cut`, S003-36), nor under a lease that is not its
//! requester's (`fence`). The owner executes, and knows nothing of who
//! coordinates a snapshot or decides a routing table.

use super::cut::{Cut, Executing, Width};
use super::error::DataError;
use super::fence::FenceGate;
use super::interrupted::Interrupted;
use super::lineage::{LineageGate, Published};
use super::moving::{Hold, Moving, Noted};
use super::page_store::{PageAt, PageStore, ReadPart, StoreError};
use super::router::{EpochVerdict, RoutingTable, judge_epoch};
use super::traffic::Traffic;
use crate::id::{Epoch, LayerRun, LeaseEpoch, NodeNo, PageNo, SnapshotId, VolumeId};
use crate::io::hlc::Hlc;
use crate::limits::FORWARD_DEADLINE_MS;
use crate::planted::{Plant, planted};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// A range in a page, at the routing epoch under which the requester sent it here.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub page: PageNo,
    pub offset_bytes: u32,
    pub len_bytes: u32,
    pub epoch: Epoch,
    /// The lease under which its requester changes it.
    pub lease: LeaseEpoch,
}

/// What this server knows of one volume; lives as long as the volume does.
pub struct VolumeState {
    pub id: VolumeId,
    table: RefCell<Rc<RoutingTable>>,
    /// What a snapshot that is being taken keeps waiting.
    pub cut: Rc<Cut>,
    fence: RefCell<FenceGate>,
    fence_changed: Notify,
    /// Pages that move to another owner.
    pub moving: Rc<Moving>,
    /// The write verifier with which each server gave pages of the volume away.
    given: RefCell<Vec<(NodeNo, u64)>>,
    /// Requests for pages since the start.
    requests: Cell<u64>,
    pub traffic: Traffic,
    pub(super) lineage: LineageGate,
    pub(super) interrupted: Interrupted,
}

/// The part of a server that executes requests for its own pages.
pub struct Owner {
    pub me: NodeNo,
    pub store: PageStore,
    hlc: Arc<Hlc>,
    /// The write verifier: changes when acknowledged, unflushed writes may have been lost.
    pub verifier: u64,
    volumes: RefCell<HashMap<VolumeId, Rc<VolumeState>>>,
    /// Requests for pages since the start, of all volumes.
    served: Cell<u64>,
    /// Every volume is known of which spans were under way before the start, or will not be.
    pub(super) spans_resumed: Cell<bool>,
    /// Lease epochs that were confirmed before the start.
    confirmed: HashMap<VolumeId, LeaseEpoch>,
    /// Pages that were being handed over before the start.
    doubted: RefCell<HashMap<VolumeId, Range<u32>>>,
    tables_changed: Notify,
}

/// One change that the fence has let through; it is executed when this is dropped.
struct Changing {
    state: Rc<VolumeState>,
    began: LeaseEpoch,
    _noted: Noted,
}

impl Drop for Changing {
    fn drop(&mut self) {
        if self.state.fence.borrow_mut().end(self.began) {
            self.state.fence_changed.notify_waiters();
        }
    }
}

impl VolumeState {
    #[must_use]
    pub fn table(&self) -> Rc<RoutingTable> {
        Rc::clone(&self.table.borrow())
    }

    /// Whether a change under this lease is admitted now.
    ///
    /// # Errors
    /// As [`FenceGate::check`].
    pub fn check_lease(&self, lease: LeaseEpoch) -> Result<(), DataError> {
        self.fence.borrow().check(lease)
    }

    fn begin_change(self: &Rc<Self>, at: Target) -> Result<Changing, DataError> {
        let bytes = at.offset_bytes..at.offset_bytes.saturating_add(at.len_bytes);
        Ok(Changing {
            began: self.fence.borrow_mut().begin(at.lease)?,
            state: Rc::clone(self),
            _noted: self.moving.change(at.page, bytes),
        })
    }

    /// Waits until no change that was admitted under an earlier lease epoch is being executed; gives
    /// the epoch now.
    pub async fn fenced(&self) -> LeaseEpoch {
        loop {
            let changed = self.fence_changed.notified();
            if let Some(epoch) = self.fence.borrow().drained() {
                return epoch;
            }
            changed.await;
        }
    }

    /// This epoch is confirmed, durably: nothing is changed any more under an earlier one.
    pub fn confirm_lease(&self, epoch: LeaseEpoch) {
        self.fence.borrow_mut().confirm(epoch);
    }

    /// Lets in a change over several pages, unless a snapshot is being taken or pages are handed over.
    ///
    /// # Errors
    /// [`DataError::Held`].
    pub fn try_span(&self) -> Result<Executing, DataError> {
        let span = self.moving.open_span()?;
        let mut executing = self.cut.try_execute(Width::Wide)?;
        executing.belongs_to(span);
        Ok(executing)
    }

    /// The verifier with which a server gave its last pages of the volume away.
    #[must_use]
    pub fn given_by(&self, node: NodeNo) -> Option<u64> {
        let given = self.given.borrow();
        let found = given.iter().find(|(giver, _)| *giver == node);
        found.map(|(_, verifier)| *verifier)
    }

    /// Takes over what the registry says of pages that were given away.
    pub fn publish_given(&self, given: &[(NodeNo, u64)]) {
        if *self.given.borrow() != given {
            *self.given.borrow_mut() = given.to_vec();
        }
    }
}

impl Owner {
    /// `confirmed` are the lease epochs that this server has ever confirmed.
    #[must_use]
    pub fn new(
        me: NodeNo,
        store: PageStore,
        hlc: Arc<Hlc>,
        verifier: u64,
        confirmed: HashMap<VolumeId, LeaseEpoch>,
    ) -> Self {
        Self {
            me,
            store,
            hlc,
            verifier,
            confirmed,
            doubted: RefCell::default(),
            served: Cell::default(),
            spans_resumed: Cell::default(),
            volumes: RefCell::default(),
            tables_changed: Notify::new(),
        }
    }

    /// Says which pages were being handed over before the start, before any table is published.
    pub fn doubt(&self, pages: impl Iterator<Item = (VolumeId, Range<u32>)>) {
        self.doubted.borrow_mut().extend(pages);
    }

    /// Takes over the routing tables, leases and lineages of the registry; volumes that are not
    /// among them are gone. A volume whose store has something to do first keeps its former table
    /// until that is done.
    pub fn publish(self: &Rc<Self>, published: Vec<Published>) {
        let mut volumes = self.volumes.borrow_mut();
        let mut next = HashMap::with_capacity(published.len());
        for published in published {
            let table = &published.table;
            let state = match volumes.remove(&table.volume) {
                Some(state) => state,
                None => self.new_volume(table),
            };
            state.fence.borrow_mut().publish(published.fence.clone());
            next.insert(state.id, Rc::clone(&state));
            self.take_over(&state, published);
        }
        *volumes = next;
        drop(volumes);
        self.tables_changed.notify_waiters();
    }

    /// Requests for pages of each volume since the start.
    #[must_use]
    pub fn requests(&self) -> Vec<(VolumeId, u64)> {
        let volumes = self.volumes.borrow();
        let counts = volumes
            .values()
            .map(|state| (state.id, state.requests.get()));
        counts.collect()
    }

    /// Requests for pages of all volumes since the start.
    #[must_use]
    pub fn served(&self) -> u64 {
        self.served.get()
    }

    fn new_volume(&self, table: &RoutingTable) -> Rc<VolumeState> {
        let state = VolumeState::new(table.volume, self.confirmed.get(&table.volume));
        if let Some(pages) = self.doubted.borrow_mut().remove(&table.volume) {
            state.moving.doubt(pages);
        }
        let state = Rc::new(state);
        self.resume_spans(&state);
        state
    }

    /// The table of a volume counts from now on.
    pub(super) fn set_table(&self, state: &VolumeState, table: RoutingTable) {
        if *state.table.borrow().as_ref() != table {
            *state.table.borrow_mut() = Rc::new(table);
        }
        self.tables_changed.notify_waiters();
    }

    /// The volume's state, if the published tables have it.
    #[must_use]
    pub fn volume(&self, id: VolumeId) -> Option<Rc<VolumeState>> {
        self.volumes.borrow().get(&id).map(Rc::clone)
    }

    /// The states of all volumes.
    pub(super) fn volumes(&self) -> Vec<Rc<VolumeState>> {
        self.volumes.borrow().values().map(Rc::clone).collect()
    }

    /// Waits until `ready` says so after a publication, or the deadline has passed.
    pub async fn await_tables(&self, deadline: Instant, ready: impl Fn(&Self) -> bool) -> bool {
        loop {
            let changed = self.tables_changed.notified();
            if ready(self) {
                return true;
            }
            if timeout_at(deadline, changed).await.is_err() {
                return ready(self);
            }
        }
    }

    /// Admits a request for a page: right epoch, ours, inside the page, and not held by a move.
    async fn admit(
        &self,
        volume: VolumeId,
        at: Target,
        least: Hold,
    ) -> Result<Rc<VolumeState>, DataError> {
        loop {
            let state = self.admit_now(volume, at).await?;
            if !state.moving.holds(at.page, least) {
                state.requests.set(state.requests.get() + 1);
                self.served.set(self.served.get() + 1);
                return Ok(state);
            }
            state.moving.passed(at.page, least).await;
        }
    }

    async fn admit_now(&self, volume: VolumeId, at: Target) -> Result<Rc<VolumeState>, DataError> {
        let state = match self.volume(volume) {
            Some(state) if state.table.borrow().epoch >= at.epoch => state,
            _ => self.catch_up(volume, at.epoch).await?,
        };
        let table = state.table.borrow();
        if (judge_epoch(table.epoch, at.epoch) != EpochVerdict::Serve
            || table.owner(at.page) != Some(self.me))
            && !planted(Plant::SkipEpochCheck)
        {
            return Err(DataError::Stale(table.epoch));
        }
        if !table.holds(at.offset_bytes, at.len_bytes) {
            return Err(DataError::OutOfRange);
        }
        drop(table);
        Ok(state)
    }

    /// The volume's state at `epoch` or later (S003-06): a server with an older table catches up
    /// before it serves.
    ///
    /// # Errors
    /// [`DataError::Gone`] when no table of the volume comes in time.
    pub async fn catch_up(
        &self,
        volume: VolumeId,
        epoch: Epoch,
    ) -> Result<Rc<VolumeState>, DataError> {
        let has_epoch = |owner: &Self| {
            let volume = owner.volume(volume);
            volume.is_some_and(|volume| volume.table.borrow().epoch >= epoch)
        };
        let deadline = Instant::now() + Duration::from_millis(FORWARD_DEADLINE_MS / 10);
        self.await_tables(deadline, has_epoch).await;
        self.volume(volume).ok_or(DataError::Gone)
    }

    /// Reads a range of one page.
    ///
    /// # Errors
    /// [`DataError`]; `Damaged` when the stored bytes do not match their checksum.
    pub async fn read(
        &self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
        at: Target,
    ) -> Result<Vec<ReadPart>, DataError> {
        let state = self.admit(volume, at, Hold::Everything).await?;
        state.lineage.check_online(snapshot)?;
        let read = self.store.read(at.in_store(volume), snapshot).await;
        let parts = state.traffic.reads.count(at.len_bytes, read)?;
        // The store may have dropped the page while its bytes were fetched.
        let epoch = state.table.borrow().epoch;
        if epoch != at.epoch {
            return Err(DataError::Stale(epoch));
        }
        self.show(&state, snapshot, at).await;
        Ok(parts)
    }

    /// Waits while the answer to a read would show a write whose completion is parked. Called in
    /// the same step in which the range was read.
    async fn show(&self, state: &VolumeState, snapshot: Option<SnapshotId>, at: Target) {
        let Some(mark) = state.cut.mark().filter(|_| snapshot.is_none()) else {
            return;
        };
        if planted(Plant::ReadBehindMark) {
            return;
        }
        let layers = self.store.layers(at.in_store(state.id), None, Some(mark));
        if layers.is_ok_and(|runs| runs.iter().any(|run| run.changed)) {
            state.cut.unparked(Some(mark)).await;
        }
    }

    /// Which parts of a range hold data: `(len_bytes, allocated)`.
    ///
    /// # Errors
    /// [`DataError`].
    pub async fn extents(
        &self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
        at: Target,
    ) -> Result<Vec<(u32, bool)>, DataError> {
        let state = self.admit(volume, at, Hold::Everything).await?;
        state.lineage.check_online(snapshot)?;
        let extents = self.store.extents(at.in_store(volume), snapshot)?;
        self.show(&state, snapshot, at).await;
        Ok(extents)
    }

    /// In which layers a range was written, and what changed since a snapshot (`None`: what has data).
    ///
    /// # Errors
    /// [`DataError`].
    pub async fn layers(
        &self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
        since: Option<SnapshotId>,
        at: Target,
    ) -> Result<Vec<LayerRun>, DataError> {
        let state = self.admit(volume, at, Hold::Everything).await?;
        state.lineage.check_online(snapshot)?;
        let layers = self.store.layers(at.in_store(volume), snapshot, since)?;
        self.show(&state, snapshot, at).await;
        Ok(layers)
    }

    /// Writes a range of one page; `span` is the gate already passed by a spanning request.
    ///
    /// # Errors
    /// [`DataError`]; the range is unchanged, or wholly written, never in part.
    pub async fn write(
        &self,
        volume: VolumeId,
        at: Target,
        data: Bytes,
        fua: bool,
        span: Option<&Executing>,
    ) -> Result<(), DataError> {
        let store_at = at.in_store(volume);
        let width = Width::of(store_at.is_written_at_once());
        let passed = self.pass_gates(volume, at, width, span).await?;
        self.record(store_at, at.epoch);
        let written = self.store.write(store_at, data, at.epoch).await;
        let traffic = &passed.1.state.traffic;
        traffic.writes.count(at.len_bytes, written)?;
        self.complete(passed, fua).await
    }

    /// Ends a change that was executed in this step: it is in the log, on one side of every mark.
    async fn complete(
        &self,
        passed: (Option<Executing>, Changing),
        fua: bool,
    ) -> Result<(), DataError> {
        let cut = Rc::clone(&passed.1.state.cut);
        let mark = cut.mark();
        let volume = passed.1.state.id;
        cut.stamp(|| (self.hlc.tick(), self.store.last_era(volume)));
        drop(passed);
        if fua {
            self.store.flush().await?;
        }
        cut.unparked(mark).await;
        Ok(())
    }

    /// The execution record, for whoever watches that a page has one owner in an epoch (promise 6).
    fn record(&self, at: PageAt, epoch: Epoch) {
        tracing::trace!(
            target: "blockd::executed",
            node = u64::from(self.me.0),
            volume = at.volume.0,
            page = u64::from(at.page.0),
            epoch = u64::from(epoch.0),
        );
    }

    /// Admits a change and passes the gates; table and lease may have changed at the first.
    async fn pass_gates(
        &self,
        volume: VolumeId,
        at: Target,
        width: Width,
        span: Option<&Executing>,
    ) -> Result<(Option<Executing>, Changing), DataError> {
        if span.is_some() {
            // A hand-over waits for open spans: their parts are not held.
            let state = self.admit(volume, at, Hold::Everything).await?;
            state.lineage.check_online(None)?;
            return Ok((None, state.begin_change(at)?));
        }
        loop {
            let state = self.admit(volume, at, Hold::Changes).await?;
            state.lineage.check_online(None)?;
            if let Ok(gate) = state.cut.try_execute(width) {
                return Ok((Some(gate), state.begin_change(at)?));
            }
            drop(state.cut.execute(width).await);
        }
    }

    /// Makes a range of one page read as zeros.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn zero(
        &self,
        volume: VolumeId,
        at: Target,
        keep_allocated: bool,
        fua: bool,
        span: Option<&Executing>,
    ) -> Result<(), DataError> {
        let store_at = at.in_store(volume);
        let width = Width::of(match keep_allocated {
            true => store_at.is_written_at_once(),
            false => store_at.is_zeroed_at_once(),
        });
        let passed = self.pass_gates(volume, at, width, span).await?;
        if planted(Plant::SkipTrim) {
            return Ok(());
        }
        self.record(store_at, at.epoch);
        let zeroed = self.store.zero(store_at, keep_allocated, at.epoch).await;
        let traffic = &passed.1.state.traffic;
        traffic.zeroes.count(at.len_bytes, zeroed)?;
        self.complete(passed, fua).await
    }

    /// Everything that this owner acknowledged of the volume is durable when it returns. `epoch` is
    /// that of the table from which the requester knows whom to ask: with an older one it would
    /// leave out an owner.
    ///
    /// # Errors
    /// [`DataError::Damaged`] when the store has failed; [`DataError::Stale`].
    pub async fn flush(&self, volume: VolumeId, epoch: Epoch) -> Result<(), DataError> {
        let state = match self.volume(volume) {
            Some(state) if state.table.borrow().epoch >= epoch => state,
            _ => self.catch_up(volume, epoch).await?,
        };
        state.moving.settled().await;
        let now = state.table.borrow().epoch;
        if judge_epoch(now, epoch) != EpochVerdict::Serve {
            return Err(DataError::Stale(now));
        }
        Ok(self.store.flush().await?)
    }
}

impl VolumeState {
    fn new(id: VolumeId, confirmed: Option<&LeaseEpoch>) -> Self {
        Self {
            id,
            table: RefCell::new(Rc::new(RoutingTable::empty(id))),
            cut: Rc::default(),
            fence: RefCell::new(FenceGate::new(confirmed.copied().unwrap_or_default())),
            fence_changed: Notify::new(),
            moving: Rc::default(),
            given: RefCell::default(),
            requests: Cell::new(0),
            traffic: Traffic::default(),
            lineage: LineageGate::default(),
            interrupted: Interrupted::default(),
        }
    }
}

impl Target {
    fn in_store(self, volume: VolumeId) -> PageAt {
        PageAt {
            volume,
            page: self.page,
            offset_bytes: self.offset_bytes,
            len_bytes: self.len_bytes,
        }
    }
}

impl From<StoreError> for DataError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NoSpace => Self::NoSpace,
            StoreError::Closed => Self::Unavailable("the server is stopping".to_owned()),
            StoreError::UnknownSnapshot { .. } | StoreError::VolumeDeleted { .. } => Self::Gone,
            behind @ (StoreError::Behind { .. } | StoreError::HasClone { .. }) => {
                Self::Unavailable(behind.to_string())
            }
            other => Self::Damaged(other.to_string()),
        }
    }
}
