//! Layers: in which era the content of each sub-block was written, and so what changed between two
//! views of a page.
//!
//! The tables tell it by sub-blocks of 4 KiB. A sub-block that was written or zeroed in an era
//! counts as changed in it, whatever bytes it has now; what was only copied between versions does
//! not. Merging versions that nobody sees loses no change that a remaining view could ask for: no
//! view lies between their eras.
//!
//! Invariant: what differs between two views is changed; the converse need not hold.

use super::engine::{Engine, chunk_of};
use super::error::StoreError;
use super::tables::Volume;
use super::types::PageAt;
use super::version::{ALL, SUBS, Version, bits};
use crate::id::{CHUNK_BYTES, LayerRun, SUB_BLOCK_BYTES, SnapshotId};
use crate::io::disk::Disk;

/// What one view of a chunk is made of.
struct ChunkLayers {
    /// Era in which each sub-block was written; `None` if it never was.
    written: [Option<u32>; SUBS],
    /// Sub-blocks with stored bytes.
    data: u16,
}

impl ChunkLayers {
    /// `versions` are those of the chunk, newest first.
    fn of(versions: &[Version], era: u32) -> ChunkLayers {
        let (mut undecided, mut unwritten) = (ALL, ALL);
        let (mut written, mut data) = ([None; SUBS], 0);
        for version in &versions[newer_than(versions, era)..] {
            data |= version.data() & undecided;
            undecided &= !version.present;
            for sub in bits(version.own() & unwritten) {
                written[sub] = Some(version.era);
            }
            unwritten &= !version.own();
            if unwritten == 0 {
                break;
            }
        }
        ChunkLayers { written, data }
    }
}

/// How many of the versions, newest first, are of a later era.
fn newer_than(versions: &[Version], era: u32) -> usize {
    versions.partition_point(|version| era < version.era)
}

/// Sub-blocks that were written between two views.
fn changed(versions: &[Version], one: u32, other: u32) -> u16 {
    let (from, to) = (one.max(other), one.min(other));
    versions[newer_than(versions, from)..newer_than(versions, to)]
        .iter()
        .fold(0, |mask, version| mask | version.own())
}

impl Volume {
    /// Layers from the view of `era` down to where something was written: 1 is what was written
    /// since the newest snapshot older than the view.
    fn depth(&self, era: u32, written: u32) -> u32 {
        let older = |era| self.snapshots.partition_point(|(_, last)| *last < era);
        u32::try_from(1 + older(era).saturating_sub(older(written))).unwrap_or(u32::MAX)
    }
}

impl<D: Disk> Engine<D> {
    /// Layers of a range as `snapshot` (`None`: the head) sees it, exact to 4 KiB, neighbours merged.
    ///
    /// `changed` compares with the snapshot `since`, older or newer; without one, with an empty
    /// volume.
    pub fn layers(
        &self,
        at: PageAt,
        snapshot: Option<SnapshotId>,
        since: Option<SnapshotId>,
    ) -> Result<Vec<LayerRun>, StoreError> {
        Self::check_range(&at)?;
        let since = match since {
            Some(_) => self.view(at.volume, since)?.map(|(_, era)| era),
            None => None,
        };
        let view = self.view(at.volume, snapshot)?;
        let mut runs = Vec::new();
        let (mut next, end) = (at.offset_bytes, at.offset_bytes + at.len_bytes);
        while next < end {
            let absent = view.map_or(end - next, |(volume, _)| volume.absent_bytes(at.page, next));
            let absent = absent.min(end - next);
            let chunk_end = ((next / CHUNK_BYTES + 1) * CHUNK_BYTES).min(end);
            next = match view {
                Some((volume, era)) if absent == 0 => {
                    chunk_runs(volume, &at, (next, chunk_end), era, since, &mut runs);
                    chunk_end
                }
                _ => {
                    LayerRun::unallocated(u64::from(absent)).append_to(&mut runs);
                    next + absent
                }
            };
        }
        Ok(runs)
    }
}

/// Adds the runs of the bytes `range` of a page, which lie in one chunk.
fn chunk_runs(
    volume: &Volume,
    at: &PageAt,
    range: (u32, u32),
    era: u32,
    since: Option<u32>,
    runs: &mut Vec<LayerRun>,
) {
    let (mut next, end) = range;
    let versions = volume.chunk(at.page, chunk_of(next));
    if versions.is_empty() {
        return LayerRun::unallocated(u64::from(end - next)).append_to(runs);
    }
    let layers = ChunkLayers::of(versions, era);
    let changed = since.map_or(layers.data, |since| changed(versions, era, since));
    while next < end {
        let sub_end = ((next / SUB_BLOCK_BYTES + 1) * SUB_BLOCK_BYTES).min(end);
        let sub = (next % CHUNK_BYTES / SUB_BLOCK_BYTES) as usize;
        let run = LayerRun {
            len_bytes: u64::from(sub_end - next),
            depth: layers.written[sub].map_or(0, |written| volume.depth(era, written)),
            hole: layers.data >> sub & 1 == 0,
            changed: changed >> sub & 1 == 1,
        };
        run.append_to(runs);
        next = sub_end;
    }
}
