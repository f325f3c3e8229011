//! The snapshots of a mounted volume, as directories: each a filesystem of its own that is opened when
//! it is first looked into.

use super::files::{Line, errno};
use super::node_id::NodeId;
use super::timely::TimelyDevice;
use crate::backend::{Backend, BackendError, Listing, TargetName};
use crate::ext4::device::TargetDevice;
use crate::ext4::filesystem::{Filesystem, Options};
use crate::ext4::inode::{self, Kind};
use blockd::id::SnapshotId;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::OnceCell;

/// One snapshot.
struct Snapshot {
    name: TargetName,
    opened: OnceCell<Filesystem>,
}

#[derive(Default)]
struct Known {
    by_id: HashMap<SnapshotId, u32>,
    /// By index, which starts at 1.
    all: Vec<Arc<Snapshot>>,
}

/// The snapshots of one volume.
pub struct Snapshots {
    backend: Arc<dyn Backend>,
    volume: String,
    deadline: Duration,
    options: Options,
    known: Mutex<Known>,
}

impl Snapshots {
    #[must_use]
    pub fn new(
        backend: Arc<dyn Backend>,
        volume: String,
        deadline: Duration,
        options: Options,
    ) -> Self {
        let known = Mutex::default();
        Self {
            backend,
            volume,
            deadline,
            options,
            known,
        }
    }

    /// A panic elsewhere leaves it whole: what is added is added last.
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The index of a snapshot; the same as long as it is mounted.
    fn index(&self, id: SnapshotId, name: &TargetName) -> u32 {
        let mut known = self.known();
        if let Some(index) = known.by_id.get(&id) {
            return *index;
        }
        known.all.push(Arc::new(Snapshot {
            name: name.clone(),
            opened: OnceCell::new(),
        }));
        let index = known.all.len() as u32;
        known.by_id.insert(id, index);
        index
    }

    fn target(&self, name: &[u8]) -> Option<TargetName> {
        let name = std::str::from_utf8(name).ok()?;
        TargetName::parse(&format!("{}@{name}", self.volume))
    }

    /// The index of the snapshot `name`.
    ///
    /// # Errors
    /// `ENOENT`, what the servers report.
    pub async fn find(&self, name: &[u8]) -> Result<u32, BackendError> {
        let none = || errno(libc::ENOENT, "no such snapshot");
        let target = self.target(name).ok_or_else(none)?;
        let info = self.backend.find(&target).await?;
        let id = info.snapshot_id.ok_or_else(none)?;
        Ok(self.index(id, &target))
    }

    /// Takes the snapshot `name` while `fs` needs no replay; its index.
    ///
    /// # Errors
    /// `EINVAL` for a name that no snapshot can have, what the servers and the filesystem report.
    pub async fn take(&self, name: &[u8], fs: &Filesystem) -> Result<u32, BackendError> {
        let target = self.target(name);
        let target = target.ok_or_else(|| errno(libc::EINVAL, "not a name of a snapshot"))?;
        fs.quiesced(self.backend.snapshot(&target)).await??;
        self.find(name).await
    }

    /// The filesystem of the snapshot with this index.
    ///
    /// # Errors
    /// What keeps it from being read.
    pub async fn filesystem(&self, index: u32) -> Result<Filesystem, BackendError> {
        let at = (index as usize).wrapping_sub(1);
        let snapshot = self.known().all.get(at).cloned();
        let snapshot = snapshot.ok_or_else(|| errno(libc::ESTALE, "no such snapshot"))?;
        let opened = snapshot
            .opened
            .get_or_try_init(|| self.open(&snapshot.name));
        opened.await.cloned()
    }

    async fn open(&self, name: &TargetName) -> Result<Filesystem, BackendError> {
        let target = self.backend.open(name).await?;
        let device = TimelyDevice::new(Arc::new(TargetDevice(target)), self.deadline);
        Ok(Filesystem::open(Arc::new(device), self.options.clone()).await?)
    }

    /// The snapshots behind the first `from`, as lines of a directory.
    ///
    /// # Errors
    /// What the servers report.
    pub async fn lines(&self, from: u64) -> Result<Vec<Line>, BackendError> {
        let mut names = Vec::new();
        for info in self.backend.list(Listing::Snapshots).await? {
            let snapshot = info.name.snapshot.clone();
            if let (true, Some(id), Some(name)) =
                (info.name.volume == self.volume, info.snapshot_id, snapshot)
            {
                let index = self.index(id, &info.name);
                names.push((NodeId::Frozen(index, inode::ROOT), name.into_bytes()));
            }
        }
        names.sort_by(|one, other| one.1.cmp(&other.1));
        let dots = [
            (NodeId::Snapshots, b".".to_vec()),
            (NodeId::ROOT, b"..".to_vec()),
        ];
        let all = dots.into_iter().chain(names).zip(1..);
        let line = |((id, name), next)| Line {
            id,
            kind: Kind::Directory,
            name,
            next,
        };
        let skip = usize::try_from(from).unwrap_or(usize::MAX);
        Ok(all.map(line).skip(skip).collect())
    }
}
