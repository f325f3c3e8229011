//! Meta pages: for every slot, which version of which chunk it holds.
//!
//! ```text
//! meta page (4096 bytes)            record of a slot (96 bytes)
//! offset size                       offset size
//!      0    4  magic "BMP1"              0    8  volume
//!      4    4  CRC-32 of bytes 8..4096   8    4  page
//!      8    4  number of the page       12    2  chunk of the page
//!     12    4  reserved, 0              14    2  present
//!     16    8  checkpoint               16    2  zero
//!     24   40  reserved, 0              18    2  1 if used, 0 if free
//!     64 4032  42 records               20    4  era
//!                                       24    4  epoch of the page
//!                                       28    2  copied
//!                                       30    2  reserved, 0
//!                                       32   64  CRC-32 of 16 sub-blocks
//! ```
//! Stores of the first builds have 0 for `copied`: what was copied up counts as written in its era.
//!
//! Page `n` has copy A at `2n` and copy B at `2n + 1`; a checkpoint writes the copy that is not in
//! force. The superblock has a digest over (number, checkpoint, CRC) of all pages in force, so that a
//! lost write cannot bring an old copy back unseen.

use super::codec::{crcs_at, put, u16_at, u32_at, u64_at};
use super::record::ChunkAt;
use super::version::{GROUP_CHUNKS, SUBS, Version};
use crate::id::{PageNo, VolumeId};
use crate::io::disk::{Disk, DiskFile};
use std::io::{self, IoSlice};

/// Records of a meta page.
pub(super) const META_SLOTS: u32 = 42;
pub(super) const META_PAGE_BYTES: usize = 4096;
const MAGIC: u32 = u32::from_le_bytes(*b"BMP1");
const RECORD_BYTES: usize = 96;
const HEADER_BYTES: usize = 64;
const _: () = assert!(HEADER_BYTES + META_SLOTS as usize * RECORD_BYTES == META_PAGE_BYTES);

/// A slot as the meta page has it; `None` is free.
pub(super) type SlotRecord = Option<SlotContent>;

/// What a used slot holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SlotContent {
    pub(super) at: ChunkAt,
    pub(super) epoch: u32,
    pub(super) version: Version,
}

fn encode_record(record: &SlotRecord, buf: &mut [u8]) {
    buf.fill(0);
    let Some(SlotContent { at, epoch, version }) = record else {
        return;
    };
    put(buf, 0, &at.volume.0.to_le_bytes());
    put(buf, 8, &at.page.0.to_le_bytes());
    put(buf, 12, &at.chunk.to_le_bytes());
    put(buf, 14, &version.present.to_le_bytes());
    put(buf, 16, &version.zero.to_le_bytes());
    put(buf, 18, &1u16.to_le_bytes());
    put(buf, 20, &version.era.to_le_bytes());
    put(buf, 24, &epoch.to_le_bytes());
    put(buf, 28, &version.copied.to_le_bytes());
    for sub in 0..SUBS {
        put(buf, 32 + 4 * sub, &version.crcs[sub].to_le_bytes());
    }
}

fn decode_record(buf: &[u8], slot: u32) -> SlotRecord {
    if u16_at(buf, 18) == 0 {
        return None;
    }
    let chunk = u16_at(buf, 12);
    let at = ChunkAt {
        volume: VolumeId(u64_at(buf, 0)),
        page: PageNo(u32_at(buf, 8)),
        chunk,
    };
    let version = Version {
        crcs: crcs_at(buf, 32),
        slot,
        era: u32_at(buf, 20),
        present: u16_at(buf, 14),
        zero: u16_at(buf, 16),
        copied: u16_at(buf, 28),
        chunk: u8::try_from(chunk % GROUP_CHUNKS).unwrap_or(0),
    };
    Some(SlotContent {
        at,
        epoch: u32_at(buf, 24),
        version,
    })
}

/// A meta page in memory.
#[derive(Clone)]
pub(super) struct MetaPage {
    buf: Box<[u8; META_PAGE_BYTES]>,
}

impl MetaPage {
    /// A page of free slots.
    pub(super) fn empty(number: u32) -> MetaPage {
        let mut buf = Box::new([0; META_PAGE_BYTES]);
        put(&mut buf[..], 0, &MAGIC.to_le_bytes());
        put(&mut buf[..], 8, &number.to_le_bytes());
        MetaPage { buf }
    }

    /// A page read from the file; `None` if it is not valid or not this page.
    pub(super) fn parse(buf: Box<[u8; META_PAGE_BYTES]>, number: u32) -> Option<MetaPage> {
        let valid = u32_at(&buf[..], 0) == MAGIC
            && u32_at(&buf[..], 8) == number
            && u32_at(&buf[..], 4) == crc32fast::hash(&buf[8..]);
        valid.then_some(MetaPage { buf })
    }

    /// Checkpoint that wrote the page.
    pub(super) fn checkpoint(&self) -> u64 {
        u64_at(&self.buf[..], 16)
    }

