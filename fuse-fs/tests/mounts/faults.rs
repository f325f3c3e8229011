//! Servers that fail or do not answer: errors stay errors of one request, and commands come back.
//!
//! A file with unflushed writes on servers that hang is held by another process: its close waits,
//! and any child that this process forks closes a copy of what this process has open.

use crate::bench::{Bench, str_of, tool, wait_until};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn open_rw(bench: &Bench, name: &str) -> File {
    File::options()
        .read(true)
        .write(true)
        .open(bench.file(name))
        .unwrap()
}

#[test]
fn errors_and_panics_are_eio_and_the_mount_lives() {
    for what in ["fail", "panic"] {
        let bench = Bench::new();
        bench.volume("a", MIB);
        bench.view(&[]);
        let file = open_rw(&bench, "a");
        bench.fault(what);
        for _ in 0..20 {
            assert_eq!(
                file.read_at(&mut [0; 512], 0).unwrap_err().raw_os_error(),
                Some(libc::EIO)
            );
            assert_eq!(
                file.write_at(&[1; 512], 0).unwrap_err().raw_os_error(),
                Some(libc::EIO)
            );
            assert_eq!(file.sync_all().unwrap_err().raw_os_error(), Some(libc::EIO));
        }
        bench.no_fault();
        file.write_all_at(&[1; 512], 0).unwrap();
        file.sync_all().unwrap();
        drop(file);
        bench.fuse_fs_ok(&["umount", str_of(&bench.path("mnt"))]);
    }
}

#[test]
fn a_server_that_does_not_answer_is_eio_after_the_deadline() {
    let bench = Bench::new();
    bench.volume("a", MIB);
    bench.view(&["--io-deadline", "1"]);
    let file = open_rw(&bench, "a");
    bench.fault("hang");
    let started = Instant::now();
    assert_eq!(
        file.read_at(&mut [0; 512], 0).unwrap_err().raw_os_error(),
        Some(libc::EIO)
    );
    assert!(
        started.elapsed() < Duration::from_secs(20),
        "{:?}",
        started.elapsed()
    );
    bench.no_fault();
    assert_eq!(file.read_at(&mut [0; 512], 0).unwrap(), 512);
}

/// A process whose write has arrived and whose close waits for servers that hang.
fn write_unflushed(bench: &Bench, name: &str) -> Child {
    let of = format!("of={}", str_of(&bench.file(name)));
    let mut command = Command::new("dd");
    command.args(["if=/dev/urandom", "bs=512", "count=1", "conv=notrunc", &of]);
    let child = command.stderr(Stdio::null()).spawn().unwrap();
    let store = bench.path("store").join(name);
    wait_until("written", || fs::read(&store).unwrap()[..512] != [0; 512]);
    child
}

/// Without --force the deadline leaves everything in place, and the servers' return is enough.
#[test]
fn umount_of_a_view_comes_back_and_loses_nothing() {
    let bench = Bench::new();
    bench.volume("a", MIB);
    bench.view(&["--io-deadline", "2"]);
    let mnt = bench.path("mnt");
    bench.fault("hang-flush");
    let mut writer = write_unflushed(&bench, "a");
    let started = Instant::now();
    let output = bench.fuse_fs(&["umount", str_of(&mnt), "--timeout", "1"]);
    assert!(
        started.elapsed() < Duration::from_secs(15),
        "{:?}",
        started.elapsed()
    );
    assert_eq!(output.status.code(), Some(32));
    assert!(String::from_utf8_lossy(&output.stderr).contains("may be unflushed"));
    assert_eq!(bench.mounts().len(), 1);
    bench.no_fault();
    assert!(
        !writer.wait().unwrap().success(),
        "its close failed with EIO"
    );
    bench.fuse_fs_ok(&["umount", str_of(&mnt)]);
    assert!(
        bench.flushes() >= 1,
        "and the write was flushed all the same"
    );
}

