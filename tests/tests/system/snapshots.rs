//! Snapshots: a point in time over servers and volumes, their space and their life.

use super::chains::{Load, PAGE, PAGE_BLOCKS};
use blockd::admin::{AdminErrorKind, HoldsInfo};
use blockd::control::snapshot::Procedure;
use blockd::io::link::decode_control;
use blockd::io::wire::{Frame, Kind, Status};
use blockd_tests::{Cluster, ClusterOptions, MIB, Peer, Random};
use bytes::Bytes;
use std::time::Instant;

/// S003-22, 25, 29, 33, 35 to 39: snapshots of two volumes as one, taken under load through each
/// server in turn, are a point in time: they hold all that was acknowledged before the command,
/// nothing issued after its completion, no write without the one that it depends on, whatever
/// servers and connections the two came through, and no half of a write over two owners. Every
/// server shows the same (S003-20).
#[test]
fn snapshots_under_load_are_a_point_in_time() {
    let cluster = Cluster::three();
    create_both(&cluster);
    let load = Load::start(&cluster, ["v", "w"]);
    take_under_load(&cluster, load, Procedure::Barrier);
}

/// As above, by `hold` (S003-36 to 39).
#[test]
fn holds_under_load_are_a_point_in_time() {
    let cluster = Cluster::three();
    create_both(&cluster);
    let load = Load::start(&cluster, ["v", "w"]);
    take_under_load(&cluster, load, Procedure::Hold);
}

/// As above, by `stamp` (S003-40 to 44, U-07, U-09): each chain of dependent writes goes through one
/// server, over several connections. The wall clocks of the servers are 5 s too fast, 5 s too slow,
/// and jump from one to the other.
#[test]
fn stamps_of_wrong_clocks_under_load_are_a_point_in_time() {
    let mut cluster = Cluster::undefined(&ClusterOptions::default());
    for (server, (offset_ms, jump_every_ms)) in
        cluster
            .servers
            .iter_mut()
            .zip([(5000, 0), (-5000, 0), (5000, 70)])
    {
        server.config.push_str(&format!(
            "[clock_skew]\noffset_ms = {offset_ms}\njump_every_ms = {jump_every_ms}\n"
        ));
        server.start();
    }
    cluster.define("test");
    create_both(&cluster);
    let load = Load::start_each_through_one(&cluster, ["v", "w"]);
    take_under_load(&cluster, load, Procedure::Stamp);
}

fn create_both(cluster: &Cluster) {
    cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    cluster.create_on("w", 64 * PAGE, PAGE_BLOCKS, &[]);
}

fn take_under_load(cluster: &Cluster, load: Load, procedure: Procedure) {
    let mut slowest_ms = 0;
    for number in 0..36 {
        let name = format!("s{number}");
        let before = load.marks();
        let started = Instant::now();
        let targets = [format!("v@{name}"), format!("w@{name}")];
        let taken = cluster
            .snapshot_by(number % 3, &[&targets[0], &targets[1]], procedure)
            .unwrap();
        slowest_ms = slowest_ms.max(started.elapsed().as_millis());
        let after = load.marks();
        assert_eq!(taken.len(), 2);
        load.check(cluster, number % 3, &name, &before, &after);
        load.check(cluster, (number + 1) % 3, &name, &before, &after);
        load.check_running();
    }
    let marks = load.marks();
    load.finish();
    let total: u64 = marks.iter().map(|(acknowledged, _)| acknowledged).sum();
    eprintln!("{procedure}: 36 under {total} dependent writes, slowest {slowest_ms} ms");
    assert_eq!(cluster.holds_at(0), HoldsInfo::default());
    assert!(
        marks.iter().all(|(acknowledged, _)| *acknowledged > 36),
        "{marks:?}: no real load"
    );
    for volume in ["v", "w"] {
        assert_eq!(cluster.snapshots(volume).len(), 36);
        let images: Vec<Vec<u8>> = (0..3)
            .map(|index| {
                let mut connection = cluster.nbd(index, &format!("{volume}@s17"));
                connection
                    .read(0, u32::try_from(64 * PAGE).unwrap())
                    .unwrap()
            })
            .collect();
        assert!(
            images.windows(2).all(|pair| pair[0] == pair[1]),
            "{volume}@s17 differs"
        );
    }
}

/// S003-26: a snapshot takes no space of its own; the first write after it takes what it changes
/// (4 KiB granularity) and not the page; the list says so; deleting gives the space back.
#[test]
fn copy_on_write_takes_only_what_changes() {
    let cluster = Cluster::three();
    cluster.create("v", 64 * MIB);
    let volume = cluster.open("v");
    let data = Bytes::from(Random::new(1).bytes(48 << 20));
    cluster.block(volume.write(0, data.clone())).unwrap();
    cluster.block(volume.flush()).unwrap();
    let full = cluster.show("v").allocated_bytes.unwrap();
    assert!(
        (48 * MIB..49 * MIB).contains(&full),
        "{full} bytes for 48 MiB"
    );
    cluster.snapshot("v@s");
    let taken = cluster.snapshots("v").remove(0);
    assert_eq!(taken.referenced_bytes, Some(48 * MIB));
    assert_eq!(taken.unique_bytes, Some(0));
    assert_eq!(
        cluster.show("v").allocated_bytes,
        Some(full),
        "the snapshot itself takes space"
    );
    let changed = Bytes::from(vec![1; 4096]);
    for page in 0..12 {
        cluster
            .block(volume.write(page * 4 * MIB + 8192, changed.clone()))
            .unwrap();
    }
    cluster.block(volume.flush()).unwrap();
    let listed = cluster.snapshots("v").remove(0);
    assert_eq!(listed.referenced_bytes, Some(48 * MIB));
    assert_eq!(
        listed.unique_bytes,
        Some(12 * 4096),
        "12 blocks were changed"
    );
    let after = cluster.show("v").allocated_bytes.unwrap();
    assert!(
        after <= full + 12 * 65_536,
        "{} bytes for 12 blocks",
        after - full
    );
    let found = cluster
        .block(cluster.open("v@s").read(0, 48 << 20))
        .unwrap();
    assert!(found == data, "the snapshot has changed");
}

