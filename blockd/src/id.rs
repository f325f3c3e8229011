//! Identifiers and units of the system as types: nothing here does IO.
//!
//! A number that means something has a type, so that a page number cannot be passed where an
//! epoch is wanted. All of them are plain values: `Copy`, ordered, and serialisable because they
//! appear on the wire, on disk and in `--json`.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes of a block, the addressing unit of a volume (S003-02).
pub const BLOCK_BYTES: u64 = 512;
/// Bytes of a sub-block, the unit of checksum and of snapshot sharing.
pub const SUB_BLOCK_BYTES: u32 = 4096;
/// Bytes of a chunk, a slot of the page store.
pub const CHUNK_BYTES: u32 = 65_536;
/// Blocks of a page unless the volume says otherwise (S003-02).
pub const DEFAULT_PAGE_BLOCKS: u32 = 8192;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

id!(
    /// A volume, unique in its cluster and never used again after a delete.
    VolumeId(u64)
);
id!(
    /// A snapshot of one volume; grows with every snapshot of that volume. 0 is never used.
    SnapshotId(u32)
);
id!(
    /// Index of a page in its volume.
    PageNo(u32)
);
id!(
    /// The fencing number of a volume's routing table; grows with every change of it.
    Epoch(u32)
);
id!(
    /// The fencing number of a volume's exclusive lease; 0 in a change: its requester holds none.
    LeaseEpoch(u32)
);
id!(
    /// Number of a node in its cluster; 0 is "no node".
    NodeNo(u16)
);
id!(
    /// Position of a record in a store's log, counted in records from 1.
    Lsn(u64)
);
id!(
    /// Revision of the registry: the index of the last change applied.
    Revision(u64)
);
id!(
    /// One run of the snapshot procedure; chosen at random by the coordinator.
    TicketId(u64)
);

id!(
    /// A moment of a hybrid logical clock: milliseconds since 1970 in the upper 48 bits, a count in
    /// the lower 16. 0 is none. What happened after something else has a later stamp, if a message
    /// that carried the clock went from the one to the other.
    Stamp(u64)
);

impl Stamp {
    /// The earliest later moment.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

/// `page_count` pages from `first_page` on belong to `owner` (S003-05, run-length encoded).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct RouteRun {
    pub first_page: u32,
    pub page_count: u32,
    pub owner: NodeNo,
}

/// A run of bytes of a page or volume: where its content comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerRun {
    pub len_bytes: u64,
    /// 0: never written. 1: written since the newest snapshot older than the view; 2: between that
    /// one and the next older one; and so on.
    pub depth: u32,
    /// Reads as zeros, and takes no space.
    pub hole: bool,
    /// May differ from the snapshot that the view was compared with.
    pub changed: bool,
}

impl LayerRun {
    /// Bytes that were never written.
    #[must_use]
    pub fn unallocated(len_bytes: u64) -> Self {
        Self {
            len_bytes,
            depth: 0,
            hole: true,
            changed: false,
        }
    }

    /// Adds this run behind the others; lengthens the last one if it is like it.
    pub fn append_to(self, runs: &mut Vec<Self>) {
        match runs.last_mut() {
            Some(last) if last.is_like(&self) => last.len_bytes += self.len_bytes,
            _ => runs.push(self),
        }
    }

    /// Whether the other run differs in nothing but its length.
    #[must_use]
    pub fn is_like(&self, other: &Self) -> bool {
        (self.depth, self.hole, self.changed) == (other.depth, other.hole, other.changed)
    }
}

/// Where a scrub of a store's part of a volume goes on: by group of chunks, chunk, then newest version
/// first. The default is the beginning.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ScrubPosition {
    pub group: u64,
    pub chunk: u8,
    /// The version of this era and older ones of the chunk.
    pub era: u32,
}

impl Default for ScrubPosition {
    fn default() -> Self {
        Self {
            group: 0,
            chunk: 0,
            era: u32::MAX,
        }
    }
}

/// Where a byte of a volume lies: its page and the offset in that page (S003-03).
#[must_use]
pub fn locate(offset_bytes: u64, page_blocks: u32) -> (u64, u64) {
    let page_bytes = u64::from(page_blocks) * BLOCK_BYTES;
    (offset_bytes / page_bytes, offset_bytes % page_bytes)
}

/// Number of pages of a volume of `size_bytes`; the last one may be partly used.
#[must_use]
pub fn page_count(size_bytes: u64, page_blocks: u32) -> u64 {
    size_bytes.div_ceil(u64::from(page_blocks) * BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// S003-03: block 93847 of a volume with pages of 8192 blocks is on page 11, offset 3735.
    #[test]
    fn block_93847_is_on_page_11() {
        let (page, offset) = locate(93_847 * BLOCK_BYTES, DEFAULT_PAGE_BLOCKS);
        assert_eq!((page, offset), (11, 3735 * BLOCK_BYTES));
        assert_eq!(locate(8191 * BLOCK_BYTES, DEFAULT_PAGE_BLOCKS).0, 0);
        assert_eq!(locate(8192 * BLOCK_BYTES, DEFAULT_PAGE_BLOCKS).0, 1);
    }

    #[test]
    fn a_partial_last_page_counts() {
        assert_eq!(page_count(1, DEFAULT_PAGE_BLOCKS), 1);
        assert_eq!(page_count(4 << 20, DEFAULT_PAGE_BLOCKS), 1);
        assert_eq!(page_count((4 << 20) + 1, DEFAULT_PAGE_BLOCKS), 2);
    }
}
