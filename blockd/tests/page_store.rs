//! The page store as its callers use it: real files, worker threads, close and crash.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use blockd::data::page_store::{PageAt, PageStore, ReadPart, StoreError, StoreOptions};
use blockd::id::{Epoch, PageNo, SnapshotId, VolumeId};
use blockd::io::sim_disk::SimRandom;
use bytes::Bytes;
use std::collections::BTreeSet;
use std::future::{Future, poll_fn};
use std::path::Path;
use std::task::Poll;

const VOLUME: VolumeId = VolumeId(7);

fn options() -> StoreOptions {
    StoreOptions {
        log_bytes: 1 << 20,
        free_bytes_min: 0,
        ..StoreOptions::default()
    }
}

fn at(page: u32, offset_bytes: u32, len_bytes: u32) -> PageAt {
    PageAt {
        volume: VOLUME,
        page: PageNo(page),
        offset_bytes,
        len_bytes,
    }
}

fn run<F: Future>(test: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

fn open(dir: &Path) -> PageStore {
    PageStore::open(dir, options()).unwrap()
}

async fn read(store: &PageStore, at: PageAt, snapshot: Option<SnapshotId>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in store.read(at, snapshot).await.unwrap() {
        match part {
            ReadPart::Data(data) => bytes.extend_from_slice(&data),
            ReadPart::Hole(len) => bytes.resize(bytes.len() + len as usize, 0),
        }
    }
    bytes
}

async fn write(store: &PageStore, at: PageAt, byte: u8) {
    let data = Bytes::from(vec![byte; at.len_bytes as usize]);
    store.write(at, data, Epoch(3)).await.unwrap();
}

#[test]
fn writes_many_times_the_log_survive_close_and_crash() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let store = open(dir.path());
        for round in 0..8u8 {
            for page in 0..32 {
                write(
                    &store,
                    at(page, 512 * 7, 40_960 + 512),
                    round * 32 + u8::try_from(page).unwrap(),
                )
                .await;
            }
        }
        write(&store, at(40, 0, 4 << 20), 9).await;
        store.flush().await.unwrap();
        assert!(store.is_clean());
        store.close().await.unwrap();
        let closed = store
            .write(at(0, 0, 512), Bytes::from(vec![0; 512]), Epoch(3))
            .await;
        assert!(matches!(closed, Err(StoreError::Closed)));
        drop(store);
        let store = open(dir.path());
        assert_eq!(
            store.usage().log_used_bytes,
            0,
            "a closed store has an empty log"
        );
        write(&store, at(40, 1 << 20, 512), 10).await;
        drop(store);
        let store = open(dir.path());
        for page in 0..32 {
            let bytes = read(&store, at(page, 0, 65_536), None).await;
            assert!(
                bytes[..3584]
                    .iter()
                    .chain(&bytes[45_056..])
                    .all(|b| *b == 0)
            );
            assert!(
                bytes[3584..45_056]
                    .iter()
                    .all(|b| *b == 224 + u8::try_from(page).unwrap())
            );
        }
        let bytes = read(&store, at(40, 0, 4 << 20), None).await;
        assert!(
            bytes
                .iter()
                .enumerate()
                .all(|(i, b)| *b == if i >> 9 == 2048 { 10 } else { 9 })
        );
        assert_eq!(
            store.page_epochs(VOLUME).last(),
            Some(&(PageNo(40), Epoch(3)))
        );
    });
}

