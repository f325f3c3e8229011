//! Where everything of a new filesystem goes: the numbers that mke2fs 1.47.0 (Debian 12) chooses by default.

use super::space::Space;
use crate::ext4::crc::{self, crc32c};
use crate::ext4::error::Ext4Error;
use crate::ext4::extent::{MAX_RUN_BLOCKS, Run};
use crate::ext4::features::{Features, compat, incompat, ro_compat};
use crate::ext4::group::Group;
use crate::ext4::hash;
use crate::ext4::inode;
use crate::ext4::superblock::Superblock;
use std::ops::Range;

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
/// Smaller ones would have no journal, larger ones more inodes than numbers.
const MIN_BYTES: u64 = 3 * MIB;
const MAX_BYTES: u64 = 16 * TIB;
const SMALL_BYTES: u64 = 512 * MIB;
const BIG_BYTES: u64 = 4 * TIB;
/// A filesystem of small blocks ends where a page of memory does.
const PAGE_BYTES: u64 = 4096;
const INODE_BYTES: u16 = 256;
const DESCRIPTOR_BYTES: u16 = 64;
const FIRST_INODE: u32 = 11;
const RESERVED_PERCENT: u64 = 5;
pub(super) const LOG_GROUPS_PER_FLEX: u32 = 4;
const GROUPS_PER_FLEX: u32 = 1 << LOG_GROUPS_PER_FLEX;
/// A last group needs room for its own metadata and this.
pub(crate) const LAST_GROUP_MARGIN: u64 = 50;
/// The filesystem may grow so many times without moving anything.
const GROWTH: u64 = 1024;
const MAX_BLOCKS: u64 = 0xffff_ffff;
/// Directory blocks of lost+found: 16 KiB, at most those that an inode of ext2 points to.
const LOST_AND_FOUND_BYTES: u32 = 16384;
const MAX_LOST_AND_FOUND_BLOCKS: u32 = 12;
/// Extents that fit the inode.
const ROOT_EXTENTS: usize = 4;

/// Blocks of the filesystem below which the journal has so many.
const JOURNAL_BLOCKS: [(u64, u64); 7] = [
    (32_768, 1024),
    (256 << 10, 4096),
    (512 << 10, 8192),
    (4096 << 10, 16_384),
    (8192 << 10, 32_768),
    (16_384 << 10, 65_536),
    (32_768 << 10, 131_072),
];
const MAX_JOURNAL_BLOCKS: u64 = 262_144;

/// What is chosen anew for each filesystem.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    pub uuid: [u8; 16],
    pub hash_seed: [u8; 16],
    /// At most 16 bytes.
    pub label: Vec<u8>,
    /// Seconds since 1970.
    pub now: u32,
}

/// A filesystem that is not yet written.
#[derive(Clone, Debug)]
pub struct Plan {
    pub superblock: Superblock,
    pub groups: Vec<Group>,
    pub space: Space,
    pub root_block: u64,
    pub lost_and_found: Range<u64>,
    /// The block that lists the reserved descriptor blocks.
    pub resize_list: u64,
    pub journal: Vec<Run>,
    /// The node of the journal's extents, if they do not fit its inode.
    pub journal_node: Option<u64>,
}

impl Plan {
    /// Plans a filesystem that fills `size_bytes`.
    ///
    /// # Errors
    /// [`Ext4Error::Size`].
    pub fn new(size_bytes: u64, identity: &Identity) -> Result<Self, Ext4Error> {
        if !(MIN_BYTES..=MAX_BYTES).contains(&size_bytes) {
            return Err(Ext4Error::Size { size_bytes });
        }
        let mut superblock = sizes(size_bytes, identity);
        let wanted_inodes = superblock.inodes_count;
        spread_inodes(&mut superblock, wanted_inodes);
        if let Some(blocks) = too_small_last_group(&superblock) {
            let whole = superblock.blocks_count;
            superblock.blocks_count -= blocks;
            superblock.reserved_blocks =
                superblock.reserved_blocks * superblock.blocks_count / whole;
            spread_inodes(&mut superblock, wanted_inodes);
        }
        let mut plan = Self {
            groups: vec![Group::default(); superblock.groups_count() as usize],
            space: Space::new(superblock.blocks_count),
            superblock,
            root_block: 0,
            lost_and_found: 0..0,
            resize_list: 0,
            journal: Vec::new(),
            journal_node: None,
        };
        plan.place().ok_or(Ext4Error::Size { size_bytes })?;
        plan.count();
        Ok(plan)
    }

