//! What an operator says of a snapshot or volume beside its definition: its name, that it is
//! protected, that it is off-line.

use super::change::{ChangeError, in_state, reading, snapshot_keys};
use super::name::check_name;
use super::object::{Key, Mark, Object, SnapshotRecord, SnapshotState};
use super::state::RegistryState;
use super::transaction::Transaction;
use crate::id::{SnapshotId, VolumeId};

impl RegistryState {
    /// Whether the snapshot is protected from being deleted.
    #[must_use]
    pub fn is_protected(&self, volume: VolumeId, id: SnapshotId) -> bool {
        self.get(&Key::Protected(volume, id)).is_some()
    }

    /// Whether the snapshot (`None`: the volume itself) is off-line (S001-06).
    #[must_use]
    pub fn is_offline(&self, volume: VolumeId, id: Option<SnapshotId>) -> bool {
        self.get(&Key::Offline(volume, id.unwrap_or_default()))
            .is_some()
    }
}

/// Gives a committed snapshot another name.
///
/// # Errors
/// It is not there or not committed, or the name is taken or bad.
pub fn rename_snapshot(
    state: &RegistryState,
    volume: VolumeId,
    id: SnapshotId,
    name: &str,
) -> Result<Transaction, ChangeError> {
    check_name(name)?;
    let record = in_state(state, volume, id, SnapshotState::Committed)?;
    let owner = state.volume(volume).ok_or(ChangeError::NoVolume(volume))?;
    let wanted = Key::SnapshotName(volume, name.to_owned());
    if state.get(&wanted).is_some() {
        let (volume, name) = (owner.name.clone(), name.to_owned());
        return Err(ChangeError::SnapshotExists(volume, name));
    }
    let [_, old, key] = snapshot_keys(record);
    let renamed = SnapshotRecord {
        name: name.to_owned(),
        ..record.clone()
    };
    Ok(reading(state, &[key.clone(), wanted.clone()])
        .remove(old)
        .put(wanted, Object::SnapshotName(id))
        .put(key, Object::Snapshot(renamed)))
}

/// Protects a committed snapshot from being deleted, or ends that.
///
/// # Errors
/// It is not there or not committed.
pub fn protect_snapshot(
    state: &RegistryState,
    volume: VolumeId,
    id: SnapshotId,
    mark: Option<Mark>,
) -> Result<Transaction, ChangeError> {
    let record = in_state(state, volume, id, SnapshotState::Committed)?;
    let [_, _, snapshot] = snapshot_keys(record);
    let transaction = reading(state, &[snapshot]);
    Ok(marked(transaction, Key::Protected(volume, id), mark))
}

/// Takes a volume or a committed snapshot off-line, or brings it back (S001-06).
///
/// # Errors
/// There is no such volume, or no such committed snapshot.
pub fn set_offline(
    state: &RegistryState,
    volume: VolumeId,
    id: Option<SnapshotId>,
    mark: Option<Mark>,
) -> Result<Transaction, ChangeError> {
    let read = match id {
        None => Key::Volume(volume),
        Some(id) => {
            let record = in_state(state, volume, id, SnapshotState::Committed)?;
            let [_, _, snapshot] = snapshot_keys(record);
            snapshot
        }
    };
    state.volume(volume).ok_or(ChangeError::NoVolume(volume))?;
    let transaction = reading(state, &[read]);
    let key = Key::Offline(volume, id.unwrap_or_default());
    Ok(marked(transaction, key, mark))
}

fn marked(transaction: Transaction, key: Key, mark: Option<Mark>) -> Transaction {
    match mark {
        Some(mark) => transaction.put(key, Object::Mark(mark)),
        None => transaction.remove(key),
    }
}
