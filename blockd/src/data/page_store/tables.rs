//! The tables of the store and what each log record does to them.
//!
//! Invariant: the tables are a function of the log alone. At run time a change is logged and then
//! executed; recovery executes the same records over the tables of the last checkpoint.

use super::catalog::Catalog;
use super::hash::FastMap;
use super::line::{Line, Turn};
use super::meta::{SlotContent, SlotRecord};
use super::record::{Change, ChunkAt, DataKind};
use super::slots::Slots;
use super::tree;
use super::version::{ALL, GROUP_CHUNKS, SUBS, Version, bits};
use super::volume::{Volume, chunk_in_group, group_key};
use crate::id::{SnapshotId, VolumeId};
use crate::planted::{Plant, planted};
use std::collections::{BTreeSet, VecDeque};

/// Positions in the log file are kept in units of the record alignment.
const POS_UNIT: u64 = 64;

/// Sub-blocks of one slot whose newest bytes are still only in the log.
#[derive(Clone, Debug)]
pub(super) struct DirtySlot {
    mask: u16,
    pos: [u32; SUBS],
}

/// What the slab still has to learn from the log, in the order of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Redo {
    /// Copy a sub-block from the log (position in units of 64 bytes).
    Write {
        lsn: u64,
        slot: u32,
        sub: u8,
        pos: u32,
    },
    /// Sub-blocks give their space back.
    Trim { lsn: u64, slot: u32, mask: u16 },
    /// The slot is free; `warm` if its space is worth keeping.
    Free { lsn: u64, slot: u32, warm: bool },
}

impl Redo {
    /// Slot that it is about.
    fn slot(&self) -> u32 {
        match self {
            Redo::Write { slot, .. } | Redo::Trim { slot, .. } | Redo::Free { slot, .. } => *slot,
        }
    }

    /// Record that caused it.
    pub(super) fn lsn(&self) -> u64 {
        match self {
            Redo::Write { lsn, .. } | Redo::Trim { lsn, .. } | Redo::Free { lsn, .. } => *lsn,
        }
    }
}

/// Slots that changed since the last checkpoint, and the image of them at the running one.
#[derive(Debug, Default)]
pub(super) struct SlotChanges {
    /// Changed slots and their chunk now; `None` is free.
    pub(super) changed: FastMap<u32, Option<ChunkAt>>,
    /// Changed slots when the running checkpoint began.
    pub(super) frozen: FastMap<u32, Option<ChunkAt>>,
    /// Those of them that changed again: their records as the checkpoint needs them.
    pub(super) captured: FastMap<u32, SlotRecord>,
    /// Frozen slots below this are written already.
    pub(super) emitted_end: u64,
}

impl SlotChanges {
    /// Must be called before the version in `slot` changes.
    fn touch(&mut self, slot: u32, now: Option<ChunkAt>, before: impl FnOnce() -> SlotRecord) {
        let pending = self.emitted_end <= u64::from(slot) && self.frozen.contains_key(&slot);
        if pending && !self.captured.contains_key(&slot) {
            self.captured.insert(slot, before());
        }
        self.changed.insert(slot, now);
    }
}

/// Everything that a checkpoint and the log together describe.
#[derive(Debug, Default)]
pub(super) struct Tables {
    pub(super) volumes: FastMap<u64, Volume>,
    pub(super) slots: Slots,
    pub(super) slots_used: u64,
    pub(super) changes: SlotChanges,
    pub(super) redo: VecDeque<Redo>,
    pub(super) freed_in_redo: u64,
    /// Spans that have begun and not ended, by volume and id.
    pub(super) spans: BTreeSet<(u64, u64)>,
    dirty: FastMap<u32, DirtySlot>,
}

/// The record does not fit the tables: log and checkpoint are not of one history.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Misfit(pub(super) &'static str);

impl Tables {
    /// Place in the log file of a sub-block, if its newest bytes are there.
    pub(super) fn dirty_pos(&self, slot: u32, sub: usize) -> Option<u64> {
        let dirty = self.dirty.get(&slot)?;
        (dirty.mask >> sub & 1 == 1).then(|| u64::from(dirty.pos[sub]) * POS_UNIT)
    }

