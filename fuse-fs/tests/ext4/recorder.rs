//! A device in memory that keeps what was asked of it, in order: for each moment, what a loss of power leaves.
//!
//! A flush keeps what was answered before it was asked for, once it is answered itself; no more, and no sooner.

use crate::data::Random;
use bytes::Bytes;
use fuse_fs::ext4::device::{Device, Pending};
use std::collections::HashMap;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, AtomicU32, AtomicU64, Ordering};

/// Where the superblock keeps the logarithm of the block size, less 10.
const LOG_BLOCK_AT: usize = 1024 + 0x18;
/// So many more states are taken from right before a flush.
const LAST_WEIGHT: usize = 4;
/// Of a flush, unless a test says otherwise.
const FLUSH_TURNS: u32 = 100;

#[derive(Clone)]
enum Event {
    Write {
        request: u64,
        offset: usize,
        data: Bytes,
    },
    /// A write was answered.
    Written(u64),
    Flush(u64),
    /// A flush was answered.
    Flushed(u64),
    Mark(Mark),
}

/// A block that is not yet known to be durable.
struct Loose {
    request: u64,
    answered: bool,
    /// The first flush that was asked for after the answer.
    covered_by: Option<u64>,
    offset: usize,
    data: Bytes,
}

/// What is on the device at one moment.
pub(crate) struct Moment<'a> {
    /// The files that are durable.
    pub(crate) synced: &'a HashMap<u32, Vec<u8>>,
    /// The number of [`Mark::Step`] that nothing may be older than.
    pub(crate) step: usize,
}

/// What a test noted between two requests.
#[derive(Clone, Debug)]
pub(crate) enum Mark {
    /// A file may be changing from here on.
    Touched(u32),
    /// A file is durable as it is said here, until it is touched.
    Synced(u32, Vec<u8>),
    /// Names are at least as they were after so many operations.
    Step(usize),
}

/// The device.
pub(crate) struct Recorder {
    bytes: Mutex<Vec<u8>>,
    start: Mutex<Vec<u8>>,
    events: Mutex<Vec<Event>>,
    /// Writes and flushes until one fails; then all do.
    left: AtomicI64,
    requests: AtomicU64,
    /// A flush takes so much longer than a write.
    flush_turns: AtomicU32,
}

