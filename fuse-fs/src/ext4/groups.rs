//! The groups of a mounted filesystem: their descriptors, and which blocks and inodes may be given away.
//!
//! Each bitmap exists twice. The one on disk (in the cache) is what the running transaction makes it. `taken` says
//! what may not be given away: besides what is in use on disk, also what was claimed for data that is still on
//! its way, and what was freed by a transaction that has not committed. So nothing freed is written over before
//! its freeing is durable.

use crate::ext4::bitmap;
use crate::ext4::bytes::{le32, put};
use crate::ext4::cache::Cache;
use crate::ext4::crc::{self, crc32c};
use crate::ext4::error::{Ext4Error, FsError, Place};
use crate::ext4::features::incompat;
use crate::ext4::group::{Group, bitmap_checksum, bitmap_matches};
use crate::ext4::superblock::{self, CHECKSUM_AT, Superblock};
use crate::ext4::transaction::Tid;
use std::ops::Range;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// One group.
pub(super) struct State {
    pub(super) descriptor: Group,
    /// `None` until the bitmap is needed.
    pub(super) taken_blocks: Option<Box<[u8]>>,
    pub(super) taken_inodes: Option<Box<[u8]>>,
}

pub(super) struct Slot {
    inode_table: u64,
    pub(super) state: Mutex<State>,
    /// What may be given away, to choose a group by.
    pub(super) free_blocks: AtomicU32,
    pub(super) free_inodes: AtomicU32,
    pub(super) directories: AtomicU32,
}

impl Slot {
    fn new(group: &Group) -> Self {
        Self {
            inode_table: group.inode_table,
            state: Mutex::new(State {
                descriptor: *group,
                taken_blocks: None,
                taken_inodes: None,
            }),
            free_blocks: AtomicU32::new(group.free_blocks),
            free_inodes: AtomicU32::new(group.free_inodes),
            directories: AtomicU32::new(group.directories),
        }
    }
}

/// All groups.
pub struct Groups {
    /// As it was opened; its counts are those of then.
    superblock: Superblock,
    /// What each growth made of it: who still has an older one sees no more than there was.
    grown: boxcar::Vec<Superblock>,
    pub(super) cache: Arc<Cache>,
    pub(super) slots: boxcar::Vec<Slot>,
    /// Blocks that may be given away and that nobody was promised.
    available: AtomicI64,
    /// Blocks that are free after the commit of who freed them.
    pub(super) pending: AtomicU64,
    /// As the superblock counts.
    pub(super) free_blocks: AtomicU64,
    pub(super) free_inodes: AtomicU32,
}

impl Groups {
    #[must_use]
    pub fn new(superblock: Superblock, cache: Arc<Cache>, groups: &[Group]) -> Self {
        let blocks: u64 = groups
            .iter()
            .map(|group| u64::from(group.free_blocks))
            .sum();
        let inodes = groups.iter().map(|group| group.free_inodes).sum();
        Self {
            superblock,
            grown: boxcar::Vec::new(),
            cache,
            slots: groups.iter().map(Slot::new).collect(),
            available: AtomicI64::new(i64::try_from(blocks).unwrap_or(i64::MAX)),
            pending: AtomicU64::new(0),
            free_blocks: AtomicU64::new(blocks),
            free_inodes: AtomicU32::new(inodes),
        }
    }

