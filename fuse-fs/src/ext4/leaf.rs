//! A block of directory entries that changes: names found, put in, taken out; a full block halved by hash.
//!
//! The functions change bytes and leave the checksum to [`dir::seal`]. An entry never moves within its block.

use crate::ext4::bytes::put;
use crate::ext4::dir::{self, Entry, Slot};

/// Finds `name`.
///
/// # Errors
/// What is wrong with the block, as a phrase.
pub fn find<'a>(
    block: &'a [u8],
    name: &[u8],
    stores_kinds: bool,
) -> Result<Option<Entry<'a>>, String> {
    let slot = find_slot(block, name, stores_kinds)?;
    Ok(slot.map(|(_, slot)| slot.entry))
}

/// The slot of `name`, and where the one before begins.
fn find_slot<'a>(
    block: &'a [u8],
    name: &[u8],
    stores_kinds: bool,
) -> Result<Option<(Option<usize>, Slot<'a>)>, String> {
    let mut before = None;
    for slot in dir::slots(block, stores_kinds) {
        let slot = slot?;
        if slot.entry.inode != 0 && slot.entry.name == name {
            return Ok(Some((before, slot)));
        }
        before = Some(slot.at);
    }
    Ok(None)
}

/// Puts `entry` into the first room that is large enough; whether there was one.
///
/// # Errors
/// What is wrong with the block, as a phrase.
pub fn insert(block: &mut [u8], entry: &Entry<'_>) -> Result<bool, String> {
    let needed = dir::own_length(entry.name);
    let Some((at, used, length)) = room(block, needed)? else {
        return Ok(false);
    };
    if used > 0 {
        dir::set_length(block, at, used);
    }
    dir::write_entry(block, at + used, entry, length - used);
    Ok(true)
}

/// The first slot with `needed` free bytes: its start, what it uses, its length.
fn room(block: &[u8], needed: usize) -> Result<Option<(usize, usize, usize)>, String> {
    for slot in dir::slots(block, false) {
        let slot = slot?;
        if slot.length - slot.used() >= needed {
            return Ok(Some((slot.at, slot.used(), slot.length)));
        }
    }
    Ok(None)
}

/// Whether [`insert`] would find room for `name`.
///
/// # Errors
/// What is wrong with the block, as a phrase.
pub fn has_room(block: &[u8], name: &[u8]) -> Result<bool, String> {
    Ok(room(block, dir::own_length(name))?.is_some())
}

/// Takes `name` out; whether it was there. Its bytes are wiped and its room goes to the entry before.
///
/// # Errors
/// What is wrong with the block, as a phrase.
pub fn remove(block: &mut [u8], name: &[u8]) -> Result<bool, String> {
    let Some((before, Slot { at, length, .. })) = find_slot(block, name, false)? else {
        return Ok(false);
    };
    block[at..at + length].fill(0);
    match before {
        Some(before) => dir::set_length(block, before, at + length - before),
        None => dir::set_length(block, at, length),
    }
    Ok(true)
}

/// Lets `name` lead to another inode; whether it was there.
///
/// # Errors
/// What is wrong with the block, as a phrase.
pub fn point(block: &mut [u8], name: &[u8], inode: u32, kind: u8) -> Result<bool, String> {
    let Some((_, Slot { at, .. })) = find_slot(block, name, false)? else {
        return Ok(false);
    };
    put(block, at, &inode.to_le_bytes());
    block[at + 7] = kind;
    Ok(true)
}

