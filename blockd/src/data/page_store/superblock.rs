//! The superblock: names the checkpoint from which the store recovers.
//!
//! ```text
//! offset size
//!      0    8  magic "BLKSTORE"
//!      8    4  format version (2; 1 knew neither rollbacks nor clones)
//!     12    4  CRC-32 of bytes 16..160
//!     16    8  store id, random; its low half seeds the checksums of the log
//!     24    8  sequence of this superblock
//!     32    8  checkpoint number
//!     40    8  log: position of the first record needed
//!     48    8  log: lsn before it
//!     56    4  log: checksum before it
//!     60    4  1 if the store was closed with an empty log
//!     64    8  log: size in bytes
//!     72    8  highest lsn known durable
//!     80    4  slots of the slab
//!     84    4  CRC-32 of the catalog
//!     88    8  bytes of the catalog (file a for even checkpoints, b for odd ones)
//!     96    8  digest of all meta pages
//!    104    4  how often an opening has found records missing that may have been acknowledged
//!    108   52  reserved, 0
//! ```
//! Four copies of 4 KiB: even sequences are in copies 0 and 1, odd ones in 2 and 3, so that the pair
//! in force is never written. The newest valid copy counts.

use super::codec::{put, u32_at, u64_at};
use super::error::StoreError;
use super::log::LogPoint;
use crate::io::disk::{Disk, DiskFile};
use std::io::{self, IoSlice};

const MAGIC: &[u8; 8] = b"BLKSTORE";
const VERSION: u32 = 2;
/// Oldest version that is read; the next superblock written makes it the newest.
const VERSION_MIN: u32 = 1;
const COPY_BYTES: usize = 4096;
const USED_BYTES: usize = 160;

/// Contents of a superblock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Superblock {
    pub(super) store_id: u64,
    pub(super) sequence: u64,
    pub(super) checkpoint: u64,
    pub(super) start: LogPoint,
    pub(super) clean: bool,
    pub(super) log_bytes: u64,
    pub(super) durable: u64,
    pub(super) slots: u32,
    pub(super) catalog_crc: u32,
    pub(super) catalog_bytes: u64,
    pub(super) meta_digest: u64,
    pub(super) losses: u32,
}

/// One of the four copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Copy {
    Valid(Superblock),
    /// Never written.
    Empty,
    /// Torn or damaged.
    Damaged,
}

impl Superblock {
    /// Seed of the log's checksums.
    pub(super) fn seed(&self) -> u32 {
        u32::try_from(self.store_id & u64::from(u32::MAX)).unwrap_or(0)
    }

    fn encode(&self) -> [u8; COPY_BYTES] {
        let mut buf = [0; COPY_BYTES];
        put(&mut buf, 0, MAGIC);
        put(&mut buf, 8, &VERSION.to_le_bytes());
        for (at, value) in [
            (16, self.store_id),
            (24, self.sequence),
            (32, self.checkpoint),
            (40, self.start.pos),
            (48, self.start.lsn),
            (64, self.log_bytes),
            (72, self.durable),
            (88, self.catalog_bytes),
            (96, self.meta_digest),
        ] {
            put(&mut buf, at, &value.to_le_bytes());
        }
        put(&mut buf, 56, &self.start.crc.to_le_bytes());
        put(&mut buf, 60, &u32::from(self.clean).to_le_bytes());
        put(&mut buf, 80, &self.slots.to_le_bytes());
        put(&mut buf, 84, &self.catalog_crc.to_le_bytes());
        put(&mut buf, 104, &self.losses.to_le_bytes());
        let crc = crc32fast::hash(&buf[16..USED_BYTES]);
        put(&mut buf, 12, &crc.to_le_bytes());
        buf
    }

    fn decode(buf: &[u8]) -> Result<Option<Superblock>, StoreError> {
        if &buf[..8] != MAGIC {
            return Ok(None);
        }
        let found = u32_at(buf, 8);
        if crc32fast::hash(&buf[16..USED_BYTES]) != u32_at(buf, 12) {
            return Ok(None);
        }
        if VERSION < found {
            return Err(StoreError::NewerVersion {
                found,
                supported: VERSION,
            });
        }
        if found < VERSION_MIN {
            return Ok(None);
        }
        Ok(Some(Superblock {
            store_id: u64_at(buf, 16),
            sequence: u64_at(buf, 24),
            checkpoint: u64_at(buf, 32),
            start: LogPoint {
                pos: u64_at(buf, 40),
                lsn: u64_at(buf, 48),
                crc: u32_at(buf, 56),
            },
            clean: u32_at(buf, 60) == 1,
            log_bytes: u64_at(buf, 64),
            durable: u64_at(buf, 72),
            slots: u32_at(buf, 80),
            catalog_crc: u32_at(buf, 84),
            catalog_bytes: u64_at(buf, 88),
            meta_digest: u64_at(buf, 96),
            losses: u32_at(buf, 104),
        }))
    }

