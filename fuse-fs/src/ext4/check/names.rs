//! That each directory hangs on the root, and each inode has as many names as it says.

use super::{Checker, Parents};
use crate::ext4::error::Place;
use crate::ext4::features::ro_compat;
use crate::ext4::inode::{self, Kind};
use std::collections::HashSet;

/// Beyond this a directory says that it has one link (dir_nlink).
const MAX_LINKS: u32 = 65_000;

impl Checker<'_> {
    pub(super) fn check_names(&self) {
        self.check_root();
        self.check_tree();
        self.check_links();
    }

    fn check_root(&self) {
        let root = Place::Inode(inode::ROOT);
        if self.inodes.borrow().get(inode::ROOT).kind != Some(Kind::Directory) {
            self.find(root, "the root is not a directory");
        }
        let dotdot = self
            .parents
            .borrow()
            .get(&inode::ROOT)
            .map_or(0, |parents| parents.dotdot);
        if dotdot != inode::ROOT {
            self.find(root, format!("\"..\" of the root leads to inode {dotdot}"));
        }
    }

    fn check_tree(&self) {
        let mut connected = HashSet::from([inode::ROOT]);
        let parents = self.parents.borrow();
        let mut directories: Vec<u32> = self.directory_numbers();
        directories.retain(|number| *number != inode::ROOT);
        for number in directories {
            let known = parents.get(&number).copied().unwrap_or_default();
            if known.named_in == 0 {
                self.find(Place::Inode(number), "a directory without a name");
            } else if !known.agree() {
                let Parents { named_in, dotdot } = known;
                self.find(
                    Place::Inode(number),
                    format!("\"..\" leads to inode {dotdot}, but inode {named_in} names it"),
                );
            }
            self.climb(number, &mut connected);
        }
    }

    fn directory_numbers(&self) -> Vec<u32> {
        let inodes = self.inodes.borrow();
        let named = inodes
            .used()
            .filter(|(_, slot)| slot.kind == Some(Kind::Directory) && !slot.nameless);
        named.map(|(number, _)| number).collect()
    }

    /// Follows the names upwards until something known; a circle is found once.
    fn climb(&self, from: u32, connected: &mut HashSet<u32>) {
        let parents = self.parents.borrow();
        let (mut path, mut number) = (Vec::new(), from);
        while number != 0 && connected.insert(number) {
            path.push(number);
            number = parents.get(&number).map_or(0, |parents| parents.named_in);
        }
        if path.contains(&number) {
            self.find(Place::Inode(number), "a directory that is below itself");
        }
    }

    fn check_links(&self) {
        let many = self
            .image
            .superblock
            .features
            .has_ro_compat(ro_compat::DIR_NLINK);
        for (number, slot) in self
            .inodes
            .borrow()
            .used()
            .filter(|(_, slot)| !slot.nameless)
        {
            let place = Place::Inode(number);
            let directory = slot.kind == Some(Kind::Directory);
            let says = u32::from(slot.links);
            if slot.names == 0 {
                self.find(place, "it is in use and has no name");
            } else if directory && many && says == 1 {
                if slot.names <= MAX_LINKS {
                    self.note(format!(
                        "directory {number} has {} links and does not count them",
                        slot.names
                    ));
                }
            } else if says != slot.names {
                self.find(
                    place,
                    format!("it says that it has {says} links, it has {}", slot.names),
                );
            }
        }
    }
}
