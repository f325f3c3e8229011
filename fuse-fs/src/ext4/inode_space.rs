//! Which inodes are given away: files next to their directory, directories of the root apart from each other.

use crate::ext4::bitmap;
use crate::ext4::block_space::Change;
use crate::ext4::error::FsError;
use crate::ext4::groups::{Groups, Slot, corrupt};
use crate::ext4::inode::{Kind, ROOT};
use crate::ext4::transaction::Tid;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// An inode that was put into the bitmap on disk.
pub struct UsedInode {
    pub change: Change,
    /// Slots of the group's table that count from now on and hold anything: they must be zeroed.
    pub garbage: Range<u32>,
}

impl Groups {
    /// Claims an inode of `kind` for a directory `parent`.
    ///
    /// # Errors
    /// [`FsError::NoSpace`], the device's, and what is wrong with a bitmap.
    pub async fn claim_inode(&self, parent: u32, kind: Kind) -> Result<u32, FsError> {
        let parent_group = self
            .superblock()
            .inode_place(parent)
            .map_or(0, |(at, _)| at);
        let start = if kind == Kind::Directory {
            self.group_for_directory(parent, parent_group)
        } else {
            parent_group
        };
        let count = self.superblock().groups_count();
        for group in (0..count).map(|step| (start + step) % count) {
            if self.slots[group as usize]
                .free_inodes
                .load(Ordering::Relaxed)
                == 0
            {
                continue;
            }
            self.load_inodes(group).await?;
            if let Some(inode) = self.claim_inode_in(group) {
                return Ok(inode);
            }
        }
        Err(FsError::NoSpace)
    }

    fn claim_inode_in(&self, group: u32) -> Option<u32> {
        let mut state = self.state(group);
        let taken = state.taken_inodes.as_mut()?;
        let count = self.superblock().inodes_per_group;
        let reserved = if group == 0 {
            self.superblock().first_inode - 1
        } else {
            0
        };
        let at = bitmap::next(taken, reserved..count, false);
        if at == count {
            return None;
        }
        bitmap::fill(taken, at..at + 1, true);
        let free = &self.slots[group as usize].free_inodes;
        free.fetch_sub(1, Ordering::Relaxed);
        Some(group * count + at + 1)
    }

    /// The group from which on a directory looks for room. Those of the root go where few are and much is free,
    /// others stay with their parent while it is not fuller than the average.
    fn group_for_directory(&self, parent: u32, parent_group: u32) -> u32 {
        let count = self.slots.count() as u32;
        let sum = |what: fn(&Slot) -> u32| {
            let all: u64 = self
                .slots
                .iter()
                .map(|(_, slot)| u64::from(what(slot)))
                .sum();
            (all / u64::from(count)) as u32
        };
        let inodes = sum(|slot| slot.free_inodes.load(Ordering::Relaxed));
        let blocks = sum(|slot| slot.free_blocks.load(Ordering::Relaxed));
        let roomy = |group: &u32, share: u32| {
            let slot = &self.slots[*group as usize];
            let free = slot.free_inodes.load(Ordering::Relaxed);
            free > 0
                && free >= inodes / share
                && slot.free_blocks.load(Ordering::Relaxed) >= blocks / share
        };
        if parent == ROOT {
            let directories = |group: &u32| {
                self.slots[*group as usize]
                    .directories
                    .load(Ordering::Relaxed)
            };
            let best = (0..count)
                .filter(|group| roomy(group, 1))
                .min_by_key(directories);
            return best.unwrap_or(parent_group);
        }
        let near = (0..count).map(|step| (parent_group + step) % count);
        let mut near = near.filter(|group| roomy(group, 2));
        near.next().unwrap_or(parent_group)
    }

    /// Whether the bitmap on disk says that an inode is in use.
    ///
    /// # Errors
    /// The device's, and what is wrong with the bitmap.
    pub async fn is_inode_used(&self, inode: u32) -> Result<bool, FsError> {
        let Some((group, at)) = self.superblock().inode_place(inode) else {
            return Ok(false);
        };
        self.load_inodes(group).await?;
        let state = self.state(group);
        let taken = state.taken_inodes.as_deref();
        Ok(taken.is_some_and(|taken| bitmap::is_set(taken, at)))
    }

