//! The oracle of snapshot consistency (S003-25): writes that depend on each other.
//!
//! A writer puts 1 into place 0, then 1 into place 1 and so on, then 2 into place 0: each write is
//! issued after the one before was acknowledged. A point in time holds the first `m` of these
//! writes for some `m`, whatever servers and volumes the places are on.

use std::sync::atomic::{AtomicU64, Ordering};

/// How far a writer of a chain has come, counted in writes.
#[derive(Debug, Default)]
pub struct Progress {
    issued: AtomicU64,
    acknowledged: AtomicU64,
}

impl Progress {
    pub fn issue(&self) {
        self.issued.fetch_add(1, Ordering::SeqCst);
    }

    pub fn acknowledge(&self) {
        self.acknowledged.fetch_add(1, Ordering::SeqCst);
    }

    #[must_use]
    pub fn issued(&self) -> u64 {
        self.issued.load(Ordering::SeqCst)
    }

    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::SeqCst)
    }
}

/// The rule of a chain over so many places.
#[derive(Clone, Copy, Debug)]
pub struct Chain {
    pub places: u64,
}

impl Chain {
    /// Place and value of the write with this number, from 0 on.
    #[must_use]
    pub fn write(&self, number: u64) -> (usize, u64) {
        (
            usize::try_from(number % self.places).unwrap(),
            number / self.places + 1,
        )
    }

    /// The number of writes that a point in time with these values holds.
    ///
    /// # Errors
    /// Which values cannot have been there at the same time.
    pub fn cut(&self, values: &[u64]) -> Result<u64, String> {
        let count: u64 = values.iter().sum();
        let must = |place: u64| (count + self.places - 1 - place) / self.places;
        let right = (0..self.places)
            .zip(values)
            .all(|(place, value)| must(place) == *value);
        match right {
            true => Ok(count),
            false => Err(format!("{values:?} is no prefix of the chain")),
        }
    }

    /// Checks the values of a snapshot that was commanded when `acknowledged` writes were
    /// acknowledged, and complete when `issued` writes were issued.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self, values: &[u64], acknowledged: u64, issued: u64) -> Result<u64, String> {
        let count = self.cut(values)?;
        match (acknowledged..=issued).contains(&count) {
            true => Ok(count),
            false => Err(format!(
                "holds {count} writes, but {acknowledged} were acknowledged before the command \
                 and {issued} issued before its completion"
            )),
        }
    }
}

/// A block that carries one number in every word.
#[derive(Clone, Copy, Debug)]
pub struct Tag;

impl Tag {
    #[must_use]
    pub fn block(value: u64, len_bytes: usize) -> Vec<u8> {
        value.to_le_bytes().repeat(len_bytes / 8)
    }

    /// The number, if all words carry the same one.
    #[must_use]
    pub fn read(block: &[u8]) -> Option<u64> {
        let value = u64::from_le_bytes(block[..8].try_into().unwrap());
        (block == Self::block(value, block.len())).then_some(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHAIN: Chain = Chain { places: 3 };

    #[test]
    fn every_prefix_is_a_cut() {
        let mut values = [0; 3];
        for number in 0..20 {
            assert_eq!(CHAIN.check(&values, number, number), Ok(number));
            let (place, value) = CHAIN.write(number);
            values[place] = value;
        }
    }

    #[test]
    fn a_later_write_without_an_earlier_one_is_refused() {
        for values in [[1, 0, 1], [0, 1, 0], [2, 1, 0], [1, 2, 1], [3, 1, 1]] {
            assert!(CHAIN.cut(&values).is_err(), "{values:?}");
        }
    }

    #[test]
    fn a_cut_of_another_time_is_refused() {
        assert!(CHAIN.check(&[1, 1, 1], 4, 9).is_err());
        assert!(CHAIN.check(&[1, 1, 1], 0, 2).is_err());
    }

    #[test]
    fn a_torn_block_has_no_tag() {
        let mut block = Tag::block(7, 4096);
        assert_eq!(Tag::read(&block), Some(7));
        block[4095] = 1;
        assert_eq!(Tag::read(&block), None);
    }
}
