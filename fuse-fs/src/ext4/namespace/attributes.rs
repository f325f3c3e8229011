//! Owner, mode, times and flags of an inode.

use super::{INODE_CREDITS, xattrs};
use crate::ext4::error::{FsError, Refusal};
use crate::ext4::filesystem::Filesystem;
use crate::ext4::inode::{FLAG_APPEND, FLAG_IMMUTABLE, FLAGS_CHANGEABLE, FLAGS_VISIBLE, Kind};
use crate::ext4::inode_cell::{InodeCell, InodeState};
use crate::ext4::time::Timestamp;
use crate::ext4::xattr_set::XattrSet;

const MODE_BITS: u16 = 0o7777;
const SET_USER: u16 = 0o4000;
const SET_GROUP: u16 = 0o2000;
const GROUP_EXECUTES: u16 = 0o10;
/// Changed by attributes that stand in a block: it, its bitmap and descriptor.
const XATTR_CREDITS: u32 = 4;

/// A time that is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewTime {
    Now,
    At(Timestamp),
}

/// What is to change; `None` stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttributeChange {
    /// Without the kind.
    pub mode: Option<u16>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub atime: Option<NewTime>,
    pub mtime: Option<NewTime>,
    /// By default, if anything changes, now.
    pub ctime: Option<Timestamp>,
}

impl AttributeChange {
    /// Programs may set times to now where they may write, also behind the end only.
    fn is_touch(&self) -> bool {
        let now = |time: Option<NewTime>| !matches!(time, Some(NewTime::At(_)));
        self.mode.is_none()
            && self.uid.is_none()
            && self.gid.is_none()
            && now(self.atime)
            && now(self.mtime)
    }
}

impl Filesystem {
    /// Changes attributes. A new owner takes away the right to run as the owner.
    ///
    /// # Errors
    /// [`Refusal::NotPermitted`] of what is immutable or append-only; [`FsError::NoSpace`].
    pub async fn set_attributes(
        &self,
        inode: &InodeCell,
        change: &AttributeChange,
    ) -> Result<(), FsError> {
        self.check_writable()?;
        let mut state = inode.write().await;
        let fixed = match change.is_touch() {
            true => FLAG_IMMUTABLE,
            false => FLAG_IMMUTABLE | FLAG_APPEND,
        };
        if state.raw.has_flag(fixed) {
            return Err(Refusal::NotPermitted.into());
        }
        let mode = changed_mode(&state, change);
        let xattrs = match mode.filter(|_| state.raw.kind() != Some(Kind::Symlink)) {
            Some(mode) => self.xattrs_of_mode(&state, mode).await?,
            None => None,
        };
        let mut handle = self
            .begin(INODE_CREDITS + XATTR_CREDITS, u32::from(xattrs.is_some()))
            .await?;
        if let Some(xattrs) = xattrs {
            self.put_xattrs(&mut handle, &mut state, &xattrs).await?;
        }
        let now = self.now();
        set(&mut state, change, mode, now);
        handle.put_inode(&mut state).await?;
        let _ = handle.finish();
        Ok(())
    }

    /// Takes away the right to run as the owner, and as the group if that may run it: somebody who has no such
    /// right has changed the content.
    ///
    /// # Errors
    /// The device's.
    pub async fn drop_privileges(&self, inode: &InodeCell) -> Result<(), FsError> {
        let mode = |state: &InodeState| {
            let old = state.raw.mode();
            let new = without_privileges(old);
            (new != old && !state.raw.is_directory()).then_some(new)
        };
        if mode(&*inode.read().await).is_none() {
            return Ok(());
        }
        let mut state = inode.write().await;
        let Some(mode) = mode(&state) else {
            return Ok(());
        };
        let mut handle = self.begin(INODE_CREDITS, 0).await?;
        state.raw.set_mode(mode);
        state.raw.set_ctime(self.now());
        handle.put_inode(&mut state).await?;
        let _ = handle.finish();
        Ok(())
    }

    /// The attributes with the access control list for a new mode, if there is a list.
    async fn xattrs_of_mode(
        &self,
        state: &InodeState,
        mode: u16,
    ) -> Result<Option<XattrSet>, FsError> {
        let mut xattrs = self.xattr_set(&state.raw).await?;
        let Some(acl) = xattrs::access_acl(&xattrs, state.raw.number())? else {
            return Ok(None);
        };
        let set = xattrs.set(
            crate::ext4::xattr::ACCESS_ACL,
            b"",
            &acl.with_mode(mode).to_stored(),
        );
        set?;
        Ok(Some(xattrs))
    }

    /// The flags that chattr knows.
    pub async fn flags(&self, inode: &InodeCell) -> u32 {
        inode.read().await.raw.flags() & FLAGS_VISIBLE
    }

    /// Sets the flags that chattr may change: immutable, append-only, no atime, no dump, synchronous. Who may do it
    /// is the caller's to know.
    ///
    /// # Errors
    /// [`Refusal::Unsupported`] if another flag would change, or of what is no file or directory.
    pub async fn set_flags(&self, inode: &InodeCell, flags: u32) -> Result<(), FsError> {
        self.check_writable()?;
        let mut state = inode.write().await;
        let old = state.raw.flags();
        let settable = matches!(state.raw.kind(), Some(Kind::Regular | Kind::Directory));
        if !settable || (old ^ flags) & FLAGS_VISIBLE & !FLAGS_CHANGEABLE != 0 {
            return Err(Refusal::Unsupported.into());
        }
        let mut handle = self.begin(INODE_CREDITS, 0).await?;
        state
            .raw
            .set_flags(old & !FLAGS_CHANGEABLE | flags & FLAGS_CHANGEABLE);
        state.raw.set_ctime(self.now());
        handle.put_inode(&mut state).await?;
        let _ = handle.finish();
        Ok(())
    }
}

fn without_privileges(mode: u16) -> u16 {
    let group = mode & GROUP_EXECUTES != 0;
    mode & !SET_USER & if group { !SET_GROUP } else { !0 }
}

/// The new mode without the kind, if it changes.
fn changed_mode(state: &InodeState, change: &AttributeChange) -> Option<u16> {
    let old = state.raw.mode() & MODE_BITS;
    let owned = change.uid.is_some() || change.gid.is_some();
    match change.mode {
        Some(mode) => Some(mode & MODE_BITS),
        None if owned && !state.raw.is_directory() => {
            let mode = without_privileges(old);
            (mode != old).then_some(mode)
        }
        None => None,
    }
}

fn set(state: &mut InodeState, change: &AttributeChange, mode: Option<u16>, now: Timestamp) {
    let time = |time| match time {
        NewTime::Now => now,
        NewTime::At(time) => time,
    };
    let raw = &mut state.raw;
    if let Some(mode) = mode {
        raw.set_mode(raw.mode() & !MODE_BITS | mode);
    }
    change.uid.into_iter().for_each(|uid| raw.set_uid(uid));
    change.gid.into_iter().for_each(|gid| raw.set_gid(gid));
    change
        .atime
        .into_iter()
        .for_each(|atime| raw.set_atime(time(atime)));
    change
        .mtime
        .into_iter()
        .for_each(|mtime| raw.set_mtime(time(mtime)));
    raw.set_ctime(change.ctime.unwrap_or(now));
}