    /// Writes both copies of this sequence and syncs them.
    pub(super) fn write<D: Disk + ?Sized>(&self, disk: &D) -> io::Result<()> {
        let buf = self.encode();
        let parts = [IoSlice::new(&buf), IoSlice::new(&buf)];
        disk.write_at(
            DiskFile::Super,
            (self.sequence % 2) * 2 * COPY_BYTES as u64,
            &parts,
        )?;
        disk.sync(DiskFile::Super)
    }

    /// Each copy with its place in the file.
    pub(super) fn copies<D: Disk + ?Sized>(disk: &D) -> Result<Vec<(u64, Copy)>, StoreError> {
        let mut buf = vec![0; 4 * COPY_BYTES];
        disk.read_at(DiskFile::Super, 0, &mut buf)
            .map_err(|e| StoreError::read(DiskFile::Super, e))?;
        let copies = (0..).step_by(COPY_BYTES).zip(buf.chunks(COPY_BYTES));
        let state = |copy: &[u8]| match Superblock::decode(copy)? {
            Some(found) => Ok(Copy::Valid(found)),
            None if copy.iter().all(|byte| *byte == 0) => Ok(Copy::Empty),
            None => Ok(Copy::Damaged),
        };
        copies.map(|(pos, copy)| Ok((pos, state(copy)?))).collect()
    }

    /// The newest valid copy; `None` if all four are empty.
    pub(super) fn read<D: Disk + ?Sized>(disk: &D) -> Result<Option<Superblock>, StoreError> {
        let mut newest: Option<Superblock> = None;
        for (_, copy) in Superblock::copies(disk)? {
            let Copy::Valid(found) = copy else {
                continue;
            };
            if newest
                .as_ref()
                .is_none_or(|best| best.sequence < found.sequence)
            {
                newest = Some(found);
            }
        }
        Ok(newest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::sim_disk::SimDisk;

    fn sample(sequence: u64) -> Superblock {
        Superblock {
            store_id: 0x1122_3344_5566_7788,
            sequence,
            checkpoint: 3,
            start: LogPoint {
                pos: 4096,
                lsn: 17,
                crc: 0xdead_beef,
            },
            clean: true,
            log_bytes: 1 << 20,
            durable: 16,
            slots: 42,
            catalog_crc: 5,
            catalog_bytes: 6,
            meta_digest: 7,
            losses: 0,
        }
    }

    #[test]
    fn the_format_is_the_golden_file() {
        let golden = include_bytes!("../../../tests/golden/superblock-v2.bin");
        assert_eq!(&sample(2).encode()[..USED_BYTES], golden);
        assert_eq!(
            Superblock::decode(&sample(2).encode()).unwrap(),
            Some(sample(2))
        );
        let older = include_bytes!("../../../tests/golden/superblock-v1.bin");
        assert_eq!(Superblock::decode(older).unwrap(), Some(sample(2)));
    }

    #[test]
    fn losses_have_bytes_that_were_reserved() {
        let lossy = Superblock {
            losses: 8,
            ..sample(2)
        };
        let bytes = lossy.encode();
        assert_eq!(bytes[104..108], [8, 0, 0, 0]);
        assert_eq!(Superblock::decode(&bytes).unwrap(), Some(lossy));
    }

    #[test]
    fn a_damaged_pair_falls_back_to_the_older_one() {
        let disk = SimDisk::new();
        sample(2).write(&disk).unwrap();
        sample(3).write(&disk).unwrap();
        assert_eq!(Superblock::read(&disk).unwrap(), Some(sample(3)));
        disk.flip_bit(DiskFile::Super, 2 * 4096 + 40, 1);
        assert_eq!(Superblock::read(&disk).unwrap(), Some(sample(3)));
        disk.flip_bit(DiskFile::Super, 3 * 4096 + 40, 1);
        assert_eq!(Superblock::read(&disk).unwrap(), Some(sample(2)));
    }

    #[test]
    fn a_newer_version_is_refused() {
        let mut buf = sample(1).encode();
        buf[8] = 3;
        let error = Superblock::decode(&buf).unwrap_err();
        assert!(matches!(
            error,
            StoreError::NewerVersion {
                found: 3,
                supported: 2
            }
        ));
    }
}
