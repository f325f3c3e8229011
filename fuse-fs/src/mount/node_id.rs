//! The numbers by which the kernel knows our files: an inode of the mounted filesystem or of a snapshot.
//!
//! ```text
//! bits 32-63: 0 the mounted filesystem, 1 to 2^32 - 2 a snapshot, 2^32 - 1 the directory .snapshot
//! bits 0-31:  the inode; of the mounted filesystem's root, which is 2, the kernel's number is 1
//! ```

use crate::ext4::inode;

const KERNEL_ROOT: u64 = 1;
const SNAPSHOTS: u32 = u32::MAX;

/// A file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeId {
    /// Of the mounted filesystem.
    Main(u32),
    /// Of the snapshot with this index.
    Frozen(u32, u32),
    /// The directory of all snapshots.
    Snapshots,
}

impl NodeId {
    pub const ROOT: Self = Self::Main(inode::ROOT);

    /// What the kernel's number names.
    #[must_use]
    pub fn of(number: u64) -> Self {
        let (index, inode) = ((number >> 32) as u32, number as u32);
        match (index, number) {
            (_, KERNEL_ROOT) => Self::ROOT,
            (0, _) => Self::Main(inode),
            (SNAPSHOTS, _) => Self::Snapshots,
            _ => Self::Frozen(index, inode),
        }
    }

    /// The kernel's number.
    #[must_use]
    pub fn number(self) -> u64 {
        match self {
            Self::ROOT => KERNEL_ROOT,
            other => other.shown(),
        }
    }

    /// What users see as the inode's number.
    #[must_use]
    pub fn shown(self) -> u64 {
        match self {
            Self::Main(inode) => u64::from(inode),
            Self::Frozen(index, inode) => u64::from(index) << 32 | u64::from(inode),
            Self::Snapshots => u64::from(SNAPSHOTS) << 32,
        }
    }

    /// Another file of the same filesystem.
    #[must_use]
    pub fn sibling(self, inode: u32) -> Self {
        match self {
            Self::Frozen(index, _) => Self::Frozen(index, inode),
            Self::Main(_) | Self::Snapshots => Self::Main(inode),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_files_are_one_to_one() {
        for id in [
            NodeId::ROOT,
            NodeId::Main(11),
            NodeId::Main(u32::MAX),
            NodeId::Frozen(1, 2),
            NodeId::Frozen(u32::MAX - 1, u32::MAX),
            NodeId::Snapshots,
        ] {
            assert_eq!(NodeId::of(id.number()), id);
        }
        assert_eq!(NodeId::ROOT.number(), 1);
        assert_eq!(NodeId::ROOT.shown(), 2);
        assert_eq!(NodeId::Frozen(3, 2).sibling(9), NodeId::Frozen(3, 9));
    }
}
