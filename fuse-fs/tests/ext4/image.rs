//! Images in files: made by mke2fs, filled by the kernel through a loop mount, judged by e2fsck.

use bytes::Bytes;
use fuse_fs::ext4::check::{self, report::Report};
use fuse_fs::ext4::device::{Device, Pending};
use fuse_fs::ext4::error::Ext4Error;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tempfile::TempDir;

/// Upper bound of any command of a test; a test that reaches it has found a hang.
const PATIENCE_S: &str = "60";

/// A directory for images, and a mount point in it.
pub(crate) struct Workshop {
    root: TempDir,
    names: AtomicU32,
}

/// A mount that ends with it.
struct Mounted<'a>(&'a Path);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        // A process that another test is starting may hold our open files for a moment.
        let unmounts = || run("umount", &[text(self.0)]).status.success();
        for _ in 0..100 {
            if unmounts() {
                break;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Workshop {
    pub(crate) fn new() -> Self {
        // In memory where possible: the kernel syncs often, and the bytes are not kept.
        let memory = Path::new("/dev/shm");
        let base = if memory.is_dir() {
            memory.to_owned()
        } else {
            std::env::temp_dir()
        };
        let root = tempfile::Builder::new()
            .prefix("fuse-fs-ext4")
            .tempdir_in(base)
            .unwrap();
        fs::create_dir(root.path().join("mnt")).unwrap();
        let names = AtomicU32::new(0);
        Self { root, names }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A file of `mib` MiB with a file system of mke2fs; `options` are split at spaces.
    pub(crate) fn make(&self, mib: u64, options: &str) -> PathBuf {
        let path = self.fresh("image");
        File::create(&path).unwrap().set_len(mib << 20).unwrap();
        let mut arguments = vec!["-q", "-F"];
        arguments.extend(options.split_whitespace());
        arguments.push(text(&path));
        succeed("mke2fs", &arguments);
        path
    }

    /// A name that was not used before.
    fn fresh(&self, what: &str) -> PathBuf {
        let number = self.names.fetch_add(1, Ordering::Relaxed);
        self.path(&format!("{what}{number}"))
    }

    /// Mounts the image with the kernel and calls `change` with the directory.
    pub(crate) fn change(&self, image: &Path, change: impl FnOnce(&Path)) {
        self.change_with(image, "user_xattr,acl", change);
    }

    /// As [`Self::change`], with mount options.
    pub(crate) fn change_with(&self, image: &Path, options: &str, change: impl FnOnce(&Path)) {
        let dir = self.path("mnt");
        let options = format!("loop,{options}");
        succeed(
            "mount",
            &["-t", "ext4", "-o", &options, text(image), text(&dir)],
        );
        let mounted = Mounted(&dir);
        change(&dir);
        drop(mounted);
        assert!(
            !Path::new(&dir).join("lost+found").exists(),
            "still mounted"
        );
    }

    /// A copy of what is in the image now, mounted or not.
    pub(crate) fn copy(&self, image: &Path) -> PathBuf {
        let copy = self.fresh("copy");
        succeed("cp", &["--sparse=always", text(image), text(&copy)]);
        copy
    }
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a tool, at most for a minute.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("timeout");
    command.args([PATIENCE_S, program]).args(arguments);
    command.env("LC_ALL", "C").output().unwrap()
}

pub(crate) fn succeed(program: &str, arguments: &[&str]) {
    let output = run(program, arguments);
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {output:?}"
    );
}

/// What `e2fsck -fn` says, and whether it is content.
pub(crate) fn e2fsck(image: &Path) -> (bool, String) {
    let output = run("e2fsck", &["-fn", text(image)]);
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stdout).into_owned(),
    )
}

/// Lets e2fsck do what a mount would: replay the journal and delete orphans; whether it found more than that.
pub(crate) fn e2fsck_recovers(image: &Path) -> bool {
    let output = run("e2fsck", &["-p", text(image)]);
    matches!(output.status.code(), Some(0 | 1)) && e2fsck(image).0
}

/// What our check says of an image in memory.
pub(crate) fn check_bytes(bytes: Vec<u8>) -> Result<Report, Ext4Error> {
    let device = Memory(bytes);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(check::check(&device, &|_, _, _| {}))
}

/// What our check says of an image in a file.
pub(crate) fn check_file(path: &Path) -> Result<Report, Ext4Error> {
    check_bytes(fs::read(path).unwrap())
}

/// Bytes as a device that is read.
pub(crate) struct Memory(pub(crate) Vec<u8>);

