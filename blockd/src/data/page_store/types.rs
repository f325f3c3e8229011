//! Requests, answers and options of the page store as plain values.

use crate::id::{CHUNK_BYTES, PageNo, SUB_BLOCK_BYTES, SnapshotId, VolumeId};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A byte range inside one page of one volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PageAt {
    /// Volume of the page.
    pub volume: VolumeId,
    /// Page of the volume.
    pub page: PageNo,
    /// First byte in the page; any byte, though whole sub-blocks are cheapest.
    pub offset_bytes: u32,
    /// Length in bytes.
    pub len_bytes: u32,
}

/// Larger writes are logged in parts of this size; a snapshot is atomic against each part.
pub(super) const PART_BYTES: u32 = 4 << 20;

impl PageAt {
    /// Parts of a write, each of which fits the smallest log.
    pub(super) fn parts(self) -> impl Iterator<Item = PageAt> {
        let end = self.offset_bytes.saturating_add(self.len_bytes);
        let mut next = self.offset_bytes;
        let mut is_first = true;
        std::iter::from_fn(move || {
            let offset_bytes = next;
            let part_end = (next / PART_BYTES)
                .saturating_add(1)
                .saturating_mul(PART_BYTES);
            next = part_end.min(end);
            let is_part = offset_bytes < end || is_first;
            is_first = false;
            is_part.then_some(PageAt {
                offset_bytes,
                len_bytes: next.saturating_sub(offset_bytes),
                ..self
            })
        })
    }

    /// Whether a write of the range is one step, so on one side of every snapshot.
    #[must_use]
    pub fn is_written_at_once(self) -> bool {
        self.parts().nth(1).is_none()
    }

    /// Whether zeroing the range, without storing the zeros, is one step.
    #[must_use]
    pub fn is_zeroed_at_once(self) -> bool {
        let Some(last) = self
            .offset_bytes
            .checked_add(self.len_bytes.saturating_sub(1))
        else {
            return false;
        };
        let within = |unit: u32| self.offset_bytes / unit == last / unit;
        let is_whole = (self.offset_bytes | self.len_bytes).is_multiple_of(SUB_BLOCK_BYTES);
        within(SUB_BLOCK_BYTES) || (is_whole && within(CHUNK_BYTES))
    }
}

/// What a clone was made of: a snapshot of another volume of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Parent {
    /// The volume.
    pub volume: VolumeId,
    /// Its snapshot.
    pub snapshot: SnapshotId,
}

/// A piece of an answered read, in the order of the bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadPart {
    /// Stored bytes, verified against their checksums.
    Data(Bytes),
    /// So many bytes that were never written, or were trimmed: zeros.
    Hole(u32),
}

impl ReadPart {
    /// Bytes of the volume that this piece covers.
    #[must_use]
    pub fn len_bytes(&self) -> usize {
        match self {
            ReadPart::Data(data) => data.len(),
            ReadPart::Hole(len) => *len as usize,
        }
    }
}

/// How a store is laid out and when it writes by itself.
#[derive(Clone, Debug)]
pub struct StoreOptions {
    /// Size of the log file in bytes when the store is formatted; 1 MiB to 64 GiB, whole 64 KiB.
    pub log_bytes: u64,
    /// A sync starts at the latest when this much of the log is not durable.
    pub unsynced_bytes_max: u64,
    /// A sync starts at the latest this long after a write.
    pub sync_interval: Duration,
    /// Log data waiting to be copied to the slab before the copying starts.
    pub unapplied_bytes_max: u64,
    /// Bytes of overwritten slots that stay allocated for the next large writes.
    pub reuse_bytes_max: u64,
    /// Bytes of the file system that writes leave free.
    pub free_bytes_min: u64,
    /// Bytes of one write that go to the slab before other requests get a turn.
    pub turn_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            log_bytes: 256 << 20,
            unsynced_bytes_max: 64 << 20,
            sync_interval: Duration::from_secs(1),
            unapplied_bytes_max: 32 << 20,
            reuse_bytes_max: 128 << 20,
            free_bytes_min: 64 << 20,
            turn_bytes: 256 << 10,
        }
    }
}

/// Space that one volume holds in the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VolumeUsage {
    /// Data bytes of the volume and of all its snapshots, in whole sub-blocks.
    pub allocated_bytes: u64,
    /// Bytes copied up since the store was opened: between versions, and from the parent of a clone.
    pub copied_up_bytes: u64,
}

/// Space of one snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnapshotUsage {
    /// Data bytes that a reader of the snapshot sees, shared or not.
    pub referenced_bytes: u64,
    /// Data bytes that deleting it would free.
    pub unique_bytes: u64,
    /// Data bytes that it holds and the head does not share: with other snapshots, or alone.
    pub used_bytes: u64,
}

/// Totals of the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreUsage {
    /// Chunk slots that hold a version.
    pub slots_used: u64,
    /// Slots of the slab file, used or free.
    pub slots_total: u64,
    /// Data bytes of all volumes.
    pub allocated_bytes: u64,
    /// Bytes of the log between its oldest needed record and its end.
    pub log_used_bytes: u64,
    /// Size of the log file.
    pub log_bytes: u64,
}
