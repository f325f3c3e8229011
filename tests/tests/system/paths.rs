//! The ways that requests take between client and servers, seen from the network between them.

use super::chains::{Load, PAGE, PAGE_BLOCKS};
use super::move_kills::wait_phase;
use blockd::admin::{AdminReply, AdminRequest};
use blockd::client::Client;
use blockd::id::{Epoch, NodeNo};
use blockd::io::wire::Status;
use blockd_tests::{
    Attachments, Cluster, Delay, MIB, NbdConnection, Network, Passed, Random, Sharers,
    check_shared, run,
};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

fn at_once() -> Delay {
    Arc::new(|_, _| Duration::ZERO)
}

/// The first byte of a page of this server.
fn page_of(cluster: &Cluster, volume: &str, node: u16) -> u64 {
    let route = cluster.route(0, volume);
    let run = route.runs.iter().find(|run| run.owner.0 == node).unwrap();
    u64::from(run.first_page) * u64::from(route.page_blocks) * 512
}

/// From, to, and whether it is the answer.
fn hops(passed: &[Passed]) -> Vec<(u16, u8, bool)> {
    passed
        .iter()
        .map(|frame| (frame.from.0, frame.to, frame.reply))
        .collect()
}

/// S003-07: a request for a page of server 3 that server 1 receives goes 1, 3, 1, client; one for a
/// page of server 1 goes nowhere else.
#[test]
fn a_request_goes_to_the_holder_and_back_the_same_way() {
    let cluster = Cluster::three();
    let network = Network::between(&cluster, &at_once());
    let volume = cluster.create("v", 12 * MIB).id;
    let mut client = cluster.nbd(0, "v");
    let (near, far) = (page_of(&cluster, "v", 1), page_of(&cluster, "v", 3));
    network.forget();
    client.write(near, &[1; 4096]).unwrap();
    assert_eq!(client.read(near, 4096).unwrap(), [1; 4096]);
    assert_eq!(network.passed(volume), [], "a page that is here");
    client.write(far, &[2; 4096]).unwrap();
    assert_eq!(hops(&network.passed(volume)), [(1, 3, false), (1, 3, true)]);
    network.forget();
    assert_eq!(client.read(far, 4096).unwrap(), [2; 4096]);
    let passed = network.passed(volume);
    assert_eq!(hops(&passed), [(1, 3, false), (1, 3, true)]);
    assert_eq!(u64::from(passed[0].page.0), far / (4 * MIB));
}

/// S003-08: a client that reads a whole volume, most of which is on other servers, connects to the
/// one server that it asked and to nobody else.
#[test]
fn a_client_has_one_peer_only() {
    let cluster = Cluster::three();
    cluster.create("v", 12 * MIB);
    let data = Random::new(4).bytes(12 << 20);
    cluster.nbd(1, "v").write(0, &data).unwrap();
    let (trace, image) = (cluster.path("trace"), cluster.path("image"));
    let [uri, _] = cluster.servers[0].uris("v");
    let arguments = [
        "-f",
        "-e",
        "trace=connect",
        "-o",
        trace.to_str().unwrap(),
        "nbdcopy",
        &uri,
        image.to_str().unwrap(),
    ];
    run(60, "strace", arguments);
    assert!(std::fs::read(&image).unwrap() == data);
    let trace = std::fs::read_to_string(&trace).unwrap();
    let connects: Vec<&str> = trace
        .lines()
        .filter(|line| line.contains("AF_INET"))
        .collect();
    let asked = format!("\"{}\"", cluster.servers[0].address);
    assert!(!connects.is_empty(), "{trace}");
    assert!(
        connects.iter().all(|line| line.contains(&asked)),
        "{connects:?}"
    );
}

