//! Writes over pages of several owners: agreed before they are sent, whole in every snapshot.

use super::chains::{Load, PAGE, PAGE_BLOCKS, write_spans};
use blockd::control::snapshot::Procedure;
use blockd::id::{Epoch, PageNo, VolumeId};
use blockd::io::link::{SpanList, encode_control};
use blockd::io::wire::{Frame, Kind, Status, flags};
use blockd_tests::nbd_raw::{Address, Endpoint, Mode, RawNbd, wire};
use blockd_tests::{Cluster, MIB, Peer};
use rustix::process::Signal;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

fn spanners(cluster: &Cluster, volume: &'static str, through: &[Option<usize>]) -> Load {
    let stop = Arc::new(AtomicBool::new(false));
    let spans = (1..).step_by(3).zip(through);
    let spanners = spans
        .map(|(page, through)| write_spans(cluster, volume, page * PAGE, *through, &stop))
        .collect();
    Load {
        stop,
        writers: vec![],
        spanners,
    }
}

/// Review e3: the spans of two volumes that one client writes at the same time share connections
/// and must not be taken for each other: no write fails, no snapshot of one has half a span.
#[test]
fn spans_of_two_volumes_of_one_client_are_kept_apart() {
    let cluster = Cluster::three();
    cluster.create_on("v", 16 * PAGE, PAGE_BLOCKS, &[]);
    cluster.create_on("w", 16 * PAGE, PAGE_BLOCKS, &[]);
    let snapped = spanners(&cluster, "v", &[None; 4]);
    let other = spanners(&cluster, "w", &[None; 4]);
    for number in 0..40 {
        let name = format!("s{number}");
        let before = snapped.marks();
        cluster
            .snapshot_at(number % 3, &[&format!("v@{name}")])
            .unwrap();
        let after = snapped.marks();
        snapped.check(&cluster, number % 3, &name, &before, &after);
        snapped.check_running();
        other.check_running();
    }
    let written: u64 = [&snapped, &other]
        .iter()
        .flat_map(|load| load.marks())
        .map(|(acknowledged, _)| acknowledged)
        .sum();
    snapped.finish();
    other.finish();
    eprintln!("spans of two volumes: 40 snapshots under {written} spanning writes");
    assert!(written > 400, "{written}: no real load");
}

fn span_frame(kind: Kind, volume: VolumeId, span: u64, epoch: Epoch) -> Frame {
    let mut frame = Frame::request(kind, volume);
    (frame.aux, frame.epoch) = (span, epoch);
    frame
}

fn span_part(volume: VolumeId, span: u64, epoch: Epoch, page: u32) -> Frame {
    let mut frame = span_frame(Kind::Write, volume, span, epoch);
    frame.flags = flags::SPAN;
    (frame.page, frame.len_bytes) = (PageNo(page), 512);
    frame.payload = bytes::Bytes::from(vec![7; 512]).into();
    frame
}

/// Review E2 and E3: an owner refuses an id that is in use, and answers `Held` to a part of a span that
/// it does not know (so that it is begun again). S003-33: a span outlives its connection for a moment, so
/// that its requester can go on with it over another one before a snapshot has half of it; what a dead
/// requester has begun keeps no snapshot from being taken after that.
#[test]
fn spans_outlive_their_connection_for_a_moment() {
    let cluster = Cluster::three();
    let volume = cluster.create_on("v", 16 * PAGE, PAGE_BLOCKS, &[1]);
    let other = cluster.create_on("w", 16 * PAGE, PAGE_BLOCKS, &[1]);
    let peer = Peer::connect(&cluster, 0);
    let begin = |id| span_frame(Kind::SpanBegin, volume.id, id, volume.epoch);
    assert_eq!(peer.status(begin(5)), Status::Ok);
    assert_eq!(peer.status(begin(5)), Status::Malformed);
    let of_other = span_frame(Kind::SpanBegin, other.id, 5, other.epoch);
    assert_eq!(peer.status(of_other), Status::Ok, "ids are per volume");
    let part = |id| span_part(volume.id, id, volume.epoch, 0);
    assert_eq!(peer.status(part(5)), Status::Ok);
    assert_eq!(peer.status(part(6)), Status::Held, "never begun");
    assert_eq!(
        Peer::connect(&cluster, 0).status(part(5)),
        Status::Held,
        "begun over another connection"
    );
    let end = span_frame(Kind::SpanEnd, other.id, 5, other.epoch);
    assert_eq!(peer.status(end), Status::Ok);
    let ended = span_part(other.id, 5, other.epoch, 0);
    assert_eq!(peer.status(ended), Status::Held, "ended");
    cluster.snapshot_at(1, &["w@s"]).unwrap();
    let open = cluster.snapshot_at(1, &["v@early"]);
    assert!(open.is_err(), "taken although a span is open: {open:?}");
    drop(peer);
    let peer = Peer::connect(&cluster, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| cluster.snapshot_at(1, &["v@whole"]).unwrap());
        await_hold(&peer, &volume, 100);
        assert_eq!(peer.status(begin(5)), Status::Ok, "it goes on");
        assert_eq!(peer.status(part(5)), Status::Ok);
        let end = span_frame(Kind::SpanEnd, volume.id, 5, volume.epoch);
        assert_eq!(peer.status(end), Status::Ok);
    });
    assert_eq!(peer.status(begin(7)), Status::Ok);
    assert_eq!(peer.status(part(7)), Status::Ok);
    drop(peer);
    let lost = Instant::now();
    while let Err(open) = cluster.snapshot_at(1, &["v@s"]) {
        assert!(
            lost.elapsed() < Duration::from_secs(10),
            "a dead requester's span holds the snapshot: {open:?}"
        );
    }
    assert_eq!(cluster.nbd(2, "v@s").read(0, 512).unwrap(), [7; 512]);
}

