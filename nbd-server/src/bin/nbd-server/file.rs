//! An export backed by a file or block device.
//!
//! Reads and writes are tried without waiting first (RWF_NOWAIT); what would block goes to a helper thread. After a failed sync the
//! kernel may have dropped dirty pages and reports that only once, so from then on nothing more is acknowledged.
//!
//! A request that is dropped does not stop its helper thread, and its client may send it again and then overwrite what it wrote. So a
//! dropped change that has not started never will, and one that has started ends before any later change is made.

use std::fs::{File, OpenOptions};
use std::io::{self, IoSlice, IoSliceMut};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use nbd_server::{
    Export, ExportError, ExportInfo, Extent, MetaContext, NbdErrno, ReadPart, ReadReply, ZeroFlags,
    limits,
};
use rustix::fs::{Advice, FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Zeroes are written so many bytes at a time where the filesystem cannot make them itself.
const ZERO_BYTES: usize = 1 << 20;
/// Reads of at least so many bytes are checked for being a hole altogether.
const HOLE_CHECK_BYTES: u32 = 64 << 10;

/// A file as an export; clones share it.
#[derive(Clone)]
pub(crate) struct FileExport {
    backing: Arc<Backing>,
}

struct Backing {
    file: File,
    /// Path for humans.
    path: String,
    /// Size of a block device; a regular file is asked each time.
    device_bytes: Option<u64>,
    read_only: bool,
    sync_failed: AtomicBool,
    /// Changes on helper threads whose requests were dropped.
    orphans: watch::Sender<usize>,
}

impl FileExport {
    pub(crate) fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(!read_only).open(path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "neither a regular file nor a block device",
            ));
        }
        let device_bytes = if kind.is_block_device() {
            Some(rustix::fs::seek(&file, SeekFrom::End(0))?)
        } else {
            None
        };
        Ok(Self {
            backing: Arc::new(Backing {
                file,
                path: path.display().to_string(),
                device_bytes,
                read_only,
                sync_failed: AtomicBool::new(false),
                orphans: watch::Sender::new(0),
            }),
        })
    }

    /// Runs what may block on a helper thread.
    async fn block<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Backing) -> Result<T, ExportError> + Send + 'static,
    ) -> Result<T, ExportError> {
        let backing = Arc::clone(&self.backing);
        let done = tokio::task::spawn_blocking(move || work(&backing)).await;
        done.unwrap_or_else(|_| Err(helper_died()))
    }

    /// Changes the file on a helper thread, behind all changes whose requests were dropped.
    async fn change(
        &self,
        work: impl FnOnce(&Backing) -> Result<(), ExportError> + Send + 'static,
    ) -> Result<(), ExportError> {
        self.settled().await;
        let backing = Arc::clone(&self.backing);
        let mut change = Change {
            backing: Arc::clone(&self.backing),
            helper: Some(tokio::task::spawn_blocking(move || work(&backing))),
        };
        let done = match &mut change.helper {
            Some(helper) => helper.await,
            None => return Err(helper_died()),
        };
        done.unwrap_or_else(|_| Err(helper_died()))
    }

    /// Waits for the changes whose requests were dropped.
    async fn settled(&self) {
        let orphans = &self.backing.orphans;
        if *orphans.borrow() > 0 {
            // It cannot fail: the sender is at hand.
            let _ = orphans.subscribe().wait_for(|count| *count == 0).await;
        }
    }
}

/// A change on a helper thread, as its request sees it.
struct Change {
    backing: Arc<Backing>,
    helper: Option<JoinHandle<Result<(), ExportError>>>,
}

impl Drop for Change {
    /// Cancels what has not started; later changes wait for the rest.
    fn drop(&mut self) {
        let Some(helper) = self.helper.take_if(|helper| !helper.is_finished()) else {
            return;
        };
        helper.abort();
        let backing = Arc::clone(&self.backing);
        backing.orphans.send_modify(|count| *count += 1);
        // Without a runtime nothing more is served, and nobody waits.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(async move {
                let _ = helper.await;
                backing.orphans.send_modify(|count| *count -= 1);
            });
        }
    }
}

fn helper_died() -> ExportError {
    ExportError::io("the helper thread died")
}

impl Backing {
    fn size_bytes(&self) -> u64 {
        self.device_bytes
            .unwrap_or_else(|| self.file.metadata().map_or(0, |meta| meta.len()))
    }

    fn check(&self) -> Result<(), ExportError> {
        match self.sync_failed.load(Ordering::Acquire) {
            true => Err(ExportError::io(
                "an earlier sync failed, so writes may be lost; restart the server after repair",
            )),
            false => Ok(()),
        }
    }

    fn sync(&self) -> Result<(), ExportError> {
        self.check()?;
        self.file.sync_data().map_err(|error| {
            self.sync_failed.store(true, Ordering::Release);
            ExportError::from(error)
        })
    }

    fn sync_if(&self, fua: bool) -> Result<(), ExportError> {
        if fua { self.sync() } else { Ok(()) }
    }

