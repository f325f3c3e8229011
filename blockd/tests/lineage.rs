//! Rollbacks, clones, clones of clones, flattening, and moves of their pages between two stores, against
//! a model that keeps whole images: what every view shows, what changed between any two views, and that
//! deleting a snapshot frees exactly what it was said to hold alone (S003-13, S003-20, S003-26). Planted
//! faults show that the judge sees them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use blockd::data::page_store::{
    Engine, Exported, Fetched, MovedVersion, PageAt, Parent, Placement, ReadPart, Step, StoreError,
    StoreOptions,
};
use blockd::id::{Epoch, LayerRun, PageNo, SnapshotId, VolumeId};
use blockd::io::sim_disk::{SimDisk, SimRandom};
use std::collections::BTreeSet;
use std::sync::Arc;

/// Blocks of 512 bytes that are used of the one page: three chunks.
const BLOCKS: usize = 384;
const SUBS: usize = BLOCKS / 8;
const OPS: usize = 140;
const SNAPSHOTS_MAX: usize = 5;
const VOLUMES_MAX: usize = 4;
const PAGE: PageNo = PageNo(2);

fn options() -> StoreOptions {
    StoreOptions {
        log_bytes: 1 << 20,
        free_bytes_min: 0,
        ..StoreOptions::default()
    }
}

fn at(volume: VolumeId, block: usize, count: usize) -> PageAt {
    PageAt {
        volume,
        page: PAGE,
        offset_bytes: u32::try_from(block * 512).unwrap(),
        len_bytes: u32::try_from(count * 512).unwrap(),
    }
}

/// What one view shows, and for each sub-block the operations of this volume that made it so.
#[derive(Clone)]
struct View {
    image: [u8; BLOCKS],
    touches: Vec<BTreeSet<usize>>,
}

struct Vol {
    id: VolumeId,
    head: View,
    snapshots: Vec<(SnapshotId, View)>,
    parent: Option<Parent>,
    /// What several branches have from one version may count as written on each of them.
    is_rolled_back: bool,
    /// The store that has its page.
    home: usize,
}

impl Vol {
    fn view(&self, snapshot: Option<SnapshotId>) -> &View {
        let find = |id| &self.snapshots.iter().find(|(s, _)| *s == id).unwrap().1;
        snapshot.map_or(&self.head, find)
    }

    fn views(&self) -> impl Iterator<Item = Option<SnapshotId>> {
        let ids: Vec<_> = self.snapshots.iter().map(|(id, _)| Some(*id)).collect();
        ids.into_iter().chain([None])
    }
}

/// What the judge asks of the store.
#[derive(Clone, Copy)]
struct Reader {
    bytes: fn(&Runner, VolumeId, Option<SnapshotId>) -> Vec<u8>,
    changed: fn(&Runner, VolumeId, Option<SnapshotId>, SnapshotId) -> Vec<bool>,
    unique: fn(&Runner, VolumeId, SnapshotId) -> u64,
    /// What arrives of a version that was moved.
    moved: fn(&MovedVersion) -> MovedVersion,
}

const HONEST: Reader = Reader {
    bytes: Runner::bytes,
    changed: Runner::changed,
    unique: Runner::unique,
    moved: MovedVersion::clone,
};

struct Runner {
    /// The store that is worked on, and its number.
    disk: Arc<SimDisk>,
    engine: Engine<SimDisk>,
    here: usize,
    /// The other store.
    away: (Arc<SimDisk>, Engine<SimDisk>),
    random: SimRandom,
    volumes: Vec<Vol>,
    ops: usize,
    epoch: u32,
    next_snapshot: u32,
    next_volume: u64,
    reader: Reader,
}

