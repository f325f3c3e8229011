//! The bytes of one open volume: what read, write, fallocate and lseek mean on it.
//!
//! A volume behaves as a block device does: its size is fixed to a write (one that starts at the
//! end is `ENOSPC`, one that crosses it is short), and only `truncate` makes it larger.

use crate::backend::{Answer, BackendError, Extent, OpenTarget};
use bytes::Bytes;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Bytes of one TRIM, WRITE_ZEROES or extents request, so that each has its own deadline.
const STEP_BYTES: u64 = 1 << 30;

/// What `fallocate` can do to a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallocate {
    /// Free the range.
    Punch,
    /// Zeros, and the space stays reserved if it was.
    Zero,
}

impl Fallocate {
    /// Reads the mode bits of fallocate(2); everything that a thin volume cannot do is `EOPNOTSUPP`.
    ///
    /// # Errors
    /// `EOPNOTSUPP` for preallocation, collapse, insert and unshare.
    pub fn of_mode(mode: i32) -> Result<Self, BackendError> {
        match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE => Ok(Self::Punch),
            libc::FALLOC_FL_ZERO_RANGE => Ok(Self::Zero),
            _ => Err(BackendError::new(libc::EOPNOTSUPP, "fallocate mode")),
        }
    }
}

/// An open volume or snapshot, shared by all who have it open.
pub struct OpenFile {
    target: Arc<dyn OpenTarget>,
    deadline: Duration,
    /// Changes answered so far, and how many of them a flush has covered.
    changes: AtomicU64,
    flushed_changes: AtomicU64,
}

impl OpenFile {
    /// `deadline` bounds each request to the backend.
    #[must_use]
    pub fn new(target: Arc<dyn OpenTarget>, deadline: Duration) -> Self {
        Self {
            target,
            deadline,
            changes: AtomicU64::new(0),
            flushed_changes: AtomicU64::new(0),
        }
    }

    /// The size as last read from the servers.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.target.size_bytes()
    }

    /// At most `len_bytes`; fewer at the end of the volume.
    ///
    /// # Errors
    /// What the backend reports, `EIO` after the deadline.
    pub async fn read(&self, offset_bytes: u64, len_bytes: u32) -> Result<Bytes, BackendError> {
        let len = self.clip(offset_bytes, u64::from(len_bytes)).await?;
        match u32::try_from(len) {
            Ok(0) => Ok(Bytes::new()),
            Ok(len) => {
                self.within("read", self.target.read(offset_bytes, len))
                    .await
            }
            Err(_) => Err(BackendError::new(libc::EINVAL, "read of 4 GiB")),
        }
    }

    /// Number of bytes written; fewer than given at the end of the volume.
    ///
    /// # Errors
    /// `EROFS` on a snapshot, `ENOSPC` at the end, what the backend reports, `EIO` after the deadline.
    pub async fn write(&self, offset_bytes: u64, mut data: Bytes) -> Result<u32, BackendError> {
        self.writable()?;
        let len = self.clip(offset_bytes, data.len() as u64).await?;
        if len == 0 && !data.is_empty() {
            return Err(BackendError::new(
                libc::ENOSPC,
                "write at the end of the volume",
            ));
        }
        data.truncate(usize::try_from(len).unwrap_or(usize::MAX));
        let written = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let result = self
            .within("write", self.target.write(offset_bytes, data))
            .await;
        self.changed();
        result.map(|()| written)
    }

    /// Zeros in the part of the range that lies inside the volume.
    ///
    /// # Errors
    /// `EROFS` on a snapshot, what the backend reports, `EIO` after the deadline.
    pub async fn fallocate(
        &self,
        how: Fallocate,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<(), BackendError> {
        self.writable()?;
        let keep_allocated = how == Fallocate::Zero;
        let end = offset_bytes + self.clip(offset_bytes, len_bytes).await?;
        let mut at = offset_bytes;
        while at < end {
            let step = STEP_BYTES.min(end - at);
            let result = self
                .within("zero", self.target.zero(at, step, keep_allocated))
                .await;
            self.changed();
            result?;
            at += step;
        }
        Ok(())
    }

    /// Everything answered before is durable when this returns, whoever wrote it.
    ///
    /// # Errors
    /// What the backend reports, `EIO` after the deadline.
    pub async fn flush(&self) -> Result<(), BackendError> {
        let changes = self.changes.load(Ordering::SeqCst);
        self.within("flush", self.target.flush()).await?;
        self.flushed_changes.fetch_max(changes, Ordering::SeqCst);
        Ok(())
    }

    /// As [`OpenFile::flush`], without asking the servers if nothing was changed through this file.
    ///
    /// # Errors
    /// As [`OpenFile::flush`].
    pub async fn flush_if_changed(&self) -> Result<(), BackendError> {
        if self.is_changed() {
            self.flush().await
        } else {
            Ok(())
        }
    }

    /// Whether a change was answered that no flush has covered.
    #[must_use]
    pub fn is_changed(&self) -> bool {
        self.changes.load(Ordering::SeqCst) != self.flushed_changes.load(Ordering::SeqCst)
    }

    /// First byte at or after `offset_bytes` that is in a hole (`hole`) or in data; the end is a hole.
    ///
    /// # Errors
    /// `ENXIO` past the end or if there is no data left.
    pub async fn seek(&self, offset_bytes: u64, hole: bool) -> Result<u64, BackendError> {
        let nothing = || BackendError::new(libc::ENXIO, "no data up to the end of the volume");
        if self.clip(offset_bytes, 1).await? == 0 {
            return Err(nothing());
        }
        let end = self.size_bytes();
        let mut at = offset_bytes;
        while at < end {
            let step = STEP_BYTES.min(end - at);
            let extents = self
                .within("extents", self.target.extents(at, step))
                .await?;
            if let Some(found) = first_of(&extents, hole) {
                return Ok(at + found.min(step));
            }
            at += step;
        }
        if hole { Ok(end) } else { Err(nothing()) }
    }

    /// Reads the size anew.
    ///
    /// # Errors
    /// What the backend reports, `EIO` after the deadline.
    pub async fn refresh(&self) -> Result<(), BackendError> {
        self.within("refresh", self.target.refresh()).await
    }

    /// How much of the range lies inside the volume, whose size is read anew if the range leaves it.
    async fn clip(&self, offset_bytes: u64, len_bytes: u64) -> Result<u64, BackendError> {
        let inside = |size_bytes: u64| size_bytes.saturating_sub(offset_bytes).min(len_bytes);
        if inside(self.size_bytes()) < len_bytes {
            self.refresh().await?;
        }
        Ok(inside(self.size_bytes()))
    }

    fn writable(&self) -> Result<(), BackendError> {
        match self.target.is_read_only() {
            true => Err(BackendError::new(libc::EROFS, "a snapshot is read-only")),
            false => Ok(()),
        }
    }

    /// A failed change counts too: part of it may have been made.
    fn changed(&self) {
        self.changes.fetch_add(1, Ordering::SeqCst);
    }

    fn within<'a, T: 'a>(
        &'a self,
        what: &'static str,
        answer: Answer<'a, T>,
    ) -> impl Future<Output = Result<T, BackendError>> + Send + 'a {
        within(what, self.deadline, answer)
    }
}

