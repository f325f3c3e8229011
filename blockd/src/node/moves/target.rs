//! The new owner of moving pages, before it is their owner: it takes in what the source sends.
//!
//! What came for an attempt is taken in only while the registry has this attempt, and nothing after
//! it was sealed: a message that is late can never change a page that is served here.

use super::order::{MoveOrder, MovedData};
use super::owns;
use crate::control::registry::routes::owners;
use crate::control::registry::{MoveBatch, MovePhase, MoveRecord, RegistryState, SnapshotState};
use crate::data::error::DataError;
use crate::data::owner::VolumeState;
use crate::data::page_store::{History, StoreError};
use crate::id::{PageNo, SnapshotId, VolumeId};
use crate::io::link::decode_control;
use crate::io::wire::{Frame, Kind, Payload, Status, flags};
use crate::limits::MOVE_SNAPSHOT_WAIT_MS;
use crate::node::Member;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

/// A batch that moves to this server.
struct Receiving {
    attempt: u64,
    batch: MoveBatch,
    sealed: Cell<bool>,
    executing: Cell<u32>,
    changed: Notify,
}

/// All batches that move to this server, by volume.
#[derive(Default)]
pub(super) struct Arrivals(RefCell<HashMap<VolumeId, Rc<Receiving>>>);

/// Data that is being taken in.
struct TakingIn(Rc<Receiving>);

impl Drop for TakingIn {
    fn drop(&mut self) {
        self.0.executing.set(self.0.executing.get() - 1);
        self.0.changed.notify_waiters();
    }
}

impl Receiving {
    fn take_in(self: &Rc<Self>) -> Result<TakingIn, DataError> {
        if self.sealed.get() {
            return Err(unavailable("the batch is sealed"));
        }
        self.executing.set(self.executing.get() + 1);
        Ok(TakingIn(Rc::clone(self)))
    }

    /// Takes nothing more; returns when nothing is being taken in.
    async fn seal(&self) {
        self.sealed.set(true);
        loop {
            let changed = self.changed.notified();
            if self.executing.get() == 0 {
                return;
            }
            changed.await;
        }
    }
}

impl Arrivals {
    /// Whether this page is on its way to this server.
    pub(super) fn has(&self, volume: VolumeId, page: PageNo) -> bool {
        let all = self.0.borrow();
        all.get(&volume)
            .is_some_and(|receiving| receiving.batch.has(page.0))
    }

    /// Whether any page of the volume is on its way to this server.
    pub(super) fn has_any(&self, volume: VolumeId) -> bool {
        self.0.borrow().contains_key(&volume)
    }

    /// Another volume of the same family of clones of which the same pages are on their way here. One
    /// shows what the other has, so they come one after the other.
    fn relative(
        &self,
        state: &RegistryState,
        volume: VolumeId,
        batch: &MoveBatch,
    ) -> Option<VolumeId> {
        let first = |volume| state.ancestors(volume).last().unwrap_or(volume);
        let all = self.0.borrow();
        let mut others = all.iter().filter(|(id, _)| **id != volume);
        let found = others.find(|(id, receiving)| {
            let other = receiving.batch;
            let overlaps = batch.first_page < other.end() && other.first_page < batch.end();
            overlaps && first(**id) == first(volume)
        });
        found.map(|(id, _)| *id)
    }

    /// Forgets batches that the registry does not have any more. Its copy here is at least as new
    /// as their begin.
    pub(super) fn tidy(&self, state: &RegistryState) {
        self.0.borrow_mut().retain(|volume, receiving| {
            let record = state.page_move(*volume);
            record.is_some_and(|record| {
                record.attempt == receiving.attempt && matches!(record.phase, MovePhase::Copying(_))
            })
        });
    }

    fn of(&self, volume: VolumeId, attempt: u64) -> Result<Rc<Receiving>, DataError> {
        let all = self.0.borrow();
        let found = all.get(&volume).filter(|found| found.attempt == attempt);
        let text =
            "this server does not wait for that batch (it was restarted, or the move went on)";
        found.cloned().ok_or_else(|| unavailable(text))
    }
}

fn unavailable(text: impl ToString) -> DataError {
    DataError::Unavailable(text.to_string())
}

