//! The view as files: what image and backup tools do with it.

use crate::bench::{Bench, str_of, tool, tool_output};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

const MIB: u64 = 1 << 20;

/// Bytes that differ at every position of a few MiB.
fn pattern(len: u64) -> Vec<u8> {
    (0..len)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect()
}

fn errno<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

fn open_rw(path: &Path) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn volumes_appear_and_vanish_and_nothing_else_can_be_made() {
    let bench = Bench::new();
    let a = bench.volume("a", MIB);
    bench.volume("a@s", MIB);
    bench.view(&[]);
    let (volumes, snapshots) = (bench.path("mnt/volumes"), bench.path("mnt/snapshots"));
    assert_eq!(names(&bench.path("mnt")), ["snapshots", "volumes"]);
    assert_eq!(
        (names(&volumes), names(&snapshots)),
        (vec!["a".to_owned()], vec!["a@s".to_owned()])
    );
    bench.volume("b", MIB);
    assert_eq!(names(&volumes), ["a", "b"]);
    assert_eq!(errno(fs::remove_file(volumes.join("b"))), libc::EPERM);
    assert_eq!(
        errno(fs::rename(volumes.join("b"), volumes.join("c"))),
        libc::EPERM
    );
    assert_eq!(errno(File::create(volumes.join("new"))), libc::EPERM);
    assert_eq!(errno(fs::remove_file(snapshots.join("a@s"))), libc::EROFS);
    assert_eq!(errno(File::create(snapshots.join("a@t"))), libc::EROFS);
    assert_eq!(errno(fs::create_dir(bench.path("mnt/x"))), libc::EPERM);
    assert_eq!(errno(File::open(volumes.join("a@s"))), libc::ENOENT);
    fs::remove_file(a).unwrap();
    assert_eq!(names(&volumes), ["b"]);
    bench.fuse_fs_ok(&["umount", str_of(&bench.path("mnt"))]);
    assert!(bench.mounts().is_empty() && bench.daemons().is_empty());
}

#[test]
fn what_is_written_is_read_and_is_in_the_store() {
    for options in [&[][..], &["--cache"][..]] {
        let bench = Bench::new();
        let store = bench.volume("a", 8 * MIB);
        bench.view(options);
        let data = pattern(3 * MIB + 777);
        let file = open_rw(&bench.file("a"));
        file.write_all_at(&data, 12_345).unwrap();
        file.sync_all().unwrap();
        assert!(bench.flushes() >= 1, "fsync is a flush");
        let mut back = vec![0; data.len()];
        file.read_exact_at(&mut back, 12_345).unwrap();
        assert!(back == data);
        assert!(fs::read(&store).unwrap()[12_345..12_345 + data.len()] == data);
        drop(file);
        tool(&["cmp", str_of(&store), str_of(&bench.file("a"))]);
    }
}

#[test]
fn the_end_of_a_volume_is_that_of_a_block_device() {
    let bench = Bench::new();
    bench.volume("a", MIB + 100);
    bench.view(&[]);
    let file = open_rw(&bench.file("a"));
    assert_eq!(
        file.write_at(&[7; 200], MIB).unwrap(),
        100,
        "a write that crosses the end is short"
    );
    assert_eq!(errno(file.write_at(&[7; 200], MIB + 100)), libc::ENOSPC);
    assert_eq!(file.read_at(&mut [0; 200], MIB).unwrap(), 100);
    assert_eq!(file.read_at(&mut [0; 200], MIB + 100).unwrap(), 0);
    assert_eq!(file.metadata().unwrap().len(), MIB + 100);
}

#[test]
fn truncate_grows_and_never_shrinks() {
    let bench = Bench::new();
    let store = bench.volume("a", MIB);
    bench.view(&[]);
    let file = open_rw(&bench.file("a"));
    file.set_len(MIB).unwrap();
    assert_eq!(errno(file.set_len(MIB - 1)), libc::EPERM);
    file.set_len(4 * MIB).unwrap();
    assert_eq!(fs::metadata(&store).unwrap().len(), 4 * MIB);
    assert_eq!(file.metadata().unwrap().len(), 4 * MIB);
    file.write_all_at(b"end", 4 * MIB - 3).unwrap();
    fs::write(bench.file("a"), b"O_TRUNC is ignored").unwrap();
    assert_eq!(fs::metadata(bench.file("a")).unwrap().len(), 4 * MIB);
    assert!(fs::read(&store).unwrap().ends_with(b"end"));
}

