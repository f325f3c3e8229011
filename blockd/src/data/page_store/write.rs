//! Writing: read what is needed first, then log everything of the request without a pause.
//!
//! A write is planned per chunk. Whole chunks go to fresh slots (`place`) and are logged as pointers;
//! the rest is logged with its data. Partly covered sub-blocks are completed from what the head reads. A chunk
//! whose newest version belongs to a snapshot gets a new version with only the touched sub-blocks; if
//! that would be the third partial layer, the middle one is closed first (copy-up).

use super::engine::{ColdRead, Engine, Fetched, Step, chunk_of};
use super::error::StoreError;
use super::place::Placement;
use super::read::{Origin, SUB, Source, sub_mask};
use super::record::{Change, ChunkAt, DataKind, RECORD_BYTES_MAX};
use super::types::PageAt;
use super::version::{ALL, GROUP_CHUNKS, SUBS, Version, bits};
use super::volume::group_key;
use crate::id::{CHUNK_BYTES, Epoch, SUB_BLOCK_BYTES};
use crate::io::disk::Disk;

/// A sub-block made of old and new bytes.
struct Edge {
    sub: u32,
    bytes: Box<[u8; SUB]>,
}

/// Content to copy up into the newest version of a chunk.
pub(super) struct CopyUp {
    pub(super) slot: u32,
    pub(super) mask: u16,
    pub(super) zero: u16,
    pub(super) crcs: [u32; SUBS],
    pub(super) buf: Vec<u8>,
}

/// What a request needs before it can be logged.
#[derive(Default)]
struct Plan {
    edges: Vec<Edge>,
    copy_ups: Vec<(ChunkAt, CopyUp)>,
    cold: Vec<ColdRead>,
    /// Bytes of the log.
    log_bytes: u64,
    /// Bytes of the slab that may have to be allocated.
    slab_bytes: u64,
}

/// The part of a request that lies in one chunk, in sub-blocks of the page.
struct Piece {
    at: ChunkAt,
    first: u32,
    end: u32,
}

pub(super) fn group_of(at: ChunkAt) -> u64 {
    group_key(at.page, at.chunk / GROUP_CHUNKS)
}

impl Piece {
    fn mask(&self) -> u16 {
        let from = self.first as usize % SUBS;
        sub_mask(from, from + (self.end - self.first) as usize)
    }

    /// True if new data covers the whole chunk, so that it is in a fresh slot as it is.
    fn is_whole(&self, edges: &[Edge]) -> bool {
        let has_edge = edges
            .iter()
            .any(|e| (self.first..self.end).contains(&e.sub));
        self.end - self.first == CHUNK_BYTES / SUB_BLOCK_BYTES && !has_edge
    }
}

/// Pieces of the sub-blocks `first..end` of a page.
fn pieces(at: &PageAt, first: u32, end: u32) -> impl Iterator<Item = Piece> + use<> {
    let (volume, page) = (at.volume, at.page);
    let subs = CHUNK_BYTES / SUB_BLOCK_BYTES;
    let mut next = first;
    std::iter::from_fn(move || {
        let first = next;
        next = ((first / subs + 1) * subs).min(end);
        let chunk = chunk_of(first * SUB_BLOCK_BYTES);
        (first < end).then_some(Piece {
            at: ChunkAt {
                volume,
                page,
                chunk,
            },
            first,
            end: next,
        })
    })
}

impl<D: Disk> Engine<D> {
    /// Writes a range of a page; `data` has its length. The placement is of this write alone, empty at
    /// first; after an error it is empty again.
    pub fn write(
        &mut self,
        at: PageAt,
        data: &[u8],
        epoch: Epoch,
        placement: &mut Placement,
        fetched: &[Fetched],
    ) -> Result<Step<()>, StoreError> {
        let step = self.try_write(at, data, epoch, placement, fetched);
        if step.is_err() {
            self.give_up(placement);
        }
        step
    }

