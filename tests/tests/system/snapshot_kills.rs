//! Snapshots while coordinators and participants are killed (S003-35).

use super::chains::{Load, PAGE, PAGE_BLOCKS};
use blockd::admin::HoldsInfo;
use blockd::control::snapshot::{Answer, Order, Preparation, Procedure};
use blockd::id::{NodeNo, SnapshotId};
use blockd::io::wire::{Frame, Kind, Status};
use blockd::limits::SNAPSHOT_HOLD_MAX_MS;
use blockd_tests::{Cluster, Peer, Random};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

const ROUNDS: usize = 16;
/// S003-28: no write waits longer than the hold (500 ms), plus what a loaded machine adds.
const RELEASED_WITHIN: Duration = Duration::from_secs(5);

/// S003-35: the coordinator or a participant dies at a random time of the procedure: the snapshot
/// is complete or it does not exist, never half of it; writes go on; no hold remains.
#[test]
fn a_killed_server_leaves_no_partial_snapshot() {
    kill_during(Procedure::Barrier, Load::start);
}

/// As above, by `hold`.
#[test]
fn a_killed_server_leaves_no_partial_hold() {
    kill_during(Procedure::Hold, Load::start);
}

/// As above, by `stamp`.
#[test]
fn a_killed_server_leaves_no_partial_snapshot_by_stamps() {
    kill_during(Procedure::Stamp, Load::start_each_through_one);
}

fn kill_during(procedure: Procedure, start: fn(&Cluster, [&'static str; 2]) -> Load) {
    let mut cluster = Cluster::three();
    let (mut random, seed) = Random::fresh();
    cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    cluster.create_on("w", 64 * PAGE, PAGE_BLOCKS, &[]);
    let load = start(&cluster, ["v", "w"]);
    let mut marks = BTreeMap::new();
    let mut committed = 0;
    let (before_all, started) = (load.marks(), Instant::now());
    cluster
        .snapshot_by(0, &["v@first", "w@first"], procedure)
        .unwrap();
    marks.insert("first".to_owned(), (before_all, load.marks()));
    // From before the first order until after the commit, however slow the machine is.
    let window_us = u64::try_from(started.elapsed().as_micros() * 3 / 2).unwrap();
    for round in 0..ROUNDS {
        let name = format!("s{round}");
        let coordinator = round % 3;
        let victim = if random.one_in(2) {
            coordinator
        } else {
            (coordinator + 1) % 3
        };
        let before = load.marks();
        let taking = start_snapshot(&cluster, coordinator, &name, procedure);
        sleep(Duration::from_micros(random.within(0..window_us)));
        cluster.servers[victim].kill();
        let answered_well = taking.join().unwrap();
        committed += usize::from(answered_well);
        cluster.servers[victim].start();
        cluster.wait_writable();
        writes_go_through(&cluster, seed);
        load.await_spans();
        marks.insert(name.clone(), (before, load.marks()));
        load.check_running();
        let listed = listed(&cluster);
        assert!(
            !answered_well || listed.contains(&name),
            "{name} was taken and is not listed"
        );
        if listed.contains(&name) {
            let (before, after) = &marks[&name];
            for server in 0..3 {
                load.check(&cluster, server, &name, before, after);
            }
        }
    }
    let listed = listed(&cluster);
    for name in &listed {
        let (before, after) = &marks[name];
        load.check(&cluster, 0, name, before, after);
    }
    load.finish();
    eprintln!(
        "snapshot kills, {procedure}: seed {seed}, {ROUNDS} rounds, {committed} answered as taken, {} exist",
        listed.len()
    );
    cluster.snapshot_at(0, &["v@last", "w@last"]).unwrap();
    assert_eq!(cluster.holds_at(1), HoldsInfo::default());
}

/// What a hold may add to a request besides its bound: that much is another hold, which nothing could
/// excuse. A loaded machine needs less for the timer and the way back.
const SLACK: Duration = Duration::from_millis(SNAPSHOT_HOLD_MAX_MS);

/// S003-28, U-08: the coordinator dies when the others are ready and have been told nothing more, under the
/// bound that a server has if nobody says otherwise: no client waits longer than that.
#[test]
fn no_client_waits_longer_than_the_default_bound() {
    let mut cluster = Cluster::three();
    let volume = cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    cluster.create_on("w", 64 * PAGE, PAGE_BLOCKS, &[]);
    let writers = [1, 2].map(|server| EagerWriter::start(&cluster, server));
    // An open span on the coordinator keeps it from being ready, and so from saying take.
    let coordinator = Peer::connect(&cluster, 0);
    let mut begin = Frame::request(Kind::SpanBegin, volume.id);
    (begin.aux, begin.epoch) = (5, volume.epoch);
    assert_eq!(coordinator.status(begin), Status::Ok);
    let taking = start_snapshot(&cluster, 0, "s", Procedure::Hold);
    wait_holding(&cluster, &[NodeNo(2), NodeNo(3)]);
    cluster.servers[0].signal(rustix::process::Signal::KILL);
    drop(coordinator);
    cluster.servers[0].kill();
    assert!(!taking.join().unwrap(), "taken by a dead coordinator");
    let longest = writers.map(EagerWriter::finish);
    eprintln!("snapshot kills: the longest waits {longest:?}");
    let bound = Duration::from_millis(SNAPSHOT_HOLD_MAX_MS) + SLACK;
    assert!(longest.iter().all(|took| *took < bound), "{longest:?}");
    let holds = cluster.holds_at(1).holds;
    assert!(holds.is_empty(), "{holds:?}");
}

/// Waits until each of these servers keeps a write of `v` waiting.
fn wait_holding(cluster: &Cluster, servers: &[NodeNo]) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let holds = cluster.holds_at(1).holds;
        let holding = |server: &NodeNo| {
            let mut of_server = holds.iter().filter(|(_, hold)| hold.server == *server);
            of_server.any(|(volume, hold)| volume == "v" && 0 < hold.waiting)
        };
        if servers.iter().all(holding) {
            return;
        }
        assert!(Instant::now() < deadline, "{holds:?}");
    }
}