/// S003-09: the client library asks the holder itself; after the table has changed, its old hint is
/// answered stale once, and the request is carried out all the same.
#[test]
fn a_direct_client_goes_straight_to_the_holder() {
    let cluster = Cluster::three();
    let network = Network::between(&cluster, &at_once());
    let id = cluster.create("v", 12 * MIB).id;
    let volume = cluster.open("v");
    let far = page_of(&cluster, "v", 3);
    network.forget();
    cluster
        .block(volume.write(far, vec![5; 4096].into()))
        .unwrap();
    assert_eq!(hops(&network.passed(id)), [(0, 3, false), (0, 3, true)]);
    grow(&cluster, 1);
    network.forget();
    assert_eq!(
        cluster.block(volume.read(far, 4096)).unwrap(),
        [5; 4096].as_slice()
    );
    assert_straight(&network.passed(id), 3);
}

/// Every table is old after this.
fn grow(cluster: &Cluster, through: usize) {
    let grow = AdminRequest::VolumeResize {
        name: "v".to_owned(),
        size_bytes: 40 * MIB,
        allow_shrink: false,
    };
    cluster.admin_at(through, grow).unwrap();
}

/// One request from a client to this server alone, with one answer that its table is old at the most.
fn assert_straight(passed: &[Passed], node: u8) {
    let stale = passed
        .iter()
        .filter(|frame| frame.status == Status::Stale)
        .count();
    assert!(
        passed
            .iter()
            .all(|frame| (frame.from, frame.to) == (NodeNo(0), node)),
        "{passed:?}"
    );
    assert!(
        stale <= 1 && passed.last().unwrap().status == Status::Ok,
        "{passed:?}"
    );
}

/// S003-09: what `attach` gives goes straight to each holder, too, with old hints as well.
#[test]
fn an_attachment_goes_straight_to_the_holders() {
    let cluster = Cluster::three();
    let network = Network::between(&cluster, &at_once());
    let id = cluster.create("v", 12 * MIB).id;
    let attachments = Attachments::new(&cluster);
    let mut client = NbdConnection::unix(&attachments.socket("v"), "v").unwrap();
    for node in 1..=3_u8 {
        let page = page_of(&cluster, "v", node.into());
        network.forget();
        client.write(page, &[node; 4096]).unwrap();
        assert_eq!(
            hops(&network.passed(id)),
            [(0, node, false), (0, node, true)]
        );
    }
    for node in 1..=3_u8 {
        let page = page_of(&cluster, "v", node.into());
        // The first one has the table of before.
        if node == 1 {
            grow(&cluster, 1);
        }
        network.forget();
        assert_eq!(client.read(page, 4096).unwrap(), [node; 4096]);
        assert_straight(&network.passed(id), node);
    }
}

/// S003-18: a server whose table is old asks the holder under the old epoch, hears that it is stale, and
/// asks again: the answer is right, and what was forwarded is never forwarded on.
#[test]
fn an_old_table_costs_another_try_and_no_wrong_answer() {
    let cluster = Cluster::three();
    let behind = follower(&cluster);
    let holder = (1..=3_u16).find(|node| *node != behind).unwrap();
    let slow = Arc::new(AtomicBool::new(false));
    let network = Network::between(&cluster, &late_for(behind, &slow));
    let id = cluster.create("v", 12 * MIB).id;
    let far = page_of(&cluster, "v", holder);
    let mut client = cluster.nbd(usize::from(behind) - 1, "v");
    client.write(far, &[6; 4096]).unwrap();
    slow.store(true, Ordering::Relaxed);
    let at_holder = usize::from(holder) - 1;
    std::thread::scope(|scope| {
        scope.spawn(|| grow(&cluster, at_holder));
        let deadline = Instant::now() + Duration::from_secs(30);
        while cluster.route(at_holder, "v").epoch == Epoch(1) {
            assert!(Instant::now() < deadline, "the volume does not grow");
        }
        network.forget();
        assert_eq!(client.read(far, 4096).unwrap(), [6; 4096]);
    });
    let passed = network.passed(id);
    let stale = passed
        .iter()
        .filter(|frame| frame.status == Status::Stale)
        .count();
    assert!(stale > 0, "the table was not old: {passed:?}");
    let holder = u8::try_from(holder).unwrap();
    let one_hop = |frame: &Passed| (frame.from.0, frame.to) == (behind, holder);
    assert!(passed.iter().all(one_hop), "{passed:?}");
    assert_eq!(passed.last().unwrap().status, Status::Ok);
}

