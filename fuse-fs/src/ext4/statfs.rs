//! How much room there is.

use crate::ext4::features::compat;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::inode;

/// What `statfs` tells; in blocks of the filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Statfs {
    pub block_bytes: u32,
    pub blocks: u64,
    pub free_blocks: u64,
    /// Without those that are kept for the system.
    pub available_blocks: u64,
    pub inodes: u64,
    pub free_inodes: u64,
}

impl Filesystem {
    /// The room that there is, less what is promised to data in memory.
    #[must_use]
    pub fn statfs(&self) -> Statfs {
        let superblock = self.superblock();
        let free_blocks = self.groups().available();
        Statfs {
            block_bytes: superblock.block_bytes,
            blocks: superblock
                .blocks_count
                .saturating_sub(self.overhead_blocks()),
            free_blocks,
            available_blocks: free_blocks.saturating_sub(superblock.reserved_blocks),
            inodes: u64::from(superblock.inodes_count),
            free_inodes: self.groups().available_inodes(),
        }
    }

    /// Blocks that files can never have: heads of groups, bitmaps, inode tables, the journal.
    fn overhead_blocks(&self) -> u64 {
        let superblock = self.superblock();
        let tables = u64::from(superblock.inode_table_blocks()) + 2;
        let heads = (0..superblock.groups_count()).map(|group| {
            let head = superblock.group_head(group);
            head.end - head.start + tables
        });
        heads.sum::<u64>() + self.journal_blocks()
    }

    fn journal_blocks(&self) -> u64 {
        let superblock = self.superblock();
        let inside = superblock.features.has_compat(compat::HAS_JOURNAL);
        match inside && superblock.journal_inode == inode::JOURNAL {
            true => self.journal_bytes() / u64::from(superblock.block_bytes),
            false => 0,
        }
    }
}