    /// The slab has the bytes that were at this place in the log.
    pub(super) fn clear_dirty(&mut self, slot: u32, sub: usize, pos: u32) {
        let Some(dirty) = self.dirty.get_mut(&slot) else {
            return;
        };
        if dirty.mask >> sub & 1 == 1 && dirty.pos[sub] == pos {
            self.undirty(slot, 1 << sub);
        }
    }

    fn undirty(&mut self, slot: u32, mask: u16) {
        let Some(dirty) = self.dirty.get_mut(&slot) else {
            return;
        };
        dirty.mask &= !mask;
        if dirty.mask == 0 {
            self.dirty.remove(&slot);
        }
    }

    /// Slots with bytes that are only in the log.
    pub(super) fn dirty_slots(&self) -> usize {
        self.dirty.len()
    }

    /// Puts a version of a checkpoint in its place.
    pub(super) fn load(&mut self, content: SlotContent) {
        let SlotContent { at, epoch, version } = content;
        self.slots_used += 1;
        let volume = self.volumes.entry(at.volume.0).or_default();
        volume.data_subs += u64::from(version.data().count_ones());
        let group = volume
            .groups
            .entry(group_key(at.page, at.chunk / GROUP_CHUNKS))
            .or_default();
        group.epoch = group.epoch.max(epoch);
        group.insert(version);
    }

    /// Takes over the volumes of a checkpoint.
    pub(super) fn load_catalog(&mut self, catalog: Catalog) {
        for entry in catalog.volumes {
            let volume = self.volumes.entry(entry.volume.0).or_default();
            (volume.era, volume.deleted) = (entry.era, entry.deleted);
            volume.set_snapshots(entry.snapshots);
        }
        for entry in catalog.histories {
            let volume = self.volumes.entry(entry.volume.0).or_default();
            (volume.turns, volume.rolled_back) = (entry.turns, entry.rolled_back);
            volume.parent = entry.parent;
        }
        let spans = catalog.spans.into_iter();
        self.spans
            .extend(spans.map(|(volume, span)| (volume.0, span)));
    }

    /// Does what a record says. `data_pos` is the place of its data in the log file.
    pub(super) fn execute(
        &mut self,
        lsn: u64,
        change: &Change,
        data_pos: u64,
    ) -> Result<(), Misfit> {
        match change {
            Change::Mark { .. } | Change::Pad(_) => {}
            Change::Data {
                kind,
                at,
                slot,
                mask,
                zero,
                epoch,
                crcs,
            } => {
                let content = Content {
                    mask: *mask,
                    zero: *zero,
                    copied: 0,
                    crcs,
                    data_pos,
                };
                match kind {
                    DataKind::Put => self.put(lsn, *at, *slot, *epoch, &content)?,
                    DataKind::Fill => self.fill(lsn, *at, *slot, content)?,
                    DataKind::Merge { drop } => self.merge(lsn, *at, *slot, *drop, content)?,
                    DataKind::Moved { era, copied } => {
                        let (era, copied) = (*era, *copied);
                        self.take_in(lsn, *at, *slot, era, &Content { copied, ..content })?;
                    }
                }
            }
            Change::Pointer {
                at,
                slot,
                epoch,
                era,
                crcs,
            } => {
                for (index, crcs) in (0u16..).zip(crcs) {
                    let chunk = at
                        .chunk
                        .checked_add(index)
                        .ok_or(Misfit("chunk out of range"))?;
                    self.point(
                        lsn,
                        ChunkAt { chunk, ..*at },
                        slot + u32::from(index),
                        (*epoch, *era),
                        crcs,
                    );
                }
            }
            Change::DropGroup(at) => self.drop_group(lsn, *at)?,
            Change::DropChunk(at) => self.drop_chunk(lsn, *at)?,
            Change::Adopt(at, epoch) => self.adopt(*at, *epoch),
            Change::Forget { at, slot, mask } => self.forget(lsn, *at, *slot, *mask)?,
            change => self.change_volume(change)?,
        }
        Ok(())
    }

