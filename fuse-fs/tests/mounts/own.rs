//! Our own ext4, mounted: snapshots that the kernel wrote, options, exit codes, failures.

use crate::bench::{Bench, str_of, tool, wait_until};
use crate::shadow::{difference, tree};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

/// A mount of the kernel that ends with it.
pub(crate) struct Kernel(pub(crate) PathBuf);

impl Kernel {
    pub(crate) fn mount(image: &Path, dir: PathBuf) -> Self {
        fs::create_dir_all(&dir).unwrap();
        tool(&[
            "mount",
            "-o",
            "loop,user_xattr,acl",
            str_of(image),
            str_of(&dir),
        ]);
        Self(dir)
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        // A process that another test is starting may hold our open files for a moment.
        wait_until("unmounted", || {
            crate::bench::tool_output(&["umount", str_of(&self.0)])
                .status
                .success()
        });
    }
}

/// Something of everything.
pub(crate) fn fill(dir: &Path) {
    for number in 0..700 {
        let sub = dir.join(format!("many/d{}", number % 3));
        fs::create_dir_all(&sub).unwrap();
        let file = sub.join(format!("file-{number:04}-{}", "x".repeat(number % 90)));
        fs::write(&file, vec![number as u8; number * 41 % 9000]).unwrap();
        fs::set_permissions(
            &file,
            fs::Permissions::from_mode(number as u32 * 7 % 0o10000),
        )
        .unwrap();
        chown(
            &file,
            Some(number as u32 * 300),
            Some(70_000 - number as u32),
        )
        .unwrap();
        if number % 9 == 1 {
            fs::hard_link(&file, dir.join(format!("link{number}"))).unwrap();
        }
    }
    for length in [1, 59, 60, 61, 900] {
        symlink("z".repeat(length), dir.join(format!("symlink{length}"))).unwrap();
    }
    for (name, words) in [("char", "c 300 70000"), ("block", "b 8 1"), ("fifo", "p")] {
        let mut arguments = vec!["mknod", "-m", "640"];
        let path = dir.join(name);
        arguments.push(str_of(&path));
        arguments.extend(words.split(' '));
        tool(&arguments);
    }
    for time in [
        "1901-12-20",
        "1969-07-20 20:17:40.5",
        "2040-01-01",
        "2446-01-01",
    ] {
        let name = dir.join(format!("time {time}"));
        fs::write(&name, time).unwrap();
        tool(&["touch", "-d", time, str_of(&name)]);
    }
    let sparse = File::create(dir.join("sparse")).unwrap();
    for piece in 0..200 {
        sparse
            .write_all_at(&[b'q'; 5000], piece * 65_536 + piece * 100)
            .unwrap();
    }
    sparse.set_len(40 << 20).unwrap();
    let allocated = File::create(dir.join("allocated")).unwrap();
    let how = rustix::fs::FallocateFlags::empty();
    // Files without extents cannot have it.
    let _ = rustix::fs::fallocate(&allocated, how, 8192, 300_000);
    allocated.write_all_at(b"written", 100_000).unwrap();
    for (name, value) in [
        ("user.small", 3),
        ("trusted.large", 300),
        ("user.larger", 500),
    ] {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(dir.join("sparse"), name, &vec![b'v'; value], flags).unwrap();
    }
    tool(&[
        "setfacl",
        "-m",
        "u:7:rx,g:9:w",
        str_of(&dir.join("allocated")),
    ]);
    tool(&["setfacl", "-d", "-m", "u:7:rx", str_of(&dir.join("many"))]);
    File::open(dir).unwrap().sync_all().unwrap();
}

