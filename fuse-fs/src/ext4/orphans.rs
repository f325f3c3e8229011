//! The list of orphans: inodes that are deleted while they are open, or are being shortened.
//!
//! On disk it is a chain: the superblock names the first, each inode names in its dtime the next. A mount frees
//! what is on it. The order is kept here; inodes are put into their tables with the successor that this says.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

#[derive(Clone, Copy, Default)]
struct Links {
    previous: u32,
    next: u32,
}

#[derive(Default)]
struct List {
    first: u32,
    links: HashMap<u32, Links>,
}

/// The orphans of a mounted filesystem.
#[derive(Default)]
pub struct Orphans {
    list: Mutex<List>,
}

impl Orphans {
    fn list(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first of the chain; 0: there is none.
    #[must_use]
    pub fn first(&self) -> u32 {
        self.list().first
    }

    /// The successor of an orphan, 0 at the end; `None` if `inode` is no orphan.
    #[must_use]
    pub fn next_of(&self, inode: u32) -> Option<u32> {
        self.list().links.get(&inode).map(|links| links.next)
    }

    /// Puts `inode` first, unless it is there.
    pub fn add(&self, inode: u32) {
        let mut list = self.list();
        if list.links.contains_key(&inode) {
            return;
        }
        let next = std::mem::replace(&mut list.first, inode);
        if let Some(links) = list.links.get_mut(&next) {
            links.previous = inode;
        }
        list.links.insert(inode, Links { previous: 0, next });
    }

    /// Takes `inode` off: `None` if it is no orphan, else the orphan that names another successor now, if the
    /// superblock does not.
    #[must_use]
    pub fn remove(&self, inode: u32) -> Option<Option<u32>> {
        let mut list = self.list();
        let Links { previous, next } = list.links.remove(&inode)?;
        if let Some(links) = list.links.get_mut(&next) {
            links.previous = previous;
        }
        match list.links.get_mut(&previous) {
            Some(links) => {
                links.next = next;
                Some(Some(previous))
            }
            None => {
                list.first = next;
                Some(None)
            }
        }
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.list().links.len()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(orphans: &Orphans) -> Vec<u32> {
        let next = |at: &u32| orphans.next_of(*at).filter(|next| *next != 0);
        let first = Some(orphans.first()).filter(|first| *first != 0);
        std::iter::successors(first, next).collect()
    }

    #[test]
    fn the_chain_stays_whole_wherever_one_leaves() {
        for leaving in [11, 12, 13] {
            let orphans = Orphans::default();
            [11, 12, 13, 12]
                .into_iter()
                .for_each(|inode| orphans.add(inode));
            assert_eq!(chain(&orphans), [13, 12, 11]);
            let renamed = orphans.remove(leaving);
            let expected = [13, 12, 11].into_iter().filter(|at| *at != leaving);
            assert_eq!(chain(&orphans), expected.collect::<Vec<_>>());
            let before = if leaving == 13 {
                None
            } else {
                Some(leaving + 1)
            };
            assert_eq!(renamed, Some(before));
            assert_eq!(orphans.remove(leaving), None);
        }
    }
}
