//! The per-block register model: what each block of a range must hold.

use crate::random::Random;

/// Bytes of a block of the model.
const BLOCK: usize = 512;

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Zeros,
    /// Bytes that only the write with this number puts into this block.
    Write(u64),
}

/// The acknowledged content of `len_bytes` bytes from `start_bytes` on.
#[derive(Clone, Debug)]
pub struct Register {
    start_bytes: u64,
    blocks: Vec<Content>,
    /// Distinguishes this register's writes from those of all others.
    owner: u64,
    writes: u64,
}

impl Register {
    /// A range that holds zeros; offsets and lengths are multiples of 512.
    #[must_use]
    pub fn new(owner: u64, start_bytes: u64, len_bytes: u64) -> Self {
        let blocks = usize::try_from(len_bytes).unwrap() / BLOCK;
        Self {
            start_bytes,
            blocks: vec![Content::Zeros; blocks],
            owner,
            writes: 0,
        }
    }

    #[must_use]
    pub fn start_bytes(&self) -> u64 {
        self.start_bytes
    }

    #[must_use]
    pub fn len_bytes(&self) -> u64 {
        (self.blocks.len() * BLOCK) as u64
    }

    /// A random range inside, of 1 to `max_blocks` blocks: offset in the volume and length.
    pub fn pick(&self, random: &mut Random, max_blocks: u64) -> (u64, u32) {
        let total = self.blocks.len() as u64;
        let len = random.within(1..max_blocks.min(total) + 1);
        let first = random.within(0..total - len + 1);
        let len_bytes = u32::try_from(len * BLOCK as u64).unwrap();
        (self.start_bytes + first * BLOCK as u64, len_bytes)
    }

    /// The data of the next write of a range, and its number.
    pub fn data(&mut self, offset_bytes: u64, len_bytes: u32) -> (Content, Vec<u8>) {
        self.writes += 1;
        let content = Content::Write(self.owner << 40 | self.writes);
        (
            content,
            self.image(offset_bytes, &vec![content; len_bytes as usize / BLOCK]),
        )
    }

    /// The range holds `content` from now on.
    pub fn acknowledge(&mut self, offset_bytes: u64, len_bytes: u32, content: Content) {
        let (first, count) = self.blocks_of(offset_bytes, len_bytes);
        self.blocks[first..first + count].fill(content);
    }

    /// The bytes that a read of the range must give.
    #[must_use]
    pub fn expected(&self, offset_bytes: u64, len_bytes: u32) -> Vec<u8> {
        let (first, count) = self.blocks_of(offset_bytes, len_bytes);
        self.image(offset_bytes, &self.blocks[first..first + count])
    }

    /// Fails at the first block that does not hold what it must.
    pub fn check(&self, offset_bytes: u64, found: &[u8], who: &str) {
        let len = u32::try_from(found.len()).unwrap();
        let expected = self.expected(offset_bytes, len);
        if expected == found {
            return;
        }
        let pairs = expected.chunks(BLOCK).zip(found.chunks(BLOCK));
        let bad = pairs.map(|(a, b)| a == b).position(|equal| !equal).unwrap();
        let at = bad * BLOCK;
        let (first, _) = self.blocks_of(offset_bytes, len);
        panic!(
            "{who}: byte {} of the volume must hold {:?}, found {:02x?} instead of {:02x?}",
            offset_bytes + at as u64,
            self.blocks[first + bad],
            &found[at..at + 24],
            &expected[at..at + 24],
        );
    }

    fn blocks_of(&self, offset_bytes: u64, len_bytes: u32) -> (usize, usize) {
        let first = usize::try_from(offset_bytes - self.start_bytes).unwrap() / BLOCK;
        (first, len_bytes as usize / BLOCK)
    }

    fn image(&self, offset_bytes: u64, blocks: &[Content]) -> Vec<u8> {
        let mut image = vec![0; blocks.len() * BLOCK];
        for (number, (content, bytes)) in blocks.iter().zip(image.chunks_mut(BLOCK)).enumerate() {
            let Content::Write(write) = content else {
                continue;
            };
            let place = offset_bytes + (number * BLOCK) as u64;
            bytes[..8].copy_from_slice(&write.to_le_bytes());
            bytes[8..16].copy_from_slice(&place.to_le_bytes());
            let fill = Random::new(write ^ place.rotate_left(32)).bytes(BLOCK - 16);
            bytes[16..].copy_from_slice(&fill);
        }
        image
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_acknowledged_is_expected() {
        let mut register = Register::new(1, 4096, 8192);
        let (content, data) = register.data(4608, 1024);
        register.acknowledge(4608, 1024, content);
        register.acknowledge(5120, 512, Content::Zeros);
        let found = register.expected(4096, 2048);
        assert!(found[..512].iter().all(|byte| *byte == 0));
        assert_eq!(found[512..1024], data[..512]);
        assert!(found[1024..].iter().all(|byte| *byte == 0));
        register.check(4608, &data[..512], "self");
    }

    #[test]
    #[should_panic(expected = "byte 5120 of the volume must hold")]
    fn a_lost_write_is_found() {
        let mut register = Register::new(1, 4096, 8192);
        let before = register.expected(4608, 1024);
        let (content, _) = register.data(5120, 512);
        register.acknowledge(5120, 512, content);
        register.check(4608, &before, "self");
    }

    #[test]
    #[should_panic(expected = "must hold")]
    fn data_in_the_wrong_place_is_found() {
        let mut register = Register::new(1, 0, 8192);
        let (content, data) = register.data(512, 512);
        register.acknowledge(1024, 512, content);
        register.check(1024, &data, "self");
    }
}
