//! Pages that move between two stores, with all their versions, against a model that keeps the bytes
//! of every view (S003-19).
//!
//! Random writes, trims, snapshots and deletions go on while chunks are copied in passes; snapshots
//! come to the two stores at different moments. After the last tail every view of the new store must
//! be the model's, also after a crash at any device operation and a second try. Planted faults show
//! that the judge sees what it must see.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use blockd::data::page_store::{
    Engine, Fetched, MovedVersion, PageAt, Placement, ReadPart, Step, StoreError, StoreOptions,
};
use blockd::id::{Epoch, PageNo, SnapshotId, VolumeId};
use blockd::io::sim_disk::{CrashKeeps, SimDisk, SimRandom};
use std::collections::BTreeSet;
use std::sync::Arc;

const VOLUME: VolumeId = VolumeId(3);
const PAGE: PageNo = PageNo(5);
/// Blocks of 512 bytes of the page that are used: three chunks.
const BLOCKS: usize = 384;
const CHUNKS: u16 = 3;
const STEPS: usize = 60;
const SNAPSHOTS_MAX: usize = 6;

/// What an implementation may get wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fault {
    None,
    /// What changed after its chunk was copied is not copied again.
    TailForgotten,
    /// A chunk is laid over what the receiver has instead of replacing it.
    OldChunkKept,
    /// All versions are those of the head.
    PlacesForgotten,
    /// What a version zeroes shows what is below it.
    ZerosForgotten,
}

fn options() -> StoreOptions {
    StoreOptions {
        log_bytes: 1 << 20,
        free_bytes_min: 0,
        ..StoreOptions::default()
    }
}

fn at(block: usize, count: usize) -> PageAt {
    PageAt {
        volume: VOLUME,
        page: PAGE,
        offset_bytes: u32::try_from(block * 512).unwrap(),
        len_bytes: u32::try_from(count * 512).unwrap(),
    }
}

type Image = [u8; BLOCKS];

/// One store.
struct Site {
    disk: Arc<SimDisk>,
    engine: Engine<SimDisk>,
}

impl Site {
    fn new(disk: SimDisk) -> Self {
        disk.cold_one_in(4);
        let disk = Arc::new(disk);
        let engine = Engine::open(Arc::clone(&disk), options(), 7).unwrap();
        Self { disk, engine }
    }

    fn run_jobs(&mut self) {
        loop {
            let job = self.engine.next_maintenance().unwrap();
            let Some(job) = job.or_else(|| self.engine.next_sync(true).unwrap()) else {
                return;
            };
            let done = job.run(&*self.disk);
            self.engine.finish(done).unwrap();
        }
    }

    fn attempt<T>(
        &mut self,
        mut request: impl FnMut(&mut Engine<SimDisk>, &[Fetched]) -> Result<Step<T>, StoreError>,
    ) -> T {
        let mut fetched = Vec::new();
        for _ in 0..1000 {
            match request(&mut self.engine, &fetched).unwrap() {
                Step::Done(answer) => return answer,
                Step::Cold(reads) => {
                    fetched.extend(reads.into_iter().map(|r| r.fetch(&*self.disk).unwrap()));
                }
                Step::Full => {
                    self.engine.request_checkpoint();
                    self.run_jobs();
                }
                Step::More => self.run_jobs(),
            }
        }
        panic!("no progress: {:?}", self.engine.usage());
    }

    fn take(&mut self, id: SnapshotId) {
        if !self.engine.snapshots(VOLUME).contains(&id) {
            self.engine.take_snapshot(VOLUME, id).unwrap();
        }
    }

    fn drop_snapshot(&mut self, id: SnapshotId, sweep: bool) {
        let groups = self.attempt(|engine, _| engine.drop_snapshot(VOLUME, id));
        if sweep {
            for key in groups {
                while self.attempt(|engine, f| engine.sweep_group(VOLUME, key, f)) {}
            }
        }
    }

    fn view(&mut self, snapshot: Option<SnapshotId>) -> Vec<u8> {
        let parts = self.attempt(|engine, f| engine.read(at(0, BLOCKS), snapshot, f));
        let bytes = parts.iter().map(|part| match part {
            ReadPart::Data(data) => data.to_vec(),
            ReadPart::Hole(len) => vec![0; *len as usize],
        });
        bytes.collect::<Vec<_>>().concat()
    }
}

