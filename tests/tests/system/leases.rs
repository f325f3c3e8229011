//! Exclusive writer leases: never two writers, whatever dies or stops.

use blockd::admin::{AdminErrorKind, AdminReply, AdminRequest, LeaseInfo, VolumeInfo};
use blockd::client::{ClientError, HolderText, Lease, Volume};
use blockd::control::registry::LeaseState;
use blockd::id::{LeaseEpoch, PageNo, RouteRun};
use blockd::io::wire::{Frame, Kind, Status};
use blockd_tests::{Cluster, MIB, NbdConnection, NbdError, Peer};
use bytes::Bytes;
use std::io::{BufRead, BufReader, Lines};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Pages of 1 MiB, one after the other on nodes 1, 2 and 3.
const PAGE_BLOCKS: u32 = 2048;
const PAGES: u64 = 6;
const TTL: Duration = Duration::from_secs(2);
const LONG: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(60);

fn cluster() -> Cluster {
    let cluster = Cluster::three();
    cluster.create_on("v", PAGES * MIB, PAGE_BLOCKS, &[1, 2, 3]);
    cluster
}

fn holder(purpose: &str) -> HolderText {
    HolderText {
        host: "h1".to_owned(),
        pid: 42,
        purpose: purpose.to_owned(),
    }
}

fn lease(cluster: &Cluster, volume: &Volume, purpose: &str) -> Lease {
    let acquired = volume.acquire_exclusive(holder(purpose), LONG);
    cluster.block(acquired).unwrap()
}

fn write(cluster: &Cluster, volume: &Volume, page: u64, value: u8) -> Result<(), ClientError> {
    let data = Bytes::from(vec![value; 4096]);
    cluster.block(volume.write(page * MIB, data))
}

fn show(cluster: &Cluster) -> LeaseInfo {
    let volume = "v".to_owned();
    match cluster.admin(AdminRequest::LeaseShow { volume }).unwrap() {
        AdminReply::Lease(info) => info,
        other => panic!("{other:?}"),
    }
}

fn break_lease(cluster: &Cluster) -> LeaseInfo {
    let volume = "v".to_owned();
    match cluster.admin(AdminRequest::LeaseBreak { volume }).unwrap() {
        AdminReply::Lease(info) => info,
        other => panic!("{other:?}"),
    }
}

/// Index of the owner of each page.
fn owners(cluster: &Cluster) -> Vec<usize> {
    let route = cluster.route(0, "v");
    let of = |run: &RouteRun| vec![usize::from(run.owner.0) - 1; run.page_count as usize];
    route.runs.iter().flat_map(of).collect()
}

/// Pages of one owner.
fn pages_of(owners: &[usize], index: usize) -> impl Iterator<Item = u64> {
    (0..PAGES)
        .zip(owners)
        .filter_map(move |(page, owner)| (*owner == index).then_some(page))
}

/// A write of the first bytes of a page, straight to its owner, under a lease epoch.
fn raw_write(peer: &Peer<'_>, volume: &VolumeInfo, page: u64, lease: LeaseEpoch) -> Frame {
    let mut frame = Frame::request(Kind::Write, volume.id);
    frame.epoch = volume.epoch;
    (frame.page, frame.len_bytes) = (PageNo(page as u32), 512);
    frame.payload = Bytes::from(vec![0xbb; 512]).into();
    frame.set_lease(lease);
    peer.call(frame)
}

fn first_bytes(cluster: &Cluster) -> Vec<u8> {
    let mut nbd = cluster.nbd(1, "v");
    (0..PAGES)
        .map(|page| nbd.read(page * MIB, 4096).unwrap()[0])
        .collect()
}

