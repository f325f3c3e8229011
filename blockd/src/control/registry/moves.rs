//! Moves of pages from server to server, as registry facts (S003-12, S003-19).
//!
//! ```text
//!   planned ---begin---> copying(batch) ---flip---> flipped(batch) ---adopt---> dropping(batch)
//!      ^  ^                 |                                                        |
//!      |  +-----release-----+                                                        |
//!      +-----------------------------------drop--------------------------------------+
//!   at planned, when nothing is left: done; on a wish or an error: paused, cancelled, failed
//! ```
//!
//! There is one record a volume. No server drives it: the next step is always the duty of the server
//! that holds what the step is about ([`duty`]), so whoever restarts goes on. Every step is one
//! compare-and-set transaction. A flip is good for one attempt only: once a batch was released, a
//! flip of that attempt that is still under way can never be executed.

use super::change::{ChangeError, next_epoch, reading};
use super::object::{Key, Object, SnapshotRecord, SnapshotState, VolumeRecord};
use super::routes::{self, RouteRun};
use super::state::RegistryState;
use super::transaction::Transaction;
use crate::id::{Epoch, NodeNo, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};

/// Snapshot records of one transaction.
const SNAPSHOTS_AT_ONCE: usize = 400;

/// Consecutive pages that change their owner together.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct MoveBatch {
    pub first_page: u32,
    pub page_count: u32,
    pub from: NodeNo,
    pub to: NodeNo,
}

impl MoveBatch {
    /// The page behind the last.
    #[must_use]
    pub fn end(&self) -> u32 {
        self.first_page.saturating_add(self.page_count)
    }

    #[must_use]
    pub fn has(&self, page: u32) -> bool {
        (self.first_page..self.end()).contains(&page)
    }
}

/// How far a move is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MovePhase {
    /// No batch is under way; the owner of the next pages begins one.
    Planned,
    /// The owner copies, and goes on serving.
    Copying(MoveBatch),
    /// The batch belongs to its new owner since this epoch, which is to make that durable.
    Flipped(MoveBatch, Epoch),
    /// The new owner has all; the former one drops its copy.
    Dropping(MoveBatch),
    Paused,
    Done,
    Cancelled,
    /// With what went wrong; the pages left have their owner as before.
    Failed(String),
}

/// What shall become of the move when its batch has ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MoveWish {
    Run,
    Pause,
    Cancel,
}

/// The moves of the pages of one volume, under way or ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MoveRecord {
    pub volume: VolumeId,
    /// What asked for it: shown.
    pub reason: String,
    /// Pages still to move, in order; the owner of a run is the new one.
    pub left: Vec<RouteRun>,
    pub phase: MovePhase,
    pub wish: MoveWish,
    /// Counts the batches that were begun, over all moves of the volume.
    pub attempt: u64,
    /// Bytes a second that are copied at the most.
    pub rate_bytes: u64,
    pub total_pages: u64,
    pub moved_pages: u64,
    /// Bytes of data that went to new owners.
    pub moved_bytes: u64,
    /// Milliseconds since 1970; shown, never compared.
    pub started_unix_ms: u64,
    /// The write verifier with which each server gave pages away the last time, over all moves of
    /// the volume: writes that it acknowledged under that verifier are with the new owners (promise 3).
    pub given: Vec<(NodeNo, u64)>,
}

/// What is to be moved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MoveSpec {
    /// Pages with their new owners, in order.
    pub wanted: Vec<RouteRun>,
    pub reason: String,
    pub rate_bytes: u64,
    pub now_unix_ms: u64,
}

/// What the source knows when it flips a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FlipSpec {
    pub attempt: u64,
    /// Epoch of the table under which the batch was copied.
    pub epoch: Epoch,
    /// Snapshots that the new owner knows.
    pub snapshots: Vec<SnapshotId>,
    /// Whether a snapshot that is being taken may be aborted.
    pub over_pending: bool,
    pub verifier: u64,
    pub bytes: u64,
}

/// The step that is one server's to take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Duty {
    Nothing,
    /// Begin a batch of these pages, or of the first of them.
    Begin(MoveBatch),
    Copy(MoveBatch),
    Adopt(MoveBatch, Epoch),
    Drop(MoveBatch),
    /// Nothing is left: say so.
    Finish,
}