impl Runner {
    fn new(seed: u64, reader: Reader) -> Runner {
        let store = || {
            let disk = Arc::new(SimDisk::new());
            disk.cold_one_in(5);
            let engine = Engine::open(Arc::clone(&disk), options(), 1).unwrap();
            (disk, engine)
        };
        let (disk, engine) = store();
        let nothing = View {
            image: [0; BLOCKS],
            touches: vec![BTreeSet::new(); SUBS],
        };
        Runner {
            disk,
            engine,
            here: 0,
            away: store(),
            random: SimRandom(seed),
            volumes: vec![Vol {
                id: VolumeId(1),
                head: nothing,
                snapshots: Vec::new(),
                parent: None,
                is_rolled_back: false,
                home: 0,
            }],
            ops: 0,
            epoch: 1,
            next_snapshot: 1,
            next_volume: 2,
            reader,
        }
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.random.below(end as u64)).unwrap()
    }

    fn go(&mut self, home: usize) {
        if self.here != home {
            std::mem::swap(&mut self.disk, &mut self.away.0);
            std::mem::swap(&mut self.engine, &mut self.away.1);
            self.here = home;
        }
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

    fn bytes(&self, volume: VolumeId, snapshot: Option<SnapshotId>) -> Vec<u8> {
        let mut fetched = Vec::new();
        loop {
            let read = self.engine.read(at(volume, 0, BLOCKS), snapshot, &fetched);
            match read.unwrap() {
                Step::Done(parts) => {
                    let bytes = |part| match part {
                        ReadPart::Data(data) => data.to_vec(),
                        ReadPart::Hole(len) => vec![0; len as usize],
                    };
                    return parts.into_iter().map(bytes).collect::<Vec<_>>().concat();
                }
                Step::Cold(reads) => {
                    fetched.extend(reads.into_iter().map(|r| r.fetch(&*self.disk).unwrap()));
                }
                step => panic!("{step:?}"),
            }
        }
    }

    fn changed(&self, volume: VolumeId, view: Option<SnapshotId>, since: SnapshotId) -> Vec<bool> {
        let runs = self.engine.layers(at(volume, 0, BLOCKS), view, Some(since));
        let subs = |run: LayerRun| std::iter::repeat_n(run.changed, run.len_bytes as usize / 4096);
        runs.unwrap().into_iter().flat_map(subs).collect()
    }

    fn unique(&self, volume: VolumeId, snapshot: SnapshotId) -> u64 {
        let usages = |snapshot| {
            let mut scan = self.engine.begin_usages(volume, snapshot).unwrap();
            while self.engine.count_usages(&mut scan, 1) {}
            scan.finish()
        };
        let (usage, all) = (usages(Some(snapshot))[0].1, usages(None));
        assert!(
            all.contains(&(snapshot, usage)),
            "{snapshot}: {usage:?} {all:?}"
        );
        usage.unique_bytes
    }

    fn step(&mut self) -> Result<(), String> {
        self.ops += 1;
        let of = self.below(self.volumes.len());
        let (id, count) = (self.volumes[of].id, self.volumes[of].snapshots.len());
        self.go(self.volumes[of].home);
        match self.below(100) {
            0..=44 => self.change(of),
            45..=56 if count < SNAPSHOTS_MAX => {
                let snapshot = SnapshotId(self.next_snapshot);
                self.next_snapshot += 1;
                self.engine.take_snapshot(id, snapshot).unwrap();
                let head = self.volumes[of].head.clone();
                self.volumes[of].snapshots.push((snapshot, head));
            }
            57..=66 if count > 0 => {
                let index = self.below(count);
                return self.drop_snapshot(of, index);
            }
            67..=74 if count > 0 => {
                let (snapshot, view) =
                    self.volumes[of].snapshots[self.random.0 as usize % count].clone();
                self.epoch += 1;
                let groups = self.engine.roll_back(id, snapshot, self.epoch).unwrap();
                let again = self.engine.roll_back(id, snapshot, self.epoch).unwrap();
                assert!(again.is_empty(), "done once");
                self.volumes[of].head = view;
                self.volumes[of].is_rolled_back = true;
                if self.below(2) == 0 {
                    self.sweep(id, groups);
                }
            }
            75..=79 if count > 0 && self.volumes.len() < VOLUMES_MAX => {
                let (snapshot, view) =
                    self.volumes[of].snapshots[self.random.0 as usize % count].clone();
                self.clone_volume(
                    Parent {
                        volume: id,
                        snapshot,
                    },
                    view,
                );
            }
            80..=83 => self.flatten(of),
            84..=90 => {
                self.engine.request_apply();
                self.engine.request_checkpoint();
                self.run_jobs();
            }
            91..=94 => {
                self.engine = Engine::open(Arc::clone(&self.disk), options(), 1).unwrap();
                self.sweep_all();
            }
            95 => self.relocate(of),
            _ => self.run_jobs(),
        }
        Ok(())
    }

    /// Moves the page of a volume to the other store. Clones that stay copy up what they have in it.
    fn relocate(&mut self, of: usize) {
        let (id, home) = (self.volumes[of].id, self.here);
        let history = self.engine.history(id);
        let chunks = self.engine.page_chunks(id, PAGE);
        let parcels: Vec<Exported> = chunks.into_iter().map(|c| self.export(id, c)).collect();
        self.go(1 - home);
        if let Some(parent) = self.volumes[of].parent {
            self.engine.clone_volume(id, parent).unwrap();
        }
        self.attempt(|engine, _| engine.adopt_history(id, &history));
        for parcel in parcels {
            let (at, mut rest) = ((PAGE, parcel.moved.chunk), &parcel.data[..]);
            for version in &parcel.moved.versions {
                let (data, behind) = rest.split_at(version.data_bytes());
                rest = behind;
                let version = (self.reader.moved)(version);
                let data = &data[..version.data_bytes()];
                self.attempt(|engine, _| engine.take_in(id, at, &history.order(), &version, data));
                if self.below(6) == 0 {
                    self.delete_on_the_way(of);
                }
            }
        }
        self.attempt(|engine, _| engine.adopt_page(id, PAGE, Epoch(1)));
        self.volumes[of].home = 1 - home;
        self.go(home);
        for clone in self.engine.clones(id, None) {
            for key in self.engine.parent_groups(clone, PAGE) {
                let mut copy = || self.attempt(|engine, f| engine.copy_up_group(clone, key, f));
                while copy().is_some() {}
            }
        }
        self.attempt(|engine, _| engine.drop_page(id, PAGE));
        self.attempt(|engine, _| engine.forget_empty_volume(id));
    }

    /// A snapshot that is no clone's parent goes while the page comes to this store.
    fn delete_on_the_way(&mut self, of: usize) {
        let volume = self.volumes[of].id;
        let is_parent = |snapshot: SnapshotId| {
            let parent = Some(Parent { volume, snapshot });
            self.volumes.iter().any(|clone| clone.parent == parent)
        };
        let mut all = self.volumes[of].snapshots.iter();
        if let Some(index) = all.position(|(snapshot, _)| !is_parent(*snapshot)) {
            let (snapshot, _) = self.volumes[of].snapshots.remove(index);
            let groups = self.attempt(|engine, _| engine.drop_snapshot(volume, snapshot));
            self.sweep(volume, groups);
        }
    }

    fn export(&mut self, id: VolumeId, chunk: u16) -> Exported {
        let exported = self.attempt(|engine, f| engine.export_chunk(id, (PAGE, chunk), None, f));
        assert_eq!(exported.next, None);
        exported
    }

    fn change(&mut self, of: usize) {
        let id = self.volumes[of].id;
        let (block, count) = match self.below(6) {
            0..=2 => (self.below(SUBS) * 8, 8),
            3 => {
                let block = self.below(BLOCKS);
                (block, 1 + self.below((BLOCKS - block).min(40)))
            }
            4 => (self.below(SUBS - 8) * 8, 64),
            _ => (self.below(3) * 128, 128),
        };
        let value = match self.below(3) {
            0 => 0,
            _ => u8::try_from(1 + self.below(250)).unwrap(),
        };
        if value == 0 {
            self.attempt(|engine, f| engine.zero(at(id, block, count), Epoch(1), f));
        } else {
            let (data, mut placement) = (vec![value; count * 512], Placement::default());
            let range = at(id, block, count);
            self.attempt(|engine, f| engine.write(range, &data, Epoch(1), &mut placement, f));
        }
        let head = &mut self.volumes[of].head;
        head.image[block..block + count].fill(value);
        for sub in block / 8..(block + count).div_ceil(8) {
            head.touches[sub].insert(self.ops);
        }
    }

    fn clone_volume(&mut self, parent: Parent, view: View) {
        let id = VolumeId(self.next_volume);
        self.next_volume += 1;
        self.engine.clone_volume(id, parent).unwrap();
        self.engine.clone_volume(id, parent).unwrap();
        self.volumes.push(Vol {
            id,
            head: View {
                touches: vec![BTreeSet::new(); SUBS],
                ..view
            },
            snapshots: Vec::new(),
            parent: Some(parent),
            is_rolled_back: false,
            home: self.here,
        });
    }

    /// Copies up all or a part; ends the dependence only after all.
    fn flatten(&mut self, of: usize) {
        let id = self.volumes[of].id;
        if self.volumes[of].parent.is_none() {
            return;
        }
        let parts = self.below(3);
        for (part, key) in self.engine.parent_groups(id, PAGE).into_iter().enumerate() {
            while self
                .attempt(|engine, f| engine.copy_up_group(id, key, f))
                .is_some()
            {
                if part < parts {
                    return;
                }
            }
        }
        self.engine.detach(id).unwrap();
        self.volumes[of].parent = None;
    }

    /// Deletes a snapshot, unless a clone needs it, and judges what that frees.
    fn drop_snapshot(&mut self, of: usize, index: usize) -> Result<(), String> {
        let (volume, snapshot) = (self.volumes[of].id, self.volumes[of].snapshots[index].0);
        let parent = Some(Parent { volume, snapshot });
        if self.volumes.iter().any(|clone| clone.parent == parent) {
            // The registry refuses it; so does the store if it has the clone.
            if !self.engine.clones(volume, Some(snapshot)).is_empty() {
                let refused = self.engine.drop_snapshot(volume, snapshot);
                assert!(matches!(refused, Err(StoreError::HasClone { .. })));
            }
            return Ok(());
        }
        self.sweep_all();
        let allocated = |runner: &Runner| runner.engine.volume_usage(volume).allocated_bytes;
        let (before, unique) = (
            allocated(self),
            (self.reader.unique)(self, volume, snapshot),
        );
        let groups = self.attempt(|engine, _| engine.drop_snapshot(volume, snapshot));
        self.volumes[of].snapshots.remove(index);
        self.sweep(volume, groups);
        let freed = before - allocated(self);
        match freed == unique {
            true => Ok(()),
            false => Err(format!("{volume}@{snapshot} freed {freed}, said {unique}")),
        }
    }

    fn sweep(&mut self, volume: VolumeId, groups: Vec<u64>) {
        for key in groups {
            while self.attempt(|engine, f| engine.sweep_group(volume, key, f)) {}
        }
    }

    fn sweep_all(&mut self) {
        for (volume, key) in self.engine.unfinished().0 {
            self.sweep(volume, vec![key]);
        }
        assert!(self.engine.unfinished().0.is_empty());
    }

    fn judge(&self) -> Result<(), String> {
        for volume in self.volumes.iter().filter(|v| v.home == self.here) {
            for view in volume.views() {
                self.judge_bytes(volume, view)?;
                for (since, before) in &volume.snapshots {
                    self.judge_changes(volume, view, *since, before)?;
                }
            }
        }
        Ok(())
    }

    fn judge_bytes(&self, volume: &Vol, view: Option<SnapshotId>) -> Result<(), String> {
        let bytes = (self.reader.bytes)(self, volume.id, view);
        let image = &volume.view(view).image;
        let wrong = (0..BLOCKS).find(|b| bytes[b * 512..][..512] != [image[*b]; 512]);
        let extents = self.engine.extents(at(volume.id, 0, BLOCKS), view).unwrap();
        let mut block = 0;
        for (len, allocated) in extents {
            let end = block + len as usize / 512;
            if !allocated && image[block..end].iter().any(|value| *value != 0) {
                return Err(format!("volume {} {view:?}: a hole with data", volume.id));
            }
            block = end;
        }
        match wrong {
            None => Ok(()),
            Some(block) => Err(format!(
                "volume {} {view:?}, block {block}: wrong bytes, {} for {}",
                volume.id,
                bytes[block * 512],
                image[block]
            )),
        }
    }

    fn judge_changes(
        &self,
        volume: &Vol,
        view: Option<SnapshotId>,
        since: SnapshotId,
        before: &View,
    ) -> Result<(), String> {
        let now = volume.view(view);
        let changed = (self.reader.changed)(self, volume.id, view, since);
        for (sub, changed) in changed.into_iter().enumerate() {
            let differs = now.image[sub * 8..][..8] != before.image[sub * 8..][..8];
            let touched = match volume.is_rolled_back {
                true => !now.touches[sub].is_empty() || !before.touches[sub].is_empty(),
                false => now.touches[sub] != before.touches[sub],
            };
            let what = match (changed, differs, touched) {
                (false, true, _) => "a change was missed",
                (true, _, false) => "changed, and never written",
                _ => continue,
            };
            let id = volume.id;
            return Err(format!(
                "volume {id} {view:?} since {since}, sub-block {sub}: {what}"
            ));
        }
        Ok(())
    }
}

