//! Layers and changes between snapshots against a model that keeps every snapshot's bytes.
//!
//! Judged over random workloads with deleted snapshots, half-done merges, checkpoints and restarts:
//! a block that differs is always reported, and what is reported was written to. Planted faults
//! show that the judge sees both kinds of error.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use blockd::data::page_store::{Engine, Fetched, PageAt, Step, StoreError, StoreOptions};
use blockd::id::{Epoch, LayerRun, PageNo, SnapshotId, VolumeId};
use blockd::io::sim_disk::{SimDisk, SimRandom};
use std::sync::Arc;

const VOLUME: VolumeId = VolumeId(3);
const PAGES: usize = 2;
/// Blocks of 512 bytes of each page that are used: three chunks.
const BLOCKS: usize = 384;
const SUBS: usize = BLOCKS / 8;
const OPS: usize = 160;
const SNAPSHOTS_MAX: usize = 7;

fn options() -> StoreOptions {
    StoreOptions {
        log_bytes: 1 << 20,
        free_bytes_min: 0,
        ..StoreOptions::default()
    }
}

fn at(page: usize, block: usize, count: usize) -> PageAt {
    PageAt {
        volume: VOLUME,
        page: PageNo(u32::try_from(page).unwrap()),
        offset_bytes: u32::try_from(block * 512).unwrap(),
        len_bytes: u32::try_from(count * 512).unwrap(),
    }
}

fn bytes_of(run: &LayerRun) -> usize {
    usize::try_from(run.len_bytes).unwrap()
}

/// What one view shows: a byte for each block, which fills it.
type Image = [[u8; BLOCKS]; PAGES];

/// A snapshot as the model knows it, or the head.
struct View {
    id: Option<SnapshotId>,
    /// Operations before it.
    taken: usize,
    image: Image,
}

struct Model {
    head: Image,
    /// For each sub-block the operations that wrote or zeroed it.
    touches: Vec<Vec<usize>>,
    snapshots: Vec<View>,
    ops: usize,
}

/// How the judge asks the store.
type Reader = fn(
    &Engine<SimDisk>,
    PageAt,
    Option<SnapshotId>,
    Option<SnapshotId>,
) -> Result<Vec<LayerRun>, StoreError>;

fn honest(
    engine: &Engine<SimDisk>,
    at: PageAt,
    snapshot: Option<SnapshotId>,
    since: Option<SnapshotId>,
) -> Result<Vec<LayerRun>, StoreError> {
    engine.layers(at, snapshot, since)
}

impl Model {
    fn new() -> Model {
        Model {
            head: [[0; BLOCKS]; PAGES],
            touches: vec![Vec::new(); PAGES * SUBS],
            snapshots: Vec::new(),
            ops: 0,
        }
    }

    fn put(&mut self, page: usize, block: usize, count: usize, value: u8) {
        self.head[page][block..block + count].fill(value);
        for sub in block / 8..(block + count).div_ceil(8) {
            self.touches[page * SUBS + sub].push(self.ops);
        }
    }

    fn take(&mut self, id: SnapshotId) {
        self.snapshots.push(View {
            id: Some(id),
            taken: self.ops,
            image: self.head,
        });
    }

    /// Checks every view against every other one; the first violation.
    fn judge(&self, engine: &Engine<SimDisk>, reader: Reader) -> Result<(), String> {
        let head = View {
            id: None,
            taken: self.ops + 1,
            image: self.head,
        };
        let views = || self.snapshots.iter().chain([&head]);
        for page in 0..PAGES {
            for view in views() {
                self.judge_pair(engine, reader, page, view, None)?;
                for since in &self.snapshots {
                    self.judge_pair(engine, reader, page, view, Some(since))?;
                }
            }
        }
        Ok(())
    }

    fn judge_pair(
        &self,
        engine: &Engine<SimDisk>,
        reader: Reader,
        page: usize,
        view: &View,
        since: Option<&View>,
    ) -> Result<(), String> {
        let since_id = since.and_then(|since| since.id);
        let runs = reader(engine, at(page, 0, BLOCKS), view.id, since_id).unwrap();
        let subs: Vec<&LayerRun> = runs
            .iter()
            .flat_map(|run| std::iter::repeat_n(run, bytes_of(run) / 4096))
            .collect();
        assert_eq!(subs.len(), SUBS, "the runs do not cover the page");
        assert!(runs.windows(2).all(|pair| !pair[0].is_like(&pair[1])));
        for (sub, run) in subs.into_iter().enumerate() {
            let judged = self.judge_sub(page, sub, run, view, since);
            judged.map_err(|what| {
                format!("page {page} sub-block {sub} of {:?} since {since_id:?}: {what}, {run:?}, touched {:?}, view {}", view.id, self.touches[page * SUBS + sub], view.taken)
            })?;
        }
        Ok(())
    }

