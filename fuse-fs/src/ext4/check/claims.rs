//! Which blocks are in use, by what was found to use them.

use crate::ext4::bytes::array;
use crate::ext4::superblock::Superblock;

const WORD_BITS: u32 = 64;

/// One bit for each block, kept for groups where something is in use.
pub struct Claims {
    first: u64,
    group_blocks: u32,
    groups: Vec<Option<Box<[u64]>>>,
}

impl Claims {
    /// No block is in use.
    #[must_use]
    pub fn new(superblock: &Superblock) -> Self {
        Self {
            first: u64::from(superblock.first_data_block),
            group_blocks: superblock.blocks_per_group,
            groups: vec![None; superblock.groups_count() as usize],
        }
    }

    /// Marks `blocks` blocks from `first`, which lie inside the filesystem, as used; those that were already.
    pub fn claim(&mut self, first: u64, blocks: u64) -> Vec<u64> {
        let mut taken = Vec::new();
        for block in first..first + blocks {
            let (word, bit) = self.word(block);
            if *word & bit != 0 {
                taken.push(block);
            }
            *word |= bit;
        }
        taken
    }

    fn word(&mut self, block: u64) -> (&mut u64, u64) {
        let index = block - self.first;
        let within = (index % u64::from(self.group_blocks)) as u32;
        let words = self.group_blocks.div_ceil(WORD_BITS) as usize;
        let group = &mut self.groups[(index / u64::from(self.group_blocks)) as usize];
        let bits = group.get_or_insert_with(|| vec![0; words].into_boxed_slice());
        (
            &mut bits[(within / WORD_BITS) as usize],
            1 << (within % WORD_BITS),
        )
    }

    /// Whether block `within` of `group` is in use.
    #[must_use]
    pub fn is_used(&self, group: u32, within: u32) -> bool {
        let bits = self.groups[group as usize].as_ref();
        bits.is_some_and(|bits| {
            bits[(within / WORD_BITS) as usize] >> (within % WORD_BITS) & 1 != 0
        })
    }

    /// Whether the first `count` bits of `bitmap` say of `group` what is known here.
    #[must_use]
    pub fn matches(&self, group: u32, bitmap: &[u8], count: u32) -> bool {
        let known = self.groups[group as usize].as_deref().unwrap_or_default();
        let words = bitmap.chunks_exact(8).enumerate();
        words
            .take(count.div_ceil(WORD_BITS) as usize)
            .all(|(at, bytes)| {
                let left = count - at as u32 * WORD_BITS;
                let mask = if left < WORD_BITS {
                    (1 << left) - 1
                } else {
                    u64::MAX
                };
                let word = u64::from_le_bytes(array(bytes, 0));
                (word ^ known.get(at).copied().unwrap_or(0)) & mask == 0
            })
    }

    /// How many blocks of `group` are in use.
    #[must_use]
    pub fn used(&self, group: u32) -> u32 {
        let bits = self.groups[group as usize].as_ref();
        bits.map_or(0, |bits| bits.iter().map(|word| word.count_ones()).sum())
    }
}
