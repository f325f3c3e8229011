//! An export in memory: sparse, in chunks of 64 KiB that are allocated when they are written.
//!
//! A read hands out references to chunks; a write copies a chunk first if a reply still refers to it.

use std::cell::RefCell;
use std::rc::Rc;

use bytes::{Bytes, BytesMut};
use nbd_server::{
    Export, ExportError, ExportInfo, Extent, MetaContext, ReadPart, ReadReply, ZeroFlags, limits,
};

const CHUNK_BYTES: u64 = 64 << 10;
/// Chunks of a leaf of the chunk table: 64 MiB of the export.
const LEAF_CHUNKS: u64 = 1024;
/// Bytes that are cleared before other connections get their turn.
const TURN_BYTES: u64 = 64 << 20;

type Leaf = Box<[Option<Bytes>]>;

/// Memory as an export; clones share it.
#[derive(Clone)]
pub(crate) struct MemoryExport {
    table: Rc<RefCell<Vec<Option<Leaf>>>>,
    info: ExportInfo,
}

/// The part of a range that is within one chunk.
struct Piece {
    chunk: u64,
    start: usize,
    len_bytes: usize,
}

impl Piece {
    /// The first piece of a range that is not empty.
    fn first(at: u64, end: u64) -> Self {
        let (chunk, start) = (at / CHUNK_BYTES, at % CHUNK_BYTES);
        Self {
            chunk,
            start: start as usize,
            len_bytes: (end - at).min(CHUNK_BYTES - start) as usize,
        }
    }

    fn is_whole(&self) -> bool {
        self.len_bytes as u64 == CHUNK_BYTES
    }
}

/// A range cut at chunk borders.
fn pieces(offset: u64, len_bytes: u64) -> impl Iterator<Item = Piece> {
    let (mut at, end) = (offset, offset + len_bytes);
    std::iter::from_fn(move || {
        let piece = (at < end).then(|| Piece::first(at, end))?;
        at += piece.len_bytes as u64;
        Some(piece)
    })
}

impl MemoryExport {
    pub(crate) fn new(size_bytes: u64, read_only: bool) -> Self {
        let leaves = size_bytes.div_ceil(CHUNK_BYTES * LEAF_CHUNKS) as usize;
        let table = Rc::new(RefCell::new(vec![None; leaves]));
        Self {
            table,
            info: ExportInfo {
                fast_zero: true,
                read_only,
                ..ExportInfo::new(size_bytes)
            },
        }
    }

    fn read_piece(&self, piece: &Piece) -> ReadPart {
        let table = self.table.borrow();
        let leaf = table[(piece.chunk / LEAF_CHUNKS) as usize].as_ref();
        match leaf.and_then(|leaf| leaf[(piece.chunk % LEAF_CHUNKS) as usize].as_ref()) {
            Some(chunk) => ReadPart::Data(chunk.slice(piece.start..piece.start + piece.len_bytes)),
            None => ReadPart::Hole(piece.len_bytes as u32),
        }
    }

    /// Changes the slot of a chunk.
    fn with_slot(&self, chunk: u64, change: impl FnOnce(&mut Option<Bytes>)) {
        let mut table = self.table.borrow_mut();
        let leaf = table[(chunk / LEAF_CHUNKS) as usize]
            .get_or_insert_with(|| vec![None; LEAF_CHUNKS as usize].into());
        change(&mut leaf[(chunk % LEAF_CHUNKS) as usize]);
    }

    /// Whether the byte at `at` is allocated, and the end of a run for which that holds.
    fn allocation(&self, at: u64) -> (bool, u64) {
        let table = self.table.borrow();
        let (chunk, leaf) = (at / CHUNK_BYTES, at / CHUNK_BYTES / LEAF_CHUNKS);
        match &table[leaf as usize] {
            None => (false, (leaf + 1) * LEAF_CHUNKS * CHUNK_BYTES),
            Some(leaf) => {
                let slot = &leaf[(chunk % LEAF_CHUNKS) as usize];
                (slot.is_some(), (chunk + 1) * CHUNK_BYTES)
            }
        }
    }

    /// Changes bytes of a chunk, which is allocated if need be.
    fn change(&self, piece: &Piece, change: impl FnOnce(&mut [u8])) {
        self.with_slot(piece.chunk, |slot| {
            let mut bytes = match slot.take().map(Bytes::try_into_mut) {
                Some(Ok(own)) => own,
                Some(Err(shared)) => BytesMut::from(&shared[..]),
                None => BytesMut::zeroed(CHUNK_BYTES as usize),
            };
            change(&mut bytes[piece.start..piece.start + piece.len_bytes]);
            *slot = Some(bytes.freeze());
        });
    }

    /// Frees whole chunks unless they shall stay allocated, and clears the rest.
    async fn clear(&self, offset: u64, len_bytes: u64, no_hole: bool) {
        let (mut turn_bytes, mut at, end) = (0, offset, offset + len_bytes);
        while at < end {
            let (is_allocated, border) = self.allocation(at);
            if !is_allocated && !no_hole {
                at = border;
                continue;
            }
            at += self.clear_piece(at, end, no_hole);
            turn_bytes += CHUNK_BYTES;
            if turn_bytes >= TURN_BYTES {
                tokio::task::yield_now().await;
                turn_bytes = 0;
            }
        }
    }

