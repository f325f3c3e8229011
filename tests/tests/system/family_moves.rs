//! Clones, their parents and rolled-back volumes change servers like all others (S003-12, S003-13,
//! S003-19, S003-20).

use super::moves::owners_of;
use super::snapshot_verbs::{ctl_json, ctl_refused, done};
use blockd::id::NodeNo;
use blockd_tests::{Cluster, Random};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Bytes of a page (64 blocks), and pages of each volume.
const PAGE: u64 = 32 << 10;
const PAGES: u64 = 48;
const LEN: u64 = PAGES * PAGE;

fn bytes(len: u64, seed: u64) -> Bytes {
    Bytes::from(Random::new(seed).bytes(usize::try_from(len).unwrap()))
}

fn write(cluster: &Cluster, name: &str, offset: u64, data: Bytes) {
    cluster
        .block(cluster.open(name).write(offset, data))
        .unwrap();
}

fn trim(cluster: &Cluster, name: &str, offset: u64, len: u64) {
    let len = u32::try_from(len).unwrap();
    cluster.nbd(0, name).trim(offset, len).unwrap();
}

/// `v` with snapshots; `c`, a clone of it, and `d`, a clone of the clone, all written and trimmed; `r`, which
/// was rolled back to a snapshot that is gone, and to one that is there.
fn make_family(cluster: &Cluster, servers: &[u16]) {
    for name in ["v", "r"] {
        cluster.create_on(name, LEN, 64, servers);
        write(cluster, name, 0, bytes(LEN - 4 * PAGE, 1));
    }
    trim(cluster, "v", 3 * PAGE, 2 * PAGE);
    cluster.snapshot("v@s");
    write(cluster, "v", LEN / 4, bytes(LEN / 2, 2));
    cluster.snapshot("v@t");
    write(cluster, "v", 2 * PAGE, bytes(9 * PAGE, 3));
    done(cluster, "volume clone v@s c");
    write(cluster, "c", 5 * PAGE + 4096, bytes(7 * PAGE, 4));
    trim(cluster, "c", 9 * PAGE, 6 * PAGE);
    cluster.snapshot("c@mine");
    done(cluster, "volume clone c@mine d");
    write(cluster, "c", 20 * PAGE, bytes(10 * PAGE, 5));
    write(cluster, "d", 22 * PAGE + 512, bytes(3 * PAGE, 6));
    trim(cluster, "d", 30 * PAGE, PAGE / 2);
    cluster.snapshot("r@a");
    write(cluster, "r", LEN / 3, bytes(LEN / 3, 7));
    cluster.snapshot("r@b");
    write(cluster, "r", LEN / 2, bytes(LEN / 3, 8));
    done(cluster, "snapshot rollback r@a");
    cluster.delete_snapshot("r@a");
    write(cluster, "r", 8 * PAGE, bytes(4 * PAGE, 9));
    cluster.snapshot("r@c");
    done(cluster, "snapshot rollback r@b");
    write(cluster, "r", 11 * PAGE, bytes(4 * PAGE, 10));
}

/// What every volume and snapshot holds, through one server.
fn images(cluster: &Cluster, server: usize) -> BTreeMap<String, Vec<u8>> {
    let mut names: Vec<String> = ["v", "c", "d", "r"].map(str::to_owned).to_vec();
    for name in names.clone() {
        let snapshots = cluster.snapshots(&name).into_iter();
        names.extend(snapshots.map(|snapshot| format!("{name}@{}", snapshot.name)));
    }
    let len = u32::try_from(LEN).unwrap();
    let read = |name: &String| cluster.nbd(server, name).read(0, len).unwrap();
    names
        .iter()
        .map(|name| (name.clone(), read(name)))
        .collect()
}

fn check(cluster: &Cluster, server: usize, wanted: &BTreeMap<String, Vec<u8>>, when: &str) {
    let found = images(cluster, server);
    assert!(found.keys().eq(wanted.keys()), "{when}: {:?}", found.keys());
    for (name, image) in wanted {
        let page = |image: &[u8], at: u64| {
            let from = usize::try_from(at * PAGE).unwrap();
            image[from..from + usize::try_from(PAGE).unwrap()].to_vec()
        };
        let wrong = (0..PAGES).find(|at| page(image, *at) != page(&found[name], *at));
        assert_eq!(
            wrong,
            None,
            "{when}: page of {name} through server {}",
            server + 1
        );
    }
}

