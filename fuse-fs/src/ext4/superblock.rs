//! The superblock: 1024 bytes at byte 1024 of the device, and copies at the start of some groups.
//!
//! ```text
//! 0x00 u32 inodes          0x20 u32 blocks per group  0x58 u16 inode size          0xe4 u32 journal device
//! 0x04 u32 blocks, low     0x28 u32 inodes per group  0x5c u32 compatible          0xe8 u32 first orphan
//! 0x08 u32 reserved, low   0x38 u16 magic 0xef53      0x60 u32 incompatible        0xec u32 x4 hash seed
//! 0x0c u32 free blocks, low 0x3a u16 state            0x64 u32 read-only compatible 0xfe u16 descriptor size
//! 0x10 u32 free inodes     0x4c u32 revision          0x68 u8 x16 uuid             0x104 u32 first meta group
//! 0x14 u32 first data block 0x54 u32 first inode      0xce u16 reserved descriptor blocks 0xfc u8 hash of new indexes
//! 0x18 u32 log2(block) - 10                           0xe0 u32 journal inode
//! 0x150, 0x154, 0x158 u32 high halves of blocks, reserved, free   0x160 u32 flags   0x168 u64 MMP block
//! 0x175 u8 checksum type (1, CRC-32C)   0x194 u32 errors seen     0x240, 0x244, 0x26c u32 quota inodes
//! 0x24c u32 x2 groups with backups (sparse_super2)    0x270 u32 checksum seed      0x280 u32 orphan file
//! 0x3fc u32 CRC-32C of all before, from !0
//! ```

use crate::ext4::bytes::{array, join, le16, le32, part};
use crate::ext4::crc::{self, crc32c};
use crate::ext4::error::{Ext4Error, Place};
use crate::ext4::features::{Features, compat, incompat, ro_compat};

/// Where the first superblock lies, and its size.
pub const OFFSET_BYTES: u64 = 1024;
pub const SIZE_BYTES: usize = 1024;

pub(super) const MAGIC: u16 = 0xef53;
pub(super) const CHECKSUM_AT: usize = 0x3fc;
const CHECKSUM_CRC32C: u8 = 1;
const MIN_BLOCK_BYTES: u32 = 1024;
const MAX_LOG_BLOCK: u32 = 6;
const OLD_INODE_BYTES: u16 = 128;
const OLD_FIRST_INODE: u32 = 11;
const OLD_DESCRIPTOR_BYTES: u16 = 32;
const STATE_CLEAN: u16 = 1;
const FLAG_UNSIGNED_HASH: u32 = 2;

/// What a superblock says, with the ranges of its fields checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    pub inodes_count: u32,
    pub blocks_count: u64,
    pub reserved_blocks: u64,
    pub free_blocks: u64,
    pub free_inodes: u32,
    pub first_data_block: u32,
    pub block_bytes: u32,
    pub blocks_per_group: u32,
    pub inodes_per_group: u32,
    pub state: u16,
    pub first_inode: u32,
    pub inode_bytes: u16,
    pub features: Features,
    pub uuid: [u8; 16],
    pub reserved_descriptor_blocks: u16,
    pub prealloc_dir_blocks: u8,
    pub journal_inode: u32,
    pub journal_device: u32,
    pub last_orphan: u32,
    pub hash_seed: [u32; 4],
    /// Of the indexes that new directories get.
    pub hash_version: u8,
    pub descriptor_bytes: u16,
    pub first_meta_group: u32,
    pub flags: u32,
    pub mmp_block: u64,
    pub errors_count: u32,
    pub quota_inodes: [u32; 3],
    pub backup_groups: [u32; 2],
    pub orphan_file: u32,
    /// Where the checksums of all metadata but this start.
    pub checksum_seed: u32,
}

