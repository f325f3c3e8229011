//! What a participant does between the orders of a coordinator, seen by its clients.

use super::chains::{PAGE, PAGE_BLOCKS};
use blockd::admin::{AdminRequest, HoldInfo, HoldsInfo, SnapshotName, VolumeInfo};
use blockd::control::snapshot::{Answer, Order, Preparation, Procedure};
use blockd::id::{NodeNo, PageNo, SnapshotId, Stamp};
use blockd::io::wire::{Frame, Kind, Status, flags};
use blockd_tests::{Cluster, NbdConnection, Peer};
use bytes::Bytes;
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

/// How long these tickets last: much longer than a write takes on a busy machine.
const HOLD: Duration = Duration::from_millis(2000);
const AT_ONCE: Duration = Duration::from_millis(1000);
/// Not reached by the registry, so that the sweep leaves it alone.
const SNAPSHOT: SnapshotId = SnapshotId(1000);
/// Milliseconds of a stamp are its upper bits.
const COUNT_BITS: u32 = 16;

fn prepare(volume: &VolumeInfo, procedure: Procedure) -> Order {
    prepare_for(HOLD, volume, procedure)
}

fn prepare_for(hold: Duration, volume: &VolumeInfo, procedure: Procedure) -> Order {
    let hold_max_ms = u64::try_from(hold.as_millis()).unwrap();
    Order::PrepareBy(Preparation {
        procedure,
        coordinator: NodeNo(1),
        snapshot: SNAPSHOT,
        epoch: volume.epoch,
        hold_max_ms,
        park_max_ms: hold_max_ms,
    })
}

/// The first byte of a page that a server owns.
fn page_of(cluster: &Cluster, volume: &str, server: u16) -> u64 {
    let route = cluster.route(0, volume);
    let run = route.runs.iter().find(|run| run.owner.0 == server);
    u64::from(run.unwrap().first_page) * PAGE
}

fn timed<T>(body: impl FnOnce() -> T) -> Duration {
    let started = Instant::now();
    body();
    started.elapsed()
}

/// S003-36, 40: between ready and take a write waits (`hold`), is executed and not acknowledged nor
/// shown (`barrier`), or is acknowledged at once (`stamp`). Other blocks are read at once in all.
#[test]
fn what_waits_between_ready_and_take() {
    let cluster = Cluster::three();
    let volume = cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    let at = page_of(&cluster, "v", 2);
    for (ticket, procedure) in [
        (1, Procedure::Hold),
        (2, Procedure::Barrier),
        (3, Procedure::Stamp),
    ] {
        let peer = Peer::connect(&cluster, 1);
        let ready = peer.order(volume.id, ticket, prepare(&volume, procedure));
        let is_ready = matches!(ready, Answer::Ready { .. } | Answer::ReadyAt { .. });
        assert!(is_ready, "{procedure}: {ready:?}");
        let mut writer = cluster.nbd(0, "v");
        let writing = std::thread::spawn(move || timed(|| writer.write(at, &[7; 4096]).unwrap()));
        sleep(Duration::from_millis(100));
        let mut reader = cluster.nbd(2, "v");
        let other = timed(|| reader.read(at + 8192, 4096).unwrap());
        let same = timed(|| reader.read(at, 4096).unwrap());
        let wrote = writing.join().unwrap();
        assert!(other < AT_ONCE, "{procedure}: another block took {other:?}");
        let waits = |took: Duration| took > AT_ONCE;
        let seen = (waits(wrote), waits(same));
        let wanted = match procedure {
            Procedure::Hold => (true, false),
            Procedure::Barrier => (true, true),
            Procedure::Stamp => (false, false),
        };
        assert_eq!(seen, wanted, "{procedure}: write {wrote:?}, read {same:?}");
        assert!(wrote < HOLD + AT_ONCE, "{procedure}: {wrote:?}");
        sleep(HOLD);
    }
}

