//! The record of the write-ahead log.
//!
//! ```text
//! offset size
//!      0    4  magic "BLR1" (the last byte is the format version)
//!      4    1  kind
//!      5    1  reserved, 0
//!      6    2  mask: sub-blocks whose bytes follow
//!      8    8  lsn
//!     16    8  highest lsn known durable when the record was written
//!     24    8  volume; of a mark: lsn up to which pointer data is synced
//!     32    4  page; of a clone: 8 bytes, the parent volume; of a span: 8 bytes, its id
//!     36    2  chunk of the page
//!     38    2  zero: sub-blocks that become zeros, or of which a version forgets what it decided
//!     40    4  slot; of a snapshot taken of an era: that era; of a turn: the era that it follows
//!     44    4  argument: snapshot, slot to drop, chunks of a pointer, bytes of a pad; of moved
//!              data: sub-blocks that are copied; of a turn: its era
//!     48    4  epoch; of moved data and pointers: era; of a rollback or turn: that of the routing
//!              table that it made
//!     52    4  length of the body in bytes, a multiple of 64
//!     56    4  checksum field of the record before
//!     60    4  CRC-32 (seeded by the store's id) of bytes 0..60 and of the checksum table
//!     64       checksum table: one CRC-32 for each set bit of mask, padded to 64 bytes
//!              data: 4096 bytes for each set bit of mask
//! ```
//! A pointer has 16 checksums for each of its chunks, mask 0 and no data. The seed is secret, so that
//! a guest cannot forge records inside its data. Kinds 25 and 26 came with spans, 20 to 24 with page moves,
//! 15 and 16 with snapshots by time stamps,
//! 11 to 14 with rollbacks and clones and format version 2 of the store.

use super::codec::{put, u16_at, u32_at, u64_at};
use super::line::Turn;
use super::types::Parent;
use super::version::{SUBS, bits};
use crate::id::{PageNo, SnapshotId, VolumeId};

/// Alignment of records and bytes of the header.
pub(super) const RECORD_ALIGN: usize = 64;
const MAGIC: u32 = u32::from_le_bytes(*b"BLR1");
/// Chunks of the largest pointer record (1 MiB).
pub(super) const POINTER_CHUNKS: usize = 16;
/// Header and largest checksum table.
pub(super) const HEAD_BYTES_MAX: usize = RECORD_ALIGN + POINTER_CHUNKS * SUBS * 4;
/// The largest record: a chunk of data.
pub(super) const RECORD_BYTES_MAX: usize = 2 * RECORD_ALIGN + SUBS * 4096;

/// A chunk of a page of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct ChunkAt {
    pub(super) volume: VolumeId,
    pub(super) page: PageNo,
    pub(super) chunk: u16,
}

/// What a data record does with its sub-blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataKind {
    /// Content of the head; the slot is that of the newest version, or of a new one.
    Put,
    /// Content copied up into the version in `slot`; readers see no difference.
    Fill,
    /// As `Fill`, then the version in the slot `drop` disappears; the later era of both stays.
    Merge {
        /// Slot to free.
        drop: u32,
    },
    /// Content of the version of an era, which came from another store.
    Moved {
        era: u32,
        /// Which of its sub-blocks count as copied.
        copied: u16,
    },
}

