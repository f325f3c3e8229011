//! What the machine says of itself: randomness, wall clock, boot.

use std::fs;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// 128 random bits from the kernel.
///
/// # Errors
/// When the kernel gives none.
pub fn random_u128() -> io::Result<u128> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(u128::from_le_bytes(bytes))
}

/// 64 random bits from the kernel.
///
/// # Errors
/// When the kernel gives none.
pub fn random_u64() -> io::Result<u64> {
    random_u128().map(|bits| bits as u64)
}

/// Milliseconds since 1970: shown to people and used for ages, never for an order of events.
#[must_use]
pub fn unix_ms() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}

/// The name of this host; empty if the kernel does not say.
#[must_use]
pub fn hostname() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    name.trim_end().to_owned()
}

/// The id of this boot of the machine; a new one after every start of the kernel.
#[must_use]
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default()
}