    /// Finds a place for everything; `None` if there is too little room.
    fn place(&mut self) -> Option<()> {
        for group in 0..self.superblock.groups_count() {
            self.space.take(self.superblock.group_head(group));
        }
        for first in (0..self.superblock.groups_count()).step_by(GROUPS_PER_FLEX as usize) {
            self.place_flex(first)?;
        }
        self.root_block = self.take(0, 1)?;
        let blocks =
            (LOST_AND_FOUND_BYTES / self.superblock.block_bytes).min(MAX_LOST_AND_FOUND_BLOCKS);
        let lost_and_found = self.take(0, u64::from(blocks))?;
        self.lost_and_found = lost_and_found..lost_and_found + u64::from(blocks);
        let tables = self.groups[0].inode_table;
        self.resize_list =
            self.take(tables + u64::from(self.superblock.inode_table_blocks()), 1)?;
        self.place_journal()
    }

    fn take(&mut self, from: u64, count: u64) -> Option<u64> {
        let first = self
            .space
            .find(from.max(u64::from(self.superblock.first_data_block)), count)?;
        self.space.take(first..first + count);
        Some(first)
    }

    /// Bitmaps and tables of the groups of one flex group stand together at its start.
    fn place_flex(&mut self, first: u32) -> Option<()> {
        let last = (first + GROUPS_PER_FLEX).min(self.superblock.groups_count());
        let mut start = self.superblock.group_first(first);
        let table = u64::from(self.superblock.inode_table_blocks());
        for (what, blocks) in [(0, 1), (1, 1), (2, table)] {
            // The first is put where all find room, within a quarter of a group.
            let all = u64::from(last - first) * blocks;
            let all = all.min(u64::from(self.superblock.blocks_per_group) / 4);
            let mut from = self.space.find(start, all.max(blocks))?;
            if last - first == 1 {
                // A lone group leaves room for the bitmaps of those that may follow.
                start = from + u64::from(GROUPS_PER_FLEX);
            }
            for group in first..last {
                let place = self.take(from, blocks)?;
                let descriptor = &mut self.groups[group as usize];
                match what {
                    0 => descriptor.block_bitmap = place,
                    1 => descriptor.inode_bitmap = place,
                    _ => descriptor.inode_table = place,
                }
                from = place + blocks;
            }
        }
        Some(())
    }

    /// The journal lies in the middle, where the way to everything else is short.
    fn place_journal(&mut self) -> Option<()> {
        let count = self.superblock.blocks_count;
        let sized = JOURNAL_BLOCKS.into_iter().find(|(below, _)| count < *below);
        let mut left = sized.map_or(MAX_JOURNAL_BLOCKS, |(_, blocks)| blocks);
        let mut from = self.superblock.group_first(self.middle_group());
        let mut logical = 0;
        while left > 0 {
            let free = self.space.free_run(from)?;
            let blocks = left.min(free.end - free.start).min(MAX_RUN_BLOCKS);
            let (physical, unwritten) = (free.start, false);
            self.journal.push(Run {
                logical,
                physical,
                blocks,
                unwritten,
            });
            self.space.take(physical..physical + blocks);
            (left, logical, from) = (left - blocks, logical + blocks, physical + blocks);
        }
        if self.journal.len() > ROOT_EXTENTS {
            let before = self.journal[0].physical.saturating_sub(1);
            self.journal_node = Some(self.take(before, 1)?);
        }
        Some(())
    }

    /// Of the groups around the middle, the one with the most free blocks.
    fn middle_group(&self) -> u32 {
        let superblock = &self.superblock;
        let last = superblock.groups_count() - 1;
        let half = (superblock.blocks_count - u64::from(superblock.first_data_block)) / 2;
        let middle = ((half - u64::from(superblock.first_data_block))
            / u64::from(superblock.blocks_per_group)) as u32;
        let start = if middle > GROUPS_PER_FLEX {
            let flex = middle & !(GROUPS_PER_FLEX - 1);
            (flex..=last)
                .find(|group| self.free(*group) > 0)
                .unwrap_or(0)
        } else {
            middle.saturating_sub(1)
        };
        let near = start..=(middle + 1).min(last).max(start);
        let best = near.rev().max_by_key(|group| self.free(*group));
        best.unwrap_or(start)
    }

    /// The blocks of a group.
    #[must_use]
    pub fn range(&self, group: u32) -> Range<u64> {
        let first = self.superblock.group_first(group);
        first..first + u64::from(self.superblock.group_blocks(group))
    }

    fn free(&self, group: u32) -> u32 {
        let used: u64 = self
            .space
            .used_in(self.range(group))
            .map(|range| range.end - range.start)
            .sum();
        self.superblock.group_blocks(group) - used as u32
    }

    /// Fills the counters of descriptors and superblock.
    fn count(&mut self) {
        let per_group = self.superblock.inodes_per_group;
        let last = self.superblock.groups_count() - 1;
        for group in 0..=last {
            let head: Vec<_> = Some(self.superblock.group_head(group))
                .into_iter()
                .filter(|head| !head.is_empty())
                .collect();
            let only_head = self.space.used_in(self.range(group)).eq(head);
            let used_inodes = if group == 0 { FIRST_INODE } else { 0 };
            let free_blocks = self.free(group);
            let descriptor = &mut self.groups[group as usize];
            descriptor.free_blocks = free_blocks;
            descriptor.free_inodes = per_group - used_inodes;
            descriptor.unused_inodes = per_group - used_inodes;
            descriptor.directories = if group == 0 { 2 } else { 0 };
            descriptor.inodes_uninit = group > 0;
            // The bitmap of the last one has to say where it ends.
            descriptor.blocks_uninit = only_head && group < last;
            descriptor.table_zeroed = true;
        }
        self.superblock.free_blocks = self
            .groups
            .iter()
            .map(|group| u64::from(group.free_blocks))
            .sum();
        self.superblock.free_inodes = self.superblock.inodes_count - FIRST_INODE;
    }
}

