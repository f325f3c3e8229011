//! How the index of a directory grows: from one block to a root and two leaves, and when a leaf was divided.
//!
//! Plans are made of what was read, before anything is allocated: a directory that is full changes nothing.

use crate::ext4::dir::{self, Entry};
use crate::ext4::htree::{self, Child, Root};
use crate::ext4::leaf::{self, Halves};

/// A node on the way from the root to a leaf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// The block of the directory; the root's is 0.
    pub block: u32,
    pub entries: Vec<Child>,
    /// The entry that the way goes through.
    pub taken: usize,
}

/// What can be in an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    pub root: usize,
    pub node: usize,
    pub max_levels: u8,
}

/// Nodes to be written for one more leaf.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Growth {
    /// Levels below the root and the root's entries, if these change.
    pub root: Option<(u8, Vec<Child>)>,
    /// Blocks, old and new ones, with their entries.
    pub nodes: Vec<(u32, Vec<Child>)>,
    /// How many of the blocks are new: the next ones behind the directory's end, in order.
    pub new_blocks: u32,
}

/// Plans to put `leaf` behind the leaf that `way`, from the root down, leads to; `next_block` is the first new one.
/// `None`: the index is full.
#[must_use]
pub fn plan(way: &[Step], leaf: Child, capacity: Capacity, next_block: u32) -> Option<Growth> {
    // The same hash a third time: no search would find the names behind.
    let behind = way
        .iter()
        .rev()
        .find_map(|step| step.entries.get(step.taken + 1));
    if behind.is_some_and(|next| next.hash <= leaf.hash) {
        return None;
    }
    let mut growth = Growth::default();
    let levels = (way.len() - 1) as u8;
    let mut child = leaf;
    for (depth, step) in way.iter().enumerate().rev() {
        let mut entries = step.entries.clone();
        entries.insert(step.taken + 1, child);
        let room = if depth == 0 {
            capacity.root
        } else {
            capacity.node
        };
        let fresh = next_block + growth.new_blocks;
        match (entries.len() <= room, depth) {
            (true, 0) => growth.root = Some((levels, entries)),
            (true, _) => growth.nodes.push((step.block, entries)),
            (false, 0) if levels >= capacity.max_levels => return None,
            (false, 0) => {
                let below = Child {
                    hash: 0,
                    block: fresh,
                };
                growth.root = Some((levels + 1, vec![below]));
                growth.nodes.push((fresh, entries));
                growth.new_blocks += 1;
            }
            (false, _) => {
                let upper = entries.split_off(entries.len() / 2);
                child = Child {
                    hash: upper[0].hash,
                    block: fresh,
                };
                growth.nodes.push((step.block, entries));
                growth.nodes.push((fresh, upper));
                growth.new_blocks += 1;
                continue;
            }
        }
        break;
    }
    Some(growth)
}

/// The three blocks of a directory that had one: its root and two leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Indexed {
    pub root: Vec<u8>,
    pub halves: Halves,
}

/// Makes an index of the only block of a directory.
///
/// # Errors
/// What is wrong with the block, as a phrase.
pub fn index(
    block: &[u8],
    hash_version: u8,
    stores_kinds: bool,
    hash_of: impl Fn(&[u8]) -> u32,
    seed: Option<u32>,
) -> Result<Indexed, String> {
    let entries = dir::entries(block, stores_kinds)?;
    let first = dir::slots(block, stores_kinds).next().transpose()?;
    let dots: Vec<&[u8]> = entries.iter().take(2).map(|entry| entry.name).collect();
    if dots != [b".".as_slice(), b".."]
        || first.is_none_or(|dot| dot.length != dir::own_length(b"."))
    {
        return Err("its first entries are not \".\" and \"..\"".to_owned());
    }
    let halves = leaf::halve(hashed(&entries[2..], hash_of), block.len(), seed)?;
    let mut root = block.to_vec();
    let leaves = [(0, 1), (halves.hash, 2)];
    let entries = leaves.map(|(hash, block)| Child { hash, block }).to_vec();
    let levels = 0;
    let head = Root {
        hash_version,
        levels,
        entries,
    };
    htree::write_root(&mut root, &head, seed);
    Ok(Indexed { root, halves })
}

