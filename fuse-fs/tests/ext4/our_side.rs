//! Operations and trees through our own ext4.

use crate::kernel_side::{Facts, Tree, set_time};
use crate::operations::{How, Operation};
use crate::write::options;
use fuse_fs::ext4::device::FileDevice;
use fuse_fs::ext4::error::{FsError, Refusal};
use fuse_fs::ext4::filesystem::{Filesystem, Options};
use fuse_fs::ext4::inode::{Kind, ROOT};
use fuse_fs::ext4::inode_cell::InodeCell;
use fuse_fs::ext4::namespace::{AttributeChange, Content, NewNode, NewTime, RenameMode, SetMode};
use fuse_fs::ext4::time::Timestamp;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Names that one listing is asked for: few, so that cookies are used.
const LIST_LIMIT: usize = 7;

/// Mounts as programs do: with commits in the background.
pub(crate) async fn open(image: &Path) -> Filesystem {
    open_damaged(image).await.unwrap()
}

/// As [`open`], where anything may go wrong.
pub(crate) async fn open_damaged(image: &Path) -> Result<Filesystem, FsError> {
    let device = FileDevice::open(image, true).unwrap();
    let options = Options {
        commit_interval: Duration::from_millis(200),
        cache_bytes: 256 << 20,
        ..options()
    };
    Filesystem::open(Arc::new(device), options).await
}

/// A plain new file of root's.
pub(crate) fn node(mode: u32, content: Content<'_>) -> NewNode<'_> {
    NewNode {
        mode: mode as u16,
        umask: 0,
        uid: 0,
        gid: 0,
        content,
    }
}

/// The inode at `path`.
pub(crate) async fn resolve(fs: &Filesystem, path: &str) -> Result<Arc<InodeCell>, FsError> {
    let mut cell = fs.inode(ROOT).await?;
    for name in path.split('/').filter(|name| !name.is_empty()) {
        cell = fs
            .lookup_name(follow(fs, cell).await?.as_ref(), name.as_bytes())
            .await?;
    }
    Ok(cell)
}

/// A symbolic link on the way is followed: those of the tests lead to nothing, or are too long for a name.
async fn follow(fs: &Filesystem, cell: Arc<InodeCell>) -> Result<Arc<InodeCell>, FsError> {
    let kind = cell.read().await.raw.kind();
    match kind {
        Some(Kind::Symlink) => {}
        Some(Kind::Directory) => return Ok(cell),
        _ => return Err(Refusal::NotDirectory.into()),
    }
    match fs.read_link(&cell).await?.len() {
        0..256 => Err(Refusal::NotFound.into()),
        _ => Err(Refusal::NameTooLong.into()),
    }
}

/// The directory of `path`, and the last name.
async fn parent<'p>(fs: &Filesystem, path: &'p str) -> Result<(Arc<InodeCell>, &'p [u8]), FsError> {
    let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
    let cell = follow(fs, resolve(fs, directory).await?).await?;
    Ok((cell, name.as_bytes()))
}

/// Carries out `operation`; the errno that a program would see.
pub(crate) async fn apply(fs: &Filesystem, operation: &Operation) -> Result<(), i32> {
    let done = try_apply(fs, operation).await;
    done.map_err(|error| match error {
        FsError::Refused(_) | FsError::NoSpace => error.errno(),
        other => panic!("{operation:?}: {other}"),
    })
}

/// As [`apply`], where anything may go wrong.
pub(crate) async fn try_apply(fs: &Filesystem, operation: &Operation) -> Result<(), FsError> {
    match operation {
        Operation::Rename { path, new, how } => rename(fs, path, new, *how).await,
        Operation::Make { .. } | Operation::Device { .. } | Operation::Symlink { .. } => {
            create(fs, operation).await
        }
        Operation::Link { path, new } => link(fs, path, new).await,
        Operation::Unlink { path } => remove(fs, path, false).await,
        Operation::RemoveDirectory { path } => remove(fs, path, true).await,
        _ => change(fs, operation).await,
    }
}

