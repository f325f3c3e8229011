//! The changes over several pages that a requester has under way, by ids that no other requester has.
//!
//! A server that stopped half-way in one keeps its gate after the restart (`data::interrupted`). With
//! every new connection the requester says which go on, so that the server can let the others go.

use super::encode_control;
use crate::id::{NodeNo, VolumeId};
use crate::io::wire::{Frame, Kind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The upper 16 bits of a span's id are the number of the node that began it, 0 for clients.
const NODE_SHIFT: u32 = 48;

/// Ids of spans: those that were given so far are from `first` up to and without `next`, and
/// those that go on are `open`. The payload of a `SpanEnd` of no volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpanList {
    pub first: u64,
    pub next: u64,
    pub open: BTreeSet<u64>,
}

impl SpanList {
    /// Whether this requester began the span, and needs nothing more of it; or an earlier run of the same
    /// node did, which is dead.
    #[must_use]
    pub fn has_ended(&self, id: u64) -> bool {
        let given = self.next.wrapping_sub(self.first);
        match id.wrapping_sub(self.first) < given {
            true => !self.open.contains(&id),
            false => self.is_of_a_node() && id >> NODE_SHIFT == self.first >> NODE_SHIFT,
        }
    }

    fn is_of_a_node(&self) -> bool {
        self.first >> NODE_SHIFT != 0
    }
}

pub(super) struct OpenSpans(Mutex<SpanList>);

impl OpenSpans {
    /// Of a client. `requester` must be random: owners tell requesters apart by the ids.
    pub(super) fn new(requester: u64) -> Self {
        let first = requester << 16 >> 16;
        Self(Mutex::new(SpanList {
            first,
            next: first,
            open: BTreeSet::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, SpanList> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The ids from now on are those of a node, of which nobody else begins spans.
    pub(super) fn be_of(&self, node: NodeNo) {
        let mut list = self.lock();
        list.first = u64::from(node.0) << NODE_SHIFT | list.next << 16 >> 16;
        list.next = list.first;
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

    /// What a new connection begins with; nothing if a client has had no span.
    pub(super) fn announcement(&self) -> Option<Frame> {
        let list = self.lock();
        let mut request = Frame::request(Kind::SpanEnd, VolumeId(0));
        request.payload = encode_control(&*list);
        (list.next != list.first || list.is_of_a_node()).then_some(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::link::decode_control;

    #[test]
    fn a_span_has_ended_if_it_was_begun_and_is_not_open() {
        let spans = OpenSpans::new(0xffff_0000_0000_0007);
        assert_eq!(spans.announcement(), None);
        let (first, second) = (spans.begin(), spans.begin());
        assert_eq!((first, second), (7, 8));
        spans.end(first);
        let list = list(&spans);
        assert!(list.has_ended(first));
        assert!(!list.has_ended(second), "it goes on");
        assert!(!list.has_ended(9), "not begun yet");
        assert!(!list.has_ended(6), "another requester's");
    }

    #[test]
    fn what_an_earlier_run_of_a_node_began_has_ended() {
        let of = |node| 0x0123_4567 | u64::from(node) << NODE_SHIFT;
        let spans = OpenSpans::new(u64::MAX - 9);
        spans.be_of(NodeNo(3));
        let open = spans.begin();
        let list = list(&spans);
        assert!(list.has_ended(of(3_u16)));
        assert!(!list.has_ended(of(4)) && !list.has_ended(of(0)) && !list.has_ended(open));
        let idle = OpenSpans::new(1);
        idle.be_of(NodeNo(4));
        let idle = self::list(&idle);
        assert!(idle.has_ended(of(4)), "it has had none");
    }

    fn list(spans: &OpenSpans) -> SpanList {
        decode_control(spans.announcement().unwrap().payload).unwrap()
    }
}
