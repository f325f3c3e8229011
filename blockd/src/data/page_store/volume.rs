//! A volume of the store: its eras, its snapshots, what it was cloned from, its chunks.

use super::engine::chunk_of;
use super::hash::FastMap;
use super::line::{Line, Turn};
use super::record::ChunkAt;
use super::types::Parent;
use super::version::{GROUP_CHUNKS, Group, Version};
use crate::id::{CHUNK_BYTES, PageNo, SnapshotId, VolumeId};

/// See the head of the file.
#[derive(Debug, Default)]
pub(super) struct Volume {
    /// Era that writes go to; a snapshot ends it.
    pub(super) era: u32,
    /// In the order of their eras, with the last era that each one sees.
    snapshots: Vec<(SnapshotId, u32)>,
    /// Era of each snapshot by its id.
    era_of: FastMap<u32, u32>,
    /// Eras begun by rollbacks, in order.
    pub(super) turns: Vec<Turn>,
    /// Routing epoch of the last rollback; 0 if there was none.
    pub(super) rolled_back: u32,
    /// What no version decides is read there.
    pub(super) parent: Option<Parent>,
    /// A snapshot of this era or a later one may still be taken. Not logged.
    pub(super) pinned: Option<u32>,
    /// Waits for its groups to be dropped.
    pub(super) deleted: bool,
    /// Groups of chunks by `group_key`.
    pub(super) groups: FastMap<u64, Group>,
    /// Sub-blocks with data, of all versions.
    pub(super) data_subs: u64,
}

impl Volume {
    /// Snapshots with the last era that each one sees, in the order of these.
    pub(super) fn snapshots(&self) -> &[(SnapshotId, u32)] {
        &self.snapshots
    }

    /// Takes over snapshots, in the order of their eras.
    pub(super) fn set_snapshots(&mut self, snapshots: Vec<(SnapshotId, u32)>) {
        self.era_of = snapshots.iter().map(|(id, era)| (id.0, *era)).collect();
        self.snapshots = snapshots;
    }

    /// An era, later than those of all snapshots so far, ends with a snapshot.
    pub(super) fn add_snapshot(&mut self, snapshot: SnapshotId, era: u32) {
        self.snapshots.push((snapshot, era));
        self.era_of.insert(snapshot.0, era);
    }

    /// Forgets a snapshot.
    pub(super) fn remove_snapshot(&mut self, snapshot: SnapshotId) {
        self.era_of.remove(&snapshot.0);
        self.snapshots.retain(|(id, _)| *id != snapshot);
    }

    /// Last era that a snapshot sees.
    pub(super) fn era_of(&self, snapshot: SnapshotId) -> Option<u32> {
        self.era_of.get(&snapshot.0).copied()
    }

    /// What the head sees.
    pub(super) fn head(&self) -> Line<'_> {
        Line::new(u32::MAX, &self.turns)
    }

    /// What a view of an era sees.
    pub(super) fn line(&self, era: u32) -> Line<'_> {
        Line::new(era, &self.turns)
    }

    /// What a reader of the snapshot (`None`: the head) sees.
    pub(super) fn view(&self, snapshot: Option<SnapshotId>) -> Option<Line<'_>> {
        match snapshot {
            None => Some(self.head()),
            Some(id) => self.era_of(id).map(|era| self.line(era)),
        }
    }

    /// Bytes of the page from `offset_bytes` on, to the end of a run of chunks of which no view shows
    /// anything; 0 if one may show something of the first.
    pub(super) fn absent_bytes(&self, page: PageNo, offset_bytes: u32) -> u32 {
        let group = chunk_of(offset_bytes) / GROUP_CHUNKS;
        if self.parent.is_some() || self.groups.contains_key(&group_key(page, group)) {
            return 0;
        }
        let group_bytes = u32::from(GROUP_CHUNKS) * CHUNK_BYTES;
        group_bytes - offset_bytes % group_bytes
    }

    /// Versions of a chunk, newest first.
    pub(super) fn chunk(&self, page: PageNo, chunk: u16) -> &[Version] {
        let group = self.groups.get(&group_key(page, chunk / GROUP_CHUNKS));
        group.map_or(&[], |group| group.chunk(chunk_in_group(chunk)))
    }

    /// Index range of the snapshots with an era in `from..to`.
    pub(super) fn snapshots_between(&self, from: u32, to: u32) -> std::ops::Range<usize> {
        let before = |era| self.snapshots.partition_point(|(_, last)| *last < era);
        let first = before(from);
        first..before(to).max(first)
    }

    /// Whether the newest version of a chunk takes what is written now: no view but the head sees it.
    pub(super) fn is_open(&self, newest: &Version) -> bool {
        let turned = self.turns.last().is_some_and(|turn| newest.era < turn.era);
        !turned && !self.is_seen(newest.era, self.era)
    }

    /// True if some snapshot has, or one may be taken to have, an era in `from..to`.
    pub(super) fn is_seen(&self, from: u32, to: u32) -> bool {
        self.pinned.is_some_and(|pinned| pinned < to)
            || !self.snapshots_between(from, to).is_empty()
    }
}

/// Key of a group in its volume.
pub(super) fn group_key(page: PageNo, group: u16) -> u64 {
    u64::from(page.0) << 16 | u64::from(group)
}

/// First chunk of the group with that key.
pub(super) fn group_at(volume: VolumeId, key: u64) -> ChunkAt {
    let page = PageNo(u32::try_from(key >> 16).unwrap_or(u32::MAX));
    let group = u16::try_from(key & 0xffff).unwrap_or(u16::MAX);
    ChunkAt {
        volume,
        page,
        chunk: group.saturating_mul(GROUP_CHUNKS),
    }
}

/// Index of a chunk in its group.
pub(super) fn chunk_in_group(chunk: u16) -> u8 {
    u8::try_from(chunk % GROUP_CHUNKS).unwrap_or(0)
}