    /// What a record about a whole volume says.
    fn change_volume(&mut self, change: &Change) -> Result<(), Misfit> {
        let unknown = Misfit("no such volume");
        match change {
            Change::TakeSnapshot(id, snapshot) => {
                let volume = self.volumes.entry(id.0).or_default();
                volume.add_snapshot(*snapshot, volume.era);
                next_era(volume)?;
            }
            Change::NextEra(id) => next_era(self.volumes.entry(id.0).or_default())?,
            Change::TakeSnapshotAt(id, snapshot, era) => {
                let volume = self.volumes.entry(id.0).or_default();
                let next = era.checked_add(1).ok_or(Misfit("eras used up"))?;
                if volume
                    .snapshots()
                    .last()
                    .is_some_and(|(_, last)| era <= last)
                {
                    return Err(Misfit("snapshot of an era before another one"));
                }
                volume.add_snapshot(*snapshot, *era);
                volume.era = volume.era.max(next);
            }
            Change::DropSnapshot(id, snapshot) => {
                let volume = self.volumes.get_mut(&id.0).ok_or(unknown)?;
                volume.remove_snapshot(*snapshot);
            }
            Change::SpanBegun(id, span) => drop(self.spans.insert((id.0, *span))),
            Change::SpanEnded(id, span) => drop(self.spans.remove(&(id.0, *span))),
            Change::Rollback(id, snapshot, epoch) => self.roll_back(*id, *snapshot, *epoch)?,
            Change::Turn(id, turn, epoch) => {
                let volume = self.volumes.entry(id.0).or_default();
                let last = volume.turns.last().map_or(0, |last| last.era);
                if turn.era <= last || turn.era <= turn.to {
                    return Err(Misfit("a turn out of order"));
                }
                volume.era = volume.era.max(turn.era);
                volume.turns.push(*turn);
                volume.rolled_back = *epoch;
            }
            Change::Clone(id, parent) => {
                let volume = self.volumes.entry(id.0).or_default();
                volume.parent = Some(*parent);
            }
            Change::Detach(id) => {
                let volume = self.volumes.get_mut(&id.0).ok_or(unknown)?;
                volume.parent = None;
            }
            Change::DropVolume(id) => {
                let volume = self.volumes.get_mut(&id.0).ok_or(unknown)?;
                volume.deleted = true;
                volume.parent = None;
                volume.set_snapshots(Vec::new());
                self.spans.retain(|(volume, _)| *volume != id.0);
                self.forget_if_gone(*id);
            }
            _ => return Err(Misfit("not a change of a volume")),
        }
        Ok(())
    }

    /// A volume without chunks has nothing to go back to, whether it knows the snapshot or not.
    fn roll_back(&mut self, id: VolumeId, snapshot: SnapshotId, epoch: u32) -> Result<(), Misfit> {
        let volume = self.volumes.entry(id.0).or_default();
        match volume.era_of(snapshot) {
            Some(to) => {
                next_era(volume)?;
                let era = volume.era;
                volume.turns.push(Turn { era, to });
            }
            None if volume.groups.is_empty() => {}
            None => return Err(Misfit("rollback to an unknown snapshot")),
        }
        volume.rolled_back = epoch;
        Ok(())
    }

    fn put(
        &mut self,
        lsn: u64,
        at: ChunkAt,
        slot: u32,
        epoch: u32,
        content: &Content<'_>,
    ) -> Result<(), Misfit> {
        let volume = self.volumes.entry(at.volume.0).or_default();
        let group = volume
            .groups
            .entry(group_key(at.page, at.chunk / GROUP_CHUNKS))
            .or_default();
        group.epoch = group.epoch.max(epoch);
        let chunk = chunk_in_group(at.chunk);
        let newest = group.chunk(chunk).first();
        match newest {
            Some(newest) if newest.slot == slot => {}
            Some(newest) if newest.era >= volume.era => {
                return Err(Misfit("write to a slot that is not the newest"));
            }
            _ => {
                self.changes.touch(slot, Some(at), || None);
                group.insert(Version::empty(slot, volume.era, chunk));
                self.slots.extend_to(slot.saturating_add(1));
                self.slots_used += 1;
            }
        }
        self.set(lsn, at, slot, content)
    }

