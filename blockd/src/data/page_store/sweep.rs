//! Freeing what only a deleted snapshot held.
//!
//! A version that no snapshot and no head sees directly is merged with the next newer one: either
//! its sub-blocks that the newer lacks are copied up, or the newer's are copied down over it,
//! whichever moves fewer bytes. One record does the whole merge, so a crash leaves it done or undone.

use super::engine::{Engine, Fetched, Step};
use super::error::StoreError;
use super::read::SUB;
use super::record::{ChunkAt, DataKind, RECORD_BYTES_MAX};
use super::tables::{Volume, group_at};
use super::version::Version;
use super::write::CopyUp;
use crate::id::VolumeId;
use crate::io::disk::Disk;

/// Two neighbouring versions of a chunk of which nobody sees the older one.
struct Unseen {
    at: ChunkAt,
    newer: Version,
    older: Version,
}

impl Unseen {
    /// Sub-blocks of the older version that still count.
    fn missing(&self) -> u16 {
        self.older.present & !self.newer.present
    }

    /// True if copying the older version's part up moves less than copying the newer's down.
    fn is_up(&self) -> bool {
        (self.missing() & self.older.data()).count_ones() <= self.newer.data().count_ones()
    }
}

impl<D: Disk> Engine<D> {
    /// Merges one unseen version of a group; `Done(false)` says that there was none left.
    pub fn sweep_group(
        &mut self,
        volume: VolumeId,
        key: u64,
        fetched: &[Fetched],
    ) -> Result<Step<bool>, StoreError> {
        self.check_writable()?;
        let found = self.tables.volumes.get(&volume.0).filter(|v| !v.deleted);
        let Some(unseen) = found.and_then(|v| first_unseen(v, volume, key)) else {
            return Ok(Step::Done(false));
        };
        let mut cold = Vec::new();
        let (copy, drop) = self.plan_merge(&unseen, fetched, &mut cold)?;
        if !cold.is_empty() {
            return Ok(Step::Cold(cold));
        }
        if !self.has_room(RECORD_BYTES_MAX as u64) {
            return Ok(Step::Full);
        }
        if copy.mask != 0 {
            self.claim_space(u64::from(copy.mask.count_ones()) * SUB as u64)?;
        }
        self.log_copy(unseen.at, &copy, DataKind::Merge { drop })?;
        Ok(Step::Done(true))
    }

    fn plan_merge(
        &self,
        unseen: &Unseen,
        fetched: &[Fetched],
        cold: &mut Vec<super::engine::ColdRead>,
    ) -> Result<(CopyUp, u32), StoreError> {
        let Unseen { at, newer, older } = unseen;
        let (keep, from, want) = if unseen.is_up() {
            (newer, older, unseen.missing())
        } else {
            (older, newer, newer.present)
        };
        let copy = self.read_copy_up(
            *at,
            keep.slot,
            std::slice::from_ref(from),
            want,
            fetched,
            cold,
        )?;
        Ok((copy, from.slot))
    }
}

fn first_unseen(volume: &Volume, id: VolumeId, key: u64) -> Option<Unseen> {
    let versions = volume.groups.get(&key)?.all();
    let pair = versions
        .windows(2)
        .find(|pair| pair[0].chunk == pair[1].chunk && !volume.is_seen(pair[1].era, pair[0].era))?;
    let first = group_at(id, key);
    let at = ChunkAt {
        chunk: first.chunk + u16::from(pair[0].chunk),
        ..first
    };
    Some(Unseen {
        at,
        newer: pair[0].clone(),
        older: pair[1].clone(),
    })
}
