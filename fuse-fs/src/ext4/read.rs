//! Reading a file: from memory what is there, the rest from the device, zeros where nothing is.

use crate::ext4::error::{Ext4Error, FsError, Refusal};
use crate::ext4::extent_tree::Mapping;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::inode::Kind;
use crate::ext4::inode_cell::{InodeCell, InodeState};
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::ops::Range;

const READS_AT_ONCE: usize = 16;
const MAX_READ_BLOCKS: u64 = 256;

/// Where a part of a read comes from.
#[derive(Debug)]
enum Source {
    Memory(Bytes),
    Device { physical: u64, blocks: u64 },
    Zeros { blocks: u64 },
}

impl Filesystem {
    /// At most `len_bytes` of a file from `offset_bytes` on; less at its end.
    ///
    /// # Errors
    /// [`Refusal::IsDirectory`], the device's, and what is wrong with the map.
    pub async fn read(
        &self,
        cell: &InodeCell,
        offset_bytes: u64,
        len_bytes: u32,
    ) -> Result<Bytes, FsError> {
        let inode = cell.read().await;
        match inode.raw.kind() {
            Some(Kind::Regular) => {}
            Some(Kind::Directory) => return Err(Refusal::IsDirectory.into()),
            _ => return Err(Refusal::Invalid.into()),
        }
        let end = inode
            .size_bytes()
            .min(offset_bytes.saturating_add(u64::from(len_bytes)));
        if offset_bytes >= end {
            return Ok(Bytes::new());
        }
        let block_bytes = u64::from(self.superblock().block_bytes);
        let blocks = offset_bytes / block_bytes..end.div_ceil(block_bytes);
        let skipped = (offset_bytes - blocks.start * block_bytes) as usize;
        let whole = self.read_blocks(&inode, blocks).await?;
        Ok(whole.slice(skipped..skipped + (end - offset_bytes) as usize))
    }

    /// Whole blocks of a file.
    pub(super) async fn read_blocks(
        &self,
        inode: &InodeState,
        blocks: Range<u64>,
    ) -> Result<Bytes, FsError> {
        let block_bytes = self.superblock().block_bytes as usize;
        let total = (blocks.end - blocks.start) as usize * block_bytes;
        let mut sources = self.sources(inode, blocks).await?;
        if let [_] = sources[..]
            && let Some(source) = sources.pop()
        {
            return self.fetch(source).await;
        }
        let mut parts = std::pin::pin!(
            stream::iter(sources)
                .map(|source| self.fetch(source))
                .buffered(READS_AT_ONCE)
        );
        let mut whole = BytesMut::with_capacity(total);
        while let Some(part) = parts.try_next().await? {
            whole.extend_from_slice(&part);
        }
        Ok(whole.freeze())
    }

    async fn sources(
        &self,
        inode: &InodeState,
        blocks: Range<u64>,
    ) -> Result<Vec<Source>, FsError> {
        let mut sources = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end {
            if let Some(page) = inode.data.page(at) {
                sources.push(Source::Memory(page.clone()));
                at += 1;
                continue;
            }
            let end = inode
                .data
                .next_page(at..blocks.end)
                .min(at + MAX_READ_BLOCKS);
            let mapping = self.lookup(&inode.raw, at).await?;
            let count = mapping.blocks().min(end - at);
            match (mapping, sources.last_mut()) {
                (Mapping::Run(run), Some(Source::Device { physical, blocks }))
                    if !run.unwritten
                        && *physical + *blocks == run.physical
                        && *blocks + count <= MAX_READ_BLOCKS =>
                {
                    *blocks += count;
                }
                (Mapping::Run(run), _) if !run.unwritten => sources.push(Source::Device {
                    physical: run.physical,
                    blocks: count,
                }),
                _ => sources.push(Source::Zeros { blocks: count }),
            }
            at += count;
        }
        Ok(sources)
    }

    async fn fetch(&self, source: Source) -> Result<Bytes, FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        match source {
            Source::Memory(page) => Ok(page),
            Source::Zeros { blocks } => Ok(vec![0; (blocks * block_bytes) as usize].into()),
            Source::Device { physical, blocks } => self.read_device(physical, blocks).await,
        }
    }

    /// Blocks as they are on the device.
    pub(super) async fn read_device(&self, physical: u64, blocks: u64) -> Result<Bytes, FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        let (offset_bytes, len_bytes) = (physical * block_bytes, blocks * block_bytes);
        let read = self.device().read(offset_bytes, len_bytes as u32).await;
        let failed = |source| Ext4Error::Read {
            offset_bytes,
            len_bytes,
            source,
        };
        Ok(read.map_err(failed)?)
    }
}
