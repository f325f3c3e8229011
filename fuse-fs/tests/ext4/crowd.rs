//! Many at once: tasks on the same names, listings while names come and go, very large directories.

use crate::data::Random;
use crate::image::{Workshop, check_file};
use crate::late::Late;
use crate::operations::{DIRECTORY, How, Operation, REGULAR, operation};
use crate::our_side::{apply, names, node, open, release, resolve};
use crate::write::{assert_clean, options, run};
use fuse_fs::ext4::filesystem::Filesystem;
use fuse_fs::ext4::namespace::Content;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// An operation without what lasts: nothing is made immutable.
pub(crate) fn passing(random: &mut Random) -> Operation {
    loop {
        match operation(random) {
            Operation::Flags { .. } => {}
            other => return other,
        }
    }
}

/// Whatever the order was, the outcome is a filesystem; a deadlock would be a test that does not end.
#[test]
fn tasks_on_the_same_names_leave_a_clean_filesystem() {
    let shop = Workshop::new();
    for options in ["-t ext4 -b 1024", "-t ext4"] {
        let image = shop.make(64, options);
        run(async {
            let fs = open(&image).await;
            let tasks: Vec<_> = (0..16)
                .map(|task| {
                    let fs = fs.clone();
                    tokio::spawn(async move {
                        let mut random = Random(task);
                        let mut done = 0;
                        for _ in 0..1200 {
                            done += u32::from(apply(&fs, &passing(&mut random)).await.is_ok());
                        }
                        done
                    })
                })
                .collect();
            let mut done = 0;
            for task in tasks {
                done += task.await.unwrap();
            }
            assert!(done > 2000, "{done} operations were carried out");
            fs.close().await.unwrap();
        });
        assert_clean(&image);
    }
}

/// The first operations after a mount read the bitmaps at the same time, and one changes them before the others
/// have looked: that is no damage.
#[test]
fn the_first_at_once_find_the_bitmaps_right() {
    let shop = Workshop::new();
    let image = shop.make(64, "-t ext4 -b 1024");
    let new = node(REGULAR | 0o644, Content::Nothing);
    run(async {
        let fs = open(&image).await;
        let root = resolve(&fs, "").await.unwrap();
        for name in 0..8 {
            fs.create(&root, format!("old{name}").as_bytes(), &new)
                .await
                .unwrap();
        }
        fs.close().await.unwrap();
    });
    for round in 0..20 {
        run(async {
            let device = Arc::new(Late::open(&image));
            let fs = Filesystem::open(device, options()).await.unwrap();
            let root = resolve(&fs, "").await.unwrap();
            let tasks = (0..8).map(|task| {
                let (fs, root) = (fs.clone(), root.clone());
                tokio::spawn(async move {
                    let new = node(REGULAR | 0o644, Content::Nothing);
                    let (from, to) = match round % 2 {
                        0 => (format!("old{task}"), format!("new{task}")),
                        _ => (format!("new{task}"), format!("old{task}")),
                    };
                    let gone = fs.unlink(&root, from.as_bytes()).await?;
                    fs.free_orphan(&gone).await?;
                    let cell = fs.create(&root, to.as_bytes(), &new).await?;
                    fs.write(&cell, 0, vec![7; 3000].into()).await?;
                    fs.fsync(&cell, false).await
                })
            });
            for task in tasks.collect::<Vec<_>>() {
                task.await.unwrap().unwrap();
            }
            fs.close().await.unwrap();
        });
    }
    assert_clean(&image);
}

/// Names that stay are listed exactly once, whatever comes and goes between two parts of the listing.
#[test]
fn a_listing_has_every_name_that_stays_exactly_once() {
    let shop = Workshop::new();
    for options in ["-t ext4 -b 1024", "-t ext4", "-t ext4 -O ^dir_index"] {
        let image = shop.make(64, options);
        run(async {
            let fs = open(&image).await;
            let stay = |n: u32| format!("stays{n}");
            make(&fs, "d", DIRECTORY).await;
            // From one block on: the directory becomes an index while it is listed.
            for n in 0..12 {
                make(&fs, &format!("d/{}", stay(n)), REGULAR).await;
            }
            let stop = Arc::new(AtomicBool::new(false));
            let churn = tokio::spawn(churn(fs.clone(), stop.clone()));
            let directory = resolve(&fs, "d").await.unwrap();
            for _ in 0..60 {
                let mut counts = BTreeMap::new();
                for (name, _) in names(&fs, &directory).await {
                    *counts.entry(name).or_insert(0) += 1;
                }
                assert!(
                    counts.values().all(|count| *count == 1),
                    "{options}: {counts:?}"
                );
                assert!((0..12).all(|n| counts.contains_key(&stay(n))), "{options}");
            }
            stop.store(true, Ordering::Relaxed);
            churn.await.unwrap();
            fs.close().await.unwrap();
        });
        assert_clean(&image);
    }
}

