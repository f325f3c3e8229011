//! Space of a file without writing: allocated ahead, punched out, zeroed; where data is; copies.

use crate::ext4::error::{FsError, Refusal};
use crate::ext4::extent::MAX_UNWRITTEN_BLOCKS;
use crate::ext4::extent_tree::{EDIT_BLOCKS, EDIT_CREDITS, Mapping};
use crate::ext4::filesystem::Filesystem;
use crate::ext4::inode_cell::{InodeCell, InodeState};
use crate::ext4::write::check_regular;
use bytes::Bytes;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of one step of a copy.
const COPY_BYTES: u64 = 1 << 20;

/// What is done to a range of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Later writes find room. The size grows to the end of the range, unless it is kept.
    Allocate { keep_size: bool },
    /// The range becomes a hole; the size is kept.
    Punch,
    /// The range becomes allocated zeros.
    Zero { keep_size: bool },
}

/// What [`Filesystem::seek`] looks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sought {
    Data,
    Hole,
}

impl Filesystem {
    /// Changes the space of a range of a file.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] for an empty range, [`FsError::TooLarge`], [`FsError::NoSpace`] (a part may be
    /// done), the device's.
    pub async fn fallocate(
        &self,
        cell: &Arc<InodeCell>,
        how: Allocation,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<(), FsError> {
        self.check_writable()?;
        if len_bytes == 0 {
            return Err(Refusal::Invalid.into());
        }
        let end = offset_bytes.checked_add(len_bytes);
        let end = end.filter(|end| *end <= self.max_file_bytes());
        let range = offset_bytes..end.ok_or(FsError::TooLarge)?;
        let _no_flush = cell.lock_flush().await;
        let mut inode = cell.write().await;
        check_regular(&inode)?;
        self.ensure_extents(&mut inode).await?;
        let now = self.now();
        inode.raw.set_mtime(now);
        inode.raw.set_ctime(now);
        match how {
            Allocation::Allocate { keep_size } => {
                self.allocate_range(&mut inode, &range, keep_size).await
            }
            Allocation::Punch => self.punch(cell, &mut inode, &range).await,
            Allocation::Zero { keep_size } => {
                self.punch(cell, &mut inode, &range).await?;
                self.allocate_range(&mut inode, &range, keep_size).await
            }
        }
    }

    async fn allocate_range(
        &self,
        inode: &mut InodeState,
        range: &Range<u64>,
        keep_size: bool,
    ) -> Result<(), FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        let (mut at, end) = (range.start / block_bytes, range.end.div_ceil(block_bytes));
        while at < end {
            let mapping = self.lookup(&inode.raw, at).await?;
            let blocks = mapping.blocks().min(end - at);
            at += match mapping {
                Mapping::Run(_) => blocks,
                Mapping::Hole { .. } => self.allocate_hole(inode, at, blocks).await?,
            };
        }
        let size = if keep_size {
            inode.size_bytes()
        } else {
            range.end
        };
        self.lengthen(inode, size).await
    }

    /// Allocates blocks of a hole as unwritten; how many.
    async fn allocate_hole(
        &self,
        inode: &mut InodeState,
        logical: u64,
        blocks: u64,
    ) -> Result<u64, FsError> {
        let most = MAX_UNWRITTEN_BLOCKS.min(u64::from(self.superblock().blocks_per_group));
        let want = blocks.min(most) as u32;
        let goal = self.goal(&inode.raw, logical).await?;
        let mut handle = self.begin(EDIT_CREDITS + 3, EDIT_BLOCKS + want).await?;
        let place = handle.allocate_blocks(goal, want).await?;
        let count = place.end - place.start;
        handle
            .insert_run(inode, logical, place.start, count, true)
            .await?;
        handle.put_inode(inode).await?;
        let _ = handle.finish();
        Ok(count)
    }

