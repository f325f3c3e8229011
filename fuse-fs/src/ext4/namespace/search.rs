//! Where a name is in a directory, and where it goes: through the index, or block by block without one.

use super::draft::Draft;
use crate::ext4::cache::Block;
use crate::ext4::dir::{self, Entry};
use crate::ext4::error::FsError;
use crate::ext4::features::compat;
use crate::ext4::growth::{self, Capacity, Growth, Step};
use crate::ext4::hash;
use crate::ext4::htree::{self, Child, Index, Root};
use crate::ext4::leaf;
use crate::ext4::superblock::Superblock;

/// An entry that was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Found {
    /// The block of the directory.
    pub(super) block: u64,
    pub(super) inode: u32,
    pub(super) kind: u8,
}

/// A node on the way to a leaf, and the entry taken there.
pub(super) struct Frame {
    block: u32,
    bytes: Block,
    taken: usize,
}

/// A leaf of a directory.
pub(super) enum Position {
    Linear(u64),
    Indexed(Vec<Frame>),
}

/// The hash of a directory's names.
#[derive(Clone, Copy)]
pub(super) struct Hasher<'f> {
    version: u8,
    superblock: &'f Superblock,
}

impl Hasher<'_> {
    pub(super) fn of(&self, name: &[u8]) -> u32 {
        let Superblock { hash_seed, .. } = self.superblock;
        hash::hash(
            name,
            self.version,
            hash_seed,
            self.superblock.hashes_unsigned(),
        )
    }
}

