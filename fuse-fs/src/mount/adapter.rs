//! FUSE requests to operations of the mounted filesystem.
//!
//! A handler parses, refuses what can be refused at once, copies what it must, and hands the work to
//! the [`Answerer`].

use super::answer::Answerer;
use super::attributes::{file_attr, file_type, new_time, timestamp, unknown};
use super::change::{Change, Writing};
use super::files::{Files, Found, Line, MAX_NAME_BYTES};
use super::grow_command::{Answer, GROW};
use super::node_id::NodeId;
use super::options::{Atime, MountOptions};
use super::session;
use super::stats::{Op, Stats};
use crate::adapter::{Refuse, sized};
use crate::backend::BackendError;
use crate::ext4::fallocate::{Allocation, Sought};
use crate::ext4::inode::Kind;
use crate::ext4::namespace::{AttributeChange, Content, NewNode, RenameMode, SetMode};
use bytes::Bytes;
use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation,
    INodeNo, IoctlFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr,
    ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyIoctl,
    ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use std::ffi::OsStr;
use std::future::Future;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::runtime::Handle;

/// How long the kernel may believe what it was told: nobody else changes it.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 86_400);
/// A snapshot can be deleted by others.
const SNAPSHOTS_TTL: Duration = Duration::from_secs(1);
/// The kernel asks for a page of lines at a time; more than fit are looked up in vain.
const LINES: usize = 128;
const LINES_PLUS: usize = 24;
/// The statistics, as an attribute of the root.
pub(crate) const STATS_XATTR: &str = "blockd.stats";
/// `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS`; the latter is also known with its argument's size as `int`.
const GET_FLAGS: u32 = 0x8008_6601;
const SET_FLAGS: u32 = 0x4008_6602;

pub(super) struct Adapter {
    files: Arc<Files>,
    options: MountOptions,
    answers: Answerer,
    stats: Arc<Stats>,
    /// Who mounted it.
    owner: u32,
}

fn entry(reply: ReplyEntry, found: &Found) {
    let attr = file_attr(found, found.id.number());
    let generation = Generation(u64::from(found.attr.generation));
    reply.entry_with_ttls(&attr_ttl(found), &ttl(found.id), &attr, generation);
}

/// The number 0 stands for "no such name", which the kernel remembers.
fn looked_up(reply: ReplyEntry, found: Option<Found>) {
    match found {
        Some(found) => entry(reply, &found),
        None => reply.entry(&FOR_EVER, &unknown(Kind::Regular), Generation(0)),
    }
}

/// How many blocks a file has is known when its data has left memory.
fn attr_ttl(found: &Found) -> Duration {
    match found.attr.settled {
        true => ttl(found.id),
        false => Duration::ZERO,
    }
}

fn ttl(id: NodeId) -> Duration {
    match id {
        NodeId::Snapshots | NodeId::Frozen(_, crate::ext4::inode::ROOT) => SNAPSHOTS_TTL,
        NodeId::Main(_) | NodeId::Frozen(..) => FOR_EVER,
    }
}

/// Names that are too long are nobody's; the kernel passes them on.
fn name_of(name: &OsStr) -> Result<Vec<u8>, BackendError> {
    match name.len() {
        0..=MAX_NAME_BYTES => Ok(name.as_bytes().to_vec()),
        _ => Err(BackendError::new(libc::ENAMETOOLONG, "name too long")),
    }
}

fn rename_mode(flags: RenameFlags, req: &Request) -> Result<RenameMode, BackendError> {
    let no_replace = flags.contains(RenameFlags::RENAME_NOREPLACE);
    let exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
    let whiteout = flags.contains(RenameFlags::RENAME_WHITEOUT);
    match (exchange, whiteout, no_replace) {
        (false, false, false) => Ok(RenameMode::Replace),
        (false, false, true) => Ok(RenameMode::NoReplace),
        (true, false, false) => Ok(RenameMode::Exchange),
        (false, true, no_replace) => Ok(RenameMode::Whiteout {
            no_replace,
            uid: req.uid(),
            gid: req.gid(),
        }),
        _ => Err(BackendError::new(
            libc::EINVAL,
            "flags that exclude each other",
        )),
    }
}

fn allocation(mode: i32) -> Result<Allocation, BackendError> {
    let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        0 => Ok(Allocation::Allocate { keep_size }),
        libc::FALLOC_FL_PUNCH_HOLE if keep_size => Ok(Allocation::Punch),
        libc::FALLOC_FL_ZERO_RANGE => Ok(Allocation::Zero { keep_size }),
        _ => Err(BackendError::new(libc::EOPNOTSUPP, "this fallocate")),
    }
}

