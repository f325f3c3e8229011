//! The index of a large directory: a tree by the hash of names whose leaves are ordinary blocks.
//!
//! ```text
//! root, the directory's first block: entries "." (12 bytes) and ".." (to the end), and inside the latter
//!   0x18 u32 0, 0x1c u8 hash, 0x1d u8 8, 0x1e u8 levels of nodes below, 0x1f u8 0, from 0x20 the index
//! node: one free entry of the whole block, from 0x08 the index
//! index: 0 u16 capacity, 2 u16 entries, 4 u32 block for hashes from 0, then u32 hash, u32 block for hashes from it
//!   lowest bit of a hash set: the block before has names of that hash, too
//! tail (metadata_csum), behind the capacity: u32 0, u32 CRC-32C from the inode's seed over all in use and the tail
//! ```

use crate::ext4::bytes::{le16, le32, part};
use crate::ext4::crc::crc32c;

const ROOT_INDEX_AT: usize = 0x20;
const NODE_INDEX_AT: usize = 8;
const ENTRY_BYTES: usize = 8;
const BLOCK_MASK: u32 = 0x0fff_ffff;

/// The first block of an indexed directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    pub hash_version: u8,
    /// Levels of nodes between the root and the leaves.
    pub levels: u8,
    pub entries: Vec<Child>,
}

/// Names with hashes from `hash` on are in or below this block of the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child {
    pub hash: u32,
    pub block: u32,
}

/// Reads the root in the first block of a directory.
///
/// # Errors
/// What is wrong with it, as a phrase.
pub fn read_root(block: &[u8], max_levels: u8, seed: Option<u32>) -> Result<Root, String> {
    let (hash_version, levels) = (block[0x1c], block[0x1e]);
    if le32(block, 0x18) != 0 || block[0x1d] != 8 || levels > max_levels {
        return Err(format!(
            "index root with {levels} levels, or no root at all"
        ));
    }
    if hash_version > 5 {
        return Err(format!("index with unknown hash {hash_version}"));
    }
    let entries = read_index(block, ROOT_INDEX_AT, seed)?;
    Ok(Root {
        hash_version,
        levels,
        entries,
    })
}

/// Reads a node.
///
/// # Errors
/// What is wrong with it, as a phrase.
pub fn read_node(block: &[u8], seed: Option<u32>) -> Result<Vec<Child>, String> {
    let covers = usize::from(le16(block, 4));
    if le32(block, 0) != 0 || (covers != block.len() && covers != block.len() % 65536) {
        return Err("index node that is not one free entry".to_owned());
    }
    read_index(block, NODE_INDEX_AT, seed)
}

fn read_index(block: &[u8], at: usize, seed: Option<u32>) -> Result<Vec<Child>, String> {
    let (capacity, count) = (
        usize::from(le16(block, at)),
        usize::from(le16(block, at + 2)),
    );
    let room = (block.len() - at) / ENTRY_BYTES - usize::from(seed.is_some());
    if capacity != room || count == 0 || count > capacity {
        return Err(format!(
            "index with {count} entries of {capacity}, where {room} fit"
        ));
    }
    if seed.is_some_and(|seed| !checksum_matches(block, at, seed)) {
        return Err("index with a wrong checksum".to_owned());
    }
    let child = |n: usize| Child {
        hash: if n == 0 {
            0
        } else {
            le32(block, at + n * ENTRY_BYTES)
        },
        block: le32(block, at + n * ENTRY_BYTES + 4) & BLOCK_MASK,
    };
    let entries: Vec<Child> = (0..count).map(child).collect();
    match entries.windows(2).all(|pair| pair[0].hash < pair[1].hash) {
        true => Ok(entries),
        false => Err("index whose hashes are out of order".to_owned()),
    }
}

fn checksum_matches(block: &[u8], at: usize, seed: u32) -> bool {
    let used = at + usize::from(le16(block, at + 2)) * ENTRY_BYTES;
    let tail = at + usize::from(le16(block, at)) * ENTRY_BYTES;
    let crc = crc32c(
        crc32c(seed, part(block, 0, used)),
        part(block, tail, tail + 4),
    );
    crc32c(crc, &[0; 4]) == le32(block, tail + 4)
}
