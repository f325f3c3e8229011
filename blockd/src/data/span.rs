//! A change over several pages, all or nothing in every snapshot (S003-33).
//!
//! Its owners agree to it before any part is sent, and keep the gate open for it until they are
//! told that it has ended: no owner takes a snapshot between the first part and the last. When an
//! owner is lost half-way, the others keep their gates while the request is tried again, so that
//! a snapshot meanwhile is aborted as late and never has a part of it. Only if the requester
//! itself dies half-way may a later snapshot have the parts that were executed, as the volume has.
//!
//! [`Progress`] is what has been reached, as plain data; [`Span`] adds who was asked, and
//! ends the span there when it is dropped, also while they are being asked.

use super::forward::{self, ForwardError};
use super::router::{Part, RoutingTable};
use crate::id::{Epoch, LeaseEpoch, NodeNo, VolumeId};
use crate::io::link::{Link, Peers};
use crate::io::wire::{Frame, Kind};
use crate::limits::{REQUEST_PART_BYTES, ZERO_SPAN_BYTES, ZERO_SPAN_PAGES};
use futures_util::future::join_all;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Cuts a TRIM or WRITE_ZEROES into the `(offset_bytes, len_bytes)` that are one span each, so that
/// none is as long as a span may last. Zeros that are written out count as a write.
pub fn zero_pieces(
    offset_bytes: u64,
    len_bytes: u64,
    keep_allocated: bool,
    page_bytes: u32,
) -> impl Iterator<Item = (u64, u64)> {
    let most_bytes = if keep_allocated {
        u64::from(REQUEST_PART_BYTES)
    } else {
        ZERO_SPAN_BYTES
    };
    let piece_bytes = most_bytes.min(ZERO_SPAN_PAGES * u64::from(page_bytes));
    (0..len_bytes.div_ceil(piece_bytes)).map(move |index| {
        let at = index * piece_bytes;
        (offset_bytes + at, piece_bytes.min(len_bytes - at))
    })
}

/// How far a change over several pages has come.
#[derive(Debug)]
pub struct Progress {
    /// Routing epoch at which parts were done.
    epoch: Epoch,
    parts: Vec<(Part, bool)>,
    begun: BTreeSet<NodeNo>,
    /// Parts may have been executed: those that agreed must not be let go before the end.
    touched: bool,
    /// Losses of owners that its requester knew of when parts were done.
    losses: u64,
}

impl Progress {
    #[must_use]
    pub fn new(epoch: Epoch, parts: impl Iterator<Item = Part>) -> Self {
        Self {
            epoch,
            parts: parts.map(|part| (part, false)).collect(),
            begun: BTreeSet::new(),
            touched: false,
            losses: 0,
        }
    }

    /// Owners have lost unflushed changes so often by now. All parts are sent again after a loss, as
    /// those that were done may be among them.
    pub fn after_losses(&mut self, losses: u64) {
        let is_new = losses != std::mem::replace(&mut self.losses, losses);
        for (_, done) in &mut self.parts {
            *done &= !is_new;
        }
    }

    /// Takes over the owners of a newer routing table. All parts are sent again then: with the
    /// new epoch may have come a rollback, which has taken back what was done.
    pub fn route(&mut self, table: &RoutingTable) {
        let is_new = table.epoch != std::mem::replace(&mut self.epoch, table.epoch);
        for (part, done) in &mut self.parts {
            part.owner = table.owner(part.page).unwrap_or(part.owner);
            *done &= !is_new;
        }
    }

    fn open_parts(&self) -> impl Iterator<Item = (usize, Part)> + '_ {
        let parts = self.parts.iter().enumerate();
        parts.filter_map(|(index, (part, done))| (!done).then_some((index, *part)))
    }

    /// Owners of parts still to come that have not agreed yet.
    #[must_use]
    pub fn to_begin(&self) -> BTreeSet<NodeNo> {
        let owners = self.open_parts().map(|(_, part)| part.owner);
        owners.filter(|owner| !self.begun.contains(owner)).collect()
    }

    pub fn began(&mut self, node: NodeNo) {
        self.begun.insert(node);
    }

    /// The owner was lost, or does not know the span: it must agree again.
    pub fn lost(&mut self, node: NodeNo) {
        self.begun.remove(&node);
    }

    /// Parts to be sent now, by index; from here on nothing may be given back.
    pub fn send(&mut self) -> Vec<(usize, Part)> {
        self.touched = true;
        self.open_parts().collect()
    }

    pub fn done(&mut self, index: usize) {
        self.parts[index].1 = true;
    }

    /// Lets all owners go, unless parts may have been executed. True if it did.
    pub fn give_back(&mut self) -> bool {
        if !self.touched {
            self.begun.clear();
        }
        !self.touched
    }
}

/// A span, and the owners that may have heard of it.
pub struct Span {
    pub id: u64,
    pub progress: Progress,
    volume: VolumeId,
    peers: Arc<Peers>,
    /// Of the servers that were asked.
    addresses: BTreeSet<String>,
}

