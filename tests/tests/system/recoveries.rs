//! `blockd recover`: the registry of all servers is lost, and the stores bring everything back.

use blockd::admin::{AdminReply, AdminRequest};
use blockd::client::{Client, ClientOptions};
use blockd_tests::{Cluster, MIB, Ran, Random, Server, binary, run, try_run};
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

fn blockctl(cluster: &Cluster, arguments: &[&str]) -> Ran {
    let servers = cluster.server_list();
    let all = ["--servers", &servers]
        .into_iter()
        .chain(arguments.iter().copied());
    try_run(120, binary("blockctl"), all)
}

fn recover<S: AsRef<std::ffi::OsStr>>(arguments: impl IntoIterator<Item = S>) -> Ran {
    let first = std::ffi::OsString::from("recover");
    let rest = arguments.into_iter().map(|a| a.as_ref().to_owned());
    try_run(60, binary("blockd"), std::iter::once(first).chain(rest))
}

/// Every export, copied whole by an independent client.
fn images(cluster: &Cluster, names: &[&str], round: &str) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    for (index, name) in names.iter().enumerate() {
        let path = cluster.path(&format!("{round}-{}", name.replace('@', "-at-")));
        let [uri, _] = cluster.servers[index % cluster.servers.len()].uris(name);
        run(120, "nbdcopy", [uri.as_str(), path.to_str().unwrap()]);
        found.insert((*name).to_owned(), path);
    }
    found
}

/// Servers publish their addresses by themselves, so the facts may be of a later revision than asked for.
fn facts_revision(server: &Server) -> Option<u64> {
    let text = fs::read_to_string(server.state.join("facts")).ok()?;
    let head: serde_json::Value = serde_json::from_str(text.lines().nth(1)?).ok()?;
    head["revision"].as_u64()
}

fn wait_facts(cluster: &Cluster) {
    let deadline = Instant::now() + Duration::from_secs(30);
    let AdminReply::Cluster(status) = cluster.admin(AdminRequest::ClusterStatus).unwrap() else {
        panic!()
    };
    for server in &cluster.servers {
        while facts_revision(server) < Some(status.revision.0) {
            assert!(
                Instant::now() < deadline,
                "no facts at revision {}",
                status.revision
            );
            sleep(Duration::from_millis(50));
        }
    }
}

fn lose_registries(cluster: &mut Cluster) {
    for server in &mut cluster.servers {
        if server.is_running() {
            server.kill();
        }
        fs::remove_dir_all(server.state.join("registry")).unwrap();
    }
}

/// A client that knows nothing of the old incarnation.
fn fresh_client(cluster: &Cluster) -> Client {
    cluster.client_with(&[0, 1, 2], ClientOptions::default())
}

