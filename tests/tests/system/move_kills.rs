//! Servers that die while pages move, at every step of a move (S003-19), and moves that must end
//! otherwise: paused, cancelled, overtaken by other changes.

use super::moves::{Clients, check_everywhere, check_one_owner, owners_of};
use blockd::admin::AdminRequest;
use blockd::id::NodeNo;
use blockd_tests::{Cluster, ClusterOptions, MIB, NbdConnection, binary, try_run};
use bytes::Bytes;
use serde_json::Value;
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

pub(crate) fn moves(cluster: &Cluster, volume: &str) -> Value {
    let listed = cluster.blockctl(&format!("move list {volume} --json"));
    serde_json::from_str::<Value>(&listed).unwrap()[0].clone()
}

pub(crate) fn wait_phase(cluster: &Cluster, volume: &str, wanted: &str) -> Value {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let now = moves(cluster, volume);
        if now["phase"] == wanted {
            return now;
        }
        assert!(Instant::now() < deadline, "not {wanted}: {now}");
        sleep(Duration::from_millis(50));
    }
}

/// S003-19: kill -9 at every step, of the source or the target: the move ends by itself once the
/// server is back, all that was acknowledged is there, each page has exactly one owner. Snapshots
/// are as they were.
#[test]
fn a_death_at_any_step_is_recovered() {
    for (step, dies) in [
        ("move-begun", 0),
        ("move-copied", 0),
        ("move-sealed", 0),
        ("move-flipped", 0),
        ("move-adopting", 1),
        ("move-dropping", 0),
    ] {
        let mut cluster = Cluster::three();
        cluster.create_on("v", 32 * MIB, 8192, &[1]);
        let volume = cluster.open("v");
        let data = Bytes::from(blockd_tests::Random::new(5).bytes(16 << 20));
        cluster.block(volume.write(0, data.clone())).unwrap();
        cluster.snapshot("v@s");
        cluster.servers[dies].kill();
        cluster.servers[dies].environment = vec![("BLOCKD_CRASH_AT".to_owned(), step.to_owned())];
        cluster.servers[dies].start();
        cluster.wait_writable();
        let later = Bytes::from(blockd_tests::Random::new(6).bytes(1 << 20));
        cluster.block(volume.write(3 << 20, later.clone())).unwrap();
        cluster.blockctl("page move v all --to 2 --no-wait");
        cluster.servers[dies].wait_end();
        cluster.servers[dies].environment.clear();
        sleep(Duration::from_millis(300));
        cluster.servers[dies].start();
        wait_phase(&cluster, "v", "done");
        assert_eq!(owners_of(&cluster, 2, "v"), [NodeNo(2)].into(), "{step}");
        let mut wanted = data.to_vec();
        let mut snapshot = cluster.nbd(2, "v@s");
        assert!(
            snapshot.read(0, 16 << 20).unwrap() == wanted,
            "{step}: the snapshot"
        );
        wanted[3 << 20..4 << 20].copy_from_slice(&later);
        let mut head = cluster.nbd(0, "v");
        assert!(
            head.read(0, 16 << 20).unwrap() == wanted,
            "{step}: the volume"
        );
        let allocated = cluster.show("v").allocated_bytes.unwrap();
        assert_eq!(allocated, 17 * MIB, "{step}");
        check_one_owner(&mut cluster, "v", allocated);
    }
}

