//! Pages on their way between stores: the versions of a chunk out of one, and into another (S003-19).
//!
//! A version is placed by the history of its volume (`history`). A clone's page comes with what it has
//! in the pages of its parents, as if it had been copied up (`lineage`), so it needs none of them.
//!
//! A page that is moving in belongs to nobody here: it is taken in chunk by chunk, and a crash in
//! between leaves a part that is dropped or taken in again. Moved data counts as of epoch 0 until the
//! page is adopted, so that a scan of all stores never prefers it to the owner's.

use super::engine::{ColdRead, Engine, Fetched, Step};
use super::error::StoreError;
use super::history::EraPlace;
use super::lineage::{Below, under};
use super::read::{Origin, SUB, Source};
use super::record::{Change, ChunkAt, DataKind};
use super::version::{ALL, GROUP_CHUNKS, SUBS, Version, bits};
use super::volume::{Volume, group_at, group_key};
use crate::id::{CHUNK_BYTES, Epoch, PageNo, SUB_BLOCK_BYTES, SnapshotId, VolumeId};
use crate::io::disk::{Disk, DiskFile};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::IoSlice;

/// Bytes of data after which an export ends a piece.
const PIECE_BYTES: usize = 1 << 20;
/// Groups of the largest page.
const PAGE_GROUPS: u16 = 128;

/// One version of a chunk, without its data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedVersion {
    pub place: EraPlace,
    /// Sub-blocks that it decides; of these: zeros, and those that were copied and not written.
    pub present: u16,
    pub zero: u16,
    pub copied: u16,
    /// CRC-32 of each sub-block with data, lowest first.
    pub crcs: Vec<u32>,
}

/// Versions of a chunk, oldest first: all of them, or a piece of a long chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedChunk {
    pub page: PageNo,
    pub chunk: u16,
    /// The first piece: what the receiver has of the chunk goes first.
    pub is_first: bool,
    pub versions: Vec<MovedVersion>,
}

/// A piece of a chunk with the data of its versions, one behind the other.
#[derive(Clone, Debug)]
pub struct Exported {
    pub moved: MovedChunk,
    /// The snapshots of the volume, oldest first, by which its versions are placed.
    pub snapshots: Vec<SnapshotId>,
    pub data: Vec<u8>,
    /// Where the next piece begins; `None`: this was the last.
    pub next: Option<u32>,
}

impl Exported {
    fn add(&mut self, (moved, data): (MovedVersion, Vec<u8>)) {
        self.data.extend(data);
        self.moved.versions.push(moved);
    }
}

impl MovedVersion {
    fn data(&self) -> u16 {
        self.present & !self.zero
    }

    /// Bytes of its data.
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        self.data().count_ones() as usize * SUB
    }

    fn is_sound(&self, data: &[u8]) -> bool {
        (self.zero | self.copied) & !self.present == 0
            && self.crcs.len() == self.data().count_ones() as usize
            && data.len() == self.data_bytes()
    }
}

impl<D: Disk> Engine<D> {
    /// Chunks of a page that have versions here or in the volume's parents, in order.
    pub fn page_chunks(&self, volume: VolumeId, page: PageNo) -> BTreeSet<u16> {
        let family = self.ancestry(volume).into_iter();
        let found = family.filter_map(|id| self.tables.volumes.get(&id.0));
        let groups = found.flat_map(|found| {
            let numbers = 0..PAGE_GROUPS;
            numbers.filter_map(move |number| {
                let group = found.groups.get(&group_key(page, number))?;
                Some((number * GROUP_CHUNKS, group))
            })
        });
        groups
            .flat_map(|(first, group)| group.chains().map(move |v| first + u16::from(v[0].chunk)))
            .collect()
    }

    /// Pages that hold versions here or in the volume's parents, with the bytes of all their data.
    pub fn shown_pages(&self, volume: VolumeId) -> BTreeMap<PageNo, u64> {
        let mut pages = BTreeMap::new();
        for (page, bytes) in self
            .ancestry(volume)
            .into_iter()
            .flat_map(|v| self.held_pages(v))
        {
            *pages.entry(page).or_default() += bytes;
        }
        pages
    }

