//! Files whose blocks are mapped by the pointers of ext2 and ext3: before such a file changes, it gets extents.

use crate::ext4::bytes::le32;
use crate::ext4::error::{Ext4Error, FsError, Place, Refusal};
use crate::ext4::extent::{self, Run};
use crate::ext4::extent_tree::{EDIT_BLOCKS, EDIT_CREDITS};
use crate::ext4::filesystem::Filesystem;
use crate::ext4::inode::{FLAG_EXTENTS, Kind, MAP_BYTES};
use crate::ext4::inode_cell::InodeState;
use crate::ext4::raw_inode::RawInode;
use std::collections::HashSet;

const DIRECT_BLOCKS: usize = 12;
const SLOTS: usize = MAP_BYTES / POINTER_BYTES;
const POINTER_BYTES: usize = 4;

/// What the pointers of a file say.
#[derive(Default)]
struct Pointers {
    runs: Vec<Run>,
    /// Blocks that hold pointers.
    nodes: HashSet<u64>,
}

impl Filesystem {
    /// Gives the file an extent tree, if it has none. The inode's lock is held, and no handle.
    ///
    /// # Errors
    /// [`Refusal::Unsupported`] for a file in more pieces than one transaction can map; the device's; what is
    /// wrong with the pointers.
    pub async fn ensure_extents(&self, inode: &mut InodeState) -> Result<(), FsError> {
        if inode.raw.has_flag(FLAG_EXTENTS) || !has_blocks(&inode.raw) {
            return Ok(());
        }
        let pointers = self.read_pointers(&inode.raw).await?;
        let capacity = extent::capacity(self.superblock().block_bytes as usize);
        let tree_blocks = EDIT_BLOCKS + (2 * pointers.runs.len()).div_ceil(capacity) as u32;
        let credits = EDIT_CREDITS + 2 * tree_blocks + pointers.nodes.len() as u32;
        if credits as usize > self.transactions().max_blocks() {
            return Err(Refusal::Unsupported.into());
        }
        let mut handle = self.begin_with_headroom(credits, tree_blocks).await?;
        inode.raw.set_flags(inode.raw.flags() | FLAG_EXTENTS);
        extent::write_leaf(inode.raw.map_mut(), &[]);
        for run in &pointers.runs {
            inode.raw.subtract_blocks(run.blocks);
            handle
                .insert_run(inode, run.logical, run.physical, run.blocks, false)
                .await?;
        }
        for node in &pointers.nodes {
            inode.raw.subtract_blocks(1);
            handle.free_metadata(*node).await?;
        }
        handle.put_inode(inode).await?;
        let _ = handle.finish();
        Ok(())
    }

    async fn read_pointers(&self, raw: &RawInode) -> Result<Pointers, FsError> {
        let fan = u64::from(self.superblock().block_bytes) / POINTER_BYTES as u64;
        let mut found = Pointers::default();
        // The next last: logical block, level (0: data), pointer.
        let mut pending = Vec::new();
        let mut logical = 0;
        for slot in 0..SLOTS {
            let level = (slot + 1).saturating_sub(DIRECT_BLOCKS) as u32;
            pending.push((logical, level, le32(raw.map(), slot * POINTER_BYTES)));
            logical += fan.pow(level);
        }
        pending.reverse();
        while let Some((logical, level, pointer)) = pending.pop() {
            if pointer == 0 {
                continue;
            }
            let block = self.inside(raw, pointer)?;
            if level == 0 {
                found.push(logical, block);
                continue;
            }
            if !found.nodes.insert(block) {
                let problem = format!("block {block} is twice in its map");
                return Err(Ext4Error::corrupt(Place::Inode(raw.number()), problem).into());
            }
            let bytes = self.read_block(block).await?;
            let step = fan.pow(level - 1);
            let pointers = bytes.chunks_exact(POINTER_BYTES).enumerate().rev();
            let child = |(at, chunk): (usize, &[u8])| {
                (logical + at as u64 * step, level - 1, le32(chunk, 0))
            };
            pending.extend(pointers.map(child).filter(|(.., pointer)| *pointer != 0));
        }
        Ok(found)
    }
}

impl Pointers {
    fn push(&mut self, logical: u64, physical: u64) {
        match self.runs.last_mut() {
            Some(run)
                if run.logical + run.blocks == logical && run.physical + run.blocks == physical =>
            {
                run.blocks += 1;
            }
            _ => self.runs.push(Run {
                logical,
                physical,
                blocks: 1,
                unwritten: false,
            }),
        }
    }
}

/// Whether the map of an inode names blocks, and is not a device's number or a short link.
fn has_blocks(raw: &RawInode) -> bool {
    match raw.kind() {
        Some(Kind::Regular | Kind::Directory) => true,
        Some(Kind::Symlink) => raw.size_bytes() >= MAP_BYTES as u64,
        _ => false,
    }
}