/// S003-19, X-02: source and target are killed at random moments while pages go round under clients
/// of the third server: after each return every acknowledged byte is there.
#[test]
fn deaths_at_random_moments_lose_nothing() {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 48 * MIB, 8192, &[1]);
    let clients = Clients::through(&cluster, "v", 48 * MIB, &[2]);
    let mut random = blockd_tests::Random::new(11);
    for round in 0..8_u16 {
        let to = 1 + (round + 1) % 2;
        let words = format!("page move v all --to {to} --rate 64MiB --no-wait");
        // The move before may still be under way, after a death.
        let deadline = Instant::now() + Duration::from_secs(60);
        while cluster.try_blockctl(&words).code != Some(0) {
            if owners_of(&cluster, 2, "v") == [NodeNo(to)].into() {
                break;
            }
            assert!(Instant::now() < deadline, "{}", moves(&cluster, "v"));
            sleep(Duration::from_millis(100));
        }
        sleep(Duration::from_millis(random.within(0..700)));
        let dies = usize::from(round % 2);
        cluster.servers[dies].kill();
        sleep(Duration::from_millis(100));
        cluster.servers[dies].start();
        cluster.wait_writable();
        clients.check_running();
    }
    wait_phase(&cluster, "v", "done");
    let registers = clients.finish();
    check_everywhere(&cluster, "v", &registers);
    let allocated = cluster.show("v").allocated_bytes.unwrap();
    check_one_owner(&mut cluster, "v", allocated);
}

/// S003-13: a group grows from one server to two to three under clients, which never notice; then a
/// server is drained and stopped, and the clients of the others go on. A flush after that vouches
/// for what the stopped server had acknowledged before it gave its pages away.
#[test]
fn a_group_grows_and_shrinks_under_clients() {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 96 * MIB, 8192, &[1]);
    let clients = Clients::through(&cluster, "v", 96 * MIB, &[0, 2]);
    cluster.snapshot("v@s");
    sleep(Duration::from_secs(1));
    cluster.blockctl("volume rebalance v --rate 1GiB");
    let route = cluster.route(0, "v");
    let mut pages = [0; 3];
    for run in &route.runs {
        pages[usize::from(run.owner.0) - 1] += run.page_count;
    }
    assert_eq!(pages.iter().sum::<u32>(), 24);
    assert!(
        pages.iter().all(|pages| (5..=11).contains(pages)),
        "{pages:?}"
    );
    assert!(
        cluster
            .blockctl("volume rebalance v")
            .contains("nothing to move")
            || cluster.route(0, "v").runs.len() > 1
    );
    clients.check_running();
    // A client that has written through server 3 to all, and has not flushed.
    let mut unflushed = NbdConnection::tcp(&cluster.servers[2].nbd_address(), "v").unwrap();
    let said = cluster.blockctl("node drain 2");
    assert!(said.contains("node 2 owns nothing"), "{said}");
    assert!(!owners_of(&cluster, 0, "v").contains(&NodeNo(2)));
    assert!(cluster.snapshots("v")[0].referenced_bytes.is_some());
    assert!(cluster.servers[1].stop().success());
    unflushed.flush().unwrap();
    let before = clients.requests.load(std::sync::atomic::Ordering::Relaxed);
    sleep(Duration::from_secs(2));
    clients.check_running();
    let after = clients.requests.load(std::sync::atomic::Ordering::Relaxed);
    assert!(after > before + 20, "{before} then {after} requests");
    let created = cluster.create("w", 64 * MIB);
    assert_eq!(
        created.owners,
        [NodeNo(1), NodeNo(3)],
        "a drained node gets nothing"
    );
    let refused = cluster.try_blockctl("page move v 0 --to 2");
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.contains("undrain"), "{refused:?}");
    let longest = clients.longest();
    let registers = clients.finish();
    check_everywhere(&cluster, "v", &registers);
    eprintln!("moves: grown and drained, longest pause {longest:?}");
    cluster.servers[1].start();
    cluster.wait_writable();
    cluster.blockctl("node undrain 2");
    cluster.blockctl("page move v all --to 2 --rate 1GiB");
    check_everywhere(&cluster, "v", &registers);
}

