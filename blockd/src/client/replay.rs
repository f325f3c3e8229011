//! The replay buffer: changes that were sent but not yet flushed (promise 3).
//!
//! An owner's write verifier changes when it may have lost such changes. Then what it had executed of them
//! is sent again, in the order in which they were issued, before anything else is done with the volume.
//! What others had executed is left alone, also where the page belongs to the loser now: another client
//! may have written over it meanwhile. A
//! flush that found all verifiers unchanged empties the buffer of everything that was acknowledged
//! before it began.

use crate::data::router::Part;
use crate::id::NodeNo;
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::iter;
use std::ops::Range;

/// A change of a range of the volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Write(Bytes),
    Zero {
        len_bytes: u64,
        keep_allocated: bool,
    },
}

impl Change {
    /// A piece of it.
    fn piece(&self, at_bytes: u64, len_bytes: u64) -> Self {
        let at = usize::try_from(at_bytes).unwrap_or(usize::MAX);
        let len = usize::try_from(len_bytes).unwrap_or(usize::MAX);
        match self {
            Self::Write(data) => Self::Write(data.slice(at..at + len)),
            Self::Zero { keep_allocated, .. } => Self::Zero {
                len_bytes,
                keep_allocated: *keep_allocated,
            },
        }
    }

    pub(super) fn len_bytes(&self) -> u64 {
        match self {
            Self::Write(data) => data.len() as u64,
            Self::Zero { len_bytes, .. } => *len_bytes,
        }
    }

    fn buffered_bytes(&self) -> usize {
        match self {
            Self::Write(data) => data.len(),
            Self::Zero { .. } => 64,
        }
    }
}

#[derive(Debug)]
struct Entry {
    offset_bytes: u64,
    change: Change,
    /// When it was acknowledged, on the scale of `Replay::clock`.
    acknowledged: Option<u64>,
    /// Its parts and who executed them, once it was acknowledged.
    executed: Vec<Part>,
}

impl Entry {
    fn end(&self) -> u64 {
        self.offset_bytes + self.change.len_bytes()
    }

    /// The ranges of the volume that owners executed for which `is_of` holds.
    fn executed(&self, is_of: impl Fn(NodeNo) -> bool) -> Vec<Range<u64>> {
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for part in self.executed.iter().filter(|part| is_of(part.owner)) {
            let at = self.offset_bytes + part.at_bytes;
            let end = at + u64::from(part.len_bytes);
            match ranges.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => ranges.push(at..end),
            }
        }
        ranges
    }

    /// The change in a range of the volume.
    fn piece(&self, range: &Range<u64>) -> Change {
        let at = range.start - self.offset_bytes;
        self.change.piece(at, range.end - range.start)
    }
}

/// The rest of `ranges` without `taken`.
fn without(ranges: impl IntoIterator<Item = Range<u64>>, taken: &Range<u64>) -> Vec<Range<u64>> {
    let ranges = ranges.into_iter().flat_map(|range| {
        let before = range.start..range.end.min(taken.start);
        let behind = range.start.max(taken.end)..range.end;
        [before, behind]
    });
    ranges.filter(|range| !range.is_empty()).collect()
}

/// What of a part is outside a range of its change.
fn rest(part: Part, taken: &Range<u64>) -> Vec<Part> {
    let end = part.at_bytes + u64::from(part.len_bytes);
    let ranges = without(iter::once(part.at_bytes..end), taken).into_iter();
    let bytes = |len: u64| u32::try_from(len).unwrap_or(u32::MAX);
    let piece = |range: Range<u64>| Part {
        offset_bytes: part.offset_bytes + bytes(range.start - part.at_bytes),
        len_bytes: bytes(range.end - range.start),
        at_bytes: range.start,
        ..part
    };
    ranges.map(piece).collect()
}

/// Unflushed changes in the order of their issue, and what is known of the owners.
#[derive(Debug, Default)]
pub(super) struct Replay {
    entries: BTreeMap<u64, Entry>,
    /// Counts issues, acknowledgements and marks.
    clock: u64,
    buffered_bytes: usize,
    verifiers: HashMap<NodeNo, u64>,
    /// How often owners have lost changes that are in the buffer.
    losses: u64,
    /// The owners that have, since the last complete replay.
    lost: BTreeSet<NodeNo>,
    /// How many of these a complete replay has made good.
    made_good: u64,
}