impl<'f> Draft<'f> {
    /// Without an index, what an index would have.
    pub(super) async fn hasher(&self) -> Result<Hasher<'f>, FsError> {
        let superblock = self.fs.superblock();
        let version = match self.indexed {
            true => self.head(&self.node(0).await?)?.0,
            false => superblock.hash_version,
        };
        Ok(Hasher {
            version,
            superblock,
        })
    }

    fn head(&self, root: &[u8]) -> Result<(u8, u8), FsError> {
        htree::read_head(root, self.max_levels()).map_err(|problem| self.corrupt(0, problem))
    }

    fn index<'a>(&self, block: u32, bytes: &'a [u8]) -> Result<Index<'a>, FsError> {
        let index = match block {
            0 => Index::of_root(bytes, self.seed),
            _ => Index::of_node(bytes, self.seed),
        };
        index.map_err(|problem| self.corrupt(u64::from(block), problem))
    }

    async fn frame(&self, block: u32, hash: u32) -> Result<Frame, FsError> {
        let bytes = self.node(u64::from(block)).await?;
        let taken = self.index(block, &bytes)?.find(hash);
        Ok(Frame {
            block,
            bytes,
            taken,
        })
    }

    /// The child that a frame took; the root is nobody's child.
    fn child(&self, frame: &Frame) -> Result<u32, FsError> {
        let child = self
            .index(frame.block, &frame.bytes)?
            .child(frame.taken)
            .block;
        if child == 0 || u64::from(child) >= self.blocks {
            let problem = format!("its index leads to block {child}");
            return Err(self.corrupt(u64::from(frame.block), problem));
        }
        Ok(child)
    }

    /// The first leaf that may have names of `hash`.
    pub(super) async fn seek(&self, hash: u32) -> Result<Position, FsError> {
        if !self.indexed {
            return Ok(Position::Linear(0));
        }
        let root = self.frame(0, hash).await?;
        let (_, levels) = self.head(&root.bytes)?;
        let mut way = vec![root];
        self.descend(&mut way, levels, hash).await?;
        Ok(Position::Indexed(way))
    }

    async fn descend(&self, way: &mut Vec<Frame>, levels: u8, hash: u32) -> Result<(), FsError> {
        while let Some(last) = way.last()
            && way.len() <= usize::from(levels)
        {
            let child = self.child(last)?;
            way.push(self.frame(child, hash).await?);
        }
        Ok(())
    }

    /// The block of the leaf.
    pub(super) fn block_at(&self, position: &Position) -> Result<u64, FsError> {
        match position {
            Position::Linear(block) => Ok(*block),
            Position::Indexed(way) => match way.last() {
                Some(frame) => self.child(frame).map(u64::from),
                None => Err(self.corrupt(0, "an index without a root")),
            },
        }
    }

    /// The deepest node with an entry behind the one taken, and that entry.
    fn next_child(&self, way: &[Frame]) -> Result<Option<(usize, Child)>, FsError> {
        for (depth, frame) in way.iter().enumerate().rev() {
            let index = self.index(frame.block, &frame.bytes)?;
            if frame.taken + 1 < index.count() {
                return Ok(Some((depth, index.child(frame.taken + 1))));
            }
        }
        Ok(None)
    }

    /// Whether names of `hash` may be in the leaf behind, too.
    pub(super) fn continues(&self, position: &Position, hash: u32) -> Result<bool, FsError> {
        match position {
            Position::Linear(block) => Ok(block + 1 < self.blocks),
            Position::Indexed(way) => {
                let next = self.next_child(way)?;
                Ok(next.is_some_and(|(_, child)| child.hash == hash | 1))
            }
        }
    }

    /// The hash from which on names are in the leaf behind; `None` at the end.
    pub(super) fn next_hash(&self, position: &Position) -> Result<Option<u32>, FsError> {
        match position {
            Position::Linear(block) => Ok((block + 1 < self.blocks).then_some(0)),
            Position::Indexed(way) => Ok(self.next_child(way)?.map(|(_, child)| child.hash)),
        }
    }

    /// Goes to the leaf behind; whether there is one.
    pub(super) async fn advance(&self, position: &mut Position) -> Result<bool, FsError> {
        match position {
            Position::Linear(block) => {
                *block += 1;
                Ok(*block < self.blocks)
            }
            Position::Indexed(way) => {
                let Some((depth, _)) = self.next_child(way)? else {
                    return Ok(false);
                };
                let levels = (way.len() - 1) as u8;
                way.truncate(depth + 1);
                way[depth].taken += 1;
                self.descend(way, levels, 0).await?;
                Ok(true)
            }
        }
    }

    /// Finds `name`, which is neither "." nor "..".
    pub(super) async fn find(&self, name: &[u8]) -> Result<Option<Found>, FsError> {
        let hash = self.hasher().await?.of(name);
        let mut position = self.seek(hash).await?;
        loop {
            let block = self.block_at(&position)?;
            let bytes = self.leaf(block).await?;
            let found = leaf::find(&bytes, name, self.stores_kinds());
            if let Some(entry) = found.map_err(|problem| self.corrupt(block, problem))? {
                let Entry { inode, kind, .. } = entry;
                return Ok(Some(Found { block, inode, kind }));
            }
            if !self.continues(&position, hash)? || !self.advance(&mut position).await? {
                return Ok(None);
            }
        }
    }

    /// The directory above.
    pub(super) async fn parent(&self) -> Result<u32, FsError> {
        let bytes = self.first_block().await?;
        let found = leaf::find(&bytes, b"..", false).map_err(|problem| self.corrupt(0, problem))?;
        let parent = found.ok_or_else(|| self.corrupt(0, "it has no \"..\""))?;
        Ok(parent.inode)
    }

    async fn first_block(&self) -> Result<Block, FsError> {
        match self.indexed {
            true => {
                let bytes = self.node(0).await?;
                self.index(0, &bytes)?;
                Ok(bytes)
            }
            false => self.leaf(0).await,
        }
    }

    /// Whether it has no names.
    pub(super) async fn is_empty(&self) -> Result<bool, FsError> {
        let mut position = self.seek(0).await?;
        loop {
            let block = self.block_at(&position)?;
            let bytes = self.leaf(block).await?;
            if !leaf::is_empty(&bytes).map_err(|problem| self.corrupt(block, problem))? {
                return Ok(false);
            }
            if !self.advance(&mut position).await? {
                return Ok(true);
            }
        }
    }

    /// Lets ".." lead to another directory.
    pub(super) async fn set_parent(&mut self, parent: u32) -> Result<(), FsError> {
        let mut bytes = self.first_block().await?.to_vec();
        let kind = self.kind_stored(crate::ext4::inode::Kind::Directory as u8);
        let pointed = leaf::point(&mut bytes, b"..", parent, kind);
        if !pointed.map_err(|problem| self.corrupt(0, problem))? {
            return Err(self.corrupt(0, "it has no \"..\""));
        }
        match self.indexed {
            true => htree::seal_root(&mut bytes, self.seed),
            false => dir::seal(&mut bytes, self.seed),
        }
        self.put(0, bytes);
        Ok(())
    }

    /// What entries have in the place of the kind.
    fn kind_stored(&self, kind: u8) -> u8 {
        if self.stores_kinds() { kind } else { 0 }
    }

    /// Changes a leaf by `change`, if that says so.
    async fn edit(
        &mut self,
        block: u64,
        change: impl FnOnce(&mut [u8]) -> Result<bool, String>,
    ) -> Result<bool, FsError> {
        let mut bytes = self.leaf(block).await?.to_vec();
        let changed = change(&mut bytes).map_err(|problem| self.corrupt(block, problem))?;
        if changed {
            dir::seal(&mut bytes, self.seed);
            self.put(block, bytes);
        }
        Ok(changed)
    }

    /// Takes out `name`, which was found in `block`.
    pub(super) async fn remove(&mut self, block: u64, name: &[u8]) -> Result<(), FsError> {
        match self.edit(block, |bytes| leaf::remove(bytes, name)).await? {
            true => Ok(()),
            false => Err(self.corrupt(block, "a name is gone")),
        }
    }

    /// Lets `name`, which is in `block`, lead to another inode.
    pub(super) async fn point(
        &mut self,
        block: u64,
        name: &[u8],
        inode: u32,
        kind: u8,
    ) -> Result<(), FsError> {
        let kind = self.kind_stored(kind);
        let point = |bytes: &mut [u8]| leaf::point(bytes, name, inode, kind);
        match self.edit(block, point).await? {
            true => Ok(()),
            false => Err(self.corrupt(block, "a name is gone")),
        }
    }

    /// Adds `name`, which is not there; the block that has it now.
    pub(super) async fn add(&mut self, name: &[u8], inode: u32, kind: u8) -> Result<u64, FsError> {
        let kind = self.kind_stored(kind);
        let entry = Entry { inode, kind, name };
        if !self.indexed {
            if let Some(block) = self.add_linear(&entry).await? {
                return Ok(block);
            }
            if self.blocks > 1 || !self.fs.superblock().features.has_compat(compat::DIR_INDEX) {
                let block = self.blocks;
                self.put(
                    block,
                    dir::write_block(&[entry], self.block_bytes(), self.seed),
                );
                return Ok(block);
            }
            self.make_index().await?;
        }
        self.add_indexed(&entry).await
    }

    async fn add_linear(&mut self, entry: &Entry<'_>) -> Result<Option<u64>, FsError> {
        for block in 0..self.blocks {
            if self.insert(block, entry).await? {
                return Ok(Some(block));
            }
        }
        Ok(None)
    }

    async fn insert(&mut self, block: u64, entry: &Entry<'_>) -> Result<bool, FsError> {
        let bytes = self.leaf(block).await?;
        let room = leaf::has_room(&bytes, entry.name);
        if !room.map_err(|problem| self.corrupt(block, problem))? {
            return Ok(false);
        }
        self.edit(block, |bytes| leaf::insert(bytes, entry)).await
    }

    async fn make_index(&mut self) -> Result<(), FsError> {
        let hasher = self.hasher().await?;
        let bytes = self.leaf(0).await?;
        let kinds = self.stores_kinds();
        let hash_of = |name: &[u8]| hasher.of(name);
        let made = growth::index(&bytes, hasher.version, kinds, hash_of, self.seed);
        let made = made.map_err(|problem| self.corrupt(0, problem))?;
        self.put(0, made.root);
        self.put(1, made.halves.lower);
        self.put(2, made.halves.upper);
        self.indexed = true;
        Ok(())
    }

    async fn add_indexed(&mut self, entry: &Entry<'_>) -> Result<u64, FsError> {
        let hash = self.hasher().await?.of(entry.name);
        let position = self.seek(hash).await?;
        let block = self.block_at(&position)?;
        if self.insert(block, entry).await? {
            return Ok(block);
        }
        let upper = self.divide(&position, block).await?;
        let block = if hash >= upper.hash {
            u64::from(upper.block)
        } else {
            block
        };
        match self.insert(block, entry).await? {
            true => Ok(block),
            false => Err(self.corrupt(block, "half a block has no room for a name")),
        }
    }

    /// Divides a full leaf; its upper half.
    async fn divide(&mut self, position: &Position, block: u64) -> Result<Child, FsError> {
        let hasher = self.hasher().await?;
        let bytes = self.leaf(block).await?;
        let entries = dir::entries(&bytes, self.stores_kinds());
        let entries = entries.map_err(|problem| self.corrupt(block, problem))?;
        let entries = growth::hashed(&entries, |name| hasher.of(name));
        let halves = leaf::halve(entries, bytes.len(), self.seed);
        let halves = halves.map_err(|problem| self.corrupt(block, problem))?;
        let fresh = u32::try_from(self.blocks).map_err(|_| FsError::NoSpace)?;
        let upper = Child {
            hash: halves.hash,
            block: fresh,
        };
        let way = self.steps(position)?;
        let growth = growth::plan(&way, upper, self.capacity(), fresh + 1);
        let growth = growth.ok_or(FsError::NoSpace)?;
        self.put(block, halves.lower);
        self.put(u64::from(fresh), halves.upper);
        self.grow(growth, hasher.version).await?;
        Ok(upper)
    }

    fn capacity(&self) -> Capacity {
        Capacity {
            root: htree::root_capacity(self.block_bytes(), self.seed),
            node: htree::node_capacity(self.block_bytes(), self.seed),
            max_levels: self.max_levels(),
        }
    }

    fn steps(&self, position: &Position) -> Result<Vec<Step>, FsError> {
        let Position::Indexed(way) = position else {
            return Ok(Vec::new());
        };
        let step = |frame: &Frame| {
            let entries = self.index(frame.block, &frame.bytes)?.entries();
            let block = frame.block;
            Ok(Step {
                block,
                entries: entries.map_err(|problem| self.corrupt(u64::from(block), problem))?,
                taken: frame.taken,
            })
        };
        way.iter().map(step).collect()
    }

    async fn grow(&mut self, growth: Growth, hash_version: u8) -> Result<(), FsError> {
        let (block_bytes, seed) = (self.block_bytes(), self.seed);
        for (block, entries) in growth.nodes {
            let node = htree::write_node(&entries, block_bytes, seed);
            self.put(u64::from(block), node);
        }
        if let Some((levels, entries)) = growth.root {
            let mut bytes = self.node(0).await?.to_vec();
            let root = Root {
                hash_version,
                levels,
                entries,
            };
            htree::write_root(&mut bytes, &root, seed);
            self.put(0, bytes);
        }
        Ok(())
    }
}