/// S003-13: one server becomes two, then four, under clients that never notice; each time the volume is
/// evened out over all of them.
#[test]
fn a_group_grows_from_one_server_to_four_under_clients() {
    let mut cluster = Cluster::undefined(&ClusterOptions {
        servers: 4,
        ..ClusterOptions::default()
    });
    cluster.servers[0].start();
    let first = cluster.client_of(&[0]);
    let define = AdminRequest::ClusterDefine {
        name: "grows".to_owned(),
    };
    cluster.block(first.admin(define)).unwrap();
    let ctl = |cluster: &Cluster, words: &str| {
        let servers = cluster.servers[0].peer_address();
        let words = format!("--servers {servers} {words}");
        try_run(60, binary("blockctl"), words.split(' '))
            .ok()
            .stdout
    };
    ctl(&cluster, "volume create v --size 96MiB");
    let clients = Clients::through(&cluster, "v", 96 * MIB, &[0]);
    ctl(&cluster, "snapshot create v@s");
    sleep(Duration::from_millis(500));
    for servers in [2, 4] {
        for index in servers / 2..servers {
            cluster.servers[index].start();
            let address = cluster.servers[index].peer_address();
            ctl(&cluster, &format!("node define {address} --online"));
        }
        ctl(&cluster, "volume rebalance v --rate 1GiB");
        clients.check_running();
        let mut pages = vec![0; servers];
        for run in cluster.route(0, "v").runs {
            pages[usize::from(run.owner.0) - 1] += run.page_count;
        }
        let share = 24 / u32::try_from(servers).unwrap();
        let is_even = |pages: &u32| (share / 2..=share * 2).contains(pages);
        assert!(pages.iter().all(is_even), "{servers} servers: {pages:?}");
        eprintln!("moves: {servers} servers have {pages:?} pages");
    }
    let registers = clients.finish();
    check_everywhere(&cluster, "v", &registers);
    let allocated = ctl(&cluster, "volume show v --json");
    let allocated: Value = serde_json::from_str(&allocated).unwrap();
    let mut snapshot = cluster.nbd(3, "v@s");
    assert_eq!(snapshot.read(0, 4096).unwrap().len(), 4096);
    assert!(
        allocated["allocated_bytes"]
            .as_u64()
            .is_some_and(|bytes| bytes > 0)
    );
}

/// Moves are paused, resumed, cancelled and overtaken by a resize, a rename and a delete; what is
/// asked for wrongly is refused with what to do.
#[test]
fn a_move_gives_way_to_what_its_operator_does() {
    let cluster = Cluster::three();
    cluster.create_on("v", 256 * MIB, 8192, &[1]);
    let volume = cluster.open("v");
    let data = Bytes::from(blockd_tests::Random::new(9).bytes(64 << 20));
    for at in [0, 64, 128] {
        cluster.block(volume.write(at * MIB, data.clone())).unwrap();
    }
    cluster.blockctl("page move v all --to 2 --rate 16MiB --no-wait");
    assert_eq!(cluster.refused_move("page move v 0 --to 3"), "conflict");
    assert!(
        cluster
            .blockctl("volume show v")
            .contains("moving: page move to node 2")
    );
    let route: Value = serde_json::from_str(&cluster.blockctl("route show v --json")).unwrap();
    assert_eq!(route["move"]["pages_total"], 64);
    sleep(Duration::from_millis(300));
    cluster.blockctl("move pause v");
    wait_phase(&cluster, "v", "paused");
    cluster.blockctl("move resume v");
    cluster.blockctl("volume resize v 512MiB");
    cluster.blockctl("volume rename v x");
    cluster.blockctl("volume resize x 200MiB --allow-shrink");
    let moving = moves(&cluster, "x");
    assert_ne!(moving["phase"], "failed", "{moving}");
    cluster.blockctl("move cancel x");
    wait_phase(&cluster, "x", "cancelled");
    assert_eq!(cluster.refused_move("move pause x"), "conflict");
    let mut head = cluster.nbd(2, "x");
    for at in [0, 64, 128] {
        assert!(
            head.read(at * MIB, 64 << 20).unwrap() == data,
            "at {at} MiB"
        );
    }
    cluster.blockctl("page move x all --to 3 --rate 16MiB --no-wait");
    cluster.blockctl("volume delete x");
    let none: Value = serde_json::from_str(&cluster.blockctl("move list --json")).unwrap();
    assert_eq!(none, serde_json::json!([]));
    cluster.create_on("w", 8 * MIB, 8192, &[1]);
    for (words, kind) in [
        ("page move nosuch all --to 2", "not_found"),
        ("page move w 0-99 --to 2", "invalid"),
        ("page move w 0 --to 9", "not_found"),
        ("page move w 0 --to 1", "conflict"),
        ("page move w 0 --to 2 --rate 1KiB", "invalid"),
        ("node drain 9", "not_found"),
    ] {
        assert_eq!(cluster.refused_move(words), kind, "{words}");
    }
}

