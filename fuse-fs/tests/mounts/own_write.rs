//! Our own ext4, mounted read-write: what it writes the kernel and e2fsck find right, also after a kill.

use crate::bench::{Bench, str_of, tool, tool_output, wait_until};
use crate::own::{Kernel, errno, fill};
use crate::shadow::{comparable, difference, tree, without_space};
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

/// A volume with a filesystem of mke2fs, mounted on `fs`.
fn mounted(bench: &Bench, size_mib: u64, options: &[&str]) -> (PathBuf, PathBuf) {
    let volume = bench.volume("v", size_mib * MIB);
    let mut mkfs = vec!["mkfs.ext4", "-q", "-F"];
    mkfs.extend(options);
    mkfs.push(str_of(&volume));
    tool(&mkfs);
    let dir = bench.path("fs");
    mount(bench);
    (volume, dir)
}

/// A daemon that was killed may still be letting its memory go, and has the volume until then.
fn mount(bench: &Bench) {
    bench.fuse_fs_ok(&["mount", "v", str_of(&bench.path("fs")), "--wait", "10"]);
}

fn unmount(bench: &Bench) {
    bench.fuse_fs_ok(&["umount", str_of(&bench.path("fs"))]);
    assert!(bench.mounts().is_empty() && bench.daemons().is_empty());
}

fn check(volume: &Path) {
    tool(&["e2fsck", "-fn", str_of(volume)]);
}

/// Kills the daemon, as a crash does.
fn kill(bench: &Bench) {
    for pid in bench.daemons() {
        // SAFETY: a process that this bench started.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    wait_until("ended", || bench.daemons().is_empty());
    tool(&["umount", "-l", str_of(&bench.path("fs"))]);
}

#[test]
fn a_tree_is_the_kernel_s_while_it_is_mounted_and_after() {
    for options in [&[][..], &["-b", "1024"], &["-O", "^metadata_csum,^64bit"]] {
        let bench = Bench::new();
        let (volume, dir) = mounted(&bench, 256, options);
        let image = bench.path("image");
        File::create(&image).unwrap().set_len(256 * MIB).unwrap();
        tool(&["mkfs.ext4", "-q", "-F", str_of(&image)]);
        let theirs = Kernel::mount(&image, bench.path("kernel"));
        for dir in [&dir, &theirs.0] {
            fill(dir);
            fs::remove_dir_all(dir.join("many/d1")).unwrap();
            fs::rename(dir.join("many/d0"), dir.join("moved")).unwrap();
        }
        let live = tree(&dir);
        let difference_live = difference(&comparable(live.clone()), &comparable(tree(&theirs.0)));
        assert_eq!(difference_live, None, "{options:?}");
        drop(theirs);
        unmount(&bench);
        check(&volume);
        bench.fuse_fs_ok(&["mount", "v", str_of(&dir), "-o", "ro"]);
        let after = tree(&dir);
        unmount(&bench);
        let change = difference(&without_space(live), &without_space(after.clone()));
        assert_eq!(change, None, "{options:?}");
        let kernel = Kernel::mount(&volume, bench.path("kernel"));
        assert_eq!(difference(&after, &tree(&kernel.0)), None, "{options:?}");
    }
}

#[test]
fn what_was_fsynced_outlives_a_kill() {
    let bench = Bench::new();
    let (volume, dir) = mounted(&bench, 128, &[]);
    for round in 0..4 {
        for number in 0..50 {
            let path = dir.join(format!("r{round}-{number}"));
            let mut file = File::create(path).unwrap();
            file.write_all(&vec![number as u8; number * 331]).unwrap();
            file.sync_all().unwrap();
        }
        let unsynced = dir.join(format!("unsynced{round}"));
        fs::write(unsynced, vec![b'u'; 300_000]).unwrap();
        kill(&bench);
        mount(&bench);
        for number in 0..50 {
            let bytes = fs::read(dir.join(format!("r{round}-{number}"))).unwrap();
            assert!(
                bytes == vec![number as u8; number * 331],
                "{round} {number}"
            );
        }
    }
    unmount(&bench);
    check(&volume);
}

#[test]
fn sigterm_loses_nothing() {
    let bench = Bench::new();
    let (volume, dir) = mounted(&bench, 64, &[]);
    fs::write(dir.join("file"), vec![b'x'; 5 << 20]).unwrap();
    // SAFETY: a process that this bench started.
    unsafe { libc::kill(bench.daemons()[0], libc::SIGTERM) };
    bench.wait_unmounted();
    wait_until("ended", || bench.daemons().is_empty());
    check(&volume);
    let kernel = Kernel::mount(&volume, bench.path("kernel"));
    assert!(fs::read(kernel.0.join("file")).unwrap() == vec![b'x'; 5 << 20]);
}

#[test]
fn a_volume_has_one_holder() {
    let bench = Bench::new();
    let (volume, dir) = mounted(&bench, 64, &[]);
    let other = bench.path("mnt");
    let refused = bench.fuse_fs(&["mount", "v", str_of(&other)]);
    assert_eq!(refused.status.code(), Some(32));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("held by"), "{text}");
    let held = bench.path("held");
    fs::write(dir.join("first"), b"1").unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let words = ["mount", "v", str_of(&other), "--wait", "30"];
            bench.fuse_fs_ok(&words)
        });
        bench.fuse_fs_ok(&["umount", str_of(&dir)]);
        waiting.join().unwrap();
    });
    assert!(!held.exists());
    assert_eq!(fs::read(other.join("first")).unwrap(), b"1");
    bench.fuse_fs_ok(&["umount", str_of(&other)]);
    check(&volume);
}

