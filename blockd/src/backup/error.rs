//! Why a backup or a restore did not succeed.

use super::rbd::StreamError;
use crate::client::ClientError;

/// Everything that ends an export, import, archive or restore other than success.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{0}")]
    Stream(#[from] StreamError),
    /// Reading or writing the stream itself.
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        source: std::io::Error,
    },
    /// Something of an archive is missing or not what it was; the text names the object.
    #[error("{0}")]
    Damaged(String),
    /// The place of an archive cannot be read or written.
    #[error("{0}")]
    Archive(String),
    /// What was asked makes no sense for these snapshots.
    #[error("{0}")]
    Refused(String),
    /// It went wrong after the volume was changed.
    #[error("{source}; {aftermath}")]
    Partly {
        source: Box<BackupError>,
        aftermath: String,
    },
}

impl BackupError {
    pub(super) fn refused<T>(text: String) -> Result<T, Self> {
        Err(Self::Refused(text))
    }
}
