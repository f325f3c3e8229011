//! A random workload on the store's engine over a simulated device, and the model that judges it.
//!
//! The model knows only the promises: a register per 512-byte block, flushes, snapshots.

use blockd::data::page_store::{
    Engine, Fetched, Job, JobDone, PageAt, Parent, Placement, ReadPart, Step, StoreError,
    StoreOptions,
};
use blockd::id::{Epoch, PageNo, SnapshotId, VolumeId};
use blockd::io::disk::{Disk, DiskFile};
use blockd::io::sim_disk::{DiskOp, SimDisk, SimRandom};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex};

pub(crate) const STORE_ID: u64 = 0x5eed_0001;
pub(crate) const PAGES: [(VolumeId, PageNo); 4] = [
    (VolumeId(1), PageNo(0)),
    (VolumeId(1), PageNo(7)),
    (VolumeId(2), PageNo(3)),
    (CLONE, PageNo(0)),
];
/// A volume that becomes a clone of a snapshot of the first one.
const CLONE: VolumeId = VolumeId(3);
/// Its page, and that of the parent.
const CLONED: (usize, usize) = (3, 0);
/// Blocks of each page that the workload uses: three chunks.
pub(crate) const BLOCKS: usize = 384;

pub(crate) fn options() -> StoreOptions {
    StoreOptions {
        log_bytes: 1 << 20,
        unsynced_bytes_max: 300 << 10,
        unapplied_bytes_max: 256 << 10,
        reuse_bytes_max: 256 << 10,
        free_bytes_min: 0,
        turn_bytes: 64 << 10,
        ..StoreOptions::default()
    }
}

/// One acknowledged or running request, with the device operations that it spans.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    /// Page index, first block, blocks; the value is the op's number, or 0 for zeros.
    Put {
        page: usize,
        block: usize,
        count: usize,
        value: u32,
    },
    Take(VolumeId, SnapshotId),
    Drop(VolumeId, SnapshotId),
    /// The head is the snapshot again.
    RollBack(VolumeId, SnapshotId),
    /// `CLONE` begins as this snapshot of the first volume.
    Clone(SnapshotId),
}

#[derive(Clone, Debug)]
pub(crate) struct Logged {
    pub(crate) op: Op,
    pub(crate) from: usize,
    pub(crate) to: usize,
}

/// What happened, as the model needs it.
#[derive(Default)]
pub(crate) struct History {
    pub(crate) ops: Vec<Logged>,
    /// (device operations done, ops covered) of answered flushes.
    pub(crate) flushes: Vec<(usize, usize)>,
}

pub(crate) fn content(page: usize, block: usize, value: u32) -> u64 {
    if value == 0 {
        0
    } else {
        u64::from(value) << 32 | (page as u64) << 16 | block as u64 | 1 << 31
    }
}

/// Value of a block, or what is wrong with its bytes. A clone's block may have its parent's content.
pub(crate) fn value_of(page: usize, block: usize, bytes: &[u8]) -> Result<u32, String> {
    let word = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    let whole = bytes
        .chunks_exact(8)
        .all(|w| u64::from_le_bytes(w.try_into().unwrap()) == word);
    let value = u32::try_from(word >> 32).unwrap();
    let is_cloned = page == CLONED.0 && word == content(CLONED.1, block, value);
    if whole && (is_cloned || word == content(page, block, value)) {
        Ok(value)
    } else {
        Err(format!("mixed bytes, first word {word:#x}"))
    }
}

pub(crate) fn fill(page: usize, block: usize, count: usize, value: u32) -> Vec<u8> {
    (block..block + count)
        .flat_map(|b| content(page, b, value).to_le_bytes().repeat(64))
        .collect()
}

pub(crate) fn at(page: usize, block: usize, count: usize) -> PageAt {
    let (volume, no) = PAGES[page];
    PageAt {
        volume,
        page: no,
        offset_bytes: (block * 512) as u32,
        len_bytes: (count * 512) as u32,
    }
}

/// Takes a job's device operations without doing them, so that they can be done one by one.
struct Deferred<'a> {
    disk: &'a SimDisk,
    ops: Mutex<VecDeque<DiskOp>>,
}