    /// Whether nothing is stored in the range.
    fn is_hole(&self, offset: u64, len_bytes: u64) -> bool {
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data >= offset + len_bytes,
            Err(error) => error == Errno::NXIO,
        }
    }

    /// Punches or zeroes in the filesystem; `false` if it cannot.
    fn fallocate(
        &self,
        flags: FallocateFlags,
        offset: u64,
        len_bytes: u64,
    ) -> Result<bool, ExportError> {
        match rustix::fs::fallocate(
            &self.file,
            flags | FallocateFlags::KEEP_SIZE,
            offset,
            len_bytes,
        ) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV) => Ok(false),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }

    fn zero(&self, offset: u64, len_bytes: u64, flags: ZeroFlags) -> Result<(), ExportError> {
        self.check()?;
        let how = if flags.no_hole {
            FallocateFlags::ZERO_RANGE
        } else {
            FallocateFlags::PUNCH_HOLE
        };
        if !self.fallocate(how, offset, len_bytes)? {
            if flags.fast {
                return Err(ExportError::new(
                    NbdErrno::NotSup,
                    "the filesystem below can only write zeroes as data",
                ));
            }
            let zeroes = vec![0; ZERO_BYTES.min(usize::try_from(len_bytes).unwrap_or(ZERO_BYTES))];
            let end = offset + len_bytes;
            for at in (offset..end).step_by(zeroes.len()) {
                let step = (end - at).min(zeroes.len() as u64) as usize;
                self.file.write_all_at(&zeroes[..step], at)?;
            }
        }
        self.sync_if(flags.fua)
    }

    fn extents(&self, offset: u64, len_bytes: u64) -> Vec<Extent> {
        let (mut extents, mut at, end) = (Vec::new(), offset, offset + len_bytes);
        while at < end && extents.len() < limits::EXTENTS_MAX {
            let data = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) => data.min(end),
                Err(Errno::NXIO) => end,
                // A device or filesystem that cannot tell: allocated, which is always safe.
                Err(_) => at,
            };
            if data > at {
                extents.push(Extent::allocation(data - at, true, true));
                at = data;
                continue;
            }
            let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(at))
                .unwrap_or(end)
                .clamp(at + 1, end);
            extents.push(Extent::allocation(hole - at, false, false));
            at = hole;
        }
        extents
    }
}

impl Export for FileExport {
    fn info(&self) -> ExportInfo {
        ExportInfo {
            read_only: self.backing.read_only,
            fast_zero: true,
            ..ExportInfo::new(self.backing.size_bytes())
        }
    }

    fn description(&self) -> String {
        self.backing.path.clone()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadReply, ExportError> {
        if len >= HOLE_CHECK_BYTES && self.backing.is_hole(offset, u64::from(len)) {
            return Ok(ReadReply::One(ReadPart::Hole(len)));
        }
        let mut data = vec![0; len as usize];
        let flags = ReadWriteFlags::NOWAIT;
        let now = rustix::io::preadv2(
            &self.backing.file,
            &mut [IoSliceMut::new(&mut data)],
            offset,
            flags,
        )
        .unwrap_or(0);
        if now < data.len() {
            let work = move |backing: &Backing| {
                backing
                    .file
                    .read_exact_at(&mut data[now..], offset + now as u64)?;
                Ok(data)
            };
            data = self.block(work).await?;
        }
        Ok(Bytes::from(data).into())
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), ExportError> {
        self.settled().await;
        self.backing.check()?;
        let flags = ReadWriteFlags::NOWAIT;
        let now = rustix::io::pwritev2(&self.backing.file, &[IoSlice::new(&data)], offset, flags)
            .unwrap_or(0);
        if now == data.len() && !fua {
            return Ok(());
        }
        let work = move |backing: &Backing| {
            backing
                .file
                .write_all_at(&data[now..], offset + now as u64)?;
            backing.sync_if(fua)
        };
        self.change(work).await
    }

    async fn flush(&self) -> Result<(), ExportError> {
        self.block(Backing::sync).await
    }

    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), ExportError> {
        let work = move |backing: &Backing| {
            backing.check()?;
            backing.fallocate(FallocateFlags::PUNCH_HOLE, offset, len)?;
            backing.sync_if(fua)
        };
        self.change(work).await
    }

    async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), ExportError> {
        self.change(move |backing| backing.zero(offset, len, flags))
            .await
    }

    async fn cache(&self, offset: u64, len: u64) -> Result<(), ExportError> {
        let advised = rustix::fs::fadvise(
            &self.backing.file,
            offset,
            std::num::NonZeroU64::new(len),
            Advice::WillNeed,
        );
        advised.map_err(|error| io::Error::from(error).into())
    }

    async fn block_status(
        &self,
        _context: &MetaContext,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, ExportError> {
        self.block(move |backing| Ok(backing.extents(offset, len)))
            .await
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::task::{Context, Poll, Waker};

    use super::*;

    /// Helper threads run in order: there is one.
    #[test]
    fn a_dropped_change_is_not_made_behind_a_later_one() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .max_blocking_threads(1)
            .build()
            .unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let export = FileExport::open(file.path(), false).unwrap();
        runtime.block_on(async {
            let (started, has_started) = mpsc::channel();
            let (go, gate) = mpsc::channel::<()>();
            let cx = &mut Context::from_waker(Waker::noop());
            let mut stale = Box::pin(export.change(move |backing| {
                started.send(()).unwrap();
                gate.recv().unwrap();
                Ok(backing.file.write_all_at(b"stale", 0)?)
            }));
            assert!(stale.as_mut().poll(cx).is_pending());
            let mut queued =
                Box::pin(export.change(|backing| Ok(backing.file.write_all_at(b"queued", 1024)?)));
            assert!(queued.as_mut().poll(cx).is_pending());
            has_started.recv().unwrap();
            drop((stale, queued));
            let mut new = Box::pin(export.write(0, Bytes::from_static(b"newer"), false));
            assert_eq!(
                new.as_mut().poll(cx),
                Poll::Pending,
                "the started one must end"
            );
            go.send(()).unwrap();
            new.await.unwrap();
        });
        let bytes = std::fs::read(file.path()).unwrap();
        assert_eq!(bytes[..5], *b"newer");
        assert_eq!(bytes[1024..1030], [0; 6], "it had not started");
    }
}
