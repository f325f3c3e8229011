//! The disk of a simulated server: page store, registry file and small files in memory.
//!
//! A medium outlives its servers. A dead process leaves everything; power loss keeps any subset of the
//! unsynced 512-byte sectors. An incarnation is one run of the server on it: once dead it reaches
//! neither its medium nor the network.

use crate::random::Random;
use crate::trace;
use blockd::io::device::Device;
use blockd::io::disk::{Disk, DiskFile};
use blockd::io::environment::Clock;
use blockd::io::state_dir::StateDir;
use redb::{Database, DatabaseError, StorageBackend};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

const PAGE_BYTES: u64 = 4096;
const SECTOR_BYTES: usize = 512;
const REGISTRY: usize = DiskFile::ALL.len();
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

type Page = Arc<[u8; PAGE_BYTES as usize]>;
type Image = BTreeMap<u64, Page>;

#[derive(Clone)]
enum Op {
    /// A range within a page as the write left it: position, length, the page.
    Write(u64, usize, Page),
    Punch(u64, u64),
}

#[derive(Clone, Default)]
struct File {
    current: Image,
    synced: Image,
    unsynced: Vec<Op>,
    len: u64,
    synced_len: u64,
}

/// How a server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Death {
    /// The process dies, the page cache stays.
    Process,
    /// Of 256 unsynced sectors so many survive.
    Power(u8),
}

/// Faults of a medium that wait for their moment.
#[derive(Clone, Default)]
pub(crate) struct DiskFaults {
    /// The operation that fails with EIO, counted from now.
    pub fail_in: Option<u64>,
    /// The operation before which the server dies.
    pub die_in: Option<(u64, Death)>,
    /// The same, counted from the next write of the slab: in the middle of a checkpoint.
    pub die_after_slab_write: Option<(u64, Death)>,
    /// Slab write that is lost, or goes elsewhere.
    pub lose_in: Option<u64>,
    pub misdirect_in: Option<u64>,
    pub latency_ms: (u64, u64),
    pub full: bool,
    pub cold_one_in: u64,
}

/// What a server keeps.
#[derive(Clone, Default)]
pub(crate) struct Medium {
    files: [File; REGISTRY + 1],
    small: BTreeMap<String, String>,
    boot: u64,
    pub faults: DiskFaults,
    random: Option<Random>,
    reads: u64,
    /// Pages of the slab that cannot be read until they are written again.
    unreadable: BTreeSet<u64>,
    /// Data of the slab was damaged: EIO is a right answer.
    pub damaged: bool,
    /// An operation failed: the store or registry has stopped until a restart.
    pub failed: bool,
    /// One has failed at some time: requests of then may fail.
    pub has_failed: bool,
}

pub(crate) type SharedMedium = Arc<Mutex<Medium>>;

/// One run of a server.
pub(crate) struct Incarnation {
    pub host: usize,
    dead: AtomicBool,
    death: Mutex<Option<Death>>,
}

impl Incarnation {
    #[must_use]
    pub(crate) fn new(host: usize) -> Arc<Self> {
        Arc::new(Self {
            host,
            dead: AtomicBool::new(false),
            death: Mutex::default(),
        })
    }

    #[must_use]
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// Cuts this run off from everything.
    pub(crate) fn die(&self, death: Death) {
        if !self.dead.swap(true, Ordering::Relaxed) {
            *lock(&self.death) = Some(death);
        }
    }

    /// How it died, told once.
    pub(crate) fn take_death(&self) -> Option<Death> {
        match self.is_dead() {
            true => lock(&self.death).take(),
            false => None,
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn pieces(pos: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = pos + done as u64;
        let offset = (at % PAGE_BYTES) as usize;
        let take = (len - done).min(PAGE_BYTES as usize - offset);
        let range = done..done + take;
        done += take;
        (take > 0).then_some((at / PAGE_BYTES, offset, range))
    })
}

fn read(image: &Image, pos: u64, buf: &mut [u8]) {
    for (page, at, range) in pieces(pos, buf.len()) {
        match image.get(&page) {
            Some(data) => buf[range.clone()].copy_from_slice(&data[at..at + range.len()]),
            None => buf[range].fill(0),
        }
    }
}

fn write(image: &mut Image, pos: u64, data: &[u8]) {
    for (page, at, range) in pieces(pos, data.len()) {
        write_page(image, page, at, &data[range]);
    }
}

/// Writes within a page; gives the page.
fn write_page<'a>(image: &'a mut Image, page: u64, at: usize, data: &[u8]) -> &'a Page {
    let target = image.entry(page);
    if let Ok(whole) = <&[u8; PAGE_BYTES as usize]>::try_from(data) {
        return target.insert_entry(Arc::new(*whole)).into_mut();
    }
    let target = target.or_insert_with(|| Arc::new([0; PAGE_BYTES as usize]));
    Arc::make_mut(target)[at..at + data.len()].copy_from_slice(data);
    target
}

