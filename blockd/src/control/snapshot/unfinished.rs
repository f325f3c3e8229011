//! Which snapshot records have no coordinator any more: what this server has seen of them.
//!
//! Times in the records are other servers' wall clocks, which may be far ahead, so they are never
//! compared: this server counts for how long it has seen each record unfinished. It begins at zero at
//! its start. Time in which it did not run does not count, as it could have heard nothing.

use crate::id::{SnapshotId, VolumeId};
use crate::limits::{SNAPSHOT_PENDING_MAX_MS, SWEEP_INTERVAL_MS};
use std::collections::BTreeMap;

/// How long each record has been unfinished.
#[derive(Debug, Default)]
pub struct UnfinishedWatch {
    seen_ms: BTreeMap<(VolumeId, SnapshotId), u64>,
    last_tick_ms: Option<u64>,
}

impl UnfinishedWatch {
    /// Looks at all records that are neither committed nor gone, every `SWEEP_INTERVAL_MS`.
    pub fn tick(
        &mut self,
        now_ms: u64,
        unfinished: impl IntoIterator<Item = (VolumeId, SnapshotId)>,
    ) {
        let last = self.last_tick_ms.replace(now_ms).unwrap_or(now_ms);
        let passed = now_ms.saturating_sub(last).min(2 * SWEEP_INTERVAL_MS);
        let before = std::mem::take(&mut self.seen_ms);
        let seen = unfinished.into_iter().map(|key| {
            let seen = before.get(&key).map_or(0, |seen| seen + passed);
            (key, seen)
        });
        self.seen_ms = seen.collect();
    }

    /// True if whoever was at it is dead or has given up.
    #[must_use]
    pub fn is_abandoned(&self, volume: VolumeId, snapshot: SnapshotId) -> bool {
        let seen = self.seen_ms.get(&(volume, snapshot));
        seen.is_some_and(|seen| *seen > SNAPSHOT_PENDING_MAX_MS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: (VolumeId, SnapshotId) = (VolumeId(1), SnapshotId(3));

    #[test]
    fn a_record_that_stays_unfinished_is_abandoned() {
        let mut watch = UnfinishedWatch::default();
        for now_ms in (0..=SNAPSHOT_PENDING_MAX_MS).step_by(10_000) {
            watch.tick(now_ms, [KEY]);
            assert!(!watch.is_abandoned(KEY.0, KEY.1), "too early: {now_ms}");
        }
        watch.tick(SNAPSHOT_PENDING_MAX_MS + 10_000, [KEY]);
        assert!(watch.is_abandoned(KEY.0, KEY.1));
        watch.tick(SNAPSHOT_PENDING_MAX_MS + 20_000, []);
        watch.tick(SNAPSHOT_PENDING_MAX_MS + 30_000, [KEY]);
        assert!(!watch.is_abandoned(KEY.0, KEY.1), "it was finished");
    }

    #[test]
    fn time_in_which_this_server_was_stopped_does_not_count() {
        let mut watch = UnfinishedWatch::default();
        watch.tick(0, [KEY]);
        watch.tick(3_600_000, [KEY]);
        assert!(!watch.is_abandoned(KEY.0, KEY.1));
    }
}