trait RefusedMove {
    fn refused_move(&self, words: &str) -> String;
}

impl RefusedMove for Cluster {
    /// The kind of the error with which a command is refused.
    fn refused_move(&self, words: &str) -> String {
        let ran = self.try_blockctl(&format!("{words} --json"));
        assert_eq!(ran.code, Some(1), "{ran:?}");
        let error: Value = serde_json::from_str(&ran.stderr).unwrap();
        error["error"]["kind"].as_str().unwrap().to_owned()
    }
}

/// S003-19: a target without space makes the move fail, cleanly: the source keeps the pages and
/// serves them; a target that is away makes it wait, and says so.
#[test]
fn a_target_that_is_full_or_away_changes_nothing() {
    let mut cluster = Cluster::three();
    cluster.servers[1].kill();
    cluster.servers[1]
        .config
        .push_str(&format!("reserve_bytes = {}\n", 1_u64 << 50));
    cluster.servers[1].start();
    cluster.wait_writable();
    cluster.create_on("v", 32 * MIB, 8192, &[1]);
    let volume = cluster.open("v");
    let data = Bytes::from(vec![7; 8 << 20]);
    cluster.block(volume.write(0, data.clone())).unwrap();
    let failed = cluster.try_blockctl("page move v all --to 2");
    assert_eq!(failed.code, Some(1));
    assert!(failed.stderr.contains("no space"), "{failed:?}");
    assert_eq!(owners_of(&cluster, 0, "v"), [NodeNo(1)].into());
    cluster.block(volume.write(MIB, data.clone())).unwrap();
    cluster.servers[2].kill();
    cluster.blockctl("page move v all --to 3 --no-wait");
    sleep(Duration::from_secs(2));
    let waits = moves(&cluster, "v");
    assert!(
        waits["trouble"]
            .as_str()
            .is_some_and(|why| why.contains("node 3")),
        "{waits}"
    );
    cluster.block(volume.write(2 * MIB, data)).unwrap();
    cluster.servers[2].start();
    wait_phase(&cluster, "v", "done");
    let found = cluster.block(volume.read(0, 10 << 20)).unwrap();
    assert!(found.iter().all(|byte| *byte == 7));
}

/// S003-18: a server that cannot hear of a move asks the old owner, which sends it to the new one:
/// right answers over two hops at the most, from every server, as fast as ever.
#[test]
fn stale_tables_find_the_new_owner() {
    let cluster = Cluster::three();
    cluster.create_on("v", 8 * MIB, 8192, &[1]);
    let mut connections: Vec<_> = (0..3).map(|index| cluster.nbd(index, "v")).collect();
    let volume = cluster.open("v");
    let mover = {
        let servers = cluster.server_list();
        let blockctl = blockd_tests::binary("blockctl");
        spawn(move || {
            for to in [2, 3, 1, 3, 2, 1] {
                let words = format!("--servers {servers} page move v all --to {to}");
                let words = words.split(' ').map(str::to_owned);
                blockd_tests::run(60, &blockctl, words.map(std::ffi::OsString::from));
            }
        })
    };
    let mut rounds = 0_u64;
    while !mover.is_finished() {
        rounds += 1;
        let stamp = vec![u8::try_from(rounds % 251).unwrap(); 4096];
        let writer = usize::try_from(rounds % 3).unwrap();
        connections[writer].write(8192, &stamp).unwrap();
        for connection in &mut connections {
            assert!(
                connection.read(8192, 4096).unwrap() == stamp,
                "round {rounds}"
            );
        }
        let found = cluster.block(volume.read(8192, 4096)).unwrap();
        assert!(found == stamp, "round {rounds} by the client library");
    }
    mover.join().unwrap();
    assert!(rounds > 50, "{rounds}");
}