fn punch(image: &mut Image, pos: u64, len: u64) {
    let (first, end) = (pos.div_ceil(PAGE_BYTES), (pos + len) / PAGE_BYTES);
    let inner: Vec<u64> = image
        .range(first..end.max(first))
        .map(|(page, _)| *page)
        .collect();
    for page in inner {
        image.remove(&page);
    }
    for page in [pos / PAGE_BYTES, (pos + len) / PAGE_BYTES] {
        let (start, stop) = (
            pos.max(page * PAGE_BYTES),
            (pos + len).min((page + 1) * PAGE_BYTES),
        );
        if start < stop && image.contains_key(&page) {
            write(image, start, &vec![0; (stop - start) as usize]);
        }
    }
}

fn copy_page(from: &Image, to: &mut Image, page: u64) {
    match from.get(&page) {
        Some(data) => drop(to.insert(page, Arc::clone(data))),
        None => drop(to.remove(&page)),
    }
}

impl File {
    fn write(&mut self, pos: u64, data: &[u8]) {
        for (page, at, range) in pieces(pos, data.len()) {
            let (pos, len) = (page * PAGE_BYTES + at as u64, range.len());
            let written = write_page(&mut self.current, page, at, &data[range]);
            self.unsynced.push(Op::Write(pos, len, Arc::clone(written)));
        }
        self.len = self.len.max(pos + data.len() as u64);
    }

    fn sync(&mut self) {
        for op in self.unsynced.drain(..) {
            match op {
                Op::Write(pos, ..) => copy_page(&self.current, &mut self.synced, pos / PAGE_BYTES),
                Op::Punch(_, 0) => {}
                Op::Punch(pos, len) => {
                    punch(&mut self.synced, pos, len);
                    for page in pos / PAGE_BYTES..=(pos + len - 1) / PAGE_BYTES {
                        copy_page(&self.current, &mut self.synced, page);
                    }
                }
            }
        }
        self.synced_len = self.len;
    }

    fn lose_power(&mut self, keep: u8, random: &mut Random) {
        let mut image = std::mem::take(&mut self.synced);
        let mut len = match random.one_in(2) {
            true => self.len,
            false => self.synced_len,
        };
        for op in self.unsynced.drain(..) {
            match op {
                Op::Write(pos, written, page) => {
                    let offset = (pos % PAGE_BYTES) as usize;
                    let mut done = 0;
                    while done < written {
                        let at = pos + done as u64;
                        let in_sector = (at % SECTOR_BYTES as u64) as usize;
                        let take = (SECTOR_BYTES - in_sector).min(written - done);
                        if random.below(256) < u64::from(keep) {
                            write(&mut image, at, &page[offset + done..offset + done + take]);
                            len = len.max(at + take as u64);
                        }
                        done += take;
                    }
                }
                Op::Punch(pos, length) if random.below(256) < u64::from(keep) => {
                    punch(&mut image, pos, length);
                }
                Op::Punch(..) => {}
            }
        }
        self.current = image.clone();
        self.synced = image;
        (self.len, self.synced_len) = (len, len);
    }
}

impl Medium {
    /// Makes it one of a run: its choices come from `random`.
    pub(crate) fn arm(&mut self, random: Random) {
        self.random = Some(random);
    }

    fn random(&mut self) -> &mut Random {
        self.random.get_or_insert_with(|| Random::new(0, 0))
    }

    /// What a death leaves.
    pub(crate) fn die(&mut self, death: Death) {
        self.failed = false;
        self.faults.die_in = None;
        self.faults.die_after_slab_write = None;
        let Death::Power(keep) = death else { return };
        self.boot += 1;
        let mut random = self.random().clone();
        for file in &mut self.files {
            file.lose_power(keep, &mut random);
        }
        *self.random() = random;
    }

    /// How often the page store has found its log cut, by the newest of the four superblocks (their
    /// byte table is in `page_store/superblock.rs`).
    pub(crate) fn cuts(&self) -> u32 {
        let count = |copy: u64| {
            let mut bytes = [0; 4];
            let file = &self.files[DiskFile::Super as usize];
            read(&file.current, copy * PAGE_BYTES + 104, &mut bytes);
            u32::from_le_bytes(bytes)
        };
        (0..4).map(count).max().unwrap_or_default()
    }

