//! FUSE requests to operations of the view.
//!
//! A handler parses, copies what it must, and moves its reply into a task; it never waits for the
//! servers. A reply that is dropped answers `EIO`, so a task that panics costs its own request only.

use crate::backend::BackendError;
use crate::error::FuseFsError;
use crate::open_file::Fallocate;
use crate::view::{Node, View};
use bytes::Bytes;
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, MountOption, OpenAccMode, OpenFlags,
    RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    Session, SessionACL, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::fs::File;
use std::future::Future;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::runtime::Handle;
use tokio::sync::Semaphore;

/// How long the kernel may believe a name or a size: another host may create, delete or resize.
const ATTR_TTL: Duration = Duration::from_secs(1);
/// Bytes of one write request, and of one read: the kernel's page limit is 256 pages.
pub(crate) const MAX_WRITE_BYTES: u32 = 1 << 20;
/// Requests that the kernel sends without waiting (readahead, asynchronous direct IO).
pub(crate) const MAX_BACKGROUND: u16 = 256;
/// KiB of data that writes in flight may hold; above it the reader of requests waits.
const WRITE_BUDGET_KIB: u32 = 256 << 10;
/// Threads that read requests: they only parse and copy.
const MAX_READER_THREADS: usize = 4;
/// Unit of `st_blocks`.
const STAT_BLOCK_BYTES: u64 = 512;
/// Unit of statfs, and the preferred IO unit.
const STATFS_BLOCK_BYTES: u32 = 4096;
const NAME_MAX_BYTES: u32 = 255;

/// How a view is shown to the kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct ViewOptions {
    /// Users other than the one who mounts may look, within the file modes.
    pub allow_other: bool,
    /// The page cache keeps data over opens: for a volume that only this host uses.
    pub cache: bool,
}

/// A view that is mounted; the kernel's requests are served until it is unmounted.
pub struct MountedView {
    session: BackgroundSession,
}

impl MountedView {
    /// Mounts `view` on `dir` and serves it; usable when this returns.
    ///
    /// # Errors
    /// [`FuseFsError::NoFuse`] without the device, [`FuseFsError::View`] otherwise.
    pub fn mount(
        view: Arc<View>,
        dir: &Path,
        options: ViewOptions,
        runtime: &Handle,
    ) -> Result<Self, FuseFsError> {
        check_fuse()?;
        let adapter = Adapter {
            view,
            options,
            runtime: runtime.clone(),
            budget: Arc::new(Semaphore::new(WRITE_BUDGET_KIB as usize)),
            owner: (
                rustix::process::geteuid().as_raw(),
                rustix::process::getegid().as_raw(),
            ),
        };
        let failed = |error: io::Error| FuseFsError::View {
            dir: dir.to_owned(),
            reason: error.to_string(),
        };
        let session = Session::new(adapter, dir, &session_config(options)).map_err(failed)?;
        Ok(Self {
            session: session.spawn().map_err(failed)?,
        })
    }

    /// Waits until the kernel has ended the connection: unmounted, and the last file closed.
    ///
    /// # Errors
    /// What ended it, if it was not an unmount.
    pub fn wait(self) -> io::Result<()> {
        self.session.join()
    }
}

/// Without the device nothing can be mounted, and the error would be a riddle.
pub(crate) fn check_fuse() -> Result<(), FuseFsError> {
    let device = File::options().read(true).write(true).open("/dev/fuse");
    device.map(|_| ()).map_err(FuseFsError::NoFuse)
}

pub(crate) fn reader_threads() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    cores.clamp(2, MAX_READER_THREADS)
}

fn session_config(options: ViewOptions) -> Config {
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName("blockd".to_owned()),
        MountOption::Subtype("blockd".to_owned()),
        MountOption::DefaultPermissions,
        MountOption::NoExec,
        MountOption::NoAtime,
    ];
    config.acl = if options.allow_other {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(reader_threads());
    config.clone_fd = true;
    config
}

struct Adapter {
    view: Arc<View>,
    options: ViewOptions,
    runtime: Handle,
    /// KiB.
    budget: Arc<Semaphore>,
    owner: (u32, u32),
}

/// Carries an answer to the kernel; one per kind of reply.
pub(crate) trait Refuse {
    fn refuse(self, errno: Errno);
}

