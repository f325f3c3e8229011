//! What is left when power is lost at any moment: replayed by us and by e2fsck, with nothing lost that was synced
//! and nothing shown that was never written.

use crate::data::Random;
use crate::image::{Workshop, check_bytes, e2fsck, e2fsck_recovers};
use crate::recorder::{Mark, Recorder};
use crate::write::{make_orphan, options, run};
use fuse_fs::ext4::fallocate::Allocation;
use fuse_fs::ext4::filesystem::{Filesystem, Options};
use fuse_fs::ext4::inode_cell::InodeCell;
use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// What stands in every free block at the start; no file is ever given it.
pub(crate) const STALE: u8 = 0xa5;
/// One in so many states is also shown to e2fsck in the short form; in the long one each is.
const E2FSCK_EVERY: usize = 12;
const FILES: u32 = 4;
/// More states than there are moments.
const EVERY_STATE: usize = 1 << 32;

pub(crate) fn rounds() -> u64 {
    let told = std::env::var("FUSE_FS_EXT4_ROUNDS").ok();
    told.and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Whether e2fsck sees the state with this number.
pub(crate) fn is_for_e2fsck(state: usize) -> bool {
    rounds() > 1 || state.is_multiple_of(E2FSCK_EVERY)
}

/// An image with some files, and old data in all free blocks.
pub(crate) fn make(workshop: &Workshop, mib: u64, kind: &str) -> (Vec<u8>, Vec<u32>) {
    let image = workshop.make(mib, kind);
    let mut numbers = Vec::new();
    workshop.change(&image, |dir| {
        for at in 0..FILES {
            let path = dir.join(format!("file{at}"));
            fs::write(&path, b"").unwrap();
            numbers.push(fs::metadata(&path).unwrap().ino() as u32);
        }
        fill_up(dir);
    });
    (fs::read(image).unwrap(), numbers)
}

/// Leaves old data in all free blocks. Appends only: what a truncation frees is not free before the kernel's
/// journal commits.
pub(crate) fn fill_up(dir: &Path) {
    let path = dir.join("old");
    let mut old = fs::File::create(&path).unwrap();
    let mut size = 1 << 20;
    while size >= 1024 {
        if old.write_all(&vec![STALE; size]).is_err() {
            size /= 4;
        }
    }
    old.sync_all().unwrap();
    fs::remove_file(&path).unwrap();
}

pub(crate) fn often() -> Options {
    Options {
        commit_interval: Duration::from_millis(7),
        ..options()
    }
}

/// Operations on the files, some of them synced, with deleted directories between; ends without closing.
async fn work(device: &Arc<Recorder>, numbers: &[u32], steps: u64, random: &mut Random) {
    let Ok(fs) = Filesystem::open(device.clone(), often()).await else {
        return;
    };
    let mut models: HashMap<u32, Vec<u8>> = numbers.iter().map(|at| (*at, Vec::new())).collect();
    for _ in 0..steps {
        let number = numbers[random.below(numbers.len() as u64) as usize];
        let Ok(cell) = fs.inode(number).await else {
            return;
        };
        let Some(model) = models.get_mut(&number) else {
            return;
        };
        if step(&fs, device, &cell, model, random).await.is_none() {
            return;
        }
    }
    let _ = fs.sync().await;
}

/// One operation; `None` if it failed.
async fn step(
    fs: &Filesystem,
    device: &Recorder,
    cell: &Arc<InodeCell>,
    model: &mut Vec<u8>,
    random: &mut Random,
) -> Option<()> {
    let number = cell.number();
    let choice = random.below(12);
    if (3..10).contains(&choice) {
        device.mark(Mark::Touched(number));
    }
    let offset = random.below(60_000);
    match choice {
        0 => {
            let blocks = 1 + random.below(12) as u32;
            let orphan = make_orphan(fs, blocks).await.ok()?;
            if random.below(3) > 0 {
                let cell = fs.inode(orphan).await.ok()?;
                fs.free_orphan(&cell).await.ok()?;
            }
        }
        1 => fs.sync().await.ok()?,
        3..=6 => {
            let byte = random.below(0x90) as u8;
            let len = [10, 1000, 5000, 40_000][random.below(4) as usize];
            let offset = if choice == 3 {
                model.len() as u64
            } else {
                offset
            };
            let data = vec![byte; len];
            fs.write(cell, offset, data.clone().into()).await.ok()?;
            let (from, to) = (offset as usize, offset as usize + len);
            model.resize(model.len().max(to), 0);
            model[from..to].copy_from_slice(&data);
        }
        7 => {
            let size = if random.below(2) == 0 { 0 } else { offset };
            fs.truncate(cell, size).await.ok()?;
            model.resize(size as usize, 0);
        }
        8 => {
            let len = 1 + random.below(30_000);
            fs.fallocate(cell, Allocation::Punch, offset, len)
                .await
                .ok()?;
            let end = model.len().min((offset + len) as usize);
            if (offset as usize) < end {
                model[offset as usize..end].fill(0);
            }
        }
        9 => {
            let how = Allocation::Allocate { keep_size: true };
            fs.fallocate(cell, how, offset, 20_000).await.ok()?;
        }
        _ => {
            fs.fsync(cell, choice == 10).await.ok()?;
            device.mark(Mark::Synced(number, model.clone()));
        }
    }
    Some(())
}

/// Judges what a loss of power left.
pub(crate) fn judge(left: Vec<u8>, numbers: &[u32], synced: &HashMap<u32, Vec<u8>>, what: &str) {
    let device = Arc::new(Recorder::new(left));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await;
        let fs = fs.unwrap_or_else(|error| panic!("{what}: {error}"));
        for number in numbers {
            let cell = fs.inode(*number).await.unwrap();
            let found = fs.read(&cell, 0, u32::MAX).await.unwrap();
            let stale = found.iter().position(|byte| *byte == STALE);
            assert_eq!(stale, None, "{what}: inode {number} shows old data");
            if let Some(expected) = synced.get(number) {
                let same = found.iter().zip(expected).take_while(|(a, b)| a == b);
                assert!(
                    found[..] == expected[..],
                    "{what}: inode {number} lost what was synced: {} bytes of {}, right until {}",
                    found.len(),
                    expected.len(),
                    same.count()
                );
            }
        }
        fs.close().await.unwrap();
    });
    let report = check_bytes(device.content()).unwrap();
    assert!(report.findings.is_empty(), "{what}: {:?}", report.findings);
}