/// Three servers, several volumes, snapshots, resizes, page sizes, a rename, a filesystem and a
/// lease; all registries are deleted; the exports of the three machines make a plan without doubts;
/// after it everything is as before, byte by byte, and works on.
#[test]
fn a_lost_registry_is_rebuilt_from_the_stores() {
    let mut cluster = Cluster::three();
    cluster.create("plain", 20 * MIB);
    cluster.create_on("small-pages", 8 * MIB, 64, &[1, 3]);
    cluster.create_on("single", 8 * MIB, 8192, &[2]);
    cluster.create("empty", 100 * MIB);
    drop(
        blockctl(
            &cluster,
            &[
                "volume", "create", "files", "--size", "64MiB", "--format", "ext4",
            ],
        )
        .ok(),
    );
    let mut random = Random::new(21);
    for name in ["plain", "small-pages", "single"] {
        let volume = cluster.open(name);
        let data = random.bytes(7 << 20);
        cluster
            .block(volume.write(random.within(0..MIB) / 512 * 512, data.into()))
            .unwrap();
    }
    cluster
        .snapshot_at(1, &["plain@one", "small-pages@one"])
        .unwrap();
    let volume = cluster.open("plain");
    for _ in 0..20 {
        let at = random.within(0..19 * MIB) / 512 * 512;
        cluster
            .block(volume.write(at, random.bytes(70_000 / 512 * 512).into()))
            .unwrap();
    }
    drop(blockctl(&cluster, &["volume", "resize", "plain", "36MiB"]).ok());
    let volume = cluster.open("plain");
    cluster
        .block(volume.write(30 * MIB, random.bytes(3 << 20).into()))
        .unwrap();
    cluster.snapshot("plain@two");
    cluster.snapshot("single@first");
    cluster.delete_snapshot("plain@one");
    cluster.snapshot("plain@three");
    drop(blockctl(&cluster, &["volume", "rename", "single", "renamed"]).ok());
    let names = [
        "plain",
        "plain@two",
        "plain@three",
        "small-pages",
        "small-pages@one",
        "renamed",
        "renamed@first",
        "empty",
        "files",
    ];
    let before = images(&cluster, &names, "before");
    let shown: BTreeMap<&str, _> = ["plain", "small-pages", "renamed", "empty", "files"]
        .map(|name| (name, cluster.show(name)))
        .into();
    wait_facts(&cluster);
    lose_registries(&mut cluster);

    let mut exports = Vec::new();
    for server in &cluster.servers {
        let path = cluster.path(&format!("export-{}", server.number));
        let state = server.state.to_str().unwrap();
        drop(
            recover([
                "export",
                "--state",
                state,
                "--output",
                path.to_str().unwrap(),
            ])
            .ok(),
        );
        exports.push(path);
    }
    let plan = cluster.path("plan");
    let mut arguments: Vec<&str> = vec!["plan", "--output", plan.to_str().unwrap()];
    arguments.extend(exports.iter().map(|path| path.to_str().unwrap()));
    let planned = recover(&arguments).ok();
    assert!(planned.stdout.contains("volume renamed"), "{planned:?}");
    assert!(!planned.stdout.contains("DOUBT"), "{planned:?}");

    let state = |index: usize| cluster.servers[index].state.to_str().unwrap().to_owned();
    let careless = recover([
        "apply",
        "--plan",
        plan.to_str().unwrap(),
        "--state",
        &state(0),
    ]);
    assert!(
        careless.code == Some(3) && careless.stderr.contains("stop every server"),
        "{careless:?}"
    );
    assert!(!cluster.servers[0].state.join("registry").exists());
    let apply = |index: usize| {
        recover([
            "apply",
            "--plan",
            plan.to_str().unwrap(),
            "--state",
            &state(index),
            "--i-have-stopped-all-servers",
        ])
    };
    drop(apply(0).ok());
    fs::create_dir(cluster.servers[1].state.join("registry")).unwrap();
    let aside = apply(1).ok();
    assert!(
        aside.stdout.contains("registry.before-recovery-1"),
        "{aside:?}"
    );
    let again = apply(1).ok();
    assert!(
        !again.stdout.contains("former"),
        "repeating it changes nothing: {again:?}"
    );

    // Two servers of the new incarnation have a majority; the third is still one of the old.
    cluster
        .servers
        .iter_mut()
        .for_each(blockd_tests::Server::start);
    cluster.wait_writable_but(2);
    let AdminReply::Nodes(nodes) = cluster.admin_at(0, AdminRequest::NodeList).unwrap() else {
        panic!()
    };
    let up: Vec<bool> = nodes.iter().map(|node| node.reachable).collect();
    assert_eq!(
        up,
        [true, true, false],
        "a server of the old incarnation is refused"
    );
    let old = cluster.admin_at(2, AdminRequest::ClusterStatus);
    assert!(
        !matches!(&old, Ok(AdminReply::Cluster(status)) if status.phase == 2),
        "{old:?}"
    );
    cluster.servers[2].kill();
    let late = recover([
        "apply",
        "--plan",
        plan.to_str().unwrap(),
        "--state",
        cluster.servers[2].state.to_str().unwrap(),
        "--i-have-stopped-all-servers",
    ])
    .ok();
    assert!(late.stdout.contains("node 3"), "{late:?}");
    cluster.servers[2].start();
    cluster.wait_writable();

    let after = images(&cluster, &names, "after");
    for name in names {
        let same = fs::read(&before[name]).unwrap() == fs::read(&after[name]).unwrap();
        assert!(same, "{name} differs");
    }
    run(60, "e2fsck", ["-fn", after["files"].to_str().unwrap()]);
    run(
        60,
        "qemu-img",
        [
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            before["plain"].to_str().unwrap(),
            cluster.servers[2].uris("plain")[0].as_str(),
        ],
    );
    let client = fresh_client(&cluster);
    for (name, old) in shown {
        let request = AdminRequest::VolumeShow {
            name: name.to_owned(),
        };
        let AdminReply::Volume(new) = cluster.block(client.admin(request)).unwrap() else {
            panic!()
        };
        assert!(old.epoch < new.epoch, "{name}: {new:?}");
        let new = blockd::admin::VolumeInfo {
            epoch: old.epoch,
            ..new
        };
        assert_eq!(new, old);
    }
    // It works on: writes, growth, snapshots, new volumes, and a scrub of everything.
    let volume = cluster.block(client.open("plain")).unwrap();
    cluster
        .block(volume.write(0, vec![9; 9 << 20].into()))
        .unwrap();
    cluster.block(volume.flush()).unwrap();
    drop(
        blockctl(
            &cluster,
            &["snapshot", "create", "plain@after", "files@after"],
        )
        .ok(),
    );
    drop(blockctl(&cluster, &["volume", "create", "new", "--size", "8MiB"]).ok());
    drop(blockctl(&cluster, &["volume", "resize", "files", "128MiB"]).ok());
    drop(blockctl(&cluster, &["volume", "delete", "empty"]).ok());
    drop(blockctl(&cluster, &["volume", "scrub", "--all"]).ok());
    for server in &mut cluster.servers {
        assert!(server.stop().success());
        let checked = try_run(
            60,
            binary("blockd"),
            ["check", "--data", "--state", server.state.to_str().unwrap()],
        );
        assert_eq!(checked.code, Some(0), "{checked:?}");
    }
}

