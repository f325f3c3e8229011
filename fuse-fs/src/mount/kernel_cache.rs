//! What the kernel keeps of files in its cache, and how it is asked for that.

use super::files::errno;
use crate::backend::BackendError;
use fuser::{INodeNo, Notifier};
use std::sync::{Arc, OnceLock};

/// The kernel's cache of a mount, which can be reached when the mount exists.
#[derive(Clone, Default)]
pub(super) struct KernelCache {
    notifier: Arc<OnceLock<Notifier>>,
}

impl KernelCache {
    pub(super) fn reach(&self, notifier: Notifier) {
        let _ = self.notifier.set(notifier);
    }

    /// The kernel writes the data of a file that it has not written, and forgets all of its data. Its writes
    /// are requests of their own: whoever waits for this must not be who answers them.
    ///
    /// # Errors
    /// `EIO` if the connection has ended.
    pub(super) async fn give_up_cache(&self, ino: INodeNo) -> Result<(), BackendError> {
        let Some(notifier) = self.notifier.get().cloned() else {
            return Err(errno(libc::EIO, "the mount is not there yet"));
        };
        let to_the_end = 0;
        let told = tokio::task::spawn_blocking(move || notifier.inval_inode(ino, 0, to_the_end));
        match told.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(BackendError::new(libc::EIO, error.to_string())),
            Err(_) => Err(errno(libc::EIO, "the mount ends")),
        }
    }
}