    fn try_write(
        &mut self,
        at: PageAt,
        data: &[u8],
        epoch: Epoch,
        placement: &mut Placement,
        fetched: &[Fetched],
    ) -> Result<Step<()>, StoreError> {
        self.check_writable()?;
        Self::check_range(&at)?;
        self.check_volume(at.volume)?;
        if data.len() != at.len_bytes as usize {
            let problem = "the data has another length";
            return Err(StoreError::BadRequest {
                offset_bytes: at.offset_bytes,
                len_bytes: at.len_bytes,
                problem,
            });
        }
        if !self.begin_era(at.volume)? {
            return Ok(Step::Full);
        }
        if !self.place(&at, data, placement)? {
            return Ok(Step::More);
        }
        let plan = self.plan_write(&at, data, fetched)?;
        if !plan.cold.is_empty() {
            return Ok(Step::Cold(plan.cold));
        }
        if !self.has_room(plan.log_bytes) {
            return Ok(Step::Full);
        }
        self.claim_space(plan.slab_bytes)?;
        self.log_copy_ups(&plan)?;
        self.log_pieces(&at, data, epoch, &plan, placement)?;
        Ok(Step::Done(()))
    }

    fn plan_write(
        &self,
        at: &PageAt,
        data: &[u8],
        fetched: &[Fetched],
    ) -> Result<Plan, StoreError> {
        let (start, stop) = (at.offset_bytes, at.offset_bytes + at.len_bytes);
        let mut plan = Plan::default();
        let (first, end) = (start / SUB_BLOCK_BYTES, stop.div_ceil(SUB_BLOCK_BYTES));
        for sub in [first, end.saturating_sub(1)] {
            let (from, to) = (
                (sub * SUB_BLOCK_BYTES).max(start),
                ((sub + 1) * SUB_BLOCK_BYTES).min(stop),
            );
            let is_partial = from < to && to - from < SUB_BLOCK_BYTES;
            if is_partial && plan.edges.last().is_none_or(|e| e.sub != sub) {
                let new = &data[(from - start) as usize..(to - start) as usize];
                let offset = (from - sub * SUB_BLOCK_BYTES) as usize;
                let edge = self.edge(at, sub, offset, new, fetched, &mut plan.cold)?;
                plan.edges.push(edge);
            }
        }
        for piece in pieces(at, first, end) {
            if piece.is_whole(&plan.edges) {
                plan.log_bytes += 192;
                continue;
            }
            plan.log_bytes += 128 + u64::from(piece.end - piece.first) * SUB as u64;
            let new = piece.mask() & !self.stored_in_place(piece.at);
            plan.slab_bytes += u64::from(new.count_ones()) * SUB as u64;
            self.plan_copy_up(&piece, fetched, &mut plan)?;
        }
        Ok(plan)
    }

    fn versions(&self, at: ChunkAt) -> &[Version] {
        self.tables
            .volumes
            .get(&at.volume.0)
            .map_or(&[], |v| v.chunk(at.page, at.chunk))
    }

    /// The version of a chunk that takes what is written now.
    pub(super) fn open_version(&self, at: ChunkAt) -> Option<&Version> {
        let volume = self.tables.volumes.get(&at.volume.0)?;
        let newest = volume.chunk(at.page, at.chunk).first();
        newest.filter(|newest| volume.is_open(newest))
    }

    /// Sub-blocks that a write would overwrite where they are.
    fn stored_in_place(&self, at: ChunkAt) -> u16 {
        self.open_version(at).map_or(0, Version::data)
    }

    /// A sub-block with `new` laid over its old bytes at `offset`.
    fn edge(
        &self,
        at: &PageAt,
        sub: u32,
        offset: usize,
        new: &[u8],
        fetched: &[Fetched],
        cold: &mut Vec<ColdRead>,
    ) -> Result<Edge, StoreError> {
        let mut bytes = Box::new([0; SUB]);
        let source = self.head_source(*at, sub);
        let origin = Origin {
            volume: at.volume,
            page: at.page,
            sub,
        };
        self.gather(&[source], origin, &mut bytes[..], fetched, cold)?;
        bytes[offset..offset + new.len()].copy_from_slice(new);
        Ok(Edge { sub, bytes })
    }

    /// Reads what must be copied up before the chunk may get another partial version.
    fn plan_copy_up(
        &self,
        piece: &Piece,
        fetched: &[Fetched],
        plan: &mut Plan,
    ) -> Result<(), StoreError> {
        let Some(volume) = self.tables.volumes.get(&piece.at.volume.0) else {
            return Ok(());
        };
        let mut older = volume.head().of(self.versions(piece.at));
        let Some(newest) = older.next() else {
            return Ok(());
        };
        let stays_partial =
            !volume.is_open(newest) && newest.present != ALL && older.next().is_some();
        if !stays_partial || piece.mask() == ALL {
            return Ok(());
        }
        let want = !newest.present;
        let older = volume.head().of(self.versions(piece.at)).skip(1);
        let sources = self.tables.sources_of(volume, piece.at, older, want);
        let cold = &mut plan.cold;
        let copy = self.read_copy_up(piece.at, newest.slot, &sources, want, fetched, cold)?;
        plan.log_bytes += RECORD_BYTES_MAX as u64;
        plan.slab_bytes += u64::from(copy.mask.count_ones()) * SUB as u64;
        plan.copy_ups.push((piece.at, copy));
        Ok(())
    }

