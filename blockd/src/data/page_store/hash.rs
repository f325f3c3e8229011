//! A hash for small integer keys that the store itself makes: one multiplication, no keys.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// Hash map for slot numbers, group keys and volume ids.
pub(super) type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<IntHasher>>;

/// Folded multiplication; good bits at both ends, which the table needs.
#[derive(Default)]
pub(super) struct IntHasher(u64);

impl Hasher for IntHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        let wide = u128::from(self.0 ^ value ^ 0x9e37_79b9_7f4a_7c15) * 0xd6e8_feb8_6659_fd93;
        let bytes = wide.to_le_bytes();
        let (low, high) = bytes.split_at(8);
        self.0 = super::codec::u64_at(low, 0) ^ super::codec::u64_at(high, 0);
    }
}
