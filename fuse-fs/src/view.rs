//! The operations of the view, without FUSE: names and numbers to volumes and their open files.

use crate::backend::{Answer, Backend, BackendError, OpenTarget, Space, TargetInfo, TargetName};
use crate::open_file::{OpenFile, within};
use crate::overlay::OverlaidSnapshot;
use crate::volumes::{self, Child, DirEntry, Directory, KnownFiles};
use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// A file or directory as `stat` and `lookup` need it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Node {
    Directory(u64),
    File(u64, TargetInfo),
}

/// The volumes of a cluster as a tree of files.
pub struct View {
    backend: Arc<dyn Backend>,
    deadline: Duration,
    /// Memory for what is written to a snapshot; none: snapshots cannot be written.
    overlay_bytes: Option<u64>,
    known: Mutex<KnownFiles>,
    open: Mutex<HashMap<u64, Opened>>,
    directories: Mutex<OpenDirectories>,
}

struct Opened {
    file: Arc<OpenFile>,
    /// Opens that were not released. A file stays with none until what was written is flushed.
    users: u64,
}

#[derive(Default)]
struct OpenDirectories {
    next: u64,
    listings: HashMap<u64, Arc<Vec<DirEntry>>>,
}

fn errno(errno: i32, message: &str) -> BackendError {
    BackendError::new(errno, message)
}

