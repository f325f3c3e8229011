//! Volumes and snapshots as files and as mounted file systems ("Done when" 3, S003-14, S003-20).

use blockd_tests::{Cluster, FuseMount, MIB, Random, binary, run, try_run};
use std::fs;
use std::time::{Duration, Instant};

const SIZE: u64 = 192 * MIB;

/// A cluster with a formatted volume `demo`.
fn cluster() -> Cluster {
    let cluster = Cluster::three();
    let servers = cluster.server_list();
    let size = SIZE.to_string();
    let create = [
        "--servers",
        &servers,
        "volume",
        "create",
        "demo",
        "--size",
        &size,
    ];
    run(
        60,
        binary("blockctl"),
        create.iter().chain(&["--format", "ext4"]),
    );
    cluster
}

/// A file written through the mount is read back through the snapshot's mount after the original
/// was overwritten; the images taken through all servers are equal; `e2fsck` finds nothing.
#[test]
fn a_snapshot_keeps_the_file_that_was_overwritten() {
    let cluster = cluster();
    let servers = cluster.server_list();
    let directory = cluster.directory().to_owned();
    let old = Random::new(1).bytes(20 << 20);
    let new = Random::new(2).bytes(20 << 20);
    let mut mount = FuseMount::kernel(&servers, &directory, "mnt", "demo");
    fs::write(mount.path.join("file"), &old).unwrap();
    fs::create_dir(mount.path.join("dir")).unwrap();
    fs::write(mount.path.join("dir/small"), "small").unwrap();
    run(30, "sync", ["-f", mount.path.to_str().unwrap()]);
    cluster.snapshot("demo@first");
    fs::write(mount.path.join("file"), &new).unwrap();
    fs::remove_file(mount.path.join("dir/small")).unwrap();
    let mut first = FuseMount::kernel(&servers, &directory, "first", "demo@first");
    assert!(
        fs::read(first.path.join("file")).unwrap() == old,
        "the snapshot's file has changed"
    );
    assert_eq!(
        fs::read_to_string(first.path.join("dir/small")).unwrap(),
        "small"
    );
    assert!(
        fs::write(first.path.join("file"), "x").is_err(),
        "a snapshot was written to"
    );
    assert!(fs::read(mount.path.join("file")).unwrap() == new);
    first.umount(&[]).ok().code.unwrap();
    mount.umount(&[]).ok().code.unwrap();
    images_are_equal(&cluster, "demo");
    images_are_equal(&cluster, "demo@first");
    let mut again = FuseMount::kernel(&servers, &directory, "again", "demo");
    assert!(fs::read(again.path.join("file")).unwrap() == new);
    again.umount(&[]).ok().code.unwrap();
}

/// The images of all servers, over TCP and unix, are equal and clean.
fn images_are_equal(cluster: &Cluster, export: &str) {
    let image = cluster.path("image");
    let other = cluster.path("other");
    run(
        60,
        "nbdcopy",
        [
            "--connections=4",
            &cluster.servers[0].uris(export)[0],
            text(&image),
        ],
    );
    if !export.contains('@') {
        run(60, "e2fsck", ["-f", "-n", text(&image)]);
    }
    for server in &cluster.servers {
        for uri in server.uris(export) {
            run(60, "nbdcopy", ["--connections=4", &uri, text(&other)]);
            run(60, "cmp", [&image, &other]);
        }
    }
}

fn text(path: &std::path::Path) -> &str {
    path.to_str().unwrap()
}

/// Every volume and snapshot is a file of its size, written and read like one, and what is
/// written there is what NBD shows.
#[test]
fn volumes_and_snapshots_are_files() {
    let cluster = Cluster::three();
    cluster.create("v", 24 * MIB);
    cluster.create_on("w", 3 * MIB, 8, &[1, 2]);
    let servers = cluster.server_list();
    let mut view = FuseMount::volumes(&servers, cluster.directory(), "view");
    let file = view.path.join("volumes/v");
    assert_eq!(fs::metadata(&file).unwrap().len(), 24 * MIB);
    assert_eq!(
        fs::metadata(view.path.join("volumes/w")).unwrap().len(),
        3 * MIB
    );
    let old = Random::new(5).bytes(24 << 20);
    let raw = cluster.path("raw");
    fs::write(&raw, &old).unwrap();
    run(
        60,
        "dd",
        [
            &format!("if={}", text(&raw)),
            &format!("of={}", text(&file)),
            "bs=1M",
            "conv=notrunc,fsync",
        ],
    );
    run(60, "cmp", [&raw, &file]);
    assert!(cluster.nbd(1, "v").read(0, 24 << 20).unwrap() == old);
    cluster.snapshot("v@s");
    cluster.nbd(2, "v").write(0, &[9; 1 << 20]).unwrap();
    let snapshot = view.path.join("snapshots/v@s");
    run(60, "cmp", [&raw, &snapshot]);
    assert_ne!(
        try_run(60, "cmp", [&raw, &file]).code,
        Some(0),
        "the volume shows its snapshot"
    );
    assert!(
        fs::OpenOptions::new().write(true).open(&snapshot).is_err(),
        "writable snapshot"
    );
    let map = run(
        60,
        "qemu-img",
        [
            "compare",
            "-f",
            "raw",
            "-F",
            "raw",
            text(&raw),
            text(&snapshot),
        ],
    );
    assert!(map.contains("identical"), "{map}");
    view.umount(&[]).ok().code.unwrap();
}

/// A restart of a server under a mounted file system is a pause; unmounting after a server's
/// death returns.
#[test]
fn servers_die_under_a_mount() {
    let mut cluster = cluster();
    let servers = cluster.server_list();
    let directory = cluster.directory().to_owned();
    let mut mount = FuseMount::kernel(&servers, &directory, "mnt", "demo");
    let data = Random::new(8).bytes(8 << 20);
    for victim in 0..3 {
        let file = mount.path.join(format!("file{victim}"));
        fs::write(&file, &data).unwrap();
        cluster.servers[victim].kill();
        let path = mount.path.clone();
        let sync = std::thread::spawn(move || run(100, "sync", ["-f", path.to_str().unwrap()]));
        cluster.servers[victim].start();
        sync.join().unwrap();
    }
    for victim in 0..3 {
        let found = fs::read(mount.path.join(format!("file{victim}"))).unwrap();
        assert!(found == data, "file{victim} has changed");
    }
    cluster.servers[0].kill();
    let started = Instant::now();
    let refused = mount.umount(&["--timeout", "2"]);
    let forced = mount.umount(&["--force", "--timeout", "2"]);
    assert!(
        started.elapsed() < Duration::from_secs(90),
        "{refused:?}, then {forced:?}"
    );
    assert!(
        refused.code == Some(0) || forced.code == Some(0),
        "{refused:?}, then {forced:?}"
    );
    cluster.servers[0].start();
    cluster.wait_writable();
    let mut again = FuseMount::kernel(&servers, &directory, "again", "demo");
    assert!(fs::read(again.path.join("file1")).unwrap() == data);
    again.umount(&[]).ok().code.unwrap();
    images_are_equal(&cluster, "demo");
}