    /// A volume, what it was cloned from, and so on.
    fn ancestry(&self, volume: VolumeId) -> Vec<VolumeId> {
        let parent = |id: &VolumeId| Some(self.parent(*id)?.volume);
        std::iter::successors(Some(volume), parent).collect()
    }

    /// Pages that hold versions, with the bytes of their data, in order.
    pub fn held_pages(&self, volume: VolumeId) -> BTreeMap<PageNo, u64> {
        let mut pages = BTreeMap::new();
        let found = self.tables.volumes.get(&volume.0).filter(|v| !v.deleted);
        for (key, group) in found.into_iter().flat_map(|v| &v.groups) {
            let subs: u32 = group.all().map(|v| v.data().count_ones()).sum();
            *pages.entry(group_at(volume, *key).page).or_default() +=
                u64::from(subs) * u64::from(SUB_BLOCK_BYTES);
        }
        pages
    }

    /// The versions of a chunk of eras from `from` on, verified, up to a bounded size.
    pub fn export_chunk(
        &self,
        volume: VolumeId,
        (page, chunk): (PageNo, u16),
        from: Option<u32>,
        fetched: &[Fetched],
    ) -> Result<Step<Exported>, StoreError> {
        self.check_volume(volume)?;
        let mut exported = Exported {
            moved: MovedChunk {
                page,
                chunk,
                is_first: from.is_none(),
                versions: Vec::new(),
            },
            snapshots: self.snapshots(volume),
            data: Vec::new(),
            next: None,
        };
        let mut cold = Vec::new();
        let Some(found) = self.tables.volumes.get(&volume.0) else {
            return Ok(Step::Done(exported));
        };
        let at = ChunkAt {
            volume,
            page,
            chunk,
        };
        let versions = found.chunk(page, chunk);
        let mut below = match from {
            None => self.below(found, at),
            Some(_) => Below::default(),
        };
        if below.mask() != 0 && under(found, versions).is_none() {
            let below = std::mem::take(&mut below);
            exported.add(self.moved(found, at, None, below, fetched, &mut cold)?);
        }
        let versions = versions.iter().rev();
        for version in versions.filter(|v| from.is_none_or(|from| from <= v.era)) {
            if exported.data.len() >= PIECE_BYTES {
                exported.next = Some(version.era);
                break;
            }
            let below = std::mem::take(&mut below);
            exported.add(self.moved(found, at, Some(version), below, fetched, &mut cold)?);
        }
        Ok(match cold.is_empty() {
            true => Step::Done(exported),
            false => Step::Cold(cold),
        })
    }

    /// A version, the one under all if there is none, with what the parents of its volume decide
    /// below it; and its data.
    fn moved(
        &self,
        found: &Volume,
        at: ChunkAt,
        version: Option<&Version>,
        below: Below,
        fetched: &[Fetched],
        cold: &mut Vec<ColdRead>,
    ) -> Result<(MovedVersion, Vec<u8>), StoreError> {
        let own = version.map_or(0, Version::data);
        let mut sources = self.tables.sources_in(version.into_iter(), own);
        if let Some(parent) = self.tables.parent_of(found).filter(|_| below.data != 0) {
            let theirs = self.tables.sources(parent, at, below.data);
            bits(below.data).for_each(|sub| sources[sub] = theirs[sub]);
        }
        let moved = MovedVersion {
            place: version.map_or_else(EraPlace::default, |v| found.place(v.era)),
            present: version.map_or(0, |v| v.present) | below.mask(),
            zero: version.map_or(0, |v| v.zero) | below.zero,
            copied: version.map_or(0, |v| v.copied) | below.mask(),
            crcs: sources.iter().filter_map(Source::crc).collect(),
        };
        let data = self.stored(at, &sources, own | below.data, fetched, cold)?;
        Ok((moved, data))
    }

    /// The sub-blocks that are stored in these sources, one behind the other.
    fn stored(
        &self,
        at: ChunkAt,
        sources: &[Source; SUBS],
        want: u16,
        fetched: &[Fetched],
        cold: &mut Vec<ColdRead>,
    ) -> Result<Vec<u8>, StoreError> {
        let mut buf = vec![0; CHUNK_BYTES as usize];
        let origin = Origin {
            volume: at.volume,
            page: at.page,
            sub: u32::from(at.chunk) * (CHUNK_BYTES / SUB_BLOCK_BYTES),
        };
        self.gather(sources, origin, &mut buf, fetched, cold)?;
        if want == ALL {
            return Ok(buf);
        }
        let subs = bits(want).map(|sub| &buf[sub * SUB..(sub + 1) * SUB]);
        Ok(subs.collect::<Vec<_>>().concat())
    }

