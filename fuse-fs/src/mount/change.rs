//! The operations of a mount that change something.

use super::files::{Files, Found, SNAPSHOTS_NAME, errno, found};
use super::node_id::NodeId;
use super::options::Atime;
use super::requests::TrimRange;
use crate::backend::BackendError;
use crate::ext4::fallocate::Allocation;
use crate::ext4::inode::{FLAG_APPEND, FLAG_IMMUTABLE, FLAG_NO_ATIME};
use crate::ext4::inode_cell::InodeCell;
use crate::ext4::namespace::{AttributeChange, NewNode, NewTime, RenameMode, SetMode};
use crate::ext4::time::Timestamp;
use bytes::Bytes;
use std::sync::Arc;

/// An atime older than this is renewed though nothing was written since.
const RELATIVE_ATIME_S: i64 = 86_400;

/// What `setattr` changes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change {
    pub attributes: AttributeChange,
    pub size_bytes: Option<u64>,
    /// Who changes the size may not keep the set-uid bits.
    pub unprivileged: bool,
}

/// How a write is done.
#[derive(Clone, Copy, Debug)]
pub struct Writing {
    /// The times become now; if not, who writes sets them.
    pub stamped: bool,
    /// Who writes may not keep the set-uid bits.
    pub unprivileged: bool,
}

impl Files {
    /// A name in the root that is taken by the directory of the snapshots.
    fn refuse_reserved(&self, parent: NodeId, name: &[u8]) -> Result<(), BackendError> {
        match self.snapshots.is_some() && parent == NodeId::ROOT && name == SNAPSHOTS_NAME {
            true => Err(errno(libc::EEXIST, "the name of the snapshots' directory")),
            false => Ok(()),
        }
    }

    /// Makes a file of any kind.
    ///
    /// # Errors
    /// `EEXIST`, `ENOSPC`, what the filesystem reports.
    pub async fn create(
        &self,
        parent: NodeId,
        name: &[u8],
        node: &NewNode<'_>,
    ) -> Result<Found, BackendError> {
        self.refuse_reserved(parent, name)?;
        let directory = self.own(parent).await?;
        let cell = self.fs.create(&directory, name, node).await?;
        self.learned(NodeId::Main(cell.number()), &cell).await
    }

    /// Gives a file one more name.
    ///
    /// # Errors
    /// `EEXIST`, what the filesystem reports.
    pub async fn link(
        &self,
        file: NodeId,
        parent: NodeId,
        name: &[u8],
    ) -> Result<Found, BackendError> {
        self.refuse_reserved(parent, name)?;
        let (cell, directory) = (self.own(file).await?, self.own(parent).await?);
        self.fs.link(&cell, &directory, name).await?;
        self.learned(file, &cell).await
    }

    /// Takes a name from a file, or with `directory` from an empty directory.
    ///
    /// # Errors
    /// `ENOENT`, `ENOTEMPTY`, what the filesystem reports.
    pub async fn unlink(
        &self,
        parent: NodeId,
        name: &[u8],
        directory: bool,
    ) -> Result<(), BackendError> {
        let above = self.own(parent).await?;
        let cell = match directory {
            true => self.fs.remove_directory(&above, name).await?,
            false => self.fs.unlink(&above, name).await?,
        };
        self.unnamed(&cell).await
    }

    /// Gives a file another name, and perhaps takes that from another file.
    ///
    /// # Errors
    /// `ENOENT`, `EEXIST`, `ENOTEMPTY`, what the filesystem reports.
    pub async fn rename(
        &self,
        from: (NodeId, &[u8]),
        to: (NodeId, &[u8]),
        mode: RenameMode,
    ) -> Result<(), BackendError> {
        self.refuse_reserved(to.0, to.1)?;
        let (source, target) = (self.own(from.0).await?, self.own(to.0).await?);
        let replaced = self.fs.rename(&source, from.1, &target, to.1, mode).await?;
        match replaced {
            Some(cell) => self.unnamed(&cell).await,
            None => Ok(()),
        }
    }

    /// A file that lost a name: if it was the last one, it is freed when the kernel forgets it.
    async fn unnamed(&self, cell: &Arc<InodeCell>) -> Result<(), BackendError> {
        if cell.read().await.raw.links() > 0 || !self.references.orphaned(cell.number()) {
            return Ok(());
        }
        let _stay = self.stay().await;
        Ok(self.fs.free_orphan(cell).await?)
    }

    /// Changes attributes and the size.
    ///
    /// # Errors
    /// What the filesystem reports.
    pub async fn change(&self, id: NodeId, change: &Change) -> Result<Found, BackendError> {
        let cell = self.own(id).await?;
        if let Some(size_bytes) = change.size_bytes {
            self.fs.truncate(&cell, size_bytes).await?;
            self.changed_by(&cell, change.unprivileged).await?;
        }
        if change.attributes != AttributeChange::default() {
            self.fs.set_attributes(&cell, &change.attributes).await?;
        }
        found(id, &cell, self.fs.superblock().block_bytes).await
    }

    /// The content of a file changes; if by somebody unprivileged, nobody may run it as its owner any more.
    async fn changed_by(
        &self,
        cell: &Arc<InodeCell>,
        unprivileged: bool,
    ) -> Result<(), BackendError> {
        match unprivileged {
            true => Ok(self.fs.drop_privileges(cell).await?),
            false => Ok(()),
        }
    }

    /// Writes to a file; durable after [`Self::fsync`].
    ///
    /// # Errors
    /// `ENOSPC`, what the filesystem reports.
    pub async fn write(
        &self,
        id: NodeId,
        offset_bytes: u64,
        data: Bytes,
        how: Writing,
    ) -> Result<(), BackendError> {
        let cell = self.own(id).await?;
        self.changed_by(&cell, how.unprivileged).await?;
        match how.stamped {
            true => self.fs.write(&cell, offset_bytes, data).await?,
            false => self.fs.write_unstamped(&cell, offset_bytes, data).await?,
        }
        Ok(())
    }