#[test]
fn umount_of_a_view_by_force_detaches_it() {
    let bench = Bench::new();
    bench.volume("a", MIB);
    bench.view(&[]);
    bench.fault("hang-flush");
    let mut writer = write_unflushed(&bench, "a");
    let started = Instant::now();
    let output = bench.fuse_fs(&[
        "umount",
        str_of(&bench.path("mnt")),
        "--timeout",
        "1",
        "--force",
    ]);
    assert_eq!(output.status.code(), Some(32));
    assert!(
        started.elapsed() < Duration::from_secs(15),
        "{:?}",
        started.elapsed()
    );
    assert!(String::from_utf8_lossy(&output.stderr).contains("detached by force"));
    assert!(bench.mounts().is_empty());
    assert!(!writer.wait().unwrap().success(), "who waited is told");
    wait_until("ended", || bench.daemons().is_empty());
}

#[test]
fn a_flush_that_fails_is_told_by_umount() {
    let bench = Bench::new();
    bench.volume("a", MIB);
    bench.view(&[]);
    let mnt = bench.path("mnt");
    let file = open_rw(&bench, "a");
    file.write_all_at(&[1; 512], 0).unwrap();
    bench.fault("fail-flush");
    drop(file);
    let output = bench.fuse_fs(&["umount", str_of(&mnt)]);
    assert_eq!(output.status.code(), Some(32), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("flushing the volumes"),
        "{output:?}"
    );
    bench.no_fault();
    bench.fuse_fs_ok(&["umount", str_of(&mnt)]);
    assert_eq!(
        bench.flushes(),
        1,
        "the write was flushed when the servers could again"
    );
}

#[test]
fn a_kernel_mount_whose_servers_are_away_is_left_or_torn_down() {
    let bench = Bench::new();
    let store = bench.volume("a", 64 * MIB);
    tool(&["mkfs.ext4", "-q", str_of(&store)]);
    let dir = bench.path("fs");
    bench.fuse_fs_ok(&["mount", "--kernel", "a", str_of(&dir)]);
    fs::write(dir.join("f"), vec![7; 100_000]).unwrap();
    bench.fault("hang");
    let started = Instant::now();
    let output = bench.fuse_fs(&["umount", str_of(&dir), "--timeout", "2"]);
    assert_eq!(output.status.code(), Some(32));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("still mounted"),
        "{output:?}"
    );
    assert_eq!(bench.mounts().len(), 2);
    let output = bench.fuse_fs(&["umount", str_of(&dir), "--timeout", "2", "--force"]);
    assert_eq!(output.status.code(), Some(32));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("detached by force"),
        "{output:?}"
    );
    assert!(
        started.elapsed() < Duration::from_secs(40),
        "{:?}",
        started.elapsed()
    );
    assert!(bench.mounts().is_empty());
    wait_until("ended", || bench.daemons().is_empty());
    bench.no_fault();
    bench.fuse_fs_ok(&["mount", "--kernel", "a", str_of(&dir)]);
    bench.fuse_fs_ok(&["umount", str_of(&dir)]);
    tool(&["e2fsck", "-fn", str_of(&store)]);
}

#[test]
fn a_daemon_that_died_is_told_and_cleared_away() {
    let bench = Bench::new();
    bench.volume("a", MIB);
    bench.view(&[]);
    let daemons = bench.daemons();
    // SAFETY: the daemon of this bench.
    unsafe { libc::kill(daemons[0], libc::SIGKILL) };
    wait_until("dead", || bench.daemons().is_empty());
    let output = bench.fuse_fs(&["umount", str_of(&bench.path("mnt"))]);
    assert_eq!(output.status.code(), Some(32));
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("had died"),
        "{output:?}"
    );
    assert!(bench.mounts().is_empty());
    bench.view(&[]);
    bench.fuse_fs_ok(&["umount", str_of(&bench.path("mnt"))]);
}