fn wait_drained(cluster: &Cluster, node: u16) {
    let deadline = Instant::now() + Duration::from_secs(90);
    loop {
        let drains = ctl_json(cluster, "node drain --list");
        let drains = drains.as_array().unwrap();
        let drain = drains.iter().find(|drain| drain["node"] == node).unwrap();
        if drain["volumes_left"].as_array().unwrap().is_empty() {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{drain}: {}",
            cluster.blockctl("move list")
        );
        sleep(Duration::from_millis(100));
    }
}

fn owns_nothing(cluster: &Cluster, node: u16) {
    for name in ["v", "c", "d", "r"] {
        assert!(
            !owners_of(cluster, 0, name).contains(&NodeNo(node)),
            "{name}"
        );
        for snapshot in cluster.snapshots(name) {
            assert!(
                snapshot.referenced_bytes.is_some(),
                "{name}@{}",
                snapshot.name
            );
        }
    }
}

/// A server is drained whatever its volumes are: every snapshot and every head stays what it is, also
/// when the server is gone, and when the pages come back one volume after the other, parents first.
#[test]
fn a_family_leaves_a_server_and_comes_back() {
    let mut cluster = Cluster::three();
    make_family(&cluster, &[]);
    let before = images(&cluster, 0);
    cluster.blockctl("node drain 2");
    owns_nothing(&cluster, 2);
    for server in 0..3 {
        check(&cluster, server, &before, "drained");
    }
    assert!(cluster.servers[1].stop().success());
    for server in [0, 2] {
        check(&cluster, server, &before, "the server is away");
    }
    cluster.servers[1].start();
    cluster.wait_writable();
    cluster.blockctl("node undrain 2");
    for name in ["v", "d", "r", "c"] {
        cluster.blockctl(&format!("page move {name} 0-23 --to 2 --rate 1GiB"));
        check(&cluster, 1, &before, &format!("half of {name} came back"));
    }
    cluster.blockctl("node drain 1");
    owns_nothing(&cluster, 1);
    check(&cluster, 0, &before, "server 1 drained");
    write(&cluster, "v", 0, bytes(LEN, 20));
    write(&cluster, "d", 16 * PAGE, bytes(8 * PAGE, 21));
    done(&cluster, "snapshot rollback c@mine");
    let mut after = images(&cluster, 2);
    for (name, image) in &before {
        let is_changed = ["v", "d", "c"].contains(&name.as_str());
        assert!(
            is_changed || after[name] == *image,
            "{name} saw changes of others"
        );
    }
    assert!(after["c"] == before["c@mine"]);
    cluster.servers[2].kill();
    cluster.servers[2].start();
    cluster.wait_writable();
    check(&cluster, 1, &after, "after a restart");
    done(&cluster, "volume flatten d");
    done(&cluster, "volume delete c --force");
    after.retain(|name, _| !name.starts_with('c'));
    let d = cluster
        .nbd(1, "d")
        .read(0, u32::try_from(LEN).unwrap())
        .unwrap();
    assert!(d == after["d"], "d is independent");
    cluster.delete_snapshot("v@s");
}

/// S003-19: kill -9 at every step of the moves of a family, of the server that is drained or of the one
/// that gets the pages.
#[test]
fn a_family_survives_a_death_at_any_step() {
    for (step, dies) in [
        ("move-begun", 0),
        ("move-copied", 0),
        ("move-sealed", 0),
        ("move-flipped", 0),
        ("move-adopting", 1),
        ("move-dropping", 0),
    ] {
        let mut cluster = Cluster::three();
        make_family(&cluster, &[1]);
        let before = images(&cluster, 2);
        cluster.blockctl("node drain 3");
        cluster.servers[dies].kill();
        cluster.servers[dies].environment = vec![("BLOCKD_CRASH_AT".to_owned(), step.to_owned())];
        cluster.servers[dies].start();
        cluster.wait_writable();
        cluster.blockctl("node drain 1 --no-wait");
        cluster.servers[dies].wait_end();
        cluster.servers[dies].environment.clear();
        sleep(Duration::from_millis(300));
        cluster.servers[dies].start();
        wait_drained(&cluster, 1);
        owns_nothing(&cluster, 1);
        check(&cluster, 2, &before, step);
    }
}