/// The image as a crash leaves it: copied while it is mounted and has just been changed.
fn crashed_image(bench: &Bench, options: &[&str]) -> PathBuf {
    let image = bench.volume("image", 256 * MIB);
    let mut mkfs = vec!["mkfs.ext4", "-q", "-F"];
    mkfs.extend(options);
    mkfs.push(str_of(&image));
    tool(&mkfs);
    let snapshot = bench.path("store/a@s");
    let kernel = Kernel::mount(&image, bench.path("kernel"));
    fill(&kernel.0);
    tool(&["sync", "-f", str_of(&kernel.0)]);
    fs::remove_dir_all(kernel.0.join("many/d2")).unwrap();
    fs::write(kernel.0.join("last"), b"in the journal").unwrap();
    File::open(kernel.0.join("last"))
        .unwrap()
        .sync_all()
        .unwrap();
    tool(&["cp", "--sparse=always", str_of(&image), str_of(&snapshot)]);
    drop(kernel);
    snapshot
}

/// `dumpe2fs` of an image that was mounted when it was copied.
fn needs_recovery(image: &Path) -> bool {
    tool(&["dumpe2fs", "-h", str_of(image)]).contains("needs_recovery")
}

#[test]
fn a_snapshot_of_a_mounted_filesystem_is_what_the_kernel_makes_of_it() {
    for options in [
        &[][..],
        &["-b", "1024", "-O", "^metadata_csum,^64bit"],
        &["-O", "^extent,^dir_index,^64bit"],
    ] {
        let bench = Bench::new();
        let snapshot = crashed_image(&bench, options);
        assert!(needs_recovery(&snapshot), "{options:?}");
        let dir = bench.path("fs");
        bench.fuse_fs_ok(&["mount", "a@s", str_of(&dir)]);
        let copy = bench.path("copy");
        tool(&["cp", "--sparse=always", str_of(&snapshot), str_of(&copy)]);
        let kernel = Kernel::mount(&copy, bench.path("kernel"));
        let (ours, theirs) = (tree(&dir), tree(&kernel.0));
        assert!(ours.len() > 400, "{}", ours.len());
        assert_eq!(difference(&ours, &theirs), None, "{options:?}");
        assert!(needs_recovery(&snapshot), "nothing was written");
        drop(kernel);
        bench.fuse_fs_ok(&["umount", str_of(&dir)]);
        assert!(bench.mounts().is_empty() && bench.daemons().is_empty());
    }
}

pub(crate) fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    result.unwrap_err().raw_os_error().unwrap()
}

#[test]
fn a_snapshot_cannot_be_changed_and_long_names_are_nobodys() {
    let bench = Bench::new();
    let snapshot = bench.volume("a@s", 16 * MIB);
    tool(&["mkfs.ext4", "-q", "-F", str_of(&snapshot)]);
    let dir = bench.path("fs");
    bench.fuse_fs_ok(&["mount", "a@s", str_of(&dir), "-o", "noexec,nodev"]);
    assert_eq!(errno(File::create(dir.join("new"))), libc::EROFS);
    assert_eq!(errno(fs::create_dir(dir.join("new"))), libc::EROFS);
    assert_eq!(errno(fs::remove_dir(dir.join("lost+found"))), libc::EROFS);
    assert_eq!(errno(fs::metadata(dir.join("none"))), libc::ENOENT);
    let long = dir.join("x".repeat(256));
    assert_eq!(errno(fs::metadata(long)), libc::ENAMETOOLONG);
    let options = tool(&["findmnt", "-n", "-o", "FSTYPE,SOURCE,OPTIONS", str_of(&dir)]);
    for word in [
        "fuse.blockd",
        "a@s",
        "ro,",
        "noexec",
        "nodev",
        "allow_other",
    ] {
        assert!(options.contains(word), "{word}: {options}");
    }
    let space = tool(&["stat", "-f", "-c", "%s %b %c %l", str_of(&dir)]);
    assert!(
        space.starts_with("4096 ") || space.starts_with("1024 "),
        "{space}"
    );
    assert!(space.trim().ends_with(" 255"), "{space}");
}

