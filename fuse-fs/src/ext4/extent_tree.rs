//! The extents of a file while it is mounted: finding a block, and changing a leaf wherever that leads.
//!
//! ```text
//! root in the inode (4 entries) -> index blocks -> leaves: runs in the order of the file
//! ```
//!
//! An index entry starts where its child starts. A leaf that becomes too large is split, one that becomes empty
//! is freed, and the change goes up until nothing changes; at the top the tree grows or shrinks by one level.

use crate::ext4::error::{Ext4Error, FsError, Place};
use crate::ext4::extent::{
    self, Child, LOGICAL_END, MAX_DEPTH, MAX_RUN_BLOCKS, MAX_UNWRITTEN_BLOCKS, Node, Run,
};
use crate::ext4::filesystem::Filesystem;
use crate::ext4::handle::Handle;
use crate::ext4::inode::{FLAG_EXTENTS, MAP_BYTES};
use crate::ext4::inode_cell::InodeState;
use crate::ext4::raw_inode::RawInode;
use std::ops::Range;

/// Blocks that one change of a leaf changes at most: a split on each level, a new root, and the bitmaps of the
/// new blocks.
pub const EDIT_CREDITS: u32 = 3 * (MAX_DEPTH as u32 + 2);
/// Blocks that one change of a leaf allocates at most.
pub const EDIT_BLOCKS: u32 = MAX_DEPTH as u32 + 2;

/// What stands at a block of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// From the block that was asked for on.
    Run(Run),
    /// So many blocks, at least, have nothing.
    Hole { blocks: u64 },
}

impl Mapping {
    #[must_use]
    pub fn blocks(&self) -> u64 {
        match self {
            Self::Run(run) => run.blocks,
            Self::Hole { blocks } => *blocks,
        }
    }
}

/// One index on the way to a leaf.
struct Step {
    /// `None`: the root.
    block: Option<u64>,
    depth: u16,
    children: Vec<Child>,
    chosen: usize,
}

/// A leaf, and how it was found.
struct Path {
    steps: Vec<Step>,
    /// `None`: the root is the leaf.
    block: Option<u64>,
    /// What the leaf maps.
    range: Range<u64>,
    runs: Vec<Run>,
}

impl Filesystem {
    /// What stands at block `logical` of the file with extents.
    ///
    /// # Errors
    /// The device's, and what is wrong with the tree.
    pub(super) async fn lookup_extent(
        &self,
        raw: &RawInode,
        logical: u64,
    ) -> Result<Mapping, FsError> {
        let mut end = LOGICAL_END;
        let mut start = 0;
        let mut node = self.root_node(raw)?;
        while extent::depth(&node) > 0 {
            let index = extent::find(&node, logical).unwrap_or(0);
            let (first, block) = extent::child(&node, index);
            if first > logical {
                let blocks = first - logical;
                return Ok(Mapping::Hole { blocks });
            }
            end = extent::logical_of(&node, index + 1).unwrap_or(end);
            start = start.max(first);
            let depth = extent::depth(&node) - 1;
            node = self.node(raw, block, depth, start..end).await?;
        }
        let next = match extent::find(&node, logical) {
            Some(index) => {
                let run = extent::run(&node, index);
                if logical < run.logical + run.blocks {
                    return Ok(Mapping::Run(from(run, logical)));
                }
                index + 1
            }
            None => 0,
        };
        let next = extent::logical_of(&node, next).unwrap_or(end);
        let blocks = next - logical;
        Ok(Mapping::Hole { blocks })
    }

    fn root_node(&self, raw: &RawInode) -> Result<crate::ext4::cache::Block, FsError> {
        let checked = Node::read(raw.map(), None, &(0..LOGICAL_END), self.superblock());
        match checked {
            Ok(_) => Ok(raw.map().into()),
            Err(problem) => Err(corrupt(raw, problem)),
        }
    }