/// S003-18: pages have moved, and the server that is asked has not heard of it: it asks the old owner, hears
/// that its table is stale, and asks the new one. These two hops are all, by count; nobody forwards for
/// it. If it has heard of it in time, as on a slow machine, there is one, and they move again.
#[test]
fn a_moved_page_is_found_in_two_hops() {
    let cluster = Cluster::three();
    let behind = follower(&cluster);
    let mut owners = [1, 2].map(|step| (behind - 1 + step) % 3 + 1);
    let slow = Arc::new(AtomicBool::new(false));
    let network = Network::between(&cluster, &late_for(behind, &slow));
    let id = cluster.create_on("v", 8 * MIB, 8192, &[owners[0]]).id;
    let mut client = cluster.nbd(usize::from(behind) - 1, "v");
    client.write(4096, &[6; 4096]).unwrap();
    slow.store(true, Ordering::Relaxed);
    for _ in 0..5 {
        move_and_wait(&cluster, owners);
        network.forget();
        assert_eq!(client.read(4096, 4096).unwrap(), [6; 4096]);
        let [from, to] = owners;
        let passed = network.passed(id);
        let hops = answered(&passed);
        if hops == [(behind, from, Status::Stale), (behind, to, Status::Ok)] {
            return;
        }
        assert_eq!(hops, [(behind, to, Status::Ok)], "{passed:?}");
        wait_phase(&cluster, "v", "done");
        owners.reverse();
    }
    panic!("the table was never old");
}

/// Each request that passed, with the status of its answer, when one is sent after the other.
fn answered(passed: &[Passed]) -> Vec<(u16, u16, Status)> {
    let pairs = passed.chunks(2).map(|pair| match pair {
        [request, answer] if !request.reply && answer.reply => {
            (request.from.0, u16::from(request.to), answer.status)
        }
        other => panic!("{other:?}"),
    });
    pairs.collect()
}

/// Moves all pages, and waits until their former owner knows of it.
fn move_and_wait(cluster: &Cluster, [from, to]: [u16; 2]) {
    let at_old = cluster.client_of(&[usize::from(from) - 1]);
    cluster.blockctl(&format!("page move v all --to {to} --no-wait"));
    let deadline = Instant::now() + Duration::from_secs(30);
    while owner_now(cluster, &at_old) != NodeNo(to) {
        assert!(Instant::now() < deadline, "the pages do not move");
    }
}

/// A server that does not lead the registry.
fn follower(cluster: &Cluster) -> u16 {
    let AdminReply::Cluster(status) = cluster.admin(AdminRequest::ClusterStatus).unwrap() else {
        panic!()
    };
    let mut all = 1..=3;
    all.find(|node| status.leader != Some(NodeNo(*node)))
        .unwrap()
}

/// While `slow`, what other servers say to this one comes late; what it says, and its answers, do not.
fn late_for(behind: u16, slow: &Arc<AtomicBool>) -> Delay {
    let slow = Arc::clone(slow);
    Arc::new(move |from, to| {
        let late = slow.load(Ordering::Relaxed) && u16::from(to) == behind && from.0 != 0;
        Duration::from_millis(if late { 400 } else { 0 })
    })
}

/// The owner of the first page, as this client's server shows it.
fn owner_now(cluster: &Cluster, client: &Client) -> NodeNo {
    let volume = "v".to_owned();
    match cluster.block(client.admin(AdminRequest::RouteShow { volume })) {
        Ok(AdminReply::Route(route)) => route.runs[0].owner,
        other => panic!("{other:?}"),
    }
}

