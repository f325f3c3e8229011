//! Loop devices on the view and `mount --kernel`: the kernel's filesystems on volumes.

use crate::bench::{Bench, str_of, tool};
use std::fs;
use std::path::Path;

const MIB: u64 = 1 << 20;

/// Detaches the loop device that losetup made, also when the test fails.
struct Losetup(String);

impl Losetup {
    fn attach(file: &Path, options: &[&str]) -> Self {
        let mut arguments = vec!["losetup", "--show", "-f"];
        arguments.extend(options);
        arguments.push(str_of(file));
        Self(tool(&arguments).trim().to_owned())
    }
}

impl Drop for Losetup {
    fn drop(&mut self) {
        let _ = crate::bench::tool_output(&["losetup", "-d", &self.0]);
    }
}

fn write_tree(dir: &Path) {
    for number in 0..50 {
        let sub = dir.join(format!("d{}", number % 5));
        fs::create_dir_all(&sub).unwrap();
        fs::write(
            sub.join(format!("f{number}")),
            vec![number as u8; 10_000 + number * 777],
        )
        .unwrap();
    }
}

fn check_tree(dir: &Path) {
    for number in 0..50 {
        let file = dir.join(format!("d{}/f{number}", number % 5));
        assert!(fs::read(file).unwrap() == vec![number as u8; 10_000 + number * 777]);
    }
}

#[test]
fn losetup_works_buffered_and_direct() {
    for direct in ["--direct-io=off", "--direct-io=on"] {
        let bench = Bench::new();
        let store = bench.volume("a", 64 * MIB);
        bench.view(&[]);
        let device = Losetup::attach(&bench.file("a"), &[direct]);
        let shown = tool(&["losetup", "-n", "-O", "DIO", &device.0]);
        assert_eq!(
            shown.trim() == "1",
            direct == "--direct-io=on",
            "{direct}: {shown}"
        );
        tool(&["mkfs.ext4", "-q", &device.0]);
        let fs_dir = bench.path("fs");
        tool(&["mount", &device.0, str_of(&fs_dir)]);
        write_tree(&fs_dir);
        tool(&["umount", str_of(&fs_dir)]);
        drop(device);
        assert!(bench.flushes() > 0, "the journal's flushes arrive");
        tool(&["e2fsck", "-fn", str_of(&store)]);
        bench.fuse_fs_ok(&["umount", str_of(&bench.path("mnt"))]);
    }
}

#[test]
fn ext4_is_mounted_unmounted_and_clean() {
    let bench = Bench::new();
    let store = bench.volume("a", 64 * MIB);
    tool(&["mkfs.ext4", "-q", str_of(&store)]);
    round_trip(&bench);
    tool(&["e2fsck", "-fn", str_of(&store)]);
}

#[test]
fn xfs_is_mounted_unmounted_and_clean() {
    let bench = Bench::new();
    let store = bench.volume("a", 320 * MIB);
    tool(&["mkfs.xfs", "-q", str_of(&store)]);
    round_trip(&bench);
    tool(&["xfs_repair", "-n", str_of(&store)]);
}

/// Mounts volume `a`, writes, unmounts; mounts it again, a plain umount this time, and once more.
fn round_trip(bench: &Bench) {
    let dir = bench.path("fs");
    let mount = [
        "mount",
        "--kernel",
        "a",
        str_of(&dir),
        "-o",
        "noatime,discard",
    ];
    bench.fuse_fs_ok(&mount);
    write_tree(&dir);
    assert!(bench.fuse_fs_ok(&mount).contains("already mounted"));
    let busy = fs::File::open(dir.join("d0/f0")).unwrap();
    let refused = bench.fuse_fs(&["umount", str_of(&dir)]);
    assert_eq!(refused.status.code(), Some(32));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("in use"));
    drop(busy);
    let before = bench.flushes();
    bench.fuse_fs_ok(&["umount", str_of(&dir)]);
    assert!(bench.flushes() > before);
    assert_nothing_left(bench);
    bench.fuse_fs_ok(&mount);
    check_tree(&dir);
    tool(&["umount", str_of(&dir)]);
    bench.fuse_fs_ok(&mount);
    check_tree(&dir);
    bench.fuse_fs_ok(&["umount", str_of(&dir)]);
    assert_nothing_left(bench);
}

fn assert_nothing_left(bench: &Bench) {
    assert!(bench.mounts().is_empty(), "{:?}", bench.mounts());
    assert!(bench.daemons().is_empty());
    assert_eq!(
        fs::read_dir(bench.path("run")).unwrap().count(),
        0,
        "no state files, no hidden directories"
    );
    let devices = tool(&["losetup", "-n", "-O", "BACK-FILE", "-l"]);
    assert!(!devices.contains(str_of(&bench.path(""))), "{devices}");
}

/// Thaws a filesystem, also when the test fails: an unmount would wait for it.
struct Frozen<'a>(&'a str);

impl<'a> Frozen<'a> {
    fn freeze(dir: &'a str) -> Self {
        tool(&["fsfreeze", "-f", dir]);
        Self(dir)
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = crate::bench::tool_output(&["fsfreeze", "-u", self.0]);
    }
}

/// `frozen`: the snapshot is made while the filesystem is frozen, so that it needs no journal.
fn mount_snapshot(mkfs: &str, size_bytes: u64, frozen: bool) {
    let bench = Bench::new();
    let store = bench.volume("a", size_bytes);
    tool(&[mkfs, "-q", str_of(&store)]);
    let (dir, snap) = (bench.path("fs"), bench.path("mnt"));
    bench.fuse_fs_ok(&["mount", "--kernel", "a", str_of(&dir)]);
    write_tree(&dir);
    tool(&["sync", "-f", str_of(&dir)]);
    let freeze = frozen.then(|| Frozen::freeze(str_of(&dir)));
    fs::copy(&store, bench.path("store/a@s")).unwrap();
    drop(freeze);
    let said = bench.fuse_fs_ok(&["mount", "--kernel", "a@s", str_of(&snap)]);
    assert_eq!(
        said.contains("fsfreeze"),
        !frozen || mkfs == "mkfs.xfs",
        "{said}"
    );
    if frozen {
        check_tree(&snap);
    }
    let refused = fs::write(snap.join("new"), b"x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    bench.fuse_fs_ok(&["umount", str_of(&snap)]);
    bench.fuse_fs_ok(&["umount", str_of(&dir)]);
    assert_nothing_left(&bench);
}

#[test]
fn a_snapshot_is_mounted_read_only_beside_its_volume() {
    for frozen in [true, false] {
        mount_snapshot("mkfs.ext4", 64 * MIB, frozen);
        mount_snapshot("mkfs.xfs", 320 * MIB, frozen);
    }
}
