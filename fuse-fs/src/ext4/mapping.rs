//! From a block of a mounted file to its place, by extents or by the pointers of ext2 and ext3.

use crate::ext4::bytes::le32;
use crate::ext4::error::{Ext4Error, FsError, Place};
use crate::ext4::extent::{LOGICAL_END, Run};
use crate::ext4::extent_tree::{EDIT_BLOCKS, EDIT_CREDITS, Mapping};
use crate::ext4::filesystem::Filesystem;
use crate::ext4::handle::Handle;
use crate::ext4::inode::FLAG_EXTENTS;
use crate::ext4::inode_cell::InodeState;
use crate::ext4::raw_inode::RawInode;

const DIRECT_BLOCKS: u64 = 12;
const POINTER_BYTES: u64 = 4;
const LEVELS: u32 = 3;

/// Blocks of metadata that one more block of a directory changes, and those that it allocates.
pub const APPEND_CREDITS: u32 = EDIT_CREDITS + 3;
pub const APPEND_BLOCKS: u32 = EDIT_BLOCKS + 1;

impl Filesystem {
    /// What stands at block `logical` of a file.
    ///
    /// # Errors
    /// The device's, and what is wrong with the map.
    pub async fn lookup(&self, raw: &RawInode, logical: u64) -> Result<Mapping, FsError> {
        if logical >= LOGICAL_END {
            return Err(FsError::TooLarge);
        }
        if raw.has_flag(FLAG_EXTENTS) {
            self.lookup_extent(raw, logical).await
        } else {
            self.lookup_pointer(raw, logical).await
        }
    }

    /// Where block `logical` of a directory or symbolic link is; `None` in a hole.
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub async fn map_block(&self, raw: &RawInode, logical: u64) -> Result<Option<u64>, FsError> {
        Ok(match self.lookup(raw, logical).await? {
            Mapping::Run(run) if !run.unwritten => Some(run.physical),
            _ => None,
        })
    }

    async fn lookup_pointer(&self, raw: &RawInode, logical: u64) -> Result<Mapping, FsError> {
        let fan = u64::from(self.superblock().block_bytes) / POINTER_BYTES;
        let (mut within, mut level) = (logical, 0);
        let mut pointer = if logical < DIRECT_BLOCKS {
            le32(raw.map(), (logical * POINTER_BYTES) as usize)
        } else {
            within -= DIRECT_BLOCKS;
            level = 1;
            while level < LEVELS && within >= fan.pow(level) {
                within -= fan.pow(level);
                level += 1;
            }
            if within >= fan.pow(level) {
                return Err(FsError::TooLarge);
            }
            let slot = DIRECT_BLOCKS + u64::from(level) - 1;
            le32(raw.map(), (slot * POINTER_BYTES) as usize)
        };
        while level > 0 && pointer != 0 {
            level -= 1;
            let block = self.read_block(self.inside(raw, pointer)?).await?;
            let index = within / fan.pow(level) % fan;
            pointer = le32(&block, (index * POINTER_BYTES) as usize);
        }
        if pointer == 0 {
            let size = fan.pow(level);
            let blocks = size - within % size;
            return Ok(Mapping::Hole { blocks });
        }
        Ok(Mapping::Run(Run {
            logical,
            physical: self.inside(raw, pointer)?,
            blocks: 1,
            unwritten: false,
        }))
    }

    pub(super) fn inside(&self, raw: &RawInode, pointer: u32) -> Result<u64, FsError> {
        let block = u64::from(pointer);
        if self.superblock().contains(block, 1) {
            return Ok(block);
        }
        let problem = format!("its map names block {block}, outside the filesystem");
        Err(Ext4Error::corrupt(Place::Inode(raw.number()), problem).into())
    }

    /// Where block `logical` of a file should stand: behind the one before, or near its inode.
    pub(super) async fn goal(&self, raw: &RawInode, logical: u64) -> Result<u64, FsError> {
        if let Some(before) = logical.checked_sub(1)
            && let Mapping::Run(run) = self.lookup(raw, before).await?
        {
            return Ok(run.physical + 1);
        }
        let group = self.superblock().inode_place(raw.number());
        Ok(self
            .superblock()
            .group_first(group.map_or(0, |(group, _)| group)))
    }
}

impl Handle {
    /// Adds a block of zeros to a directory (or to a symbolic link, which has none yet), and puts the inode. It
    /// takes [`APPEND_CREDITS`] and [`APPEND_BLOCKS`]; [`Filesystem::ensure_extents`] comes before.
    ///
    /// # Errors
    /// The device's, and what is wrong with the map.
    pub async fn append_directory_block(
        &mut self,
        inode: &mut InodeState,
    ) -> Result<(u64, u64), FsError> {
        let block_bytes = u64::from(self.filesystem().superblock().block_bytes);
        let logical = inode.raw.size_bytes().div_ceil(block_bytes);
        let goal = self.filesystem().clone().goal(&inode.raw, logical).await?;
        let physical = self.allocate_blocks(goal, 1).await?.start;
        self.create(physical, |_| ());
        self.insert_run(inode, logical, physical, 1, false).await?;
        inode.raw.set_size_bytes((logical + 1) * block_bytes);
        self.put_inode(inode).await?;
        Ok((logical, physical))
    }

    /// Maps blocks that were allocated, where the file has a hole. Does not put the inode.
    pub(super) async fn insert_run(
        &mut self,
        inode: &mut InodeState,
        logical: u64,
        physical: u64,
        blocks: u64,
        unwritten: bool,
    ) -> Result<(), FsError> {
        let run = Run {
            logical,
            physical,
            blocks,
            unwritten,
        };
        inode.raw.add_blocks(blocks);
        let insert = |runs: &mut Vec<Run>, _| {
            let at = runs.partition_point(|other| other.logical < logical);
            runs.insert(at, run);
        };
        self.edit_extents(inode, logical, insert).await?;
        Ok(())
    }
}
