//! An inode as it is kept while mounted: the bytes of its slot, read and changed field by field.
//!
//! What no field here names is preserved. The layout is in [`crate::ext4::inode`], and:
//!
//! ```text
//! 0x08 u32 atime    0x84 u32 ctime, extra    0x90 u32 crtime
//! 0x0c u32 ctime    0x88 u32 mtime, extra    0x94 u32 crtime, extra
//! 0x10 u32 mtime    0x8c u32 atime, extra    0x28, 0x2c of devices: the number, old and new form
//! ```

use crate::ext4::bytes::{join, le16, le32, part, put};
use crate::ext4::features::{incompat, ro_compat};
use crate::ext4::inode::{BASE_BYTES, FLAG_HUGE_FILE, Inode, Kind, MAP_BYTES, seal};
use crate::ext4::superblock::Superblock;
use crate::ext4::time::Timestamp;

const MAP_AT: usize = 0x28;
const SECTOR_BYTES: u64 = 512;
/// Sectors that 48 bits count.
const MAX_SECTORS: u64 = 1 << 48;
/// Device numbers below are kept in the old form.
const MAX_OLD_DEVICE: u32 = 256;

/// The bytes of a slot in the inode table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawInode {
    number: u32,
    bytes: Box<[u8]>,
    block_bytes: u32,
    wide_blocks: bool,
    huge_files: bool,
}

impl RawInode {
    #[must_use]
    pub fn new(number: u32, slot: &[u8], superblock: &Superblock) -> Self {
        Self {
            number,
            bytes: slot.into(),
            block_bytes: superblock.block_bytes,
            wide_blocks: superblock.features.has_incompat(incompat::BIT64),
            huge_files: superblock.features.has_ro_compat(ro_compat::HUGE_FILE),
        }
    }

    /// As the reading code knows it.
    #[must_use]
    pub fn decoded(&self, superblock: &Superblock) -> Inode {
        Inode::read(self.number, &self.bytes, superblock)
    }

    /// The bytes of the slot, with their checksum.
    #[must_use]
    pub fn sealed(&self, superblock: &Superblock) -> Vec<u8> {
        let mut bytes = self.bytes.to_vec();
        if superblock.has_checksums() {
            seal(self.number, &mut bytes, superblock);
        }
        bytes
    }

    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// Where the checksums of the inode's blocks start.
    #[must_use]
    pub fn checksum_seed(&self, superblock: &Superblock) -> u32 {
        self.decoded(superblock).checksum_seed
    }

    #[must_use]
    pub fn mode(&self) -> u16 {
        le16(&self.bytes, 0)
    }

