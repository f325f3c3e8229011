//! From an inode to the blocks of its file: extent trees of every depth, and the indirect blocks of ext2 and ext3.
//!
//! A walk ends on any input: an extent node maps a part of what its parent maps, so no node is met twice, and
//! of indirect blocks the visitor refuses those it has seen.

use crate::ext4::bytes::le32;
use crate::ext4::error::{Ext4Error, Place};
use crate::ext4::extent::{self, LOGICAL_END, Node, Run};
use crate::ext4::image::Image;
use crate::ext4::inode::{FLAG_EXTENTS, Inode};
use std::ops::Range;

const DIRECT_BLOCKS: usize = 12;
/// Levels of the three pointers behind the direct ones.
const LEVELS: u32 = 3;
const POINTER_BYTES: u32 = 4;

/// Learns what a map consists of.
pub trait Visitor {
    /// A block that holds a part of the map; whether to follow it.
    fn node(&mut self, block: u64) -> bool;
    fn run(&mut self, run: Run);
    /// A part of the map cannot be used.
    fn problem(&mut self, problem: String);
}

/// Shows the whole map of `inode` to `visitor`, in the order of the file.
///
/// # Errors
/// Only the device's; what is wrong with the map goes to the visitor.
pub async fn walk<V: Visitor>(
    image: &Image<'_>,
    inode: &Inode,
    visitor: &mut V,
) -> Result<(), Ext4Error> {
    if inode.has_flag(FLAG_EXTENTS) {
        walk_extents(image, inode, visitor).await
    } else {
        walk_pointers(image, inode, visitor).await
    }
}

/// The runs of a file whose map has to be right.
///
/// # Errors
/// [`Ext4Error::Corrupt`] with what is wrong, or the device's.
pub async fn runs(image: &Image<'_>, inode: &Inode) -> Result<Vec<Run>, Ext4Error> {
    let mut strict = Strict::default();
    walk(image, inode, &mut strict).await?;
    match strict.problem {
        Some(problem) => Err(Ext4Error::corrupt(Place::Inode(inode.number), problem)),
        None => Ok(strict.runs),
    }
}

#[derive(Default)]
struct Strict {
    runs: Vec<Run>,
    seen: std::collections::HashSet<u64>,
    problem: Option<String>,
}

impl Visitor for Strict {
    fn node(&mut self, block: u64) -> bool {
        let new = self.seen.insert(block);
        if !new {
            self.problem(format!("block {block} is twice in its map"));
        }
        new
    }

    fn run(&mut self, run: Run) {
        self.runs.push(run);
    }

    fn problem(&mut self, problem: String) {
        self.problem.get_or_insert(problem);
    }
}

async fn walk_extents<V: Visitor>(
    image: &Image<'_>,
    inode: &Inode,
    visitor: &mut V,
) -> Result<(), Ext4Error> {
    // What is still to be visited, the next last: parts of the file, depth and block of the node for each.
    let mut pending: Vec<(Range<u64>, u16, u64)> = Vec::new();
    let root = Node::read(&inode.map, None, &(0..LOGICAL_END), &image.superblock);
    expand(root, visitor, &mut pending);
    while let Some((range, depth, block)) = pending.pop() {
        if !visitor.node(block) {
            continue;
        }
        let bytes = image.block(block).await?;
        if image.superblock.has_checksums()
            && !extent::checksum_matches(&bytes, inode.checksum_seed)
        {
            visitor.problem(format!("extent node at block {block} has a wrong checksum"));
        }
        let node = Node::read(&bytes, Some(depth), &range, &image.superblock)
            .map_err(|problem| format!("{problem} (node at block {block})"));
        if node.is_ok() && extent::first_logical(&bytes) != Some(range.start) {
            visitor.problem(format!(
                "extent node at block {block} does not start where its parent says, at {}",
                range.start
            ));
        }
        expand(node, visitor, &mut pending);
    }
    Ok(())
}

fn expand<V: Visitor>(
    node: Result<Node, String>,
    visitor: &mut V,
    pending: &mut Vec<(Range<u64>, u16, u64)>,
) {
    match node {
        Ok(Node::Leaf(runs)) => runs.into_iter().for_each(|run| visitor.run(run)),
        Ok(Node::Index { depth, children }) => {
            let child = |(range, block)| (range, depth - 1, block);
            pending.extend(children.into_iter().rev().map(child));
        }
        Err(problem) => visitor.problem(problem),
    }
}

async fn walk_pointers<V: Visitor>(
    image: &Image<'_>,
    inode: &Inode,
    visitor: &mut V,
) -> Result<(), Ext4Error> {
    let fan = u64::from(image.superblock.block_bytes / POINTER_BYTES);
    let mut merged = Merged::default();
    // The next last: logical block, level (0: data), pointer.
    let mut pending = Vec::new();
    let mut logical = 0;
    for slot in 0..DIRECT_BLOCKS + LEVELS as usize {
        let level = (slot + 1).saturating_sub(DIRECT_BLOCKS) as u32;
        pending.push((
            logical,
            level,
            le32(&inode.map, slot * POINTER_BYTES as usize),
        ));
        logical += fan.pow(level);
    }
    pending.reverse();
    while let Some((logical, level, pointer)) = pending.pop() {
        let block = u64::from(pointer);
        if pointer == 0 {
            continue;
        }
        if !image.superblock.contains(block, 1) {
            visitor.problem(format!(
                "block {logical} of the file at {block}, outside the filesystem"
            ));
        } else if level == 0 {
            merged.push(logical, block, visitor);
        } else if visitor.node(block) {
            let bytes = image.block(block).await?;
            let step = fan.pow(level - 1);
            let pointers = bytes.chunks_exact(POINTER_BYTES as usize).enumerate();
            let child = |(at, chunk): (usize, &[u8])| {
                (logical + at as u64 * step, level - 1, le32(chunk, 0))
            };
            pending.extend(
                pointers
                    .map(child)
                    .filter(|(_, _, pointer)| *pointer != 0)
                    .rev(),
            );
        }
    }
    merged.finish(visitor);
    Ok(())
}

/// Joins single blocks to runs.
#[derive(Default)]
struct Merged {
    open: Option<Run>,
}

impl Merged {
    fn push<V: Visitor>(&mut self, logical: u64, physical: u64, visitor: &mut V) {
        match &mut self.open {
            Some(run)
                if run.logical + run.blocks == logical && run.physical + run.blocks == physical =>
            {
                run.blocks += 1;
            }
            _ => {
                self.finish(visitor);
                let (blocks, unwritten) = (1, false);
                self.open = Some(Run {
                    logical,
                    physical,
                    blocks,
                    unwritten,
                });
            }
        }
    }

    fn finish<V: Visitor>(&mut self, visitor: &mut V) {
        if let Some(run) = self.open.take() {
            visitor.run(run);
        }
    }
}
