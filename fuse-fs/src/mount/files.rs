//! The operations of a mount, without FUSE: numbers and names to files of the mounted filesystem and
//! of its snapshots.

use super::grow_command::Answer;
use super::node_id::NodeId;
use super::references::References;
use super::snapshots::Snapshots;
use crate::backend::{BackendError, OpenTarget};
use crate::ext4::error::{FsError, Refusal};
use crate::ext4::fallocate::Sought;
use crate::ext4::filesystem::Filesystem;
use crate::ext4::inode::{self, Kind};
use crate::ext4::inode_cell::{InodeCell, InodeState};
use crate::ext4::measures::Measures;
use crate::ext4::statfs::Statfs;
use crate::ext4::time::Timestamp;
use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::{OwnedRwLockReadGuard, RwLock};

/// Bytes of a name.
pub const MAX_NAME_BYTES: usize = 255;
/// The directory of the snapshots, in the root; it is not listed.
pub(super) const SNAPSHOTS_NAME: &[u8] = b".snapshot";

/// A file with its attributes.
#[derive(Clone, Debug)]
pub struct Found {
    pub id: NodeId,
    pub kind: Kind,
    pub attr: Attr,
}

/// What `stat` tells.
#[derive(Clone, Copy, Debug, Default)]
pub struct Attr {
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub links: u16,
    pub size_bytes: u64,
    /// In units of 512 bytes.
    pub sectors: u64,
    pub atime: Timestamp,
    pub mtime: Timestamp,
    pub ctime: Timestamp,
    pub crtime: Timestamp,
    /// Major and minor number of a device node.
    pub device: (u32, u32),
    pub generation: u32,
    /// Nothing of the file is only in memory.
    pub settled: bool,
}

/// A line of a directory.
#[derive(Clone, Debug)]
pub struct Line {
    pub id: NodeId,
    pub kind: Kind,
    pub name: Vec<u8>,
    /// Where the reader goes on behind it.
    pub next: u64,
}

/// A mounted filesystem.
pub struct Files {
    pub(super) fs: Filesystem,
    volume: Arc<dyn OpenTarget>,
    pub(super) snapshots: Option<Snapshots>,
    pub(super) references: References,
    /// Shared by work that goes on behind an answer; taken alone to end the mount.
    behind: Arc<RwLock<()>>,
    /// Reading a file changes its atime.
    pub(super) atime: super::options::Atime,
}

pub(super) fn errno(errno: i32, message: &str) -> BackendError {
    BackendError::new(errno, message)
}

impl From<FsError> for BackendError {
    fn from(error: FsError) -> Self {
        Self::new(error.errno(), error.to_string())
    }
}

impl Attr {
    fn of(state: &InodeState, block_bytes: u32) -> Self {
        let raw = &state.raw;
        let device = match raw.kind() {
            Some(Kind::CharDevice | Kind::BlockDevice) => raw.device(),
            _ => (0, 0),
        };
        Self {
            mode: raw.mode(),
            uid: raw.uid(),
            gid: raw.gid(),
            links: raw.links(),
            size_bytes: state.size_bytes(),
            sectors: state.sectors(block_bytes),
            atime: raw.atime(),
            mtime: raw.mtime(),
            ctime: raw.ctime(),
            crtime: raw.crtime().unwrap_or_default(),
            device,
            generation: raw.generation(),
            settled: state.is_settled(),
        }
    }
}

pub(super) async fn found(
    id: NodeId,
    cell: &InodeCell,
    block_bytes: u32,
) -> Result<Found, BackendError> {
    let state = cell.read().await;
    let kind = state.raw.kind();
    let kind = kind.ok_or_else(|| errno(libc::EUCLEAN, "a file of no kind"))?;
    let attr = Attr::of(&state, block_bytes);
    Ok(Found { id, kind, attr })
}

impl Files {
    #[must_use]
    pub fn new(
        fs: Filesystem,
        volume: Arc<dyn OpenTarget>,
        snapshots: Option<Snapshots>,
        atime: super::options::Atime,
    ) -> Self {
        Self {
            fs,
            volume,
            snapshots,
            references: References::default(),
            behind: Arc::default(),
            atime,
        }
    }

    /// The filesystem of a file, and the file.
    pub(super) async fn cell(
        &self,
        id: NodeId,
    ) -> Result<(Filesystem, Arc<InodeCell>), BackendError> {
        let (fs, number) = match (id, &self.snapshots) {
            (NodeId::Main(inode), _) => (self.fs.clone(), inode),
            (NodeId::Frozen(index, inode), Some(snapshots)) => {
                (snapshots.filesystem(index).await?, inode)
            }
            (NodeId::Frozen(..) | NodeId::Snapshots, _) => {
                return Err(errno(libc::ESTALE, "no such snapshot"));
            }
        };
        let cell = fs.inode(number).await?;
        Ok((fs, cell))
    }