#[test]
fn holes_are_punched_and_found() {
    let bench = Bench::new();
    let store = bench.volume("a", 4 * MIB);
    bench.view(&[]);
    let file = open_rw(&bench.file("a"));
    file.write_all_at(&pattern(2 * MIB), MIB).unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)).unwrap(), MIB);
    assert_eq!(seek(&file, SeekFrom::Hole(MIB)).unwrap(), 3 * MIB);
    assert_eq!(
        errno(seek(&file, SeekFrom::Data(3 * MIB)).map_err(io::Error::from)),
        libc::ENXIO
    );
    let before = fs::metadata(&store).unwrap().blocks();
    fallocate(
        &file,
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
        MIB,
        MIB,
    )
    .unwrap();
    fallocate(
        &file,
        FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
        2 * MIB,
        MIB / 2,
    )
    .unwrap();
    assert_eq!(before - fs::metadata(&store).unwrap().blocks(), MIB / 512);
    let bytes = fs::read(bench.file("a")).unwrap();
    assert!(
        bytes[..5 * (MIB / 2) as usize]
            .iter()
            .all(|byte| *byte == 0)
    );
    assert!(
        bytes[5 * (MIB / 2) as usize..3 * MIB as usize]
            == pattern(2 * MIB)[3 * (MIB / 2) as usize..]
    );
    let preallocate = fallocate(&file, FallocateFlags::KEEP_SIZE, 0, MIB).map_err(io::Error::from);
    assert_eq!(errno(preallocate), libc::EOPNOTSUPP);
}

#[test]
fn snapshots_are_read_only_with_attributes_of_their_own() {
    let bench = Bench::new();
    bench.volume("a", MIB);
    fs::write(bench.volume("a@s", MIB), pattern(MIB)).unwrap();
    bench.view(&[]);
    assert!(fs::read(bench.file("a@s")).unwrap() == pattern(MIB));
    assert_eq!(
        errno(File::options().write(true).open(bench.file("a@s"))),
        libc::EROFS
    );
    let value = |file: &str, name: &str| {
        let mut buffer = [0; 64];
        let len = rustix::fs::getxattr(bench.file(file), name, &mut buffer);
        len.map(|len| String::from_utf8_lossy(&buffer[..len]).into_owned())
    };
    assert_eq!(value("a", "user.blockd.size").unwrap(), MIB.to_string());
    assert_eq!(value("a", "user.blockd.epoch").unwrap(), "3");
    assert_eq!(value("a", "user.blockd.id"), value("a@s", "user.blockd.id"));
    assert!(value("a@s", "user.blockd.snapshot_id").is_ok());
    assert_eq!(
        value("a", "user.blockd.snapshot_id"),
        Err(rustix::io::Errno::NODATA)
    );
    let space = rustix::fs::statvfs(bench.path("mnt")).unwrap();
    assert_eq!(
        (
            space.f_blocks * space.f_frsize,
            space.f_bavail * space.f_frsize
        ),
        (4 << 30, 3 << 30)
    );
}

