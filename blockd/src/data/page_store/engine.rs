//! The store as a state machine: single-threaded, no clock, no threads.
//!
//! Short IO (log appends, reads that do not block) is done in place. Everything that waits for the
//! device is a `Job`, a plain value that somebody runs and brings back (`maintain`). A request that
//! cannot go on says why (`Step`) and is simply made again.

use super::buffers::Buffers;
use super::eras::Split;
use super::error::StoreError;
use super::hash::FastMap;
use super::line::Line;
use super::log::{Log, RESERVE_SNAPSHOTS};
use super::maintain::Upkeep;
use super::record::{Change, ChunkAt};
use super::sweep::first_todo;
use super::tables::Tables;
use super::types::{PageAt, Parent, StoreOptions};
use super::version::{GROUP_CHUNKS, bits, resolve};
use super::volume::{Volume, group_at, group_key};
use crate::id::{CHUNK_BYTES, SUB_BLOCK_BYTES, SnapshotId, VolumeId};
use crate::io::disk::{Disk, DiskFile};
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;

/// Length of the largest page; chunk numbers are 16 bits and the store keeps them well below.
pub const PAGE_BYTES_MAX: u32 = 512 << 20;
/// Space is asked of the file system once for so many bytes.
const HEADROOM_BYTES: u64 = 64 << 20;

/// How far a request got.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<T> {
    /// It is done.
    Done(T),
    /// Bytes are not in memory: fetch these and make the request again with them.
    Cold(Vec<ColdRead>),
    /// The log is full: make the request again when a maintenance job has ended.
    Full,
    /// It is a long one: make the request again after others had a turn.
    More,
}

/// A read that would block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ColdRead {
    /// File to read.
    pub file: DiskFile,
    /// Byte position.
    pub pos: u64,
    /// Length in bytes.
    pub len_bytes: usize,
}

/// A cold read done.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// File and position, as asked.
    pub read: ColdRead,
    /// The bytes.
    pub data: Vec<u8>,
}

impl ColdRead {
    /// Does the read; blocks.
    pub fn fetch<D: Disk + ?Sized>(self, disk: &D) -> Result<Fetched, StoreError> {
        let mut data = vec![0; self.len_bytes];
        disk.read_at(self.file, self.pos, &mut data)
            .map_err(|e| StoreError::read(self.file, e))?;
        Ok(Fetched { read: self, data })
    }
}

impl Fetched {
    /// The bytes of another read, if they are among these.
    pub(super) fn part(&self, read: ColdRead) -> Option<&[u8]> {
        let skip = read.pos.checked_sub(self.read.pos)?;
        let skip = usize::try_from(skip).ok()?;
        let bytes = self.data.get(skip..skip.checked_add(read.len_bytes)?)?;
        (self.read.file == read.file).then_some(bytes)
    }
}

/// The state machine of one store.
pub struct Engine<D> {
    pub(super) disk: Arc<D>,
    pub(super) options: StoreOptions,
    pub(super) tables: Tables,
    pub(super) log: Log,
    pub(super) upkeep: Upkeep,
    /// First failed write or sync; ends all writing.
    pub(super) failed: Option<StoreError>,
    pub(super) closed: bool,
    pub(super) buffers: Buffers,
    /// Volumes in which each write has its own era.
    pub(super) splits: FastMap<u64, Split>,
    /// Groups that may have versions of another branch that nobody frees; see `note_turned`.
    pub(super) turned: BTreeSet<(VolumeId, u64)>,
    /// Bytes copied up in each volume since the start.
    pub(super) copied_up: FastMap<u64, u64>,
    /// Bytes that may be allocated before the file system is asked again.
    headroom: u64,
}

impl<D: Disk> Engine<D> {
    pub(super) fn assemble(
        disk: Arc<D>,
        options: StoreOptions,
        tables: Tables,
        log: Log,
        upkeep: Upkeep,
    ) -> Engine<D> {
        Engine {
            disk,
            options,
            tables,
            log,
            upkeep,
            failed: None,
            closed: false,
            buffers: Buffers::default(),
            splits: FastMap::default(),
            turned: BTreeSet::new(),
            copied_up: FastMap::default(),
            headroom: 0,
        }
    }

    /// The device, for jobs and cold reads.
    pub fn disk(&self) -> Arc<D> {
        Arc::clone(&self.disk)
    }

    /// True when everything acknowledged is durable.
    pub fn is_clean(&self) -> bool {
        self.log.last_change <= self.log.durable
    }

    /// Lsn of the last change.
    pub fn last_lsn(&self) -> u64 {
        self.log.last_change
    }

    /// Changes up to this lsn survive power loss.
    pub fn durable_lsn(&self) -> u64 {
        self.log.durable
    }

    /// Bytes of the log that are not durable.
    pub fn unsynced_bytes(&self) -> u64 {
        self.log.unsynced()
    }

    /// Fails if the store was closed or has failed.
    pub(super) fn check_writable(&self) -> Result<(), StoreError> {
        match &self.failed {
            Some(error) => Err(error.clone()),
            None if self.closed => Err(StoreError::Closed),
            None => Ok(()),
        }
    }

