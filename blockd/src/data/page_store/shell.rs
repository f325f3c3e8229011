//! The store as the reactor sees it: an async handle around the engine.

use super::error::StoreError;
use super::types::{PageAt, ReadPart, SnapshotUsage, StoreOptions, StoreUsage, VolumeUsage};
use crate::id::{Epoch, PageNo, SnapshotId, VolumeId};
use bytes::Bytes;
use std::path::Path;
use std::rc::Rc;

/// An open page store. Cheap to clone; for one thread (a tokio `LocalSet`).
#[derive(Clone)]
pub struct PageStore {
    inner: Rc<()>,
}

impl PageStore {
    /// Opens the store in `dir` and recovers it; formats an empty directory.
    pub fn open(dir: &Path, options: StoreOptions) -> Result<PageStore, StoreError> {
        unimplemented!("{dir:?} {options:?}")
    }

    /// Reads; `None` is the head. Unwritten bytes come as holes.
    pub async fn read(
        &self,
        at: PageAt,
        snapshot: Option<SnapshotId>,
    ) -> Result<Vec<ReadPart>, StoreError> {
        unimplemented!("{at:?} {snapshot:?}")
    }

    /// Writes; when it returns the bytes survive the death of the process.
    pub async fn write(&self, at: PageAt, data: Bytes, epoch: Epoch) -> Result<(), StoreError> {
        unimplemented!("{at:?} {data:?} {epoch:?}")
    }

    /// Makes the range read as zeros. Frees its space, or stores zeros if `keep_allocated`.
    pub async fn zero(
        &self,
        at: PageAt,
        keep_allocated: bool,
        epoch: Epoch,
    ) -> Result<(), StoreError> {
        unimplemented!("{at:?} {keep_allocated} {epoch:?}")
    }

    /// Everything acknowledged before the call is durable when it returns.
    pub async fn flush(&self) -> Result<(), StoreError> {
        unimplemented!()
    }

    /// True when a flush would have nothing to do.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        Rc::strong_count(&self.inner) == 0
    }

    /// Takes a snapshot now: the point in time is this call. Flush afterwards to make it durable.
    pub fn take_snapshot(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<(), StoreError> {
        unimplemented!("{volume:?} {snapshot:?}")
    }

    /// Deletes a snapshot and frees what only it held. Unknown snapshots are deleted already.
    pub async fn delete_snapshot(
        &self,
        volume: VolumeId,
        snapshot: SnapshotId,
    ) -> Result<(), StoreError> {
        unimplemented!("{volume:?} {snapshot:?}")
    }

    /// Snapshots of a volume, oldest first.
    #[must_use]
    pub fn snapshots(&self, volume: VolumeId) -> Vec<SnapshotId> {
        unimplemented!("{volume:?}")
    }

    /// Deletes a volume with all its snapshots and frees its space.
    pub async fn delete_volume(&self, volume: VolumeId) -> Result<(), StoreError> {
        unimplemented!("{volume:?}")
    }

    /// Volumes that have data or snapshots here, in order.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeId> {
        unimplemented!()
    }

    /// Runs of allocated and unallocated bytes, exact to 4 KiB, neighbours merged.
    pub fn extents(
        &self,
        at: PageAt,
        snapshot: Option<SnapshotId>,
    ) -> Result<Vec<(u32, bool)>, StoreError> {
        unimplemented!("{at:?} {snapshot:?}")
    }

    /// Space of a volume.
    #[must_use]
    pub fn volume_usage(&self, volume: VolumeId) -> VolumeUsage {
        unimplemented!("{volume:?}")
    }

    /// Space of a snapshot; scans the volume's table.
    pub fn snapshot_usage(
        &self,
        volume: VolumeId,
        snapshot: SnapshotId,
    ) -> Result<SnapshotUsage, StoreError> {
        unimplemented!("{volume:?} {snapshot:?}")
    }

    /// Totals of the store.
    #[must_use]
    pub fn usage(&self) -> StoreUsage {
        unimplemented!()
    }

    /// Pages of which a snapshot (`None`: the head) holds data, in order.
    pub fn snapshot_pages(
        &self,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
    ) -> Result<Vec<PageNo>, StoreError> {
        unimplemented!("{volume:?} {snapshot:?}")
    }

    /// Makes everything durable, writes a checkpoint and stops the worker threads.
    pub async fn close(&self) -> Result<(), StoreError> {
        unimplemented!()
    }
}