/// While one client holds the lease, every page refuses every other writer, through every server
/// and over every way, and names the holder; reads, snapshots and growth go on; shrinking and
/// deleting are refused. After the release everybody writes again.
#[test]
fn a_lease_keeps_every_other_writer_out() {
    let cluster = cluster();
    let mut nbd: Vec<NbdConnection> = (0..3).map(|index| cluster.nbd(index, "v")).collect();
    let (ours, other) = (cluster.open("v"), cluster.client_of(&[2]));
    let other = cluster.block(other.open("v")).unwrap();
    write(&cluster, &other, 0, 1).unwrap();
    let held = lease(&cluster, &ours, "attach /dev/nbd0");
    for connection in &mut nbd {
        for page in 0..PAGES {
            let refused = connection.write(page * MIB, &[2; 4096]);
            assert!(matches!(refused, Err(NbdError::Errno(1))), "{refused:?}");
            assert!(connection.trim(page * MIB, 4096).is_err());
            connection.read(page * MIB, 4096).unwrap();
        }
        assert!(connection.write(MIB - 4096, &[2; 8192]).is_err(), "a span");
        connection.flush().unwrap();
    }
    for page in 0..PAGES {
        write(&cluster, &ours, page, 3).unwrap();
        match write(&cluster, &other, page, 4).unwrap_err() {
            ClientError::Fenced { reason, .. } => {
                assert!(
                    reason.contains("h1 (process 42, attach /dev/nbd0)"),
                    "{reason}"
                );
            }
            error => panic!("{error}"),
        }
    }
    cluster
        .block(ours.write(MIB - 4096, Bytes::from(vec![3; 8192])))
        .unwrap();
    cluster
        .block(ours.zero(2 * MIB + 8192, 3 * MIB, false))
        .unwrap();
    let conflict = cluster.block(other.acquire_exclusive(holder("other"), LONG));
    let conflict = conflict.unwrap_err().to_string();
    assert!(
        conflict.contains("h1 (process 42, attach /dev/nbd0) since 20"),
        "{conflict}"
    );
    cluster.snapshot("v@s");
    let resize = |size_bytes| AdminRequest::VolumeResize {
        name: "v".to_owned(),
        size_bytes,
        allow_shrink: true,
    };
    cluster.admin(resize((PAGES + 2) * MIB)).unwrap();
    assert_eq!(cluster.refused(resize(MIB)).kind, AdminErrorKind::Conflict);
    cluster.delete_snapshot("v@s");
    let name = "v".to_owned();
    let refused = cluster.refused(AdminRequest::VolumeDelete { name: name.clone() });
    assert!(refused.message.contains("h1 (process 42"), "{refused}");
    cluster.block(held.release()).unwrap();
    assert_eq!(show(&cluster).state, LeaseState::Free);
    for connection in &mut nbd {
        (0..PAGES).for_each(|page| connection.write(page * MIB, &[5; 4096]).unwrap());
    }
    write(&cluster, &other, 1, 6).unwrap();
    write(&cluster, &ours, 1, 7).unwrap();
    cluster.admin(AdminRequest::VolumeDelete { name }).unwrap();
}