    /// Makes a file durable.
    ///
    /// # Errors
    /// What was lost.
    pub async fn fsync(&self, id: NodeId, data_only: bool) -> Result<(), BackendError> {
        match id {
            NodeId::Main(_) => Ok(self.fs.fsync(&self.own(id).await?, data_only).await?),
            NodeId::Frozen(..) | NodeId::Snapshots => Ok(()),
        }
    }

    /// Changes the space of a range.
    ///
    /// # Errors
    /// `ENOSPC`, what the filesystem reports.
    pub async fn fallocate(
        &self,
        id: NodeId,
        how: Allocation,
        offset_bytes: u64,
        len_bytes: u64,
        unprivileged: bool,
    ) -> Result<(), BackendError> {
        let cell = self.own(id).await?;
        self.changed_by(&cell, unprivileged).await?;
        Ok(self
            .fs
            .fallocate(&cell, how, offset_bytes, len_bytes)
            .await?)
    }

    /// Copies between files of the mounted filesystem; how many bytes.
    ///
    /// # Errors
    /// What the filesystem reports.
    pub async fn copy_range(
        &self,
        from: (NodeId, u64),
        to: (NodeId, u64),
        len_bytes: u64,
        unprivileged: bool,
    ) -> Result<u64, BackendError> {
        let NodeId::Main(_) = from.0 else {
            return Err(errno(libc::EXDEV, "between filesystems"));
        };
        let (source, target) = (self.own(from.0).await?, self.own(to.0).await?);
        self.changed_by(&target, unprivileged).await?;
        let copied = self
            .fs
            .copy_range((&source, from.1), (&target, to.1), len_bytes);
        Ok(copied.await?)
    }

    /// Gives free space back to the volume; the answer says how much.
    ///
    /// # Errors
    /// `EROFS`, `EINVAL`, what the filesystem reports.
    pub async fn trim(&self, id: NodeId, range: TrimRange) -> Result<TrimRange, BackendError> {
        self.own(id).await?;
        let end = range.start_bytes.saturating_add(range.len_bytes);
        let trimmed = self.fs.trim(range.start_bytes..end, range.least_bytes);
        Ok(TrimRange {
            len_bytes: trimmed.await?,
            ..range
        })
    }

    /// Sets an attribute.
    ///
    /// # Errors
    /// `EEXIST` and `ENODATA` by `mode`, `ENOSPC`, what the filesystem reports.
    pub async fn set_xattr(
        &self,
        id: NodeId,
        name: &[u8],
        value: &[u8],
        mode: SetMode,
    ) -> Result<(), BackendError> {
        let cell = self.own(id).await?;
        Ok(self.fs.set_xattr(&cell, name, value, mode).await?)
    }

    /// Takes an attribute away.
    ///
    /// # Errors
    /// `ENODATA`, what the filesystem reports.
    pub async fn remove_xattr(&self, id: NodeId, name: &[u8]) -> Result<(), BackendError> {
        let cell = self.own(id).await?;
        Ok(self.fs.remove_xattr(&cell, name).await?)
    }

    /// Sets the flags of chattr(1).
    ///
    /// # Errors
    /// `EPERM` for who may not, `EOPNOTSUPP` for flags that are not kept, what the filesystem reports.
    pub async fn set_flags(&self, id: NodeId, flags: u32, uid: u32) -> Result<(), BackendError> {
        let cell = self.own(id).await?;
        let owner = cell.read().await.raw.uid();
        let changed = self.fs.flags(&cell).await ^ flags;
        let privileged = changed & (FLAG_IMMUTABLE | FLAG_APPEND) != 0;
        if uid != 0 && (privileged || uid != owner) {
            return Err(errno(
                libc::EPERM,
                "not the owner, or a flag that is root's to set",
            ));
        }
        Ok(self.fs.set_flags(&cell, flags).await?)
    }

    /// A file was read: its atime becomes now where the mount's options want that.
    ///
    /// # Errors
    /// What the filesystem reports.
    pub async fn touch(&self, id: NodeId) -> Result<(), BackendError> {
        let NodeId::Main(_) = id else { return Ok(()) };
        if self.atime == Atime::Never || self.fs.is_read_only() {
            return Ok(());
        }
        let cell = self.own(id).await?;
        let change = {
            let state = cell.read().await;
            let (raw, now) = (&state.raw, self.fs.now());
            let renew = self.atime == Atime::Always
                || is_old(raw.atime(), raw.mtime().max(raw.ctime()), now);
            if !renew || raw.has_flag(FLAG_NO_ATIME) {
                return Ok(());
            }
            AttributeChange {
                atime: Some(NewTime::At(now)),
                ctime: Some(raw.ctime()),
                ..AttributeChange::default()
            }
        };
        let _stay = self.stay().await;
        Ok(self.fs.set_attributes(&cell, &change).await?)
    }
}

/// As relatime has it.
fn is_old(atime: Timestamp, changed: Timestamp, now: Timestamp) -> bool {
    atime <= changed || now.seconds - atime.seconds >= RELATIVE_ATIME_S
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_atime_is_renewed_once_a_day_and_after_a_change() {
        let at = |seconds| Timestamp { seconds, nanos: 0 };
        assert!(is_old(at(5), at(5), at(6)));
        assert!(is_old(at(5), at(6), at(6)));
        assert!(!is_old(at(6), at(5), at(7)));
        assert!(is_old(at(6), at(5), at(6 + RELATIVE_ATIME_S)));
    }
}
