//! The write-ahead log: a ring of records in one file.
//!
//! Positions are virtual: they grow for ever; the place in the file is the position modulo the size.
//! Three lsn move, in this order: `last` (appended: survives the process), `durable` (synced:
//! survives power loss), `recorded` (a durable record says that this lsn is durable). Only changes up
//! to `recorded` may touch the slab in place or release slots, because recovery verifies pointer data
//! beyond `recorded` against the slab and cuts the log where it does not verify.

use super::record::{Change, HEAD_BYTES_MAX, RECORD_ALIGN, encode, sizes};
use crate::io::disk::{Disk, DiskFile};
use std::io::{self, IoSlice};

/// Bytes that only marks may use, so that a full log can always be emptied.
pub(super) const RESERVE_MARKS: u64 = 16 << 10;
/// Bytes that only marks and snapshots may use: a snapshot cannot wait.
pub(super) const RESERVE_SNAPSHOTS: u64 = 48 << 10;
/// The disk hears this far ahead, and a step further, where records will be written.
const AHEAD_BYTES: u64 = 512 << 10;

/// A place in the log from which recovery can go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LogPoint {
    /// Virtual position of the next record.
    pub(super) pos: u64,
    /// Lsn of the record before.
    pub(super) lsn: u64,
    /// Checksum of the record before.
    pub(super) crc: u32,
}

/// The state of the ring.
#[derive(Debug)]
pub(super) struct Log {
    pub(super) size_bytes: u64,
    pub(super) seed: u32,
    pub(super) head: LogPoint,
    /// First position that recovery needs.
    pub(super) tail: u64,
    pub(super) durable: u64,
    pub(super) recorded: u64,
    /// Durable lsn that the last record carries.
    pub(super) carried: u64,
    /// Last record that is more than a mark.
    pub(super) last_change: u64,
    /// Position up to which the log is durable.
    pub(super) durable_pos: u64,
}

impl Log {
    /// Bytes in use.
    pub(super) fn used(&self) -> u64 {
        self.head.pos - self.tail
    }

    /// True if records of so many bytes fit and leave the reserve.
    pub(super) fn has_room(&self, len_bytes: u64, reserve: u64) -> bool {
        let wrap = super::record::RECORD_BYTES_MAX as u64;
        self.used() + len_bytes + wrap + reserve <= self.size_bytes
    }

    /// Bytes appended and not yet durable.
    pub(super) fn unsynced(&self) -> u64 {
        self.head.pos - self.durable_pos
    }

    /// Appends a change with its data; gives the place in the file of the data. The caller has checked
    /// the room. On an error nothing is appended.
    pub(super) fn append<D: Disk>(
        &mut self,
        disk: &D,
        change: &Change,
        data: &[&[u8]],
    ) -> io::Result<u64> {
        let len = sizes(change).1 as u64;
        let rest = self.size_bytes - self.head.pos % self.size_bytes;
        if rest < len {
            let pad = u32::try_from(rest - RECORD_ALIGN as u64).unwrap_or(0);
            self.write(disk, &Change::Pad(pad), &[])?;
        }
        let pos = self.write(disk, change, data)?;
        if !matches!(change, Change::Mark { .. }) {
            self.last_change = self.head.lsn;
        }
        Ok(pos)
    }

    fn write<D: Disk>(&mut self, disk: &D, change: &Change, data: &[&[u8]]) -> io::Result<u64> {
        let mut head = [0; HEAD_BYTES_MAX];
        let lsn = self.head.lsn + 1;
        let (head_len, crc) = encode(
            change,
            lsn,
            self.durable,
            self.head.crc,
            self.seed,
            &mut head,
        );
        let file_pos = self.head.pos % self.size_bytes;
        let mut parts = [IoSlice::new(&[]); 18];
        parts[0] = IoSlice::new(&head[..head_len]);
        for (part, bytes) in parts[1..].iter_mut().zip(data) {
            *part = IoSlice::new(bytes);
        }
        disk.write_at(DiskFile::Log, file_pos, &parts[..=data.len()])?;
        let before = self.head.pos;
        self.head = LogPoint {
            pos: self.head.pos + sizes(change).1 as u64,
            lsn,
            crc,
        };
        self.carried = self.durable;
        self.look_ahead(disk, before);
        Ok(file_pos + head_len as u64)
    }

    /// Records are not whole blocks of the file system, which would read the block that the next one
    /// touches first while the reactor waits.
    fn look_ahead<D: Disk>(&self, disk: &D, before: u64) {
        let step = self.head.pos / AHEAD_BYTES;
        if step != before / AHEAD_BYTES {
            let pos = (step + 2) * AHEAD_BYTES % self.size_bytes;
            disk.will_write(DiskFile::Log, pos, AHEAD_BYTES);
        }
    }
}
