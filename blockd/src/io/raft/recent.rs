//! The last entries of the log in memory: what was appended is soon read for the followers and for the
//! state machine.

use super::TypeConfig;
use openraft::Entry;
use std::collections::VecDeque;

/// Encoded bytes of entries that are kept; the last entry is kept whatever its size.
const KEPT_BYTES_MAX: usize = 4 << 20;

/// Neighbouring entries up to the end of the log. Empty at a start: the file has them all.
#[derive(Default)]
pub(super) struct Recent {
    entries: VecDeque<(Entry<TypeConfig>, usize)>,
    bytes: usize,
}

impl Recent {
    /// Takes an entry that the file has, with its length in encoded bytes.
    pub(super) fn push(&mut self, entry: Entry<TypeConfig>, len_bytes: usize) {
        let index = entry.log_id.index;
        if self.end() != Some(index) {
            self.entries.clear();
            self.bytes = 0;
        }
        self.bytes = self.bytes.saturating_add(len_bytes);
        self.entries.push_back((entry, len_bytes));
        while self.bytes > KEPT_BYTES_MAX && self.entries.len() > 1 {
            self.drop_first();
        }
    }

    /// Forgets the entries from index `first` on.
    pub(super) fn truncate(&mut self, first: u64) {
        while self
            .entries
            .back()
            .is_some_and(|(e, _)| e.log_id.index >= first)
        {
            let dropped = self.entries.pop_back().map_or(0, |(_, len)| len);
            self.bytes = self.bytes.saturating_sub(dropped);
        }
    }

    /// Forgets the entries up to index `last`.
    pub(super) fn purge(&mut self, last: u64) {
        while self
            .entries
            .front()
            .is_some_and(|(e, _)| e.log_id.index <= last)
        {
            self.drop_first();
        }
    }

    /// The entries of `start..end` (none: to the end of the log), up to `bytes_max` encoded bytes, but one
    /// at the least. `None`: the first of them is not here.
    pub(super) fn read(
        &self,
        start: u64,
        end: Option<u64>,
        bytes_max: usize,
    ) -> Option<Vec<Entry<TypeConfig>>> {
        let first = self.entries.front()?.0.log_id.index;
        let skipped = usize::try_from(start.checked_sub(first)?).ok()?;
        let (mut found, mut bytes) = (Vec::new(), 0_usize);
        for (entry, len_bytes) in self.entries.iter().skip(skipped) {
            bytes = bytes.saturating_add(*len_bytes);
            let over = bytes > bytes_max && !found.is_empty();
            if over || end.is_some_and(|end| entry.log_id.index >= end) {
                break;
            }
            found.push(entry.clone());
        }
        Some(found)
    }

    fn end(&self) -> Option<u64> {
        self.entries
            .back()
            .map(|(e, _)| e.log_id.index.saturating_add(1))
    }

    fn drop_first(&mut self) {
        let dropped = self.entries.pop_front().map_or(0, |(_, len)| len);
        self.bytes = self.bytes.saturating_sub(dropped);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use openraft::{CommittedLeaderId, EntryPayload, LogId};

    fn entry(index: u64) -> Entry<TypeConfig> {
        Entry {
            log_id: LogId::new(CommittedLeaderId::new(1, 1), index),
            payload: EntryPayload::Blank,
        }
    }

    fn indices(
        recent: &Recent,
        start: u64,
        end: Option<u64>,
        bytes_max: usize,
    ) -> Option<Vec<u64>> {
        let found = recent.read(start, end, bytes_max)?;
        Some(found.iter().map(|e| e.log_id.index).collect())
    }

    #[test]
    fn reads_what_it_has_and_says_what_it_has_not() {
        let mut recent = Recent::default();
        assert_eq!(indices(&recent, 0, None, 99), None);
        (5..10).for_each(|index| recent.push(entry(index), 10));
        assert_eq!(indices(&recent, 4, None, 99), None);
        assert_eq!(indices(&recent, 5, Some(7), 99), Some(vec![5, 6]));
        assert_eq!(indices(&recent, 8, None, 99), Some(vec![8, 9]));
        assert_eq!(indices(&recent, 10, None, 99), Some(vec![]));
        // Up to the bytes, but one at the least.
        assert_eq!(indices(&recent, 5, None, 20), Some(vec![5, 6]));
        assert_eq!(indices(&recent, 5, None, 1), Some(vec![5]));
    }

    #[test]
    fn forgets_at_both_ends_and_what_a_gap_cuts_off() {
        let mut recent = Recent::default();
        (5..10).for_each(|index| recent.push(entry(index), 10));
        recent.truncate(8);
        recent.purge(5);
        assert_eq!(indices(&recent, 5, None, 99), None);
        assert_eq!(indices(&recent, 6, None, 99), Some(vec![6, 7]));
        assert_eq!(recent.bytes, 20);
        recent.push(entry(8), 10);
        assert_eq!(indices(&recent, 6, None, 99), Some(vec![6, 7, 8]));
        recent.push(entry(20), 10);
        assert_eq!(indices(&recent, 8, None, 99), None);
        assert_eq!(indices(&recent, 20, None, 99), Some(vec![20]));
    }

    #[test]
    fn keeps_to_its_bytes() {
        let mut recent = Recent::default();
        (0..9).for_each(|index| recent.push(entry(index), KEPT_BYTES_MAX / 4));
        assert_eq!(indices(&recent, 4, None, usize::MAX), None);
        assert_eq!(
            indices(&recent, 5, None, usize::MAX),
            Some(vec![5, 6, 7, 8])
        );
        recent.push(entry(9), KEPT_BYTES_MAX * 2);
        assert_eq!(indices(&recent, 9, None, usize::MAX), Some(vec![9]));
    }
}
