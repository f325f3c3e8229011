//! From memory to the disk: data first, then the transaction that maps it.
//!
//! One flush of a file at a time, under its flush lock, which whoever takes blocks away from a file holds, too.
//! So what was looked up when the data left is still so when it has arrived.

use crate::ext4::error::FsError;
use crate::ext4::extent::Run;
use crate::ext4::extent_tree::{EDIT_BLOCKS, EDIT_CREDITS, Mapping, from};
use crate::ext4::file_data::Page;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::handle::Handle;
use crate::ext4::inode_cell::{InodeCell, InodeState};
use crate::ext4::journal::log;
use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// From so much on data leaves memory without being asked: a stream keeps the servers busy all the time.
const WRITEBACK_BYTES: u64 = 32 << 20;
/// What one step of a flush takes.
const BATCH_BYTES: u64 = 16 << 20;
const MAX_WRITE_BYTES: usize = 1 << 20;
const WRITES_AT_ONCE: usize = 16;
const FILES_AT_ONCE: usize = 32;

/// The files with data that is only in memory, and how much that is.
#[derive(Default)]
pub(super) struct Dirty {
    bytes: AtomicU64,
    /// By number and by cell: a number is given away again while the file that had it is still here.
    files: Mutex<BTreeMap<(u32, usize), Arc<InodeCell>>>,
    /// Held by who writes back: a sync has to wait for what another one took.
    writing_back: tokio::sync::Mutex<()>,
    /// There is less now.
    pub(super) room: Notify,
    /// There is too much.
    pub(super) pressure: Notify,
}

impl Dirty {
    fn files(&self) -> MutexGuard<'_, BTreeMap<(u32, usize), Arc<InodeCell>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where a piece of data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// Blocks that the file maps.
    Mapped,
    /// Blocks that it maps, but not yet as written.
    Unwritten,
    /// Blocks that were claimed for it.
    Claimed,
}

/// Consecutive blocks of a file that go to consecutive blocks.
#[derive(Debug)]
struct Piece {
    logical: u64,
    physical: u64,
    pages: Vec<Bytes>,
    target: Target,
}

impl Piece {
    fn blocks(&self) -> u64 {
        self.pages.len() as u64
    }

    fn place(&self) -> Range<u64> {
        self.physical..self.physical + self.blocks()
    }
}

impl Filesystem {
    /// Bytes of files that are acknowledged and only in memory.
    #[must_use]
    pub fn dirty_bytes(&self) -> u64 {
        self.dirty().bytes.load(Ordering::Acquire)
    }

    pub(super) fn add_dirty_bytes(&self, cell: &Arc<InodeCell>, bytes: u64) {
        let all = self.dirty().bytes.fetch_add(bytes, Ordering::AcqRel) + bytes;
        self.note_dirty(cell);
        if all > (self.options().dirty_limit_bytes / 2).min(WRITEBACK_BYTES) {
            self.dirty().pressure.notify_one();
        }
    }

    pub(super) fn subtract_dirty_bytes(&self, bytes: u64) {
        self.dirty().bytes.fetch_sub(bytes, Ordering::AcqRel);
        self.dirty().room.notify_waiters();
    }

    /// The file is looked at by the next writeback.
    pub(super) fn note_dirty(&self, cell: &Arc<InodeCell>) {
        let mut files = self.dirty().files();
        let key = (cell.number(), Arc::as_ptr(cell).addr());
        files.entry(key).or_insert_with(|| cell.clone());
    }

    /// Waits while too much is only in memory.
    pub(super) async fn wait_for_room(&self) {
        loop {
            let room = self.dirty().room.notified();
            if self.dirty_bytes() <= self.options().dirty_limit_bytes {
                return;
            }
            self.dirty().pressure.notify_one();
            room.await;
        }
    }

