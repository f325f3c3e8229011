//! `/dev/blockd/VOL`: made by udev where its rule is installed, else by the daemon.

use super::error::AttachError;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DIRECTORY: &str = "/dev/blockd";
/// udev listens here while it runs.
const UDEV: &str = "/run/udev/control";
/// How long udev may take for its rules.
const UDEV_PATIENCE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(50);

/// The link of a target.
#[must_use]
pub(super) fn link_of(target: &str) -> PathBuf {
    Path::new(DIRECTORY).join(target)
}

/// Sees to it that the link is there; waits for udev first.
pub(super) async fn make(target: &str, device: &Path) -> Result<PathBuf, AttachError> {
    let link = link_of(target);
    let polls = match Path::new(UDEV).exists() {
        true => UDEV_PATIENCE.as_millis() / POLL.as_millis(),
        false => 0,
    };
    for _ in 0..polls {
        if points_to(&link, device) {
            return Ok(link);
        }
        tokio::time::sleep(POLL).await;
    }
    replace(&link, device).map_err(|error| AttachError::system(link.display(), &error))?;
    Ok(link)
}

/// Takes the link away, unless it is of another device.
pub(super) fn remove(link: &Path, device: &Path) {
    if points_to(link, device)
        && let Err(error) = fs::remove_file(link)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(link = %link.display(), %error, "not removed");
    }
}

/// udev's links are relative, ours are not.
fn points_to(link: &Path, device: &Path) -> bool {
    let at = fs::read_link(link).ok();
    let at = at.and_then(|to| link.parent()?.join(to).canonicalize().ok());
    at.is_some_and(|at| at == device)
}

fn replace(link: &Path, device: &Path) -> io::Result<()> {
    let parent = link.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent)?;
    match fs::remove_file(link) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    symlink(device, link)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_is_replaced_and_only_its_own_device_removes_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let (one, two) = (root.join("nbd1"), root.join("nbd2"));
        fs::write(&one, "").unwrap();
        fs::write(&two, "").unwrap();
        let link = root.join("blockd/v");
        replace(&link, &one).unwrap();
        replace(&link, &two).unwrap();
        assert!(points_to(&link, &two));
        remove(&link, &one);
        assert!(link.exists());
        remove(&link, &two);
        assert!(!link.exists());
    }
}