/// Facts that are older than the last changes: what came after them is found in the stores, and said.
#[test]
fn old_facts_are_made_up_for_by_the_stores() {
    let mut cluster = Cluster::three();
    cluster.create("v", 12 * MIB);
    let volume = cluster.open("v");
    cluster
        .block(volume.write(0, vec![1; 12 << 20].into()))
        .unwrap();
    wait_facts(&cluster);
    let facts: Vec<_> = cluster
        .servers
        .iter()
        .map(|server| fs::read(server.state.join("facts")).unwrap())
        .collect();
    cluster.snapshot("v@late");
    drop(blockctl(&cluster, &["volume", "resize", "v", "24MiB"]).ok());
    let volume = cluster.open("v");
    cluster
        .block(volume.write(0, vec![2; 24 << 20].into()))
        .unwrap();
    let created = cluster.create("later", 4 * MIB);
    let later = cluster.open("later");
    cluster
        .block(later.write(4096, vec![3; 4096].into()))
        .unwrap();
    lose_registries(&mut cluster);
    for (server, facts) in cluster.servers.iter().zip(facts) {
        fs::write(server.state.join("facts"), facts).unwrap();
    }
    let plan = cluster.path("plan").to_str().unwrap().to_owned();
    let states: Vec<String> = cluster
        .servers
        .iter()
        .map(|s| format!("--state={}", s.state.display()))
        .collect();
    let mut arguments = vec!["plan".to_owned(), "--output".to_owned(), plan.clone()];
    arguments.extend(states.clone());
    let planned = recover(&arguments);
    assert_eq!(planned.code, Some(1), "doubts: {planned:?}");
    for words in [
        "has grown since the newest facts",
        "came after the newest facts",
        "recovered-1",
    ] {
        assert!(planned.stdout.contains(words), "no {words:?}: {planned:?}");
    }
    let mut arguments = vec![
        "apply".to_owned(),
        "--plan".to_owned(),
        plan,
        "--i-have-stopped-all-servers".to_owned(),
    ];
    arguments.extend(states);
    let refused = recover(&arguments);
    assert!(refused.stderr.contains("--accept-doubts"), "{refused:?}");
    arguments.push("--accept-doubts".to_owned());
    drop(recover(&arguments).ok());
    cluster
        .servers
        .iter_mut()
        .for_each(blockd_tests::Server::start);
    cluster.wait_writable();
    assert!(cluster.nbd(0, "v").read(0, 24 << 20).unwrap() == [2; 24 << 20]);
    assert!(cluster.nbd(1, "v@recovered-1").read(0, 12 << 20).unwrap() == [1; 12 << 20]);
    let name = format!("recovered-{}", created.id);
    assert!(
        cluster.nbd(2, &name).read(0, 12288).unwrap()
            == [vec![0; 4096], vec![3; 4096], vec![0; 4096]].concat()
    );
}

/// The registry of one server is lost, a majority has it: the server is given it again.
#[test]
fn a_lost_registry_of_one_server_comes_back_from_the_others() {
    for lost in [2, 0] {
        let mut cluster = Cluster::three();
        cluster.create("v", 12 * MIB);
        let volume = cluster.open("v");
        cluster
            .block(volume.write(0, vec![1; 12 << 20].into()))
            .unwrap();
        cluster.servers[lost].kill();
        fs::remove_dir_all(cluster.servers[lost].state.join("registry")).unwrap();
        cluster.wait_writable_but(lost);
        cluster.servers[lost].start();
        let address = cluster.servers[lost].peer_address();
        let other = (lost + 1) % 3;
        let define = AdminRequest::NodeDefine {
            address,
            name: None,
            online: true,
        };
        cluster.admin_at(other, define).unwrap();
        cluster.wait_writable();
        cluster.create("w", 8 * MIB);
        assert!(cluster.nbd(lost, "v").read(0, 12 << 20).unwrap() == [1; 12 << 20]);
        cluster.servers[other].kill();
        cluster.wait_writable_but(other);
        assert_eq!(
            cluster.route(lost, "w"),
            cluster.route(3 - lost - other, "w")
        );
    }
}

