//! The changes over several pages that a requester has under way, by ids that no other requester has.
//!
//! A server that stopped half-way in one keeps its gate after the restart (`data::interrupted`). With
//! every new connection the requester says which go on, so that the server can let the others go.

use super::encode_control;
use crate::id::VolumeId;
use crate::io::wire::{Frame, Kind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Ids of spans: those that were given so far are from `first` up to and without `next`, and
/// those that go on are `open`. The payload of a `SpanEnd` of no volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpanList {
    pub first: u64,
    pub next: u64,
    pub open: BTreeSet<u64>,
}

impl SpanList {
    /// Whether this requester began the span, and needs nothing more of it.
    #[must_use]
    pub fn has_ended(&self, id: u64) -> bool {
        let given = self.next.wrapping_sub(self.first);
        id.wrapping_sub(self.first) < given && !self.open.contains(&id)
    }
}

pub(super) struct OpenSpans(Mutex<SpanList>);

impl OpenSpans {
    /// Ids begin at `first`, which must be random: owners tell requesters apart by them.
    pub(super) fn new(first: u64) -> Self {
        Self(Mutex::new(SpanList {
            first,
            next: first,
            open: BTreeSet::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, SpanList> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn begin(&self) -> u64 {
        let mut list = self.lock();
        let id = list.next;
        list.next = id.wrapping_add(1);
        list.open.insert(id);
        id
    }

    pub(super) fn end(&self, id: u64) {
        self.lock().open.remove(&id);
    }

    /// What a new connection begins with; nothing if there has been no span.
    pub(super) fn announcement(&self) -> Option<Frame> {
        let list = self.lock();
        let mut request = Frame::request(Kind::SpanEnd, VolumeId(0));
        request.payload = encode_control(&*list);
        (list.next != list.first).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::link::decode_control;

    #[test]
    fn a_span_has_ended_if_it_was_begun_and_is_not_open() {
        let spans = OpenSpans::new(u64::MAX);
        assert_eq!(spans.announcement(), None);
        let (first, second) = (spans.begin(), spans.begin());
        assert_eq!((first, second), (u64::MAX, 0));
        spans.end(first);
        let announced = spans.announcement().unwrap();
        let list: SpanList = decode_control(announced.payload).unwrap();
        assert!(list.has_ended(first));
        assert!(!list.has_ended(second), "it goes on");
        assert!(!list.has_ended(1), "not begun yet");
        assert!(!list.has_ended(u64::MAX - 1), "another requester's");
    }
}