/// A change of the store, as logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing; it carries the durable lsn. Pointer data up to lsn `in_slab` was synced before.
    Mark { in_slab: u64 },
    /// Fills the end of the ring; bytes after the header.
    Pad(u32),
    /// Sub-blocks of one chunk.
    Data {
        kind: DataKind,
        at: ChunkAt,
        slot: u32,
        mask: u16,
        zero: u16,
        epoch: u32,
        crcs: [u32; SUBS],
    },
    /// Whole chunks whose data lies in fresh neighbouring slots already.
    Pointer {
        at: ChunkAt,
        slot: u32,
        epoch: u32,
        /// Of chunks that came from another store; otherwise the era of the volume.
        era: Option<u32>,
        crcs: Vec<[u32; SUBS]>,
    },
    /// A snapshot taken at this point of the log.
    TakeSnapshot(VolumeId, SnapshotId),
    /// A snapshot forgotten; merges follow.
    DropSnapshot(VolumeId, SnapshotId),
    /// A volume forgotten; its groups are dropped one by one after it.
    DropVolume(VolumeId),
    /// All versions of a group of chunks freed (`chunk` is its first).
    DropGroup(ChunkAt),
    /// All versions of a chunk freed.
    DropChunk(ChunkAt),
    /// The group of a chunk belongs to this server since an epoch.
    Adopt(ChunkAt, u32),
    /// Later writes of the volume are told from the earlier ones, without a snapshot yet.
    NextEra(VolumeId),
    /// A snapshot of what was written up to the end of an era.
    TakeSnapshotAt(VolumeId, SnapshotId, u32),
    /// The head is what the snapshot is; the routing epoch at which it came to be.
    Rollback(VolumeId, SnapshotId, u32),
    /// A rollback that other stores carried out before this one had anything of the volume.
    Turn(VolumeId, Turn, u32),
    /// A volume that begins as a snapshot of another one.
    Clone(VolumeId, Parent),
    /// A clone that needs its parent no more.
    Detach(VolumeId),
    /// A change over several pages of the volume may be executed in part from here on (S003-33).
    SpanBegun(VolumeId, u64),
    /// All parts of a span that this store has were executed, or its requester has given it up.
    SpanEnded(VolumeId, u64),
    /// What a version decided, and no view reads from it.
    Forget { at: ChunkAt, slot: u32, mask: u16 },
}

/// A record as found in the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) lsn: u64,
    pub(super) durable: u64,
    pub(super) prev_crc: u32,
    pub(super) crc: u32,
    /// Bytes of header and checksum table, where the data begins.
    pub(super) head_bytes: usize,
    /// Bytes of the whole record.
    pub(super) len_bytes: usize,
    pub(super) change: Change,
}

/// Bytes of header and table of a change, and of the whole record.
pub(super) fn sizes(change: &Change) -> (usize, usize) {
    let (crcs, data) = match change {
        Change::Data { mask, .. } => (
            mask.count_ones() as usize,
            mask.count_ones() as usize * 4096,
        ),
        Change::Pointer { crcs, .. } => (crcs.len() * SUBS, 0),
        Change::Pad(bytes) => (0, *bytes as usize),
        _ => (0, 0),
    };
    let head = RECORD_ALIGN + (crcs * 4).next_multiple_of(RECORD_ALIGN);
    (head, head + data)
}

/// Writes header and table into `buf`; gives their length and the record's checksum.
pub(super) fn encode(
    change: &Change,
    lsn: u64,
    durable: u64,
    prev_crc: u32,
    seed: u32,
    buf: &mut [u8],
) -> (usize, u32) {
    let (head, len) = sizes(change);
    let buf = &mut buf[..head];
    buf.fill(0);
    put(buf, 0, &MAGIC.to_le_bytes());
    put(buf, 8, &lsn.to_le_bytes());
    put(buf, 16, &durable.to_le_bytes());
    let body = u32::try_from(len - RECORD_ALIGN).unwrap_or(u32::MAX);
    put(buf, 52, &body.to_le_bytes());
    put(buf, 56, &prev_crc.to_le_bytes());
    let table = encode_fields(change, buf);
    let crc = checksum(buf, table, seed);
    put(buf, 60, &crc.to_le_bytes());
    (head, crc)
}