pub(crate) fn judge_by_e2fsck(workshop: &Workshop, left: &[u8], what: &str) {
    let path = workshop.path("left");
    fs::write(&path, left).unwrap();
    assert!(e2fsck_recovers(&path), "{what}: {}", e2fsck(&path).1);
}

/// The states of one run of the workload; how many.
fn crash_all(
    workshop: &Workshop,
    start: &[u8],
    numbers: &[u32],
    seed: u64,
    states: usize,
) -> usize {
    let mut random = Random(seed);
    let device = Arc::new(Recorder::new(start.to_vec()));
    run(work(&device, numbers, 120, &mut random));
    let mut count = 0;
    device.crashes(states, &mut Random(seed), |left, moment| {
        let what = format!("seed {seed}, state {count}");
        if is_for_e2fsck(count) {
            judge_by_e2fsck(workshop, &left, &what);
        }
        judge(left, numbers, moment.synced, &what);
        count += 1;
    });
    assert!(count > 0);
    count
}

#[test]
fn no_loss_of_power_loses_what_was_synced_or_shows_what_was_not_written() {
    let workshop = Workshop::new();
    let mut states = 0;
    for (at, kind) in ["-t ext4", "-t ext4 -b 4096", "-t ext4 -O ^metadata_csum"]
        .iter()
        .enumerate()
    {
        let (start, numbers) = make(&workshop, 10, kind);
        for round in 0..rounds() {
            let seed = 1000 * at as u64 + round;
            states += crash_all(&workshop, &start, &numbers, seed, 40);
        }
        eprintln!("{states} states");
    }
}

