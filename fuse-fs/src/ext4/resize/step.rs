//! One step of a growth, planned: what a filesystem is afterwards, and which blocks change for that.
//!
//! A step reaches at most to the end of the groups that one block of descriptors describes, and each step is one
//! transaction. New groups hold their own bitmaps and inode tables.

use super::Refused;
use crate::ext4::features::{compat, incompat, ro_compat};
use crate::ext4::group::Group;
use crate::ext4::mkfs::plan::LAST_GROUP_MARGIN;
use crate::ext4::superblock::Superblock;
use std::ops::Range;

/// What a step does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Step {
    /// As it is afterwards; of its counts, those that are free are as before.
    pub(super) superblock: Superblock,
    /// The group that was the last one, and the bits of its bitmap that become free.
    pub(super) extended: (u32, Range<u32>),
    /// The groups that are added behind it.
    pub(super) groups: Vec<Group>,
    /// The reserved block that becomes one of descriptors.
    pub(super) descriptor_block: Option<u64>,
}

impl Step {
    /// The next step of a growth to `size_bytes`; `None` if nothing is left that would make a group.
    pub(super) fn next(before: &Superblock, size_bytes: u64) -> Result<Option<Self>, Refused> {
        check_features(before)?;
        // The list of reserved blocks, and their copies, have numbers of 32 bits.
        let blocks = (size_bytes / u64::from(before.block_bytes)).min(u64::from(u32::MAX));
        if blocks <= before.blocks_count {
            return Ok(None);
        }
        let mut after = before.clone();
        let count = before.groups_count();
        let per_block = before.descriptors_per_block();
        let full = before.group_blocks(count - 1) == before.blocks_per_group;
        let new_block = full && count.is_multiple_of(per_block);
        if new_block {
            let left = before.reserved_descriptor_blocks.checked_sub(1);
            after.reserved_descriptor_blocks = left.ok_or(Refused::Descriptors)?;
        }
        let most_groups = match new_block {
            true => count + per_block,
            false => count.next_multiple_of(per_block),
        };
        let most_groups = most_groups.min(u32::MAX / before.inodes_per_group);
        let end = before.group_first(most_groups);
        after.blocks_count = without_stump(before, blocks.min(end), count);
        if after.blocks_count <= before.blocks_count {
            return Ok(None);
        }
        let groups = groups(&after, after.blocks_count);
        after.inodes_count = groups * before.inodes_per_group;
        let share = u128::from(before.reserved_blocks) * u128::from(after.blocks_count);
        let share = share / u128::from(before.blocks_count);
        after.reserved_blocks = u64::try_from(share).unwrap_or(before.reserved_blocks);
        let bits = before.group_blocks(count - 1)..after.group_blocks(count - 1);
        Ok(Some(Self {
            extended: (count - 1, bits),
            groups: (count..groups)
                .map(|group| new_group(&after, group))
                .collect(),
            descriptor_block: new_block.then(|| after.descriptor_block(count / per_block)),
            superblock: after,
        }))
    }

    /// The numbers of the groups that are added.
    pub(super) fn new_groups(&self) -> Range<u32> {
        self.extended.0 + 1..self.superblock.groups_count()
    }

    /// The bits in use of the bitmap of an added group.
    pub(super) fn used_bits(&self, group: u32) -> u32 {
        let head = self.superblock.group_head(group);
        (head.end - head.start) as u32 + 2 + self.superblock.inode_table_blocks()
    }

    /// Blocks and inodes that become free.
    pub(super) fn free(&self) -> (u64, u32) {
        let extended = self.extended.1.len() as u64;
        let added = self.groups.iter();
        let blocks: u64 = added
            .clone()
            .map(|group| u64::from(group.free_blocks))
            .sum();
        (
            extended + blocks,
            added.map(|group| group.free_inodes).sum(),
        )
    }

    /// The groups that keep copies of superblock and descriptors.
    pub(super) fn backups(&self) -> impl Iterator<Item = u32> {
        let groups = 1..self.superblock.groups_count();
        groups.filter(|group| self.superblock.has_backup(*group))
    }

    /// The blocks that stay reserved for descriptors.
    pub(super) fn reserved(&self) -> Range<u64> {
        let end = self.superblock.group_head(0).end;
        end - u64::from(self.superblock.reserved_descriptor_blocks)..end
    }
}

/// What mke2fs has written for ten years has all of it.
fn check_features(superblock: &Superblock) -> Result<(), Refused> {
    let features = &superblock.features;
    let lacking = |feature: &str| Err(Refused::Feature(format!("it has no {feature}")));
    if !features.has_compat(compat::RESIZE_INODE) {
        lacking("resize_inode")
    } else if !superblock.has_checksums() {
        lacking("metadata_csum")
    } else if !features.has_ro_compat(ro_compat::SPARSE_SUPER) {
        lacking("sparse_super")
    } else if features.has_incompat(incompat::META_BG) || features.has_compat(compat::SPARSE_SUPER2)
    {
        Err(Refused::Feature(
            "it uses meta_bg or sparse_super2".to_owned(),
        ))
    } else {
        Ok(())
    }
}

fn groups(superblock: &Superblock, blocks_count: u64) -> u32 {
    let blocks = blocks_count - u64::from(superblock.first_data_block);
    blocks.div_ceil(u64::from(superblock.blocks_per_group)) as u32
}

/// `end`, or where the last group begins if that would be a new one too small to be one.
fn without_stump(superblock: &Superblock, end: u64, count: u32) -> u64 {
    let last = groups(superblock, end) - 1;
    let first = superblock.group_first(last);
    let head = superblock.group_head(last);
    let needed = head.end - head.start + 2 + u64::from(superblock.inode_table_blocks());
    match last >= count && end - first < needed + LAST_GROUP_MARGIN {
        true => first,
        false => end,
    }
}

fn new_group(after: &Superblock, group: u32) -> Group {
    let head = after.group_head(group);
    let used = head.end - after.group_first(group) + 2 + u64::from(after.inode_table_blocks());
    Group {
        block_bitmap: head.end,
        inode_bitmap: head.end + 1,
        inode_table: head.end + 2,
        free_blocks: after.group_blocks(group) - used as u32,
        free_inodes: after.inodes_per_group,
        unused_inodes: after.inodes_per_group,
        inodes_uninit: true,
        // The bitmap of the last one has to say where it ends.
        blocks_uninit: group + 1 < after.groups_count(),
        table_zeroed: true,
        ..Group::default()
    }
}
