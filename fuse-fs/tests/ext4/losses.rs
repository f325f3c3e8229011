//! The fourteen known ways in which a journaling filesystem loses data, one that was ours, and the tests that none
//! of them is:
//! ```text
//!  1 old metadata over data      crash::a_revoked_block_does_not_come_back_over_data, journal
//!  2 reuse before the commit     crash::nothing_freed_is_written_over_before_its_freeing_commits
//!  3 the format of the log       crash::a_block_that_begins_with_.., crash::the_log_wraps_around_.., journal
//!  4 commit before its data      crash::no_loss_of_power_..
//!  5 size before its data        crash::no_loss_of_power_.., systematic
//!  6 log reused too early        crash::what_the_log_held_is_durable_at_home_before_the_log_is_given_up
//!  7 too much in a transaction   here: a_huge_file_is_given_up_in_steps_..
//!  8 forgotten orphans           write::orphans_are_freed_by_who_made_them_or_by_the_next_mount
//!  9 replay forgotten            here: whoever_reads_no_journal_finds_a_whole_filesystem_or_is_told_to
//! 10 writing on after an error   crash::whatever_request_fails_..
//! 11 wrong checksums             here: every_checksum_is_written_and_looked_at
//! 12 names that are too long     here: no_operation_takes_a_name_of_256_bytes; mounts
//! 13 listings that jump          crowd::a_listing_has_every_name_that_stays_exactly_once
//! 14 inodes given away too early here: an_inode_is_not_given_away_while_somebody_holds_it
//! 15 data mistaken for another's here: data_waits_also_where_a_removed_file_had_the_number
//! ```

use crate::crash::{STALE, fill_up};
use crate::data::Random;
use crate::image::{Workshop, check_bytes, e2fsck, run as tool, text};
use crate::operations::{DIRECTORY, REGULAR};
use crate::our_side::{node, release, resolve};
use crate::recorder::Recorder;
use crate::write::{open, options, run};
use fuse_fs::ext4::error::FsError;
use fuse_fs::ext4::filesystem::{Filesystem, Options};
use fuse_fs::ext4::inode_cell::InodeCell;
use fuse_fs::ext4::namespace::{Content, RenameMode, SetMode};
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// More states than there are moments.
const EVERY_STATE: usize = 1 << 32;
/// Where the superblock is, and in it the incompatible features and the first orphan.
const SUPERBLOCK: usize = 1024;
const INCOMPAT: usize = SUPERBLOCK + 0x60;
const LAST_ORPHAN: usize = SUPERBLOCK + 0xe8;
const NEEDS_RECOVERY: u32 = 0x4;

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// (7) A file in thousands of pieces does not fit one transaction of a small journal. Wherever the power is lost
/// it is whole or gone, with all its blocks.
#[test]
fn a_huge_file_is_given_up_in_steps_each_of_which_survives_a_crash() {
    const PIECES: u64 = 12_000;
    let workshop = Workshop::new();
    let soon = || Options {
        commit_interval: Duration::from_millis(1),
        ..options()
    };
    for unlinked in [false, true] {
        let image = workshop.make(40, "-t ext4 -b 1024 -J size=1");
        let mut number = 0;
        workshop.change(&image, |dir| {
            let path = dir.join("huge");
            fs::write(&path, b"").unwrap();
            number = fs::metadata(&path).unwrap().ino() as u32;
            fill_up(dir);
        });
        let device = Arc::new(Recorder::new(fs::read(image).unwrap()));
        run(async {
            let fs = Filesystem::open(device.clone(), soon()).await.unwrap();
            let cell = fs.inode(number).await.unwrap();
            for piece in 0..PIECES {
                let data = vec![1; 100];
                fs.write(&cell, piece * 2048, data.into()).await.unwrap();
            }
            fs.sync().await.unwrap();
            device.forget();
            if unlinked {
                let root = resolve(&fs, "").await.unwrap();
                let gone = fs.unlink(&root, b"huge").await.unwrap();
                release(&fs, &gone).await.unwrap();
            } else {
                fs.truncate(&cell, 3).await.unwrap();
            }
            fs.sync().await.unwrap();
        });
        let (mut sizes, mut halves) = (HashMap::new(), 0);
        device.crashes(25, &mut Random(7), |left, _| {
            // By the kernel: e2fsck 1.47.0 gives up on an orphan with a tree of two levels, of the kernel's, too.
            let path = workshop.path("left");
            fs::write(&path, &left).unwrap();
            workshop.change(&path, |_| {});
            let (clean, said) = e2fsck(&path);
            assert!(clean, "{said}");
            let device = Arc::new(Recorder::new(left));
            let size = run(async {
                let fs = Filesystem::open(device.clone(), options()).await.unwrap();
                halves += usize::from(le32(&device.content(), LAST_ORPHAN) != 0);
                let size = match resolve(&fs, "huge").await {
                    Ok(cell) => {
                        let content = fs.read(&cell, 0, u32::MAX).await.unwrap();
                        assert!(!content.contains(&STALE));
                        Some(content.len())
                    }
                    Err(_) => None,
                };
                fs.close().await.unwrap();
                size
            });
            let report = check_bytes(device.content()).unwrap();
            assert!(report.findings.is_empty(), "{:?}", report.findings);
            *sizes.entry(size).or_insert(0) += 1;
        });
        let small = if unlinked { None } else { Some(3) };
        let whole = Some((PIECES as usize - 1) * 2048 + 100);
        let allowed = |size: &Option<usize>| *size == small || *size == whole;
        assert!(sizes.keys().all(allowed), "{sizes:?}");
        assert!(
            sizes.contains_key(&small) && halves > 0,
            "{sizes:?} {halves}"
        );
    }
}

