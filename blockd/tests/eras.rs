//! Snapshots of an era that was split off (`stamp`), against a model that keeps every image.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use blockd::data::page_store::{PageAt, PageStore, ReadPart};
use blockd::id::{Epoch, PageNo, SnapshotId, VolumeId};
use blockd::io::sim_disk::SimRandom;
use bytes::Bytes;
use common::{open, session};

const VOLUME: VolumeId = VolumeId(3);
/// Bytes of the page that are used: three chunks.
const LEN: usize = 192 << 10;
const ROUNDS: u32 = 60;

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

/// What the store is to show.
struct Model {
    random: SimRandom,
    head: Vec<u8>,
    snapshots: Vec<(SnapshotId, Vec<u8>)>,
    rounds: u32,
}

impl Model {
    async fn changes(&mut self, store: &PageStore, below: u64) {
        for _ in 0..self.random.below(below) {
            change(store, &mut self.random, &mut self.head).await;
        }
    }

    /// Splits, writes, and takes a snapshot of one of the eras.
    async fn split_and_take(&mut self, store: &PageStore) {
        self.rounds += 1;
        self.changes(store, 6).await;
        let before = store.split_eras(VOLUME).unwrap();
        let mut images = vec![(before, self.head.clone())];
        for _ in 0..self.random.below(12) {
            change(store, &mut self.random, &mut self.head).await;
            images.push((store.last_era(VOLUME), self.head.clone()));
        }
        let chosen = usize::try_from(self.random.below(images.len() as u64)).unwrap();
        let (era, then) = images.swap_remove(chosen);
        let id = SnapshotId(self.rounds);
        store.take_snapshot_at(VOLUME, id, era).unwrap();
        self.snapshots.push((id, then));
        self.changes(store, 3).await;
    }

    async fn join_and_delete(&mut self, store: &PageStore) {
        store.join_eras(VOLUME).await.unwrap();
        if self.snapshots.len() > 4 {
            let chosen = usize::try_from(self.random.below(5)).unwrap();
            let (gone, _) = self.snapshots.remove(chosen);
            store.delete_snapshot(VOLUME, gone).await.unwrap();
        }
    }

    async fn check(&self, store: &PageStore) {
        let round = self.rounds;
        assert!(image(store, None).await == self.head, "round {round}");
        for (id, then) in &self.snapshots {
            let found = image(store, Some(*id)).await;
            assert!(found == *then, "round {round}, snapshot {id}");
        }
    }
}

/// S003-26, 41, 42: a snapshot of any era that was split off is the image after that write, before and
/// after the eras are joined, and after a crash; the others are merged and take no space.
#[test]
fn a_snapshot_of_any_era_is_the_image_of_then() {
    let dir = tempfile::tempdir().unwrap();
    let mut model = Model {
        random: SimRandom(11),
        head: vec![0; LEN],
        snapshots: Vec::new(),
        rounds: 0,
    };
    while model.rounds < ROUNDS {
        session(async {
            let store = open(dir.path());
            model.check(&store).await;
            loop {
                model.split_and_take(&store).await;
                model.check(&store).await;
                if model.random.below(3) == 0 {
                    return;
                }
                model.join_and_delete(&store).await;
                model.check(&store).await;
            }
        });
    }
    session(async {
        let store = open(dir.path());
        for (id, _) in std::mem::take(&mut model.snapshots) {
            store.delete_snapshot(VOLUME, id).await.unwrap();
        }
        model.check(&store).await;
        let used = store.volume_usage(VOLUME).allocated_bytes;
        assert!(used <= LEN as u64, "{used} bytes for {LEN}");
    });
}

/// S003-42: a TRIM of what is a hole has its moment, but no era. A snapshot of that moment does not
/// have the write behind it (seed 11447001290 of the simulator).
#[test]
fn a_change_that_changes_nothing_does_not_share_the_era_of_the_next_one() {
    let dir = tempfile::tempdir().unwrap();
    session(async {
        let store = open(dir.path());
        let before = store.split_eras(VOLUME).unwrap();
        store.zero(at(0, 4096), false, Epoch(1)).await.unwrap();
        let then = store.last_era(VOLUME);
        assert_eq!(then, before);
        let data = Bytes::from(vec![7; 4096]);
        store.write(at(0, 4096), data, Epoch(1)).await.unwrap();
        store.zero(at(8192, 4096), false, Epoch(1)).await.unwrap();
        assert_eq!(store.last_era(VOLUME), then + 1);
        store.take_snapshot_at(VOLUME, SnapshotId(1), then).unwrap();
        assert_eq!(image(&store, Some(SnapshotId(1))).await, vec![0; LEN]);
        store.join_eras(VOLUME).await.unwrap();
        assert_eq!(image(&store, Some(SnapshotId(1))).await, vec![0; LEN]);
    });
}