impl MoveRecord {
    /// Whether no step follows unless somebody asks for it.
    #[must_use]
    pub fn is_over(&self) -> bool {
        use MovePhase::{Cancelled, Done, Failed};
        matches!(self.phase, Done | Cancelled | Failed(_))
    }

    /// The batch under way.
    #[must_use]
    pub fn batch(&self) -> Option<MoveBatch> {
        match self.phase {
            MovePhase::Copying(batch)
            | MovePhase::Flipped(batch, _)
            | MovePhase::Dropping(batch) => Some(batch),
            _ => None,
        }
    }

    /// The pages that come next: of one owner, for one new owner.
    fn next(&self, volume: &VolumeRecord) -> Option<MoveBatch> {
        let left = misplaced(&self.left, &volume.routes);
        let (run, from) = *left.first()?;
        Some(MoveBatch {
            first_page: run.first_page,
            page_count: run.page_count,
            from,
            to: run.owner,
        })
    }

    /// The phase in which a batch has ended.
    pub(super) fn resting(&self, volume: &VolumeRecord) -> MovePhase {
        match self.wish {
            MoveWish::Cancel => MovePhase::Cancelled,
            _ if self.next(volume).is_none() => MovePhase::Done,
            MoveWish::Pause => MovePhase::Paused,
            MoveWish::Run => MovePhase::Planned,
        }
    }
}

/// The parts of `wanted` that are elsewhere, each with its owner now. Pages that do not exist are
/// left out.
fn misplaced(wanted: &[RouteRun], routes: &[RouteRun]) -> Vec<(RouteRun, NodeNo)> {
    let mut parts: Vec<(RouteRun, NodeNo)> = Vec::new();
    for run in wanted {
        let end = run.first_page.saturating_add(run.page_count);
        let from = routes.partition_point(|now| now.first_page + now.page_count <= run.first_page);
        let over = routes[from..].iter().take_while(|now| now.first_page < end);
        for now in over.filter(|now| now.owner != run.owner) {
            let first_page = now.first_page.max(run.first_page);
            let page_count = (now.first_page + now.page_count).min(end) - first_page;
            let owner = run.owner;
            let part = RouteRun {
                first_page,
                page_count,
                owner,
            };
            parts.push((part, now.owner));
        }
    }
    parts
}

/// What a server is to do about a move now.
#[must_use]
pub fn duty(state: &RegistryState, record: &MoveRecord, me: NodeNo) -> Duty {
    let Some(volume) = state.volume(record.volume) else {
        return Duty::Nothing;
    };
    match record.phase {
        MovePhase::Planned => match record.next(volume) {
            Some(batch) if batch.from == me => Duty::Begin(batch),
            None if routes::owner(&volume.routes, 0) == Some(me) => Duty::Finish,
            _ => Duty::Nothing,
        },
        MovePhase::Copying(batch) if batch.from == me => Duty::Copy(batch),
        MovePhase::Flipped(batch, epoch) if batch.to == me => Duty::Adopt(batch, epoch),
        MovePhase::Dropping(batch) if batch.from == me => Duty::Drop(batch),
        _ => Duty::Nothing,
    }
}

/// The server whose step is next.
#[must_use]
pub fn responsible(state: &RegistryState, record: &MoveRecord) -> Option<NodeNo> {
    match record.phase {
        MovePhase::Planned => Some(record.next(state.volume(record.volume)?)?.from),
        MovePhase::Copying(batch) | MovePhase::Dropping(batch) => Some(batch.from),
        MovePhase::Flipped(batch, _) => Some(batch.to),
        _ => None,
    }
}

