//! A handle: one operation inside the running transaction, all of which is on disk after a crash, or nothing.
//!
//! Locks of inodes are taken before the handle. While it is held nothing is waited for but reads of metadata:
//! the commit waits for the handle.

use crate::ext4::block_space::Change;
use crate::ext4::bytes::{le32, put};
use crate::ext4::cache::Block;
use crate::ext4::error::{Ext4Error, FsError, Place};
use crate::ext4::extent;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::inode::{FLAG_EXTENTS, Inode, Kind, seal};
use crate::ext4::inode_cell::{InodeCell, InodeState};
use crate::ext4::raw_inode::RawInode;
use crate::ext4::transaction::{Ticket, Tid};
use crate::ext4::write::HEADROOM_BLOCKS;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of the fields behind the first 128 of new inodes.
const EXTRA_BYTES: u16 = 32;
const DTIME_AT: usize = 0x14;

/// One operation. One that changed something and is dropped before [`Handle::finish`] aborts the journal: half
/// of it must not reach the disk.
pub struct Handle {
    fs: Filesystem,
    ticket: Ticket,
    promise: Promise,
    changed: bool,
    finished: bool,
}

/// Blocks that are kept back, and not yet allocated.
struct Promise {
    fs: Filesystem,
    blocks: u64,
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.fs.groups().give_back(self.blocks);
    }
}

impl Filesystem {
    /// Starts an operation that changes at most `credits` blocks of metadata and allocates at most `blocks`.
    /// Allocation inside cannot fail for lack of space.
    ///
    /// # Errors
    /// [`FsError::ReadOnly`], [`FsError::NoSpace`], [`FsError::Aborted`].
    pub async fn begin(&self, credits: u32, blocks: u32) -> Result<Handle, FsError> {
        let leave = if blocks > 0 { HEADROOM_BLOCKS } else { 0 };
        self.begin_leaving(credits, blocks, leave).await
    }

    /// As [`Self::begin`], for what was acknowledged or gives up space: it may take the last blocks.
    pub(super) async fn begin_with_headroom(
        &self,
        credits: u32,
        blocks: u32,
    ) -> Result<Handle, FsError> {
        self.begin_leaving(credits, blocks, 0).await
    }

    async fn begin_leaving(
        &self,
        credits: u32,
        blocks: u32,
        leave: u64,
    ) -> Result<Handle, FsError> {
        self.check_writable()?;
        self.promise(u64::from(blocks), leave).await?;
        let promise = Promise {
            fs: self.clone(),
            blocks: u64::from(blocks),
        };
        Ok(Handle {
            fs: self.clone(),
            ticket: self.enter(credits).await?,
            promise,
            changed: false,
            finished: false,
        })
    }

    /// Keeps blocks back; where too few are free, those that wait for a commit are waited for.
    pub(super) async fn promise(&self, blocks: u64, leave: u64) -> Result<(), FsError> {
        match self.groups().promise(blocks, leave) {
            Err(FsError::NoSpace) if self.groups().waits_for_commit(blocks + leave) => {
                self.commit_and_wait(self.running_tid()).await?;
                self.groups().promise(blocks, leave)
            }
            decided => decided,
        }
    }

    async fn enter(&self, credits: u32) -> Result<Ticket, FsError> {
        loop {
            match self.transactions().enter(credits).await? {
                Ok(ticket) => return Ok(ticket),
                Err(full) => self.commit_and_wait(full).await?,
            }
        }
    }
}

impl Handle {
    pub(super) fn filesystem(&self) -> &Filesystem {
        &self.fs
    }

    #[must_use]
    pub fn tid(&self) -> Tid {
        self.ticket.tid
    }

    /// The operation is whole.
    #[must_use = "fsync waits for this transaction"]
    pub fn finish(mut self) -> Tid {
        self.finished = true;
        self.ticket.tid
    }

    /// # Errors
    /// What the device reports.
    pub async fn read_block(&self, block: u64) -> Result<Block, FsError> {
        self.fs.read_block(block).await
    }

    /// Changes a block of metadata; checksums inside are the caller's.
    ///
    /// # Errors
    /// What the device reports.
    pub async fn update<R>(
        &mut self,
        block: u64,
        change: impl FnOnce(&mut [u8]) -> R,
    ) -> Result<R, FsError> {
        let (result, first) = self.fs.cache().update(block, self.tid(), change).await?;
        self.note(block, first);
        Ok(result)
    }

    /// Makes a block of metadata anew, of zeros and what `fill` puts there.
    pub fn create(&mut self, block: u64, fill: impl FnOnce(&mut [u8])) {
        self.fs.cache().create(block, self.tid(), fill);
        self.note(block, true);
    }

