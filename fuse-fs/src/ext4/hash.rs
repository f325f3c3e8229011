//! The hashes of names that order an indexed directory.

const DEFAULT_STATE: [u32; 4] = [0x6745_2301, 0xefcd_ab89, 0x98ba_dcfe, 0x1032_5476];
/// Marks the end of a directory for readers, so no name may have it.
const END_OF_DIRECTORY: u32 = 0x7fff_ffff << 1;
/// The hash of new filesystems.
pub const HALF_MD4: u8 = 1;
const UNSIGNED_FROM: u8 = 3;

/// The hash of `name`; its lowest bit is 0. `version` is the index root's, 0 to 5.
#[must_use]
pub fn hash(name: &[u8], version: u8, seed: &[u32; 4], unsigned: bool) -> u32 {
    let unsigned = unsigned || version >= UNSIGNED_FROM;
    let char_of: fn(u8) -> u32 = if unsigned {
        u32::from
    } else {
        |byte| i32::from(byte.cast_signed()).cast_unsigned()
    };
    let state = if seed.iter().all(|word| *word == 0) {
        DEFAULT_STATE
    } else {
        *seed
    };
    let raw = match version % UNSIGNED_FROM {
        0 => legacy(name, char_of),
        1 => fold::<8>(name, state, char_of, half_md4)[1],
        _ => fold::<4>(name, state, char_of, tea)[0],
    };
    match raw & !1 {
        END_OF_DIRECTORY => END_OF_DIRECTORY - 2,
        hash => hash,
    }
}

fn legacy(name: &[u8], char_of: fn(u8) -> u32) -> u32 {
    let (mut hash0, mut hash1) = (0x12a3_fe2d_u32, 0x37ab_e8f9_u32);
    for byte in name {
        let mut hash = hash1.wrapping_add(hash0 ^ char_of(*byte).wrapping_mul(7_152_373));
        if hash & 0x8000_0000 != 0 {
            hash = hash.wrapping_sub(0x7fff_ffff);
        }
        (hash0, hash1) = (hash, hash0);
    }
    hash0 << 1
}

/// Feeds `name` in pieces of `N` words to `round`. What is left of the name pads its last piece by its length.
fn fold<const N: usize>(
    name: &[u8],
    state: [u32; 4],
    char_of: fn(u8) -> u32,
    round: fn([u32; 4], &[u32; N]) -> [u32; 4],
) -> [u32; 4] {
    let starts = (0..name.len()).step_by(N * 4);
    starts.fold(state, |state, start| {
        round(state, &words(&name[start..], char_of))
    })
}

/// The first `N` words of `rest`, padded by its length.
fn words<const N: usize>(rest: &[u8], char_of: fn(u8) -> u32) -> [u32; N] {
    let length = rest.len() as u32 & 0xff;
    let pad = length << 24 | length << 16 | length << 8 | length;
    let mut words = [pad; N];
    for (word, bytes) in words.iter_mut().zip(rest.chunks(4)) {
        *word = bytes
            .iter()
            .fold(pad, |word, byte| char_of(*byte).wrapping_add(word << 8));
    }
    words
}

fn half_md4(state: [u32; 4], words: &[u32; 8]) -> [u32; 4] {
    type Mix = fn(u32, u32, u32) -> u32;
    let select: Mix = |x, y, z| z ^ (x & (y ^ z));
    let majority: Mix = |x, y, z| (x & y).wrapping_add((x ^ y) & z);
    let parity: Mix = |x, y, z| x ^ y ^ z;
    let rounds: [(Mix, u32, [usize; 8], [u32; 4]); 3] = [
        (select, 0, [0, 1, 2, 3, 4, 5, 6, 7], [3, 7, 11, 19]),
        (
            majority,
            0x5a82_7999,
            [1, 3, 5, 7, 0, 2, 4, 6],
            [3, 5, 9, 13],
        ),
        (
            parity,
            0x6ed9_eba1,
            [3, 7, 2, 6, 1, 5, 0, 4],
            [3, 9, 11, 15],
        ),
    ];
    let [mut a, mut b, mut c, mut d] = state;
    for (mix, constant, order, shifts) in rounds {
        for (step, word) in order.into_iter().enumerate() {
            let sum = a
                .wrapping_add(mix(b, c, d))
                .wrapping_add(words[word])
                .wrapping_add(constant);
            (a, b, c, d) = (d, sum.rotate_left(shifts[step % 4]), b, c);
        }
    }
    let end = [a, b, c, d];
    std::array::from_fn(|n| state[n].wrapping_add(end[n]))
}

fn tea(state: [u32; 4], words: &[u32; 4]) -> [u32; 4] {
    let [mut left, mut right, ..] = state;
    let mut sum = 0_u32;
    let mix = |half: u32, sum: u32, a: u32, b: u32| {
        (half << 4).wrapping_add(a) ^ half.wrapping_add(sum) ^ (half >> 5).wrapping_add(b)
    };
    for _ in 0..16 {
        sum = sum.wrapping_add(0x9e37_79b9);
        left = left.wrapping_add(mix(right, sum, words[0], words[1]));
        right = right.wrapping_add(mix(left, sum, words[2], words[3]));
    }
    [
        state[0].wrapping_add(left),
        state[1].wrapping_add(right),
        state[2],
        state[3],
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `debugfs -R "dx_hash -h HASH -s SEED NAME"` of e2fsprogs 1.47.0 says.
    #[test]
    fn known_answers() {
        let seed = [0x0403_0201, 0x0807_0605, 0x0c0b_0a09, 0x100f_0e0d];
        let long = b"a name of more than thirty-two bytes, to be sure";
        let names: [&[u8]; 3] = [b"a", b"hello", long];
        for (version, expected) in [
            (0, [0xe74b_53e2, 0x3225_2546, 0x948b_bac0]),
            (1, [0x8d08_ec4c, 0xe2dd_f968, 0x9592_ac1c]),
            (2, [0xf535_28f0, 0x1a56_92b6, 0x11f9_9b58]),
        ] {
            assert_eq!(
                names.map(|name| hash(name, version, &seed, false)),
                expected
            );
        }
        assert_eq!(hash(b"hello", 1, &[0; 4], false), 0x1746_da32);
        assert_eq!(hash("gr\u{fc}n".as_bytes(), 1, &[0; 4], false), 0x095d_9284);
        assert_ne!(hash("gr\u{fc}n".as_bytes(), 4, &[0; 4], false), 0x095d_9284);
    }
}