    fn judge_sub(
        &self,
        page: usize,
        sub: usize,
        run: &LayerRun,
        view: &View,
        since: Option<&View>,
    ) -> Result<(), &'static str> {
        let bytes =
            |view: &View| -> [u8; 8] { view.image[page][sub * 8..][..8].try_into().unwrap() };
        let touches = &self.touches[page * SUBS + sub];
        let (now, before) = (bytes(view), since.map_or([0; 8], bytes));
        if run.hole && now != [0; 8] {
            return Err("a hole with data");
        }
        if now != before && !run.changed {
            return Err("a change was missed");
        }
        let between = match since {
            Some(since) => view.taken.min(since.taken)..view.taken.max(since.taken),
            None => 0..view.taken,
        };
        if run.changed && !touches.iter().any(|op| between.contains(op)) {
            return Err("reported, and never written");
        }
        let Some(last) = touches.iter().rfind(|op| **op < view.taken) else {
            return if run.depth == 0 {
                Ok(())
            } else {
                Err("depth of what was never written")
            };
        };
        let layers = self.snapshots.iter().map(|snapshot| snapshot.taken);
        let above = layers.filter(|taken| (last + 1..view.taken).contains(taken));
        match run.hole || run.depth as usize == 1 + above.count() {
            true => Ok(()),
            false => Err("wrong depth"),
        }
    }
}

/// A store under random requests, and its model.
struct Runner {
    disk: Arc<SimDisk>,
    engine: Engine<SimDisk>,
    random: SimRandom,
    model: Model,
    next_snapshot: u32,
    /// Groups with versions that nobody sees any more.
    unswept: Vec<u64>,
}

impl Runner {
    fn new(seed: u64) -> Runner {
        let disk = Arc::new(SimDisk::new());
        disk.cold_one_in(4);
        Runner {
            engine: Engine::open(Arc::clone(&disk), options(), 1).unwrap(),
            disk,
            random: SimRandom(seed),
            model: Model::new(),
            next_snapshot: 1,
            unswept: Vec::new(),
        }
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.random.below(end as u64)).unwrap()
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
            }
        }
        panic!("no progress: {:?}", self.engine.usage());
    }

    fn range(&mut self) -> (usize, usize) {
        match self.below(8) {
            0..=3 => (self.below(SUBS) * 8, 8),
            4..=5 => {
                let block = self.below(BLOCKS);
                (block, 1 + self.below((BLOCKS - block).min(30)))
            }
            6 => {
                let block = self.below(BLOCKS - 140);
                (block, 100 + self.below(40))
            }
            _ => (self.below(3) * 128, 128),
        }
    }

    fn step(&mut self) {
        self.model.ops += 1;
        match self.below(100) {
            0..=49 => self.change(),
            50..=64 if self.model.snapshots.len() < SNAPSHOTS_MAX => {
                let id = SnapshotId(self.next_snapshot);
                self.next_snapshot += 1;
                self.engine.take_snapshot(VOLUME, id).unwrap();
                self.model.take(id);
            }
            65..=76 if !self.model.snapshots.is_empty() => {
                let index = self.below(self.model.snapshots.len());
                let id = self.model.snapshots.remove(index).id.unwrap();
                let groups = self.attempt(|engine, _| engine.drop_snapshot(VOLUME, id));
                self.unswept = groups;
                self.sweep(self.random.0 % 3);
            }
            77..=82 => self.sweep(u64::MAX),
            83..=90 => {
                self.engine.request_apply();
                self.engine.request_checkpoint();
                self.run_jobs();
            }
            91..=93 => {
                self.engine = Engine::open(Arc::clone(&self.disk), options(), 1).unwrap();
            }
            _ => self.run_jobs(),
        }
    }

    fn change(&mut self) {
        let page = self.below(PAGES);
        let (block, count) = self.range();
        if self.below(3) == 0 {
            self.attempt(|engine, f| engine.zero(at(page, block, count), Epoch(1), f));
            return self.model.put(page, block, count, 0);
        }
        // Few values, so that blocks are often written again with what they have.
        let value = u8::try_from(self.below(4)).unwrap();
        let data = vec![value; count * 512];
        self.attempt(|engine, f| engine.write(at(page, block, count), &data, Epoch(1), f));
        self.model.put(page, block, count, value);
    }

    /// Merges up to so many unseen versions.
    fn sweep(&mut self, mut count: u64) {
        for key in self.unswept.clone() {
            while 0 < count && self.attempt(|engine, f| engine.sweep_group(VOLUME, key, f)) {
                count -= 1;
            }
        }
    }
}