    /// The page's share of the digest.
    pub(super) fn digest(&self) -> u64 {
        let buf = &self.buf[..];
        let mut z = u64::from(u32_at(buf, 8)) << 32 | u64::from(u32_at(buf, 4));
        z = (z ^ u64_at(buf, 16).rotate_left(17)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// The records of the used slots.
    pub(super) fn records(&self) -> impl Iterator<Item = SlotContent> + '_ {
        let first = u32_at(&self.buf[..], 8) * META_SLOTS;
        let records = self.buf[HEADER_BYTES..]
            .chunks_exact(RECORD_BYTES)
            .zip(first..);
        records.filter_map(|(bytes, slot)| decode_record(bytes, slot))
    }

    fn set(&mut self, slot: u32, record: &SlotRecord) {
        let at = HEADER_BYTES + (slot % META_SLOTS) as usize * RECORD_BYTES;
        encode_record(record, &mut self.buf[at..at + RECORD_BYTES]);
    }

    fn seal(&mut self, checkpoint: u64) {
        put(&mut self.buf[..], 16, &checkpoint.to_le_bytes());
        let crc = crc32fast::hash(&self.buf[8..]);
        put(&mut self.buf[..], 4, &crc.to_le_bytes());
    }
}

/// The copy of a meta page that is in force.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum MetaCopy {
    /// Never written: all slots are free.
    #[default]
    None,
    A,
    B,
}

impl MetaCopy {
    /// The copy that a checkpoint may write.
    pub(super) fn other(self) -> MetaCopy {
        if self == MetaCopy::A {
            MetaCopy::B
        } else {
            MetaCopy::A
        }
    }

    /// Place of the copy in the file.
    pub(super) fn pos(self, number: u32) -> u64 {
        (2 * u64::from(number) + u64::from(self == MetaCopy::B)) * META_PAGE_BYTES as u64
    }
}

/// New records of one meta page.
#[derive(Clone, Debug)]
pub(super) struct MetaUpdate {
    pub(super) number: u32,
    pub(super) in_force: MetaCopy,
    pub(super) records: Vec<(u32, SlotRecord)>,
}

impl MetaUpdate {
    /// Writes the page with the new records into its other copy; gives the change of the digest.
    pub(super) fn write<D: Disk + ?Sized>(&self, disk: &D, checkpoint: u64) -> io::Result<u64> {
        let old = match self.in_force {
            MetaCopy::None => None,
            copy => Some(read_copy(disk, self.number, copy)?.ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    "meta page in force does not verify",
                )
            })?),
        };
        let before = old.as_ref().map_or(0, MetaPage::digest);
        let mut page = old.unwrap_or_else(|| MetaPage::empty(self.number));
        for (slot, record) in &self.records {
            page.set(*slot, record);
        }
        page.seal(checkpoint);
        let pos = self.in_force.other().pos(self.number);
        disk.write_at(DiskFile::Meta, pos, &[IoSlice::new(&page.buf[..])])?;
        Ok(before ^ page.digest())
    }
}

/// One copy of a page; `None` if it does not verify.
pub(super) fn read_copy<D: Disk + ?Sized>(
    disk: &D,
    number: u32,
    copy: MetaCopy,
) -> io::Result<Option<MetaPage>> {
    let mut buf = Box::new([0; META_PAGE_BYTES]);
    disk.read_at(DiskFile::Meta, copy.pos(number), &mut buf[..])?;
    Ok(MetaPage::parse(buf, number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_format_is_the_golden_file() {
        let version = Version {
            crcs: std::array::from_fn(|i| u32::try_from(i).unwrap() * 0x0101_0101),
            slot: 43,
            era: 9,
            present: 0xf0ff,
            zero: 0x1001,
            copied: 0,
            chunk: 2,
        };
        let at = ChunkAt {
            volume: VolumeId(77),
            page: PageNo(5),
            chunk: 66,
        };
        let content = SlotContent {
            at,
            epoch: 4,
            version,
        };
        let mut page = MetaPage::empty(1);
        page.set(43, &Some(content.clone()));
        page.seal(12);
        let golden = include_bytes!("../../../tests/golden/meta-page-v1.bin");
        assert_eq!(&page.buf[..256], golden);
        let again = MetaPage::parse(page.buf.clone(), 1).unwrap();
        assert_eq!(
            (again.checkpoint(), again.records().collect::<Vec<_>>()),
            (12, vec![content])
        );
        assert!(MetaPage::parse(page.buf, 2).is_none(), "a misdirected page");
    }

    #[test]
    fn copied_sub_blocks_have_the_bytes_that_were_reserved() {
        let version = Version {
            crcs: [7; SUBS],
            slot: 42,
            era: 9,
            present: 0xf00f,
            zero: 0x1001,
            copied: 0x3002,
            chunk: 2,
        };
        let at = ChunkAt {
            volume: VolumeId(77),
            page: PageNo(5),
            chunk: 66,
        };
        let content = Some(SlotContent {
            at,
            epoch: 4,
            version,
        });
        let mut buf = [0xff; RECORD_BYTES];
        encode_record(&content, &mut buf);
        assert_eq!(buf[28..32], [0x02, 0x30, 0, 0]);
        assert_eq!(decode_record(&buf, 42), content);
    }
}