/// Two requests of one server at the time of a snapshot: a span that arrived before `prepare` and is not
/// executed yet, and writes of one block each that arrive after it.
struct Arrivals<'a> {
    cluster: &'a Cluster,
    volume: &'a VolumeInfo,
    peer: Peer<'a>,
    at: u64,
}

impl<'a> Arrivals<'a> {
    fn span(&self, kind: Kind) -> Frame {
        let mut frame = Frame::request(kind, self.volume.id);
        (frame.aux, frame.epoch) = (5, self.volume.epoch);
        frame
    }

    fn before(cluster: &'a Cluster, volume: &'a VolumeInfo) -> Self {
        let (peer, at) = (Peer::connect(cluster, 1), page_of(cluster, "v", 2));
        let arrivals = Self {
            cluster,
            volume,
            peer,
            at,
        };
        let began = arrivals.peer.status(arrivals.span(Kind::SpanBegin));
        assert_eq!(began, Status::Ok);
        arrivals
    }

    /// The first block of the page is changed by the span, which ends.
    fn execute(&self) {
        let mut part = self.span(Kind::Write);
        part.flags = flags::SPAN;
        part.page = PageNo(u32::try_from(self.at / PAGE).unwrap());
        (part.len_bytes, part.payload) = (512, Bytes::from(vec![7; 512]).into());
        assert_eq!(self.peer.status(part), Status::Ok);
        assert_eq!(self.peer.status(self.span(Kind::SpanEnd)), Status::Ok);
    }

    /// Writes to the other blocks, each through its own connection, that come after `prepare`.
    fn after(&self) -> Vec<JoinHandle<()>> {
        let write = |block: u64| {
            let (mut writer, at) = (self.cluster.nbd(0, "v"), self.at + block * 4096);
            spawn(move || writer.write(at, &[7; 4096]).unwrap())
        };
        (1..=LATER).map(write).collect()
    }

    /// The hold of this server, once it is as wanted.
    fn hold(&self, is_wanted: impl Fn(&HoldInfo) -> bool) -> HoldInfo {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let holds = self.cluster.holds_at(1).holds;
            if let Some((_, hold)) = holds.iter().find(|(_, hold)| is_wanted(hold)) {
                return hold.clone();
            }
            assert!(Instant::now() < deadline, "{holds:?}");
        }
    }
}

/// Writes that come after `prepare`.
const LATER: u64 = 3;

/// S003-36, 37: what arrived before `prepare` and is not executed yet is executed before `ready`, and is in
/// the snapshot. By `hold`, what arrives after it waits, is counted in `io holds` and in the answer, and
/// is not in the snapshot; by `barrier` it is executed before the log is marked, and is in it. None of
/// these is acknowledged between ready and take.
#[test]
fn what_arrived_before_prepare_is_in_and_what_waits_is_counted() {
    let cluster = Cluster::three();
    let volume = cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    for (ticket, procedure) in [(1, Procedure::Hold), (2, Procedure::Barrier)] {
        let is_held = procedure == Procedure::Hold;
        let arrivals = Arrivals::before(&cluster, &volume);
        let coordinator = Peer::connect(&cluster, 1);
        let (ready, writers) = std::thread::scope(|scope| {
            let (peer, id) = (&coordinator, volume.id);
            let order = prepare_for(5 * HOLD, &volume, procedure);
            let preparing = scope.spawn(move || peer.order(id, ticket, order));
            arrivals.hold(|hold| hold.ticket.0 == ticket);
            let mut writers = arrivals.after();
            match is_held {
                true => drop(arrivals.hold(|hold| u64::from(hold.waiting) == LATER)),
                false => writers.drain(..).for_each(|writer| writer.join().unwrap()),
            }
            assert!(!preparing.is_finished(), "ready while a span is open");
            arrivals.execute();
            (preparing.join().unwrap(), writers)
        });
        let Answer::Ready { held, incarnation } = ready else {
            panic!("{procedure}: {ready:?}");
        };
        let counted = if is_held { LATER } else { 0 };
        assert_eq!(u64::from(held), counted, "{procedure}");
        assert!(writers.iter().all(|writer| !writer.is_finished()));
        let take = Order::Take { incarnation };
        assert_eq!(coordinator.order(volume.id, ticket, take), Answer::Taken);
        writers
            .into_iter()
            .for_each(|writer| writer.join().unwrap());
        let shows = |block: u64| in_snapshot(&coordinator, &volume, arrivals.at + block * 4096);
        let shown: Vec<bool> = (0..=LATER).map(shows).collect();
        assert_eq!(shown, [true, !is_held, !is_held, !is_held], "{procedure}");
        forget(&coordinator, &volume, arrivals.at);
    }
}

