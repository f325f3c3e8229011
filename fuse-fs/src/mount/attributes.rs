//! Attributes and times in the forms of FUSE.

use super::files::Found;
use crate::ext4::inode::Kind;
use crate::ext4::namespace::NewTime;
use crate::ext4::time::Timestamp;
use fuser::{FileAttr, FileType, INodeNo, TimeOrNow};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Preferred unit of IO.
pub(super) const BLOCK_BYTES: u32 = 4096;

pub(super) fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Regular => FileType::RegularFile,
        Kind::Directory => FileType::Directory,
        Kind::CharDevice => FileType::CharDevice,
        Kind::BlockDevice => FileType::BlockDevice,
        Kind::Fifo => FileType::NamedPipe,
        Kind::Socket => FileType::Socket,
        Kind::Symlink => FileType::Symlink,
    }
}

fn system_time(time: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let whole = if time.seconds < 0 {
        UNIX_EPOCH.checked_sub(seconds)
    } else {
        UNIX_EPOCH.checked_add(seconds)
    };
    whole.unwrap_or(UNIX_EPOCH) + Duration::from_nanos(u64::from(time.nanos))
}

/// `fuser` 0.18 counts the nanoseconds of a time before 1970 backwards when it reads one, though not when
/// it writes one; the kernel has them forwards.
pub(super) fn timestamp(time: SystemTime) -> Timestamp {
    let (since, sign) = match time.duration_since(UNIX_EPOCH) {
        Ok(since) => (since, 1),
        Err(error) => (error.duration(), -1),
    };
    Timestamp {
        seconds: since.as_secs().cast_signed() * sign,
        nanos: since.subsec_nanos(),
    }
}

pub(super) fn new_time(time: TimeOrNow) -> NewTime {
    match time {
        TimeOrNow::Now => NewTime::Now,
        TimeOrNow::SpecificTime(time) => NewTime::At(timestamp(time)),
    }
}

/// As the kernel's `new_encode_dev`.
fn encoded((major, minor): (u32, u32)) -> u32 {
    minor & 0xff | major << 8 | (minor & !0xff) << 12
}

/// `number` is the kernel's key in the answer to a lookup, else only shown.
pub(super) fn file_attr(found: &Found, number: u64) -> FileAttr {
    let attr = &found.attr;
    FileAttr {
        ino: INodeNo(number),
        size: attr.size_bytes,
        blocks: attr.sectors,
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: system_time(attr.crtime),
        kind: file_type(found.kind),
        perm: attr.mode & 0o7777,
        nlink: u32::from(attr.links),
        uid: attr.uid,
        gid: attr.gid,
        rdev: encoded(attr.device),
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

/// Of a file that cannot be read.
pub(super) fn unknown(kind: Kind) -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: file_type(kind),
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_the_kernel_s() {
        // As `fuser` reads (seconds, nanoseconds) of the kernel.
        let read = |seconds: i64, nanos| match seconds {
            0.. => UNIX_EPOCH + Duration::new(seconds.unsigned_abs(), nanos),
            _ => UNIX_EPOCH - Duration::new(seconds.unsigned_abs(), nanos),
        };
        for (seconds, nanos) in [
            (0, 0),
            (7, 5),
            (-1, 0),
            (-14_182_940, 500_000_000),
            (1 << 33, 1),
        ] {
            let time = Timestamp { seconds, nanos };
            assert_eq!(timestamp(read(seconds, nanos)), time);
        }
        let half = Timestamp {
            seconds: -2,
            nanos: 500_000_000,
        };
        assert_eq!(system_time(half), UNIX_EPOCH - Duration::from_millis(1500));
    }

    #[test]
    fn device_numbers_are_the_kernel_s() {
        assert_eq!(encoded((8, 1)), 0x801);
        assert_eq!(encoded((300, 70_000)), 0x1111_2c70);
    }
}
