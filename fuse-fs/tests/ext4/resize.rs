//! A mounted filesystem that grows, judged by e2fsck, by our check and by the kernel.

use crate::crash::{judge, judge_by_e2fsck, make};
use crate::crowd::passing;
use crate::data::Random;
use crate::image::{Workshop, e2fsck, text};
use crate::our_side::{open, try_apply};
use crate::recorder::Recorder;
use crate::write::{options, run};
use fuse_fs::ext4::check;
use fuse_fs::ext4::device::FileDevice;
use fuse_fs::ext4::filesystem::Filesystem;
use fuse_fs::ext4::resize::{GrowError, Refused};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

const MIB: u64 = 1 << 20;
/// Options of mke2fs, and sizes in MiB one after the other: within the last group, to new groups, to groups with
/// copies of the superblock, over the end of a block of descriptors.
const GROWTHS: [(&str, &[u64]); 4] = [
    ("-t ext4 -b 1024", &[20, 23, 60, 130, 700]),
    ("-t ext4 -b 4096", &[100, 110, 700, 9 << 10]),
    (
        "-t ext4 -b 2048 -O metadata_csum_seed,orphan_file",
        &[64, 72, 3000],
    ),
    ("-t ext4 -b 1024 -g 1024 -O ^flex_bg,^64bit", &[17, 18, 100]),
];

fn resize(image: &Path, mib: u64) {
    let file = File::options().write(true).open(image).unwrap();
    file.set_len(mib * MIB).unwrap();
}

fn assert_clean(image: &Path) {
    let (clean, said) = e2fsck(image);
    assert!(clean, "{said}");
    let device = FileDevice::open(image, false).unwrap();
    let report = run(check::check(&device, &|_, _, _| {})).unwrap();
    assert!(report.findings.is_empty(), "{:?}", report.findings);
}

/// Sizes that dumpe2fs tells, those of `backup` or of the first superblock.
fn sizes(image: &Path, backup: Option<(u64, u32)>) -> Vec<String> {
    let mut command = Command::new("dumpe2fs");
    command.arg("-h").env("LC_ALL", "C");
    if let Some((block, bytes)) = backup {
        command.args(["-o", &format!("superblock={block}")]);
        command.args(["-o", &format!("blocksize={bytes}")]);
    }
    let output = command.arg(text(image)).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    let wanted = ["Block count:", "Inode count:", "Reserved GDT blocks:"];
    let wanted = |line: &&str| wanted.iter().any(|name| line.starts_with(name));
    said.lines().filter(wanted).map(str::to_owned).collect()
}

/// Operations by four tasks until `stop`.
fn crowd(fs: &Filesystem, stop: &Arc<AtomicBool>) -> Vec<tokio::task::JoinHandle<()>> {
    let task = |number| {
        let (fs, stop) = (fs.clone(), stop.clone());
        tokio::spawn(async move {
            let mut random = Random(number);
            while !stop.load(Ordering::Relaxed) {
                // Another task may free what this one has looked up.
                let _ = try_apply(&fs, &passing(&mut random)).await;
            }
        })
    };
    (0..4).map(task).collect()
}

#[test]
fn a_filesystem_grows_while_it_is_used() {
    let workshop = Workshop::new();
    for (kind, mib) in GROWTHS {
        let image = workshop.make(mib[0], kind);
        for pair in mib.windows(2) {
            resize(&image, pair[1]);
            run(async {
                let fs = open(&image).await;
                let stop = Arc::new(AtomicBool::new(false));
                let tasks = crowd(&fs, &stop);
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                let grown = fs.grow(pair[1] * MIB).await.unwrap();
                assert_eq!(grown.bytes_before, pair[0] * MIB, "{kind}");
                assert_eq!(grown.bytes, pair[1] * MIB, "{kind}");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
                stop.store(true, Ordering::Relaxed);
                for task in tasks {
                    task.await.unwrap();
                }
                let again = fs.grow(pair[1] * MIB).await.unwrap();
                assert_eq!(again.bytes_before, again.bytes, "nothing is left to do");
                fs.close().await.unwrap();
            });
            assert_clean(&image);
        }
        let block_bytes = fs::metadata(&image).unwrap().len() / blocks(&image);
        let per_group = if kind.contains("-g 1024") {
            1024
        } else {
            8 * block_bytes
        };
        let copy = 3 * per_group + u64::from(block_bytes == 1024);
        let copied = sizes(&image, Some((copy, block_bytes as u32)));
        assert_eq!(copied, sizes(&image, None), "{kind}: the copy in group 3");
        fill_by_kernel(&workshop, &image, mib[mib.len() - 1]);
        assert_clean(&image);
    }
}

fn blocks(image: &Path) -> u64 {
    let sizes = sizes(image, None);
    let line = sizes.iter().find(|line| line.starts_with("Block count:"));
    let count = line.unwrap().split_whitespace().last().unwrap();
    count.parse().unwrap()
}

