//! Numbers inside on-disk structures: little-endian ones of ext4, big-endian ones of jbd2.
//!
//! Callers slice structures out of blocks whose size is known; what lies beyond the slice reads as 0.

/// The `u16` at byte `at`.
#[must_use]
pub fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

/// The `u32` at byte `at`.
#[must_use]
pub fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

/// The big-endian `u16` at byte `at`.
#[must_use]
pub fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(bytes, at))
}

/// The big-endian `u32` at byte `at`.
#[must_use]
pub fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

/// A number that is kept in two halves.
#[must_use]
pub fn join(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

/// The `N` bytes at `at`.
#[must_use]
pub fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let end = at.saturating_add(N);
    let found = bytes.get(at..end).and_then(|slice| slice.try_into().ok());
    found.unwrap_or([0; N])
}

/// What stands between `from` and `to`, less where `bytes` is shorter.
#[must_use]
pub fn part(bytes: &[u8], from: usize, to: usize) -> &[u8] {
    let to = to.min(bytes.len());
    bytes.get(from..to).unwrap_or_default()
}

/// Writes `value` at `at`; the caller's buffer is large enough.
pub fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}
