//! State directories that a server must not use, and configurations that it cannot.

use blockd::client::{ClientError, ClientOptions, IoErrorKind};
use blockd_tests::{Cluster, ClusterOptions, MIB, Random, Server, Tmpfs, binary, try_run};
use std::fs;
use std::path::Path;
use std::time::Duration;

fn one() -> ClusterOptions {
    ClusterOptions {
        servers: 1,
        ..ClusterOptions::default()
    }
}

/// Starting a server on this directory fails at once with these words; nothing else is logged as
/// a panic.
fn start_fails(cluster: &Cluster, state: &Path, words: &[&str]) {
    let address = cluster.addresses.of(100).to_string();
    let arguments = [
        "serve",
        "--state",
        state.to_str().unwrap(),
        "--listen",
        &address,
    ];
    let ran = try_run(30, binary("blockd"), arguments);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    for word in words {
        assert!(ran.stderr.contains(word), "no {word:?}: {ran:?}");
    }
    assert!(!ran.stderr.contains("panicked"), "{ran:?}");
}

/// A directory that another process uses is refused, and that process goes on.
#[test]
fn a_state_directory_in_use() {
    let cluster = Cluster::start(&one());
    cluster.create("v", MIB);
    let state = cluster.servers[0].state.clone();
    start_fails(&cluster, &state, &["in use", state.to_str().unwrap()]);
    cluster.nbd(0, "v").write(0, &[1; 4096]).unwrap();
}

/// Directories that cannot be made, written to or read.
#[test]
fn a_state_directory_that_cannot_be_used() {
    let cluster = Cluster::undefined(&one());
    let file = cluster.path("file");
    fs::write(&file, "no directory").unwrap();
    start_fails(&cluster, &file, &[file.to_str().unwrap()]);
    start_fails(&cluster, &file.join("below"), &[file.to_str().unwrap()]);
    let disk = Tmpfs::mount(&cluster.path("disk"), 200 * MIB);
    disk.remount("ro");
    let state = disk.path().join("state");
    start_fails(&cluster, &state, &[state.to_str().unwrap(), "ead-only"]);
}

/// A read-only file system under a state directory that was used before.
#[test]
fn a_used_state_directory_that_became_read_only() {
    let mut cluster = Cluster::undefined(&ClusterOptions {
        servers: 1,
        config: format!("log_bytes = {}\nreserve_bytes = 0\n", 8 * MIB),
    });
    let disk = Tmpfs::mount(&cluster.path("disk"), 200 * MIB);
    cluster.servers[0].state = disk.path().join("state");
    cluster.servers[0].start();
    cluster.define("test");
    cluster.create("v", 8 * MIB);
    let data = Random::new(1).bytes(1 << 20);
    cluster.nbd(0, "v").write(0, &data).unwrap();
    assert!(cluster.servers[0].stop().success());
    disk.remount("ro");
    let state = cluster.servers[0].state.clone();
    start_fails(&cluster, &state, &["ead-only"]);
    disk.remount("rw");
    cluster.servers[0].start();
    cluster.wait_writable();
    assert!(cluster.nbd(0, "v").read(0, 1 << 20).unwrap() == data);
    assert!(cluster.servers[0].stop().success());
}

/// Files of a later format, and damaged ones, are refused by name and left as they are.
#[test]
fn a_state_directory_of_a_newer_version_or_damaged() {
    let mut cluster = Cluster::start(&one());
    assert!(cluster.servers[0].stop().success());
    let state = cluster.servers[0].state.clone();
    let node = state.join("node");
    let good = fs::read_to_string(&node).unwrap();
    let newer = good.replacen("blockd-node 1 ", "blockd-node 99 ", 1);
    let damaged = good.replacen("unique_id", "unique_ie", 1);
    for (text, words) in [
        (newer, &["99", "newer blockd"][..]),
        (damaged, &["damaged", "restore"]),
        (String::new(), &["damaged"]),
    ] {
        fs::write(&node, &text).unwrap();
        start_fails(&cluster, &state, words);
        assert_eq!(
            fs::read_to_string(&node).unwrap(),
            text,
            "the file was changed"
        );
    }
    fs::write(&node, good).unwrap();
    cluster.servers[0].start();
    cluster.wait_writable();
}

