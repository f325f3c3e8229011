//! Commit and checkpoint: from the running transaction to the log, and from there to the blocks' places.
//!
//! One commit serves everybody who waits. It freezes what the transaction changed while nobody is inside, and
//! writes it while the next transaction runs. A block goes home only in a form that has committed, and never
//! after its freeing has committed; the log is reused only after what it held is durable at home.

use crate::ext4::bytes::{le32, put};
use crate::ext4::cache::Block;
use crate::ext4::device::Device;
use crate::ext4::error::{Ext4Error, FsError};
use crate::ext4::features::incompat;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::groups::{seal_superblock, superblock_place};
use crate::ext4::journal::log::{self, Log, Record};
use crate::ext4::superblock;
use crate::ext4::transaction::{Freed, Running, Tid};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::collections::HashMap;
use std::ops::Range;
use std::time::Instant;

const MAX_WRITE_BYTES: usize = 1 << 20;
const WRITES_AT_ONCE: usize = 16;

/// The log, and what it holds that is not yet home. One commit or checkpoint at a time.
pub(super) struct Committer {
    log: Log,
    homeless: HashMap<u64, (Block, Tid)>,
    /// The block with the superblock, as it was committed last.
    superblock: Block,
    /// There is nothing to replay, on disk, too; the next transaction has to change that first.
    quiet: bool,
}

/// A transaction that nobody changes any more.
struct Frozen {
    tid: Tid,
    freed: Freed,
    record: Record,
}

impl Committer {
    pub(super) fn new(log: Log) -> Self {
        Self {
            log,
            homeless: HashMap::new(),
            superblock: Block::from([]),
            quiet: true,
        }
    }

    /// Commits the running transaction.
    async fn commit(&mut self, fs: &Filesystem) -> Result<(), FsError> {
        let frozen = {
            let _nobody_inside = fs.transactions().close_barrier().await;
            freeze(fs).await?
        };
        match frozen {
            Some(frozen) => self.store(fs, frozen).await,
            None => Ok(()),
        }
    }

    /// As [`Self::commit`], inside the closed barrier.
    async fn commit_closed(&mut self, fs: &Filesystem) -> Result<(), FsError> {
        match freeze(fs).await? {
            Some(frozen) => self.store(fs, frozen).await,
            None => Ok(()),
        }
    }

    /// Writes a transaction to the log; it has committed afterwards.
    async fn store(&mut self, fs: &Filesystem, frozen: Frozen) -> Result<(), FsError> {
        let began = Instant::now();
        let Frozen { tid, freed, record } = frozen;
        if self.quiet {
            self.write_superblock(fs, true).await?;
            self.log.restart().await?;
            self.quiet = false;
        }
        let needed = self.log.needed(record.blocks.len(), record.revoked.len());
        if !self.log.has_room(needed) {
            self.checkpoint(fs).await?;
        }
        if !self.log.has_room(needed) {
            let problem = format!("a transaction of {needed} blocks does not fit the journal");
            fs.transactions().abort(&problem);
            fs.transactions().check()?;
        }
        self.log.commit(&record, fs.now()).await?;
        fs.transactions().flushed(tid);
        for block in &record.revoked {
            self.homeless.remove(block);
        }
        let (superblock, _) = superblock_place(fs.superblock());
        if let Some((_, content)) = record.blocks.iter().find(|(block, _)| *block == superblock) {
            self.superblock = content.clone();
        }
        let kept = record.blocks.into_iter();
        self.homeless
            .extend(kept.map(|(block, content)| (block, (content, tid))));
        release(fs, freed).await;
        fs.transactions().committed(tid);
        fs.commit_times().committed(began.elapsed());
        if self.log.used() > self.log.capacity() / 2 {
            self.checkpoint(fs).await?;
        }
        Ok(())
    }

    /// Leaves nothing to replay: everything is home, and the superblock says so.
    async fn quiet(&mut self, fs: &Filesystem) -> Result<(), FsError> {
        if !self.quiet {
            self.checkpoint(fs).await?;
            self.log.mark_empty().await?;
            self.write_superblock(fs, false).await?;
            self.quiet = true;
        }
        Ok(())
    }

    /// Begins with the superblock in the cache, and leaves nothing to replay on disk.
    pub(super) async fn start(&mut self, fs: &Filesystem) -> Result<(), FsError> {
        let (block, _) = superblock_place(fs.superblock());
        self.superblock = fs.cache().read(block).await?;
        self.write_superblock(fs, false).await
    }

