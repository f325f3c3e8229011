//! What one chunk holds in one era, and how versions overlay each other.
//!
//! Invariants of the versions of one chunk, newest first:
//! - eras fall strictly; a view reads those on its line (`line`), the newest first;
//! - `zero` and `copied` are subsets of `present`;
//! - a copied sub-block is what the older versions of the line decide it to be, or the parent of a
//!   clone, or zeros where none does;
//! - on a line at most two are partial layers over each other: a partial version lies over a version
//!   that is closed (`present` is all ones), or is the oldest, or lacks only what all over it have.

use crate::id::{CHUNK_BYTES, SUB_BLOCK_BYTES};
use std::collections::BTreeMap;

/// Sub-blocks of a chunk.
pub(super) const SUBS: usize = (CHUNK_BYTES / SUB_BLOCK_BYTES) as usize;
/// Mask of all sub-blocks.
pub(super) const ALL: u16 = u16::MAX;
/// Chunks of a group, the unit of the table.
pub(super) const GROUP_CHUNKS: u16 = 64;

/// One version of one chunk. The size counts: one for every 64 KiB allocated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Version {
    /// CRC-32 of each sub-block that is present and not zero; 0 elsewhere.
    pub(super) crcs: [u32; SUBS],
    /// Place of the data in the slab.
    pub(super) slot: u32,
    /// Era of the volume in which the version began.
    pub(super) era: u32,
    /// Sub-blocks that this version decides.
    pub(super) present: u16,
    /// Sub-blocks that it decides to be zeros.
    pub(super) zero: u16,
    /// Sub-blocks that were not written in its era but copied up from older versions.
    pub(super) copied: u16,
    /// Chunk in its group.
    pub(super) chunk: u8,
}

const _: () = assert!(
    size_of::<Version>() == 80,
    "96 bytes a chunk is the memory budget"
);

impl Version {
    /// A version that decides nothing yet.
    pub(super) fn empty(slot: u32, era: u32, chunk: u8) -> Self {
        Self {
            crcs: [0; SUBS],
            slot,
            era,
            present: 0,
            zero: 0,
            copied: 0,
            chunk,
        }
    }

    /// Sub-blocks with stored bytes.
    pub(super) fn data(&self) -> u16 {
        self.present & !self.zero
    }

    /// Sub-blocks that were written in its era.
    pub(super) fn own(&self) -> u16 {
        self.present & !self.copied
    }

    /// Copied sub-blocks once the next older version has been merged with this one.
    pub(super) fn copied_with(&self, older: &Version) -> u16 {
        (self.copied & !older.own()) | (older.copied & !self.present)
    }

    /// Decides nothing any more about sub-blocks.
    pub(super) fn unset(&mut self, mask: u16) {
        self.present &= !mask;
        self.zero &= !mask;
        self.copied &= !mask;
        bits(mask).for_each(|sub| self.crcs[sub] = 0);
    }

    /// Puts content into sub-blocks, as written: bytes for `mask`, zeros for `zero`.
    pub(super) fn set(&mut self, mask: u16, zero: u16, crcs: &[u32; SUBS]) {
        self.present |= mask | zero;
        self.zero = (self.zero | zero) & !mask;
        self.copied &= !(mask | zero);
        for sub in bits(mask | zero) {
            self.crcs[sub] = if mask >> sub & 1 == 1 { crcs[sub] } else { 0 };
        }
    }
}

/// Set bits of a mask, lowest first.
pub(super) fn bits(mask: u16) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let bit = rest.trailing_zeros() as usize;
        rest &= rest.wrapping_sub(1);
        (bit < SUBS).then_some(bit)
    })
}

/// Versions of one chunk from which on they have a vector of their own: putting one in moves no
/// other chunk's.
const LONG: usize = 8;

/// The versions of up to 64 neighbouring chunks of a page.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    /// Of the chunks with few versions: by chunk, then newest first.
    versions: Vec<Version>,
    /// Of the chunks with many: newest first. Empty in most groups.
    long: BTreeMap<u8, Vec<Version>>,
    /// Highest epoch that wrote here.
    pub(super) epoch: u32,
}

impl Group {
    /// True if no chunk has a version.
    pub(super) fn is_empty(&self) -> bool {
        self.versions.is_empty() && self.long.is_empty()
    }

    /// The versions of each chunk, newest first.
    pub(super) fn chains(&self) -> impl Iterator<Item = &[Version]> {
        let short = self.versions.chunk_by(|a, b| a.chunk == b.chunk);
        short.chain(self.long.values().map(Vec::as_slice))
    }

    /// All versions of all chunks.
    pub(super) fn all(&self) -> impl Iterator<Item = &Version> {
        self.chains().flatten()
    }

    /// Versions of one chunk, newest first.
    pub(super) fn chunk(&self, chunk: u8) -> &[Version] {
        match self.long.get(&chunk) {
            Some(long) => long,
            None => {
                let (start, end) = self.range(chunk);
                &self.versions[start..end]
            }
        }
    }

    fn chunk_mut(&mut self, chunk: u8) -> &mut [Version] {
        let (start, end) = self.range(chunk);
        let long = self.long.get_mut(&chunk);
        long.map_or(&mut self.versions[start..end], Vec::as_mut_slice)
    }

    /// The version of a chunk that lies in a slot.
    pub(super) fn slot_mut(&mut self, chunk: u8, slot: u32) -> Option<&mut Version> {
        self.chunk_mut(chunk).iter_mut().find(|v| v.slot == slot)
    }