/// S003-16: 40 ms lie between server 1 and the other two. Blocks that all share through all servers are
/// one register each (C1), snapshots under dependent writes are points in time (C3), every server shows the same, nothing fails; only what crosses the gap is slower.
#[test]
fn halves_that_are_far_apart_are_one_cluster() {
    let cluster = Cluster::three();
    let half = |node: u16| node == 1;
    let delay: Delay =
        Arc::new(
            move |from, to| match from.0 != 0 && half(from.0) != half(u16::from(to)) {
                true => Duration::from_millis(20),
                false => Duration::ZERO,
            },
        );
    let network = Network::between(&cluster, &delay);
    cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    cluster.create_on("w", 64 * PAGE, PAGE_BLOCKS, &[]);
    let shared = [1, 2, 3].map(|server| page_of(&cluster, "v", server) + PAGE - 4096);
    let sharers = Sharers::start(&cluster, "v", &shared, 1);
    let load = Load::start(&cluster, ["v", "w"]);
    for number in 0..6 {
        let name = format!("s{number}");
        let before = load.marks();
        let targets = [format!("v@{name}"), format!("w@{name}")];
        cluster
            .snapshot_at(number % 3, &[&targets[0], &targets[1]])
            .unwrap();
        let after = load.marks();
        load.check(&cluster, number % 3, &name, &before, &after);
        load.check(&cluster, (number + 1) % 3, &name, &before, &after);
        load.check_running();
    }
    let marks = load.marks();
    load.finish();
    let history = sharers.finish();
    check_shared(&history).unwrap();
    assert!(history.len() > 100, "{}: no real load", history.len());
    assert!(
        marks.iter().all(|(acknowledged, _)| *acknowledged > 6),
        "{marks:?}: no real load"
    );
    let whole = |server: usize| {
        cluster
            .nbd(server, "v")
            .read(0, u32::try_from(64 * PAGE).unwrap())
            .unwrap()
    };
    assert!(whole(0) == whole(1) && whole(1) == whole(2));
    let mut client = cluster.nbd(0, "v");
    let mut fastest = |at: u64| {
        let times = (0..10).map(|_| {
            let began = Instant::now();
            client.read(at, 512).unwrap();
            began.elapsed()
        });
        times.min().unwrap()
    };
    let (near, far) = (
        fastest(page_of(&cluster, "v", 1)),
        fastest(page_of(&cluster, "v", 3)),
    );
    assert!(
        far >= Duration::from_millis(40) && near < Duration::from_millis(40),
        "{near:?} {far:?}"
    );
    drop(network);
}

/// what a server sent is sent again, byte by byte, after newer writes: nobody executes it.
#[test]
fn replayed_connections_change_nothing() {
    let cluster = Cluster::three();
    let network = Network::between(&cluster, &at_once());
    cluster.create("v", 12 * MIB);
    let far = page_of(&cluster, "v", 3);
    let mut client = cluster.nbd(0, "v");
    client.write(far, &[1; 65536]).unwrap();
    let recorded = network.sent_by(NodeNo(1));
    client.write(far, &[2; 65536]).unwrap();
    let replayed = recorded
        .iter()
        .filter(|bytes| bytes.windows(4096).any(|part| part == [1; 4096]))
        .count();
    assert!(replayed > 0, "the write was recorded");
    for (server, bytes) in cluster
        .servers
        .iter()
        .flat_map(|server| recorded.iter().map(move |bytes| (server, bytes)))
    {
        let mut stream = TcpStream::connect(server.peer_address()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(2)))
            .unwrap();
        // The server may close before it has read all.
        let _ = stream.write_all(bytes);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    assert!(client.read(far, 65536).unwrap() == [2; 65536]);
    assert!(cluster.nbd(2, "v").read(far, 65536).unwrap() == [2; 65536]);
    cluster.wait_writable();
}