#[test]
fn whatever_request_fails_the_journal_is_given_up_and_the_next_mount_has_what_was_synced() {
    let workshop = Workshop::new();
    let (start, numbers) = make(&workshop, 10, "-t ext4");
    let step = if rounds() > 1 { 1 } else { 23 };
    for requests in (0..600).step_by(step) {
        let device = Arc::new(Recorder::new(start.clone()));
        run(async {
            // Opening writes, too; what fails there is told by `open`.
            let fs = Filesystem::open(device.clone(), often()).await.unwrap();
            fs.close().await.unwrap();
            device.fail_after(requests + 10);
            work(&device, &numbers, 60, &mut Random(5)).await;
        });
        let (left, synced) = (device.content(), device.synced());
        let what = format!("after {requests} requests");
        judge_by_e2fsck(&workshop, &left, &what);
        judge(left, &numbers, &synced, &what);
    }
}

#[test]
fn a_revoked_block_does_not_come_back_over_data() {
    let workshop = Workshop::new();
    let (start, numbers) = make(&workshop, 10, "-t ext4");
    let device = Arc::new(Recorder::new(start));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        let cell = fs.inode(numbers[0]).await.unwrap();
        // Data takes the place of a directory while the log still has its blocks.
        let orphan = make_orphan(&fs, 300).await.unwrap();
        fs.sync().await.unwrap();
        let orphan = fs.inode(orphan).await.unwrap();
        fs.free_orphan(&orphan).await.unwrap();
        fs.sync().await.unwrap();
        let content = fill(&fs, &cell, 0x77).await;
        assert!(content.len() > 6 << 20);
        fs.fsync(&cell, false).await.unwrap();
        device.mark(Mark::Synced(numbers[0], content));
    });
    let (left, synced) = (device.content(), device.synced());
    assert_eq!(synced.len(), 1);
    judge_by_e2fsck(&workshop, &left, "revoked");
    judge(left, &numbers, &synced, "revoked");
}

#[test]
fn a_block_that_begins_with_the_magic_of_the_journal_is_logged_escaped() {
    let workshop = Workshop::new();
    let (start, numbers) = make(&workshop, 10, "-t ext4");
    let device = Arc::new(Recorder::new(start));
    let magic = [0xc0, 0x3b, 0x39, 0x98, 1, 2, 3, 4];
    let block = run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        let cell = fs.inode(numbers[0]).await.unwrap();
        fs.write(&cell, 0, vec![1; 1024].into()).await.unwrap();
        fs.fsync(&cell, false).await.unwrap();
        let block = fs.map_block(&cell.read().await.raw, 0).await.unwrap();
        let block = block.unwrap();
        let mut handle = fs.begin(1, 0).await.unwrap();
        let write = |bytes: &mut [u8]| bytes[..8].copy_from_slice(&magic);
        handle.update(block, write).await.unwrap();
        let tid = handle.finish();
        fs.commit_and_wait(tid).await.unwrap();
        block
    });
    let left = device.content();
    let at = block as usize * 1024;
    assert_ne!(left[at..at + 8], magic, "it is only in the log");
    let path = workshop.path("left");
    fs::write(&path, &left).unwrap();
    assert!(e2fsck_recovers(&path));
    assert_eq!(fs::read(path).unwrap()[at..at + 8], magic, "by e2fsck");
    let device = Arc::new(Recorder::new(left));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        fs.close().await.unwrap();
    });
    assert_eq!(device.content()[at..at + 8], magic, "by us");
}

