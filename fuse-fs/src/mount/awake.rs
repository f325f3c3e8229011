//! `-o low_latency`: while the mount is busy, idle processors wait awake.
//!
//! A request goes from a program to this process and back, and both wait for each other asleep. To wake a processor
//! that has gone to sleep takes longer than most requests, in virtual machines several times. Processors do not sleep
//! while somebody holds the kernel's `/dev/cpu_dma_latency` (PM QoS) with the latency 0: that costs power on
//! all of them, so it is held only while requests come in numbers.

use super::stats::Stats;
use crate::error::FuseFsError;
use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

const LATENCY_DEVICE: &str = "/dev/cpu_dma_latency";
/// The bound in microseconds, as the device wants it.
const NO_LATENCY: [u8; 4] = 0_i32.to_ne_bytes();
const TICK: Duration = Duration::from_millis(20);
/// From 2,000 requests a second on.
const BUSY_REQUESTS: u64 = 40;
/// So long after the last busy tick.
const HELD_TICKS: u32 = 10;

/// When processors are kept awake.
#[derive(Default)]
struct Watch {
    requests: u64,
    ticks_left: u32,
}

impl Watch {
    /// Whether they are until the next look; `requests` is how many have come in all.
    fn look(&mut self, requests: u64) -> bool {
        let new = requests.saturating_sub(self.requests);
        self.requests = requests;
        self.ticks_left = match new >= BUSY_REQUESTS {
            true => HELD_TICKS,
            false => self.ticks_left.saturating_sub(1),
        };
        self.ticks_left > 0
    }
}

/// Whether it can be done: by root, on a kernel with power management.
///
/// # Errors
/// [`FuseFsError::System`] with the reason.
pub fn check() -> Result<(), FuseFsError> {
    // Nothing is asked of the kernel before a latency is written.
    File::options()
        .write(true)
        .open(LATENCY_DEVICE)
        .map(drop)
        .map_err(|source| FuseFsError::System {
            what: "low_latency needs /dev/cpu_dma_latency",
            source,
        })
}

/// Keeps processors awake while requests come in numbers, for ever.
pub async fn keep_awake(stats: Arc<Stats>) {
    let (mut watch, mut held) = (Watch::default(), None);
    loop {
        tokio::time::sleep(TICK).await;
        match (watch.look(stats.requests()), &held) {
            (true, None) => {
                held = hold()
                    .inspect_err(|error| tracing::debug!("{LATENCY_DEVICE}: {error}"))
                    .ok();
            }
            (false, Some(_)) => held = None,
            _ => {}
        }
    }
}

fn hold() -> io::Result<File> {
    let mut file = File::options().write(true).open(LATENCY_DEVICE)?;
    file.write_all(&NO_LATENCY)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_awake_while_many_requests_come_and_a_moment_longer() {
        let mut watch = Watch::default();
        assert!(!watch.look(BUSY_REQUESTS - 1));
        assert!(watch.look(2 * BUSY_REQUESTS));
        for _ in 1..HELD_TICKS {
            assert!(watch.look(2 * BUSY_REQUESTS));
        }
        assert!(!watch.look(2 * BUSY_REQUESTS + 1));
        assert!(watch.look(4 * BUSY_REQUESTS), "busy again");
    }
}