    /// Writes what is dirty now. What cannot be written is told to who syncs the file.
    pub(super) async fn write_back(&self) {
        let _alone = self.dirty().writing_back.lock().await;
        let files = std::mem::take(&mut *self.dirty().files());
        stream::iter(files.into_values())
            .for_each_concurrent(FILES_AT_ONCE, |cell| async move {
                if let Err(error) = self.flush_file(&cell, true).await {
                    tracing::error!("inode {}: data was lost: {error}", cell.number());
                }
            })
            .await;
    }

    /// Writes the file's data, and its times if they are wanted.
    pub(super) async fn flush_file(
        &self,
        cell: &Arc<InodeCell>,
        times: bool,
    ) -> Result<(), FsError> {
        let _alone = cell.lock_flush().await;
        self.flush_locked(cell).await?;
        let mut inode = cell.write().await;
        if times && inode.data.times_changed && !inode.freed {
            self.put_times(&mut inode).await?;
        }
        Ok(())
    }

    async fn put_times(&self, inode: &mut InodeState) -> Result<(), FsError> {
        let mut handle = self.begin_with_headroom(1, 0).await?;
        handle.put_inode(inode).await?;
        inode.data.times_changed = false;
        let _ = handle.finish();
        Ok(())
    }

    /// Writes the file's data. The caller has the flush lock.
    pub(super) async fn flush_locked(&self, cell: &Arc<InodeCell>) -> Result<(), FsError> {
        loop {
            let pieces = {
                let mut inode = cell.write().await;
                match self.take_and_zero(&mut inode).await {
                    Ok(pieces) => pieces,
                    Err(error) => return self.lose(&mut inode, Vec::new(), error),
                }
            };
            if pieces.is_empty() {
                return self.catch_up_size(cell).await;
            }
            let written = self.write_pieces(&pieces).await;
            let mut inode = cell.write().await;
            inode.data.arrived.note(self.running_tid());
            if let Err(error) = written {
                return self.lose(&mut inode, pieces, error);
            }
            self.map_pieces(&mut inode, pieces).await?;
        }
    }

    /// Lets the size on disk be the one that programs see, also where the pages behind it were punched out.
    async fn catch_up_size(&self, cell: &Arc<InodeCell>) -> Result<(), FsError> {
        let mut inode = cell.write().await;
        if inode.data.size_bytes.is_none() || !inode.data.dirty.is_empty() {
            return Ok(());
        }
        let mut handle = self.begin_with_headroom(1, 0).await?;
        let size = inode.size_bytes();
        inode.set_disk_size(size);
        handle.put_inode(&mut inode).await?;
        inode.data_tid = handle.finish();
        Ok(())
    }

    /// As [`Self::take_batch`]. If the file grows and its last block stays as it is on the device, nothing old is
    /// left behind its end.
    async fn take_and_zero(&self, inode: &mut InodeState) -> Result<Vec<Piece>, FsError> {
        let last = inode.raw.size_bytes() / u64::from(self.superblock().block_bytes);
        if inode.data.size_bytes.is_some() && !inode.data.dirty.contains_key(&last) {
            self.zero_behind_end(inode).await?;
        }
        self.take_batch(inode).await
    }

    /// Moves some dirty pages to those that are being written, each with its place.
    async fn take_batch(&self, inode: &mut InodeState) -> Result<Vec<Piece>, FsError> {
        let most = (BATCH_BYTES / u64::from(self.superblock().block_bytes)) as usize;
        let dirty = inode.data.dirty.iter().take(most);
        let pages: Vec<(u64, Page)> = dirty.map(|(at, page)| (*at, page.clone())).collect();
        let promised = pages.iter().filter(|(_, page)| page.promised).count() as u64;
        let mut pieces = Vec::new();
        let placed = self.place_pages(inode, &pages, &mut pieces).await;
        let claimed: u64 = pieces
            .iter()
            .filter(|piece| piece.target == Target::Claimed)
            .map(Piece::blocks)
            .sum();
        for (logical, page) in pages {
            inode.data.dirty.remove(&logical);
            inode.data.writing.insert(logical, page.bytes);
        }
        if claimed <= promised {
            self.groups().give_back(promised - claimed);
        }
        if let Err(error) = placed {
            self.release_claims(&pieces);
            return Err(error);
        }
        Ok(pieces)
    }