/// The entries that are names, each behind its hash.
#[must_use]
pub fn hashed<'a>(entries: &[Entry<'a>], hash_of: impl Fn(&[u8]) -> u32) -> Vec<(u32, Entry<'a>)> {
    let used = entries.iter().filter(|entry| entry.inode != 0);
    used.map(|entry| (hash_of(entry.name), *entry)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ext4::htree::MAX_LEVELS_LARGE;
    use std::collections::BTreeMap;

    const CAPACITY: Capacity = Capacity {
        root: 4,
        node: 7,
        max_levels: MAX_LEVELS_LARGE,
    };

    /// Nodes in memory, and the way to the leaf of a hash.
    struct Tree {
        levels: u8,
        nodes: BTreeMap<u32, Vec<Child>>,
        next_block: u32,
    }

    impl Tree {
        fn way(&self, hash: u32) -> Vec<Step> {
            let mut way: Vec<Step> = Vec::new();
            for _ in 0..=self.levels {
                let block = way.last().map_or(0, |step| step.entries[step.taken].block);
                let entries = self.nodes[&block].clone();
                let taken = entries
                    .iter()
                    .rposition(|child| child.hash <= hash)
                    .unwrap();
                way.push(Step {
                    block,
                    entries,
                    taken,
                });
            }
            way
        }

        fn add(&mut self, hash: u32) -> bool {
            let block = self.next_block;
            let leaf = Child { hash, block };
            let Some(growth) = plan(&self.way(hash), leaf, CAPACITY, block + 1) else {
                return false;
            };
            self.next_block += 1 + growth.new_blocks;
            if let Some((levels, entries)) = growth.root {
                self.levels = levels;
                assert!(entries.len() <= CAPACITY.root);
                self.nodes.insert(0, entries);
            }
            for (block, mut entries) in growth.nodes {
                assert!(entries.len() <= CAPACITY.node && block < self.next_block);
                // As on disk: the first hash of a node is not stored.
                entries[0].hash = 0;
                self.nodes.insert(block, entries);
            }
            true
        }
    }

    #[test]
    fn every_leaf_is_found_at_every_depth_until_the_index_is_full() {
        let root = vec![Child { hash: 0, block: 1 }];
        let nodes = BTreeMap::from([(0, root)]);
        let mut tree = Tree {
            levels: 0,
            nodes,
            next_block: 2,
        };
        let mut leaves = BTreeMap::from([(0, 1)]);
        for n in 1_u32.. {
            let hash = n.wrapping_mul(2_654_435_761) & !1;
            let block = tree.next_block;
            if !tree.add(hash) {
                break;
            }
            leaves.insert(hash, block);
            for (hash, block) in &leaves {
                let way = tree.way(*hash);
                let last = way.last().unwrap();
                assert_eq!(last.entries[last.taken].block, *block);
            }
        }
        assert_eq!(tree.levels, MAX_LEVELS_LARGE);
        assert!(
            leaves.len() > CAPACITY.root * CAPACITY.node * CAPACITY.node / 2,
            "{}",
            leaves.len()
        );
    }

    #[test]
    fn a_directory_of_one_block_becomes_a_root_and_two_leaves() {
        let names: Vec<String> = (0..40).map(|n| format!("name{n}")).collect();
        let entry = |name: &'static str, inode| Entry {
            inode,
            kind: 2,
            name: name.as_bytes(),
        };
        let mut entries = vec![entry(".", 12), entry("..", 2)];
        entries.extend(names.iter().map(|name| Entry {
            inode: 20,
            kind: 1,
            name: name.as_bytes(),
        }));
        let block = dir::write_block(&entries, 1024, Some(7));
        let hash_of = |name: &[u8]| crate::ext4::hash::hash(name, 1, &[0; 4], false);
        let Indexed { root, halves } = index(&block, 1, true, hash_of, Some(7)).unwrap();
        let read = htree::read_root(&root, 1, Some(7)).unwrap();
        assert_eq!(
            (read.hash_version, read.levels, read.entries.len()),
            (1, 0, 2)
        );
        assert_eq!(dir::entries(&root, true).unwrap().len(), 2);
        let in_leaf = |block: &[u8]| dir::entries(block, true).unwrap().len();
        assert_eq!(in_leaf(&halves.lower) + in_leaf(&halves.upper), 40);
        let node = htree::write_node(&read.entries, 1024, Some(7));
        assert_eq!(htree::read_node(&node, Some(7)).unwrap(), read.entries);
        let found = htree::Index::of_node(&node, Some(7)).unwrap();
        assert_eq!(
            (found.find(halves.hash - 2), found.find(halves.hash)),
            (0, 1)
        );
    }
}
