//! Data of a file that is only in memory: acknowledged, and on its way to the disk.
//!
//! ```text
//! write -> dirty -> writing (blocks claimed, data written) -> mapped and counted by the size on disk
//! ```
//!
//! Blocks are claimed in memory when the data leaves; the file maps them, and its size on disk grows, only in a
//! transaction after the data was written. The first flush of its commit makes the data durable before the
//! commit block, so no crash shows what stood in a block before.

use crate::ext4::transaction::Tid;
use bytes::Bytes;
use std::collections::BTreeMap;
use std::ops::Range;

/// One block of a file; behind the file's end it is zero.
#[derive(Clone, Debug)]
pub(super) struct Page {
    pub(super) bytes: Bytes,
    /// A block is promised for it.
    pub(super) promised: bool,
}

/// How far what was written is durable: data arrives on the device at once, and a flush that begins later keeps it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Arrived {
    /// How often data arrived.
    pub(super) writes: u64,
    /// So many of these are known to be durable.
    pub(super) durable: u64,
    /// The transaction that was running then: its commit flushes the device.
    pub(super) during: Tid,
}

impl Arrived {
    /// Of a file that was just looked up: what was known of it may have been forgotten.
    pub(super) fn unknown(running: Tid) -> Self {
        Self {
            writes: 1,
            durable: 0,
            during: running,
        }
    }

    /// Data is on the device, and not yet durable.
    pub(super) fn note(&mut self, running: Tid) {
        self.writes += 1;
        self.during = running;
    }
}

/// What of a file is only in memory.
#[derive(Debug, Default)]
pub(super) struct FileData {
    /// By block of the file.
    pub(super) dirty: BTreeMap<u64, Page>,
    /// What is being written; of a block that is in both, this is the older.
    pub(super) writing: BTreeMap<u64, Bytes>,
    /// The size that programs see, while the one on disk is behind.
    pub(super) size_bytes: Option<u64>,
    /// The times in the inode are younger than those on disk.
    pub(super) times_changed: bool,
    pub(super) arrived: Arrived,
    /// Acknowledged data was lost for this reason; the next fsync tells.
    pub(super) lost: Option<String>,
}

impl FileData {
    /// The newest content of a block, if it is in memory.
    pub(super) fn page(&self, logical: u64) -> Option<&Bytes> {
        let dirty = self.dirty.get(&logical).map(|page| &page.bytes);
        dirty.or_else(|| self.writing.get(&logical))
    }

    /// The first block of `range` that is in memory, or its end.
    pub(super) fn next_page(&self, range: Range<u64>) -> u64 {
        let dirty = self.dirty.range(range.clone()).next().map(|(at, _)| *at);
        let writing = self.writing.range(range.clone()).next();
        let writing = writing.map(|(at, _)| *at);
        let first = dirty.into_iter().chain(writing).min();
        first.unwrap_or(range.end)
    }

    /// Drops what is dirty in `range`: how many pages, and how many promised blocks.
    pub(super) fn drop_dirty(&mut self, range: Range<u64>) -> (u64, u64) {
        let mut rest = self.dirty.split_off(&range.start);
        let mut behind = rest.split_off(&range.end);
        self.dirty.append(&mut behind);
        let promised = rest.values().filter(|page| page.promised).count();
        (rest.len() as u64, promised as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dropping_takes_the_range_only() {
        let mut data = FileData::default();
        for at in [1, 3, 4, 9] {
            let page = Page {
                bytes: Bytes::new(),
                promised: at % 3 == 0,
            };
            data.dirty.insert(at, page);
        }
        assert_eq!(data.drop_dirty(3..9), (2, 1));
        assert_eq!(data.dirty.keys().copied().collect::<Vec<_>>(), [1, 9]);
        assert_eq!(data.next_page(2..20), 9);
        assert_eq!(data.next_page(2..7), 7);
    }
}
