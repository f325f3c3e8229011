//! Upkeep: syncing the log, bringing the slab up to it, checkpoints.
//!
//! Two lanes, one job at a time in each: `sync` (group commit) and `maintenance` (apply, checkpoint).
//! A job is a plain value; whoever runs it brings the outcome back to `finish`.
//!
//! Order that makes recovery exact:
//! 0. Pointer data is synced, a mark says so, then the log is synced: three steps of one flush.
//! 1. A redo entry is applied only when its record is durable and a durable record says so
//!    (`log.recorded`), in the order of the log.
//! 2. A checkpoint at point C freezes the tables at C, applies everything up to C, syncs the slab,
//!    writes the changed meta pages into the copies not in force, syncs, writes the catalog, syncs, and
//!    only then writes the superblock. The log before C is free after that.

use super::catalog::{self, Catalog, CatalogHistory, CatalogVolume};
use super::engine::Engine;
use super::error::StoreError;
use super::log::{LogPoint, RESERVE_MARKS};
use super::meta::{META_SLOTS, MetaCopy, MetaUpdate};
use super::read::SUB;
use super::record::Change;
use super::superblock::Superblock;
use super::tables::Redo;
use super::volume::Volume;
use crate::id::{CHUNK_BYTES, VolumeId};
use crate::io::disk::{Disk, DiskFile};
use crate::planted::{Plant, planted};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};

/// Sub-blocks and slots of one apply job.
const APPLY_ENTRIES_MAX: usize = 2048;
/// Bytes of one write to the slab.
const APPLY_WRITE_BYTES: usize = 1 << 20;
/// Meta pages of one job.
const META_PAGES_MAX: usize = 256;
/// Changed slots that are worth a checkpoint: beginning one sorts them.
const CHANGED_MAX: usize = 128 << 10;
/// Slots waiting to become free that are worth a round of upkeep.
const FREED_MAX: u64 = 1024;

/// Work that waits for the device.
#[derive(Debug)]
pub enum Job {
    /// Sync of the log, or before it of the slab if pointers wait for that.
    Sync(SyncJob),
    /// Copying from the log to the slab.
    Apply(ApplyJob),
    /// Sync of the slab before a checkpoint.
    SyncSlab,
    /// Meta pages of a checkpoint.
    Meta(MetaJob),
    /// The last step of a checkpoint.
    Commit(CommitJob),
}

/// See `Job::Sync`.
#[derive(Clone, Copy, Debug)]
pub struct SyncJob {
    upto: LogPoint,
    carried: u64,
    file: DiskFile,
}

/// See `Job::Apply`.
#[derive(Debug, Default)]
pub struct ApplyJob {
    entries: Vec<Redo>,
    /// (slot, sub-block) and place in the log in units of 64 bytes.
    writes: BTreeMap<(u32, u8), u32>,
    punches: BTreeSet<(u32, u8)>,
    frees: Vec<(u32, bool)>,
}

/// See `Job::Meta`.
#[derive(Debug)]
pub struct MetaJob {
    checkpoint: u64,
    updates: Vec<MetaUpdate>,
}

/// See `Job::Commit`.
#[derive(Debug)]
pub struct CommitJob {
    superblock: Superblock,
    catalog: Vec<u8>,
}

/// A job that was run.
#[derive(Debug)]
pub struct JobDone {
    job: Job,
    /// Change of the meta digest.
    outcome: io::Result<u64>,
}

impl Job {
    /// Runs the job; blocks.
    pub fn run<D: Disk + ?Sized>(self, disk: &D) -> JobDone {
        let outcome = match &self {
            Job::Sync(job) => job.run(disk),
            Job::Apply(job) => job.run(disk),
            Job::SyncSlab if planted(Plant::SkipSlabSync) => Ok(0),
            Job::SyncSlab => disk.sync(DiskFile::Slab).map(|()| 0),
            Job::Meta(job) => job.updates.iter().try_fold(0, |digest, update| {
                update
                    .write(disk, job.checkpoint)
                    .map(|change| digest ^ change)
            }),
            Job::Commit(job) => job.run(disk),
        };
        JobDone { job: self, outcome }
    }

