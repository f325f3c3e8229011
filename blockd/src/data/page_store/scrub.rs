//! Verifying what is stored: every sub-block of every version against its checksum, on the device.
//!
//! A [`StoredChunk`] says where the sub-blocks of one version lie. It is read elsewhere, by a thread
//! that may block, while the tables go on. So a mismatch is damage only if the tables still say the
//! same after it was read; otherwise it was replaced meanwhile and has to be looked at again.

use super::engine::Engine;
use super::finding::DamagedRange;
use super::read::{SUB, Source};
use super::record::ChunkAt;
use super::tables::Tables;
use super::version::{SUBS, Version, bits};
use super::volume::{Volume, group_at};
use crate::id::{CHUNK_BYTES, SUB_BLOCK_BYTES, ScrubPosition, VolumeId};
use crate::io::disk::{Disk, DiskFile};

/// Groups whose keys are looked up at once.
const GROUPS_AT_ONCE: usize = 16;

/// Where the sub-blocks of one version of a chunk lie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredChunk {
    at: ChunkAt,
    slot: u32,
    /// Sub-block, file, position and checksum.
    subs: Vec<(u8, DiskFile, u64, u32)>,
}

/// What a step of a scrub came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Bytes that were verified.
    pub bytes: u64,
    pub damaged: Vec<DamagedRange>,
    /// Where to go on; `None` behind the last version.
    pub next: Option<ScrubPosition>,
}

/// Sub-blocks of a chunk that are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadChunk {
    chunk: StoredChunk,
    mask: u16,
}

/// A buffer of one chunk whose start fits reads past the page cache.
pub struct ChunkBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl Default for ChunkBuffer {
    fn default() -> Self {
        let bytes = vec![0; CHUNK_BYTES as usize + SUB];
        let start = bytes.as_ptr().align_offset(SUB).min(SUB);
        ChunkBuffer { bytes, start }
    }
}

impl ChunkBuffer {
    fn slice(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + len]
    }
}

impl BadChunk {
    /// The chunk as it was looked at.
    #[must_use]
    pub fn chunk(&self) -> &StoredChunk {
        &self.chunk
    }
}

impl StoredChunk {
    /// Bytes to read.
    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        self.subs.len() as u64 * u64::from(SUB_BLOCK_BYTES)
    }

    /// Where the slab must reach to.
    pub(super) fn slab_end(&self) -> u64 {
        let in_slab = self.subs.iter().filter(|s| s.1 == DiskFile::Slab);
        in_slab.map(|s| s.2 + SUB as u64).max().unwrap_or(0)
    }

    /// Reads it from the device; what does not verify. Blocks.
    pub fn verify<D: Disk + ?Sized>(&self, disk: &D, buffer: &mut ChunkBuffer) -> Option<BadChunk> {
        let mut mask = 0;
        let follows = |a: &(u8, DiskFile, u64, u32), b: &(u8, DiskFile, u64, u32)| {
            a.1 == b.1 && a.2 + SUB as u64 == b.2
        };
        for run in self.subs.chunk_by(follows) {
            let buf = buffer.slice(run.len() * SUB);
            let is_read = disk.read_from_device(run[0].1, run[0].2, buf).is_ok();
            for ((sub, file, pos, crc), bytes) in run.iter().zip(buf.chunks_mut(SUB)) {
                let readable = is_read || disk.read_from_device(*file, *pos, bytes).is_ok();
                if !readable || crc32fast::hash(bytes) != *crc {
                    mask |= 1 << sub;
                }
            }
        }
        let chunk = || BadChunk {
            chunk: self.clone(),
            mask,
        };
        (mask != 0).then(chunk)
    }
}

impl Tables {
    /// Where the bytes of a version are.
    pub(super) fn stored(&self, at: ChunkAt, version: &Version) -> StoredChunk {
        let subs = bits(version.data()).filter_map(|sub| match self.source_in(version, sub) {
            Source::Stored { file, pos, crc } => Some((u8::try_from(sub).ok()?, file, pos, crc)),
            Source::Hole => None,
        });
        StoredChunk {
            at,
            slot: version.slot,
            subs: subs.collect(),
        }
    }

