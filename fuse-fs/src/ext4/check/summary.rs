//! Bitmaps and counters, against what was found.

use super::{Checker, READS_AHEAD};
use crate::ext4::error::{Ext4Error, Place};
use crate::ext4::group::bitmap_matches;
use crate::ext4::inode::Kind;
use futures_util::stream::{self, StreamExt, TryStreamExt};

/// The bitmaps of a group; `None` where they are not on disk or lie outside.
struct Bitmaps {
    group: u32,
    blocks: Option<Vec<u8>>,
    inodes: Option<Vec<u8>>,
}

#[derive(Default)]
struct Totals {
    free_blocks: u64,
    free_inodes: u64,
}

impl Checker<'_> {
    pub(super) async fn check_summary(&self) -> Result<(), Ext4Error> {
        let groups = stream::iter(0..self.image.superblock.groups_count());
        let mut bitmaps = std::pin::pin!(
            groups
                .map(|group| self.read_bitmaps(group))
                .buffered(READS_AHEAD)
        );
        let mut totals = Totals::default();
        let count = u64::from(self.image.superblock.groups_count());
        while let Some(bitmaps) = bitmaps.try_next().await? {
            (self.progress)("groups", u64::from(bitmaps.group), count);
            totals.free_blocks += u64::from(self.check_group_blocks(&bitmaps));
            totals.free_inodes += u64::from(self.check_group_inodes(&bitmaps));
        }
        self.check_totals(&totals);
        Ok(())
    }

    async fn read_bitmaps(&self, group: u32) -> Result<Bitmaps, Ext4Error> {
        let descriptor = &self.image.groups[group as usize];
        let read =
            async |block, uninit: bool| match uninit || !self.image.superblock.contains(block, 1) {
                true => Ok(None),
                false => self.image.block(block).await.map(Some),
            };
        Ok(Bitmaps {
            group,
            blocks: read(descriptor.block_bitmap, descriptor.blocks_uninit).await?,
            inodes: read(descriptor.inode_bitmap, descriptor.inodes_uninit).await?,
        })
    }

    /// Free blocks of the group.
    fn check_group_blocks(&self, bitmaps: &Bitmaps) -> u32 {
        let (group, superblock) = (bitmaps.group, &self.image.superblock);
        let (place, descriptor) = (Place::Group(group), &self.image.groups[group as usize]);
        let count = superblock.group_blocks(group);
        let claims = self.claims.borrow();
        match &bitmaps.blocks {
            Some(bitmap) => {
                if !claims.matches(group, bitmap, count) {
                    self.compare(place, "block", bitmap, count, |at| {
                        claims.is_used(group, at)
                    });
                }
                self.check_rest(place, "block", bitmap, count);
                if !bitmap_matches(
                    bitmap,
                    superblock.blocks_per_group,
                    descriptor.block_bitmap_checksum,
                    superblock,
                ) {
                    self.find(place, "its block bitmap has a wrong checksum");
                }
            }
            None if descriptor.blocks_uninit && claims.used(group) != self.own_metadata(group) => {
                let differs =
                    |at: &u32| claims.is_used(group, *at) != self.is_own_metadata(group, *at);
                if let Some(at) = (0..count).find(differs) {
                    let block = superblock.group_first(group) + u64::from(at);
                    self.find(
                        place,
                        format!("block {block} is in use, but the group's bitmap was never made"),
                    );
                }
            }
            None => {}
        }
        let free = count - claims.used(group);
        if free != descriptor.free_blocks {
            self.find(
                place,
                format!(
                    "it says that it has {} free blocks, it has {free}",
                    descriptor.free_blocks
                ),
            );
        }
        free
    }

    /// Free inodes of the group.
    fn check_group_inodes(&self, bitmaps: &Bitmaps) -> u32 {
        let (group, superblock) = (bitmaps.group, &self.image.superblock);
        let (place, descriptor) = (Place::Group(group), &self.image.groups[group as usize]);
        let count = superblock.inodes_per_group;
        let inodes = self.inodes.borrow();
        let slots = inodes.group(group);
        let is_used = |at: u32| slots.get(at as usize).is_some_and(|slot| slot.used);
        if let Some(bitmap) = &bitmaps.inodes {
            self.compare(place, "inode", bitmap, count, is_used);
            self.check_rest(place, "inode", bitmap, count);
            if !bitmap_matches(bitmap, count, descriptor.inode_bitmap_checksum, superblock) {
                self.find(place, "its inode bitmap has a wrong checksum");
            }
        }
        let used = slots.iter().filter(|slot| slot.used).count() as u32;
        let is_directory =
            |slot: &&super::inode_table::Slot| slot.used && slot.kind == Some(Kind::Directory);
        let directories = slots.iter().filter(is_directory).count() as u32;
        let free = count - used;
        if free != descriptor.free_inodes {
            self.find(
                place,
                format!(
                    "it says that it has {} free inodes, it has {free}",
                    descriptor.free_inodes
                ),
            );
        }
        if directories != descriptor.directories {
            self.find(
                place,
                format!(
                    "it says that it has {} directories, it has {directories}",
                    descriptor.directories
                ),
            );
        }
        free
    }

    /// Finds bits among the first `count` of `bitmap` that are not as they should.
    fn compare(
        &self,
        place: Place,
        what: &str,
        bitmap: &[u8],
        count: u32,
        is_used: impl Fn(u32) -> bool,
    ) {
        let bit = |at: u32| bitmap[(at / 8) as usize] >> (at % 8) & 1 != 0;
        let wrong = |set: bool| {
            (0..count)
                .filter(|at| bit(*at) == set && is_used(*at) != set)
                .collect::<Vec<_>>()
        };
        let (leaked, lost) = (wrong(true), wrong(false));
        if let Some(first) = leaked.first() {
            self.find(
                place,
                format!(
                    "its {what} bitmap has {} free ones in use, the first at {first}",
                    leaked.len()
                ),
            );
        }
        if let Some(first) = lost.first() {
            self.find(
                place,
                format!(
                    "its {what} bitmap has {} used ones free, the first at {first}",
                    lost.len()
                ),
            );
        }
    }

    /// Finds that `bitmap` is not filled up behind its first `count` bits.
    fn check_rest(&self, place: Place, what: &str, bitmap: &[u8], count: u32) {
        let mut rest = count..bitmap.len() as u32 * 8;
        if rest.any(|at| bitmap[(at / 8) as usize] >> (at % 8) & 1 == 0) {
            self.find(
                place,
                format!("its {what} bitmap is not filled up behind the last {what}"),
            );
        }
    }

    /// While mounted the kernel keeps the totals in memory, so they count only after an unmount.
    fn check_totals(&self, totals: &Totals) {
        let superblock = &self.image.superblock;
        let mut report = self.report.borrow_mut();
        report.used_blocks = superblock.blocks_count - totals.free_blocks;
        report.used_inodes = u64::from(superblock.inodes_count) - totals.free_inodes;
        if !superblock.was_unmounted() {
            return;
        }
        for (what, says, is) in [
            ("blocks", superblock.free_blocks, totals.free_blocks),
            (
                "inodes",
                u64::from(superblock.free_inodes),
                totals.free_inodes,
            ),
        ] {
            if says != is {
                report.find(
                    Place::Superblock,
                    format!("it says that {says} {what} are free, {is} are"),
                );
            }
        }
    }
}
