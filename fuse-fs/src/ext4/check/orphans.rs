//! Orphans: inodes that were deleted while open or are being truncated, on a list or in the orphan file.
//!
//! ```text
//! block of the orphan file: u32 inodes (0: free), and in its last 8 bytes u32 magic 0x0b10ca04,
//! u32 CRC-32C from the file's seed over the block's number as u64 and the inodes
//! ```

use super::Checker;
use crate::ext4::bytes::{le32, part};
use crate::ext4::crc::crc32c;
use crate::ext4::error::{Ext4Error, Place};
use crate::ext4::features::compat;
use crate::ext4::map;

const FILE_MAGIC: u32 = 0x0b10_ca04;
const FILE_TAIL_BYTES: usize = 8;

impl Checker<'_> {
    pub(super) async fn collect_orphans(&self) -> Result<(), Ext4Error> {
        self.follow_list().await?;
        if self
            .image
            .superblock
            .features
            .has_compat(compat::ORPHAN_FILE)
        {
            match self.read_file().await {
                Err(Ext4Error::Corrupt(finding)) => self.report.borrow_mut().add(finding),
                other => other?,
            }
        }
        let count = self.orphans.borrow().len();
        if count > 0 {
            self.note(format!(
                "{count} deleted or shrinking files wait for the next mount to free their blocks"
            ));
        }
        Ok(())
    }

    /// Each orphan has in dtime the next. The list ends with 0.
    async fn follow_list(&self) -> Result<(), Ext4Error> {
        let mut number = self.image.superblock.last_orphan;
        while number != 0 {
            if !self.add_orphan(number) {
                self.find(
                    Place::Superblock,
                    format!("the list of orphans holds inode {number}, which cannot be on it"),
                );
                break;
            }
            match self.image.inode(number).await {
                Ok((inode, _)) => number = inode.dtime,
                Err(Ext4Error::Corrupt(finding)) => {
                    self.report.borrow_mut().add(finding);
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether `number` can be an orphan and is not known as one.
    fn add_orphan(&self, number: u32) -> bool {
        let superblock = &self.image.superblock;
        let possible = superblock.first_inode..=superblock.inodes_count;
        possible.contains(&number) && self.orphans.borrow_mut().insert(number)
    }

    async fn read_file(&self) -> Result<(), Ext4Error> {
        let number = self.image.superblock.orphan_file;
        let place = Place::Inode(number);
        let (inode, _) = self.image.inode(number).await?;
        for run in map::runs(self.image, &inode).await? {
            for block in run.physical..run.physical + run.blocks {
                let bytes = self.image.block(block).await?;
                let tail = bytes.len() - FILE_TAIL_BYTES;
                let entries = part(&bytes, 0, tail);
                let crc = crc32c(crc32c(inode.checksum_seed, &block.to_le_bytes()), entries);
                let checked = self.image.superblock.has_checksums();
                if le32(&bytes, tail) != FILE_MAGIC || (checked && crc != le32(&bytes, tail + 4)) {
                    return Err(Ext4Error::corrupt(
                        place,
                        format!("block {block} of the orphan file has a wrong checksum"),
                    ));
                }
                for entry in entries
                    .chunks_exact(4)
                    .map(|entry| le32(entry, 0))
                    .filter(|entry| *entry != 0)
                {
                    if !self.add_orphan(entry) {
                        self.find(
                            place,
                            format!("the orphan file holds inode {entry}, which cannot be in it"),
                        );
                    }
                }
            }
        }
        Ok(())
    }
}
