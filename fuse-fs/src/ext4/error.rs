//! Why a filesystem cannot be read, and where in it something was found wrong.

use std::fmt;
use std::io;

/// Where in a filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    Superblock,
    Journal,
    Group(u32),
    Inode(u32),
    /// A block of a directory, counted from its beginning.
    Directory {
        inode: u32,
        block: u64,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Superblock => f.write_str("superblock"),
            Self::Journal => f.write_str("journal"),
            Self::Group(group) => write!(f, "group {group}"),
            Self::Inode(inode) => write!(f, "inode {inode}"),
            Self::Directory { inode, block } => write!(f, "directory inode {inode} block {block}"),
        }
    }
}

/// Something that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    pub place: Place,
    /// A phrase, without the place.
    pub problem: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.problem)
    }
}

/// Why a filesystem cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Ext4Error {
    #[error("no ext2, ext3 or ext4 filesystem is there")]
    NotExt4,
    #[error(
        "the filesystem uses {}, which this version does not support; use e2fsprogs and the kernel's ext4 (`fuse-fs volumes` shows the volume as a file)",
        features.join(", ")
    )]
    Unsupported { features: Vec<String> },
    #[error("{0}")]
    Corrupt(Finding),
    #[error("reading {len_bytes} bytes at {offset_bytes}: {source}")]
    Read {
        offset_bytes: u64,
        len_bytes: u64,
        source: io::Error,
    },
    #[error("writing {len_bytes} bytes at {offset_bytes}: {source}")]
    Write {
        offset_bytes: u64,
        len_bytes: u64,
        source: io::Error,
    },
    #[error("making durable what was written: {source}")]
    Flush { source: io::Error },
    #[error(
        "{size_bytes} bytes are too few or too many for a filesystem: from 3 MiB to 16 TiB are possible"
    )]
    Size { size_bytes: u64 },
}

impl Ext4Error {
    /// What is wrong at `place`.
    pub fn corrupt(place: Place, problem: impl Into<String>) -> Self {
        let problem = problem.into();
        Self::Corrupt(Finding { place, problem })
    }
}

/// Why an operation on a mounted filesystem failed.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    #[error(transparent)]
    Ext4(#[from] Ext4Error),
    #[error("the journal was given up: {reason}; unmount, and check the filesystem")]
    Aborted { reason: String },
    #[error("data that was acknowledged could not be written: {reason}")]
    Lost { reason: String },
    #[error("the filesystem is mounted read-only")]
    ReadOnly,
    #[error("the filesystem is full")]
    NoSpace,
    #[error("a file cannot be so large")]
    TooLarge,
    #[error("inode {0} is not in use")]
    Stale(u32),
    #[error("{0}")]
    Refused(Refusal),
}

/// What an operation was refused for, as POSIX names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no such file or directory")]
    NotFound,
    #[error("it exists")]
    Exists,
    #[error("it is not a directory")]
    NotDirectory,
    #[error("it is a directory")]
    IsDirectory,
    #[error("the directory is not empty")]
    NotEmpty,
    #[error("the name is longer than 255 bytes")]
    NameTooLong,
    #[error("the argument is not valid")]
    Invalid,
    #[error("too many links")]
    TooManyLinks,
    #[error("not permitted")]
    NotPermitted,
    #[error("access denied")]
    Access,
    #[error("no such attribute")]
    NoAttribute,
    #[error("the buffer is too small")]
    Range,
    #[error("not supported")]
    Unsupported,
    #[error("no data behind this offset")]
    NoData,
}

impl From<Refusal> for FsError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl FsError {
    /// The positive errno that a program sees.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Ext4(_) | Self::Aborted { .. } | Self::Lost { .. } => libc::EIO,
            Self::ReadOnly => libc::EROFS,
            Self::NoSpace => libc::ENOSPC,
            Self::TooLarge => libc::EFBIG,
            Self::Stale(_) => libc::ESTALE,
            Self::Refused(refusal) => refusal.errno(),
        }
    }
}

impl Refusal {
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Self::NotFound => libc::ENOENT,
            Self::Exists => libc::EEXIST,
            Self::NotDirectory => libc::ENOTDIR,
            Self::IsDirectory => libc::EISDIR,
            Self::NotEmpty => libc::ENOTEMPTY,
            Self::NameTooLong => libc::ENAMETOOLONG,
            Self::Invalid => libc::EINVAL,
            Self::TooManyLinks => libc::EMLINK,
            Self::NotPermitted => libc::EPERM,
            Self::Access => libc::EACCES,
            Self::NoAttribute => libc::ENODATA,
            Self::Range => libc::ERANGE,
            Self::Unsupported => libc::EOPNOTSUPP,
            Self::NoData => libc::ENXIO,
        }
    }
}
