//! Block groups: the descriptor of each, and where the fixed metadata of a group lies.
//!
//! ```text
//! 0x00 u32 block bitmap      0x0c u16 free blocks       0x18 u16 block bitmap checksum
//! 0x04 u32 inode bitmap      0x0e u16 free inodes       0x1a u16 inode bitmap checksum
//! 0x08 u32 inode table       0x10 u16 directories       0x1c u16 unused inodes at the table's end
//! 0x12 u16 flags: 1 inodes and 2 blocks not initialised, 4 inode table zeroed
//! 0x1e u16 checksum: the low half of CRC-32C, or CRC-16 (uninit_bg)
//! 0x20 to 0x3a: the high halves of all but flags and checksum, in the same order (64bit)
//! ```

use crate::ext4::bytes::{join, le16, le32, part, put};
use crate::ext4::crc::{crc16, crc32c};
use crate::ext4::features::{compat, incompat, ro_compat};
use crate::ext4::superblock::Superblock;
use std::ops::Range;

const INODES_UNINIT: u16 = 1;
const BLOCKS_UNINIT: u16 = 2;
const TABLE_ZEROED: u16 = 4;
const WIDE_BYTES: usize = 64;
const CHECKSUM_AT: usize = 0x1e;

/// One group descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Group {
    pub block_bitmap: u64,
    pub inode_bitmap: u64,
    pub inode_table: u64,
    pub free_blocks: u32,
    pub free_inodes: u32,
    pub directories: u32,
    /// The last inodes of the table that were never used.
    pub unused_inodes: u32,
    pub block_bitmap_checksum: u32,
    pub inode_bitmap_checksum: u32,
    /// The bitmap of inodes is not on disk: none is in use.
    pub inodes_uninit: bool,
    /// The bitmap of blocks is not on disk: only the group's own metadata is in use.
    pub blocks_uninit: bool,
    /// What was never used of the inode table is zero on disk.
    pub table_zeroed: bool,
}

impl Group {
    /// Reads a descriptor of `superblock.descriptor_bytes`. Flags count only with checksums.
    #[must_use]
    pub fn read(bytes: &[u8], superblock: &Superblock) -> Self {
        let wide = bytes.len() >= WIDE_BYTES;
        let block = |low, high| join(if wide { le32(bytes, high) } else { 0 }, le32(bytes, low));
        let count = |low, high| {
            let high = if wide { le16(bytes, high) } else { 0 };
            u32::from(high) << 16 | u32::from(le16(bytes, low))
        };
        let flags = if superblock.features.has_group_checksums() {
            le16(bytes, 0x12)
        } else {
            0
        };
        Self {
            block_bitmap: block(0, 0x20),
            inode_bitmap: block(4, 0x24),
            inode_table: block(8, 0x28),
            free_blocks: count(0xc, 0x2c),
            free_inodes: count(0xe, 0x2e),
            directories: count(0x10, 0x30),
            unused_inodes: if superblock.features.has_group_checksums() {
                count(0x1c, 0x32)
            } else {
                0
            },
            block_bitmap_checksum: count(0x18, 0x38),
            inode_bitmap_checksum: count(0x1a, 0x3a),
            inodes_uninit: flags & INODES_UNINIT != 0,
            blocks_uninit: flags & BLOCKS_UNINIT != 0,
            table_zeroed: flags & TABLE_ZEROED != 0,
        }
    }

    /// The 64 bytes of descriptor `number`, with its checksum.
    #[must_use]
    pub fn write(&self, number: u32, superblock: &Superblock) -> [u8; WIDE_BYTES] {
        let mut bytes = [0; WIDE_BYTES];
        self.write_over(&mut bytes, number, superblock);
        bytes
    }

    /// Puts the descriptor `number` over `bytes`, which may be as narrow as old ones, with its checksum.
    pub fn write_over(&self, bytes: &mut [u8], number: u32, superblock: &Superblock) {
        let wide = bytes.len() >= WIDE_BYTES;
        for (at, block) in [
            (0, self.block_bitmap),
            (4, self.inode_bitmap),
            (8, self.inode_table),
        ] {
            put(bytes, at, &(block as u32).to_le_bytes());
            if wide {
                put(bytes, at + 0x20, &((block >> 32) as u32).to_le_bytes());
            }
        }
        for (low, high, count) in [
            (0xc, 0x2c, self.free_blocks),
            (0xe, 0x2e, self.free_inodes),
            (0x10, 0x30, self.directories),
            (0x1c, 0x32, self.unused_inodes),
            (0x18, 0x38, self.block_bitmap_checksum),
            (0x1a, 0x3a, self.inode_bitmap_checksum),
        ] {
            put(bytes, low, &(count as u16).to_le_bytes());
            if wide {
                put(bytes, high, &((count >> 16) as u16).to_le_bytes());
            }
        }
        let flag = |set, bit| if set { bit } else { 0 };
        let flags = flag(self.inodes_uninit, INODES_UNINIT)
            | flag(self.blocks_uninit, BLOCKS_UNINIT)
            | flag(self.table_zeroed, TABLE_ZEROED);
        put(bytes, 0x12, &flags.to_le_bytes());
        if let Some(checksum) = checksum(bytes, number, superblock) {
            put(bytes, CHECKSUM_AT, &checksum.to_le_bytes());
        }
    }
}

/// Whether the descriptor's own checksum is right; without the feature it has none.
#[must_use]
pub fn checksum_matches(bytes: &[u8], number: u32, superblock: &Superblock) -> bool {
    checksum(bytes, number, superblock).is_none_or(|checksum| checksum == le16(bytes, CHECKSUM_AT))
}