#[test]
fn the_log_wraps_around_many_times() {
    let workshop = Workshop::new();
    let (start, numbers) = make(&workshop, 10, "-t ext4");
    let device = Arc::new(Recorder::new(start));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        for round in 0..400_u32 {
            let orphan = make_orphan(&fs, 20).await.unwrap();
            let orphan = fs.inode(orphan).await.unwrap();
            fs.free_orphan(&orphan).await.unwrap();
            let number = numbers[round as usize % numbers.len()];
            let cell = fs.inode(number).await.unwrap();
            let content = vec![1 + round as u8 % 0x80; 3000 + round as usize];
            device.mark(Mark::Touched(number));
            fs.truncate(&cell, 0).await.unwrap();
            fs.write(&cell, 0, content.clone().into()).await.unwrap();
            fs.fsync(&cell, round % 2 == 0).await.unwrap();
            device.mark(Mark::Synced(number, content));
        }
    });
    let mut count = 0;
    device.crashes(60, &mut Random(3), |left, moment| {
        let what = format!("state {count}");
        if count % 6 == 0 {
            judge_by_e2fsck(&workshop, &left, &what);
        }
        judge(left, &numbers, moment.synced, &what);
        count += 1;
    });
}

#[test]
fn an_append_is_synced_with_two_flushes_and_one_commit_serves_all_who_wait() {
    let workshop = Workshop::new();
    let (start, numbers) = make(&workshop, 10, "-t ext4");
    let device = Arc::new(Recorder::new(start));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        let cell = fs.inode(numbers[0]).await.unwrap();
        fs.write(&cell, 0, vec![1; 4096].into()).await.unwrap();
        fs.fsync(&cell, false).await.unwrap();
        let before = device.flushes();
        fs.write(&cell, 4096, vec![2; 4096].into()).await.unwrap();
        fs.fsync(&cell, false).await.unwrap();
        assert_eq!(device.flushes() - before, 2);
        let before = device.flushes();
        let writers = (0..16).map(|at| {
            let (fs, number) = (fs.clone(), numbers[at % numbers.len()]);
            tokio::spawn(async move {
                let cell = fs.inode(number).await.unwrap();
                fs.write(&cell, 9000 + 4096 * at as u64, vec![3; 4096].into())
                    .await
                    .unwrap();
                fs.fsync(&cell, false).await.unwrap();
            })
        });
        for writer in writers.collect::<Vec<_>>() {
            writer.await.unwrap();
        }
        let flushes = device.flushes() - before;
        assert!(flushes <= 16, "{flushes} flushes of 16 writers");
        let before = device.flushes();
        fs.write(&cell, 0, vec![4; 4096].into()).await.unwrap();
        fs.fsync(&cell, true).await.unwrap();
        assert_eq!(device.flushes() - before, 1, "in place, data only");
        fs.close().await.unwrap();
    });
}

#[test]
fn what_is_on_the_device_while_it_is_quiesced_needs_no_replay() {
    let workshop = Workshop::new();
    let (start, numbers) = make(&workshop, 10, "-t ext4");
    let device = Arc::new(Recorder::new(start));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        let cell = fs.inode(numbers[0]).await.unwrap();
        for round in 1..4_u8 {
            let content = vec![round; 10_000];
            fs.write(&cell, 0, content.clone().into()).await.unwrap();
            let snapshot = fs.quiesced(async { device.content() }).await.unwrap();
            let path = workshop.path("snapshot");
            fs::write(&path, &snapshot).unwrap();
            let (clean, said) = e2fsck(&path);
            assert!(clean && !said.contains("recover"), "{said}");
            workshop.change_with(&path, "ro", |dir| {
                assert_eq!(fs::read(dir.join("file0")).unwrap(), content);
            });
            fs.write(&cell, 500, vec![9; 5000].into()).await.unwrap();
            fs.fsync(&cell, false).await.unwrap();
            judge_by_e2fsck(&workshop, &device.content(), "after it");
        }
        fs.close().await.unwrap();
    });
}

/// Writes to a file until the filesystem is full; what.
async fn fill(fs: &Filesystem, cell: &Arc<InodeCell>, byte: u8) -> Vec<u8> {
    let mut content = Vec::new();
    let piece = vec![byte; 60_000];
    while let Ok(()) = fs
        .write(cell, content.len() as u64, piece.clone().into())
        .await
    {
        content.extend_from_slice(&piece);
    }
    content
}