    /// Content of the version of an era, which is made if there is none.
    fn take_in(
        &mut self,
        lsn: u64,
        at: ChunkAt,
        slot: u32,
        era: u32,
        content: &Content<'_>,
    ) -> Result<(), Misfit> {
        let volume = self.volumes.entry(at.volume.0).or_default();
        let key = group_key(at.page, at.chunk / GROUP_CHUNKS);
        let group = volume.groups.entry(key).or_default();
        let chunk = chunk_in_group(at.chunk);
        match group.era_mut(chunk, era) {
            Some(version) if version.slot == slot => {}
            Some(_) => return Err(Misfit("moved data for a slot of another version")),
            None => {
                self.changes.touch(slot, Some(at), || None);
                group.insert(Version::empty(slot, era, chunk));
                self.slots.extend_to(slot.saturating_add(1));
                self.slots_used += 1;
            }
        }
        self.set(lsn, at, slot, content)
    }

    fn fill(
        &mut self,
        lsn: u64,
        at: ChunkAt,
        slot: u32,
        content: Content<'_>,
    ) -> Result<(), Misfit> {
        let copied = content.mask | content.zero;
        self.set(lsn, at, slot, &Content { copied, ..content })
    }

    /// Content into an existing version. What is zero in the oldest version of its line is a hole,
    /// unless it hides what the parent of a clone has.
    fn set(
        &mut self,
        lsn: u64,
        at: ChunkAt,
        slot: u32,
        content: &Content<'_>,
    ) -> Result<(), Misfit> {
        let chunk = chunk_in_group(at.chunk);
        let volume = self
            .volumes
            .get_mut(&at.volume.0)
            .ok_or(Misfit("no such volume"))?;
        let key = group_key(at.page, at.chunk / GROUP_CHUNKS);
        let group = volume.groups.get_mut(&key).ok_or(Misfit("no such group"))?;
        let epoch = group.epoch;
        let chain = group.chunk(chunk);
        let era = chain.iter().find(|v| v.slot == slot).map(|v| v.era);
        let line = Line::new(era.ok_or(Misfit("no version in the slot"))?, &volume.turns);
        let is_oldest = volume.parent.is_none() && line.of(chain).nth(1).is_none();
        let version = group
            .slot_mut(chunk, slot)
            .ok_or(Misfit("no version in the slot"))?;
        self.changes.touch(slot, Some(at), || {
            Some(SlotContent {
                at,
                epoch,
                version: version.clone(),
            })
        });
        let before = version.data();
        version.set(content.mask, content.zero, content.crcs);
        version.copied |= content.copied;
        if is_oldest {
            version.present &= !version.zero;
            version.copied &= version.present;
            version.zero = 0;
        }
        let (after, is_empty) = (version.data(), version.present == 0);
        volume.data_subs = (volume.data_subs + u64::from(after.count_ones()))
            .saturating_sub(u64::from(before.count_ones()));
        self.dirty_after_set(lsn, slot, content);
        if before & content.zero != 0 {
            self.redo.push_back(Redo::Trim {
                lsn,
                slot,
                mask: before & content.zero,
            });
        }
        if is_oldest && is_empty {
            self.remove_version(lsn, at, slot, false)?;
        }
        Ok(())
    }

