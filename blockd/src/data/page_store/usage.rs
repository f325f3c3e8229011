//! What the store holds, for people and for resync.

use super::engine::Engine;
use super::error::StoreError;
use super::record::ChunkAt;
use super::tables::{Redo, Volume, group_at};
use super::types::{SnapshotUsage, StoreUsage, VolumeUsage};
use super::version::{Group, Version};
use crate::id::{Epoch, PageNo, SUB_BLOCK_BYTES, SnapshotId, VolumeId};
use crate::io::disk::Disk;
use std::collections::BTreeMap;

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
            v.snapshots.iter().map(|(id, _)| *id).collect()
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
        }
    }

    /// Space of a snapshot; scans the volume's table.
    pub fn snapshot_usage(
        &self,
        volume: VolumeId,
        snapshot: SnapshotId,
    ) -> Result<SnapshotUsage, StoreError> {
        let mut usage = SnapshotUsage::default();
        let Some((found, era)) = self.view(volume, Some(snapshot))? else {
            return Ok(usage);
        };
        for (key, group) in &found.groups {
            let first = group_at(volume, *key);
            for versions in group.all().chunk_by(|a, b| a.chunk == b.chunk) {
                let chunk = first.chunk + u16::from(versions[0].chunk);
                let seen = Self::data_mask(found, ChunkAt { chunk, ..first }, era);
                usage.referenced_bytes += sub_bytes(seen.count_ones());
                usage.unique_bytes += sub_bytes(unique_subs(found, versions, era));
            }
        }
        Ok(usage)
    }

    /// Pages of which the view holds data, in order.
    pub fn snapshot_pages(
        &self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
    ) -> Result<Vec<PageNo>, StoreError> {
        let Some((found, era)) = self.view(volume, snapshot)? else {
            return Ok(Vec::new());
        };
        let has_data = |group: &Group| group.all().iter().any(|v| v.era <= era && v.data() != 0);
        let holding = found.groups.iter().filter(|(_, group)| has_data(group));
        let mut pages: Vec<PageNo> = holding
            .map(|(key, _)| group_at(volume, *key).page)
            .collect();
        pages.sort_unstable();
        pages.dedup();
        Ok(pages)
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
        let groups = self.tables.volumes.values().map(|volume| {
            let entry = size_of::<(u64, Group)>() + ENTRY_OVERHEAD_BYTES;
            let heap: usize = volume.groups.values().map(Group::heap_bytes).sum();
            volume.groups.capacity() * entry + heap
        });
        let pending =
            self.tables.redo.capacity() * size_of::<Redo>() + self.tables.dirty_slots() * 80;
        let subs: u64 = self.tables.volumes.values().map(|v| v.data_subs).sum();
        StoreUsage {
            slots_used: self.tables.slots_used,
            slots_total: u64::from(self.tables.slots.end()),
            allocated_bytes: subs * u64::from(SUB_BLOCK_BYTES),
            log_used_bytes: self.log.used(),
            log_bytes: self.log.size_bytes,
            resident_bytes: (groups.sum::<usize>() + pending + self.upkeep.copies.len()) as u64,
        }
    }
}

/// Sub-blocks that only this snapshot keeps: the version it sees directly, where the next newer one
/// has its own, if no other snapshot sees that version.
fn unique_subs(volume: &Volume, versions: &[Version], era: u32) -> u32 {
    let Some(index) = versions.iter().position(|v| v.era <= era) else {
        return 0;
    };
    let (Some(newer), seen) = (index.checked_sub(1).map(|i| &versions[i]), &versions[index]) else {
        return 0;
    };
    let sharers = volume
        .snapshots
        .iter()
        .filter(|(_, e)| seen.era <= *e && *e < newer.era)
        .count();
    if sharers == 1 {
        (seen.data() & newer.present).count_ones()
    } else {
        0
    }
}
