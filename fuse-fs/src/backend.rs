//! The seam between the view and what holds the bytes: `blockd::client`, or a double in tests.

use blockd::id::{Epoch, SnapshotId, VolumeId};
use bytes::Bytes;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

/// A future that a backend answers with.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, BackendError>> + Send + 'a>>;

/// Makes the backend of one process; the product has one and the test double the other.
pub type Connect = fn(ConnectOptions) -> Answer<'static, Arc<dyn Backend>>;

/// What a backend needs to reach its servers.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// Peer addresses, `HOST[:PORT]`; at least one.
    pub servers: Vec<String>,
    /// How long an IO may wait for a server that does not answer.
    pub io_deadline: Duration,
}

/// A failure, as a filesystem reports it and as a person reads it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BackendError {
    /// A positive errno.
    pub errno: i32,
    pub message: String,
}

impl BackendError {
    /// A failure with `errno` (positive) and a sentence for people.
    #[must_use]
    pub fn new(errno: i32, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { errno, message }
    }
}

/// `VOL` or `VOL@SNAP`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct TargetName {
    pub volume: String,
    pub snapshot: Option<String>,
}

impl TargetName {
    /// Reads `VOL` or `VOL@SNAP`; `None` if a part is empty or cannot be a file's name.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (volume, snapshot) = match text.split_once('@') {
            Some((volume, snapshot)) => (volume, Some(snapshot)),
            None => (text, None),
        };
        let usable = |part: &str| !part.is_empty() && !part.contains(['/', '\0', '@']);
        if !usable(volume) || !snapshot.is_none_or(usable) || matches!(text, "." | "..") {
            return None;
        }
        Some(Self {
            volume: volume.to_owned(),
            snapshot: snapshot.map(str::to_owned),
        })
    }
}

impl fmt::Display for TargetName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.snapshot {
            Some(snapshot) => write!(f, "{}@{snapshot}", self.volume),
            None => f.write_str(&self.volume),
        }
    }
}

/// A volume or snapshot as the view shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetInfo {
    pub name: TargetName,
    pub volume_id: VolumeId,
    pub snapshot_id: Option<SnapshotId>,
    pub size_bytes: u64,
    pub epoch: Epoch,
    /// `None` if an owner cannot be reached.
    pub allocated_bytes: Option<u64>,
    pub created_unix_s: u64,
}

/// Which of the two directories.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listing {
    Volumes,
    Snapshots,
}

/// Bytes of the whole cluster that are allocated and free.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    pub allocated_bytes: u64,
    pub free_bytes: u64,
}

/// A run of a volume: bytes that read as zeros (`hole`) or may hold data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub len_bytes: u64,
    pub hole: bool,
}

/// The servers as one.
pub trait Backend: Send + Sync + 'static {
    /// All volumes, or all snapshots, as they are now.
    fn list(&self, listing: Listing) -> Answer<'_, Vec<TargetInfo>>;
    /// One volume or snapshot as it is now; `ENOENT` if there is none.
    fn find<'a>(&'a self, name: &'a TargetName) -> Answer<'a, TargetInfo>;
    /// Opens it for IO.
    fn open<'a>(&'a self, name: &'a TargetName) -> Answer<'a, Arc<dyn OpenTarget>>;
    /// Makes a volume larger.
    fn grow<'a>(&'a self, volume: &'a str, size_bytes: u64) -> Answer<'a, ()>;
    /// Takes a snapshot of a volume; `EEXIST` if there is one of that name.
    fn snapshot<'a>(&'a self, name: &'a TargetName) -> Answer<'a, ()>;
    fn space(&self) -> Answer<'_, Space>;
}

/// The right to be the only writer of a volume, until it is released or lost.
pub trait WriterLease: Send + Sync + 'static {
    /// Waits until it is lost; says why.
    fn lost(&self) -> Pin<Box<dyn Future<Output = String> + Send + '_>>;
    /// Lets others write; what was written before is theirs to see.
    fn release(self: Box<Self>) -> Answer<'static, ()>;
}

/// One open volume or snapshot. Operations run concurrently; ranges lie inside the size.
pub trait OpenTarget: Send + Sync + 'static {
    fn size_bytes(&self) -> u64;
    fn is_read_only(&self) -> bool;
    /// Exactly `len_bytes`; holes read as zeros.
    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Answer<'_, Bytes>;
    fn write(&self, offset_bytes: u64, data: Bytes) -> Answer<'_, ()>;
    /// Reads give zeros afterwards; `keep_allocated` false frees what can be freed.
    fn zero(&self, offset_bytes: u64, len_bytes: u64, keep_allocated: bool) -> Answer<'_, ()>;
    /// Everything acknowledged before is durable when this returns.
    fn flush(&self) -> Answer<'_, ()>;
    /// Covers the range exactly, in order.
    fn extents(&self, offset_bytes: u64, len_bytes: u64) -> Answer<'_, Vec<Extent>>;
    /// Reads the size anew.
    fn refresh(&self) -> Answer<'_, ()>;
    /// Becomes the only writer of the volume, `purpose` saying what for; waits so long for another one
    /// to end. `EBUSY` names the other one.
    fn acquire(&self, _purpose: &str, _wait: Duration) -> Answer<'_, Box<dyn WriterLease>> {
        let refused = BackendError::new(libc::EROFS, "a snapshot is never written");
        Box::pin(std::future::ready(Err(refused)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_and_print_alike() {
        for text in ["vol", "vol@snap", "a.b-c@2026"] {
            assert_eq!(TargetName::parse(text).unwrap().to_string(), text);
        }
        for text in ["", "@", "a@", "@b", "a/b", "a@b@c", ".", "..", "a\0"] {
            assert_eq!(TargetName::parse(text), None, "{text:?}");
        }
    }
}
