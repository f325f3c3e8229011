//! The bytes of a plan, block by block.

use super::plan::{Identity, LOG_GROUPS_PER_FLEX, Plan};
use crate::ext4::bytes::{le32, part, put};
use crate::ext4::crc::{self, crc32c};
use crate::ext4::dir::{self, Entry};
use crate::ext4::extent::{self, Run};
use crate::ext4::group::bitmap_checksum;
use crate::ext4::inode::{self, FLAG_EXTENTS, Inode, Kind, MAP_BYTES};
use crate::ext4::journal::layout;
use crate::ext4::superblock::{CHECKSUM_AT, MAGIC, SIZE_BYTES};
use std::ops::Range;

const LOST_AND_FOUND: u32 = 11;
const EXTRA_BYTES: u16 = 32;
const SECTOR_BYTES: u64 = 512;
const MAP_AT: usize = 0x28;
const DOUBLE_INDIRECT_AT: usize = MAP_AT + 13 * 4;

/// What one write of [`super::make`] puts where.
pub(super) type Piece = (u64, Vec<u8>);

/// An inode that has to be written.
struct NewInode {
    number: u32,
    mode: u16,
    links: u16,
    size_bytes: u64,
    blocks: u64,
    map: [u8; MAP_BYTES],
    flags: u32,
}

impl Plan {
    /// Everything but the primary superblock, by its offset in bytes; the rest of the device is zero. Fills the
    /// checksums of the bitmaps into the descriptors.
    pub(super) fn pieces(&mut self, identity: &Identity) -> Vec<Piece> {
        let mut pieces = self.bitmaps();
        pieces.extend(self.files(identity));
        pieces.push((self.at(self.journal[0].physical), self.journal_superblock()));
        pieces.extend(self.reserved());
        pieces.extend(self.heads(identity));
        pieces
    }

    fn at(&self, block: u64) -> u64 {
        block * u64::from(self.superblock.block_bytes)
    }

    fn block_bytes(&self) -> usize {
        self.superblock.block_bytes as usize
    }