    /// The damaged ranges of a chunk, as the tables are now; nothing of what was replaced since.
    pub(super) fn damage(&self, bad: &BadChunk) -> Vec<DamagedRange> {
        let at = bad.chunk.at;
        let Some(volume) = self.volumes.get(&at.volume.0) else {
            return Vec::new();
        };
        let versions = volume.chunk(at.page, at.chunk);
        let Some(version) = versions.iter().find(|v| v.slot == bad.chunk.slot) else {
            return Vec::new();
        };
        let now = self.stored(at, version);
        let mut ranges: Vec<DamagedRange> = Vec::new();
        for stored in now.subs.iter().filter(|s| bad.mask >> s.0 & 1 == 1) {
            if !bad.chunk.subs.contains(stored) {
                continue;
            }
            let range = damaged_sub(volume, versions, at, version.slot, stored);
            match ranges.last_mut() {
                Some(last) if last.goes_on_in(&range) => last.len_bytes += range.len_bytes,
                _ => ranges.push(range),
            }
        }
        ranges
    }
}

fn damaged_sub(
    volume: &Volume,
    versions: &[Version],
    at: ChunkAt,
    slot: u32,
    &(sub, file, pos, _): &(u8, DiskFile, u64, u32),
) -> DamagedRange {
    let decides = |era: u32| {
        let mut seen = volume.line(era).of(versions);
        let decider = seen.find(|v| v.present >> sub & 1 == 1);
        decider.is_some_and(|v| v.slot == slot)
    };
    let snapshots = volume.snapshots().iter().filter(|(_, era)| decides(*era));
    DamagedRange {
        volume: at.volume,
        page: at.page,
        offset_bytes: u32::from(at.chunk) * CHUNK_BYTES + u32::from(sub) * SUB_BLOCK_BYTES,
        len_bytes: SUB_BLOCK_BYTES,
        head: decides(u32::MAX),
        snapshots: snapshots.map(|(id, _)| *id).collect(),
        file: file.name().to_owned(),
        file_offset_bytes: pos,
    }
}

impl<D: Disk> Engine<D> {
    /// The next versions of a volume from a position on, of about so many bytes, and where to go on;
    /// `None` behind the last one.
    pub fn scrub_batch(
        &self,
        id: VolumeId,
        from: ScrubPosition,
        bytes_max: u64,
    ) -> (Vec<StoredChunk>, Option<ScrubPosition>) {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        let Some(volume) = self.tables.volumes.get(&id.0) else {
            return (batch, None);
        };
        let (keys, more) = next_groups(volume, from.group);
        for key in &keys {
            let first = group_at(id, *key);
            for version in volume.groups[key].all() {
                let here = (version.chunk, std::cmp::Reverse(version.era));
                if *key == from.group && here < (from.chunk, std::cmp::Reverse(from.era)) {
                    continue;
                }
                if bytes_max <= bytes {
                    let next = ScrubPosition {
                        group: *key,
                        chunk: version.chunk,
                        era: version.era,
                    };
                    return (batch, Some(next));
                }
                let chunk = first.chunk + u16::from(version.chunk);
                let stored = self.tables.stored(ChunkAt { chunk, ..first }, version);
                bytes += stored.len_bytes();
                batch.push(stored);
            }
        }
        let next = keys.last().filter(|_| more).map(|last| ScrubPosition {
            group: last + 1,
            ..ScrubPosition::default()
        });
        (batch, next)
    }

    /// What of a mismatch is damage: the tables say the same as when it was read. `Err` gives what
    /// to verify again, as it has moved meanwhile.
    pub fn judge(&self, bad: &BadChunk) -> Result<Vec<DamagedRange>, StoredChunk> {
        let at = bad.chunk.at;
        let volume = self.tables.volumes.get(&at.volume.0);
        let versions = volume.map_or(&[][..], |v| v.chunk(at.page, at.chunk));
        let now = versions.iter().find(|v| v.slot == bad.chunk.slot);
        let now = now.map(|version| self.tables.stored(at, version));
        let moved = |now: &StoredChunk| now.subs.iter().any(|s| !bad.chunk.subs.contains(s));
        match now {
            Some(now) if moved(&now) => Err(now),
            _ => Ok(self.tables.damage(bad)),
        }
    }
}

/// The first keys from one on, sorted, and whether there are more.
fn next_groups(volume: &Volume, from: u64) -> (Vec<u64>, bool) {
    let mut keys: Vec<u64> = Vec::with_capacity(2 * GROUPS_AT_ONCE);
    let mut more = false;
    for key in volume.groups.keys().filter(|key| from <= **key) {
        keys.push(*key);
        if keys.len() == 2 * GROUPS_AT_ONCE {
            keys.sort_unstable();
            keys.truncate(GROUPS_AT_ONCE);
            more = true;
        }
    }
    keys.sort_unstable();
    more |= GROUPS_AT_ONCE < keys.len();
    keys.truncate(GROUPS_AT_ONCE);
    (keys, more)
}

const _: () = assert!(SUBS == 16, "a mask of sub-blocks is a u16");