    /// Some pages of the slab that have data, one behind the other, cannot be read from now on.
    pub(crate) fn fail_reads(&mut self, number: u64) {
        let pages = &self.files[DiskFile::Slab as usize].current;
        let first = number % (pages.len() as u64).max(1);
        let failing = pages.keys().skip(first as usize);
        self.unreadable
            .extend(failing.take(1 + number as usize % 32));
    }

    /// Everything can be read again.
    pub(crate) fn heal_reads(&mut self) {
        self.unreadable.clear();
    }

    fn check_readable(&mut self, file: DiskFile, pos: u64, len: usize) -> io::Result<()> {
        let pages = pos / PAGE_BYTES..(pos + len as u64).div_ceil(PAGE_BYTES);
        if file != DiskFile::Slab || self.unreadable.range(pages).next().is_none() {
            return Ok(());
        }
        trace::count("fault: read EIO");
        self.has_failed = true;
        Err(io::Error::from_raw_os_error(EIO))
    }

    /// What is written or discarded can be read again.
    fn rewrite(&mut self, file: usize, pos: u64, len: u64) {
        let pages = pos / PAGE_BYTES..(pos + len).div_ceil(PAGE_BYTES);
        if file == DiskFile::Slab as usize && !self.unreadable.is_empty() {
            self.unreadable.retain(|page| !pages.contains(page));
        }
    }

    /// Inverts a bit of the slab, also of what is synced. False if the slab is empty.
    pub(crate) fn rot(&mut self) -> bool {
        let pages: Vec<u64> = self.files[DiskFile::Slab as usize]
            .synced
            .keys()
            .copied()
            .collect();
        if pages.is_empty() {
            return false;
        }
        let random = self.random();
        let page = pages[random.below(pages.len() as u64) as usize];
        let (at, bit) = (random.below(PAGE_BYTES) as usize, random.below(8));
        let file = &mut self.files[DiskFile::Slab as usize];
        for image in [&mut file.current, &mut file.synced] {
            if let Some(data) = image.get_mut(&page) {
                Arc::make_mut(data)[at] ^= 1 << bit;
            }
        }
        self.damaged = true;
        true
    }
}

/// A medium as one incarnation sees it.
#[derive(Clone)]
pub(crate) struct SimState {
    pub medium: SharedMedium,
    pub incarnation: Arc<Incarnation>,
    path: PathBuf,
}

fn due(countdown: &mut Option<u64>) -> bool {
    match countdown {
        Some(0) => {
            *countdown = None;
            true
        }
        Some(left) => {
            *left -= 1;
            false
        }
        None => false,
    }
}

impl SimState {
    #[must_use]
    pub(crate) fn new(medium: SharedMedium, incarnation: Arc<Incarnation>) -> Self {
        let path = PathBuf::from(format!("/sim/{}", incarnation.host));
        Self {
            medium,
            incarnation,
            path,
        }
    }

    fn open(&self) -> io::Result<MutexGuard<'_, Medium>> {
        match self.incarnation.is_dead() {
            true => Err(io::Error::from_raw_os_error(EIO)),
            false => Ok(lock(&self.medium)),
        }
    }

    /// Counts one change and lets what is due happen.
    fn change(&self, file: usize, writes: bool) -> io::Result<MutexGuard<'_, Medium>> {
        let mut medium = self.open()?;
        trace::mix(file as u64 + 100 * u64::from(writes));
        if let Some((left, death)) = &mut medium.faults.die_in {
            if *left == 0 {
                let death = *death;
                medium.faults.die_in = None;
                drop(medium);
                trace::count("fault: dies at a disk operation");
                self.incarnation.die(death);
                return Err(io::Error::from_raw_os_error(EIO));
            }
            *left -= 1;
        }
        if due(&mut medium.faults.fail_in) {
            trace::count(match writes {
                true => "fault: write EIO",
                false => "fault: sync EIO",
            });
            (medium.failed, medium.has_failed) = (true, true);
            return Err(io::Error::from_raw_os_error(EIO));
        }
        if writes && medium.faults.full && file != REGISTRY {
            trace::count("fault: ENOSPC");
            return Err(io::Error::from_raw_os_error(ENOSPC));
        }
        Ok(medium)
    }

    fn write(&self, file: usize, pos: u64, data: &[u8]) -> io::Result<()> {
        let mut medium = self.change(file, true)?;
        let mut pos = pos;
        if file == DiskFile::Slab as usize {
            let faults = &mut medium.faults;
            faults.die_in = faults.die_after_slab_write.take().or(faults.die_in);
            if due(&mut medium.faults.lose_in) {
                trace::count("fault: lost write");
                medium.damaged = true;
                return Ok(());
            }
            if due(&mut medium.faults.misdirect_in) {
                trace::count("fault: misdirected write");
                medium.damaged = true;
                pos = medium.random().below(64) * PAGE_BYTES;
            }
        }
        medium.rewrite(file, pos, data.len() as u64);
        medium.files[file].write(pos, data);
        Ok(())
    }

    fn sync_file(&self, file: usize) -> io::Result<()> {
        self.change(file, false)?.files[file].sync();
        Ok(())
    }
}

