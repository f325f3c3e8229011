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