/// The kernel has the room that there is, and uses it.
fn fill_by_kernel(workshop: &Workshop, image: &Path, mib: u64) {
    workshop.change(image, |dir| {
        let space = rustix::fs::statvfs(dir).unwrap();
        let free = space.f_bfree * space.f_frsize;
        assert!(free > mib * MIB * 7 / 10, "{free} of {mib} MiB are free");
        let file = File::create(dir.join("large")).unwrap();
        let most = (free * 9 / 10).min(200 * MIB);
        for at in (0..most).step_by(MIB as usize) {
            file.write_all_at(&[0x5a; 1 << 20], at).unwrap();
        }
        file.sync_all().unwrap();
    });
}

/// What is free after a growth is given away, and is there after a remount.
#[test]
fn new_room_is_used() {
    let workshop = Workshop::new();
    let image = workshop.make(20, "-t ext4 -b 1024");
    resize(&image, 200);
    let content: Vec<u8> = (0..150 * MIB).map(|at| (at / 1000) as u8 | 1).collect();
    run(async {
        let fs = open(&image).await;
        let root = fs.inode(2).await.unwrap();
        let node = crate::our_side::node(0o100_644, fuse_fs::ext4::namespace::Content::Nothing);
        let cell = fs.create(&root, b"large", &node).await.unwrap();
        let full = fs.fallocate(
            &cell,
            fuse_fs::ext4::fallocate::Allocation::Allocate { keep_size: true },
            0,
            150 * MIB,
        );
        assert!(full.await.is_err(), "there is no room yet");
        fs.grow(200 * MIB).await.unwrap();
        for (at, part) in (0..).step_by(1 << 20).zip(content.chunks(1 << 20)) {
            fs.write(&cell, at, part.to_vec().into()).await.unwrap();
        }
        fs.fsync(&cell, false).await.unwrap();
        fs.close().await.unwrap();
    });
    assert_clean(&image);
    workshop.change(&image, |dir| {
        assert!(fs::read(dir.join("large")).unwrap() == content);
    });
}

#[test]
fn what_cannot_grow_says_why() {
    let workshop = Workshop::new();
    for (kind, word) in [
        ("-t ext4 -O ^resize_inode", "resize_inode"),
        ("-t ext4 -O ^metadata_csum", "metadata_csum"),
    ] {
        let image = workshop.make(20, kind);
        resize(&image, 60);
        run(async {
            let fs = open(&image).await;
            let refused = fs.grow(60 * MIB).await.unwrap_err();
            assert!(refused.to_string().contains(word), "{refused}");
            fs.close().await.unwrap();
        });
        assert_clean(&image);
    }
    // Room for the descriptors of no more than 32 groups.
    let image = workshop.make(20, "-t ext4 -b 1024 -E resize=200000");
    resize(&image, 1000);
    run(async {
        let fs = open(&image).await;
        let grown = fs.grow(1000 * MIB).await.unwrap();
        assert_eq!(grown.bytes, 256 * MIB + 1024, "as far as it goes");
        let refused = fs.grow(1000 * MIB).await.unwrap_err();
        assert!(matches!(refused, GrowError::Refused(Refused::Descriptors)));
        fs.close().await.unwrap();
    });
    assert_clean(&image);
}

/// A loss of power at any moment of a growth leaves the filesystem as it was or as it is, with what was synced.
#[test]
fn a_growth_is_whole_or_not_at_all() {
    let workshop = Workshop::new();
    let (mut start, numbers) = make(&workshop, 10, "-t ext4 -b 1024 -g 1024");
    let old = start.len();
    // Behind the end is what another filesystem left there.
    start.resize(36 << 20, 0xff);
    let device = Arc::new(Recorder::new(start));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        let mut random = Random(7);
        let growth = async {
            for mib in [11, 20, 36] {
                fs.grow(mib * MIB).await.unwrap();
            }
        };
        let cell = fs.inode(numbers[0]).await.unwrap();
        let writing = async {
            for at in 0..60 {
                device.mark(crate::recorder::Mark::Touched(numbers[0]));
                let content = vec![at; 1 + random.below(50_000) as usize];
                fs.truncate(&cell, 0).await.unwrap();
                fs.write(&cell, 0, content.clone().into()).await.unwrap();
                fs.fsync(&cell, false).await.unwrap();
                device.mark(crate::recorder::Mark::Synced(numbers[0], content));
            }
        };
        tokio::join!(growth, writing);
        fs.close().await.unwrap();
    });
    assert!(device.content().len() > old);
    let mut count = 0;
    device.crashes(80, &mut Random(9), |left, moment| {
        let what = format!("state {count}");
        judge_by_e2fsck(&workshop, &left, &what);
        judge(left, &numbers, moment.synced, &what);
        count += 1;
    });
    assert!(count > 40, "{count} states");
}
