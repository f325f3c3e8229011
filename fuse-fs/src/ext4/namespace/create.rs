//! New files of every kind: with the owner, the mode and the access control lists that the directory gives them.

use super::draft::Draft;
use super::{INODE_CREDITS, add_subdirectory, check_may_add, check_name, xattrs};
use crate::ext4::acl::Acl;
use crate::ext4::bytes::put;
use crate::ext4::dir::{self, Entry};
use crate::ext4::error::{Ext4Error, FsError, Place, Refusal};
use crate::ext4::features::incompat;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::handle::Handle;
use crate::ext4::inode::{self, FLAG_EXTENTS, Kind, MAP_BYTES};
use crate::ext4::inode_cell::{InodeCell, InodeState};
use crate::ext4::mapping::{APPEND_BLOCKS, APPEND_CREDITS};
use crate::ext4::xattr;
use crate::ext4::xattr_set::XattrSet;
use std::sync::Arc;

const SET_GROUP: u16 = 0o2000;
const PERMISSIONS: u16 = 0o777;
/// Changed by a new inode: bitmap, descriptor, table.
const NEW_INODE_CREDITS: u32 = 4;
const MAX_LINK_BYTES: usize = 4095;

/// What a new file is.
#[derive(Clone, Copy, Debug)]
pub struct NewNode<'a> {
    /// With the kind; what `umask` takes away is still in it.
    pub mode: u16,
    pub umask: u16,
    pub uid: u32,
    pub gid: u32,
    pub content: Content<'a>,
}

/// What is in a new file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    Nothing,
    Device {
        major: u32,
        minor: u32,
    },
    /// Of a symbolic link.
    Target(&'a [u8]),
}

/// A new inode, decided and not yet made.
pub(super) struct Decided<'a> {
    parent: u32,
    kind: Kind,
    mode: u16,
    uid: u32,
    gid: u32,
    flags: u32,
    content: Content<'a>,
    xattrs: XattrSet,
}

impl Decided<'_> {
    fn blocks(&self) -> u32 {
        let own = match self.content {
            Content::Target(target) => target.len() >= MAP_BYTES,
            _ => self.kind == Kind::Directory,
        };
        u32::from(own) + u32::from(!self.xattrs.in_block().is_empty())
    }

    /// Blocks that making it may change.
    pub(super) fn credits(&self) -> u32 {
        INODE_CREDITS + NEW_INODE_CREDITS + self.blocks() * APPEND_CREDITS
    }

    /// Blocks that making it may allocate.
    pub(super) fn promise(&self) -> u32 {
        self.blocks() * APPEND_BLOCKS
    }
}

impl Filesystem {
    /// Makes a file of any kind.
    ///
    /// # Errors
    /// [`Refusal::Exists`], [`Refusal::NameTooLong`], [`Refusal::Invalid`] for a mode of no kind,
    /// [`Refusal::TooManyLinks`], [`Refusal::NotPermitted`]; [`FsError::NoSpace`].
    pub async fn create(
        &self,
        parent: &InodeCell,
        name: &[u8],
        node: &NewNode<'_>,
    ) -> Result<Arc<InodeCell>, FsError> {
        check_name(name)?;
        self.check_writable()?;
        let kind = check_content(node)?;
        let mut directory = parent.write().await;
        let mut draft = Draft::of(self, &directory)?;
        if draft.find(name).await?.is_some() {
            return Err(Refusal::Exists.into());
        }
        check_may_add(&directory)?;
        self.check_target(node)?;
        if kind == Kind::Directory {
            self.check_subdirectory(&directory.raw)?;
        }
        let new = self.decide(&directory, node, kind).await?;
        // The number is not known before the handle; the place of the name is.
        let block = draft.add(name, inode::ROOT, kind as u8).await?;
        let credits = draft.credits() + new.credits();
        let mut handle = self.begin(credits, draft.promise() + new.promise()).await?;
        let cell = self.make(&mut handle, &new).await?;
        draft.point(block, name, cell.number(), kind as u8).await?;
        if kind == Kind::Directory {
            add_subdirectory(&mut directory.raw);
        }
        draft.apply(&mut handle, &mut directory).await?;
        let _ = handle.finish();
        Ok(cell)
    }

    /// A target fits one block, with a 0 behind it.
    fn check_target(&self, node: &NewNode<'_>) -> Result<(), Refusal> {
        let max = MAX_LINK_BYTES.min(self.superblock().block_bytes as usize - 1);
        match node.content {
            Content::Target(target) if target.len() > max => Err(Refusal::NameTooLong),
            _ => Ok(()),
        }
    }

