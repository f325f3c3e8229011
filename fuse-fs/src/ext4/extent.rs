//! Nodes of the tree that maps a file's blocks: in the inode's 60 bytes the root, others in blocks.
//!
//! ```text
//! header: 0 u16 magic 0xf30a, 2 u16 entries, 4 u16 capacity, 6 u16 depth (0: leaf), 8 u32 unused
//! leaf:   0 u32 logical block, 4 u16 length (above 32768: unwritten, 32768 more), 6 u16 high, 8 u32 low physical
//! index:  0 u32 logical block, 4 u32 low, 8 u16 high of the child's block
//! behind the last entry's place, in blocks: u32 CRC-32C from the inode's seed over all before
//! ```

use crate::ext4::bytes::{join, le16, le32, part, put};
use crate::ext4::crc::crc32c;
use crate::ext4::superblock::Superblock;
use std::ops::Range;

/// Depth of the deepest tree that 32-bit block numbers need.
pub const MAX_DEPTH: u16 = 5;
/// Logical blocks are below this.
pub const LOGICAL_END: u64 = 1 << 32;

const MAGIC: u16 = 0xf30a;
const ENTRY_BYTES: usize = 12;
const MAX_WRITTEN: u16 = 32768;
/// What the capacity may be less than the room, as old programs left it.
const CAPACITY_SLACK: usize = 2;

/// Consecutive blocks of a file that are consecutive on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    pub logical: u64,
    pub physical: u64,
    pub blocks: u64,
    /// Allocated, but reads give zeros.
    pub unwritten: bool,
}

/// A node with its entries, in the order of the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    Leaf(Vec<Run>),
    /// What part of the file each child maps, and the child's block.
    Index {
        depth: u16,
        children: Vec<(Range<u64>, u64)>,
    },
}

impl Node {
    /// Reads a node that maps `range`; `depth` is known of all but the root.
    ///
    /// # Errors
    /// What is wrong with it, as a phrase.
    pub fn read(
        bytes: &[u8],
        depth: Option<u16>,
        range: &Range<u64>,
        superblock: &Superblock,
    ) -> Result<Self, String> {
        let own_depth = le16(bytes, 6);
        let (count, capacity) = (usize::from(le16(bytes, 2)), usize::from(le16(bytes, 4)));
        let room = bytes.len().saturating_sub(ENTRY_BYTES) / ENTRY_BYTES;
        if le16(bytes, 0) != MAGIC {
            return Err("no extent header".to_owned());
        }
        if own_depth > MAX_DEPTH || depth.is_some_and(|depth| depth != own_depth) {
            return Err(format!("extent node of depth {own_depth}"));
        }
        if count > capacity || capacity > room || capacity + CAPACITY_SLACK < room {
            return Err(format!(
                "extent node with {count} entries of {capacity}, where {room} fit"
            ));
        }
        if count == 0 && (depth.is_some() || own_depth > 0) {
            return Err("extent node without entries".to_owned());
        }
        let entries = (1..=count).map(|at| part(bytes, at * ENTRY_BYTES, (at + 1) * ENTRY_BYTES));
        if own_depth == 0 {
            leaf(entries, range, superblock).map(Self::Leaf)
        } else {
            let children = index(entries, range, superblock)?;
            let depth = own_depth;
            Ok(Self::Index { depth, children })
        }
    }
}

fn leaf<'a>(
    entries: impl Iterator<Item = &'a [u8]>,
    range: &Range<u64>,
    superblock: &Superblock,
) -> Result<Vec<Run>, String> {
    let mut next = range.start;
    let mut runs = Vec::new();
    for entry in entries {
        let run = run_of(entry);
        let end = run.logical + run.blocks;
        if run.blocks == 0 || run.logical < next || end > range.end {
            return Err(format!(
                "extent of blocks {}..{end} is empty, out of order, or outside {}..{}",
                run.logical, range.start, range.end
            ));
        }
        if !superblock.contains(run.physical, run.blocks) {
            return Err(format!(
                "extent of {} blocks at {} is outside the filesystem",
                run.blocks, run.physical
            ));
        }
        next = end;
        runs.push(run);
    }
    Ok(runs)
}

fn index<'a>(
    entries: impl Iterator<Item = &'a [u8]>,
    range: &Range<u64>,
    superblock: &Superblock,
) -> Result<Vec<(Range<u64>, u64)>, String> {
    let mut children: Vec<(Range<u64>, u64)> = Vec::new();
    for entry in entries {
        let logical = u64::from(le32(entry, 0));
        let block = join(u32::from(le16(entry, 8)), le32(entry, 4));
        let previous = children.last().map(|(range, _)| range.start);
        if logical < range.start
            || logical >= range.end
            || previous.is_some_and(|start| start >= logical)
        {
            return Err(format!("index entry for block {logical} is out of order"));
        }
        if !superblock.contains(block, 1) {
            return Err(format!(
                "extent node at block {block} is outside the filesystem"
            ));
        }
        if let Some((range, _)) = children.last_mut() {
            range.end = logical;
        }
        children.push((logical..range.end, block));
    }
    Ok(children)
}

