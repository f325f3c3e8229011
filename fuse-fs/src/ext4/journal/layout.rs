//! The blocks of a jbd2 journal; all numbers are big-endian.
//!
//! ```text
//! every block but logged ones: 0 u32 magic 0xc03b3998, 4 u32 kind, 8 u32 sequence of its transaction
//!   kinds: 1 descriptor, 2 commit, 3 and 4 superblock of version 1 and 2, 5 revoke
//! superblock: 0x0c u32 block size, 0x10 u32 length, 0x14 u32 first log block, 0x18 u32 first sequence,
//!   0x1c u32 start (0: empty), 0x20 u32 error; version 2: 0x24 u32 compatible, 0x28 u32 incompatible,
//!   0x30 u8 x16 uuid, 0x40 u32 users, 0x50 u8 checksum type, 0x54 u32 fast-commit blocks, 0xfc u32 CRC-32C of its 1024 bytes
//! descriptor: tags from 0x0c, each followed by a uuid of 16 bytes unless its flag says "same"
//!   tag, checksum v3: 0 u32 block, 4 u32 flags, 8 u32 block high, 12 u32 checksum
//!   other tags: 0 u32 block, 4 u16 checksum, 6 u16 flags, [8 u32 block high (64bit)], [2 unused (v2)]
//!   flags: 1 escaped (the block began with the magic, zeros are logged), 2 same uuid, 8 last tag
//! revoke: 0x0c u32 bytes in use, then block numbers of 4 or 8 bytes (64bit)
//! commit: 0x0c u8 checksum type, 0x0d u8 its size, 0x10 u32 checksum, 0x30 u64 seconds, 0x38 u32 nanoseconds
//! checksums v2, v3: descriptor and revoke have CRC-32C in their last 4 bytes, commit at 0x10, tags over
//!   sequence and logged block; all start from the CRC-32C of the uuid
//! ```

use crate::ext4::bytes::{be16, be32, join, part, put};
use crate::ext4::crc::{self, crc32c};

pub const KIND_DESCRIPTOR: u32 = 1;
pub const KIND_COMMIT: u32 = 2;
pub const KIND_REVOKE: u32 = 5;

const KIND_SUPERBLOCK_V1: u32 = 3;
const KIND_SUPERBLOCK_V2: u32 = 4;
const MAGIC: u32 = 0xc03b_3998;
const HEADER_BYTES: usize = 12;
const SUPERBLOCK_BYTES: usize = 1024;
const SUPERBLOCK_CHECKSUM_AT: usize = 0xfc;
const COMMIT_CHECKSUM_AT: usize = 0x10;
const TAIL_BYTES: usize = 4;
const UUID_BYTES: usize = 16;

const COMPAT_CHECKSUM: u32 = 1;
const INCOMPAT_REVOKE: u32 = 1;
const INCOMPAT_64BIT: u32 = 2;
const INCOMPAT_CSUM_V2: u32 = 8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;
const INCOMPAT_KNOWN: u32 = 0x3f;
const CHECKSUM_CRC32C: u8 = 4;

const TAG_ESCAPED: u32 = 1;
const TAG_SAME_UUID: u32 = 2;
const TAG_LAST: u32 = 8;

/// How a journal is laid out, and where its log starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalSuperblock {
    /// Log blocks are `first..end`.
    pub first: u32,
    pub end: u32,
    pub sequence: u32,
    /// 0: the log is empty.
    pub start: u32,
    /// The error for which the journal was given up, or 0.
    pub error: u32,
    compatible: u32,
    incompatible: u32,
    checksum_seed: u32,
}

/// A block of a transaction, as its descriptor announces it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag {
    /// Of the filesystem.
    pub block: u64,
    pub escaped: bool,
    checksum: u32,
}