/// The two stores and the truth.
struct World {
    /// The owner of the page, then the other.
    sites: [Site; 2],
    random: SimRandom,
    head: Image,
    snapshots: Vec<(SnapshotId, Image)>,
    next: u32,
    dirty: BTreeSet<u16>,
    fault: Fault,
    /// Nothing changes while the page is copied.
    is_quiet: bool,
}

impl World {
    fn new(seed: u64, fault: Fault) -> Self {
        Self {
            sites: [Site::new(SimDisk::new()), Site::new(SimDisk::new())],
            random: SimRandom(seed),
            head: [0; BLOCKS],
            snapshots: Vec::new(),
            next: 1,
            dirty: BTreeSet::new(),
            fault,
            is_quiet: false,
        }
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.random.below(end as u64)).unwrap()
    }

    fn owner(&mut self) -> &mut Site {
        &mut self.sites[0]
    }

    fn step(&mut self) {
        match self.below(100) {
            0..=59 => self.change(),
            60..=74 if self.snapshots.len() < SNAPSHOTS_MAX => self.snapshot(),
            75..=86 if !self.snapshots.is_empty() => {
                let index = self.below(self.snapshots.len());
                let (id, _) = self.snapshots.remove(index);
                let (both, sweep) = (self.below(2) == 0, self.below(2) == 0);
                let first = self.below(2);
                self.sites[first].drop_snapshot(id, sweep);
                if both {
                    self.sites[1 - first].drop_snapshot(id, sweep);
                }
            }
            87..=91 => {
                self.owner().engine.request_checkpoint();
                self.owner().run_jobs();
            }
            92..=94 => {
                let disk = Arc::clone(&self.owner().disk);
                self.owner().engine = Engine::open(disk, options(), 7).unwrap();
            }
            _ => self.sites.iter_mut().for_each(Site::run_jobs),
        }
    }

    /// Both stores hold pages of the volume, so both take it, in any order, also with changes between.
    fn snapshot(&mut self) {
        let id = SnapshotId(self.next);
        self.next += 1;
        let early = self.below(2) == 0;
        if early {
            self.sites[1].take(id);
            (0..self.below(3)).for_each(|_| self.change());
        }
        self.sites[0].take(id);
        self.snapshots.push((id, self.head));
        self.sites[1].take(id);
    }

    fn change(&mut self) {
        let block = self.below(BLOCKS);
        let count = match self.below(4) {
            0 => 8.min(BLOCKS - block),
            1 => 1 + self.below((BLOCKS - block).min(40)),
            _ => 1 + self.below(BLOCKS - block),
        };
        let (block, count) = match self.below(4) {
            0 => (self.below(3) * 128, 128),
            _ => (block, count),
        };
        let value = u8::try_from(self.below(250)).unwrap() * u8::from(self.random.below(3) != 0);
        if value == 0 {
            self.owner()
                .attempt(|engine, f| engine.zero(at(block, count), Epoch(1), f));
        } else {
            let (data, mut placement) = (vec![value; count * 512], Placement::default());
            self.owner().attempt(|engine, f| {
                engine.write(at(block, count), &data, Epoch(1), &mut placement, f)
            });
        }
        self.head[block..block + count].fill(value);
        let chunks = block / 128..=(block + count - 1) / 128;
        self.dirty
            .extend(chunks.map(|chunk| u16::try_from(chunk).unwrap()));
    }

    /// Ships a chunk to the other store, piece by piece.
    fn ship(&mut self, chunk: u16) {
        let order = self.owner().engine.snapshots(VOLUME);
        let mut from = None;
        loop {
            let exported = self
                .owner()
                .attempt(|engine, f| engine.export_chunk(VOLUME, (PAGE, chunk), from, f));
            if exported.moved.is_first && self.fault != Fault::OldChunkKept {
                self.sites[1].attempt(|engine, _| engine.drop_chunk(VOLUME, PAGE, chunk));
            }
            let mut rest = exported.data.as_slice();
            for version in &exported.moved.versions {
                let (data, after) = rest.split_at(version.data_bytes());
                rest = after;
                let version = self.fault.apply(version);
                self.sites[1].attempt(|engine, _| {
                    engine.take_in(VOLUME, (PAGE, chunk), &order, &version, data)
                });
                if !self.is_quiet && self.below(6) == 0 {
                    self.delete_at_receiver();
                }
            }
            match exported.next {
                Some(next) => from = Some(next),
                None => return,
            }
        }
    }

    /// A snapshot goes between two versions that come: the receiver places the second as if the
    /// snapshot had never been.
    fn delete_at_receiver(&mut self) {
        if self.snapshots.is_empty() {
            return;
        }
        let index = self.below(self.snapshots.len());
        let (id, _) = self.snapshots.remove(index);
        let sweep = self.below(2) == 0;
        self.sites[1].drop_snapshot(id, sweep);
    }

    /// Snapshots that the receiver must know before it takes in what was written after them.
    fn register(&mut self) {
        let order = self.owner().engine.snapshots(VOLUME);
        let live: BTreeSet<SnapshotId> = self.snapshots.iter().map(|(id, _)| *id).collect();
        for id in order.into_iter().filter(|id| live.contains(id)) {
            self.sites[1].take(id);
        }
    }

    fn copy(&mut self) {
        self.register();
        self.sites[1].attempt(|engine, _| engine.drop_page(VOLUME, PAGE));
        self.dirty = (0..CHUNKS).collect();
        for _ in 0..4 {
            for chunk in std::mem::take(&mut self.dirty) {
                self.register();
                self.ship(chunk);
                let steps = if self.is_quiet { 0 } else { self.below(4) };
                (0..steps).for_each(|_| self.step());
            }
        }
        if self.fault != Fault::TailForgotten {
            self.register();
            let tail = std::mem::take(&mut self.dirty);
            tail.into_iter().for_each(|chunk| self.ship(chunk));
        }
    }

    fn judge(&mut self) -> Result<(), String> {
        self.register();
        let views = self.snapshots.iter().map(|(id, image)| (Some(*id), *image));
        let views: Vec<_> = views.chain([(None, self.head)]).collect();
        for (id, image) in views {
            let found = self.sites[1].view(id);
            let wrong =
                (0..BLOCKS).find(|b| found[b * 512..][..512].iter().any(|x| *x != image[*b]));
            if let Some(block) = wrong {
                return Err(format!("view {id:?}, block {block}"));
            }
        }
        Ok(())
    }

    /// Flips the owner, which then drops its copy.
    fn flip(&mut self) {
        self.sites.swap(0, 1);
        self.owner()
            .attempt(|engine, _| engine.adopt_page(VOLUME, PAGE, Epoch(2)));
        self.sites[1].attempt(|engine, _| engine.drop_page(VOLUME, PAGE));
        assert!(self.sites[1].engine.held_pages(VOLUME).is_empty());
    }
}

