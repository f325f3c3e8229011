//! A device in memory that loses, tears, flips and fails: the store's files in simulation.
//!
//! It keeps the synced image and the writes since. A crash keeps any subset of the unsynced 512-byte
//! sectors. Images are shared page by page, so that a copy for every crash point is cheap.

use super::disk::{Disk, DiskFile};
use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const PAGE_BYTES: u64 = 4096;
const SECTOR_BYTES: usize = 512;
const ENOSPC: i32 = 28;
const EIO: i32 = 5;

/// A change of the device, as traces record it.
#[derive(Clone, Debug)]
pub enum DiskOp {
    /// Bytes written at a position.
    Write(DiskFile, u64, Arc<[u8]>),
    /// A range made zero and given back.
    Punch(DiskFile, u64, u64),
    /// All earlier changes of the file made durable.
    Sync(DiskFile),
}

/// Which unsynced sectors a crash keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CrashKeeps {
    /// The process died, the machine did not.
    All,
    /// Power failed before anything unsynced was written.
    Nothing,
    /// Power failed; so many of 256 sectors survive, chosen by the seed.
    Some(u8),
}

/// The error that the failing operation gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SimFault {
    /// EIO.
    Io,
    /// ENOSPC (of writes only; other operations succeed).
    NoSpace,
}

/// Deterministic random numbers (splitmix64): same seed, same disk.
#[derive(Clone, Debug)]
pub struct SimRandom(pub u64);

