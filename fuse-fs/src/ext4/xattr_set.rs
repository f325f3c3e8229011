//! The extended attributes of one inode as a set that changes: what stays in the inode, what goes to the block.

use crate::ext4::xattr::{self, Attribute};

/// One attribute, kept.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Kept {
    namespace: u8,
    name: Vec<u8>,
    value: Vec<u8>,
}

impl Kept {
    fn of(attribute: &Attribute<'_>) -> Self {
        Self {
            namespace: attribute.namespace,
            name: attribute.name.to_vec(),
            value: attribute.value.to_vec(),
        }
    }

    fn view(&self) -> Attribute<'_> {
        Attribute {
            namespace: self.namespace,
            name: &self.name,
            value: &self.value,
        }
    }
}

/// One of the two places, with the bytes that it has room for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    attributes: Vec<Kept>,
    room: usize,
}

impl Place {
    fn fits(&self, attribute: &Attribute<'_>) -> bool {
        let used: usize = self
            .attributes
            .iter()
            .map(|one| xattr::size(&one.view()))
            .sum();
        used + xattr::size(attribute) <= self.room
    }

    fn take(&mut self, namespace: u8, name: &[u8]) -> bool {
        let before = self.attributes.len();
        self.attributes
            .retain(|one| (one.namespace, one.name.as_slice()) != (namespace, name));
        self.attributes.len() < before
    }

    fn views(&self) -> Vec<Attribute<'_>> {
        self.attributes.iter().map(Kept::view).collect()
    }
}

/// There is no room for an attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom;

/// The attributes of an inode.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XattrSet {
    inode: Place,
    block: Place,
}

impl XattrSet {
    /// None yet, in an inode with an area of `area_bytes`.
    #[must_use]
    pub fn empty(area_bytes: usize, block_bytes: usize) -> Self {
        let place = |room| Place {
            attributes: Vec::new(),
            room,
        };
        Self {
            inode: place(xattr::inode_room(area_bytes)),
            block: place(xattr::block_room(block_bytes)),
        }
    }

    /// Reads them from the area of the inode and from its block, if it has one.
    ///
    /// # Errors
    /// What is wrong with them, as a phrase.
    pub fn read(area: &[u8], block: Option<&[u8]>, block_bytes: usize) -> Result<Self, String> {
        let keep = |found: Vec<Attribute<'_>>| found.iter().map(Kept::of).collect();
        let mut set = Self::empty(area.len(), block_bytes);
        set.inode.attributes = keep(xattr::in_inode(area)?);
        if let Some(block) = block {
            set.block.attributes = keep(xattr::in_block(block)?);
        }
        Ok(set)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = Attribute<'_>> {
        self.inode
            .attributes
            .iter()
            .chain(&self.block.attributes)
            .map(Kept::view)
    }

    /// The value of one.
    #[must_use]
    pub fn get(&self, namespace: u8, name: &[u8]) -> Option<&[u8]> {
        let mut all = self.iter();
        let found = all.find(|one| (one.namespace, one.name) == (namespace, name));
        found.map(|one| one.value)
    }

    /// Gives an attribute a value: in the inode if there is room, else in the block.
    ///
    /// # Errors
    /// [`NoRoom`], and nothing changed.
    pub fn set(&mut self, namespace: u8, name: &[u8], value: &[u8]) -> Result<(), NoRoom> {
        let new = Attribute {
            namespace,
            name,
            value,
        };
        let mut next = self.clone();
        next.remove(namespace, name);
        let place = if next.inode.fits(&new) {
            &mut next.inode
        } else if next.block.fits(&new) {
            &mut next.block
        } else {
            return Err(NoRoom);
        };
        place.attributes.push(Kept::of(&new));
        *self = next;
        Ok(())
    }

    /// Takes an attribute away; whether it was there.
    pub fn remove(&mut self, namespace: u8, name: &[u8]) -> bool {
        self.inode.take(namespace, name) || self.block.take(namespace, name)
    }

    /// Those in the inode.
    #[must_use]
    pub fn in_inode(&self) -> Vec<Attribute<'_>> {
        self.inode.views()
    }

    /// Those in the block; without any, no block is needed.
    #[must_use]
    pub fn in_block(&self) -> Vec<Attribute<'_>> {
        self.block.views()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    const USER: u8 = 1;
    const AREA_BYTES: usize = 96;

    fn written(set: &XattrSet) -> ([u8; AREA_BYTES], Vec<u8>) {
        let mut area = [7; AREA_BYTES];
        xattr::write_inode(&mut area, &set.in_inode());
        (
            area,
            xattr::write_block(&set.in_block(), 4096, 1, 55, Some(9)),
        )
    }

    #[test]
    fn a_set_is_a_map_that_survives_being_written() {
        let mut set = XattrSet::read(&[0; AREA_BYTES], None, 4096).unwrap();
        let mut model: BTreeMap<(u8, Vec<u8>), Vec<u8>> = BTreeMap::new();
        let mut refused = 0;
        for step in 0..3000_u32 {
            let random = step.wrapping_mul(2_654_435_761) >> 8;
            let name = format!("name{}", random % 23).into_bytes();
            let namespace = [USER, 4, 6][random as usize % 3];
            if random % 5 == 0 {
                let was = model.remove(&(namespace, name.clone())).is_some();
                assert_eq!(set.remove(namespace, &name), was);
            } else {
                let value = vec![step as u8; (random / 7 % 600) as usize];
                match set.set(namespace, &name, &value) {
                    Ok(()) => drop(model.insert((namespace, name), value)),
                    Err(NoRoom) => refused += 1,
                }
            }
            let (area, block) = written(&set);
            assert!(xattr::checksum_matches(&block, 55, 9));
            let read = XattrSet::read(&area, Some(&block), 4096).unwrap();
            let found: BTreeMap<_, _> = read
                .iter()
                .map(|one| ((one.namespace, one.name.to_vec()), one.value.to_vec()))
                .collect();
            assert_eq!(found, model);
        }
        assert!(refused > 10 && !set.in_inode().is_empty());
    }

    #[test]
    fn a_value_that_fits_exactly_is_taken_and_one_byte_more_is_not() {
        let mut set = XattrSet::read(&[], None, 4096).unwrap();
        let room = xattr::block_room(4096) - 20;
        assert_eq!(set.set(USER, b"name", &vec![1; room + 1]), Err(NoRoom));
        set.set(USER, b"name", &vec![1; room]).unwrap();
        let (_, block) = written(&set);
        assert_eq!(xattr::in_block(&block).unwrap()[0].value.len(), room);
        assert_eq!(set.set(USER, b"n", b""), Err(NoRoom));
        assert_eq!(set.get(USER, b"name").map(<[u8]>::len), Some(room));
    }
}
