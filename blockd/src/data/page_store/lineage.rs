//! Where a volume comes from: rollbacks, clones, and copying up what a clone still has in its parent.
//!
//! A rollback is one record: the head goes on from the era of the snapshot, and what lies between is
//! another branch (`line`). A clone is one record, too: a volume without versions, whose reads fall
//! through to a snapshot of the parent. Neither moves a byte.
//!
//! A clone needs its parent as long as the parent has data that the clone does not decide. Copying
//! it up, page by page, puts it under all versions of the clone, so that every snapshot of the clone
//! has it, too. Holes need no copy: what nobody decides is a hole, with a parent or without. Zeros are
//! copied as zeros: a page that was copied up decides all that the pages of its parents decide, so it
//! makes no difference which of these are in the store (S003-13).

use super::engine::{Engine, Fetched, PAGE_BYTES_MAX, Step};
use super::error::StoreError;
use super::line::Line;
use super::read::SUB;
use super::record::{Change, ChunkAt, DataKind, RECORD_BYTES_MAX};
use super::types::Parent;
use super::version::{GROUP_CHUNKS, Version};
use super::volume::{Volume, group_at, group_key};
use crate::id::{CHUNK_BYTES, PageNo, SnapshotId, VolumeId};
use crate::io::disk::Disk;
use std::collections::BTreeSet;

/// Groups of the largest page.
const GROUPS_MAX: u16 = (PAGE_BYTES_MAX / CHUNK_BYTES / GROUP_CHUNKS as u32) as u16;

impl<D: Disk> Engine<D> {
    /// Makes the head what the snapshot is, unless this rollback was done: `epoch` is that of the
    /// routing table that it makes. The groups to sweep afterwards.
    pub fn roll_back(
        &mut self,
        volume: VolumeId,
        snapshot: SnapshotId,
        epoch: u32,
    ) -> Result<Vec<u64>, StoreError> {
        self.check_writable()?;
        self.check_volume(volume)?;
        let found = self.tables.volumes.get(&volume.0);
        if found.is_some_and(|found| epoch <= found.rolled_back) {
            return Ok(Vec::new());
        }
        let is_unknown =
            |found: &&Volume| found.era_of(snapshot).is_none() && !found.groups.is_empty();
        if found.filter(is_unknown).is_some() {
            return Err(StoreError::UnknownSnapshot { volume, snapshot });
        }
        let groups = found.map_or_else(Vec::new, |v| v.groups.keys().copied().collect());
        self.commit_at_once(&Change::Rollback(volume, snapshot, epoch))?;
        Ok(groups)
    }

    /// Routing epoch of the last rollback of a volume; 0 if there was none.
    pub fn rolled_back(&self, volume: VolumeId) -> u32 {
        let found = self.tables.volumes.get(&volume.0);
        found.map_or(0, |found| found.rolled_back)
    }

    /// Makes a volume, which has nothing of its own yet, a clone of a snapshot; nothing if it is.
    pub fn clone_volume(&mut self, volume: VolumeId, parent: Parent) -> Result<(), StoreError> {
        self.check_writable()?;
        self.check_volume(volume)?;
        if self.parent(volume) == Some(parent) {
            return Ok(());
        }
        self.check_parent(parent)?;
        self.commit_at_once(&Change::Clone(volume, parent))
    }

    /// What a volume is a clone of.
    pub fn parent(&self, volume: VolumeId) -> Option<Parent> {
        self.tables.volumes.get(&volume.0)?.parent
    }

    /// Ends the dependence of a clone on its parent; all that it needs must have been copied up.
    pub fn detach(&mut self, volume: VolumeId) -> Result<(), StoreError> {
        self.check_writable()?;
        let Some(found) = self.tables.volumes.get(&volume.0) else {
            return Ok(());
        };
        if found.parent.is_none() {
            return Ok(());
        }
        let chunks = self.group_keys(found).into_iter().flat_map(|key| {
            let first = group_at(volume, key);
            (0..GROUP_CHUNKS).map(move |chunk| ChunkAt {
                chunk: first.chunk + chunk,
                ..first
            })
        });
        if chunks.into_iter().any(|at| self.below(found, at).data != 0) {
            return Err(StoreError::NeedsParent { volume });
        }
        self.commit_at_once(&Change::Detach(volume))
    }