/// Offset in `extents` of the first one that is a hole (`hole`) or data.
fn first_of(extents: &[Extent], hole: bool) -> Option<u64> {
    let mut at = 0u64;
    for extent in extents {
        if extent.hole == hole && extent.len_bytes > 0 {
            return Some(at);
        }
        at = at.saturating_add(extent.len_bytes);
    }
    None
}

/// The answer, or `EIO` after `deadline`.
///
/// # Errors
/// What the answer reports, `EIO` after the deadline.
pub async fn within<T>(
    what: &'static str,
    deadline: Duration,
    answer: Answer<'_, T>,
) -> Result<T, BackendError> {
    match tokio::time::timeout(deadline, answer).await {
        Ok(result) => result,
        Err(_) => {
            let message = format!("{what}: no answer within {} s", deadline.as_secs());
            Err(BackendError::new(libc::EIO, message))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_punch_and_zero_can_be_done() {
        let keep = libc::FALLOC_FL_KEEP_SIZE;
        assert_eq!(
            Fallocate::of_mode(keep | libc::FALLOC_FL_PUNCH_HOLE),
            Ok(Fallocate::Punch)
        );
        assert_eq!(
            Fallocate::of_mode(libc::FALLOC_FL_ZERO_RANGE),
            Ok(Fallocate::Zero)
        );
        for mode in [0, keep, libc::FALLOC_FL_COLLAPSE_RANGE, -1] {
            assert_eq!(
                Fallocate::of_mode(mode).unwrap_err().errno,
                libc::EOPNOTSUPP
            );
        }
    }

    #[test]
    fn the_first_run_of_a_kind_is_found() {
        let run = |len_bytes, hole| Extent { len_bytes, hole };
        let runs = [run(0, true), run(10, false), run(5, true), run(1, false)];
        assert_eq!(first_of(&runs, false), Some(0));
        assert_eq!(first_of(&runs, true), Some(10));
        assert_eq!(first_of(&runs[1..2], true), None);
    }
}