impl Fault {
    fn apply(self, version: &MovedVersion) -> MovedVersion {
        let mut version = version.clone();
        match self {
            Self::PlacesForgotten => version.place.after = None,
            Self::ZerosForgotten => {
                version.present &= !version.zero;
                version.copied &= version.present;
                version.zero = 0;
            }
            _ => {}
        }
        version
    }
}

fn workload(seed: u64, fault: Fault) -> Result<(), String> {
    let mut world = World::new(seed, fault);
    for round in 0..4 {
        (0..STEPS).for_each(|_| world.step());
        world.copy();
        world
            .judge()
            .map_err(|what| format!("seed {seed} round {round}: {what}"))?;
        world.flip();
    }
    Ok(())
}

/// S003-19: a page is the same in every view after each move, there and back, under any changes.
#[test]
fn every_view_moves_with_the_page() {
    for seed in 0..60 {
        workload(seed, Fault::None).unwrap();
    }
}

#[test]
fn planted_faults_are_found() {
    for fault in [
        Fault::TailForgotten,
        Fault::OldChunkKept,
        Fault::PlacesForgotten,
        Fault::ZerosForgotten,
    ] {
        let found = (0..40).find(|seed| workload(*seed, fault).is_err());
        assert!(found.is_some(), "not found: {fault:?}");
    }
}

