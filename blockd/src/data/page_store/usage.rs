//! What the store holds, for people and for resync.

use super::engine::Engine;
use super::error::StoreError;
use super::line::Line;
use super::record::ChunkAt;
use super::tables::Redo;
use super::tree;
use super::types::{SnapshotUsage, StoreUsage, VolumeUsage};
use super::version::{ALL, GROUP_CHUNKS, Group, Version, resolve};
use super::volume::{Volume, group_at};
use crate::id::{Epoch, PageNo, SUB_BLOCK_BYTES, SnapshotId, VolumeId};
use crate::io::disk::Disk;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Memory of a hash table entry besides key and value.
const ENTRY_OVERHEAD_BYTES: usize = 2;

fn sub_bytes(subs: u32) -> u64 {
    u64::from(subs) * u64::from(SUB_BLOCK_BYTES)
}

impl<D: Disk> Engine<D> {
    /// Snapshots of a volume, oldest first.
    pub fn snapshots(&self, volume: VolumeId) -> Vec<SnapshotId> {
        let found = self.tables.volumes.get(&volume.0);
        found.map_or_else(Vec::new, |v| {
            v.snapshots().iter().map(|(id, _)| *id).collect()
        })
    }

    /// Volumes with data or snapshots, in order.
    pub fn volumes(&self) -> Vec<VolumeId> {
        let known = self.tables.volumes.iter().filter(|(_, v)| !v.deleted);
        let mut ids: Vec<VolumeId> = known.map(|(id, _)| VolumeId(*id)).collect();
        ids.sort_unstable();
        ids
    }

    /// Space of a volume.
    pub fn volume_usage(&self, volume: VolumeId) -> VolumeUsage {
        let subs = self
            .tables
            .volumes
            .get(&volume.0)
            .map_or(0, |v| v.data_subs);
        VolumeUsage {
            allocated_bytes: subs * u64::from(SUB_BLOCK_BYTES),
            copied_up_bytes: self.copied_up.get(&volume.0).copied().unwrap_or(0),
        }
    }

    /// Begins to count what one snapshot of a volume holds (`None`: each of them), as they are now.
    ///
    /// Errors: the snapshot is unknown.
    pub fn begin_usages(
        &self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
    ) -> Result<UsageScan, StoreError> {
        let view = self.view(volume, snapshot)?;
        let wanted = match (snapshot, view) {
            (Some(id), view) => vec![(id, view.map_or(0, |(_, line)| line.era()))],
            (None, Some((found, _))) => found.snapshots().to_vec(),
            (None, None) => Vec::new(),
        };
        Ok(UsageScan {
            volume,
            keys: view.map_or_else(Vec::new, |(found, _)| self.group_keys(found)),
            usages: vec![SnapshotUsage::default(); wanted.len()],
            shown: Steps::new(wanted.len()),
            used: Steps::new(wanted.len()),
            wanted,
        })
    }

    /// Counts some more groups; `false` if none was left.
    pub fn count_usages(&self, scan: &mut UsageScan, groups_max: usize) -> bool {
        let Some(found) = self.tables.volumes.get(&scan.volume.0) else {
            return false;
        };
        let from = scan.keys.len().saturating_sub(groups_max);
        let keys: Vec<u64> = scan.keys.drain(from..).collect();
        let has_one_line = found.parent.is_none() && found.turns.is_empty();
        for key in &keys {
            if has_one_line && 1 < scan.wanted.len() {
                let chains = found.groups.get(key).into_iter().flat_map(Group::chains);
                chains.for_each(|versions| scan.add_in_a_row(versions));
                continue;
            }
            for (index, (_, era)) in scan.wanted.iter().enumerate() {
                let usage = self.usage_of_group(found, scan.volume, *era, *key);
                scan.usages[index].referenced_bytes += usage.referenced_bytes;
                scan.usages[index].unique_bytes += usage.unique_bytes;
                scan.usages[index].used_bytes += usage.used_bytes;
            }
        }
        !keys.is_empty()
    }