/// Fills the fields that depend on the kind; gives the number of checksums.
fn encode_fields(change: &Change, buf: &mut [u8]) -> usize {
    let (kind, volume, argument) = match change {
        Change::Mark { in_slab } => (1, VolumeId(*in_slab), 0),
        Change::Pad(bytes) => (2, VolumeId(0), *bytes),
        Change::Data {
            kind: DataKind::Put,
            at,
            ..
        } => (3, at.volume, 0),
        Change::Data {
            kind: DataKind::Fill,
            at,
            ..
        } => (4, at.volume, 0),
        Change::Data {
            kind: DataKind::Merge { drop },
            at,
            ..
        } => (5, at.volume, *drop),
        Change::Data {
            kind: DataKind::Moved { copied, .. },
            at,
            ..
        } => (20, at.volume, u32::from(*copied)),
        Change::Pointer { at, crcs, era, .. } => {
            let kind = if era.is_some() { 21 } else { 6 };
            (kind, at.volume, u32::try_from(crcs.len()).unwrap_or(0))
        }
        Change::TakeSnapshot(volume, snapshot) => (7, *volume, snapshot.0),
        Change::DropSnapshot(volume, snapshot) => (8, *volume, snapshot.0),
        Change::DropVolume(volume) => (9, *volume, 0),
        Change::DropGroup(at) => (10, at.volume, 0),
        Change::DropChunk(at) => (22, at.volume, 0),
        Change::Adopt(at, _) => (23, at.volume, 0),
        Change::NextEra(volume) => (15, *volume, 0),
        Change::TakeSnapshotAt(volume, snapshot, _) => (16, *volume, snapshot.0),
        Change::Rollback(volume, snapshot, _) => (11, *volume, snapshot.0),
        Change::Turn(volume, turn, _) => (24, *volume, turn.era),
        Change::Clone(volume, parent) => (12, *volume, parent.snapshot.0),
        Change::Detach(volume) => (13, *volume, 0),
        Change::Forget { at, .. } => (14, at.volume, 0),
        Change::SpanBegun(volume, _) => (25, *volume, 0),
        Change::SpanEnded(volume, _) => (26, *volume, 0),
    };
    buf[4] = kind;
    put(buf, 24, &volume.0.to_le_bytes());
    put(buf, 44, &argument.to_le_bytes());
    let put_place = |buf: &mut [u8], at: &ChunkAt, slot: u32, epoch: u32| {
        put(buf, 32, &at.page.0.to_le_bytes());
        put(buf, 36, &at.chunk.to_le_bytes());
        put(buf, 40, &slot.to_le_bytes());
        put(buf, 48, &epoch.to_le_bytes());
    };
    let mut table = 0;
    let mut put_crc = |buf: &mut [u8], crc: u32| {
        put(buf, RECORD_ALIGN + 4 * table, &crc.to_le_bytes());
        table += 1;
    };
    match change {
        Change::Data {
            kind,
            at,
            slot,
            mask,
            zero,
            epoch,
            crcs,
        } => {
            let epoch = match kind {
                DataKind::Moved { era, .. } => era,
                _ => epoch,
            };
            put_place(buf, at, *slot, *epoch);
            put(buf, 6, &mask.to_le_bytes());
            put(buf, 38, &zero.to_le_bytes());
            bits(*mask).for_each(|sub| put_crc(buf, crcs[sub]));
        }
        Change::Pointer {
            at,
            slot,
            epoch,
            era,
            crcs,
        } => {
            put_place(buf, at, *slot, era.unwrap_or(*epoch));
            crcs.iter().flatten().for_each(|crc| put_crc(buf, *crc));
        }
        Change::DropGroup(at) | Change::DropChunk(at) => put_place(buf, at, 0, 0),
        Change::Adopt(at, epoch) => put_place(buf, at, 0, *epoch),
        Change::TakeSnapshotAt(_, _, era) => put(buf, 40, &era.to_le_bytes()),
        Change::Rollback(_, _, epoch) => put(buf, 48, &epoch.to_le_bytes()),
        Change::Turn(_, turn, epoch) => {
            put(buf, 40, &turn.to.to_le_bytes());
            put(buf, 48, &epoch.to_le_bytes());
        }
        Change::Clone(_, parent) => put(buf, 32, &parent.volume.0.to_le_bytes()),
        Change::SpanBegun(_, span) | Change::SpanEnded(_, span) => {
            put(buf, 32, &span.to_le_bytes())
        }
        Change::Forget { at, slot, mask } => {
            put_place(buf, at, *slot, 0);
            put(buf, 38, &mask.to_le_bytes());
        }
        _ => {}
    }
    table
}

fn checksum(head: &[u8], table: usize, seed: u32) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(seed);
    hasher.update(&head[..60]);
    hasher.update(&head[RECORD_ALIGN..RECORD_ALIGN + 4 * table]);
    hasher.finalize()
}

/// True if a record may begin with these bytes; cheap, for the scan.
pub(super) fn has_magic(bytes: &[u8]) -> bool {
    bytes.len() >= RECORD_ALIGN && u32_at(bytes, 0) == MAGIC
}

/// True for the kinds whose checksum table may be longer than 64 bytes.
pub(super) fn has_long_table(bytes: &[u8]) -> bool {
    matches!(bytes[4], 6 | 21)
}