    async fn node(
        &self,
        raw: &RawInode,
        block: u64,
        depth: u16,
        range: Range<u64>,
    ) -> Result<crate::ext4::cache::Block, FsError> {
        let superblock = self.superblock();
        let place = Place::Inode(raw.number());
        let check = |bytes: &[u8]| {
            let seed = raw.checksum_seed(superblock);
            if superblock.has_checksums() && !extent::checksum_matches(bytes, seed) {
                let problem = format!("extent node at block {block} has a wrong checksum");
                return Err(Ext4Error::corrupt(place, problem));
            }
            let node = Node::read(bytes, Some(depth), &range, superblock);
            node.map(|_| ())
                .map_err(|problem| Ext4Error::corrupt(place, problem))
        };
        let bytes = self.read_checked(block, check).await?;
        // What was found right as a part of another tree may not be one here.
        if extent::depth(&bytes) != depth {
            return Err(corrupt(raw, format!("block {block} is no node of its map")));
        }
        Ok(bytes)
    }

    async fn path(&self, raw: &RawInode, logical: u64) -> Result<Path, FsError> {
        let mut range = 0..LOGICAL_END;
        let mut block = None;
        let mut node = self.root_node(raw)?;
        let mut steps = Vec::new();
        while extent::depth(&node) > 0 {
            let depth = extent::depth(&node);
            let count = (0..).take_while(|at| extent::logical_of(&node, *at).is_some());
            let children: Vec<Child> = count.map(|at| extent::child(&node, at)).collect();
            let chosen = extent::find(&node, logical).unwrap_or(0);
            let (first, child) = children[chosen];
            if chosen > 0 {
                range.start = first;
            }
            if let Some((next, _)) = children.get(chosen + 1) {
                range.end = *next;
            }
            steps.push(Step {
                block,
                depth,
                children,
                chosen,
            });
            block = Some(child);
            let checked = range.start.max(first)..range.end;
            node = self.node(raw, child, depth - 1, checked).await?;
        }
        let count = (0..).take_while(|at| extent::logical_of(&node, *at).is_some());
        let runs = count.map(|at| extent::run(&node, at)).collect();
        Ok(Path {
            steps,
            block,
            range,
            runs,
        })
    }
}

impl Handle {
    /// Changes the runs of the leaf that maps `logical`, with `edit`, and says where the leaf's part of the file
    /// ends. The runs stay in order, inside that part; neighbours are joined here. Does not put the inode.
    ///
    /// # Errors
    /// The device's, and what is wrong with the tree.
    pub(super) async fn edit_extents(
        &mut self,
        inode: &mut InodeState,
        logical: u64,
        edit: impl FnOnce(&mut Vec<Run>, Range<u64>),
    ) -> Result<u64, FsError> {
        if !inode.raw.has_flag(FLAG_EXTENTS) {
            let problem = "its blocks are not mapped by extents".to_owned();
            return Err(corrupt(&inode.raw, problem));
        }
        let path = self.filesystem().path(&inode.raw, logical).await?;
        let Path {
            mut steps,
            block,
            range,
            mut runs,
        } = path;
        let last_before = runs.last().map(|run| run.logical);
        edit(&mut runs, range.clone());
        let runs = joined(&runs);
        let appended = runs.last().map(|run| run.logical) != last_before;
        let goal = runs.first().map_or(0, |run| run.physical);
        let mut level = match block {
            None => self.put_root_leaf(inode, runs, goal).await?,
            Some(block) => self.put_leaf(inode, block, &runs, appended, goal).await?,
        };
        while let Some(mut step) = steps.pop() {
            let same = level == step.children[step.chosen..=step.chosen];
            if same {
                break;
            }
            let at_end = appended && step.chosen + 1 == step.children.len();
            let chosen = step.chosen..=step.chosen;
            step.children.splice(chosen, level);
            level = match step.block {
                None => {
                    self.put_root_index(inode, step.depth, step.children, goal)
                        .await?;
                    break;
                }
                Some(block) => {
                    let depth = step.depth;
                    self.put_index(inode, block, depth, &step.children, at_end, goal)
                        .await?
                }
            };
        }
        self.shrink(inode).await?;
        Ok(range.end)
    }