fn checksum(bytes: &[u8], number: u32, superblock: &Superblock) -> Option<u16> {
    let before = part(bytes, 0, CHECKSUM_AT);
    let after = part(bytes, CHECKSUM_AT + 2, bytes.len());
    if superblock.has_checksums() {
        let crc = crc32c(superblock.checksum_seed, &number.to_le_bytes());
        let crc = crc32c(crc32c(crc32c(crc, before), &[0, 0]), after);
        Some((crc & 0xffff) as u16)
    } else if superblock.features.has_ro_compat(ro_compat::GDT_CSUM) {
        let crc = crc16(crc16(0xffff, &superblock.uuid), &number.to_le_bytes());
        Some(crc16(crc16(crc, before), after))
    } else {
        None
    }
}

/// The checksum of `bitmap`, of which its first `bits` count.
#[must_use]
pub fn bitmap_checksum(bitmap: &[u8], bits: u32, superblock: &Superblock) -> u32 {
    crc32c(superblock.checksum_seed, part(bitmap, 0, bits as usize / 8))
}

/// Whether `bitmap` of `bits` bits has the checksum `stored`, of which old descriptors keep half.
#[must_use]
pub fn bitmap_matches(bitmap: &[u8], bits: u32, stored: u32, superblock: &Superblock) -> bool {
    let kept = if usize::from(superblock.descriptor_bytes) >= WIDE_BYTES {
        u32::MAX
    } else {
        0xffff
    };
    !superblock.has_checksums() || bitmap_checksum(bitmap, bits, superblock) & kept == stored
}

/// Arithmetic of groups: all in blocks of the filesystem.
impl Superblock {
    #[must_use]
    pub fn groups_count(&self) -> u32 {
        self.inodes_count / self.inodes_per_group
    }

    #[must_use]
    pub fn group_first(&self, group: u32) -> u64 {
        u64::from(self.first_data_block) + u64::from(group) * u64::from(self.blocks_per_group)
    }

    /// All but the last group have the same number.
    #[must_use]
    pub fn group_blocks(&self, group: u32) -> u32 {
        let left = self.blocks_count.saturating_sub(self.group_first(group));
        u32::try_from(left).map_or(self.blocks_per_group, |left| {
            left.min(self.blocks_per_group)
        })
    }

    #[must_use]
    pub fn inode_table_blocks(&self) -> u32 {
        let bytes = u64::from(self.inodes_per_group) * u64::from(self.inode_bytes);
        u32::try_from(bytes.div_ceil(u64::from(self.block_bytes))).unwrap_or(u32::MAX)
    }

    #[must_use]
    pub fn descriptors_per_block(&self) -> u32 {
        self.block_bytes / u32::from(self.descriptor_bytes)
    }

    #[must_use]
    pub fn descriptor_blocks(&self) -> u32 {
        self.groups_count().div_ceil(self.descriptors_per_block())
    }

    #[must_use]
    pub fn has_backup(&self, group: u32) -> bool {
        if group == 0 {
            true
        } else if self.features.has_compat(compat::SPARSE_SUPER2) {
            self.backup_groups.contains(&group)
        } else if self.features.has_ro_compat(ro_compat::SPARSE_SUPER) {
            group == 1 || [3, 5, 7].into_iter().any(|base| is_power(group, base))
        } else {
            true
        }
    }

    /// Blocks of descriptors that stand behind each backup of the superblock, without reserved ones.
    fn old_descriptor_blocks(&self) -> u32 {
        if self.features.has_incompat(incompat::META_BG) {
            self.first_meta_group.min(self.descriptor_blocks())
        } else {
            self.descriptor_blocks()
        }
    }

    /// Where block `index` of the descriptors is read from.
    #[must_use]
    pub fn descriptor_block(&self, index: u32) -> u64 {
        if index < self.old_descriptor_blocks() {
            return u64::from(self.first_data_block) + 1 + u64::from(index);
        }
        let group = index.saturating_mul(self.descriptors_per_block());
        self.group_first(group) + u64::from(self.has_backup(group))
    }

    /// The blocks at the start of `group` that hold superblock and descriptors, reserved ones included.
    #[must_use]
    pub fn group_head(&self, group: u32) -> Range<u64> {
        let first = self.group_first(group);
        let backup = self.has_backup(group);
        let meta = group / self.descriptors_per_block();
        let descriptors =
            if self.features.has_incompat(incompat::META_BG) && meta >= self.first_meta_group {
                let within = group % self.descriptors_per_block();
                u32::from(within < 2 || within + 1 == self.descriptors_per_block())
            } else if backup {
                self.old_descriptor_blocks() + u32::from(self.reserved_descriptor_blocks)
            } else {
                0
            };
        first..first + u64::from(backup) + u64::from(descriptors)
    }

    /// The group and the index in its table of an inode; `None` if there is no such inode.
    #[must_use]
    pub fn inode_place(&self, inode: u32) -> Option<(u32, u32)> {
        let index = inode
            .checked_sub(1)
            .filter(|_| inode <= self.inodes_count)?;
        Some((index / self.inodes_per_group, index % self.inodes_per_group))
    }
}

fn is_power(mut number: u32, base: u32) -> bool {
    while number > 1 && number.is_multiple_of(base) {
        number /= base;
    }
    number == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backups_are_at_powers_of_three_five_and_seven() {
        let powers: Vec<u32> = (2..130)
            .filter(|n| [3, 5, 7].iter().any(|b| is_power(*n, *b)))
            .collect();
        assert_eq!(powers, [3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }
}
