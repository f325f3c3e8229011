//! What the machine says of itself: randomness, wall clock, boot.

use crate::control::network::Prefix;
use if_addrs::{IfAddr, get_if_addrs};
use std::fs;
use std::io;
use std::net::IpAddr;
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

/// Bytes of memory that this process has; 0 if the kernel does not say.
#[must_use]
pub fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse().ok());
    kib.unwrap_or(0u64) * 1024
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

/// The bits of the mask of an address of this machine: that of its adapter, or of the one whose
/// subnetwork it is in, as all of 127.0.0.0/8 is of the loopback adapter. All of its bits, if there is none.
#[must_use]
pub fn mask_bits(address: IpAddr) -> u8 {
    let adapters = get_if_addrs().unwrap_or_default().into_iter();
    let known: Vec<(IpAddr, u8)> = adapters
        .map(|adapter| match adapter.addr {
            IfAddr::V4(v4) => (v4.ip.into(), v4.prefixlen),
            IfAddr::V6(v6) => (v6.ip.into(), v6.prefixlen),
        })
        .collect();
    let exact = known.iter().find(|(ip, _)| *ip == address);
    let around = |(ip, bits): &&(IpAddr, u8)| Prefix::of(*ip, *bits) == Prefix::of(address, *bits);
    let found = exact.or_else(|| known.iter().filter(around).max_by_key(|(_, bits)| *bits));
    found.map_or(u8::MAX, |(_, bits)| *bits)
}
