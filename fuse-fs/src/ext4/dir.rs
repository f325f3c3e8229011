//! Blocks of a directory: entries, one behind the other, that fill the block.
//!
//! ```text
//! entry: 0 u32 inode (0: free), 4 u16 length with padding, 6 u8 name length, 7 u8 kind of file, 8 name
//! tail (metadata_csum): a free entry of 12 bytes, 0 name length, kind 0xde, 8 u32 CRC-32C from the inode's seed
//! ```

use crate::ext4::bytes::{le16, le32, part, put};
use crate::ext4::crc::crc32c;

const HEADER_BYTES: usize = 8;
const MIN_ENTRY_BYTES: usize = 12;
const TAIL_BYTES: usize = 12;
const TAIL_KIND: u8 = 0xde;
const WIDE_BLOCK_BYTES: usize = 65536;

/// One entry; `inode` 0 is free room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    pub inode: u32,
    /// 0: the filesystem does not store kinds.
    pub kind: u8,
    pub name: &'a [u8],
}

/// An entry and the bytes of the block that it covers, padding included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot<'a> {
    pub at: usize,
    pub length: usize,
    pub entry: Entry<'a>,
}

impl Slot<'_> {
    /// The bytes that the entry itself needs; none if it is free.
    #[must_use]
    pub fn used(&self) -> usize {
        match self.entry.inode {
            0 => 0,
            _ => own_length(self.entry.name),
        }
    }
}

/// The entries of a block, without its tail; ends behind an error.
pub struct Slots<'a> {
    block: &'a [u8],
    at: usize,
    stores_kinds: bool,
}

/// The entries of `block` in their order.
#[must_use]
pub fn slots(block: &[u8], stores_kinds: bool) -> Slots<'_> {
    let at = 0;
    Slots {
        block,
        at,
        stores_kinds,
    }
}

impl<'a> Slots<'a> {
    fn slot(&self) -> Result<Slot<'a>, String> {
        let (block, at) = (self.block, self.at);
        let length = length_of(le16(block, at + 4), block.len());
        let name_bytes = usize::from(le16(block, at + 6) & 0xff);
        if length < MIN_ENTRY_BYTES || !length.is_multiple_of(4) || at + length > block.len() {
            return Err(format!("entry at {at} has a length of {length}"));
        }
        if HEADER_BYTES + name_bytes > length {
            return Err(format!(
                "entry at {at} has a name of {name_bytes} bytes in {length}"
            ));
        }
        let entry = Entry {
            inode: le32(block, at),
            kind: if self.stores_kinds { block[at + 7] } else { 0 },
            name: part(block, at + HEADER_BYTES, at + HEADER_BYTES + name_bytes),
        };
        Ok(Slot { at, length, entry })
    }
}

impl<'a> Iterator for Slots<'a> {
    type Item = Result<Slot<'a>, String>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.block.len() || is_tail(part(self.block, self.at, self.block.len())) {
            return None;
        }
        let slot = self.slot();
        self.at = match &slot {
            Ok(slot) => slot.at + slot.length,
            Err(_) => self.block.len(),
        };
        Some(slot)
    }
}

/// The entries of a block, without its tail.
///
/// # Errors
/// What is wrong with the block, as a phrase.
pub fn entries(block: &[u8], stores_kinds: bool) -> Result<Vec<Entry<'_>>, String> {
    slots(block, stores_kinds)
        .map(|slot| slot.map(|slot| slot.entry))
        .collect()
}

/// The bytes of an entry with `name` and no more room than it needs.
#[must_use]
pub fn own_length(name: &[u8]) -> usize {
    (HEADER_BYTES + name.len())
        .next_multiple_of(4)
        .max(MIN_ENTRY_BYTES)
}

/// Makes a block of `entries`, which fit, and with a `seed` a tail; without entries, of free room.
#[must_use]
pub fn write_block(entries: &[Entry<'_>], block_bytes: usize, seed: Option<u32>) -> Vec<u8> {
    let mut block = vec![0; block_bytes];
    let end = block_bytes - seed.map_or(0, |_| TAIL_BYTES);
    let free = [Entry {
        inode: 0,
        kind: 0,
        name: b"",
    }];
    let entries = if entries.is_empty() { &free } else { entries };
    let mut at = 0;
    for (index, entry) in entries.iter().enumerate() {
        let length = if index + 1 == entries.len() {
            end - at
        } else {
            own_length(entry.name)
        };
        write_entry(&mut block, at, entry, length);
        at += length;
    }
    if seed.is_some() {
        let tail = Entry {
            inode: 0,
            kind: TAIL_KIND,
            name: b"",
        };
        write_entry(&mut block, end, &tail, TAIL_BYTES);
    }
    seal(&mut block, seed);
    block
}

/// Puts the checksum into the tail of a block that has one.
pub fn seal(block: &mut [u8], seed: Option<u32>) {
    if let Some(seed) = seed {
        let end = block.len() - TAIL_BYTES;
        let crc = crc32c(seed, part(block, 0, end));
        put(block, end + 8, &crc.to_le_bytes());
    }
}

/// Writes an entry of `length` bytes at `at`.
pub(super) fn write_entry(block: &mut [u8], at: usize, entry: &Entry<'_>, length: usize) {
    put(block, at, &entry.inode.to_le_bytes());
    set_length(block, at, length);
    put(block, at + 6, &[entry.name.len() as u8, entry.kind]);
    put(block, at + HEADER_BYTES, entry.name);
}

/// Changes how far the entry at `at` reaches.
pub(super) fn set_length(block: &mut [u8], at: usize, length: usize) {
    let stored = stored_length(length, block.len());
    put(block, at + 4, &stored.to_le_bytes());
}

fn stored_length(length: usize, block_bytes: usize) -> u16 {
    match length {
        _ if length < WIDE_BLOCK_BYTES => length as u16,
        _ if length == block_bytes => u16::MAX,
        _ => (length & 0xfffc | length >> 16) as u16,
    }
}

/// Lengths of blocks of 64 KiB do not fit 16 bits; their lowest two are the highest.
fn length_of(stored: u16, block_bytes: usize) -> usize {
    let stored = usize::from(stored);
    match stored {
        _ if block_bytes < WIDE_BLOCK_BYTES => stored,
        0 | 0xffff => block_bytes,
        _ => stored & 0xfffc | (stored & 3) << 16,
    }
}

/// Whether the block ends with a checksum, and a right one.
#[must_use]
pub fn checksum_matches(block: &[u8], seed: u32) -> bool {
    let at = block.len() - TAIL_BYTES;
    let tail = part(block, at, block.len());
    is_tail(tail) && crc32c(seed, part(block, 0, at)) == le32(tail, 8)
}

/// Whether `rest`, what is left of a block, is its tail.
fn is_tail(rest: &[u8]) -> bool {
    let length = usize::from(le16(rest, 4));
    rest.len() == TAIL_BYTES
        && le32(rest, 0) == 0
        && length == TAIL_BYTES
        && rest[6..8] == [0, TAIL_KIND]
}
