//! A filesystem as it is after its journal was replayed: into memory, the device is not written.

use crate::ext4::bytes::part;
use crate::ext4::device::Device;
use crate::ext4::error::{Ext4Error, Finding, Place};
use crate::ext4::features::{compat, incompat};
use crate::ext4::group::{self, Group};
use crate::ext4::inode::Inode;
use crate::ext4::journal::replay::{self, Replay};
use crate::ext4::superblock::{self, Superblock};

/// Bytes that one read of the device asks for at most.
const MAX_READ_BYTES: u32 = 1 << 20;

/// A filesystem that can be read.
pub struct Image<'a> {
    device: &'a dyn Device,
    pub superblock: Superblock,
    pub groups: Vec<Group>,
    pub replay: Replay,
}

impl<'a> Image<'a> {
    /// Reads superblock and descriptors and replays the journal; what is wrong with journal and descriptors, but
    /// leaves the rest to be read, goes to `findings`.
    ///
    /// # Errors
    /// See [`Superblock::read`]; besides what the device reports.
    pub async fn open(
        device: &'a dyn Device,
        findings: &mut Vec<Finding>,
    ) -> Result<Self, Ext4Error> {
        let bytes = read(
            device,
            superblock::OFFSET_BYTES,
            superblock::SIZE_BYTES as u32,
        )
        .await?;
        let mut image = Self {
            device,
            superblock: Superblock::read(&bytes, device.size_bytes())?,
            groups: Vec::new(),
            replay: Replay::default(),
        };
        image.read_groups(1, &mut Vec::new()).await?;
        match replay::replay(&image, findings).await {
            Ok(replay) => image.replay = replay,
            Err(Ext4Error::Corrupt(finding)) => findings.push(finding),
            Err(error) => return Err(error),
        }
        image.read_superblock().await?;
        findings.extend(image.outside());
        image.read_groups(u32::MAX, findings).await?;
        Ok(image)
    }

    /// Whole blocks that the device has.
    pub(super) fn device_blocks(&self) -> u64 {
        self.device.size_bytes() / u64::from(self.superblock.block_bytes)
    }

    /// What the journal holds of no filesystem.
    fn outside(&self) -> Option<Finding> {
        let mut blocks = self.replay.numbers();
        let block = blocks.find(|block| *block >= self.superblock.blocks_count)?;
        Some(Finding {
            place: Place::Journal,
            problem: format!("a transaction has block {block} outside the filesystem"),
        })
    }

    /// The superblock anew: the journal may hold a younger one.
    async fn read_superblock(&mut self) -> Result<(), Ext4Error> {
        if !self.replay.is_empty() {
            let block_bytes = u64::from(self.superblock.block_bytes);
            let block = self.block(superblock::OFFSET_BYTES / block_bytes).await?;
            let at = (superblock::OFFSET_BYTES % block_bytes) as usize;
            let bytes = part(&block, at, at + superblock::SIZE_BYTES);
            self.superblock = Superblock::read(bytes, self.device.size_bytes())?;
        }
        Ok(())
    }

    /// Reads the descriptors, at most `max_blocks` of them.
    async fn read_groups(
        &mut self,
        max_blocks: u32,
        findings: &mut Vec<Finding>,
    ) -> Result<(), Ext4Error> {
        self.groups.clear();
        let superblock = self.superblock.clone();
        for index in 0..superblock.descriptor_blocks().min(max_blocks) {
            let block = self.block(superblock.descriptor_block(index)).await?;
            let descriptors = block.chunks_exact(usize::from(superblock.descriptor_bytes));
            let left = superblock.groups_count() as usize - self.groups.len();
            for bytes in descriptors.take(left) {
                let number = self.groups.len() as u32;
                let mut group = Group::read(bytes, &superblock);
                if !group::checksum_matches(bytes, number, &superblock) {
                    let problem = "its descriptor has a wrong checksum".to_owned();
                    findings.push(Finding {
                        place: Place::Group(number),
                        problem,
                    });
                    group.inodes_uninit = false;
                    group.blocks_uninit = false;
                    group.unused_inodes = 0;
                }
                self.groups.push(group);
            }
        }
        Ok(())
    }