/// The most blocks that one written extent has.
pub const MAX_RUN_BLOCKS: u64 = MAX_WRITTEN as u64;
/// The most blocks that one unwritten extent has.
pub const MAX_UNWRITTEN_BLOCKS: u64 = MAX_RUN_BLOCKS - 1;

/// A child of an index: the first logical block that it maps, and its own block.
pub type Child = (u64, u64);

/// Entries that fit a node of so many bytes.
#[must_use]
pub fn capacity(bytes: usize) -> usize {
    (bytes - ENTRY_BYTES) / ENTRY_BYTES
}

/// Writes a leaf of `runs`, which fit, over the whole of `bytes`.
pub fn write_leaf(bytes: &mut [u8], runs: &[Run]) {
    write_header(bytes, runs.len(), 0);
    for (at, run) in (ENTRY_BYTES..).step_by(ENTRY_BYTES).zip(runs) {
        let unwritten = if run.unwritten { MAX_WRITTEN } else { 0 };
        put(bytes, at, &(run.logical as u32).to_le_bytes());
        put(
            bytes,
            at + 4,
            &(run.blocks as u16 + unwritten).to_le_bytes(),
        );
        put(bytes, at + 6, &((run.physical >> 32) as u16).to_le_bytes());
        put(bytes, at + 8, &(run.physical as u32).to_le_bytes());
    }
}

/// Writes an index of `children`, which fit, over the whole of `bytes`; `depth` is 1 above leaves.
pub fn write_index(bytes: &mut [u8], depth: u16, children: &[Child]) {
    write_header(bytes, children.len(), depth);
    for (at, (logical, block)) in (ENTRY_BYTES..).step_by(ENTRY_BYTES).zip(children) {
        put(bytes, at, &(*logical as u32).to_le_bytes());
        put(bytes, at + 4, &(*block as u32).to_le_bytes());
        put(bytes, at + 8, &((*block >> 32) as u16).to_le_bytes());
    }
}

fn write_header(bytes: &mut [u8], count: usize, depth: u16) {
    bytes.fill(0);
    for (at, value) in [
        (0, MAGIC),
        (2, count as u16),
        (4, capacity(bytes.len()) as u16),
        (6, depth),
    ] {
        put(bytes, at, &value.to_le_bytes());
    }
}

/// Levels below the node in `bytes`; 0: a leaf.
#[must_use]
pub fn depth(bytes: &[u8]) -> u16 {
    le16(bytes, 6)
}

/// The last entry of a checked node that starts at or before `logical`.
#[must_use]
pub fn find(bytes: &[u8], logical: u64) -> Option<usize> {
    let count = usize::from(le16(bytes, 2));
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = usize::midpoint(low, high);
        if u64::from(le32(bytes, (middle + 1) * ENTRY_BYTES)) <= logical {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    low.checked_sub(1)
}

/// Where entry `index` of a node starts; `None` behind the last.
#[must_use]
pub fn logical_of(bytes: &[u8], index: usize) -> Option<u64> {
    let count = usize::from(le16(bytes, 2));
    (index < count).then(|| u64::from(le32(bytes, (index + 1) * ENTRY_BYTES)))
}

/// Entry `index` of an index.
#[must_use]
pub fn child(bytes: &[u8], index: usize) -> Child {
    let entry = part(bytes, (index + 1) * ENTRY_BYTES, (index + 2) * ENTRY_BYTES);
    let block = join(u32::from(le16(entry, 8)), le32(entry, 4));
    (u64::from(le32(entry, 0)), block)
}

/// Entry `index` of a leaf.
#[must_use]
pub fn run(bytes: &[u8], index: usize) -> Run {
    run_of(part(
        bytes,
        (index + 1) * ENTRY_BYTES,
        (index + 2) * ENTRY_BYTES,
    ))
}

fn run_of(entry: &[u8]) -> Run {
    let stored = le16(entry, 4);
    let unwritten = stored > MAX_WRITTEN;
    let blocks = if unwritten {
        stored - MAX_WRITTEN
    } else {
        stored
    };
    Run {
        logical: u64::from(le32(entry, 0)),
        physical: join(u32::from(le16(entry, 6)), le32(entry, 8)),
        blocks: u64::from(blocks),
        unwritten,
    }
}

/// Puts the checksum behind the entries of a node in a block; `seed` is the inode's.
pub fn seal(block: &mut [u8], seed: u32) {
    let tail = tail(block);
    let crc = crc32c(seed, part(block, 0, tail));
    put(block, tail, &crc.to_le_bytes());
}

/// Behind the last place for an entry.
fn tail(block: &[u8]) -> usize {
    ENTRY_BYTES + usize::from(le16(block, 4)) * ENTRY_BYTES
}

/// The first logical block that the node in `bytes` names; `None` of an empty one.
#[must_use]
pub fn first_logical(bytes: &[u8]) -> Option<u64> {
    (le16(bytes, 2) > 0).then(|| u64::from(le32(bytes, ENTRY_BYTES)))
}

/// Whether a node in a block has the right checksum; `seed` is the inode's.
#[must_use]
pub fn checksum_matches(block: &[u8], seed: u32) -> bool {
    let tail = tail(block);
    tail + 4 <= block.len() && crc32c(seed, part(block, 0, tail)) == le32(block, tail)
}