    /// Writes the superblock as it has committed, past the log, durably; it says whether there is something to
    /// replay.
    async fn write_superblock(&self, fs: &Filesystem, replay: bool) -> Result<(), FsError> {
        let (block, at) = superblock_place(fs.superblock());
        let mut bytes = self.superblock.to_vec();
        let slot = &mut bytes[at..at + superblock::SIZE_BYTES];
        let others = le32(slot, 0x60) & !incompat::NEEDS_RECOVERY;
        let flag = if replay { incompat::NEEDS_RECOVERY } else { 0 };
        put(slot, 0x60, &(others | flag).to_le_bytes());
        seal_superblock(slot, fs.superblock());
        let offset = block * u64::from(fs.superblock().block_bytes);
        log::write(fs.device(), offset, bytes.into()).await?;
        log::flush(fs.device()).await?;
        Ok(())
    }

    /// Writes everything that has committed to its place, and starts the log anew.
    async fn checkpoint(&mut self, fs: &Filesystem) -> Result<(), FsError> {
        if self.log.used() == 0 {
            return Ok(());
        }
        self.write_home(fs).await?;
        self.log.restart().await?;
        fs.commit_times().checkpointed();
        Ok(())
    }

    async fn write_home(&mut self, fs: &Filesystem) -> Result<(), Ext4Error> {
        let device = fs.device();
        let block_bytes = u64::from(fs.superblock().block_bytes);
        let mut blocks: Vec<(u64, Block, Tid)> = self
            .homeless
            .iter()
            .map(|(block, (content, tid))| (*block, content.clone(), *tid))
            .collect();
        blocks.sort_unstable_by_key(|(block, ..)| *block);
        write_runs(device, block_bytes, &blocks).await?;
        log::flush(device).await?;
        self.homeless.clear();
        for (block, _, tid) in blocks {
            fs.cache().written_home(block, tid);
        }
        Ok(())
    }
}

/// Writes sorted blocks, neighbours together.
async fn write_runs(
    device: &dyn Device,
    block_bytes: u64,
    blocks: &[(u64, Block, Tid)],
) -> Result<(), Ext4Error> {
    let most = MAX_WRITE_BYTES / block_bytes as usize;
    let runs = blocks
        .chunk_by(|(a, ..), (b, ..)| a + 1 == *b)
        .flat_map(|run| run.chunks(most));
    let write = |run: &[(u64, Block, Tid)]| {
        let offset = run[0].0 * block_bytes;
        let parts: Vec<&[u8]> = run.iter().map(|(_, content, _)| &content[..]).collect();
        (offset, parts.concat())
    };
    stream::iter(runs.map(|run| Ok(write(run))))
        .try_for_each_concurrent(WRITES_AT_ONCE, |(offset, bytes)| {
            log::write(device, offset, bytes.into())
        })
        .await
}

/// Ends the running transaction, inside the closed barrier; `None` if it changed nothing.
async fn freeze(fs: &Filesystem) -> Result<Option<Frozen>, FsError> {
    let transactions = fs.transactions();
    transactions.check()?;
    if transactions.running().is_empty() {
        let empty = transactions.swap();
        transactions.committed(empty.tid);
        return Ok(None);
    }
    let (tid, groups) = {
        let running = transactions.running();
        (running.tid, running.groups.clone())
    };
    let orphan = fs.orphans().first();
    let sealed = fs.groups().seal(groups.into_iter(), orphan, tid).await?;
    transactions.running().changed.extend(sealed);
    let running: Running = transactions.swap();
    let blocks = running.changed.iter().filter_map(|block| {
        let content = fs.cache().freeze(*block, tid)?;
        Some((*block, content))
    });
    let record = Record {
        blocks: blocks.collect(),
        revoked: running.freed.metadata.iter().copied().collect(),
    };
    let freed = running.freed;
    Ok(Some(Frozen { tid, freed, record }))
}