#[test]
fn a_snapshot_costs_what_changes_and_deleting_it_frees_exactly_that() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let store = open(dir.path());
        write(&store, at(0, 0, 1 << 20), 1).await;
        store.take_snapshot(VOLUME, SnapshotId(1)).unwrap();
        let taken = store.take_snapshot(VOLUME, SnapshotId(1));
        assert!(matches!(taken, Err(StoreError::SnapshotExists { .. })));
        write(&store, at(0, 8192, 4096), 2).await;
        store
            .zero(at(0, 65_536, 65_536), false, Epoch(3))
            .await
            .unwrap();
        assert_eq!(store.volume_usage(VOLUME).allocated_bytes, (1 << 20) + 4096);
        let usages = store.snapshot_usages(VOLUME, Some(SnapshotId(1))).await;
        let usage = usages.unwrap()[0].1;
        assert_eq!(
            (usage.referenced_bytes, usage.unique_bytes),
            (1 << 20, 4096 + 65_536)
        );
        assert_eq!(usage.used_bytes, usage.unique_bytes, "there is no other");
        assert!(
            read(&store, at(0, 0, 1 << 20), Some(SnapshotId(1)))
                .await
                .iter()
                .all(|b| *b == 1)
        );
        let head = read(&store, at(0, 4096, 12_288), None).await;
        assert_eq!((head[0], head[4096], head[8192]), (1, 2, 1));
        let extents = store.extents(at(0, 0, 262_144), None).unwrap();
        assert_eq!(extents, [(65_536, true), (65_536, false), (131_072, true)]);
        store.delete_snapshot(VOLUME, SnapshotId(1)).await.unwrap();
        store.delete_snapshot(VOLUME, SnapshotId(1)).await.unwrap();
        assert_eq!(
            store.volume_usage(VOLUME).allocated_bytes,
            (1 << 20) - 65_536
        );
        assert_eq!(store.usage().slots_used, 15);
        assert_eq!(store.snapshot_pages(VOLUME, None).unwrap(), [PageNo(0)]);
        store.delete_volume(VOLUME).await.unwrap();
        assert_eq!((store.volumes(), store.usage().slots_used), (Vec::new(), 0));
    });
}

/// What two snapshots share, and the head has no more, each of them uses and neither has alone.
#[test]
fn used_is_what_the_head_does_not_share() {
    const CHUNK: u32 = 65_536;
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let store = open(dir.path());
        write(&store, at(0, 0, 4 * CHUNK), 1).await;
        store.take_snapshot(VOLUME, SnapshotId(1)).unwrap();
        write(&store, at(0, 0, CHUNK), 2).await;
        store.take_snapshot(VOLUME, SnapshotId(2)).unwrap();
        write(&store, at(0, 0, 2 * CHUNK), 3).await;
        let zeroed = at(0, 2 * CHUNK, CHUNK);
        store.zero(zeroed, false, Epoch(3)).await.unwrap();
        let chunks = async |snapshot: Option<SnapshotId>| -> Vec<(u64, u64)> {
            let usages = store.snapshot_usages(VOLUME, snapshot).await.unwrap();
            let chunks = |bytes: u64| bytes / u64::from(CHUNK);
            let of = usages.iter().map(|(_, usage)| usage);
            of.map(|u| (chunks(u.used_bytes), chunks(u.unique_bytes)))
                .collect()
        };
        assert_eq!(chunks(None).await, [(3, 1), (3, 1)]);
        assert_eq!(chunks(Some(SnapshotId(1))).await, [(3, 1)]);
        store.roll_back(VOLUME, SnapshotId(1), Epoch(4)).unwrap();
        let used: Vec<u64> = chunks(None).await.iter().map(|(used, _)| *used).collect();
        assert_eq!(used, [0, 1], "the head is the first one");
    });
}

/// Write `n` puts its number into block `n % 16`, and snapshot `n` is taken behind it. So a write is held
/// as long as one of the 16 snapshots from its own on is, or the head shows it.
fn is_held(kept: &BTreeSet<u32>, written: u32) -> bool {
    1000 < written + 16 || kept.range(written..written + 16).next().is_some()
}

/// Nothing is held that no view shows, nothing is gone that one does, and the first, the last and some
/// others of the snapshots show what they showed.
async fn check_kept(store: &PageStore, kept: &BTreeSet<u32>) {
    let allocated = store.volume_usage(VOLUME).allocated_bytes;
    let held = (1..=1000).filter(|written| is_held(kept, *written));
    let least = held.count() as u64 * 4096;
    // Every view may have a chunk of its own: blocks are copied so that chains stay short.
    let most = (kept.len() as u64 + 1) * 65_536;
    assert!((least..=most).contains(&allocated), "{allocated} bytes");
    let some = kept.iter().step_by(kept.len() / 8 + 1);
    for number in some.chain(kept.last()) {
        let bytes = read(store, at(0, 0, 65_536), Some(SnapshotId(*number))).await;
        for written in number.saturating_sub(15).max(1)..=*number {
            let byte = bytes[(written % 16 * 4096) as usize];
            let wanted = u8::try_from(written % 251).unwrap();
            assert_eq!(byte, wanted, "snapshot {number}, write {written}");
        }
    }
}

