//! Operations and trees through the kernel: on a directory where its own ext4 is mounted.

use crate::operations::{How, Operation};
use rustix::fs::{self as sys, AtFlags, CWD, RenameFlags, XattrFlags};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// What can be seen of a file. Names of one inode have the same first name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) links: u64,
    pub(crate) device: (u32, u32),
    pub(crate) target: Vec<u8>,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(crate) first_name: String,
    pub(crate) flags: u32,
    /// Only where an operation set it.
    pub(crate) mtime: Option<(i64, u32)>,
}

pub(crate) type Tree = BTreeMap<String, Facts>;

/// Times from the clock are later than this and before the next one that operations set.
const CLOCK: std::ops::Range<i64> = 1_700_000_001..2_147_483_648;

pub(crate) fn set_time(time: (i64, u32)) -> Option<(i64, u32)> {
    (!CLOCK.contains(&time.0)).then_some(time)
}

/// Carries out `operation`; what the kernel answered.
pub(crate) fn apply(root: &Path, operation: &Operation) -> Result<(), i32> {
    let at = |path: &str| root.join(path);
    let done = match operation {
        Operation::Make { path, mode } if mode & libc::S_IFMT == libc::S_IFDIR => {
            // mkdir(2) ignores what is not a permission but the sticky bit.
            sys::mkdir(at(path), sys::Mode::from_raw_mode(mode & 0o1777))
        }
        Operation::Make { path, mode } => node(&at(path), *mode, 0),
        Operation::Device {
            path,
            mode,
            major,
            minor,
        } => node(&at(path), *mode, libc::makedev(*major, *minor)),
        Operation::Symlink { path, target } => sys::symlink(target.as_str(), at(path)),
        Operation::Link { path, new } => sys::link(at(path), at(new)),
        Operation::Unlink { path } => sys::unlink(at(path)),
        Operation::RemoveDirectory { path } => sys::rmdir(at(path)),
        Operation::Rename { path, new, how } => {
            let flags = match how {
                How::Replace => RenameFlags::empty(),
                How::NoReplace => RenameFlags::NOREPLACE,
                How::Exchange => RenameFlags::EXCHANGE,
                How::Whiteout => RenameFlags::WHITEOUT,
            };
            sys::renameat_with(CWD, at(path), CWD, at(new), flags)
        }
        Operation::Mode { path, mode } => not_symlink(&at(path))
            .and_then(|()| sys::chmod(at(path), sys::Mode::from_raw_mode(*mode))),
        Operation::Owner { path, uid, gid } => {
            let (uid, gid) = (sys::Uid::from_raw(*uid), sys::Gid::from_raw(*gid));
            sys::chownat(
                CWD,
                at(path),
                Some(uid),
                Some(gid),
                AtFlags::SYMLINK_NOFOLLOW,
            )
        }
        Operation::Times { path, atime, mtime } => {
            let of = |(seconds, nanos): (i64, u32)| sys::Timespec {
                tv_sec: seconds,
                tv_nsec: nanos.into(),
            };
            let times = sys::Timestamps {
                last_access: of(*atime),
                last_modification: of(*mtime),
            };
            sys::utimensat(CWD, at(path), &times, AtFlags::SYMLINK_NOFOLLOW)
        }
        Operation::SetXattr {
            path,
            name,
            value,
            flags,
        } => sys::lsetxattr(
            at(path),
            name.as_str(),
            value,
            XattrFlags::from_bits_retain(*flags),
        ),
        Operation::RemoveXattr { path, name } => sys::lremovexattr(at(path), name.as_str()),
        Operation::Flags { path, flags } => set_flags(&at(path), *flags),
    };
    done.map_err(Errno::raw_os_error)
}

fn node(path: &Path, mode: u32, device: u64) -> Result<(), Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: a path that ends with 0 and lives over the call.
    match unsafe { libc::mknod(path.as_ptr(), mode, device) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap()),
    }
}

/// chmod would follow it.
fn not_symlink(path: &Path) -> Result<(), Errno> {
    let stat = sys::lstat(path)?;
    match stat.st_mode & libc::S_IFMT {
        libc::S_IFLNK => Err(Errno::OPNOTSUPP),
        _ => Ok(()),
    }
}

fn open_plain(path: &Path) -> Result<fs::File, Errno> {
    let kind = sys::lstat(path)?.st_mode & libc::S_IFMT;
    if kind != libc::S_IFREG && kind != libc::S_IFDIR {
        return Err(Errno::OPNOTSUPP);
    }
    let opened = sys::open(
        path,
        sys::OFlags::RDONLY | sys::OFlags::NOATIME,
        sys::Mode::empty(),
    )?;
    Ok(opened.into())
}

fn set_flags(path: &Path, flags: u32) -> Result<(), Errno> {
    let file = open_plain(path)?;
    let old = sys::ioctl_getflags(&file)?;
    let settable = sys::IFlags::from_bits_retain(0xf0);
    sys::ioctl_setflags(
        &file,
        (old - settable) | sys::IFlags::from_bits_retain(flags),
    )
}

/// Everything below `root`.
pub(crate) fn tree(root: &Path) -> Tree {
    let (mut tree, mut first_names) = (Tree::new(), BTreeMap::new());
    let mut pending = vec![String::new()];
    let mut paths = Vec::new();
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(root.join(&directory)).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let path = if directory.is_empty() {
                name
            } else {
                format!("{directory}/{name}")
            };
            if entry.file_type().unwrap().is_dir() {
                pending.push(path.clone());
            }
            paths.push(path);
        }
    }
    paths.sort();
    for path in paths {
        let facts = facts(&root.join(&path), &path, &mut first_names);
        tree.insert(path, facts);
    }
    tree
}

fn facts(file: &Path, path: &str, first_names: &mut BTreeMap<u64, String>) -> Facts {
    let metadata = fs::symlink_metadata(file).unwrap();
    let kind = metadata.file_type();
    let device = match kind.is_char_device() || kind.is_block_device() {
        true => (libc::major(metadata.rdev()), libc::minor(metadata.rdev())),
        false => (0, 0),
    };
    let target = match kind.is_symlink() {
        true => fs::read_link(file).unwrap().as_os_str().as_bytes().to_vec(),
        false => Vec::new(),
    };
    let flags = open_plain(file).map_or(0, |file| sys::ioctl_getflags(&file).unwrap().bits());
    Facts {
        mode: metadata.mode(),
        owner: (metadata.uid(), metadata.gid()),
        links: metadata.nlink(),
        device,
        target,
        xattrs: xattrs(file),
        first_name: first_names
            .entry(metadata.ino())
            .or_insert_with(|| path.to_owned())
            .clone(),
        flags: flags & 0xf0,
        mtime: set_time((
            metadata.mtime(),
            u32::try_from(metadata.mtime_nsec()).unwrap(),
        )),
    }
}

fn xattrs(file: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 65536];
    let length = sys::llistxattr(file, &mut names).unwrap();
    let names = names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    let value = |name: &[u8]| {
        let mut value = vec![0; 65536];
        let length = sys::lgetxattr(file, name, &mut value).unwrap();
        value.truncate(length);
        value
    };
    names.map(|name| (name.to_vec(), value(name))).collect()
}