#[test]
fn nothing_freed_is_written_over_before_its_freeing_commits() {
    let workshop = Workshop::new();
    let (start, numbers) = make(&workshop, 10, "-t ext4");
    let device = Arc::new(Recorder::new(start));
    let old = run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        let first = fs.inode(numbers[0]).await.unwrap();
        let second = fs.inode(numbers[1]).await.unwrap();
        let old = fill(&fs, &first, 0x11).await;
        fs.fsync(&first, false).await.unwrap();
        device.mark(Mark::Synced(numbers[0], old.clone()));
        fs.truncate(&first, 0).await.unwrap();
        let new = vec![0x22; old.len() / 2];
        fs.write(&second, 0, new.into()).await.unwrap();
        fs.fsync(&second, false).await.unwrap();
        old
    });
    let mut count = 0;
    device.crashes(80, &mut Random(2), |left, moment| {
        if moment.synced.is_empty() {
            return;
        }
        let device = Arc::new(Recorder::new(left));
        run(async {
            let fs = Filesystem::open(device, options()).await.unwrap();
            let cell = fs.inode(numbers[0]).await.unwrap();
            let found = fs.read(&cell, 0, u32::MAX).await.unwrap();
            assert!(found.is_empty() || found[..] == old[..], "state {count}");
            count += 1;
        });
    });
    assert!(count > 10);
}

#[test]
fn what_the_log_held_is_durable_at_home_before_the_log_is_given_up() {
    let workshop = Workshop::new();
    let (start, numbers) = make(&workshop, 10, "-t ext4");
    let device = Arc::new(Recorder::new(start));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        for round in 0..30_u8 {
            let number = numbers[usize::from(round) % numbers.len()];
            let cell = fs.inode(number).await.unwrap();
            let content = vec![round; 1000 * usize::from(round)];
            device.mark(Mark::Touched(number));
            fs.write(&cell, 0, content.clone().into()).await.unwrap();
            fs.fsync(&cell, false).await.unwrap();
            device.mark(Mark::Synced(number, content));
            fs.quiesced(async {}).await.unwrap();
        }
    });
    let mut count = 0;
    device.crashes(EVERY_STATE, &mut Random(9), |left, moment| {
        judge(left, &numbers, moment.synced, &format!("state {count}"));
        count += 1;
    });
    assert!(count > 300);
}

/// Two programs sync the same file: the second, too, has its answer only when the data is durable.
#[test]
fn a_sync_waits_for_the_flush_of_another_one() {
    let workshop = Workshop::new();
    let (start, numbers) = make(&workshop, 10, "-t ext4");
    let device = Arc::new(Recorder::new(start));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        let cell = fs.inode(numbers[0]).await.unwrap();
        for round in 0..40_u8 {
            let content = vec![1 + round; 5000];
            device.mark(Mark::Touched(numbers[0]));
            fs.write(&cell, 0, content.clone().into()).await.unwrap();
            let syncs = (0..4).map(|turns| {
                let (fs, cell, device) = (fs.clone(), cell.clone(), device.clone());
                let (number, content) = (numbers[0], content.clone());
                tokio::spawn(async move {
                    for _ in 0..turns * u32::from(round) {
                        tokio::task::yield_now().await;
                    }
                    fs.fsync(&cell, true).await.unwrap();
                    device.mark(Mark::Synced(number, content));
                })
            });
            for sync in syncs.collect::<Vec<_>>() {
                sync.await.unwrap();
            }
        }
    });
    all_are_right(&device, &numbers);
}

