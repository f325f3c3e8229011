//! Reading: which place holds each sub-block, and getting the bytes from there.

use super::buffers::BUFFER_BYTES;
use super::engine::{ColdRead, Engine, Fetched, Step, chunk_of};
use super::error::StoreError;
use super::line::Line;
use super::record::ChunkAt;
use super::tables::Tables;
use super::types::{PageAt, ReadPart};
use super::version::{SUBS, Version, bits, resolve};
use super::volume::Volume;
use crate::id::{CHUNK_BYTES, PageNo, SUB_BLOCK_BYTES, SnapshotId, VolumeId};
use crate::io::disk::{Disk, DiskFile};
use crate::planted::{Plant, planted};
use bytes::Bytes;

/// Bytes of a sub-block, for slices.
pub(super) const SUB: usize = SUB_BLOCK_BYTES as usize;

/// Where the bytes of one sub-block are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Zeros, stored nowhere.
    Hole,
    /// In a file, with this checksum.
    Stored { file: DiskFile, pos: u64, crc: u32 },
}

impl Source {
    /// The checksum of what is stored.
    pub(super) fn crc(&self) -> Option<u32> {
        match self {
            Source::Hole => None,
            Source::Stored { crc, .. } => Some(*crc),
        }
    }
}

/// First sub-block of a run of sources, to name a bad one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Origin {
    pub(super) volume: VolumeId,
    pub(super) page: PageNo,
    pub(super) sub: u32,
}

impl Tables {
    /// Source of a sub-block that this version decides.
    pub(super) fn source_in(&self, version: &Version, sub: usize) -> Source {
        if version.zero >> sub & 1 == 1 {
            return Source::Hole;
        }
        let crc = version.crcs[sub];
        match self.dirty_pos(version.slot, sub) {
            Some(pos) => Source::Stored {
                file: DiskFile::Log,
                pos,
                crc,
            },
            None => {
                let pos = u64::from(version.slot) * u64::from(CHUNK_BYTES) + (sub * SUB) as u64;
                Source::Stored {
                    file: DiskFile::Slab,
                    pos,
                    crc,
                }
            }
        }
    }

    /// What a volume was cloned from: the volume, and the line of the snapshot.
    pub(super) fn parent_of(&self, volume: &Volume) -> Option<(&Volume, Line<'_>)> {
        let parent = volume.parent?;
        let found = self.volumes.get(&parent.volume.0).filter(|v| !v.deleted)?;
        Some((found, found.view(Some(parent.snapshot))?))
    }

    /// Sources of the wanted sub-blocks as these versions, newest first, decide them; holes elsewhere.
    pub(super) fn sources_in<'v>(
        &self,
        versions: impl Iterator<Item = &'v Version>,
        want: u16,
    ) -> [Source; SUBS] {
        let found = resolve(versions, want);
        std::array::from_fn(|sub| found[sub].map_or(Source::Hole, |v| self.source_in(v, sub)))
    }

    /// The same, of a clone: what they do not decide comes from its parent.
    pub(super) fn sources_of<'v>(
        &self,
        volume: &Volume,
        at: ChunkAt,
        versions: impl Iterator<Item = &'v Version>,
        want: u16,
    ) -> [Source; SUBS] {
        let Some((parent, line)) = self.parent_of(volume) else {
            return self.sources_in(versions, want);
        };
        let found = resolve(versions, want);
        let open = bits(want).filter(|sub| found[*sub].is_none());
        let open = open.fold(0, |mask, sub| mask | 1 << sub);
        let mut sources = [Source::Hole; SUBS];
        if open != 0 {
            let below = line.of(parent.chunk(at.page, at.chunk));
            sources = self.sources_of(parent, at, below, open);
        }
        for sub in 0..SUBS {
            if let Some(version) = found[sub] {
                sources[sub] = self.source_in(version, sub);
            }
        }
        sources
    }

    /// Sources of the wanted sub-blocks of a chunk as a view sees them.
    pub(super) fn sources(
        &self,
        (volume, line): (&Volume, Line<'_>),
        at: ChunkAt,
        want: u16,
    ) -> [Source; SUBS] {
        let versions = line.of(volume.chunk(at.page, at.chunk));
        self.sources_of(volume, at, versions, want)
    }
}