    async fn place_pages(
        &self,
        inode: &InodeState,
        pages: &[(u64, Page)],
        pieces: &mut Vec<Piece>,
    ) -> Result<(), FsError> {
        let mut claimed = 0;
        let promised = pages.iter().filter(|(_, page)| page.promised).count() as u64;
        let mut goal = None;
        let mut at = 0;
        while at < pages.len() {
            let (logical, _) = pages[at];
            let same_run =
                |(index, (page, _)): &(usize, &(u64, Page))| *page == logical + *index as u64;
            let run = pages[at..].iter().enumerate().take_while(same_run).count() as u64;
            let (physical, blocks, target) = match self.lookup(&inode.raw, logical).await? {
                Mapping::Run(run_there) => {
                    let target = if run_there.unwritten {
                        Target::Unwritten
                    } else {
                        Target::Mapped
                    };
                    (run_there.physical, run_there.blocks.min(run), target)
                }
                Mapping::Hole { blocks } => {
                    let near = match goal {
                        Some(near) => near,
                        None => self.goal(&inode.raw, logical).await?,
                    };
                    let want = blocks.min(run);
                    if claimed + want > promised {
                        self.groups().promise(claimed + want - promised, 0)?;
                    }
                    let place = self.groups().claim_blocks(near, want as u32).await?;
                    claimed += place.end - place.start;
                    goal = Some(place.end);
                    (place.start, place.end - place.start, Target::Claimed)
                }
            };
            let next = at + blocks as usize;
            let pages = pages[at..next].iter().map(|(_, page)| page.bytes.clone());
            pieces.push(Piece {
                logical,
                physical,
                pages: pages.collect(),
                target,
            });
            at = next;
        }
        Ok(())
    }

    async fn write_pieces(&self, pieces: &[Piece]) -> Result<(), FsError> {
        let block_bytes = self.superblock().block_bytes as usize;
        let most = MAX_WRITE_BYTES / block_bytes;
        let writes = pieces.iter().flat_map(|piece| {
            let starts = (piece.physical..).step_by(most);
            starts.zip(piece.pages.chunks(most))
        });
        let write = |(physical, pages): (u64, &[Bytes])| {
            let offset = physical * block_bytes as u64;
            let data = match pages {
                [page] => page.clone(),
                _ => {
                    let mut data = BytesMut::with_capacity(pages.len() * block_bytes);
                    pages.iter().for_each(|page| data.extend_from_slice(page));
                    data.freeze()
                }
            };
            (offset, data)
        };
        let device = self.device();
        stream::iter(writes.map(|piece| Ok(write(piece))))
            .try_for_each_concurrent(WRITES_AT_ONCE, |(offset, data)| {
                log::write(device, offset, data)
            })
            .await?;
        Ok(())
    }

    /// Lets the file map what was written, and its size on disk grow.
    async fn map_pieces(&self, inode: &mut InodeState, pieces: Vec<Piece>) -> Result<(), FsError> {
        let mut pieces = pieces.into_iter();
        while let Some(piece) = pieces.next() {
            if let Err(error) = self.map_piece(inode, &piece).await {
                let rest = std::iter::once(piece).chain(pieces).collect();
                return self.lose(inode, rest, error);
            }
        }
        self.forget_writing(inode);
        Ok(())
    }

