//! Every hold is listed with its owner, its reason and, if it has one, its deadline.

use super::move_kills::wait_phase;
use blockd::admin::{AdminReply, AdminRequest, HoldInfo, HoldsInfo, SnapshotName, VolumeInfo};
use blockd::client::ClientError;
use blockd::id::{NodeNo, PageNo};
use blockd::io::wire::{Frame, Kind, Status, flags};
use blockd::limits::MOVE_HOLD_MAX_MS;
use blockd_tests::{Cluster, MIB, Peer};
use bytes::Bytes;
use std::thread::{JoinHandle, spawn};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

/// The hold of `v` whose reason has these words.
fn wait_hold(cluster: &Cluster, words: &str) -> HoldInfo {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let holds = cluster.holds_at(0).holds;
        let mut of_volume = holds.iter().filter(|(volume, _)| volume == "v");
        if let Some((_, hold)) = of_volume.find(|(_, hold)| hold.reason.contains(words)) {
            return hold.clone();
        }
        assert!(Instant::now() < deadline, "no {words:?} in {holds:?}");
    }
}

fn wait_none(cluster: &Cluster) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let holds = cluster.holds_at(0);
        if holds == HoldsInfo::default() {
            return;
        }
        assert!(Instant::now() < deadline, "{holds:?}");
    }
}

/// A change over several pages of a server that has begun there and does not end.
struct OpenSpan<'a> {
    peer: Peer<'a>,
    volume: VolumeInfo,
}

impl<'a> OpenSpan<'a> {
    fn of(cluster: &'a Cluster, index: usize, volume: &VolumeInfo) -> Self {
        let peer = Peer::connect(cluster, index);
        let volume = volume.clone();
        Self { peer, volume }
    }

    fn frame(&self, kind: Kind) -> Frame {
        let mut frame = Frame::request(kind, self.volume.id);
        (frame.aux, frame.epoch) = (5, self.volume.epoch);
        frame
    }

    fn begin(&self) -> Status {
        self.peer.status(self.frame(Kind::SpanBegin))
    }

    fn end(&self) {
        assert_eq!(self.peer.status(self.frame(Kind::SpanEnd)), Status::Ok);
    }

    /// Begins as soon as a snapshot that is taken from now on lets it; false if a rollback behind that
    /// snapshot was quicker.
    fn begin_behind_a_snapshot(&self) -> bool {
        let mut was_held = false;
        let deadline = Instant::now() + PATIENCE;
        loop {
            match (self.begin(), was_held) {
                (Status::Ok, true) => return true,
                (Status::Stale, _) => return false,
                (Status::Ok, false) => self.end(),
                (Status::Held, _) => was_held = true,
                (other, _) => panic!("{other:?}"),
            }
            assert!(Instant::now() < deadline, "no snapshot is taken");
        }
    }
}

/// a move that waits for what began before it holds changes of its pages; the list says so, whose it
/// is and how much of the bound is left.
#[test]
fn a_move_hold_is_listed_with_its_deadline() {
    let cluster = Cluster::three();
    let volume = cluster.create_on("v", 8 * MIB, 8192, &[1]);
    cluster.nbd(0, "v").write(0, &[1; 4096]).unwrap();
    let span = OpenSpan::of(&cluster, 0, &volume);
    assert_eq!(span.begin(), Status::Ok);
    cluster.blockctl("page move v all --to 2 --no-wait");
    let hold = wait_hold(&cluster, "pages 0 to 1 change their owner");
    let by = (hold.server, hold.coordinator);
    assert_eq!(by, (NodeNo(1), NodeNo(1)), "{hold:?}");
    assert!(hold.left_ms.is_some_and(|ms| ms <= MOVE_HOLD_MAX_MS));
    assert!(hold.reason.contains("changes of them wait"), "{hold:?}");
    span.end();
    wait_phase(&cluster, "v", "done");
    wait_none(&cluster);
}

