//! Each inode: its checksum and fields, the blocks of its file, its attributes.

use super::directories::Directory;
use super::inode_table::Slot;
use super::{Checker, READS_AHEAD};
use crate::ext4::error::{Ext4Error, Place};
use crate::ext4::extent::{LOGICAL_END, Run};
use crate::ext4::features::{compat, incompat};
use crate::ext4::inode::{
    self, BASE_BYTES, FLAG_EXTENTS, FLAG_INDEX, FLAG_VERITY, Inode, Kind, MAP_BYTES,
};
use crate::ext4::map::{self, Visitor};
use crate::ext4::xattr;
use futures_util::stream::{self, StreamExt, TryStreamExt};

/// Blocks of a table that one read fetches.
const TABLE_READ_BLOCKS: u32 = 64;
/// Inodes whose blocks are read at the same time.
const INODES_AT_ONCE: usize = 64;
const SECTOR_BYTES: u64 = 512;
/// Fields behind the first 128 bytes that every large inode has.
const MIN_EXTRA_BYTES: u16 = 4;
const SPECIAL_FLAGS: u32 = inode::FLAG_IMMUTABLE | inode::FLAG_APPEND;

/// A part of a table that is read at once.
struct Piece {
    first_block: u64,
    blocks: u32,
    first_inode: u32,
    inodes: u32,
}