/// (9) While the log holds what is not at home, the superblock says so; when it says that there is nothing to
/// replay, there is not.
#[test]
fn whoever_reads_no_journal_finds_a_whole_filesystem_or_is_told_to() {
    let workshop = Workshop::new();
    let image = workshop.make(10, "-t ext4");
    let device = Arc::new(Recorder::new(fs::read(image).unwrap()));
    run(async {
        for round in 0..3 {
            let fs = Filesystem::open(device.clone(), options()).await.unwrap();
            let root = resolve(&fs, "").await.unwrap();
            for number in 0..3 {
                let name = format!("{round}-{number}");
                let new = node(REGULAR | 0o644, Content::Nothing);
                let cell = fs.create(&root, name.as_bytes(), &new).await.unwrap();
                fs.write(&cell, 0, vec![1; 5000].into()).await.unwrap();
                fs.fsync(&cell, false).await.unwrap();
                if number == 1 {
                    fs.quiesced(async {}).await.unwrap();
                }
            }
            fs.close().await.unwrap();
        }
    });
    let (mut quiet, mut told) = (0, 0);
    device.crashes(EVERY_STATE, &mut Random(1), |left, _| {
        if le32(&left, INCOMPAT) & NEEDS_RECOVERY != 0 {
            told += 1;
            return;
        }
        let report = check_bytes(left.clone()).unwrap();
        assert!(report.findings.is_empty(), "{:?}", report.findings);
        assert_eq!(report.transactions, 0);
        if quiet % 20 == 0 {
            let path = workshop.path("left");
            fs::write(&path, &left).unwrap();
            let (clean, said) = e2fsck(&path);
            assert!(clean, "{said}");
        }
        quiet += 1;
    });
    assert!(quiet > 20 && told > 20, "{quiet} {told}");
}

/// What debugfs says of a file behind a word, a number.
fn number_behind(image: &Path, path: &str, word: &str) -> usize {
    let output = tool("debugfs", &["-R", &format!("stat {path}"), text(image)]);
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let (_, rest) = said
        .split_once(word)
        .unwrap_or_else(|| panic!("{word}: {said}"));
    let digits = rest
        .trim_start()
        .split(|c: char| !c.is_ascii_digit())
        .next();
    digits.unwrap().parse().unwrap()
}