/// Review e8: writes that a snapshot holds, more of one server than a connection may have in
/// flight, do not keep the orders of that same snapshot from the owner: it is taken once the last
/// owner is ready, and all writes end well.
#[test]
fn held_writes_do_not_stand_in_the_way_of_the_snapshot() {
    const CONNECTIONS: u64 = 16;
    const WRITES: u64 = 120;
    let cluster = Cluster::three();
    let volume = cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[2, 3]);
    let route = cluster.route(0, "v");
    let crowded = route.runs.iter().find(|run| run.owner.0 == 2).unwrap();
    let at = u64::from(crowded.first_page) * PAGE;
    let slow = Peer::connect(&cluster, 2);
    let begin = span_frame(Kind::SpanBegin, volume.id, 1, volume.epoch);
    assert_eq!(slow.status(begin), Status::Ok);
    let mut writers: Vec<_> = (0..CONNECTIONS).map(|_| cluster.nbd(0, "v")).collect();
    let client = cluster.client_of(&[0]);
    let taking = cluster.handle().spawn(async move {
        use blockd::admin::{AdminRequest, SnapshotName};
        let target = SnapshotName {
            volume: "v".to_owned(),
            snapshot: "s".to_owned(),
        };
        let request = AdminRequest::SnapshotCreateBy {
            targets: vec![target],
            procedure: Procedure::Hold,
        };
        client.admin(request).await
    });
    await_hold(&Peer::connect(&cluster, 1), &volume, 1);
    for (number, writer) in (0..).zip(&mut writers) {
        for write in 0..WRITES {
            let data = [number as u8 + 1; 512];
            let offset = at + (number * WRITES + write) % u64::from(PAGE_BLOCKS) * 512;
            writer.send_write(offset, &data).unwrap();
        }
    }
    let end = span_frame(Kind::SpanEnd, volume.id, 1, volume.epoch);
    assert_eq!(slow.status(end), Status::Ok);
    let ended = Instant::now();
    let taken = cluster.block(taking).unwrap();
    let took = ended.elapsed();
    eprintln!("snapshot behind {} writes: {took:?}", CONNECTIONS * WRITES);
    for writer in &mut writers {
        for _ in 0..WRITES {
            writer.next_reply().unwrap();
        }
    }
    taken.unwrap();
    assert!(took < Duration::from_secs(5), "ended after {took:?}");
}

/// Waits until a snapshot holds the volume where this peer is connected; tries with ids from the first on.
fn await_hold(peer: &Peer, volume: &blockd::admin::VolumeInfo, first_id: u64) {
    let deadline = Instant::now() + Duration::from_secs(5);
    for id in first_id.. {
        let begin = span_frame(Kind::SpanBegin, volume.id, id, volume.epoch);
        match peer.status(begin) {
            Status::Held => return,
            status => assert_eq!(status, Status::Ok),
        }
        let end = span_frame(Kind::SpanEnd, volume.id, id, volume.epoch);
        assert_eq!(peer.status(end), Status::Ok);
        assert!(Instant::now() < deadline, "no snapshot holds the volume");
    }
}

