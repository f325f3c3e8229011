//! A peer connection of its own, with frames as the test wants them.

use crate::cluster::Cluster;
use blockd::control::snapshot::{Answer, Order};
use blockd::id::{NodeNo, VolumeId};
use blockd::io::link::{Hello, Link, decode_control, encode_control};
use blockd::io::wire::{Frame, Kind, Status, VERSION};
use std::sync::atomic::{AtomicU64, Ordering};

static REQUESTERS: AtomicU64 = AtomicU64::new(1 << 32);

/// A connection to one server of a cluster; closed when dropped.
pub struct Peer<'a> {
    cluster: &'a Cluster,
    link: Link,
}

impl<'a> Peer<'a> {
    /// Connects as a requester that nobody else is.
    #[must_use]
    pub fn connect(cluster: &'a Cluster, index: usize) -> Self {
        let hello = Hello {
            min_version: VERSION,
            max_version: VERSION,
            requester: REQUESTERS.fetch_add(1, Ordering::Relaxed),
            connection: 1,
            cluster_id: None,
            node: NodeNo(0),
        };
        let address = cluster.servers[index].peer_address();
        let link = cluster.block(Link::connect(&address, &hello)).unwrap();
        Self { cluster, link }
    }

    /// One request and its answer, whatever its status.
    #[must_use]
    pub fn call(&self, request: Frame) -> Frame {
        self.cluster.block(self.link.call(request)).unwrap()
    }

    /// The status of the answer to a request.
    #[must_use]
    pub fn status(&self, request: Frame) -> Status {
        self.call(request).status
    }

    /// One order of the snapshot procedure.
    #[must_use]
    pub fn order(&self, volume: VolumeId, ticket: u64, order: Order) -> Answer {
        let mut request = Frame::request(Kind::Snapshot, volume);
        request.aux = ticket;
        request.payload = encode_control(&order);
        decode_control(self.call(request).payload).unwrap()
    }
}