    /// Clones of a volume, or of one snapshot of it, in order.
    pub fn clones(&self, volume: VolumeId, snapshot: Option<SnapshotId>) -> Vec<VolumeId> {
        let is_clone = |found: &Volume| {
            let of = found.parent.filter(|parent| parent.volume == volume);
            of.is_some_and(|of| snapshot.is_none_or(|snapshot| snapshot == of.snapshot))
        };
        let all = self.tables.volumes.iter().filter(|(_, v)| is_clone(v));
        let mut clones: Vec<VolumeId> = all.map(|(id, _)| VolumeId(*id)).collect();
        clones.sort_unstable();
        clones
    }

    /// Fails if clones depend on a volume or on one snapshot of it.
    pub(super) fn check_no_clone(
        &self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
    ) -> Result<(), StoreError> {
        match self.clones(volume, snapshot).first() {
            Some(clone) => Err(StoreError::HasClone {
                volume,
                clone: *clone,
            }),
            None => Ok(()),
        }
    }

    /// As a snapshot: a record that may use the reserve of the log.
    fn commit_at_once(&mut self, change: &Change) -> Result<(), StoreError> {
        if !self.log.has_room(64, super::log::RESERVE_MARKS) {
            return Err(StoreError::LogFull);
        }
        self.commit(change, &[])
    }

    /// Pages of which the parent of a clone holds data, in order.
    pub fn parent_pages(&self, volume: VolumeId) -> Result<Vec<PageNo>, StoreError> {
        match self.parent(volume) {
            Some(parent) => self.snapshot_pages(parent.volume, Some(parent.snapshot)),
            None => Ok(Vec::new()),
        }
    }

    /// Groups of a page in which the parent of a clone, or the parents of that, have something.
    pub fn parent_groups(&self, volume: VolumeId, page: PageNo) -> Vec<u64> {
        let mut groups = BTreeSet::new();
        let mut next = self.tables.volumes.get(&volume.0);
        while let Some((parent, _)) = next.and_then(|v| self.tables.parent_of(v)) {
            let keys = (0..=GROUPS_MAX).map(|group| group_key(page, group));
            groups.extend(keys.filter(|key| parent.groups.contains_key(key)));
            next = Some(parent);
        }
        groups.into_iter().collect()
    }

    /// Copies up the next chunk of a group that a clone has in its parent only, in part; the bytes.
    /// `None` says that there was none left.
    pub fn copy_up_group(
        &mut self,
        volume: VolumeId,
        key: u64,
        fetched: &[Fetched],
    ) -> Result<Step<Option<u64>>, StoreError> {
        self.check_writable()?;
        self.check_volume(volume)?;
        let first = group_at(volume, key);
        let chunks = (0..GROUP_CHUNKS).map(|chunk| ChunkAt {
            chunk: first.chunk + chunk,
            ..first
        });
        let found = self.tables.volumes.get(&volume.0);
        let needed = found.and_then(|found| {
            let mut needed = chunks.map(|at| (found, at, self.below(found, at).mask()));
            needed.find(|(.., mask)| *mask != 0)
        });
        let Some((found, at, mask)) = needed else {
            return Ok(Step::Done(None));
        };
        let under = under(found, found.chunk(at.page, at.chunk));
        let Some(parent) = self.tables.parent_of(found) else {
            return Ok(Step::Done(None));
        };
        let sources = self.tables.sources(parent, at, mask);
        let mut cold = Vec::new();
        let (slot, era) = under.unwrap_or((0, 0));
        let kind = DataKind::Moved { era, copied: mask };
        let mut copy = self.read_copy_up(at, slot, &sources, mask, fetched, &mut cold)?;
        if !cold.is_empty() {
            return Ok(Step::Cold(cold));
        }
        if !self.has_room(RECORD_BYTES_MAX as u64) {
            return Ok(Step::Full);
        }
        let bytes = u64::from(copy.mask.count_ones()) * SUB as u64;
        self.claim_space(bytes)?;
        if under.is_none() {
            copy.slot = self.tables.slots.allocate(1).ok_or(StoreError::NoSpace)?;
        }
        let logged = self.log_copy(at, &copy, kind);
        if logged.is_err() && under.is_none() {
            self.tables.slots.release(copy.slot, true);
        }
        logged.map(|()| Step::Done(Some(bytes)))
    }

