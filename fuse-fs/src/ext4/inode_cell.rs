//! The inodes in memory: one cell for each, however many use it.

use crate::ext4::error::FsError;
use crate::ext4::file_data::{Arrived, FileData};
use crate::ext4::filesystem::Filesystem;
use crate::ext4::raw_inode::RawInode;
use crate::ext4::transaction::Tid;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};

const SHARDS: usize = 64;
/// Cells of a shard before those that nobody uses are looked for.
const MIN_CELLS: usize = 1024;

/// An inode, and what of its file is only in memory.
pub struct InodeState {
    /// As it is in its table, once it was put there.
    pub raw: RawInode,
    /// The youngest transaction that changed it.
    pub tid: Tid,
    /// The youngest transaction that its data needs.
    pub(super) data_tid: Tid,
    pub(super) data: FileData,
    pub(super) freed: bool,
}

impl InodeState {
    #[must_use]
    pub fn new(raw: RawInode, tid: Tid) -> Self {
        Self {
            raw,
            tid,
            data_tid: tid,
            data: FileData::default(),
            freed: false,
        }
    }

    /// The size that programs see.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.data.size_bytes.unwrap_or(self.raw.size_bytes())
    }

    /// Space in units of 512 bytes, with what data in memory will need.
    #[must_use]
    pub fn sectors(&self, block_bytes: u32) -> u64 {
        let promised = self.data.dirty.values().filter(|page| page.promised);
        let blocks = promised.count() + self.data.writing.len();
        self.raw.sectors() + blocks as u64 * u64::from(block_bytes / 512)
    }

    /// Nothing of the file's data is only in memory.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.data.dirty.is_empty() && self.data.writing.is_empty()
    }

    pub(super) fn set_visible_size(&mut self, size_bytes: u64) {
        let ahead = size_bytes != self.raw.size_bytes();
        self.data.size_bytes = ahead.then_some(size_bytes);
    }

    pub(super) fn set_disk_size(&mut self, size_bytes: u64) {
        let visible = self.size_bytes();
        self.raw.set_size_bytes(size_bytes);
        self.set_visible_size(visible);
    }
}

/// The place of one inode. Its lock is taken before a handle is begun.
pub struct InodeCell {
    number: u32,
    state: RwLock<InodeState>,
    /// Held while data is on its way to the disk, and by who takes blocks away; before the state's lock.
    flush: tokio::sync::Mutex<()>,
}

impl InodeCell {
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    pub async fn read(&self) -> RwLockReadGuard<'_, InodeState> {
        self.state.read().await
    }

    pub(super) async fn lock_flush(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.flush.lock().await
    }

    pub async fn write(&self) -> RwLockWriteGuard<'_, InodeState> {
        self.state.write().await
    }
}

#[derive(Default)]
struct Shard {
    cells: HashMap<u32, Arc<InodeCell>>,
    /// So many were in use when it was last looked.
    in_use: usize,
}

/// All cells.
pub struct Inodes {
    shards: Vec<Mutex<Shard>>,
    /// Held while an inode is read, so that what is read is not older than what a cell had meanwhile.
    loading: Vec<tokio::sync::Mutex<()>>,
}

impl Default for Inodes {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            loading: (0..SHARDS).map(|_| tokio::sync::Mutex::default()).collect(),
        }
    }
}

impl Inodes {
    fn shard(&self, number: u32) -> MutexGuard<'_, Shard> {
        let shard = &self.shards[number as usize % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[must_use]
    pub fn get(&self, number: u32) -> Option<Arc<InodeCell>> {
        self.shard(number).cells.get(&number).cloned()
    }

    /// A new cell of the inode in `state`.
    pub fn add(&self, state: InodeState) -> Arc<InodeCell> {
        let number = state.raw.number();
        let cell = Arc::new(InodeCell {
            number,
            state: RwLock::new(state),
            flush: tokio::sync::Mutex::default(),
        });
        let mut shard = self.shard(number);
        if shard.cells.len() >= MIN_CELLS.max(2 * shard.in_use) {
            shard.cells.retain(|_, cell| Arc::strong_count(cell) > 1);
            shard.in_use = shard.cells.len();
        }
        shard.cells.insert(number, cell.clone());
        cell
    }

    /// Forgets an inode that was freed.
    pub fn remove(&self, number: u32) {
        self.shard(number).cells.remove(&number);
    }
}

impl Filesystem {
    /// The inode `number`.
    ///
    /// # Errors
    /// [`FsError::Stale`] if it is not in use; the device's; what is wrong with it.
    pub async fn inode(&self, number: u32) -> Result<Arc<InodeCell>, FsError> {
        if let Some(cell) = self.inodes().get(number) {
            return Ok(cell);
        }
        let _one_at_a_time = self.inodes().loading[number as usize % SHARDS].lock().await;
        if let Some(cell) = self.inodes().get(number) {
            return Ok(cell);
        }
        let raw = self.read_raw(number).await?;
        if raw.mode() == 0 || (raw.links() == 0 && self.orphans().next_of(number).is_none()) {
            return Err(FsError::Stale(number));
        }
        // It may have been changed and forgotten since the last commit.
        let running = self.running_tid();
        let mut state = InodeState::new(raw, running);
        state.data.arrived = Arrived::unknown(running);
        Ok(self.inodes().add(state))
    }
}