/// Plans the move of pages of a volume, and gives its record.
///
/// # Errors
/// There is no such volume or server, another move of it is under way, a new owner is drained, or
/// there is nothing to move.
pub fn plan_move(
    state: &RegistryState,
    id: VolumeId,
    spec: &MoveSpec,
) -> Result<(Transaction, MoveRecord), ChangeError> {
    let volume = state.volume(id).ok_or(ChangeError::NoVolume(id))?;
    let before = state.page_move(id);
    if let Some(now) = before.filter(|now| !now.is_over()) {
        return Err(ChangeError::Moving(volume.name.clone(), now.reason.clone()));
    }
    for run in &spec.wanted {
        check_target(state, run.owner)?;
    }
    let parts = misplaced(&spec.wanted, &volume.routes);
    let pages = parts.iter().map(|(run, _)| u64::from(run.page_count)).sum();
    if pages == 0 {
        return Err(ChangeError::NothingToMove(volume.name.clone()));
    }
    let record = MoveRecord {
        volume: id,
        reason: spec.reason.clone(),
        left: joined(parts.iter().map(|(run, _)| *run)),
        phase: MovePhase::Planned,
        wish: MoveWish::Run,
        attempt: before.map_or(0, |before| before.attempt),
        rate_bytes: spec.rate_bytes,
        total_pages: pages,
        moved_pages: 0,
        moved_bytes: 0,
        started_unix_ms: spec.now_unix_ms,
        given: before.map_or_else(Vec::new, |before| before.given.clone()),
    };
    Ok((saving(state, &record), record))
}

fn check_target(state: &RegistryState, node: NodeNo) -> Result<(), ChangeError> {
    if state.node(node).is_none() {
        return Err(ChangeError::NoNode(node));
    }
    match state.drain(node) {
        None => Ok(()),
        Some(_) => Err(ChangeError::Drained(node)),
    }
}

fn joined(runs: impl Iterator<Item = RouteRun>) -> Vec<RouteRun> {
    let mut all: Vec<RouteRun> = Vec::new();
    for run in runs {
        match all.last_mut() {
            Some(last)
                if last.owner == run.owner
                    && last.first_page + last.page_count == run.first_page =>
            {
                last.page_count += run.page_count;
            }
            _ => all.push(run),
        }
    }
    all
}

/// The owner of the next pages begins to copy a batch of them; its record has the attempt.
///
/// # Errors
/// The move has gone on, or these pages are not the next ones.
pub fn begin_batch(
    state: &RegistryState,
    id: VolumeId,
    batch: MoveBatch,
) -> Result<(Transaction, MoveRecord), ChangeError> {
    let (volume, now) = under_way(state, id)?;
    let next = now.next(volume).filter(|next| {
        now.phase == MovePhase::Planned
            && (next.first_page, next.from, next.to) == (batch.first_page, batch.from, batch.to)
            && (1..=next.page_count).contains(&batch.page_count)
    });
    if next.is_none() {
        return Err(ChangeError::MoveWentOn(volume.name.clone()));
    }
    let record = MoveRecord {
        phase: MovePhase::Copying(batch),
        attempt: now.attempt + 1,
        ..now.clone()
    };
    Ok((saving(state, &record), record))
}

/// Gives a batch up that was not flipped: it is copied anew, or what is wished happens. Gives the
/// record as it is then; one that has gone on is left as it is.
///
/// # Errors
/// There is no such move.
pub fn release_batch(
    state: &RegistryState,
    id: VolumeId,
    attempt: u64,
) -> Result<(Transaction, MoveRecord), ChangeError> {
    let (volume, now) = under_way(state, id)?;
    if now.attempt != attempt || !matches!(now.phase, MovePhase::Copying(_)) {
        return Ok((Transaction::new(), now.clone()));
    }
    let record = MoveRecord {
        phase: now.resting(volume),
        ..now.clone()
    };
    Ok((saving(state, &record), record))
}

