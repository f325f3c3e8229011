//! Which blocks a filesystem that is being planned has given away.

use std::collections::BTreeMap;
use std::ops::Range;

/// Ranges of used blocks, from first to end; neighbours are one.
#[derive(Clone, Debug)]
pub struct Space {
    used: BTreeMap<u64, u64>,
    end: u64,
}

impl Space {
    /// Blocks up to `end` are free.
    #[must_use]
    pub fn new(end: u64) -> Self {
        let used = BTreeMap::new();
        Self { used, end }
    }

    /// Gives away `range`, of which nothing was given away.
    pub fn take(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((before, _)) = self
            .used
            .range(..=start)
            .next_back()
            .filter(|(_, to)| **to == start)
        {
            start = *before;
        }
        if let Some(after) = self.used.remove(&end) {
            end = after;
        }
        self.used.insert(start, end);
    }

    /// The free blocks from the first free one at or behind `from`, up to the next that is used.
    #[must_use]
    pub fn free_run(&self, from: u64) -> Option<Range<u64>> {
        let mut start = from;
        if let Some((_, end)) = self
            .used
            .range(..=start)
            .next_back()
            .filter(|(_, end)| **end > start)
        {
            start = *end;
        }
        let end = self
            .used
            .range(start..)
            .next()
            .map_or(self.end, |(next, _)| *next);
        (start < end).then_some(start..end)
    }

    /// The first of `count` free blocks in a row at or behind `from`.
    #[must_use]
    pub fn find(&self, from: u64, count: u64) -> Option<u64> {
        let mut from = from;
        loop {
            let run = self.free_run(from)?;
            if run.end - run.start >= count {
                return Some(run.start);
            }
            from = run.end;
        }
    }

    /// What is used of `range`, in order.
    pub fn used_in(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let before = self.used.range(..range.start).next_back();
        let all = before.into_iter().chain(self.used.range(range.clone()));
        let clip = move |(start, end): (&u64, &u64)| *start.max(&range.start)..*end.min(&range.end);
        all.map(clip).filter(|clipped| clipped.start < clipped.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_not_found() {
        let mut space = Space::new(100);
        space.take(10..20);
        space.take(30..40);
        space.take(50..50);
        assert_eq!(space.find(0, 10), Some(0));
        assert_eq!(space.find(5, 10), Some(20));
        assert_eq!(space.find(5, 11), Some(40));
        assert_eq!(space.find(50, 51), None);
        space.take(20..30);
        assert_eq!(space.free_run(15), Some(40..100));
        assert!(space.used_in(15..50).eq(std::iter::once(15..40)));
    }
}