    /// Decides all of a file that is made as `node` in `directory`.
    pub(super) async fn decide<'a>(
        &self,
        directory: &InodeState,
        node: &NewNode<'a>,
        kind: Kind,
    ) -> Result<Decided<'a>, FsError> {
        let grouped = directory.raw.mode() & SET_GROUP != 0;
        let inherits_group = grouped && kind == Kind::Directory;
        let mut new = Decided {
            parent: directory.raw.number(),
            kind,
            mode: node.mode | if inherits_group { SET_GROUP } else { 0 },
            uid: node.uid,
            gid: if grouped {
                directory.raw.gid()
            } else {
                node.gid
            },
            flags: directory.raw.flags() & kind.inherited_flags(),
            content: node.content,
            xattrs: self.empty_xattrs(),
        };
        if kind == Kind::Symlink {
            return Ok(new);
        }
        let xattrs = self.xattr_set(&directory.raw).await?;
        match xattrs::default_acl(&xattrs, directory.raw.number())? {
            None => new.mode &= !(node.umask & PERMISSIONS),
            Some(default) => new.inherit_acl(&default)?,
        }
        Ok(new)
    }

    /// Makes an inode that has one link, or is an empty directory.
    pub(super) async fn make(
        &self,
        handle: &mut Handle,
        new: &Decided<'_>,
    ) -> Result<Arc<InodeCell>, FsError> {
        let cell = handle.allocate_inode(new.parent, new.mode).await?;
        let mut guard = cell.write().await;
        let state = &mut *guard;
        state.raw.set_mode(new.mode);
        state.raw.set_uid(new.uid);
        state.raw.set_gid(new.gid);
        state.raw.set_flags(state.raw.flags() | new.flags);
        state.raw.set_links(1);
        match new.content {
            Content::Device { major, minor } => state.raw.set_device(major, minor),
            Content::Target(target) => self.fill_link(handle, state, target).await?,
            Content::Nothing if new.kind == Kind::Directory => {
                state.raw.set_links(2);
                self.fill_directory(handle, state, new.parent).await?;
            }
            Content::Nothing => {}
        }
        self.put_xattrs(handle, state, &new.xattrs).await?;
        handle.put_inode(state).await?;
        drop(guard);
        Ok(cell)
    }

    /// A short target is in the inode, in the place of the map.
    async fn fill_link(
        &self,
        handle: &mut Handle,
        state: &mut InodeState,
        target: &[u8],
    ) -> Result<(), FsError> {
        if target.len() < MAP_BYTES {
            state.raw.set_flags(state.raw.flags() & !FLAG_EXTENTS);
            state.raw.map_mut().fill(0);
            put(state.raw.map_mut(), 0, target);
        } else {
            let (_, physical) = handle.append_directory_block(state).await?;
            handle
                .update(physical, |bytes| put(bytes, 0, target))
                .await?;
        }
        state.raw.set_size_bytes(target.len() as u64);
        Ok(())
    }

    async fn fill_directory(
        &self,
        handle: &mut Handle,
        state: &mut InodeState,
        parent: u32,
    ) -> Result<(), FsError> {
        let superblock = self.superblock();
        let (_, physical) = handle.append_directory_block(state).await?;
        let stores_kinds = superblock.features.has_incompat(incompat::FILETYPE);
        let kind = if stores_kinds {
            Kind::Directory as u8
        } else {
            0
        };
        let seed = superblock
            .has_checksums()
            .then(|| state.raw.checksum_seed(superblock));
        let dots = [(state.raw.number(), b".".as_slice()), (parent, b"..")];
        let dots = dots.map(|(inode, name)| Entry { inode, kind, name });
        let content = dir::write_block(&dots, superblock.block_bytes as usize, seed);
        handle
            .update(physical, |bytes| bytes.copy_from_slice(&content))
            .await
    }

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// [`Refusal::Invalid`] of what is none; what is wrong with it; the device's.
    pub async fn read_link(&self, link: &InodeCell) -> Result<Vec<u8>, FsError> {
        let state = link.read().await;
        let raw = &state.raw;
        if raw.kind() != Some(Kind::Symlink) {
            return Err(Refusal::Invalid.into());
        }
        let bad = || {
            Ext4Error::corrupt(
                Place::Inode(raw.number()),
                "a symbolic link of a wrong size",
            )
        };
        let size = usize::try_from(raw.size_bytes()).map_err(|_| bad())?;
        if size < MAP_BYTES && !raw.has_flag(FLAG_EXTENTS) {
            return Ok(raw.map()[..size].to_vec());
        }
        let physical = self.map_block(raw, 0).await?.ok_or_else(bad)?;
        let bytes = self.read_block(physical).await?;
        Ok(bytes.get(..size).ok_or_else(bad)?.to_vec())
    }
}

impl Decided<'_> {
    fn inherit_acl(&mut self, default: &Acl) -> Result<(), FsError> {
        let (acl, permissions) = default.clone().inherited(self.mode);
        self.mode = self.mode & !PERMISSIONS | permissions;
        let mut set = |namespace, acl: &Acl| self.xattrs.set(namespace, b"", &acl.to_stored());
        if self.kind == Kind::Directory {
            set(xattr::DEFAULT_ACL, default)?;
        }
        if !acl.is_mode() {
            set(xattr::ACCESS_ACL, &acl)?;
        }
        Ok(())
    }
}

/// The kind of a new file whose content fits it.
fn check_content(node: &NewNode<'_>) -> Result<Kind, Refusal> {
    let kind = Kind::of_mode(node.mode).ok_or(Refusal::Invalid)?;
    let fits = match node.content {
        Content::Nothing => !matches!(kind, Kind::Symlink | Kind::CharDevice | Kind::BlockDevice),
        Content::Device { .. } => matches!(kind, Kind::CharDevice | Kind::BlockDevice),
        Content::Target(target) => {
            kind == Kind::Symlink && !target.is_empty() && !target.contains(&0)
        }
    };
    if fits {
        Ok(kind)
    } else {
        Err(Refusal::Invalid)
    }
}