    pub(super) fn check_range(at: &PageAt) -> Result<(), StoreError> {
        let end = at.offset_bytes.checked_add(at.len_bytes);
        if end.is_some_and(|end| end <= PAGE_BYTES_MAX) {
            return Ok(());
        }
        Err(StoreError::BadRequest {
            offset_bytes: at.offset_bytes,
            len_bytes: at.len_bytes,
            problem: "beyond the largest page",
        })
    }

    pub(super) fn check_volume(&self, volume: VolumeId) -> Result<(), StoreError> {
        match self.tables.volumes.get(&volume.0) {
            Some(v) if v.deleted => Err(StoreError::VolumeDeleted { volume }),
            Some(v) if v.parent.is_some() => self.check_parents(v),
            _ => Ok(()),
        }
    }

    /// Fails unless everything that a clone may read is here.
    fn check_parents<'a>(&'a self, mut volume: &'a Volume) -> Result<(), StoreError> {
        while let Some(parent) = volume.parent {
            self.check_parent(parent)?;
            match self.tables.parent_of(volume) {
                Some((next, _)) => volume = next,
                None => return Ok(()),
            }
        }
        Ok(())
    }

    /// Fails if there is something of a volume, and its snapshot is not there. A clone whose pages came
    /// from other servers needs nothing of its parent.
    pub(super) fn check_parent(&self, parent: Parent) -> Result<(), StoreError> {
        let known = self.tables.volumes.get(&parent.volume.0);
        let has_snapshot = |v: &Volume| !v.deleted && v.era_of(parent.snapshot).is_some();
        match known.is_none_or(|v| has_snapshot(v) || v.groups.is_empty()) {
            true => Ok(()),
            false => Err(StoreError::UnknownSnapshot {
                volume: parent.volume,
                snapshot: parent.snapshot,
            }),
        }
    }

    /// Volume and line of a view; `None` if nothing was ever written.
    pub(super) fn view(
        &self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
    ) -> Result<Option<(&Volume, Line<'_>)>, StoreError> {
        self.check_volume(volume)?;
        match (self.tables.volumes.get(&volume.0), snapshot) {
            (None, None) => Ok(None),
            (None, Some(snapshot)) => Err(StoreError::UnknownSnapshot { volume, snapshot }),
            (Some(found), None) => Ok(Some((found, found.head()))),
            (Some(found), Some(snapshot)) => {
                let line = found.view(Some(snapshot));
                line.map(|line| Some((found, line)))
                    .ok_or(StoreError::UnknownSnapshot { volume, snapshot })
            }
        }
    }

    /// A write failed: without space only the request fails, otherwise the store stops.
    pub(super) fn write_failed(&mut self, action: &'static str, error: io::Error) -> StoreError {
        if error.kind() == io::ErrorKind::StorageFull {
            return StoreError::NoSpace;
        }
        self.latch(StoreError::Failed {
            action,
            source: Arc::new(error),
        })
    }

    pub(super) fn latch(&mut self, error: StoreError) -> StoreError {
        self.failed.get_or_insert(error).clone()
    }

    /// Logs a change and executes it. The caller has checked the room.
    pub(super) fn commit(&mut self, change: &Change, data: &[&[u8]]) -> Result<(), StoreError> {
        let disk = Arc::clone(&self.disk);
        let pos = self
            .log
            .append(&*disk, change, data)
            .map_err(|e| self.write_failed("log write", e))?;
        if matches!(change, Change::Pointer { .. }) {
            self.upkeep.last_pointer = self.log.head.lsn;
        }
        let executed = self.tables.execute(self.log.head.lsn, change, pos);
        executed.map_err(|misfit| {
            self.latch(StoreError::Corrupt {
                what: "table",
                detail: misfit.0.to_owned(),
            })
        })
    }

    /// True if the log takes so many bytes from a write.
    pub(super) fn has_room(&self, len_bytes: u64) -> bool {
        self.log
            .has_room(len_bytes, RESERVE_SNAPSHOTS + super::log::RESERVE_MARKS)
    }

    /// Sets aside space in the file system, or says that there is none.
    pub(super) fn claim_space(&mut self, bytes: u64) -> Result<(), StoreError> {
        if self.headroom < bytes {
            let free = self
                .disk
                .free_bytes()
                .map_err(|e| StoreError::read(DiskFile::Slab, e))?;
            let waiting =
                (self.tables.redo.len() as u64).saturating_mul(u64::from(SUB_BLOCK_BYTES));
            let usable = free.saturating_sub(waiting.saturating_add(self.options.free_bytes_min));
            self.headroom = usable.min(HEADROOM_BYTES.max(bytes));
        }
        match self.headroom.checked_sub(bytes) {
            Some(rest) => self.headroom = rest,
            None => return Err(StoreError::NoSpace),
        }
        Ok(())
    }

    /// Takes a snapshot: writes logged before are in it, later ones are not.
    pub fn take_snapshot(
        &mut self,
        volume: VolumeId,
        snapshot: SnapshotId,
    ) -> Result<(), StoreError> {
        self.check_new_snapshot(volume, snapshot)?;
        self.commit(&Change::TakeSnapshot(volume, snapshot), &[])
    }

    pub(super) fn check_new_snapshot(
        &self,
        volume: VolumeId,
        snapshot: SnapshotId,
    ) -> Result<(), StoreError> {
        self.check_writable()?;
        self.check_volume(volume)?;
        let known = self.tables.volumes.get(&volume.0);
        if known.is_some_and(|v| v.era_of(snapshot).is_some()) {
            return Err(StoreError::SnapshotExists { volume, snapshot });
        }
        match self.log.has_room(64, super::log::RESERVE_MARKS) {
            true => Ok(()),
            false => Err(StoreError::LogFull),
        }
    }

    /// Forgets a snapshot at once. The groups to sweep afterwards; none if it is unknown.
    pub fn drop_snapshot(
        &mut self,
        volume: VolumeId,
        snapshot: SnapshotId,
    ) -> Result<Step<Vec<u64>>, StoreError> {
        self.check_writable()?;
        let Some(found) = self.tables.volumes.get(&volume.0) else {
            return Ok(Step::Done(Vec::new()));
        };
        if found.deleted || found.era_of(snapshot).is_none() {
            return Ok(Step::Done(Vec::new()));
        }
        self.check_no_clone(volume, Some(snapshot))?;
        let groups = found.groups.keys().copied().collect();
        if !self.has_room(64) {
            return Ok(Step::Full);
        }
        self.commit(&Change::DropSnapshot(volume, snapshot), &[])?;
        Ok(Step::Done(groups))
    }

    /// Forgets a volume at once. The groups to drop afterwards.
    pub fn drop_volume(&mut self, volume: VolumeId) -> Result<Step<Vec<u64>>, StoreError> {
        self.check_writable()?;
        let Some(found) = self.tables.volumes.get(&volume.0) else {
            return Ok(Step::Done(Vec::new()));
        };
        let (deleted, groups) = (found.deleted, found.groups.keys().copied().collect());
        self.check_no_clone(volume, None)?;
        if !deleted {
            if !self.has_room(64) {
                return Ok(Step::Full);
            }
            self.commit(&Change::DropVolume(volume), &[])?;
        }
        Ok(Step::Done(groups))
    }

    /// Drops a group of a deleted volume.
    pub fn drop_group(&mut self, volume: VolumeId, key: u64) -> Result<Step<()>, StoreError> {
        self.check_writable()?;
        let known = self
            .tables
            .volumes
            .get(&volume.0)
            .filter(|v| v.deleted)
            .map(|v| v.groups.contains_key(&key));
        if known != Some(true) {
            return Ok(Step::Done(()));
        }
        if !self.has_room(64) {
            return Ok(Step::Full);
        }
        self.commit(&Change::DropGroup(group_at(volume, key)), &[])?;
        Ok(Step::Done(()))
    }

    /// What recovery found half done: groups with unseen versions, groups of deleted volumes.
    pub fn unfinished(&self) -> (Vec<(VolumeId, u64)>, Vec<VolumeId>) {
        let (mut groups, mut volumes) = (Vec::new(), Vec::new());
        for (id, volume) in &self.tables.volumes {
            if volume.deleted {
                volumes.push(VolumeId(*id));
                continue;
            }
            let found = volume.groups.iter();
            let found = found.filter(|(_, group)| first_todo(volume, group).is_some());
            groups.extend(found.map(|(key, _)| (VolumeId(*id), *key)));
        }
        groups.sort_unstable();
        volumes.sort_unstable();
        (groups, volumes)
    }

    /// Sub-blocks of `want` that the view sees as stored bytes.
    pub(super) fn data_mask(
        &self,
        (volume, line): (&Volume, Line<'_>),
        at: ChunkAt,
        want: u16,
    ) -> u16 {
        let found = resolve(line.of(volume.chunk(at.page, at.chunk)), want);
        let (mut data, mut open) = (0, want);
        for sub in bits(want) {
            if let Some(version) = found[sub] {
                data |= version.data() & 1 << sub;
                open &= !(1 << sub);
            }
        }
        match self.tables.parent_of(volume) {
            Some(parent) if open != 0 => data | self.data_mask(parent, at, open),
            _ => data,
        }
    }

    /// Highest epoch that wrote to the part of the page around a chunk.
    pub(super) fn group_epoch(&self, at: ChunkAt) -> u32 {
        let volume = self.tables.volumes.get(&at.volume.0);
        let group = volume.and_then(|v| v.groups.get(&group_key(at.page, at.chunk / GROUP_CHUNKS)));
        group.map_or(0, |g| g.epoch)
    }
}

/// Chunk of a byte offset in a page.
pub(super) fn chunk_of(offset_bytes: u32) -> u16 {
    u16::try_from(offset_bytes / CHUNK_BYTES).unwrap_or(u16::MAX)
}
