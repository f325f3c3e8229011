//! Each directory: its blocks, its entries, and what they name; its index, if it has one.

use super::{Checker, Parents, READS_AHEAD};
use crate::ext4::dir::{self, Entry};
use crate::ext4::error::{Ext4Error, Place};
use crate::ext4::extent::Run;
use crate::ext4::features::{compat, incompat};
use crate::ext4::hash;
use crate::ext4::htree::{self, Child, MAX_LEVELS, MAX_LEVELS_LARGE};
use crate::ext4::inode::{self, FLAG_INDEX, Inode, Kind};
use futures_util::stream::{self, TryStreamExt};
use std::collections::{HashMap, HashSet};
use std::ops::RangeInclusive;

/// Blocks of a directory that one read fetches.
const READ_BLOCKS: u64 = 64;
const DOT: &[u8] = b".";
const DOTDOT: &[u8] = b"..";

/// A directory that was found among the inodes.
pub(super) struct Directory {
    inode: u32,
    checksum_seed: u32,
    indexed: bool,
    runs: Vec<Run>,
    blocks: u64,
}

impl Directory {
    pub(super) fn new(inode: &Inode, runs: Vec<Run>) -> Self {
        Self {
            inode: inode.number,
            checksum_seed: inode.checksum_seed,
            indexed: inode.has_flag(FLAG_INDEX),
            blocks: runs.last().map_or(0, |run| run.logical + run.blocks),
            runs,
        }
    }

    fn place(&self, block: u64) -> Place {
        let inode = self.inode;
        Place::Directory { inode, block }
    }

    /// Where block `logical` of the directory lies.
    fn block(&self, logical: u64) -> Option<u64> {
        let at = self
            .runs
            .partition_point(|run| run.logical + run.blocks <= logical);
        let run = self.runs.get(at).filter(|run| run.logical <= logical)?;
        Some(run.physical + (logical - run.logical))
    }
}

/// What an index says of the blocks of its directory.
struct Index {
    hash_version: u8,
    nodes: HashSet<u64>,
    /// The hashes that the names in each leaf may have.
    leaves: HashMap<u64, RangeInclusive<u32>>,
}

