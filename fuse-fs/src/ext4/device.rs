//! The block device below the filesystem: a seam with a volume of blockd on one side and a file on the other.

use crate::backend::OpenTarget;
use bytes::Bytes;
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::future::Future;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

/// A future that a device answers with.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send + 'a>>;

/// Bytes that are addressed by offset. Operations run concurrently.
pub trait Device: Send + Sync {
    fn size_bytes(&self) -> u64;
    /// Exactly `len_bytes`; the range lies inside the size.
    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Pending<'_, Bytes>;
    fn write(&self, offset_bytes: u64, data: Bytes) -> Pending<'_, ()>;
    /// Reads give zeros afterwards; the space is freed where that is possible.
    fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Pending<'_, ()>;
    /// Every write that was answered before is durable afterwards.
    fn flush(&self) -> Pending<'_, ()>;
}

/// An image in a file, or a block device of this machine.
pub struct FileDevice {
    file: File,
    size_bytes: u64,
}

impl FileDevice {
    /// Opens `path` for reading, and with `write` for writing.
    ///
    /// # Errors
    /// It cannot be opened, or its size is not known.
    pub fn open(path: &Path, write: bool) -> io::Result<Self> {
        let mut file = File::options().read(true).write(write).open(path)?;
        // Of a block device, metadata tells no size.
        let size_bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
        Ok(Self { file, size_bytes })
    }
}

impl Device for FileDevice {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Pending<'_, Bytes> {
        let mut bytes = vec![0; len_bytes as usize];
        let read = self.file.read_exact_at(&mut bytes, offset_bytes);
        Box::pin(std::future::ready(read.map(|()| bytes.into())))
    }

    fn write(&self, offset_bytes: u64, data: Bytes) -> Pending<'_, ()> {
        Box::pin(std::future::ready(
            self.file.write_all_at(&data, offset_bytes),
        ))
    }

    fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Pending<'_, ()> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let freed = rustix::fs::fallocate(&self.file, how, offset_bytes, len_bytes);
        Box::pin(std::future::ready(freed.map_err(io::Error::from)))
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(std::future::ready(self.file.sync_data()))
    }
}

/// A volume or snapshot of the servers.
pub struct TargetDevice(pub Arc<dyn OpenTarget>);

impl Device for TargetDevice {
    fn size_bytes(&self) -> u64 {
        self.0.size_bytes()
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Pending<'_, Bytes> {
        Box::pin(async move {
            let read = self.0.read(offset_bytes, len_bytes).await;
            read.map_err(io::Error::other)
        })
    }

    fn write(&self, offset_bytes: u64, data: Bytes) -> Pending<'_, ()> {
        Box::pin(async move {
            let written = self.0.write(offset_bytes, data).await;
            written.map_err(io::Error::other)
        })
    }

    fn zero(&self, offset_bytes: u64, len_bytes: u64) -> Pending<'_, ()> {
        Box::pin(async move {
            let zeroed = self.0.zero(offset_bytes, len_bytes, false).await;
            zeroed.map_err(io::Error::other)
        })
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(async move { self.0.flush().await.map_err(io::Error::other) })
    }
}