/// Drops the part of the snapshot and makes zeros of what it had.
fn forget(peer: &Peer, volume: &VolumeInfo, at: u64) {
    let mut dropped = Frame::request(Kind::SnapshotDrop, volume.id);
    (dropped.snapshot, dropped.epoch) = (SNAPSHOT, volume.epoch);
    assert_eq!(peer.status(dropped), Status::Ok);
    let mut zero = Frame::request(Kind::Zero, volume.id);
    zero.epoch = volume.epoch;
    zero.page = PageNo(u32::try_from(at / PAGE).unwrap());
    zero.len_bytes = u32::try_from(PAGE).unwrap();
    assert_eq!(peer.status(zero), Status::Ok);
}

/// What waits on all servers while the coordinator's own part of `v` is not ready: a request over
/// several pages is open there. The snapshot is taken when that has ended.
fn holds_behind_a_span(
    cluster: &Cluster,
    volume: &VolumeInfo,
    targets: &[&str],
    least: usize,
) -> HoldsInfo {
    let peer = Peer::connect(cluster, 0);
    let span = |kind| {
        let mut frame = Frame::request(kind, volume.id);
        (frame.aux, frame.epoch) = (5, volume.epoch);
        frame
    };
    assert_eq!(peer.status(span(Kind::SpanBegin)), Status::Ok);
    let client = cluster.client_of(&[0]);
    let targets = targets.iter().map(|volume| SnapshotName {
        volume: (*volume).to_owned(),
        snapshot: "s".to_owned(),
    });
    let targets = targets.collect();
    let request = AdminRequest::SnapshotCreate { targets };
    let taking = cluster
        .handle()
        .spawn(async move { client.admin(request).await });
    let deadline = Instant::now() + Duration::from_secs(10);
    let holds = loop {
        let holds = cluster.holds_at(1);
        let of_volume = holds.holds.iter().filter(|(name, _)| name == "v");
        if of_volume.count() >= least {
            break holds;
        }
        assert!(Instant::now() < deadline, "{holds:?}");
    };
    assert!(!taking.is_finished());
    assert_eq!(peer.status(span(Kind::SpanEnd)), Status::Ok);
    cluster.block(taking).unwrap().unwrap();
    assert_eq!(cluster.holds_at(1), HoldsInfo::default());
    holds
}

/// S003-24, 38, 45: a server that coordinates asks the others while its own part is not ready yet, and
/// nobody takes before it is. The procedure is that of the volume, and `barrier` if the volumes of a
/// group want different ones.
#[test]
fn the_others_prepare_while_the_coordinator_does() {
    let cluster = Cluster::three();
    let volume = cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    cluster.create_on("w", 64 * PAGE, PAGE_BLOCKS, &[]);
    cluster.blockctl("volume set v procedure stamp");
    cluster.blockctl("volume set w procedure hold");
    // A barrier keeps those waiting that are ready for a moment only.
    for (targets, procedure, least) in [(&["v"][..], "stamp", 3), (&["w", "v"], "barrier", 1)] {
        let holds = holds_behind_a_span(&cluster, &volume, targets, least).holds;
        for (_, hold) in holds {
            assert_eq!(hold.coordinator, NodeNo(1));
            assert!(hold.reason.contains(procedure), "{}", hold.reason);
        }
        cluster.delete_snapshot("v@s");
    }
}