    /// The superblock at its largest.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        let newest = self.grown.count().checked_sub(1);
        let grown = newest.and_then(|newest| self.grown.get(newest));
        grown.unwrap_or(&self.superblock)
    }

    /// There are more groups, and more blocks in `extended`, which was the last one and whose bitmap is known.
    /// They may be promised after [`Self::give_back`]. Nobody is inside a transaction.
    pub(super) fn grow(&self, larger: Superblock, groups: &[Group], extended: (u32, Range<u32>)) {
        let (last, bits) = extended;
        let mut blocks = bits.len() as u32;
        let mut state = self.state(last);
        state.descriptor.free_blocks += blocks;
        if let Some(taken) = &mut state.taken_blocks {
            bitmap::fill(taken, bits, false);
        }
        drop(state);
        let free = &self.slots[last as usize].free_blocks;
        free.fetch_add(blocks, Ordering::Relaxed);
        for group in groups {
            blocks += group.free_blocks;
            self.free_inodes
                .fetch_add(group.free_inodes, Ordering::AcqRel);
            self.slots.push(Slot::new(group));
        }
        self.free_blocks
            .fetch_add(u64::from(blocks), Ordering::AcqRel);
        self.grown.push(larger);
    }

    pub(super) fn state(&self, group: u32) -> MutexGuard<'_, State> {
        let slot = &self.slots[group as usize];
        slot.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the inode table of `group` begins.
    #[must_use]
    pub fn inode_table(&self, group: u32) -> u64 {
        self.slots[group as usize].inode_table
    }

    /// Keeps `blocks` blocks back for who will claim them.
    ///
    /// # Errors
    /// [`FsError::NoSpace`].
    pub fn promise(&self, blocks: u64, leave: u64) -> Result<(), FsError> {
        let (blocks, leave) = (blocks.cast_signed(), leave.cast_signed());
        let enough = |available: i64| (available - leave >= blocks).then(|| available - blocks);
        self.available
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, enough)
            .map(|_| ())
            .map_err(|_| FsError::NoSpace)
    }

    /// Whether so many blocks could be promised after a commit.
    #[must_use]
    pub fn waits_for_commit(&self, blocks: u64) -> bool {
        let pending = self.pending.load(Ordering::Acquire);
        pending > 0 && self.available() + pending >= blocks
    }

    /// The freeing of so many blocks has committed.
    pub(super) fn settle_freed(&self, blocks: u64) {
        self.pending.fetch_sub(blocks, Ordering::AcqRel);
    }

    /// Gives back what was promised and not claimed, or claimed and is free again.
    pub fn give_back(&self, blocks: u64) {
        self.available
            .fetch_add(blocks.cast_signed(), Ordering::AcqRel);
    }

    /// Blocks that can still be promised.
    #[must_use]
    pub fn available(&self) -> u64 {
        u64::try_from(self.available.load(Ordering::Acquire)).unwrap_or(0)
    }

    #[must_use]
    pub fn available_inodes(&self) -> u64 {
        let free = |(_, slot): (usize, &Slot)| u64::from(slot.free_inodes.load(Ordering::Relaxed));
        self.slots.iter().map(free).sum()
    }

    /// Makes the block bitmap of `group` known.
    pub(super) async fn load_blocks(&self, group: u32) -> Result<(), FsError> {
        let descriptor = {
            let state = self.state(group);
            if state.taken_blocks.is_some() {
                return Ok(());
            }
            state.descriptor
        };
        let count = self.superblock().group_blocks(group);
        let mut taken = if descriptor.blocks_uninit {
            self.own_metadata(group, &descriptor)
        } else {
            let stored = descriptor.block_bitmap_checksum;
            let bits = self.superblock().blocks_per_group;
            self.read_bitmap(group, descriptor.block_bitmap, bits, stored)
                .await?
        };
        let end = self.superblock().block_bytes * 8;
        bitmap::fill(&mut taken, count..end, true);
        let free = bitmap::count_free(&taken, 0..count);
        let mut state = self.state(group);
        // Nobody changes a bitmap that is not known; one that got known meanwhile may have changed since.
        if state.taken_blocks.is_none() {
            if free != descriptor.free_blocks {
                return Err(corrupt(
                    group,
                    "its free blocks are not those of its bitmap",
                ));
            }
            state.taken_blocks = Some(taken);
        }
        Ok(())
    }

    /// Makes the inode bitmap of `group` known.
    pub(super) async fn load_inodes(&self, group: u32) -> Result<(), FsError> {
        let descriptor = {
            let state = self.state(group);
            if state.taken_inodes.is_some() {
                return Ok(());
            }
            state.descriptor
        };
        let count = self.superblock().inodes_per_group;
        let mut taken = if descriptor.inodes_uninit {
            vec![0; self.superblock().block_bytes as usize].into()
        } else {
            let stored = descriptor.inode_bitmap_checksum;
            self.read_bitmap(group, descriptor.inode_bitmap, count, stored)
                .await?
        };
        bitmap::fill(&mut taken, count..self.superblock().block_bytes * 8, true);
        let free = bitmap::count_free(&taken, 0..count);
        let mut state = self.state(group);
        if state.taken_inodes.is_none() {
            if free != descriptor.free_inodes {
                return Err(corrupt(
                    group,
                    "its free inodes are not those of its bitmap",
                ));
            }
            state.taken_inodes = Some(taken);
        }
        Ok(())
    }

    async fn read_bitmap(
        &self,
        group: u32,
        block: u64,
        bits: u32,
        stored: u32,
    ) -> Result<Box<[u8]>, FsError> {
        if !self.superblock().contains(block, 1) {
            return Err(corrupt(group, "a bitmap is outside the filesystem"));
        }
        let place = Place::Group(group);
        let check = |bytes: &[u8]| match bitmap_matches(bytes, bits, stored, self.superblock()) {
            true => Ok(()),
            false => Err(Ext4Error::corrupt(place, "a bitmap has a wrong checksum")),
        };
        let bytes = self.cache.read_checked(block, check).await?;
        Ok(bytes[..].into())
    }

    /// The bitmap of a group of whose blocks only its own metadata is in use.
    pub(super) fn own_metadata(&self, group: u32, descriptor: &Group) -> Box<[u8]> {
        let mut bits = vec![0; self.superblock().block_bytes as usize];
        let first = self.superblock().group_first(group);
        let end = first + u64::from(self.superblock().group_blocks(group));
        let table = descriptor.inode_table;
        let parts = [
            self.superblock().group_head(group),
            descriptor.block_bitmap..descriptor.block_bitmap + 1,
            descriptor.inode_bitmap..descriptor.inode_bitmap + 1,
            table..table + u64::from(self.superblock().inode_table_blocks()),
        ];
        for part in parts {
            let (from, to) = (part.start.max(first), part.end.min(end));
            if from < to {
                let range = (from - first) as u32..(to - first) as u32;
                bitmap::fill(&mut bits, range, true);
            }
        }
        bits.into()
    }

    /// Cuts blocks into the parts of each group: the group and the bits.
    pub(super) fn parts(&self, blocks: Range<u64>) -> Vec<(u32, Range<u32>)> {
        let per_group = u64::from(self.superblock().blocks_per_group);
        let origin = u64::from(self.superblock().first_data_block);
        let (mut at, end) = (blocks.start - origin, blocks.end - origin);
        let mut parts = Vec::new();
        while at < end {
            let next = end.min((at / per_group + 1) * per_group);
            let within = (at % per_group) as u32;
            let range = within..within + (next - at) as u32;
            parts.push(((at / per_group) as u32, range));
            at = next;
        }
        parts
    }

    /// Puts the descriptors of `groups`, with the checksums of their bitmaps, and the counts of the superblock
    /// into transaction `tid`; returns the blocks that it changed first. Nobody changes anything meanwhile.
    ///
    /// # Errors
    /// The device's.
    pub async fn seal(
        &self,
        groups: impl Iterator<Item = u32>,
        last_orphan: u32,
        tid: Tid,
    ) -> Result<Vec<u64>, Ext4Error> {
        let mut changed = Vec::new();
        for group in groups {
            let descriptor = self.sealed_descriptor(group);
            let index = group / self.superblock().descriptors_per_block();
            let size = usize::from(self.superblock().descriptor_bytes);
            let at = (group % self.superblock().descriptors_per_block()) as usize * size;
            let block = self.superblock().descriptor_block(index);
            let write = |bytes: &mut [u8]| {
                descriptor.write_over(&mut bytes[at..at + size], group, self.superblock());
            };
            if self.cache.update(block, tid, write).await?.1 {
                changed.push(block);
            }
        }
        let free_blocks = self.free_blocks.load(Ordering::Acquire);
        let free_inodes = self.free_inodes.load(Ordering::Acquire);
        let write = |bytes: &mut [u8]| {
            let incompatible = le32(bytes, 0x60) | incompat::NEEDS_RECOVERY;
            put(bytes, 0x60, &incompatible.to_le_bytes());
            put(bytes, 0xc, &(free_blocks as u32).to_le_bytes());
            put(bytes, 0x158, &((free_blocks >> 32) as u32).to_le_bytes());
            put(bytes, 0x10, &free_inodes.to_le_bytes());
            put(bytes, 0xe8, &last_orphan.to_le_bytes());
        };
        let block = update_superblock(&self.cache, self.superblock(), tid, write).await?;
        changed.extend(block);
        Ok(changed)
    }

    fn sealed_descriptor(&self, group: u32) -> Group {
        let mut state = self.state(group);
        let descriptor = &mut state.descriptor;
        let kept = if self.superblock().descriptor_bytes >= 64 {
            u32::MAX
        } else {
            0xffff
        };
        if self.superblock().has_checksums() {
            if let Some(bits) = self.cache.get(descriptor.block_bitmap)
                && !descriptor.blocks_uninit
            {
                let count = self.superblock().blocks_per_group;
                descriptor.block_bitmap_checksum =
                    bitmap_checksum(&bits, count, self.superblock()) & kept;
            }
            if let Some(bits) = self.cache.get(descriptor.inode_bitmap)
                && !descriptor.inodes_uninit
            {
                let count = self.superblock().inodes_per_group;
                descriptor.inode_bitmap_checksum =
                    bitmap_checksum(&bits, count, self.superblock()) & kept;
            }
        }
        *descriptor
    }
}

