//! Loop devices on the view and `mount --kernel`: the kernel's filesystems on volumes.

use crate::bench::{Bench, str_of, tool, tool_output};
use std::fs;
use std::os::unix::fs::FileExt;
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
        let _ = tool_output(&["losetup", "-d", &self.0]);
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
        let _ = tool_output(&["fsfreeze", "-u", self.0]);
    }
}

/// A volume with a filesystem that is mounted on `fs`.
fn mounted(mkfs: &str, size_bytes: u64) -> Bench {
    let bench = Bench::new();
    let store = bench.volume("a", size_bytes);
    tool(&[mkfs, "-q", str_of(&store)]);
    bench.fuse_fs_ok(&["mount", "--kernel", "a", str_of(&bench.path("fs"))]);
    bench
}

/// Mounts `a@s` on `mnt`, runs `look` on it, and checks that the snapshot stays as it is.
fn look_into_snapshot(bench: &Bench, options: &str, look: impl FnOnce(&Path, &str)) {
    let (store, before) = (bench.path("store/a@s"), bench.path("before"));
    fs::copy(&store, &before).unwrap();
    let flushes = bench.flushes();
    let snap = bench.path("mnt");
    let mut mount = vec!["mount", "--kernel", "a@s", str_of(&snap)];
    mount.extend(
        (!options.is_empty())
            .then_some(["-o", options])
            .iter()
            .flatten(),
    );
    let said = bench.fuse_fs_ok(&mount);
    look(&snap, &said);
    let refused = fs::write(snap.join("new"), b"x").unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    bench.fuse_fs_ok(&["umount", str_of(&snap)]);
    tool(&["cmp", str_of(&store), str_of(&before)]);
    assert_eq!(bench.flushes(), flushes, "nor is it flushed");
}

fn finish(bench: &Bench) {
    bench.fuse_fs_ok(&["umount", str_of(&bench.path("fs"))]);
    assert_nothing_left(bench);
}

fn frozen_snapshot_is_complete(mkfs: &str, size_bytes: u64) {
    let bench = mounted(mkfs, size_bytes);
    let dir = bench.path("fs");
    write_tree(&dir);
    let freeze = Frozen::freeze(str_of(&dir));
    fs::copy(bench.path("store/a"), bench.path("store/a@s")).unwrap();
    drop(freeze);
    look_into_snapshot(&bench, "", |snap, said| {
        assert_eq!(said, "");
        check_tree(snap);
    });
    finish(&bench);
}

/// What is in the journal only: seen after a replay, and not without one.
fn journal_is_replayed_in_memory(mkfs: &str, size_bytes: u64, skip: &str) {
    let bench = mounted(mkfs, size_bytes);
    let dir = bench.path("fs");
    write_tree(&dir);
    tool(&["sync", "-f", str_of(&dir)]);
    let data: Vec<u8> = (0..300_000u32).map(|at| (at % 253) as u8).collect();
    fs::create_dir(dir.join("late")).unwrap();
    fs::write(dir.join("late/file"), &data).unwrap();
    fs::File::open(dir.join("late/file"))
        .unwrap()
        .sync_all()
        .unwrap();
    fs::copy(bench.path("store/a"), bench.path("store/a@s")).unwrap();
    look_into_snapshot(&bench, skip, |snap, _| {
        assert!(!snap.join("late/file").exists(), "it is in the journal");
    });
    for _ in 0..2 {
        look_into_snapshot(&bench, "", |snap, said| {
            assert_eq!(said, "");
            assert!(fs::read(snap.join("late/file")).unwrap() == data);
            check_tree(snap);
        });
    }
    finish(&bench);
}

#[test]
fn a_snapshot_is_mounted_read_only_beside_its_volume() {
    frozen_snapshot_is_complete("mkfs.ext4", 64 * MIB);
    frozen_snapshot_is_complete("mkfs.xfs", 320 * MIB);
}

#[test]
fn ext4_that_was_fsynced_just_before_the_snapshot_is_in_it() {
    journal_is_replayed_in_memory("mkfs.ext4", 64 * MIB, "noload");
}

#[test]
fn xfs_that_was_fsynced_just_before_the_snapshot_is_in_it() {
    journal_is_replayed_in_memory("mkfs.xfs", 320 * MIB, "norecovery");
}

/// The journal's own superblock is destroyed in the snapshot.
#[test]
fn a_journal_that_cannot_be_replayed_is_left_alone_and_told() {
    let bench = mounted("mkfs.ext4", 64 * MIB);
    write_tree(&bench.path("fs"));
    tool(&["sync", "-f", str_of(&bench.path("fs"))]);
    let (store, snapshot) = (bench.path("store/a"), bench.path("store/a@s"));
    let block = tool_output(&["debugfs", "-R", "bmap <8> 0", str_of(&store)]).stdout;
    let block: u64 = String::from_utf8(block).unwrap().trim().parse().unwrap();
    let unit = tool(&["stat", "-f", "-c", "%S", str_of(&bench.path("fs"))]);
    fs::copy(store, &snapshot).unwrap();
    let file = fs::File::options().write(true).open(snapshot).unwrap();
    file.write_all_at(&[0xff; 12], block * unit.trim().parse::<u64>().unwrap())
        .unwrap();
    look_into_snapshot(&bench, "", |snap, said| {
        assert!(said.contains("could not be replayed"), "{said}");
        assert_eq!(
            fs::read_dir(snap).unwrap().count(),
            6,
            "5 directories and lost+found"
        );
    });
    finish(&bench);
}
