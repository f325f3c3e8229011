//! Snapshots of an era that was split off (`stamp`), against a model that keeps every image.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use blockd::data::page_store::{PageAt, PageStore, ReadPart, StoreOptions};
use blockd::id::{Epoch, PageNo, SnapshotId, VolumeId};
use blockd::io::sim_disk::SimRandom;
use bytes::Bytes;
use std::path::Path;

const VOLUME: VolumeId = VolumeId(3);
/// Bytes of the page that are used: three chunks.
const LEN: usize = 192 << 10;
const ROUNDS: u32 = 60;

fn open(dir: &Path) -> PageStore {
    let options = StoreOptions {
        log_bytes: 1 << 20,
        free_bytes_min: 0,
        ..StoreOptions::default()
    };
    PageStore::open(dir, options).unwrap()
}

fn at(offset: usize, len: usize) -> PageAt {
    PageAt {
        volume: VOLUME,
        page: PageNo(0),
        offset_bytes: u32::try_from(offset).unwrap(),
        len_bytes: u32::try_from(len).unwrap(),
    }
}

async fn image(store: &PageStore, snapshot: Option<SnapshotId>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in store.read(at(0, LEN), snapshot).await.unwrap() {
        match part {
            ReadPart::Data(data) => bytes.extend_from_slice(&data),
            ReadPart::Hole(len) => bytes.resize(bytes.len() + len as usize, 0),
        }
    }
    bytes
}

/// One change that is a single step of the store: a write of any blocks, or a TRIM in a chunk.
async fn change(store: &PageStore, random: &mut SimRandom, head: &mut [u8]) {
    let mut within = |end: usize| usize::try_from(random.below(end as u64)).unwrap();
    let sub = within(LEN / 4096);
    if within(4) == 0 {
        let count = 1 + within(16 - sub % 16);
        let range = at(sub * 4096, count * 4096);
        assert!(range.is_zeroed_at_once());
        store.zero(range, false, Epoch(1)).await.unwrap();
        head[sub * 4096..(sub + count) * 4096].fill(0);
        return;
    }
    let from = sub * 4096 + 512 * within(8);
    let end = LEN.min(from + 512 * (1 + within(200)));
    let byte = u8::try_from(1 + within(250)).unwrap();
    let data = Bytes::from(vec![byte; end - from]);
    assert!(at(from, end - from).is_written_at_once());
    store
        .write(at(from, end - from), data, Epoch(1))
        .await
        .unwrap();
    head[from..end].fill(byte);
}

/// S003-26, 41, 42: a snapshot of any era that was split off is the image after that write, before and
/// after the eras are joined, and after a crash; the others are merged and take no space.
#[test]
fn a_snapshot_of_any_era_is_the_image_of_then() {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let mut random = SimRandom(11);
        let (mut store, mut head) = (open(dir.path()), vec![0; LEN]);
        let mut snapshots: Vec<(SnapshotId, Vec<u8>)> = Vec::new();
        for round in 1..=ROUNDS {
            for _ in 0..random.below(6) {
                change(&store, &mut random, &mut head).await;
            }
            let before = store.split_eras(VOLUME).unwrap();
            let mut images = vec![(before, head.clone())];
            for _ in 0..random.below(12) {
                change(&store, &mut random, &mut head).await;
                images.push((store.current_era(VOLUME), head.clone()));
            }
            let chosen = usize::try_from(random.below(images.len() as u64)).unwrap();
            let (era, then) = images.swap_remove(chosen);
            let id = SnapshotId(round);
            store.take_snapshot_at(VOLUME, id, era).unwrap();
            for _ in 0..random.below(3) {
                change(&store, &mut random, &mut head).await;
            }
            assert!(image(&store, Some(id)).await == then, "round {round}");
            snapshots.push((id, then));
            if random.below(3) == 0 {
                drop(store);
                store = open(dir.path());
            } else {
                store.join_eras(VOLUME).await.unwrap();
            }
            if snapshots.len() > 4 {
                let gone = snapshots.remove(usize::try_from(random.below(5)).unwrap());
                store.delete_snapshot(VOLUME, gone.0).await.unwrap();
            }
            assert!(image(&store, None).await == head, "round {round}");
            for (id, then) in &snapshots {
                assert!(
                    image(&store, Some(*id)).await == *then,
                    "round {round}, {id}"
                );
            }
        }
        for (id, _) in snapshots {
            store.delete_snapshot(VOLUME, id).await.unwrap();
        }
        let used = store.volume_usage(VOLUME).allocated_bytes;
        assert!(used <= LEN as u64, "{used} bytes for {LEN}");
        assert!(image(&store, None).await == head);
    });
}