/// A server that comes back with the state directory of another cluster is no member: the others
/// and the clients get none of its data, and the right directory works again.
#[test]
fn a_state_directory_of_another_cluster() {
    let mut cluster = Cluster::three();
    let mut other = Cluster::start(&one());
    for (which, value) in [(&cluster, 1), (&other, 2)] {
        which.create("v", 12 * MIB);
        let volume = which.open("v");
        which
            .block(volume.write(0, vec![value; 12 << 20].into()))
            .unwrap();
    }
    let page = cluster
        .route(0, "v")
        .runs
        .iter()
        .position(|run| run.owner.0 == 3)
        .unwrap();
    let at = page as u64 * 4 * MIB;
    assert!(other.servers[0].stop().success());
    assert!(cluster.servers[2].stop().success());
    let right = cluster.servers[2].state.clone();
    cluster.servers[2].state.clone_from(&other.servers[0].state);
    cluster.servers[2].start();
    let options = ClientOptions {
        io_deadline: Duration::from_secs(2),
        ..ClientOptions::default()
    };
    let client = cluster.client_with(&[0, 1], options);
    let volume = cluster.block(client.open("v")).unwrap();
    match cluster.block(volume.read(at, 4096)) {
        Err(ClientError::Io {
            reason: IoErrorKind::Deadline,
            ..
        }) => {}
        other => panic!("{other:?} from a server of another cluster"),
    }
    assert!(cluster.servers[2].stop().success());
    cluster.servers[2].state = right;
    cluster.servers[2].start();
    cluster.wait_writable();
    assert_eq!(cluster.nbd(0, "v").read(at, 4096).unwrap(), [1; 4096]);
    assert_eq!(
        cluster.block(volume.read(at, 4096)).unwrap(),
        [1; 4096].as_slice()
    );
}

/// Configurations with mistakes are refused with the key and what it may be.
#[test]
fn bad_configurations() {
    let cluster = Cluster::undefined(&one());
    let address = cluster.addresses.of(101).to_string();
    let start = |more: &[&str]| {
        let state = cluster.path("state");
        let arguments = ["serve", "--state", state.to_str().unwrap()];
        try_run(30, binary("blockd"), arguments.iter().chain(more))
    };
    let file = cluster.path("bad.toml");
    for (text, words) in [
        ("listen_address = 1", "listen_address"),
        ("log_bytes = \"many\"", "log_bytes"),
        ("snapshot_hold_max_ms = 1", "snapshot_hold_max_ms"),
        ("log_bytes = 1", "log"),
        ("[", "bad.toml"),
    ] {
        fs::write(&file, text).unwrap();
        let ran = start(&["--listen", &address, "--config", file.to_str().unwrap()]);
        assert_eq!(ran.code, Some(1), "{text}: {ran:?}");
        assert!(ran.stderr.contains(words), "{text}: {ran:?}");
    }
    for (listen, words) in [
        ("nonsense", "nonsense"),
        ("0.0.0.0", "0.0.0.0"),
        ("127.0.0.1:99999", "99999"),
        ("203.0.113.7", "203.0.113.7:10809 is not a loopback address"),
    ] {
        let ran = start(&["--listen", listen]);
        assert_eq!(ran.code, Some(1), "{listen}: {ran:?}");
        assert!(ran.stderr.contains(words), "{listen}: {ran:?}");
    }
    let missing = start(&["--listen", &address, "--config", "/nonexistent.toml"]);
    assert!(missing.stderr.contains("/nonexistent.toml"), "{missing:?}");
    assert!(start(&[]).stderr.contains("--listen"));
}

/// An address that another server listens on is refused, and that server goes on.
#[test]
fn an_address_in_use() {
    let mut cluster = Cluster::undefined(&one());
    cluster.servers[0].start();
    let address = cluster.servers[0].address;
    let mut second = Server::new(2, address, &cluster.path("second"));
    second.spawn();
    assert_eq!(second.wait_end().code(), Some(1));
    assert!(
        second.log().contains(&address.to_string()),
        "{}",
        second.log()
    );
    cluster.servers[0].wait_ready();
}