    /// A file that can be changed.
    pub(super) async fn own(&self, id: NodeId) -> Result<Arc<InodeCell>, BackendError> {
        match id {
            NodeId::Main(inode) => Ok(self.fs.inode(inode).await?),
            NodeId::Frozen(..) | NodeId::Snapshots => {
                Err(errno(libc::EROFS, "a snapshot is read-only"))
            }
        }
    }

    /// A file that the kernel learns of now.
    pub(super) async fn learned(
        &self,
        id: NodeId,
        cell: &InodeCell,
    ) -> Result<Found, BackendError> {
        let found = found(id, cell, self.fs.superblock().block_bytes).await?;
        self.learn(id);
        Ok(found)
    }

    /// The kernel learns of a file once more.
    pub fn learn(&self, id: NodeId) {
        if let NodeId::Main(inode) = id {
            self.references.looked_up(inode);
        }
    }

    /// The kernel takes lookups back; whether [`Self::free`] is to be called.
    #[must_use]
    pub fn forget(&self, id: NodeId, lookups: u64) -> bool {
        match id {
            NodeId::Main(inode) => self.references.forgotten(inode, lookups),
            NodeId::Frozen(..) | NodeId::Snapshots => false,
        }
    }

    /// The kernel has opened a file for writing.
    pub fn opened_for_writing(&self, id: NodeId) {
        if let NodeId::Main(inode) = id {
            self.references.opened_for_writing(inode);
        }
    }

    /// Who had opened it has closed it.
    pub fn closed_by_writer(&self, id: NodeId) {
        if let NodeId::Main(inode) = id {
            self.references.closed_by_writer(inode);
        }
    }

    /// Whether the kernel may hold data of a file that it has not written.
    #[must_use]
    pub fn has_writers(&self, id: NodeId) -> bool {
        matches!(id, NodeId::Main(inode) if self.references.has_writers(inode))
    }

    /// Frees a file without a name that the kernel no longer knows.
    ///
    /// # Errors
    /// What the filesystem reports; it stays an orphan.
    pub async fn free(&self, id: NodeId) -> Result<(), BackendError> {
        let _behind = self.behind.read().await;
        let cell = self.own(id).await?;
        Ok(self.fs.free_orphan(&cell).await?)
    }

    /// Keeps the mount from ending while something goes on behind an answer.
    pub(super) async fn stay(&self) -> OwnedRwLockReadGuard<()> {
        self.behind.clone().read_owned().await
    }

    /// What `name` is in `parent`; `None` if there is none, and only this mount could make it.
    ///
    /// # Errors
    /// `ENOENT` for a snapshot, `ENOTDIR`, what the filesystem reports.
    pub async fn lookup(&self, parent: NodeId, name: &[u8]) -> Result<Option<Found>, BackendError> {
        let id = match (parent, &self.snapshots) {
            (NodeId::ROOT, Some(_)) if name == SNAPSHOTS_NAME => NodeId::Snapshots,
            (NodeId::Snapshots, Some(snapshots)) => {
                NodeId::Frozen(snapshots.find(name).await?, inode::ROOT)
            }
            _ => {
                let (fs, directory) = self.cell(parent).await?;
                return match fs.lookup_name(&directory, name).await {
                    Err(FsError::Refused(Refusal::NotFound)) => Ok(None),
                    cell => {
                        let cell = cell?;
                        let id = parent.sibling(cell.number());
                        self.learned(id, &cell).await.map(Some)
                    }
                };
            }
        };
        self.stat(id).await.map(Some)
    }

    /// The attributes of a file.
    ///
    /// # Errors
    /// What the filesystem reports.
    pub async fn stat(&self, id: NodeId) -> Result<Found, BackendError> {
        if id == NodeId::Snapshots {
            let cell = self.own(NodeId::ROOT).await?;
            let mut root = found(id, &cell, self.fs.superblock().block_bytes).await?;
            (root.id, root.attr.mode) = (id, 0o040_555);
            return Ok(root);
        }
        let (fs, cell) = self.cell(id).await?;
        found(id, &cell, fs.superblock().block_bytes).await
    }

    /// Up to about `limit` lines of a directory from `from` on, which is 0 or what a line said.
    ///
    /// # Errors
    /// `ENOTDIR`, what the filesystem reports.
    pub async fn lines(
        &self,
        id: NodeId,
        from: u64,
        limit: usize,
    ) -> Result<Vec<Line>, BackendError> {
        if let (NodeId::Snapshots, Some(snapshots)) = (id, &self.snapshots) {
            return snapshots.lines(from).await;
        }
        let (fs, directory) = self.cell(id).await?;
        let mut lines = Vec::new();
        for listed in fs.list(&directory, from, limit).await? {
            let child = id.sibling(listed.inode);
            let kind = match listed.kind {
                Some(kind) => kind,
                None => self.stat(child).await?.kind,
            };
            let (name, next) = (listed.name, listed.cookie);
            lines.push(Line {
                id: child,
                kind,
                name,
                next,
            });
        }
        Ok(lines)
    }

