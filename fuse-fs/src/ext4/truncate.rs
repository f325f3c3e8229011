//! Changing the size of a file. Behind the end nothing old is left: not in the last block, and no block.

use crate::ext4::error::FsError;
use crate::ext4::extent::LOGICAL_END;
use crate::ext4::extent_tree::{EDIT_BLOCKS, Mapping};
use crate::ext4::file_data::Page;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::inode_cell::{InodeCell, InodeState};
use crate::ext4::journal::log;
use crate::ext4::write::{check_regular, patched};
use std::sync::Arc;

impl Filesystem {
    /// Gives a file a size; times become now.
    ///
    /// # Errors
    /// [`FsError::TooLarge`], the device's, what is wrong with the map.
    pub async fn truncate(&self, cell: &Arc<InodeCell>, size_bytes: u64) -> Result<(), FsError> {
        self.check_writable()?;
        if size_bytes > self.max_file_bytes() {
            return Err(FsError::TooLarge);
        }
        let _no_flush = cell.lock_flush().await;
        let mut inode = cell.write().await;
        check_regular(&inode)?;
        self.ensure_extents(&mut inode).await?;
        let now = self.now();
        inode.raw.set_mtime(now);
        inode.raw.set_ctime(now);
        if size_bytes < inode.size_bytes() {
            self.shorten(&mut inode, size_bytes).await
        } else {
            self.lengthen(&mut inode, size_bytes).await
        }
    }

    /// The bytes between are zeros: a hole, or unwritten, or the zeros behind the end of a block.
    pub(super) async fn lengthen(
        &self,
        inode: &mut InodeState,
        size_bytes: u64,
    ) -> Result<(), FsError> {
        if size_bytes > inode.size_bytes() {
            self.zero_behind_end(inode).await?;
        }
        let mut handle = self.begin_with_headroom(1, 0).await?;
        if size_bytes > inode.size_bytes() {
            inode.raw.set_size_bytes(size_bytes);
            inode.data.size_bytes = None;
        }
        handle.put_inode(inode).await?;
        inode.data_tid = handle.finish();
        Ok(())
    }

    async fn shorten(&self, inode: &mut InodeState, size_bytes: u64) -> Result<(), FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        self.zero_tail(inode, size_bytes).await?;
        let first = size_bytes.div_ceil(block_bytes);
        self.drop_dirty(inode, first..LOGICAL_END);
        let mut handle = self
            .begin_with_headroom(self.step_credits() + 2, EDIT_BLOCKS)
            .await?;
        let disk_size = inode.raw.size_bytes().min(size_bytes);
        inode.raw.set_size_bytes(disk_size);
        inode.set_visible_size(size_bytes);
        let mut left = first..LOGICAL_END;
        left.end = handle.free_step(inode, left.clone()).await?;
        if left.is_empty() {
            handle.put_inode(inode).await?;
        } else {
            handle.orphan_add(inode).await?;
        }
        inode.data_tid = handle.finish();
        if !left.is_empty() {
            self.free_from(inode, first).await?;
            let mut handle = self.begin_with_headroom(3, 0).await?;
            handle.orphan_remove(inode).await?;
            inode.data_tid = handle.finish();
        }
        Ok(())
    }

    /// Zeros what the last block on the device holds behind the end there, before that moves up: data that was
    /// written when the power failed, before the size that counts it had committed.
    pub(super) async fn zero_behind_end(&self, inode: &mut InodeState) -> Result<(), FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        let size_bytes = inode.raw.size_bytes();
        let (logical, within) = (
            size_bytes / block_bytes,
            (size_bytes % block_bytes) as usize,
        );
        if within == 0 {
            return Ok(());
        }
        let Mapping::Run(run) = self.lookup(&inode.raw, logical).await? else {
            return Ok(());
        };
        if run.unwritten {
            return Ok(());
        }
        let old = self.read_device(run.physical, 1).await?;
        let behind = &old[within..];
        if behind.iter().any(|byte| *byte != 0) {
            let bytes = patched(&old, within, &vec![0; behind.len()]);
            log::write(self.device(), run.physical * block_bytes, bytes).await?;
            inode.data.arrived.note(self.running_tid());
        }
        Ok(())
    }

    /// Zeros what the last block holds behind the new end, on the device before the end moves.
    async fn zero_tail(&self, inode: &mut InodeState, size_bytes: u64) -> Result<(), FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        let (logical, within) = (size_bytes / block_bytes, size_bytes % block_bytes);
        if within == 0 {
            return Ok(());
        }
        let old = self.block_of(inode, logical).await?;
        let zeros = vec![0; (block_bytes - within) as usize];
        let bytes = patched(&old, within as usize, &zeros);
        if let Mapping::Run(run) = self.lookup(&inode.raw, logical).await?
            && !run.unwritten
        {
            let offset = run.physical * block_bytes;
            log::write(self.device(), offset, bytes.clone()).await?;
            inode.data.arrived.note(self.running_tid());
        }
        if let Some(page) = inode.data.dirty.get_mut(&logical) {
            let promised = page.promised;
            *page = Page { bytes, promised };
        }
        Ok(())
    }
}