/// Mask of the sub-blocks `from..to` of a chunk.
pub(super) fn sub_mask(from: usize, to: usize) -> u16 {
    (from..to).fold(0, |mask, sub| mask | 1 << sub)
}

impl<D: Disk> Engine<D> {
    /// Reads a range of a page. Fetched bytes of an earlier attempt are used where they still count.
    pub fn read(
        &self,
        at: PageAt,
        snapshot: Option<SnapshotId>,
        fetched: &[Fetched],
    ) -> Result<Step<Vec<ReadPart>>, StoreError> {
        Self::check_range(&at)?;
        let Some(view) = self.view(at.volume, snapshot)? else {
            return Ok(Step::Done(hole(at.len_bytes)));
        };
        if at.len_bytes == 0 {
            return Ok(Step::Done(Vec::new()));
        }
        let first = at.offset_bytes / SUB_BLOCK_BYTES;
        let end = (at.offset_bytes + at.len_bytes).div_ceil(SUB_BLOCK_BYTES);
        if end - first == 1 {
            return self.read_one(at, view, fetched);
        }
        let sources = self.range_sources(at, view);
        let (start, stop) = (
            at.offset_bytes as usize,
            (at.offset_bytes + at.len_bytes) as usize,
        );
        let mut parts = Vec::new();
        let mut cold = Vec::new();
        let mut index = 0;
        while index < sources.len() {
            let run = piece_len(&sources[index..]);
            let piece = &sources[index..index + run];
            let from = (first as usize + index) * SUB;
            let (skip, end) = (start.saturating_sub(from), (run * SUB).min(stop - from));
            if piece[0] == Source::Hole {
                parts.push(ReadPart::Hole(u32::try_from(end - skip).unwrap_or(0)));
            } else {
                let origin = Origin {
                    volume: at.volume,
                    page: at.page,
                    sub: first + u32::try_from(index).unwrap_or(0),
                };
                let data = self.gather_data(piece, origin, fetched, &mut cold)?;
                parts.push(ReadPart::Data(data.slice(skip..end)));
            }
            index += run;
        }
        Ok(if cold.is_empty() {
            Step::Done(parts)
        } else {
            Step::Cold(cold)
        })
    }

    /// The bytes of sources that are all stored.
    fn gather_data(
        &self,
        sources: &[Source],
        origin: Origin,
        fetched: &[Fetched],
        cold: &mut Vec<ColdRead>,
    ) -> Result<Bytes, StoreError> {
        let len_bytes = sources.len() * SUB;
        if len_bytes <= BUFFER_BYTES / 2 {
            let mut buf = vec![0; len_bytes];
            self.gather(sources, origin, &mut buf, fetched, cold)?;
            return Ok(buf.into());
        }
        let mut buffer = self.buffers.take(len_bytes);
        self.gather(sources, origin, buffer.as_mut(), fetched, cold)?;
        Ok(buffer.freeze())
    }