/// Clones are written while they and their parent change servers again and again.
#[test]
fn a_family_moves_under_writers() {
    let cluster = Cluster::three();
    make_family(&cluster, &[1, 2]);
    let before = images(&cluster, 0);
    let stop = Arc::new(AtomicBool::new(false));
    let writers = ["v", "c", "d"].map(|name| {
        let (opened, handle) = (cluster.open(name), cluster.handle());
        let (stop, mut image) = (Arc::clone(&stop), before[name].clone());
        std::thread::spawn(move || {
            let mut random = Random::new(30);
            while !stop.load(Ordering::Relaxed) {
                let at = random.within(0..LEN / 512 - 64) * 512;
                let blocks = 1 + random.index(63);
                let data = random.bytes(512 * blocks);
                let from = usize::try_from(at).unwrap();
                image[from..from + data.len()].copy_from_slice(&data);
                let written = handle.block_on(opened.write(at, data.clone().into()));
                written.unwrap();
                let len = u32::try_from(data.len() + 4096).unwrap();
                let len = len.min(u32::try_from(LEN - at).unwrap());
                let read = handle.block_on(opened.read(at, len)).unwrap();
                assert!(read == image[from..from + read.len()], "{name} at {at}");
            }
            image
        })
    });
    for (name, to) in [
        ("c", 3),
        ("v", 3),
        ("d", 1),
        ("v", 2),
        ("d", 3),
        ("c", 2),
        ("v", 1),
    ] {
        cluster.blockctl(&format!("page move {name} all --to {to} --rate 1GiB"));
        assert!(
            writers.iter().all(|writer| !writer.is_finished()),
            "a writer failed"
        );
    }
    stop.store(true, Ordering::Relaxed);
    let mut wanted = before.clone();
    for (name, writer) in ["v", "c", "d"].into_iter().zip(writers) {
        wanted.insert(name.to_owned(), writer.join().unwrap());
    }
    check(&cluster, 2, &wanted, "moved under writers");
}

/// S003-19: a source that dies for good between flip and drop is forgotten, and its move ends: what it had
/// is with the new owner.
#[test]
fn a_source_that_never_comes_back_is_forgotten() {
    let mut cluster = Cluster::three();
    cluster.create_on("w", LEN, 64, &[1]);
    write(&cluster, "w", 0, bytes(LEN, 1));
    cluster.snapshot("w@s");
    cluster.servers[0].kill();
    let crash = ("BLOCKD_CRASH_AT".to_owned(), "move-dropping".to_owned());
    cluster.servers[0].environment = vec![crash];
    cluster.servers[0].start();
    cluster.wait_writable();
    let up = ctl_refused(&cluster, "node forget 1");
    assert!(up.contains("stop the server"), "{up}");
    cluster.blockctl("page move w all --to 3 --no-wait");
    cluster.servers[0].wait_end();
    cluster.wait_writable_but(0);
    let phase = || ctl_json(&cluster, "move list w")[0]["phase"].clone();
    assert_eq!(phase(), "dropping");
    let kept = ctl_refused(&cluster, "node forget 1");
    assert!(kept.contains("node drain 1"), "{kept}");
    cluster.blockctl("node drain 1 --no-wait");
    assert!(ctl_refused(&cluster, "node forget 9").contains("no node 9"));
    done(&cluster, "node forget 1");
    assert_eq!(phase(), "done");
    let nodes = ctl_json(&cluster, "node list");
    assert_eq!(nodes.as_array().unwrap().len(), 2, "{nodes}");
    let wanted = bytes(LEN, 1);
    for server in [1, 2] {
        for name in ["w", "w@s"] {
            let len = u32::try_from(LEN).unwrap();
            let found = cluster.nbd(server, name).read(0, len).unwrap();
            assert!(found == wanted, "{name}");
        }
    }
    cluster.snapshot_at(1, &["w@later"]).unwrap();
    cluster.blockctl("page move w all --to 2");
    assert_eq!(owners_of(&cluster, 1, "w"), [NodeNo(2)].into());
}
