//! FUSE requests to operations of the mounted filesystem.
//!
//! A handler parses, refuses what can be refused at once, copies what it must, and hands the work to
//! the [`Answerer`].

use super::answer::Answerer;
use super::attributes::{new_time, timestamp};
use super::change::{Change, Writing};
use super::files::{Files, Found, Line, MAX_NAME_BYTES};
use super::grow_command::{Answer, GROW};
use super::kernel_cache::KernelCache;
use super::node_id::NodeId;
use super::options::{Atime, MountOptions};
use super::replies::{add_plus, attr, created, entry, looked_up, names};
use super::requests::{TrimRange, allocation, device_of, name_of, rename_mode, set_mode, sought};
use super::session;
use super::stats::{Op, Stats};
use crate::adapter::{Refuse, sized};
use crate::backend::BackendError;
use crate::ext4::namespace::{AttributeChange, Content, NewNode};
use bytes::Bytes;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, INodeNo,
    IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::future::Future;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;
use tokio::runtime::Handle;

/// The kernel asks for a page of lines at a time; more than fit are looked up in vain.
const LINES: usize = 128;
const LINES_PLUS: usize = 24;
/// The statistics, as an attribute of the root.
pub(crate) const STATS_XATTR: &str = "blockd.stats";
/// `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS`; the latter is also known with its argument's size as `int`.
const GET_FLAGS: u32 = 0x8008_6601;
const SET_FLAGS: u32 = 0x4008_6602;
/// `FITRIM`, of fstrim(8).
const TRIM: u32 = 0xc018_5879;

pub(super) struct Adapter {
    files: Arc<Files>,
    options: MountOptions,
    answers: Answerer,
    pub(super) stats: Arc<Stats>,
    pub(super) kernel: KernelCache,
    /// Who mounted it.
    owner: u32,
}

impl Adapter {
    pub(super) fn new(files: Arc<Files>, options: MountOptions, runtime: Handle) -> Self {
        let stats = Arc::new(Stats::default());
        Self {
            files,
            options,
            answers: Answerer::new(runtime, stats.clone()),
            stats,
            kernel: KernelCache::default(),
            owner: rustix::process::geteuid().as_raw(),
        }
    }

    /// Answers `reply` with what `work` on the files gives.
    fn run<R, W, T>(
        &self,
        op: Op,
        reply: R,
        work: impl FnOnce(Arc<Files>) -> W,
        send: impl FnOnce(R, T) + Send + 'static,
    ) where
        R: Refuse + Send + 'static,
        W: Future<Output = Result<T, BackendError>> + Send + 'static,
        T: Send,
    {
        self.answers
            .answer(op, reply, work(self.files.clone()), send);
    }

    /// Makes a file and answers with it.
    fn make(
        &self,
        op: Op,
        req: &Request,
        (parent, name): (INodeNo, &OsStr),
        (mode, umask): (u32, u32),
        content: Made,
        reply: ReplyEntry,
    ) {
        let (parent, name, owner) = (NodeId::of(parent.0), name_of(name), (req.uid(), req.gid()));
        let work = async move |files: Arc<Files>| {
            make(&files, parent, &name?, (mode, umask), owner, &content).await
        };
        self.run(op, reply, work, |reply, found: Found| entry(reply, &found));
    }

    /// mkdir in the directory of the snapshots.
    fn take_snapshot(&self, name: &OsStr, reply: ReplyEntry) {
        let name = name_of(name);
        let work = async move |files: Arc<Files>| files.take_snapshot(&name?).await;
        self.run(Op::Snapshot, reply, work, |reply, found: Found| {
            entry(reply, &found)
        });
    }

    /// What a file that is opened does in the kernel.
    fn open_flags(&self) -> FopenFlags {
        match self.options.direct_io {
            true => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
            false => FopenFlags::FOPEN_KEEP_CACHE,
        }
    }

    /// Lets work go on behind an answer.
    fn behind(
        &self,
        op: Op,
        work: impl Future<Output = Result<(), BackendError>> + Send + 'static,
    ) {
        self.answers.answer(op, Nobody, work, |_, ()| {});
    }

    /// Reading has changed the atime.
    fn touch(&self, id: NodeId) {
        if self.options.atime != Atime::Never {
            let files = self.files.clone();
            self.behind(Op::Touch, async move { files.touch(id).await });
        }
    }

    fn touch_directory(&self, id: NodeId, offset: u64) {
        if offset == 0 && self.options.directory_atime {
            self.touch(id);
        }
    }

    fn forget_one(&self, ino: INodeNo, lookups: u64) {
        let (files, id) = (self.files.clone(), NodeId::of(ino.0));
        if files.forget(id, lookups) {
            self.behind(Op::Free, async move { files.free(id).await });
        }
    }
}