    /// The version of a chunk that began in an era.
    pub(super) fn era_mut(&mut self, chunk: u8, era: u32) -> Option<&mut Version> {
        let versions = self.chunk_mut(chunk);
        let index = versions.partition_point(|v| era < v.era);
        versions.get_mut(index).filter(|v| v.era == era)
    }

    /// Adds a version at its place. Grows in small steps: memory is the budget, not time.
    pub(super) fn insert(&mut self, version: Version) {
        let chunk = version.chunk;
        let newer = self.chunk(chunk).partition_point(|v| version.era < v.era);
        if let Some(long) = self.long.get_mut(&chunk) {
            return long.insert(newer, version);
        }
        let (start, end) = self.range(chunk);
        if self.versions.len() == self.versions.capacity() {
            self.versions
                .reserve_exact((self.versions.len() / 4).clamp(1, 8));
        }
        self.versions.insert(start + newer, version);
        if LONG <= end - start {
            let chain = self.versions.drain(start..=end).collect();
            self.long.insert(chunk, chain);
        }
    }

    /// Takes a version out.
    pub(super) fn remove(&mut self, chunk: u8, slot: u32) -> Option<Version> {
        let index = self.chunk(chunk).iter().position(|v| v.slot == slot)?;
        let Some(long) = self.long.get_mut(&chunk) else {
            let start = self.range(chunk).0;
            return Some(self.versions.remove(start + index));
        };
        let removed = long.remove(index);
        if long.len() <= LONG / 2 {
            self.shorten(chunk);
        }
        Some(removed)
    }

    /// Puts the versions of a chunk, few again, back to those of the others.
    fn shorten(&mut self, chunk: u8) {
        let chain = self.long.remove(&chunk).unwrap_or_default();
        let start = self.range(chunk).0;
        self.versions.splice(start..start, chain);
    }

    /// Where the versions of a chunk with few of them are.
    fn range(&self, chunk: u8) -> (usize, usize) {
        let start = self.versions.partition_point(|v| v.chunk < chunk);
        let same = |v: &&Version| v.chunk == chunk;
        (
            start,
            start + self.versions[start..].iter().take_while(same).count(),
        )
    }

    /// Bytes of memory behind the vectors.
    pub(super) fn heap_bytes(&self) -> usize {
        let long = self.long.values().map(Vec::capacity);
        let versions = self.versions.capacity() + long.sum::<usize>();
        versions * size_of::<Version>()
    }
}

/// For each sub-block of `want`: the first of the versions that decides it, if any does.
pub(super) fn resolve<'v>(
    versions: impl Iterator<Item = &'v Version>,
    want: u16,
) -> [Option<&'v Version>; SUBS] {
    let mut found = [None; SUBS];
    let mut rest = want;
    for version in versions {
        for sub in bits(version.present & rest) {
            found[sub] = Some(version);
        }
        rest &= !version.present;
        if rest == 0 {
            break;
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(slot: u32, era: u32, present: u16, zero: u16) -> Version {
        Version {
            crcs: [slot; SUBS],
            slot,
            era,
            present,
            zero,
            copied: 0,
            chunk: 3,
        }
    }

    #[test]
    fn versions_stay_sorted_by_chunk_then_newest_first() {
        let mut group = Group::default();
        for (slot, era, chunk) in [(1, 1, 3), (2, 5, 3), (3, 2, 1), (4, 3, 3), (5, 9, 7)] {
            group.insert(Version {
                chunk,
                ..version(slot, era, 1, 0)
            });
        }
        assert_eq!(
            group.chunk(3).iter().map(|v| v.slot).collect::<Vec<_>>(),
            [2, 4, 1]
        );
        assert_eq!(group.remove(3, 4).map(|v| v.era), Some(3));
        for era in 10..30 {
            group.insert(version(era, era, 1, 0));
        }
        assert_eq!((group.chunk(3).len(), group.chunk(7).len()), (22, 1));
        assert!(group.chunk(3).is_sorted_by(|a, b| b.era < a.era));
        for era in 10..30 {
            assert_eq!(group.remove(3, era).map(|v| v.slot), Some(era));
        }
        assert!(group.long.is_empty());
        let order = |v: &Version| (v.chunk, v.slot);
        assert_eq!(
            group.all().map(order).collect::<Vec<_>>(),
            [(1, 3), (3, 2), (3, 1), (7, 5)]
        );
        assert_eq!(group.chunk(3).len(), 2);
        assert!(group.chunk(2).is_empty());
    }

    #[test]
    fn a_merge_keeps_what_was_written_apart_from_what_was_copied() {
        let older = Version {
            copied: 0b0011,
            ..version(1, 2, 0b0111, 0)
        };
        let newer = Version {
            copied: 0b1101,
            ..version(2, 5, 0b1101, 0)
        };
        // Copied twice; copied once; written below, copied above; never below.
        assert_eq!(newer.copied_with(&older), 0b1011);
        let written = version(2, 5, 0b1101, 0);
        assert_eq!(written.copied_with(&older), 0b0010);
    }

    #[test]
    fn a_reader_sees_the_newest_version_of_its_era_and_falls_through() {
        let versions = [
            version(3, 7, 0b001, 0),
            version(2, 4, 0b011, 0b010),
            version(1, 0, 0b111, 0),
        ];
        let slots = |era| {
            let found = resolve(versions.iter().filter(|v| v.era <= era), 0b1111);
            [0, 1, 2, 3].map(|i: usize| found[i].map(|v| v.slot))
        };
        assert_eq!(slots(u32::MAX), [Some(3), Some(2), Some(1), None]);
        assert_eq!(slots(6), [Some(2), Some(2), Some(1), None]);
        assert_eq!(slots(3), [Some(1), Some(1), Some(1), None]);
    }
}
