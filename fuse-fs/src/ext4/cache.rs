//! Blocks of metadata in memory, each at its newest.
//!
//! A block is an `Arc`: who reads keeps what he saw, and a commit keeps what it froze, while later changes go to
//! a copy. A block may leave memory only when its newest content is in its place on the device: it is neither
//! changed by the running transaction (`changed_in`) nor logged and not yet written home (`logged_in`).

use crate::ext4::device::Device;
use crate::ext4::error::Ext4Error;
use crate::ext4::transaction::Tid;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The content of a block.
pub type Block = Arc<[u8]>;

const SHARDS: usize = 64;
/// Loads of one stripe are one after the other, so that two never read the same block.
const LOAD_STRIPES: usize = 512;
/// How many blocks one insertion looks at to make room.
const EVICTION_STEPS: usize = 8;
/// Places of entries that are gone, which the queue of a shard may have beyond as many as there are entries.
const QUEUE_SLACK: usize = 256;
const NEVER: Tid = Tid(0);

struct Entry {
    block: Block,
    /// It was found right after it was read, or was made here.
    checked: bool,
    recently_used: bool,
    changed_in: Tid,
    logged_in: Tid,
    /// Which of the block's places in the queue counts.
    place: u64,
}

#[derive(Default)]
struct Shard {
    entries: HashMap<u64, Entry>,
    /// The order of eviction, by block and place; places of entries that are gone may be in it.
    queue: VecDeque<(u64, u64)>,
    next_place: u64,
    hits: u64,
    misses: u64,
}

/// The metadata blocks of one filesystem.
pub struct Cache {
    device: Arc<dyn Device>,
    block_bytes: u32,
    shards: Vec<Mutex<Shard>>,
    stripes: Vec<tokio::sync::Mutex<()>>,
    max_per_shard: usize,
}

impl Cache {
    /// A cache that tries to stay below `max_bytes`.
    #[must_use]
    pub fn new(device: Arc<dyn Device>, block_bytes: u32, max_bytes: u64) -> Self {
        let max_blocks = usize::try_from(max_bytes / u64::from(block_bytes)).unwrap_or(usize::MAX);
        Self {
            device,
            block_bytes,
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            stripes: (0..LOAD_STRIPES)
                .map(|_| tokio::sync::Mutex::default())
                .collect(),
            max_per_shard: max_blocks / SHARDS,
        }
    }

    fn shard(&self, block: u64) -> MutexGuard<'_, Shard> {
        let shard = &self.shards[(block % SHARDS as u64) as usize];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The block, if it is in memory.
    #[must_use]
    pub fn get(&self, block: u64) -> Option<Block> {
        let mut shard = self.shard(block);
        let entry = shard.entries.get_mut(&block)?;
        entry.recently_used = true;
        Some(entry.block.clone())
    }

