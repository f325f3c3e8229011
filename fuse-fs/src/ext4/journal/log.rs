//! The log while the filesystem is mounted: a ring to which whole transactions are appended.
//!
//! ```text
//! [superblock] first .. tail [transactions not yet home] head .. end
//! ```
//!
//! The ring is only reused behind a superblock, durable on the device, that says where the log starts now.

use crate::ext4::cache::Block;
use crate::ext4::device::Device;
use crate::ext4::error::{Ext4Error, Place};
use crate::ext4::extent::Run;
use crate::ext4::features::incompat;
use crate::ext4::image::Image;
use crate::ext4::journal::layout::{self, JournalSuperblock, NewTag, magic_bytes};
use crate::ext4::map;
use crate::ext4::time::Timestamp;
use bytes::Bytes;
use futures_util::stream::{self, TryStreamExt};
use std::sync::Arc;

/// Bytes of one write, and writes in flight.
const MAX_WRITE_BYTES: usize = 1 << 20;
const WRITES_AT_ONCE: usize = 16;
/// A log that is full to the last block would look empty.
const SPARE_BLOCKS: u32 = 2;

/// What a transaction puts into the log.
pub struct Record {
    pub blocks: Vec<(u64, Block)>,
    pub revoked: Vec<u64>,
}

/// The journal of a mounted filesystem.
pub struct Log {
    device: Arc<dyn Device>,
    block_bytes: usize,
    runs: Vec<Run>,
    format: JournalSuperblock,
    superblock: Vec<u8>,
    head: u32,
    used: u32,
    sequence: u32,
}

impl Log {
    /// Opens the journal of `image`, whose log was replayed to its places. It is made empty.
    ///
    /// # Errors
    /// [`Ext4Error::Corrupt`] if it cannot be used, or the device's.
    pub async fn open(device: Arc<dyn Device>, image: &Image<'_>) -> Result<Self, Ext4Error> {
        let corrupt = |problem: String| Ext4Error::corrupt(Place::Journal, problem);
        let (inode, _) = image.inode(image.superblock.journal_inode).await?;
        let runs = map::runs(image, &inode).await?;
        let first = runs
            .first()
            .ok_or_else(|| corrupt("it is empty".to_owned()))?;
        let block_bytes = image.superblock.block_bytes;
        let mut superblock = image.raw_blocks(first.physical, 1).await?;
        let wide = image.superblock.features.has_incompat(incompat::BIT64);
        layout::prepare(&mut superblock, wide, image.superblock.has_checksums());
        let sequence = image.replay.next_sequence;
        layout::set_start(&mut superblock, 0, sequence);
        let length = inode.size_bytes / u64::from(block_bytes);
        let format = JournalSuperblock::read(&superblock, block_bytes, length).map_err(corrupt)?;
        let log = Self {
            device,
            block_bytes: block_bytes as usize,
            runs,
            head: format.first,
            used: 0,
            sequence,
            format,
            superblock,
        };
        log.write_superblock().await?;
        Ok(log)
    }

