//! What is known of each inode while a check runs.

use crate::ext4::inode::Kind;
use crate::ext4::superblock::Superblock;

/// One inode. Free ones have no kind and are not system ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Slot {
    pub(super) kind: Option<Kind>,
    /// In use, even if nothing is known of its kind.
    pub(super) used: bool,
    /// Not reached by names: reserved ones, and files deleted while open.
    pub(super) nameless: bool,
    pub(super) links: u16,
    /// Names that were found.
    pub(super) names: u32,
}

/// The inodes of all groups, as far as the groups have used them.
pub(super) struct InodeTable {
    per_group: u32,
    groups: Vec<Vec<Slot>>,
}

impl InodeTable {
    /// All are free.
    #[must_use]
    pub(super) fn new(superblock: &Superblock) -> Self {
        Self {
            per_group: superblock.inodes_per_group,
            groups: vec![Vec::new(); superblock.groups_count() as usize],
        }
    }

    /// Makes room for `count` inodes of `group`; those behind stay free.
    pub(super) fn open_group(&mut self, group: u32, count: u32) {
        self.groups[group as usize].resize(count as usize, Slot::default());
    }

    /// The slot of `inode`; `None` if there is no such inode or it was never used.
    pub(super) fn get_mut(&mut self, inode: u32) -> Option<&mut Slot> {
        let index = inode.checked_sub(1)?;
        let group = self.groups.get_mut((index / self.per_group) as usize)?;
        group.get_mut((index % self.per_group) as usize)
    }

    /// The slot of `inode`, free if it was never used.
    #[must_use]
    pub(super) fn get(&self, inode: u32) -> Slot {
        let index = inode.saturating_sub(1);
        let group = self.groups.get((index / self.per_group) as usize);
        let slot = group.and_then(|group| group.get((index % self.per_group) as usize));
        slot.copied().unwrap_or_default()
    }

    /// The slots of a group, from its first inode on.
    #[must_use]
    pub(super) fn group(&self, group: u32) -> &[Slot] {
        &self.groups[group as usize]
    }

    /// All inodes in use, by number.
    pub(super) fn used(&self) -> impl Iterator<Item = (u32, Slot)> + '_ {
        let per_group = self.per_group;
        let groups = (0..).zip(&self.groups);
        let slots = groups
            .flat_map(move |(group, slots)| (group * per_group + 1..).zip(slots.iter().copied()));
        slots.filter(|(_, slot)| slot.used)
    }
}