    /// True for the lane of syncs.
    #[must_use]
    pub fn is_sync(&self) -> bool {
        matches!(self, Job::Sync(_))
    }
}

impl SyncJob {
    fn run<D: Disk + ?Sized>(&self, disk: &D) -> io::Result<u64> {
        if planted(Plant::SkipSync) {
            return Ok(0);
        }
        disk.sync(self.file).map(|()| 0)
    }
}

impl CommitJob {
    fn run<D: Disk + ?Sized>(&self, disk: &D) -> io::Result<u64> {
        let file = catalog_file(self.superblock.checkpoint);
        disk.write_at(file, 0, &[IoSlice::new(&self.catalog)])?;
        let synced = disk.sync(DiskFile::Meta).and_then(|()| disk.sync(file));
        let written = synced.and_then(|()| self.superblock.write(disk));
        written.map(|()| 0).map_err(io::Error::other)
    }
}

/// The file that a checkpoint writes its catalog to.
pub(super) fn catalog_file(checkpoint: u64) -> DiskFile {
    if checkpoint.is_multiple_of(2) {
        DiskFile::CatalogA
    } else {
        DiskFile::CatalogB
    }
}

impl ApplyJob {
    /// Takes up an entry; later entries of the log replace earlier ones.
    fn add(&mut self, entry: Redo, keep_warm: bool) {
        self.entries.push(entry);
        match entry {
            Redo::Write { slot, sub, pos, .. } => {
                self.punches.remove(&(slot, sub));
                self.writes.insert((slot, sub), pos);
            }
            Redo::Trim { slot, mask, .. } => {
                for sub in super::version::bits(mask) {
                    let key = (slot, u8::try_from(sub).unwrap_or(0));
                    self.writes.remove(&key);
                    self.punches.insert(key);
                }
            }
            Redo::Free { slot, .. } => {
                for sub in 0..16 {
                    self.writes.remove(&(slot, sub));
                    if keep_warm {
                        self.punches.remove(&(slot, sub));
                    } else {
                        self.punches.insert((slot, sub));
                    }
                }
                self.frees.push((slot, keep_warm));
            }
        }
    }

    fn run<D: Disk + ?Sized>(&self, disk: &D) -> io::Result<u64> {
        let mut punch: Option<(u64, u64)> = None;
        for key in &self.punches {
            let pos = slab_pos(*key);
            punch = match punch {
                Some((start, end)) if end == pos => Some((start, pos + SUB as u64)),
                Some((start, end)) => {
                    disk.punch(DiskFile::Slab, start, end - start)?;
                    Some((pos, pos + SUB as u64))
                }
                None => Some((pos, pos + SUB as u64)),
            };
        }
        if let Some((start, end)) = punch {
            disk.punch(DiskFile::Slab, start, end - start)?;
        }
        self.copy(disk).map(|()| 0)
    }

    /// Copies from the log, neighbours of the slab in one write.
    fn copy<D: Disk + ?Sized>(&self, disk: &D) -> io::Result<()> {
        let (mut start, mut buf) = (0, Vec::new());
        for (key, pos) in &self.writes {
            let to = slab_pos(*key);
            let follows = start + buf.len() as u64 == to && buf.len() < APPLY_WRITE_BYTES;
            if !buf.is_empty() && !follows {
                disk.write_at(DiskFile::Slab, start, &[IoSlice::new(&buf)])?;
                buf.clear();
            }
            if buf.is_empty() {
                start = to;
            }
            let at = buf.len();
            buf.resize(at + SUB, 0);
            disk.read_at(DiskFile::Log, u64::from(*pos) * 64, &mut buf[at..])?;
        }
        if buf.is_empty() {
            return Ok(());
        }
        disk.write_at(DiskFile::Slab, start, &[IoSlice::new(&buf)])
    }
}

fn slab_pos((slot, sub): (u32, u8)) -> u64 {
    u64::from(slot) * u64::from(CHUNK_BYTES) + u64::from(sub) * SUB as u64
}