fn workload(seed: u64, reader: Reader) -> Result<(), String> {
    let mut runner = Runner::new(seed);
    for op in 0..OPS {
        runner.step();
        if op % 4 == 3 {
            let judged = runner.model.judge(&runner.engine, reader);
            judged.map_err(|what| format!("seed {seed}, after {} steps: {what}", op + 1))?;
        }
    }
    Ok(())
}

fn workloads() -> u64 {
    let wanted = std::env::var("BLOCKD_LAYER_WORKLOADS").ok();
    wanted.and_then(|count| count.parse().ok()).unwrap_or(150)
}

#[test]
fn no_change_between_any_two_views_is_missed() {
    for seed in 0..workloads() {
        workload(seed, honest).unwrap();
    }
}

/// Faults that an implementation may have; each must be found.
#[test]
fn planted_faults_are_found() {
    let faults: [(&str, &str, Reader); 4] = [
        ("trims forgotten", "missed", |engine, at, view, since| {
            let mut runs = honest(engine, at, view, since)?;
            runs.iter_mut().for_each(|run| run.changed &= !run.hole);
            Ok(merged(runs))
        }),
        ("newest layer only", "missed", |engine, at, view, since| {
            let mut runs = honest(engine, at, view, since)?;
            runs.iter_mut()
                .for_each(|run| run.changed &= run.depth == 1);
            Ok(merged(runs))
        }),
        ("everything", "never written", |engine, at, view, since| {
            let mut runs = honest(engine, at, view, since)?;
            runs.iter_mut().for_each(|run| run.changed = true);
            Ok(merged(runs))
        }),
        (
            "one layer too deep",
            "wrong depth",
            |engine, at, view, since| {
                let mut runs = honest(engine, at, view, since)?;
                runs.iter_mut()
                    .filter(|run| 1 < run.depth)
                    .for_each(|run| run.depth += 1);
                Ok(runs)
            },
        ),
    ];
    for (fault, expected, reader) in faults {
        let found = (0..20).find_map(|seed| workload(seed, reader).err());
        let found = found.unwrap_or_else(|| panic!("not found: {fault}"));
        assert!(found.contains(expected), "{fault}: {found}");
    }
}

fn merged(runs: Vec<LayerRun>) -> Vec<LayerRun> {
    let mut all = Vec::new();
    runs.into_iter().for_each(|run| run.append_to(&mut all));
    all
}

/// A thousand snapshots with one sub-block written between two of them: the answer is exact to that
/// sub-block, although every version of the chunk was closed by copying up.
#[test]
fn among_a_thousand_snapshots_every_difference_is_exact() {
    let mut runner = Runner::new(1);
    let written = |number: usize| number * 7 % 16;
    for number in 1..=1000 {
        let data = vec![u8::try_from(number % 251).unwrap(); 4096];
        let range = at(0, written(number) * 8, 8);
        runner.attempt(|engine, f| engine.write(range, &data, Epoch(1), f));
        let id = SnapshotId(u32::try_from(number).unwrap());
        runner.engine.take_snapshot(VOLUME, id).unwrap();
        if number % 100 == 0 {
            runner.engine.request_checkpoint();
            runner.run_jobs();
            runner.engine = Engine::open(Arc::clone(&runner.disk), options(), 1).unwrap();
        }
    }
    let snapshot = |number: usize| Some(SnapshotId(u32::try_from(number).unwrap()));
    for (view, since) in [
        (1000, 999),
        (1000, 990),
        (500, 498),
        (17, 1),
        (1000, 1),
        (3, 7),
    ] {
        let runs = honest(
            &runner.engine,
            at(0, 0, 128),
            snapshot(view),
            snapshot(since),
        )
        .unwrap();
        let subs: Vec<bool> = runs
            .iter()
            .flat_map(|run| std::iter::repeat_n(run.changed, bytes_of(run) / 4096))
            .collect();
        let mut expected = [false; 16];
        (view.min(since) + 1..=view.max(since)).for_each(|n| expected[written(n)] = true);
        assert_eq!(subs, expected, "{view} since {since}");
    }
    let runs = honest(&runner.engine, at(0, 0, 128), None, None).unwrap();
    let depth_of = |sub: usize| {
        let mut end = 0;
        let run = runs.iter().find(|run| {
            end += bytes_of(run);
            sub * 4096 < end
        });
        run.unwrap().depth
    };
    assert_eq!((depth_of(written(1000)), depth_of(written(999))), (2, 3));
    let started = std::time::Instant::now();
    for _ in 0..1000 {
        honest(&runner.engine, at(0, 0, 128), None, snapshot(1)).unwrap();
    }
    eprintln!(
        "layers of a chunk with 1000 versions: {:?}",
        started.elapsed() / 1000
    );
}
