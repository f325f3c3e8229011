//! A mounted filesystem: opening replays the journal and frees orphans, closing leaves nothing to replay.
//!
//! Order of the first writes: the replayed blocks, the journal as empty, the superblock as replayed; before the
//! first transaction "needs recovery" in the superblock, then the start of the log. Of the last ones: everything
//! home, the journal as empty, then the superblock without "needs recovery". So at each moment a crash leaves
//! what a mount can read.

use crate::ext4::bytes::{le16, le32, put};
use crate::ext4::cache::{Block, Cache};
use crate::ext4::commit::Committer;
use crate::ext4::device::Device;
use crate::ext4::error::{Ext4Error, FsError};
use crate::ext4::features::ro_compat;
use crate::ext4::groups::{Groups, update_superblock};
use crate::ext4::image::Image;
use crate::ext4::inode_cell::Inodes;
use crate::ext4::journal::log::{self, Log};
use crate::ext4::measures::CommitTimes;
use crate::ext4::orphan_file::Left;
use crate::ext4::orphans::Orphans;
use crate::ext4::superblock::Superblock;
use crate::ext4::time::Timestamp;
use crate::ext4::transaction::{Tid, Transactions};
use crate::ext4::writeback::Dirty;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Where times come from.
pub type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;

/// How a filesystem is mounted.
#[derive(Clone)]
pub struct Options {
    pub read_only: bool,
    /// Freed space is given back to the volume after each commit.
    pub discard: bool,
    pub clock: Clock,
    /// What generations of inodes come from.
    pub seed: u64,
    /// Metadata kept in memory, about.
    pub cache_bytes: u64,
    /// Data of files that is acknowledged and only in memory, about.
    pub dirty_limit_bytes: u64,
    /// Data and the running transaction leave memory at the latest after this.
    pub commit_interval: Duration,
}

/// How often the writeback looks whether the filesystem is gone.
const PRESSURE_CHECK: Duration = Duration::from_secs(1);
/// A share of the log that one transaction may fill.
const TRANSACTION_SHARE: u32 = 4;

struct Shared {
    device: Arc<dyn Device>,
    options: Options,
    cache: Arc<Cache>,
    groups: Groups,
    inodes: Inodes,
    orphans: Orphans,
    transactions: Transactions,
    dirty: Dirty,
    commit_times: CommitTimes,
    /// `None` of a filesystem that is not written, or was closed.
    committer: tokio::sync::Mutex<Option<Committer>>,
    /// Why nothing is written, if nothing is.
    read_only: Option<Vec<String>>,
    generations: AtomicU64,
    journal_bytes: u64,
    topology: tokio::sync::Mutex<()>,
    growing: tokio::sync::Mutex<()>,
}

/// A mounted filesystem; clones are the same.
#[derive(Clone)]
pub struct Filesystem(Arc<Shared>);

impl Filesystem {
    /// Mounts the filesystem on `device`. One with features that cannot be written is mounted read-only.
    ///
    /// # Errors
    /// What keeps it from being read; a journal that cannot be replayed; the device's.
    pub async fn open(device: Arc<dyn Device>, options: Options) -> Result<Self, FsError> {
        let mut findings = Vec::new();
        let image = Image::open(device.as_ref(), &mut findings).await?;
        if let Some(finding) = findings.into_iter().next() {
            return Err(Ext4Error::Corrupt(finding).into());
        }
        let read_only = read_only(&image, &options);
        let left = Left::read(&image).await?;
        let superblock = image.superblock.clone();
        let cache = Arc::new(Cache::new(
            device.clone(),
            superblock.block_bytes,
            options.cache_bytes,
        ));
        let log = if read_only.is_none() {
            replay_to_disk(&image, device.as_ref()).await?;
            Some(Log::open(device.clone(), &image).await?)
        } else {
            pin_replayed(&image, &cache).await?;
            None
        };
        let journal_bytes = match image.has_journal() {
            true => {
                image
                    .inode(image.superblock.journal_inode)
                    .await?
                    .0
                    .size_bytes
            }
            false => 0,
        };
        let max_blocks = log
            .as_ref()
            .map_or(0, |log| log.capacity() / TRANSACTION_SHARE);
        let fs = Self(Arc::new(Shared {
            groups: Groups::new(superblock, cache.clone(), &image.groups),
            cache,
            inodes: Inodes::default(),
            orphans: Orphans::default(),
            dirty: Dirty::default(),
            commit_times: CommitTimes::default(),
            transactions: Transactions::new(max_blocks as usize),
            committer: tokio::sync::Mutex::new(log.map(Committer::new)),
            read_only,
            journal_bytes,
            generations: AtomicU64::new(options.seed),
            topology: tokio::sync::Mutex::default(),
            growing: tokio::sync::Mutex::default(),
            device: device.clone(),
            options,
        }));
        fs.start().await?;
        fs.free_left(&left).await?;
        Ok(fs)
    }

    /// Notes the mount on disk, and begins to commit.
    async fn start(&self) -> Result<(), FsError> {
        if let Some(committer) = self.committer().lock().await.as_mut() {
            self.note_mount().await?;
            committer.start(self).await?;
            self.start_timer();
            self.start_writeback();
        }
        Ok(())
    }

    async fn note_mount(&self) -> Result<(), Ext4Error> {
        let now = u32::try_from(self.now().seconds).unwrap_or(u32::MAX);
        let note = |bytes: &mut [u8]| {
            let mut compatible = le32(bytes, 0x64);
            compatible |= ro_compat::LARGE_FILE;
            put(bytes, 0x64, &compatible.to_le_bytes());
            let mounts = le16(bytes, 0x34).saturating_add(1);
            put(bytes, 0x34, &mounts.to_le_bytes());
            put(bytes, 0x2c, &now.to_le_bytes());
            put(bytes, 0x30, &now.to_le_bytes());
        };
        update_superblock(self.cache(), self.superblock(), Tid::default(), note).await?;
        Ok(())
    }