/// A checkpoint in the making.
#[derive(Debug)]
struct Checkpoint {
    start: LogPoint,
    number: u64,
    clean: bool,
    slots: u32,
    catalog: Vec<u8>,
    digest: u64,
    /// Frozen slots in order, and how many of them are written.
    order: Vec<u32>,
    emitted: usize,
    slab_synced: bool,
    pages: Vec<u32>,
}

/// State of upkeep.
#[derive(Debug, Default)]
pub(super) struct Upkeep {
    pub(super) superblock: Superblock,
    /// Copy in force of each meta page.
    pub(super) copies: Vec<MetaCopy>,
    /// Last pointer record: its data is durable only after a sync of the slab.
    pub(super) last_pointer: u64,
    /// Pointer data up to this point is synced in the slab.
    pub(super) in_slab: LogPoint,
    /// The next sync is that of the log, even if new pointers came.
    slab_was_synced: bool,
    checkpoint: Option<Checkpoint>,
    sync_runs: bool,
    maintenance_runs: bool,
    /// Somebody asked: apply up to this lsn, write a checkpoint.
    apply_wanted: u64,
    checkpoint_wanted: bool,
    /// Lsn that must become `recorded` for maintenance to go on.
    recorded_wanted: u64,
    /// A job found no space; tried again when a request asks.
    stalled: bool,
}

impl<D: Disk> Engine<D> {
    /// Asks for everything logged so far to be copied to the slab.
    pub fn request_apply(&mut self) {
        self.upkeep.apply_wanted = self.log.last_change;
        self.upkeep.stalled = false;
    }

    /// Asks for a checkpoint.
    pub fn request_checkpoint(&mut self) {
        self.upkeep.checkpoint_wanted = true;
        self.upkeep.stalled = false;
    }

    /// True if upkeep waits for space; asking for apply tries again.
    pub fn is_stalled(&self) -> bool {
        self.upkeep.stalled
    }

    /// Slots that a round of upkeep would make free.
    pub fn pending_frees(&self) -> u64 {
        self.tables.freed_in_redo
    }

    /// No more requests that write.
    pub fn stop_writes(&mut self) {
        self.closed = true;
    }

    /// The error that stopped the store.
    pub fn failure(&self) -> Option<StoreError> {
        self.failed.clone()
    }

    /// True if a checkpoint is being written.
    pub fn is_checkpointing(&self) -> bool {
        self.upkeep.checkpoint.is_some()
    }

    /// True if the slab has everything that the log has.
    pub fn is_applied(&self) -> bool {
        self.tables.redo.is_empty() && !self.upkeep.maintenance_runs
    }

    /// The next sync, if one is needed: for a flush, for the limit of unsynced bytes, for maintenance.
    pub fn next_sync(&mut self, is_wanted: bool) -> Result<Option<Job>, StoreError> {
        if self.upkeep.sync_runs || self.failed.is_some() {
            return Ok(None);
        }
        let flush = is_wanted && !self.is_clean();
        let limit = self.options.unsynced_bytes_max <= self.log.unsynced();
        let record = self.log.recorded < self.upkeep.recorded_wanted;
        if !flush && !limit && !record {
            return Ok(None);
        }
        let (head, carried) = (self.log.head, self.log.carried);
        if self.upkeep.in_slab.lsn < self.upkeep.last_pointer && !self.upkeep.slab_was_synced {
            self.upkeep.sync_runs = true;
            return Ok(Some(Job::Sync(SyncJob {
                upto: head,
                carried,
                file: DiskFile::Slab,
            })));
        }
        self.upkeep.slab_was_synced = false;
        let all_durable = self.upkeep.recorded_wanted <= self.log.durable;
        if record
            && all_durable
            && self.log.carried < self.upkeep.recorded_wanted
            && self.log.has_room(64, 0)
        {
            match self.mark() {
                // A full disk: only the mark has to wait.
                Err(StoreError::NoSpace) if flush || limit => {}
                marked => marked?,
            }
        }
        self.upkeep.sync_runs = true;
        let all_in_slab = self.upkeep.last_pointer <= self.upkeep.in_slab.lsn;
        let upto = if all_in_slab {
            self.log.head
        } else {
            self.upkeep.in_slab
        };
        let carried = self.log.carried;
        Ok(Some(Job::Sync(SyncJob {
            upto,
            carried,
            file: DiskFile::Log,
        })))
    }

