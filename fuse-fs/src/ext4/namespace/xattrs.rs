//! Extended attributes by their names: user, trusted, security, and the access control lists.

use super::INODE_CREDITS;
use crate::ext4::acl::Acl;
use crate::ext4::cache::Block;
use crate::ext4::error::{Ext4Error, FsError, Place, Refusal};
use crate::ext4::features::compat;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::handle::Handle;
use crate::ext4::inode::{FLAG_APPEND, FLAG_IMMUTABLE, Kind};
use crate::ext4::inode_cell::{InodeCell, InodeState};
use crate::ext4::raw_inode::RawInode;
use crate::ext4::xattr::{self, ACCESS_ACL, DEFAULT_ACL};
use crate::ext4::xattr_set::{NoRoom, XattrSet};

const PERMISSIONS: u16 = 0o777;
const MAX_NAME_BYTES: usize = 255;
/// Changed with a block of attributes: it, another one, bitmaps and descriptors of both.
const CREDITS: u32 = 6;

/// The prefixes of names, and the numbers that stand for them.
const NAMESPACES: [(&str, u8); 5] = [
    ("system.posix_acl_access", ACCESS_ACL),
    ("system.posix_acl_default", DEFAULT_ACL),
    ("user.", 1),
    ("trusted.", 4),
    ("security.", 6),
];

/// Whether an attribute must be new, or must not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetMode {
    Any,
    Create,
    Replace,
}

impl Filesystem {
    /// The value of an attribute; of an access control list, as programs exchange it.
    ///
    /// # Errors
    /// [`Refusal::NoAttribute`]; [`Refusal::Unsupported`] of a class that is not kept; what is wrong with them.
    pub async fn xattr(&self, inode: &InodeCell, name: &[u8]) -> Result<Vec<u8>, FsError> {
        let (namespace, rest) = parse(name)?;
        let state = inode.read().await;
        let set = self.xattr_set(&state.raw).await?;
        let value = set.get(namespace, rest).ok_or(Refusal::NoAttribute)?;
        match namespace {
            ACCESS_ACL | DEFAULT_ACL => Ok(stored_acl(value, inode.number())?.to_exchanged()),
            _ => Ok(value.to_vec()),
        }
    }