#[test]
fn statistics_tell_what_was_asked() {
    let bench = Bench::new();
    let snapshot = bench.volume("a@s", 16 * MIB);
    tool(&["mkfs.ext4", "-q", "-F", str_of(&snapshot)]);
    let dir = bench.path("fs");
    bench.fuse_fs_ok(&["mount", "a@s", str_of(&dir)]);
    assert!(fs::metadata(dir.join("none")).is_err());
    let command = ["stats", str_of(&dir)];
    let run = |more: &[&str]| {
        let words: Vec<&str> = command
            .iter()
            .copied()
            .chain(more.iter().copied())
            .collect();
        bench.stats(&words)
    };
    let json = run(&["--json"]);
    assert!(json.contains("\"lookup\":{"), "{json}");
    assert!(json.contains("\"panics\":0"), "{json}");
    assert!(json.contains("\"cache_hits\":"), "{json}");
    assert!(
        run(&[]).contains("lookup ") && run(&[]).contains("commit_mean_us 0"),
        "{json}"
    );
    let none = bench.path("mnt");
    let refused = crate::bench::tool_output(&[str_of(&bench.program()), "stats", str_of(&none)]);
    assert_eq!(refused.status.code(), Some(32));
}

#[test]
fn exit_codes_are_those_of_mount() {
    let bench = Bench::new();
    bench.volume("empty", 16 * MIB);
    let dir = bench.path("fs");
    let dir = str_of(&dir);
    for (line, code, said) in [
        (&["mount", "empty", dir][..], 32, "no ext2, ext3 or ext4"),
        (&["mount", "none", dir], 32, "none:"),
        (&["mount", "a/b", dir], 1, "not VOL or VOL@SNAP"),
        (
            &["mount", "empty", "/nowhere"],
            1,
            "make the directory first",
        ),
        (
            &["mount", "empty", dir, "-o", "bogus"],
            1,
            "bogus: no such mount option",
        ),
        (
            &["mount", "empty", dir, "-o", "commit=0"],
            1,
            "from 1 to 300 seconds",
        ),
    ] {
        let output = bench.fuse_fs(line);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{line:?}: {text}");
        assert!(text.contains(said), "{line:?}: {text}");
        assert_eq!(text.lines().count(), 1, "{line:?}: {text}");
    }
    assert!(bench.mounts().is_empty());
}

#[test]
fn servers_that_fail_are_eio_and_the_mount_lives() {
    for what in ["fail", "panic", "hang"] {
        let bench = Bench::new();
        let snapshot = bench.volume("a@s", 64 * MIB);
        tool(&["mkfs.ext4", "-q", "-F", str_of(&snapshot)]);
        let kernel = Kernel::mount(&snapshot, bench.path("kernel"));
        fs::write(kernel.0.join("file"), vec![7; 3 << 20]).unwrap();
        drop(kernel);
        let dir = bench.path("fs");
        bench.fuse_fs_ok(&["mount", "a@s", str_of(&dir), "--io-deadline", "1"]);
        let file = File::open(dir.join("file")).unwrap();
        bench.fault(what);
        let mut bytes = [0; 4096];
        assert_eq!(errno(file.read_at(&mut bytes, 0)), libc::EIO, "{what}");
        bench.no_fault();
        file.read_exact_at(&mut bytes, 2 << 20).unwrap();
        assert_eq!(bytes, [7; 4096]);
        drop(file);
        bench.fuse_fs_ok(&["umount", str_of(&dir)]);
    }
}

#[test]
fn fstab_s_helper_mounts_and_sigterm_unmounts() {
    let bench = Bench::new();
    let snapshot = bench.volume("a@s", 16 * MIB);
    tool(&["mkfs.ext4", "-q", "-F", str_of(&snapshot)]);
    let helper = bench.path("mount.fuse.blockd");
    symlink(bench.program(), &helper).unwrap();
    let dir = bench.path("fs");
    let options = format!(
        "ro,_netdev,nofail,servers={}",
        bench.path("store").display()
    );
    tool(&[str_of(&helper), "a@s", str_of(&dir), "-n", "-o", &options]);
    assert_eq!(bench.mounts().len(), 1);
    let daemons = bench.daemons();
    assert_eq!(daemons.len(), 1);
    // SAFETY: a process that this bench started.
    unsafe { libc::kill(daemons[0], libc::SIGTERM) };
    bench.wait_unmounted();
    wait_until("ended", || bench.daemons().is_empty());
}