/// Gets no answer: the request had its own, or wants none.
struct Nobody;

impl Refuse for Nobody {
    fn refuse(self, _: Errno) {}
}

/// What a new file is made with.
enum Made {
    Nothing,
    Device(u32),
    Target(Vec<u8>),
}

async fn make(
    files: &Files,
    parent: NodeId,
    name: &[u8],
    (mode, umask): (u32, u32),
    (uid, gid): (u32, u32),
    made: &Made,
) -> Result<Found, BackendError> {
    let content = match made {
        Made::Nothing => Content::Nothing,
        Made::Device(rdev) => device_of(*rdev),
        Made::Target(target) => Content::Target(target),
    };
    let node = NewNode {
        mode: mode as u16,
        umask: umask as u16,
        uid,
        gid,
        content,
    };
    files.create(parent, name, &node).await
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        session::negotiate(&self.options, config)
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (parent, name) = (NodeId::of(parent.0), name_of(name));
        let work = async move |files: Arc<Files>| files.lookup(parent, &name?).await;
        self.run(Op::Lookup, reply, work, looked_up);
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.forget_one(ino, nlookup);
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let id = NodeId::of(ino.0);
        let work = async move |files: Arc<Files>| files.stat(id).await;
        self.run(Op::Stat, reply, work, |reply, found: Found| {
            attr(reply, &found)
        });
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let attributes = AttributeChange {
            mode: mode.map(|mode| (mode & 0o7777) as u16),
            uid,
            gid,
            atime: atime.map(new_time),
            mtime: mtime.map(new_time),
            ctime: ctime.map(timestamp),
        };
        let change = Change {
            attributes,
            size_bytes: size,
            unprivileged: req.uid() != 0,
        };
        let id = NodeId::of(ino.0);
        let work = async move |files: Arc<Files>| files.change(id, &change).await;
        self.run(Op::SetAttr, reply, work, |reply, found: Found| {
            attr(reply, &found)
        });
    }

    fn readlink(&self, _req: &Request, ino: INodeNo, reply: ReplyData) {
        let id = NodeId::of(ino.0);
        let work = async move |files: Arc<Files>| files.link_target(id).await;
        self.run(Op::ReadLink, reply, work, |reply, target: Vec<u8>| {
            reply.data(&target)
        });
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let made = match mode & libc::S_IFMT {
            libc::S_IFCHR | libc::S_IFBLK => Made::Device(rdev),
            _ => Made::Nothing,
        };
        self.make(Op::Create, req, (parent, name), (mode, umask), made, reply);
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        reply: ReplyEntry,
    ) {
        if NodeId::of(parent.0) == NodeId::Snapshots {
            return self.take_snapshot(name, reply);
        }
        let mode = mode & !libc::S_IFMT | libc::S_IFDIR;
        self.make(
            Op::Mkdir,
            req,
            (parent, name),
            (mode, umask),
            Made::Nothing,
            reply,
        );
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let target = Made::Target(target.as_os_str().as_bytes().to_vec());
        let mode = libc::S_IFLNK | 0o777;
        self.make(Op::Symlink, req, (parent, name), (mode, 0), target, reply);
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let write = flags & libc::O_ACCMODE != libc::O_RDONLY;
        let (parent, name, owner) = (NodeId::of(parent.0), name_of(name), (req.uid(), req.gid()));
        let mode = mode & !libc::S_IFMT | libc::S_IFREG;
        let work = async move |files: Arc<Files>| {
            let made = make(&files, parent, &name?, (mode, umask), owner, &Made::Nothing).await?;
            if write {
                files.opened_for_writing(made.id);
            }
            Ok(made)
        };
        let how = self.open_flags();
        self.run(Op::Create, reply, work, move |reply, found: Found| {
            created(reply, &found, how)
        });
    }

    fn unlink(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (parent, name) = (NodeId::of(parent.0), name_of(name));
        let work = async move |files: Arc<Files>| files.unlink(parent, &name?, false).await;
        self.run(Op::Unlink, reply, work, |reply, ()| reply.ok());
    }

    fn rmdir(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (parent, name) = (NodeId::of(parent.0), name_of(name));
        let work = async move |files: Arc<Files>| files.unlink(parent, &name?, true).await;
        self.run(Op::Rmdir, reply, work, |reply, ()| reply.ok());
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (from, to) = (NodeId::of(parent.0), NodeId::of(newparent.0));
        let (name, new_name, mode) = (name_of(name), name_of(newname), rename_mode(flags, req));
        let work = async move |files: Arc<Files>| {
            files.rename((from, &name?), (to, &new_name?), mode?).await
        };
        self.run(Op::Rename, reply, work, |reply, ()| reply.ok());
    }

    fn link(
        &self,
        _req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let (file, parent, name) = (NodeId::of(ino.0), NodeId::of(newparent.0), name_of(newname));
        let work = async move |files: Arc<Files>| files.link(file, parent, &name?).await;
        self.run(Op::Link, reply, work, |reply, found: Found| {
            entry(reply, &found)
        });
    }

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let write = flags.acc_mode() != OpenAccMode::O_RDONLY;
        match (NodeId::of(ino.0), write) {
            (NodeId::Frozen(..) | NodeId::Snapshots, true) => return reply.error(Errno::EROFS),
            (id, true) => self.files.opened_for_writing(id),
            (_, false) => {}
        }
        reply.opened(FileHandle(0), self.open_flags());
    }

    /// The kernel has written all that this opening left in its cache, also through memory.
    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            self.files.closed_by_writer(NodeId::of(ino.0));
        }
        reply.ok();
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let how = match NodeId::of(ino.0) {
            NodeId::Snapshots => FopenFlags::empty(),
            _ => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR,
        };
        reply.opened(FileHandle(0), how);
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
        let id = NodeId::of(ino.0);
        let work = async move |files: Arc<Files>| files.read(id, offset, size).await;
        self.run(Op::Read, reply, work, |reply, data: Bytes| {
            reply.data(&data)
        });
        self.touch(id);
    }

    /// Acknowledged from memory; O_APPEND is the kernel's, which knows the size.
    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let (id, data) = (NodeId::of(ino.0), Bytes::copy_from_slice(data));
        let size = data.len() as u32;
        // What the kernel collects it has stamped; it sends the times by itself.
        let how = Writing {
            stamped: !self.options.writeback || self.options.direct_io,
            unprivileged: write_flags.contains(WriteFlags::FUSE_WRITE_KILL_SUIDGID),
        };
        let work = async move |files: Arc<Files>| files.write(id, offset, data, how).await;
        self.run(Op::Write, reply, work, move |reply, ()| reply.written(size));
    }

    /// Closing promises nothing; the kernel remembers this answer.
    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn fsync(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let id = NodeId::of(ino.0);
        let work = async move |files: Arc<Files>| files.fsync(id, datasync).await;
        self.run(Op::Fsync, reply, work, |reply, ()| reply.ok());
    }

    /// Of the root, everything: how `fuse-fs umount` learns that all is durable.
    fn fsyncdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        datasync: bool,
        reply: ReplyEmpty,
    ) {
        let id = NodeId::of(ino.0);
        let work = async move |files: Arc<Files>| match id {
            NodeId::ROOT => files.sync().await,
            _ => files.fsync(id, datasync).await,
        };
        self.run(Op::Fsync, reply, work, |reply, ()| reply.ok());
    }

    fn readdir(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let id = NodeId::of(ino.0);
        let work = async move |files: Arc<Files>| files.lines(id, offset, LINES).await;
        self.run(Op::ReadDir, reply, work, names);
        self.touch_directory(id, offset);
    }

    fn readdirplus(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        let id = NodeId::of(ino.0);
        let work = async move |files: Arc<Files>| {
            let mut lines = Vec::new();
            for line in files.lines(id, offset, LINES_PLUS).await? {
                // A file that cannot be read keeps nobody from seeing its name.
                let found = files.stat(line.id).await.ok();
                lines.push((line, found));
            }
            Ok(lines)
        };
        let files = self.files.clone();
        let send = move |mut reply: ReplyDirectoryPlus, lines: Vec<(Line, Option<Found>)>| {
            for (line, found) in &lines {
                if add_plus(&mut reply, line, found.as_ref(), &files) {
                    break;
                }
            }
            reply.ok();
        };
        self.run(Op::ReadDir, reply, work, send);
        self.touch_directory(id, offset);
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let (id, how) = (NodeId::of(ino.0), allocation(mode));
        let unprivileged = req.uid() != 0;
        let work = async move |files: Arc<Files>| {
            files
                .fallocate(id, how?, offset, length, unprivileged)
                .await
        };
        self.run(Op::Fallocate, reply, work, |reply, ()| reply.ok());
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
        let (id, sought, kernel) = (
            NodeId::of(ino.0),
            sought(offset, whence),
            self.kernel.clone(),
        );
        let work = async move |files: Arc<Files>| {
            let (from, sought) = sought?;
            if files.has_writers(id) {
                kernel.give_up_cache(ino).await?;
            }
            files.seek(id, from, sought).await
        };
        self.run(
            Op::Seek,
            reply,
            work,
            |reply, at: u64| match i64::try_from(at) {
                Ok(at) => reply.offset(at),
                Err(_) => reply.error(Errno::EOVERFLOW),
            },
        );
    }

    fn copy_file_range(
        &self,
        req: &Request,
        ino_in: INodeNo,
        _fh_in: FileHandle,
        offset_in: u64,
        ino_out: INodeNo,
        _fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _flags: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let from = (NodeId::of(ino_in.0), offset_in);
        let to = (NodeId::of(ino_out.0), offset_out);
        // The answer has 32 bits.
        let len = len.min(1 << 30);
        let unprivileged = req.uid() != 0;
        let work =
            async move |files: Arc<Files>| files.copy_range(from, to, len, unprivileged).await;
        self.run(Op::Copy, reply, work, |reply, copied: u64| {
            reply.written(copied as u32)
        });
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let space = self.files.space();
        let (unit, names) = (space.block_bytes, MAX_NAME_BYTES as u32);
        let (blocks, free, available) = (space.blocks, space.free_blocks, space.available_blocks);
        let (inodes, free_inodes) = (space.inodes, space.free_inodes);
        reply.statfs(
            blocks,
            free,
            available,
            inodes,
            free_inodes,
            unit,
            names,
            unit,
        );
    }

    fn getxattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let id = NodeId::of(ino.0);
        if id == NodeId::ROOT && name == STATS_XATTR {
            let stats = self.stats.json(&self.files.measures());
            return sized(reply, stats.to_string().as_bytes(), size);
        }
        let name = name.as_bytes().to_vec();
        let work = async move |files: Arc<Files>| files.xattr(id, &name).await;
        self.run(Op::GetXattr, reply, work, move |reply, value: Vec<u8>| {
            sized(reply, &value, size);
        });
    }

    fn listxattr(&self, req: &Request, ino: INodeNo, size: u32, reply: ReplyXattr) {
        let (id, privileged) = (NodeId::of(ino.0), req.uid() == 0);
        let work = async move |files: Arc<Files>| files.xattr_names(id, privileged).await;
        self.run(Op::ListXattr, reply, work, move |reply, names: Vec<u8>| {
            sized(reply, &names, size);
        });
    }

    fn setxattr(
        &self,
        _req: &Request,
        ino: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        let mode = set_mode(flags);
        let (id, name, value) = (NodeId::of(ino.0), name.as_bytes().to_vec(), value.to_vec());
        let work = async move |files: Arc<Files>| files.set_xattr(id, &name, &value, mode).await;
        self.run(Op::SetXattr, reply, work, |reply, ()| reply.ok());
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (id, name) = (NodeId::of(ino.0), name.as_bytes().to_vec());
        let work = async move |files: Arc<Files>| files.remove_xattr(id, &name).await;
        self.run(Op::RemoveXattr, reply, work, |reply, ()| reply.ok());
    }

    /// chattr(1), of which immutable and append-only are root's to set; and growth and fstrim(8), for root and who
    /// mounted it.
    fn ioctl(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: IoctlFlags,
        cmd: u32,
        in_data: &[u8],
        _out_size: u32,
        reply: ReplyIoctl,
    ) {
        let (id, uid) = (NodeId::of(ino.0), req.uid());
        match (cmd, in_data.first_chunk::<4>()) {
            (GET_FLAGS, _) => {
                let work = async move |files: Arc<Files>| files.flags(id).await;
                self.run(Op::Flags, reply, work, |reply, flags: u32| {
                    reply.ioctl(0, &flags.to_ne_bytes());
                });
            }
            (SET_FLAGS, Some(flags)) => {
                let flags = u32::from_ne_bytes(*flags);
                let work = async move |files: Arc<Files>| files.set_flags(id, flags, uid).await;
                self.run(Op::Flags, reply, work, |reply, ()| reply.ioctl(0, &[]));
            }
            (GROW | TRIM, _) if uid != 0 && uid != self.owner => reply.error(Errno::EPERM),
            (TRIM, _) => {
                let wanted = TrimRange::parse(in_data);
                let work = async move |files: Arc<Files>| files.trim(id, wanted?).await;
                self.run(Op::Trim, reply, work, |reply, done: TrimRange| {
                    reply.ioctl(0, &done.bytes());
                });
            }
            (GROW, _) if id == NodeId::ROOT => {
                let work = async move |files: Arc<Files>| Ok(files.grow().await);
                self.run(Op::Grow, reply, work, |reply, answer: Answer| {
                    reply.ioctl(0, &answer.bytes());
                });
            }
            _ => reply.error(Errno::ENOTTY),
        }
    }
}