impl Checker<'_> {
    pub(super) async fn check_inodes(&self) -> Result<(), Ext4Error> {
        self.mark_reserved();
        let groups = 0..self.image.superblock.groups_count();
        let pieces = groups.flat_map(|group| self.pieces(group));
        let read = |piece: Piece| async move {
            let bytes = self.image.blocks(piece.first_block, piece.blocks).await?;
            Ok::<_, Ext4Error>((piece, bytes))
        };
        let mut tables = std::pin::pin!(stream::iter(pieces).map(read).buffered(READS_AHEAD));
        while let Some((piece, bytes)) = tables.try_next().await? {
            let slots = bytes.chunks_exact(usize::from(self.image.superblock.inode_bytes));
            let numbered = (piece.first_inode..).zip(slots).take(piece.inodes as usize);
            let checks =
                stream::iter(numbered.map(|(number, bytes)| Ok(self.check_inode(number, bytes))));
            let mut checks = std::pin::pin!(checks.try_buffer_unordered(INODES_AT_ONCE));
            while checks.try_next().await?.is_some() {}
            (self.progress)(
                "inodes",
                u64::from(piece.first_inode),
                self.report.borrow().inodes,
            );
        }
        self.check_xattr_references();
        Ok(())
    }

    /// Opens the table of `group`, and cuts the part in use into reads.
    fn pieces(&self, group: u32) -> Vec<Piece> {
        let superblock = &self.image.superblock;
        let descriptor = &self.image.groups[group as usize];
        let table_blocks = superblock.inode_table_blocks();
        if descriptor.unused_inodes > superblock.inodes_per_group {
            self.find(
                Place::Group(group),
                format!("{} unused inodes", descriptor.unused_inodes),
            );
        }
        let usable = !descriptor.inodes_uninit
            && superblock.contains(descriptor.inode_table, u64::from(table_blocks));
        let used = superblock
            .inodes_per_group
            .saturating_sub(descriptor.unused_inodes);
        let used = if usable { used } else { 0 };
        self.inodes.borrow_mut().open_group(
            group,
            used.max(if group == 0 {
                superblock.first_inode - 1
            } else {
                0
            }),
        );
        let in_block = superblock.block_bytes / u32::from(superblock.inode_bytes);
        let starts = (0..used.div_ceil(in_block)).step_by(TABLE_READ_BLOCKS as usize);
        let piece = |block: u32| Piece {
            first_block: descriptor.inode_table + u64::from(block),
            blocks: TABLE_READ_BLOCKS.min(used.div_ceil(in_block) - block),
            first_inode: group * superblock.inodes_per_group + block * in_block + 1,
            inodes: (TABLE_READ_BLOCKS * in_block).min(used - block * in_block),
        };
        starts.map(piece).collect()
    }

    /// Reserved inodes are in use whatever they hold.
    fn mark_reserved(&self) {
        let superblock = &self.image.superblock;
        let mut inodes = self.inodes.borrow_mut();
        inodes.open_group(0, superblock.first_inode - 1);
        for number in (1..superblock.first_inode).filter(|number| *number != inode::ROOT) {
            if let Some(slot) = inodes.get_mut(number) {
                (slot.used, slot.nameless) = (true, true);
            }
        }
    }

    fn is_system(&self, number: u32) -> bool {
        let superblock = &self.image.superblock;
        let hidden =
            number == superblock.orphan_file && superblock.features.has_compat(compat::ORPHAN_FILE);
        (number < superblock.first_inode && number != inode::ROOT)
            || hidden
            || superblock.quota_inodes.contains(&number)
    }

    async fn check_inode(&self, number: u32, bytes: &[u8]) -> Result<Option<()>, Ext4Error> {
        let inode = Inode::read(number, bytes, &self.image.superblock);
        let place = Place::Inode(number);
        if !inode.checksum_matches(bytes, &self.image.superblock) {
            self.find(place, "its checksum is wrong");
        }
        let orphan = self.orphans.borrow().contains(&number);
        if inode.links == 0 && !orphan && number != inode::BAD_BLOCKS {
            if inode.dtime == 0 && inode.mode != 0 && !self.is_system(number) {
                self.find(place, "it has no links and was not deleted");
            }
            return Ok(Some(()));
        }
        if number == inode::RESIZE {
            return Ok(Some(()));
        }
        if inode.dtime != 0 && !orphan {
            self.find(place, "it is in use and has a time of deletion");
        }
        self.enter(&inode, orphan);
        self.check_fields(&inode, bytes);
        self.check_blocks(&inode, orphan).await?;
        Ok(Some(()))
    }

    /// Notes in the table what is known of an inode in use.
    fn enter(&self, inode: &Inode, orphan: bool) {
        let system = self.is_system(inode.number);
        if let Some(slot) = self.inodes.borrow_mut().get_mut(inode.number) {
            *slot = Slot {
                kind: inode.kind(),
                used: true,
                nameless: system || (orphan && inode.links == 0),
                links: inode.links,
                names: 0,
            };
        }
        let mut report = self.report.borrow_mut();
        match inode.kind() {
            Some(Kind::Directory) => report.directories += 1,
            Some(_) if !system => report.files += 1,
            _ => {}
        }
    }

    fn check_fields(&self, inode: &Inode, bytes: &[u8]) {
        let place = Place::Inode(inode.number);
        let features = &self.image.superblock.features;
        let Some(kind) = inode.kind() else {
            if inode.number != inode::BAD_BLOCKS {
                self.find(place, format!("its mode {:o} is of no kind", inode.mode));
            }
            return;
        };
        let extra = usize::from(inode.extra_bytes);
        if extra + BASE_BYTES > bytes.len().max(BASE_BYTES)
            || extra % 4 != 0
            || (1..MIN_EXTRA_BYTES).contains(&inode.extra_bytes)
        {
            self.find(place, format!("{extra} extra bytes"));
        } else if let Err(problem) = xattr::check_inode(inode, bytes) {
            self.find(place, problem);
        }
        if inode.has_flag(FLAG_EXTENTS) && !features.has_incompat(incompat::EXTENT) {
            self.find(place, "it has extents, which the filesystem does not allow");
        }
        if inode.has_flag(FLAG_INDEX)
            && (kind != Kind::Directory || !features.has_compat(compat::DIR_INDEX))
        {
            self.find(place, "it has an index, which it cannot have");
        }
        if inode.has_flag(inode::FLAGS_REFUSED) {
            let flags = inode.flags & inode::FLAGS_REFUSED;
            self.find(
                place,
                format!("flags {flags:#x}, for features that the filesystem does not have"),
            );
        }
        if let Some(name) = inode::field_without_use(bytes, &self.image.superblock) {
            self.find(place, format!("its {name} is not zero"));
        }
        if kind.is_special() {
            self.check_special(inode);
        }
    }

    /// Device nodes, fifos and sockets have only a device number.
    fn check_special(&self, inode: &Inode) {
        let place = Place::Inode(inode.number);
        if inode.size_bytes != 0 {
            self.find(
                place,
                format!("a device, fifo or socket of {} bytes", inode.size_bytes),
            );
        }
        if inode.has_flag(FLAG_EXTENTS | FLAG_INDEX) {
            self.find(place, "a device, fifo or socket that has blocks");
        }
        if inode.has_flag(SPECIAL_FLAGS) {
            self.find(
                place,
                "a device, fifo or socket that is immutable or append-only",
            );
        }
    }

    async fn check_blocks(&self, inode: &Inode, orphan: bool) -> Result<(), Ext4Error> {
        let mut blocks = Blocks::new(self, inode);
        if has_map(inode) {
            map::walk(self.image, inode, &mut blocks).await?;
        }
        if inode.xattr_block != 0 {
            blocks.count += u64::from(self.check_xattr_block(inode).await?);
        }
        let sectors = blocks.count * (u64::from(self.image.superblock.block_bytes) / SECTOR_BYTES);
        let place = Place::Inode(inode.number);
        if sectors != inode.sectors && !blocks.broken {
            self.find(
                place,
                format!(
                    "it has {} blocks of 512 bytes, not {sectors}",
                    inode.sectors
                ),
            );
        }
        if !orphan {
            self.check_size(inode, &blocks);
        }
        let Blocks { runs, .. } = blocks;
        match inode.kind() {
            Some(Kind::Directory) if !orphan => self
                .directories
                .borrow_mut()
                .push(Directory::new(inode, runs)),
            Some(Kind::Symlink) => self.check_symlink(inode, &runs).await?,
            _ => {}
        }
        Ok(())
    }

    fn check_size(&self, inode: &Inode, blocks: &Blocks<'_, '_>) {
        let block_bytes = u64::from(self.image.superblock.block_bytes);
        let size_blocks = inode.size_bytes.div_ceil(block_bytes);
        let wrong = match inode.kind() {
            _ if blocks.broken => false,
            Some(Kind::Directory) => {
                let spare = u64::from(self.image.superblock.prealloc_dir_blocks);
                !inode.size_bytes.is_multiple_of(block_bytes)
                    || size_blocks == 0
                    || blocks.end < size_blocks
                    || blocks.end > size_blocks + spare
            }
            Some(Kind::Regular) => {
                let past_end =
                    inode.size_bytes < blocks.written_end.saturating_sub(1) * block_bytes;
                (past_end && !inode.has_flag(FLAG_VERITY))
                    || inode.size_bytes > self.max_size(inode)
            }
            _ => false,
        };
        if wrong {
            let end = blocks.written_end;
            self.find(
                Place::Inode(inode.number),
                format!(
                    "a size of {} bytes with blocks up to {end}",
                    inode.size_bytes
                ),
            );
        }
    }

    pub(super) fn max_size(&self, inode: &Inode) -> u64 {
        let block_bytes = u64::from(self.image.superblock.block_bytes);
        let fan = block_bytes / 4;
        if inode.has_flag(FLAG_EXTENTS) {
            LOGICAL_END * block_bytes - 1
        } else {
            (12 + fan + fan * fan + fan * fan * fan) * block_bytes
        }
    }

    /// The text of a link, in the inode or in one block, is as long as the size says.
    async fn check_symlink(&self, inode: &Inode, runs: &[Run]) -> Result<(), Ext4Error> {
        let block_bytes = u64::from(self.image.superblock.block_bytes);
        let text = match runs.first() {
            _ if is_short_link(inode) => inode.map.to_vec(),
            Some(run) if run.logical == 0 && inode.size_bytes < block_bytes => {
                self.image.block(run.physical).await?
            }
            _ => Vec::new(),
        };
        let length = text
            .iter()
            .position(|byte| *byte == 0)
            .unwrap_or(text.len());
        if inode.size_bytes == 0 || inode.size_bytes != length as u64 {
            self.find(
                Place::Inode(inode.number),
                format!(
                    "a symbolic link of {} bytes with a text of {length}",
                    inode.size_bytes
                ),
            );
        }
        Ok(())
    }

    /// Whether the block can be counted as the inode's.
    async fn check_xattr_block(&self, inode: &Inode) -> Result<bool, Ext4Error> {
        let (block, place) = (inode.xattr_block, Place::Inode(inode.number));
        if !self.image.superblock.contains(block, 1) {
            self.find(
                place,
                format!("its xattr block {block} is outside the filesystem"),
            );
            return Ok(false);
        }
        let known = {
            let mut known = self.xattr_blocks.borrow_mut();
            let users = known.entry(block).or_default();
            users.1 += 1;
            users.1 > 1
        };
        if known {
            return Ok(true);
        }
        self.claim(place, block, 1);
        let bytes = self.image.block(block).await?;
        let superblock = &self.image.superblock;
        if superblock.has_checksums()
            && !xattr::checksum_matches(&bytes, block, superblock.checksum_seed)
        {
            self.find(
                place,
                format!("its xattr block {block} has a wrong checksum"),
            );
        }
        match xattr::check_block(&bytes) {
            Ok(users) => self.xattr_blocks.borrow_mut().entry(block).or_default().0 = users,
            Err(problem) => {
                self.find(place, format!("xattr block {block}: {problem}"));
                self.xattr_blocks.borrow_mut().entry(block).or_default().0 = u32::MAX;
            }
        }
        Ok(true)
    }

    fn check_xattr_references(&self) {
        for (block, (said, found)) in self.xattr_blocks.borrow().iter() {
            // The maximum marks a block that has its finding already.
            if said != found && *said != u32::MAX {
                self.find(
                    Place::Superblock,
                    format!("xattr block {block} says that {said} inodes use it, {found} do"),
                );
            }
        }
    }
}