/// Whether no name but "." and ".." is in the block.
///
/// # Errors
/// What is wrong with the block, as a phrase.
pub fn is_empty(block: &[u8]) -> Result<bool, String> {
    for slot in dir::slots(block, false) {
        let entry = slot?.entry;
        if entry.inode != 0 && entry.name != b"." && entry.name != b".." {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The two halves of a block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Halves {
    pub lower: Vec<u8>,
    pub upper: Vec<u8>,
    /// Of the first name above; its lowest bit tells that the last one below has the same hash.
    pub hash: u32,
}

/// Divides `entries`, each behind the hash of its name, into two blocks of about the same fill.
///
/// # Errors
/// Fewer than two entries cannot be divided.
pub fn halve(
    mut entries: Vec<(u32, Entry<'_>)>,
    block_bytes: usize,
    seed: Option<u32>,
) -> Result<Halves, String> {
    entries.sort_by(|(left, one), (right, other)| (left, one.name).cmp(&(right, other.name)));
    let total: usize = entries.iter().map(length).sum();
    let mut below = 0;
    // The first entry whose own middle lies behind that of all: neither half is more than half an entry larger.
    let middle = entries.iter().position(|entry| {
        below += length(entry);
        below * 2 - length(entry) > total
    });
    let middle = middle.unwrap_or(0).max(1);
    if middle >= entries.len() {
        return Err(format!("a full leaf of {} entries", entries.len()));
    }
    let (first, last) = (entries[middle].0, entries[middle - 1].0);
    let write = |half: &[(u32, Entry<'_>)]| {
        let half: Vec<Entry<'_>> = half.iter().map(|(_, entry)| *entry).collect();
        dir::write_block(&half, block_bytes, seed)
    };
    Ok(Halves {
        lower: write(&entries[..middle]),
        upper: write(&entries[middle..]),
        hash: first | u32::from(first == last),
    })
}

fn length((_, entry): &(u32, Entry<'_>)) -> usize {
    dir::own_length(entry.name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const SEED: Option<u32> = Some(77);

    fn entry(inode: u32, name: &[u8]) -> Entry<'_> {
        let kind = 1;
        Entry { inode, kind, name }
    }

    fn names(block: &[u8]) -> BTreeMap<Vec<u8>, u32> {
        let entries = dir::entries(block, true).unwrap();
        let used = entries.iter().filter(|entry| entry.inode != 0);
        used.map(|entry| (entry.name.to_vec(), entry.inode))
            .collect()
    }

    /// A linear congruential generator: the same numbers in every run.
    fn numbers(mut state: u64) -> impl FnMut(u64) -> u64 {
        move |below| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 33) % below
        }
    }

    #[test]
    fn a_block_is_a_map_whatever_goes_in_and_out() {
        for (block_bytes, seed) in [(1024, SEED), (4096, None), (65536, SEED)] {
            let mut random = numbers(5);
            let mut block = dir::write_block(&[], block_bytes, seed);
            let mut model = BTreeMap::new();
            let mut refused = 0;
            for step in 1..6000_u32 {
                let name = vec![b'a'; random(255) as usize + 1];
                let name = if random(2) == 0 {
                    &name[..random(9) as usize % name.len() + 1]
                } else {
                    &name
                };
                if random(3) == 0 {
                    let was = remove(&mut block, name).unwrap();
                    assert_eq!(was, model.remove(name).is_some());
                } else if model.contains_key(name) {
                    assert!(point(&mut block, name, step, 1).unwrap());
                    model.insert(name.to_vec(), step);
                } else {
                    let fits = has_room(&block, name).unwrap();
                    assert_eq!(insert(&mut block, &entry(step, name)).unwrap(), fits);
                    refused += u32::from(!fits);
                    if fits {
                        model.insert(name.to_vec(), step);
                    }
                }
                assert_eq!(names(&block), model);
                assert_eq!(
                    find(&block, name, true).unwrap().map(|entry| entry.inode),
                    model.get(name).copied()
                );
                assert_eq!(is_empty(&block).unwrap(), model.is_empty());
            }
            dir::seal(&mut block, seed);
            assert!(seed.is_none_or(|seed| dir::checksum_matches(&block, seed)));
            assert!(block_bytes > 4096 || refused > 0);
        }
    }

    #[test]
    fn what_was_removed_leaves_no_name_behind() {
        let mut block = dir::write_block(&[entry(5, b"first"), entry(6, b"secret")], 1024, SEED);
        assert!(remove(&mut block, b"secret").unwrap());
        assert!(!block.windows(6).any(|window| window == b"secret"));
        assert!(remove(&mut block, b"first").unwrap());
        assert!(!remove(&mut block, b"first").unwrap());
    }

    #[test]
    fn halves_hold_everything_in_the_order_of_hashes() {
        let names: Vec<Vec<u8>> = (0..80)
            .map(|n| vec![b'a' + n % 26; 1 + usize::from(n) / 2])
            .collect();
        let hashed = |names: &'_ [Vec<u8>]| -> Vec<(u32, Vec<u8>)> {
            names
                .iter()
                .map(|name| {
                    (
                        (name.len() as u32).wrapping_mul(2_654_435_761) & !1,
                        name.clone(),
                    )
                })
                .collect()
        };
        let all = hashed(&names);
        let entries: Vec<_> = all
            .iter()
            .zip(1..)
            .map(|((hash, name), n)| (*hash, entry(n, name)))
            .collect();
        let halves = halve(entries, 4096, SEED).unwrap();
        let of = |block: &[u8]| {
            dir::entries(block, true)
                .unwrap()
                .iter()
                .map(|entry| (entry.name.len() as u32).wrapping_mul(2_654_435_761) & !1)
                .collect::<Vec<_>>()
        };
        let (lower, upper) = (of(&halves.lower), of(&halves.upper));
        assert_eq!(lower.len() + upper.len(), 80);
        assert!(lower.iter().all(|hash| *hash < halves.hash));
        assert!(upper.iter().all(|hash| *hash >= halves.hash & !1));
        assert!(
            dir::checksum_matches(&halves.lower, 77) && dir::checksum_matches(&halves.upper, 77)
        );
    }

    #[test]
    fn halves_of_one_hash_say_that_it_continues() {
        let entries = vec![
            (8, entry(1, b"a")),
            (8, entry(2, b"b")),
            (8, entry(3, b"c")),
        ];
        let halves = halve(entries, 1024, None).unwrap();
        assert_eq!(halves.hash, 9);
        assert!(halve(vec![(8, entry(1, b"a"))], 1024, None).is_err());
    }

    /// Bytes that no program wrote are an error or an answer, and the block keeps its length.
    #[test]
    fn damaged_blocks_are_refused_or_used_without_harm() {
        let mut random = numbers(9);
        for _ in 0..4000 {
            let entries = [entry(5, b"first"), entry(6, b"second"), entry(7, b"third")];
            let mut block = dir::write_block(&entries, 1024, SEED);
            for _ in 0..4 {
                let at = random(64) as usize;
                block[at] = random(256) as u8;
            }
            let _ = find(&block, b"third", true);
            let _ = insert(&mut block, &entry(8, b"a name of some length"));
            let _ = remove(&mut block, b"second");
            let _ = point(&mut block, b"third", 9, 2);
        }
    }
}
