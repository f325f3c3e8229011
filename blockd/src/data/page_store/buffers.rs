//! Buffers for large reads, used again and again: fresh memory of the system costs a page fault for
//! every 4 KiB, which is more than the copy into it.

use bytes::Bytes;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a buffer. A few of them fit the second-level cache, so that what was just read and
/// verified is still there when it is sent.
pub(super) const BUFFER_BYTES: usize = 128 << 10;
/// Unused buffers that are kept: 8 MiB.
const KEPT_MAX: usize = 64;

type Kept = Arc<Mutex<Vec<Box<[u8]>>>>;

/// The unused buffers of a store.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    kept: Kept,
}

/// A buffer on loan; returns when it, or the last `Bytes` of it, is dropped.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: Box<[u8]>,
    len_bytes: usize,
    kept: Kept,
}

impl Buffers {
    /// A buffer of `len_bytes`, at most `BUFFER_BYTES`, with anything in it.
    pub(super) fn take(&self, len_bytes: usize) -> Buffer {
        let kept = self
            .kept
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        Buffer {
            memory: kept.unwrap_or_else(|| vec![0; BUFFER_BYTES].into()),
            len_bytes: len_bytes.min(BUFFER_BYTES),
            kept: Arc::clone(&self.kept),
        }
    }
}

impl Buffer {
    pub(super) fn as_mut(&mut self) -> &mut [u8] {
        &mut self.memory[..self.len_bytes]
    }

    pub(super) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.memory[..self.len_bytes]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT_MAX {
            kept.push(std::mem::take(&mut self.memory));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_with_its_last_reference() {
        let buffers = Buffers::default();
        let kept = || buffers.kept.lock().unwrap().len();
        let mut buffer = buffers.take(5);
        buffer.as_mut().copy_from_slice(b"hello");
        let bytes = buffer.freeze();
        let slice = bytes.slice(1..3);
        drop(bytes);
        assert_eq!((&slice[..], kept()), (&b"el"[..], 0));
        drop(slice);
        assert_eq!(kept(), 1);
        let many: Vec<Buffer> = (0..KEPT_MAX + 2)
            .map(|_| buffers.take(BUFFER_BYTES))
            .collect();
        assert_eq!(kept(), 0);
        drop(many);
        assert_eq!(kept(), KEPT_MAX);
    }
}