async fn churn(fs: Filesystem, stop: Arc<AtomicBool>) {
    let mut random = Random(3);
    let mut present = BTreeSet::new();
    while !stop.load(Ordering::Relaxed) {
        let name = format!("d/goes{}-{}", random.below(900), "y".repeat(60));
        if present.remove(&name) {
            apply(&fs, &Operation::Unlink { path: name }).await.unwrap();
        } else {
            make(&fs, &name, REGULAR).await;
            present.insert(name);
        }
        tokio::task::yield_now().await;
    }
}

async fn make(fs: &Filesystem, path: &str, kind: u32) {
    let (path, mode) = (path.to_owned(), kind | 0o755);
    apply(fs, &Operation::Make { path, mode }).await.unwrap();
}

/// The rate stays flat: `FUSE_FS_EXT4_NAMES=1000000` with --release and --nocapture shows it, in 4 GiB of memory.
#[test]
fn a_directory_of_many_names_is_right() {
    let names = std::env::var("FUSE_FS_EXT4_NAMES").map(|text| text.parse().unwrap());
    let count: u32 = names.unwrap_or(20_000);
    let mib = 256 + u64::from(count) / 256;
    let options = format!("-t ext4 -N {}", count + 1000);
    let shop = Workshop::new();
    let image = shop.make(mib, &options);
    run(async {
        let fs = open(&image).await;
        make(&fs, "big", DIRECTORY).await;
        let directory = resolve(&fs, "big").await.unwrap();
        let step = count / 10;
        for part in 0..10 {
            let start = Instant::now();
            for n in part * step..(part + 1) * step {
                let new = node(REGULAR | 0o644, Content::Nothing);
                fs.create(&directory, format!("file{n}").as_bytes(), &new)
                    .await
                    .unwrap();
            }
            let rate = f64::from(step) / start.elapsed().as_secs_f64();
            eprintln!("{} names: {rate:.0} creates/s", (part + 1) * step);
        }
        let mut listed = 0;
        let mut cookie = 0;
        loop {
            let names = fs.list(&directory, cookie, 1000).await.unwrap();
            let Some(last) = names.last() else { break };
            cookie = last.cookie;
            listed += names.len();
        }
        assert_eq!(listed, count as usize + 2);
        fs.sync().await.unwrap();
        let start = Instant::now();
        for n in (0..count).step_by(2) {
            let gone = fs
                .unlink(&directory, format!("file{n}").as_bytes())
                .await
                .unwrap();
            release(&fs, &gone).await.unwrap();
        }
        let rate = f64::from(count / 2) / start.elapsed().as_secs_f64();
        eprintln!("{rate:.0} unlinks/s");
        fs.close().await.unwrap();
    });
    assert_clean(&image);
}

/// What a program has open stays when its last name goes, and is freed after its last close or by the next mount.
#[test]
fn what_is_open_without_a_name_is_freed_later() {
    let shop = Workshop::new();
    for closes in [true, false] {
        let image = shop.make(32, "-t ext4");
        run(async {
            let fs = open(&image).await;
            make(&fs, "file", REGULAR).await;
            make(&fs, "directory", DIRECTORY).await;
            let root = resolve(&fs, "").await.unwrap();
            let file = fs.unlink(&root, b"file").await.unwrap();
            let directory = fs.remove_directory(&root, b"directory").await.unwrap();
            assert_eq!(file.read().await.raw.links(), 0);
            let empty = fs.list(&directory, 0, 10).await.unwrap();
            assert!(empty.is_empty());
            let new = node(REGULAR | 0o644, Content::Nothing);
            let refused = fs.create(&directory, b"new", &new).await;
            assert_eq!(refused.err().map(|error| error.errno()), Some(libc::ENOENT));
            if closes {
                release(&fs, &file).await.unwrap();
                release(&fs, &directory).await.unwrap();
            }
            fs.close().await.unwrap();
        });
        if !closes {
            run(async { open(&image).await.close().await.unwrap() });
        }
        assert_clean(&image);
        let report = check_file(&image).unwrap();
        assert_eq!(report.used_inodes, 11, "only what mke2fs made");
    }
}

/// A directory with more subdirectories than a link count holds has a count of 1, here and with the kernel.
#[test]
fn beyond_65000_subdirectories_the_count_is_one() {
    let shop = Workshop::new();
    let image = shop.make(512, "-t ext4 -b 1024 -N 70000 -O large_dir");
    run(async {
        let fs = open(&image).await;
        make(&fs, "many", DIRECTORY).await;
        let many = resolve(&fs, "many").await.unwrap();
        let new = node(DIRECTORY | 0o755, Content::Nothing);
        for n in 0..65_010 {
            fs.create(&many, format!("{n}").as_bytes(), &new)
                .await
                .unwrap();
        }
        assert_eq!(many.read().await.raw.links(), 1);
        let gone = fs.remove_directory(&many, b"17").await.unwrap();
        release(&fs, &gone).await.unwrap();
        assert_eq!(many.read().await.raw.links(), 1);
        apply(
            &fs,
            &Operation::Rename {
                path: "many/18".to_owned(),
                new: "moved".to_owned(),
                how: How::Replace,
            },
        )
        .await
        .unwrap();
        fs.close().await.unwrap();
    });
    assert_clean(&image);
}
