//! Which blocks are given away: near a goal, in runs as long as wanted where there are any.
//!
//! A claim is in memory only; [`Groups::use_blocks`] puts it on disk in a transaction, after the data.

use crate::ext4::bitmap;
use crate::ext4::error::FsError;
use crate::ext4::groups::{Groups, corrupt};
use crate::ext4::transaction::Tid;
use std::ops::Range;
use std::sync::atomic::Ordering;

impl Groups {
    /// Claims at most `want` consecutive blocks, near `goal` if that is possible. The caller was promised them.
    ///
    /// # Errors
    /// The device's, and what is wrong with a bitmap.
    pub async fn claim_blocks(&self, goal: u64, want: u32) -> Result<Range<u64>, FsError> {
        let count = self.superblock().groups_count();
        let goal = goal.max(u64::from(self.superblock().first_data_block));
        let start = self.parts(goal..goal + 1)[0].clone();
        let start_group = start.0.min(count - 1);
        let order = || (0..count).map(|step| (start_group + step) % count);
        for whole in [true, false] {
            for group in order() {
                let from = if group == start_group {
                    start.1.start
                } else {
                    0
                };
                let free = self.slots[group as usize]
                    .free_blocks
                    .load(Ordering::Relaxed);
                if free == 0 || (whole && free < want) {
                    continue;
                }
                self.load_blocks(group).await?;
                if let Some(claimed) = self.claim_in(group, from, want, whole) {
                    return Ok(claimed);
                }
            }
        }
        Err(FsError::NoSpace)
    }

    /// Claims in one group: what stands at `from`, or a run as long as wanted, or (not `whole`) the longest.
    fn claim_in(&self, group: u32, from: u32, want: u32, whole: bool) -> Option<Range<u64>> {
        let mut state = self.state(group);
        let end = self.superblock().group_blocks(group);
        let taken = state.taken_blocks.as_mut()?;
        let ahead = bitmap::next(taken, from..end.min(from.saturating_add(want)), true);
        let fits = |run: &Range<u32>| !whole || run.len() as u32 >= want;
        let run = if ahead > from && from < end {
            Some(from..ahead)
        } else {
            let behind = bitmap::find_run(taken, from..end, want).filter(fits);
            behind.or_else(|| bitmap::find_run(taken, 0..end, want).filter(fits))
        }?;
        Some(self.mark_claimed(group, taken, run))
    }

    /// The first run of at least `least` free blocks of `group` among the bits `within`. It is not claimed.
    pub(super) fn free_run(
        &self,
        group: u32,
        within: Range<u32>,
        least: u32,
    ) -> Option<Range<u32>> {
        let state = self.state(group);
        let taken = state.taken_blocks.as_ref()?;
        let mut at = within.start;
        while at < within.end {
            let start = bitmap::next(taken, at..within.end, false);
            let end = bitmap::next(taken, start..within.end, true);
            if end - start >= least {
                return Some(start..end);
            }
            at = end;
        }
        None
    }

    /// Claims these blocks of `group`, unless one of them is taken. The caller was promised them.
    pub(super) fn claim_exactly(&self, group: u32, bits: Range<u32>) -> Option<Range<u64>> {
        let mut state = self.state(group);
        let taken = state.taken_blocks.as_mut()?;
        bitmap::is_all(taken, bits.clone(), false).then(|| self.mark_claimed(group, taken, bits))
    }

    fn mark_claimed(&self, group: u32, taken: &mut [u8], bits: Range<u32>) -> Range<u64> {
        bitmap::fill(taken, bits.clone(), true);
        let free = &self.slots[group as usize].free_blocks;
        free.fetch_sub(bits.len() as u32, Ordering::Relaxed);
        let first = self.superblock().group_first(group);
        first + u64::from(bits.start)..first + u64::from(bits.end)
    }

    /// Gives claimed blocks, or such whose freeing has committed, back to who asks next.
    pub fn release_blocks(&self, blocks: Range<u64>) {
        self.give_back(blocks.end - blocks.start);
        for (group, range) in self.parts(blocks) {
            let count = range.len() as u32;
            if let Some(taken) = &mut self.state(group).taken_blocks {
                bitmap::fill(taken, range, false);
            }
            let free = &self.slots[group as usize].free_blocks;
            free.fetch_add(count, Ordering::Relaxed);
        }
    }

    /// Puts claimed blocks into the bitmaps on disk; returns the groups and bitmap blocks that changed first.
    ///
    /// # Errors
    /// The device's, and [`crate::ext4::error::Ext4Error::Corrupt`] if one was in use.
    pub async fn use_blocks(&self, blocks: Range<u64>, tid: Tid) -> Result<Vec<Change>, FsError> {
        self.change_blocks(blocks, tid, true).await
    }

    /// Takes blocks out of the bitmaps on disk. They stay claimed until the transaction has committed.
    ///
    /// # Errors
    /// As [`Self::use_blocks`], if one was free.
    pub async fn free_blocks(&self, blocks: Range<u64>, tid: Tid) -> Result<Vec<Change>, FsError> {
        for (group, _) in self.parts(blocks.clone()) {
            self.load_blocks(group).await?;
        }
        self.change_blocks(blocks, tid, false).await
    }

    async fn change_blocks(
        &self,
        blocks: Range<u64>,
        tid: Tid,
        used: bool,
    ) -> Result<Vec<Change>, FsError> {
        let mut changes = Vec::new();
        for (group, range) in self.parts(blocks) {
            let (block, made) = self.open_block_bitmap(group, tid);
            let count = range.len() as u32;
            let change = |bits: &mut [u8]| {
                let right = bitmap::is_all(bits, range.clone(), !used);
                bitmap::fill(bits, range, used);
                right
            };
            let (right, first) = self.cache.update(block, tid, change).await?;
            if !right {
                let problem = "blocks that are given away or back are not what its bitmap says";
                return Err(corrupt(group, problem));
            }
            let descriptor = &mut self.state(group).descriptor;
            if used {
                descriptor.free_blocks -= count;
                self.free_blocks
                    .fetch_sub(u64::from(count), Ordering::AcqRel);
            } else {
                descriptor.free_blocks += count;
                self.pending.fetch_add(u64::from(count), Ordering::AcqRel);
                self.free_blocks
                    .fetch_add(u64::from(count), Ordering::AcqRel);
            }
            let first = first || made;
            changes.push(Change {
                group,
                block,
                first,
            });
        }
        Ok(changes)
    }

    /// The block of the group's bitmap, and whether it was made now because it was never on disk.
    fn open_block_bitmap(&self, group: u32, tid: Tid) -> (u64, bool) {
        let mut state = self.state(group);
        let block = state.descriptor.block_bitmap;
        let made = state.descriptor.blocks_uninit;
        if made {
            state.descriptor.blocks_uninit = false;
            let mut bits = self.own_metadata(group, &state.descriptor);
            let end = self.superblock().block_bytes * 8;
            bitmap::fill(&mut bits, self.superblock().group_blocks(group)..end, true);
            self.cache
                .create(block, tid, |bytes| bytes.copy_from_slice(&bits));
        }
        (block, made)
    }
}

/// A bitmap that a transaction changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    pub group: u32,
    pub block: u64,
    pub first: bool,
}