/// Deletes so many snapshots, any of those that are kept; what only they held is freed, exactly.
async fn delete_some(store: &PageStore, kept: &mut BTreeSet<u32>, random: &mut SimRandom) {
    let allocated = || store.volume_usage(VOLUME).allocated_bytes;
    let (before, mut freed) = (allocated(), 0);
    for _ in 0..100 {
        let index = usize::try_from(random.below(kept.len() as u64)).unwrap();
        let number = *kept.iter().nth(index).unwrap();
        let usages = store.snapshot_usages(VOLUME, Some(SnapshotId(number)));
        freed += usages.await.unwrap()[0].1.unique_bytes;
        let deleted = store.delete_snapshot(VOLUME, SnapshotId(number));
        deleted.await.unwrap();
        kept.remove(&number);
    }
    assert_eq!(before - allocated(), freed, "{} are kept", kept.len());
}

/// Of 1000 snapshots any are deleted, in any order: each time exactly what only they held is freed.
#[test]
fn a_thousand_snapshots_keep_the_head_and_every_one_of_them() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let store = open(dir.path());
        for number in 1..=1000u32 {
            write(
                &store,
                at(0, number % 16 * 4096, 4096),
                u8::try_from(number % 251).unwrap(),
            )
            .await;
            store.take_snapshot(VOLUME, SnapshotId(number)).unwrap();
        }
        let mut kept: BTreeSet<u32> = (1..=1000).collect();
        check_kept(&store, &kept).await;
        let mut random = SimRandom(26);
        while !kept.is_empty() {
            delete_some(&store, &mut kept, &mut random).await;
            check_kept(&store, &kept).await;
        }
        assert_eq!(
            (
                store.usage().slots_used,
                store.volume_usage(VOLUME).allocated_bytes
            ),
            (1, 65_536)
        );
    });
}

#[test]
fn a_store_in_use_or_of_a_newer_version_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let store = open(dir.path());
        assert!(matches!(
            PageStore::open(dir.path(), options()),
            Err(StoreError::InUse { .. })
        ));
        store.close().await.unwrap();
        drop(store);
        let path = dir.path().join("super");
        let mut bytes = std::fs::read(&path).unwrap();
        (0..4).for_each(|copy| bytes[copy * 4096 + 8] = 3);
        std::fs::write(&path, bytes).unwrap();
        let newer = PageStore::open(dir.path(), options());
        assert!(matches!(
            newer,
            Err(StoreError::NewerVersion { found: 3, .. })
        ));
        let file = dir.path().join("log");
        let no_dir = PageStore::open(&file, options());
        assert!(matches!(no_dir, Err(StoreError::Directory { .. })));
    });
}

#[test]
fn a_large_write_that_is_dropped_between_two_turns_leaves_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let store = open(dir.path());
        let data = Bytes::from(vec![1; 1 << 20]);
        let mut dropped = Box::pin(store.write(at(0, 0, 1 << 20), data, Epoch(3)));
        let polled_once = poll_fn(|cx| Poll::Ready(dropped.as_mut().poll(cx))).await;
        assert!(polled_once.is_pending());
        drop(dropped);
        assert_eq!(read(&store, at(0, 0, 4096), None).await, vec![0; 4096]);
        assert_eq!(store.usage().slots_used, 0);
        write(&store, at(0, 4096, 1 << 20), 2).await;
        let bytes = read(&store, at(0, 0, 2 << 20), None).await;
        let expected = |i| u8::from((4096..(1 << 20) + 4096).contains(&i)) * 2;
        assert!((0..).zip(bytes).all(|(i, byte)| byte == expected(i)));
        assert_eq!(store.usage().slots_total, 17, "its slots were used again");
    });
}

/// Its older version would stay for ever: nobody looks for it once the snapshot is deleted.
#[test]
fn a_chunk_that_is_written_again_after_its_snapshots_are_gone_has_one_version() {
    for by_stamp in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        run(async {
            let store = open(dir.path());
            write(&store, at(0, 0, 1 << 20), 1).await;
            if by_stamp {
                store.split_eras(VOLUME).unwrap();
                store.join_eras(VOLUME).await.unwrap();
            } else {
                store.take_snapshot(VOLUME, SnapshotId(1)).unwrap();
                store.delete_snapshot(VOLUME, SnapshotId(1)).await.unwrap();
            }
            write(&store, at(0, 8192, 4096), 2).await;
            write(&store, at(0, 65_536, 65_536), 3).await;
            let zeroed = at(0, 131_072, 65_536);
            store.zero(zeroed, false, Epoch(3)).await.unwrap();
        });
        run(async {
            let store = open(dir.path());
            let allocated = store.volume_usage(VOLUME).allocated_bytes;
            assert_eq!(
                (allocated, store.usage().slots_used),
                ((1 << 20) - 65_536, 15)
            );
            let bytes = read(&store, at(0, 0, 262_144), None).await;
            let shown = [0, 8192, 12_288, 65_536, 131_072, 196_608].map(|i| bytes[i]);
            assert_eq!(shown, [1, 2, 1, 3, 0, 1]);
        });
    }
}