    /// Gives back an inode that was claimed, or whose freeing has committed.
    pub fn release_inode(&self, inode: u32) {
        let Some((group, at)) = self.superblock().inode_place(inode) else {
            return;
        };
        if let Some(taken) = &mut self.state(group).taken_inodes {
            bitmap::fill(taken, at..at + 1, false);
        }
        let free = &self.slots[group as usize].free_inodes;
        free.fetch_add(1, Ordering::Relaxed);
    }

    /// Puts a claimed inode into the bitmap on disk.
    ///
    /// # Errors
    /// The device's, and [`crate::ext4::error::Ext4Error::Corrupt`] if it was in use.
    pub async fn use_inode(&self, inode: u32, kind: Kind, tid: Tid) -> Result<UsedInode, FsError> {
        let change = self.change_inode(inode, tid, true).await?;
        let (_, at) = self.superblock().inode_place(inode).unwrap_or_default();
        let count = self.superblock().inodes_per_group;
        let mut state = self.state(change.group);
        let descriptor = &mut state.descriptor;
        descriptor.free_inodes -= 1;
        self.free_inodes.fetch_sub(1, Ordering::AcqRel);
        if kind == Kind::Directory {
            descriptor.directories += 1;
            let slot = &self.slots[change.group as usize];
            slot.directories.fetch_add(1, Ordering::Relaxed);
        }
        let mut garbage = 0..0;
        if self.superblock().features.has_group_checksums() {
            let used = count - descriptor.unused_inodes.min(count);
            if at >= used {
                descriptor.unused_inodes = count - at - 1;
                if !descriptor.table_zeroed {
                    garbage = used..at;
                }
            }
        }
        Ok(UsedInode { change, garbage })
    }

    /// Takes an inode out of the bitmap on disk. It stays claimed until the transaction has committed.
    ///
    /// # Errors
    /// As [`Self::use_inode`], if it was free.
    pub async fn free_inode(
        &self,
        inode: u32,
        directory: bool,
        tid: Tid,
    ) -> Result<Change, FsError> {
        let (group, _) = self.superblock().inode_place(inode).unwrap_or_default();
        self.load_inodes(group).await?;
        let change = self.change_inode(inode, tid, false).await?;
        let mut state = self.state(change.group);
        state.descriptor.free_inodes += 1;
        self.free_inodes.fetch_add(1, Ordering::AcqRel);
        if directory {
            let descriptor = &mut state.descriptor;
            descriptor.directories = descriptor.directories.saturating_sub(1);
            let counted = descriptor.directories;
            let slot = &self.slots[change.group as usize];
            slot.directories.store(counted, Ordering::Relaxed);
        }
        Ok(change)
    }

    async fn change_inode(&self, inode: u32, tid: Tid, used: bool) -> Result<Change, FsError> {
        let (group, at) = self
            .superblock()
            .inode_place(inode)
            .ok_or(FsError::Stale(inode))?;
        let (block, made) = self.open_inode_bitmap(group, tid);
        let change = |bits: &mut [u8]| {
            let right = bitmap::is_set(bits, at) != used;
            bitmap::fill(bits, at..at + 1, used);
            right
        };
        let (right, first) = self.cache.update(block, tid, change).await?;
        if !right {
            let problem = "an inode that is given away or back is not what its bitmap says";
            return Err(corrupt(group, problem));
        }
        let first = first || made;
        Ok(Change {
            group,
            block,
            first,
        })
    }

    fn open_inode_bitmap(&self, group: u32, tid: Tid) -> (u64, bool) {
        let mut state = self.state(group);
        let block = state.descriptor.inode_bitmap;
        let made = state.descriptor.inodes_uninit;
        if made {
            state.descriptor.inodes_uninit = false;
            let (count, end) = (
                self.superblock().inodes_per_group,
                self.superblock().block_bytes * 8,
            );
            self.cache
                .create(block, tid, |bits| bitmap::fill(bits, count..end, true));
        }
        (block, made)
    }
}