/// Carries out what a source says.
pub(crate) async fn answer(member: &Member, request: &Frame) -> Frame {
    let done = match request.kind {
        Kind::MoveData => take_in(member, request).await,
        _ => match decode_control(request.payload.clone()) {
            Ok(order) => carry_out(member, request.volume, request.aux, order).await,
            Err(_) => Err(DataError::Malformed("unreadable order of a move")),
        },
    };
    match done {
        Ok(()) => {
            let mut reply = request.answer(Status::Ok, Payload::default());
            if member
                .moves
                .clients
                .ask(member.owner().served(), Instant::now())
            {
                reply.flags |= flags::ASKED;
            }
            reply
        }
        Err(error) => error.reply_to(request),
    }
}

async fn carry_out(
    member: &Member,
    volume: VolumeId,
    attempt: u64,
    order: MoveOrder,
) -> Result<(), DataError> {
    let arrivals = &member.moves.arrivals;
    match order {
        MoveOrder::Begin {
            first_page,
            page_count,
            history,
        } => {
            let batch = begin(member, volume, attempt).await?;
            if (batch.first_page, batch.page_count) != (first_page, page_count) {
                return Err(DataError::Malformed("another batch than the registry has"));
            }
            clear(member, volume, &batch).await?;
            inherit(member, volume, &history).await?;
            register(member, volume, &history.order()).await
        }
        MoveOrder::Settle => {
            arrivals.of(volume, attempt)?.sealed.set(false);
            Ok(member.owner().store.flush().await?)
        }
        MoveOrder::Seal { snapshots } => {
            let receiving = arrivals.of(volume, attempt)?;
            receiving.seal().await;
            register(member, volume, &snapshots).await?;
            let lease = member.registry.state().lease(volume).epoch;
            if lease.0 > 0 {
                member.leases.confirm(member, volume, lease).await?;
            }
            member.owner().store.flush().await?;
            arrivals.of(volume, attempt).map(drop)
        }
    }
}

/// Waits for the batch of this attempt from now on, if it is the one that the registry has.
async fn begin(member: &Member, volume: VolumeId, attempt: u64) -> Result<MoveBatch, DataError> {
    let state = member.registry.barrier().await.map_err(unavailable)?;
    member.publish();
    let record = state.page_move(volume).filter(|r| r.attempt == attempt);
    let batch = match record.map(|record| &record.phase) {
        Some(MovePhase::Copying(batch)) if batch.to == member.number() => *batch,
        _ => return Err(unavailable("the registry does not have this batch")),
    };
    let is_settled = |volume: &VolumeState| volume.is_settled();
    if !member
        .owner()
        .volume(volume)
        .is_some_and(|state| is_settled(&state))
    {
        return Err(unavailable(
            "the volume is still being rolled back or cloned here",
        ));
    }
    let arrivals = &member.moves.arrivals;
    if let Some(other) = arrivals.relative(&state, volume, &batch) {
        return Err(unavailable(format!(
            "the same pages of volume {other} come first"
        )));
    }
    let before = arrivals.0.borrow_mut().remove(&volume);
    if let Some(before) = before {
        before.seal().await;
    }
    let receiving = Receiving {
        attempt,
        batch,
        sealed: Cell::new(false),
        executing: Cell::new(0),
        changed: Notify::new(),
    };
    arrivals.0.borrow_mut().insert(volume, Rc::new(receiving));
    Ok(batch)
}

/// Drops what earlier attempts left here, also of what the volume was cloned from: the volume must
/// not show a half of it.
async fn clear(member: &Member, volume: VolumeId, batch: &MoveBatch) -> Result<(), DataError> {
    let state = member.registry.state();
    for volume in std::iter::once(volume).chain(state.ancestors(volume)) {
        let leaves = state.page_move(volume).and_then(MoveRecord::batch);
        if leaves.is_some_and(|leaving| leaving.from == member.number()) {
            return Err(unavailable(
                "pages of the same family are leaving this server",
            ));
        }
        let held = member.owner().store.held_pages(volume).into_keys();
        drop_foreign(member, volume, held.filter(|page| batch.has(page.0))).await?;
    }
    Ok(())
}

async fn drop_foreign(
    member: &Member,
    volume: VolumeId,
    pages: impl Iterator<Item = PageNo>,
) -> Result<(), DataError> {
    let store = &member.owner().store;
    for page in pages {
        let is_foreign = || !owns(member, volume, page);
        store.drop_page(volume, page, is_foreign).await?;
    }
    Ok(())
}

