//! Which slots of the slab are free.
//!
//! A slot comes here only when the record that freed it is durable and known to be (see `redo`), so
//! that a slot handed out again can never be needed by recovery. Warm slots still have their space in
//! the file system and are handed out first.

use std::collections::BTreeMap;

/// Runs looked at for a long allocation before the slab grows instead.
const SEARCH_RUNS: usize = 64;

/// Free slots as runs, merged with their neighbours.
#[derive(Debug, Default)]
struct Runs {
    runs: BTreeMap<u32, u32>,
    slots: u64,
}

impl Runs {
    fn insert(&mut self, slot: u32) {
        self.slots += 1;
        let (mut start, mut len) = (slot, 1);
        if let Some((&before, &before_len)) = self.runs.range(..slot).next_back()
            && before + before_len == slot
        {
            (start, len) = (before, before_len + 1);
        }
        if let Some(after) = slot.checked_add(1).and_then(|next| self.runs.remove(&next)) {
            len += after;
        }
        self.runs.insert(start, len);
    }

    fn take(&mut self, count: u32) -> Option<u32> {
        let mut early = self.runs.iter().take(SEARCH_RUNS);
        let (start, len) = early
            .find(|(_, len)| count <= **len)
            .map(|(s, l)| (*s, *l))?;
        self.runs.remove(&start);
        if count < len {
            self.runs.insert(start + count, len - count);
        }
        self.slots -= u64::from(count);
        Some(start)
    }
}

/// The allocator of slots.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// First slot that was never used.
    end: u32,
    warm: Runs,
    cold: Runs,
}

impl Slots {
    /// Slots of the slab, used or free.
    pub(super) fn end(&self) -> u32 {
        self.end
    }

    /// Free slots whose space is still allocated.
    pub(super) fn warm(&self) -> u64 {
        self.warm.slots
    }

    /// Neighbouring free slots; `None` if the address space is used up.
    pub(super) fn allocate(&mut self, count: u32) -> Option<u32> {
        if let Some(start) = self.warm.take(count).or_else(|| self.cold.take(count)) {
            return Some(start);
        }
        let start = self.end;
        self.end = start.checked_add(count)?;
        Some(start)
    }

    /// Makes a slot free.
    pub(super) fn release(&mut self, slot: u32, warm: bool) {
        if warm {
            self.warm.insert(slot)
        } else {
            self.cold.insert(slot)
        }
    }

    /// Recovery met a slot in use: the slab reaches at least to it.
    pub(super) fn extend_to(&mut self, end: u32) {
        self.end = self.end.max(end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_merge_and_warm_slots_come_first() {
        let mut slots = Slots::default();
        assert_eq!(slots.allocate(6), Some(0));
        for slot in [0, 2, 1] {
            slots.release(slot, false);
        }
        slots.release(5, true);
        assert_eq!((slots.cold.slots, slots.warm()), (3, 1));
        assert_eq!(slots.allocate(1), Some(5));
        assert_eq!(slots.allocate(3), Some(0));
        assert_eq!(slots.allocate(1), Some(6));
        slots.extend_to(u32::MAX);
        assert_eq!(slots.allocate(1), None);
    }
}