impl Span {
    #[must_use]
    pub fn new(
        peers: &Arc<Peers>,
        table: &RoutingTable,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Self {
        Self {
            id: peers.begin_span(),
            progress: Progress::new(table.epoch, table.parts(offset_bytes, len_bytes)),
            volume: table.volume,
            peers: Arc::clone(peers),
            addresses: BTreeSet::new(),
        }
    }

    /// Asks owners to agree, each over its connection, or says why there is none. All that can be
    /// asked are; when this is cancelled, they are told of the end.
    ///
    /// # Errors
    /// Of the owners that have not agreed, the error of one.
    pub async fn begin<E: From<ForwardError>>(
        &mut self,
        table: &RoutingTable,
        lease: LeaseEpoch,
        links: Vec<Result<(NodeNo, Link), E>>,
    ) -> Result<(), E> {
        let mut request = Frame::request(Kind::SpanBegin, self.volume);
        (request.aux, request.epoch) = (self.id, table.epoch);
        request.set_lease(lease);
        let mut ended = Ok(());
        let mut begins = Vec::new();
        for link in links {
            match link {
                Ok((node, link)) => {
                    self.addresses.insert(link.address().to_owned());
                    let request = request.clone();
                    begins.push(async move { (node, forward::call(&link, request).await) });
                }
                Err(error) => ended = Err(error),
            }
        }
        for (node, agreed) in join_all(begins).await {
            match agreed {
                Ok(_) => self.progress.began(node),
                Err(error) => ended = Err(error.into()),
            }
        }
        ended
    }

    /// Lets the owners go if no part was sent, so that a snapshot that holds one of them can go on.
    pub fn give_back(&mut self) -> bool {
        let given_back = self.progress.give_back();
        if given_back {
            self.end();
        }
        given_back
    }

    fn end(&mut self) {
        for address in std::mem::take(&mut self.addresses) {
            let mut request = Frame::request(Kind::SpanEnd, self.volume);
            request.aux = self.id;
            self.peers.post(&address, request);
        }
    }
}

impl Drop for Span {
    fn drop(&mut self) {
        self.peers.end_span(self.id);
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::RouteRun;

    fn table() -> RoutingTable {
        let run = |first_page, owner| RouteRun {
            first_page,
            page_count: 1,
            owner: NodeNo(owner),
        };
        let runs = vec![run(0, 1), run(1, 2), run(2, 1)];
        RoutingTable::new(VolumeId(1), Epoch(1), 12 << 20, 8192, runs).unwrap()
    }

    #[test]
    fn long_zeroes_are_cut_and_others_are_one_span() {
        let cut =
            |offset, len, keep, page| zero_pieces(offset, len, keep, page).collect::<Vec<_>>();
        const GIB: u64 = 1 << 30;
        assert_eq!(cut(512, 4 * GIB, false, 4 << 20), [(512, 4 * GIB)]);
        assert_eq!(
            cut(512, 4 * GIB + 1, false, 4 << 20),
            [(512, 4 * GIB), (512 + 4 * GIB, 1)]
        );
        assert_eq!(cut(0, 64 << 20, true, 4 << 20), [(0, 64 << 20)]);
        assert_eq!(cut(0, GIB, true, 4 << 20).len(), 16);
        assert_eq!(cut(0, 1 << 20, false, 512).len(), 2, "1024 pages each");
        assert_eq!(cut(7, 0, false, 4096), []);
    }

    #[test]
    fn a_lost_owner_agrees_again_and_only_its_part_is_sent_again() {
        let mut progress = Progress::new(Epoch(1), table().parts(0, 12 << 20));
        assert_eq!(progress.to_begin(), [NodeNo(1), NodeNo(2)].into());
        progress.began(NodeNo(1));
        progress.began(NodeNo(2));
        assert!(progress.to_begin().is_empty());
        assert_eq!(progress.send().len(), 3);
        progress.done(0);
        progress.done(2);
        progress.lost(NodeNo(2));
        assert!(!progress.give_back(), "node 1 has executed its parts");
        progress.route(&table());
        assert_eq!(progress.send().len(), 1, "the same epoch");
        assert_eq!(progress.to_begin(), [NodeNo(2)].into());
        progress.began(NodeNo(2));
        let again = progress.send();
        assert_eq!(
            again.iter().map(|(index, _)| *index).collect::<Vec<_>>(),
            [1]
        );
        progress.done(1);
        assert!(progress.send().is_empty());
        let runs = table().runs().to_vec();
        let newer = RoutingTable::new(VolumeId(1), Epoch(2), 12 << 20, 8192, runs).unwrap();
        progress.route(&newer);
        assert_eq!(progress.send().len(), 3, "a rollback may have come with it");
        progress.done(0);
        progress.after_losses(0);
        assert_eq!(progress.send().len(), 2);
        progress.after_losses(1);
        assert_eq!(progress.send().len(), 3, "it may have been lost");
    }

    #[test]
    fn owners_are_let_go_only_before_any_part_was_sent() {
        let mut progress = Progress::new(Epoch(1), table().parts(0, 8 << 20));
        progress.began(NodeNo(1));
        assert!(progress.give_back());
        assert_eq!(progress.to_begin().len(), 2);
        progress.send();
        assert!(!progress.give_back());
    }
}
