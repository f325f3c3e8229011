//! Inodes: what a file is, without its name and its data.
//!
//! ```text
//! 0x00 u16 mode      0x1a u16 links          0x64 u32 generation        0x78 u16 uid, high
//! 0x02 u16 uid       0x1c u32 blocks, low    0x68 u32 xattr block, low  0x7a u16 gid, high
//! 0x04 u32 size, low 0x20 u32 flags          0x6c u32 size, high        0x7c u16 checksum, low
//! 0x14 u32 dtime     0x28 u8 x60 block map   0x74 u16 blocks, high      0x80 u16 bytes behind 128 in use
//! 0x18 u16 gid       0x76 u16 xattr block, high                         0x82 u16 checksum, high
//! ```
//!
//! The checksum is CRC-32C from the inode's seed (the filesystem's, number, generation) over all bytes, with
//! its own two fields zero. A deleted inode that waits for its blocks to be freed has in dtime the next one.

use crate::ext4::bytes::{array, join, le16, le32, part, put};
use crate::ext4::crc::crc32c;
use crate::ext4::features::{incompat, ro_compat};
use crate::ext4::superblock::Superblock;

pub const BAD_BLOCKS: u32 = 1;
pub const ROOT: u32 = 2;
pub const RESIZE: u32 = 7;
pub const JOURNAL: u32 = 8;

/// Bytes of the part that every inode has; xattrs may stand behind it.
pub const BASE_BYTES: usize = 128;
/// Bytes of the block map, or of a short symbolic link.
pub const MAP_BYTES: usize = 60;

pub const FLAG_IMMUTABLE: u32 = 0x10;
pub const FLAG_APPEND: u32 = 0x20;
pub const FLAG_INDEX: u32 = 0x1000;
pub const FLAG_HUGE_FILE: u32 = 0x4_0000;
pub const FLAG_EXTENTS: u32 = 0x8_0000;
pub const FLAG_VERITY: u32 = 0x10_0000;
const FLAG_SYNC: u32 = 0x8;
const FLAG_NO_DUMP: u32 = 0x40;
pub const FLAG_NO_ATIME: u32 = 0x80;
const FLAG_SYNC_DIRECTORY: u32 = 0x1_0000;
/// The flags that programs may change.
pub const FLAGS_CHANGEABLE: u32 =
    FLAG_SYNC | FLAG_IMMUTABLE | FLAG_APPEND | FLAG_NO_DUMP | FLAG_NO_ATIME | FLAG_SYNC_DIRECTORY;
/// The flags that programs see.
pub const FLAGS_VISIBLE: u32 = FLAGS_CHANGEABLE | FLAG_INDEX | FLAG_HUGE_FILE | FLAG_EXTENTS;
/// Flags of files that only filesystems have which this code refuses: encrypted, a large xattr, data in the
/// inode, names without case.
pub const FLAGS_REFUSED: u32 = 0x800 | 0x20_0000 | 0x1000_0000 | 0x4000_0000;

const CHECKSUM_LOW_AT: usize = 0x7c;
const CHECKSUM_HIGH_AT: usize = 0x82;
const SECTOR_BYTES: u64 = 512;

/// The kinds of files, by the numbers that directories store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Regular = 1,
    Directory = 2,
    CharDevice = 3,
    BlockDevice = 4,
    Fifo = 5,
    Socket = 6,
    Symlink = 7,
}

impl Kind {
    /// The kind that a mode names.
    #[must_use]
    pub fn of_mode(mode: u16) -> Option<Self> {
        Some(match mode >> 12 {
            0o10 => Self::Regular,
            0o04 => Self::Directory,
            0o02 => Self::CharDevice,
            0o06 => Self::BlockDevice,
            0o01 => Self::Fifo,
            0o14 => Self::Socket,
            0o12 => Self::Symlink,
            _ => return None,
        })
    }

    /// The kind of a number in a directory.
    #[must_use]
    pub fn of_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Regular,
            2 => Self::Directory,
            3 => Self::CharDevice,
            4 => Self::BlockDevice,
            5 => Self::Fifo,
            6 => Self::Socket,
            7 => Self::Symlink,
            _ => return None,
        })
    }

    /// The flags that a new inode has from its directory.
    #[must_use]
    pub fn inherited_flags(self) -> u32 {
        let any = FLAG_NO_DUMP | FLAG_NO_ATIME;
        match self {
            Self::Directory => any | FLAG_SYNC | FLAG_SYNC_DIRECTORY,
            Self::Regular => any | FLAG_SYNC,
            _ => any,
        }
    }

    /// Has neither data nor a size.
    #[must_use]
    pub fn is_special(self) -> bool {
        matches!(
            self,
            Self::CharDevice | Self::BlockDevice | Self::Fifo | Self::Socket
        )
    }
}

/// One inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inode {
    pub number: u32,
    pub mode: u16,
    pub links: u16,
    pub size_bytes: u64,
    pub dtime: u32,
    pub flags: u32,
    pub map: [u8; MAP_BYTES],
    pub generation: u32,
    /// 0: none.
    pub xattr_block: u64,
    /// In units of 512 bytes.
    pub sectors: u64,
    /// Bytes behind the first 128 that fields use.
    pub extra_bytes: u16,
    /// Where the checksums of its blocks start.
    pub checksum_seed: u32,
}