impl Disk for Deferred<'_> {
    fn read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        self.disk.read_at(file, pos, buf)
    }
    fn try_read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<bool> {
        self.disk.try_read_at(file, pos, buf)
    }
    fn write_at(&self, file: DiskFile, pos: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let data: Vec<u8> = parts.iter().flat_map(|p| p.iter().copied()).collect();
        self.ops
            .lock()
            .unwrap()
            .push_back(DiskOp::Write(file, pos, data.into()));
        Ok(())
    }
    fn sync(&self, file: DiskFile) -> io::Result<()> {
        self.ops.lock().unwrap().push_back(DiskOp::Sync(file));
        Ok(())
    }
    fn punch(&self, file: DiskFile, pos: u64, len: u64) -> io::Result<()> {
        self.ops
            .lock()
            .unwrap()
            .push_back(DiskOp::Punch(file, pos, len));
        Ok(())
    }
    fn len_bytes(&self, file: DiskFile) -> io::Result<u64> {
        self.disk.len_bytes(file)
    }
    fn free_bytes(&self) -> io::Result<u64> {
        self.disk.free_bytes()
    }
}

type Lane = Option<(VecDeque<DiskOp>, JobDone)>;

/// Drives an engine; its jobs are done in pieces at random later times.
pub(crate) struct Runner {
    pub(crate) disk: Arc<SimDisk>,
    pub(crate) engine: Engine<SimDisk>,
    pub(crate) random: SimRandom,
    pub(crate) history: History,
    lanes: [Lane; 2],
    waiting_flushes: Vec<(u64, usize)>,
    model: Vec<Vec<u32>>,
    snapshots: Vec<(VolumeId, SnapshotId)>,
    /// Images of the pages at each snapshot.
    images: Vec<(SnapshotId, Vec<Vec<u32>>)>,
    is_cloned: bool,
    next_snapshot: u32,
    epoch: u32,
}

impl Runner {
    pub(crate) fn new(disk: Arc<SimDisk>, seed: u64) -> Runner {
        let engine = Engine::open(Arc::clone(&disk), options(), STORE_ID).unwrap();
        let model = vec![vec![0; BLOCKS]; PAGES.len()];
        let (history, snapshots) = (History::default(), Vec::new());
        let waiting_flushes = Vec::new();
        Runner {
            disk,
            engine,
            random: SimRandom(seed),
            history,
            lanes: [None, None],
            waiting_flushes,
            model,
            snapshots,
            images: Vec::new(),
            is_cloned: false,
            next_snapshot: 1,
            epoch: 1,
        }
    }

    fn start(&mut self, job: Job) {
        let lane = usize::from(job.is_sync());
        let deferred = Deferred {
            disk: &self.disk,
            ops: Mutex::default(),
        };
        let done = job.run(&deferred);
        self.lanes[lane] = Some((deferred.ops.into_inner().unwrap(), done));
    }

    /// Starts what can be started and does one device operation of a running job.
    pub(crate) fn pump(&mut self) {
        if let Some(job) = self.engine.next_maintenance().unwrap() {
            self.start(job);
        }
        if let Some(job) = self
            .engine
            .next_sync(!self.waiting_flushes.is_empty())
            .unwrap()
        {
            self.start(job);
        }
        let lane = self.random.below(2) as usize;
        let lane = if self.lanes[lane].is_some() {
            lane
        } else {
            1 - lane
        };
        let Some((ops, _)) = &mut self.lanes[lane] else {
            return;
        };
        if let Some(op) = ops.pop_front() {
            self.disk.replay(&op);
        }
        if ops.is_empty() {
            let (_, done) = self.lanes[lane].take().unwrap();
            self.engine.finish(done).unwrap();
        }
        let (durable, done) = (self.engine.durable_lsn(), self.disk.trace_len());
        let answered = self
            .waiting_flushes
            .extract_if(.., |(lsn, _)| *lsn <= durable);
        self.history
            .flushes
            .extend(answered.map(|(_, ops)| (done, ops)));
    }

    /// Makes a request until it is done.
    pub(crate) fn attempt<T>(
        &mut self,
        mut request: impl FnMut(&mut Engine<SimDisk>, &[Fetched]) -> Result<Step<T>, StoreError>,
    ) -> Result<T, StoreError> {
        let mut fetched = Vec::new();
        for _ in 0..10_000 {
            match request(&mut self.engine, &fetched)? {
                Step::Done(answer) => return Ok(answer),
                Step::Cold(reads) => {
                    (0..self.random.below(3)).for_each(|_| self.pump());
                    fetched.extend(
                        reads
                            .into_iter()
                            .map(|read| read.fetch(&*self.disk).unwrap()),
                    );
                }
                Step::Full => {
                    if !self.engine.is_checkpointing() {
                        self.engine.request_checkpoint();
                    }
                    self.pump();
                }
                Step::More => (0..self.random.below(3)).for_each(|_| self.pump()),
            }
        }
        panic!("no progress: {:?}", self.engine.usage());
    }