    fn start_timer(&self) {
        let weak = Arc::downgrade(&self.0);
        let every = self.options().commit_interval;
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(every).await;
                let Some(fs) = weak.upgrade().map(Self) else {
                    return;
                };
                if fs.transactions().check().is_err() {
                    return;
                }
                fs.write_back().await;
                fs.commit_up_to(fs.running_tid()).await;
            }
        });
    }

    /// Writes data back as soon as there is too much of it.
    fn start_writeback(&self) {
        let weak = Arc::downgrade(&self.0);
        tokio::spawn(async move {
            while let Some(fs) = weak.upgrade().map(Self) {
                let woken = tokio::time::timeout(PRESSURE_CHECK, fs.dirty().pressure.notified());
                if woken.await.is_ok() {
                    fs.write_back().await;
                }
            }
        });
    }

    /// Everything that was acknowledged is durable afterwards.
    ///
    /// # Errors
    /// [`FsError::Aborted`], the device's.
    pub async fn sync(&self) -> Result<(), FsError> {
        if self.is_read_only() {
            return Ok(());
        }
        self.write_back().await;
        let running = self.running_tid();
        self.commit_and_wait(running).await?;
        // Data in place may have changed nothing that is committed.
        if !self.transactions().has_flushed(running) {
            log::flush(self.device()).await?;
        }
        Ok(())
    }

    /// # Errors
    /// [`FsError::ReadOnly`], [`FsError::Aborted`].
    pub fn check_writable(&self) -> Result<(), FsError> {
        if self.is_read_only() {
            return Err(FsError::ReadOnly);
        }
        self.transactions().check()
    }

    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.0.read_only.is_some()
    }

    /// The features for which it is not written; empty if that was asked for, or if it is written.
    #[must_use]
    pub fn unwritable_features(&self) -> &[String] {
        self.0.read_only.as_deref().unwrap_or_default()
    }

    /// A block of metadata at its newest.
    ///
    /// # Errors
    /// What the device reports.
    pub async fn read_block(&self, block: u64) -> Result<Block, FsError> {
        Ok(self.cache().read(block).await?)
    }

    /// As [`Self::read_block`]; `check` sees the block when it comes from the device.
    ///
    /// # Errors
    /// What the device reports, or `check`.
    pub async fn read_checked(
        &self,
        block: u64,
        check: impl FnOnce(&[u8]) -> Result<(), Ext4Error>,
    ) -> Result<Block, FsError> {
        Ok(self.cache().read_checked(block, check).await?)
    }

    /// What does not change while it is mounted but by a growth: sizes, features, seeds. Its counts are those of
    /// the mount.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        self.0.groups.superblock()
    }

    #[must_use]
    pub fn now(&self) -> Timestamp {
        (self.0.options.clock)()
    }

    /// While it is held, no directory comes into another one.
    pub(super) fn topology(&self) -> &tokio::sync::Mutex<()> {
        &self.0.topology
    }

    /// One growth at a time.
    pub(super) fn growing(&self) -> &tokio::sync::Mutex<()> {
        &self.0.growing
    }

    pub(super) fn next_generation(&self) -> u32 {
        // SplitMix64.
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let state = self.0.generations.fetch_add(STEP, Ordering::Relaxed);
        let mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 32) as u32
    }

    pub(super) fn journal_bytes(&self) -> u64 {
        self.0.journal_bytes
    }

    pub(super) fn device(&self) -> &dyn Device {
        self.0.device.as_ref()
    }

    pub(super) fn options(&self) -> &Options {
        &self.0.options
    }

    pub(super) fn cache(&self) -> &Cache {
        &self.0.cache
    }

    pub(super) fn groups(&self) -> &Groups {
        &self.0.groups
    }

    pub(super) fn inodes(&self) -> &Inodes {
        &self.0.inodes
    }

    pub(super) fn orphans(&self) -> &Orphans {
        &self.0.orphans
    }

    pub(super) fn dirty(&self) -> &Dirty {
        &self.0.dirty
    }

    pub(super) fn commit_times(&self) -> &CommitTimes {
        &self.0.commit_times
    }

    pub(super) fn transactions(&self) -> &Transactions {
        &self.0.transactions
    }

    pub(super) fn committer(&self) -> &tokio::sync::Mutex<Option<Committer>> {
        &self.0.committer
    }
}

/// Why `image` is not written, or `None` if it is.
fn read_only(image: &Image<'_>, options: &Options) -> Option<Vec<String>> {
    let unwritable = image.superblock.features.unwritable();
    (options.read_only || !unwritable.is_empty()).then_some(unwritable)
}

/// Writes what the journal holds to its place.
async fn replay_to_disk(image: &Image<'_>, device: &dyn Device) -> Result<(), FsError> {
    let block_bytes = u64::from(image.superblock.block_bytes);
    let mut blocks: Vec<u64> = image.replay.numbers().collect();
    blocks.sort_unstable();
    for block in blocks {
        let content = image.block(block).await?;
        log::write(device, block * block_bytes, content.into()).await?;
    }
    log::flush(device).await?;
    Ok(())
}

/// Keeps what the journal holds in memory.
async fn pin_replayed(image: &Image<'_>, cache: &Cache) -> Result<(), FsError> {
    for block in image.replay.numbers() {
        let content = image.block(block).await?;
        cache.create(block, Tid(1), |bytes| bytes.copy_from_slice(&content));
    }
    Ok(())
}
