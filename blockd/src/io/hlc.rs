//! The hybrid logical clock (U-07): wall clock time that never goes back and runs ahead of every
//! clock that it has heard of.
//!
//! What one message after another carries from server to server orders events without trusting
//! that the servers' wall clocks agree: a clock that is slow is pulled along, one that jumps back
//! counts on from where it was. It starts anew with the process.

use super::environment::{Clock, SystemClock};
use crate::id::Stamp;
use serde::Deserialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Milliseconds by which a clock that is heard of may be ahead of this one; one further ahead is
/// a mistake that would spread to all servers, and is not followed.
const AHEAD_MAX_MS: u64 = 24 * 3_600_000;
const COUNT_BITS: u32 = 16;

/// The clock of one process.
pub struct Hlc {
    last: AtomicU64,
    /// `None` has no time of its own.
    wall: Option<Arc<dyn Clock>>,
}

impl Hlc {
    #[must_use]
    pub fn new(wall: Arc<dyn Clock>) -> Self {
        Self {
            last: AtomicU64::new(0),
            wall: Some(wall),
        }
    }

    /// A clock that carries what it hears from one server to the next, as a client does.
    #[must_use]
    pub fn follower() -> Self {
        Self {
            last: AtomicU64::new(0),
            wall: None,
        }
    }

    /// The moment of an event: later than all before, and than all that were heard of.
    pub fn tick(&self) -> Stamp {
        let wall = self.wall();
        let next = |last: u64| wall.max(last.saturating_add(1));
        let (set, read) = (Ordering::Relaxed, Ordering::Relaxed);
        let before = self.last.fetch_update(set, read, |last| Some(next(last)));
        Stamp(before.map_or(wall, next))
    }

    /// Follows a clock that a message carried; what happens here from now on is later.
    pub fn observe(&self, stamp: Stamp) {
        if stamp.0 <= self.last.load(Ordering::Relaxed) {
            return;
        }
        let most = self.wall().saturating_add(AHEAD_MAX_MS << COUNT_BITS);
        if self.wall.is_none() || stamp.0 <= most {
            self.last.fetch_max(stamp.0, Ordering::Relaxed);
        } else {
            tracing::warn!(%stamp, "a clock that is more than a day ahead is not followed");
        }
    }

    fn wall(&self) -> u64 {
        let wall = self.wall.as_ref();
        wall.map_or(0, |wall| wall.unix_ms() << COUNT_BITS)
    }
}

/// A wall clock that is wrong, for tests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Skew {
    /// Milliseconds that are added to the wall clock.
    pub offset_ms: i64,
    /// The offset changes its sign so often; 0 is never.
    pub jump_every_ms: u64,
}

impl Clock for Skew {
    fn unix_ms(&self) -> u64 {
        let wall_ms = SystemClock.unix_ms();
        let jumps = wall_ms.checked_div(self.jump_every_ms).unwrap_or(0);
        let sign = if jumps % 2 == 1 { -1 } else { 1 };
        wall_ms.saturating_add_signed(sign * self.offset_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skewed(offset_ms: i64, jump_every_ms: u64) -> Hlc {
        Hlc::new(Arc::new(Skew {
            offset_ms,
            jump_every_ms,
        }))
    }

    /// S003-43: a message makes the slow clock later than the fast one that sent it.
    #[test]
    fn a_slow_clock_follows_a_fast_one() {
        let (fast, slow) = (skewed(5000, 0), skewed(-5000, 0));
        let first = fast.tick();
        assert!(slow.tick() < first, "the clocks differ");
        slow.observe(first);
        let second = slow.tick();
        assert!(second > first);
        fast.observe(second);
        assert!(fast.tick() > second);
    }

    /// S003-43: a clock that jumps back and forth gives rising stamps.
    #[test]
    fn jumps_do_not_turn_time_back() {
        let clock = skewed(5000, 1);
        let end = SystemClock.unix_ms() + 20;
        let mut last = clock.tick();
        while SystemClock.unix_ms() < end {
            let next = clock.tick();
            assert!(next > last);
            last = next;
        }
    }

    #[test]
    fn a_clock_that_is_days_ahead_is_not_followed() {
        let clock = skewed(0, 0);
        clock.observe(Stamp(u64::MAX));
        assert!(clock.tick().0 < u64::MAX / 2);
    }
}