    /// Bytes of a file, fewer at its end.
    ///
    /// # Errors
    /// What the filesystem reports.
    pub async fn read(
        &self,
        id: NodeId,
        offset_bytes: u64,
        len_bytes: u32,
    ) -> Result<Bytes, BackendError> {
        let (fs, cell) = self.cell(id).await?;
        Ok(fs.read(&cell, offset_bytes, len_bytes).await?)
    }

    /// Where a symbolic link leads.
    ///
    /// # Errors
    /// `EINVAL` for other files, what the filesystem reports.
    pub async fn link_target(&self, id: NodeId) -> Result<Vec<u8>, BackendError> {
        let (fs, cell) = self.cell(id).await?;
        Ok(fs.read_link(&cell).await?)
    }

    /// From `offset_bytes` on, where what is sought begins.
    ///
    /// # Errors
    /// `ENXIO` behind the end, what the filesystem reports.
    pub async fn seek(
        &self,
        id: NodeId,
        offset_bytes: u64,
        sought: Sought,
    ) -> Result<u64, BackendError> {
        let (fs, cell) = self.cell(id).await?;
        Ok(fs.seek(&cell, offset_bytes, sought).await?)
    }

    /// The value of an attribute.
    ///
    /// # Errors
    /// `ENODATA`, what the filesystem reports.
    pub async fn xattr(&self, id: NodeId, name: &[u8]) -> Result<Vec<u8>, BackendError> {
        if id == NodeId::Snapshots {
            return Err(errno(libc::ENODATA, "no such attribute"));
        }
        let (fs, cell) = self.cell(id).await?;
        Ok(fs.xattr(&cell, name).await?)
    }

    /// The names of all attributes, each with a 0 behind it; `privileged` users see all of them.
    ///
    /// # Errors
    /// What the filesystem reports.
    pub async fn xattr_names(&self, id: NodeId, privileged: bool) -> Result<Vec<u8>, BackendError> {
        if id == NodeId::Snapshots {
            return Ok(Vec::new());
        }
        let (fs, cell) = self.cell(id).await?;
        let names = fs.xattr_names(&cell).await?;
        let shown = names
            .into_iter()
            .filter(|name| privileged || !name.starts_with(b"trusted."));
        Ok(shown.flat_map(|name| [name, vec![0]].concat()).collect())
    }

    /// The flags of chattr(1).
    ///
    /// # Errors
    /// What the filesystem reports.
    pub async fn flags(&self, id: NodeId) -> Result<u32, BackendError> {
        if id == NodeId::Snapshots {
            return Err(errno(libc::ENOTTY, "no flags"));
        }
        let (fs, cell) = self.cell(id).await?;
        Ok(fs.flags(&cell).await)
    }

    /// Blocks and inodes of the filesystem.
    #[must_use]
    pub fn space(&self) -> Statfs {
        self.fs.statfs()
    }

    #[must_use]
    pub fn measures(&self) -> Measures {
        self.fs.measures()
    }

    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.fs.is_read_only()
    }

    /// Takes a snapshot of the volume; its filesystem needs no replay.
    ///
    /// # Errors
    /// `EEXIST`, what the servers and the filesystem report.
    pub async fn take_snapshot(&self, name: &[u8]) -> Result<Found, BackendError> {
        let snapshots = self.snapshots.as_ref();
        let snapshots = snapshots.ok_or_else(|| errno(libc::EROFS, "a snapshot has none"))?;
        let index = snapshots.take(name, &self.fs).await?;
        self.stat(NodeId::Frozen(index, inode::ROOT)).await
    }

    /// Lets the filesystem fill the volume, whose size may have changed.
    pub(super) async fn grow(&self) -> Answer {
        let grown = async {
            self.volume
                .refresh()
                .await
                .map_err(|error| error.to_string())?;
            let volume_bytes = self.volume.size_bytes();
            let grown = self.fs.grow(volume_bytes).await;
            let grown = grown.map_err(|error| error.to_string())?;
            Ok::<_, String>(Answer::Grown {
                bytes_before: grown.bytes_before,
                bytes: grown.bytes,
                volume_bytes,
            })
        };
        grown
            .await
            .unwrap_or_else(|reason| Answer::Refused { reason })
    }

    /// Everything that was acknowledged is durable afterwards.
    ///
    /// # Errors
    /// What was lost.
    pub async fn sync(&self) -> Result<(), BackendError> {
        Ok(self.fs.sync().await?)
    }

    /// Unmounted: frees what has no name, and leaves a filesystem without a journal to replay.
    ///
    /// # Errors
    /// What was lost.
    pub async fn close(&self) -> Result<(), BackendError> {
        let _alone = self.behind.write().await;
        for inode in self.references.take_orphans() {
            if let Err(error) = self.free_unnamed(inode).await {
                tracing::warn!("inode {inode} stays an orphan: {error}");
            }
        }
        Ok(self.fs.close().await?)
    }

    async fn free_unnamed(&self, inode: u32) -> Result<(), FsError> {
        let cell = self.fs.inode(inode).await?;
        self.fs.free_orphan(&cell).await
    }
}
