//! Orphans that a kernel left, on the list and in the orphan file: freed when the filesystem is opened.
//!
//! The layout of the file is in [`crate::ext4::check`]. Own orphans are always on the list, which is as valid.

use crate::ext4::bytes::{le32, part, put};
use crate::ext4::crc::crc32c;
use crate::ext4::error::{Ext4Error, FsError, Place};
use crate::ext4::features::{compat, ro_compat};
use crate::ext4::filesystem::Filesystem;
use crate::ext4::groups::update_superblock;
use crate::ext4::image::Image;
use crate::ext4::map;
use crate::ext4::superblock::Superblock;
use std::collections::HashSet;

const TAIL_BYTES: usize = 8;

/// What the last mount left.
pub(super) struct Left {
    /// In the order of their list.
    listed: Vec<u32>,
    in_file: Vec<u32>,
    /// The blocks of the orphan file that hold any, and where its checksums start.
    file_blocks: Vec<u64>,
    file_seed: u32,
}

impl Left {
    pub(super) async fn read(image: &Image<'_>) -> Result<Self, FsError> {
        let mut left = Self {
            listed: Vec::new(),
            in_file: Vec::new(),
            file_blocks: Vec::new(),
            file_seed: 0,
        };
        left.read_list(image).await?;
        let features = &image.superblock.features;
        if features.has_compat(compat::ORPHAN_FILE)
            && features.has_ro_compat(ro_compat::ORPHAN_PRESENT)
        {
            left.read_file(image).await?;
        }
        Ok(left)
    }

    async fn read_list(&mut self, image: &Image<'_>) -> Result<(), FsError> {
        let mut seen = HashSet::new();
        let mut number = image.superblock.last_orphan;
        while number != 0 {
            if !possible(number, &image.superblock) || !seen.insert(number) {
                let problem =
                    format!("the list of orphans holds inode {number}, which cannot be on it");
                return Err(Ext4Error::corrupt(Place::Superblock, problem).into());
            }
            self.listed.push(number);
            number = image.inode(number).await?.0.dtime;
        }
        Ok(())
    }

    async fn read_file(&mut self, image: &Image<'_>) -> Result<(), FsError> {
        let (inode, _) = image.inode(image.superblock.orphan_file).await?;
        self.file_seed = inode.checksum_seed;
        for run in map::runs(image, &inode).await? {
            for block in run.physical..run.physical + run.blocks {
                let bytes = image.block(block).await?;
                let entries = part(&bytes, 0, bytes.len() - TAIL_BYTES).chunks_exact(4);
                let inodes = entries.map(|entry| le32(entry, 0));
                let before = self.in_file.len();
                let found = inodes.filter(|inode| possible(*inode, &image.superblock));
                self.in_file.extend(found);
                if self.in_file.len() > before {
                    self.file_blocks.push(block);
                }
            }
        }
        Ok(())
    }
}

fn possible(inode: u32, superblock: &Superblock) -> bool {
    (superblock.first_inode..=superblock.inodes_count).contains(&inode)
}

impl Filesystem {
    /// Frees what the last mount left. Each is on a list until it is gone.
    pub(super) async fn free_left(&self, left: &Left) -> Result<(), FsError> {
        if self.is_read_only() {
            return Ok(());
        }
        for number in left.listed.iter().rev() {
            self.orphans().add(*number);
        }
        for number in &left.listed {
            self.clean_orphan(*number).await?;
        }
        for number in &left.in_file {
            if self.groups().is_inode_used(*number).await? {
                self.orphans().add(*number);
                self.clean_orphan(*number).await?;
            }
        }
        for block in &left.file_blocks {
            self.empty_orphan_block(*block, left.file_seed).await?;
        }
        if self
            .superblock()
            .features
            .has_ro_compat(ro_compat::ORPHAN_PRESENT)
        {
            self.note_no_orphans().await?;
        }
        Ok(())
    }

    async fn empty_orphan_block(&self, block: u64, seed: u32) -> Result<(), FsError> {
        let mut handle = self.begin(1, 0).await?;
        let checked = self.superblock().has_checksums();
        let empty = |bytes: &mut [u8]| {
            let tail = bytes.len() - TAIL_BYTES;
            bytes[..tail].fill(0);
            if checked {
                let crc = crc32c(crc32c(seed, &block.to_le_bytes()), &bytes[..tail]);
                put(bytes, tail + 4, &crc.to_le_bytes());
            }
        };
        handle.update(block, empty).await?;
        let _ = handle.finish();
        Ok(())
    }

    async fn note_no_orphans(&self) -> Result<(), FsError> {
        let mut handle = self.begin(1, 0).await?;
        let note = |bytes: &mut [u8]| {
            let others = le32(bytes, 0x64) & !ro_compat::ORPHAN_PRESENT;
            put(bytes, 0x64, &others.to_le_bytes());
        };
        let block = update_superblock(self.cache(), self.superblock(), handle.tid(), note).await?;
        block.into_iter().for_each(|block| handle.note(block, true));
        let _ = handle.finish();
        Ok(())
    }
}