impl SimRandom {
    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n` (0 if `n` is 0).
    pub fn below(&mut self, n: u64) -> u64 {
        self.next_u64() % n.max(1)
    }
}

type Page = Arc<[u8; PAGE_BYTES as usize]>;

#[derive(Clone, Default)]
struct Image {
    pages: BTreeMap<u64, Page>,
}

impl Image {
    fn read(&self, pos: u64, buf: &mut [u8]) {
        for (page, at, range) in pieces(pos, buf.len()) {
            match self.pages.get(&page) {
                Some(data) => buf[range.clone()].copy_from_slice(&data[at..at + range.len()]),
                None => buf[range].fill(0),
            }
        }
    }

    fn write(&mut self, pos: u64, data: &[u8]) {
        for (page, at, range) in pieces(pos, data.len()) {
            let target = self
                .pages
                .entry(page)
                .or_insert_with(|| Arc::new([0; PAGE_BYTES as usize]));
            Arc::make_mut(target)[at..at + range.len()].copy_from_slice(&data[range]);
        }
    }

    fn punch(&mut self, pos: u64, len: u64) {
        let (first, end) = (pos.div_ceil(PAGE_BYTES), (pos + len) / PAGE_BYTES);
        let inner: Vec<u64> = self
            .pages
            .range(first..end.max(first))
            .map(|(page, _)| *page)
            .collect();
        for page in inner {
            self.pages.remove(&page);
        }
        let present: Vec<u64> = [pos / PAGE_BYTES, (pos + len) / PAGE_BYTES].into();
        for page in present {
            let start = pos.max(page * PAGE_BYTES);
            let stop = (pos + len).min((page + 1) * PAGE_BYTES);
            if start < stop && self.pages.contains_key(&page) {
                self.write(start, &vec![0; usize::try_from(stop - start).unwrap_or(0)]);
            }
        }
    }

    fn apply(&mut self, op: &DiskOp) {
        match op {
            DiskOp::Write(_, pos, data) => self.write(*pos, data),
            DiskOp::Punch(_, pos, len) => self.punch(*pos, *len),
            DiskOp::Sync(_) => {}
        }
    }
}

/// Splits a range at page boundaries: page, offset in it, range of the buffer.
fn pieces(pos: u64, len: usize) -> impl Iterator<Item = (u64, usize, std::ops::Range<usize>)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = pos + done as u64;
        let offset = usize::try_from(at % PAGE_BYTES).unwrap_or(0);
        let take = (len - done).min(PAGE_BYTES as usize - offset);
        let range = done..done + take;
        done += take;
        (take > 0).then_some((at / PAGE_BYTES, offset, range))
    })
}

#[derive(Clone, Default)]
struct SimFile {
    current: Image,
    synced: Image,
    unsynced: Vec<DiskOp>,
}

#[derive(Clone, Default)]
struct State {
    files: [SimFile; DiskFile::ALL.len()],
    trace: Option<Vec<DiskOp>>,
    capacity_pages: Option<usize>,
    operations: u64,
    fault: Option<(u64, SimFault)>,
    cold_one_in: u64,
    reads: u64,
}

/// The simulated device; clones share nothing but unchanged pages.
#[derive(Default)]
pub struct SimDisk {
    state: Mutex<State>,
}

impl SimDisk {
    /// An empty device.
    #[must_use]
    pub fn new() -> SimDisk {
        SimDisk::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts recording every change; `take_trace` gives what was recorded.
    pub fn record(&self) {
        self.state().trace = Some(Vec::new());
    }

    /// Changes recorded so far.
    #[must_use]
    pub fn trace_len(&self) -> usize {
        self.state().trace.as_ref().map_or(0, Vec::len)
    }

    /// Ends the recording.
    #[must_use]
    pub fn take_trace(&self) -> Vec<DiskOp> {
        self.state().trace.take().unwrap_or_default()
    }

    /// Does what a trace says.
    pub fn replay(&self, op: &DiskOp) {
        self.state().change(op.clone());
    }

    /// Operation `nth` from now (0: the next write, sync or punch) fails once.
    pub fn fail_nth(&self, nth: u64, fault: SimFault) {
        let mut state = self.state();
        state.fault = Some((state.operations + nth, fault));
    }

    /// Operations that may fail, so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.state().operations
    }

    /// Every `n`-th read without waiting says that it would block; 0 is never.
    pub fn cold_one_in(&self, n: u64) {
        self.state().cold_one_in = n;
    }

    /// Limits the allocated bytes of all files; `None` lifts the limit.
    pub fn set_capacity(&self, bytes: Option<u64>) {
        self.state().capacity_pages = bytes.and_then(|b| usize::try_from(b / PAGE_BYTES).ok());
    }

    /// Bytes allocated in a file.
    #[must_use]
    pub fn allocated_bytes(&self, file: DiskFile) -> u64 {
        self.state().files[file as usize].current.pages.len() as u64 * PAGE_BYTES
    }

    /// Inverts one bit, also of what is synced: the medium rots.
    pub fn flip_bit(&self, file: DiskFile, pos: u64, bit: u8) {
        let mut state = self.state();
        let file = &mut state.files[file as usize];
        for image in [&mut file.current, &mut file.synced] {
            let mut byte = [0];
            image.read(pos, &mut byte);
            image.write(pos, &[byte[0] ^ (1 << (bit % 8))]);
        }
    }

    /// The device as it is found after a crash at this point.
    #[must_use]
    pub fn crashed(&self, keeps: CrashKeeps, random: &mut SimRandom) -> SimDisk {
        let state = self.state();
        let files = std::array::from_fn(|i| state.files[i].crashed(keeps, random));
        SimDisk {
            state: Mutex::new(State {
                files,
                ..State::default()
            }),
        }
    }
}

impl SimFile {
    fn crashed(&self, keeps: CrashKeeps, random: &mut SimRandom) -> SimFile {
        let image = match keeps {
            CrashKeeps::All => self.current.clone(),
            CrashKeeps::Nothing => self.synced.clone(),
            CrashKeeps::Some(share) => self.torn(share, random),
        };
        SimFile {
            synced: image.clone(),
            current: image,
            unsynced: Vec::new(),
        }
    }

    fn torn(&self, share: u8, random: &mut SimRandom) -> Image {
        let mut image = self.synced.clone();
        for op in &self.unsynced {
            match op {
                DiskOp::Write(_, pos, data) => {
                    let mut done = 0;
                    while done < data.len() {
                        let at = pos + done as u64;
                        let in_sector = usize::try_from(at % SECTOR_BYTES as u64).unwrap_or(0);
                        let take = (SECTOR_BYTES - in_sector).min(data.len() - done);
                        if random.below(256) < u64::from(share) {
                            image.write(at, &data[done..done + take]);
                        }
                        done += take;
                    }
                }
                DiskOp::Punch(..) if random.below(256) < u64::from(share) => image.apply(op),
                DiskOp::Punch(..) | DiskOp::Sync(_) => {}
            }
        }
        image
    }
}

impl State {
    fn change(&mut self, op: DiskOp) {
        let (DiskOp::Write(file, ..) | DiskOp::Punch(file, ..) | DiskOp::Sync(file)) = op;
        let target = &mut self.files[file as usize];
        if matches!(op, DiskOp::Sync(_)) {
            target.synced = target.current.clone();
            target.unsynced.clear();
        } else {
            target.current.apply(&op);
            target.unsynced.push(op.clone());
        }
        if let Some(trace) = &mut self.trace {
            trace.push(op);
        }
    }

    fn count(&mut self, writes: bool) -> io::Result<()> {
        let now = self.operations;
        self.operations += 1;
        match self.fault {
            Some((at, SimFault::Io)) if at == now => Err(io::Error::from_raw_os_error(EIO)),
            Some((at, SimFault::NoSpace)) if at == now && writes => {
                Err(io::Error::from_raw_os_error(ENOSPC))
            }
            _ => Ok(()),
        }
    }

    fn pages(&self) -> usize {
        self.files.iter().map(|f| f.current.pages.len()).sum()
    }

    fn check_capacity(&self, file: DiskFile, pos: u64, len: usize) -> io::Result<()> {
        let Some(capacity) = self.capacity_pages else {
            return Ok(());
        };
        let image = &self.files[file as usize].current;
        let new = pieces(pos, len)
            .filter(|(page, ..)| !image.pages.contains_key(page))
            .count();
        if self.pages() + new > capacity && new > 0 {
            return Err(io::Error::from_raw_os_error(ENOSPC));
        }
        Ok(())
    }
}

impl Disk for SimDisk {
    fn read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        self.state().files[file as usize].current.read(pos, buf);
        Ok(())
    }

    fn try_read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<bool> {
        let mut state = self.state();
        state.reads += 1;
        if state.cold_one_in > 0 && state.reads.is_multiple_of(state.cold_one_in) {
            return Ok(false);
        }
        state.files[file as usize].current.read(pos, buf);
        Ok(true)
    }

    fn write_at(&self, file: DiskFile, pos: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let mut state = self.state();
        state.count(true)?;
        let data: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        state.check_capacity(file, pos, data.len())?;
        state.change(DiskOp::Write(file, pos, data.into()));
        Ok(())
    }

    fn sync(&self, file: DiskFile) -> io::Result<()> {
        let mut state = self.state();
        state.count(false)?;
        state.change(DiskOp::Sync(file));
        Ok(())
    }

    fn punch(&self, file: DiskFile, pos: u64, len: u64) -> io::Result<()> {
        let mut state = self.state();
        state.count(false)?;
        state.change(DiskOp::Punch(file, pos, len));
        Ok(())
    }

    fn len_bytes(&self, file: DiskFile) -> io::Result<u64> {
        let state = self.state();
        let last = state.files[file as usize].current.pages.last_key_value();
        Ok(last.map_or(0, |(page, _)| (page + 1) * PAGE_BYTES))
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let state = self.state();
        let free = state
            .capacity_pages
            .map_or(1 << 28, |c| c.saturating_sub(state.pages()));
        Ok(free as u64 * PAGE_BYTES)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte(disk: &SimDisk, pos: u64) -> u8 {
        let mut buf = [0];
        disk.read_at(DiskFile::Log, pos, &mut buf).unwrap();
        buf[0]
    }

    #[test]
    fn a_crash_keeps_what_was_synced_and_a_subset_of_the_rest() {
        let disk = SimDisk::new();
        disk.write_at(DiskFile::Log, 0, &[IoSlice::new(&[1; 4096])])
            .unwrap();
        disk.sync(DiskFile::Log).unwrap();
        disk.write_at(DiskFile::Log, 0, &[IoSlice::new(&[2; 4096])])
            .unwrap();
        let mut random = SimRandom(1);
        assert_eq!(byte(&disk.crashed(CrashKeeps::All, &mut random), 0), 2);
        assert_eq!(byte(&disk.crashed(CrashKeeps::Nothing, &mut random), 0), 1);
        let torn = disk.crashed(CrashKeeps::Some(128), &mut random);
        let sectors: Vec<u8> = (0..8).map(|i| byte(&torn, i * 512)).collect();
        assert!(sectors.contains(&1) && sectors.contains(&2), "{sectors:?}");
    }

    #[test]
    fn the_nth_operation_fails_once() {
        let disk = SimDisk::new();
        disk.fail_nth(1, SimFault::Io);
        disk.sync(DiskFile::Log).unwrap();
        assert_eq!(
            disk.sync(DiskFile::Log).unwrap_err().raw_os_error(),
            Some(EIO)
        );
        disk.sync(DiskFile::Log).unwrap();
    }

    #[test]
    fn a_punch_frees_whole_pages_and_zeroes_parts() {
        let disk = SimDisk::new();
        disk.write_at(DiskFile::Log, 0, &[IoSlice::new(&[1; 12288])])
            .unwrap();
        disk.punch(DiskFile::Log, 2048, 8192).unwrap();
        assert_eq!(disk.allocated_bytes(DiskFile::Log), 8192);
        assert_eq!(
            (
                byte(&disk, 0),
                byte(&disk, 2048),
                byte(&disk, 10239),
                byte(&disk, 10240)
            ),
            (1, 0, 0, 1)
        );
    }
}