    fn dirty_after_set(&mut self, lsn: u64, slot: u32, content: &Content<'_>) {
        if content.mask != 0 {
            let dirty = self.dirty.entry(slot).or_insert(DirtySlot {
                mask: 0,
                pos: [0; SUBS],
            });
            dirty.mask |= content.mask;
            for (index, sub) in (0u64..).zip(bits(content.mask)) {
                let pos =
                    u32::try_from((content.data_pos + index * 4096) / POS_UNIT).unwrap_or(u32::MAX);
                dirty.pos[sub] = pos;
                let sub = u8::try_from(sub).unwrap_or(0);
                self.redo.push_back(Redo::Write {
                    lsn,
                    slot,
                    sub,
                    pos,
                });
            }
        }
        self.undirty(slot, content.zero & !content.mask);
    }

    fn merge(
        &mut self,
        lsn: u64,
        at: ChunkAt,
        keep: u32,
        drop: u32,
        content: Content<'_>,
    ) -> Result<(), Misfit> {
        let chunk = chunk_in_group(at.chunk);
        let versions = self
            .volumes
            .get(&at.volume.0)
            .map_or(&[][..], |v| v.chunk(at.page, at.chunk));
        let find = |slot| versions.iter().find(|v| v.slot == slot);
        let (kept, dropped) = find(keep)
            .zip(find(drop))
            .ok_or(Misfit("merge of unknown versions"))?;
        let (newer, older) = match dropped.era < kept.era {
            true => (kept, dropped),
            false => (dropped, kept),
        };
        let (era, copied) = (newer.era, newer.copied_with(older));
        self.remove_version(lsn, at, drop, false)?;
        let key = group_key(at.page, at.chunk / GROUP_CHUNKS);
        let group = self
            .volumes
            .get_mut(&at.volume.0)
            .and_then(|v| v.groups.get_mut(&key));
        let group = group.ok_or(Misfit("no such group"))?;
        let epoch = group.epoch;
        let mut version = group
            .remove(chunk, keep)
            .ok_or(Misfit("no version in the slot"))?;
        self.changes.touch(keep, Some(at), || {
            Some(SlotContent {
                at,
                epoch,
                version: version.clone(),
            })
        });
        (version.era, version.copied) = (era, copied);
        group.insert(version);
        self.set(lsn, at, keep, &Content { copied, ..content })
    }

    fn point(
        &mut self,
        lsn: u64,
        at: ChunkAt,
        slot: u32,
        (epoch, era): (u32, Option<u32>),
        crcs: &[u32; SUBS],
    ) {
        let volume = self.volumes.entry(at.volume.0).or_default();
        let era = era.unwrap_or(volume.era);
        let group = volume
            .groups
            .entry(group_key(at.page, at.chunk / GROUP_CHUNKS))
            .or_default();
        group.epoch = group.epoch.max(epoch);
        let (epoch, chunk) = (group.epoch, chunk_in_group(at.chunk));
        self.changes.touch(slot, Some(at), || None);
        self.slots.extend_to(slot.saturating_add(1));
        volume.data_subs += SUBS as u64;
        let whole = Version {
            crcs: *crcs,
            slot,
            era,
            present: ALL,
            zero: 0,
            copied: 0,
            chunk,
        };
        match group.era_mut(chunk, era) {
            Some(found) => {
                let old = std::mem::replace(found, whole);
                volume.data_subs -= u64::from(old.data().count_ones());
                let before = old.clone();
                self.changes.touch(old.slot, None, || {
                    Some(SlotContent {
                        at,
                        epoch,
                        version: before,
                    })
                });
                self.free(lsn, old.slot, true);
            }
            None => {
                group.insert(whole);
                self.slots_used += 1;
            }
        }
    }

    fn free(&mut self, lsn: u64, slot: u32, warm: bool) {
        self.dirty.remove(&slot);
        if planted(Plant::ReuseFreedAtOnce) {
            return self.slots.release(slot, true);
        }
        self.redo.push_back(Redo::Free { lsn, slot, warm });
        self.freed_in_redo += 1;
    }

