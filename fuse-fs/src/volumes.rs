//! The tree of the view as pure data: `/volumes/NAME` and `/snapshots/NAME@SNAP`.
//!
//! Inode numbers follow from the ids of volume and snapshot, so that a volume keeps its number
//! over a rename, over remounts and on every host, and a volume that is deleted and created again
//! under its old name is another file.

use crate::backend::{Listing, TargetInfo, TargetName};
use std::collections::HashMap;

pub const ROOT_INO: u64 = 1;
pub const VOLUMES_INO: u64 = 2;
pub const SNAPSHOTS_INO: u64 = 3;
/// Volume ids are shifted by this, so that they never meet the numbers of the directories.
const FIRST_FILE_INO: u64 = 16;
/// Bits of an inode number below the snapshot id.
const VOLUME_BITS: u32 = 32;

pub const VOLUMES_NAME: &str = "volumes";
pub const SNAPSHOTS_NAME: &str = "snapshots";
const XATTR_PREFIX: &str = "user.blockd.";

/// A directory of the tree, by inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Directory {
    Root,
    Of(Listing),
}

impl Directory {
    /// The directory with this inode number, if it is one.
    #[must_use]
    pub fn of_ino(ino: u64) -> Option<Self> {
        match ino {
            ROOT_INO => Some(Self::Root),
            VOLUMES_INO => Some(Self::Of(Listing::Volumes)),
            SNAPSHOTS_INO => Some(Self::Of(Listing::Snapshots)),
            _ => None,
        }
    }

    /// What a name in this directory stands for; `None` if it cannot be there.
    #[must_use]
    pub fn child(self, name: &str) -> Option<Child> {
        match self {
            Self::Root => match name {
                VOLUMES_NAME => Some(Child::Directory(VOLUMES_INO)),
                SNAPSHOTS_NAME => Some(Child::Directory(SNAPSHOTS_INO)),
                _ => None,
            },
            Self::Of(listing) => TargetName::parse(name)
                .filter(|target| target.snapshot.is_some() == (listing == Listing::Snapshots))
                .map(Child::Target),
        }
    }
}

/// What a name stands for, before anybody asked whether it exists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Child {
    Directory(u64),
    Target(TargetName),
}

/// Inode number of a volume or snapshot; `None` if the volume's id is too large to have one.
#[must_use]
pub fn ino_of(info: &TargetInfo) -> Option<u64> {
    let volume = info.volume_id.0.checked_add(FIRST_FILE_INO)?;
    let snapshot = u64::from(info.snapshot_id.map_or(0, |id| id.0));
    (volume >> VOLUME_BITS == 0).then_some(snapshot << VOLUME_BITS | volume)
}

/// One line of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    pub ino: u64,
    pub directory: bool,
    pub name: String,
}

impl DirEntry {
    fn directory(ino: u64, name: &str) -> Self {
        let name = name.to_owned();
        Self {
            ino,
            directory: true,
            name,
        }
    }
}

/// The lines of a directory with `targets` in it; the root ignores them.
#[must_use]
pub fn entries(directory: Directory, targets: &[TargetInfo]) -> Vec<DirEntry> {
    let own = match directory {
        Directory::Root => ROOT_INO,
        Directory::Of(Listing::Volumes) => VOLUMES_INO,
        Directory::Of(Listing::Snapshots) => SNAPSHOTS_INO,
    };
    let mut lines = vec![
        DirEntry::directory(own, "."),
        DirEntry::directory(ROOT_INO, ".."),
    ];
    match directory {
        Directory::Root => {
            lines.push(DirEntry::directory(VOLUMES_INO, VOLUMES_NAME));
            lines.push(DirEntry::directory(SNAPSHOTS_INO, SNAPSHOTS_NAME));
        }
        Directory::Of(_) => lines.extend(targets.iter().filter_map(file_entry)),
    }
    lines
}

fn file_entry(info: &TargetInfo) -> Option<DirEntry> {
    let name = info.name.to_string();
    TargetName::parse(&name)?;
    let ino = ino_of(info)?;
    Some(DirEntry {
        ino,
        directory: false,
        name,
    })
}

/// The extended attributes of a file, name and value, in the order they are listed.
#[must_use]
pub fn xattrs(info: &TargetInfo) -> Vec<(String, String)> {
    let mut pairs = vec![
        ("id", info.volume_id.to_string()),
        ("size", info.size_bytes.to_string()),
        ("epoch", info.epoch.to_string()),
        ("volume", info.name.volume.clone()),
    ];
    if let Some(id) = info.snapshot_id {
        pairs.push(("snapshot_id", id.to_string()));
    }
    if let Some(allocated_bytes) = info.allocated_bytes {
        pairs.push(("allocated", allocated_bytes.to_string()));
    }
    let named = |(name, value)| (format!("{XATTR_PREFIX}{name}"), value);
    pairs.into_iter().map(named).collect()
}