impl Replay {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Notes a change before any part of it is sent.
    pub(super) fn issued(&mut self, offset_bytes: u64, change: Change) -> u64 {
        self.buffered_bytes += change.buffered_bytes();
        let number = self.tick();
        let entry = Entry {
            offset_bytes,
            change,
            acknowledged: None,
            executed: Vec::new(),
        };
        self.entries.insert(number, entry);
        number
    }

    /// The owners of all parts have answered; the change is kept until a flush.
    pub(super) fn acknowledged(&mut self, number: u64, executed: Vec<Part>) {
        let now = self.tick();
        if let Some(entry) = self.entries.get_mut(&number) {
            entry.acknowledged = Some(now);
            entry.executed = executed;
        }
    }

    /// The change failed, or its user gave up: nobody was promised anything.
    pub(super) fn withdrawn(&mut self, number: u64) {
        if let Some(entry) = self.entries.remove(&number) {
            self.buffered_bytes -= entry.change.buffered_bytes();
        }
    }

    /// Bytes of memory that the buffer keeps.
    pub(super) fn buffered_bytes(&self) -> usize {
        self.buffered_bytes
    }

    /// Notes the verifier that came with a connection or an answer of an owner.
    pub(super) fn heard(&mut self, node: NodeNo, verifier: u64) {
        let before = self.verifiers.insert(node, verifier);
        if before.is_some_and(|before| before != verifier) && !self.entries.is_empty() {
            self.losses += 1;
            self.lost.insert(node);
        }
    }

    /// Whether a server that was heard owns nothing any more.
    pub(super) fn has_former_owners(&self, owners: &[NodeNo]) -> bool {
        self.verifiers.keys().any(|node| !owners.contains(node))
    }

    /// Forgets servers that own nothing any more. `given` are the verifiers under which servers gave
    /// their last pages away: under another one they may have lost changes before.
    pub(super) fn former_owners(&mut self, owners: &[NodeNo], given: &[(NodeNo, u64)]) {
        let former = self.verifiers.extract_if(|node, _| !owners.contains(node));
        let lost = former.filter(|entry| !given.contains(entry));
        let lost: Vec<NodeNo> = lost.map(|(node, _)| node).collect();
        if !lost.is_empty() && !self.entries.is_empty() {
            self.losses += 1;
            self.lost.extend(lost);
        }
    }

    /// Losses up to now.
    pub(super) fn losses(&self) -> u64 {
        self.losses
    }

    /// Losses that have been made good.
    pub(super) fn made_good(&self) -> u64 {
        self.made_good
    }

    /// A replay that began at so many losses is complete.
    pub(super) fn replayed(&mut self, losses: u64) {
        self.made_good = self.made_good.max(losses);
        if self.made_good == self.losses {
            self.lost.clear();
        }
    }

    /// The mark that a flush must take before it begins.
    pub(super) fn mark(&mut self) -> u64 {
        self.tick()
    }

    /// Everything acknowledged before `mark` is durable.
    pub(super) fn flushed(&mut self, mark: u64) {
        let buffered_bytes = &mut self.buffered_bytes;
        self.entries.retain(|_, entry| {
            let durable = entry.acknowledged.is_some_and(|at| at < mark);
            if durable {
                *buffered_bytes -= entry.change.buffered_bytes();
            }
            !durable
        });
    }

    /// What must be sent again, oldest first, with the numbers of the changes. What was written over since
    /// by a change that is not lost is left alone: that went to another owner, after a move. What was not
    /// acknowledged is sent by its own request, which keeps the gates of its span meanwhile.
    pub(super) fn changes(&self) -> Vec<(u64, (u64, Change))> {
        let mut kept: Vec<(u64, Range<u64>)> = Vec::new();
        let mut changes = Vec::new();
        for (number, entry) in self.entries.iter().rev() {
            let Some(acknowledged) = entry.acknowledged else {
                continue;
            };
            let later = kept.iter().filter(|(issued, taken)| {
                *issued > acknowledged
                    && entry.offset_bytes < taken.end
                    && taken.start < entry.end()
            });
            let lost = entry.executed(|node| self.lost.contains(&node));
            let ranges = later.fold(lost, |ranges, (_, taken)| without(ranges, taken));
            let kept_of = entry.executed(|node| !self.lost.contains(&node));
            kept.extend(kept_of.into_iter().map(|range| (*number, range)));
            let pieces = ranges.iter().rev();
            let pieces = pieces.map(|range| (*number, (range.start, entry.piece(range))));
            changes.extend(pieces);
        }
        changes.reverse();
        changes
    }