    async fn map_piece(&self, inode: &mut InodeState, piece: &Piece) -> Result<(), FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        let end = (piece.logical + piece.blocks()) * block_bytes;
        let size = inode.size_bytes().min(end).max(inode.raw.size_bytes());
        if piece.target == Target::Mapped && size == inode.raw.size_bytes() {
            return Ok(());
        }
        let mut handle = self
            .begin_with_headroom(EDIT_CREDITS + 4, EDIT_BLOCKS)
            .await?;
        match piece.target {
            Target::Mapped => {}
            Target::Unwritten => {
                handle
                    .mark_written(inode, piece.logical, piece.blocks())
                    .await?;
            }
            Target::Claimed => {
                handle.use_claimed(piece.place()).await?;
                handle
                    .insert_run(inode, piece.logical, piece.physical, piece.blocks(), false)
                    .await?;
            }
        }
        inode.set_disk_size(size);
        handle.put_inode(inode).await?;
        inode.data.times_changed = false;
        inode.data_tid = handle.finish();
        Ok(())
    }

    /// Data cannot be written: it is gone, and the next fsync says so.
    fn lose(
        &self,
        inode: &mut InodeState,
        pieces: Vec<Piece>,
        error: FsError,
    ) -> Result<(), FsError> {
        self.release_claims(&pieces);
        self.forget_writing(inode);
        inode.data.lost = Some(error.to_string());
        Err(error)
    }

    fn release_claims(&self, pieces: &[Piece]) {
        for piece in pieces
            .iter()
            .filter(|piece| piece.target == Target::Claimed)
        {
            self.groups().release_blocks(piece.place());
        }
    }

    fn forget_writing(&self, inode: &mut InodeState) {
        let pages = std::mem::take(&mut inode.data.writing).len() as u64;
        self.subtract_dirty_bytes(pages * u64::from(self.superblock().block_bytes));
    }

    /// Drops what is dirty in `blocks` of a file.
    pub(super) fn drop_dirty(&self, inode: &mut InodeState, blocks: Range<u64>) {
        let (pages, promised) = inode.data.drop_dirty(blocks);
        self.groups().give_back(promised);
        self.subtract_dirty_bytes(pages * u64::from(self.superblock().block_bytes));
    }

    /// Makes durable what was written to the file; with `data_only`, times of a file that did not grow may stay.
    ///
    /// # Errors
    /// [`FsError::Aborted`]; [`FsError::Lost`] once, if data that was acknowledged could not be written.
    pub async fn fsync(&self, cell: &Arc<InodeCell>, data_only: bool) -> Result<(), FsError> {
        if self.is_read_only() {
            return Ok(());
        }
        let flushed = self.flush_file(cell, !data_only).await;
        let (tid, arrived) = {
            let mut inode = cell.write().await;
            if let Some(reason) = inode.data.lost.take() {
                return Err(FsError::Lost { reason });
            }
            flushed?;
            let tid = if data_only { inode.data_tid } else { inode.tid };
            (tid, inode.data.arrived)
        };
        self.commit_and_wait(tid).await?;
        if arrived.durable < arrived.writes {
            // A commit that began before the data arrived says nothing of it.
            if !self.transactions().has_flushed(arrived.during) {
                log::flush(self.device()).await?;
            }
            let known = &mut cell.write().await.data.arrived;
            known.durable = known.durable.max(arrived.writes);
        }
        Ok(())
    }
}

impl Handle {
    /// Marks unwritten blocks of a file as written. Does not put the inode.
    async fn mark_written(
        &mut self,
        inode: &mut InodeState,
        logical: u64,
        blocks: u64,
    ) -> Result<(), FsError> {
        let (mut at, end) = (logical, logical + blocks);
        while at < end {
            let mark = |runs: &mut Vec<Run>, _| {
                *runs = runs
                    .iter()
                    .flat_map(|run| split_written(*run, at..end))
                    .collect();
            };
            at = self.edit_extents(inode, at, mark).await?;
        }
        Ok(())
    }
}

/// A run cut at the ends of `range`, and written inside.
fn split_written(run: Run, range: Range<u64>) -> Vec<Run> {
    let end = run.logical + run.blocks;
    let first = range.start.clamp(run.logical, end);
    let last = range.end.clamp(first, end);
    let mut parts = [from(run, run.logical), from(run, first), from(run, last)];
    parts[0].blocks = first - run.logical;
    parts[1].blocks = last - first;
    parts[1].unwritten = false;
    parts.into_iter().filter(|part| part.blocks > 0).collect()
}