/// Reads header and table; `None` if they are not a whole valid record head.
pub(super) fn decode(bytes: &[u8], seed: u32) -> Option<Record> {
    if !has_magic(bytes) {
        return None;
    }
    let (mask, argument) = (u16_at(bytes, 6), u32_at(bytes, 44));
    let table = match bytes[4] {
        3..=5 | 20 => mask.count_ones() as usize,
        6 | 21 if (1..=POINTER_CHUNKS).contains(&(argument as usize)) => argument as usize * SUBS,
        1 | 2 | 7..=16 | 22..=26 => 0,
        _ => return None,
    };
    let head_bytes = RECORD_ALIGN + (4 * table).next_multiple_of(RECORD_ALIGN);
    let crc = u32_at(bytes, 60);
    if bytes.len() < head_bytes || checksum(bytes, table, seed) != crc {
        return None;
    }
    let change = decode_change(bytes, mask, argument)?;
    let len_bytes = sizes(&change).1;
    (len_bytes == RECORD_ALIGN + u32_at(bytes, 52) as usize).then_some(Record {
        lsn: u64_at(bytes, 8),
        durable: u64_at(bytes, 16),
        prev_crc: u32_at(bytes, 56),
        crc,
        head_bytes,
        len_bytes,
        change,
    })
}