    /// A piece of a change at `offset_bytes` was sent again; `parts` are those of the piece.
    pub(super) fn executed_again(&mut self, number: u64, offset_bytes: u64, parts: Vec<Part>) {
        let found = self.entries.get_mut(&number);
        let Some(entry) = found.filter(|entry| entry.acknowledged.is_some()) else {
            return;
        };
        let at = offset_bytes - entry.offset_bytes;
        let len: u64 = parts.iter().map(|part| u64::from(part.len_bytes)).sum();
        let piece = at..at + len;
        let before = entry.executed.drain(..);
        entry.executed = before.flat_map(|part| rest(part, &piece)).collect();
        let again = parts.into_iter().map(|part| Part {
            at_bytes: at + part.at_bytes,
            ..part
        });
        entry.executed.extend(again);
        entry.executed.sort_unstable_by_key(|part| part.at_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::PageNo;

    /// Pages of 4 bytes; the owner of page n is node n + 1.
    fn parts(offset: u64, len: u64) -> Vec<Part> {
        let pages = offset / 4..=(offset + len - 1) / 4;
        let part = |page: u64| {
            let (from, to) = (offset.max(page * 4), (offset + len).min(page * 4 + 4));
            Part {
                owner: NodeNo(u16::try_from(page).unwrap() + 1),
                page: PageNo(u32::try_from(page).unwrap()),
                offset_bytes: u32::try_from(from % 4).unwrap(),
                len_bytes: u32::try_from(to - from).unwrap(),
                at_bytes: from - offset,
            }
        };
        pages.map(part).collect()
    }

    fn sent(replay: &Replay) -> Vec<(u64, Change)> {
        let changes = replay.changes().into_iter();
        changes.map(|(_, piece)| piece).collect()
    }

    /// What an owner that lost nothing has may have been written over by another client.
    #[test]
    fn only_what_the_loser_had_is_sent_again() {
        let mut replay = Replay::default();
        replay.heard(NodeNo(2), 7);
        let first = replay.issued(2, write("abcdefgh"));
        let second = replay.issued(0, write("x"));
        replay.acknowledged(first, parts(2, 8));
        replay.acknowledged(second, parts(0, 1));
        replay.heard(NodeNo(2), 8);
        assert_eq!(sent(&replay), [(4, write("cdef"))]);
        replay.replayed(1);
        replay.heard(NodeNo(3), 1);
        replay.heard(NodeNo(3), 2);
        assert_eq!(sent(&replay), [(8, write("gh"))]);
    }

    /// Who owns a page now has not lost what its former owner executed and handed over.
    #[test]
    fn what_a_page_had_before_it_came_to_the_loser_is_left_alone() {
        let mut replay = Replay::default();
        replay.heard(NodeNo(1), 7);
        replay.heard(NodeNo(2), 7);
        let number = replay.issued(4, write("m"));
        replay.acknowledged(number, parts(4, 1));
        replay.heard(NodeNo(1), 8);
        assert_eq!(replay.losses(), 1);
        assert_eq!(sent(&replay), []);
        replay.former_owners(&[NodeNo(1)], &[(NodeNo(2), 9)]);
        assert_eq!(replay.losses(), 2);
        assert_eq!(sent(&replay), [(4, write("m"))], "lost before it was given");
    }

    /// The page moved after the loss, and the client wrote to its new owner before it heard of it.
    #[test]
    fn what_the_client_wrote_over_with_another_owner_is_left_alone() {
        let on = |owner, offset, len| {
            let of = |part| Part { owner, ..part };
            parts(offset, len).into_iter().map(of).collect()
        };
        let mut replay = Replay::default();
        replay.heard(NodeNo(1), 7);
        let older = replay.issued(0, write("abcd"));
        replay.acknowledged(older, on(NodeNo(1), 0, 4));
        let newer = replay.issued(1, write("XY"));
        let at_once = replay.issued(3, write("z"));
        replay.acknowledged(newer, on(NodeNo(2), 1, 2));
        replay.acknowledged(at_once, on(NodeNo(1), 3, 1));
        replay.heard(NodeNo(1), 8);
        let expected = [(0, write("a")), (3, write("d")), (3, write("z"))];
        assert_eq!(sent(&replay), expected);
        replay.executed_again(older, 0, on(NodeNo(1), 0, 1));
        assert_eq!(sent(&replay), expected, "of the same loss");
    }

    #[test]
    fn what_was_sent_again_is_lost_with_whoever_executed_it_then() {
        let mut replay = Replay::default();
        for node in 1..=3 {
            replay.heard(NodeNo(node), 7);
        }
        let number = replay.issued(2, write("abcdefgh"));
        replay.acknowledged(number, parts(2, 8));
        replay.heard(NodeNo(2), 8);
        let on_another = |part| Part {
            owner: NodeNo(3),
            ..part
        };
        let again = parts(4, 4).into_iter().map(on_another).collect();
        replay.executed_again(number, 4, again);
        replay.replayed(1);
        replay.heard(NodeNo(2), 9);
        assert_eq!(sent(&replay), []);
        replay.replayed(2);
        replay.heard(NodeNo(3), 8);
        assert_eq!(sent(&replay), [(4, write("cdefgh"))]);
    }

    fn write(text: &'static str) -> Change {
        Change::Write(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn a_flush_forgets_what_was_acknowledged_before_it_began() {
        let mut replay = Replay::default();
        let (first, second) = (
            replay.issued(0, write("aa")),
            replay.issued(4, write("bbb")),
        );
        replay.acknowledged(first, parts(0, 2));
        let mark = replay.mark();
        let third = replay.issued(8, write("c"));
        replay.acknowledged(third, parts(8, 1));
        replay.acknowledged(second, parts(4, 3));
        replay.flushed(mark);
        assert_eq!(replay.buffered_bytes(), 4);
        assert_eq!(replay.entries.len(), 2);
    }

    #[test]
    fn a_changed_verifier_asks_for_a_replay_in_order() {
        let mut replay = Replay::default();
        replay.heard(NodeNo(1), 7);
        for text in ["a", "b"] {
            let number = replay.issued(0, write(text));
            replay.acknowledged(number, parts(0, 1));
        }
        replay.issued(0, write("sent by its own request"));
        replay.heard(NodeNo(1), 7);
        replay.heard(NodeNo(2), 9);
        assert_eq!(replay.losses(), 0);
        replay.heard(NodeNo(1), 8);
        assert_eq!((replay.losses(), replay.made_good()), (1, 0));
        assert_eq!(sent(&replay), [(0, write("a")), (0, write("b"))]);
        replay.heard(NodeNo(2), 10);
        replay.replayed(1);
        assert_eq!(
            (replay.losses(), replay.made_good()),
            (2, 1),
            "lost again meanwhile"
        );
    }

    /// S003-19: what a former owner acknowledged is with the new one, unless it was lost before.
    #[test]
    fn a_former_owner_that_gave_its_pages_unharmed_asks_for_no_replay() {
        for (given, losses) in [(7, 0), (8, 1)] {
            let mut replay = Replay::default();
            replay.heard(NodeNo(1), 7);
            replay.heard(NodeNo(2), 9);
            replay.issued(0, write("a"));
            assert!(!replay.has_former_owners(&[NodeNo(1), NodeNo(2)]));
            assert!(replay.has_former_owners(&[NodeNo(2)]));
            replay.former_owners(&[NodeNo(2)], &[(NodeNo(1), given)]);
            assert_eq!(replay.losses(), losses);
            assert!(!replay.has_former_owners(&[NodeNo(2)]));
        }
    }

    #[test]
    fn what_is_withdrawn_or_was_never_there_is_not_lost() {
        let mut replay = Replay::default();
        let number = replay.issued(0, write("a"));
        replay.withdrawn(number);
        assert_eq!(replay.buffered_bytes(), 0);
        replay.heard(NodeNo(1), 7);
        replay.heard(NodeNo(1), 8);
        assert_eq!(replay.losses(), 0);
    }
}
