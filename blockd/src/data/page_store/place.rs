//! Where the whole chunks of a write go: to fresh slots, a turn at a time, before the write is logged.
//!
//! Until a pointer record refers to them these slots are nobody's: readers do not see them, a crash
//! makes them free again, and a write that is given up gives them back.

use super::engine::{Engine, chunk_of};
use super::error::StoreError;
use super::read::SUB;
use super::record::{Change, ChunkAt, POINTER_CHUNKS};
use super::types::PageAt;
use super::version::{ALL, SUBS};
use crate::id::{CHUNK_BYTES, Epoch};
use crate::io::disk::{Disk, DiskFile};
use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;

/// Progress of one write; empty at first. Belongs to one range and its data.
#[derive(Debug, Default)]
pub struct Placement {
    runs: VecDeque<Run>,
}

/// Neighbouring slots for neighbouring chunks.
#[derive(Debug)]
struct Run {
    at: ChunkAt,
    slot: u32,
    slots: u32,
    /// Checksums of the chunks that are in the slab.
    crcs: Vec<[u32; SUBS]>,
}

impl Run {
    fn has_room(&self) -> bool {
        self.crcs.len() < self.slots as usize
    }
}

impl Placement {
    /// Chunks that are in the slab.
    fn placed(&self) -> u32 {
        let placed: usize = self.runs.iter().map(|run| run.crcs.len()).sum();
        u32::try_from(placed).unwrap_or(u32::MAX)
    }
}

/// Chunks of a page that a range covers whole.
fn whole_chunks(at: &PageAt) -> Range<u32> {
    let stop = at.offset_bytes + at.len_bytes;
    at.offset_bytes.div_ceil(CHUNK_BYTES)..stop / CHUNK_BYTES
}

impl<D: Disk> Engine<D> {
    /// Brings the next whole chunks to the slab; `false` if others should have a turn before the rest.
    pub(super) fn place(
        &mut self,
        at: &PageAt,
        data: &[u8],
        placement: &mut Placement,
    ) -> Result<bool, StoreError> {
        let chunks = whole_chunks(at);
        let from = chunks.start + placement.placed();
        let turn = (self.options.turn_bytes / u64::from(CHUNK_BYTES)).max(1);
        for (chunk, turn) in (from..chunks.end).zip((0..turn).rev()) {
            let start = (chunk * CHUNK_BYTES - at.offset_bytes) as usize;
            let bytes = &data[start..start + CHUNK_BYTES as usize];
            self.place_chunk(at, chunk..chunks.end, bytes, placement)?;
            if turn == 0 && chunk + 1 < chunks.end {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Writes the first of the chunks that are left.
    fn place_chunk(
        &mut self,
        at: &PageAt,
        left: Range<u32>,
        bytes: &[u8],
        placement: &mut Placement,
    ) -> Result<(), StoreError> {
        if !placement.runs.back().is_some_and(Run::has_room) {
            placement.runs.push_back(self.reserve(at, left)?);
        }
        let Some(run) = placement.runs.back_mut() else {
            return Ok(());
        };
        let slot = u64::from(run.slot) + run.crcs.len() as u64;
        let crcs = std::array::from_fn(|i| crc32fast::hash(&bytes[i * SUB..(i + 1) * SUB]));
        let pos = slot * u64::from(CHUNK_BYTES);
        self.disk
            .write_at(DiskFile::Slab, pos, &[IoSlice::new(bytes)])
            .map_err(|e| self.write_failed("slab write", e))?;
        run.crcs.push(crcs);
        Ok(())
    }

    /// Takes slots for the next chunks, as many as one record can name.
    fn reserve(&mut self, at: &PageAt, left: Range<u32>) -> Result<Run, StoreError> {
        let slots = (left.end - left.start).min(POINTER_CHUNKS as u32);
        self.claim_space(u64::from(slots) * u64::from(CHUNK_BYTES))?;
        let slot = self.tables.slots.allocate(slots);
        let (volume, page) = (at.volume, at.page);
        let chunk = chunk_of(left.start * CHUNK_BYTES);
        Ok(Run {
            at: ChunkAt {
                volume,
                page,
                chunk,
            },
            slot: slot.ok_or(StoreError::NoSpace)?,
            slots,
            crcs: Vec::with_capacity(slots as usize),
        })
    }

    /// Logs where the chunks are that begin with this one, and that what they replace is gone.
    pub(super) fn log_placed(
        &mut self,
        first: ChunkAt,
        epoch: Epoch,
        placement: &mut Placement,
    ) -> Result<(), StoreError> {
        let Some(run) = placement.runs.pop_front_if(|run| run.at == first) else {
            return Ok(());
        };
        let replaced = self.replaced(&run);
        let Run {
            at,
            slot,
            slots,
            crcs,
        } = run;
        let epoch = epoch.0;
        let change = Change::Pointer {
            at,
            slot,
            epoch,
            era: None,
            crcs,
        };
        if let Err(error) = self.commit(&change, &[]) {
            self.release_slots(slot, slots);
            return Err(error);
        }
        let mask = ALL;
        replaced
            .into_iter()
            .try_for_each(|(at, slot)| self.commit(&Change::Forget { at, slot, mask }, &[]))
    }

    /// Versions of earlier eras, with their slots, that no view sees once the run is logged.
    fn replaced(&self, run: &Run) -> Vec<(ChunkAt, u32)> {
        let chunks = (run.at.chunk..).take(run.crcs.len());
        let replaced = chunks.filter_map(|chunk| {
            let at = ChunkAt { chunk, ..run.at };
            let open = self.open_version(at)?;
            (open.era < self.current_era(at.volume)).then_some((at, open.slot))
        });
        replaced.collect()
    }

    /// Gives back what a write took that will not be logged.
    pub fn give_up(&mut self, placement: &mut Placement) {
        for run in placement.runs.drain(..) {
            self.release_slots(run.slot, run.slots);
        }
    }

    fn release_slots(&mut self, slot: u32, slots: u32) {
        (slot..slot + slots).for_each(|slot| self.tables.slots.release(slot, true));
    }
}
