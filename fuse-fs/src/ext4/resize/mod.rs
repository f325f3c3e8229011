//! Growing a mounted filesystem while it is used, as the kernel's ext4 does for resize2fs.
//!
//! ```text
//! behind the end: inode tables zeroed -> one transaction: bitmaps, descriptors, resize inode, superblock
//!     -> the blocks may be given away -> the copies of superblock and descriptors are renewed
//! ```
//!
//! The transaction alone decides: a crash before it leaves the filesystem as it was, and what was written behind
//! its end is nobody's.

mod step;

use crate::ext4::bitmap;
use crate::ext4::bytes::{le32, put};
use crate::ext4::error::{Ext4Error, FsError, Place};
use crate::ext4::features::incompat;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::groups::{seal_superblock, superblock_place, update_superblock};
use crate::ext4::inode;
use crate::ext4::journal::log;
use crate::ext4::superblock::{self, Superblock};
use crate::ext4::transaction::Tid;
use futures_util::stream::{self, TryStreamExt};
use std::ops::Range;
use step::Step;

/// Requests in flight.
const WRITES_AT_ONCE: usize = 16;
/// Where an inode has the block that lists the reserved ones: the pointer to pointers to pointers.
const LIST_AT: usize = 0x28 + 13 * POINTER_BYTES;
const SECTORS_AT: usize = 0x1c;
const POINTER_BYTES: usize = 4;
const SECTOR_BYTES: u32 = 512;
/// Superblock, descriptors, two bitmaps, the resize inode and its list, with room.
const FIXED_BLOCKS: usize = 16;

/// Why a filesystem cannot grow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error("{0}; unmount it and use resize2fs on the volume as a file (`fuse-fs volumes`)")]
    Feature(String),
    #[error(
        "it has no more blocks reserved for group descriptors; unmount it and use resize2fs on the volume as a file (`fuse-fs volumes`)"
    )]
    Descriptors,
    #[error("its journal is too small for the step")]
    Journal,
}

/// Why a filesystem did not grow.
#[derive(Debug, thiserror::Error)]
pub enum GrowError {
    #[error("the filesystem cannot grow: {0}")]
    Refused(#[from] Refused),
    #[error(transparent)]
    Failed(#[from] FsError),
}

/// How large a filesystem was and is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grown {
    pub bytes_before: u64,
    pub bytes: u64,
}

impl Filesystem {
    /// Grows to at most `size_bytes`, which the device has; a rest that would make no group stays outside, and so
    /// does what the descriptors have no room for. A filesystem that is so large already stays as it is.
    ///
    /// # Errors
    /// [`Refused`] if nothing of it was possible; what the device reports.
    pub async fn grow(&self, size_bytes: u64) -> Result<Grown, GrowError> {
        let _alone = self.growing().lock().await;
        self.check_writable()?;
        let size =
            |superblock: &Superblock| superblock.blocks_count * u64::from(superblock.block_bytes);
        let bytes_before = size(self.superblock());
        loop {
            let bytes = size(self.superblock());
            match self.grow_once(size_bytes).await {
                Ok(true) => {}
                Err(GrowError::Refused(_)) if bytes > bytes_before => break,
                Ok(false) => break,
                Err(error) => return Err(error),
            }
        }
        let bytes = size(self.superblock());
        Ok(Grown {
            bytes_before,
            bytes,
        })
    }

    /// Whether there was something to do.
    async fn grow_once(&self, size_bytes: u64) -> Result<bool, GrowError> {
        let Some(step) = Step::next(self.superblock(), size_bytes)? else {
            return Ok(false);
        };
        self.groups().load_blocks(step.extended.0).await?;
        self.zero_tables(&step).await.map_err(FsError::from)?;
        let blocks = FIXED_BLOCKS + usize::from(step.superblock.reserved_descriptor_blocks);
        if !self.commit_alone(blocks, self.change(&step)).await? {
            return Err(Refused::Journal.into());
        }
        self.groups().give_back(step.free().0);
        let copied = self.renew_copies(&step).await;
        copied.map_err(FsError::from)?;
        Ok(true)
    }