    fn mark(&mut self) -> Result<(), StoreError> {
        self.commit(
            &Change::Mark {
                in_slab: self.upkeep.in_slab.lsn,
            },
            &[],
        )
    }

    /// The slab is synced: say so in the log, so that recovery need not guess from the data.
    fn slab_synced(&mut self, upto: LogPoint) -> Result<(), StoreError> {
        self.upkeep.in_slab = upto;
        self.upkeep.slab_was_synced = true;
        if self.log.has_room(64, 0) {
            self.mark()
        } else {
            Ok(())
        }
    }

    /// The next maintenance job, if there is something to do that can be done now.
    pub fn next_maintenance(&mut self) -> Result<Option<Job>, StoreError> {
        if self.upkeep.maintenance_runs || self.upkeep.stalled || self.failed.is_some() {
            return Ok(None);
        }
        let wants_checkpoint = self.upkeep.checkpoint_wanted
            || self.log.size_bytes / 2 < self.log.used()
            || CHANGED_MAX < self.tables.changes.changed.len();
        if self.upkeep.checkpoint.is_none() && wants_checkpoint {
            self.begin_checkpoint(false)?;
        }
        let job = self.apply_job().or_else(|| self.checkpoint_job());
        self.upkeep.maintenance_runs = job.is_some();
        Ok(job)
    }

    /// Begins the checkpoint that leaves an empty log; everything must be applied.
    pub fn begin_close(&mut self) -> Result<(), StoreError> {
        if self.upkeep.checkpoint.is_none() && self.failed.is_none() {
            self.begin_checkpoint(true)?;
        }
        Ok(())
    }

    /// Lsn up to which the slab should have everything.
    fn apply_target(&self) -> u64 {
        let waiting = self.tables.redo.len() as u64 * SUB as u64;
        let is_much = self.options.unapplied_bytes_max <= waiting
            || FREED_MAX <= self.tables.freed_in_redo
            || planted(Plant::SlabBeforeLog);
        let pressure = if is_much { self.log.last_change } else { 0 };
        let checkpoint = self.upkeep.checkpoint.as_ref().map_or(0, |c| c.start.lsn);
        self.upkeep.apply_wanted.max(pressure).max(checkpoint)
    }

    fn apply_job(&mut self) -> Option<Job> {
        let target = self.apply_target();
        let first = self.tables.redo.front().map(Redo::lsn)?;
        if target < first {
            return None;
        }
        if self.log.recorded < first && !planted(Plant::SlabBeforeLog) {
            let back = self.tables.redo.back().map_or(0, Redo::lsn);
            self.upkeep.recorded_wanted = self.upkeep.recorded_wanted.max(back.min(target));
            return None;
        }
        let mut job = ApplyJob::default();
        let pool = self.options.reuse_bytes_max / u64::from(CHUNK_BYTES);
        let mut warm_slots = self.tables.slots.warm();
        while job.entries.len() < APPLY_ENTRIES_MAX {
            let recorded = self.log.recorded;
            let Some(entry) = self
                .tables
                .redo
                .pop_front_if(|entry| entry.lsn() <= recorded || planted(Plant::SlabBeforeLog))
            else {
                break;
            };
            let keep_warm = matches!(entry, Redo::Free { warm: true, .. }) && warm_slots < pool;
            warm_slots += u64::from(keep_warm);
            job.add(entry, keep_warm);
        }
        Some(Job::Apply(job))
    }

