//! Our own ext4 on a volume of a real cluster: made, used by the kernel, checked while and after it is mounted.

use blockd_tests::{Cluster, FuseMount, MIB, Ran, Random, binary, run, try_run};
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

fn fuse_fs(servers: &str, words: &str) -> Ran {
    let words = words
        .split(' ')
        .chain(["--servers", servers, "--io-deadline", "20"]);
    try_run(60, binary("fuse-fs"), words)
}

/// Issue 5: `fuse-fs mkfs` and `check`. A snapshot of a mounted volume is what a crash leaves: its journal is
/// replayed in memory, and it is clean.
#[test]
fn a_volume_is_formatted_used_and_checked() {
    let cluster = Cluster::three();
    let servers = cluster.server_list();
    cluster.create("demo", 192 * MIB);
    let empty = fuse_fs(&servers, "check demo");
    assert_eq!(empty.code, Some(8), "{empty:?}");
    drop(fuse_fs(&servers, "mkfs demo --label data").ok());
    let mut mount = FuseMount::kernel(&servers, cluster.directory(), "mnt", "demo");
    for number in 0..300 {
        let sub = mount.path.join(format!("d{}", number % 7));
        fs::create_dir_all(&sub).unwrap();
        fs::write(
            sub.join(format!("f{number}")),
            Random::new(number).bytes(3000),
        )
        .unwrap();
    }
    run(30, "sync", ["-f", mount.path.to_str().unwrap()]);
    cluster.snapshot("demo@live");
    fs::remove_dir_all(mount.path.join("d3")).unwrap();
    let live = fuse_fs(&servers, "check demo@live --json").ok();
    assert!(live.stdout.contains("\"clean\":true"), "{live:?}");
    assert!(live.stdout.contains("\"files\":300"), "{live:?}");
    assert!(
        !live.stdout.contains("\"transactions_replayed\":0"),
        "{live:?}"
    );
    drop(mount.umount(&[]).ok());
    drop(fuse_fs(&servers, "check demo").ok());
    let image = cluster.path("image");
    run(
        60,
        "nbdcopy",
        [&cluster.servers[0].uris("demo")[0], image.to_str().unwrap()],
    );
    run(60, "e2fsck", ["-f", "-n", image.to_str().unwrap()]);
    let again = fuse_fs(&servers, "mkfs demo");
    assert_eq!(again.code, Some(32), "{again:?}");
}

/// Bytes of the file `number` of a writer.
fn content(writer: u64, number: u64) -> Vec<u8> {
    Random::new(writer << 32 | number).bytes(1000 + (number as usize * 977) % 20_000)
}

/// Writes files and makes each durable, until that fails; how many succeeded.
fn write_until_killed(dir: &Path, writer: u64) -> u64 {
    for number in 0.. {
        let written = File::create(dir.join(format!("w{writer}-{number}"))).and_then(|mut file| {
            file.write_all(&content(writer, number))?;
            file.sync_all()
        });
        if written.is_err() {
            return number;
        }
    }
    unreachable!("a writer ends by an error")
}

/// Each writer's first files, so many, are whole.
fn has_all(dir: &Path, acknowledged: &[u64]) {
    for (writer, count) in (0..).zip(acknowledged) {
        for number in 0..*count {
            let bytes = fs::read(dir.join(format!("w{writer}-{number}"))).unwrap();
            assert!(bytes == content(writer, number), "{writer} {number}");
        }
    }
}

/// Issue 5, done when 5: four writers, each server killed in turn and then the mount itself; nothing that was
/// made durable is lost, to us and to the kernel, and the file system is whole.
#[test]
fn our_own_mount_outlives_its_servers_and_itself() {
    let mut cluster = Cluster::three();
    let servers = cluster.server_list();
    cluster.create("demo", 256 * MIB);
    drop(fuse_fs(&servers, "mkfs demo").ok());
    let mount = FuseMount::own(&servers, cluster.directory(), "mnt", "demo");
    let dir = mount.path.clone();
    let acknowledged: Vec<u64> = std::thread::scope(|scope| {
        let dir = &dir;
        let writers: Vec<_> = (0..4)
            .map(|writer| scope.spawn(move || write_until_killed(dir, writer)))
            .collect();
        for index in 0..3 {
            std::thread::sleep(Duration::from_millis(500));
            cluster.servers[index].kill();
            cluster.servers[index].start();
            cluster.wait_writable();
        }
        std::thread::sleep(Duration::from_millis(500));
        mount.kill();
        writers
            .into_iter()
            .map(|writer| writer.join().unwrap())
            .collect()
    });
    assert!(
        acknowledged.iter().all(|count| *count > 3),
        "{acknowledged:?}"
    );
    let mut mount = FuseMount::own(&servers, cluster.directory(), "mnt", "demo");
    has_all(&mount.path, &acknowledged);
    drop(mount.umount(&[]).ok());
    let mut kernel = FuseMount::kernel(&servers, cluster.directory(), "kernel", "demo");
    has_all(&kernel.path, &acknowledged);
    drop(kernel.umount(&[]).ok());
    drop(fuse_fs(&servers, "check demo").ok());
    let image = cluster.path("image");
    let uri = &cluster.servers[0].uris("demo")[0];
    run(60, "nbdcopy", [uri, image.to_str().unwrap()]);
    run(60, "e2fsck", ["-f", "-n", image.to_str().unwrap()]);
}