/// Gives a batch to its new owner: routing table, epoch and the owners of the latest snapshots
/// change in this one transaction.
///
/// # Errors
/// The batch was released, the routing table or the snapshots changed meanwhile, or a snapshot is
/// being taken.
pub fn flip_batch(
    state: &RegistryState,
    id: VolumeId,
    spec: &FlipSpec,
) -> Result<(Transaction, MoveRecord), ChangeError> {
    let (volume, now) = under_way(state, id)?;
    let MovePhase::Copying(batch) = now.phase else {
        return Err(ChangeError::MoveWentOn(volume.name.clone()));
    };
    if now.attempt != spec.attempt {
        return Err(ChangeError::MoveWentOn(volume.name.clone()));
    }
    if volume.epoch != spec.epoch {
        return Err(ChangeError::EpochChanged(id, volume.epoch));
    }
    check_snapshots(state, id, spec)?;
    let volume = VolumeRecord {
        epoch: next_epoch(volume.epoch)?,
        routes: routes::assign(&volume.routes, batch.first_page, batch.page_count, batch.to),
        ..volume.clone()
    };
    routes::check(&volume.routes, volume.page_count())?;
    let record = flipped(now, batch, &volume, spec);
    let mut transaction = saving(state, &record).put(Key::Volume(id), Object::Volume(volume));
    // A snapshot that is committed between this reading and the flip must be a conflict.
    let pending = |s: &&SnapshotRecord| s.state == SnapshotState::Pending;
    for snapshot in state.snapshots(id).filter(pending) {
        let key = Key::Snapshot(id, snapshot.id);
        let revision = state.revision_of(&key);
        transaction = transaction.expect(key, revision);
    }
    if let Some(owners) = change_snapshot_owners(state, id, batch.to, true) {
        transaction.expect.extend(owners.expect);
        transaction.changes.extend(owners.changes);
    }
    Ok((transaction, record))
}

/// A committed snapshot must be known to the new owner; a pending one would be aborted.
fn check_snapshots(
    state: &RegistryState,
    id: VolumeId,
    spec: &FlipSpec,
) -> Result<(), ChangeError> {
    let unknown = |snapshot: &&SnapshotRecord| match snapshot.state {
        SnapshotState::Committed => !spec.snapshots.contains(&snapshot.id),
        SnapshotState::Pending => !spec.over_pending,
        SnapshotState::Deleting => false,
    };
    match state.snapshots(id).find(unknown) {
        None => Ok(()),
        Some(new) => Err(ChangeError::SnapshotState(id, new.id, new.state)),
    }
}

fn flipped(
    now: &MoveRecord,
    batch: MoveBatch,
    volume: &VolumeRecord,
    spec: &FlipSpec,
) -> MoveRecord {
    let mut given = now.given.clone();
    given.retain(|(node, _)| *node != batch.from);
    given.push((batch.from, spec.verifier));
    MoveRecord {
        phase: MovePhase::Flipped(batch, volume.epoch),
        left: joined(
            misplaced(&now.left, &volume.routes)
                .into_iter()
                .map(|(run, _)| run),
        ),
        moved_pages: now.moved_pages + u64::from(batch.page_count),
        moved_bytes: now.moved_bytes + spec.bytes,
        given,
        ..now.clone()
    }
}

/// Makes a server an owner of snapshots of the volume that it has been told of, or no owner any
/// more; some at a time, `None` when that is so.
#[must_use]
pub fn change_snapshot_owners(
    state: &RegistryState,
    id: VolumeId,
    node: NodeNo,
    is_owner: bool,
) -> Option<Transaction> {
    let wrong = state
        .snapshots(id)
        .filter(|snapshot| snapshot.owners.contains(&node) != is_owner);
    let changed = wrong.take(SNAPSHOTS_AT_ONCE).map(|snapshot| {
        let mut owners = snapshot.owners.clone();
        owners.retain(|owner| *owner != node);
        if is_owner {
            owners.insert(owners.partition_point(|owner| *owner < node), node);
        }
        SnapshotRecord {
            owners,
            ..snapshot.clone()
        }
    });
    let transaction = changed.fold(Transaction::new(), |transaction, record| {
        let key = Key::Snapshot(id, record.id);
        let transaction = transaction.expect(key.clone(), state.revision_of(&key));
        transaction.put(key, Object::Snapshot(record))
    });
    (!transaction.changes.is_empty()).then_some(transaction)
}

/// The new owner has made durable that the batch is its own.
///
/// # Errors
/// The move has gone on.
pub fn adopt_batch(
    state: &RegistryState,
    id: VolumeId,
    batch: MoveBatch,
) -> Result<(Transaction, MoveRecord), ChangeError> {
    let (volume, now) = under_way(state, id)?;
    match now.phase {
        MovePhase::Flipped(found, _) if found == batch => {}
        _ => return Err(ChangeError::MoveWentOn(volume.name.clone())),
    }
    let phase = match state.node(batch.from) {
        Some(_) => MovePhase::Dropping(batch),
        // It was forgotten, and its copy with it.
        None => now.resting(volume),
    };
    let record = MoveRecord {
        phase,
        ..now.clone()
    };
    Ok((saving(state, &record), record))
}