    /// One block. It lies inside the filesystem.
    ///
    /// # Errors
    /// What the device reports.
    pub async fn block(&self, block: u64) -> Result<Vec<u8>, Ext4Error> {
        self.blocks(block, 1).await
    }

    /// `count` consecutive blocks. They lie inside the filesystem.
    ///
    /// # Errors
    /// What the device reports.
    pub async fn blocks(&self, first: u64, count: u32) -> Result<Vec<u8>, Ext4Error> {
        let mut bytes = self.raw_blocks(first, count).await?;
        if self.replay.is_empty() {
            return Ok(bytes);
        }
        let chunks = bytes.chunks_exact_mut(self.superblock.block_bytes as usize);
        for (block, chunk) in (first..).zip(chunks) {
            if let Some(logged) = self.replay.newest(block) {
                let raw = self.raw_blocks(logged.journal_block, 1).await?;
                logged.restore(&raw, chunk);
            }
        }
        Ok(bytes)
    }

    /// `count` consecutive blocks as they are on the device, without what the journal holds.
    ///
    /// # Errors
    /// What the device reports.
    pub async fn raw_blocks(&self, first: u64, count: u32) -> Result<Vec<u8>, Ext4Error> {
        let block_bytes = u64::from(self.superblock.block_bytes);
        let (mut at, end) = (
            first * block_bytes,
            (first + u64::from(count)) * block_bytes,
        );
        let mut bytes = Vec::with_capacity(usize::try_from(end - at).unwrap_or(0));
        while at < end {
            let len =
                u32::try_from(end - at).map_or(MAX_READ_BYTES, |left| left.min(MAX_READ_BYTES));
            bytes.extend_from_slice(&read(self.device, at, len).await?);
            at += u64::from(len);
        }
        Ok(bytes)
    }

    /// One inode, from its table.
    ///
    /// # Errors
    /// [`Ext4Error::Corrupt`] if there is no such inode or its table lies outside; what the device reports.
    pub async fn inode(&self, number: u32) -> Result<(Inode, Vec<u8>), Ext4Error> {
        let none = || Ext4Error::corrupt(Place::Inode(number), "it does not exist");
        let (group, index) = self.superblock.inode_place(number).ok_or_else(none)?;
        let table = self
            .groups
            .get(group as usize)
            .ok_or_else(none)?
            .inode_table;
        let in_block = self.superblock.block_bytes / u32::from(self.superblock.inode_bytes);
        let block = table + u64::from(index / in_block);
        if !self.superblock.contains(block, 1) {
            return Err(Ext4Error::corrupt(
                Place::Group(group),
                "its inode table is outside the filesystem",
            ));
        }
        let size = usize::from(self.superblock.inode_bytes);
        let at = (index % in_block) as usize * size;
        let bytes = part(&self.block(block).await?, at, at + size).to_vec();
        Ok((Inode::read(number, &bytes, &self.superblock), bytes))
    }

    /// A journal lies inside the filesystem.
    #[must_use]
    pub fn has_journal(&self) -> bool {
        self.superblock.features.has_compat(compat::HAS_JOURNAL)
    }

    /// Whether the filesystem says that its journal must be replayed.
    #[must_use]
    pub fn needs_recovery(&self) -> bool {
        self.superblock
            .features
            .has_incompat(incompat::NEEDS_RECOVERY)
    }
}

async fn read(
    device: &dyn Device,
    offset_bytes: u64,
    len_bytes: u32,
) -> Result<bytes::Bytes, Ext4Error> {
    if offset_bytes + u64::from(len_bytes) > device.size_bytes() {
        return Err(Ext4Error::NotExt4);
    }
    let read = device.read(offset_bytes, len_bytes).await;
    read.map_err(|source| Ext4Error::Read {
        offset_bytes,
        len_bytes: u64::from(len_bytes),
        source,
    })
}