/// A superblock with the sizes that follow from the device's.
fn sizes(size_bytes: u64, identity: &Identity) -> Superblock {
    let (block_bytes, bytes_per_inode) = match size_bytes {
        _ if size_bytes < SMALL_BYTES => (1024, 4096),
        _ if size_bytes < BIG_BYTES => (4096, 16_384),
        _ => (4096, 32_768),
    };
    let blocks_count = size_bytes / PAGE_BYTES * (PAGE_BYTES / u64::from(block_bytes));
    let inodes = (blocks_count * u64::from(block_bytes) / bytes_per_inode).min(u64::from(u32::MAX));
    Superblock {
        inodes_count: inodes as u32,
        blocks_count,
        reserved_blocks: blocks_count * RESERVED_PERCENT / 100,
        free_blocks: 0,
        free_inodes: 0,
        first_data_block: u32::from(block_bytes == 1024),
        block_bytes,
        blocks_per_group: block_bytes * 8,
        inodes_per_group: 0,
        state: 1,
        first_inode: FIRST_INODE,
        inode_bytes: INODE_BYTES,
        features: features(),
        uuid: identity.uuid,
        reserved_descriptor_blocks: 0,
        prealloc_dir_blocks: 0,
        journal_inode: inode::JOURNAL,
        journal_device: 0,
        last_orphan: 0,
        hash_seed: [0, 4, 8, 12].map(|at| crate::ext4::bytes::le32(&identity.hash_seed, at)),
        hash_version: hash::HALF_MD4,
        descriptor_bytes: DESCRIPTOR_BYTES,
        first_meta_group: 0,
        // Names are hashed as signed bytes.
        flags: 1,
        mmp_block: 0,
        errors_count: 0,
        quota_inodes: [0; 3],
        backup_groups: [0; 2],
        orphan_file: 0,
        checksum_seed: crc32c(crc::START, &identity.uuid),
    }
}

fn features() -> Features {
    Features {
        compat: compat::HAS_JOURNAL | compat::EXT_ATTR | compat::RESIZE_INODE | compat::DIR_INDEX,
        incompat: incompat::FILETYPE | incompat::EXTENT | incompat::BIT64 | incompat::FLEX_BG,
        ro_compat: ro_compat::SPARSE_SUPER
            | ro_compat::LARGE_FILE
            | ro_compat::HUGE_FILE
            | ro_compat::DIR_NLINK
            | ro_compat::EXTRA_ISIZE
            | ro_compat::METADATA_CSUM,
    }
}

fn groups(superblock: &Superblock) -> u32 {
    let blocks = superblock.blocks_count - u64::from(superblock.first_data_block);
    blocks.div_ceil(u64::from(superblock.blocks_per_group)) as u32
}

/// Gives each group as many of the `wanted` inodes as fill the blocks of its table, and room for the descriptors
/// of more groups.
fn spread_inodes(superblock: &mut Superblock, wanted: u32) {
    let groups = groups(superblock);
    let in_block = superblock.block_bytes / u32::from(superblock.inode_bytes);
    let per_group = wanted
        .max(FIRST_INODE + 1)
        .div_ceil(groups)
        .min(superblock.block_bytes * 8)
        .next_multiple_of(in_block);
    superblock.inodes_per_group = per_group.max(8) & !7;
    superblock.inodes_count = superblock.inodes_per_group * groups;
    let most =
        (superblock.blocks_count * GROWTH).min(MAX_BLOCKS) - u64::from(superblock.first_data_block);
    let most_groups = most.div_ceil(u64::from(superblock.blocks_per_group));
    let blocks = most_groups.div_ceil(u64::from(superblock.descriptors_per_block()));
    let reserved = blocks.saturating_sub(u64::from(superblock.descriptor_blocks()));
    superblock.reserved_descriptor_blocks =
        reserved.min(u64::from(superblock.block_bytes / 4)) as u16;
}

/// How many blocks a last group has that is too small to be one.
fn too_small_last_group(superblock: &Superblock) -> Option<u64> {
    let last = superblock.groups_count() - 1;
    let head = superblock.group_head(last);
    let needs = 2 + u64::from(superblock.inode_table_blocks()) + (head.end - head.start);
    let has = u64::from(superblock.group_blocks(last));
    (last > 0 && has < needs + LAST_GROUP_MARGIN).then_some(has)
}