#[test]
fn a_lease_that_is_broken_ends_the_writing() {
    let bench = Bench::new();
    let (volume, dir) = mounted(&bench, 64, &[]);
    let mut file = File::create(dir.join("file")).unwrap();
    file.write_all(b"before").unwrap();
    file.sync_all().unwrap();
    bench.fault("fenced");
    file.write_all(b"after").unwrap();
    assert_eq!(errno(file.sync_all()), libc::EIO);
    // What is only in memory is refused from the next commit on.
    wait_until("given up", || File::create(dir.join("new")).is_err());
    assert_eq!(errno(File::create(dir.join("other"))), libc::EIO);
    assert_eq!(fs::read(dir.join("file")).unwrap()[..6], *b"before");
    drop(file);
    kill(&bench);
    bench.no_fault();
    mount(&bench);
    assert_eq!(fs::read(dir.join("file")).unwrap(), b"before");
    unmount(&bench);
    check(&volume);
}

#[test]
fn a_snapshot_of_the_mounted_filesystem_needs_no_replay() {
    let bench = Bench::new();
    let (_, dir) = mounted(&bench, 64, &[]);
    fs::write(dir.join("file"), b"old").unwrap();
    fs::create_dir(dir.join(".snapshot/one")).unwrap();
    fs::write(dir.join("file"), b"new").unwrap();
    fs::remove_dir(dir.join("lost+found")).unwrap();
    let seen: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(seen, ["file"], ".snapshot is not listed");
    assert_eq!(fs::read_dir(dir.join(".snapshot")).unwrap().count(), 1);
    let frozen = dir.join(".snapshot/one");
    assert_eq!(fs::read(frozen.join("file")).unwrap(), b"old");
    assert!(frozen.join("lost+found").is_dir());
    assert_eq!(errno(fs::write(frozen.join("file"), b"x")), libc::EROFS);
    assert_eq!(errno(fs::remove_file(frozen.join("file"))), libc::EROFS);
    assert_eq!(errno(fs::create_dir(frozen.clone())), libc::EEXIST);
    assert_eq!(
        errno(fs::metadata(dir.join(".snapshot/none"))),
        libc::ENOENT
    );
    assert_eq!(errno(fs::create_dir(dir.join(".snapshot"))), libc::EEXIST);
    let snapshot = bench.path("store/v@one");
    check(&snapshot);
    let kernel = bench.path("kernel");
    fs::create_dir(&kernel).unwrap();
    tool(&["mount", "-o", "loop,ro", str_of(&snapshot), str_of(&kernel)]);
    let old = fs::read(kernel.join("file"));
    tool(&["umount", str_of(&kernel)]);
    assert_eq!(old.unwrap(), b"old");
    unmount(&bench);
}

#[test]
fn a_file_without_a_name_lives_until_it_is_closed() {
    let bench = Bench::new();
    let (volume, dir) = mounted(&bench, 64, &[]);
    let free = || {
        tool(&["sync", str_of(&dir)]);
        let text = tool(&["stat", "-f", "-c", "%f %d", str_of(&dir)]);
        text.trim().to_owned()
    };
    let before = free();
    let mut file = File::options()
        .create_new(true)
        .read(true)
        .write(true)
        .open(dir.join("gone"))
        .unwrap();
    file.write_all(&[7; 100_000]).unwrap();
    fs::remove_file(dir.join("gone")).unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes, [7; 100_000]);
    drop(file);
    wait_until("freed", || free() == before);
    let open = File::create(dir.join("open")).unwrap();
    open.write_all_at(&[1; 50_000], 0).unwrap();
    fs::remove_file(dir.join("open")).unwrap();
    kill(&bench);
    drop(open);
    mount(&bench);
    assert_eq!(free(), before, "the orphan went at the mount");
    unmount(&bench);
    check(&volume);
}

