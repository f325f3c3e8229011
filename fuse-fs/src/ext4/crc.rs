//! The checksums of ext4 and jbd2: CRC-32C without the final inversion, CRC-16 of the older descriptors,
//! and the big-endian CRC-32 of jbd2's first version.

/// Where every chain of checksums starts.
pub const START: u32 = !0;

/// CRC-32C of `bytes`, continued from `crc`; neither end is inverted.
#[must_use]
pub fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!crc, bytes)
}

/// CRC-16 (polynomial 0xa001, reflected), continued from `crc`.
#[must_use]
pub fn crc16(crc: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(crc, |crc, byte| {
        (0..8).fold(crc ^ u16::from(*byte), |crc, _| {
            (crc >> 1) ^ (0xa001 * (crc & 1))
        })
    })
}

/// CRC-32 (polynomial 0x04c11db7, most significant bit first), continued from `crc`.
#[must_use]
pub fn crc32_be(crc: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(crc, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte) << 24, |crc, _| {
            (crc << 1) ^ (0x04c1_1db7 * (crc >> 31))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        let digits = b"123456789";
        assert_eq!(!crc32c(START, digits), 0xe306_9283);
        assert_eq!(crc16(0, digits), 0xbb3d, "CRC-16/ARC");
        assert_eq!(crc32_be(START, digits), 0x0376_e6e7, "CRC-32/MPEG-2");
    }

    #[test]
    fn a_checksum_continues() {
        assert_eq!(crc32c(crc32c(START, b"ab"), b"cd"), crc32c(START, b"abcd"));
    }
}