#[test]
fn a_snapshot_is_freed_also_when_whoever_deletes_it_goes_away() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let store = open(dir.path());
        for byte in [1, 2] {
            for page in 0..40 {
                write(&store, at(page, 0, 4096), byte).await;
            }
            if byte == 1 {
                store.take_snapshot(VOLUME, SnapshotId(1)).unwrap();
            }
        }
        assert_eq!(store.volume_usage(VOLUME).allocated_bytes, 80 * 4096);
        let mut dropped = Box::pin(store.delete_snapshot(VOLUME, SnapshotId(1)));
        let polled_once = poll_fn(|cx| Poll::Ready(dropped.as_mut().poll(cx))).await;
        assert!(polled_once.is_pending());
        drop(dropped);
        let freed = async {
            while store.volume_usage(VOLUME).allocated_bytes > 40 * 4096 {
                tokio::task::yield_now().await;
            }
        };
        let patience = std::time::Duration::from_secs(60);
        tokio::time::timeout(patience, freed).await.unwrap();
    });
}

/// Promise 3: what the disk had taken and lost is counted, once, also if the machine did not stop, so
/// that whoever was answered hears of it (seed 997000000448 of the simulator). A kill loses nothing.
#[test]
fn an_acknowledged_write_that_the_disk_lost_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let store = open(dir.path());
        write(&store, at(0, 0, 65_536), 1).await;
        store.flush().await.unwrap();
    });
    run(async {
        let store = open(dir.path());
        assert_eq!(store.losses(), 0, "it was only killed");
        write(&store, at(0, 0, 65_536), 2).await;
        write(&store, at(1, 0, 4096), 3).await;
    });
    lose(dir.path(), 2);
    run(async {
        let store = open(dir.path());
        assert_eq!(store.losses(), 1);
        assert_eq!(read(&store, at(0, 0, 4096), None).await, [1; 4096]);
        assert_eq!(read(&store, at(1, 0, 4096), None).await, [0; 4096]);
        write(&store, at(0, 0, 4096), 4).await;
    });
    run(async {
        let store = open(dir.path());
        assert_eq!(store.losses(), 1, "nothing more was lost");
        assert_eq!(read(&store, at(0, 0, 4096), None).await, [4; 4096]);
        store.close().await.unwrap();
    });
}

/// Makes zeros of what the slab has of this byte.
fn lose(dir: &Path, byte: u8) {
    let slab = dir.join("slab");
    let mut bytes = std::fs::read(&slab).unwrap();
    let found = bytes.iter().filter(|found| **found == byte).count();
    assert_eq!(found, 65_536);
    bytes
        .iter_mut()
        .filter(|b| **b == byte)
        .for_each(|b| *b = 0);
    std::fs::write(&slab, bytes).unwrap();
}

/// After a rollback and without snapshots a chunk that is written again has one version as soon as
/// the background has had its turn (seed 999000002899 of the simulator).
#[test]
fn a_chunk_that_is_written_again_after_a_rollback_has_one_version() {
    let dir = tempfile::tempdir().unwrap();
    run(async {
        let store = open(dir.path());
        write(&store, at(0, 0, 16_384), 1).await;
        store.take_snapshot(VOLUME, SnapshotId(1)).unwrap();
        write(&store, at(1, 0, 4096), 1).await;
        store.take_snapshot(VOLUME, SnapshotId(2)).unwrap();
        store.roll_back(VOLUME, SnapshotId(1), Epoch(4)).unwrap();
        for snapshot in [1, 2] {
            let dropped = store.delete_snapshot(VOLUME, SnapshotId(snapshot));
            dropped.await.unwrap();
        }
        write(&store, at(0, 0, 4096), 2).await;
        write(&store, at(0, 0, 16_384), 3).await;
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert_eq!(store.volume_usage(VOLUME).allocated_bytes, 16_384);
        assert_eq!(read(&store, at(0, 0, 16_384), None).await, [3; 16_384]);
    });
}
