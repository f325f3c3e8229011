//! What the kernel cannot be told over FUSE, and root can write into sysfs: read-ahead and dirty limits.
//!
//! Without it, INIT's read-ahead is cut to 128 KiB, and at most 1 % of memory may be dirty, whatever the
//! server's cache holds. Without any limit the kernel would keep a stream to itself until it is synced; from half of
//! the limit on it writes beside the program.

use crate::mountinfo;
use std::io;
use std::path::{Path, PathBuf};

/// What hides a round trip of half a millisecond at 2 GB/s.
const READ_AHEAD_KIB: &str = "4096";
/// 128 MiB that the kernel may keep dirty of the mount.
const MAX_DIRTY_BYTES: &str = "134217728";
/// Percent of the memory that may be dirty in all, for kernels before 6.2, which count no bytes.
const MAX_RATIO: &str = "50";

/// Sets the limits of the mount on `dir`; without privileges they stay as they are.
pub fn tune(dir: &Path) {
    if let Err(error) = try_tune(dir) {
        tracing::debug!("{}: read-ahead and dirty limits: {error}", dir.display());
    }
}

fn try_tune(dir: &Path) -> io::Result<()> {
    let Some(entry) = mountinfo::mounted_at(dir)? else {
        return Err(io::Error::from(io::ErrorKind::NotFound));
    };
    let bdi = PathBuf::from(format!("/sys/class/bdi/0:{}", entry.minor));
    std::fs::write(bdi.join("read_ahead_kb"), READ_AHEAD_KIB)?;
    let limited = std::fs::write(bdi.join("max_bytes"), MAX_DIRTY_BYTES)
        .and_then(|()| std::fs::write(bdi.join("strict_limit"), "1"));
    if let Err(error) = limited {
        tracing::debug!("max_bytes and strict_limit: {error}");
        std::fs::write(bdi.join("max_ratio"), MAX_RATIO)?;
    }
    Ok(())
}
