//! What has its place: superblocks, descriptors, bitmaps, inode tables, the blocks reserved for growing.

use super::Checker;
use crate::ext4::bytes::le32;
use crate::ext4::error::{Ext4Error, Place};
use crate::ext4::features::{compat, incompat};
use crate::ext4::inode::{self, Inode, MAP_BYTES};
use std::ops::Range;

/// Where the resize inode keeps the block that lists the reserved ones.
const DOUBLE_INDIRECT_AT: usize = 13 * 4;
const POINTER_BYTES: u64 = 4;
const SECTOR_BYTES: u32 = 512;
const MMP_CLEAN: u32 = 0xff4d_4d50;
const MMP_MAGIC: u32 = 0x004d_4d50;

impl Checker<'_> {
    pub(super) async fn check_fixed(&self) -> Result<(), Ext4Error> {
        let superblock = &self.image.superblock;
        for group in 0..superblock.groups_count() {
            self.claim_group(group);
        }
        let journal = superblock.journal_inode != 0 || superblock.journal_device != 0;
        if journal && !superblock.features.has_compat(compat::HAS_JOURNAL) {
            self.find(
                Place::Superblock,
                "it names a journal that the filesystem does not have",
            );
        }
        if superblock.features.has_incompat(incompat::MMP) {
            self.check_mmp().await?;
        }
        if superblock.features.has_compat(compat::RESIZE_INODE) {
            self.check_resize_inode().await?;
        }
        Ok(())
    }

    /// The parts of a group's metadata: name, first block, blocks.
    fn parts(&self, group: u32) -> [(&'static str, u64, u64); 3] {
        let descriptor = &self.image.groups[group as usize];
        let table_blocks = u64::from(self.image.superblock.inode_table_blocks());
        [
            ("block bitmap", descriptor.block_bitmap, 1),
            ("inode bitmap", descriptor.inode_bitmap, 1),
            ("inode table", descriptor.inode_table, table_blocks),
        ]
    }

    fn claim_group(&self, group: u32) {
        let superblock = &self.image.superblock;
        let place = Place::Group(group);
        let clip = |range: Range<u64>| range.start..range.end.min(superblock.blocks_count);
        let head = clip(superblock.group_head(group));
        self.claim(place, head.start, head.end - head.start);
        let near = superblock.group_first(group)
            ..superblock.group_first(group) + u64::from(superblock.group_blocks(group));
        for (what, first, blocks) in self.parts(group) {
            let fits = near.contains(&first) && first + blocks <= near.end;
            if !superblock.contains(first, blocks) {
                self.find(
                    place,
                    format!("its {what} at block {first} is outside the filesystem"),
                );
            } else if !superblock.features.has_incompat(incompat::FLEX_BG) && !fits {
                self.find(
                    place,
                    format!("its {what} at block {first} is outside the group"),
                );
                self.claim(place, first, blocks);
            } else {
                self.claim(place, first, blocks);
            }
        }
    }

    /// Whether `within`, counted from the group's start, belongs to the group's own metadata.
    pub(super) fn is_own_metadata(&self, group: u32, within: u32) -> bool {
        let block = self.image.superblock.group_first(group) + u64::from(within);
        let part = |(_, first, blocks): (_, u64, u64)| block >= first && block - first < blocks;
        self.image.superblock.group_head(group).contains(&block)
            || self.parts(group).into_iter().any(part)
    }

    /// How many blocks of `group` belong to the group's own metadata, if nothing overlaps.
    pub(super) fn own_metadata(&self, group: u32) -> u32 {
        let superblock = &self.image.superblock;
        let first = superblock.group_first(group);
        let end = first + u64::from(superblock.group_blocks(group));
        let within =
            |start: u64, blocks: u64| (start + blocks).min(end).saturating_sub(start.max(first));
        let head = superblock.group_head(group);
        let parts = self
            .parts(group)
            .into_iter()
            .map(|(_, start, blocks)| within(start, blocks));
        (within(head.start, head.end - head.start) + parts.sum::<u64>()) as u32
    }

    async fn check_mmp(&self) -> Result<(), Ext4Error> {
        let block = self.image.superblock.mmp_block;
        if !self.image.superblock.contains(block, 1) {
            self.find(
                Place::Superblock,
                format!("the MMP block {block} is outside the filesystem"),
            );
            return Ok(());
        }
        self.claim(Place::Superblock, block, 1);
        let bytes = self.image.block(block).await?;
        match (le32(&bytes, 0), le32(&bytes, 4)) {
            (MMP_MAGIC, MMP_CLEAN) => {}
            (MMP_MAGIC, _) => self.note("its MMP block says that a host uses it now".to_owned()),
            _ => self.find(Place::Superblock, "the MMP block has no magic"),
        }
        Ok(())
    }

    /// The resize inode lists every block that is reserved for descriptors, by its copies in all groups.
    async fn check_resize_inode(&self) -> Result<(), Ext4Error> {
        let place = Place::Inode(inode::RESIZE);
        let superblock = &self.image.superblock;
        let (inode, _) = match self.image.inode(inode::RESIZE).await {
            Ok(found) => found,
            Err(Ext4Error::Corrupt(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        let list = u64::from(le32(&inode.map, DOUBLE_INDIRECT_AT));
        let others = (0..MAP_BYTES)
            .step_by(4)
            .filter(|at| *at != DOUBLE_INDIRECT_AT);
        let reserved = u32::from(superblock.reserved_descriptor_blocks);
        if others.into_iter().any(|at| le32(&inode.map, at) != 0)
            || inode.links == 0 && reserved > 0
        {
            self.find(place, "it is not a list of reserved descriptor blocks");
            return Ok(());
        }
        if list == 0 && reserved == 0 {
            return Ok(());
        }
        if !superblock.contains(list, 1) {
            self.find(
                place,
                format!("its list at block {list} is outside the filesystem"),
            );
            return Ok(());
        }
        self.claim(place, list, 1);
        self.check_reserved(&inode, list).await
    }

    async fn check_reserved(&self, inode: &Inode, list: u64) -> Result<(), Ext4Error> {
        let place = Place::Inode(inode::RESIZE);
        let superblock = &self.image.superblock;
        let origin = u64::from(superblock.first_data_block);
        let end = superblock.group_head(0).end;
        let reserved = end - u64::from(superblock.reserved_descriptor_blocks)..end;
        let fan = u64::from(superblock.block_bytes) / POINTER_BYTES;
        let named = reserved
            .clone()
            .map(|block| ((block - origin - 1) % fan, block));
        if !holds(&self.image.block(list).await?, named) {
            self.find(place, "its list does not name the reserved blocks");
        }
        let groups = 1..superblock.groups_count();
        let backups: Vec<u32> = groups
            .filter(|group| superblock.has_backup(*group))
            .collect();
        for block in reserved.clone() {
            let copy = |group: &u32| superblock.group_first(*group) + block - origin;
            if !holds(
                &self.image.block(block).await?,
                (0..).zip(backups.iter().map(copy)),
            ) {
                self.find(
                    place,
                    format!("reserved block {block} does not name its copies"),
                );
            }
        }
        let blocks = 1 + (reserved.end - reserved.start) * (1 + backups.len() as u64);
        let sectors = blocks * u64::from(superblock.block_bytes / SECTOR_BYTES);
        if inode.size_bytes > self.max_size(inode) {
            self.find(place, format!("a size of {} bytes", inode.size_bytes));
        }
        if inode.sectors != sectors {
            self.find(
                place,
                format!(
                    "it has {} blocks of 512 bytes, not {sectors}",
                    inode.sectors
                ),
            );
        }
        Ok(())
    }
}

/// Whether `block` holds the pointers at their indices and zeros elsewhere.
fn holds(block: &[u8], pointers: impl Iterator<Item = (u64, u64)>) -> bool {
    let mut expected = vec![0; block.len()];
    for (index, pointer) in pointers {
        let at = (index * POINTER_BYTES) as usize;
        match (expected.get_mut(at..at + 4), u32::try_from(pointer)) {
            (Some(word), Ok(pointer)) => word.copy_from_slice(&pointer.to_le_bytes()),
            _ => return false,
        }
    }
    expected == block
}