    /// The names of all attributes.
    ///
    /// # Errors
    /// What is wrong with them; the device's.
    pub async fn xattr_names(&self, inode: &InodeCell) -> Result<Vec<Vec<u8>>, FsError> {
        let state = inode.read().await;
        let set = self.xattr_set(&state.raw).await?;
        let prefix = |namespace| NAMESPACES.iter().find(|(_, number)| *number == namespace);
        let name = |one: xattr::Attribute<'_>| {
            let (prefix, _) = prefix(one.namespace)?;
            Some([prefix.as_bytes(), one.name].concat())
        };
        Ok(set.iter().filter_map(name).collect())
    }

    /// Sets an attribute; of an access control list, `mode` does not count.
    ///
    /// # Errors
    /// [`Refusal::Exists`], [`Refusal::NoAttribute`] by `mode`; [`Refusal::Invalid`] for no access control list;
    /// [`Refusal::NotPermitted`]; [`FsError::NoSpace`] if it does not fit the inode and one block.
    pub async fn set_xattr(
        &self,
        inode: &InodeCell,
        name: &[u8],
        value: &[u8],
        mode: SetMode,
    ) -> Result<(), FsError> {
        self.change_xattrs(inode, name, |raw, set, (namespace, rest)| {
            let present = set.get(namespace, rest).is_some();
            match (namespace, mode) {
                (ACCESS_ACL | DEFAULT_ACL, _) => set_acl(raw, set, namespace, value),
                (_, SetMode::Create) if present => Err(Refusal::Exists.into()),
                (_, SetMode::Replace) if !present => Err(Refusal::NoAttribute.into()),
                _ => Ok(set.set(namespace, rest, value)?),
            }
        })
        .await
    }

    /// Takes an attribute away; of an access control list, also one that is not there.
    ///
    /// # Errors
    /// [`Refusal::NoAttribute`], [`Refusal::NotPermitted`].
    pub async fn remove_xattr(&self, inode: &InodeCell, name: &[u8]) -> Result<(), FsError> {
        self.change_xattrs(inode, name, |raw, set, (namespace, rest)| {
            let removed = set.remove(namespace, rest);
            match namespace {
                ACCESS_ACL | DEFAULT_ACL => check_acl(raw, namespace, false),
                _ if removed => Ok(()),
                _ => Err(Refusal::NoAttribute.into()),
            }
        })
        .await
    }

    async fn change_xattrs(
        &self,
        inode: &InodeCell,
        name: &[u8],
        change: impl FnOnce(&mut RawInode, &mut XattrSet, (u8, &[u8])) -> Result<(), FsError>,
    ) -> Result<(), FsError> {
        self.check_writable()?;
        if !self.superblock().features.has_compat(compat::EXT_ATTR) {
            return Err(Refusal::Unsupported.into());
        }
        let mut state = inode.write().await;
        if state.raw.has_flag(FLAG_IMMUTABLE | FLAG_APPEND) {
            return Err(Refusal::NotPermitted.into());
        }
        let mut set = self.xattr_set(&state.raw).await?;
        let mut raw = state.raw.clone();
        change(&mut raw, &mut set, parse(name)?)?;
        let blocks = u32::from(!set.in_block().is_empty());
        let mut handle = self.begin(INODE_CREDITS + CREDITS, blocks).await?;
        state.raw = raw;
        state.raw.set_ctime(self.now());
        self.put_xattrs(&mut handle, &mut state, &set).await?;
        handle.put_inode(&mut state).await?;
        let _ = handle.finish();
        Ok(())
    }

    /// The attributes of an inode.
    pub(super) async fn xattr_set(&self, raw: &RawInode) -> Result<XattrSet, FsError> {
        let block = self.xattr_block(raw).await?;
        let block_bytes = self.superblock().block_bytes as usize;
        let set = XattrSet::read(raw.xattr_area(), block.as_deref(), block_bytes);
        set.map_err(|problem| Ext4Error::corrupt(Place::Inode(raw.number()), problem).into())
    }

    /// Those of a new inode.
    pub(super) fn empty_xattrs(&self) -> XattrSet {
        let superblock = self.superblock();
        let area_bytes = usize::from(superblock.inode_bytes).saturating_sub(NEW_FIELDS_BYTES);
        XattrSet::empty(area_bytes, superblock.block_bytes as usize)
    }

    async fn xattr_block(&self, raw: &RawInode) -> Result<Option<Block>, FsError> {
        let (number, place) = (raw.xattr_block(), Place::Inode(raw.number()));
        if number == 0 {
            return Ok(None);
        }
        self.check_xattr_block(raw)?;
        let seed = self.xattr_seed();
        let checked = self.read_checked(number, |bytes| match seed {
            Some(seed) if !xattr::checksum_matches(bytes, number, seed) => {
                let problem = format!("its xattr block {number} has a wrong checksum");
                Err(Ext4Error::corrupt(place, problem))
            }
            _ => Ok(()),
        });
        Ok(Some(checked.await?))
    }

    fn check_xattr_block(&self, raw: &RawInode) -> Result<(), Ext4Error> {
        let number = raw.xattr_block();
        if self.superblock().contains(number, 1) {
            return Ok(());
        }
        let problem = format!("its xattr block {number} is outside the filesystem");
        Err(Ext4Error::corrupt(Place::Inode(raw.number()), problem))
    }

    fn xattr_seed(&self) -> Option<u32> {
        let superblock = self.superblock();
        superblock
            .has_checksums()
            .then_some(superblock.checksum_seed)
    }

    /// Gives an inode these attributes: a block of its own is changed, one that others use is left to them. The
    /// handle has a block for it; the caller puts the inode.
    pub(super) async fn put_xattrs(
        &self,
        handle: &mut Handle,
        state: &mut InodeState,
        set: &XattrSet,
    ) -> Result<(), FsError> {
        xattr::write_inode(state.raw.xattr_area_mut(), &set.in_inode());
        let old = self.xattr_block(&state.raw).await?;
        let (number, attributes) = (state.raw.xattr_block(), set.in_block());
        let content = |number| {
            let block_bytes = self.superblock().block_bytes as usize;
            xattr::write_block(&attributes, block_bytes, 1, number, self.xattr_seed())
        };
        match old {
            Some(old) if attributes.is_empty() || xattr::users(&old) > 1 => {
                self.release_xattr_block(handle, state).await?;
            }
            Some(old) => {
                let content = content(number);
                if content != *old {
                    handle
                        .update(number, |bytes| bytes.copy_from_slice(&content))
                        .await?;
                }
                return Ok(());
            }
            None => {}
        }
        if !attributes.is_empty() {
            let goal = self.goal(&state.raw, 0).await?;
            let number = handle.allocate_blocks(goal, 1).await?.start;
            let content = content(number);
            handle.create(number, |bytes| bytes.copy_from_slice(&content));
            state.raw.set_xattr_block(number);
            state.raw.add_blocks(1);
        }
        Ok(())
    }

    /// Takes its block of attributes from an inode; the last that used it frees it. The caller puts the inode.
    ///
    /// # Errors
    /// The device's; [`Ext4Error::Corrupt`], and nothing changed.
    pub(in crate::ext4) async fn release_xattr_block(
        &self,
        handle: &mut Handle,
        state: &mut InodeState,
    ) -> Result<(), FsError> {
        let number = state.raw.xattr_block();
        if number == 0 {
            return Ok(());
        }
        self.check_xattr_block(&state.raw)?;
        let seed = self.xattr_seed();
        // Decided inside: another inode may release the same block now.
        let others = handle.update(number, |bytes| {
            let others = xattr::users(bytes).saturating_sub(1);
            if others > 0 {
                xattr::set_users(bytes, others, number, seed);
            }
            others
        });
        if others.await? == 0 {
            handle.free_metadata(number).await?;
        }
        state.raw.set_xattr_block(0);
        state.raw.subtract_blocks(1);
        Ok(())
    }
}