    pub fn set_mode(&mut self, mode: u16) {
        self.put16(0, mode);
    }

    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        Kind::of_mode(self.mode())
    }

    #[must_use]
    pub fn is_directory(&self) -> bool {
        self.kind() == Some(Kind::Directory)
    }

    #[must_use]
    pub fn uid(&self) -> u32 {
        u32::from(le16(&self.bytes, 0x78)) << 16 | u32::from(le16(&self.bytes, 2))
    }

    pub fn set_uid(&mut self, uid: u32) {
        self.put16(2, uid as u16);
        self.put16(0x78, (uid >> 16) as u16);
    }

    #[must_use]
    pub fn gid(&self) -> u32 {
        u32::from(le16(&self.bytes, 0x7a)) << 16 | u32::from(le16(&self.bytes, 0x18))
    }

    pub fn set_gid(&mut self, gid: u32) {
        self.put16(0x18, gid as u16);
        self.put16(0x7a, (gid >> 16) as u16);
    }

    #[must_use]
    pub fn links(&self) -> u16 {
        le16(&self.bytes, 0x1a)
    }

    pub fn set_links(&mut self, links: u16) {
        self.put16(0x1a, links);
    }

    /// The size on disk, behind which nothing was written yet.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        join(le32(&self.bytes, 0x6c), le32(&self.bytes, 4))
    }

    pub fn set_size_bytes(&mut self, size_bytes: u64) {
        self.put32(4, size_bytes as u32);
        self.put32(0x6c, (size_bytes >> 32) as u32);
    }

    #[must_use]
    pub fn dtime(&self) -> u32 {
        le32(&self.bytes, 0x14)
    }

    pub fn set_dtime(&mut self, dtime: u32) {
        self.put32(0x14, dtime);
    }

    #[must_use]
    pub fn flags(&self) -> u32 {
        le32(&self.bytes, 0x20)
    }

    pub fn set_flags(&mut self, flags: u32) {
        self.put32(0x20, flags);
    }

    #[must_use]
    pub fn has_flag(&self, flag: u32) -> bool {
        self.flags() & flag != 0
    }

    #[must_use]
    pub fn generation(&self) -> u32 {
        le32(&self.bytes, 0x64)
    }

    pub fn set_generation(&mut self, generation: u32) {
        self.put32(0x64, generation);
    }

    /// 0: none.
    #[must_use]
    pub fn xattr_block(&self) -> u64 {
        let high = if self.wide_blocks {
            u32::from(le16(&self.bytes, 0x76))
        } else {
            0
        };
        join(high, le32(&self.bytes, 0x68))
    }

    pub fn set_xattr_block(&mut self, block: u64) {
        self.put32(0x68, block as u32);
        if self.wide_blocks {
            self.put16(0x76, (block >> 32) as u16);
        }
    }

    /// Space in use, in units of 512 bytes: data, map and xattr block.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        let low = u64::from(le32(&self.bytes, 0x1c));
        if !self.huge_files {
            return low;
        }
        let all = u64::from(le16(&self.bytes, 0x74)) << 32 | low;
        if self.has_flag(FLAG_HUGE_FILE) {
            all * self.sectors_per_block()
        } else {
            all
        }
    }

    pub fn set_sectors(&mut self, sectors: u64) {
        let in_blocks = self.huge_files && sectors >= MAX_SECTORS;
        let flag = if in_blocks { FLAG_HUGE_FILE } else { 0 };
        self.set_flags(self.flags() & !FLAG_HUGE_FILE | flag);
        let count = if in_blocks {
            sectors / self.sectors_per_block()
        } else {
            sectors
        };
        self.put32(0x1c, count as u32);
        if self.huge_files {
            self.put16(0x74, (count >> 32) as u16);
        }
    }

    /// Counts `blocks` more.
    pub fn add_blocks(&mut self, blocks: u64) {
        self.set_sectors(self.sectors() + blocks * self.sectors_per_block());
    }

    /// Counts `blocks` less.
    pub fn subtract_blocks(&mut self, blocks: u64) {
        let sectors = blocks * self.sectors_per_block();
        self.set_sectors(self.sectors().saturating_sub(sectors));
    }

    fn sectors_per_block(&self) -> u64 {
        u64::from(self.block_bytes) / SECTOR_BYTES
    }

    /// The block map, or a short symbolic link.
    #[must_use]
    pub fn map(&self) -> &[u8] {
        part(&self.bytes, MAP_AT, MAP_AT + MAP_BYTES)
    }

    pub fn map_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[MAP_AT..MAP_AT + MAP_BYTES]
    }

    /// Major and minor number of a device node.
    #[must_use]
    pub fn device(&self) -> (u32, u32) {
        let (old, new) = (le32(self.map(), 0), le32(self.map(), 4));
        if old != 0 {
            (old >> 8 & 0xff, old & 0xff)
        } else {
            (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xf_ff00)
        }
    }

    pub fn set_device(&mut self, major: u32, minor: u32) {
        let old = major < MAX_OLD_DEVICE && minor < MAX_OLD_DEVICE;
        let (at, value) = if old {
            (0, major << 8 | minor)
        } else {
            (4, minor & 0xff | major << 8 | (minor & !0xff) << 12)
        };
        self.map_mut().fill(0);
        put(self.map_mut(), at, &value.to_le_bytes());
    }

    /// Bytes behind the first 128 that fields use.
    #[must_use]
    pub fn extra_bytes(&self) -> usize {
        if self.bytes.len() > BASE_BYTES {
            usize::from(le16(&self.bytes, 0x80)).min(self.bytes.len() - BASE_BYTES)
        } else {
            0
        }
    }

    pub fn set_extra_bytes(&mut self, extra_bytes: u16) {
        if self.bytes.len() > BASE_BYTES {
            self.put16(0x80, extra_bytes);
        }
    }

    /// Where xattrs may stand; empty in inodes without extra fields.
    #[must_use]
    pub fn xattr_area(&self) -> &[u8] {
        let bytes = &self.bytes;
        part(bytes, self.xattr_area_at(), bytes.len())
    }

    pub fn xattr_area_mut(&mut self) -> &mut [u8] {
        let at = self.xattr_area_at();
        &mut self.bytes[at..]
    }

    fn xattr_area_at(&self) -> usize {
        match self.extra_bytes() {
            0 => self.bytes.len(),
            extra => BASE_BYTES + extra,
        }
    }

    #[must_use]
    pub fn atime(&self) -> Timestamp {
        self.time(8, 0x8c)
    }

    pub fn set_atime(&mut self, time: Timestamp) {
        self.set_time(8, 0x8c, time);
    }

    #[must_use]
    pub fn ctime(&self) -> Timestamp {
        self.time(0xc, 0x84)
    }

    pub fn set_ctime(&mut self, time: Timestamp) {
        self.set_time(0xc, 0x84, time);
    }

    #[must_use]
    pub fn mtime(&self) -> Timestamp {
        self.time(0x10, 0x88)
    }

    pub fn set_mtime(&mut self, time: Timestamp) {
        self.set_time(0x10, 0x88, time);
    }

    /// When it was made; `None` in inodes that do not keep it.
    #[must_use]
    pub fn crtime(&self) -> Option<Timestamp> {
        self.keeps(0x90).then(|| self.time(0x90, 0x94))
    }

    pub fn set_crtime(&mut self, time: Timestamp) {
        if self.keeps(0x90) {
            self.set_time(0x90, 0x94, time);
        }
    }

    fn time(&self, at: usize, extra_at: usize) -> Timestamp {
        let extra = if self.keeps(extra_at) {
            le32(&self.bytes, extra_at)
        } else {
            0
        };
        Timestamp::decode(le32(&self.bytes, at), extra)
    }

    fn set_time(&mut self, at: usize, extra_at: usize, time: Timestamp) {
        let wide = self.keeps(extra_at);
        let (low, extra) = time.encode(wide);
        self.put32(at, low);
        if wide {
            self.put32(extra_at, extra);
        }
    }

    /// Whether the word at `at` lies inside the extra fields in use.
    fn keeps(&self, at: usize) -> bool {
        at + 4 <= BASE_BYTES + self.extra_bytes()
    }

    fn put16(&mut self, at: usize, value: u16) {
        put(&mut self.bytes, at, &value.to_le_bytes());
    }

    fn put32(&mut self, at: usize, value: u32) {
        put(&mut self.bytes, at, &value.to_le_bytes());
    }
}