/// The files that the kernel knows by number, each with its last known state.
#[derive(Debug, Default)]
pub struct KnownFiles {
    files: HashMap<u64, KnownFile>,
}

#[derive(Debug)]
struct KnownFile {
    info: TargetInfo,
    /// How often a lookup answered with it; `forget` counts down.
    lookups: u64,
}

impl KnownFiles {
    /// Counts a lookup of `info`, which has the number `ino`.
    pub fn looked_up(&mut self, ino: u64, info: &TargetInfo) {
        let new = || KnownFile {
            info: info.clone(),
            lookups: 0,
        };
        let file = self.files.entry(ino).or_insert_with(new);
        file.info.clone_from(info);
        file.lookups += 1;
    }

    /// Takes back `lookups` lookups; a file without any is forgotten.
    pub fn forget(&mut self, ino: u64, lookups: u64) {
        if let Some(file) = self.files.get_mut(&ino) {
            file.lookups = file.lookups.saturating_sub(lookups);
            if file.lookups == 0 {
                self.files.remove(&ino);
            }
        }
    }

    /// The last known state of a file.
    #[must_use]
    pub fn get(&self, ino: u64) -> Option<&TargetInfo> {
        self.files.get(&ino).map(|file| &file.info)
    }

    /// Replaces the last known state, if the file is known.
    pub fn update(&mut self, ino: u64, info: &TargetInfo) {
        if let Some(file) = self.files.get_mut(&ino) {
            file.info.clone_from(info);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockd::id::{Epoch, SnapshotId, VolumeId};

    fn info(name: &str, volume: u64, snapshot: Option<u32>) -> TargetInfo {
        TargetInfo {
            name: TargetName::parse(name).unwrap(),
            volume_id: VolumeId(volume),
            snapshot_id: snapshot.map(SnapshotId),
            size_bytes: 4096,
            epoch: Epoch(7),
            allocated_bytes: None,
            created_unix_s: 0,
        }
    }

    #[test]
    fn inode_numbers_differ_and_miss_the_directories() {
        let volume = ino_of(&info("v", 1, None)).unwrap();
        let snapshot = ino_of(&info("v@s", 1, Some(1))).unwrap();
        assert_eq!(volume, 17);
        assert_eq!(snapshot, (1 << 32) | 17);
        assert!(Directory::of_ino(ino_of(&info("v", 0, None)).unwrap()).is_none());
        assert_eq!(ino_of(&info("v", (1 << 32) - 16, None)), None);
        assert_eq!(ino_of(&info("v", u64::MAX, None)), None);
    }

    #[test]
    fn names_belong_to_one_directory() {
        let volumes = Directory::Of(Listing::Volumes);
        let snapshots = Directory::Of(Listing::Snapshots);
        assert!(volumes.child("v").is_some() && volumes.child("v@s").is_none());
        assert!(snapshots.child("v").is_none() && snapshots.child("v@s").is_some());
        assert_eq!(
            Directory::Root.child("volumes"),
            Some(Child::Directory(VOLUMES_INO))
        );
        assert_eq!(Directory::Root.child("v"), None);
    }

    #[test]
    fn names_that_no_directory_can_hold_are_left_out() {
        let mut bad = info("v", 3, None);
        bad.name.volume = "a/b".to_owned();
        let lines = entries(Directory::Of(Listing::Volumes), &[bad, info("w", 4, None)]);
        let names: Vec<_> = lines.iter().map(|line| line.name.as_str()).collect();
        assert_eq!(names, [".", "..", "w"]);
    }

    #[test]
    fn a_file_is_known_until_it_is_forgotten_as_often_as_looked_up() {
        let mut known = KnownFiles::default();
        let v = info("v", 1, None);
        known.looked_up(17, &v);
        known.looked_up(17, &v);
        known.forget(17, 1);
        assert_eq!(known.get(17), Some(&v));
        known.forget(17, 5);
        assert_eq!(known.get(17), None);
        known.update(17, &v);
        assert_eq!(known.get(17), None, "an update does not bring it back");
    }

    #[test]
    fn xattrs_tell_id_size_epoch_and_snapshot() {
        let pairs = xattrs(&info("v@s", 1, Some(2)));
        let names: Vec<_> = pairs
            .iter()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let expected = ["id=1", "size=4096", "epoch=7", "volume=v", "snapshot_id=2"];
        assert_eq!(names, expected.map(|pair| format!("user.blockd.{pair}")));
    }
}