/// A panic elsewhere leaves these maps whole: every change of them is a single call.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl View {
    /// `deadline` bounds every request to the backend. With `overlay_bytes`, what is written to a
    /// snapshot is kept in that much memory until the snapshot's last close.
    #[must_use]
    pub fn new(backend: Arc<dyn Backend>, deadline: Duration, overlay_bytes: Option<u64>) -> Self {
        Self {
            backend,
            deadline,
            overlay_bytes,
            known: Mutex::default(),
            open: Mutex::default(),
            directories: Mutex::default(),
        }
    }

    /// What `name` is in the directory `parent`.
    ///
    /// # Errors
    /// `ENOTDIR`, `ENOENT`, `EOVERFLOW` for an id without an inode number, what the backend reports.
    pub async fn lookup(&self, parent: u64, name: &str) -> Result<Node, BackendError> {
        let directory = Directory::of_ino(parent).ok_or_else(|| errno(libc::ENOTDIR, "lookup"))?;
        match directory.child(name) {
            None => Err(errno(libc::ENOENT, "no such name")),
            Some(Child::Directory(ino)) => Ok(Node::Directory(ino)),
            Some(Child::Target(target)) => {
                let info = self.within("lookup", self.backend.find(&target)).await?;
                let overflow = || errno(libc::EOVERFLOW, "volume id above 2^32");
                let ino = volumes::ino_of(&info).ok_or_else(overflow)?;
                lock(&self.known).looked_up(ino, &info);
                Ok(Node::File(ino, info))
            }
        }
    }

    /// The kernel no longer knows the file from `lookups` of its lookups.
    pub fn forget(&self, ino: u64, lookups: u64) {
        lock(&self.known).forget(ino, lookups);
    }

    /// The node with number `ino` as it is now; an open file whose servers are away, as it was.
    ///
    /// # Errors
    /// `ESTALE` for a volume that is gone, what the backend reports.
    pub async fn stat(&self, ino: u64) -> Result<Node, BackendError> {
        if Directory::of_ino(ino).is_some() {
            return Ok(Node::Directory(ino));
        }
        let last = self.last_known(ino)?;
        match self.within("stat", self.backend.find(&last.name)).await {
            Ok(info) if volumes::ino_of(&info) == Some(ino) => {
                lock(&self.known).update(ino, &info);
                Ok(Node::File(ino, info))
            }
            Ok(_) => Err(errno(libc::ESTALE, "another volume has this name now")),
            Err(_) if lock(&self.open).contains_key(&ino) => Ok(Node::File(ino, last)),
            Err(error) if error.errno == libc::ENOENT => Err(errno(libc::ESTALE, &error.message)),
            Err(error) => Err(error),
        }
    }

    /// The file's last known state, without asking anybody.
    fn last_known(&self, ino: u64) -> Result<TargetInfo, BackendError> {
        let known = lock(&self.known).get(ino).cloned();
        known.ok_or_else(|| errno(libc::ESTALE, "not looked up"))
    }

    /// Opens the file for one user; `write` on a snapshot is refused unless it goes to memory.
    ///
    /// # Errors
    /// `EROFS`, `EISDIR`, what the backend reports.
    pub async fn open(&self, ino: u64, write: bool) -> Result<(), BackendError> {
        if Directory::of_ino(ino).is_some() {
            return Err(errno(libc::EISDIR, "open"));
        }
        let info = self.last_known(ino)?;
        if write && info.snapshot_id.is_some() && self.overlay_bytes.is_none() {
            return Err(errno(libc::EROFS, "a snapshot is read-only"));
        }
        if let Some(opened) = lock(&self.open).get_mut(&ino) {
            opened.users += 1;
            return Ok(());
        }
        let target = self.target(info).await?;
        let new = || Opened {
            file: Arc::new(OpenFile::new(target, self.deadline)),
            users: 0,
        };
        lock(&self.open).entry(ino).or_insert_with(new).users += 1;
        Ok(())
    }

    async fn target(&self, info: TargetInfo) -> Result<Arc<dyn OpenTarget>, BackendError> {
        let target = self.within("open", self.backend.open(&info.name)).await?;
        Ok(
            match self.overlay_bytes.filter(|_| info.snapshot_id.is_some()) {
                Some(limit) => Arc::new(OverlaidSnapshot::new(info.name, target, limit)),
                None => target,
            },
        )
    }

    /// The open file with this number.
    ///
    /// # Errors
    /// `EBADF` if nobody has it open.
    pub fn file(&self, ino: u64) -> Result<Arc<OpenFile>, BackendError> {
        let file = lock(&self.open).get(&ino).map(|opened| opened.file.clone());
        file.ok_or_else(|| errno(libc::EBADF, "not open"))
    }

    /// One user less; the last one's writes are flushed before the volume is let go.
    ///
    /// # Errors
    /// What the flush reports; the volume is kept then, so that a later flush tries again.
    pub async fn release(&self, ino: u64) -> Result<(), BackendError> {
        let Some(file) = self.one_user_less(ino) else {
            return Ok(());
        };
        file.flush_if_changed().await?;
        let mut open = lock(&self.open);
        if open
            .get(&ino)
            .is_some_and(|opened| opened.users == 0 && !opened.file.is_changed())
        {
            open.remove(&ino);
        }
        Ok(())
    }

    /// The file if that was its last user.
    fn one_user_less(&self, ino: u64) -> Option<Arc<OpenFile>> {
        let mut open = lock(&self.open);
        let opened = open.get_mut(&ino)?;
        opened.users = opened.users.saturating_sub(1);
        (opened.users == 0).then(|| opened.file.clone())
    }

    /// Flushes every volume that was written through this view, all at the same time.
    ///
    /// # Errors
    /// The first failure, after all have been tried.
    pub async fn flush_all(&self) -> Result<(), BackendError> {
        let files: Vec<_> = lock(&self.open)
            .values()
            .map(|opened| opened.file.clone())
            .collect();
        let flush =
            |file: Arc<OpenFile>| tokio::spawn(async move { file.flush_if_changed().await });
        let tasks: Vec<_> = files.into_iter().map(flush).collect();
        let mut result = Ok(());
        for task in tasks {
            let flushed = task
                .await
                .unwrap_or_else(|_| Err(errno(libc::EIO, "flush panicked")));
            result = result.and(flushed);
        }
        result
    }

    /// Makes the volume `size_bytes` large: equal is nothing, larger grows it.
    ///
    /// # Errors
    /// `EPERM` for a shrink, `EROFS` on a snapshot, what the backend reports.
    pub async fn resize(&self, ino: u64, size_bytes: u64) -> Result<(), BackendError> {
        let Node::File(_, info) = self.stat(ino).await? else {
            return Err(errno(libc::EISDIR, "truncate"));
        };
        if info.snapshot_id.is_some() {
            return Err(errno(libc::EROFS, "a snapshot is read-only"));
        }
        if size_bytes < info.size_bytes {
            return Err(errno(
                libc::EPERM,
                "a volume is not shrunk here; use `blockctl volume resize --allow-shrink`",
            ));
        }
        if size_bytes > info.size_bytes {
            self.within("resize", self.backend.grow(&info.name.volume, size_bytes))
                .await?;
            if let Ok(file) = self.file(ino) {
                file.refresh().await?;
            }
        }
        Ok(())
    }

    /// Reads a directory as it is now and keeps it until [`View::close_directory`].
    ///
    /// # Errors
    /// `ENOTDIR`, what the backend reports.
    pub async fn open_directory(&self, ino: u64) -> Result<u64, BackendError> {
        let directory = Directory::of_ino(ino).ok_or_else(|| errno(libc::ENOTDIR, "opendir"))?;
        let targets = match directory {
            Directory::Root => Vec::new(),
            Directory::Of(listing) => self.within("list", self.backend.list(listing)).await?,
        };
        let listing = Arc::new(volumes::entries(directory, &targets));
        let mut directories = lock(&self.directories);
        directories.next += 1;
        let handle = directories.next;
        directories.listings.insert(handle, listing);
        Ok(handle)
    }

    /// The lines read by [`View::open_directory`].
    ///
    /// # Errors
    /// `EBADF` for an unknown handle.
    pub fn directory(&self, handle: u64) -> Result<Arc<Vec<DirEntry>>, BackendError> {
        let listing = lock(&self.directories).listings.get(&handle).cloned();
        listing.ok_or_else(|| errno(libc::EBADF, "directory not open"))
    }

    pub fn close_directory(&self, handle: u64) {
        lock(&self.directories).listings.remove(&handle);
    }

    /// Extended attributes of a file; directories have none.
    ///
    /// # Errors
    /// As [`View::stat`].
    pub async fn xattrs(&self, ino: u64) -> Result<Vec<(String, String)>, BackendError> {
        match self.stat(ino).await? {
            Node::Directory(_) => Ok(Vec::new()),
            Node::File(_, info) => Ok(volumes::xattrs(&info)),
        }
    }

    /// Allocated and free bytes of the cluster.
    ///
    /// # Errors
    /// What the backend reports.
    pub async fn space(&self) -> Result<Space, BackendError> {
        self.within("statfs", self.backend.space()).await
    }

    /// The errno for adding, removing or renaming `name` in `parent`: volumes are made by `blockctl`.
    #[must_use]
    pub fn refusal(parent: u64) -> i32 {
        match Directory::of_ino(parent) {
            Some(Directory::Of(crate::backend::Listing::Snapshots)) => libc::EROFS,
            _ => libc::EPERM,
        }
    }

    /// Name of the file, for log lines.
    #[must_use]
    pub fn name(&self, ino: u64) -> Option<TargetName> {
        lock(&self.known).get(ino).map(|info| info.name.clone())
    }

    fn within<'a, T: 'a>(
        &'a self,
        what: &'static str,
        answer: Answer<'a, T>,
    ) -> impl Future<Output = Result<T, BackendError>> + Send + 'a {
        within(what, self.deadline, answer)
    }
}
