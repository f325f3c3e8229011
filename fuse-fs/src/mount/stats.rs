//! What a mount has done: requests by kind, with their latency.

use crate::ext4::measures::Measures;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Kinds of requests, as users call them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum Op {
    Lookup,
    Stat,
    SetAttr,
    ReadDir,
    ReadLink,
    Create,
    Mkdir,
    Symlink,
    Link,
    Unlink,
    Rmdir,
    Rename,
    Read,
    Write,
    Fsync,
    Fallocate,
    Copy,
    Seek,
    GetXattr,
    ListXattr,
    SetXattr,
    RemoveXattr,
    Flags,
    Snapshot,
    Grow,
    Trim,
    Free,
    Touch,
}

const OPS: [(Op, &str); 28] = [
    (Op::Lookup, "lookup"),
    (Op::Stat, "stat"),
    (Op::SetAttr, "setattr"),
    (Op::ReadDir, "readdir"),
    (Op::ReadLink, "readlink"),
    (Op::Create, "create"),
    (Op::Mkdir, "mkdir"),
    (Op::Symlink, "symlink"),
    (Op::Link, "link"),
    (Op::Unlink, "unlink"),
    (Op::Rmdir, "rmdir"),
    (Op::Rename, "rename"),
    (Op::Read, "read"),
    (Op::Write, "write"),
    (Op::Fsync, "fsync"),
    (Op::Fallocate, "fallocate"),
    (Op::Copy, "copy"),
    (Op::Seek, "seek"),
    (Op::GetXattr, "getxattr"),
    (Op::ListXattr, "listxattr"),
    (Op::SetXattr, "setxattr"),
    (Op::RemoveXattr, "removexattr"),
    (Op::Flags, "flags"),
    (Op::Snapshot, "snapshot"),
    (Op::Grow, "grow"),
    (Op::Trim, "trim"),
    (Op::Free, "free"),
    (Op::Touch, "touch"),
];

impl Op {
    #[must_use]
    pub fn name(self) -> &'static str {
        OPS[self as usize].1
    }

    /// Its answer is hardly ever in memory: what the kernel reads it does not have, and a sync goes to the disk.
    #[must_use]
    pub(super) fn waits(self) -> bool {
        matches!(self, Self::Read | Self::Fsync)
    }
}

/// Bucket n counts latencies below 2^n microseconds that no lower bucket counts.
const BUCKETS: usize = 32;

#[derive(Default)]
struct Counters {
    count: AtomicU64,
    errors: AtomicU64,
    inline: AtomicU64,
    total_ns: AtomicU64,
    max_ns: AtomicU64,
    buckets: [AtomicU64; BUCKETS],
}

impl Counters {
    fn ended(&self, latency: Duration, failed: bool) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.count.fetch_add(1, Relaxed);
        self.errors.fetch_add(u64::from(failed), Relaxed);
        self.total_ns.fetch_add(ns, Relaxed);
        self.max_ns.fetch_max(ns, Relaxed);
        self.buckets[bucket(ns / 1000)].fetch_add(1, Relaxed);
    }

    /// The upper bound of the bucket in which the `share` of all latencies is reached.
    fn quantile_us(&self, share: f64) -> u64 {
        let counts = self.buckets.each_ref().map(|bucket| bucket.load(Relaxed));
        let wanted = counts.iter().sum::<u64>() as f64 * share;
        let mut sum = 0;
        for (index, count) in counts.iter().enumerate() {
            sum += count;
            if sum > 0 && sum as f64 >= wanted {
                return 1 << index;
            }
        }
        0
    }

    fn json(&self) -> Value {
        let count = self.count.load(Relaxed);
        let mean_us = self.total_ns.load(Relaxed) as f64 / 1000.0 / count.max(1) as f64;
        json!({
            "count": count,
            "errors": self.errors.load(Relaxed),
            "answered_at_once": self.inline.load(Relaxed),
            "mean_us": (mean_us * 10.0).round() / 10.0,
            "p50_below_us": self.quantile_us(0.5),
            "p99_below_us": self.quantile_us(0.99),
            "max_us": self.max_ns.load(Relaxed).div_ceil(1000),
        })
    }
}

fn bucket(us: u64) -> usize {
    ((u64::BITS - us.leading_zeros()) as usize).min(BUCKETS - 1)
}

/// Counters of one mount.
pub struct Stats {
    since: Instant,
    ops: [Counters; OPS.len()],
    panics: AtomicU64,
}

impl Default for Stats {
    fn default() -> Self {
        Self {
            since: Instant::now(),
            ops: Default::default(),
            panics: AtomicU64::new(0),
        }
    }
}

impl Stats {
    /// A request that came at `began` has its answer.
    pub fn ended(&self, op: Op, began: Instant, failed: bool) {
        self.ops[op as usize].ended(began.elapsed(), failed);
    }

    /// How many requests had their answer.
    #[must_use]
    pub fn requests(&self) -> u64 {
        self.ops.iter().map(|op| op.count.load(Relaxed)).sum()
    }

    /// It had its answer without waiting for anything.
    pub fn answered_at_once(&self, op: Op) {
        self.ops[op as usize].inline.fetch_add(1, Relaxed);
    }

    /// A request was given up, and answered with `EIO`.
    pub fn panicked(&self) {
        self.panics.fetch_add(1, Relaxed);
    }

    /// All of it; kinds that were not asked for are left out.
    #[must_use]
    pub fn json(&self, measures: &Measures) -> Value {
        let used = OPS
            .iter()
            .filter(|(op, _)| self.ops[*op as usize].count.load(Relaxed) > 0);
        let operations: serde_json::Map<String, Value> = used
            .map(|(op, name)| ((*name).to_owned(), self.ops[*op as usize].json()))
            .collect();
        json!({
            "mounted_s": self.since.elapsed().as_secs(),
            "panics": self.panics.load(Relaxed),
            "operations": operations,
            "filesystem": measures,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_has_its_name() {
        for (index, (op, name)) in OPS.iter().enumerate() {
            assert_eq!(*op as usize, index);
            assert_eq!(op.name(), *name);
        }
    }

    #[test]
    fn latencies_are_told_by_their_buckets() {
        let counters = Counters::default();
        for us in 1..=100 {
            counters.ended(Duration::from_micros(us), us == 7);
        }
        let json = counters.json();
        assert_eq!(json["count"], 100);
        assert_eq!(json["errors"], 1);
        assert_eq!(json["p50_below_us"], 64);
        assert_eq!(json["p99_below_us"], 128);
        assert_eq!(json["max_us"], 100);
        assert_eq!(Counters::default().quantile_us(0.5), 0);
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn only_what_was_used_is_shown() {
        let stats = Stats::default();
        stats.ended(Op::Read, Instant::now(), false);
        let json = stats.json(&Measures::default());
        assert_eq!(json["filesystem"]["commits"], 0);
        let operations = json["operations"].as_object().unwrap();
        assert_eq!(operations.keys().collect::<Vec<_>>(), ["read"]);
    }
}