    pub(super) fn note(&mut self, block: u64, first: bool) {
        self.changed = true;
        if first {
            self.fs.transactions().running().changed.insert(block);
        }
    }

    fn note_change(&mut self, change: Change) {
        self.note(change.block, change.first);
        let mut running = self.fs.transactions().running();
        running.groups.insert(change.group);
    }

    /// Allocates at most `want` (not 0) consecutive blocks near `goal`, from those that `begin` was told.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] if none is left of these; the device's.
    pub async fn allocate_blocks(&mut self, goal: u64, want: u32) -> Result<Range<u64>, FsError> {
        let want = u64::from(want).min(self.promise.blocks);
        if want == 0 {
            return Err(FsError::NoSpace);
        }
        let claimed = self.fs.groups().claim_blocks(goal, want as u32).await?;
        self.promise.blocks -= claimed.end - claimed.start;
        self.use_claimed(claimed.clone()).await?;
        Ok(claimed)
    }

    /// Puts blocks that were claimed before into the bitmaps.
    ///
    /// # Errors
    /// The device's.
    pub async fn use_claimed(&mut self, blocks: Range<u64>) -> Result<(), FsError> {
        let changes = self.fs.groups().use_blocks(blocks, self.tid()).await;
        self.note_changes(changes)
    }

    fn note_changes(&mut self, changes: Result<Vec<Change>, FsError>) -> Result<(), FsError> {
        self.changed = true;
        changes?
            .into_iter()
            .for_each(|change| self.note_change(change));
        Ok(())
    }

    /// Frees blocks of data.
    ///
    /// # Errors
    /// The device's; [`Ext4Error::Corrupt`] if one is free.
    pub async fn free_blocks(&mut self, blocks: Range<u64>) -> Result<(), FsError> {
        let changes = self
            .fs
            .groups()
            .free_blocks(blocks.clone(), self.tid())
            .await;
        self.note_changes(changes)?;
        self.fs.transactions().running().freed.data.push(blocks);
        Ok(())
    }

    /// Frees a block of metadata: copies of it in the log are revoked.
    ///
    /// # Errors
    /// As [`Self::free_blocks`].
    pub async fn free_metadata(&mut self, block: u64) -> Result<(), FsError> {
        let changes = self
            .fs
            .groups()
            .free_blocks(block..block + 1, self.tid())
            .await;
        self.note_changes(changes)?;
        self.fs.cache().forget(block);
        let mut running = self.fs.transactions().running();
        running.changed.remove(&block);
        running.freed.metadata.insert(block);
        Ok(())
    }

    /// Puts an inode into its table.
    ///
    /// # Errors
    /// The device's.
    pub async fn put_inode(&mut self, inode: &mut InodeState) -> Result<(), FsError> {
        inode.tid = self.tid();
        self.put_raw(&mut inode.raw).await
    }

    async fn put_raw(&mut self, raw: &mut RawInode) -> Result<(), FsError> {
        if let Some(next) = self.fs.orphans().next_of(raw.number()) {
            raw.set_dtime(next);
        }
        let sealed = raw.sealed(self.fs.superblock());
        let (block, at) = self.fs.inode_at(raw.number())?;
        self.update(block, |bytes| put(bytes, at, &sealed)).await
    }

    /// Allocates an inode of the kind that `mode` names, near the directory `parent`. Mode, generation, times and
    /// an empty map are set and it has no links; the caller sets the rest and puts it.
    ///
    /// # Errors
    /// [`FsError::NoSpace`] before anything changed; the device's.
    pub async fn allocate_inode(
        &mut self,
        parent: u32,
        mode: u16,
    ) -> Result<Arc<InodeCell>, FsError> {
        let kind = Kind::of_mode(mode).unwrap_or(Kind::Regular);
        let number = self.fs.groups().claim_inode(parent, kind).await?;
        let used = self.fs.groups().use_inode(number, kind, self.tid()).await?;
        self.note_change(used.change);
        self.zero_slots(used.change.group, used.garbage).await?;
        let raw = self.new_inode(number, mode, kind);
        Ok(self.fs.inodes().add(InodeState::new(raw, self.tid())))
    }

    /// Zeros slots of a table that was never zeroed.
    async fn zero_slots(&mut self, group: u32, slots: Range<u32>) -> Result<(), FsError> {
        let first = group * self.fs.superblock().inodes_per_group + 1;
        let size = usize::from(self.fs.superblock().inode_bytes);
        for slot in slots {
            let (block, at) = self.fs.inode_at(first + slot)?;
            self.update(block, |bytes| bytes[at..at + size].fill(0))
                .await?;
        }
        Ok(())
    }