    /// Takes in one version of a chunk, behind those that came before: what was there earlier is
    /// dropped. `order` are the sender's snapshots, oldest first.
    pub fn take_in(
        &mut self,
        volume: VolumeId,
        (page, chunk): (PageNo, u16),
        order: &[SnapshotId],
        moved: &MovedVersion,
        data: &[u8],
    ) -> Result<Step<()>, StoreError> {
        self.check_writable()?;
        self.check_volume(volume)?;
        if !moved.is_sound(data) {
            return Err(bad_move(
                chunk,
                data.len(),
                "a moved version without its data",
            ));
        }
        let known = self.tables.volumes.get(&volume.0);
        let nothing = Volume::default();
        let era = known.unwrap_or(&nothing).era_at(order, moved.place);
        let unknown = "a version behind a snapshot or rollback that is unknown here";
        let era = era.ok_or_else(|| bad_move(chunk, 0, unknown))?;
        // The versions before it were placed when there may have been a snapshot between them that was
        // dropped since. No view tells their eras apart any more, but this one is still the newer.
        let before = known.and_then(|known| known.chunk(page, chunk).first());
        let era = era.max(before.map_or(0, |before| before.era));
        let at = ChunkAt {
            volume,
            page,
            chunk,
        };
        if !self.has_room(256 + data.len() as u64) {
            return Ok(Step::Full);
        }
        self.claim_space(data.len() as u64)?;
        let crcs = verified(moved, chunk, data)?;
        self.log_version(at, era, moved, crcs, data)?;
        Ok(Step::Done(()))
    }

    fn log_version(
        &mut self,
        at: ChunkAt,
        era: u32,
        moved: &MovedVersion,
        crcs: [u32; SUBS],
        data: &[u8],
    ) -> Result<(), StoreError> {
        let versions = self.tables.volumes.get(&at.volume.0);
        let mut versions = versions
            .map_or(&[][..], |v| v.chunk(at.page, at.chunk))
            .iter();
        let known = versions.find(|v| v.era == era).map(|v| (v.slot, v.own()));
        if moved.data() == ALL && moved.copied == 0 {
            return self.place_version(at, era, crcs, data);
        }
        let (slot, own) = match known {
            Some(known) => known,
            None => (self.tables.slots.allocate(1).ok_or(StoreError::NoSpace)?, 0),
        };
        let copied = moved.copied & !own;
        let change = Change::Data {
            kind: DataKind::Moved { era, copied },
            at,
            slot,
            mask: moved.data(),
            zero: moved.zero,
            epoch: 0,
            crcs,
        };
        let committed = self.commit(&change, &data.chunks(SUB).collect::<Vec<_>>());
        if committed.is_err() && known.is_none() {
            self.tables.slots.release(slot, true);
        }
        committed
    }

    /// A whole chunk goes to its slot at once.
    fn place_version(
        &mut self,
        at: ChunkAt,
        era: u32,
        crcs: [u32; SUBS],
        data: &[u8],
    ) -> Result<(), StoreError> {
        let slot = self.tables.slots.allocate(1).ok_or(StoreError::NoSpace)?;
        let pos = u64::from(slot) * u64::from(CHUNK_BYTES);
        let written = self
            .disk
            .write_at(DiskFile::Slab, pos, &[IoSlice::new(data)])
            .map_err(|e| self.write_failed("slab write", e));
        let change = Change::Pointer {
            at,
            slot,
            epoch: 0,
            era: Some(era),
            crcs: vec![crcs],
        };
        let logged = written.and_then(|()| self.commit(&change, &[]));
        if logged.is_err() {
            self.tables.slots.release(slot, true);
        }
        logged
    }

