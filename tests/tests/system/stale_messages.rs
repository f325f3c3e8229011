//! Messages of the past, each kind that names an epoch: the receiver refuses them.

use blockd::admin::AdminRequest;
use blockd::client::HolderText;
use blockd::id::{Epoch, LeaseEpoch, NodeNo, PageNo};
use blockd::io::link::{Hello, Link, LinkError};
use blockd::io::wire::{Frame, Kind, Status, VERSION};
use blockd_tests::{Cluster, MIB, Peer};
use bytes::Bytes;
use std::time::Duration;

/// a request of an older epoch of the volume's table is answered stale, whatever its kind, and
/// changes nothing; the answer names the epoch now.
#[test]
fn a_lower_epoch_is_refused_by_the_receiver() {
    let cluster = Cluster::three();
    let old = cluster.create_on("v", 8 * MIB, 8192, &[2]);
    cluster.nbd(0, "v").write(0, &[1; 4096]).unwrap();
    let resize = AdminRequest::VolumeResize {
        name: "v".to_owned(),
        size_bytes: 16 * MIB,
        allow_shrink: false,
    };
    cluster.admin(resize).unwrap();
    let now = cluster.show("v").epoch;
    assert!(old.epoch < now);
    let peer = Peer::connect(&cluster, 1);
    // A request of the newer epoch is answered when the server has caught up with it.
    let mut newer = Frame::request(Kind::Read, old.id);
    (newer.epoch, newer.len_bytes) = (now, 4096);
    assert_ne!(peer.call(newer).status, Status::Gone);
    for epoch in [Epoch(0), old.epoch, Epoch(now.0 - 1)] {
        for kind in [
            Kind::Read,
            Kind::Write,
            Kind::Zero,
            Kind::Flush,
            Kind::Extents,
            Kind::SpanBegin,
            Kind::VolumeDrop,
        ] {
            let mut request = Frame::request(kind, old.id);
            (request.epoch, request.page, request.len_bytes) = (epoch, PageNo(0), 4096);
            match kind {
                Kind::Write => request.payload = Bytes::from(vec![9; 4096]).into(),
                // All pages from this one on.
                Kind::VolumeDrop => request.len_bytes = 1,
                _ => {}
            }
            let reply = peer.call(request);
            assert_eq!(
                (reply.status, reply.epoch),
                (Status::Stale, now),
                "{kind:?} of epoch {epoch}"
            );
        }
    }
    assert_eq!(cluster.nbd(2, "v").read(0, 4096).unwrap(), [1; 4096]);
}

/// another cluster's hello is refused before any request is read.
#[test]
fn another_cluster_is_refused_at_the_hello() {
    let cluster = Cluster::three();
    let hello = Hello {
        min_version: VERSION,
        max_version: VERSION,
        requester: 77,
        connection: 1,
        cluster_id: Some(format!("{:032x}", 1)),
        node: NodeNo(1),
    };
    let refused = cluster.block(Link::connect(&cluster.servers[0].peer_address(), &hello));
    match refused.err() {
        Some(LinkError::Refused { status, .. }) => assert_eq!(status, Status::WrongCluster as u16),
        other => panic!("{other:?}"),
    }
}

/// a change under a lease that is over is refused.
#[test]
fn a_lower_lease_epoch_is_refused() {
    let cluster = Cluster::three();
    let volume = cluster.create_on("v", 4 * MIB, 8192, &[2]);
    let opened = cluster.open("v");
    let holder = HolderText::this_process("a test");
    let acquired = cluster.block(opened.acquire_exclusive(holder, Duration::from_secs(10)));
    let lease = acquired.unwrap();
    let peer = Peer::connect(&cluster, 1);
    let write = |lease: LeaseEpoch| {
        let mut request = Frame::request(Kind::Write, volume.id);
        (request.epoch, request.len_bytes) = (volume.epoch, 4096);
        request.payload = Bytes::from(vec![9; 4096]).into();
        request.set_lease(lease);
        peer.status(request)
    };
    assert_eq!(
        write(LeaseEpoch(0)),
        Status::Leased,
        "no lease, while another one holds it"
    );
    assert_eq!(write(LeaseEpoch(1)), Status::Ok, "the holder's own");
    cluster.block(lease.release()).unwrap();
    assert_eq!(
        write(LeaseEpoch(1)),
        Status::Leased,
        "of a lease that is over"
    );
    assert_eq!(write(LeaseEpoch(0)), Status::Ok);
    let mut read = Frame::request(Kind::Read, volume.id);
    (read.epoch, read.len_bytes) = (volume.epoch, 512);
    assert_eq!(peer.status(read), Status::Ok, "reads need none");
}