/// Bytes of a new inode before its attributes.
const NEW_FIELDS_BYTES: usize = 160;

/// The number of the class and the rest of the name.
fn parse(name: &[u8]) -> Result<(u8, &[u8]), Refusal> {
    if name.len() > MAX_NAME_BYTES {
        return Err(Refusal::Range);
    }
    for (prefix, namespace) in NAMESPACES {
        let whole = matches!(namespace, ACCESS_ACL | DEFAULT_ACL);
        match name.strip_prefix(prefix.as_bytes()) {
            Some(rest) if rest.is_empty() == whole => return Ok((namespace, rest)),
            Some(_) if !whole => return Err(Refusal::Invalid),
            _ => {}
        }
    }
    Err(Refusal::Unsupported)
}

fn stored_acl(value: &[u8], inode: u32) -> Result<Acl, FsError> {
    let bad = |_| Ext4Error::corrupt(Place::Inode(inode), "an access control list that is none");
    Ok(Acl::from_stored(value).map_err(bad)?)
}

/// The list that new files in a directory get.
pub(super) fn default_acl(set: &XattrSet, inode: u32) -> Result<Option<Acl>, FsError> {
    set.get(DEFAULT_ACL, b"")
        .map(|value| stored_acl(value, inode))
        .transpose()
}

/// The list of the inode itself.
pub(super) fn access_acl(set: &XattrSet, inode: u32) -> Result<Option<Acl>, FsError> {
    set.get(ACCESS_ACL, b"")
        .map(|value| stored_acl(value, inode))
        .transpose()
}

/// Sets a list, which says the mode, too; one that says no more than the mode is not kept.
fn set_acl(
    raw: &mut RawInode,
    set: &mut XattrSet,
    namespace: u8,
    value: &[u8],
) -> Result<(), FsError> {
    check_acl(raw, namespace, !Acl::is_without_entries(value))?;
    let acl = Acl::from_exchanged(value).map_err(|_| Refusal::Invalid)?;
    let acl = match acl {
        Some(acl) if namespace == ACCESS_ACL => {
            raw.set_mode(raw.mode() & !PERMISSIONS | acl.mode());
            Some(acl).filter(|acl| !acl.is_mode())
        }
        acl => acl,
    };
    match acl {
        Some(acl) => Ok(set.set(namespace, b"", &acl.to_stored())?),
        None => {
            set.remove(namespace, b"");
            Ok(())
        }
    }
}

/// Symbolic links have no lists, and only directories get defaults.
fn check_acl(raw: &RawInode, namespace: u8, gets: bool) -> Result<(), FsError> {
    match raw.kind() {
        Some(Kind::Symlink) => Err(Refusal::Unsupported.into()),
        Some(Kind::Directory) => Ok(()),
        _ if namespace == DEFAULT_ACL && gets => Err(Refusal::Access.into()),
        _ => Ok(()),
    }
}

impl From<NoRoom> for FsError {
    fn from(_: NoRoom) -> Self {
        Self::NoSpace
    }
}
