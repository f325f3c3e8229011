//! What the kernel cannot be told over FUSE, and root can write into sysfs: read-ahead and dirty limits.
//!
//! Without it, INIT's read-ahead is cut to 128 KiB, and at most 1 % of memory may be dirty, whatever the
//! server's cache holds.

use crate::mountinfo;
use std::io;
use std::path::{Path, PathBuf};

/// What hides a round trip of half a millisecond at 2 GB/s.
const READ_AHEAD_KIB: &str = "4096";
/// Percent of the memory that may be dirty in all.
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
    // Kernels before 6.2 have no strict_limit to clear.
    if let Err(error) = std::fs::write(bdi.join("strict_limit"), "0") {
        tracing::debug!("strict_limit: {error}");
    }
    std::fs::write(bdi.join("max_ratio"), MAX_RATIO)
}
