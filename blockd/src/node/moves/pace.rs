//! How fast pages are copied: below a rate that was asked for, or by what clients leave.
//!
//! Without a rate a move goes as fast as it can while neither of the two servers is asked for pages, and
//! at [`MOVE_BUSY_RATE_BYTES`] while one of them is.

use crate::limits::{MOVE_BUSY_MS, MOVE_BUSY_RATE_BYTES};
use std::cell::Cell;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// Whether clients ask a server for its pages, by the number of requests that it has served.
#[derive(Default)]
pub(super) struct Clients {
    served: Cell<u64>,
    until: Cell<Option<Instant>>,
}

impl Clients {
    /// True if there was a request in the last [`MOVE_BUSY_MS`], as far as that was looked at.
    pub(super) fn ask(&self, served: u64, now: Instant) -> bool {
        if self.served.replace(served) != served {
            self.until
                .set(Some(now + Duration::from_millis(MOVE_BUSY_MS)));
        }
        self.until.get().is_some_and(|until| now < until)
    }
}

/// Keeps the copying below a rate.
pub(super) struct Pace {
    /// `None`: by what clients leave.
    rate_bytes: Option<u64>,
    clients: Clients,
    /// Until when the new owner counts as asked by clients.
    target_until: Cell<Option<Instant>>,
    /// When all that was copied is due.
    due: Cell<Instant>,
}

impl Pace {
    const BURST: Duration = Duration::from_millis(2);

    /// `rate_bytes` a second, 0 for none; `served` are the requests that this server has served so far.
    pub(super) fn new(rate_bytes: u64, served: u64) -> Self {
        let clients = Clients::default();
        clients.served.set(served);
        Self {
            rate_bytes: Some(rate_bytes).filter(|rate| *rate != 0),
            clients,
            target_until: Cell::default(),
            due: Cell::new(Instant::now()),
        }
    }

    /// The new owner has said that clients ask it.
    pub(super) fn target_is_asked(&self, now: Instant) {
        self.target_until
            .set(Some(now + Duration::from_millis(MOVE_BUSY_MS)));
    }

    /// Bytes a second at the most now, if there is a bound.
    fn rate(&self, served: u64, now: Instant) -> Option<u64> {
        let asked = self.clients.ask(served, now);
        let target_asked = self.target_until.get().is_some_and(|until| now < until);
        let by_clients = (asked || target_asked).then_some(MOVE_BUSY_RATE_BYTES);
        self.rate_bytes.or(by_clients)
    }

    /// When so many bytes more may be copied; now, without a bound.
    fn due(&self, bytes: usize, served: u64, now: Instant) -> Instant {
        let Some(rate) = self.rate(served, now) else {
            self.due.set(now);
            return now;
        };
        let cost = Duration::from_secs_f64(bytes as f64 / rate as f64);
        let due = self.due.get().max(now);
        self.due.set(due + cost);
        due
    }

    /// Waits until so many bytes may be copied.
    pub(super) async fn wait(&self, bytes: usize, served: u64) {
        let now = Instant::now();
        let due = self.due(bytes, served, now);
        // A timer is exact to a millisecond: what is due sooner does not wait for it.
        if due.duration_since(now) > Self::BURST {
            sleep_until(due).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const BUSY: Duration = Duration::from_millis(MOVE_BUSY_MS);

    #[test]
    fn a_rate_is_kept_whoever_asks() {
        let (pace, now) = (Pace::new(1000, 0), Instant::now());
        assert_eq!(pace.due(2000, 0, now), now);
        assert_eq!(pace.due(1000, 7, now), now + 2 * SECOND);
        assert_eq!(pace.due(1000, 7, now + 9 * SECOND), now + 9 * SECOND);
    }

    #[test]
    fn without_a_rate_only_clients_slow_it_down() {
        let (pace, now) = (Pace::new(0, 5), Instant::now());
        let second = usize::try_from(MOVE_BUSY_RATE_BYTES).unwrap();
        assert_eq!(pace.due(second, 5, now), now);
        assert_eq!(pace.due(second, 5, now), now, "nobody asks");
        assert_eq!(pace.due(second, 6, now), now);
        assert_eq!(
            pace.due(second, 6, now),
            now + SECOND,
            "this server is asked"
        );
        let later = now + 2 * BUSY;
        assert_eq!(pace.due(second, 6, later), later, "and no more");
        pace.target_is_asked(later);
        pace.due(second, 6, later);
        assert_eq!(pace.due(second, 6, later), later + SECOND);
        assert_eq!(pace.due(second, 6, later + BUSY), later + BUSY);
    }
}