impl Device for Memory {
    fn size_bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Pending<'_, Bytes> {
        let at = usize::try_from(offset_bytes).unwrap();
        let bytes = Bytes::copy_from_slice(&self.0[at..at + len_bytes as usize]);
        Box::pin(std::future::ready(Ok(bytes)))
    }

    fn write(&self, _offset_bytes: u64, _data: Bytes) -> Pending<'_, ()> {
        panic!("a check writes nothing")
    }

    fn zero(&self, _offset_bytes: u64, _len_bytes: u64) -> Pending<'_, ()> {
        panic!("a check writes nothing")
    }

    fn flush(&self) -> Pending<'_, ()> {
        panic!("a check writes nothing")
    }
}

/// A tree with something of everything; `scale` 1 makes an index of one level, 10 one of two with small blocks.
pub(crate) fn fill(dir: &Path, scale: usize) {
    fill_directories(dir, scale);
    fill_special(dir);
    fill_files(dir, scale);
    fill_xattrs(dir);
}

fn fill_directories(dir: &Path, scale: usize) {
    let deep = dir.join("a/b/c");
    fs::create_dir_all(&deep).unwrap();
    for number in 0..150 * scale {
        let name = format!("a/file-{number:05}-{}", "x".repeat(number * 7 % 40));
        fs::write(dir.join(&name), vec![b'y'; number * 37 % 3000]).unwrap();
        if number % 7 == 1 {
            fs::hard_link(dir.join(&name), deep.join(format!("link{number}"))).unwrap();
        }
        if number % 5 == 0 {
            fs::remove_file(dir.join(&name)).unwrap();
        }
    }
    for number in 0..20 * scale {
        let sub = dir.join(format!("many/d{number}"));
        fs::create_dir_all(&sub).unwrap();
        fs::write(sub.join("f"), b"f").unwrap();
    }
}

fn fill_special(dir: &Path) {
    for length in [5, 59, 60, 900] {
        symlink("z".repeat(length), dir.join(format!("symlink{length}"))).unwrap();
    }
    for (name, mode, device) in [
        ("char", libc::S_IFCHR, libc::makedev(300, 70_000)),
        ("block", libc::S_IFBLK, libc::makedev(8, 1)),
        ("fifo", libc::S_IFIFO, 0),
        ("socket", libc::S_IFSOCK, 0),
    ] {
        let path = c_path(&dir.join(name));
        // SAFETY: a path that ends with 0 and lives over the call.
        let made = unsafe { libc::mknod(path.as_ptr(), mode | 0o644, device) };
        assert_eq!(made, 0, "{name}");
    }
}

/// A fragmented, a sparse and, where there are extents, an allocated and unwritten file.
fn fill_files(dir: &Path, scale: usize) {
    let fragmented = File::create(dir.join("fragmented")).unwrap();
    for piece in 0..120 * scale as u64 {
        fragmented.write_all_at(&[b'q'; 100], piece * 8192).unwrap();
    }
    fragmented.sync_all().unwrap();
    let mut sparse = File::create(dir.join("sparse")).unwrap();
    sparse.seek(SeekFrom::Start(50 << 20)).unwrap();
    sparse.write_all(b"end").unwrap();
    let allocated = File::create(dir.join("allocated")).unwrap();
    // Files without extents cannot have it.
    let _ = rustix::fs::fallocate(
        &allocated,
        rustix::fs::FallocateFlags::KEEP_SIZE,
        0,
        300_000,
    );
}

fn fill_xattrs(dir: &Path) {
    for number in 0..8 {
        let file = dir.join(format!("xattrs{number}"));
        fs::write(&file, b"x").unwrap();
        set_xattr(&file, "user.small", &vec![b'v'; number + 1]);
        set_xattr(&file, "user.large", &vec![b'w'; 300 + number % 2]);
        set_xattr(&file, "user.gr\u{fc}n", b"not ASCII");
    }
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions) in [(0x01_u16, 6_u16), (0x04, 4), (0x20, 4)] {
        acl.extend(tag.to_le_bytes());
        acl.extend(permissions.to_le_bytes());
        acl.extend(u32::MAX.to_le_bytes());
    }
    set_xattr(&dir.join("a"), "system.posix_acl_default", &acl);
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(path, name, value, flags).unwrap();
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// Directories become files and files directories, so that metadata blocks change their owners.
pub(crate) fn churn(dir: &Path, round: usize) {
    let tree = dir.join(format!("tree{round}"));
    fs::create_dir(&tree).unwrap();
    fill(&tree, 1);
    if round > 0 {
        fs::remove_dir_all(dir.join(format!("tree{}", round - 1))).unwrap();
    }
    fs::write(dir.join(format!("data{round}")), vec![0xc0; 3 << 20]).unwrap();
}
