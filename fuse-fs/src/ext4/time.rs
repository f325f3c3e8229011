//! Times of files: seconds of which inodes keep 32 bits, and behind them two more and the nanoseconds.
//!
//! ```text
//! extra word: bits 0..2 how many times 2^32 seconds are added, bits 2..32 nanoseconds
//! ```
//!
//! The 32 bits are signed: from 1901, with the two bits to 2446.

/// A point in time since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Timestamp {
    pub seconds: i64,
    pub nanos: u32,
}

/// What an inode can keep.
const MIN_SECONDS: i64 = i32::MIN as i64;
const MAX_SECONDS: i64 = MIN_SECONDS + (4 << 32) - 1;
/// What it can keep without the extra word.
const MAX_NARROW_SECONDS: i64 = i32::MAX as i64;

impl Timestamp {
    /// The time of a system's clock.
    #[must_use]
    pub fn of(time: std::time::SystemTime) -> Self {
        match time.duration_since(std::time::UNIX_EPOCH) {
            Ok(since) => Self {
                seconds: i64::try_from(since.as_secs()).unwrap_or(MAX_SECONDS),
                nanos: since.subsec_nanos(),
            },
            Err(_) => Self::default(),
        }
    }

    /// The two words of an inode; a time that they cannot keep becomes the nearest.
    #[must_use]
    pub fn encode(self, wide: bool) -> (u32, u32) {
        let max = if wide {
            MAX_SECONDS
        } else {
            MAX_NARROW_SECONDS
        };
        let seconds = self.seconds.clamp(MIN_SECONDS, max);
        let low = seconds as i32;
        let epochs = (seconds - i64::from(low)) >> 32;
        (
            low.cast_unsigned(),
            epochs.cast_unsigned() as u32 | self.nanos << 2,
        )
    }

    /// The time in two words of an inode; `extra` is 0 where there is none.
    #[must_use]
    pub fn decode(low: u32, extra: u32) -> Self {
        Self {
            seconds: i64::from(low.cast_signed()) + (i64::from(extra & 3) << 32),
            nanos: (extra >> 2).min(999_999_999),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_from_1901_to_2446_is_kept() {
        for seconds in [
            MIN_SECONDS,
            -1,
            0,
            1 << 31,
            1 << 32,
            5_000_000_000,
            MAX_SECONDS,
        ] {
            let time = Timestamp {
                seconds,
                nanos: 999_999_999,
            };
            let (low, extra) = time.encode(true);
            assert_eq!(Timestamp::decode(low, extra), time);
        }
    }

    #[test]
    fn what_cannot_be_kept_becomes_the_nearest() {
        let late = Timestamp {
            seconds: 1 << 40,
            nanos: 0,
        };
        let (low, extra) = late.encode(true);
        assert_eq!(Timestamp::decode(low, extra).seconds, MAX_SECONDS);
        assert_eq!(late.encode(false).0, i32::MAX.cast_unsigned());
    }
}