impl Recorder {
    pub(crate) fn new(start: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(start.clone()),
            start: Mutex::new(start),
            events: Mutex::default(),
            left: AtomicI64::new(i64::MAX),
            requests: AtomicU64::new(0),
            flush_turns: AtomicU32::new(FLUSH_TURNS),
        }
    }

    pub(crate) fn set_flush_turns(&self, turns: u32) {
        self.flush_turns.store(turns, Ordering::Relaxed);
    }

    /// Only so many writes and flushes succeed.
    pub(crate) fn fail_after(&self, requests: i64) {
        self.left.store(requests, Ordering::SeqCst);
    }

    fn spend(&self) -> io::Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 {
            Ok(())
        } else {
            Err(io::Error::other("planted"))
        }
    }

    pub(crate) fn mark(&self, mark: Mark) {
        self.push(Event::Mark(mark));
    }

    /// What was asked so far is durable, and no moment of it is looked at.
    pub(crate) fn forget(&self) {
        let mut events = self.events.lock().unwrap();
        events.clear();
        *self.start.lock().unwrap() = self.content();
    }

    fn push(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    pub(crate) fn flushes(&self) -> usize {
        let events = self.events.lock().unwrap();
        let flush = |event: &&Event| matches!(event, Event::Flush(_));
        events.iter().filter(flush).count()
    }

    /// The files that are durable now.
    pub(crate) fn synced(&self) -> HashMap<u32, Vec<u8>> {
        let mut synced = HashMap::new();
        for event in self.events.lock().unwrap().iter() {
            match event {
                Event::Mark(Mark::Touched(file)) => {
                    synced.remove(file);
                }
                Event::Mark(Mark::Synced(file, content)) => {
                    synced.insert(*file, content.clone());
                }
                _ => {}
            }
        }
        synced
    }

    /// Goes through moments in order, and shows for each what could be left by a loss of power then, and what is
    /// durable. About `states` of them; how many.
    pub(crate) fn crashes(
        &self,
        states: usize,
        random: &mut Random,
        mut see: impl FnMut(Vec<u8>, &Moment<'_>),
    ) -> usize {
        let events = self.events.lock().unwrap().clone();
        let is_moment = |event: &Event| !matches!(event, Event::Written(_) | Event::Flush(_));
        let moments = events.iter().filter(|event| is_moment(event)).count() as u64;
        let mut left = Left::new(self.start.lock().unwrap().clone());
        let (mut synced, mut step) = (HashMap::new(), 0);
        let mut seen = 0;
        for (at, event) in events.iter().enumerate() {
            match event {
                Event::Mark(Mark::Touched(file)) => {
                    synced.remove(file);
                }
                Event::Mark(Mark::Synced(file, content)) => {
                    synced.insert(*file, content.clone());
                }
                Event::Mark(Mark::Step(durable)) => step = *durable,
                request => left.pass(request),
            }
            if !is_moment(event) {
                continue;
            }
            // Before a flush ends the most may be lost.
            let last = matches!(events.get(at + 1), Some(Event::Flushed(_)));
            let wanted = if last { LAST_WEIGHT * states } else { states };
            if random.below(moments) < wanted as u64 {
                let synced = &synced;
                see(left.some(random), &Moment { synced, step });
                seen += 1;
            }
        }
        seen
    }
}

/// What a loss of power leaves for certain, and what perhaps.
struct Left {
    durable: Vec<u8>,
    loose: Vec<Loose>,
    /// A loss of power keeps or loses a block as one, as the volume does.
    block_bytes: usize,
}

impl Left {
    fn new(start: Vec<u8>) -> Self {
        Self {
            block_bytes: 1024 << start[LOG_BLOCK_AT],
            durable: start,
            loose: Vec::new(),
        }
    }

    fn pass(&mut self, event: &Event) {
        match event {
            Event::Write {
                request,
                offset,
                data,
            } => {
                let starts = (0..data.len()).step_by(self.block_bytes);
                let pieces = starts.map(|at| Loose {
                    request: *request,
                    answered: false,
                    covered_by: None,
                    offset: offset + at,
                    data: data.slice(at..data.len().min(at + self.block_bytes)),
                });
                self.loose.extend(pieces);
            }
            Event::Written(write) => self
                .loose
                .iter_mut()
                .filter(|piece| piece.request == *write)
                .for_each(|piece| piece.answered = true),
            Event::Flush(flush) => self
                .loose
                .iter_mut()
                .filter(|piece| piece.answered && piece.covered_by.is_none())
                .for_each(|piece| piece.covered_by = Some(*flush)),
            Event::Flushed(flush) => {
                let covered = |piece: &Loose| piece.covered_by.is_some_and(|by| by <= *flush);
                for piece in self.loose.extract_if(.., |piece| covered(piece)) {
                    put(&mut self.durable, (piece.offset, &piece.data));
                }
            }
            Event::Mark(_) => {}
        }
    }

    /// One of the states that a loss of power may leave.
    fn some(&self, random: &mut Random) -> Vec<u8> {
        let share = random.below(5);
        let mut left = self.durable.clone();
        let kept = self.loose.iter().filter(|_| match share {
            0 => false,
            1 => true,
            2 => random.below(10) > 0,
            3 => random.below(10) == 0,
            _ => random.below(2) == 0,
        });
        kept.for_each(|piece| put(&mut left, (piece.offset, &piece.data)));
        left
    }
}

fn put(bytes: &mut [u8], (offset, data): (usize, &Bytes)) {
    bytes[offset..offset + data.len()].copy_from_slice(data);
}

/// Lets others run so often.
async fn wait(turns: u32) {
    for _ in 0..turns {
        tokio::task::yield_now().await;
    }
}

impl Device for Recorder {
    fn size_bytes(&self) -> u64 {
        self.start.lock().unwrap().len() as u64
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Pending<'_, Bytes> {
        let at = usize::try_from(offset_bytes).unwrap();
        let bytes = self.bytes.lock().unwrap();
        let read = Bytes::copy_from_slice(&bytes[at..at + len_bytes as usize]);
        Box::pin(async move {
            wait(1).await;
            Ok(read)
        })
    }

    fn write(&self, offset_bytes: u64, data: Bytes) -> Pending<'_, ()> {
        let offset = usize::try_from(offset_bytes).unwrap();
        Box::pin(async move {
            self.spend()?;
            let request = self.requests.fetch_add(1, Ordering::SeqCst);
            put(&mut self.bytes.lock().unwrap(), (offset, &data));
            self.push(Event::Write {
                request,
                offset,
                data,
            });
            wait(1).await;
            self.push(Event::Written(request));
            Ok(())
        })
    }

    fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Pending<'_, ()> {
        self.write(
            offset_bytes,
            vec![0; usize::try_from(len_bytes).unwrap()].into(),
        )
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(async move {
            self.spend()?;
            let request = self.requests.fetch_add(1, Ordering::SeqCst);
            self.push(Event::Flush(request));
            wait(self.flush_turns.load(Ordering::Relaxed)).await;
            self.push(Event::Flushed(request));
            Ok(())
        })
    }
}