    fn remove_version(
        &mut self,
        lsn: u64,
        at: ChunkAt,
        slot: u32,
        warm: bool,
    ) -> Result<(), Misfit> {
        let volume = self
            .volumes
            .get_mut(&at.volume.0)
            .ok_or(Misfit("no such volume"))?;
        let key = group_key(at.page, at.chunk / GROUP_CHUNKS);
        let group = volume.groups.get_mut(&key).ok_or(Misfit("no such group"))?;
        let epoch = group.epoch;
        let version = group
            .remove(chunk_in_group(at.chunk), slot)
            .ok_or(Misfit("no version in the slot"))?;
        if group.is_empty() {
            volume.groups.remove(&key);
        }
        volume.data_subs -= u64::from(version.data().count_ones());
        self.slots_used -= 1;
        self.changes
            .touch(slot, None, || Some(SlotContent { at, epoch, version }));
        self.free(lsn, slot, warm);
        Ok(())
    }

    /// A version loses what no view reads from it. What was written in it counts as written in the
    /// versions over it, so that no change is forgotten.
    fn forget(&mut self, lsn: u64, at: ChunkAt, slot: u32, mask: u16) -> Result<(), Misfit> {
        let volume = self
            .volumes
            .get_mut(&at.volume.0)
            .ok_or(Misfit("no such volume"))?;
        let (chunk, chain) = (chunk_in_group(at.chunk), volume.chunk(at.page, at.chunk));
        let index = chain.iter().position(|v| v.slot == slot);
        let index = index.ok_or(Misfit("no version in the slot"))?;
        let written = chain[index].own() & mask;
        let over = tree::nodes(volume, chain).swap_remove(index).children;
        let over: Vec<u32> = over.into_iter().map(|child| chain[child].slot).collect();
        let key = group_key(at.page, at.chunk / GROUP_CHUNKS);
        let group = volume.groups.get_mut(&key).ok_or(Misfit("no such group"))?;
        let epoch = group.epoch;
        for (slot, copied, forgotten) in over
            .into_iter()
            .map(|slot| (slot, written, 0))
            .chain([(slot, 0, mask)])
        {
            let version = group.slot_mut(chunk, slot).ok_or(Misfit("no version"))?;
            self.changes.touch(slot, Some(at), || {
                Some(SlotContent {
                    at,
                    epoch,
                    version: version.clone(),
                })
            });
            version.copied &= !copied;
            let before = version.data();
            version.unset(forgotten);
            let freed = before & forgotten;
            volume.data_subs -= u64::from(freed.count_ones());
            if freed != 0 {
                self.redo.push_back(Redo::Trim {
                    lsn,
                    slot,
                    mask: freed,
                });
            }
        }
        let is_empty = group.slot_mut(chunk, slot).is_some_and(|v| v.present == 0);
        self.undirty(slot, mask);
        if is_empty {
            self.remove_version(lsn, at, slot, false)?;
        }
        Ok(())
    }

    fn drop_group(&mut self, lsn: u64, at: ChunkAt) -> Result<(), Misfit> {
        let volume = self
            .volumes
            .get_mut(&at.volume.0)
            .ok_or(Misfit("no such volume"))?;
        let first = at.chunk / GROUP_CHUNKS;
        let group = volume
            .groups
            .remove(&group_key(at.page, first))
            .ok_or(Misfit("no such group"))?;
        let epoch = group.epoch;
        for version in group.all() {
            volume.data_subs -= u64::from(version.data().count_ones());
            let at = ChunkAt {
                chunk: first * GROUP_CHUNKS + u16::from(version.chunk),
                ..at
            };
            let before = || {
                Some(SlotContent {
                    at,
                    epoch,
                    version: version.clone(),
                })
            };
            self.changes.touch(version.slot, None, before);
        }
        for version in group.all() {
            self.slots_used -= 1;
            self.free(lsn, version.slot, false);
        }
        self.forget_if_gone(at.volume);
        Ok(())
    }

    fn drop_chunk(&mut self, lsn: u64, at: ChunkAt) -> Result<(), Misfit> {
        let volume = self.volumes.get(&at.volume.0);
        let versions = volume.map_or(&[][..], |v| v.chunk(at.page, at.chunk));
        let slots: Vec<u32> = versions.iter().map(|version| version.slot).collect();
        slots
            .into_iter()
            .try_for_each(|slot| self.remove_version(lsn, at, slot, false))
    }