    /// Zeros what is behind the end now and must be zero then.
    async fn zero_tables(&self, step: &Step) -> Result<(), Ext4Error> {
        let table = u64::from(step.superblock.inode_table_blocks());
        let tables = step
            .groups
            .iter()
            .map(|group| group.inode_table..group.inode_table + table);
        let heads = step
            .new_groups()
            .map(|group| step.superblock.group_head(group));
        let ranges = tables.chain(heads).filter(|range| !range.is_empty());
        let zero = |range: Range<u64>| self.zero_blocks(range);
        stream::iter(ranges.map(Ok))
            .try_for_each_concurrent(WRITES_AT_ONCE, zero)
            .await
    }

    async fn zero_blocks(&self, range: Range<u64>) -> Result<(), Ext4Error> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        let (offset_bytes, len_bytes) = (
            range.start * block_bytes,
            (range.end - range.start) * block_bytes,
        );
        let zeroed = self.device().zero(offset_bytes, len_bytes).await;
        zeroed.map_err(|source| Ext4Error::Write {
            offset_bytes,
            len_bytes,
            source,
        })
    }

    /// The transaction of a step.
    async fn change(&self, step: &Step) -> Result<(), FsError> {
        let tid = self.running_tid();
        let mut changed = self.change_bitmaps(step, tid).await?;
        changed.extend(self.change_reserved(step, tid).await?);
        if let Some(block) = step.descriptor_block {
            self.cache().create(block, tid, |_| {});
            changed.push(block);
        }
        let groups = step.extended.0..step.superblock.groups_count();
        self.groups()
            .grow(step.superblock.clone(), &step.groups, step.extended.clone());
        let write = |bytes: &mut [u8]| write_sizes(bytes, &step.superblock);
        let superblock = update_superblock(self.cache(), &step.superblock, tid, write).await?;
        changed.extend(superblock);
        let mut running = self.transactions().running();
        running.changed.extend(changed);
        running.groups.extend(groups);
        Ok(())
    }

    /// The bitmaps of the group that was the last one, and of the one that is.
    async fn change_bitmaps(&self, step: &Step, tid: Tid) -> Result<Vec<u64>, FsError> {
        let mut changed = Vec::new();
        let (last, bits) = step.extended.clone();
        let descriptor = self.groups().state(last).descriptor;
        if !descriptor.blocks_uninit && !bits.is_empty() {
            let free = |bytes: &mut [u8]| bitmap::fill(bytes, bits, false);
            let block = descriptor.block_bitmap;
            self.cache().update(block, tid, free).await?;
            changed.push(block);
        }
        let made = step.new_groups().zip(&step.groups);
        for (group, descriptor) in made.filter(|(_, descriptor)| !descriptor.blocks_uninit) {
            let (used, end) = (step.used_bits(group), step.superblock.group_blocks(group));
            let all = step.superblock.block_bytes * 8;
            self.cache()
                .create(descriptor.block_bitmap, tid, |bytes: &mut [u8]| {
                    bitmap::fill(bytes, 0..used, true);
                    bitmap::fill(bytes, end..all, true);
                });
            changed.push(descriptor.block_bitmap);
        }
        Ok(changed)
    }