/// The former owner has dropped the batch.
///
/// # Errors
/// The move has gone on.
pub fn drop_batch(
    state: &RegistryState,
    id: VolumeId,
    batch: MoveBatch,
) -> Result<(Transaction, MoveRecord), ChangeError> {
    let (volume, now) = under_way(state, id)?;
    if now.phase != MovePhase::Dropping(batch) {
        return Err(ChangeError::MoveWentOn(volume.name.clone()));
    }
    let record = MoveRecord {
        phase: now.resting(volume),
        ..now.clone()
    };
    Ok((saving(state, &record), record))
}

/// Nothing is left to move.
///
/// # Errors
/// There is, or the move has gone on.
pub fn finish_move(
    state: &RegistryState,
    id: VolumeId,
) -> Result<(Transaction, MoveRecord), ChangeError> {
    let (volume, now) = under_way(state, id)?;
    if now.phase != MovePhase::Planned || now.next(volume).is_some() {
        return Err(ChangeError::MoveWentOn(volume.name.clone()));
    }
    let record = MoveRecord {
        phase: MovePhase::Done,
        ..now.clone()
    };
    Ok((saving(state, &record), record))
}

/// Ends a move with an error; a batch that was flipped is finished first.
///
/// # Errors
/// There is no move under way, or it is past its attempt.
pub fn fail_move(
    state: &RegistryState,
    id: VolumeId,
    attempt: u64,
    why: &str,
) -> Result<(Transaction, MoveRecord), ChangeError> {
    let (volume, now) = under_way(state, id)?;
    let is_copying = matches!(now.phase, MovePhase::Copying(_) | MovePhase::Planned);
    if now.attempt != attempt || !is_copying {
        return Err(ChangeError::MoveWentOn(volume.name.clone()));
    }
    let mut why = why.to_owned();
    why.truncate(why.floor_char_boundary(crate::limits::REGISTRY_TEXT_BYTES_MAX));
    let record = MoveRecord {
        phase: MovePhase::Failed(why),
        ..now.clone()
    };
    Ok((saving(state, &record), record))
}

/// Pauses, goes on with, or cancels a move. What is already flipped is finished in any case.
///
/// # Errors
/// There is no move of the volume, or it is over.
pub fn wish_move(
    state: &RegistryState,
    id: VolumeId,
    wish: MoveWish,
) -> Result<(Transaction, MoveRecord), ChangeError> {
    let volume = state.volume(id).ok_or(ChangeError::NoVolume(id))?;
    let no_move = || ChangeError::NoMove(volume.name.clone());
    let now = state.page_move(id).ok_or_else(no_move)?;
    let goes_on = matches!(now.phase, MovePhase::Failed(_)) && wish == MoveWish::Run;
    if now.is_over() && !goes_on {
        return Err(no_move());
    }
    let mut record = MoveRecord {
        wish,
        ..now.clone()
    };
    if !matches!(now.phase, MovePhase::Flipped(..) | MovePhase::Dropping(_)) {
        record.phase = record.resting(volume);
    }
    Ok((saving(state, &record), record))
}

fn under_way(
    state: &RegistryState,
    id: VolumeId,
) -> Result<(&VolumeRecord, &MoveRecord), ChangeError> {
    let volume = state.volume(id).ok_or(ChangeError::NoVolume(id))?;
    let record = state.page_move(id);
    let record = record.ok_or_else(|| ChangeError::NoMove(volume.name.clone()))?;
    Ok((volume, record))
}

fn saving(state: &RegistryState, record: &MoveRecord) -> Transaction {
    let (volume, key) = (Key::Volume(record.volume), Key::Move(record.volume));
    reading(state, &[volume, key.clone()]).put(key, Object::Move(record.clone()))
}

#[cfg(test)]
mod tests;
