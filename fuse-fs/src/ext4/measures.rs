//! What a mounted filesystem has done since it was opened, for who looks after it.

use crate::ext4::filesystem::Filesystem;
use serde::Serialize;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// How often metadata was in memory, and what commits took.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Measures {
    /// Blocks of metadata that were in memory when they were wanted, and that were not.
    pub cache_hits: u64,
    pub cache_misses: u64,
    pub commits: u64,
    pub commit_mean_us: u64,
    pub commit_max_us: u64,
    /// So often the log was written home.
    pub checkpoints: u64,
    /// Bytes of files that are acknowledged and only in memory.
    pub dirty_bytes: u64,
}

/// What commits and checkpoints took.
#[derive(Debug, Default)]
pub(super) struct CommitTimes {
    commits: AtomicU64,
    total_ns: AtomicU64,
    max_ns: AtomicU64,
    checkpoints: AtomicU64,
}

impl CommitTimes {
    pub(super) fn committed(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.commits.fetch_add(1, Relaxed);
        self.total_ns.fetch_add(ns, Relaxed);
        self.max_ns.fetch_max(ns, Relaxed);
    }

    pub(super) fn checkpointed(&self) {
        self.checkpoints.fetch_add(1, Relaxed);
    }
}

impl Filesystem {
    #[must_use]
    pub fn measures(&self) -> Measures {
        let (cache_hits, cache_misses) = self.cache().counts();
        let times = self.commit_times();
        let commits = times.commits.load(Relaxed);
        Measures {
            cache_hits,
            cache_misses,
            commits,
            commit_mean_us: times.total_ns.load(Relaxed) / commits.max(1) / 1000,
            commit_max_us: times.max_ns.load(Relaxed) / 1000,
            checkpoints: times.checkpoints.load(Relaxed),
            dirty_bytes: self.dirty_bytes(),
        }
    }
}
