//! A device in memory that keeps what was asked of it, in order: for each moment, what a loss of power leaves.

use crate::data::Random;
use bytes::Bytes;
use fuse_fs::ext4::device::{Device, Pending};
use std::collections::HashMap;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};

/// Where the superblock keeps the logarithm of the block size, less 10.
const LOG_BLOCK_AT: usize = 1024 + 0x18;
/// So many more states are taken from right before a flush.
const LAST_WEIGHT: usize = 4;
/// A flush takes so much longer than a write.
const FLUSH_TURNS: u32 = 100;

#[derive(Clone)]
enum Event {
    Write { offset: usize, data: Bytes },
    Flush,
    Mark(Mark),
}

/// What a test noted between two requests.
#[derive(Clone, Debug)]
pub(crate) enum Mark {
    /// A file may be changing from here on.
    Touched(u32),
    /// A file is durable as it is said here, until it is touched.
    Synced(u32, Vec<u8>),
}

/// The device.
pub(crate) struct Recorder {
    bytes: Mutex<Vec<u8>>,
    start: Vec<u8>,
    events: Mutex<Vec<Event>>,
    /// Writes and flushes until one fails; then all do.
    left: AtomicI64,
}

impl Recorder {
    pub(crate) fn new(start: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(start.clone()),
            start,
            events: Mutex::default(),
            left: AtomicI64::new(i64::MAX),
        }
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
        self.events.lock().unwrap().push(Event::Mark(mark));
    }

    pub(crate) fn content(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    pub(crate) fn flushes(&self) -> usize {
        let events = self.events.lock().unwrap();
        let flush = |event: &&Event| matches!(event, Event::Flush);
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

    /// Goes through moments in order, and shows for each what could be left by a loss of power then, and which
    /// files are durable. About `states` of them.
    pub(crate) fn crashes(
        &self,
        states: usize,
        random: &mut Random,
        mut see: impl FnMut(Vec<u8>, &HashMap<u32, Vec<u8>>),
    ) -> usize {
        // A loss of power keeps or loses a block as one, as the volume does.
        let block_bytes = 1024 << self.start[LOG_BLOCK_AT];
        let events = self.events.lock().unwrap().clone();
        let mut durable = self.start.clone();
        let mut loose: Vec<(usize, Bytes)> = Vec::new();
        let mut synced = HashMap::new();
        let mut seen = 0;
        for (at, event) in events.iter().enumerate() {
            match event {
                Event::Write { offset, data } => {
                    for at in (0..data.len()).step_by(block_bytes) {
                        let end = data.len().min(at + block_bytes);
                        loose.push((offset + at, data.slice(at..end)));
                    }
                }
                Event::Flush => {
                    loose.drain(..).for_each(|piece| put(&mut durable, &piece));
                }
                Event::Mark(Mark::Touched(file)) => {
                    synced.remove(file);
                }
                Event::Mark(Mark::Synced(file, content)) => {
                    synced.insert(*file, content.clone());
                }
            }
            // Before a flush the most may be lost.
            let last = matches!(events.get(at + 1), Some(Event::Flush));
            let wanted = if last { LAST_WEIGHT * states } else { states };
            if random.below(events.len() as u64) < wanted as u64 {
                let share = random.below(5);
                let mut left = durable.clone();
                let kept = loose.iter().filter(|_| match share {
                    0 => false,
                    1 => true,
                    2 => random.below(10) > 0,
                    3 => random.below(10) == 0,
                    _ => random.below(2) == 0,
                });
                kept.for_each(|piece| put(&mut left, piece));
                see(left, &synced);
                seen += 1;
            }
        }
        seen
    }
}

fn put(bytes: &mut [u8], (offset, data): &(usize, Bytes)) {
    bytes[*offset..*offset + data.len()].copy_from_slice(data);
}

/// Answers after others have run so often.
fn after<T: Send + 'static>(turns: u32, result: io::Result<T>) -> Pending<'static, T> {
    Box::pin(async move {
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        result
    })
}

impl Device for Recorder {
    fn size_bytes(&self) -> u64 {
        self.start.len() as u64
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Pending<'_, Bytes> {
        let at = usize::try_from(offset_bytes).unwrap();
        let bytes = self.bytes.lock().unwrap();
        after(
            1,
            Ok(Bytes::copy_from_slice(&bytes[at..at + len_bytes as usize])),
        )
    }

    fn write(&self, offset_bytes: u64, data: Bytes) -> Pending<'_, ()> {
        let offset = usize::try_from(offset_bytes).unwrap();
        let spent = self.spend();
        if spent.is_ok() {
            put(&mut self.bytes.lock().unwrap(), &(offset, data.clone()));
            let event = Event::Write { offset, data };
            self.events.lock().unwrap().push(event);
        }
        after(1, spent)
    }

    fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Pending<'_, ()> {
        self.write(
            offset_bytes,
            vec![0; usize::try_from(len_bytes).unwrap()].into(),
        )
    }

    fn flush(&self) -> Pending<'_, ()> {
        let spent = self.spend();
        if spent.is_ok() {
            self.events.lock().unwrap().push(Event::Flush);
        }
        after(FLUSH_TURNS, spent)
    }
}