#[test]
fn image_and_copy_tools_work_on_the_files() {
    let bench = Bench::new();
    let store = bench.volume("a", 16 * MIB);
    bench.volume("b", 16 * MIB);
    bench.view(&[]);
    let (a, b, source) = (bench.file("a"), bench.file("b"), bench.path("source"));
    fs::write(&source, pattern(5 * MIB)).unwrap();
    tool(&[
        "dd",
        &format!("if={}", str_of(&source)),
        &format!("of={}", str_of(&a)),
        "bs=1M",
        "oflag=direct",
        "conv=notrunc,fsync",
        "seek=2",
    ]);
    tool(&["cmp", str_of(&store), str_of(&a)]);
    tool(&[
        "qemu-img",
        "convert",
        "-n",
        "-f",
        "raw",
        "-O",
        "raw",
        str_of(&a),
        str_of(&b),
    ]);
    tool(&[
        "qemu-img",
        "compare",
        "-f",
        "raw",
        "-F",
        "raw",
        str_of(&a),
        str_of(&b),
    ]);
    let copy = bench.path("copy");
    tool(&["cp", "--sparse=always", str_of(&a), str_of(&copy)]);
    tool(&["cmp", str_of(&a), str_of(&copy)]);
    assert!(
        fs::metadata(&copy).unwrap().blocks() * 512 < 6 * MIB,
        "the copy is sparse"
    );
    let map = tool(&["qemu-img", "map", "-f", "raw", "--output=json", str_of(&a)]);
    assert!(
        map.contains("\"start\": 2097152, \"length\": 5242880") && map.contains("\"zero\": true"),
        "{map}"
    );
}

#[test]
fn two_files_are_written_at_once() {
    let bench = Bench::new();
    let stores = ["a", "b"].map(|name| bench.volume(name, 8 * MIB));
    bench.view(&[]);
    let write = |name: &'static str, seed: u64| {
        let path = bench.file(name);
        std::thread::spawn(move || {
            let file = open_rw(&path);
            for block in 0..512 {
                file.write_all_at(&[(block * seed) as u8; 16_384], block * 16_384)
                    .unwrap();
            }
            file.sync_all().unwrap();
        })
    };
    for thread in [write("a", 3), write("b", 5)] {
        thread.join().unwrap();
    }
    for (store, seed) in stores.iter().zip([3, 5]) {
        let bytes = fs::read(store).unwrap();
        assert!(
            bytes
                .chunks(16_384)
                .enumerate()
                .all(|(at, run)| run.iter().all(|byte| *byte == (at * seed) as u8))
        );
    }
}

#[test]
fn a_signal_unmounts_cleanly_and_flushes() {
    let bench = Bench::new();
    bench.volume("a", MIB);
    bench.view(&[]);
    let file = open_rw(&bench.file("a"));
    file.write_all_at(b"x", 0).unwrap();
    assert_eq!(bench.flushes(), 0);
    let daemons = bench.daemons();
    assert_eq!(daemons.len(), 1, "{daemons:?}");
    // SAFETY: the daemon of this bench.
    unsafe { libc::kill(daemons[0], libc::SIGTERM) };
    bench.wait_unmounted();
    assert_eq!(bench.flushes(), 1);
    file.write_all_at(b"y", 1).unwrap();
    drop(file);
    crate::bench::wait_until("ended after the last close", || bench.daemons().is_empty());
    assert!(bench.flushes() >= 2);
}

#[test]
fn usage_errors_say_what_to_do_and_exit_as_mount_does() {
    let bench = Bench::new();
    let expect = |arguments: &[&str], code: i32, text: &str| {
        let output = bench.fuse_fs(arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(text), "{arguments:?}: {said}");
    };
    let mnt = bench.path("mnt");
    expect(&["volumes", "/nowhere/at/all"], 1, "No such file");
    expect(&["volumes", "/proc"], 32, "mounted there already");
    expect(
        &["volumes", str_of(&mnt), "--servers", "/nowhere"],
        32,
        "no server there",
    );
    expect(&["mount", "v", str_of(&mnt), "-t", "xfs"], 1, "--kernel");
    expect(&["mount", "--kernel", "a/b", str_of(&mnt)], 1, "VOL@SNAP");
    expect(
        &["mount", "--kernel", "v", str_of(&mnt)],
        32,
        "no such volume",
    );
    expect(
        &["umount", str_of(&mnt)],
        32,
        "nothing that fuse-fs mounted",
    );
    expect(&["umount"], 1, "Usage");
    bench.volume("v", MIB);
    expect(&["mount", "--kernel", "v", str_of(&mnt)], 32, "mkfs.ext4");
    assert!(
        bench.mounts().is_empty() && bench.daemons().is_empty(),
        "nothing is left behind"
    );
    assert!(
        !tool_output(&["mountpoint", "-q", str_of(&mnt)])
            .status
            .success()
    );
}
