//! What requests of FUSE say, in the words of the filesystem.

use super::files::{MAX_NAME_BYTES, errno};
use crate::backend::BackendError;
use crate::ext4::fallocate::{Allocation, Sought};
use crate::ext4::namespace::{Content, RenameMode, SetMode};
use fuser::{RenameFlags, Request};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

/// Names that are too long are nobody's; the kernel passes them on.
pub(super) fn name_of(name: &OsStr) -> Result<Vec<u8>, BackendError> {
    match name.len() {
        0..=MAX_NAME_BYTES => Ok(name.as_bytes().to_vec()),
        _ => Err(errno(libc::ENAMETOOLONG, "name too long")),
    }
}

pub(super) fn rename_mode(flags: RenameFlags, req: &Request) -> Result<RenameMode, BackendError> {
    let no_replace = flags.contains(RenameFlags::RENAME_NOREPLACE);
    let exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
    let whiteout = flags.contains(RenameFlags::RENAME_WHITEOUT);
    match (exchange, whiteout, no_replace) {
        (false, false, false) => Ok(RenameMode::Replace),
        (false, false, true) => Ok(RenameMode::NoReplace),
        (true, false, false) => Ok(RenameMode::Exchange),
        (false, true, no_replace) => Ok(RenameMode::Whiteout {
            no_replace,
            uid: req.uid(),
            gid: req.gid(),
        }),
        _ => Err(errno(libc::EINVAL, "flags that exclude each other")),
    }
}

pub(super) fn allocation(mode: i32) -> Result<Allocation, BackendError> {
    let keep_size = mode & libc::FALLOC_FL_KEEP_SIZE != 0;
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        0 => Ok(Allocation::Allocate { keep_size }),
        libc::FALLOC_FL_PUNCH_HOLE if keep_size => Ok(Allocation::Punch),
        libc::FALLOC_FL_ZERO_RANGE => Ok(Allocation::Zero { keep_size }),
        _ => Err(errno(libc::EOPNOTSUPP, "this fallocate")),
    }
}

/// Numbers of devices as the kernel's `new_encode_dev` has them.
pub(super) fn device_of(rdev: u32) -> Content<'static> {
    Content::Device {
        major: rdev >> 8 & 0xfff,
        minor: rdev & 0xff | rdev >> 12 & 0xf_ff00,
    }
}

/// What `lseek` looks for, and from where.
pub(super) fn sought(offset: i64, whence: i32) -> Result<(u64, Sought), BackendError> {
    let sought = match whence {
        libc::SEEK_DATA => Sought::Data,
        libc::SEEK_HOLE => Sought::Hole,
        _ => return Err(errno(libc::EINVAL, "neither data nor a hole")),
    };
    let from = u64::try_from(offset).map_err(|_| errno(libc::ENXIO, "before the beginning"))?;
    Ok((from, sought))
}

pub(super) fn set_mode(flags: i32) -> SetMode {
    match flags {
        libc::XATTR_CREATE => SetMode::Create,
        libc::XATTR_REPLACE => SetMode::Replace,
        _ => SetMode::Any,
    }
}

/// `struct fstrim_range` of the kernel: three `u64` in the machine's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrimRange {
    pub start_bytes: u64,
    /// Of the request: how far; of the answer: how much was given back.
    pub len_bytes: u64,
    /// Shorter runs of free space stay.
    pub least_bytes: u64,
}

impl TrimRange {
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, BackendError> {
        let word = |at: usize| bytes.get(at..).and_then(|rest| rest.first_chunk::<8>());
        match (word(0), word(8), word(16)) {
            (Some(start), Some(len), Some(least)) => Ok(Self {
                start_bytes: u64::from_ne_bytes(*start),
                len_bytes: u64::from_ne_bytes(*len),
                least_bytes: u64::from_ne_bytes(*least),
            }),
            _ => Err(errno(libc::EINVAL, "no range to trim")),
        }
    }

    pub(super) fn bytes(self) -> [u8; 24] {
        let mut bytes = [0; 24];
        let words = [self.start_bytes, self.len_bytes, self.least_bytes];
        for (place, word) in bytes.chunks_exact_mut(8).zip(words) {
            place.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_to_trim_is_the_kernel_s_struct() {
        let range = TrimRange {
            start_bytes: 1 << 20,
            len_bytes: u64::MAX,
            least_bytes: 4096,
        };
        assert_eq!(TrimRange::parse(&range.bytes()).unwrap(), range);
        assert_eq!(range.bytes()[8..16], [0xff; 8]);
        assert!(TrimRange::parse(&[0; 23]).is_err());
    }
}