    /// What a clone has of a chunk in its parents only.
    pub(super) fn below(&self, clone: &Volume, at: ChunkAt) -> Below {
        let Some(parent) = self.tables.parent_of(clone) else {
            return Below::default();
        };
        let open = open_in(clone, clone.chunk(at.page, at.chunk));
        if open == 0 {
            return Below::default();
        }
        let data = self.data_mask(parent, at, open);
        let zero = self.decided(parent, at, open) & !data;
        Below { data, zero }
    }

    /// Sub-blocks that a view or the parents under it decide.
    fn decided(&self, (volume, line): (&Volume, Line<'_>), at: ChunkAt, want: u16) -> u16 {
        let seen = line.of(volume.chunk(at.page, at.chunk));
        let own = want & seen.fold(0, |mask, version| mask | version.present);
        match self.tables.parent_of(volume) {
            Some(parent) => own | self.decided(parent, at, want & !own),
            None => own,
        }
    }
}

/// Sub-blocks of a chunk that a clone's parents decide and some view of the clone does not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Below {
    pub(super) data: u16,
    pub(super) zero: u16,
}

impl Below {
    pub(super) fn mask(self) -> u16 {
        self.data | self.zero
    }
}

/// Sub-blocks that some view of the volume finds undecided.
fn open_in(volume: &Volume, versions: &[Version]) -> u16 {
    let eras = volume.snapshots().iter().map(|(_, era)| *era);
    let mut open = 0;
    for era in eras.chain([u32::MAX]) {
        let seen = volume.line(era).of(versions);
        open |= !seen.fold(0, |mask, version| mask | version.present);
    }
    open
}

/// Slot and era of the version that is under all views of a chunk; `None` if there is none.
pub(super) fn under(volume: &Volume, versions: &[Version]) -> Option<(u32, u32)> {
    let oldest = versions.last()?;
    let is_under = oldest.era == 0 || {
        let mut views = volume.snapshots().iter().map(|(_, era)| *era);
        let mut turns = volume.turns.iter();
        views.all(|era| oldest.era <= era) && turns.all(|turn| oldest.era <= turn.to)
    };
    is_under.then_some((oldest.slot, oldest.era))
}

#[cfg(test)]
mod tests {
    use super::super::version::bits;
    use super::*;

    #[test]
    fn what_is_under_all_views_is_the_oldest_version_or_nothing() {
        let version = |era| Version {
            crcs: [0; super::super::version::SUBS],
            slot: era + 10,
            era,
            present: 1,
            zero: 0,
            copied: 0,
            chunk: 0,
        };
        let mut volume = Volume::default();
        assert_eq!(under(&volume, &[]), None);
        assert_eq!(under(&volume, &[version(3)]), Some((13, 3)));
        volume.set_snapshots(vec![(SnapshotId(1), 2)]);
        assert_eq!(under(&volume, &[version(3)]), None, "the snapshot is older");
        assert_eq!(under(&volume, &[version(3), version(2)]), Some((12, 2)));
        assert_eq!(open_in(&volume, &[version(3)]), u16::MAX);
        assert_eq!(bits(open_in(&volume, &[version(2)])).next(), Some(1));
    }
}