    async fn punch(
        &self,
        cell: &Arc<InodeCell>,
        inode: &mut InodeState,
        range: &Range<u64>,
    ) -> Result<(), FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        let range = range.start
            ..range
                .end
                .min(inode.size_bytes().next_multiple_of(block_bytes));
        if !range.is_empty() {
            let inner = range.start.div_ceil(block_bytes)..range.end / block_bytes;
            if inner.start > inner.end {
                self.zero_bytes(cell, inode, range).await?;
            } else {
                let edges = [
                    range.start..inner.start * block_bytes,
                    inner.end * block_bytes..range.end,
                ];
                for edge in edges {
                    self.zero_bytes(cell, inode, edge).await?;
                }
                self.punch_blocks(inode, inner).await?;
            }
        }
        self.lengthen(inode, 0).await
    }

    async fn punch_blocks(
        &self,
        inode: &mut InodeState,
        blocks: Range<u64>,
    ) -> Result<(), FsError> {
        self.drop_dirty(inode, blocks.clone());
        let mut left = blocks;
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

    /// Zeros a part of a block, if the block holds anything.
    async fn zero_bytes(
        &self,
        cell: &Arc<InodeCell>,
        inode: &mut InodeState,
        range: Range<u64>,
    ) -> Result<(), FsError> {
        let logical = range.start / u64::from(self.superblock().block_bytes);
        if range.is_empty() || !self.is_data(inode, logical).await?.0 {
            return Ok(());
        }
        let zeros = Bytes::from(vec![0; (range.end - range.start) as usize]);
        self.put_pages(cell, inode, range.start, &zeros).await
    }

    /// Whether a block of a file has data, and for how many blocks that is so.
    async fn is_data(&self, inode: &InodeState, logical: u64) -> Result<(bool, u64), FsError> {
        if inode.data.page(logical).is_some() {
            return Ok((true, 1));
        }
        let mapping = self.lookup(&inode.raw, logical).await?;
        let next_page = inode.data.next_page(logical..logical + mapping.blocks());
        let written = matches!(mapping, Mapping::Run(run) if !run.unwritten);
        Ok((written, next_page - logical))
    }

    /// The first byte at or behind `offset_bytes` that is data, or in a hole; the end of the file is a hole.
    ///
    /// # Errors
    /// [`Refusal::NoData`] behind the end, or without data; the device's.
    pub async fn seek(
        &self,
        cell: &InodeCell,
        offset_bytes: u64,
        sought: Sought,
    ) -> Result<u64, FsError> {
        let inode = cell.read().await;
        let (block_bytes, size) = (u64::from(self.superblock().block_bytes), inode.size_bytes());
        if offset_bytes >= size {
            return Err(Refusal::NoData.into());
        }
        let mut logical = offset_bytes / block_bytes;
        while logical * block_bytes < size {
            let (data, blocks) = self.is_data(&inode, logical).await?;
            if data == (sought == Sought::Data) {
                return Ok(offset_bytes.max(logical * block_bytes));
            }
            logical += blocks;
        }
        match sought {
            Sought::Hole => Ok(size),
            Sought::Data => Err(Refusal::NoData.into()),
        }
    }

    /// Copies at most `len_bytes` from one file to another, or within one where the ranges do not overlap; how
    /// many.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] for ranges that overlap; those of reading and writing, if nothing was copied before.
    pub async fn copy_range(
        &self,
        from: (&Arc<InodeCell>, u64),
        to: (&Arc<InodeCell>, u64),
        len_bytes: u64,
    ) -> Result<u64, FsError> {
        let overlap = from.1.abs_diff(to.1) < len_bytes;
        if Arc::ptr_eq(from.0, to.0) && overlap {
            return Err(Refusal::Invalid.into());
        }
        let mut copied = 0;
        while copied < len_bytes {
            let step = COPY_BYTES.min(len_bytes - copied) as u32;
            let read = self.read(from.0, from.1 + copied, step).await;
            let written = match read {
                Ok(data) if data.is_empty() => break,
                Ok(data) => {
                    let len = data.len() as u64;
                    let written = self.write(to.0, to.1 + copied, data).await;
                    written.map(|()| len)
                }
                Err(error) => Err(error),
            };
            match written {
                Ok(len) => copied += len,
                Err(error) if copied == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(copied)
    }
}