/// Writes to pages of a server through it, one request after another.
struct EagerWriter {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Duration>,
}

impl EagerWriter {
    fn start(cluster: &Cluster, server: usize) -> Self {
        let route = cluster.route(server, "v");
        let number = u16::from(cluster.servers[server].number);
        let run = route.runs.iter().find(|run| run.owner.0 == number);
        let at = u64::from(run.unwrap().first_page) * PAGE;
        let mut connection = cluster.nbd(server, "v");
        let stop = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&stop);
        let thread = spawn(move || {
            let mut longest = Duration::ZERO;
            while !ended.load(Ordering::Relaxed) {
                let started = Instant::now();
                connection.write(at, &[1; 512]).unwrap();
                longest = longest.max(started.elapsed());
            }
            longest
        });
        Self { stop, thread }
    }

    /// Ends after the write that is being held; the longest time that one took.
    fn finish(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap()
    }
}

pub(crate) fn start_snapshot(
    cluster: &Cluster,
    coordinator: usize,
    name: &str,
    procedure: Procedure,
) -> std::thread::JoinHandle<bool> {
    use blockd::admin::{AdminRequest, SnapshotName};
    let client = cluster.client_of(&[coordinator]);
    let handle = cluster.handle();
    let target = |volume: &str| SnapshotName {
        volume: volume.to_owned(),
        snapshot: name.to_owned(),
    };
    let targets = vec![target("v"), target("w")];
    std::thread::spawn(move || {
        let taken =
            handle.block_on(client.admin(AdminRequest::SnapshotCreateBy { targets, procedure }));
        taken.is_ok()
    })
}

/// Names of the snapshots; both volumes have the same ones, because they are taken together.
pub(crate) fn listed(cluster: &Cluster) -> Vec<String> {
    let names = |volume| -> Vec<String> {
        cluster
            .snapshots(volume)
            .into_iter()
            .map(|info| info.name)
            .collect()
    };
    let (v, w) = (names("v"), names("w"));
    assert_eq!(v, w, "a snapshot exists of one volume only");
    v
}