impl Checker<'_> {
    pub(super) async fn check_directories(&self) -> Result<(), Ext4Error> {
        let mut directories = self.directories.take();
        directories.sort_by_key(|directory| directory.inode);
        let checks = stream::iter(
            directories
                .iter()
                .map(|directory| Ok(self.check_directory(directory))),
        );
        let mut checks = std::pin::pin!(checks.try_buffer_unordered(READS_AHEAD));
        let mut done = 0;
        while checks.try_next().await?.is_some() {
            done += 1;
            (self.progress)("directories", done, directories.len() as u64);
        }
        Ok(())
    }

    async fn check_directory(&self, directory: &Directory) -> Result<Option<()>, Ext4Error> {
        let index = match directory.indexed {
            true => self.read_index(directory).await?,
            false => None,
        };
        let mut next = 0;
        for run in &directory.runs {
            if run.logical > next || run.unwritten {
                self.find(directory.place(next), "the block is not allocated");
            }
            next = run.logical + run.blocks;
            for start in (0..run.blocks).step_by(READ_BLOCKS as usize) {
                let count = READ_BLOCKS.min(run.blocks - start) as u32;
                let bytes = self.image.blocks(run.physical + start, count).await?;
                let blocks = bytes.chunks_exact(self.image.superblock.block_bytes as usize);
                for (logical, block) in (run.logical + start..).zip(blocks) {
                    self.check_directory_block(directory, index.as_ref(), logical, block);
                }
            }
        }
        Ok(Some(()))
    }

    fn check_directory_block(
        &self,
        directory: &Directory,
        index: Option<&Index>,
        logical: u64,
        block: &[u8],
    ) {
        let place = directory.place(logical);
        let is_node = index.is_some_and(|index| index.nodes.contains(&logical));
        let broken_root = directory.indexed && index.is_none() && logical == 0;
        if self.image.superblock.has_checksums()
            && !is_node
            && !broken_root
            && !dir::checksum_matches(block, directory.checksum_seed)
        {
            self.find(place, "its checksum is wrong or missing");
        }
        let stores_kinds = self
            .image
            .superblock
            .features
            .has_incompat(incompat::FILETYPE);
        let entries = match dir::entries(block, stores_kinds) {
            Ok(entries) => entries,
            Err(problem) => return self.find(place, problem),
        };
        if logical == 0 {
            self.check_dots(directory, &entries);
        }
        let mut names = HashSet::new();
        let skipped = if logical == 0 { 2 } else { 0 };
        for entry in entries
            .iter()
            .skip(skipped)
            .filter(|entry| entry.inode != 0)
        {
            if !names.insert(entry.name) {
                self.find(
                    place,
                    format!("\"{}\" is there twice", entry.name.escape_ascii()),
                );
            }
            self.check_entry(directory, place, entry);
        }
        match index {
            Some(index) if !is_node => self.check_hashes(place, index, logical, &names),
            _ => {}
        }
    }

    /// The first two entries lead to the directory itself and to the one above.
    fn check_dots(&self, directory: &Directory, entries: &[Entry<'_>]) {
        let place = directory.place(0);
        match entries.first() {
            Some(dot) if dot.name == DOT && dot.inode == directory.inode => self.link(place, dot),
            _ => self.find(place, "its first entry is not \".\" for itself"),
        }
        match entries.get(1) {
            Some(dotdot) if dotdot.name == DOTDOT => {
                self.link(place, dotdot);
                let mut parents = self.parents.borrow_mut();
                parents.entry(directory.inode).or_default().dotdot = dotdot.inode;
            }
            _ => self.find(place, "its second entry is not \"..\""),
        }
    }

    fn check_entry(&self, directory: &Directory, place: Place, entry: &Entry<'_>) {
        let name = entry.name.escape_ascii();
        if entry.name.is_empty()
            || entry.name == DOT
            || entry.name == DOTDOT
            || entry.name.iter().any(|byte| matches!(byte, 0 | b'/'))
        {
            self.find(place, format!("\"{name}\" is no name"));
        }
        if entry.inode != inode::ROOT && entry.inode < self.image.superblock.first_inode {
            return self.find(
                place,
                format!("\"{name}\" names the reserved inode {}", entry.inode),
            );
        }
        self.link(place, entry);
        if self.inodes.borrow().get(entry.inode).kind == Some(Kind::Directory) {
            let mut parents = self.parents.borrow_mut();
            let known = parents.entry(entry.inode).or_default();
            if known.named_in != 0 || entry.inode == inode::ROOT {
                self.find(
                    place,
                    format!("\"{name}\" is a second name of directory {}", entry.inode),
                );
            } else {
                known.named_in = directory.inode;
            }
        }
    }

    /// Counts an entry as a name of its inode.
    fn link(&self, place: Place, entry: &Entry<'_>) {
        let name = entry.name.escape_ascii();
        let number = entry.inode;
        let mut inodes = self.inodes.borrow_mut();
        let slot = match inodes.get_mut(number) {
            Some(slot) if slot.used => slot,
            _ => {
                return self.find(
                    place,
                    format!("\"{name}\" names inode {number}, which is not in use"),
                );
            }
        };
        slot.names = slot.names.saturating_add(1);
        let stores_kinds = self
            .image
            .superblock
            .features
            .has_incompat(incompat::FILETYPE);
        let expected = match slot.kind {
            Some(kind) if stores_kinds => kind as u8,
            _ => 0,
        };
        // 0 is what a filesystem without kinds stores, and readers look at the inode.
        if entry.kind != expected && entry.kind != 0 {
            self.find(
                place,
                format!(
                    "\"{name}\" is of kind {}, its inode {number} of kind {expected}",
                    entry.kind
                ),
            );
        }
    }

    fn check_hashes(&self, place: Place, index: &Index, logical: u64, names: &HashSet<&[u8]>) {
        let Some(range) = index.leaves.get(&logical) else {
            return self.find(place, "the index does not lead to it");
        };
        let superblock = &self.image.superblock;
        let unsigned = superblock.hashes_unsigned();
        let of =
            |name: &&[u8]| hash::hash(name, index.hash_version, &superblock.hash_seed, unsigned);
        if let Some(name) = names.iter().find(|name| !range.contains(&of(name))) {
            self.find(
                place,
                format!(
                    "\"{}\" is not where the index looks for it",
                    name.escape_ascii()
                ),
            );
        }
    }

    /// The index of a directory, from its root on; `None` with a finding if it cannot be used.
    async fn read_index(&self, directory: &Directory) -> Result<Option<Index>, Ext4Error> {
        let superblock = &self.image.superblock;
        let seed = superblock
            .has_checksums()
            .then_some(directory.checksum_seed);
        let large = superblock.features.has_incompat(incompat::LARGE_DIR);
        let max_levels = if large { MAX_LEVELS_LARGE } else { MAX_LEVELS };
        let Some(first) = directory
            .block(0)
            .filter(|_| superblock.features.has_compat(compat::DIR_INDEX))
        else {
            return Ok(None);
        };
        let root = match htree::read_root(&self.image.block(first).await?, max_levels, seed) {
            Ok(root) => root,
            Err(problem) => {
                self.find(directory.place(0), problem);
                return Ok(None);
            }
        };
        let mut index = Index {
            hash_version: root.hash_version,
            nodes: HashSet::from([0]),
            leaves: HashMap::new(),
        };
        let mut pending = children(&root.entries, &(0..=u32::MAX), root.levels);
        while let Some((range, level, logical)) = pending.pop() {
            let Some(block) = directory
                .block(logical)
                .filter(|_| logical < directory.blocks)
            else {
                self.find(
                    directory.place(0),
                    format!("its index leads to block {logical}, which it does not have"),
                );
                continue;
            };
            if index.nodes.contains(&logical) || index.leaves.contains_key(&logical) {
                self.find(directory.place(logical), "the index leads to it twice");
            } else if level == 0 {
                index.leaves.insert(logical, range);
            } else {
                index.nodes.insert(logical);
                match htree::read_node(&self.image.block(block).await?, seed) {
                    Ok(entries) => pending.extend(children(&entries, &range, level - 1)),
                    Err(problem) => self.find(directory.place(logical), problem),
                }
            }
        }
        Ok(Some(index))
    }
}

/// The hashes, the level (0: leaf) and the block of each child of a node that covers `range`.
fn children(
    entries: &[Child],
    range: &RangeInclusive<u32>,
    level: u8,
) -> Vec<(RangeInclusive<u32>, u8, u64)> {
    let start = |at: usize| {
        if at == 0 {
            *range.start()
        } else {
            entries[at].hash
        }
    };
    // With the lowest bit set, names of that hash are in the block before, too.
    let end = |at: usize| {
        entries.get(at + 1).map_or(*range.end(), |next| {
            (next.hash & !1).wrapping_sub(u32::from(next.hash & 1 == 0))
        })
    };
    let child =
        |(at, entry): (usize, &Child)| (start(at) & !1..=end(at), level, u64::from(entry.block));
    entries.iter().enumerate().map(child).collect()
}

impl Parents {
    /// Whether the two ways agree.
    pub(super) fn agree(&self) -> bool {
        self.named_in == self.dotdot
    }
}
