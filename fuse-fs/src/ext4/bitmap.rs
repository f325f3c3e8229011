//! Bitmaps of blocks and inodes: bit `n` is bit `n % 8` of byte `n / 8`, set when in use.

use crate::ext4::bytes::array;
use std::ops::Range;

const WORD_BITS: u32 = 64;

#[must_use]
pub fn is_set(bits: &[u8], at: u32) -> bool {
    bits[(at / 8) as usize] >> (at % 8) & 1 != 0
}

/// Sets or clears `range`.
pub fn fill(bits: &mut [u8], range: Range<u32>, used: bool) {
    let mut at = range.start;
    while at < range.end {
        let byte = &mut bits[(at / 8) as usize];
        let end = range.end.min((at / 8 + 1) * 8);
        let mask = (0xff_u8 << (at % 8)) & (0xff_u8 >> (7 - (end - 1) % 8));
        *byte = if used { *byte | mask } else { *byte & !mask };
        at = end;
    }
}

/// Whether all of `range` has the value `used`.
#[must_use]
pub fn is_all(bits: &[u8], range: Range<u32>, used: bool) -> bool {
    next(bits, range.clone(), !used) == range.end
}

/// The first bit of `range` with the value `used`, or its end.
#[must_use]
pub fn next(bits: &[u8], range: Range<u32>, used: bool) -> u32 {
    let mut at = range.start;
    while at < range.end {
        let word = at / WORD_BITS;
        let bytes: [u8; 8] = array(bits, word as usize * 8);
        let value = u64::from_le_bytes(bytes);
        let wanted = if used { value } else { !value };
        let left = wanted >> (at % WORD_BITS);
        if left != 0 {
            return (at + left.trailing_zeros()).min(range.end);
        }
        at = (word + 1) * WORD_BITS;
    }
    range.end
}

/// How many bits of `range` are clear.
#[must_use]
pub fn count_free(bits: &[u8], range: Range<u32>) -> u32 {
    let mut free = 0;
    let mut at = range.start;
    while at < range.end {
        let start = next(bits, at..range.end, false);
        let end = next(bits, start..range.end, true);
        free += end - start;
        at = end;
    }
    free
}

/// The first run of `want` clear bits in `range`, or else the longest one; `None` without any.
#[must_use]
pub fn find_run(bits: &[u8], range: Range<u32>, want: u32) -> Option<Range<u32>> {
    let mut best: Option<Range<u32>> = None;
    let mut at = range.start;
    while at < range.end {
        let start = next(bits, at..range.end, false);
        let end = next(bits, start..range.end.min(start.saturating_add(want)), true);
        if start < end
            && best
                .as_ref()
                .is_none_or(|best| end - start > best.len() as u32)
        {
            best = Some(start..end);
            if end - start >= want {
                break;
            }
        }
        at = end.max(start + 1);
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    fn naive(bits: &[u8], range: Range<u32>, want: u32) -> Option<Range<u32>> {
        let free = |at: u32, len: u32| (at..at + len).all(|bit| !is_set(bits, bit));
        let len = (1..=want).rev().find(|len| {
            (range.start..range.end).any(|at| at + len <= range.end && free(at, *len))
        })?;
        let at = (range.start..range.end).find(|at| free(*at, len))?;
        Some(at..at + len)
    }

    #[test]
    fn runs_are_those_that_a_naive_search_finds() {
        let mut state = 1_u64;
        for round in 0..300_u32 {
            let mut bits = vec![0_u8; 32];
            for byte in &mut bits {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                *byte = (state >> 56) as u8 | (state >> 48) as u8 & (round as u8);
            }
            let range = round % 50..256 - round % 7;
            let want = 1 + round % 9;
            assert_eq!(
                find_run(&bits, range.clone(), want),
                naive(&bits, range.clone(), want),
                "{bits:?} {range:?} {want}"
            );
            let counted = range.clone().filter(|at| !is_set(&bits, *at)).count();
            assert_eq!(count_free(&bits, range), counted as u32);
        }
    }

    #[test]
    fn filling_touches_only_the_range() {
        for (start, end) in [(0, 0), (3, 4), (3, 8), (7, 9), (0, 64), (13, 51)] {
            for used in [true, false] {
                let mut bits = vec![if used { 0 } else { 0xff }; 8];
                fill(&mut bits, start..end, used);
                let as_told = |at: &u32| is_set(&bits, *at) == ((start..end).contains(at) == used);
                assert!((0..64).all(|at| as_told(&at)), "{start}..{end} {used}");
                assert!(is_all(&bits, start..end, used));
            }
        }
    }
}
