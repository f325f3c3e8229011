//! The store as the reactor sees it: an async handle around the engine.
//!
//! Requests run on the caller's task and finish without awaiting unless they need the device or space
//! in the log. Two worker threads run the two lanes of jobs, two more the cold reads. One local
//! task takes the outcomes. Nothing runs while the store is idle.

use super::engine::{Engine, Step};
use super::error::StoreError;
use super::lanes::Lanes;
use super::place::Placement;
use super::runner::{Runner, StoreEngine, take_outcomes};
use super::scrub::{Scrubbed, StoredChunk};
use super::spans::{Spans, note_ends};
use super::types::{
    PART_BYTES, PageAt, Parent, ReadPart, SnapshotUsage, StoreOptions, StoreUsage, VolumeUsage,
};
use crate::id::{Epoch, LayerRun, PageNo, ScrubPosition, SnapshotId, VolumeId};
use crate::io::device::Device;
use crate::io::disk::{Disk, FileDisk};
use crate::planted::{Plant, planted};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::path::Path;
use std::rc::Rc;
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::spawn_local;

/// What all writes of zeros share.
static ZEROS: LazyLock<Bytes> = LazyLock::new(|| vec![0; PART_BYTES as usize].into());
/// Time after which groups are swept again that the disk kept from it; it doubles up to the second one.
const SWEEP_PAUSE: Duration = Duration::from_secs(5);
const SWEEP_PAUSE_MAX: Duration = Duration::from_secs(60);
/// Groups swept before other tasks get a turn.
const SWEEP_TURN: usize = 16;
/// Groups whose usage is counted before other tasks get a turn.
const USAGE_TURN: usize = 64;
/// Times that a scrub looks at a chunk that changes under it.
const SCRUB_TRIES: usize = 8;

/// An open page store. Cheap to clone; for one thread. Must be opened and used within a tokio
/// `LocalSet` (or local runtime) with time enabled.
#[derive(Clone)]
pub struct PageStore {
    pub(super) runner: Rc<Runner>,
}