/// Takes over the history of a volume of which this server has no page yet. An owner has carried out
/// every rollback itself.
async fn inherit(member: &Member, volume: VolumeId, history: &History) -> Result<(), DataError> {
    let (store, me) = (&member.owner().store, member.number());
    let state = member.registry.state();
    let routes = state
        .volume(volume)
        .map_or(&[][..], |volume| &volume.routes);
    if owners(routes).contains_key(&me) {
        return match store.history(volume).rollbacks.len() == history.rollbacks.len() {
            true => Ok(()),
            false => Err(unavailable("a rollback was carried out on one side only")),
        };
    }
    drop_foreign(member, volume, store.held_pages(volume).into_keys()).await?;
    let mut history = history.clone();
    history
        .snapshots
        .retain(|(id, _)| is_live(&state, volume, *id));
    Ok(store.adopt_history(volume, &history).await?)
}

fn is_live(state: &RegistryState, volume: VolumeId, id: SnapshotId) -> bool {
    use SnapshotState::{Committed, Pending};
    let found = state.snapshot(volume, id).map(|record| record.state);
    matches!(found, Some(Pending | Committed))
}

async fn take_in(member: &Member, request: &Frame) -> Result<(), DataError> {
    let volume = request.volume;
    let receiving = member.moves.arrivals.of(volume, request.aux)?;
    let (head, data) = MovedData::decode(request.payload.clone())?;
    let taking_in = receiving.take_in()?;
    register(member, volume, &head.snapshots).await?;
    let mut rest = &data[..];
    for chunk in &head.chunks {
        if !receiving.batch.has(chunk.page.0) || owns(member, volume, chunk.page) {
            return Err(DataError::Malformed(
                "a chunk of a page that does not move here",
            ));
        }
        let sizes = chunk.versions.iter().map(|version| version.data_bytes());
        let (own, behind) = rest.split_at(sizes.sum::<usize>().min(rest.len()));
        rest = behind;
        let store = &member.owner().store;
        store.take_in(volume, &head.snapshots, chunk, own).await?;
        // The clients' requests come first.
        yield_now().await;
    }
    drop(taking_in);
    Ok(())
}

/// Makes the store know the snapshots of the source, in their order, before anything that was
/// written after them is taken in. What the registry does not have was dropped, or never came to be.
async fn register(
    member: &Member,
    volume: VolumeId,
    snapshots: &[SnapshotId],
) -> Result<(), DataError> {
    let store = &member.owner().store;
    let all_known = || {
        let known = store.snapshots(volume);
        snapshots.iter().all(|id| known.contains(id))
    };
    if all_known() {
        return Ok(());
    }
    let state = member.registry.barrier().await.map_err(unavailable)?;
    for (at, id) in snapshots.iter().enumerate() {
        let found = state.snapshot(volume, *id).map(|record| record.state);
        if found == Some(SnapshotState::Pending) {
            wait_for_own_part(member, volume, *id).await;
        }
        // Asked for behind every wait: this server takes snapshots itself meanwhile.
        let known = store.snapshots(volume);
        if !is_live(&state, volume, *id) || known.contains(id) {
            continue;
        }
        // Also one that the sender had not taken when it made its list: that one is later, too.
        if known.iter().any(|known| !snapshots[..at].contains(known)) {
            return Err(unavailable(format!(
                "snapshot {id} came late to this server"
            )));
        }
        take(member, volume, *id).await?;
    }
    Ok(())
}

/// An owner of other pages of the volume takes a pending snapshot itself in a moment.
async fn wait_for_own_part(member: &Member, volume: VolumeId, id: SnapshotId) {
    let owner = member.owner();
    let owns_pages = owner
        .volume(volume)
        .is_some_and(|volume| volume.table().owners().contains(&member.number()));
    let mut waited_ms = 0;
    while owns_pages && waited_ms < MOVE_SNAPSHOT_WAIT_MS {
        if owner.store.snapshots(volume).contains(&id) {
            return;
        }
        sleep(Duration::from_millis(5)).await;
        waited_ms += 5;
    }
}

async fn take(member: &Member, volume: VolumeId, id: SnapshotId) -> Result<(), DataError> {
    loop {
        match member.owner().store.take_snapshot(volume, id) {
            Err(StoreError::LogFull) => sleep(Duration::from_millis(1)).await,
            Ok(()) | Err(StoreError::SnapshotExists { .. }) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}
