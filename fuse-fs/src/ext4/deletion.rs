//! Giving up blocks of a file, from its end, in steps of bounded size; and whole files that have no name.
//!
//! Between two steps a crash may come. Who shortens a file puts it on the list of orphans first; the next mount
//! goes on.

use crate::ext4::error::FsError;
use crate::ext4::extent::{LOGICAL_END, MAX_RUN_BLOCKS, Run};
use crate::ext4::extent_tree::{EDIT_BLOCKS, EDIT_CREDITS, from};
use crate::ext4::filesystem::Filesystem;
use crate::ext4::handle::Handle;
use crate::ext4::inode::{FLAG_EXTENTS, Kind};
use crate::ext4::inode_cell::{InodeCell, InodeState};
use std::ops::Range;
use std::sync::Arc;

/// Extents that one step frees, and blocks of metadata (each is revoked).
const RUNS_PER_STEP: usize = 8;
const METADATA_PER_STEP: u64 = 256;

impl Filesystem {
    /// Frees the blocks of a file from `first` on, in as many transactions as that takes.
    pub(super) async fn free_from(
        &self,
        inode: &mut InodeState,
        first: u64,
    ) -> Result<(), FsError> {
        let mut left = first..LOGICAL_END;
        while !left.is_empty() {
            let mut handle = self
                .begin_with_headroom(self.step_credits(), EDIT_BLOCKS)
                .await?;
            left.end = handle.free_step(inode, left.clone()).await?;
            handle.put_inode(inode).await?;
            let _ = handle.finish();
        }
        Ok(())
    }

    /// Blocks of metadata that [`Handle::free_step`] and putting the inode change.
    pub(super) fn step_credits(&self) -> u32 {
        let groups = MAX_RUN_BLOCKS as u32 / self.superblock().blocks_per_group + 2;
        EDIT_CREDITS + RUNS_PER_STEP as u32 * groups + 1
    }

    /// Frees data and inode of a file without a name: at the last close.
    ///
    /// # Errors
    /// The device's, and what is wrong with the file's map.
    pub async fn free_orphan(&self, cell: &Arc<InodeCell>) -> Result<(), FsError> {
        let _no_flush = cell.lock_flush().await;
        let mut inode = cell.write().await;
        if inode.freed || inode.raw.links() > 0 {
            return Ok(());
        }
        self.drop_dirty(&mut inode, 0..LOGICAL_END);
        inode.data.size_bytes = None;
        self.ensure_extents(&mut inode).await?;
        if inode.raw.has_flag(FLAG_EXTENTS) {
            inode.raw.set_size_bytes(0);
            self.free_from(&mut inode, 0).await?;
        }
        let mut handle = self.begin_with_headroom(2 * EDIT_CREDITS, 0).await?;
        self.release_xattr_block(&mut handle, &mut inode).await?;
        handle.orphan_remove(&mut inode).await?;
        handle.free_inode(&mut inode).await?;
        let _ = handle.finish();
        Ok(())
    }

    /// Frees what the last mount left behind: deleted files, and what is behind the ends of shortened ones.
    pub(super) async fn clean_orphan(&self, number: u32) -> Result<(), FsError> {
        let raw = self.read_raw(number).await?;
        if raw.mode() == 0 {
            return Ok(());
        }
        let cell = self.inode(number).await?;
        if raw.links() == 0 {
            return self.free_orphan(&cell).await;
        }
        let mut inode = cell.write().await;
        if inode.raw.kind() == Some(Kind::Regular) {
            self.ensure_extents(&mut inode).await?;
            let block_bytes = u64::from(self.superblock().block_bytes);
            let first = inode.raw.size_bytes().div_ceil(block_bytes);
            self.free_from(&mut inode, first).await?;
        }
        let mut handle = self.begin_with_headroom(EDIT_CREDITS, 0).await?;
        handle.orphan_remove(&mut inode).await?;
        let _ = handle.finish();
        Ok(())
    }
}

impl Handle {
    /// Frees some of the blocks in `range` (not empty) of a file, from the end; from where on nothing is left.
    pub(super) async fn free_step(
        &mut self,
        inode: &mut InodeState,
        range: Range<u64>,
    ) -> Result<u64, FsError> {
        let metadata = inode.raw.kind() != Some(Kind::Regular);
        let most = if metadata {
            METADATA_PER_STEP
        } else {
            LOGICAL_END
        };
        let (mut freed, mut next) = (Vec::new(), range.start);
        let take = |runs: &mut Vec<Run>, part: Range<u64>| {
            freed = take_back(runs, &range, most);
            let left = runs.iter().any(|run| overlap(run, &range).is_some());
            next = match freed.last() {
                Some(run) if left => run.logical,
                _ => part.start.max(range.start),
            };
        };
        self.edit_extents(inode, range.end - 1, take).await?;
        for run in &freed {
            inode.raw.subtract_blocks(run.blocks);
            let blocks = run.physical..run.physical + run.blocks;
            if metadata {
                for block in blocks {
                    self.free_metadata(block).await?;
                }
            } else {
                self.free_blocks(blocks).await?;
            }
        }
        Ok(next)
    }
}

/// Takes from the end of `runs` what lies in `range`: some runs, and at most `most` blocks.
fn take_back(runs: &mut Vec<Run>, range: &Range<u64>, most: u64) -> Vec<Run> {
    let (mut taken, mut left) = (Vec::new(), most);
    let mut index = runs.len();
    while index > 0 && taken.len() < RUNS_PER_STEP && left > 0 {
        index -= 1;
        let Some(mut inside) = overlap(&runs[index], range) else {
            continue;
        };
        if inside.blocks > left {
            inside = from(inside, inside.logical + inside.blocks - left);
        }
        left -= inside.blocks;
        taken.push(inside);
        let whole = runs[index];
        let end = inside.logical + inside.blocks;
        runs[index].blocks = inside.logical - whole.logical;
        if end < whole.logical + whole.blocks {
            runs.insert(index + 1, from(whole, end));
        }
    }
    runs.retain(|run| run.blocks > 0);
    taken
}

/// The part of `run` in `range`.
fn overlap(run: &Run, range: &Range<u64>) -> Option<Run> {
    let first = run.logical.max(range.start);
    let end = (run.logical + run.blocks).min(range.end);
    (first < end).then(|| {
        let mut inside = from(*run, first);
        inside.blocks = end - first;
        inside
    })
}