    fn begin_checkpoint(&mut self, clean: bool) -> Result<(), StoreError> {
        let catalog = catalog::encode(&self.catalog()).map_err(|e| {
            self.latch(StoreError::Corrupt {
                what: "catalog",
                detail: e.to_string(),
            })
        })?;
        let changes = &mut self.tables.changes;
        changes.frozen = std::mem::take(&mut changes.changed);
        changes.emitted_end = 0;
        let mut order: Vec<u32> = changes.frozen.keys().copied().collect();
        order.sort_unstable();
        self.upkeep.checkpoint_wanted = false;
        self.upkeep.checkpoint = Some(Checkpoint {
            start: self.log.head,
            number: self.upkeep.superblock.checkpoint + 1,
            clean,
            slots: self.tables.slots.end(),
            catalog,
            digest: self.upkeep.superblock.meta_digest,
            order,
            emitted: 0,
            slab_synced: false,
            pages: Vec::new(),
        });
        Ok(())
    }

    fn catalog(&self) -> Catalog {
        let mut catalog = Catalog::default();
        let mut volumes: Vec<(&u64, &Volume)> = self.tables.volumes.iter().collect();
        volumes.sort_unstable_by_key(|(id, _)| **id);
        for (id, found) in volumes {
            let volume = VolumeId(*id);
            catalog.volumes.push(CatalogVolume {
                volume,
                era: found.era,
                deleted: found.deleted,
                snapshots: found.snapshots().to_vec(),
            });
            if 0 < found.rolled_back || found.parent.is_some() {
                catalog.histories.push(CatalogHistory {
                    volume,
                    turns: found.turns.clone(),
                    rolled_back: found.rolled_back,
                    parent: found.parent,
                });
            }
        }
        let spans = self.tables.spans.iter();
        catalog.spans = spans
            .map(|(volume, span)| (VolumeId(*volume), *span))
            .collect();
        catalog
    }

    /// The next step of the checkpoint, once everything before it is applied.
    fn checkpoint_job(&mut self) -> Option<Job> {
        let checkpoint = self.upkeep.checkpoint.as_ref()?;
        let waits = self
            .tables
            .redo
            .front()
            .is_some_and(|entry| entry.lsn() <= checkpoint.start.lsn);
        if waits {
            return None;
        }
        if !checkpoint.slab_synced {
            return Some(Job::SyncSlab);
        }
        if checkpoint.emitted < checkpoint.order.len() {
            return self.meta_job();
        }
        let superblock = Superblock {
            sequence: self.upkeep.superblock.sequence + 1,
            checkpoint: checkpoint.number,
            start: checkpoint.start,
            clean: checkpoint.clean,
            durable: self.log.durable.max(checkpoint.start.lsn),
            slots: checkpoint.slots,
            catalog_crc: crc32fast::hash(&checkpoint.catalog),
            catalog_bytes: checkpoint.catalog.len() as u64,
            meta_digest: checkpoint.digest,
            ..self.upkeep.superblock
        };
        Some(Job::Commit(CommitJob {
            superblock,
            catalog: checkpoint.catalog.clone(),
        }))
    }

    /// Takes the records of the next meta pages as they were when the checkpoint began.
    fn meta_job(&mut self) -> Option<Job> {
        let checkpoint = self.upkeep.checkpoint.as_mut()?;
        let mut updates: Vec<MetaUpdate> = Vec::new();
        while let Some(slot) = checkpoint.order.get(checkpoint.emitted) {
            let number = slot / META_SLOTS;
            if updates.last().is_none_or(|update| update.number != number) {
                if updates.len() == META_PAGES_MAX {
                    break;
                }
                let index = number as usize;
                if self.upkeep.copies.len() <= index {
                    self.upkeep.copies.resize(index + 1, MetaCopy::None);
                }
                let in_force = self.upkeep.copies[index];
                updates.push(MetaUpdate {
                    number,
                    in_force,
                    records: Vec::new(),
                });
            }
            let record = match self.tables.changes.captured.remove(slot) {
                Some(record) => record,
                None => {
                    let at = self.tables.changes.frozen.get(slot).copied().flatten();
                    self.tables.slot_record(*slot, at)
                }
            };
            if let Some(update) = updates.last_mut() {
                update.records.push((*slot, record));
            }
            self.tables.changes.emitted_end = u64::from(*slot) + 1;
            checkpoint.emitted += 1;
        }
        Some(Job::Meta(MetaJob {
            checkpoint: checkpoint.number,
            updates,
        }))
    }

