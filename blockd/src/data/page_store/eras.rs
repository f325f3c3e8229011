//! Eras without snapshots: while a snapshot by time stamps is in the making, each write has an era of
//! its own, so that the snapshot can be taken of any of them afterwards.
//!
//! Nothing of this survives a restart but the eras themselves, which are merged like those of
//! deleted snapshots.

use super::engine::Engine;
use super::error::StoreError;
use super::record::Change;
use crate::id::{SnapshotId, VolumeId};
use crate::io::disk::Disk;
use std::collections::BTreeSet;

/// What is known of the eras of a volume that is being split.
#[derive(Debug, Default)]
pub(super) struct Split {
    /// The current era has a write.
    used: bool,
    /// Groups that were written, whose versions are merged afterwards.
    groups: BTreeSet<u64>,
}

impl<D: Disk> Engine<D> {
    /// From now on each write has its own era. Gives the last era of what was written before.
    ///
    /// # Errors
    /// `LogFull` passes; then nothing was begun.
    pub fn split_eras(&mut self, volume: VolumeId) -> Result<u32, StoreError> {
        self.check_writable()?;
        self.check_volume(volume)?;
        self.log_next_era(volume)?;
        self.splits.insert(volume.0, Split::default());
        let Some(found) = self.tables.volumes.get_mut(&volume.0) else {
            return Ok(0);
        };
        let before = found.era.saturating_sub(1);
        found.pinned = Some(before);
        Ok(before)
    }

    /// The era of the last write. A change that changed nothing has none of its own: its moment lies
    /// behind this one, and before whatever is written next.
    pub fn last_era(&self, volume: VolumeId) -> u32 {
        let era = self.current_era(volume);
        let split = self.splits.get(&volume.0);
        match split.is_some_and(|split| !split.used) {
            true => era.saturating_sub(1),
            false => era,
        }
    }

    /// Takes a snapshot of everything up to the end of an era that was split off.
    ///
    /// # Errors
    /// As `take_snapshot`; `LateSnapshot` if one of a later era was taken meanwhile, as a page move does
    /// with a snapshot for which this server has no time.
    pub fn take_snapshot_at(
        &mut self,
        volume: VolumeId,
        snapshot: SnapshotId,
        era: u32,
    ) -> Result<(), StoreError> {
        self.check_new_snapshot(volume, snapshot)?;
        let known = self.tables.volumes.get(&volume.0);
        let newest = known.and_then(|known| known.snapshots().last());
        if newest.is_some_and(|(_, newest)| era <= *newest) {
            return Err(StoreError::LateSnapshot { volume, snapshot });
        }
        self.commit(&Change::TakeSnapshotAt(volume, snapshot, era), &[])
    }

    /// Writes share an era again. The groups to sweep afterwards.
    pub fn join_eras(&mut self, volume: VolumeId) -> Vec<u64> {
        if let Some(found) = self.tables.volumes.get_mut(&volume.0) {
            found.pinned = None;
        }
        let split = self.splits.remove(&volume.0).unwrap_or_default();
        split.groups.into_iter().collect()
    }

    /// Begins an era for a write of a split volume; false if the log has no room.
    pub(super) fn begin_era(&mut self, volume: VolumeId) -> Result<bool, StoreError> {
        if !self.splits.get(&volume.0).is_some_and(|split| split.used) {
            return Ok(true);
        }
        match self.log_next_era(volume) {
            Ok(()) => {}
            Err(StoreError::LogFull) => return Ok(false),
            Err(error) => return Err(error),
        }
        if let Some(split) = self.splits.get_mut(&volume.0) {
            split.used = false;
        }
        Ok(true)
    }

    /// The era that writes go to: in a split volume that of the last one, or an empty one behind it.
    pub(super) fn current_era(&self, volume: VolumeId) -> u32 {
        let found = self.tables.volumes.get(&volume.0);
        found.map_or(0, |volume| volume.era)
    }

    /// The current era of a split volume has a write, in this group.
    pub(super) fn end_era(&mut self, volume: VolumeId, group: u64) {
        if let Some(split) = self.splits.get_mut(&volume.0) {
            split.used = true;
            split.groups.insert(group);
        }
    }

    fn log_next_era(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        if !self.log.has_room(64, super::log::RESERVE_MARKS) {
            return Err(StoreError::LogFull);
        }
        self.commit(&Change::NextEra(volume), &[])
    }
}