impl PageStore {
    /// Opens the store in `dir` and recovers it; formats an empty directory.
    ///
    /// Errors: `InUse`, `NewerVersion`, `Corrupt`, `Directory` (not readable or writable), `BadOption`.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<PageStore, StoreError> {
        let open = || FileDisk::open(dir).map(|disk| Arc::new(disk) as Arc<dyn Disk>);
        PageStore::open_on(dir, open, &Device::Blocking, options)
    }

    /// As [`Self::open`], on the disk that `open` gives; `path` is for messages.
    pub fn open_on(
        path: &Path,
        open: impl FnOnce() -> io::Result<Arc<dyn Disk>>,
        device: &Device,
        options: StoreOptions,
    ) -> Result<PageStore, StoreError> {
        let failed = |action, error| StoreError::Directory {
            path: path.to_owned(),
            action,
            source: Arc::new(error),
        };
        let disk = open().map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => StoreError::InUse {
                path: path.to_owned(),
            },
            _ => failed("open the files in it", error),
        })?;
        let sync_interval = options.sync_interval;
        let new_id = RandomState::new().build_hasher().finish();
        let engine = Engine::open(Arc::new(Arc::clone(&disk)), options, new_id)?;
        let (sender, receiver) = mpsc::unbounded_channel();
        let (ended, ends) = mpsc::unbounded_channel();
        let lanes = Lanes::start(&disk, device, &sender)
            .map_err(|error| failed("start worker threads", error))?;
        let runner = Rc::new(Runner {
            engine: RefCell::new(engine),
            device: device.clone(),
            lanes: RefCell::new(Some(lanes)),
            progress: Notify::new(),
            flush_wanted: Cell::new(0),
            timer_armed: Cell::new(false),
            sync_interval,
            spans: Spans::new(ended),
        });
        spawn_local(note_ends(Rc::downgrade(&runner), ends));
        spawn_local(take_outcomes(Rc::downgrade(&runner), receiver));
        let store = PageStore { runner };
        store.resume();
        Ok(store)
    }

    /// Finishes deletions that a crash interrupted.
    fn resume(&self) {
        let (groups, volumes) = self.runner.engine.borrow().unfinished();
        if groups.is_empty() && volumes.is_empty() {
            return;
        }
        let store = self.clone();
        spawn_local(async move {
            for (volume, key) in groups {
                if let Err(error) = store.sweep(volume, vec![key]).await {
                    tracing::warn!(%volume, %error, "space of a deleted snapshot is not freed");
                }
            }
            for volume in volumes {
                if let Err(error) = store.delete_volume(volume).await {
                    tracing::warn!(%volume, %error, "space of a deleted volume is not freed");
                }
            }
        });
    }

    /// Reads; `None` is the head. Unwritten bytes come as holes. Each run of stored bytes is one part.
    pub async fn read(
        &self,
        at: PageAt,
        snapshot: Option<SnapshotId>,
    ) -> Result<Vec<ReadPart>, StoreError> {
        let mut fetched = Vec::new();
        loop {
            let step = self.runner.engine.borrow().read(at, snapshot, &fetched)?;
            match step {
                Step::Done(parts) => return Ok(parts),
                Step::Cold(reads) => fetched.extend(self.runner.fetch(reads).await?),
                Step::Full => self.runner.wait_for_space().await?,
                Step::More => tokio::task::yield_now().await,
            }
        }
    }

    /// Writes; when it returns the bytes survive the death of the process.
    pub async fn write(&self, at: PageAt, data: Bytes, epoch: Epoch) -> Result<(), StoreError> {
        if planted(Plant::AcknowledgeBeforeLog) {
            let store = self.clone();
            spawn_local(async move { store.write_parts(at, data, epoch).await });
            return Ok(());
        }
        self.write_parts(at, data, epoch).await
    }

    async fn write_parts(&self, at: PageAt, data: Bytes, epoch: Epoch) -> Result<(), StoreError> {
        for part in at.parts() {
            let from = (part.offset_bytes - at.offset_bytes) as usize;
            let bytes = data
                .get(from..from + part.len_bytes as usize)
                .unwrap_or(&[]);
            let mut placing = Placing {
                runner: &self.runner,
                placement: Placement::default(),
            };
            let placement = &mut placing.placement;
            self.runner
                .attempt(|engine, fetched| engine.write(part, bytes, epoch, placement, fetched))
                .await?;
        }
        self.runner.after_change();
        self.sweep_turned();
        Ok(())
    }

    /// Makes the range read as zeros. Frees its space, or stores zeros if `keep_allocated`.
    pub async fn zero(
        &self,
        at: PageAt,
        keep_allocated: bool,
        epoch: Epoch,
    ) -> Result<(), StoreError> {
        if keep_allocated {
            for part in at.parts() {
                let zeros = ZEROS.slice(..part.len_bytes as usize);
                self.write(part, zeros, epoch).await?;
            }
            return Ok(());
        }
        self.runner
            .attempt(|engine, fetched| engine.zero(at, epoch, fetched))
            .await?;
        self.runner.after_change();
        self.sweep_turned();
        Ok(())
    }

    /// Everything acknowledged before the call is durable when it returns.
    pub async fn flush(&self) -> Result<(), StoreError> {
        self.runner.flush().await
    }

    /// How often an opening of the store has found changes missing that may have been acknowledged.
    #[must_use]
    pub fn losses(&self) -> u32 {
        self.runner.engine.borrow().losses()
    }

    /// True when a flush would have nothing to do.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.runner.engine.borrow().is_clean()
    }

    /// Takes a snapshot now: the point in time is this call. Flush afterwards to make it durable.
    pub fn take_snapshot(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<(), StoreError> {
        self.runner
            .engine
            .borrow_mut()
            .take_snapshot(volume, snapshot)?;
        self.runner.after_change();
        Ok(())
    }

    /// From now on each write of the volume has its own era; see [`Engine::split_eras`].
    pub fn split_eras(&self, volume: VolumeId) -> Result<u32, StoreError> {
        let before = self.runner.engine.borrow_mut().split_eras(volume)?;
        self.runner.after_change();
        Ok(before)
    }

    /// The era of the last write of a volume whose writes have their own.
    #[must_use]
    pub fn last_era(&self, volume: VolumeId) -> u32 {
        self.runner.engine.borrow().last_era(volume)
    }

    /// Takes a snapshot of everything up to the end of an era that was split off.
    pub fn take_snapshot_at(
        &self,
        volume: VolumeId,
        snapshot: SnapshotId,
        era: u32,
    ) -> Result<(), StoreError> {
        let mut engine = self.runner.engine.borrow_mut();
        engine.take_snapshot_at(volume, snapshot, era)?;
        drop(engine);
        self.runner.after_change();
        Ok(())
    }

    /// Writes share an era again from this call on; merges what no snapshot tells apart.
    pub fn join_eras(
        &self,
        volume: VolumeId,
    ) -> impl Future<Output = Result<(), StoreError>> + use<> {
        let groups = self.runner.engine.borrow_mut().join_eras(volume);
        let store = self.clone();
        async move { store.sweep(volume, groups).await }
    }

    /// Deletes a snapshot and frees what only it held. Unknown snapshots are deleted already.
    pub async fn delete_snapshot(
        &self,
        volume: VolumeId,
        snapshot: SnapshotId,
    ) -> Result<(), StoreError> {
        let groups = self
            .runner
            .attempt(|engine, _| engine.drop_snapshot(volume, snapshot))
            .await?;
        self.runner.after_change();
        if planted(Plant::LeakSnapshot) {
            return Ok(());
        }
        self.sweep(volume, groups).await
    }

    /// Merges the versions in these groups that nobody sees. To its end also when whoever asked has
    /// gone, as nobody else knows of them before the next start.
    async fn sweep(&self, volume: VolumeId, groups: Vec<u64>) -> Result<(), StoreError> {
        let store = self.clone();
        let swept =
            spawn_local(async move { store.sweep_groups(volume, groups, SWEEP_PAUSE).await });
        swept.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Sweeps what writes have left behind a rollback, in the background.
    pub(super) fn sweep_turned(&self) {
        for (volume, group) in self.runner.engine.borrow_mut().take_turned() {
            let store = self.clone();
            spawn_local(async move { store.sweep_groups(volume, vec![group], SWEEP_PAUSE).await });
        }
    }

    /// Goes on after an error, gives the first. What the disk kept from being freed is tried again.
    async fn sweep_groups(
        &self,
        volume: VolumeId,
        groups: Vec<u64>,
        pause: Duration,
    ) -> Result<(), StoreError> {
        let (mut outcome, mut left) = (Ok(()), Vec::new());
        for (turn, key) in groups.into_iter().enumerate() {
            loop {
                match self
                    .runner
                    .attempt(|engine, fetched| engine.sweep_group(volume, key, fetched))
                    .await
                {
                    Ok(true) => {}
                    Ok(false) => break,
                    Err(error) => {
                        if may_succeed_later(&error) {
                            left.push(key);
                        }
                        outcome = outcome.and(Err(error));
                        break;
                    }
                }
            }
            if turn % SWEEP_TURN == SWEEP_TURN - 1 {
                tokio::task::yield_now().await;
            }
        }
        self.runner.after_change();
        if !left.is_empty() {
            self.sweep_later(volume, left, pause);
        }
        outcome
    }

    fn sweep_later(&self, volume: VolumeId, groups: Vec<u64>, pause: Duration) {
        let weak = Rc::downgrade(&self.runner);
        spawn_local(async move {
            tokio::time::sleep(pause).await;
            if let Some(runner) = weak.upgrade() {
                let next = (2 * pause).min(SWEEP_PAUSE_MAX);
                drop(
                    PageStore { runner }
                        .sweep_groups(volume, groups, next)
                        .await,
                );
            }
        });
    }

    /// Makes the head what the snapshot is, unless the rollback of this routing epoch was done.
    pub fn roll_back(
        &self,
        volume: VolumeId,
        snapshot: SnapshotId,
        epoch: Epoch,
    ) -> Result<(), StoreError> {
        let mut engine = self.runner.engine.borrow_mut();
        let groups = engine.roll_back(volume, snapshot, epoch.0)?;
        drop(engine);
        self.runner.after_change();
        if !groups.is_empty() {
            let store = self.clone();
            spawn_local(async move {
                if let Err(error) = store.sweep(volume, groups).await {
                    tracing::warn!(%volume, %error, "space of a rollback is freed at the next start");
                }
            });
        }
        Ok(())
    }

    /// Routing epoch of the last rollback of a volume; 0 if there was none.
    #[must_use]
    pub fn rolled_back(&self, volume: VolumeId) -> Epoch {
        Epoch(self.runner.engine.borrow().rolled_back(volume))
    }

    /// Makes a volume, which has nothing of its own yet, a clone of a snapshot; nothing if it is.
    pub fn clone_volume(&self, volume: VolumeId, parent: Parent) -> Result<(), StoreError> {
        let mut engine = self.runner.engine.borrow_mut();
        engine.clone_volume(volume, parent)?;
        drop(engine);
        self.runner.after_change();
        Ok(())
    }

    /// What a volume is a clone of.
    #[must_use]
    pub fn parent(&self, volume: VolumeId) -> Option<Parent> {
        self.runner.engine.borrow().parent(volume)
    }

    /// Ends the dependence of a clone on its parent; all that it needs must have been copied up.
    pub fn detach(&self, volume: VolumeId) -> Result<(), StoreError> {
        self.runner.engine.borrow_mut().detach(volume)?;
        self.runner.after_change();
        Ok(())
    }

    /// Clones in this store of a volume, or of one snapshot of it, in order.
    #[must_use]
    pub fn clones(&self, volume: VolumeId, snapshot: Option<SnapshotId>) -> Vec<VolumeId> {
        self.runner.engine.borrow().clones(volume, snapshot)
    }

    /// Pages of which the parent of a clone holds data, in order.
    pub fn parent_pages(&self, volume: VolumeId) -> Result<Vec<PageNo>, StoreError> {
        self.runner.engine.borrow().parent_pages(volume)
    }

    /// Copies up what a clone has of a page in its parent only, so that neither the clone nor a
    /// snapshot of it needs the parent's page any more; the bytes copied.
    pub async fn copy_up(&self, volume: VolumeId, page: PageNo) -> Result<u64, StoreError> {
        let groups = self.runner.engine.borrow().parent_groups(volume, page);
        let mut copied = 0;
        for key in groups {
            loop {
                let step = self
                    .runner
                    .attempt(|engine, fetched| engine.copy_up_group(volume, key, fetched));
                match step.await? {
                    None => break,
                    Some(bytes) => copied += bytes,
                }
                self.runner.after_change();
                tokio::task::yield_now().await;
            }
        }
        Ok(copied)
    }

    /// Snapshots of a volume, oldest first.
    #[must_use]
    pub fn snapshots(&self, volume: VolumeId) -> Vec<SnapshotId> {
        self.runner.engine.borrow().snapshots(volume)
    }

    /// Deletes a volume with all its snapshots and frees its space.
    pub async fn delete_volume(&self, volume: VolumeId) -> Result<(), StoreError> {
        let groups = self
            .runner
            .attempt(|engine, _| engine.drop_volume(volume))
            .await?;
        let store = self.clone();
        let dropped = spawn_local(async move { store.drop_groups(volume, groups).await });
        dropped.await.unwrap_or(Err(StoreError::Closed))
    }

    async fn drop_groups(&self, volume: VolumeId, groups: Vec<u64>) -> Result<(), StoreError> {
        for (turn, key) in groups.into_iter().enumerate() {
            self.runner
                .attempt(|engine, _| engine.drop_group(volume, key))
                .await?;
            if turn % SWEEP_TURN == SWEEP_TURN - 1 {
                tokio::task::yield_now().await;
            }
        }
        self.runner.after_change();
        Ok(())
    }

    /// Volumes that have data or snapshots here, in order.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeId> {
        self.runner.engine.borrow().volumes()
    }

    /// Runs of allocated and unallocated bytes, exact to 4 KiB, neighbours merged.
    pub fn extents(
        &self,
        at: PageAt,
        snapshot: Option<SnapshotId>,
    ) -> Result<Vec<(u32, bool)>, StoreError> {
        self.runner.engine.borrow().extents(at, snapshot)
    }

    /// In which layer each block was written, and whether it changed since a snapshot; see
    /// [`Engine::layers`].
    pub fn layers(
        &self,
        at: PageAt,
        snapshot: Option<SnapshotId>,
        since: Option<SnapshotId>,
    ) -> Result<Vec<LayerRun>, StoreError> {
        self.runner.engine.borrow().layers(at, snapshot, since)
    }

    /// Space of a volume.
    #[must_use]
    pub fn volume_usage(&self, volume: VolumeId) -> VolumeUsage {
        self.runner.engine.borrow().volume_usage(volume)
    }

    /// Space of one snapshot of a volume (`None`: of each), in the order of their eras. Looks at the
    /// whole table, with turns for others.
    pub async fn snapshot_usages(
        &self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
    ) -> Result<Vec<(SnapshotId, SnapshotUsage)>, StoreError> {
        let mut scan = self.runner.engine.borrow().begin_usages(volume, snapshot)?;
        while self
            .runner
            .engine
            .borrow()
            .count_usages(&mut scan, USAGE_TURN)
        {
            tokio::task::yield_now().await;
        }
        Ok(scan.finish())
    }

    /// The error that stopped all writing, if one did.
    #[must_use]
    pub fn failure(&self) -> Option<StoreError> {
        self.runner.engine.borrow().failure()
    }

    /// Totals of the store.
    #[must_use]
    pub fn usage(&self) -> StoreUsage {
        self.runner.engine.borrow().usage()
    }

    /// Pages of which a snapshot (`None`: the head) holds data, in order.
    pub fn snapshot_pages(
        &self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
    ) -> Result<Vec<PageNo>, StoreError> {
        self.runner.engine.borrow().snapshot_pages(volume, snapshot)
    }

    /// Highest epoch that wrote to each page held, in order: enough to rebuild a routing table.
    #[must_use]
    pub fn page_epochs(&self, volume: VolumeId) -> Vec<(PageNo, Epoch)> {
        self.runner.engine.borrow().page_epochs(volume)
    }

    /// Verifies the next versions of a volume on the device, about so many bytes. Blocks nobody: the
    /// reading and the checksums are done elsewhere.
    pub async fn scrub(
        &self,
        volume: VolumeId,
        from: ScrubPosition,
        bytes_max: u64,
    ) -> Result<Scrubbed, StoreError> {
        let runner = &self.runner;
        let (mut batch, next) = runner.engine.borrow().scrub_batch(volume, from, bytes_max);
        let bytes = batch.iter().map(StoredChunk::len_bytes).sum();
        let mut damaged = Vec::new();
        let mut suspects: Vec<StoredChunk> = Vec::new();
        for _ in 0..SCRUB_TRIES {
            let bad = runner.verify(std::mem::take(&mut batch)).await?;
            for bad in bad {
                let judged = runner.engine.borrow().judge(&bad);
                match judged {
                    Err(moved) => batch.push(moved),
                    Ok(ranges) if suspects.contains(bad.chunk()) => damaged.extend(ranges),
                    // Once more: it may have been rewritten twice, back to what it was, meanwhile.
                    Ok(_) => {
                        suspects.push(bad.chunk().clone());
                        batch.push(bad.chunk().clone());
                    }
                }
            }
            if batch.is_empty() {
                break;
            }
        }
        Ok(Scrubbed {
            bytes,
            damaged,
            next,
        })
    }

    /// Makes everything durable, writes a checkpoint and stops the worker threads. Writes fail with
    /// `Closed` from the call on; reads go on while handles live.
    pub async fn close(&self) -> Result<(), StoreError> {
        let runner = &self.runner;
        runner.engine.borrow_mut().stop_writes();
        runner.flush().await?;
        let is_idle = |engine: &StoreEngine| engine.is_applied() && !engine.is_checkpointing();
        while !is_idle(&runner.engine.borrow()) {
            runner.engine.borrow_mut().request_apply();
            runner.wait_for_progress().await?;
        }
        runner.engine.borrow_mut().begin_close()?;
        while runner.engine.borrow().is_checkpointing() {
            runner.wait_for_progress().await?;
        }
        drop(runner.lanes.borrow_mut().take());
        Ok(())
    }
}

/// A full disk may get space; what cannot be read may be written anew, so that the sweep need not read it.
fn may_succeed_later(error: &StoreError) -> bool {
    use StoreError::{BadSubBlock, NoSpace, Read};
    matches!(error, NoSpace | Read { .. } | BadSubBlock { .. })
}

/// A write in the making: if it is dropped before it is logged, its slots are free again.
struct Placing<'a> {
    runner: &'a Runner,
    placement: Placement,
}

impl Drop for Placing<'_> {
    fn drop(&mut self) {
        let mut engine = self.runner.engine.borrow_mut();
        engine.give_up(&mut self.placement);
    }
}
