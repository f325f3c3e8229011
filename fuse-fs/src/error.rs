//! What `fuse-fs` reports to its user: what failed, where, and what to do; with mount(8)'s exit codes.

use crate::ext4::error::Ext4Error;
use std::io;
use std::path::PathBuf;

/// Exit code of mount(8) for a wrong invocation or missing permission.
pub const EXIT_USAGE: u8 = 1;
/// Exit code of mount(8) for a mount or unmount that failed.
pub const EXIT_FAILED: u8 = 32;

/// Exit codes of fsck(8), for `fuse-fs check`.
pub mod fsck {
    /// Errors were found, and left as they are.
    pub const ERRORS: u8 = 4;
    /// It could not be checked.
    pub const NOT_CHECKED: u8 = 8;
    pub const USAGE: u8 = 16;
}

/// Why a command of `fuse-fs` failed.
#[derive(Debug, thiserror::Error)]
pub enum FuseFsError {
    #[error("no servers given: use --servers HOST[:PORT],... or set BLOCKD_SERVERS")]
    NoServers,
    #[error("-o {reason}")]
    Option { reason: String },
    #[error("{target}: not VOL or VOL@SNAP")]
    TargetSyntax { target: String },
    #[error("{what} needs root: run it with sudo")]
    NotRoot { what: &'static str },
    #[error("{}: {reason}", dir.display())]
    Directory { dir: PathBuf, reason: String },
    #[error("{}: {what} is mounted there already; unmount it first or choose another directory", dir.display())]
    InUse { dir: PathBuf, what: String },
    #[error(
        "/dev/fuse: {0}; load the kernel module (modprobe fuse), or give the container the device"
    )]
    NoFuse(io::Error),
    #[error(
        "{device}: {source}; load the kernel module (modprobe loop), or give the container the device"
    )]
    NoLoop { device: String, source: io::Error },
    #[error("{device}: cannot attach {}: {source}", file.display())]
    Loop {
        device: String,
        file: PathBuf,
        source: io::Error,
    },
    #[error(
        "{target}: no such volume or snapshot; see `blockctl volume list` and `blockctl snapshot list`"
    )]
    UnknownTarget { target: String },
    #[error(
        "{target}: no ext4 or xfs filesystem found on it; make one with mkfs.ext4 or mkfs.xfs on the volume's file (`fuse-fs volumes`), or name the type with -t"
    )]
    UnknownFilesystem { target: String },
    #[error("{target}: reading its superblock: {source}; are the servers up?")]
    Superblock { target: String, source: io::Error },
    #[error("mounting {filesystem} of {target} on {}: {source}; the kernel log (dmesg) has the details", dir.display())]
    Mount {
        filesystem: String,
        target: String,
        dir: PathBuf,
        source: io::Error,
    },
    #[error("{}: cannot show the volumes: {reason}", dir.display())]
    View { dir: PathBuf, reason: String },
    #[error("{}: {reason}", file.display())]
    State { file: PathBuf, reason: String },
    #[error("{}: nothing that fuse-fs mounted is there; for other mounts use umount", dir.display())]
    NotMounted { dir: PathBuf },
    #[error("{}: {reason}", dir.display())]
    Grow { dir: PathBuf, reason: String },
    #[error("{}: in use; see `fuser -vm {}`; it is still mounted, nothing was lost", dir.display(), dir.display())]
    Busy { dir: PathBuf },
    #[error("{}: {reason}; it is still mounted, data may be unflushed; --force gives it up", dir.display())]
    Unmount { dir: PathBuf, reason: String },
    #[error("{}: {what} did not finish within {timeout_s} s, data may be unflushed; it is still mounted: wait for the servers and repeat, or give the data up with --force", dir.display())]
    Deadline {
        dir: PathBuf,
        what: &'static str,
        timeout_s: u64,
    },
    #[error("{}: detached by force, data may be unflushed: {reason}; check the filesystem before you use the volume again", dir.display())]
    Unflushed { dir: PathBuf, reason: String },
    #[error("{target}: {source}")]
    Ext4 { target: String, source: Ext4Error },
    #[error("{target}: {filesystem} is on it; --force overwrites it")]
    Overwrite {
        target: String,
        filesystem: &'static str,
    },
    #[error("{target}: {reason}")]
    Open { target: String, reason: String },
    #[error("{what}: {source}")]
    System {
        what: &'static str,
        source: io::Error,
    },
}

impl FuseFsError {
    /// Exit code as of mount(8): 1 for usage and permission, 32 for everything else.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::NoServers
            | Self::Option { .. }
            | Self::TargetSyntax { .. }
            | Self::NotRoot { .. }
            | Self::Directory { .. } => EXIT_USAGE,
            _ => EXIT_FAILED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_are_those_of_mount() {
        assert_eq!(FuseFsError::NoServers.exit_code(), 1);
        assert_eq!(FuseFsError::NotRoot { what: "mount" }.exit_code(), 1);
        let busy = FuseFsError::Busy { dir: "/mnt".into() };
        assert_eq!(busy.exit_code(), 32);
        assert!(busy.to_string().contains("fuser -vm /mnt"));
    }
}