#[test]
fn a_full_volume_says_so_and_stays_whole() {
    let bench = Bench::new();
    let (volume, dir) = mounted(&bench, 16, &["-m", "0"]);
    let mut written = 0;
    let error = loop {
        let file = File::create(dir.join(format!("f{written}")));
        let result = file.and_then(|mut file| {
            file.write_all(&[b'f'; 1 << 20])?;
            file.sync_all()
        });
        match result {
            Ok(()) => written += 1,
            Err(error) => break error.raw_os_error().unwrap(),
        }
        assert!(written < 20);
    };
    assert_eq!(error, libc::ENOSPC);
    fs::remove_file(dir.join("f0")).unwrap();
    unmount(&bench);
    check(&volume);
    let kernel = Kernel::mount(&volume, bench.path("kernel"));
    for number in 1..written {
        assert_eq!(
            fs::metadata(kernel.0.join(format!("f{number}")))
                .unwrap()
                .len(),
            1 << 20
        );
    }
}

#[test]
fn a_feature_that_cannot_be_written_mounts_read_only() {
    let bench = Bench::new();
    let (_, dir) = mounted(&bench, 64, &["-O", "quota"]);
    assert_eq!(errno(File::create(dir.join("new"))), libc::EROFS);
    let options = tool(&["findmnt", "-n", "-o", "OPTIONS", str_of(&dir)]);
    assert!(options.starts_with("ro,"), "{options}");
    unmount(&bench);
    let volume = bench.volume("v", 64 * MIB);
    tool(&[
        "mkfs.ext4",
        "-q",
        "-F",
        "-O",
        "inline_data",
        str_of(&volume),
    ]);
    let output = bench.fuse_fs(&["mount", "v", str_of(&dir)]);
    assert_eq!(output.status.code(), Some(32));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("inline_data"), "{text}");
    assert!(tool_output(&["findmnt", str_of(&dir)]).stdout.is_empty());
}

/// `volume resize`, then `grow`: the programs that use the mount have the room, without an unmount.
#[test]
fn a_mounted_filesystem_grows_with_its_volume() {
    let bench = Bench::new();
    let (volume, dir) = mounted(&bench, 64, &[]);
    let large = File::create(dir.join("large")).unwrap();
    let free = |dir: &Path| {
        let space = rustix::fs::statvfs(dir).unwrap();
        space.f_bavail * space.f_frsize
    };
    assert!(free(&dir) < 64 * MIB);
    let small = bench.stats(&["grow", str_of(&dir)]);
    assert!(small.contains("64.00 MiB already"), "{small}");
    let file = File::options().write(true).open(&volume).unwrap();
    file.set_len(400 * MIB).unwrap();
    let told = bench.stats(&["grow", str_of(&dir), "--json"]);
    let expected = format!(
        "{{\"grown\":{{\"bytes_before\":{},\"bytes\":{},\"volume_bytes\":{}}}}}\n",
        64 * MIB,
        400 * MIB,
        400 * MIB
    );
    assert_eq!(told, expected);
    assert!(free(&dir) > 300 * MIB, "{}", free(&dir));
    for at in (0..300 * MIB).step_by(MIB as usize) {
        large.write_all_at(&[at as u8 | 1; 1 << 20], at).unwrap();
    }
    large.sync_all().unwrap();
    kill(&bench);
    mount(&bench);
    assert_eq!(fs::metadata(dir.join("large")).unwrap().len(), 300 * MIB);
    unmount(&bench);
    check(&volume);
    let view = tool_output(&[str_of(&bench.program()), "grow", str_of(&dir)]);
    let said = String::from_utf8_lossy(&view.stderr).into_owned();
    assert_eq!(view.status.code(), Some(32), "{said}");
    assert!(said.contains("no directory on which"), "{said}");
}

/// Holes are found exactly, though the kernel keeps what programs have written and not yet sent.
#[test]
fn holes_are_found_also_in_files_that_are_being_written() {
    let bench = Bench::new();
    let (volume, dir) = mounted(&bench, 64, &["-b", "4096"]);
    let path = dir.join("sparse");
    let file = File::create(&path).unwrap();
    let reader = File::open(&path).unwrap();
    for at in [1, 5, 9] {
        file.write_all_at(&[at as u8; 1 << 20], at * MIB).unwrap();
        let mut found = Vec::new();
        let mut from = 0;
        while let Ok(start) = rustix::fs::seek(&reader, rustix::fs::SeekFrom::Data(from)) {
            from = rustix::fs::seek(&reader, rustix::fs::SeekFrom::Hole(start)).unwrap();
            found.push((start / MIB, from / MIB));
        }
        let expected = [1, 5, 9].iter().filter(|other| **other <= at);
        let expected: Vec<(u64, u64)> = expected.map(|at| (*at, at + 1)).collect();
        assert_eq!(found, expected, "while it is open for writing");
        let mut byte = [0];
        reader.read_exact_at(&mut byte, at * MIB).unwrap();
        assert_eq!(byte, [at as u8]);
    }
    file.set_len(20 * MIB).unwrap();
    drop((file, reader));
    let copy = dir.join("copy");
    tool(&["cp", "--sparse=auto", str_of(&path), str_of(&copy)]);
    tool(&["cmp", str_of(&path), str_of(&copy)]);
    tool(&["sync", str_of(&copy)]);
    let blocks = fs::metadata(&copy).unwrap().blocks();
    assert_eq!(blocks * 512, 3 * MIB, "the copy has the holes");
    tool(&["fallocate", "--dig-holes", str_of(&path)]);
    unmount(&bench);
    check(&volume);
}