/// after the seal a hold has no deadline of its own, as only the registry can say whose the pages are.
/// The list says that, and does not call the hold over.
#[test]
fn a_hold_that_only_the_registry_ends_has_no_deadline() {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 8 * MIB, 8192, &[1]);
    cluster.nbd(0, "v").write(0, &[1; 4096]).unwrap();
    cluster.servers[0].kill();
    cluster.servers[0].environment = vec![("BLOCKD_CRASH_AT".to_owned(), "move-sealed".to_owned())];
    cluster.servers[0].start();
    cluster.wait_writable();
    cluster.blockctl("page move v all --to 2 --no-wait");
    cluster.servers[0].wait_end();
    cluster.servers[0].environment.clear();
    // Alone it has no majority that could tell.
    for server in &mut cluster.servers[1..] {
        server.kill();
    }
    cluster.servers[0].start();
    let hold = wait_hold(&cluster, "until the registry says whose they are");
    assert_eq!(hold.left_ms, None, "{hold:?}");
    let text = cluster.blockctl("io holds");
    assert!(text.contains("server 2 did not answer"), "{text}");
    let json: serde_json::Value =
        serde_json::from_str(&cluster.blockctl("io holds --json")).unwrap();
    assert_eq!(json["holds"][0]["left_ms"], serde_json::Value::Null);
    for server in &mut cluster.servers[1..] {
        server.start();
    }
    wait_phase(&cluster, "v", "done");
    wait_none(&cluster);
}

/// a rollback that waits for a change over several pages which began before it holds all others; the
/// list says so, with the write that waits. It has no deadline: it ends with that change.
#[test]
fn a_rollback_hold_is_listed() {
    let cluster = Cluster::three();
    cluster.create_on("v", 8 * MIB, 8192, &[2]);
    // The owner itself has the former table; the others wait for it with the new one.
    let mut writer = cluster.nbd(1, "v");
    writer.write(0, &[1; 4096]).unwrap();
    cluster.snapshot("v@s");
    let (span, rolling) = overtaken_span(&cluster);
    wait_hold(&cluster, "rollback to snapshot");
    let writing = spawn(move || writer.write(0, &[2; 4096]).unwrap());
    let hold = wait_waiting(&cluster);
    let by = (hold.server, hold.coordinator, hold.left_ms);
    assert_eq!(by, (NodeNo(2), NodeNo(2), None), "{hold:?}");
    assert!(hold.reason.contains("rollback to snapshot 1"), "{hold:?}");
    assert!(!writing.is_finished() && !rolling.is_finished());
    assert_eq!(span.peer.status(part(&span)), Status::Ok, "it may end");
    span.end();
    let rolled_back = rolling.join().unwrap();
    let is_done = matches!(rolled_back, Ok(AdminReply::RolledBack(_)));
    assert!(is_done, "{rolled_back:?}");
    writing.join().unwrap();
    wait_none(&cluster);
    assert_eq!(cluster.nbd(0, "v").read(0, 4096).unwrap(), [2; 4096]);
    assert_eq!(cluster.nbd(0, "v").read(4096, 512).unwrap(), [0; 512]);
}

type Rolling = JoinHandle<Result<AdminReply, ClientError>>;

/// A span that began between the safety snapshot of a rollback and the rollback itself, which waits for it.
fn overtaken_span(cluster: &Cluster) -> (OpenSpan<'_>, Rolling) {
    for _ in 0..50 {
        let span = OpenSpan::of(cluster, 1, &cluster.show("v"));
        let (client, handle) = (cluster.client_of(&[0]), cluster.handle());
        let target = SnapshotName {
            volume: "v".to_owned(),
            snapshot: "s".to_owned(),
        };
        let request = AdminRequest::SnapshotRollback { target };
        let rolling = spawn(move || handle.block_on(client.admin(request)));
        if span.begin_behind_a_snapshot() {
            return (span, rolling);
        }
        rolling.join().unwrap().unwrap();
    }
    panic!("every rollback was quicker");
}

/// The hold, once a write waits for it.
fn wait_waiting(cluster: &Cluster) -> HoldInfo {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let hold = wait_hold(cluster, "rollback to snapshot");
        if hold.waiting == 1 {
            return hold;
        }
        assert!(Instant::now() < deadline, "{hold:?}");
    }
}

/// What the span changes: it is before the rollback, which takes it back.
fn part(span: &OpenSpan<'_>) -> Frame {
    let mut part = span.frame(Kind::Write);
    (part.flags, part.page, part.offset_bytes) = (flags::SPAN, PageNo(0), 4096);
    (part.len_bytes, part.payload) = (512, Bytes::from(vec![7; 512]).into());
    part
}