    /// Takes the outcome of a job. An error says that the store has stopped.
    pub fn finish(&mut self, done: JobDone) -> Result<(), StoreError> {
        if done.job.is_sync() {
            self.upkeep.sync_runs = false;
        } else {
            self.upkeep.maintenance_runs = false;
        }
        let digest = match done.outcome {
            Ok(digest) => digest,
            Err(error) => return self.job_failed(done.job, error),
        };
        match done.job {
            Job::Sync(job) if job.file == DiskFile::Slab => return self.slab_synced(job.upto),
            Job::Sync(job) => self.synced(job.upto, job.carried),
            Job::Apply(job) => self.applied(&job),
            Job::SyncSlab => {
                if let Some(checkpoint) = &mut self.upkeep.checkpoint {
                    checkpoint.slab_synced = true;
                }
            }
            Job::Meta(job) => {
                if let Some(checkpoint) = &mut self.upkeep.checkpoint {
                    checkpoint.digest ^= digest;
                    checkpoint
                        .pages
                        .extend(job.updates.iter().map(|update| update.number));
                }
            }
            Job::Commit(job) => self.checkpointed(job.superblock),
        }
        Ok(())
    }

    fn job_failed(&mut self, job: Job, error: io::Error) -> Result<(), StoreError> {
        let is_full = error.kind() == io::ErrorKind::StorageFull;
        match job {
            Job::Apply(job) if is_full => {
                for entry in job.entries.into_iter().rev() {
                    self.tables.redo.push_front(entry);
                }
                self.upkeep.stalled = true;
                Ok(())
            }
            Job::Meta(_) | Job::Commit(_) if is_full => {
                self.abandon_checkpoint();
                self.upkeep.stalled = true;
                Ok(())
            }
            Job::Sync(_) => Err(self.latch_job("log sync", error)),
            Job::Apply(_) => Err(self.latch_job("slab write", error)),
            Job::SyncSlab => Err(self.latch_job("slab sync", error)),
            Job::Meta(_) | Job::Commit(_) => Err(self.latch_job("checkpoint", error)),
        }
    }

    fn latch_job(&mut self, action: &'static str, error: io::Error) -> StoreError {
        self.latch(StoreError::Failed {
            action,
            source: std::sync::Arc::new(error),
        })
    }

    /// The slots of the checkpoint count as changed again; the copies in force stay.
    fn abandon_checkpoint(&mut self) {
        self.upkeep.checkpoint = None;
        let changes = &mut self.tables.changes;
        for (slot, at) in std::mem::take(&mut changes.frozen) {
            changes.changed.entry(slot).or_insert(at);
        }
        changes.captured = Default::default();
    }

    pub(super) fn synced(&mut self, upto: LogPoint, carried: u64) {
        self.log.durable = self.log.durable.max(upto.lsn);
        self.log.durable_pos = self.log.durable_pos.max(upto.pos);
        self.log.recorded = self.log.recorded.max(carried);
    }

    fn applied(&mut self, job: &ApplyJob) {
        for ((slot, sub), pos) in &job.writes {
            self.tables.clear_dirty(*slot, usize::from(*sub), *pos);
        }
        for (slot, warm) in &job.frees {
            self.tables.slots.release(*slot, *warm);
            self.tables.freed_in_redo -= 1;
        }
    }

    fn checkpointed(&mut self, superblock: Superblock) {
        let Some(checkpoint) = self.upkeep.checkpoint.take() else {
            return;
        };
        for page in checkpoint.pages {
            let copy = &mut self.upkeep.copies[page as usize];
            *copy = copy.other();
        }
        self.tables.changes.frozen = Default::default();
        self.tables.changes.captured = Default::default();
        self.log.tail = checkpoint.start.pos;
        self.log.durable = self.log.durable.max(checkpoint.start.lsn);
        self.log.durable_pos = self.log.durable_pos.max(checkpoint.start.pos);
        self.log.recorded = self.log.recorded.max(superblock.durable);
        self.upkeep.superblock = superblock;
    }
}

const _: () = assert!(
    64 * 4 < RESERVE_MARKS,
    "marks of a few rounds fit the reserve"
);