    /// What a view of an era holds of one group.
    fn usage_of_group(
        &self,
        found: &Volume,
        volume: VolumeId,
        era: u32,
        key: u64,
    ) -> SnapshotUsage {
        let (line, first) = (found.line(era), group_at(volume, key));
        let mut usage = SnapshotUsage::default();
        for chunk in (0..GROUP_CHUNKS).filter(|_| found.parent.is_some()) {
            let at = ChunkAt {
                chunk: first.chunk + chunk,
                ..first
            };
            let seen = self.data_mask((found, line), at, ALL);
            usage.referenced_bytes += sub_bytes(seen.count_ones());
        }
        for versions in found.groups.get(&key).into_iter().flat_map(Group::chains) {
            if found.parent.is_none() {
                usage.referenced_bytes += sub_bytes(shown(line, versions).count_ones());
            }
            usage.unique_bytes += sub_bytes(unique_subs(found, versions, era));
            usage.used_bytes += sub_bytes(used_subs(found, versions, era));
        }
        usage
    }

    /// Groups in which a volume, or what it was cloned from, has something.
    pub(super) fn group_keys(&self, volume: &Volume) -> Vec<u64> {
        let mut keys: Vec<u64> = volume.groups.keys().copied().collect();
        let mut next = self.tables.parent_of(volume);
        while let Some((parent, _)) = next {
            keys.extend(parent.groups.keys());
            next = self.tables.parent_of(parent);
        }
        keys.sort_unstable();
        keys.dedup();
        keys
    }

    /// Pages of which the view holds data, in order.
    pub fn snapshot_pages(
        &self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
    ) -> Result<Vec<PageNo>, StoreError> {
        let mut pages = BTreeSet::new();
        let mut view = self.view(volume, snapshot)?;
        while let Some((found, line)) = view {
            let has_data = |group: &Group| group.chains().any(|v| shown(line, v) != 0);
            let holding = found.groups.iter().filter(|(_, group)| has_data(group));
            pages.extend(holding.map(|(key, _)| group_at(volume, *key).page));
            view = self.tables.parent_of(found);
        }
        Ok(pages.into_iter().collect())
    }

    /// Highest epoch that wrote to each page held, in order: enough to rebuild a routing table.
    pub fn page_epochs(&self, volume: VolumeId) -> Vec<(PageNo, Epoch)> {
        let mut epochs: BTreeMap<PageNo, Epoch> = BTreeMap::new();
        let groups = self
            .tables
            .volumes
            .get(&volume.0)
            .into_iter()
            .flat_map(|v| &v.groups);
        for (key, _) in groups {
            let at = group_at(volume, *key);
            let epoch = epochs.entry(at.page).or_default();
            *epoch = (*epoch).max(Epoch(self.group_epoch(at)));
        }
        epochs.into_iter().collect()
    }

    /// Totals of the store.
    pub fn usage(&self) -> StoreUsage {
        let subs: u64 = self.tables.volumes.values().map(|v| v.data_subs).sum();
        StoreUsage {
            slots_used: self.tables.slots_used,
            slots_total: u64::from(self.tables.slots.end()),
            allocated_bytes: subs * u64::from(SUB_BLOCK_BYTES),
            log_used_bytes: self.log.used(),
            log_bytes: self.log.size_bytes,
        }
    }

    /// Bytes of main memory that the tables take, estimated; looks at every group.
    pub fn resident_bytes(&self) -> u64 {
        let groups = self.tables.volumes.values().map(|volume| {
            let entry = size_of::<(u64, Group)>() + ENTRY_OVERHEAD_BYTES;
            let heap: usize = volume.groups.values().map(Group::heap_bytes).sum();
            volume.groups.capacity() * entry + heap
        });
        let pending =
            self.tables.redo.capacity() * size_of::<Redo>() + self.tables.dirty_slots() * 80;
        (groups.sum::<usize>() + pending + self.upkeep.copies.len()) as u64
    }
}

/// A count of what snapshots hold, some groups at a time, so that requests go on meanwhile. What is
/// written meanwhile may be in it or not.
#[derive(Debug)]
pub struct UsageScan {
    volume: VolumeId,
    /// The snapshots with the last era that each sees, in the order of these.
    wanted: Vec<(SnapshotId, u32)>,
    /// Groups that are left.
    keys: Vec<u64>,
    usages: Vec<SnapshotUsage>,
    /// What snapshots reference, and what of it the head does not share.
    shown: Steps,
    used: Steps,
}

/// Bytes by which a count grows, and shrinks, from the snapshot before to this one.
#[derive(Debug)]
struct Steps(Vec<(u64, u64)>);