    fn bitmaps(&mut self) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for group in 0..self.superblock.groups_count() {
            let at = self.groups[group as usize];
            if !at.blocks_uninit {
                let range = self.range(group);
                let relative = |used: Range<u64>| used.start - range.start..used.end - range.start;
                let used = self.space.used_in(range.clone()).map(relative);
                let bitmap = self.bitmap(used, range.end - range.start);
                let bits = self.superblock.blocks_per_group;
                self.groups[group as usize].block_bitmap_checksum =
                    bitmap_checksum(&bitmap, bits, &self.superblock);
                pieces.push((self.at(at.block_bitmap), bitmap));
            }
            if !at.inodes_uninit {
                let bits = self.superblock.inodes_per_group;
                let used = u64::from(bits - at.free_inodes);
                let bitmap = self.bitmap(std::iter::once(0..used), u64::from(bits));
                self.groups[group as usize].inode_bitmap_checksum =
                    bitmap_checksum(&bitmap, bits, &self.superblock);
                pieces.push((self.at(at.inode_bitmap), bitmap));
            }
        }
        pieces
    }

    /// A bitmap where `used` are set, and everything from `end` on.
    fn bitmap(&self, used: impl Iterator<Item = Range<u64>>, end: u64) -> Vec<u8> {
        let mut bitmap = vec![0; self.block_bytes()];
        let bits = bitmap.len() as u64 * 8;
        for bit in used.chain(std::iter::once(end..bits)).flatten() {
            bitmap[(bit / 8) as usize] |= 1 << (bit % 8);
        }
        bitmap
    }

    /// The inodes in use and the blocks of the two directories.
    fn files(&self, identity: &Identity) -> Vec<Piece> {
        let seed = |number| Inode::read(number, &[0; 256], &self.superblock).checksum_seed;
        let entry = |inode, name| Entry {
            inode,
            kind: Kind::Directory as u8,
            name,
        };
        let root = [
            entry(inode::ROOT, &b"."[..]),
            entry(inode::ROOT, b".."),
            entry(LOST_AND_FOUND, b"lost+found"),
        ];
        let lost = [entry(LOST_AND_FOUND, &b"."[..]), entry(inode::ROOT, b"..")];
        let block = |entries: &[Entry<'_>], number| {
            dir::write_block(entries, self.block_bytes(), Some(seed(number)))
        };
        let mut pieces = vec![(self.at(self.root_block), block(&root, inode::ROOT))];
        for at in self.lost_and_found.clone() {
            let entries = if at == self.lost_and_found.start {
                &lost[..]
            } else {
                &[]
            };
            pieces.push((self.at(at), block(entries, LOST_AND_FOUND)));
        }
        if let Some(node) = self.journal_node {
            let mut leaf = vec![0; self.block_bytes()];
            extent::write_leaf(&mut leaf, &self.journal);
            extent::seal(&mut leaf, seed(inode::JOURNAL));
            pieces.push((self.at(node), leaf));
        }
        let mut table = Vec::new();
        for number in 1..=LOST_AND_FOUND {
            table.extend(self.inode(number, identity));
        }
        pieces.push((self.at(self.groups[0].inode_table), table));
        pieces
    }

    fn inode(&self, number: u32, identity: &Identity) -> Vec<u8> {
        let block_bytes = u64::from(self.superblock.block_bytes);
        let lost_blocks = self.lost_and_found.end - self.lost_and_found.start;
        let new = match number {
            inode::BAD_BLOCKS => NewInode {
                number,
                mode: 0,
                links: 0,
                size_bytes: 0,
                blocks: 0,
                map: [0; MAP_BYTES],
                flags: 0,
            },
            inode::ROOT => self.directory(number, 0o755, 3, self.root_block, 1),
            LOST_AND_FOUND => {
                self.directory(number, 0o700, 2, self.lost_and_found.start, lost_blocks)
            }
            inode::JOURNAL => {
                let blocks: u64 = self.journal.iter().map(|run| run.blocks).sum();
                NewInode {
                    number,
                    mode: 0o100_600,
                    links: 1,
                    size_bytes: blocks * block_bytes,
                    blocks: blocks + u64::from(self.journal_node.is_some()),
                    map: self.journal_map(),
                    flags: FLAG_EXTENTS,
                }
            }
            inode::RESIZE => self.resize_inode(),
            _ => return vec![0; usize::from(self.superblock.inode_bytes)],
        };
        self.slot(&new, identity)
    }

    fn directory(
        &self,
        number: u32,
        permissions: u16,
        links: u16,
        physical: u64,
        blocks: u64,
    ) -> NewInode {
        let (logical, unwritten) = (0, false);
        let mut map = [0; MAP_BYTES];
        extent::write_leaf(
            &mut map,
            &[Run {
                logical,
                physical,
                blocks,
                unwritten,
            }],
        );
        NewInode {
            number,
            mode: 0o040_000 | permissions,
            links,
            size_bytes: self.at(blocks),
            blocks,
            map,
            flags: FLAG_EXTENTS,
        }
    }

    fn journal_map(&self) -> [u8; MAP_BYTES] {
        let mut map = [0; MAP_BYTES];
        match self.journal_node {
            Some(node) => extent::write_index(&mut map, 1, &[(0, node)]),
            None => extent::write_leaf(&mut map, &self.journal),
        }
        map
    }

    /// As large as three levels of pointers could make it, with only the second in use.
    fn resize_inode(&self) -> NewInode {
        let fan = u64::from(self.superblock.block_bytes) / 4;
        let reserved = u64::from(self.superblock.reserved_descriptor_blocks);
        let mut map = [0; MAP_BYTES];
        put(
            &mut map,
            DOUBLE_INDIRECT_AT - MAP_AT,
            &(self.resize_list as u32).to_le_bytes(),
        );
        NewInode {
            number: inode::RESIZE,
            mode: 0o100_600,
            links: 1,
            size_bytes: self.at(12 + fan + fan * fan),
            blocks: 1 + reserved * (1 + self.backups().len() as u64),
            map,
            flags: 0,
        }
    }

    fn slot(&self, new: &NewInode, identity: &Identity) -> Vec<u8> {
        let mut bytes = vec![0; usize::from(self.superblock.inode_bytes)];
        let sectors = new.blocks * (u64::from(self.superblock.block_bytes) / SECTOR_BYTES);
        put(&mut bytes, 0, &new.mode.to_le_bytes());
        put(&mut bytes, 4, &(new.size_bytes as u32).to_le_bytes());
        for at in [8, 0xc, 0x10] {
            put(&mut bytes, at, &identity.now.to_le_bytes());
        }
        put(&mut bytes, 0x1a, &new.links.to_le_bytes());
        put(&mut bytes, 0x1c, &(sectors as u32).to_le_bytes());
        put(&mut bytes, 0x20, &new.flags.to_le_bytes());
        put(&mut bytes, MAP_AT, &new.map);
        put(
            &mut bytes,
            0x6c,
            &((new.size_bytes >> 32) as u32).to_le_bytes(),
        );
        put(&mut bytes, 0x80, &EXTRA_BYTES.to_le_bytes());
        put(&mut bytes, 0x90, &identity.now.to_le_bytes());
        inode::seal(new.number, &mut bytes, &self.superblock);
        bytes
    }

    fn journal_superblock(&self) -> Vec<u8> {
        let blocks: u64 = self.journal.iter().map(|run| run.blocks).sum();
        layout::empty(
            self.superblock.block_bytes,
            blocks as u32,
            &self.superblock.uuid,
        )
        .to_vec()
    }

    fn backups(&self) -> Vec<u32> {
        let groups = 1..self.superblock.groups_count();
        groups
            .filter(|group| self.superblock.has_backup(*group))
            .collect()
    }

    /// The list of the reserved descriptor blocks, and in each of them where its copies lie.
    fn reserved(&self) -> Vec<Piece> {
        let origin = u64::from(self.superblock.first_data_block);
        let end = self.superblock.group_head(0).end;
        let reserved = end - u64::from(self.superblock.reserved_descriptor_blocks)..end;
        let fan = u64::from(self.superblock.block_bytes) / 4;
        let mut list = vec![0; self.block_bytes()];
        let mut pieces = Vec::new();
        for block in reserved {
            let index = ((block - origin - 1) % fan) as usize;
            put(&mut list, index * 4, &(block as u32).to_le_bytes());
            let mut copies = vec![0; self.block_bytes()];
            for (index, group) in self.backups().into_iter().enumerate() {
                let copy = self.superblock.group_first(group) + block - origin;
                put(&mut copies, index * 4, &(copy as u32).to_le_bytes());
            }
            pieces.push((self.at(block), copies));
        }
        pieces.push((self.at(self.resize_list), list));
        pieces
    }

    /// The descriptors, and the backups of superblock and descriptors.
    fn heads(&self, identity: &Identity) -> Vec<Piece> {
        let numbered = (0..).zip(&self.groups);
        let descriptors: Vec<u8> = numbered
            .flat_map(|(number, group)| group.write(number, &self.superblock))
            .collect();
        let origin = u64::from(self.superblock.first_data_block);
        let mut pieces = vec![(self.at(origin + 1), descriptors.clone())];
        for group in self.backups() {
            let first = self.superblock.group_first(group);
            pieces.push((
                self.at(first),
                self.superblock_bytes(group as u16, identity),
            ));
            pieces.push((self.at(first + 1), descriptors.clone()));
        }
        pieces
    }

    /// The superblock as group `group` keeps it.
    pub(super) fn superblock_bytes(&self, group: u16, identity: &Identity) -> Vec<u8> {
        let superblock = &self.superblock;
        let mut bytes = vec![0; SIZE_BYTES];
        let log_block = superblock.block_bytes.trailing_zeros() - 10;
        for (at, value) in [
            (0, superblock.inodes_count),
            (4, superblock.blocks_count as u32),
            (8, superblock.reserved_blocks as u32),
            (0xc, superblock.free_blocks as u32),
            (0x10, superblock.free_inodes),
            (0x14, superblock.first_data_block),
            (0x18, log_block),
            (0x1c, log_block),
            (0x20, superblock.blocks_per_group),
            (0x24, superblock.blocks_per_group),
            (0x28, superblock.inodes_per_group),
            (0x30, identity.now),
            (0x40, identity.now),
            (0x4c, 1),
            (0x54, superblock.first_inode),
            (0x5c, superblock.features.compat),
            (0x60, superblock.features.incompat),
            (0x64, superblock.features.ro_compat),
            (0xe0, superblock.journal_inode),
            // Mounted with xattrs and ACLs.
            (0x100, 0xc),
            (0x108, identity.now),
            (0x150, (superblock.blocks_count >> 32) as u32),
            (0x154, (superblock.reserved_blocks >> 32) as u32),
            (0x158, (superblock.free_blocks >> 32) as u32),
            (0x160, superblock.flags),
        ] {
            put(&mut bytes, at, &value.to_le_bytes());
        }
        for (at, value) in [
            // Never checked for the number of mounts.
            (0x36, u16::MAX),
            (0x38, MAGIC),
            (0x3a, superblock.state),
            // After an error it goes on.
            (0x3c, 1),
            (0x58, superblock.inode_bytes),
            (0x5a, group),
            (0xce, superblock.reserved_descriptor_blocks),
            (0xfe, superblock.descriptor_bytes),
            (0x15c, EXTRA_BYTES),
            (0x15e, EXTRA_BYTES),
        ] {
            put(&mut bytes, at, &value.to_le_bytes());
        }
        put(&mut bytes, 0x68, &superblock.uuid);
        put(&mut bytes, 0x78, &identity.label);
        put(&mut bytes, 0xec, &identity.hash_seed);
        // The journal's inode is kept behind 0x10c; checksums are CRC-32C.
        put(&mut bytes, 0xfc, &[superblock.hash_version, 1]);
        put(&mut bytes, 0x174, &[LOG_GROUPS_PER_FLEX as u8, 1]);
        let journal = self.inode(inode::JOURNAL, identity);
        put(
            &mut bytes,
            0x10c,
            part(&journal, MAP_AT, MAP_AT + MAP_BYTES),
        );
        put(&mut bytes, 0x148, &le32(&journal, 0x6c).to_le_bytes());
        put(&mut bytes, 0x14c, &le32(&journal, 4).to_le_bytes());
        let checksum = crc32c(crc::START, part(&bytes, 0, CHECKSUM_AT));
        put(&mut bytes, CHECKSUM_AT, &checksum.to_le_bytes());
        bytes
    }
}
