//! A device that takes its time, as one over a network does.

use bytes::Bytes;
use fuse_fs::ext4::device::{Device, FileDevice, Pending};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// An image whose reads take 0, 1, or 2 ms in turns; it gives space back 2 ms after it was asked to.
pub(crate) struct Late {
    below: FileDevice,
    reads: AtomicU32,
}

impl Late {
    pub(crate) fn open(image: &Path) -> Self {
        Self {
            below: FileDevice::open(image, true).unwrap(),
            reads: AtomicU32::new(0),
        }
    }
}

impl Device for Late {
    fn size_bytes(&self) -> u64 {
        self.below.size_bytes()
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Pending<'_, Bytes> {
        let turn = self.reads.fetch_add(1, Ordering::Relaxed) % 3;
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(turn.into())).await;
            self.below.read(offset_bytes, len_bytes).await
        })
    }

    fn write(&self, offset_bytes: u64, data: Bytes) -> Pending<'_, ()> {
        self.below.write(offset_bytes, data)
    }

    fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Pending<'_, ()> {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(2)).await;
            self.below.zero(offset_bytes, len_bytes).await
        })
    }

    fn flush(&self) -> Pending<'_, ()> {
        self.below.flush()
    }
}