    /// The resize inode: a reserved block leaves its list, and the others get copies in new groups.
    async fn change_reserved(&self, step: &Step, tid: Tid) -> Result<Vec<u64>, FsError> {
        let superblock = &step.superblock;
        let origin = u64::from(superblock.first_data_block);
        let mut changed = Vec::new();
        if let Some(block) = step.descriptor_block {
            let list = self.reserved_list().await?;
            let fan = u64::from(superblock.block_bytes) / POINTER_BYTES as u64;
            let at = ((block - origin - 1) % fan) as usize * POINTER_BYTES;
            let clear = |bytes: &mut [u8]| put(bytes, at, &[0; POINTER_BYTES]);
            self.cache().update(list, tid, clear).await?;
            changed.push(list);
        }
        let copies: Vec<(usize, u32)> = step.backups().enumerate().collect();
        let is_new = |(_, group): &&(usize, u32)| step.new_groups().contains(group);
        if copies.iter().any(|copy| is_new(&copy)) {
            for block in step.reserved() {
                let name_copies = |bytes: &mut [u8]| {
                    for (index, group) in copies.iter().filter(is_new) {
                        let copy = superblock.group_first(*group) + block - origin;
                        put(bytes, index * POINTER_BYTES, &(copy as u32).to_le_bytes());
                    }
                };
                self.cache().update(block, tid, name_copies).await?;
                changed.push(block);
            }
        }
        let reserved = step.reserved();
        let blocks = 1 + (reserved.end - reserved.start) * (1 + copies.len() as u64);
        let sectors = blocks * u64::from(superblock.block_bytes / SECTOR_BYTES);
        let (block, at) = self.inode_at(inode::RESIZE)?;
        let size = usize::from(superblock.inode_bytes);
        let count = |bytes: &mut [u8]| {
            let slot = &mut bytes[at..at + size];
            put(slot, SECTORS_AT, &(sectors as u32).to_le_bytes());
            inode::seal(inode::RESIZE, slot, superblock);
        };
        self.cache().update(block, tid, count).await?;
        changed.push(block);
        Ok(changed)
    }

    /// The block that lists the reserved ones.
    async fn reserved_list(&self) -> Result<u64, FsError> {
        let (block, at) = self.inode_at(inode::RESIZE)?;
        let list = u64::from(le32(&self.read_block(block).await?, at + LIST_AT));
        if !self.superblock().contains(list, 1) {
            let problem = "its list of reserved blocks is outside the filesystem";
            return Err(Ext4Error::corrupt(Place::Inode(inode::RESIZE), problem).into());
        }
        Ok(list)
    }

    /// Writes the superblock and the step's descriptors to the groups that keep copies; those that are new get all
    /// descriptors.
    async fn renew_copies(&self, step: &Step) -> Result<(), Ext4Error> {
        let superblock = &step.superblock;
        let (block, at) = superblock_place(superblock);
        let newest = self.cache().read(block).await?;
        let last = superblock.descriptor_blocks() - 1;
        for group in step.backups() {
            let first = superblock.group_first(group);
            let mut copy = vec![0; superblock.block_bytes as usize];
            let slot = &mut copy[..superblock::SIZE_BYTES];
            slot.copy_from_slice(&newest[at..at + superblock::SIZE_BYTES]);
            write_copy(slot, group, superblock);
            self.write_block(first, copy).await?;
            let new = step.new_groups().contains(&group);
            for index in if new { 0..=last } else { last..=last } {
                let content = self
                    .cache()
                    .read(superblock.descriptor_block(index))
                    .await?;
                let copy = first + 1 + u64::from(index);
                self.write_block(copy, content.to_vec()).await?;
            }
        }
        log::flush(self.device()).await
    }

    async fn write_block(&self, block: u64, content: Vec<u8>) -> Result<(), Ext4Error> {
        let offset_bytes = block * u64::from(self.superblock().block_bytes);
        log::write(self.device(), offset_bytes, content.into()).await
    }
}

fn write_sizes(bytes: &mut [u8], superblock: &Superblock) {
    for (low, high, count) in [
        (4, 0x150, superblock.blocks_count),
        (8, 0x154, superblock.reserved_blocks),
    ] {
        put(bytes, low, &(count as u32).to_le_bytes());
        put(bytes, high, &((count >> 32) as u32).to_le_bytes());
    }
    put(bytes, 0, &superblock.inodes_count.to_le_bytes());
    let reserved = superblock.reserved_descriptor_blocks;
    put(bytes, 0xce, &reserved.to_le_bytes());
    // The overhead, which the kernel then counts by itself.
    put(bytes, 0x248, &[0; 4]);
}

/// Makes a superblock the copy that `group` keeps: it has nothing to replay.
fn write_copy(bytes: &mut [u8], group: u32, superblock: &Superblock) {
    let incompatible = le32(bytes, 0x60) & !incompat::NEEDS_RECOVERY;
    put(bytes, 0x60, &incompatible.to_le_bytes());
    put(bytes, 0x5a, &(group as u16).to_le_bytes());
    seal_superblock(bytes, superblock);
}
