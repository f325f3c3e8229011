//! What one chunk holds in one era, and how versions overlay each other.
//!
//! Invariants of the versions of one chunk, newest first:
//! - eras fall strictly; the first is what the head reads;
//! - `zero` and `copied` are subsets of `present`;
//! - a copied sub-block is what the older versions decide it to be, or zeros where none does;
//! - at most two are partial layers over each other: a partial version lies over a version that is
//!   closed (`present` is all ones) or is the oldest.

use crate::id::{CHUNK_BYTES, SUB_BLOCK_BYTES};

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

/// The versions of up to 64 neighbouring chunks of a page.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    /// By chunk, then newest first.
    versions: Vec<Version>,
    /// Highest epoch that wrote here.
    pub(super) epoch: u32,
}

impl Group {
    /// All versions of all chunks.
    pub(super) fn all(&self) -> &[Version] {
        &self.versions
    }

    /// Versions of one chunk, newest first.
    pub(super) fn chunk(&self, chunk: u8) -> &[Version] {
        let (start, end) = self.range(chunk);
        &self.versions[start..end]
    }

    /// The version of a chunk that lies in a slot.
    pub(super) fn slot_mut(&mut self, chunk: u8, slot: u32) -> Option<&mut Version> {
        let (start, end) = self.range(chunk);
        self.versions[start..end]
            .iter_mut()
            .find(|v| v.slot == slot)
    }

    /// The version of a chunk that began in an era.
    pub(super) fn era_mut(&mut self, chunk: u8, era: u32) -> Option<&mut Version> {
        let (start, end) = self.range(chunk);
        self.versions[start..end].iter_mut().find(|v| v.era == era)
    }

    /// Adds a version at its place. Grows in small steps: memory is the budget, not time.
    pub(super) fn insert(&mut self, version: Version) {
        let (start, end) = self.range(version.chunk);
        let newer = self.versions[start..end]
            .iter()
            .take_while(|v| version.era < v.era)
            .count();
        if self.versions.len() == self.versions.capacity() {
            self.versions
                .reserve_exact((self.versions.len() / 4).clamp(1, 8));
        }
        self.versions.insert(start + newer, version);
    }

    /// Takes a version out.
    pub(super) fn remove(&mut self, chunk: u8, slot: u32) -> Option<Version> {
        let (start, end) = self.range(chunk);
        let index = self.versions[start..end]
            .iter()
            .position(|v| v.slot == slot)?;
        Some(self.versions.remove(start + index))
    }

    fn range(&self, chunk: u8) -> (usize, usize) {
        let start = self.versions.partition_point(|v| v.chunk < chunk);
        let more = self.versions[start..]
            .iter()
            .take_while(|v| v.chunk == chunk)
            .count();
        (start, start + more)
    }

    /// Bytes of memory behind the vector.
    pub(super) fn heap_bytes(&self) -> usize {
        self.versions.capacity() * size_of::<Version>()
    }
}

/// For each sub-block of `want`: the version that decides it for a reader of `era`, if any.
pub(super) fn resolve(versions: &[Version], era: u32, want: u16) -> [Option<&Version>; SUBS] {
    let mut found = [None; SUBS];
    let mut rest = want;
    for version in versions.iter().filter(|v| v.era <= era) {
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
            let found = resolve(&versions, era, 0b1111);
            [0, 1, 2, 3].map(|i: usize| found[i].map(|v| v.slot))
        };
        assert_eq!(slots(u32::MAX), [Some(3), Some(2), Some(1), None]);
        assert_eq!(slots(6), [Some(2), Some(2), Some(1), None]);
        assert_eq!(slots(3), [Some(1), Some(1), Some(1), None]);
    }
}