    /// Puts a leaf where it was and, if it has grown too large, in new blocks; what its index shall name.
    async fn put_leaf(
        &mut self,
        inode: &mut InodeState,
        block: u64,
        runs: &[Run],
        appended: bool,
        goal: u64,
    ) -> Result<Vec<Child>, FsError> {
        if runs.is_empty() {
            self.free_node(inode, block).await?;
            return Ok(Vec::new());
        }
        let mut children = Vec::new();
        let mut block = Some(block);
        for piece in pieces(runs, self.node_capacity(), appended) {
            let (block, new) = self.node_block(inode, block.take(), goal).await?;
            self.put_node(inode, block, new, |bytes| extent::write_leaf(bytes, piece))
                .await?;
            children.push((piece[0].logical, block));
        }
        Ok(children)
    }

    async fn put_index(
        &mut self,
        inode: &mut InodeState,
        block: u64,
        depth: u16,
        entries: &[Child],
        appended: bool,
        goal: u64,
    ) -> Result<Vec<Child>, FsError> {
        if entries.is_empty() {
            self.free_node(inode, block).await?;
            return Ok(Vec::new());
        }
        let mut children = Vec::new();
        let mut block = Some(block);
        for piece in pieces(entries, self.node_capacity(), appended) {
            let (block, new) = self.node_block(inode, block.take(), goal).await?;
            let write = |bytes: &mut [u8]| extent::write_index(bytes, depth, piece);
            self.put_node(inode, block, new, write).await?;
            children.push((piece[0].0, block));
        }
        Ok(children)
    }

    /// Puts a leaf that is the root; one that is too large goes a level down.
    async fn put_root_leaf(
        &mut self,
        inode: &mut InodeState,
        runs: Vec<Run>,
        goal: u64,
    ) -> Result<Vec<Child>, FsError> {
        if runs.len() <= extent::capacity(MAP_BYTES) {
            extent::write_leaf(inode.raw.map_mut(), &runs);
        } else {
            let (block, _) = self.node_block(inode, None, goal).await?;
            let children = self.put_leaf(inode, block, &runs, true, goal).await?;
            self.put_root_index(inode, 1, children, goal).await?;
        }
        Ok(Vec::new())
    }

    /// Puts an index that is the root; one that is too large goes a level down, an empty one becomes a leaf.
    async fn put_root_index(
        &mut self,
        inode: &mut InodeState,
        depth: u16,
        children: Vec<Child>,
        goal: u64,
    ) -> Result<(), FsError> {
        let (mut depth, mut children) = (depth, children);
        while children.len() > extent::capacity(MAP_BYTES) {
            let (block, _) = self.node_block(inode, None, goal).await?;
            children = self
                .put_index(inode, block, depth, &children, true, goal)
                .await?;
            depth += 1;
        }
        if depth > MAX_DEPTH {
            let problem = "its map is deeper than any can be".to_owned();
            return Err(corrupt(&inode.raw, problem));
        }
        let map = inode.raw.map_mut();
        if children.is_empty() {
            extent::write_leaf(map, &[]);
        } else {
            extent::write_index(map, depth, &children);
        }
        Ok(())
    }

    /// Moves what the only child of the root holds into the root, if it fits.
    async fn shrink(&mut self, inode: &mut InodeState) -> Result<(), FsError> {
        loop {
            let map = inode.raw.map();
            let depth = extent::depth(map);
            if depth == 0 || extent::logical_of(map, 1).is_some() {
                return Ok(());
            }
            let (_, block) = extent::child(map, 0);
            let bytes = self.read_block(block).await?;
            let count = (0..).take_while(|at| extent::logical_of(&bytes, *at).is_some());
            let count = count.count();
            if count > extent::capacity(MAP_BYTES) {
                return Ok(());
            }
            let map = inode.raw.map_mut();
            if depth == 1 {
                let runs: Vec<Run> = (0..count).map(|at| extent::run(&bytes, at)).collect();
                extent::write_leaf(map, &runs);
            } else {
                let children: Vec<Child> = (0..count).map(|at| extent::child(&bytes, at)).collect();
                extent::write_index(map, depth - 1, &children);
            }
            self.free_node(inode, block).await?;
        }
    }

    fn node_capacity(&self) -> usize {
        let superblock = self.filesystem().superblock();
        extent::capacity(superblock.block_bytes as usize)
    }

