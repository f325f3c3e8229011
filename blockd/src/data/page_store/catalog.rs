//! The catalog: volumes of the store with their eras and snapshots.
//!
//! Format: postcard (varint) of a sequence of volumes, each {volume, era, deleted, sequence of
//! (snapshot, era)}. The superblock has its length and CRC-32.

use crate::id::{SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};

/// Entry of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct CatalogVolume {
    pub(super) volume: VolumeId,
    pub(super) era: u32,
    pub(super) deleted: bool,
    pub(super) snapshots: Vec<(SnapshotId, u32)>,
}

/// Writes the catalog.
pub(super) fn encode(volumes: &[CatalogVolume]) -> Result<Vec<u8>, postcard::Error> {
    postcard::to_stdvec(volumes)
}

/// Reads the catalog; its checksum was verified by the caller.
pub(super) fn decode(bytes: &[u8]) -> Result<Vec<CatalogVolume>, postcard::Error> {
    postcard::from_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_the_golden_file() {
        let volumes = [CatalogVolume {
            volume: VolumeId(300),
            era: 3,
            deleted: false,
            snapshots: vec![(SnapshotId(1), 0), (SnapshotId(200), 2)],
        }];
        let golden = include_bytes!("../../../tests/golden/catalog-v1.bin");
        assert_eq!(encode(&volumes).unwrap(), golden);
        assert_eq!(decode(golden).unwrap(), volumes);
    }
}
