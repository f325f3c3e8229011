//! What lies beyond the end of a volume: gone for good, and nothing else with it.

use blockd::admin::{AdminRequest, VolumeInfo};
use blockd::client::ClientError;
use blockd::id::{Epoch, PageNo};
use blockd::io::wire::{Frame, Kind, Status};
use blockd_tests::{Cluster, MIB, Peer, Random};
use std::time::{Duration, Instant};

fn resize(size_bytes: u64) -> AdminRequest {
    AdminRequest::VolumeResize {
        name: "v".to_owned(),
        size_bytes,
        allow_shrink: true,
    }
}

fn drop_from(volume: &VolumeInfo, epoch: Epoch, page: u32) -> Frame {
    let mut frame = Frame::request(Kind::VolumeDrop, volume.id);
    (frame.epoch, frame.page, frame.len_bytes) = (epoch, PageNo(page), 1);
    frame
}

/// Review e10: an order to drop pages that was given under an older routing table is refused and
/// erases nothing; under the present one it does what it says.
#[test]
fn a_drop_of_pages_of_an_older_epoch_erases_nothing() {
    let cluster = Cluster::three();
    let before = cluster.create_on("v", 8 * MIB, 2048, &[2]);
    cluster.admin(resize(16 * MIB)).unwrap();
    let volume = cluster.show("v");
    assert!(volume.epoch > before.epoch, "a growth is a new table");
    let data = Random::new(1).bytes(16 << 20);
    let mut connection = cluster.nbd(0, "v");
    connection.write(0, &data).unwrap();
    let peer = Peer::connect(&cluster, 1);
    for epoch in [Epoch(0), before.epoch] {
        let refusal = peer.call(drop_from(&volume, epoch, 8));
        assert_eq!(refusal.status, Status::Stale, "{}", refusal.text());
        assert_eq!(refusal.epoch, volume.epoch);
        assert!(connection.read(0, 16 << 20).unwrap() == data, "erased");
    }
    assert_eq!(
        peer.status(drop_from(&volume, volume.epoch, 12)),
        Status::Ok
    );
    let found = connection.read(0, 16 << 20).unwrap();
    assert!(found[..12 << 20] == data[..12 << 20], "too much was erased");
    assert!(
        found[12 << 20..].iter().all(|byte| *byte == 0),
        "the drop did nothing: the test proves nothing"
    );
}

/// A volume that shrinks while one of its owners is dead: the command says that the space is not
/// cleared everywhere, or clears it; whichever owner it was, after a growth everything beyond the
/// old end reads as zeros through every server, and what is below is as it was.
#[test]
fn what_a_shrink_cut_off_never_comes_back() {
    let mut cluster = Cluster::three();
    let data = Random::new(2).bytes(24 << 20);
    for (round, keep_bytes) in [(0, 5 * MIB), (1, 7 * MIB + 512), (2, MIB / 2)] {
        cluster.create_on("v", 24 * MIB, 2048, &[]);
        cluster.nbd(round, "v").write(0, &data).unwrap();
        cluster.servers[round].kill();
        let shrunk = cluster.admin(resize(keep_bytes));
        match &shrunk {
            Err(ClientError::Refused(error)) => {
                // The dead owner may have led the registry: then nothing was changed at all.
                let says_so = error.message.contains("not cleared on all servers")
                    || error.message.contains("registry");
                assert!(says_so, "round {round}: {error}");
            }
            Err(ClientError::Unreachable { .. }) => {}
            other => panic!("round {round}: one owner is dead, and the answer is {other:?}"),
        }
        let again = cluster.admin(resize(keep_bytes));
        assert!(
            again.is_err(),
            "round {round}: nothing was cleared, and the answer is {again:?}"
        );
        if round == 1 {
            let early = cluster.admin(resize(24 * MIB));
            assert!(
                early.is_err(),
                "grown over what a dead owner has: {early:?}"
            );
        }
        cluster.servers[round].start();
        cluster.wait_writable();
        until_ok(&cluster, &resize(keep_bytes));
        until_ok(&cluster, &resize(24 * MIB));
        let kept = usize::try_from(keep_bytes).unwrap();
        for index in 0..3 {
            let found = cluster.nbd(index, "v").read(0, 24 << 20).unwrap();
            assert!(found[..kept] == data[..kept], "round {round}: data is lost");
            let back = found[kept..].iter().position(|byte| *byte != 0);
            assert_eq!(back, None, "round {round}: old data {kept} bytes on");
        }
        let name = "v".to_owned();
        cluster.admin(AdminRequest::VolumeDelete { name }).unwrap();
    }
}

/// A request that may be refused while a server has only just come back.
fn until_ok(cluster: &Cluster, request: &AdminRequest) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while let Err(error) = cluster.admin(request.clone()) {
        assert!(Instant::now() < deadline, "{request:?}: {error}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