impl Disk for SimState {
    fn read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut medium = self.open()?;
        medium.check_readable(file, pos, buf.len())?;
        read(&medium.files[file as usize].current, pos, buf);
        Ok(())
    }

    fn try_read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<bool> {
        let mut medium = self.open()?;
        medium.reads += 1;
        let cold = medium.faults.cold_one_in;
        if cold > 0 && medium.reads.is_multiple_of(cold) {
            return Ok(false);
        }
        medium.check_readable(file, pos, buf.len())?;
        read(&medium.files[file as usize].current, pos, buf);
        Ok(true)
    }

    fn write_at(&self, file: DiskFile, pos: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let len = parts.iter().map(|part| part.len()).sum();
        let mut data = Vec::with_capacity(len);
        parts.iter().for_each(|part| data.extend_from_slice(part));
        self.write(file as usize, pos, &data)
    }

    fn sync(&self, file: DiskFile) -> io::Result<()> {
        self.sync_file(file as usize)
    }

    fn punch(&self, file: DiskFile, pos: u64, len: u64) -> io::Result<()> {
        let mut medium = self.change(file as usize, false)?;
        medium.rewrite(file as usize, pos, len);
        let target = &mut medium.files[file as usize];
        punch(&mut target.current, pos, len);
        target.unsynced.push(Op::Punch(pos, len));
        Ok(())
    }

    fn len_bytes(&self, file: DiskFile) -> io::Result<u64> {
        let medium = self.open()?;
        let last = medium.files[file as usize].current.last_key_value();
        Ok(last.map_or(0, |(page, _)| (page + 1) * PAGE_BYTES))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        Ok(match self.open()?.faults.full {
            true => 0,
            false => 1 << 40,
        })
    }
}

impl std::fmt::Debug for SimState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("simulated file")
    }
}

impl StorageBackend for SimState {
    fn len(&self) -> io::Result<u64> {
        Ok(self.open()?.files[REGISTRY].len)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let medium = self.open()?;
        let file = &medium.files[REGISTRY];
        if offset + out.len() as u64 > file.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        read(&file.current, offset, out);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut medium = self.change(REGISTRY, false)?;
        let file = &mut medium.files[REGISTRY];
        if len < file.len {
            let (pos, cut) = (len, file.len - len);
            punch(&mut file.current, pos, cut);
            file.unsynced.push(Op::Punch(pos, cut));
        }
        file.len = len;
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.sync_file(REGISTRY)
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        SimState::write(self, REGISTRY, offset, data)
    }
}

impl StateDir for SimState {
    fn path(&self) -> &Path {
        &self.path
    }

    fn read(&self, name: &str) -> io::Result<Option<String>> {
        Ok(self.open()?.small.get(name).cloned())
    }

    fn replace(&self, name: &str, text: &str) -> io::Result<()> {
        let mut medium = self.open()?;
        medium.small.insert(name.to_owned(), text.to_owned());
        Ok(())
    }

    fn store(&self) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(self.clone()))
    }

    fn registry(&self) -> Result<Database, DatabaseError> {
        let mut builder = Database::builder();
        builder.set_cache_size(1 << 20);
        builder.create_with_backend(self.clone())
    }

    fn free_bytes(&self) -> u64 {
        1 << 40
    }

    fn boot_id(&self) -> String {
        lock(&self.medium).boot.to_string()
    }

    fn device(&self) -> Device {
        let medium = Arc::clone(&self.medium);
        Device::Simulated(Arc::new(move || {
            let mut medium = lock(&medium);
            let (low, high) = medium.faults.latency_ms;
            Duration::from_millis(medium.random().between(low, high))
        }))
    }
}

/// A wall clock with an offset to the simulated time.
pub(crate) struct SimClock {
    pub start: tokio::time::Instant,
    pub offset_ms: AtomicI64,
}

/// The wall clock at the start of every run: 2026-01-01.
const EPOCH_MS: i64 = 1_767_225_600_000;

impl Clock for SimClock {
    fn unix_ms(&self) -> u64 {
        let elapsed = i64::try_from(self.start.elapsed().as_millis()).unwrap_or_default();
        let now = EPOCH_MS + elapsed + self.offset_ms.load(Ordering::Relaxed);
        u64::try_from(now).unwrap_or_default()
    }
}