    /// Reads the wanted sub-blocks from their sources, for the version in `slot`.
    pub(super) fn read_copy_up(
        &self,
        at: ChunkAt,
        slot: u32,
        sources: &[Source; SUBS],
        want: u16,
        fetched: &[Fetched],
        cold: &mut Vec<ColdRead>,
    ) -> Result<CopyUp, StoreError> {
        let mut buf = vec![0; CHUNK_BYTES as usize];
        let sub = u32::from(at.chunk) * (CHUNK_BYTES / SUB_BLOCK_BYTES);
        let origin = Origin {
            volume: at.volume,
            page: at.page,
            sub,
        };
        self.gather(sources, origin, &mut buf, fetched, cold)?;
        let (mut mask, mut crcs) = (0, [0; SUBS]);
        for (sub, source) in sources.iter().enumerate() {
            if let Source::Stored { crc, .. } = source {
                mask |= 1 << sub;
                crcs[sub] = *crc;
            }
        }
        Ok(CopyUp {
            slot,
            mask,
            zero: want & !mask,
            crcs,
            buf,
        })
    }

    fn log_copy_ups(&mut self, plan: &Plan) -> Result<(), StoreError> {
        plan.copy_ups
            .iter()
            .try_for_each(|(at, copy)| self.log_copy(*at, copy, DataKind::Fill))
    }

    /// Logs content that was copied between versions.
    pub(super) fn log_copy(
        &mut self,
        at: ChunkAt,
        copy: &CopyUp,
        kind: DataKind,
    ) -> Result<(), StoreError> {
        let parts: Vec<&[u8]> = bits(copy.mask)
            .map(|sub| &copy.buf[sub * SUB..(sub + 1) * SUB])
            .collect();
        let (slot, mask, zero, crcs) = (copy.slot, copy.mask, copy.zero, copy.crcs);
        let change = Change::Data {
            kind,
            at,
            slot,
            mask,
            zero,
            epoch: 0,
            crcs,
        };
        *self.copied_up.entry(at.volume.0).or_default() += (parts.len() * SUB) as u64;
        self.commit(&change, &parts)
    }

    fn log_pieces(
        &mut self,
        at: &PageAt,
        data: &[u8],
        epoch: Epoch,
        plan: &Plan,
        placement: &mut Placement,
    ) -> Result<(), StoreError> {
        let (start, stop) = (at.offset_bytes, at.offset_bytes + at.len_bytes);
        let (first, end) = (start / SUB_BLOCK_BYTES, stop.div_ceil(SUB_BLOCK_BYTES));
        for piece in pieces(at, first, end) {
            self.end_era(at.volume, group_of(piece.at));
            self.note_turned(piece.at);
            if piece.is_whole(&plan.edges) {
                self.log_placed(piece.at, epoch, placement)?;
                continue;
            }
            let sub_bytes = |sub: u32| -> &[u8] {
                let from = (sub * SUB_BLOCK_BYTES).wrapping_sub(start) as usize;
                match plan.edges.iter().find(|edge| edge.sub == sub) {
                    Some(edge) => &edge.bytes[..],
                    None => &data[from..from + SUB],
                }
            };
            self.log_put(&piece, epoch, sub_bytes)?;
        }
        Ok(())
    }

    /// Slot that a put goes to: that of the newest version if no snapshot sees it, or a new one.
    fn put_slot(&mut self, at: ChunkAt) -> Result<(u32, bool), StoreError> {
        if let Some(open) = self.open_version(at) {
            return Ok((open.slot, false));
        }
        let new = self.tables.slots.allocate(1);
        Ok((new.ok_or(StoreError::NoSpace)?, true))
    }