async fn create(fs: &Filesystem, operation: &Operation) -> Result<(), FsError> {
    let (path, node) = match operation {
        Operation::Make { path, mode } if mode & libc::S_IFMT == libc::S_IFDIR => {
            (path, node(mode & (libc::S_IFMT | 0o1777), Content::Nothing))
        }
        Operation::Make { path, mode } => (path, node(*mode, Content::Nothing)),
        Operation::Device {
            path,
            mode,
            major,
            minor,
        } => {
            let (major, minor) = (*major, *minor);
            (path, node(*mode, Content::Device { major, minor }))
        }
        Operation::Symlink { path, target } => (
            path,
            node(libc::S_IFLNK | 0o777, Content::Target(target.as_bytes())),
        ),
        _ => unreachable!("not a creation"),
    };
    let (directory, name) = parent(fs, path).await?;
    fs.create(&directory, name, &node).await.map(drop)
}

async fn link(fs: &Filesystem, path: &str, new: &str) -> Result<(), FsError> {
    let file = resolve(fs, path).await?;
    let (directory, name) = parent(fs, new).await?;
    // The kernel looks at the new name first.
    match fs.lookup_name(&directory, name).await {
        Ok(_) => Err(Refusal::Exists.into()),
        Err(FsError::Refused(Refusal::NotFound)) => fs.link(&file, &directory, name).await,
        Err(error) => Err(error),
    }
}

async fn remove(fs: &Filesystem, path: &str, directory: bool) -> Result<(), FsError> {
    let (parent, name) = parent(fs, path).await?;
    let gone = match directory {
        true => fs.remove_directory(&parent, name).await?,
        false => fs.unlink(&parent, name).await?,
    };
    release(fs, &gone).await
}

/// Nobody has it open: without names it goes.
pub(crate) async fn release(fs: &Filesystem, gone: &Arc<InodeCell>) -> Result<(), FsError> {
    let links = gone.read().await.raw.links();
    match links {
        0 => fs.free_orphan(gone).await,
        _ => Ok(()),
    }
}

async fn rename(fs: &Filesystem, path: &str, new: &str, how: How) -> Result<(), FsError> {
    let (from, name) = parent(fs, path).await?;
    let (to, new_name) = parent(fs, new).await?;
    // The kernel looks at the old name before it judges the new one.
    fs.lookup_name(&from, name).await?;
    let (uid, gid) = (0, 0);
    let mode = match how {
        How::Replace => RenameMode::Replace,
        How::NoReplace => RenameMode::NoReplace,
        How::Exchange => RenameMode::Exchange,
        How::Whiteout => RenameMode::Whiteout {
            no_replace: false,
            uid,
            gid,
        },
    };
    match fs.rename(&from, name, &to, new_name, mode).await? {
        Some(gone) => release(fs, &gone).await,
        None => Ok(()),
    }
}

async fn change(fs: &Filesystem, operation: &Operation) -> Result<(), FsError> {
    let time = |(seconds, nanos): (i64, u32)| Some(NewTime::At(Timestamp { seconds, nanos }));
    match operation {
        Operation::Mode { path, mode } => {
            let cell = resolve(fs, path).await?;
            if cell.read().await.raw.kind() == Some(Kind::Symlink) {
                return Err(Refusal::Unsupported.into());
            }
            let mode = Some(*mode as u16);
            fs.set_attributes(
                &cell,
                &AttributeChange {
                    mode,
                    ..Default::default()
                },
            )
            .await
        }
        Operation::Owner { path, uid, gid } => {
            let (uid, gid) = (Some(*uid), Some(*gid));
            let change = AttributeChange {
                uid,
                gid,
                ..Default::default()
            };
            fs.set_attributes(resolve(fs, path).await?.as_ref(), &change)
                .await
        }
        Operation::Times { path, atime, mtime } => {
            let (atime, mtime) = (time(*atime), time(*mtime));
            let change = AttributeChange {
                atime,
                mtime,
                ..Default::default()
            };
            fs.set_attributes(resolve(fs, path).await?.as_ref(), &change)
                .await
        }
        Operation::SetXattr {
            path,
            name,
            value,
            flags,
        } => {
            let mode = [SetMode::Any, SetMode::Create, SetMode::Replace][*flags as usize];
            let cell = resolve(fs, path).await?;
            check_class(&cell, name).await?;
            fs.set_xattr(&cell, name.as_bytes(), value, mode).await
        }
        Operation::RemoveXattr { path, name } => {
            let cell = resolve(fs, path).await?;
            check_class(&cell, name).await?;
            fs.remove_xattr(&cell, name.as_bytes()).await
        }
        Operation::Flags { path, flags } => {
            let cell = resolve(fs, path).await?;
            let kept = fs.flags(&cell).await & !0xf0;
            fs.set_flags(&cell, kept | flags).await
        }
        _ => unreachable!("not a change of attributes"),
    }
}