    /// Frees all versions of a chunk.
    pub fn drop_chunk(
        &mut self,
        volume: VolumeId,
        page: PageNo,
        chunk: u16,
    ) -> Result<Step<()>, StoreError> {
        self.check_writable()?;
        let at = ChunkAt {
            volume,
            page,
            chunk,
        };
        let found = self.tables.volumes.get(&volume.0).filter(|v| !v.deleted);
        if found.is_none_or(|v| v.chunk(page, chunk).is_empty()) {
            return Ok(Step::Done(()));
        }
        if !self.has_room(64) {
            return Ok(Step::Full);
        }
        self.commit(&Change::DropChunk(at), &[])?;
        Ok(Step::Done(()))
    }

    /// Frees a page with all its versions.
    pub fn drop_page(&mut self, volume: VolumeId, page: PageNo) -> Result<Step<()>, StoreError> {
        self.for_groups(volume, page, Change::DropGroup)
    }

    /// Says that a page belongs to this server since an epoch.
    pub fn adopt_page(
        &mut self,
        volume: VolumeId,
        page: PageNo,
        epoch: Epoch,
    ) -> Result<Step<()>, StoreError> {
        self.note_adopted(volume, page);
        self.for_groups(volume, page, |at| Change::Adopt(at, epoch.0))
    }

    /// The sender of a page may have had versions of a branch that no view shows any more, and that
    /// it had not swept yet: they are to be swept here.
    fn note_adopted(&mut self, volume: VolumeId, page: PageNo) {
        let found = self.tables.volumes.get(&volume.0);
        let Some(found) = found.filter(|found| !found.turns.is_empty()) else {
            return;
        };
        let keys = groups_of(found, page);
        self.turned.extend(keys.map(|key| (volume, key)));
    }

    fn for_groups(
        &mut self,
        volume: VolumeId,
        page: PageNo,
        change: impl Fn(ChunkAt) -> Change,
    ) -> Result<Step<()>, StoreError> {
        self.check_writable()?;
        let found = self.tables.volumes.get(&volume.0).filter(|v| !v.deleted);
        let Some(found) = found else {
            return Ok(Step::Done(()));
        };
        let keys: Vec<u64> = groups_of(found, page).collect();
        if !self.has_room(64 * keys.len() as u64) {
            return Ok(Step::Full);
        }
        let mut groups = keys.into_iter().map(|key| change(group_at(volume, key)));
        groups.try_for_each(|change| self.commit(&change, &[]))?;
        Ok(Step::Done(()))
    }

    /// Forgets a volume of which nothing is held but names of snapshots.
    pub fn forget_empty_volume(&mut self, volume: VolumeId) -> Result<Step<()>, StoreError> {
        self.check_writable()?;
        let found = self.tables.volumes.get(&volume.0);
        if found.is_none_or(|found| !found.groups.is_empty()) {
            return Ok(Step::Done(()));
        }
        if !self.has_room(64) {
            return Ok(Step::Full);
        }
        self.commit(&Change::DropVolume(volume), &[])?;
        Ok(Step::Done(()))
    }
}

/// Keys of the groups of a page that are there.
fn groups_of(volume: &Volume, page: PageNo) -> impl Iterator<Item = u64> {
    let keys = (0..PAGE_GROUPS).map(move |group| group_key(page, group));
    keys.filter(|key| volume.groups.contains_key(key))
}

/// The checksums of received data by sub-block, if they are those that its sender verified.
fn verified(moved: &MovedVersion, chunk: u16, data: &[u8]) -> Result<[u32; SUBS], StoreError> {
    let mut crcs = [0; SUBS];
    let received = bits(moved.data()).zip(&moved.crcs).zip(data.chunks(SUB));
    for ((sub, crc), bytes) in received {
        if crc32fast::hash(bytes) != *crc {
            return Err(bad_move(
                chunk,
                data.len(),
                "moved data of another checksum",
            ));
        }
        crcs[sub] = *crc;
    }
    Ok(crcs)
}

fn bad_move(chunk: u16, len: usize, problem: &'static str) -> StoreError {
    StoreError::BadRequest {
        offset_bytes: u32::from(chunk) * CHUNK_BYTES,
        len_bytes: u32::try_from(len).unwrap_or(u32::MAX),
        problem,
    }
}

const _: () =
    assert!(PAGE_GROUPS as u32 * GROUP_CHUNKS as u32 * CHUNK_BYTES == super::PAGE_BYTES_MAX);
