//! The catalog: volumes of the store with their eras, snapshots and parents.
//!
//! Format: postcard (varint) of a sequence of volumes, each {volume, era, deleted, sequence of
//! (snapshot, era)}. Since format version 2 of the store a second sequence follows, of those
//! volumes that were rolled back or cloned, each {volume, sequence of turns (era, the one that it
//! follows), routing epoch of the last rollback, optional parent (volume, snapshot)}. A third sequence,
//! which older catalogs lack, has the spans that had begun and not ended, each {volume, id}. The
//! superblock has the length of all and its CRC-32.

use super::line::Turn;
use super::types::Parent;
use crate::id::{SnapshotId, VolumeId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Entry of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CatalogVolume {
    pub(super) volume: VolumeId,
    pub(super) era: u32,
    pub(super) deleted: bool,
    pub(super) snapshots: Vec<(SnapshotId, u32)>,
}

/// Where the views of a volume come from besides its own eras in a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CatalogHistory {
    pub(super) volume: VolumeId,
    pub(super) turns: Vec<Turn>,
    pub(super) rolled_back: u32,
    pub(super) parent: Option<Parent>,
}

/// Everything in it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Catalog {
    pub(super) volumes: Vec<CatalogVolume>,
    pub(super) histories: Vec<CatalogHistory>,
    /// Spans that had begun and not ended, by volume and id.
    pub(super) spans: Vec<(VolumeId, u64)>,
}

/// Writes the catalog.
pub(super) fn encode(catalog: &Catalog) -> Result<Vec<u8>, postcard::Error> {
    postcard::to_stdvec(&(&catalog.volumes, &catalog.histories, &catalog.spans))
}

/// Reads the catalog; its checksum was verified by the caller.
pub(super) fn decode(bytes: &[u8]) -> Result<Catalog, postcard::Error> {
    let (volumes, rest) = postcard::take_from_bytes(bytes)?;
    let (histories, rest) = next_sequence(rest)?;
    let (spans, _) = next_sequence(rest)?;
    Ok(Catalog {
        volumes,
        histories,
        spans,
    })
}

/// A sequence that older catalogs end before.
fn next_sequence<T: DeserializeOwned>(bytes: &[u8]) -> Result<(Vec<T>, &[u8]), postcard::Error> {
    match bytes {
        [] => Ok((Vec::new(), bytes)),
        bytes => postcard::take_from_bytes(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volumes() -> Vec<CatalogVolume> {
        vec![CatalogVolume {
            volume: VolumeId(300),
            era: 3,
            deleted: false,
            snapshots: vec![(SnapshotId(1), 0), (SnapshotId(200), 2)],
        }]
    }

    #[test]
    fn the_format_of_version_1_is_read() {
        let golden = include_bytes!("../../../tests/golden/catalog-v1.bin");
        let catalog = Catalog {
            volumes: volumes(),
            ..Catalog::default()
        };
        assert_eq!(decode(golden).unwrap(), catalog);
    }

    /// A volume that was rolled back and is a clone, and the spans that are given.
    fn with_history(spans: Vec<(VolumeId, u64)>) -> Catalog {
        let parent = Parent {
            volume: VolumeId(5),
            snapshot: SnapshotId(6),
        };
        Catalog {
            volumes: volumes(),
            histories: vec![CatalogHistory {
                volume: VolumeId(300),
                turns: vec![Turn { era: 3, to: 0 }],
                rolled_back: 260,
                parent: Some(parent),
            }],
            spans,
        }
    }

    #[test]
    fn the_format_of_version_2_is_read() {
        let golden = include_bytes!("../../../tests/golden/catalog-v2.bin");
        assert_eq!(decode(golden).unwrap(), with_history(Vec::new()));
    }

    #[test]
    fn the_format_is_the_golden_file() {
        let catalog = with_history(vec![(VolumeId(300), u64::MAX), (VolumeId(301), 5)]);
        let golden = include_bytes!("../../../tests/golden/catalog-v3.bin");
        assert_eq!(encode(&catalog).unwrap(), golden);
        assert_eq!(decode(golden).unwrap(), catalog);
    }
}
