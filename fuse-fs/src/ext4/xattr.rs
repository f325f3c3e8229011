//! Extended attributes: behind the fields of an inode, and in one block that inodes may share.
//!
//! ```text
//! inode: at 128 + bytes in use: u32 magic 0xea020000, then entries; values are counted from the first entry
//! block: 0 u32 magic, 4 u32 inodes that use it, 8 u32 1, 0xc u32 hash of all hashes, 0x10 u32 CRC-32C (number of the block as u64, then the
//!        block with this field zero); entries from 0x20; values are counted from the block's start
//! entry: 0 u8 name length, 1 u8 namespace, 2 u16 value at, 4 u32 0, 8 u32 value size, 0xc u32 hash, 0x10 name
//! ```
//! Entries are padded to 4 bytes and end with 4 zeros.

use crate::ext4::bytes::{le16, le32, part, put};
use crate::ext4::crc::crc32c;
use crate::ext4::inode::{BASE_BYTES, Inode};

const MAGIC: u32 = 0xea02_0000;
const MAGIC_BYTES: usize = 4;
const ENTRY_BYTES: usize = 16;
/// Behind the last entry.
const END_BYTES: usize = 4;
const BLOCK_ENTRIES_AT: usize = 0x20;
/// The namespaces of ACLs, which are their names.
pub const ACCESS_ACL: u8 = 2;
pub const DEFAULT_ACL: u8 = 3;
const NAMELESS: [u8; 2] = [ACCESS_ACL, DEFAULT_ACL];
const BLOCK_HASH_AT: usize = 0xc;
const BLOCK_CHECKSUM_AT: usize = 0x10;

/// Checks the attributes in `bytes`, the slot of `inode`.
///
/// # Errors
/// What is wrong with them, as a phrase.
pub fn check_inode(inode: &Inode, bytes: &[u8]) -> Result<(), String> {
    if bytes.len() <= BASE_BYTES || inode.extra_bytes == 0 {
        return Ok(());
    }
    let at = BASE_BYTES + usize::from(inode.extra_bytes);
    in_inode(part(bytes, at, bytes.len())).map(|_| ())
}

/// Checks a block of attributes; how many inodes it says that use it.
///
/// # Errors
/// What is wrong with it, as a phrase.
pub fn check_block(block: &[u8]) -> Result<u32, String> {
    in_block(block).map(|_| users(block))
}

/// Whether the xattr block `number` has the right checksum.
#[must_use]
pub fn checksum_matches(block: &[u8], number: u64, seed: u32) -> bool {
    checksum(block, number, seed) == le32(block, BLOCK_CHECKSUM_AT)
}

fn checksum(block: &[u8], number: u64, seed: u32) -> u32 {
    let crc = crc32c(seed, &number.to_le_bytes());
    let crc = crc32c(crc32c(crc, part(block, 0, BLOCK_CHECKSUM_AT)), &[0; 4]);
    crc32c(crc, part(block, BLOCK_CHECKSUM_AT + 4, block.len()))
}

/// One attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attribute<'a> {
    pub namespace: u8,
    /// Without the namespace's prefix; ACLs have none.
    pub name: &'a [u8],
    pub value: &'a [u8],
}

/// The attributes in `area`, the bytes of an inode behind its fields.
///
/// # Errors
/// What is wrong with them, as a phrase.
pub fn in_inode(area: &[u8]) -> Result<Vec<Attribute<'_>>, String> {
    if le32(area, 0) != MAGIC {
        return Ok(Vec::new());
    }
    entries(part(area, MAGIC_BYTES, area.len()), 0, true)
}

/// The attributes in a block.
///
/// # Errors
/// What is wrong with it, as a phrase.
pub fn in_block(block: &[u8]) -> Result<Vec<Attribute<'_>>, String> {
    if le32(block, 0) != MAGIC || le32(block, 8) != 1 {
        return Err("it has no xattr header".to_owned());
    }
    entries(block, BLOCK_ENTRIES_AT, false)
}