/// S003-21, S003-27: each server makes the snapshot of its own portion only, in files that survive a
/// restart and are checksummed: what a store holds of a volume are pages that its row of the table
/// has, and damage to where the snapshot is recorded is found.
#[test]
fn each_server_has_its_portion_of_a_snapshot() {
    let mut cluster = Cluster::three();
    cluster.create("v", 36 * MIB);
    let volume = cluster.open("v");
    cluster
        .block(volume.write(0, vec![1; 36 << 20].into()))
        .unwrap();
    cluster.snapshot("v@s");
    cluster
        .block(volume.write(0, vec![2; 36 << 20].into()))
        .unwrap();
    let route = cluster.route(0, "v");
    for server in &mut cluster.servers {
        server.kill();
        server.start();
        assert!(server.stop().success());
        let state = server.state.to_str().unwrap();
        let exported = recover(["export", "--state", state]).ok().stdout;
        let volume = exported
            .lines()
            .find(|line| line.starts_with("{\"volume\""))
            .unwrap();
        let volume: serde_json::Value = serde_json::from_str(volume).unwrap();
        assert_eq!(volume["snapshots"], serde_json::json!([1]));
        let pages = volume["pages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|page| page[0].as_u64().unwrap());
        let row = route
            .runs
            .iter()
            .filter(|run| run.owner.0 == u16::from(server.number));
        let row = row
            .flat_map(|run| run.first_page..run.first_page + run.page_count)
            .map(u64::from);
        assert_eq!(pages.collect::<Vec<_>>(), row.collect::<Vec<_>>());
        for catalog in ["catalog-a", "catalog-b"] {
            let path = server.state.join("store").join(catalog);
            let mut bytes = fs::read(&path).unwrap();
            bytes.iter_mut().for_each(|byte| *byte ^= 1);
            fs::write(&path, bytes).unwrap();
        }
        let ran = try_run(60, binary("blockd"), ["check", "--state", state]);
        assert!(
            ran.code == Some(1) && ran.stdout.contains("catalog"),
            "{ran:?}"
        );
    }
}

/// One server's state is lost, the registry lives: its pages fail with an error in time, the others
/// serve theirs, and the status says which server is down.
#[test]
fn a_lost_store_is_an_error_and_no_hang() {
    let mut cluster = Cluster::three();
    cluster.create("v", 12 * MIB);
    let volume = cluster.open("v");
    cluster
        .block(volume.write(0, vec![1; 12 << 20].into()))
        .unwrap();
    let page = cluster
        .route(0, "v")
        .runs
        .iter()
        .find(|run| run.owner.0 == 3)
        .unwrap()
        .first_page;
    cluster.servers[2].kill();
    fs::remove_dir_all(&cluster.servers[2].state).unwrap();
    cluster.servers[2].start();
    cluster.wait_writable_but(2);
    let listed = blockctl(&cluster, &["node", "list"]).ok();
    let third = listed.stdout.lines().last().unwrap();
    assert!(third.contains("DOWN"), "{listed:?}");
    let mut nbd = cluster.nbd(0, "v");
    for number in 0..3_u32 {
        let began = Instant::now();
        let read = nbd.read(u64::from(number) * 4 * MIB, 4096);
        assert_eq!(read.is_err(), number == page, "page {number}: {read:?}");
        assert!(
            began.elapsed() < Duration::from_secs(45),
            "{:?}",
            began.elapsed()
        );
    }
    let scrub = blockctl(&cluster, &["--timeout", "10s", "volume", "scrub", "v"]);
    assert!(
        scrub.code == Some(3) && scrub.stderr.contains("node 3"),
        "{scrub:?}"
    );
    let created = blockctl(
        &cluster,
        &[
            "volume",
            "create",
            "w",
            "--size",
            "8MiB",
            "--servers",
            "1,2",
        ],
    );
    assert_eq!(created.code, Some(0), "{created:?}");
    drop(blockctl(&cluster, &["volume", "delete", "v"]).ok());
}
