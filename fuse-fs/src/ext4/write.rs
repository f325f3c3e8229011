//! Writing a file: acknowledged from memory, with the room on the device promised before.

use crate::ext4::error::{FsError, Refusal};
use crate::ext4::extent::LOGICAL_END;
use crate::ext4::extent_tree::Mapping;
use crate::ext4::features::ro_compat;
use crate::ext4::file_data::Page;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::inode::Kind;
use crate::ext4::inode_cell::{InodeCell, InodeState};
use bytes::{Bytes, BytesMut};
use std::ops::Range;
use std::sync::Arc;

/// Blocks that data leaves, so that the map of what was acknowledged always finds room.
pub(super) const HEADROOM_BLOCKS: u64 = 64;

impl Filesystem {
    /// Writes `data` at `offset_bytes`. It is durable after [`Self::fsync`].
    ///
    /// # Errors
    /// [`FsError::NoSpace`], [`FsError::TooLarge`]; the device's, where a part of a block has to be read first.
    pub async fn write(
        &self,
        cell: &Arc<InodeCell>,
        offset_bytes: u64,
        data: Bytes,
    ) -> Result<(), FsError> {
        self.write_stamped(cell, offset_bytes, data, true).await
    }

    /// As [`Self::write`], for who sets the times of the file himself.
    ///
    /// # Errors
    /// As [`Self::write`].
    pub async fn write_unstamped(
        &self,
        cell: &Arc<InodeCell>,
        offset_bytes: u64,
        data: Bytes,
    ) -> Result<(), FsError> {
        self.write_stamped(cell, offset_bytes, data, false).await
    }

    async fn write_stamped(
        &self,
        cell: &Arc<InodeCell>,
        offset_bytes: u64,
        data: Bytes,
        stamped: bool,
    ) -> Result<(), FsError> {
        self.check_writable()?;
        self.wait_for_room().await;
        let mut inode = cell.write().await;
        check_regular(&inode)?;
        self.ensure_extents(&mut inode).await?;
        let len_bytes = data.len() as u64;
        let end = offset_bytes.checked_add(len_bytes);
        let end = end.filter(|end| *end <= self.max_file_bytes());
        let end = end.ok_or(FsError::TooLarge)?;
        if len_bytes > 0 {
            self.put_pages(cell, &mut inode, offset_bytes, &data)
                .await?;
            let size = inode.size_bytes().max(end);
            inode.set_visible_size(size);
        }
        if stamped {
            let now = self.now();
            inode.raw.set_mtime(now);
            inode.raw.set_ctime(now);
            inode.data.times_changed = true;
        }
        self.note_dirty(cell);
        Ok(())
    }

    /// Behind it no block of a file can be mapped, nor counted.
    #[must_use]
    pub fn max_file_bytes(&self) -> u64 {
        let superblock = self.superblock();
        let mapped = (LOGICAL_END - 1) * u64::from(superblock.block_bytes);
        if superblock.features.has_ro_compat(ro_compat::HUGE_FILE) {
            mapped
        } else {
            mapped.min(u64::from(u32::MAX) * 512)
        }
    }

    /// Makes pages of `data`. Nothing changes if the room for all of it cannot be promised.
    pub(super) async fn put_pages(
        &self,
        cell: &Arc<InodeCell>,
        inode: &mut InodeState,
        offset_bytes: u64,
        data: &Bytes,
    ) -> Result<(), FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        let end = offset_bytes + data.len() as u64;
        let blocks = offset_bytes / block_bytes..end.div_ceil(block_bytes);
        let holes = self.holes(inode, blocks.clone()).await?;
        let edges = self.edge_pages(inode, offset_bytes, end).await?;
        let wanted = holes.iter().map(|hole| hole.end - hole.start).sum();
        let leave = HEADROOM_BLOCKS + self.superblock().reserved_blocks;
        self.promise(wanted, leave).await?;
        let mut new_pages = 0;
        for logical in blocks {
            let start = logical * block_bytes;
            let (from, to) = (offset_bytes.max(start), end.min(start + block_bytes));
            let part = data.slice((from - offset_bytes) as usize..(to - offset_bytes) as usize);
            let bytes = match edges.iter().find(|(edge, _)| *edge == logical) {
                Some((_, old)) => patched(old, (from - start) as usize, &part),
                None => part,
            };
            let in_hole = holes.iter().any(|hole| hole.contains(&logical));
            let old = inode.data.dirty.remove(&logical);
            new_pages += u64::from(old.is_none());
            let promised = in_hole || old.is_some_and(|page| page.promised);
            inode.data.dirty.insert(logical, Page { bytes, promised });
        }
        self.add_dirty_bytes(cell, new_pages * block_bytes);
        Ok(())
    }

    /// The parts of `blocks` for which neither the device has a block nor one is promised.
    async fn holes(
        &self,
        inode: &InodeState,
        blocks: Range<u64>,
    ) -> Result<Vec<Range<u64>>, FsError> {
        let mut holes = Vec::new();
        let mut at = blocks.start;
        while at < blocks.end {
            let mapping = self.lookup(&inode.raw, at).await?;
            let end = blocks.end.min(at + mapping.blocks());
            if matches!(mapping, Mapping::Hole { .. }) {
                let mut from = at;
                for (page, _) in inode
                    .data
                    .dirty
                    .range(at..end)
                    .filter(|(_, page)| page.promised)
                {
                    holes.push(from..*page);
                    from = page + 1;
                }
                holes.push(from..end);
            }
            at = end;
        }
        holes.retain(|hole| !hole.is_empty());
        Ok(holes)
    }

    /// The content so far of the blocks that a write covers in part.
    async fn edge_pages(
        &self,
        inode: &InodeState,
        from: u64,
        to: u64,
    ) -> Result<Vec<(u64, Bytes)>, FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        let mut edges = Vec::new();
        for at in [from, to] {
            let logical = at / block_bytes;
            let known = edges.iter().any(|(edge, _)| *edge == logical);
            if at % block_bytes != 0 && !known {
                edges.push((logical, self.block_of(inode, logical).await?));
            }
        }
        Ok(edges)
    }

    /// One block of a file as it is now; zeros behind the file's end.
    pub(super) async fn block_of(
        &self,
        inode: &InodeState,
        logical: u64,
    ) -> Result<Bytes, FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        let inside = inode.size_bytes().saturating_sub(logical * block_bytes);
        if inside == 0 {
            return Ok(vec![0; block_bytes as usize].into());
        }
        let block = self.read_blocks(inode, logical..logical + 1).await?;
        match usize::try_from(inside) {
            Ok(end) if block[end.min(block.len())..].iter().any(|byte| *byte != 0) => {
                Ok(patched(&block, end, &vec![0; block.len() - end]))
            }
            _ => Ok(block),
        }
    }
}

/// A file whose data can be changed.
pub(super) fn check_regular(inode: &InodeState) -> Result<(), FsError> {
    match inode.raw.kind() {
        Some(Kind::Regular) => Ok(()),
        Some(Kind::Directory) => Err(Refusal::IsDirectory.into()),
        _ => Err(Refusal::Invalid.into()),
    }
}

pub(super) fn patched(old: &Bytes, at: usize, part: &[u8]) -> Bytes {
    let mut copy = BytesMut::from(&old[..]);
    copy[at..at + part.len()].copy_from_slice(part);
    copy.freeze()
}
