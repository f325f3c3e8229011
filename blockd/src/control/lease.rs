//! When a lease has expired: what the registry's leader has observed of its renewals.
//!
//! Renewals are not written anywhere: the leader keeps in memory for how long it has not heard of
//! each lease, and proposes the end of one whose time to live has passed, with a margin. A new
//! leader begins at zero. Time in which this server did not run, because its machine or process was
//! stopped, does not count: it could have heard nothing. So a lease never expires early; what makes
//! an expiry safe is the fence at the owners, not the time.

use crate::id::{LeaseEpoch, VolumeId};
use crate::limits::{LEASE_MARGIN_MS, LEASE_TICK_MS};
use std::collections::BTreeMap;

/// A lease that is held, as the registry has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldLease {
    pub volume: VolumeId,
    pub epoch: LeaseEpoch,
    pub ttl_ms: u64,
}

/// How long each lease has not been heard of.
#[derive(Debug, Default)]
pub struct LeaseWatch {
    silent_ms: BTreeMap<(VolumeId, LeaseEpoch), u64>,
    last_tick_ms: Option<u64>,
}

impl LeaseWatch {
    /// The holder of the lease was heard of.
    pub fn renewed(&mut self, volume: VolumeId, epoch: LeaseEpoch) {
        self.silent_ms.insert((volume, epoch), 0);
    }

    /// This server does not lead any more.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// Looks at all leases that are held, every `LEASE_TICK_MS`; those that have expired.
    pub fn tick(&mut self, now_ms: u64, held: &[HeldLease]) -> Vec<HeldLease> {
        let last = self.last_tick_ms.replace(now_ms).unwrap_or(now_ms);
        let passed = now_ms.saturating_sub(last).min(2 * LEASE_TICK_MS);
        let before = std::mem::take(&mut self.silent_ms);
        let mut expired = Vec::new();
        for lease in held {
            let key = (lease.volume, lease.epoch);
            let silent = before.get(&key).map_or(0, |silent| silent + passed);
            if silent > lease.ttl_ms.saturating_add(LEASE_MARGIN_MS) {
                expired.push(*lease);
            }
            self.silent_ms.insert(key, silent);
        }
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: HeldLease = HeldLease {
        volume: VolumeId(1),
        epoch: LeaseEpoch(3),
        ttl_ms: 10_000,
    };

    /// Ticks until the lease expires; the time at that tick.
    fn expiry(watch: &mut LeaseWatch, mut now_ms: u64, lease: HeldLease) -> u64 {
        while watch.tick(now_ms, &[lease]).is_empty() {
            now_ms += LEASE_TICK_MS;
            assert!(now_ms < 1_000_000, "never expires");
        }
        now_ms
    }

    #[test]
    fn a_silent_lease_expires_after_its_time_and_the_margin() {
        let mut watch = LeaseWatch::default();
        let at = expiry(&mut watch, 1_000, LEASE);
        assert!(at > 1_000 + LEASE.ttl_ms + LEASE_MARGIN_MS);
        assert_eq!(watch.tick(at + 1, &[LEASE]), [LEASE], "until it is closed");
    }

    #[test]
    fn a_renewal_a_new_epoch_and_a_new_leader_begin_anew() {
        let full_ms = LEASE.ttl_ms + LEASE_MARGIN_MS;
        let mut watch = LeaseWatch::default();
        for now_ms in (0..full_ms).step_by(500) {
            assert!(watch.tick(now_ms, &[LEASE]).is_empty());
        }
        watch.renewed(LEASE.volume, LEASE.epoch);
        assert!(expiry(&mut watch, full_ms, LEASE) >= 2 * full_ms);
        let next = HeldLease {
            epoch: LeaseEpoch(5),
            ..LEASE
        };
        assert!(expiry(&mut watch, 50_000, next) > 50_000 + full_ms);
        watch.forget();
        assert!(expiry(&mut watch, 100_000, LEASE) > 100_000 + full_ms);
    }

    #[test]
    fn time_in_which_the_leader_was_stopped_does_not_count() {
        let mut watch = LeaseWatch::default();
        assert!(watch.tick(0, &[LEASE]).is_empty());
        assert!(watch.tick(3_600_000, &[LEASE]).is_empty());
        assert!(watch.tick(3_600_500, &[LEASE]).is_empty());
    }
}