impl JournalSuperblock {
    /// Reads the first block of a journal of `length` blocks of `block_bytes`.
    ///
    /// # Errors
    /// What is wrong with it, as a phrase.
    pub fn read(block: &[u8], block_bytes: u32, length: u64) -> Result<Self, String> {
        let (magic, kind) = (be32(block, 0), be32(block, 4));
        if magic != MAGIC || !matches!(kind, KIND_SUPERBLOCK_V1 | KIND_SUPERBLOCK_V2) {
            return Err("it has no superblock".to_owned());
        }
        let feature = |at| {
            if kind == KIND_SUPERBLOCK_V2 {
                be32(block, at)
            } else {
                0
            }
        };
        let (compatible, incompatible) = (feature(0x24), feature(0x28));
        let blocks = be32(block, 0x10);
        let unlogged = if incompatible & INCOMPAT_FAST_COMMIT != 0 {
            be32(block, 0x54).max(1)
        } else {
            0
        };
        let superblock = Self {
            first: be32(block, 0x14),
            end: blocks.saturating_sub(unlogged),
            sequence: be32(block, 0x18),
            start: be32(block, 0x1c),
            error: be32(block, 0x20),
            compatible,
            incompatible,
            checksum_seed: crc32c(crc::START, part(block, 0x30, 0x30 + UUID_BYTES)),
        };
        if incompatible & !INCOMPAT_KNOWN != 0 {
            return Err(format!(
                "it has unknown features {:#x}",
                incompatible & !INCOMPAT_KNOWN
            ));
        }
        if superblock.has_checksums()
            && superblock_checksum(block) != be32(block, SUPERBLOCK_CHECKSUM_AT)
        {
            return Err("its superblock has a wrong checksum".to_owned());
        }
        if be32(block, 0xc) != block_bytes || u64::from(blocks) > length {
            return Err(format!(
                "{blocks} blocks of {} bytes do not fit its inode",
                be32(block, 0xc)
            ));
        }
        let log = superblock.first..superblock.end;
        if superblock.first == 0
            || log.is_empty()
            || (superblock.start != 0 && !log.contains(&superblock.start))
        {
            return Err(format!("its log starts at {} of {log:?}", superblock.start));
        }
        Ok(superblock)
    }

    /// Checksums of version 2 or 3.
    #[must_use]
    pub fn has_checksums(&self) -> bool {
        self.incompatible & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3) != 0
    }

    /// Commit blocks hold one checksum of everything logged, as the first version had it.
    #[must_use]
    pub fn sums_transactions(&self) -> bool {
        self.compatible & COMPAT_CHECKSUM != 0 && !self.has_checksums()
    }

    #[must_use]
    pub fn has_fast_commits(&self) -> bool {
        self.incompatible & INCOMPAT_FAST_COMMIT != 0
    }

    fn tag_bytes(&self) -> usize {
        if self.incompatible & INCOMPAT_CSUM_V3 != 0 {
            return 16;
        }
        let wide = if self.incompatible & INCOMPAT_64BIT != 0 {
            4
        } else {
            0
        };
        let padding = if self.incompatible & INCOMPAT_CSUM_V2 != 0 {
            2
        } else {
            0
        };
        8 + wide + padding
    }

    /// The tags of a descriptor block.
    #[must_use]
    pub fn tags(&self, block: &[u8]) -> Vec<Tag> {
        let end = block.len() - if self.has_checksums() { TAIL_BYTES } else { 0 };
        let size = self.tag_bytes();
        let (mut at, mut tags) = (HEADER_BYTES, Vec::new());
        while at + size <= end {
            let (tag, flags) = self.tag(part(block, at, at + size));
            tags.push(tag);
            at += size
                + if flags & TAG_SAME_UUID == 0 {
                    UUID_BYTES
                } else {
                    0
                };
            if flags & TAG_LAST != 0 {
                break;
            }
        }
        tags
    }

    fn tag(&self, bytes: &[u8]) -> (Tag, u32) {
        let v3 = self.incompatible & INCOMPAT_CSUM_V3 != 0;
        let (flags, checksum) = if v3 {
            (be32(bytes, 4), be32(bytes, 12))
        } else {
            (u32::from(be16(bytes, 6)), u32::from(be16(bytes, 4)))
        };
        let high = if self.incompatible & INCOMPAT_64BIT != 0 {
            be32(bytes, 8)
        } else {
            0
        };
        let tag = Tag {
            block: join(high, be32(bytes, 0)),
            escaped: flags & TAG_ESCAPED != 0,
            checksum,
        };
        (tag, flags)
    }

    /// The blocks that a revoke block names.
    #[must_use]
    pub fn revoked(&self, block: &[u8]) -> Vec<u64> {
        let size = if self.incompatible & INCOMPAT_64BIT != 0 {
            8
        } else {
            4
        };
        let end = (be32(block, HEADER_BYTES) as usize).min(block.len());
        let entries = part(block, HEADER_BYTES + 4, end).chunks_exact(size);
        let number = |entry: &[u8]| match size {
            8 => join(be32(entry, 0), be32(entry, 4)),
            _ => u64::from(be32(entry, 0)),
        };
        entries.map(number).collect()
    }

    /// Whether a descriptor or revoke block has the right checksum.
    #[must_use]
    pub fn tail_matches(&self, block: &[u8]) -> bool {
        self.matches_without(block, block.len() - TAIL_BYTES)
    }

    /// Whether a commit block has the right checksum of its own.
    #[must_use]
    pub fn commit_matches(&self, block: &[u8]) -> bool {
        self.matches_without(block, COMMIT_CHECKSUM_AT)
    }

    fn matches_without(&self, block: &[u8], at: usize) -> bool {
        let crc = crc32c(self.checksum_seed, part(block, 0, at));
        let crc = crc32c(crc32c(crc, &[0; 4]), part(block, at + 4, block.len()));
        !self.has_checksums() || crc == be32(block, at)
    }

    /// Whether `block` is what `tag` of transaction `sequence` announced; as it is logged.
    #[must_use]
    pub fn logged_matches(&self, tag: &Tag, sequence: u32, block: &[u8]) -> bool {
        let crc = crc32c(crc32c(self.checksum_seed, &sequence.to_be_bytes()), block);
        let kept = if self.incompatible & INCOMPAT_CSUM_V3 != 0 {
            u32::MAX
        } else {
            0xffff
        };
        !self.has_checksums() || crc & kept == tag.checksum
    }
}