/// Entries from `first` in `area`, from whose start values are counted.
fn entries(area: &[u8], first: usize, hash_optional: bool) -> Result<Vec<Attribute<'_>>, String> {
    let mut at = first;
    let (mut values, mut attributes) = (Vec::new(), Vec::new());
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
        let padded = if value_bytes == 0 {
            &[]
        } else {
            part(area, value_at, value_end)
        };
        let stored = le32(area, at + 12);
        let unhashed = hash_optional && stored == 0;
        if !unhashed && !hashes(name, padded).contains(&stored) {
            return Err(format!("xattr entry at {at} has a wrong hash"));
        }
        if value_bytes > 0 {
            values.push(value_at..value_end);
        }
        attributes.push(Attribute {
            namespace,
            name,
            value: part(padded, 0, value_bytes),
        });
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
    Ok(attributes)
}

/// How many bytes of attributes fit into the area of an inode, and into a block.
#[must_use]
pub fn inode_room(area_bytes: usize) -> usize {
    area_bytes.saturating_sub(MAGIC_BYTES + END_BYTES)
}

/// See [`inode_room`].
#[must_use]
pub fn block_room(block_bytes: usize) -> usize {
    block_bytes - BLOCK_ENTRIES_AT - END_BYTES
}

/// The bytes that an attribute needs.
#[must_use]
pub fn size(attribute: &Attribute<'_>) -> usize {
    (ENTRY_BYTES + attribute.name.len()).next_multiple_of(4)
        + attribute.value.len().next_multiple_of(4)
}

/// Puts `attributes`, which fit, into the area of an inode.
pub fn write_inode(area: &mut [u8], attributes: &[Attribute<'_>]) {
    area.fill(0);
    if !attributes.is_empty() {
        put(area, 0, &MAGIC.to_le_bytes());
        write_entries(&mut area[MAGIC_BYTES..], 0, attributes, |_| 0);
    }
}

/// Makes the block `number` of `attributes`, which fit, for `users` inodes.
#[must_use]
pub fn write_block(
    attributes: &[Attribute<'_>],
    block_bytes: usize,
    users: u32,
    number: u64,
    seed: Option<u32>,
) -> Vec<u8> {
    let mut block = vec![0; block_bytes];
    put(&mut block, 0, &MAGIC.to_le_bytes());
    put(&mut block, 8, &1_u32.to_le_bytes());
    let mut sorted = attributes.to_vec();
    sorted.sort_by_key(|attribute| (attribute.namespace, attribute.name.len(), attribute.name));
    let hash = |attribute: &Attribute<'_>| {
        let mut padded = attribute.value.to_vec();
        padded.resize(padded.len().next_multiple_of(4), 0);
        hashes(attribute.name, &padded)[0]
    };
    write_entries(&mut block, BLOCK_ENTRIES_AT, &sorted, hash);
    let mix = |all: u32, attribute| all.rotate_left(16) ^ hash(attribute);
    let all = sorted.iter().fold(0, mix);
    put(&mut block, BLOCK_HASH_AT, &all.to_le_bytes());
    set_users(&mut block, users, number, seed);
    block
}

/// How many inodes a block of attributes says that use it.
#[must_use]
pub fn users(block: &[u8]) -> u32 {
    le32(block, 4)
}

/// Tells the block `number` that `users` inodes use it.
pub fn set_users(block: &mut [u8], users: u32, number: u64, seed: Option<u32>) {
    put(block, 4, &users.to_le_bytes());
    if let Some(seed) = seed {
        let crc = checksum(block, number, seed);
        put(block, BLOCK_CHECKSUM_AT, &crc.to_le_bytes());
    }
}

/// Writes entries from `first` in `area` on, and their values from its end down.
fn write_entries(
    area: &mut [u8],
    first: usize,
    attributes: &[Attribute<'_>],
    hash: impl Fn(&Attribute<'_>) -> u32,
) {
    let (mut at, mut free_to) = (first, area.len());
    for attribute in attributes {
        let Attribute {
            namespace,
            name,
            value,
        } = attribute;
        free_to -= value.len().next_multiple_of(4);
        let value_at = if value.is_empty() { 0 } else { free_to };
        put(area, at, &[name.len() as u8, *namespace]);
        put(area, at + 2, &(value_at as u16).to_le_bytes());
        put(area, at + 8, &(value.len() as u32).to_le_bytes());
        put(area, at + 12, &hash(attribute).to_le_bytes());
        put(area, at + ENTRY_BYTES, name);
        put(area, free_to, value);
        at += (ENTRY_BYTES + name.len()).next_multiple_of(4);
    }
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
