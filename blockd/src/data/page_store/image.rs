//! What a store that is not in use holds: enough to rebuild the routing tables of its volumes.

use super::record::ChunkAt;
use super::tables::Tables;
use super::version::{Version, bits};
use super::volume::{Volume, group_at};
use crate::id::{Epoch, PageNo, SnapshotId, VolumeId};
use std::collections::BTreeMap;

/// A page as one store has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageImage {
    pub page: PageNo,
    /// The highest epoch that wrote to it here.
    pub epoch: Epoch,
    /// Equal only if all views of the page are equal: a digest over the checksums.
    pub digest: u32,
    /// Bytes from the start of the page to behind the last one stored in the volume itself.
    pub head_end_bytes: u32,
}

/// The tables of a store as the next start recovers them.
pub struct StoreImage {
    tables: Tables,
}

impl StoreImage {
    pub(super) fn new(tables: Tables) -> StoreImage {
        StoreImage { tables }
    }

    /// Volumes that are not deleted, in order.
    #[must_use]
    pub fn volumes(&self) -> Vec<VolumeId> {
        let known = self.tables.volumes.iter().filter(|(_, v)| !v.deleted);
        let mut ids: Vec<VolumeId> = known.map(|(id, _)| VolumeId(*id)).collect();
        ids.sort_unstable();
        ids
    }

    /// Snapshots of a volume, oldest first.
    #[must_use]
    pub fn snapshots(&self, volume: VolumeId) -> Vec<SnapshotId> {
        let found = self.tables.volumes.get(&volume.0);
        found.map_or_else(Vec::new, |v| {
            v.snapshots().iter().map(|(id, _)| *id).collect()
        })
    }

    /// Pages of a volume that have anything stored, in order.
    #[must_use]
    pub fn pages(&self, id: VolumeId) -> Vec<PageImage> {
        let Some(volume) = self.tables.volumes.get(&id.0) else {
            return Vec::new();
        };
        let mut keys: Vec<u64> = volume.groups.keys().copied().collect();
        keys.sort_unstable();
        let mut pages: BTreeMap<PageNo, (PageImage, crc32fast::Hasher)> = BTreeMap::new();
        for key in keys {
            let first = group_at(id, key);
            let (image, hasher) = pages.entry(first.page).or_insert_with(|| {
                let image = PageImage {
                    page: first.page,
                    epoch: Epoch(0),
                    digest: 0,
                    head_end_bytes: 0,
                };
                (image, crc32fast::Hasher::new())
            });
            let group = &volume.groups[&key];
            image.epoch = image.epoch.max(Epoch(group.epoch));
            let mut chains: Vec<&[Version]> = group.chains().collect();
            chains.sort_unstable_by_key(|versions| versions[0].chunk);
            for versions in chains {
                let chunk = first.chunk.saturating_add(u16::from(versions[0].chunk));
                digest_chunk(volume, ChunkAt { chunk, ..first }, versions, image, hasher);
            }
        }
        let finish = |(image, hasher): (PageImage, crc32fast::Hasher)| PageImage {
            digest: hasher.finalize(),
            ..image
        };
        pages.into_values().map(finish).collect()
    }
}

/// Adds what each view shows of a chunk; holes add nothing.
fn digest_chunk(
    volume: &Volume,
    at: ChunkAt,
    versions: &[Version],
    image: &mut PageImage,
    hasher: &mut crc32fast::Hasher,
) {
    let head = std::iter::once((SnapshotId(0), u32::MAX));
    for (view, era) in head.chain(volume.snapshots().iter().copied()) {
        let found = super::version::resolve(volume.line(era).of(versions), super::version::ALL);
        for sub in bits(super::version::ALL) {
            let Some(version) = found[sub].filter(|v| v.data() >> sub & 1 == 1) else {
                continue;
            };
            let number = u32::from(at.chunk) * 16 + u32::try_from(sub).unwrap_or(0);
            for field in [view.0, number, version.crcs[sub]] {
                hasher.update(&field.to_le_bytes());
            }
            if view == SnapshotId(0) {
                image.head_end_bytes = image.head_end_bytes.max((number + 1) * 4096);
            }
        }
    }
}
