//! What can go wrong in the page store, and what the operator can do about it.

use crate::id::{Epoch, PageNo, SnapshotId, VolumeId};
use crate::io::disk::DiskFile;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use thiserror::Error;

/// Every error of the store. `Clone`, because one failed sync answers many waiting flushes.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The directory cannot be used at all.
    #[error("page store {}: cannot {action}: {source}", path.display())]
    Directory {
        /// The directory of the store.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the operating system said.
        source: Arc<io::Error>,
    },
    /// Another process has the store open.
    #[error("page store {}: in use by another process; stop that one first", path.display())]
    InUse {
        /// The directory of the store.
        path: PathBuf,
    },
    /// The store was written by a newer version of this program.
    #[error("page store: format version {found} is newer than {supported}; use a newer blockd")]
    NewerVersion {
        /// Version in the superblock.
        found: u32,
        /// Newest version that this program reads.
        supported: u32,
    },
    /// The files do not fit together; the store stays closed so that no wrong byte is served.
    #[error("page store: {what} is corrupt ({detail}); restore this server's copy from a replica")]
    Corrupt {
        /// Which structure.
        what: &'static str,
        /// Where, and what was found.
        detail: String,
    },
    /// A sub-block does not have the checksum that was recorded when it was written.
    #[error(
        "volume {volume} page {page} offset {offset_bytes}: checksum mismatch; repair from a replica"
    )]
    BadSubBlock {
        /// Volume of the sub-block.
        volume: VolumeId,
        /// Page of the sub-block.
        page: PageNo,
        /// Byte offset of the sub-block in the page.
        offset_bytes: u32,
    },
    /// The store is rolled back at a routing epoch that the caller has not heard of.
    #[error(
        "volume {volume}: rolled back at epoch {epoch}, of which this server has not heard yet"
    )]
    Behind {
        /// The volume.
        volume: VolumeId,
        /// The epoch.
        epoch: Epoch,
    },
    /// A clone still has something in its parent only; nothing was changed.
    #[error("volume {volume}: it is no clone in the registry, but still needs its parent here")]
    NeedsParent {
        /// The clone.
        volume: VolumeId,
    },
    /// A clone reads from it; nothing was changed.
    #[error("volume {volume}: clone {clone} depends on it; flatten or delete the clone first")]
    HasClone {
        /// The volume, or that of the snapshot.
        volume: VolumeId,
        /// The clone.
        clone: VolumeId,
    },
    /// The file system has no room; nothing was changed and the store stays usable.
    #[error("page store: no space left; free space on the file system or delete snapshots")]
    NoSpace,
    /// The log has no room for this record and the call cannot wait.
    #[error("page store: the log is full; try again when a checkpoint has ended")]
    LogFull,
    /// An earlier write or sync failed; nothing may be written until the store is opened again.
    #[error("page store: stopped after a failed {action}: {source}; check the disk, then restart")]
    Failed {
        /// Operation that failed first.
        action: &'static str,
        /// What the operating system said.
        source: Arc<io::Error>,
    },
    /// A read failed in the device.
    #[error("page store: cannot read {file}: {source}")]
    Read {
        /// File of the store.
        file: &'static str,
        /// What the operating system said.
        source: Arc<io::Error>,
    },
    /// The snapshot is not known for this volume.
    #[error("volume {volume}: no snapshot {snapshot}")]
    UnknownSnapshot {
        /// The volume asked.
        volume: VolumeId,
        /// The snapshot that it does not have.
        snapshot: SnapshotId,
    },
    /// A snapshot of what was written later was taken here first; nothing was changed.
    #[error(
        "volume {volume}: snapshot {snapshot} came late: a later one was taken first; try again"
    )]
    LateSnapshot {
        /// The volume.
        volume: VolumeId,
        /// The snapshot that came late.
        snapshot: SnapshotId,
    },
    /// A snapshot with that number exists already.
    #[error("volume {volume}: snapshot {snapshot} exists already")]
    SnapshotExists {
        /// The volume asked.
        volume: VolumeId,
        /// The snapshot that it has.
        snapshot: SnapshotId,
    },
    /// The volume was deleted and its number is not used again.
    #[error("volume {volume} is deleted")]
    VolumeDeleted {
        /// The volume asked.
        volume: VolumeId,
    },
    /// The request leaves the largest page.
    #[error("offset {offset_bytes} length {len_bytes}: {problem}")]
    BadRequest {
        /// Byte offset in the page.
        offset_bytes: u32,
        /// Length in bytes.
        len_bytes: u32,
        /// What is wrong.
        problem: &'static str,
    },
    /// An option is outside its limits.
    #[error("page store option {option}: {problem}")]
    BadOption {
        /// Name of the option.
        option: &'static str,
        /// The limit.
        problem: String,
    },
    /// The store has been closed.
    #[error("page store is closed")]
    Closed,
}

impl StoreError {
    /// A failed read of a file of the store.
    pub(super) fn read(file: DiskFile, source: io::Error) -> StoreError {
        StoreError::Read {
            file: file.name(),
            source: Arc::new(source),
        }
    }
}