/// The clock of a server: that of a ticket on a volume on which nothing happens.
fn clock(peer: &Peer, idle: &VolumeInfo, ticket: u64) -> Stamp {
    let ready = peer.order(idle.id, ticket, prepare(idle, Procedure::Stamp));
    assert_eq!(peer.order(idle.id, ticket, Order::Release), Answer::Expired);
    let Answer::ReadyAt { now, .. } = ready else {
        panic!("{ready:?}");
    };
    now
}

fn in_snapshot(peer: &Peer, volume: &VolumeInfo, at: u64) -> bool {
    let mut read = Frame::request(Kind::Read, volume.id);
    (read.snapshot, read.epoch) = (SNAPSHOT, volume.epoch);
    (read.page, read.len_bytes) = (PageNo(u32::try_from(at / PAGE).unwrap()), 512);
    read.offset_bytes = u32::try_from(at % PAGE).unwrap();
    let reply = peer.call(read);
    assert_eq!(reply.status, Status::Ok);
    reply.payload.into_bytes().contains(&7)
}

/// S003-41, 42, 44, the golden trace of FIG. 8: 130 and 132 are executed before prepare, 136 and 134
/// before T and 138 after it. The snapshot has 130, 132, 136 and 134, and not 138. Who has taken at T
/// gives no earlier stamp any more.
#[test]
fn fig_8_has_130_132_136_and_134_but_not_138() {
    let cluster = Cluster::three();
    let volume = cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    let idle = cluster.create_on("idle", 64 * PAGE, PAGE_BLOCKS, &[]);
    let peers: Vec<Peer> = (0..3).map(|index| Peer::connect(&cluster, index)).collect();
    let home: Vec<u64> = (1..=3).map(|n| page_of(&cluster, "v", n)).collect();
    let mut connections: Vec<NbdConnection> = (0..3).map(|n| cluster.nbd(n, "v")).collect();
    let mut write = |server: usize, block: u64| {
        let at = home[server] + block * 4096;
        connections[server].write(at, &[7; 4096]).unwrap();
        (server, at)
    };
    let (r130, r132) = (write(0, 0), write(1, 0));
    let ready = |peer: &Peer| peer.order(volume.id, 1, prepare(&volume, Procedure::Stamp));
    let ready: Vec<Answer> = peers.iter().map(ready).collect();
    let (r136, r134) = (write(1, 1), write(2, 1));
    sleep(Duration::from_millis(5));
    let at = clock(&peers[0], &idle, 2);
    sleep(Duration::from_millis(5));
    let r138 = write(0, 2);
    let far = Stamp(at.0 + (3000 << COUNT_BITS));
    for (peer, ready) in peers.iter().zip(ready) {
        let Answer::ReadyAt { incarnation, now } = ready else {
            panic!("{ready:?}");
        };
        assert!(now < at);
        let take = Order::TakeAt { incarnation, at };
        assert_eq!(peer.order(volume.id, 1, take), Answer::Taken);
    }
    for (name, (server, at), is_in) in [
        (130, r130, true),
        (132, r132, true),
        (136, r136, true),
        (134, r134, true),
        (138, r138, false),
    ] {
        assert_eq!(in_snapshot(&peers[server], &volume, at), is_in, "{name}");
    }
    let ready = peers[1].order(idle.id, 3, prepare(&idle, Procedure::Stamp));
    let Answer::ReadyAt { incarnation, now } = ready else {
        panic!("{ready:?}");
    };
    assert!(now < far);
    let take = Order::TakeAt {
        incarnation,
        at: far,
    };
    assert_eq!(peers[1].order(idle.id, 3, take), Answer::Taken);
    assert!(clock(&peers[1], &idle, 4) > far, "the clock was not raised");
}