impl Superblock {
    /// Reads the [`SIZE_BYTES`] of a superblock on a device of `device_bytes`.
    ///
    /// # Errors
    /// [`Ext4Error::NotExt4`] without the magic, [`Ext4Error::Unsupported`] with the names of the features,
    /// [`Ext4Error::Corrupt`] for a wrong checksum and for numbers that no filesystem has.
    pub fn read(bytes: &[u8], device_bytes: u64) -> Result<Self, Ext4Error> {
        if le16(bytes, 0x38) != MAGIC {
            return Err(Ext4Error::NotExt4);
        }
        let features = Features {
            compat: le32(bytes, 0x5c),
            incompat: le32(bytes, 0x60),
            ro_compat: le32(bytes, 0x64),
        };
        let corrupt = |problem| Err(Ext4Error::corrupt(Place::Superblock, problem));
        if features.has_ro_compat(ro_compat::METADATA_CSUM) {
            let found = crc32c(crc::START, part(bytes, 0, CHECKSUM_AT));
            if bytes.get(0x175) != Some(&CHECKSUM_CRC32C) || found != le32(bytes, CHECKSUM_AT) {
                return corrupt("its checksum is wrong".to_owned());
            }
        }
        let unreadable = features.unreadable();
        if !unreadable.is_empty() {
            return Err(Ext4Error::Unsupported {
                features: unreadable,
            });
        }
        let log_block = le32(bytes, 0x18);
        if log_block > MAX_LOG_BLOCK {
            return corrupt(format!("a block size of 2^{log_block} KiB does not exist"));
        }
        let superblock = Self::fields(bytes, features, MIN_BLOCK_BYTES << log_block);
        match superblock.implausible(device_bytes) {
            Some(problem) => corrupt(problem),
            None => Ok(superblock),
        }
    }

    fn fields(bytes: &[u8], features: Features, block_bytes: u32) -> Self {
        let wide = features.has_incompat(incompat::BIT64);
        let high = |at| if wide { le32(bytes, at) } else { 0 };
        let dynamic = le32(bytes, 0x4c) != 0;
        let uuid: [u8; 16] = array(bytes, 0x68);
        let checksum_seed = if features.has_incompat(incompat::METADATA_CSUM_SEED) {
            le32(bytes, 0x270)
        } else {
            crc32c(crc::START, &uuid)
        };
        let pick = |new, old| if dynamic { new } else { old };
        Self {
            inodes_count: le32(bytes, 0),
            blocks_count: join(high(0x150), le32(bytes, 4)),
            reserved_blocks: join(high(0x154), le32(bytes, 8)),
            free_blocks: join(high(0x158), le32(bytes, 0xc)),
            free_inodes: le32(bytes, 0x10),
            first_data_block: le32(bytes, 0x14),
            block_bytes,
            blocks_per_group: le32(bytes, 0x20),
            inodes_per_group: le32(bytes, 0x28),
            state: le16(bytes, 0x3a),
            first_inode: pick(le32(bytes, 0x54), OLD_FIRST_INODE),
            inode_bytes: if dynamic {
                le16(bytes, 0x58)
            } else {
                OLD_INODE_BYTES
            },
            features,
            uuid,
            reserved_descriptor_blocks: if features.has_compat(compat::RESIZE_INODE) {
                le16(bytes, 0xce)
            } else {
                0
            },
            prealloc_dir_blocks: bytes.get(0xcd).copied().unwrap_or(0),
            journal_inode: le32(bytes, 0xe0),
            journal_device: le32(bytes, 0xe4),
            last_orphan: le32(bytes, 0xe8),
            hash_seed: [0xec, 0xf0, 0xf4, 0xf8].map(|at| le32(bytes, at)),
            hash_version: bytes.get(0xfc).copied().unwrap_or(0),
            descriptor_bytes: if wide {
                le16(bytes, 0xfe)
            } else {
                OLD_DESCRIPTOR_BYTES
            },
            first_meta_group: le32(bytes, 0x104),
            flags: le32(bytes, 0x160),
            mmp_block: join(le32(bytes, 0x16c), le32(bytes, 0x168)),
            errors_count: le32(bytes, 0x194),
            quota_inodes: [0x240, 0x244, 0x26c].map(|at| le32(bytes, at)),
            backup_groups: [0x24c, 0x250].map(|at| le32(bytes, at)),
            orphan_file: le32(bytes, 0x280),
            checksum_seed,
        }
    }

