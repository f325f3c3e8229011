//! Where the content of a volume comes from besides its writes: rollbacks and clones.
//!
//! Both are facts first and work afterwards: whoever owns pages of the volume carries them out in its
//! store before it serves the volume at the routing epoch that came with them.

use super::change::{ChangeError, in_state, next_epoch, reading, snapshot_keys};
use super::lease::check_not_held;
use super::name::check_name;
use super::object::{Key, Mark, Object, SnapshotRecord, SnapshotState, VolumeRecord, pages};
use super::routes;
use super::state::RegistryState;
use super::transaction::Transaction;
use crate::id::{Epoch, NodeNo, SnapshotId, VolumeId};
use crate::limits::CLONE_DEPTH_MAX;
use serde::{Deserialize, Serialize};

/// A rollback of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RollbackRecord {
    /// The volume.
    pub volume: VolumeId,
    /// Routing epoch that came with it.
    pub epoch: Epoch,
    /// What the volume became.
    pub snapshot: SnapshotId,
    /// What it was before.
    pub safety: SnapshotId,
    /// The servers that carry it out, sorted: those that owned pages.
    pub owners: Vec<NodeNo>,
    /// Milliseconds since 1970 at the command; shown, never compared.
    pub at_unix_ms: u64,
}

/// What a clone was made of.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OriginRecord {
    /// The clone.
    pub volume: VolumeId,
    /// The volume of the snapshot.
    pub parent: VolumeId,
    /// The snapshot; it stays as long as this record does.
    pub snapshot: SnapshotId,
    /// The servers that had both when it was made, sorted.
    pub owners: Vec<NodeNo>,
    /// 1, and one more for each clone that the parent is.
    pub depth: u32,
    /// It is being copied up, to be without the parent.
    pub flattening: bool,
}

impl RegistryState {
    /// The last rollback of a volume.
    #[must_use]
    pub fn rollback(&self, volume: VolumeId) -> Option<&RollbackRecord> {
        match self.get(&Key::Rollback(volume))? {
            Object::Rollback(record) => Some(record),
            _ => None,
        }
    }

    /// What a clone depends on.
    #[must_use]
    pub fn origin(&self, volume: VolumeId) -> Option<&OriginRecord> {
        match self.get(&Key::Origin(volume))? {
            Object::Origin(record) => Some(record),
            _ => None,
        }
    }

    /// All clones that depend on a snapshot, by volume.
    pub fn origins(&self) -> impl Iterator<Item = &OriginRecord> {
        let all = Key::Origin(VolumeId(0))..=Key::Origin(VolumeId(u64::MAX));
        self.range(all).filter_map(|object| match object {
            Object::Origin(record) => Some(record),
            _ => None,
        })
    }

    /// What a volume was cloned from, what that was cloned from, and so on.
    pub fn ancestors(&self, volume: VolumeId) -> impl Iterator<Item = VolumeId> {
        let parent = |id: &VolumeId| Some(self.origin(*id)?.parent);
        std::iter::successors(parent(&volume), parent)
    }

    /// Names of the clones of a volume, or of one snapshot of it.
    #[must_use]
    pub fn clones(&self, parent: VolumeId, snapshot: Option<SnapshotId>) -> Vec<String> {
        let of = self.origins().filter(|origin| origin.parent == parent);
        let of = of.filter(|origin| snapshot.is_none_or(|id| id == origin.snapshot));
        of.filter_map(|origin| Some(self.volume(origin.volume)?.name.clone()))
            .collect()
    }
}

/// Makes the volume what a committed snapshot is, under a new epoch. Its size stays: what lies
/// behind the end of the snapshot is to be zeros.
///
/// # Errors
/// A snapshot is not there or not committed, somebody holds the lease of the volume, or a server owns
/// pages that did not take part in the snapshot.
pub fn roll_back(
    state: &RegistryState,
    volume: VolumeId,
    snapshot: SnapshotId,
    safety: SnapshotId,
    at_unix_ms: u64,
) -> Result<(Transaction, RollbackRecord), ChangeError> {
    check_not_held(state, volume)?;
    let target = in_state(state, volume, snapshot, SnapshotState::Committed)?;
    let before = in_state(state, volume, safety, SnapshotState::Committed)?;
    let now = state.volume(volume).ok_or(ChangeError::NoVolume(volume))?;
    let after = VolumeRecord {
        epoch: next_epoch(now.epoch)?,
        ..now.clone()
    };
    let record = RollbackRecord {
        volume,
        epoch: after.epoch,
        snapshot,
        safety,
        owners: owners_in(&now.routes, now, target)?,
        at_unix_ms,
    };
    let [key, _, target] = snapshot_keys(target);
    let [_, _, before] = snapshot_keys(before);
    let read = [
        key.clone(),
        target,
        before,
        Key::Lease(volume),
        Key::Rollback(volume),
    ];
    let transaction = reading(state, &read)
        .put(key, Object::Volume(after))
        .put(Key::Rollback(volume), Object::Rollback(record.clone()));
    Ok((transaction, record))
}

