//! A directory with changes that are only thought: blocks are changed in memory until all is known to be possible.
//!
//! An operation drafts its directories, reserves what the drafts need, and then applies them in one handle.

use crate::ext4::cache::Block;
use crate::ext4::dir;
use crate::ext4::error::{Ext4Error, FsError, Place, Refusal};
use crate::ext4::features::{compat, incompat};
use crate::ext4::filesystem::Filesystem;
use crate::ext4::handle::Handle;
use crate::ext4::htree::{MAX_LEVELS, MAX_LEVELS_LARGE};
use crate::ext4::inode::{FLAG_INDEX, Kind};
use crate::ext4::inode_cell::InodeState;
use crate::ext4::mapping::{APPEND_BLOCKS, APPEND_CREDITS};
use crate::ext4::raw_inode::RawInode;
use std::collections::BTreeMap;

/// One directory, as it would be.
pub(super) struct Draft<'f> {
    pub(super) fs: &'f Filesystem,
    raw: RawInode,
    /// Where the checksums of its blocks start, if there are any.
    pub(super) seed: Option<u32>,
    /// With those that are new.
    pub(super) blocks: u64,
    old_blocks: u64,
    pub(super) indexed: bool,
    changed: BTreeMap<u64, Block>,
}

impl<'f> Draft<'f> {
    /// The directory as it is.
    ///
    /// # Errors
    /// [`Refusal::NotDirectory`]; [`Refusal::NotFound`] if it was removed.
    pub(super) fn of(fs: &'f Filesystem, state: &InodeState) -> Result<Self, FsError> {
        if state.raw.kind() != Some(Kind::Directory) {
            return Err(Refusal::NotDirectory.into());
        }
        if state.raw.links() == 0 {
            return Err(Refusal::NotFound.into());
        }
        let superblock = fs.superblock();
        let checksums = superblock.has_checksums();
        let blocks = state.raw.size_bytes() / u64::from(superblock.block_bytes);
        Ok(Self {
            fs,
            raw: state.raw.clone(),
            seed: checksums.then(|| state.raw.checksum_seed(superblock)),
            blocks,
            old_blocks: blocks,
            indexed: state.raw.has_flag(FLAG_INDEX)
                && superblock.features.has_compat(compat::DIR_INDEX),
            changed: BTreeMap::new(),
        })
    }

    pub(super) fn number(&self) -> u32 {
        self.raw.number()
    }

    pub(super) fn block_bytes(&self) -> usize {
        self.fs.superblock().block_bytes as usize
    }

    pub(super) fn stores_kinds(&self) -> bool {
        self.fs
            .superblock()
            .features
            .has_incompat(incompat::FILETYPE)
    }

    pub(super) fn max_levels(&self) -> u8 {
        match self
            .fs
            .superblock()
            .features
            .has_incompat(incompat::LARGE_DIR)
        {
            true => MAX_LEVELS_LARGE,
            false => MAX_LEVELS,
        }
    }

    pub(super) fn corrupt(&self, block: u64, problem: impl Into<String>) -> FsError {
        self.damage(block, problem).into()
    }

    fn damage(&self, block: u64, problem: impl Into<String>) -> Ext4Error {
        let inode = self.number();
        Ext4Error::corrupt(Place::Directory { inode, block }, problem)
    }

    /// A block of entries.
    pub(super) async fn leaf(&self, logical: u64) -> Result<Block, FsError> {
        self.block(logical, |bytes| match self.seed {
            Some(seed) if !dir::checksum_matches(bytes, seed) => {
                Err(self.damage(logical, "its checksum is wrong or missing"))
            }
            _ => Ok(()),
        })
        .await
    }

    /// A block of the index; whoever reads it checks it.
    pub(super) async fn node(&self, logical: u64) -> Result<Block, FsError> {
        self.block(logical, |_| Ok(())).await
    }

    async fn block(
        &self,
        logical: u64,
        check: impl FnOnce(&[u8]) -> Result<(), Ext4Error>,
    ) -> Result<Block, FsError> {
        if let Some(changed) = self.changed.get(&logical) {
            return Ok(changed.clone());
        }
        let physical = self.fs.map_block(&self.raw, logical).await?;
        let physical =
            physical.ok_or_else(|| self.corrupt(logical, "the block is not allocated"))?;
        self.fs.read_checked(physical, check).await
    }

    /// Changes a block, or the next one behind the end.
    pub(super) fn put(&mut self, logical: u64, bytes: Vec<u8>) {
        self.blocks = self.blocks.max(logical + 1);
        self.changed.insert(logical, bytes.into());
    }

    /// Blocks that [`Self::apply`] may change.
    pub(super) fn credits(&self) -> u32 {
        self.changed.len() as u32 + self.new_blocks() * APPEND_CREDITS
    }

    /// Blocks that [`Self::apply`] may allocate.
    pub(super) fn promise(&self) -> u32 {
        self.new_blocks() * APPEND_BLOCKS
    }

    fn new_blocks(&self) -> u32 {
        (self.blocks - self.old_blocks) as u32
    }

    /// Makes the changes in the directory, which is as it was when the draft was begun, and puts its inode.
    pub(super) async fn apply(
        self,
        handle: &mut Handle,
        directory: &mut InodeState,
    ) -> Result<(), FsError> {
        for _ in 0..self.new_blocks() {
            handle.append_directory_block(directory).await?;
        }
        for (logical, content) in &self.changed {
            let physical = self.fs.map_block(&directory.raw, *logical).await?;
            let physical = physical.ok_or_else(|| self.corrupt(*logical, "the block is gone"))?;
            handle
                .update(physical, |bytes| bytes.copy_from_slice(content))
                .await?;
        }
        if self.indexed {
            directory.raw.set_flags(directory.raw.flags() | FLAG_INDEX);
        }
        let now = self.fs.now();
        directory.raw.set_mtime(now);
        directory.raw.set_ctime(now);
        handle.put_inode(directory).await
    }
}