pub(super) fn corrupt(group: u32, problem: &str) -> FsError {
    Ext4Error::corrupt(Place::Group(group), problem).into()
}

/// Changes the superblock in its block; the block, if it is the transaction's first change of it.
pub(super) async fn update_superblock(
    cache: &Cache,
    superblock: &Superblock,
    tid: Tid,
    change: impl FnOnce(&mut [u8]),
) -> Result<Option<u64>, Ext4Error> {
    let (block, at) = superblock_place(superblock);
    let write = |bytes: &mut [u8]| {
        let bytes = &mut bytes[at..at + superblock::SIZE_BYTES];
        change(bytes);
        seal_superblock(bytes, superblock);
    };
    let (_, first) = cache.update(block, tid, write).await?;
    Ok(first.then_some(block))
}

/// The block with the superblock, and where in it the superblock begins.
pub(super) fn superblock_place(superblock: &Superblock) -> (u64, usize) {
    let block_bytes = u64::from(superblock.block_bytes);
    let at = superblock::OFFSET_BYTES % block_bytes;
    (superblock::OFFSET_BYTES / block_bytes, at as usize)
}

/// Puts its checksum into a superblock.
pub(super) fn seal_superblock(bytes: &mut [u8], superblock: &Superblock) {
    if superblock.has_checksums() {
        let crc = crc32c(crc::START, &bytes[..CHECKSUM_AT]);
        put(bytes, CHECKSUM_AT, &crc.to_le_bytes());
    }
}