/// S003-20, 26: deleting a snapshot frees what only it holds, on disk as well as in the list, and
/// deleting the volume frees the rest.
#[test]
fn deleting_gives_space_back_to_the_disk() {
    let cluster = Cluster::three();
    let empty = cluster.disk_bytes();
    cluster.create("v", 256 * MIB);
    let volume = cluster.open("v");
    let fill = |seed| {
        let data = Bytes::from(Random::new(seed).bytes(32 << 20));
        for part in 0..4 {
            cluster
                .block(volume.write(part * 32 * MIB, data.clone()))
                .unwrap();
        }
        cluster.block(volume.flush()).unwrap();
    };
    fill(1);
    cluster.snapshot("v@s");
    fill(2);
    assert_eq!(cluster.snapshots("v")[0].unique_bytes, Some(128 * MIB));
    let refusal = cluster.refused(blockd::admin::AdminRequest::VolumeDelete { name: "v".into() });
    assert_eq!(refusal.kind, AdminErrorKind::Conflict, "{refusal}");
    let allocated = || cluster.show("v").allocated_bytes.unwrap();
    assert!(allocated() >= 256 * MIB);
    cluster.delete_snapshot("v@s");
    assert!(cluster.snapshots("v").is_empty());
    settles("the snapshot's space is free", || allocated() <= 129 * MIB);
    settles("the disk has the snapshot's space back", || {
        cluster.disk_bytes() < empty + 128 * MIB + SLACK
    });
    let name = "v".to_owned();
    cluster
        .admin(blockd::admin::AdminRequest::VolumeDelete { name })
        .unwrap();
    settles("the disk has the volume's space back", || {
        cluster.disk_bytes() < empty + SLACK
    });
}

/// Logs that were not written yet when the disk was measured, and slots kept for reuse.
const SLACK: u64 = 100 * MIB;

/// Waits for something that the servers do in the background.
fn settles(what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + std::time::Duration::from_secs(40);
    while !done() {
        assert!(Instant::now() < deadline, "not so after 40 s: {what}");
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}

/// S003-23: a snapshot of a volume on a subset needs only the servers of that subset to answer.
#[test]
fn a_snapshot_asks_only_the_owners() {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 8 * MIB, 256, &[1, 2]);
    let data = Random::new(4).bytes(8 << 20);
    cluster.nbd(2, "v").write(0, &data).unwrap();
    cluster.servers[2].kill();
    cluster.snapshot_at(0, &["v@without-3"]).unwrap();
    for index in [0, 1] {
        assert!(cluster.nbd(index, "v@without-3").read(0, 8 << 20).unwrap() == data);
    }
    cluster.servers[2].start();
    cluster.wait_writable();
    assert!(cluster.nbd(2, "v@without-3").read(0, 8 << 20).unwrap() == data);
}

/// S003-21, 22, 27: a server that owns nothing coordinates; each owner keeps, in its own data files and
/// over a kill, the snapshot of exactly the pages that the routing table gives it.
#[test]
fn each_server_keeps_the_snapshot_of_its_own_pages() {
    let mut cluster = Cluster::three();
    let volume = cluster.create_on("v", 8 * MIB, 256, &[1, 2]);
    cluster
        .nbd(0, "v")
        .write(0, &Random::new(5).bytes(8 << 20))
        .unwrap();
    let id = cluster.snapshot_at(2, &["v@s"]).unwrap()[0].id;
    for server in &mut cluster.servers {
        server.kill();
        for file in ["log", "catalog-a", "catalog-b"] {
            assert!(server.state.join("store").join(file).is_file(), "{file}");
        }
        server.start();
    }
    cluster.wait_writable();
    let route = cluster.route(0, "v");
    for (index, number) in (0..3).zip(1..) {
        let runs = route.runs.iter().filter(|run| run.owner.0 == number);
        let pages: u64 = runs.map(|run| u64::from(run.page_count)).sum();
        let mut request = Frame::request(Kind::Usage, volume.id);
        request.snapshot = id;
        let reply = Peer::connect(&cluster, index).call(request);
        if pages == 0 {
            assert_ne!(reply.status, Status::Ok, "server {number} has a part");
            continue;
        }
        let [_, referenced, _, _]: [u64; 4] = decode_control(reply.payload).unwrap();
        assert_eq!(referenced, pages * 256 * 512, "server {number}");
    }
}