/// A commit that began before the data arrived does not make it durable.
#[test]
fn a_sync_in_place_does_not_rely_on_a_commit_that_has_begun() {
    let workshop = Workshop::new();
    let (start, numbers) = make(&workshop, 10, "-t ext4");
    let device = Arc::new(Recorder::new(start));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        let cell = fs.inode(numbers[0]).await.unwrap();
        device.set_flush_turns(20_000);
        for round in 0..20_u32 {
            device.mark(Mark::Touched(numbers[0]));
            fs.truncate(&cell, 5000 + u64::from(round)).await.unwrap();
            let (committing, before) = (fs.clone(), device.flushes());
            let commit = tokio::spawn(async move { committing.sync().await.unwrap() });
            while device.flushes() < before + 2 {
                tokio::task::yield_now().await;
            }
            let content = vec![1 + round as u8; 5000 + round as usize];
            fs.write(&cell, 0, content.clone().into()).await.unwrap();
            fs.fsync(&cell, true).await.unwrap();
            device.mark(Mark::Synced(numbers[0], content));
            commit.await.unwrap();
        }
    });
    all_are_right(&device, &numbers);
}

/// What is zeroed inside a block changes nothing but the block.
#[test]
fn a_sync_of_everything_keeps_data_that_needs_no_commit() {
    let workshop = Workshop::new();
    let (start, numbers) = make(&workshop, 10, "-t ext4");
    let device = Arc::new(Recorder::new(start));
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        let cell = fs.inode(numbers[0]).await.unwrap();
        let other = fs.inode(numbers[1]).await.unwrap();
        for round in 0..30_u8 {
            let mut content = vec![1 + round; 5000];
            device.mark(Mark::Touched(numbers[0]));
            fs.write(&cell, 0, content.clone().into()).await.unwrap();
            fs.sync().await.unwrap();
            let zeros = fs.fallocate(&cell, Allocation::Punch, 100, 200);
            zeros.await.unwrap();
            // Commits, and leaves the zeros in memory.
            fs.truncate(&other, u64::from(round)).await.unwrap();
            fs.fsync(&other, false).await.unwrap();
            fs.sync().await.unwrap();
            content[100..300].fill(0);
            device.mark(Mark::Synced(numbers[0], content));
        }
    });
    all_are_right(&device, &numbers);
}

/// Judges every state that the device may have been left in.
fn all_are_right(device: &Recorder, numbers: &[u32]) {
    let mut count = 0;
    let states = 200 * rounds() as usize;
    device.crashes(states, &mut Random(4), |left, moment| {
        judge(left, numbers, moment.synced, &format!("state {count}"));
        count += 1;
    });
    assert!(count > 100);
}

/// An inode that leaves memory and comes back is not taken for durable.
#[test]
fn a_sync_of_a_file_that_was_forgotten_meanwhile_is_one() {
    /// Inodes whose numbers are equal in this are kept together, 1024 of them.
    const TOGETHER: u32 = 64;
    let workshop = Workshop::new();
    let image = workshop.make(40, "-t ext4 -b 1024 -N 70000");
    workshop.change(&image, |dir| {
        for at in 0..1040 * TOGETHER {
            fs::write(dir.join(at.to_string()), b"").unwrap();
        }
    });
    let device = Arc::new(Recorder::new(fs::read(image).unwrap()));
    let number = 200 * TOGETHER;
    let content = vec![7; 3000];
    run(async {
        let fs = Filesystem::open(device.clone(), options()).await.unwrap();
        let forget = async || {
            for other in (1..1030).filter(|other| *other != 200) {
                drop(fs.inode(other * TOGETHER).await.unwrap());
            }
        };
        let cell = fs.inode(number).await.unwrap();
        fs.write(&cell, 0, content.clone().into()).await.unwrap();
        fs.sync().await.unwrap();
        fs.truncate(&cell, 2000).await.unwrap();
        drop(cell);
        forget().await;
        let cell = fs.inode(number).await.unwrap();
        fs.fsync(&cell, false).await.unwrap();
        device.mark(Mark::Synced(number, content[..2000].to_vec()));
    });
    judge(device.content(), &[number], &device.synced(), "forgotten");
}