/// The process of `lease-writer`, killed when dropped.
struct Writer {
    process: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Writer {
    fn start(cluster: &Cluster) -> Self {
        let mut process = Command::new(env!("CARGO_BIN_EXE_lease-writer"))
            .args([&cluster.server_list(), "v", &TTL.as_millis().to_string()])
            .args([&MIB.to_string(), &PAGES.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        Self { process, lines }
    }

    /// The rest of the next line, which begins with this word.
    fn expect(&mut self, word: &str) -> String {
        let line = self.lines.next().unwrap().unwrap();
        let rest = line.strip_prefix(word);
        rest.unwrap_or_else(|| panic!("{line:?} instead of {word}"))
            .trim()
            .to_owned()
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, signal).unwrap();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _gone = self.process.kill();
        let _gone = self.process.wait();
    }
}

/// A holder is stopped in the middle of its writes until its lease has expired and another one has
/// it. When it goes on, every owner refuses what it had under way, and it learns that from its
/// lease; nothing of it reaches the volume.
#[test]
fn the_late_writes_of_a_stopped_holder_reach_no_owner() {
    let cluster = cluster();
    let mut first = Writer::start(&cluster);
    let epoch: LeaseEpoch = LeaseEpoch(first.expect("held").parse().unwrap());
    first.expect("writing");
    first.signal(rustix::process::Signal::STOP);
    let second = cluster.open("v");
    let waiting = second.wait_exclusive(holder("second"), LONG, PATIENCE);
    let held = cluster.block(waiting).unwrap();
    assert!(held.info().epoch > epoch);
    (0..PAGES).for_each(|page| write(&cluster, &second, page, 7).unwrap());
    first.signal(rustix::process::Signal::CONT);
    for _ in 0..PAGES {
        let reason = first.expect("fenced");
        assert!(reason.contains("h1 (process 42, second)"), "{reason}");
    }
    first.expect("lost");
    assert_eq!(first.process.wait().unwrap().code(), Some(3));
    let (owners, volume) = (owners(&cluster), cluster.show("v"));
    for index in 0..3 {
        let peer = Peer::connect(&cluster, index);
        for page in pages_of(&owners, index) {
            for stale in [epoch, LeaseEpoch(epoch.0 + 1), LeaseEpoch(0)] {
                let reply = raw_write(&peer, &volume, page, stale);
                assert_eq!(reply.status, Status::Leased, "{}", reply.text());
            }
        }
    }
    assert_eq!(first_bytes(&cluster), [7; PAGES as usize]);
}

/// Owners and the registry's leader are killed while a lease is held and another client wants it:
/// the holder goes on, restarted owners refuse everybody else from their first answer on. Then the
/// holder is killed together with the leader, and the other one gets it in time.
#[test]
fn a_lease_outlives_owners_and_the_leader_but_not_its_holder() {
    let mut cluster = cluster();
    let mut first = Writer::start(&cluster);
    let epoch = first.expect("held");
    first.expect("writing");
    let (owners, volume) = (owners(&cluster), cluster.show("v"));
    for victim in 0..3 {
        cluster.servers[victim].kill();
        cluster.servers[victim].start();
        let peer = Peer::connect(&cluster, victim);
        let deadline = Instant::now() + PATIENCE;
        for page in pages_of(&owners, victim) {
            loop {
                let reply = raw_write(&peer, &volume, page, LeaseEpoch(0));
                match reply.status {
                    Status::Leased => break,
                    Status::Unavailable => assert!(Instant::now() < deadline),
                    status => panic!("{status:?}: {}", reply.text()),
                }
            }
        }
        drop(peer);
        cluster.wait_writable();
        assert_eq!(show(&cluster).epoch.to_string(), epoch);
        let second = cluster.open("v");
        let taken = cluster.block(second.acquire_exclusive(holder("second"), LONG));
        assert!(matches!(taken, Err(ClientError::Leased(_))), "{taken:?}");
    }
    let leader = leader(&cluster);
    drop(first);
    cluster.servers[leader].kill();
    cluster.servers[leader].start();
    let second = cluster.open("v");
    let waiting = second.wait_exclusive(holder("second"), LONG, PATIENCE);
    let held = cluster.block(waiting).unwrap();
    (0..PAGES).for_each(|page| write(&cluster, &second, page, 9).unwrap());
    assert_eq!(held.why_lost(), None);
    assert_eq!(first_bytes(&cluster), [9; PAGES as usize]);
}

fn leader(cluster: &Cluster) -> usize {
    cluster.wait_writable();
    match cluster.admin(AdminRequest::ClusterStatus).unwrap() {
        AdminReply::Cluster(status) => usize::from(status.leader.unwrap().0) - 1,
        other => panic!("{other:?}"),
    }
}

/// A server that restarts alone has an old copy of the registry and no leader to ask. It knows all
/// the same that the volume was leased, and executes nobody's change.
#[test]
fn an_owner_that_restarts_alone_accepts_no_writer() {
    let mut cluster = cluster();
    let volume = cluster.open("v");
    let held = lease(&cluster, &volume, "first");
    let epoch = held.info().epoch;
    let (owners, info) = (owners(&cluster), cluster.show("v"));
    cluster
        .servers
        .iter_mut()
        .for_each(blockd_tests::Server::kill);
    cluster.servers[0].start();
    let peer = Peer::connect(&cluster, 0);
    for page in pages_of(&owners, 0) {
        for lease in [LeaseEpoch(0), LeaseEpoch(epoch.0 + 1)] {
            let reply = raw_write(&peer, &info, page, lease);
            let refused = [Status::Unavailable, Status::Leased].contains(&reply.status);
            assert!(refused, "{:?}: {}", reply.status, reply.text());
        }
    }
    drop(peer);
    cluster.servers[1].start();
    cluster.servers[2].start();
    write(&cluster, &volume, 0, 3).unwrap();
    cluster.block(held.release()).unwrap();
}

/// All owners must agree. While one is down a lease is not given, with a reason that names the
/// server, and the volume stays open to others.
#[test]
fn a_lease_that_an_owner_does_not_confirm_is_not_given() {
    let mut cluster = cluster();
    let volume = cluster.open("v");
    cluster.servers[2].kill();
    cluster.wait_writable_but(2);
    let refused = cluster.block(volume.acquire_exclusive(holder("first"), LONG));
    match refused {
        Err(ClientError::Refused(error)) => {
            assert_eq!(error.kind, AdminErrorKind::Unavailable);
            assert!(error.message.contains("node 3"), "{error}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(show(&cluster).state, LeaseState::Free);
    let page = pages_of(&owners(&cluster), 1).next().unwrap();
    write(&cluster, &volume, page, 1).unwrap();
    cluster.servers[2].start();
    let waiting = volume.acquire_exclusive(holder("first"), LONG);
    let held = cluster.block(waiting).unwrap();
    cluster.block(held.release()).unwrap();
}

/// A broken lease: the volume is closed to everybody until every owner knows, open after that; the
/// former holder is refused and told.
#[test]
fn a_broken_lease_opens_when_all_owners_know() {
    let mut cluster = cluster();
    let (ours, other) = (cluster.open("v"), cluster.open("v"));
    let held = lease(&cluster, &ours, "first");
    write(&cluster, &ours, 0, 1).unwrap();
    let owners = owners(&cluster);
    let (up, down) = (0, owners[5]);
    assert_ne!(owners[up as usize], down);
    cluster.servers[down].kill();
    cluster.wait_writable_but(down);
    let closed = break_lease(&cluster);
    assert!(matches!(closed.state, LeaseState::Closed(..)), "{closed:?}");
    for volume in [&ours, &other] {
        let refused = write(&cluster, volume, up, 2);
        assert!(
            matches!(refused, Err(ClientError::Fenced { .. })),
            "{refused:?}"
        );
    }
    assert!(held.why_lost().is_some());
    cluster.servers[down].start();
    let deadline = Instant::now() + PATIENCE;
    while show(&cluster).state != LeaseState::Free {
        assert!(Instant::now() < deadline, "{:?}", show(&cluster));
        sleep(Duration::from_millis(50));
    }
    (0..PAGES).for_each(|page| write(&cluster, &other, page, 3).unwrap());
    for page in 0..PAGES {
        let refused = write(&cluster, &ours, page, 4);
        assert!(
            matches!(refused, Err(ClientError::Fenced { .. })),
            "{refused:?}"
        );
    }
    drop(held);
    assert_eq!(first_bytes(&cluster), [3; PAGES as usize]);
}