/// Something with each kind of checksum, made by us.
async fn make_everything(fs: &Filesystem) {
    let root = resolve(fs, "").await.unwrap();
    let new = |kind: u32| node(kind | 0o755, Content::Nothing);
    for name in ["small", "large"] {
        fs.create(&root, name.as_bytes(), &new(DIRECTORY))
            .await
            .unwrap();
    }
    let small = resolve(fs, "small").await.unwrap();
    let file = fs.create(&small, b"file", &new(REGULAR)).await.unwrap();
    for piece in 0..400 {
        fs.write(&file, piece * 8192, vec![1; 100].into())
            .await
            .unwrap();
    }
    fs.set_xattr(&file, b"user.large", &[b'x'; 700], SetMode::Any)
        .await
        .unwrap();
    let large = resolve(fs, "large").await.unwrap();
    for number in 0..600 {
        let name = format!("{number}-{}", "y".repeat(100));
        fs.create(&large, name.as_bytes(), &new(REGULAR))
            .await
            .unwrap();
    }
}

/// (11) Each checksum that we write e2fsck finds right, and damage behind each is found by e2fsck and by us.
#[test]
fn every_checksum_is_written_and_looked_at() {
    let workshop = Workshop::new();
    for (kind, block) in [
        ("-t ext4 -b 1024", 1024),
        ("-t ext4 -b 4096", 4096),
        ("-t ext4 -b 1024 -O ^64bit", 1024),
        ("-t ext4 -b 1024 -O metadata_csum_seed", 1024),
    ] {
        let image = workshop.make(32, kind);
        run(async {
            let fs = open(&image).await;
            make_everything(&fs).await;
            fs.close().await.unwrap();
        });
        let (clean, said) = e2fsck(&image);
        assert!(clean, "{kind}: {said}");
        let bytes = fs::read(&image).unwrap();
        let descriptors = (le32(&bytes, SUPERBLOCK + 0x14) as usize + 1) * block;
        let of_group = |at: usize| le32(&bytes, descriptors + at) as usize * block;
        let inode_bytes = le32(&bytes, SUPERBLOCK + 0x58) as usize & 0xffff;
        let file = number_behind(&image, "/small/file", "Inode:");
        let per_group = le32(&bytes, SUPERBLOCK + 0x28) as usize;
        let (group, index) = ((file - 1) / per_group, (file - 1) % per_group);
        let descriptor_bytes = if kind.contains("^64bit") { 32 } else { 64 };
        let inode = of_group(group * descriptor_bytes + 8) + index * inode_bytes;
        let first_block = |path: &str| {
            let output = tool("debugfs", &["-R", &format!("blocks {path}"), text(&image)]);
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            said.split_whitespace()
                .next()
                .unwrap()
                .parse::<usize>()
                .unwrap()
                * block
        };
        let tree = number_behind(&image, "/small/file", "(ETB0):") * block;
        let xattrs = number_behind(&image, "/small/file", "File ACL:") * block;
        let places = [
            ("superblock", SUPERBLOCK + 0x3fc),
            ("group descriptor", descriptors + 0x1e),
            ("block bitmap", of_group(0) + block - 1),
            ("inode bitmap", of_group(4) + (per_group - 1) / 8),
            ("inode", inode + 0x7c),
            ("generation", inode + 0x64),
            ("directory leaf", first_block("/small") + block - 4),
            ("directory index", first_block("/large") + block - 4),
            ("extents", tree + block - 4),
            ("attributes", xattrs + 0x10),
        ];
        for (what, at) in places {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            let path = workshop.path("damaged");
            fs::write(&path, &damaged).unwrap();
            // It tells a wrong checksum of a descriptor, and is content.
            let (clean, said) = e2fsck(&path);
            assert!(
                !clean || said.contains("checksum"),
                "{kind}: {what}: {said}"
            );
            let found = check_bytes(damaged).map(|report| report.findings.len());
            assert!(!matches!(found, Ok(0)), "{kind}: we, {what}");
        }
    }
}