/// A block of a transaction, as it is to be announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewTag {
    /// Of the filesystem.
    pub block: u64,
    pub escaped: bool,
    /// See [`JournalSuperblock::logged_checksum`].
    pub checksum: u32,
}

/// What a transaction is written with.
impl JournalSuperblock {
    /// How many blocks one descriptor announces.
    #[must_use]
    pub fn tags_per_descriptor(&self, block_bytes: usize) -> usize {
        (block_bytes - HEADER_BYTES - UUID_BYTES - TAIL_BYTES) / self.tag_bytes()
    }

    /// How many blocks one revoke block names.
    #[must_use]
    pub fn revokes_per_block(&self, block_bytes: usize) -> usize {
        (block_bytes - HEADER_BYTES - 4 - TAIL_BYTES) / self.number_bytes()
    }

    fn number_bytes(&self) -> usize {
        if self.incompatible & INCOMPAT_64BIT != 0 {
            8
        } else {
            4
        }
    }

    /// The checksum of a block as it is logged.
    #[must_use]
    pub fn logged_checksum(&self, sequence: u32, block: &[u8]) -> u32 {
        crc32c(crc32c(self.checksum_seed, &sequence.to_be_bytes()), block)
    }

    /// A descriptor that announces `tags`, which fit.
    #[must_use]
    pub fn write_descriptor(&self, block_bytes: usize, sequence: u32, tags: &[NewTag]) -> Vec<u8> {
        let mut block = new_block(block_bytes, KIND_DESCRIPTOR, sequence);
        let mut at = HEADER_BYTES;
        for (index, tag) in tags.iter().enumerate() {
            let mut flags = if tag.escaped { TAG_ESCAPED } else { 0 };
            flags |= if index > 0 { TAG_SAME_UUID } else { 0 };
            flags |= if index + 1 == tags.len() { TAG_LAST } else { 0 };
            self.put_tag(&mut block[at..], tag, flags);
            at += self.tag_bytes();
            if index == 0 {
                at += UUID_BYTES;
            }
        }
        self.seal(&mut block, block_bytes - TAIL_BYTES);
        block
    }

    fn put_tag(&self, bytes: &mut [u8], tag: &NewTag, flags: u32) {
        put(bytes, 0, &(tag.block as u32).to_be_bytes());
        if self.incompatible & INCOMPAT_CSUM_V3 != 0 {
            put(bytes, 4, &flags.to_be_bytes());
            put(bytes, 12, &tag.checksum.to_be_bytes());
        } else {
            let checksum = if self.has_checksums() {
                tag.checksum as u16
            } else {
                0
            };
            put(bytes, 4, &checksum.to_be_bytes());
            put(bytes, 6, &(flags as u16).to_be_bytes());
        }
        if self.incompatible & INCOMPAT_64BIT != 0 {
            put(bytes, 8, &((tag.block >> 32) as u32).to_be_bytes());
        }
    }

    /// A revoke block that names `blocks`, which fit.
    #[must_use]
    pub fn write_revoke(&self, block_bytes: usize, sequence: u32, blocks: &[u64]) -> Vec<u8> {
        let mut block = new_block(block_bytes, KIND_REVOKE, sequence);
        let mut at = HEADER_BYTES + 4;
        for number in blocks {
            match self.number_bytes() {
                8 => put(&mut block, at, &number.to_be_bytes()),
                _ => put(&mut block, at, &(*number as u32).to_be_bytes()),
            }
            at += self.number_bytes();
        }
        put(&mut block, HEADER_BYTES, &(at as u32).to_be_bytes());
        self.seal(&mut block, block_bytes - TAIL_BYTES);
        block
    }

    /// The block that makes transaction `sequence` count.
    #[must_use]
    pub fn write_commit(
        &self,
        block_bytes: usize,
        sequence: u32,
        seconds: u64,
        nanos: u32,
    ) -> Vec<u8> {
        let mut block = new_block(block_bytes, KIND_COMMIT, sequence);
        put(&mut block, 0x30, &seconds.to_be_bytes());
        put(&mut block, 0x38, &nanos.to_be_bytes());
        self.seal(&mut block, COMMIT_CHECKSUM_AT);
        block
    }

