//! Which filesystem is on a volume, from its first bytes, and what mounting it takes.

/// Bytes at the start of a volume that [`detect`] looks at.
pub const PROBE_BYTES: usize = 4096;

const EXT_SUPERBLOCK: usize = 1024;
const EXT_MAGIC: u16 = 0xef53;
const EXT_MAX_LOG_BLOCK: u32 = 6;
const XFS_MAGIC: &[u8] = b"XFSB";

/// A filesystem found on a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// As in mount(2): `ext4` or `xfs`.
    pub filesystem: &'static str,
    /// The largest logical block that the filesystem can live on.
    pub unit_bytes: u32,
}

/// Reads the superblock in `head`, the first [`PROBE_BYTES`] of the volume.
#[must_use]
pub fn detect(head: &[u8]) -> Option<Found> {
    xfs(head).or_else(|| ext(head))
}

/// ext2, ext3 and ext4: the kernel's ext4 mounts all three.
fn ext(head: &[u8]) -> Option<Found> {
    let field = |at: usize, len: usize| head.get(EXT_SUPERBLOCK + at..EXT_SUPERBLOCK + at + len);
    let word = |at| field(at, 4)?.try_into().ok().map(u32::from_le_bytes);
    let magic: [u8; 2] = field(0x38, 2)?.try_into().ok()?;
    let log_block = word(0x18)?;
    if u16::from_le_bytes(magic) != EXT_MAGIC || log_block > EXT_MAX_LOG_BLOCK {
        return None;
    }
    Some(Found {
        filesystem: "ext4",
        unit_bytes: 1024 << log_block,
    })
}

fn xfs(head: &[u8]) -> Option<Found> {
    let sector: [u8; 2] = head.get(102..104)?.try_into().ok()?;
    head.starts_with(XFS_MAGIC).then_some(Found {
        filesystem: "xfs",
        unit_bytes: u32::from(u16::from_be_bytes(sector)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ext_head(log_block: u32) -> Vec<u8> {
        let mut head = vec![0; PROBE_BYTES];
        head[1024 + 0x38..1024 + 0x3a].copy_from_slice(&EXT_MAGIC.to_le_bytes());
        head[1024 + 0x18..1024 + 0x1c].copy_from_slice(&log_block.to_le_bytes());
        head
    }

    #[test]
    fn ext4_tells_its_block_size() {
        let found = detect(&ext_head(2)).unwrap();
        assert_eq!((found.filesystem, found.unit_bytes), ("ext4", 4096));
        assert_eq!(
            detect(&ext_head(99)),
            None,
            "a block size that does not exist"
        );
    }

    #[test]
    fn xfs_tells_its_sector_size() {
        let mut head = vec![0; PROBE_BYTES];
        head[..4].copy_from_slice(XFS_MAGIC);
        head[102..104].copy_from_slice(&512u16.to_be_bytes());
        assert_eq!(detect(&head).unwrap().unit_bytes, 512);
    }

    #[test]
    fn empty_and_short_volumes_have_none() {
        assert_eq!(detect(&[]), None);
        assert_eq!(detect(&[0; PROBE_BYTES]), None);
        assert_eq!(detect(b"XFSB"), None);
    }
}
