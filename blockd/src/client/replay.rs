//! The replay buffer: changes that were acknowledged but not yet flushed (promise 3).
//!
//! An owner's write verifier changes when it may have lost such changes. Then they are sent again,
//! in their order, before anything else is done with the volume. A flush that found all verifiers
//! unchanged empties the buffer of everything that was acknowledged before it began.

use crate::id::NodeNo;
use bytes::Bytes;
use std::collections::{HashMap, VecDeque};

/// One acknowledged change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Write(Bytes),
    Zero {
        len_bytes: u64,
        keep_allocated: bool,
    },
}

impl Change {
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

/// Unflushed changes in the order of their acknowledgement, and what is known of the owners.
#[derive(Debug, Default)]
pub(super) struct Replay {
    /// Sequence number, offset in the volume, change.
    changes: VecDeque<(u64, u64, Change)>,
    next: u64,
    buffered_bytes: usize,
    verifiers: HashMap<NodeNo, u64>,
    /// An owner has lost what it acknowledged; nothing may be done before a replay.
    lost: bool,
}

impl Replay {
    pub(super) fn acknowledged(&mut self, offset_bytes: u64, change: Change) {
        self.buffered_bytes += change.buffered_bytes();
        self.changes.push_back((self.next, offset_bytes, change));
        self.next += 1;
    }

    /// Bytes of memory that the buffer keeps.
    pub(super) fn buffered_bytes(&self) -> usize {
        self.buffered_bytes
    }

    /// Notes the verifier that came with a connection or an answer of an owner.
    pub(super) fn heard(&mut self, node: NodeNo, verifier: u64) {
        if self
            .verifiers
            .insert(node, verifier)
            .is_some_and(|before| before != verifier)
        {
            self.lost = !self.changes.is_empty();
        }
    }

    /// Whether a replay must come first.
    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }

    /// The mark that a flush must take before it begins.
    pub(super) fn mark(&self) -> u64 {
        self.next
    }

    /// Everything acknowledged before `mark` is durable.
    pub(super) fn flushed(&mut self, mark: u64) {
        while self
            .changes
            .front()
            .is_some_and(|(number, ..)| *number < mark)
        {
            if let Some((_, _, change)) = self.changes.pop_front() {
                self.buffered_bytes -= change.buffered_bytes();
            }
        }
    }

    /// A replay was interrupted and must be done again.
    pub(super) fn fail(&mut self) {
        self.lost = !self.changes.is_empty();
    }

    /// What must be sent again, oldest first; the replay that follows counts as begun.
    pub(super) fn begin(&mut self) -> Vec<(u64, Change)> {
        self.lost = false;
        let all = self.changes.iter();
        all.map(|(_, offset, change)| (*offset, change.clone()))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(text: &'static str) -> Change {
        Change::Write(Bytes::from_static(text.as_bytes()))
    }

    #[test]
    fn a_flush_forgets_what_was_acknowledged_before_it_began() {
        let mut replay = Replay::default();
        replay.acknowledged(0, write("aa"));
        let mark = replay.mark();
        replay.acknowledged(8, write("b"));
        replay.flushed(mark);
        assert_eq!(replay.buffered_bytes(), 1);
        assert_eq!(replay.begin(), [(8, write("b"))]);
    }

    #[test]
    fn a_changed_verifier_asks_for_a_replay_in_order() {
        let mut replay = Replay::default();
        replay.heard(NodeNo(1), 7);
        replay.acknowledged(0, write("a"));
        replay.acknowledged(0, write("b"));
        replay.heard(NodeNo(1), 7);
        replay.heard(NodeNo(2), 9);
        assert!(!replay.is_lost());
        replay.heard(NodeNo(1), 8);
        assert!(replay.is_lost());
        assert_eq!(replay.begin(), [(0, write("a")), (0, write("b"))]);
        assert!(!replay.is_lost());
    }

    #[test]
    fn a_changed_verifier_without_unflushed_changes_is_nothing() {
        let mut replay = Replay::default();
        replay.heard(NodeNo(1), 7);
        replay.heard(NodeNo(1), 8);
        assert!(!replay.is_lost());
    }
}