impl Inode {
    /// Reads the inode `number` from the bytes of its slot in the table.
    #[must_use]
    pub fn read(number: u32, bytes: &[u8], superblock: &Superblock) -> Self {
        let generation = le32(bytes, 0x64);
        let flags = le32(bytes, 0x20);
        let seed = crc32c(superblock.checksum_seed, &number.to_le_bytes());
        let wide = superblock.features.has_incompat(incompat::BIT64);
        Self {
            number,
            mode: le16(bytes, 0),
            links: le16(bytes, 0x1a),
            size_bytes: join(le32(bytes, 0x6c), le32(bytes, 4)),
            dtime: le32(bytes, 0x14),
            flags,
            map: array(bytes, 0x28),
            generation,
            xattr_block: join(
                if wide {
                    u32::from(le16(bytes, 0x76))
                } else {
                    0
                },
                le32(bytes, 0x68),
            ),
            sectors: sectors(bytes, flags, superblock),
            extra_bytes: if bytes.len() > BASE_BYTES {
                le16(bytes, 0x80)
            } else {
                0
            },
            checksum_seed: crc32c(seed, &generation.to_le_bytes()),
        }
    }

    #[must_use]
    pub fn kind(&self) -> Option<Kind> {
        Kind::of_mode(self.mode)
    }

    #[must_use]
    pub fn has_flag(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    /// Whether the checksum in `bytes`, the inode's slot, is right; a slot of zeros needs none.
    #[must_use]
    pub fn checksum_matches(&self, bytes: &[u8], superblock: &Superblock) -> bool {
        if !superblock.has_checksums() || bytes.iter().all(|byte| *byte == 0) {
            return true;
        }
        let low = u32::from(le16(bytes, CHECKSUM_LOW_AT));
        let crc = self.checksum(bytes);
        if self.has_wide_checksum(bytes) {
            crc == u32::from(le16(bytes, CHECKSUM_HIGH_AT)) << 16 | low
        } else {
            crc & 0xffff == low
        }
    }

    fn has_wide_checksum(&self, bytes: &[u8]) -> bool {
        bytes.len() > BASE_BYTES
            && usize::from(self.extra_bytes) + BASE_BYTES >= CHECKSUM_HIGH_AT + 2
    }

    fn checksum(&self, bytes: &[u8]) -> u32 {
        let crc = crc32c(self.checksum_seed, part(bytes, 0, CHECKSUM_LOW_AT));
        let crc = crc32c(crc, &[0, 0]);
        if !self.has_wide_checksum(bytes) {
            return crc32c(crc, part(bytes, CHECKSUM_LOW_AT + 2, bytes.len()));
        }
        let crc = crc32c(crc, part(bytes, CHECKSUM_LOW_AT + 2, CHECKSUM_HIGH_AT));
        let crc = crc32c(crc, &[0, 0]);
        crc32c(crc, part(bytes, CHECKSUM_HIGH_AT + 2, bytes.len()))
    }
}

/// Puts the checksum into `bytes`, the slot of inode `number` in a filesystem with checksums.
pub fn seal(number: u32, bytes: &mut [u8], superblock: &Superblock) {
    let inode = Inode::read(number, bytes, superblock);
    let crc = inode.checksum(bytes);
    put(bytes, CHECKSUM_LOW_AT, &(crc as u16).to_le_bytes());
    if inode.has_wide_checksum(bytes) {
        put(bytes, CHECKSUM_HIGH_AT, &((crc >> 16) as u16).to_le_bytes());
    }
}

/// The name of a field that is not zero though the filesystem has no use for it.
#[must_use]
pub fn field_without_use(bytes: &[u8], superblock: &Superblock) -> Option<&'static str> {
    let narrow = !superblock.features.has_incompat(incompat::BIT64);
    let short = !superblock.features.has_ro_compat(ro_compat::HUGE_FILE);
    let fields = [
        ("fragment address", le32(bytes, 0x70), true),
        (
            "high half of the xattr block",
            u32::from(le16(bytes, 0x76)),
            narrow,
        ),
        (
            "high half of the blocks",
            u32::from(le16(bytes, 0x74)),
            short,
        ),
    ];
    let used = fields
        .into_iter()
        .find(|(_, value, useless)| *useless && *value != 0);
    used.map(|(name, ..)| name)
}

/// Blocks in use; large files count in blocks of the filesystem.
fn sectors(bytes: &[u8], flags: u32, superblock: &Superblock) -> u64 {
    let low = u64::from(le32(bytes, 0x1c));
    if !superblock.features.has_ro_compat(ro_compat::HUGE_FILE) {
        return low;
    }
    let all = u64::from(le16(bytes, 0x74)) << 32 | low;
    if flags & FLAG_HUGE_FILE != 0 {
        all * (u64::from(superblock.block_bytes) / SECTOR_BYTES)
    } else {
        all
    }
}