impl Steps {
    fn new(snapshots: usize) -> Self {
        Self(vec![(0, 0); snapshots + 1])
    }

    /// Counts these sub-blocks for each of the snapshots.
    fn add(&mut self, seeing: &Range<usize>, subs: u16) {
        self.0[seeing.start].0 += sub_bytes(subs.count_ones());
        self.0[seeing.end].1 += sub_bytes(subs.count_ones());
    }

    /// The count of each snapshot.
    fn counts(&self) -> impl Iterator<Item = u64> {
        self.0.iter().scan(0, |count, (more, less)| {
            *count = *count + more - less;
            Some(*count)
        })
    }
}

impl UsageScan {
    /// Adds a chunk of a volume that was neither cloned nor rolled back: between two versions of it
    /// all snapshots show the same.
    fn add_in_a_row(&mut self, versions: &[Version]) {
        let before = |era| self.wanted.partition_point(|(_, last)| *last < era);
        let mut shown = 0;
        let mut replaced = replaced(versions);
        for (index, version) in versions.iter().enumerate().rev() {
            shown = version.data() | (shown & !version.present);
            let newer = index.checked_sub(1).map(|newer| &versions[newer]);
            let (from, end) = (
                before(version.era),
                newer.map_or(u32::MAX, |newer| newer.era),
            );
            let seeing = from..before(end).max(from);
            self.shown.add(&seeing, shown);
            self.used.add(&seeing, shown & replaced.pop().unwrap_or(0));
            if let (1, Some(newer)) = (seeing.len(), newer) {
                let own = version.data() & newer.present;
                self.usages[seeing.start].unique_bytes += sub_bytes(own.count_ones());
            }
        }
    }

    /// The snapshots in the order of their eras.
    #[must_use]
    pub fn finish(self) -> Vec<(SnapshotId, SnapshotUsage)> {
        let in_a_row = self.shown.counts().zip(self.used.counts());
        let counted = self.wanted.iter().zip(self.usages).zip(in_a_row);
        let counted = counted.map(|(((id, _), mut usage), (shown_bytes, used_bytes))| {
            usage.referenced_bytes += shown_bytes;
            usage.used_bytes += used_bytes;
            (*id, usage)
        });
        counted.collect()
    }
}

/// For each version, newest first, the sub-blocks that newer ones have of their own.
fn replaced(versions: &[Version]) -> Vec<u16> {
    let newer = versions.iter().scan(0, |newer, version| {
        let replaced = *newer;
        *newer |= version.present;
        Some(replaced)
    });
    newer.collect()
}

/// Data sub-blocks that this snapshot reads from the volume's own versions, and the head does not.
fn used_subs(volume: &Volume, versions: &[Version], era: u32) -> u32 {
    let seen_by = |era| resolve(volume.line(era).of(versions), ALL);
    let (seen, head) = (seen_by(era), seen_by(u32::MAX));
    let is_used = |sub: &usize| {
        let era = |found: Option<&Version>| found.map(|version| version.era);
        let has_data = seen[*sub].is_some_and(|version| version.data() & 1 << sub != 0);
        has_data && era(seen[*sub]) != era(head[*sub])
    };
    (0..seen.len()).filter(is_used).map(|_| 1).sum()
}

/// Data sub-blocks that a view of a chunk shows, of those that the versions decide.
fn shown(line: Line<'_>, versions: &[Version]) -> u16 {
    let (mut shown, mut open) = (0, ALL);
    for version in line.of(versions) {
        shown |= version.data() & open;
        open &= !version.present;
        if open == 0 {
            break;
        }
    }
    shown
}

/// Sub-blocks that only this snapshot keeps.
///
/// Without rollbacks that is of the version that it sees directly, if no other snapshot does, what
/// the next newer one has its own of.
fn unique_subs(volume: &Volume, versions: &[Version], era: u32) -> u32 {
    if !volume.turns.is_empty() {
        return tree::only_shown_by(volume, versions, era);
    }
    let index = versions.partition_point(|v| era < v.era);
    let (Some(newer), Some(seen)) = (
        index.checked_sub(1).map(|i| &versions[i]),
        versions.get(index),
    ) else {
        return 0;
    };
    match volume.snapshots_between(seen.era, newer.era).len() {
        1 => (seen.data() & newer.present).count_ones(),
        _ => 0,
    }
}
