//! Eras as a tree: which versions of a chunk a view sees.
//!
//! An era ends with a snapshot or a rollback. As long as nothing was rolled back, a view of an era
//! sees the versions of that era and of all before it. A rollback begins an era that does not
//! follow the one before, but the era of the snapshot: a *turn*. The eras between the two are on
//! another branch; only snapshots taken in them still see them.

use super::version::Version;
use serde::{Deserialize, Serialize};

/// An era that was begun by a rollback.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Turn {
    /// The era.
    pub(super) era: u32,
    /// The one that it follows: the last that the snapshot sees. Smaller than `era`.
    pub(super) to: u32,
}

/// The eras that a view sees, from its own back to the first.
#[derive(Clone, Copy, Debug)]
pub(super) struct Line<'a> {
    era: u32,
    /// Turns up to the era, in order.
    turns: &'a [Turn],
}

impl<'a> Line<'a> {
    /// The line of a view of `era`; `turns` are all of the volume, in order.
    pub(super) fn new(era: u32, turns: &'a [Turn]) -> Line<'a> {
        let known = match turns.last() {
            Some(last) if era < last.era => turns.partition_point(|turn| turn.era <= era),
            _ => turns.len(),
        };
        Line {
            era,
            turns: &turns[..known],
        }
    }

    /// The era of the view itself.
    pub(super) fn era(&self) -> u32 {
        self.era
    }

    /// Eras in unbroken stretches `(first, last)`, newest first.
    pub(super) fn stretches(self) -> impl Iterator<Item = (u32, u32)> + 'a {
        let mut next = Some(self);
        std::iter::from_fn(move || {
            let line = next?;
            let turn = line.turns.last();
            next = turn.map(|turn| Line::new(turn.to, line.turns));
            Some((turn.map_or(0, |turn| turn.era), line.era))
        })
    }

    /// Of the versions of a chunk those that the view sees, newest first.
    pub(super) fn of<'v>(self, versions: &'v [Version]) -> Seen<'v, 'a> {
        Seen {
            rest: versions,
            line: self,
        }
    }
}

/// See [`Line::of`].
#[derive(Clone, Copy)]
pub(super) struct Seen<'v, 'a> {
    rest: &'v [Version],
    line: Line<'a>,
}

impl Seen<'_, '_> {
    /// True if both will go on with the same versions.
    pub(super) fn is_at(&self, other: &Self) -> bool {
        self.rest.len() == other.rest.len() && self.line.turns.len() == other.line.turns.len()
    }
}

impl<'v> Iterator for Seen<'v, '_> {
    type Item = &'v Version;

    fn next(&mut self) -> Option<&'v Version> {
        loop {
            if self.rest.first()?.era > self.line.era {
                let newer = self.rest.partition_point(|v| self.line.era < v.era);
                self.rest = &self.rest[newer..];
                continue;
            }
            match self.line.turns.last() {
                Some(turn) if self.rest[0].era < turn.era => {
                    self.line = Line::new(turn.to, self.line.turns);
                }
                _ => {
                    let version = &self.rest[0];
                    self.rest = &self.rest[1..];
                    return Some(version);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::version::SUBS;
    use super::*;

    /// Eras 0 to 5, back to 2: era 6; eras 6 and 7, back to 4, which is on the other branch: era 8.
    const TURNS: [Turn; 2] = [Turn { era: 6, to: 2 }, Turn { era: 8, to: 4 }];

    fn versions() -> Vec<Version> {
        let version = |era| Version {
            crcs: [0; SUBS],
            slot: era,
            era,
            present: 1,
            zero: 0,
            copied: 0,
            chunk: 0,
        };
        (0..10).rev().map(version).collect()
    }

    fn seen(era: u32) -> Vec<u32> {
        let versions = versions();
        Line::new(era, &TURNS)
            .of(&versions)
            .map(|v| v.era)
            .collect()
    }

    #[test]
    fn a_view_sees_its_branch_and_no_other() {
        assert_eq!(seen(5), [5, 4, 3, 2, 1, 0]);
        assert_eq!(seen(7), [7, 6, 2, 1, 0]);
        assert_eq!(seen(u32::MAX), [9, 8, 4, 3, 2, 1, 0]);
        let stretches = |era| Line::new(era, &TURNS).stretches().collect::<Vec<_>>();
        assert_eq!(stretches(7), [(6, 7), (0, 2)]);
        assert_eq!(stretches(9), [(8, 9), (0, 4)]);
        assert_eq!(stretches(3), [(0, 3)]);
    }

    #[test]
    fn lines_that_have_met_go_on_together() {
        let versions = versions();
        let (mut one, mut other) = (
            Line::new(9, &TURNS).of(&versions),
            Line::new(4, &TURNS).of(&versions),
        );
        assert!(!one.is_at(&other));
        assert_eq!(one.by_ref().take(3).last().map(|v| v.era), Some(4));
        other.next();
        assert!(one.is_at(&other));
    }
}