    fn log(&mut self, op: Op, from: usize) {
        self.history.ops.push(Logged {
            op,
            from,
            to: self.disk.trace_len(),
        });
    }

    /// One random request, judged against the model at once where it reads.
    pub(crate) fn step(&mut self) {
        let pages = PAGES.len() - usize::from(!self.is_cloned);
        let page = self.random.below(pages as u64) as usize;
        let from = self.disk.trace_len();
        let number = self.history.ops.len() as u32 + 1;
        // A request that is running when the device dies counts from its first operation.
        match self.random.below(100) {
            0..=39 => {
                let (block, count) = self.range();
                let data = fill(page, block, count, number);
                let (at, mut placement) = (at(page, block, count), Placement::default());
                self.put(page, block, count, number, from, |engine, fetched| {
                    engine.write(at, &data, Epoch(1), &mut placement, fetched)
                });
            }
            40..=51 => {
                let (block, count) = self.range();
                self.put(page, block, count, 0, from, |engine, fetched| {
                    engine.zero(at(page, block, count), Epoch(1), fetched)
                });
            }
            52..=65 => self
                .waiting_flushes
                .push((self.engine.last_lsn(), self.history.ops.len())),
            66..=72 if self.snapshots.len() < 4 => {
                let (volume, snapshot) = (PAGES[page].0, SnapshotId(self.next_snapshot));
                self.next_snapshot += 1;
                self.engine.take_snapshot(volume, snapshot).unwrap();
                self.snapshots.push((volume, snapshot));
                self.images.push((snapshot, self.model.clone()));
                self.log(Op::Take(volume, snapshot), from);
            }
            73..=82 if !self.snapshots.is_empty() => {
                let index = self.random.below(self.snapshots.len() as u64) as usize;
                let (volume, snapshot) = self.snapshots[index];
                match self.random.below(4) {
                    0 => self.roll_back(volume, snapshot, from),
                    1 => self.clone_or_flatten(volume, snapshot, from),
                    _ if self.engine.clones(volume, Some(snapshot)).is_empty() => {
                        self.snapshots.remove(index);
                        self.drop_snapshot(volume, snapshot, from);
                    }
                    _ => {}
                }
            }
            83..=84 => self.engine.request_apply(),
            85..=86 => self.engine.request_checkpoint(),
            87..=89 => self.begin_and_give_up(page),
            _ => self.check_head(page),
        }
        (0..self.random.below(6)).for_each(|_| self.pump());
    }

    fn range(&mut self) -> (usize, usize) {
        match self.random.below(10) {
            0..=1 => (self.random.below(BLOCKS as u64 / 8) as usize * 8, 8),
            2..=4 => {
                let block = self.random.below(BLOCKS as u64) as usize;
                (
                    block,
                    1 + self.random.below((BLOCKS - block).min(20) as u64) as usize,
                )
            }
            5..=7 => {
                let block = self.random.below(BLOCKS as u64 - 100) as usize;
                (block, 60 + self.random.below(40) as usize)
            }
            _ => {
                let chunk = self.random.below(3) as usize;
                (
                    chunk * 128,
                    128 * (1 + self.random.below(3 - chunk as u64) as usize),
                )
            }
        }
    }

    fn put(
        &mut self,
        page: usize,
        block: usize,
        count: usize,
        value: u32,
        from: usize,
        request: impl FnMut(&mut Engine<SimDisk>, &[Fetched]) -> Result<Step<()>, StoreError>,
    ) {
        self.attempt(request).unwrap();
        self.model[page][block..block + count].fill(value);
        self.log(
            Op::Put {
                page,
                block,
                count,
                value,
            },
            from,
        );
    }

    fn image(&self, snapshot: SnapshotId, page: usize) -> Vec<u32> {
        let (_, image) = self.images.iter().find(|(id, _)| *id == snapshot).unwrap();
        image[page].clone()
    }

    fn roll_back(&mut self, volume: VolumeId, snapshot: SnapshotId, from: usize) {
        self.epoch += 1;
        let rolled_back = self.engine.roll_back(volume, snapshot, self.epoch);
        for page in (0..PAGES.len()).filter(|page| PAGES[*page].0 == volume) {
            self.model[page] = self.image(snapshot, page);
        }
        self.log(Op::RollBack(volume, snapshot), from);
        self.sweep(volume, rolled_back.unwrap());
    }