    /// Clears what one chunk has of a range and returns its length in bytes.
    fn clear_piece(&self, at: u64, end: u64, no_hole: bool) -> u64 {
        let piece = Piece::first(at, end);
        if piece.is_whole() && !no_hole {
            self.with_slot(piece.chunk, |slot| *slot = None);
        } else {
            self.change(&piece, |bytes| bytes.fill(0));
        }
        piece.len_bytes as u64
    }
}

impl Export for MemoryExport {
    fn info(&self) -> ExportInfo {
        self.info
    }

    fn description(&self) -> String {
        "memory".to_owned()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadReply, ExportError> {
        let mut pieces = pieces(offset, u64::from(len)).map(|piece| self.read_piece(&piece));
        if offset % CHUNK_BYTES + u64::from(len) > CHUNK_BYTES {
            return Ok(ReadReply::Parts(pieces.collect()));
        }
        pieces
            .next()
            .map(ReadReply::One)
            .ok_or_else(|| ExportError::io("empty range"))
    }

    async fn write(&self, offset: u64, data: Bytes, _fua: bool) -> Result<(), ExportError> {
        let mut rest = &data[..];
        for piece in pieces(offset, data.len() as u64) {
            let (now, later) = rest.split_at(piece.len_bytes);
            self.change(&piece, |bytes| bytes.copy_from_slice(now));
            rest = later;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), ExportError> {
        Ok(())
    }

    async fn trim(&self, offset: u64, len: u64, _fua: bool) -> Result<(), ExportError> {
        self.clear(offset, len, false).await;
        Ok(())
    }

    async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), ExportError> {
        self.clear(offset, len, flags.no_hole).await;
        Ok(())
    }

    async fn cache(&self, _offset: u64, _len: u64) -> Result<(), ExportError> {
        Ok(())
    }

    async fn block_status(
        &self,
        _context: &MetaContext,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, ExportError> {
        let mut extents: Vec<Extent> = Vec::new();
        let (mut at, end) = (offset, offset + len);
        while at < end {
            let (is_allocated, border) = self.allocation(at);
            let len_bytes = border.min(end) - at;
            let status = Extent::allocation(len_bytes, !is_allocated, !is_allocated);
            let is_full = extents.len() == limits::EXTENTS_MAX;
            match extents.last_mut() {
                Some(last) if last.flags == status.flags => last.len += len_bytes,
                _ if is_full => break,
                _ => extents.push(status),
            }
            at = border;
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn flatten(reply: &ReadReply) -> Vec<u8> {
        let part = |part: &ReadPart| match part {
            ReadPart::Data(data) => data.to_vec(),
            ReadPart::Hole(len_bytes) => vec![0; *len_bytes as usize],
        };
        reply.parts().iter().flat_map(part).collect()
    }

    #[tokio::test]
    async fn holes_appear_and_disappear_with_writes_and_zeroes() {
        let memory = MemoryExport::new(SIZE, false);
        memory
            .write(CHUNK_BYTES, Bytes::from_static(b"x"), false)
            .await
            .unwrap();
        let holes = |extents: Vec<Extent>| {
            extents
                .iter()
                .map(|extent| (extent.len, extent.flags & Extent::HOLE != 0))
                .collect::<Vec<_>>()
        };
        let status = holes(
            memory
                .block_status(&MetaContext::Allocation, 0, SIZE)
                .await
                .unwrap(),
        );
        assert_eq!(
            status,
            [
                (CHUNK_BYTES, true),
                (CHUNK_BYTES, false),
                (SIZE - 2 * CHUNK_BYTES, true)
            ]
        );
        memory
            .write_zeroes(0, SIZE, ZeroFlags::default())
            .await
            .unwrap();
        assert_eq!(
            holes(
                memory
                    .block_status(&MetaContext::Allocation, 0, SIZE)
                    .await
                    .unwrap()
            ),
            [(SIZE, true)]
        );
        memory
            .write_zeroes(
                1,
                2,
                ZeroFlags {
                    no_hole: true,
                    ..ZeroFlags::default()
                },
            )
            .await
            .unwrap();
        assert_eq!(
            memory
                .block_status(&MetaContext::Allocation, 0, 1)
                .await
                .unwrap()[0]
                .flags,
            0
        );
    }

    #[tokio::test]
    async fn a_reply_keeps_its_bytes_when_the_chunk_is_written_again() {
        let memory = MemoryExport::new(SIZE, false);
        memory
            .write(10, Bytes::from_static(b"before"), false)
            .await
            .unwrap();
        let reply = memory.read(10, 6).await.unwrap();
        memory
            .write(10, Bytes::from_static(b"after!"), false)
            .await
            .unwrap();
        assert_eq!(flatten(&reply), b"before");
        assert_eq!(flatten(&memory.read(10, 6).await.unwrap()), b"after!");
    }

    #[tokio::test]
    async fn ranges_cross_chunk_borders() {
        let memory = MemoryExport::new(SIZE, false);
        let data: Vec<u8> = (0..200_000u32).map(|index| index as u8).collect();
        memory
            .write(60_000, Bytes::from(data.clone()), false)
            .await
            .unwrap();
        assert_eq!(flatten(&memory.read(60_000, 200_000).await.unwrap()), data);
        memory.trim(60_001, 199_998, false).await.unwrap();
        let left = flatten(&memory.read(60_000, 200_000).await.unwrap());
        assert!(
            left[0] == data[0]
                && left[199_999] == data[199_999]
                && left[1..199_999].iter().all(|byte| *byte == 0)
        );
    }
}
