//! What `check` and `mkfs` work on: a volume or snapshot of the servers, or a file of this machine.

use crate::backend::{Connect, ConnectOptions, TargetName};
use crate::error::FuseFsError;
use crate::ext4::device::{Device, FileDevice, TargetDevice};
use std::fmt;
use std::path::PathBuf;

/// Where the filesystem is.
pub enum Source {
    Volume(TargetName, ConnectOptions),
    /// A file or block device of this machine.
    Image(PathBuf),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(target, _) => target.fmt(f),
            Self::Image(file) => file.display().fmt(f),
        }
    }
}

impl Source {
    /// Opens it, with `write` for writing.
    ///
    /// # Errors
    /// [`FuseFsError::Open`].
    pub async fn open(
        &self,
        connect: Connect,
        write: bool,
    ) -> Result<Box<dyn Device>, FuseFsError> {
        let failed = |reason: String| FuseFsError::Open {
            target: self.to_string(),
            reason,
        };
        match self {
            Self::Image(file) => {
                let device =
                    FileDevice::open(file, write).map_err(|error| failed(error.to_string()))?;
                Ok(Box::new(device))
            }
            Self::Volume(target, options) => {
                let servers = connect(options.clone())
                    .await
                    .map_err(|error| failed(error.to_string()))?;
                let opened = servers
                    .open(target)
                    .await
                    .map_err(|error| failed(error.to_string()))?;
                if write && opened.is_read_only() {
                    return Err(failed("it is read-only".to_owned()));
                }
                Ok(Box::new(TargetDevice(opened)))
            }
        }
    }
}