/// Review on S003-33 and U-09: owners are killed while writes over two of them go on through servers and the
/// library, again and again; each write ends well, and every snapshot that came to be has both
/// parts of a write or none.
#[test]
fn spans_are_whole_when_an_owner_dies_between_the_parts() {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 16 * PAGE, PAGE_BLOCKS, &[2, 3]);
    let load = spanners(&cluster, "v", &[Some(0), None, Some(0), None]);
    let mut marks = BTreeMap::new();
    for round in 0..16 {
        let name = format!("s{round}");
        let before = load.marks();
        let victim = 1 + round % 2;
        cluster.servers[victim].kill();
        let taking = {
            let client = cluster.client_of(&[0]);
            let targets = vec![blockd::admin::SnapshotName {
                volume: "v".to_owned(),
                snapshot: name.clone(),
            }];
            let request = blockd::admin::AdminRequest::SnapshotCreate { targets };
            let taking = async move { client.admin(request).await };
            cluster.handle().spawn(taking)
        };
        cluster.servers[victim].start();
        // Refused or taken: only what exists is judged.
        let _answer = cluster.block(taking).unwrap();
        load.check_running();
        let late = format!("late{round}");
        cluster.wait_writable();
        cluster.snapshot_at(0, &[&format!("v@{late}")]).unwrap();
        let after = load.marks();
        marks.insert(name, (before.clone(), after.clone()));
        marks.insert(late, (before, after));
    }
    let existing: Vec<String> = cluster
        .snapshots("v")
        .into_iter()
        .map(|info| info.name)
        .collect();
    for name in &existing {
        let (before, after) = &marks[name];
        for server in 0..3 {
            load.check(&cluster, server, name, before, after);
        }
    }
    let moved = load.marks();
    load.finish();
    eprintln!("spans and kills: {} snapshots, {moved:?}", existing.len());
    assert!(existing.len() >= 16, "{existing:?}");
    assert!(moved.iter().all(|(done, _)| *done > 16), "{moved:?}");
}

/// A span whose second owner is down is not given up: the request ends well when it returns, and
/// meanwhile the owner that has its part takes no snapshot with half of it.
#[test]
fn a_half_done_span_waits_for_its_owner() {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 4 * MIB, 2048, &[2, 3]);
    cluster.servers[2].kill();
    let mut connection = cluster.nbd(0, "v");
    let route = cluster.route(0, "v");
    let boundary = u64::from(route.runs[1].first_page) * MIB;
    let data = vec![3; 8192];
    let cookie = connection.send_write(boundary - 4096, &data).unwrap();
    let early = cluster.snapshot_at(0, &["v@early"]);
    assert!(early.is_err(), "an owner is down: {early:?}");
    cluster.servers[2].start();
    assert_eq!(connection.next_reply().unwrap(), cookie);
    cluster.wait_writable();
    cluster.snapshot("v@s");
    let found = cluster.nbd(1, "v@s").read(boundary - 4096, 8192).unwrap();
    assert!(found == data, "half of the write is missing");
}

