//! What the kernel still knows of the mounted filesystem: files without a name live as long as that, and data
//! that was not sent may be in its cache as long as a file is open for writing.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};

const SHARDS: usize = 16;

/// Files without a name that the kernel knows, and those that it has just forgotten.
#[derive(Default)]
struct Shard {
    /// Lookups that were answered and not taken back.
    lookups: HashMap<u32, u64>,
    orphans: HashSet<u32>,
    /// How often a file is open for writing.
    writers: HashMap<u32, u64>,
}

/// Counts of lookups, by inode.
#[derive(Default)]
pub struct References {
    shards: [Mutex<Shard>; SHARDS],
}

impl References {
    /// A panic elsewhere leaves the maps whole: every change of them is a single call.
    fn shard(&self, inode: u32) -> MutexGuard<'_, Shard> {
        let shard = &self.shards[inode as usize % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The kernel learns of `inode` once more.
    pub fn looked_up(&self, inode: u32) {
        *self.shard(inode).lookups.entry(inode).or_insert(0) += 1;
    }

    /// `inode` has lost its last name; whether it can be freed at once.
    #[must_use]
    pub fn orphaned(&self, inode: u32) -> bool {
        let mut shard = self.shard(inode);
        let known = shard.lookups.contains_key(&inode);
        if known {
            shard.orphans.insert(inode);
        }
        !known
    }

    /// The kernel takes `lookups` back; whether `inode` is to be freed now.
    #[must_use]
    pub fn forgotten(&self, inode: u32, lookups: u64) -> bool {
        let mut shard = self.shard(inode);
        let Some(count) = shard.lookups.get_mut(&inode) else {
            return false;
        };
        *count = count.saturating_sub(lookups);
        if *count > 0 {
            return false;
        }
        shard.lookups.remove(&inode);
        shard.writers.remove(&inode);
        shard.orphans.remove(&inode)
    }

    /// `inode` is opened for writing once more.
    pub fn opened_for_writing(&self, inode: u32) {
        *self.shard(inode).writers.entry(inode).or_insert(0) += 1;
    }

    /// Who opened `inode` for writing has closed it.
    pub fn closed_by_writer(&self, inode: u32) {
        let mut shard = self.shard(inode);
        if let Some(count) = shard.writers.get_mut(&inode) {
            *count -= 1;
            if *count == 0 {
                shard.writers.remove(&inode);
            }
        }
    }

    /// Whether the kernel may hold data of `inode` that it has not written.
    #[must_use]
    pub fn has_writers(&self, inode: u32) -> bool {
        self.shard(inode).writers.contains_key(&inode)
    }

    /// All files without a name, which nobody can use any more: it is unmounted.
    #[must_use]
    pub fn take_orphans(&self) -> Vec<u32> {
        let shards = self.shards.iter();
        let orphans = shards.flat_map(|shard| {
            let mut shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut shard.orphans)
        });
        orphans.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_without_a_name_goes_with_its_last_lookup() {
        let references = References::default();
        references.looked_up(12);
        references.looked_up(12);
        assert!(!references.orphaned(12));
        assert!(!references.forgotten(12, 1));
        assert!(references.forgotten(12, 1));
        assert!(!references.forgotten(12, 1), "once");
        assert!(references.orphaned(13), "the kernel does not know it");
    }

    #[test]
    fn a_file_has_writers_until_the_last_one_closes_it() {
        let references = References::default();
        assert!(!references.has_writers(12));
        references.looked_up(12);
        references.opened_for_writing(12);
        references.opened_for_writing(12);
        references.closed_by_writer(12);
        assert!(references.has_writers(12) && !references.has_writers(28));
        references.closed_by_writer(12);
        assert!(!references.has_writers(12));
        references.closed_by_writer(12);
        references.opened_for_writing(12);
        assert!(!references.forgotten(12, 1));
        assert!(!references.has_writers(12), "the kernel knows it no more");
    }

    #[test]
    fn a_file_with_a_name_is_only_forgotten() {
        let references = References::default();
        references.looked_up(12);
        assert!(!references.forgotten(12, 5));
        assert!(references.take_orphans().is_empty());
        references.looked_up(28);
        assert!(!references.orphaned(28));
        assert_eq!(references.take_orphans(), [28]);
        assert!(!references.forgotten(28, 1));
    }
}