/// One write to a page of each server through each server ends soon.
pub(crate) fn writes_go_through(cluster: &Cluster, seed: u64) {
    for server in 0..3 {
        let mut connection = cluster.nbd(server, "v");
        for page in 40..43 {
            let started = Instant::now();
            connection.write(page * PAGE, &[1; 512]).unwrap();
            let took = started.elapsed();
            assert!(
                took < RELEASED_WITHIN,
                "seed {seed}: a write was held for {took:?}"
            );
        }
    }
}

/// what waits is listed on every server with its owner, its reason and the time that is left,
/// and is gone when that has passed (U-08).
#[test]
fn a_hold_is_listed_until_its_deadline() {
    let cluster = Cluster::three();
    let volume = cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    for (round, procedure) in (1..).zip([Procedure::Barrier, Procedure::Hold, Procedure::Stamp]) {
        let order = Order::PrepareBy(Preparation {
            procedure,
            coordinator: NodeNo(3),
            snapshot: SnapshotId(1000 + round),
            epoch: volume.epoch,
            hold_max_ms: 1500,
            park_max_ms: 1500,
        });
        let ready = Peer::connect(&cluster, 1).order(volume.id, u64::from(round), order);
        assert!(
            matches!(ready, Answer::Ready { .. } | Answer::ReadyAt { .. }),
            "{ready:?}"
        );
        let holds = cluster.holds_at(0);
        assert_eq!(holds.holds.len(), 1, "{holds:?}");
        let (name, hold) = &holds.holds[0];
        assert_eq!(
            (name.as_str(), hold.server, hold.coordinator),
            ("v", NodeNo(2), NodeNo(3))
        );
        assert!(hold.reason.contains(procedure.name()), "{}", hold.reason);
        let left_ms = hold.left_ms.unwrap();
        assert!((1..=1500).contains(&left_ms), "{hold:?}");
        let text = cluster.blockctl("io holds list");
        assert!(text.contains("of server 3"), "{text}");
        sleep(Duration::from_millis(left_ms + 100));
        assert_eq!(cluster.holds_at(0), HoldsInfo::default());
        assert_eq!(cluster.blockctl("io holds"), "nothing waits\n");
    }
}

/// S003-28, U-08: a coordinator that says prepare and nothing more holds the writes of an idle
/// volume for the hold's time and no longer, and the next snapshot is taken.
#[test]
fn a_coordinator_that_falls_silent_holds_nobody() {
    use blockd::io::link::{Hello, Link, decode_control, encode_control};
    let cluster = Cluster::three();
    let volume = cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    cluster.create_on("w", PAGE, PAGE_BLOCKS, &[]);
    let order = Order::Prepare {
        snapshot: SnapshotId(1),
        epoch: volume.epoch,
        hold_max_ms: 400,
    };
    for round in 1..4 {
        for server in &cluster.servers {
            let hello = Hello {
                min_version: 1,
                max_version: 1,
                requester: 1000 * round + u64::from(server.number),
                connection: 1,
                cluster_id: None,
                node: NodeNo(0),
            };
            let mut request = Frame::request(Kind::Snapshot, volume.id);
            request.aux = round;
            request.payload = encode_control(&order);
            let link = cluster
                .block(Link::connect(&server.peer_address(), &hello))
                .unwrap();
            let reply = cluster.block(link.call(request)).unwrap();
            let answer: Answer = decode_control(reply.payload).unwrap();
            assert!(matches!(answer, Answer::Ready { .. }), "{answer:?}");
        }
        let held = Instant::now();
        writes_go_through(&cluster, round);
        assert!(
            held.elapsed() > Duration::from_millis(100),
            "prepare held no write"
        );
    }
    cluster.snapshot_at(0, &["v@s", "w@s"]).unwrap();
}