    /// `block`, or a new one.
    async fn node_block(
        &mut self,
        inode: &mut InodeState,
        block: Option<u64>,
        goal: u64,
    ) -> Result<(u64, bool), FsError> {
        if let Some(block) = block {
            return Ok((block, false));
        }
        let block = self.allocate_blocks(goal, 1).await?.start;
        inode.raw.add_blocks(1);
        // Whoever writes over it now finds it.
        self.create(block, |_| ());
        Ok((block, true))
    }

    async fn put_node(
        &mut self,
        inode: &InodeState,
        block: u64,
        new: bool,
        write: impl FnOnce(&mut [u8]),
    ) -> Result<(), FsError> {
        let superblock = self.filesystem().superblock();
        let seed = superblock
            .has_checksums()
            .then(|| inode.raw.checksum_seed(superblock));
        let write = |bytes: &mut [u8]| {
            write(bytes);
            if let Some(seed) = seed {
                extent::seal(bytes, seed);
            }
        };
        if new {
            self.create(block, write);
            Ok(())
        } else {
            self.update(block, write).await
        }
    }

    async fn free_node(&mut self, inode: &mut InodeState, block: u64) -> Result<(), FsError> {
        inode.raw.subtract_blocks(1);
        self.free_metadata(block).await
    }
}

fn corrupt(raw: &RawInode, problem: String) -> FsError {
    Ext4Error::corrupt(Place::Inode(raw.number()), problem).into()
}

/// The part of `run` from `logical` on.
pub(super) fn from(run: Run, logical: u64) -> Run {
    let skipped = logical - run.logical;
    Run {
        logical,
        physical: run.physical + skipped,
        blocks: run.blocks - skipped,
        unwritten: run.unwritten,
    }
}

/// Runs without empty ones, joined where they continue each other, and none longer than an extent can be.
fn joined(runs: &[Run]) -> Vec<Run> {
    let mut result: Vec<Run> = Vec::with_capacity(runs.len());
    for run in runs.iter().filter(|run| run.blocks > 0) {
        match result.last_mut() {
            Some(last)
                if last.logical + last.blocks == run.logical
                    && last.physical + last.blocks == run.physical
                    && last.unwritten == run.unwritten =>
            {
                last.blocks += run.blocks;
            }
            _ => result.push(*run),
        }
    }
    result.into_iter().flat_map(cut).collect()
}

fn cut(run: Run) -> impl Iterator<Item = Run> {
    let most = if run.unwritten {
        MAX_UNWRITTEN_BLOCKS
    } else {
        MAX_RUN_BLOCKS
    };
    let starts = (0..run.blocks).step_by(most as usize);
    starts.map(move |skipped| Run {
        logical: run.logical + skipped,
        physical: run.physical + skipped,
        blocks: most.min(run.blocks - skipped),
        unwritten: run.unwritten,
    })
}

/// Cuts entries into nodes: full ones where a file grows at its end, else such with room.
fn pieces<T>(entries: &[T], capacity: usize, appended: bool) -> std::slice::Chunks<'_, T> {
    let nodes = entries.len().div_ceil(capacity).max(1);
    let size = if appended {
        capacity
    } else {
        entries.len().div_ceil(nodes)
    };
    entries.chunks(size.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(logical: u64, physical: u64, blocks: u64, unwritten: bool) -> Run {
        Run {
            logical,
            physical,
            blocks,
            unwritten,
        }
    }

    #[test]
    fn neighbours_are_joined_as_far_as_an_extent_goes() {
        let runs = [
            run(0, 100, 4, false),
            run(4, 104, 4, false),
            run(8, 108, 0, false),
            run(8, 108, 2, true),
            run(11, 111, 70_000, false),
        ];
        let expected = [
            run(0, 100, 8, false),
            run(8, 108, 2, true),
            run(11, 111, 32_768, false),
            run(32_779, 32_879, 32_768, false),
            run(65_547, 65_647, 4_464, false),
        ];
        assert_eq!(joined(&runs), expected);
        assert_eq!(joined(&[run(0, 1, 32_768, true)]).len(), 2);
    }
}