/// The kernel gives attributes of users to files and directories only, whatever the filesystem.
async fn check_class(cell: &InodeCell, name: &str) -> Result<(), FsError> {
    let kind = cell.read().await.raw.kind();
    let plain = matches!(kind, Some(Kind::Regular | Kind::Directory));
    match name.starts_with("user.") && !plain {
        true => Err(Refusal::NotPermitted.into()),
        false => Ok(()),
    }
}

/// The names of a directory, listed a few at a time.
pub(crate) async fn names(fs: &Filesystem, directory: &InodeCell) -> Vec<(String, u32)> {
    let (mut cookie, mut names) = (0, Vec::new());
    loop {
        let listed = fs.list(directory, cookie, LIST_LIMIT).await.unwrap();
        let Some(last) = listed.last() else {
            return names;
        };
        cookie = last.cookie;
        let named = listed
            .into_iter()
            .filter(|one| one.name != b"." && one.name != b"..");
        names.extend(named.map(|one| (String::from_utf8(one.name).unwrap(), one.inode)));
    }
}

/// Everything below the root.
pub(crate) async fn tree(fs: &Filesystem) -> Tree {
    let (mut tree, mut first_names) = (Tree::new(), BTreeMap::new());
    let mut pending = vec![String::new()];
    let mut paths = Vec::new();
    while let Some(directory) = pending.pop() {
        let cell = resolve(fs, &directory).await.unwrap();
        for (name, inode) in names(fs, &cell).await {
            let path = if directory.is_empty() {
                name
            } else {
                format!("{directory}/{name}")
            };
            let cell = resolve(fs, &path).await.unwrap();
            assert_eq!(cell.number(), inode, "{path}");
            if cell.read().await.raw.is_directory() {
                pending.push(path.clone());
            }
            paths.push(path);
        }
    }
    paths.sort();
    for path in paths {
        let facts = facts(fs, &path, &mut first_names).await;
        tree.insert(path, facts);
    }
    tree
}

async fn facts(fs: &Filesystem, path: &str, first_names: &mut BTreeMap<u32, String>) -> Facts {
    let cell = resolve(fs, path).await.unwrap();
    let mut xattrs = BTreeMap::new();
    for name in fs.xattr_names(&cell).await.unwrap() {
        let value = fs.xattr(&cell, &name).await.unwrap();
        xattrs.insert(name, value);
    }
    let target = match cell.read().await.raw.kind() {
        Some(Kind::Symlink) => fs.read_link(&cell).await.unwrap(),
        _ => Vec::new(),
    };
    let state = cell.read().await;
    let raw = &state.raw;
    let special = matches!(raw.kind(), Some(Kind::CharDevice | Kind::BlockDevice));
    let plain = matches!(raw.kind(), Some(Kind::Regular | Kind::Directory));
    Facts {
        mode: u32::from(raw.mode()),
        owner: (raw.uid(), raw.gid()),
        links: u64::from(raw.links()),
        device: if special { raw.device() } else { (0, 0) },
        target,
        xattrs,
        first_name: first_names
            .entry(cell.number())
            .or_insert_with(|| path.to_owned())
            .clone(),
        flags: if plain { raw.flags() & 0xf0 } else { 0 },
        mtime: set_time((raw.mtime().seconds, raw.mtime().nanos)),
    }
}