/// Numbers of devices as the kernel's `new_encode_dev` has them.
fn device_of(rdev: u32) -> Content<'static> {
    Content::Device {
        major: rdev >> 8 & 0xfff,
        minor: rdev & 0xff | rdev >> 12 & 0xf_ff00,
    }
}

impl Adapter {
    pub(super) fn new(files: Arc<Files>, options: MountOptions, runtime: Handle) -> Self {
        let stats = Arc::new(Stats::default());
        Self {
            files,
            options,
            answers: Answerer::new(runtime, stats.clone()),
            stats,
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
        _flags: i32,
        reply: ReplyCreate,
    ) {
        let (parent, name, owner) = (NodeId::of(parent.0), name_of(name), (req.uid(), req.gid()));
        let mode = mode & !libc::S_IFMT | libc::S_IFREG;
        let work = async move |files: Arc<Files>| {
            make(&files, parent, &name?, (mode, umask), owner, &Made::Nothing).await
        };
        let how = self.open_flags();
        self.run(
            Op::Create,
            reply,
            work,
            move |reply: ReplyCreate, found: Found| {
                let attr = file_attr(&found, found.id.number());
                let generation = Generation(u64::from(found.attr.generation));
                reply.created(&FOR_EVER, &attr, generation, FileHandle(0), how);
            },
        );
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
            (NodeId::Frozen(..) | NodeId::Snapshots, true) => reply.error(Errno::EROFS),
            _ => reply.opened(FileHandle(0), self.open_flags()),
        }
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
        let send = |mut reply: ReplyDirectory, lines: Vec<Line>| {
            for line in lines {
                let name = OsStr::from_bytes(&line.name);
                let ino = INodeNo(line.id.shown());
                if reply.add(ino, line.next, file_type(line.kind), name) {
                    break;
                }
            }
            reply.ok();
        };
        self.run(Op::ReadDir, reply, work, send);
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
        if self.options.writeback && !self.files.is_read_only() {
            // The kernel does not write its dirty pages first, so what is data is not known here. With
            // this answer it takes all of a file for data, from now on without asking.
            return reply.error(Errno::ENOSYS);
        }
        let sought = match whence {
            libc::SEEK_DATA => Sought::Data,
            libc::SEEK_HOLE => Sought::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(from) = u64::try_from(offset) else {
            return reply.error(Errno::ENXIO);
        };
        let id = NodeId::of(ino.0);
        let work = async move |files: Arc<Files>| files.seek(id, from, sought).await;
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
        let mode = match flags {
            libc::XATTR_CREATE => SetMode::Create,
            libc::XATTR_REPLACE => SetMode::Replace,
            _ => SetMode::Any,
        };
        let (id, name, value) = (NodeId::of(ino.0), name.as_bytes().to_vec(), value.to_vec());
        let work = async move |files: Arc<Files>| files.set_xattr(id, &name, &value, mode).await;
        self.run(Op::SetXattr, reply, work, |reply, ()| reply.ok());
    }

    fn removexattr(&self, _req: &Request, ino: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (id, name) = (NodeId::of(ino.0), name.as_bytes().to_vec());
        let work = async move |files: Arc<Files>| files.remove_xattr(id, &name).await;
        self.run(Op::RemoveXattr, reply, work, |reply, ()| reply.ok());
    }

    /// chattr(1), of which immutable and append-only are root's to set; and growth, for root and who mounted it.
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
            (GROW, _) if id == NodeId::ROOT && uid != 0 && uid != self.owner => {
                reply.error(Errno::EPERM);
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

fn attr(reply: ReplyAttr, found: &Found) {
    reply.attr(&attr_ttl(found), &file_attr(found, found.id.shown()));
}

/// Adds a line with the attributes of its file; whether it no longer fits. A file that cannot be read
/// has the number 0, with which its name is shown all the same.
fn add_plus(
    reply: &mut ReplyDirectoryPlus,
    line: &Line,
    found: Option<&Found>,
    files: &Files,
) -> bool {
    let itself = matches!(line.name.as_slice(), b"." | b"..");
    let (attr, generation) = match found {
        Some(found) if itself => (file_attr(found, found.id.shown()), 0),
        Some(found) => (file_attr(found, found.id.number()), found.attr.generation),
        None => (unknown(line.kind), 0),
    };
    let (name, ttl) = (OsStr::from_bytes(&line.name), ttl(line.id));
    let generation = Generation(u64::from(generation));
    let full = reply.add(attr.ino, line.next, name, &ttl, &attr, generation);
    if !full && !itself && found.is_some() {
        files.learn(line.id);
    }
    full
}