/// The owners of these pages, all of which must have the snapshot.
fn owners_in(
    pages: &[routes::RouteRun],
    volume: &VolumeRecord,
    snapshot: &SnapshotRecord,
) -> Result<Vec<NodeNo>, ChangeError> {
    let owners: Vec<NodeNo> = routes::owners(pages).into_keys().collect();
    match owners.iter().find(|node| !snapshot.owners.contains(node)) {
        None => Ok(owners),
        Some(node) => Err(ChangeError::NotInSnapshot(
            volume.name.clone(),
            snapshot.name.clone(),
            *node,
        )),
    }
}

/// Creates a volume that is what a committed snapshot is, over the same servers.
///
/// # Errors
/// The snapshot is not there or not committed, the name is taken or bad, the chain of clones would
/// be too long, or a server owns pages that did not take part in the snapshot.
pub fn clone_volume(
    state: &RegistryState,
    parent: VolumeId,
    snapshot: SnapshotId,
    name: &str,
    created_unix_ms: u64,
    offline: bool,
) -> Result<(Transaction, VolumeRecord), ChangeError> {
    check_name(name)?;
    let source = in_state(state, parent, snapshot, SnapshotState::Committed)?;
    let of = state.volume(parent).ok_or(ChangeError::NoVolume(parent))?;
    let mut cluster = state.cluster().ok_or(ChangeError::NoCluster)?.clone();
    let wanted = Key::VolumeName(name.to_owned());
    if state.get(&wanted).is_some() {
        return Err(ChangeError::VolumeExists(name.to_owned()));
    }
    if let Some(moving) = state.page_move(parent).filter(|moving| !moving.is_over()) {
        return Err(ChangeError::Moving(of.name.clone(), moving.reason.clone()));
    }
    let depth = 1 + state.origin(parent).map_or(0, |origin| origin.depth);
    if depth > CLONE_DEPTH_MAX {
        return Err(ChangeError::TooDeep(of.name.clone()));
    }
    let id = cluster.next_volume;
    let next = id.0.checked_add(1).map(VolumeId);
    cluster.next_volume = next.ok_or(ChangeError::NumbersUsedUp("volume"))?;
    let size_bytes = source.size_bytes;
    let clone = VolumeRecord {
        id,
        name: name.to_owned(),
        size_bytes,
        epoch: Epoch(1),
        routes: routes::cut(&of.routes, pages(size_bytes, of.page_blocks)?),
        created_unix_s: created_unix_ms / 1000,
        next_snapshot: SnapshotId(1),
        ..of.clone()
    };
    let origin = OriginRecord {
        volume: id,
        parent,
        snapshot,
        owners: owners_in(&clone.routes, of, source)?,
        depth,
        flattening: false,
    };
    let [of_key, _, source_key] = snapshot_keys(source);
    let moves = Key::Move(parent);
    let read = [
        Key::Cluster,
        wanted.clone(),
        of_key,
        source_key.clone(),
        moves,
    ];
    // The snapshot is put as it is, so that a delete that was built before is a conflict.
    let mut transaction = reading(state, &read)
        .put(Key::Cluster, Object::Cluster(cluster))
        .put(wanted, Object::VolumeName(id))
        .put(Key::Volume(id), Object::Volume(clone.clone()))
        .put(Key::Origin(id), Object::Origin(origin))
        .put(source_key, Object::Snapshot(source.clone()));
    if offline {
        let mark = Mark {
            since_unix_ms: created_unix_ms,
        };
        transaction = transaction.put(Key::Offline(id, SnapshotId(0)), Object::Mark(mark));
    }
    Ok((transaction, clone))
}

/// Begins to make a clone independent of its parent; nothing if that goes on.
///
/// # Errors
/// It is no clone.
pub fn begin_flatten(state: &RegistryState, volume: VolumeId) -> Result<Transaction, ChangeError> {
    let origin = origin_of(state, volume)?;
    let key = Key::Origin(volume);
    let transaction = reading(state, std::slice::from_ref(&key));
    if origin.flattening {
        return Ok(transaction);
    }
    let flattening = OriginRecord {
        flattening: true,
        ..origin.clone()
    };
    Ok(transaction.put(key, Object::Origin(flattening)))
}

/// The clone depends on its parent no more: all its owners have copied up what they had there.
///
/// # Errors
/// It is no clone, or not being flattened; or its pages are moving: they must find clones on both sides.
pub fn end_flatten(state: &RegistryState, volume: VolumeId) -> Result<Transaction, ChangeError> {
    let origin = origin_of(state, volume)?;
    if !origin.flattening {
        return Err(ChangeError::NoClone(volume));
    }
    if let Some(moving) = state.page_move(volume).filter(|moving| !moving.is_over()) {
        let name = state.volume(volume).map(|volume| volume.name.clone());
        let reason = moving.reason.clone();
        return Err(ChangeError::Moving(name.unwrap_or_default(), reason));
    }
    let key = Key::Origin(volume);
    Ok(reading(state, &[key.clone(), Key::Move(volume)]).remove(key))
}

fn origin_of(state: &RegistryState, volume: VolumeId) -> Result<&OriginRecord, ChangeError> {
    state.origin(volume).ok_or(ChangeError::NoClone(volume))
}