    fn log_put<'a>(
        &mut self,
        piece: &Piece,
        epoch: Epoch,
        bytes: impl Fn(u32) -> &'a [u8],
    ) -> Result<(), StoreError> {
        let mut crcs = [0; SUBS];
        let mut parts = [&[][..]; SUBS];
        let mut count = 0;
        for sub in piece.first..piece.end {
            let part = bytes(sub);
            crcs[sub as usize % SUBS] = crc32fast::hash(part);
            parts[count] = part;
            count += 1;
        }
        self.log_content(piece.at, piece.mask(), 0, epoch, crcs, &parts[..count])
    }

    /// Logs new content of the head: bytes for `mask`, zeros for `zero`.
    fn log_content(
        &mut self,
        at: ChunkAt,
        mask: u16,
        zero: u16,
        epoch: Epoch,
        crcs: [u32; SUBS],
        parts: &[&[u8]],
    ) -> Result<(), StoreError> {
        let (slot, is_new) = self.put_slot(at)?;
        let change = Change::Data {
            kind: DataKind::Put,
            at,
            slot,
            mask,
            zero,
            epoch: epoch.0,
            crcs,
        };
        let committed = self.commit(&change, parts);
        if committed.is_err() && is_new {
            self.tables.slots.release(slot, true);
        }
        committed
    }

    /// Makes a range read as zeros and frees its space.
    pub fn zero(
        &mut self,
        at: PageAt,
        epoch: Epoch,
        fetched: &[Fetched],
    ) -> Result<Step<()>, StoreError> {
        self.check_writable()?;
        Self::check_range(&at)?;
        self.check_volume(at.volume)?;
        let (start, stop) = (at.offset_bytes, at.offset_bytes + at.len_bytes);
        let (first, end) = (start.div_ceil(SUB_BLOCK_BYTES), stop / SUB_BLOCK_BYTES);
        if end < first {
            return self.zero_edge(at, start, stop, epoch, fetched);
        }
        for (from, to) in [
            (start, first * SUB_BLOCK_BYTES),
            (end * SUB_BLOCK_BYTES, stop),
        ] {
            match self.zero_edge(at, from, to, epoch, fetched)? {
                Step::Done(()) => {}
                step => return Ok(step),
            }
        }
        for piece in pieces(&at, first, end) {
            match self.zero_piece(&piece, epoch, fetched)? {
                Step::Done(()) => {}
                step => return Ok(step),
            }
        }
        Ok(Step::Done(()))
    }

    /// Zeros part of one sub-block by writing it, unless it is a hole.
    fn zero_edge(
        &mut self,
        at: PageAt,
        from: u32,
        to: u32,
        epoch: Epoch,
        fetched: &[Fetched],
    ) -> Result<Step<()>, StoreError> {
        if to <= from || self.head_source(at, from / SUB_BLOCK_BYTES) == Source::Hole {
            return Ok(Step::Done(()));
        }
        let zeros = [0; SUB];
        let edge = PageAt {
            offset_bytes: from,
            len_bytes: to - from,
            ..at
        };
        let zeros = &zeros[..(to - from) as usize];
        self.write(edge, zeros, epoch, &mut Placement::default(), fetched)
    }

    fn zero_piece(
        &mut self,
        piece: &Piece,
        epoch: Epoch,
        fetched: &[Fetched],
    ) -> Result<Step<()>, StoreError> {
        let volume = self.tables.volumes.get(&piece.at.volume.0);
        let is_hole = volume.is_none_or(|volume| {
            self.data_mask((volume, volume.head()), piece.at, piece.mask()) == 0
        });
        if is_hole {
            return Ok(Step::Done(()));
        }
        if !self.begin_era(piece.at.volume)? {
            return Ok(Step::Full);
        }
        let mut plan = Plan {
            log_bytes: 128,
            ..Plan::default()
        };
        self.plan_copy_up(piece, fetched, &mut plan)?;
        if !plan.cold.is_empty() {
            return Ok(Step::Cold(plan.cold));
        }
        if !self.has_room(plan.log_bytes) {
            return Ok(Step::Full);
        }
        if !plan.copy_ups.is_empty() {
            self.claim_space(plan.slab_bytes)?;
            self.log_copy_ups(&plan)?;
        }
        self.end_era(piece.at.volume, group_of(piece.at));
        self.note_turned(piece.at);
        self.log_content(piece.at, 0, piece.mask(), epoch, [0; SUBS], &[])?;
        Ok(Step::Done(()))
    }
}