    /// What no filesystem on such a device can have; everything else relies on it.
    fn implausible(&self, device_bytes: u64) -> Option<String> {
        let bits = self.block_bytes * 8;
        let first = u32::from(self.block_bytes == MIN_BLOCK_BYTES);
        let inode_bytes = u32::from(self.inode_bytes);
        let descriptor_bytes = u32::from(self.descriptor_bytes);
        let wide = self.features.has_incompat(incompat::BIT64);
        if self.first_data_block != first {
            return Some(format!(
                "first data block {}, not {first}",
                self.first_data_block
            ));
        }
        if self.blocks_count <= u64::from(first)
            || self.blocks_count > device_bytes / u64::from(self.block_bytes)
        {
            return Some(format!(
                "{} blocks of {} bytes do not fit the {device_bytes} bytes of the device",
                self.blocks_count, self.block_bytes
            ));
        }
        if !(256..=bits).contains(&self.blocks_per_group)
            || !self.blocks_per_group.is_multiple_of(8)
        {
            return Some(format!("{} blocks a group", self.blocks_per_group));
        }
        if !inode_bytes.is_power_of_two() || !(128..=self.block_bytes).contains(&inode_bytes) {
            return Some(format!("inodes of {inode_bytes} bytes"));
        }
        let least = if wide { 64 } else { 32 };
        if !descriptor_bytes.is_power_of_two()
            || !(least..=self.block_bytes).contains(&descriptor_bytes)
        {
            return Some(format!("group descriptors of {descriptor_bytes} bytes"));
        }
        let in_block = self.block_bytes / inode_bytes;
        if !(in_block..=bits).contains(&self.inodes_per_group)
            || !self.inodes_per_group.is_multiple_of(8)
        {
            return Some(format!("{} inodes a group", self.inodes_per_group));
        }
        let groups = self
            .blocks_count
            .saturating_sub(u64::from(first))
            .div_ceil(u64::from(self.blocks_per_group));
        if groups.checked_mul(u64::from(self.inodes_per_group))
            != Some(u64::from(self.inodes_count))
        {
            return Some(format!(
                "{} inodes, but {groups} groups of {}",
                self.inodes_count, self.inodes_per_group
            ));
        }
        if self.first_inode < OLD_FIRST_INODE || self.first_inode > self.inodes_per_group {
            return Some(format!("first inode {}", self.first_inode));
        }
        if self.reserved_blocks > self.blocks_count {
            return Some(format!("{} reserved blocks", self.reserved_blocks));
        }
        let descriptor_blocks = groups.div_ceil(u64::from(self.block_bytes / descriptor_bytes));
        if u32::from(self.reserved_descriptor_blocks) > self.block_bytes / 4 {
            return Some(format!(
                "{} reserved descriptor blocks",
                self.reserved_descriptor_blocks
            ));
        }
        let meta = self.features.has_incompat(incompat::META_BG);
        if meta && u64::from(self.first_meta_group) > descriptor_blocks {
            return Some(format!("first meta group {}", self.first_meta_group));
        }
        let head = u64::from(self.reserved_descriptor_blocks)
            + if meta {
                u64::from(self.first_meta_group)
            } else {
                descriptor_blocks
            };
        if head + 2 > u64::from(self.blocks_per_group) {
            return Some(format!("{head} blocks of descriptors do not fit a group"));
        }
        None
    }

    #[must_use]
    pub fn was_unmounted(&self) -> bool {
        self.state & STATE_CLEAN != 0 && !self.features.has_incompat(incompat::NEEDS_RECOVERY)
    }

    /// Names are hashed as unsigned bytes.
    #[must_use]
    pub fn hashes_unsigned(&self) -> bool {
        self.flags & FLAG_UNSIGNED_HASH != 0
    }

    #[must_use]
    pub fn has_checksums(&self) -> bool {
        self.features.has_ro_compat(ro_compat::METADATA_CSUM)
    }

    /// Whether `blocks` blocks from `first` lie inside the filesystem.
    #[must_use]
    pub fn contains(&self, first: u64, blocks: u64) -> bool {
        let end = first.checked_add(blocks);
        first >= u64::from(self.first_data_block) && end.is_some_and(|end| end <= self.blocks_count)
    }
}