    /// Makes the clone, or copies up what it has in its parent, and ends that if it was all.
    fn clone_or_flatten(&mut self, volume: VolumeId, snapshot: SnapshotId, from: usize) {
        if self.is_cloned {
            for page in self.engine.parent_pages(CLONE).unwrap() {
                for key in self.engine.parent_groups(CLONE, page) {
                    while self
                        .attempt(|engine, fetched| engine.copy_up_group(CLONE, key, fetched))
                        .unwrap()
                        .is_some()
                    {}
                }
            }
            self.engine.detach(CLONE).unwrap();
        } else if volume == PAGES[CLONED.1].0 {
            let parent = Parent { volume, snapshot };
            self.engine.clone_volume(CLONE, parent).unwrap();
            let image = self.image(snapshot, CLONED.1);
            self.model[CLONED.0] = image;
            self.is_cloned = true;
            self.log(Op::Clone(snapshot), from);
        }
    }

    fn drop_snapshot(&mut self, volume: VolumeId, snapshot: SnapshotId, from: usize) {
        let groups = self
            .attempt(|engine, _| engine.drop_snapshot(volume, snapshot))
            .unwrap();
        self.log(Op::Drop(volume, snapshot), from);
        self.sweep(volume, groups);
    }

    fn sweep(&mut self, volume: VolumeId, groups: Vec<u64>) {
        for key in groups {
            while self
                .attempt(|engine, fetched| engine.sweep_group(volume, key, fetched))
                .unwrap()
            {}
        }
    }

    /// A large write whose client goes away before it is logged.
    fn begin_and_give_up(&mut self, page: usize) {
        let (at, mut placement) = (at(page, 0, BLOCKS), Placement::default());
        let data = fill(page, 0, BLOCKS, u32::MAX);
        let write = self.engine.write(at, &data, Epoch(1), &mut placement, &[]);
        assert_eq!(write.unwrap(), Step::More);
        (0..self.random.below(6)).for_each(|_| self.pump());
        self.engine.give_up(&mut placement);
    }

    fn check_head(&mut self, page: usize) {
        let parts = self
            .attempt(|engine, fetched| engine.read(at(page, 0, BLOCKS), None, fetched))
            .unwrap();
        let bytes = flatten(parts);
        for block in 0..BLOCKS {
            let value = value_of(page, block, &bytes[block * 512..][..512]);
            assert_eq!(
                value,
                Ok(self.model[page][block]),
                "live read of page {page} block {block}"
            );
        }
    }

    /// Runs all jobs to their end; closes if asked.
    pub(crate) fn drain(&mut self) {
        for _ in 0..100_000 {
            self.engine.request_apply();
            self.waiting_flushes
                .push((self.engine.last_lsn(), self.history.ops.len()));
            self.pump();
            let idle = self.lanes.iter().all(Option::is_none) && self.engine.is_applied();
            if idle && self.engine.is_clean() && !self.engine.is_checkpointing() {
                return;
            }
        }
        panic!("jobs do not end");
    }

    pub(crate) fn close(&mut self) {
        self.engine.stop_writes();
        self.drain();
        self.engine.begin_close().unwrap();
        self.drain();
    }
}

/// Writes without a pause between the turns.
pub(crate) fn write<D: Disk>(
    engine: &mut Engine<D>,
    at: PageAt,
    data: &[u8],
    epoch: Epoch,
) -> Result<Step<()>, StoreError> {
    let mut placement = Placement::default();
    loop {
        match engine.write(at, data, epoch, &mut placement, &[])? {
            Step::More => {}
            step => return Ok(step),
        }
    }
}

pub(crate) fn flatten(parts: Vec<ReadPart>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            ReadPart::Data(data) => bytes.extend_from_slice(&data),
            ReadPart::Hole(len) => bytes.resize(bytes.len() + len as usize, 0),
        }
    }
    bytes
}

/// How the checker reads.
pub(crate) type Reader =
    fn(&Engine<SimDisk>, PageAt, Option<SnapshotId>) -> Result<Vec<u8>, StoreError>;