fn decode_change(bytes: &[u8], mask: u16, argument: u32) -> Option<Change> {
    let volume = VolumeId(u64_at(bytes, 24));
    let at = ChunkAt {
        volume,
        page: PageNo(u32_at(bytes, 32)),
        chunk: u16_at(bytes, 36),
    };
    let (slot, epoch, zero) = (u32_at(bytes, 40), u32_at(bytes, 48), u16_at(bytes, 38));
    let data = |kind, epoch| {
        let mut crcs = [0; SUBS];
        for (index, sub) in bits(mask).enumerate() {
            crcs[sub] = u32_at(bytes, RECORD_ALIGN + 4 * index);
        }
        Change::Data {
            kind,
            at,
            slot,
            mask,
            zero,
            epoch,
            crcs,
        }
    };
    Some(match bytes[4] {
        1 => Change::Mark { in_slab: volume.0 },
        2 => Change::Pad(argument),
        3 => data(DataKind::Put, epoch),
        4 => data(DataKind::Fill, epoch),
        5 => data(DataKind::Merge { drop: argument }, epoch),
        6 | 21 => {
            let crc = |i: usize| super::codec::crcs_at(bytes, RECORD_ALIGN + i * SUBS * 4);
            let is_moved = bytes[4] == 21;
            Change::Pointer {
                at,
                slot,
                epoch: if is_moved { 0 } else { epoch },
                era: is_moved.then_some(epoch),
                crcs: (0..argument as usize).map(crc).collect(),
            }
        }
        7 => Change::TakeSnapshot(volume, SnapshotId(argument)),
        8 => Change::DropSnapshot(volume, SnapshotId(argument)),
        9 => Change::DropVolume(volume),
        10 => Change::DropGroup(at),
        20 => {
            let copied = u16::try_from(argument).ok()?;
            data(DataKind::Moved { era: epoch, copied }, 0)
        }
        22 => Change::DropChunk(at),
        23 => Change::Adopt(at, epoch),
        24 => {
            let (era, to) = (argument, slot);
            Change::Turn(volume, Turn { era, to }, epoch)
        }
        15 => Change::NextEra(volume),
        16 => Change::TakeSnapshotAt(volume, SnapshotId(argument), slot),
        11 => Change::Rollback(volume, SnapshotId(argument), epoch),
        12 => {
            let parent = Parent {
                volume: VolumeId(u64_at(bytes, 32)),
                snapshot: SnapshotId(argument),
            };
            Change::Clone(volume, parent)
        }
        13 => Change::Detach(volume),
        25 => Change::SpanBegun(volume, u64_at(bytes, 32)),
        26 => Change::SpanEnded(volume, u64_at(bytes, 32)),
        14 => Change::Forget {
            at,
            slot,
            mask: zero,
        },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(change: Change) {
        let mut buf = [0; HEAD_BYTES_MAX];
        let (len, crc) = encode(&change, 7, 5, 0xaabb_ccdd, 0x1234, &mut buf);
        let record = decode(&buf[..len], 0x1234).unwrap();
        assert_eq!(
            (record.lsn, record.durable, record.crc, &record.change),
            (7, 5, crc, &change)
        );
        assert_eq!((record.head_bytes, record.len_bytes), sizes(&change));
        assert_eq!(
            decode(&buf[..len], 0x1235),
            None,
            "a record of another store"
        );
        for at in 0..len.min(60) {
            buf[at] ^= 4;
            assert_eq!(decode(&buf[..len], 0x1234), None, "flip in byte {at}");
            buf[at] ^= 4;
        }
    }

    fn sample() -> Change {
        let at = ChunkAt {
            volume: VolumeId(9),
            page: PageNo(3),
            chunk: 2,
        };
        let mut crcs = [0; SUBS];
        (crcs[0], crcs[2]) = (0x1111_1111, 0x3333_3333);
        Change::Data {
            kind: DataKind::Put,
            at,
            slot: 11,
            mask: 0b101,
            zero: 0b10,
            epoch: 6,
            crcs,
        }
    }

    #[test]
    fn the_format_is_the_golden_file() {
        let mut buf = [0; HEAD_BYTES_MAX];
        let (len, _) = encode(&sample(), 7, 5, 0xaabb_ccdd, 0x1234, &mut buf);
        assert_eq!(
            &buf[..len],
            include_bytes!("../../../tests/golden/log-record-v1.bin")
        );
    }

    fn clone() -> Change {
        let parent = Parent {
            volume: VolumeId(0x0102_0304_0506_0708),
            snapshot: SnapshotId(9),
        };
        Change::Clone(VolumeId(300), parent)
    }

    #[test]
    fn the_kinds_of_version_2_are_their_golden_file() {
        let mut golden = Vec::new();
        for change in [clone(), Change::Rollback(VolumeId(300), SnapshotId(2), 6)] {
            let mut buf = [0; HEAD_BYTES_MAX];
            let (len, _) = encode(&change, 7, 5, 0xaabb_ccdd, 0x1234, &mut buf);
            golden.extend_from_slice(&buf[..len]);
        }
        assert_eq!(
            golden,
            include_bytes!("../../../tests/golden/log-record-v2.bin")
        );
    }

    #[test]
    fn every_kind_survives_the_round_trip() {
        let at = ChunkAt {
            volume: VolumeId(1 << 40),
            page: PageNo(u32::MAX),
            chunk: 8191,
        };
        let crcs = vec![[1; SUBS], [2; SUBS], [u32::MAX; SUBS]];
        round_trip(sample());
        for (epoch, era) in [(1, None), (0, Some(9))] {
            round_trip(Change::Pointer {
                at,
                slot: 77,
                epoch,
                era,
                crcs: crcs.clone(),
            });
        }
        let Change::Data { at, mask, crcs, .. } = sample() else {
            panic!("the sample is data");
        };
        round_trip(Change::Data {
            kind: DataKind::Moved { era: 4, copied: 5 },
            at,
            slot: 1,
            mask,
            zero: 0b10,
            epoch: 0,
            crcs,
        });
        round_trip(Change::DropChunk(at));
        round_trip(Change::Adopt(at, 17));
        round_trip(Change::TakeSnapshot(VolumeId(1), SnapshotId(2)));
        round_trip(Change::DropSnapshot(VolumeId(1), SnapshotId(2)));
        round_trip(Change::DropVolume(VolumeId(3)));
        round_trip(Change::DropGroup(at));
        round_trip(Change::NextEra(VolumeId(4)));
        round_trip(Change::TakeSnapshotAt(VolumeId(4), SnapshotId(5), 6));
        round_trip(Change::Mark { in_slab: 6 });
        round_trip(Change::Pad(640));
        round_trip(Change::Rollback(VolumeId(1), SnapshotId(2), 3));
        round_trip(Change::Turn(VolumeId(1), Turn { era: 7, to: 2 }, 3));
        round_trip(clone());
        round_trip(Change::Detach(VolumeId(1)));
        round_trip(Change::SpanBegun(VolumeId(1), u64::MAX));
        round_trip(Change::SpanEnded(VolumeId(1), 1 << 40));
        round_trip(Change::Forget {
            at,
            slot: 7,
            mask: 0x8001,
        });
    }
}