    fn new_inode(&self, number: u32, mode: u16, kind: Kind) -> RawInode {
        let superblock = self.fs.superblock();
        let slot = vec![0; usize::from(superblock.inode_bytes)];
        let mut raw = RawInode::new(number, &slot, superblock);
        let now = self.fs.now();
        raw.set_mode(mode);
        raw.set_generation(self.fs.next_generation());
        raw.set_extra_bytes(EXTRA_BYTES);
        raw.set_atime(now);
        raw.set_ctime(now);
        raw.set_mtime(now);
        raw.set_crtime(now);
        if matches!(kind, Kind::Regular | Kind::Directory | Kind::Symlink) {
            raw.set_flags(FLAG_EXTENTS);
            extent::write_leaf(raw.map_mut(), &[]);
        }
        raw
    }

    /// Frees an inode whose blocks are free and which is not on the list of orphans.
    ///
    /// # Errors
    /// The device's; [`Ext4Error::Corrupt`] if it is free.
    pub async fn free_inode(&mut self, inode: &mut InodeState) -> Result<(), FsError> {
        let number = inode.raw.number();
        let directory = inode.raw.is_directory();
        let now = u32::try_from(self.fs.now().seconds).unwrap_or(u32::MAX);
        inode.raw.set_dtime(now.max(1));
        inode.freed = true;
        self.put_inode(inode).await?;
        let change = self
            .fs
            .groups()
            .free_inode(number, directory, self.tid())
            .await?;
        self.note_change(change);
        self.fs.inodes().remove(number);
        self.fs.transactions().running().freed.inodes.push(number);
        Ok(())
    }

    /// Puts an inode on the list of orphans: it is deleted, or shortened to its size, at the next mount unless
    /// [`Self::orphan_remove`] comes before.
    ///
    /// # Errors
    /// The device's.
    pub async fn orphan_add(&mut self, inode: &mut InodeState) -> Result<(), FsError> {
        self.changed = true;
        self.fs.orphans().add(inode.raw.number());
        self.put_inode(inode).await
    }

    /// Takes an inode off the list of orphans.
    ///
    /// # Errors
    /// The device's.
    pub async fn orphan_remove(&mut self, inode: &mut InodeState) -> Result<(), FsError> {
        let Some(previous) = self.fs.orphans().remove(inode.raw.number()) else {
            return Ok(());
        };
        inode.raw.set_dtime(0);
        self.put_inode(inode).await?;
        if let Some(previous) = previous {
            self.relink_orphan(previous).await?;
        }
        Ok(())
    }

    /// Lets the orphan `number` name its successor, whatever else its slot holds.
    async fn relink_orphan(&mut self, number: u32) -> Result<(), FsError> {
        let fs = self.fs.clone();
        let (block, at) = fs.inode_at(number)?;
        let size = usize::from(fs.superblock().inode_bytes);
        self.update(block, |bytes| {
            let slot = &mut bytes[at..at + size];
            // Read inside: the list may change until here.
            if let Some(next) = fs.orphans().next_of(number)
                && le32(slot, DTIME_AT) != next
            {
                put(slot, DTIME_AT, &next.to_le_bytes());
                if fs.superblock().has_checksums() {
                    seal(number, slot, fs.superblock());
                }
            }
        })
        .await
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.fs.transactions().leave(&self.ticket);
        if self.changed && !self.finished {
            self.fs
                .transactions()
                .abort("an operation ended in the middle");
        }
    }
}

impl Filesystem {
    /// The block of the inode's table, and where in it the slot begins.
    pub(super) fn inode_at(&self, number: u32) -> Result<(u64, usize), FsError> {
        let superblock = self.superblock();
        let (group, index) = superblock
            .inode_place(number)
            .ok_or(FsError::Stale(number))?;
        let in_block = superblock.block_bytes / u32::from(superblock.inode_bytes);
        let block = self.groups().inode_table(group) + u64::from(index / in_block);
        if !superblock.contains(block, 1) {
            let problem = "its inode table is outside the filesystem";
            return Err(Ext4Error::corrupt(Place::Group(group), problem).into());
        }
        let at = (index % in_block) as usize * usize::from(superblock.inode_bytes);
        Ok((block, at))
    }

    /// Reads an inode from its table, in use or not.
    pub(super) async fn read_raw(&self, number: u32) -> Result<RawInode, FsError> {
        let superblock = self.superblock();
        let (block, at) = self.inode_at(number)?;
        let bytes = self.read_block(block).await?;
        let slot = &bytes[at..at + usize::from(superblock.inode_bytes)];
        let inode = Inode::read(number, slot, superblock);
        if !inode.checksum_matches(slot, superblock) {
            return Err(Ext4Error::corrupt(Place::Inode(number), "a wrong checksum").into());
        }
        Ok(RawInode::new(number, slot, superblock))
    }
}
