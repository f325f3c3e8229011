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

use crate::ext4::bytes::{le16, le32, part, put};
use crate::ext4::crc::crc32c;
use crate::ext4::dir;

/// Levels of nodes below a root at most, without and with `large_dir`.
pub const MAX_LEVELS: u8 = 1;
pub const MAX_LEVELS_LARGE: u8 = 2;

/// Bytes of the entry "."; behind them begins "..".
const DOT_BYTES: usize = 12;
const ROOT_HEAD_AT: usize = 0x18;
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
    let (hash_version, levels) = read_head(block, max_levels)?;
    let entries = Index::of_root(block, seed)?.entries()?;
    Ok(Root {
        hash_version,
        levels,
        entries,
    })
}

/// The hash and the levels of nodes that a root tells.
///
/// # Errors
/// What is wrong with it, as a phrase.
pub fn read_head(block: &[u8], max_levels: u8) -> Result<(u8, u8), String> {
    let (hash_version, levels) = (block[0x1c], block[0x1e]);
    if le32(block, 0x18) != 0 || block[0x1d] != 8 || levels > max_levels {
        return Err(format!(
            "index root with {levels} levels, or no root at all"
        ));
    }
    if hash_version > 5 {
        return Err(format!("index with unknown hash {hash_version}"));
    }
    Ok((hash_version, levels))
}

/// Reads a node.
///
/// # Errors
/// What is wrong with it, as a phrase.
pub fn read_node(block: &[u8], seed: Option<u32>) -> Result<Vec<Child>, String> {
    Index::of_node(block, seed)?.entries()
}

/// The index in a block: what a search needs, without a copy.
#[derive(Clone, Copy, Debug)]
pub struct Index<'a> {
    block: &'a [u8],
    at: usize,
    count: usize,
}

impl<'a> Index<'a> {
    /// The index of the root in the first block of a directory.
    ///
    /// # Errors
    /// What is wrong with it, as a phrase.
    pub fn of_root(block: &'a [u8], seed: Option<u32>) -> Result<Self, String> {
        Self::view(block, ROOT_INDEX_AT, seed)
    }

    /// The index of a node.
    ///
    /// # Errors
    /// What is wrong with it, as a phrase.
    pub fn of_node(block: &'a [u8], seed: Option<u32>) -> Result<Self, String> {
        let covers = usize::from(le16(block, 4));
        if le32(block, 0) != 0 || (covers != block.len() && covers != block.len() % 65536) {
            return Err("index node that is not one free entry".to_owned());
        }
        Self::view(block, NODE_INDEX_AT, seed)
    }

    fn view(block: &'a [u8], at: usize, seed: Option<u32>) -> Result<Self, String> {
        let capacity = usize::from(le16(block, at));
        let count = usize::from(le16(block, at + 2));
        let room = capacity_at(at, block.len(), seed);
        if capacity != room || count == 0 || count > capacity {
            return Err(format!(
                "index with {count} entries of {capacity}, where {room} fit"
            ));
        }
        if seed.is_some_and(|seed| checksum(block, at, seed) != stored_checksum(block, at)) {
            return Err("index with a wrong checksum".to_owned());
        }
        Ok(Self { block, at, count })
    }

    /// Entries; at least one.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// The entry `n`, below the count.
    #[must_use]
    pub fn child(&self, n: usize) -> Child {
        let at = self.at + n * ENTRY_BYTES;
        Child {
            hash: if n == 0 { 0 } else { le32(self.block, at) },
            block: le32(self.block, at + 4) & BLOCK_MASK,
        }
    }

    /// The last entry whose hash is not above `hash`.
    #[must_use]
    pub fn find(&self, hash: u32) -> usize {
        let (mut from, mut to) = (1, self.count);
        while from < to {
            let middle = from.midpoint(to);
            if self.child(middle).hash <= hash {
                from = middle + 1;
            } else {
                to = middle;
            }
        }
        from - 1
    }

    /// All entries.
    ///
    /// # Errors
    /// Hashes that are out of order, as a phrase.
    pub fn entries(&self) -> Result<Vec<Child>, String> {
        let entries: Vec<Child> = (0..self.count).map(|n| self.child(n)).collect();
        match entries.windows(2).all(|pair| pair[0].hash < pair[1].hash) {
            true => Ok(entries),
            false => Err("index whose hashes are out of order".to_owned()),
        }
    }
}

/// How many entries a root has room for.
#[must_use]
pub fn root_capacity(block_bytes: usize, seed: Option<u32>) -> usize {
    capacity_at(ROOT_INDEX_AT, block_bytes, seed)
}

/// How many entries a node has room for.
#[must_use]
pub fn node_capacity(block_bytes: usize, seed: Option<u32>) -> usize {
    capacity_at(NODE_INDEX_AT, block_bytes, seed)
}

fn capacity_at(at: usize, block_bytes: usize, seed: Option<u32>) -> usize {
    (block_bytes - at) / ENTRY_BYTES - usize::from(seed.is_some())
}

/// Makes a directory's first block, whose entries "." and ".." stand at its beginning, a root.
pub fn write_root(block: &mut [u8], root: &Root, seed: Option<u32>) {
    let to_end = block.len() - DOT_BYTES;
    dir::set_length(block, DOT_BYTES, to_end);
    block[ROOT_HEAD_AT..].fill(0);
    put(block, 0x1c, &[root.hash_version, 8, root.levels, 0]);
    write_index(block, ROOT_INDEX_AT, &root.entries, seed);
}

/// Makes a node.
#[must_use]
pub fn write_node(entries: &[Child], block_bytes: usize, seed: Option<u32>) -> Vec<u8> {
    let mut block = vec![0; block_bytes];
    dir::set_length(&mut block, 0, block_bytes);
    write_index(&mut block, NODE_INDEX_AT, entries, seed);
    block
}

fn write_index(block: &mut [u8], at: usize, entries: &[Child], seed: Option<u32>) {
    for (n, child) in entries.iter().enumerate() {
        put(block, at + n * ENTRY_BYTES, &child.hash.to_le_bytes());
        put(block, at + n * ENTRY_BYTES + 4, &child.block.to_le_bytes());
    }
    // The first entry's hash is 0 always; the capacity and the count are in its place.
    let capacity = capacity_at(at, block.len(), seed) as u16;
    put(block, at, &capacity.to_le_bytes());
    put(block, at + 2, &(entries.len() as u16).to_le_bytes());
    seal(block, at, seed);
}

/// Puts the checksum into a root whose entry ".." was changed.
pub fn seal_root(block: &mut [u8], seed: Option<u32>) {
    seal(block, ROOT_INDEX_AT, seed);
}

fn seal(block: &mut [u8], at: usize, seed: Option<u32>) {
    if let Some(seed) = seed {
        let crc = checksum(block, at, seed);
        let tail = at + usize::from(le16(block, at)) * ENTRY_BYTES;
        put(block, tail + 4, &crc.to_le_bytes());
    }
}

fn stored_checksum(block: &[u8], at: usize) -> u32 {
    le32(block, at + usize::from(le16(block, at)) * ENTRY_BYTES + 4)
}

fn checksum(block: &[u8], at: usize, seed: u32) -> u32 {
    let used = at + usize::from(le16(block, at + 2)) * ENTRY_BYTES;
    let tail = at + usize::from(le16(block, at)) * ENTRY_BYTES;
    let crc = crc32c(
        crc32c(seed, part(block, 0, used)),
        part(block, tail, tail + 4),
    );
    crc32c(crc, &[0; 4])
}
