//! Our own ext4 on a volume of a real cluster: made, used by the kernel, checked while and after it is mounted.

use blockd_tests::{Cluster, FuseMount, MIB, Ran, Random, binary, run, try_run};
use std::fs;

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