macro_rules! refuse {
    ($($reply:ty),*) => {
        $(impl Refuse for $reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}
refuse!(
    ReplyAttr,
    ReplyCreate,
    ReplyData,
    ReplyDirectory,
    ReplyDirectoryPlus,
    ReplyEmpty,
    ReplyEntry,
    ReplyIoctl,
    ReplyLseek,
    ReplyOpen,
    ReplyStatfs,
    ReplyWrite,
    ReplyXattr
);

impl Adapter {
    /// Answers `reply` with what `work` gives, in a task of the runtime.
    fn answer<R, W, T>(
        &self,
        what: &'static str,
        reply: R,
        work: W,
        send: impl FnOnce(R, T) + Send + 'static,
    ) where
        R: Refuse + Send + 'static,
        W: Future<Output = Result<T, BackendError>> + Send + 'static,
        T: Send,
    {
        self.runtime.spawn(async move {
            match work.await {
                Ok(value) => send(reply, value),
                Err(error) => {
                    report(what, &error);
                    reply.refuse(Errno::from_i32(error.errno));
                }
            }
        });
    }

    fn node_attr(&self, node: &Node) -> FileAttr {
        attr(node, self.owner)
    }
}

/// An error that the user cannot have caused is logged; the others are answers.
fn report(what: &'static str, error: &BackendError) {
    match error.errno {
        libc::EIO | libc::ENXIO | libc::ENOSPC if what != "lseek" => {
            tracing::warn!("{what}: {error}")
        }
        errno => tracing::debug!("{what}: {error} (errno {errno})"),
    }
}

fn attr(node: &Node, (uid, gid): (u32, u32)) -> FileAttr {
    let (ino, kind, perm, size, allocated, created_s) = match node {
        Node::Directory(ino) => (*ino, FileType::Directory, 0o755, 0, 0, 0),
        Node::File(ino, info) => {
            let perm = if info.snapshot_id.is_some() {
                0o400
            } else {
                0o600
            };
            let allocated = info.allocated_bytes.unwrap_or(info.size_bytes);
            (
                *ino,
                FileType::RegularFile,
                perm,
                info.size_bytes,
                allocated,
                info.created_unix_s,
            )
        }
    };
    let created = SystemTime::UNIX_EPOCH + Duration::from_secs(created_s.min(u64::from(u32::MAX)));
    FileAttr {
        ino: INodeNo(ino),
        size,
        blocks: allocated.div_ceil(STAT_BLOCK_BYTES),
        atime: created,
        mtime: created,
        ctime: created,
        crtime: created,
        kind,
        perm,
        nlink: if kind == FileType::Directory { 2 } else { 1 },
        uid,
        gid,
        rdev: 0,
        blksize: STATFS_BLOCK_BYTES,
        flags: 0,
    }
}

/// Names that are not UTF-8 are nobody's.
fn text(name: &OsStr) -> String {
    name.to_str().unwrap_or_default().to_owned()
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            // O_TRUNC comes with open, where it is ignored as block devices ignore it.
            InitFlags::FUSE_ATOMIC_O_TRUNC,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        ];
        for flag in wanted {
            if let Err(missing) = config.add_capabilities(flag) {
                tracing::debug!("the kernel has no {missing:?}");
            }
        }
        let limits = [
            config.set_max_write(MAX_WRITE_BYTES).is_ok(),
            config.set_max_background(MAX_BACKGROUND).is_ok(),
        ];
        match limits {
            [true, true] => Ok(()),
            _ => Err(io::Error::other(
                "the kernel's limits for FUSE are below ours",
            )),
        }
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (view, owner, name) = (self.view.clone(), self.owner, text(name));
        let work = async move { view.lookup(parent.0, &name).await };
        self.answer("lookup", reply, work, move |reply, node: Node| {
            reply.entry(&ATTR_TTL, &attr(&node, owner), Generation(0));
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.view.forget(ino.0, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        if let 1..=3 = ino.0 {
            return reply.attr(&ATTR_TTL, &self.node_attr(&Node::Directory(ino.0)));
        }
        let (view, owner) = (self.view.clone(), self.owner);
        let work = async move { view.stat(ino.0).await };
        self.answer("stat", reply, work, move |reply, node: Node| {
            reply.attr(&ATTR_TTL, &attr(&node, owner))
        });
    }

    fn setattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        if mode.is_some() || uid.is_some() || gid.is_some() {
            return reply.error(Errno::EPERM);
        }
        let (view, owner) = (self.view.clone(), self.owner);
        let work = async move {
            if let Some(size_bytes) = size {
                view.resize(ino.0, size_bytes).await?;
            }
            view.stat(ino.0).await
        };
        self.answer("truncate", reply, work, move |reply, node: Node| {
            reply.attr(&ATTR_TTL, &attr(&node, owner))
        });
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        let how = match self.options.cache {
            true => FopenFlags::FOPEN_KEEP_CACHE,
            false => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        };
        let view = self.view.clone();
        let work = async move { view.open(ino.0, write).await };
        self.answer("open", reply, work, move |reply, ()| {
            reply.opened(FileHandle(ino.0), how)
        });
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let view = self.view.clone();
        let work = async move { view.file(ino.0)?.read(offset, size).await };
        self.answer("read", reply, work, |reply, data: Bytes| reply.data(&data));
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let kib = u32::try_from(data.len().div_ceil(1024)).unwrap_or(WRITE_BUDGET_KIB);
        let share = self
            .budget
            .clone()
            .acquire_many_owned(kib.min(WRITE_BUDGET_KIB));
        let share = self.runtime.block_on(share);
        let (view, data) = (self.view.clone(), Bytes::copy_from_slice(data));
        let work = async move {
            let _share = share;
            view.file(ino.0)?.write(offset, data).await
        };
        self.answer("write", reply, work, ReplyWrite::written);
    }

    fn flush(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        let view = self.view.clone();
        let work = async move { view.file(ino.0)?.flush_if_changed().await };
        self.answer("close", reply, work, |reply, ()| reply.ok());
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        let view = self.view.clone();
        let work = async move { view.release(ino.0).await };
        self.answer("release", reply, work, |reply, ()| reply.ok());
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let view = self.view.clone();
        let work = async move { view.file(ino.0)?.flush().await };
        self.answer("fsync", reply, work, |reply, ()| reply.ok());
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let view = self.view.clone();
        let work = async move { view.open_directory(ino.0).await };
        self.answer("opendir", reply, work, |reply, handle| {
            reply.opened(FileHandle(handle), FopenFlags::empty());
        });
    }

    fn readdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let lines = match self.view.directory(fh.0) {
            Ok(lines) => lines,
            Err(error) => return reply.error(Errno::from_i32(error.errno)),
        };
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, line) in lines.iter().enumerate().skip(skip) {
            let kind = if line.directory {
                FileType::Directory
            } else {
                FileType::RegularFile
            };
            if reply.add(INodeNo(line.ino), index as u64 + 1, kind, &line.name) {
                break;
            }
        }
        reply.ok();
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.view.close_directory(fh.0);
        reply.ok();
    }

    /// fsync of any directory flushes every volume: how `fuse-fs umount` learns that all is durable.
    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        let view = self.view.clone();
        let work = async move { view.flush_all().await };
        self.answer("fsyncdir", reply, work, |reply, ()| reply.ok());
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let view = self.view.clone();
        let work = async move {
            let how = Fallocate::of_mode(mode)?;
            view.file(ino.0)?.fallocate(how, offset, length).await
        };
        self.answer("fallocate", reply, work, |reply, ()| reply.ok());
    }

    fn lseek(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let (Ok(from), libc::SEEK_HOLE | libc::SEEK_DATA) = (u64::try_from(offset), whence) else {
            return reply.error(Errno::EINVAL);
        };
        let view = self.view.clone();
        let work = async move {
            view.file(ino.0)?
                .seek(from, whence == libc::SEEK_HOLE)
                .await
        };
        self.answer("lseek", reply, work, |reply, at: u64| {
            match i64::try_from(at) {
                Ok(at) => reply.offset(at),
                Err(_) => reply.error(Errno::EOVERFLOW),
            }
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let view = self.view.clone();
        let work = async move { view.space().await };
        self.answer(
            "statfs",
            reply,
            work,
            |reply, space: crate::backend::Space| {
                let free = space.free_bytes / u64::from(STATFS_BLOCK_BYTES);
                let total =
                    free.saturating_add(space.allocated_bytes / u64::from(STATFS_BLOCK_BYTES));
                let unit = STATFS_BLOCK_BYTES;
                reply.statfs(total, free, free, 0, 0, unit, NAME_MAX_BYTES, unit);
            },
        );
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (view, name) = (self.view.clone(), text(name));
        if !name.starts_with("user.") {
            return reply.error(Errno::ENODATA);
        }
        let work = async move {
            let pairs = view.xattrs(ino.0).await?;
            let value = pairs
                .into_iter()
                .find_map(|(key, value)| (key == name).then_some(value));
            value.ok_or_else(|| BackendError::new(libc::ENODATA, "no such attribute"))
        };
        self.answer("getxattr", reply, work, move |reply, value: String| {
            sized(reply, value.as_bytes(), size)
        });
    }

    fn listxattr(&self, _req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let view = self.view.clone();
        let work = async move {
            let pairs = view.xattrs(ino.0).await?;
            let names = pairs.into_iter().map(|(name, _)| name + "\0");
            Ok(names.collect::<String>())
        };
        self.answer("listxattr", reply, work, move |reply, names: String| {
            sized(reply, names.as_bytes(), size)
        });
    }

    fn setxattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: &[u8],
        _: i32,
        _: u32,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn create(
        &self,
        _: &Request,
        parent: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::from_i32(View::refusal(parent.0)));
    }

    fn mknod(
        &self,
        _: &Request,
        parent: INodeNo,
        _: &OsStr,
        _: u32,
        _: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::from_i32(View::refusal(parent.0)));
    }

    fn mkdir(&self, _: &Request, parent: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::from_i32(View::refusal(parent.0)));
    }

    fn symlink(&self, _: &Request, parent: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(Errno::from_i32(View::refusal(parent.0)));
    }

    fn link(&self, _: &Request, _: INodeNo, parent: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::from_i32(View::refusal(parent.0)));
    }

    fn unlink(&self, _: &Request, parent: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::from_i32(View::refusal(parent.0)));
    }

    fn rmdir(&self, _: &Request, parent: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::from_i32(View::refusal(parent.0)));
    }

    fn rename(
        &self,
        _: &Request,
        from: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::from_i32(View::refusal(from.0)));
    }
}

/// An extended attribute's value, its size if the caller asks for that, or `ERANGE`.
pub(crate) fn sized(reply: ReplyXattr, value: &[u8], size: u32) {
    let len = u32::try_from(value.len()).unwrap_or(u32::MAX);
    match size {
        0 => reply.size(len),
        size if size < len => reply.error(Errno::ERANGE),
        _ => reply.data(value),
    }
}