/// What a committed transaction freed may be given away.
async fn release(fs: &Filesystem, freed: Freed) {
    let metadata = freed.metadata.into_iter().map(|block| block..block + 1);
    let blocks: Vec<Range<u64>> = freed.data.into_iter().chain(metadata).collect();
    if fs.options().discard {
        let block_bytes = u64::from(fs.superblock().block_bytes);
        let discard = |blocks: Range<u64>| async move {
            let len_bytes = (blocks.end - blocks.start) * block_bytes;
            let zeroed = fs.device().zero(blocks.start * block_bytes, len_bytes);
            if let Err(error) = zeroed.await {
                tracing::warn!("freed space is not given back to the volume: {error}");
            }
        };
        let discards = stream::iter(blocks.clone());
        discards.for_each_concurrent(WRITES_AT_ONCE, discard).await;
    }
    for range in blocks {
        fs.groups().settle_freed(range.end - range.start);
        fs.groups().release_blocks(range);
    }
    for inode in freed.inodes {
        fs.groups().release_inode(inode);
    }
}

impl Filesystem {
    /// Waits until transaction `tid` is durable.
    ///
    /// # Errors
    /// [`FsError::Aborted`].
    pub async fn commit_and_wait(&self, tid: Tid) -> Result<(), FsError> {
        if self.transactions().is_committed(tid) {
            return Ok(());
        }
        let fs = self.clone();
        // A task of its own: who waits may give up, a commit may not.
        tokio::spawn(async move { fs.commit_up_to(tid).await });
        self.transactions().wait_for(tid).await
    }

    /// Commits unless `tid` has committed. A failure aborts the journal.
    pub(super) async fn commit_up_to(&self, tid: Tid) {
        let mut committer = self.committer().lock().await;
        let Some(committer) = committer.as_mut() else {
            return;
        };
        if self.transactions().is_committed(tid) || self.transactions().check().is_err() {
            return;
        }
        if let Err(error) = committer.commit(self).await {
            self.transactions().abort(&error.to_string());
        }
    }

    /// Does `work` while what is on the device needs no replay: a snapshot taken meanwhile is one of a filesystem
    /// that was unmounted. Operations that change metadata wait.
    ///
    /// # Errors
    /// [`FsError::Aborted`], the device's; `work` was not begun then.
    pub async fn quiesced<T>(&self, work: impl Future<Output = T>) -> Result<T, FsError> {
        if self.is_read_only() {
            return Ok(work.await);
        }
        self.sync().await?;
        let mut committer = self.committer().lock().await;
        let _nobody_inside = self.transactions().close_barrier().await;
        match committer.as_mut() {
            Some(committer) => self.settle(committer).await?,
            None => self.transactions().check()?,
        }
        Ok(work.await)
    }

    /// Makes what `change` does to at most `blocks` blocks a transaction of its own, while nobody is inside one:
    /// it may change what operations rely on. A failure aborts the journal. `false` if the journal is too small for
    /// it; `change` was not begun then.
    pub(super) async fn commit_alone(
        &self,
        blocks: usize,
        change: impl Future<Output = Result<(), FsError>>,
    ) -> Result<bool, FsError> {
        let mut committer = self.committer().lock().await;
        self.transactions().check()?;
        let Some(committer) = committer.as_mut() else {
            return Err(FsError::ReadOnly);
        };
        if committer.log.needed(blocks, 0) > committer.log.capacity() {
            return Ok(false);
        }
        let _nobody_inside = self.transactions().close_barrier().await;
        let done = async {
            committer.commit_closed(self).await?;
            change.await?;
            committer.commit_closed(self).await
        };
        let done = done.await;
        if let Err(error) = &done {
            self.transactions().abort(&error.to_string());
        }
        done.map(|()| true)
    }

    /// Commits and checkpoints, with the barrier closed. A failure aborts the journal.
    async fn settle(&self, committer: &mut Committer) -> Result<(), FsError> {
        let settled = async {
            committer.commit_closed(self).await?;
            committer.quiet(self).await
        };
        let settled = settled.await;
        if let Err(error) = &settled {
            self.transactions().abort(&error.to_string());
        }
        settled
    }

    /// Unmounts: everything is in its place and durable afterwards, and nothing is left to replay.
    ///
    /// # Errors
    /// [`FsError::Aborted`], the device's.
    pub async fn close(&self) -> Result<(), FsError> {
        if self.is_read_only() {
            return Ok(());
        }
        self.sync().await?;
        let mut slot = self.committer().lock().await;
        let _nobody_inside = self.transactions().close_barrier().await;
        if let Some(mut committer) = slot.take() {
            self.settle(&mut committer).await?;
            self.transactions().end("it was unmounted");
        }
        Ok(())
    }

    /// The running transaction.
    pub(super) fn running_tid(&self) -> Tid {
        self.transactions().running().tid
    }
}
