//! A stop of all servers and a new start keep everything (quick restart).

use blockd::admin::{AdminReply, AdminRequest};
use blockd_tests::{Cluster, MIB, Random, Server};

/// SIGTERM ends every server with success; afterwards volumes, snapshots, tables, sizes and data
/// are what they were, through every server.
#[test]
fn a_stop_of_all_servers_keeps_everything() {
    let mut cluster = Cluster::three();
    cluster.create("v", 40 * MIB);
    cluster.create_on("w", 3 * MIB, 8, &[2, 3]);
    let old = Random::new(1).bytes(20 << 20);
    let new = Random::new(2).bytes(3 << 20);
    cluster.nbd(0, "v").write(0, &old).unwrap();
    cluster.nbd(1, "w").write(0, &new).unwrap();
    cluster.snapshot("v@s");
    cluster.nbd(2, "v").write(7 * MIB, &new).unwrap();
    let before = facts(&cluster);
    for round in 0..3 {
        for server in &mut cluster.servers {
            let status = server.stop();
            assert!(
                status.success(),
                "round {round}: {status}\n{}",
                server.log()
            );
        }
        cluster.servers.iter_mut().rev().for_each(Server::start);
        cluster.wait_writable();
        assert_eq!(facts(&cluster), before, "round {round}");
        for index in 0..3 {
            let mut connection = cluster.nbd(index, "v");
            assert!(connection.read(0, 7 << 20).unwrap() == old[..7 << 20]);
            assert!(connection.read(7 * MIB, 3 << 20).unwrap() == new);
            assert!(connection.read(10 * MIB, 10 << 20).unwrap() == old[10 << 20..]);
            assert!(cluster.nbd(index, "v@s").read(0, 20 << 20).unwrap() == old);
            assert!(cluster.nbd(index, "w").read(0, 3 << 20).unwrap() == new);
        }
    }
}

/// What the cluster says about itself, without what may change with a restart.
fn facts(cluster: &Cluster) -> Vec<String> {
    let mut facts = vec![];
    for volume in ["v", "w"] {
        facts.push(format!("{:?}", cluster.show(volume)));
        facts.push(format!("{:?}", cluster.snapshots(volume)));
        facts.extend((0..3).map(|index| format!("{:?}", cluster.route(index, volume))));
    }
    match cluster.admin(AdminRequest::NodeList).unwrap() {
        AdminReply::Nodes(nodes) => {
            let stable = nodes
                .iter()
                .map(|node| format!("{} {} {}", node.number, node.unique_id, node.peer_address));
            facts.extend(stable);
        }
        other => panic!("{other:?}"),
    }
    facts
}

/// Two of three servers serve their pages while the third is away; its pages wait for it.
#[test]
fn pages_of_other_servers_stay_served() {
    let mut cluster = Cluster::three();
    cluster.create("v", 12 * MIB);
    let route = cluster.route(0, "v");
    let data = Random::new(9).bytes(1 << 20);
    let mut connection = cluster.nbd(0, "v");
    connection.write(0, &data).unwrap();
    let away = usize::from(route.runs[0].owner.0 - 1);
    let (first, second) = ((away + 1) % 3, (away + 2) % 3);
    assert!(cluster.servers[away].stop().success());
    for run in &route.runs[1..] {
        let at = u64::from(run.first_page) * 4 * MIB;
        cluster.nbd(first, "v").write(at, &data).unwrap();
        assert!(cluster.nbd(second, "v").read(at, 1 << 20).unwrap() == data);
    }
    let mut waiting = cluster.nbd(first, "v");
    let read = std::thread::spawn(move || waiting.read(0, 1 << 20));
    cluster.servers[away].start();
    assert!(
        read.join().unwrap().unwrap() == data,
        "the page that came back has changed"
    );
}