    /// Blocks that the log holds at most.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        (self.format.end - self.format.first).saturating_sub(SPARE_BLOCKS)
    }

    #[must_use]
    pub fn used(&self) -> u32 {
        self.used
    }

    /// Blocks of the log that a transaction of so many blocks and revokes needs.
    #[must_use]
    pub fn needed(&self, blocks: usize, revoked: usize) -> u32 {
        let descriptors = blocks.div_ceil(self.format.tags_per_descriptor(self.block_bytes));
        let revokes = revoked.div_ceil(self.format.revokes_per_block(self.block_bytes));
        u32::try_from(blocks + descriptors + revokes + 1).unwrap_or(u32::MAX)
    }

    #[must_use]
    pub fn has_room(&self, needed: u32) -> bool {
        self.used.saturating_add(needed) <= self.capacity()
    }

    /// Appends a transaction, for which there is room; it is durable afterwards.
    ///
    /// Everything that was written before is durable before the transaction counts.
    ///
    /// # Errors
    /// The device's. The log must not be used afterwards.
    pub async fn commit(&mut self, record: &Record, now: Timestamp) -> Result<(), Ext4Error> {
        let blocks = self.encode(record);
        self.append(&blocks).await?;
        self.flush().await?;
        let seconds = u64::try_from(now.seconds).unwrap_or(0);
        let commit = self
            .format
            .write_commit(self.block_bytes, self.sequence, seconds, now.nanos);
        self.append(&[commit.into()]).await?;
        self.flush().await?;
        self.sequence = self.sequence.wrapping_add(1);
        Ok(())
    }

    /// All of a transaction but its commit block.
    fn encode(&self, record: &Record) -> Vec<Bytes> {
        let mut encoded = Vec::new();
        let revokes = self.format.revokes_per_block(self.block_bytes);
        for revoked in record.revoked.chunks(revokes) {
            let block = self
                .format
                .write_revoke(self.block_bytes, self.sequence, revoked);
            encoded.push(block.into());
        }
        let tags = self.format.tags_per_descriptor(self.block_bytes);
        for blocks in record.blocks.chunks(tags) {
            let logged: Vec<(Bytes, bool)> =
                blocks.iter().map(|(_, block)| escape(block)).collect();
            let tags: Vec<NewTag> = blocks
                .iter()
                .zip(&logged)
                .map(|((number, _), (logged, escaped))| NewTag {
                    block: *number,
                    escaped: *escaped,
                    checksum: self.format.logged_checksum(self.sequence, logged),
                })
                .collect();
            let descriptor = self
                .format
                .write_descriptor(self.block_bytes, self.sequence, &tags);
            encoded.push(descriptor.into());
            encoded.extend(logged.into_iter().map(|(logged, _)| logged));
        }
        encoded
    }

    async fn append(&mut self, blocks: &[Bytes]) -> Result<(), Ext4Error> {
        let mut writes: Vec<(u64, Vec<u8>)> = Vec::new();
        for block in blocks {
            let offset = self.place(self.head)? * self.block_bytes as u64;
            match writes.last_mut() {
                Some((from, bytes))
                    if *from + bytes.len() as u64 == offset && bytes.len() < MAX_WRITE_BYTES =>
                {
                    bytes.extend_from_slice(block);
                }
                _ => writes.push((offset, block.to_vec())),
            }
            self.head = self.next(self.head);
            self.used += 1;
        }
        let device = &self.device;
        stream::iter(writes.into_iter().map(Ok))
            .try_for_each_concurrent(WRITES_AT_ONCE, |(offset, bytes)| {
                write(device.as_ref(), offset, bytes.into())
            })
            .await
    }

    /// Everything that was committed is in its place: the log starts at its head.
    ///
    /// # Errors
    /// The device's.
    pub async fn restart(&mut self) -> Result<(), Ext4Error> {
        layout::set_start(&mut self.superblock, self.head, self.sequence);
        self.write_superblock().await?;
        self.used = 0;
        Ok(())
    }

    /// As [`Self::restart`], and says that there is nothing to replay.
    ///
    /// # Errors
    /// The device's.
    pub async fn mark_empty(&mut self) -> Result<(), Ext4Error> {
        layout::set_start(&mut self.superblock, 0, self.sequence);
        self.write_superblock().await?;
        self.used = 0;
        Ok(())
    }

    async fn write_superblock(&self) -> Result<(), Ext4Error> {
        let offset = self.place(0)? * self.block_bytes as u64;
        let bytes = Bytes::copy_from_slice(&self.superblock);
        write(self.device.as_ref(), offset, bytes).await?;
        self.flush().await
    }

    async fn flush(&self) -> Result<(), Ext4Error> {
        flush(self.device.as_ref()).await
    }

    /// Where block `number` of the journal lies.
    fn place(&self, number: u32) -> Result<u64, Ext4Error> {
        let number = u64::from(number);
        let at = self
            .runs
            .partition_point(|run| run.logical + run.blocks <= number);
        let run = self.runs.get(at).filter(|run| run.logical <= number);
        let hole = || Ext4Error::corrupt(Place::Journal, format!("its block {number} is a hole"));
        run.map(|run| run.physical + number - run.logical)
            .ok_or_else(hole)
    }

    fn next(&self, number: u32) -> u32 {
        if number + 1 >= self.format.end {
            self.format.first
        } else {
            number + 1
        }
    }
}

/// A block as it is logged, and whether it had to be told from a block of the journal itself.
fn escape(block: &Block) -> (Bytes, bool) {
    if block.starts_with(&magic_bytes()) {
        let mut copy = block.to_vec();
        copy[..4].fill(0);
        (copy.into(), true)
    } else {
        (Bytes::from_owner(block.clone()), false)
    }
}

/// Writes `data` to the device.
///
/// # Errors
/// The device's.
pub async fn write(device: &dyn Device, offset_bytes: u64, data: Bytes) -> Result<(), Ext4Error> {
    let len_bytes = data.len() as u64;
    let written = device.write(offset_bytes, data).await;
    written.map_err(|source| Ext4Error::Write {
        offset_bytes,
        len_bytes,
        source,
    })
}

/// Makes durable what was written.
///
/// # Errors
/// The device's.
pub async fn flush(device: &dyn Device) -> Result<(), Ext4Error> {
    device
        .flush()
        .await
        .map_err(|source| Ext4Error::Flush { source })
}