    /// How often a block that was wanted was in memory, and how often not.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let count = |(hits, misses), shard: &Mutex<Shard>| {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            (hits + shard.hits, misses + shard.misses)
        };
        self.shards.iter().fold((0, 0), count)
    }

    /// The block, from the device if it is not in memory.
    ///
    /// # Errors
    /// What the device reports.
    pub async fn read(&self, block: u64) -> Result<Block, Ext4Error> {
        self.read_checked(block, |_| Ok(())).await
    }

    /// The block; `check` sees it unless it was found right before.
    ///
    /// # Errors
    /// What the device reports, or `check`.
    pub async fn read_checked(
        &self,
        block: u64,
        check: impl FnOnce(&[u8]) -> Result<(), Ext4Error>,
    ) -> Result<Block, Ext4Error> {
        self.load(block).await?;
        let found = {
            let mut shard = self.shard(block);
            shard.entries.get_mut(&block).map(|entry| {
                entry.recently_used = true;
                (entry.block.clone(), entry.checked)
            })
        };
        let (content, checked) = match found {
            Some(found) => found,
            None => (self.fetch(block).await?, false),
        };
        if !checked {
            check(&content)?;
            if let Some(entry) = self.shard(block).entries.get_mut(&block) {
                entry.checked |= Arc::ptr_eq(&entry.block, &content);
            }
        }
        Ok(content)
    }

    async fn load(&self, block: u64) -> Result<(), Ext4Error> {
        if self.shard(block).look_up(block) {
            return Ok(());
        }
        let stripe = &self.stripes[(block % LOAD_STRIPES as u64) as usize];
        let _one_at_a_time = stripe.lock().await;
        if self.shard(block).entries.contains_key(&block) {
            return Ok(());
        }
        let content = self.fetch(block).await?;
        self.insert(block, content, false);
        Ok(())
    }

    async fn fetch(&self, block: u64) -> Result<Block, Ext4Error> {
        let offset_bytes = block * u64::from(self.block_bytes);
        let read = self.device.read(offset_bytes, self.block_bytes).await;
        let bytes = read.map_err(|source| Ext4Error::Read {
            offset_bytes,
            len_bytes: u64::from(self.block_bytes),
            source,
        })?;
        Ok(Block::from(&bytes[..]))
    }

    /// Puts a block in that is not there; what is there is younger.
    fn insert(&self, block: u64, content: Block, checked: bool) {
        let mut shard = self.shard(block);
        if !shard.entries.contains_key(&block) {
            shard.add(block, content, checked, NEVER);
            shard.make_room(self.max_per_shard);
        }
    }

    /// Changes the block in transaction `tid`; whether it is the transaction's first change of it.
    ///
    /// # Errors
    /// What the device reports.
    pub async fn update<R>(
        &self,
        block: u64,
        tid: Tid,
        change: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<(R, bool), Ext4Error> {
        let mut change = Some(change);
        loop {
            self.load(block).await?;
            if let Some(done) = self.update_cached(block, tid, &mut change) {
                return Ok(done);
            }
        }
    }

    fn update_cached<R>(
        &self,
        block: u64,
        tid: Tid,
        change: &mut Option<impl FnOnce(&mut [u8]) -> R>,
    ) -> Option<(R, bool)> {
        let mut shard = self.shard(block);
        let entry = shard.entries.get_mut(&block)?;
        let result = change.take()?(Arc::make_mut(&mut entry.block));
        let first = entry.changed_in != tid;
        entry.changed_in = tid;
        entry.checked = true;
        entry.recently_used = true;
        Some((result, first))
    }

    /// Makes the block anew in transaction `tid`, of zeros and what `fill` puts there.
    pub fn create(&self, block: u64, tid: Tid, fill: impl FnOnce(&mut [u8])) {
        let mut bytes = vec![0; self.block_bytes as usize];
        fill(&mut bytes);
        let mut shard = self.shard(block);
        shard.add(block, bytes.into(), true, tid);
        shard.make_room(self.max_per_shard);
    }

    /// The block was freed: nobody needs its content.
    pub fn forget(&self, block: u64) {
        self.shard(block).entries.remove(&block);
    }

    /// What transaction `tid` made of the block, for the log; later changes go to a copy.
    #[must_use]
    pub fn freeze(&self, block: u64, tid: Tid) -> Option<Block> {
        let mut shard = self.shard(block);
        let entry = shard.entries.get_mut(&block)?;
        if entry.changed_in != tid {
            return None;
        }
        entry.changed_in = NEVER;
        entry.logged_in = tid;
        Some(entry.block.clone())
    }

    /// What transaction `tid` made of the block is in its place.
    pub fn written_home(&self, block: u64, tid: Tid) {
        if let Some(entry) = self.shard(block).entries.get_mut(&block)
            && entry.logged_in == tid
        {
            entry.logged_in = NEVER;
        }
    }
}

impl Shard {
    fn look_up(&mut self, block: u64) -> bool {
        let found = self.entries.contains_key(&block);
        *if found {
            &mut self.hits
        } else {
            &mut self.misses
        } += 1;
        found
    }

    fn add(&mut self, block: u64, content: Block, checked: bool, changed_in: Tid) {
        self.next_place += 1;
        let entry = Entry {
            block: content,
            checked,
            recently_used: true,
            changed_in,
            logged_in: NEVER,
            place: self.next_place,
        };
        self.queue.push_back((block, self.next_place));
        self.entries.insert(block, entry);
        if self.queue.len() > 2 * self.entries.len() + QUEUE_SLACK {
            let entries = &self.entries;
            let counts = |(block, place): &(u64, u64)| {
                entries
                    .get(block)
                    .is_some_and(|entry| entry.place == *place)
            };
            self.queue.retain(counts);
        }
    }

    fn make_room(&mut self, max: usize) {
        for _ in 0..EVICTION_STEPS {
            if self.entries.len() <= max {
                return;
            }
            let Some((block, place)) = self.queue.pop_front() else {
                return;
            };
            let Some(entry) = self.entries.get_mut(&block) else {
                continue;
            };
            if entry.place != place {
                continue;
            }
            let needed = entry.changed_in != NEVER || entry.logged_in != NEVER;
            if needed || entry.recently_used {
                entry.recently_used = false;
                self.queue.push_back((block, place));
            } else {
                self.entries.remove(&block);
            }
        }
    }
}
