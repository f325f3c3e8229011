//! What an attachment counts, and what it says of itself.

use super::record::{Ha, Record};
use crate::client::OwnerState;
use crate::io::host::unix_ms;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// A request that waits longer than this waits for a server that is away, not for a disk.
const WAITING: Duration = Duration::from_secs(1);

/// Whether the attachment answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Requests are answered.
    Serving,
    /// A request has waited for longer than a second: a server that it needs is away.
    Waiting,
    /// Its daemon is gone; what waits is served again after `blockctl attach`.
    Unserved,
}

/// A server that may be asked for the routing table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    pub address: String,
    /// It is the one that is asked.
    pub in_use: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastError {
    pub unix_ms: u64,
    pub message: String,
}

/// One attachment as `blockctl attachment status` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub volume: String,
    pub backend: String,
    pub state: State,
    pub device: Option<PathBuf>,
    /// `/dev/blockd/VOL`.
    pub link: Option<PathBuf>,
    pub socket: Option<PathBuf>,
    pub pid: u32,
    pub attached_unix_ms: u64,
    pub size_bytes: u64,
    pub read_only: bool,
    pub exclusive: bool,
    pub ha: Ha,
    pub connections: u32,
    pub dead_timeout_s: u64,
    pub servers: Vec<ServerStatus>,
    /// The servers that own pages of the volume: the data comes from them.
    pub owners: Vec<OwnerState>,
    #[serde(flatten)]
    pub counts: Counts,
}

/// What was counted since the daemon started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub requests: u64,
    pub requests_in_flight: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// The longest time that a request waited or waits.
    pub longest_stall_ms: u64,
    /// Connections to servers that were made again after one was lost.
    pub reconnects: u64,
    /// Times that another server became the one that is asked first.
    pub moves: u64,
    pub errors: u64,
    pub last_error: Option<LastError>,
}

impl Status {
    /// What is known of an attachment from its record alone.
    #[must_use]
    pub fn of_record(record: &Record) -> Self {
        let spec = &record.spec;
        let server = |address: &String| ServerStatus {
            address: address.clone(),
            in_use: false,
        };
        Self {
            volume: spec.target.clone(),
            backend: record.key.to_string(),
            state: State::Unserved,
            device: record.device.clone(),
            link: None,
            socket: spec.socket.clone(),
            pid: record.pid,
            attached_unix_ms: record.attached_unix_ms,
            size_bytes: 0,
            read_only: spec.read_only,
            exclusive: spec.exclusive,
            ha: spec.ha,
            connections: spec.connections,
            dead_timeout_s: spec.dead_timeout.as_secs(),
            servers: spec.servers.iter().map(server).collect(),
            owners: vec![],
            counts: Counts::default(),
        }
    }
}

/// Counters of one attachment, for one thread.
#[derive(Debug, Default)]
pub(super) struct Meter(RefCell<Inner>);

#[derive(Debug, Default)]
struct Inner {
    counts: Counts,
    /// When each waiting request came, in the order of their coming.
    waiting: BTreeMap<u64, Instant>,
    longest: Duration,
}

/// A request that waits; it is over when this is dropped.
pub(super) struct Waiting<'a> {
    meter: &'a Meter,
    number: u64,
}

impl Meter {
    pub(super) fn begin(&self) -> Waiting<'_> {
        let mut inner = self.0.borrow_mut();
        inner.counts.requests += 1;
        let number = inner.counts.requests;
        inner.waiting.insert(number, Instant::now());
        Waiting {
            meter: self,
            number,
        }
    }

    pub(super) fn read(&self, len_bytes: u64) {
        self.0.borrow_mut().counts.read_bytes += len_bytes;
    }

    pub(super) fn written(&self, len_bytes: u64) {
        self.0.borrow_mut().counts.written_bytes += len_bytes;
    }

    pub(super) fn moved(&self) {
        self.0.borrow_mut().counts.moves += 1;
    }

    pub(super) fn failed(&self, message: String) {
        let counts = &mut self.0.borrow_mut().counts;
        counts.errors += 1;
        counts.last_error = Some(LastError {
            unix_ms: unix_ms(),
            message,
        });
    }

    /// The counts at `now`, and whether a request waits for a server.
    pub(super) fn counts(&self, now: Instant) -> (Counts, State) {
        let inner = self.0.borrow();
        let oldest = inner.waiting.first_key_value().map_or(now, |(_, at)| *at);
        let waited = now.saturating_duration_since(oldest);
        let mut counts = inner.counts.clone();
        counts.requests_in_flight = inner.waiting.len() as u64;
        let longest = inner.longest.max(waited).as_millis();
        counts.longest_stall_ms = u64::try_from(longest).unwrap_or(u64::MAX);
        let state = match waited > WAITING {
            true => State::Waiting,
            false => State::Serving,
        };
        (counts, state)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut inner = self.meter.0.borrow_mut();
        if let Some(since) = inner.waiting.remove(&self.number) {
            inner.longest = inner.longest.max(since.elapsed());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_that_waits_shows_before_it_is_over() {
        let meter = Meter::default();
        let first = meter.begin();
        let second = meter.begin();
        let later = Instant::now() + Duration::from_secs(5);
        let (counts, state) = meter.counts(later);
        assert_eq!((counts.requests, counts.requests_in_flight), (2, 2));
        assert!(counts.longest_stall_ms >= 5000, "{counts:?}");
        assert_eq!(state, State::Waiting);
        drop(first);
        drop(second);
        let (counts, state) = meter.counts(later);
        assert_eq!((counts.requests, counts.requests_in_flight), (2, 0));
        assert!(counts.longest_stall_ms < 5000, "{counts:?}");
        assert_eq!(state, State::Serving);
    }

    #[test]
    fn the_last_error_is_kept() {
        let meter = Meter::default();
        meter.failed("a".to_owned());
        meter.failed("b".to_owned());
        let (counts, _) = meter.counts(Instant::now());
        assert_eq!(counts.errors, 2);
        assert_eq!(counts.last_error.unwrap().message, "b");
    }
}