    fn seal(&self, block: &mut [u8], at: usize) {
        if self.has_checksums() {
            put(block, at, &[0; 4]);
            let crc = crc32c(self.checksum_seed, block);
            put(block, at, &crc.to_be_bytes());
        }
    }
}

fn new_block(block_bytes: usize, kind: u32, sequence: u32) -> Vec<u8> {
    let mut block = vec![0; block_bytes];
    for (at, value) in [(0, MAGIC), (4, kind), (8, sequence)] {
        put(&mut block, at, &value.to_be_bytes());
    }
    block
}

/// Makes `block`, the superblock of an empty journal, that of one which is written as this code does it: block
/// numbers as wide as the filesystem's, with checksums if the filesystem has them.
pub fn prepare(block: &mut [u8], wide: bool, checksums: bool) {
    let mut incompatible = be32(block, 0x28) & !(INCOMPAT_CSUM_V2 | INCOMPAT_FAST_COMMIT);
    let compatible = be32(block, 0x24) & !COMPAT_CHECKSUM;
    incompatible |= INCOMPAT_REVOKE;
    if wide {
        incompatible |= INCOMPAT_64BIT;
    }
    let kept = if checksums {
        incompatible | INCOMPAT_CSUM_V3
    } else {
        incompatible & !INCOMPAT_CSUM_V3
    };
    put(block, 4, &KIND_SUPERBLOCK_V2.to_be_bytes());
    put(block, 0x24, &compatible.to_be_bytes());
    put(block, 0x28, &kept.to_be_bytes());
    let kind = if checksums { CHECKSUM_CRC32C } else { 0 };
    put(block, 0x50, &[kind]);
    seal_superblock(block);
}

/// Makes `block`, the superblock of a journal, say that the log starts at `start` (0: it is empty) with
/// `sequence`.
pub fn set_start(block: &mut [u8], start: u32, sequence: u32) {
    put(block, 0x18, &sequence.to_be_bytes());
    put(block, 0x1c, &start.to_be_bytes());
    seal_superblock(block);
}

fn seal_superblock(block: &mut [u8]) {
    if be32(block, 0x28) & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3) != 0 {
        let crc = superblock_checksum(block);
        put(block, SUPERBLOCK_CHECKSUM_AT, &crc.to_be_bytes());
    }
}

/// The superblock of an empty journal of `blocks` blocks, without features: who mounts it adds what it uses.
#[must_use]
pub fn empty(block_bytes: u32, blocks: u32, uuid: &[u8; UUID_BYTES]) -> [u8; SUPERBLOCK_BYTES] {
    let mut bytes = [0; SUPERBLOCK_BYTES];
    for (at, value) in [
        (0, MAGIC),
        (4, KIND_SUPERBLOCK_V2),
        (0xc, block_bytes),
        (0x10, blocks),
        (0x14, 1),
        (0x18, 1),
        (0x40, 1),
    ] {
        put(&mut bytes, at, &value.to_be_bytes());
    }
    put(&mut bytes, 0x30, uuid);
    bytes
}

/// Kind and sequence of a block of the log; `None` if it is none.
#[must_use]
pub fn header(block: &[u8]) -> Option<(u32, u32)> {
    (be32(block, 0) == MAGIC).then(|| (be32(block, 4), be32(block, 8)))
}

/// The first four bytes of every block of the log, and of every escaped block.
#[must_use]
pub fn magic_bytes() -> [u8; 4] {
    MAGIC.to_be_bytes()
}

/// When a transaction was committed.
#[must_use]
pub fn commit_time(block: &[u8]) -> (u64, u32) {
    (
        join(be32(block, 0x30), be32(block, 0x34)),
        be32(block, 0x38),
    )
}

/// Whether a commit block of a journal of the first version holds `crc`, or no checksum at all.
#[must_use]
pub fn sum_matches(block: &[u8], crc: u32) -> bool {
    const CRC32: u8 = 1;
    match block.get(0xc..0xe) {
        Some([CRC32, 4]) => be32(block, COMMIT_CHECKSUM_AT) == crc,
        Some([0, 0]) => be32(block, COMMIT_CHECKSUM_AT) == 0,
        _ => false,
    }
}

fn superblock_checksum(block: &[u8]) -> u32 {
    let crc = crc32c(crc::START, part(block, 0, SUPERBLOCK_CHECKSUM_AT));
    let crc = crc32c(crc, &[0; 4]);
    crc32c(
        crc,
        part(block, SUPERBLOCK_CHECKSUM_AT + 4, SUPERBLOCK_BYTES),
    )
}
