//! How fast pages move, and that they stand still when they are told to.

use super::move_kills::{moves, wait_phase};
use blockd_tests::{Cluster, MIB, Random};
use bytes::Bytes;
use serde_json::Value;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Pages of 4 KiB: a batch has at most 65536 of them, so this volume moves in four.
const PAGE_BLOCKS: u32 = 8;
const BATCH: u64 = 256 * MIB;
const BATCHES: u64 = 4;
/// Data of each batch, and how much of it may move in a second.
const DATA: u64 = 4 * MIB;
const RATE: u64 = 2 * MIB;

/// A volume of server 1 with as much data in every batch.
fn cluster() -> Cluster {
    let cluster = Cluster::three();
    cluster.create_on("v", BATCHES * BATCH, PAGE_BLOCKS, &[1]);
    let volume = cluster.open("v");
    let data = Bytes::from(Random::new(3).bytes(usize::try_from(DATA).unwrap()));
    for batch in 0..BATCHES {
        cluster
            .block(volume.write(batch * BATCH, data.clone()))
            .unwrap();
    }
    cluster
}

fn begin(cluster: &Cluster) -> Instant {
    let started = Instant::now();
    cluster.blockctl(&format!("page move v all --to 2 --rate {RATE} --no-wait"));
    started
}

/// What a move has done: pages, bytes, and who owns what.
fn done(cluster: &Cluster) -> (Value, Value, Value) {
    let now = moves(cluster, "v");
    let route = serde_json::from_str::<Value>(&cluster.blockctl("route show v --json"));
    let runs = route.unwrap()["runs"].take();
    (now["pages_moved"].clone(), now["bytes_moved"].clone(), runs)
}

fn wait_moved(cluster: &Cluster) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while moves(cluster, "v")["pages_moved"] == 0 {
        assert!(Instant::now() < deadline, "no batch has moved");
        sleep(Duration::from_millis(20));
    }
}

/// A move takes no more bytes a second than `--rate` says. A quarter is let off: the first and the last message
/// of each batch are not paced.
#[test]
fn a_move_keeps_below_its_rate() {
    let cluster = cluster();
    let started = begin(&cluster);
    let ended = wait_phase(&cluster, "v", "done");
    let took = started.elapsed();
    let moved = ended["bytes_moved"].as_u64().unwrap();
    assert!(moved >= BATCHES * DATA, "{ended}");
    assert_eq!(ended["rate_bytes"], RATE);
    let rate = moved as f64 / took.as_secs_f64();
    eprintln!("moves: {moved} bytes in {took:?}, {rate:.0} a second");
    assert!(rate < RATE as f64 * 1.25, "{rate} bytes a second");
}

/// A paused move stands still: for as long as two batches take at its rate nothing is handed over. It goes on
/// where it was.
#[test]
fn a_paused_move_stands_still() {
    let cluster = cluster();
    begin(&cluster);
    wait_moved(&cluster);
    cluster.blockctl("move pause v");
    wait_phase(&cluster, "v", "paused");
    let paused = done(&cluster);
    assert!(paused.0.as_u64() < moves(&cluster, "v")["pages_total"].as_u64());
    sleep(Duration::from_secs(2 * DATA / RATE));
    assert_eq!(done(&cluster), paused);
    cluster.blockctl("move resume v");
    let ended = wait_phase(&cluster, "v", "done");
    assert_eq!(ended["pages_moved"], ended["pages_total"]);
    assert!(paused.0.as_u64() < ended["pages_moved"].as_u64(), "{ended}");
}
