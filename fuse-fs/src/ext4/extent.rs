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
        let stored = le16(entry, 4);
        let unwritten = stored > MAX_WRITTEN;
        let run = Run {
            logical: u64::from(le32(entry, 0)),
            physical: join(u32::from(le16(entry, 6)), le32(entry, 8)),
            blocks: u64::from(if unwritten {
                stored - MAX_WRITTEN
            } else {
                stored
            }),
            unwritten,
        };
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

/// Writes a leaf of `runs`, which fit and are written, over the whole of `bytes`.
pub fn write_leaf(bytes: &mut [u8], runs: &[Run]) {
    write_header(bytes, runs.len(), 0);
    for (at, run) in (ENTRY_BYTES..).step_by(ENTRY_BYTES).zip(runs) {
        put(bytes, at, &(run.logical as u32).to_le_bytes());
        put(bytes, at + 4, &(run.blocks as u16).to_le_bytes());
        put(bytes, at + 6, &((run.physical >> 32) as u16).to_le_bytes());
        put(bytes, at + 8, &(run.physical as u32).to_le_bytes());
    }
}

/// Writes an index with one child, which maps the whole file, over the whole of `bytes`.
pub fn write_index_of_one(bytes: &mut [u8], child: u64) {
    write_header(bytes, 1, 1);
    put(bytes, ENTRY_BYTES + 4, &(child as u32).to_le_bytes());
    put(
        bytes,
        ENTRY_BYTES + 8,
        &((child >> 32) as u16).to_le_bytes(),
    );
}

fn write_header(bytes: &mut [u8], count: usize, depth: u16) {
    bytes.fill(0);
    let capacity = (bytes.len() - ENTRY_BYTES) / ENTRY_BYTES;
    for (at, value) in [
        (0, MAGIC),
        (2, count as u16),
        (4, capacity as u16),
        (6, depth),
    ] {
        put(bytes, at, &value.to_le_bytes());
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