    /// The common case: a range within one sub-block.
    fn read_one(
        &self,
        at: PageAt,
        view: (&Volume, Line<'_>),
        fetched: &[Fetched],
    ) -> Result<Step<Vec<ReadPart>>, StoreError> {
        let sub = at.offset_bytes / SUB_BLOCK_BYTES;
        let source = self.sub_source(at, sub, view);
        if source == Source::Hole {
            return Ok(Step::Done(hole(at.len_bytes)));
        }
        let mut buf = vec![0; SUB];
        let mut cold = Vec::new();
        let origin = Origin {
            volume: at.volume,
            page: at.page,
            sub,
        };
        self.gather(&[source], origin, &mut buf, fetched, &mut cold)?;
        if !cold.is_empty() {
            return Ok(Step::Cold(cold));
        }
        let skip = at.offset_bytes as usize % SUB;
        let data = Bytes::from(buf);
        let whole = at.len_bytes as usize == SUB;
        let data = if whole {
            data
        } else {
            data.slice(skip..skip + at.len_bytes as usize)
        };
        Ok(Step::Done(vec![ReadPart::Data(data)]))
    }

    /// Source of one sub-block of a page.
    pub(super) fn sub_source(&self, at: PageAt, sub: u32, view: (&Volume, Line<'_>)) -> Source {
        let (in_chunk, mut view) = (sub as usize % SUBS, Some(view));
        while let Some((volume, line)) = view {
            let versions = volume.chunk(at.page, chunk_of(sub * SUB_BLOCK_BYTES));
            let mut seen = line.of(versions);
            if let Some(version) = seen.find(|v| v.present >> in_chunk & 1 == 1) {
                return self.tables.source_in(version, in_chunk);
            }
            view = self.tables.parent_of(volume);
        }
        Source::Hole
    }

    /// Source of one sub-block of a page as the head sees it.
    pub(super) fn head_source(&self, at: PageAt, sub: u32) -> Source {
        let volume = self.tables.volumes.get(&at.volume.0);
        volume.map_or(Source::Hole, |v| self.sub_source(at, sub, (v, v.head())))
    }

    /// Sources of all sub-blocks that a range touches.
    pub(super) fn range_sources(&self, at: PageAt, view: (&Volume, Line<'_>)) -> Vec<Source> {
        let first = (at.offset_bytes / SUB_BLOCK_BYTES) as usize;
        let end = (at.offset_bytes + at.len_bytes).div_ceil(SUB_BLOCK_BYTES) as usize;
        let mut sources = Vec::with_capacity(end.saturating_sub(first));
        let mut sub = first;
        while sub < end {
            let from = sub % SUBS;
            let to = SUBS.min(from + end - sub);
            let in_chunk = ChunkAt {
                volume: at.volume,
                page: at.page,
                chunk: u16::try_from(sub / SUBS).unwrap_or(u16::MAX),
            };
            let chunk = self.tables.sources(view, in_chunk, sub_mask(from, to));
            sources.extend_from_slice(&chunk[from..to]);
            sub += to - from;
        }
        sources
    }

    /// Fills `buf` from the sources, verified; adds what would block to `cold`.
    pub(super) fn gather(
        &self,
        sources: &[Source],
        origin: Origin,
        buf: &mut [u8],
        fetched: &[Fetched],
        cold: &mut Vec<ColdRead>,
    ) -> Result<(), StoreError> {
        let mut index = 0;
        while index < sources.len() {
            let Source::Stored { file, pos, .. } = sources[index] else {
                index += 1;
                continue;
            };
            let run = run_len(&sources[index..], file, pos);
            let part = &mut buf[index * SUB..(index + run) * SUB];
            let read = ColdRead {
                file,
                pos,
                len_bytes: part.len(),
            };
            match self.get(read, part, fetched) {
                Err(_) if planted(Plant::UnreadableIsZero) => part.fill(0),
                Ok(false) => push_cold(cold, read),
                got => {
                    got?;
                    self.verify(&sources[index..index + run], read, part, origin, index)?;
                }
            }
            index += run;
        }
        Ok(())
    }

    /// Bytes of a range as the device has them, unverified: for repair by hand when nothing else is left.
    pub fn salvage(&self, at: PageAt, snapshot: Option<SnapshotId>) -> Result<Vec<u8>, StoreError> {
        Self::check_range(&at)?;
        let mut buf = Vec::new();
        let Some(view) = self.view(at.volume, snapshot)? else {
            return Ok(vec![0; at.len_bytes as usize]);
        };
        for source in self.range_sources(at, view) {
            let from = buf.len();
            buf.resize(from + SUB, 0);
            if let Source::Stored { file, pos, .. } = source {
                self.disk
                    .read_at(file, pos, &mut buf[from..])
                    .map_err(|e| StoreError::read(file, e))?;
            }
        }
        buf.drain(..at.offset_bytes as usize % SUB);
        buf.truncate(at.len_bytes as usize);
        Ok(buf)
    }

    fn get(
        &self,
        read: ColdRead,
        part: &mut [u8],
        fetched: &[Fetched],
    ) -> Result<bool, StoreError> {
        if let Some(bytes) = fetched.iter().find_map(|found| found.part(read)) {
            part.copy_from_slice(bytes);
            return Ok(true);
        }
        self.disk
            .try_read_at(read.file, read.pos, part)
            .map_err(|e| StoreError::read(read.file, e))
    }

    /// Checks every sub-block. Fetched bytes may be older than the tables: a mismatch is read again.
    fn verify(
        &self,
        sources: &[Source],
        read: ColdRead,
        part: &mut [u8],
        origin: Origin,
        index: usize,
    ) -> Result<(), StoreError> {
        let bad = |part: &[u8]| {
            let mut subs = sources.iter().zip(part.chunks(SUB));
            subs.position(|(source, bytes)| {
                matches!(source, Source::Stored { crc, .. } if crc32fast::hash(bytes) != *crc)
            })
        };
        if bad(part).is_none() || planted(Plant::SkipChecksum) {
            return Ok(());
        }
        self.disk
            .read_at(read.file, read.pos, part)
            .map_err(|e| StoreError::read(read.file, e))?;
        let Some(sub) = bad(part) else { return Ok(()) };
        let offset_bytes = (origin.sub + u32::try_from(index + sub).unwrap_or(0)) * SUB_BLOCK_BYTES;
        Err(StoreError::BadSubBlock {
            volume: origin.volume,
            page: origin.page,
            offset_bytes,
        })
    }

    /// Runs of allocated and unallocated bytes of a range.
    pub fn extents(
        &self,
        at: PageAt,
        snapshot: Option<SnapshotId>,
    ) -> Result<Vec<(u32, bool)>, StoreError> {
        Self::check_range(&at)?;
        let Some(view) = self.view(at.volume, snapshot)? else {
            return Ok(vec![(at.len_bytes, false)]);
        };
        let mut runs: Vec<(u32, bool)> = Vec::new();
        let (mut pos, end) = (at.offset_bytes, at.offset_bytes + at.len_bytes);
        for source in self.range_sources(at, view) {
            let next = ((pos / SUB_BLOCK_BYTES + 1) * SUB_BLOCK_BYTES).min(end);
            let allocated = source != Source::Hole;
            match runs.last_mut() {
                Some((len, kind)) if *kind == allocated => *len += next - pos,
                _ => runs.push((next - pos, allocated)),
            }
            pos = next;
        }
        Ok(runs)
    }
}

fn hole(len_bytes: u32) -> Vec<ReadPart> {
    if len_bytes == 0 {
        Vec::new()
    } else {
        vec![ReadPart::Hole(len_bytes)]
    }
}

/// Sub-blocks from the first on that make one part of an answer: holes, or data that fits a buffer.
fn piece_len(sources: &[Source]) -> usize {
    let is_hole = sources.first() == Some(&Source::Hole);
    let same = |source: &&Source| (**source == Source::Hole) == is_hole;
    let most = if is_hole {
        sources.len()
    } else {
        BUFFER_BYTES / SUB
    };
    sources.iter().take(most).take_while(same).count()
}

/// Adds a read, to the last one if it goes on there.
fn push_cold(cold: &mut Vec<ColdRead>, read: ColdRead) {
    match cold.last_mut() {
        Some(last) if last.file == read.file && last.pos + last.len_bytes as u64 == read.pos => {
            last.len_bytes += read.len_bytes;
        }
        _ => cold.push(read),
    }
}

/// Sub-blocks from the first on that follow each other in one file.
fn run_len(sources: &[Source], in_file: DiskFile, start: u64) -> usize {
    let follows = |(index, source): &(u64, &Source)| matches!(source, Source::Stored { file, pos, .. } if *file == in_file && *pos == start + index * SUB as u64);
    (0u64..).zip(sources).take_while(follows).count()
}
