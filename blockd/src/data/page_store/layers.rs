//! Layers: in which era the content of each sub-block was written, and so what changed between two
//! views of a page.
//!
//! The tables tell it by sub-blocks of 4 KiB. A sub-block that was written or zeroed in an era
//! counts as changed in it, whatever bytes it has now; what was only copied between versions does
//! not. Merging versions that nobody sees loses no change that a remaining view could ask for: no
//! view lies between their eras. After a rollback two views may be on different branches; what
//! differs between them was written on either, since the branches parted. A clone differs from its
//! snapshots by its own versions; what it has from its parent they share.
//!
//! Invariant: what differs between two views is changed; the converse need not hold.

use super::engine::{Engine, chunk_of};
use super::error::StoreError;
use super::line::Line;
use super::record::ChunkAt;
use super::types::PageAt;
use super::version::{ALL, SUBS, Version, bits};
use super::volume::Volume;
use crate::id::{CHUNK_BYTES, LayerRun, SUB_BLOCK_BYTES, SnapshotId};
use crate::io::disk::Disk;

/// What one view of a chunk is made of.
struct ChunkLayers {
    /// Layers down to where each sub-block was written; 0 if it never was.
    depth: [u32; SUBS],
    /// Sub-blocks with stored bytes.
    data: u16,
}

impl ChunkLayers {
    const NOTHING: ChunkLayers = ChunkLayers {
        depth: [0; SUBS],
        data: 0,
    };
}

/// Sub-blocks that were written in eras that one of two views sees and the other does not.
fn changed(versions: &[Version], one: Line<'_>, other: Line<'_>) -> u16 {
    let (mut one, mut other) = (one.of(versions), other.of(versions));
    let (mut a, mut b) = (one.next(), other.next());
    let mut mask = 0;
    loop {
        match (a, b) {
            (None, None) => return mask,
            (Some(x), Some(y)) if x.era == y.era => {
                if one.is_at(&other) {
                    return mask;
                }
                (a, b) = (one.next(), other.next());
            }
            (x, Some(y)) if x.is_none_or(|x| x.era < y.era) => {
                mask |= y.own();
                b = other.next();
            }
            (x, _) => {
                mask |= x.map_or(0, Version::own);
                a = one.next();
            }
        }
    }
}

impl Volume {
    /// Snapshots older than the view of the line, back to those that see the era.
    fn snapshots_since(&self, line: Line<'_>, era: u32) -> u32 {
        let mut count = 0;
        for (first, last) in line.stretches() {
            let end = if last == line.era() { last } else { last + 1 };
            count += self.snapshots_between(first.max(era), end).len();
            if first <= era {
                break;
            }
        }
        u32::try_from(count).unwrap_or(u32::MAX)
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
            Some(_) => self.view(at.volume, since)?.map(|(_, line)| line),
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
                Some(view) if absent == 0 => {
                    self.chunk_runs(view, &at, (next, chunk_end), since, &mut runs);
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

    /// Layers of a chunk; those of its parent are under all of a clone's own.
    fn chunk_layers(&self, (volume, line): (&Volume, Line<'_>), at: ChunkAt) -> ChunkLayers {
        let (mut undecided, mut unwritten) = (ALL, ALL);
        let mut layers = ChunkLayers::NOTHING;
        for version in line.of(volume.chunk(at.page, at.chunk)) {
            layers.data |= version.data() & undecided;
            undecided &= !version.present;
            let written = version.own() & unwritten;
            if written != 0 {
                let depth = 1 + volume.snapshots_since(line, version.era);
                bits(written).for_each(|sub| layers.depth[sub] = depth);
            }
            unwritten &= !written;
            if unwritten == 0 {
                return layers;
            }
        }
        if let Some(parent) = self.tables.parent_of(volume) {
            let below = self.chunk_layers(parent, at);
            let above = 1 + volume.snapshots_since(line, 0);
            layers.data |= below.data & undecided;
            for sub in bits(unwritten).filter(|sub| below.depth[*sub] != 0) {
                layers.depth[sub] = above + below.depth[sub];
            }
        }
        layers
    }

    /// Adds the runs of the bytes `range` of a page, which lie in one chunk.
    fn chunk_runs(
        &self,
        view: (&Volume, Line<'_>),
        at: &PageAt,
        range: (u32, u32),
        since: Option<Line<'_>>,
        runs: &mut Vec<LayerRun>,
    ) {
        let (mut next, end) = range;
        let in_chunk = ChunkAt {
            volume: at.volume,
            page: at.page,
            chunk: chunk_of(next),
        };
        let versions = view.0.chunk(in_chunk.page, in_chunk.chunk);
        if versions.is_empty() && view.0.parent.is_none() {
            return LayerRun::unallocated(u64::from(end - next)).append_to(runs);
        }
        let layers = self.chunk_layers(view, in_chunk);
        let changed = since.map_or(layers.data, |since| changed(versions, view.1, since));
        while next < end {
            let sub_end = ((next / SUB_BLOCK_BYTES + 1) * SUB_BLOCK_BYTES).min(end);
            let sub = (next % CHUNK_BYTES / SUB_BLOCK_BYTES) as usize;
            let run = LayerRun {
                len_bytes: u64::from(sub_end - next),
                depth: layers.depth[sub],
                hole: layers.data >> sub & 1 == 0,
                changed: changed >> sub & 1 == 1,
            };
            run.append_to(runs);
            next = sub_end;
        }
    }
}