/// (12) The kernel passes names on that no directory can hold.
#[test]
fn no_operation_takes_a_name_of_256_bytes() {
    let workshop = Workshop::new();
    let image = workshop.make(16, "-t ext4");
    run(async {
        let fs = open(&image).await;
        let root = resolve(&fs, "").await.unwrap();
        let (longest, long) = ([b'n'; 255], [b'n'; 256]);
        let new = node(REGULAR | 0o644, Content::Nothing);
        let directory = node(DIRECTORY | 0o755, Content::Nothing);
        let link = node(libc::S_IFLNK | 0o777, Content::Target(b"target"));
        let file = fs.create(&root, &longest, &new).await.unwrap();
        let refused = |result: Result<(), FsError>| {
            assert_eq!(result.unwrap_err().errno(), libc::ENAMETOOLONG);
        };
        refused(fs.lookup_name(&root, &long).await.map(drop));
        for node in [&new, &directory, &link] {
            refused(fs.create(&root, &long, node).await.map(drop));
        }
        refused(fs.link(&file, &root, &long).await);
        refused(fs.unlink(&root, &long).await.map(drop));
        refused(fs.remove_directory(&root, &long).await.map(drop));
        for mode in [RenameMode::Replace, RenameMode::Exchange] {
            refused(fs.rename(&root, &long, &root, b"n", mode).await.map(drop));
            refused(
                fs.rename(&root, &longest, &root, &long, mode)
                    .await
                    .map(drop),
            );
        }
        let names = crate::our_side::names(&fs, &root).await;
        assert_eq!(names.len(), 2, "it and lost+found");
        fs.close().await.unwrap();
    });
    assert!(e2fsck(&image).0);
}

/// (14) A file that is open without a name keeps its number; who gets the number later is another generation.
#[test]
fn an_inode_is_not_given_away_while_somebody_holds_it() {
    let workshop = Workshop::new();
    let image = workshop.make(16, "-t ext4 -N 64");
    run(async {
        let fs = open(&image).await;
        let root = resolve(&fs, "").await.unwrap();
        let new = node(REGULAR | 0o644, Content::Nothing);
        let create = async |name: String| fs.create(&root, name.as_bytes(), &new).await;
        let held = create("held".to_owned()).await.unwrap();
        let id = |cell: Arc<InodeCell>| async move {
            let generation = cell.read().await.raw.generation();
            (cell.number(), generation)
        };
        let (number, generation) = id(held.clone()).await;
        drop(fs.unlink(&root, b"held").await.unwrap());
        fs.sync().await.unwrap();
        let mut made = 0;
        while let Ok(cell) = create(format!("new{made}")).await {
            assert_ne!(cell.number(), number);
            made += 1;
        }
        assert!(made > 20, "all that there are");
        fs.free_orphan(&held).await.unwrap();
        let early = create("early".to_owned()).await;
        if let Ok(early) = &early {
            assert!(early.number() != number, "before the freeing has committed");
        }
        fs.sync().await.unwrap();
        let (again, other) = id(create("again".to_owned()).await.unwrap()).await;
        assert_eq!(again, number);
        assert_ne!(other, generation);
        fs.close().await.unwrap();
    });
    assert!(e2fsck(&image).0);
}

/// (15) The number of a file that was removed while its data waited to be written is given to another file, whose
/// data waits as well.
#[test]
fn data_waits_also_where_a_removed_file_had_the_number() {
    let workshop = Workshop::new();
    let image = workshop.make(16, "-t ext4 -N 64");
    let (mut name, data) = (String::new(), vec![2_u8; 5000]);
    run(async {
        let fs = open(&image).await;
        let root = resolve(&fs, "").await.unwrap();
        let new = node(REGULAR | 0o644, Content::Nothing);
        let create = async |name: &str| fs.create(&root, name.as_bytes(), &new).await.unwrap();
        let (old, other) = (create("old").await, create("other").await);
        fs.write(&old, 0, vec![1; 5000].into()).await.unwrap();
        drop(fs.unlink(&root, b"old").await.unwrap());
        fs.free_orphan(&old).await.unwrap();
        // Commits the freeing, and leaves data in memory.
        fs.fsync(&other, false).await.unwrap();
        let again = loop {
            name.push('n');
            let cell = create(&name).await;
            if cell.number() == old.number() {
                break cell;
            }
        };
        fs.write(&again, 0, data.clone().into()).await.unwrap();
        fs.close().await.unwrap();
    });
    run(async {
        let fs = open(&image).await;
        let cell = resolve(&fs, &name).await.unwrap();
        assert!(fs.read(&cell, 0, 10_000).await.unwrap() == data);
        fs.close().await.unwrap();
    });
    assert!(e2fsck(&image).0);
}