/// S003-33: an owner that is killed between two parts of a span, which nobody else has a part of, takes no
/// snapshot with half of it after its restart: the requester goes on with the same id, or says that it
/// needs nothing more of it.
#[test]
fn a_span_that_was_interrupted_by_a_kill_is_whole_or_ended() {
    let mut cluster = Cluster::three();
    let volume = cluster.create_on("v", 16 * PAGE, PAGE_BLOCKS, &[1]);
    let begin = |id| span_frame(Kind::SpanBegin, volume.id, id, volume.epoch);
    let part = |id, page| span_part(volume.id, id, volume.epoch, page);
    let interrupt = |cluster: &mut Cluster, id| {
        let peer = Peer::connect(cluster, 0);
        assert_eq!(peer.status(begin(id)), Status::Ok);
        assert_eq!(peer.status(part(id, 0)), Status::Ok);
        // While the connection is open: with its end the span would end.
        cluster.servers[0].signal(Signal::KILL);
        drop(peer);
        cluster.servers[0].kill();
        cluster.servers[0].start();
        cluster.wait_writable();
        let early = cluster.snapshot_at(1, &["v@early"]).unwrap_err();
        assert!(early.to_string().contains("interrupted"), "{early}");
    };
    // A span that has ended in good order is not taken for an interrupted one.
    let peer = Peer::connect(&cluster, 0);
    assert_eq!(peer.status(begin(6)), Status::Ok);
    let end = |id| span_frame(Kind::SpanEnd, volume.id, id, volume.epoch);
    assert_eq!(peer.status(end(6)), Status::Ok);
    drop(peer);
    cluster.nbd(0, "v").flush().unwrap();
    cluster.servers[0].kill();
    cluster.servers[0].start();
    cluster.wait_writable();
    cluster.snapshot_at(1, &["v@ended"]).unwrap();

    interrupt(&mut cluster, 7);
    let peer = Peer::connect(&cluster, 0);
    assert_eq!(peer.status(begin(7)), Status::Ok);
    assert_eq!(peer.status(part(7, 1)), Status::Ok);
    let open = cluster.snapshot_at(1, &["v@early"]);
    assert!(open.is_err(), "it goes on: {open:?}");
    assert_eq!(peer.status(end(7)), Status::Ok);
    drop(peer);
    cluster.snapshot_at(1, &["v@whole"]).unwrap();
    for page in [0, PAGE] {
        let found = cluster.nbd(2, "v@whole").read(page, 512).unwrap();
        assert_eq!(found, [7; 512]);
    }

    interrupt(&mut cluster, 8);
    let peer = Peer::connect(&cluster, 0);
    let mut list = Frame::request(Kind::SpanEnd, VolumeId(0));
    let [first, next, open] = [1, 9, 8];
    let open = [open].into();
    list.payload = encode_control(&SpanList { first, next, open });
    assert_eq!(peer.status(list.clone()), Status::Ok);
    let kept = cluster.snapshot_at(1, &["v@early"]);
    assert!(
        kept.is_err(),
        "its requester says that it goes on: {kept:?}"
    );
    let open = [].into();
    list.payload = encode_control(&SpanList { first, next, open });
    assert_eq!(peer.status(list), Status::Ok);
    cluster.snapshot_at(1, &["v@given_up"]).unwrap();
}

/// Bytes that one server may grow by while it zeroes a whole volume.
const GROWTH_BYTES_MAX: u64 = 64 * MIB;

/// Review: a TRIM or WRITE_ZEROES of a whole large volume costs the memory of a piece of it, and
/// others are served before it ends.
#[test]
fn zeroing_a_whole_large_volume_leaves_memory_and_others_alone() {
    const SIZE: u64 = 4 << 40;
    let cluster = Cluster::three();
    cluster.create("large", SIZE);
    cluster.create("other", 16 * MIB);
    let at = Address::Tcp(cluster.servers[0].nbd_address());
    let mut raw = RawNbd::opened(&Endpoint::new(at, "large"), Mode::Extended);
    let mut other = cluster.nbd(0, "other");
    let before: Vec<u64> = resident(&cluster);
    for kind in [wire::TRIM, wire::ZEROES] {
        for at in [0, SIZE / 2 - 4096, SIZE - 8192] {
            assert_eq!(raw.write(0, at, &[7; 8192]), 0);
        }
        let asked = raw.send(kind, 0, 0, SIZE);
        let zeroing = std::thread::spawn(move || {
            assert_eq!(raw.reply(&asked).errno, 0);
            raw
        });
        let (mut served, mut peak) = (0, before.clone());
        while !zeroing.is_finished() {
            other.write(served % 4096 * 512, &[1; 512]).unwrap();
            served += 1;
            for (peak, now) in peak.iter_mut().zip(resident(&cluster)) {
                *peak = now.max(*peak);
            }
        }
        raw = zeroing.join().unwrap();
        for at in [0, SIZE / 2 - 4096, SIZE - 8192] {
            assert!(raw.read(at, 8192) == [0; 8192], "not zeroed at {at}");
        }
        let grown = before.iter().zip(&peak).map(|(before, peak)| peak - before);
        let grown = grown.max().unwrap();
        eprintln!(
            "command {kind}: {served} writes meanwhile, {} KiB more",
            grown >> 10
        );
        assert!(served > 10, "{served} writes were served meanwhile");
        assert!(grown < GROWTH_BYTES_MAX, "{} MiB more", grown / MIB);
    }
}

fn resident(cluster: &Cluster) -> Vec<u64> {
    let servers = cluster.servers.iter();
    servers.map(|server| server.resident_bytes()).collect()
}