/// Memory that a program has mapped and changed is data, though nothing was written by a call.
#[test]
fn changed_memory_is_data() {
    let bench = Bench::new();
    let (volume, dir) = mounted(&bench, 64, &["-b", "4096"]);
    let path = dir.join("mapped");
    let mut options = File::options();
    let options = options.create_new(true).read(true).write(true);
    let file = options.open(&path).unwrap();
    file.set_len(8 * MIB).unwrap();
    // SAFETY: nobody else has the file.
    let mut map = unsafe { memmap2::MmapMut::map_mut(&file).unwrap() };
    drop(file);
    let reader = File::open(&path).unwrap();
    let data = |from| rustix::fs::seek(&reader, rustix::fs::SeekFrom::Data(from));
    assert!(data(0).is_err(), "a hole");
    map[5 << 20] = 7;
    assert_eq!(data(0).unwrap(), 5 * MIB);
    map[3 << 20] = 7;
    assert_eq!(data(0).unwrap(), 3 * MIB, "once more, after its cache went");
    drop((map, reader));
    unmount(&bench);
    check(&volume);
}

/// fstrim(8), for who may; a mount with `nodiscard` keeps what is free until then.
#[test]
fn fstrim_gives_free_space_back() {
    let bench = Bench::new();
    let (volume, dir) = mounted(&bench, 64, &[]);
    let taken = || fs::metadata(&volume).unwrap().blocks() * 512;
    unmount(&bench);
    bench.fuse_fs_ok(&[
        "mount",
        "v",
        str_of(&dir),
        "-o",
        "nodiscard",
        "--wait",
        "10",
    ]);
    fs::write(dir.join("kept"), vec![1; 3 << 20]).unwrap();
    fs::write(dir.join("gone"), vec![2; 30 << 20]).unwrap();
    tool(&["sync", str_of(&dir.join("gone")), str_of(&dir.join("kept"))]);
    fs::remove_file(dir.join("gone")).unwrap();
    File::open(&dir).unwrap().sync_all().unwrap();
    assert!(taken() > 33 * MIB, "{}", taken());
    let said = tool(&["fstrim", "-v", str_of(&dir)]);
    assert!(said.contains("trimmed"), "{said}");
    assert!(taken() < 12 * MIB, "{} after {said}", taken());
    assert!(fs::read(dir.join("kept")).unwrap() == vec![1; 3 << 20]);
    bench.fuse_fs_ok(&["umount", str_of(&dir)]);
    bench.fuse_fs_ok(&["mount", "v", str_of(&dir), "-o", "ro", "--wait", "10"]);
    let refused = tool_output(&["fstrim", str_of(&dir)]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains("Read-only"), "{text}");
    unmount(&bench);
    check(&volume);
}

/// With `low_latency` processors are kept awake while the mount is busy, and only then.
#[test]
fn low_latency_is_held_while_the_mount_is_busy() {
    let bench = Bench::new();
    let (volume, dir) = mounted(&bench, 64, &[]);
    unmount(&bench);
    let words = [
        "mount",
        "v",
        str_of(&dir),
        "-o",
        "low_latency",
        "--wait",
        "10",
    ];
    if !Path::new("/dev/cpu_dma_latency").exists() {
        let said = String::from_utf8(bench.fuse_fs(&words).stderr).unwrap();
        assert!(said.contains("/dev/cpu_dma_latency"), "{said}");
        return;
    }
    bench.fuse_fs_ok(&words);
    let daemon = bench.daemons()[0];
    let is_held = || {
        let open = fs::read_dir(format!("/proc/{daemon}/fd")).unwrap();
        let mut links = open.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.any(|link| link == Path::new("/dev/cpu_dma_latency"))
    };
    assert!(!is_held());
    wait_until("busy", || {
        for number in 0..500 {
            File::create(dir.join(format!("f{number}"))).unwrap();
        }
        is_held()
    });
    wait_until("idle", || !is_held());
    unmount(&bench);
    check(&volume);
}
