//! Extended attributes: behind the fields of an inode, and in one block that inodes may share.
//!
//! ```text
//! inode: at 128 + bytes in use: u32 magic 0xea020000, then entries; values are counted from the first entry
//! block: 0 u32 magic, 4 u32 inodes that use it, 8 u32 1, 0x10 u32 CRC-32C (number of the block as u64, then the
//!        block with this field zero); entries from 0x20; values are counted from the block's start
//! entry: 0 u8 name length, 1 u8 namespace, 2 u16 value at, 4 u32 0, 8 u32 value size, 0xc u32 hash, 0x10 name
//! ```
//! Entries are padded to 4 bytes and end with 4 zeros.

use crate::ext4::bytes::{le16, le32, part};
use crate::ext4::crc::crc32c;
use crate::ext4::inode::{BASE_BYTES, Inode};

const MAGIC: u32 = 0xea02_0000;
const ENTRY_BYTES: usize = 16;
const BLOCK_ENTRIES_AT: usize = 0x20;
/// The namespaces of ACLs, which are their names.
const NAMELESS: [u8; 2] = [2, 3];
const BLOCK_CHECKSUM_AT: usize = 0x10;

/// Checks the attributes in `bytes`, the slot of `inode`.
///
/// # Errors
/// What is wrong with them, as a phrase.
pub fn check_inode(inode: &Inode, bytes: &[u8]) -> Result<(), String> {
    let at = BASE_BYTES + usize::from(inode.extra_bytes);
    if bytes.len() <= BASE_BYTES || inode.extra_bytes == 0 || le32(bytes, at) != MAGIC {
        return Ok(());
    }
    let area = part(bytes, at + 4, bytes.len());
    check_entries(area, 0, true)
}

/// Checks a block of attributes; how many inodes it says that use it.
///
/// # Errors
/// What is wrong with it, as a phrase.
pub fn check_block(block: &[u8]) -> Result<u32, String> {
    if le32(block, 0) != MAGIC || le32(block, 8) != 1 {
        return Err("it has no xattr header".to_owned());
    }
    check_entries(block, BLOCK_ENTRIES_AT, false)?;
    Ok(le32(block, 4))
}

/// Whether the xattr block `number` has the right checksum.
#[must_use]
pub fn checksum_matches(block: &[u8], number: u64, seed: u32) -> bool {
    let crc = crc32c(seed, &number.to_le_bytes());
    let crc = crc32c(crc32c(crc, part(block, 0, BLOCK_CHECKSUM_AT)), &[0; 4]);
    let crc = crc32c(crc, part(block, BLOCK_CHECKSUM_AT + 4, block.len()));
    crc == le32(block, BLOCK_CHECKSUM_AT)
}

/// Entries from `first` in `area`, from whose start values are counted.
fn check_entries(area: &[u8], first: usize, hash_optional: bool) -> Result<(), String> {
    let mut at = first;
    let mut values = Vec::new();
    while le32(area, at) != 0 {
        let name_bytes = usize::from(le16(area, at) & 0xff);
        let end = at + (ENTRY_BYTES + name_bytes).next_multiple_of(4);
        let (value_at, value_bytes) =
            (usize::from(le16(area, at + 2)), le32(area, at + 8) as usize);
        let namespace = (le16(area, at) >> 8) as u8;
        let nameless = name_bytes == 0 && !NAMELESS.contains(&namespace);
        if nameless || end + 4 > area.len() {
            return Err(format!(
                "xattr entry at {at} has a name of {name_bytes} bytes"
            ));
        }
        let value_end = value_at.saturating_add(value_bytes.next_multiple_of(4));
        if le32(area, at + 4) != 0 || value_bytes > area.len() || value_end > area.len() {
            return Err(format!(
                "xattr entry at {at} has its value at {value_at}..{value_end}"
            ));
        }
        let name = part(area, at + ENTRY_BYTES, at + ENTRY_BYTES + name_bytes);
        let value = if value_bytes == 0 {
            &[]
        } else {
            part(area, value_at, value_end)
        };
        let stored = le32(area, at + 12);
        let unhashed = hash_optional && stored == 0;
        if !unhashed && !hashes(name, value).contains(&stored) {
            return Err(format!("xattr entry at {at} has a wrong hash"));
        }
        if value_bytes > 0 {
            values.push(value_at..value_end);
        }
        at = end;
    }
    values.sort_by_key(|value| value.start);
    let mut free_from = at + 4;
    for value in values {
        if value.start < free_from {
            return Err(format!(
                "xattr value at {} overlaps another or the entries",
                value.start
            ));
        }
        free_from = value.end;
    }
    Ok(())
}

/// The hash of an entry. Characters above 127 were signed or not, as the machine had them.
fn hashes(name: &[u8], value: &[u8]) -> [u32; 2] {
    let of = |char_of: fn(u8) -> u32| {
        let mix = |hash: u32, byte: &u8| hash.rotate_left(5) ^ char_of(*byte);
        let words = value.chunks_exact(4).map(|word| le32(word, 0));
        words.fold(name.iter().fold(0, mix), |hash, word| {
            hash.rotate_left(16) ^ word
        })
    };
    [
        of(u32::from),
        of(|byte| i32::from(byte.cast_signed()).cast_unsigned()),
    ]
}