/// S003-19: the receiver loses power after any device operation; what it has then can be taken in
/// again from the start.
#[test]
fn a_crash_of_the_receiver_costs_nothing_but_the_copy() {
    let prepared = |seed| {
        let mut world = World::new(seed, Fault::None);
        (0..STEPS).for_each(|_| world.step());
        world.sites[1].run_jobs();
        world.is_quiet = true;
        world
    };
    let mut checked = 0;
    for seed in 0..6 {
        let mut world = prepared(seed);
        world.sites[1].disk.record();
        world.copy();
        world.sites[1].run_jobs();
        let trace = world.sites[1].disk.take_trace();
        let mut random = SimRandom(seed + 1);
        for done in (0..=trace.len()).step_by(2) {
            let mut again = prepared(seed);
            let disk = Arc::clone(&again.sites[1].disk);
            trace[..done].iter().for_each(|op| disk.replay(op));
            let keeps = match random.below(3) {
                0 => CrashKeeps::All,
                1 => CrashKeeps::Nothing,
                _ => CrashKeeps::Some(128),
            };
            again.sites[1] = Site::new(disk.crashed(keeps, &mut random));
            again.copy();
            let judged = again.judge();
            judged.unwrap_or_else(|what| panic!("seed {seed} crash after {done}: {what}"));
            checked += 1;
        }
    }
    assert!(checked > 60, "{checked}");
}

/// Bytes that changed on the way are refused, and so is a version without all of its data.
#[test]
fn moved_data_is_verified_against_the_senders_checksums() {
    let mut world = World::new(1, Fault::None);
    let (data, mut placement) = (vec![9; 4096], Placement::default());
    world
        .owner()
        .attempt(|engine, f| engine.write(at(0, 8), &data, Epoch(1), &mut placement, f));
    let exported = world
        .owner()
        .attempt(|engine, f| engine.export_chunk(VOLUME, (PAGE, 0), None, f));
    let version = &exported.moved.versions[0];
    let mut bytes = exported.data.clone();
    bytes[17] ^= 1;
    for data in [&bytes[..], &bytes[1..], &[]] {
        let refused = world.sites[1]
            .engine
            .take_in(VOLUME, (PAGE, 0), &[], version, data);
        assert!(
            matches!(refused, Err(StoreError::BadRequest { .. })),
            "{refused:?}"
        );
    }
    assert!(world.sites[1].engine.held_pages(VOLUME).is_empty());
}

/// A bad sub-block is never moved as if it were good: the export says where it is.
#[test]
fn damaged_data_is_not_moved() {
    let mut world = World::new(1, Fault::None);
    let (data, mut placement) = (vec![9; 65536], Placement::default());
    let owner = world.owner();
    owner.attempt(|engine, f| engine.write(at(0, 128), &data, Epoch(1), &mut placement, f));
    owner.run_jobs();
    owner
        .disk
        .flip_bit(blockd::io::disk::DiskFile::Slab, 8192, 3);
    let mut fetched = Vec::new();
    let refused = loop {
        match owner.engine.export_chunk(VOLUME, (PAGE, 0), None, &fetched) {
            Ok(Step::Cold(reads)) => {
                fetched.extend(reads.into_iter().map(|r| r.fetch(&*owner.disk).unwrap()));
            }
            other => break other,
        }
    };
    assert!(
        matches!(
            refused,
            Err(StoreError::BadSubBlock {
                offset_bytes: 8192,
                ..
            })
        ),
        "{refused:?}"
    );
}

/// A chain that is too long for one message comes in pieces, and the pieces make the whole.
#[test]
fn a_long_chain_moves_in_pieces() {
    let mut world = World::new(1, Fault::None);
    for number in 1..=60 {
        let value = u8::try_from(number).unwrap();
        let (data, mut placement) = (vec![value; 65536], Placement::default());
        world
            .owner()
            .attempt(|engine, f| engine.write(at(0, 128), &data, Epoch(1), &mut placement, f));
        world.head[..128].fill(value);
        let id = SnapshotId(number);
        world.sites[0].take(id);
        let head = world.head;
        world.snapshots.push((id, head));
    }
    let first = world
        .owner()
        .attempt(|engine, f| engine.export_chunk(VOLUME, (PAGE, 0), None, f));
    assert!(first.next.is_some() && first.data.len() <= 2 << 20);
    world.next = 61;
    world.register();
    (0..CHUNKS).for_each(|chunk| world.ship(chunk));
    world.judge().unwrap();
}