pub(crate) fn verified(
    engine: &Engine<SimDisk>,
    at: PageAt,
    snapshot: Option<SnapshotId>,
) -> Result<Vec<u8>, StoreError> {
    match engine.read(at, snapshot, &[])? {
        Step::Done(parts) => Ok(flatten(parts)),
        step => panic!("{step:?}"),
    }
}

impl History {
    /// Checks a recovered store after `done` device operations. `survives` says that acknowledged is
    /// enough (the process died, not the machine). Gives the first violation.
    pub(crate) fn check(
        &self,
        engine: &Engine<SimDisk>,
        done: usize,
        survives: bool,
        read: Reader,
    ) -> Result<(), String> {
        let acked = self.ops.iter().take_while(|op| op.to <= done).count();
        let issued = self
            .ops
            .iter()
            .take_while(|op| op.from < done)
            .count()
            .max(acked);
        let flushed = self
            .flushes
            .iter()
            .filter(|(at, _)| *at <= done)
            .map(|(_, ops)| *ops)
            .max()
            .unwrap_or(0);
        let sure = if survives { acked } else { flushed };
        for page in 0..PAGES.len() {
            self.check_view(engine, page, None, sure, issued, read)?;
        }
        self.check_snapshots(engine, sure, issued, read)
    }

    fn check_view(
        &self,
        engine: &Engine<SimDisk>,
        page: usize,
        snapshot: Option<SnapshotId>,
        sure: usize,
        last: usize,
        read: Reader,
    ) -> Result<(), String> {
        let bytes = read(engine, at(page, 0, BLOCKS), snapshot)
            .map_err(|e| format!("page {page} {snapshot:?}: {e}"))?;
        let allowed = self.allowed(page, sure, last);
        for block in 0..BLOCKS {
            let value = value_of(page, block, &bytes[block * 512..][..512])
                .map_err(|e| format!("page {page} block {block} {snapshot:?}: {e}"))?;
            if !allowed[block].contains(&value) {
                return Err(format!(
                    "page {page} block {block} {snapshot:?}: {value}, allowed {:?}",
                    allowed[block]
                ));
            }
        }
        Ok(())
    }

    /// Values that the blocks of a page may have after `last` operations, `sure` of them durable.
    fn allowed(&self, page: usize, sure: usize, last: usize) -> Vec<Vec<u32>> {
        let mut allowed: Vec<Vec<u32>> = vec![vec![0]; BLOCKS];
        let taken = |snapshot| {
            let is_it = |op: &Logged| matches!(op.op, Op::Take(_, id) if id == snapshot);
            self.ops.iter().position(is_it).unwrap()
        };
        for (index, logged) in self.ops[..last].iter().enumerate() {
            let (range, values) = match logged.op {
                Op::Put {
                    page: p,
                    block,
                    count,
                    value,
                } if p == page => (block..block + count, vec![vec![value]; count]),
                Op::RollBack(volume, snapshot) if volume == PAGES[page].0 => {
                    let taken = taken(snapshot);
                    (0..BLOCKS, self.allowed(page, sure.min(taken), taken))
                }
                Op::Clone(snapshot) if page == CLONED.0 => {
                    let taken = taken(snapshot);
                    (0..BLOCKS, self.allowed(CLONED.1, sure.min(taken), taken))
                }
                _ => continue,
            };
            for (now, new) in allowed[range].iter_mut().zip(values) {
                if index < sure {
                    now.clear();
                }
                now.extend(new);
            }
        }
        allowed
    }

    fn check_snapshots(
        &self,
        engine: &Engine<SimDisk>,
        sure: usize,
        issued: usize,
        read: Reader,
    ) -> Result<(), String> {
        for (taken, logged) in self.ops[..issued].iter().enumerate() {
            let Op::Take(volume, snapshot) = logged.op else {
                continue;
            };
            let is_drop =
                |op: &Logged| matches!(op.op, Op::Drop(v, s) if v == volume && s == snapshot);
            let dropped = self.ops[..issued].iter().position(is_drop);
            let exists = engine.snapshots(volume).contains(&snapshot);
            if exists && dropped.is_some_and(|index| index < sure) {
                return Err(format!("snapshot {snapshot} of {volume} is back"));
            }
            if !exists && taken < sure && dropped.is_none() {
                return Err(format!("snapshot {snapshot} of {volume} is lost"));
            }
            for page in (0..PAGES.len()).filter(|p| exists && PAGES[*p].0 == volume) {
                self.check_view(engine, page, Some(snapshot), sure.min(taken), taken, read)?;
            }
        }
        Ok(())
    }
}