fn is_short_link(inode: &Inode) -> bool {
    inode.kind() == Some(Kind::Symlink) && inode.size_bytes < MAP_BYTES as u64
}

/// Whether the map is one, and not a device number or a short link's text.
fn has_map(inode: &Inode) -> bool {
    let special = inode.kind().is_some_and(Kind::is_special);
    let nothing = inode.kind().is_none() && inode.number != inode::BAD_BLOCKS;
    !special && !nothing && !is_short_link(inode)
}

/// Claims the blocks of one inode and keeps what its other fields are compared with.
struct Blocks<'c, 'i> {
    checker: &'c Checker<'i>,
    place: Place,
    keeps_runs: bool,
    runs: Vec<Run>,
    count: u64,
    /// Behind the last logical block, written or not, and behind the last written one.
    end: u64,
    written_end: u64,
    /// A part of the map could not be read, so counts mean nothing.
    broken: bool,
}

impl<'c, 'i> Blocks<'c, 'i> {
    fn new(checker: &'c Checker<'i>, inode: &Inode) -> Self {
        Self {
            checker,
            place: Place::Inode(inode.number),
            keeps_runs: matches!(inode.kind(), Some(Kind::Directory | Kind::Symlink)),
            runs: Vec::new(),
            count: 0,
            end: 0,
            written_end: 0,
            broken: false,
        }
    }
}

impl Visitor for Blocks<'_, '_> {
    fn node(&mut self, block: u64) -> bool {
        self.count += 1;
        let ours = self.checker.claim(self.place, block, 1);
        self.broken |= !ours;
        ours
    }

    fn run(&mut self, run: Run) {
        self.count += run.blocks;
        self.end = run.logical + run.blocks;
        if !run.unwritten {
            self.written_end = self.end;
        }
        self.checker.claim(self.place, run.physical, run.blocks);
        if self.keeps_runs {
            self.runs.push(run);
        }
    }

    fn problem(&mut self, problem: String) {
        self.broken = true;
        self.checker.find(self.place, problem);
    }
}
