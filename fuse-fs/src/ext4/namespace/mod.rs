//! The operations on names and attributes, as POSIX has them.
//!
//! An operation locks its inodes, decides on what is there, drafts what changes, and makes all of it in one handle:
//! after a crash it happened or it did not. Who may do it is decided above, but for the flags of inodes.
//!
//! Order of locks, which no operation breaks: a directory before what is in it; of two directories the one above
//! first, if they are on one path, which a lock of the filesystem keeps so meanwhile; else the lower number first.

mod attributes;
mod create;
mod draft;
mod links;
mod listing;
mod rename;
mod search;
mod xattrs;

pub use attributes::{AttributeChange, NewTime};
pub use create::{Content, NewNode};
pub use listing::Listed;
pub use rename::RenameMode;
pub use xattrs::SetMode;

use crate::ext4::error::{Ext4Error, FsError, Place, Refusal};
use crate::ext4::features::ro_compat;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::inode::{self, FLAG_APPEND, FLAG_IMMUTABLE};
use crate::ext4::inode_cell::{InodeCell, InodeState};
use crate::ext4::raw_inode::RawInode;
use draft::Draft;
use std::sync::Arc;

const MAX_NAME_BYTES: usize = 255;
/// Links that an inode may have.
const MAX_LINKS: u16 = 65000;
/// A directory with more subdirectories than can be counted.
const UNCOUNTED_LINKS: u16 = 1;
/// Blocks that putting inodes into tables and on the list of orphans may change.
const INODE_CREDITS: u32 = 6;

/// What cannot be the name of something.
fn check_name(name: &[u8]) -> Result<(), Refusal> {
    match name {
        _ if name.len() > MAX_NAME_BYTES => Err(Refusal::NameTooLong),
        b"" | b"." | b".." => Err(Refusal::Invalid),
        _ if name.iter().any(|byte| matches!(byte, 0 | b'/')) => Err(Refusal::Invalid),
        _ => Ok(()),
    }
}

/// Names may come into a directory unless it is immutable.
fn check_may_add(directory: &InodeState) -> Result<(), Refusal> {
    match directory.raw.has_flag(FLAG_IMMUTABLE) {
        true => Err(Refusal::NotPermitted),
        false => Ok(()),
    }
}

/// Names may leave a directory unless it or what they name is immutable or append-only.
fn check_may_take(directory: &InodeState, inode: &InodeState) -> Result<(), Refusal> {
    let fixed = FLAG_IMMUTABLE | FLAG_APPEND;
    match directory.raw.has_flag(fixed) || inode.raw.has_flag(fixed) {
        true => Err(Refusal::NotPermitted),
        false => Ok(()),
    }
}

impl Filesystem {
    /// What `name` in `directory` leads to.
    ///
    /// # Errors
    /// [`Refusal::NotFound`], [`Refusal::NotDirectory`], [`Refusal::NameTooLong`]; what is wrong with the directory.
    pub async fn lookup_name(
        &self,
        directory: &InodeCell,
        name: &[u8],
    ) -> Result<Arc<InodeCell>, FsError> {
        check_name(name)?;
        // Held until the inode is there: the name could go, and with it the inode.
        let state = directory.read().await;
        let draft = Draft::of(self, &state)?;
        let found = draft.find(name).await?.ok_or(Refusal::NotFound)?;
        self.named(draft.number(), found.block, found.inode).await
    }

    /// The inode above a directory; of the root, itself.
    ///
    /// # Errors
    /// As [`Self::lookup_name`].
    pub async fn parent(&self, directory: &InodeCell) -> Result<Arc<InodeCell>, FsError> {
        let state = directory.read().await;
        let draft = Draft::of(self, &state)?;
        let parent = draft.parent().await?;
        self.named(draft.number(), 0, parent).await
    }

    /// The inode that an entry of a directory names.
    async fn named(
        &self,
        directory: u32,
        block: u64,
        number: u32,
    ) -> Result<Arc<InodeCell>, FsError> {
        let reserved = number < self.superblock().first_inode && number != inode::ROOT;
        let found = match reserved {
            true => Err(FsError::Stale(number)),
            false => self.inode(number).await,
        };
        match found {
            Err(FsError::Stale(number)) => {
                let problem = format!("a name leads to inode {number}, which is not in use");
                let inode = directory;
                Err(Ext4Error::corrupt(Place::Directory { inode, block }, problem).into())
            }
            found => found,
        }
    }

    /// Whether `directory` may get one more subdirectory.
    fn check_subdirectory(&self, directory: &RawInode) -> Result<(), Refusal> {
        let uncounted = self
            .superblock()
            .features
            .has_ro_compat(ro_compat::DIR_NLINK);
        match directory.links() >= MAX_LINKS && !uncounted {
            true => Err(Refusal::TooManyLinks),
            false => Ok(()),
        }
    }
}

/// Counts one more subdirectory. Beyond what can be counted the number of links is 1, and stays so.
fn add_subdirectory(directory: &mut RawInode) {
    directory.set_links(match directory.links() {
        UNCOUNTED_LINKS => UNCOUNTED_LINKS,
        links if links >= MAX_LINKS => UNCOUNTED_LINKS,
        links => links + 1,
    });
}

/// Counts one subdirectory less.
fn remove_subdirectory(directory: &mut RawInode) {
    if directory.links() > 2 {
        directory.set_links(directory.links() - 1);
    }
}