fn workload(seed: u64, reader: Reader) -> Result<(), String> {
    let mut runner = Runner::new(seed, reader);
    for op in 0..OPS {
        let stepped = runner.step();
        let judged = stepped.and_then(|()| match op % 4 {
            3 => (0..2).try_for_each(|home| {
                runner.go(home);
                runner.judge()
            }),
            _ => Ok(()),
        });
        judged.map_err(|what| format!("seed {seed}, after {} steps: {what}", op + 1))?;
    }
    Ok(())
}

#[test]
fn every_view_of_every_branch_and_clone_is_what_it_was() {
    let wanted = std::env::var("BLOCKD_LINEAGE_WORKLOADS").ok();
    let count = wanted.and_then(|count| count.parse().ok()).unwrap_or(300);
    for seed in 0..count {
        workload(seed, HONEST).unwrap();
    }
}

/// Faults that an implementation may have; each must be found.
#[test]
fn planted_faults_are_found() {
    let faults: [(&str, &[&str], Reader); 7] = [
        (
            "the head is the newest snapshot",
            &["wrong bytes"],
            Reader {
                bytes: |runner, volume, view| {
                    let newest = || runner.engine.snapshots(volume).last().copied();
                    runner.bytes(volume, view.or_else(newest))
                },
                ..HONEST
            },
        ),
        (
            "a trim of a clone shows the parent",
            &["wrong bytes"],
            Reader {
                bytes: |runner, volume, view| {
                    let mut bytes = runner.bytes(volume, view);
                    let parent = runner.engine.parent(volume);
                    let is_here = |parent: &Parent| {
                        let known = runner.engine.snapshots(parent.volume);
                        known.contains(&parent.snapshot)
                    };
                    if let Some(parent) = parent.filter(is_here) {
                        let below = runner.bytes(parent.volume, Some(parent.snapshot));
                        let zeros = bytes.iter_mut().zip(below).filter(|(own, _)| **own == 0);
                        zeros.for_each(|(own, below)| *own = below);
                    }
                    bytes
                },
                ..HONEST
            },
        ),
        (
            "one branch only",
            &["missed"],
            Reader {
                changed: |runner, volume, view, since| {
                    let depth = runner
                        .engine
                        .layers(at(volume, 0, BLOCKS), view, Some(since));
                    let subs = |run: LayerRun| {
                        let own = run.changed && run.depth == 1;
                        std::iter::repeat_n(own, run.len_bytes as usize / 4096)
                    };
                    depth.unwrap().into_iter().flat_map(subs).collect()
                },
                ..HONEST
            },
        ),
        (
            "half of what it holds",
            &["freed"],
            Reader {
                unique: |runner, volume, snapshot| runner.unique(volume, snapshot) / 2,
                ..HONEST
            },
        ),
        (
            "what a clone has of its parent stays behind",
            &["wrong bytes", "a hole with data"],
            Reader {
                // Only versions that were made for the move are all copies.
                moved: |version| match version.copied == version.present {
                    true => MovedVersion {
                        present: 0,
                        zero: 0,
                        copied: 0,
                        crcs: Vec::new(),
                        ..version.clone()
                    },
                    false => version.clone(),
                },
                ..HONEST
            },
        ),
        (
            "zeros stay behind",
            &["wrong bytes", "a hole with data", "missed"],
            Reader {
                moved: |version| MovedVersion {
                    present: version.present & !version.zero,
                    copied: version.copied & !version.zero,
                    zero: 0,
                    ..version.clone()
                },
                ..HONEST
            },
        ),
        (
            "where rollbacks led is forgotten",
            &["wrong bytes", "a hole with data", "missed"],
            Reader {
                moved: |version| {
                    let mut version = version.clone();
                    version.place.led_before = 0;
                    version
                },
                ..HONEST
            },
        ),
    ];
    for (fault, expected, reader) in faults {
        let found = (0..150).find_map(|seed| workload(seed, reader).err());
        let found = found.unwrap_or_else(|| panic!("not found: {fault}"));
        let is_expected = expected.iter().any(|words| found.contains(words));
        assert!(is_expected, "{fault}: {found}");
    }
}