    /// One slot record carries the epoch of its group.
    fn adopt(&mut self, at: ChunkAt, epoch: u32) {
        let volume = self.volumes.get_mut(&at.volume.0);
        let key = group_key(at.page, at.chunk / GROUP_CHUNKS);
        let Some(group) = volume.and_then(|v| v.groups.get_mut(&key)) else {
            return;
        };
        let before = group.epoch;
        group.epoch = before.max(epoch);
        if let Some(version) = group.all().next() {
            let first = at.chunk / GROUP_CHUNKS * GROUP_CHUNKS;
            let at = ChunkAt {
                chunk: first + u16::from(version.chunk),
                ..at
            };
            self.changes.touch(version.slot, Some(at), || {
                Some(SlotContent {
                    at,
                    epoch: before,
                    version: version.clone(),
                })
            });
        }
    }

    fn forget_if_gone(&mut self, volume: VolumeId) {
        if self
            .volumes
            .get(&volume.0)
            .is_some_and(|v| v.deleted && v.groups.is_empty())
        {
            self.volumes.remove(&volume.0);
        }
    }

    /// Slots that a record takes into use, if it were executed now.
    pub(super) fn allocates(&self, change: &Change) -> std::ops::Range<u32> {
        match change {
            Change::Pointer { slot, crcs, .. } => {
                *slot..slot.saturating_add(u32::try_from(crcs.len()).unwrap_or(u32::MAX))
            }
            Change::Data {
                kind: DataKind::Put,
                at,
                slot,
                ..
            } => {
                let volume = self.volumes.get(&at.volume.0);
                let chain = volume.map_or(&[][..], |v| v.chunk(at.page, at.chunk));
                let is_known = chain.iter().any(|v| v.slot == *slot);
                *slot..slot.saturating_add(u32::from(!is_known))
            }
            Change::Data {
                kind: DataKind::Moved { .. },
                at,
                slot,
                ..
            } => {
                let volume = self.volumes.get(&at.volume.0);
                let mut known = volume
                    .map_or(&[][..], |v| v.chunk(at.page, at.chunk))
                    .iter();
                let is_known = known.any(|v| v.slot == *slot);
                *slot..slot.saturating_add(u32::from(!is_known))
            }
            _ => 0..0,
        }
    }

    /// Recovery: what was to be done to a slot before it was taken into use again was done then, and
    /// must not be done now to its new content.
    pub(super) fn forget_redo_before(&mut self, allocated: &FastMap<u32, u64>) {
        self.redo.retain(|entry| {
            allocated
                .get(&entry.slot())
                .is_none_or(|lsn| *lsn <= entry.lsn())
        });
        let is_free = |entry: &&Redo| matches!(entry, Redo::Free { .. });
        self.freed_in_redo = self.redo.iter().filter(is_free).count() as u64;
    }

    /// Record of a slot that has not changed since it was noted in `at`.
    pub(super) fn slot_record(&self, slot: u32, at: Option<ChunkAt>) -> SlotRecord {
        let at = at?;
        let volume = self.volumes.get(&at.volume.0)?;
        let group = volume
            .groups
            .get(&group_key(at.page, at.chunk / GROUP_CHUNKS))?;
        let version = group
            .chunk(chunk_in_group(at.chunk))
            .iter()
            .find(|v| v.slot == slot)?;
        Some(SlotContent {
            at,
            epoch: group.epoch,
            version: version.clone(),
        })
    }
}

fn next_era(volume: &mut Volume) -> Result<(), Misfit> {
    volume.era = volume.era.checked_add(1).ok_or(Misfit("eras used up"))?;
    Ok(())
}

/// What a data record brings.
struct Content<'a> {
    mask: u16,
    zero: u16,
    /// Sub-blocks that are copied afterwards, besides those that were before.
    copied: u16,
    crcs: &'a [u32; SUBS],
    data_pos: u64,
}
