//! What our mkfs makes is what mke2fs makes, clean to e2fsck and to us, and good to the kernel.

use crate::image::{Workshop, check_bytes, e2fsck, fill, run, text};
use bytes::Bytes;
use fuse_fs::ext4::check;
use fuse_fs::ext4::device::{Device, FileDevice, Pending};
use fuse_fs::ext4::error::Ext4Error;
use fuse_fs::ext4::mkfs::{self, plan::Identity};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

const UUID: &str = "01020304-0506-0708-090a-0b0c0d0e0f10";
const NOW: u32 = 1_750_000_000;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn identity() -> Identity {
    let uuid: [u8; 16] = std::array::from_fn(|at| u8::try_from(at + 1).unwrap());
    let hash_seed = uuid;
    let label = b"a label".to_vec();
    let now = NOW;
    Identity {
        uuid,
        hash_seed,
        label,
        now,
    }
}

fn sized(shop: &Workshop, name: &str, size_bytes: u64) -> PathBuf {
    let path = shop.path(name);
    let _ = fs::remove_file(&path);
    File::create(&path).unwrap().set_len(size_bytes).unwrap();
    path
}

/// An image of our mkfs.
pub(crate) fn made(shop: &Workshop, name: &str, size_bytes: u64) -> PathBuf {
    let image = sized(shop, name, size_bytes);
    ours(&image);
    image
}

fn ours(image: &Path) {
    let device = FileDevice::open(image, true).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(mkfs::make(&device, &identity())).unwrap();
}

fn theirs(image: &Path) {
    let seed = format!("hash_seed={UUID}");
    let mut command = Command::new("mke2fs");
    command
        .args([
            "-q", "-F", "-t", "ext4", "-L", "a label", "-U", UUID, "-E", &seed,
        ])
        .arg(image);
    let status = command
        .env("E2FSPROGS_FAKE_TIME", NOW.to_string())
        .status()
        .unwrap();
    assert!(status.success());
}

/// What dumpe2fs says, without what says how much was written, and the checksum over it.
fn dumped(image: &Path) -> String {
    let output = run("dumpe2fs", &[text(image)]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let kept = |line: &&str| {
        !["Lifetime writes:", "Checksum:", "Overhead"]
            .iter()
            .any(|other| line.starts_with(other))
    };
    said.lines().filter(kept).collect::<Vec<_>>().join("\n")
}

/// The inodes that mkfs makes. With a node in a block, mke2fs leaves what it had in the inode before.
fn inodes(image: &Path) -> String {
    let shown = [2, 7, 8, 11].map(|number| {
        let output = run("debugfs", &["-R", &format!("stat <{number}>"), text(image)]);
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let leftovers = said.contains("(ETB0)");
        let kept = said
            .lines()
            .filter(|line| !leftovers || !line.starts_with("Inode checksum"));
        kept.collect::<Vec<_>>().join("\n")
    });
    shown.join("\n")
}

fn is_clean(image: &Path) {
    let (content, said) = e2fsck(image);
    assert!(content, "{said}");
    let device = FileDevice::open(image, false).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let report = runtime
        .block_on(check::check(&device, &|_, _, _| {}))
        .unwrap();
    assert!(report.is_clean(), "{:#?}", report.findings);
}

/// Descriptors with their checksums, places, counts and inodes are equal, and what is not shown is clean.
#[test]
fn mkfs_makes_what_mke2fs_makes() {
    let shop = Workshop::new();
    for size_bytes in [
        3 * MIB,
        8 * MIB,
        8 * MIB + 777 * 512,
        9 * MIB,
        33 * MIB,
        64 * MIB,
        129 * MIB,
        500 * MIB,
        512 * MIB,
        513 * MIB,
        GIB + 4096,
        3 * GIB,
        200 * GIB + 12 * MIB,
    ] {
        let image = sized(&shop, "ours", size_bytes);
        ours(&image);
        is_clean(&image);
        let other = sized(&shop, "theirs", size_bytes);
        theirs(&other);
        let (a, b) = (dumped(&image), dumped(&other));
        let differs = a.lines().zip(b.lines()).find(|(a, b)| a != b);
        assert!(a == b, "{size_bytes} bytes: {differs:?}");
        let (a, b) = (inodes(&image), inodes(&other));
        let differs = a.lines().zip(b.lines()).find(|(a, b)| a != b);
        assert!(a == b, "{size_bytes} bytes: {differs:?}");
    }
}

#[test]
fn the_kernel_uses_it() {
    let shop = Workshop::new();
    let image = sized(&shop, "ours", 64 * MIB);
    ours(&image);
    shop.change(&image, |dir| fill(dir, 4));
    is_clean(&image);
}

/// A device that fails after some writes.
struct Failing {
    bytes: Mutex<Vec<u8>>,
    writes_left: Mutex<usize>,
}

impl Device for Failing {
    fn size_bytes(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read(&self, _offset_bytes: u64, _len_bytes: u32) -> Pending<'_, Bytes> {
        panic!("mkfs reads nothing")
    }

    fn write(&self, offset_bytes: u64, data: Bytes) -> Pending<'_, ()> {
        let mut left = self.writes_left.lock().unwrap();
        if *left == 0 {
            return Box::pin(std::future::ready(Err(std::io::Error::other("planted"))));
        }
        *left -= 1;
        let at = usize::try_from(offset_bytes).unwrap();
        self.bytes.lock().unwrap()[at..at + data.len()].copy_from_slice(&data);
        Box::pin(std::future::ready(Ok(())))
    }

    fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Pending<'_, ()> {
        assert_eq!(offset_bytes, 0);
        self.bytes.lock().unwrap()[..usize::try_from(len_bytes).unwrap()].fill(0);
        Box::pin(std::future::ready(Ok(())))
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(std::future::ready(Ok(())))
    }
}

#[test]
fn an_interrupted_mkfs_leaves_no_filesystem() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    for writes in 0.. {
        let device = Failing {
            bytes: Mutex::new(vec![0xee; 4 << 20]),
            writes_left: Mutex::new(writes),
        };
        let made = runtime.block_on(mkfs::make(&device, &identity()));
        let judged = check_bytes(device.bytes.into_inner().unwrap());
        if made.is_ok() {
            assert!(judged.unwrap().is_clean());
            assert!(writes > 10, "{writes} writes");
            return;
        }
        assert!(
            matches!(judged, Err(Ext4Error::NotExt4)),
            "after {writes} writes: {judged:?}"
        );
    }
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    for size_bytes in [0, 3 * MIB - 1, (16 << 40) + 1, u64::MAX] {
        let planned = mkfs::plan::Plan::new(size_bytes, &identity());
        assert!(
            matches!(planned, Err(Ext4Error::Size { .. })),
            "{size_bytes}"
        );
    }
    for size_bytes in [3 * MIB, 16 << 40] {
        assert!(
            mkfs::plan::Plan::new(size_bytes, &identity()).is_ok(),
            "{size_bytes}"
        );
    }
}
