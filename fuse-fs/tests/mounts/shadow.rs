//! Trees as everything that a user can see of them, to be compared: ours with the kernel's.

use rustix::fs::{SeekFrom, seek};
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// What is seen of one file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Mode, links, uid, gid, device, size, blocks.
    pub(crate) stat: [u64; 7],
    /// Modification and change, with nanoseconds.
    pub(crate) times: [i64; 4],
    pub(crate) inode: u64,
    /// CRC of the bytes, or the target of a link.
    pub(crate) content: Vec<u8>,
    pub(crate) xattrs: BTreeMap<String, Vec<u8>>,
    /// Where data begins and ends.
    pub(crate) data: Vec<(u64, u64)>,
}

/// Everything below `root`, by path; `root` itself is ".".
pub(crate) fn tree(root: &Path) -> BTreeMap<String, Seen> {
    let mut found = BTreeMap::new();
    let mut pending = vec![root.to_owned()];
    while let Some(path) = pending.pop() {
        let name = path.strip_prefix(root).unwrap().display().to_string();
        let metadata =
            fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        if metadata.is_dir() {
            let entries = fs::read_dir(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
            for entry in entries {
                let entry = entry.unwrap();
                let same = entry.file_type().unwrap();
                let metadata = entry.metadata().unwrap();
                assert_eq!(same.is_fifo(), metadata.file_type().is_fifo(), "{name}");
                assert_eq!(same.is_dir(), metadata.is_dir(), "{name}");
                pending.push(entry.path());
            }
        }
        found.insert(name, seen(&path, &metadata));
    }
    found
}

fn seen(path: &Path, metadata: &fs::Metadata) -> Seen {
    let kind = metadata.file_type();
    // Before the bytes are read: the kernel takes what it has in its cache for data.
    let data = if kind.is_file() {
        data(path)
    } else {
        Vec::new()
    };
    let content = if kind.is_symlink() {
        fs::read_link(path)
            .unwrap()
            .into_os_string()
            .into_encoded_bytes()
    } else if kind.is_file() {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(bytes.len() as u64, metadata.len(), "{}", path.display());
        crc32c::crc32c(&bytes).to_le_bytes().to_vec()
    } else {
        Vec::new()
    };
    // Of a directory, how many blocks it has is not a promise.
    let (size, blocks) = if kind.is_dir() {
        (0, 0)
    } else {
        (metadata.len(), metadata.blocks())
    };
    Seen {
        stat: [
            u64::from(metadata.mode()),
            metadata.nlink(),
            u64::from(metadata.uid()),
            u64::from(metadata.gid()),
            metadata.rdev(),
            size,
            blocks,
        ],
        times: [
            metadata.mtime(),
            metadata.mtime_nsec(),
            metadata.ctime(),
            metadata.ctime_nsec(),
        ],
        inode: metadata.ino(),
        content,
        xattrs: xattrs(path),
        data,
    }
}

fn data(path: &Path) -> Vec<(u64, u64)> {
    let file = fs::File::open(path).unwrap();
    let (mut at, mut found) = (0, Vec::new());
    while let Ok(start) = seek(&file, SeekFrom::Data(at)) {
        at = seek(&file, SeekFrom::Hole(start)).unwrap();
        found.push((start, at));
    }
    found
}

/// The tree without what two filesystems may choose differently: numbers, times of change, where data
/// is, and how many blocks that takes.
pub(crate) fn comparable(tree: BTreeMap<String, Seen>) -> BTreeMap<String, Seen> {
    let mut tree = without_space(tree);
    for seen in tree.values_mut() {
        (seen.inode, seen.times) = (0, [0; 4]);
    }
    tree
}

/// The tree without what of a file is known only when its data has left memory: where data is, and how
/// many blocks that takes.
pub(crate) fn without_space(mut tree: BTreeMap<String, Seen>) -> BTreeMap<String, Seen> {
    for seen in tree.values_mut() {
        seen.stat[6] = 0;
        seen.data.clear();
    }
    tree
}

/// The first files that differ, as text.
pub(crate) fn difference(
    ours: &BTreeMap<String, Seen>,
    theirs: &BTreeMap<String, Seen>,
) -> Option<String> {
    let names = ours.keys().chain(theirs.keys());
    let differ = names.filter(|name| ours.get(*name) != theirs.get(*name));
    let lines: Vec<String> = differ
        .take(5)
        .map(|name| format!("{name}:\n  {:?}\n  {:?}", ours.get(name), theirs.get(name)))
        .collect();
    (!lines.is_empty()).then(|| lines.join("\n"))
}
fn xattrs(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    let names = names[..length]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty());
    names
        .map(|name| {
            let name = String::from_utf8(name.to_vec()).unwrap();
            let mut value = vec![0; 1 << 16];
            let length = rustix::fs::lgetxattr(path, &name, &mut value).unwrap();
            value.truncate(length);
            (name, value)
        })
        .collect()
}
