//! What was made of files, made anew when they change.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use tracing::{info, warn};

use super::TlsError;

/// What tells one version of a file from the next: device, inode, length, and seconds and nanoseconds of its last change.
type Stamp = Option<[i64; 5]>;

/// A value that files give.
pub(super) struct Reloaded<T> {
    files: Vec<PathBuf>,
    load: Box<dyn Fn() -> Result<T, TlsError> + Send + Sync>,
    loaded: Mutex<Loaded<T>>,
}

struct Loaded<T> {
    /// Of the files as they were when they were last read, well or not.
    stamps: Vec<Stamp>,
    value: T,
}

impl<T: Clone> Reloaded<T> {
    /// Loads for the first time.
    pub(super) fn new(
        files: Vec<PathBuf>,
        load: impl Fn() -> Result<T, TlsError> + Send + Sync + 'static,
    ) -> Result<Self, TlsError> {
        let stamps = stamps(&files);
        let value = load()?;
        Ok(Self {
            files,
            load: Box::new(load),
            loaded: Mutex::new(Loaded { stamps, value }),
        })
    }

    /// The value of the files as they are now, or of the last that were good.
    pub(super) fn get(&self) -> T {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the files are read, so that a change in between is seen the next time.
        let stamps = stamps(&self.files);
        if stamps != loaded.stamps {
            loaded.stamps = stamps;
            match (self.load)() {
                Ok(value) => {
                    info!("the credentials for TLS have changed and are used");
                    loaded.value = value;
                }
                Err(error) => {
                    warn!(%error, "the credentials for TLS have changed; the former ones stay in use");
                }
            }
        }
        loaded.value.clone()
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    let stamp_of = |path: &Path| std::fs::metadata(path).ok().map(|file| stamp(&file));
    files.iter().map(|path| stamp_of(path)).collect()
}

fn stamp(file: &Metadata) -> [i64; 5] {
    [
        file.dev().cast_signed(),
        file.ino().cast_signed(),
        file.size().cast_signed(),
        file.ctime(),
        file.ctime_nsec(),
    ]
}
