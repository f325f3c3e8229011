//! `fuse-fs umount`: data first, then the mount, the loop device, the view and its daemon.
//!
//! Every step has the command's deadline. When it passes, nothing more is taken down unless
//! `--force` was given; then the rest is torn down without waiting for the servers.

use crate::daemon::{Step, supervised, unmount_view, wait_readable};
use crate::error::FuseFsError;
use crate::loopdev;
use crate::mountinfo::{self, MountEntry};
use crate::state_file::{Record, RuntimeDir, What};
use rustix::mount::UnmountFlags;
use rustix::process::{Signal, pidfd_send_signal};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long each step of a forced detach may take: nothing of it waits for a server.
const FORCE_STEP: Duration = Duration::from_secs(5);

/// How patient an unmount is.
#[derive(Clone, Copy, Debug)]
pub struct UmountOptions {
    pub timeout: Duration,
    /// After the timeout, give the unflushed data up.
    pub force: bool,
}

/// Unmounts what `fuse-fs` mounted on `dir` (absolute), a kernel's filesystem or a view.
///
/// # Errors
/// [`FuseFsError::Busy`] and [`FuseFsError::Deadline`] leave it mounted;
/// [`FuseFsError::Unflushed`] says that it is gone and data may be lost.
pub fn umount(dir: &Path, state: &RuntimeDir, options: UmountOptions) -> Result<(), FuseFsError> {
    let record = state.load(dir)?;
    let record = record.ok_or_else(|| FuseFsError::NotMounted {
        dir: dir.to_owned(),
    })?;
    let run = Run {
        state,
        timeout: options.timeout,
        until: Instant::now() + options.timeout,
    };
    let result = match &record.what {
        What::View { .. } => run.view(dir),
        What::Kernel {
            device,
            file,
            view_dir,
            ..
        } => run.kernel(dir, device, file, view_dir),
    };
    match result {
        Err(error @ (FuseFsError::Deadline { .. } | FuseFsError::Unmount { .. }))
            if options.force =>
        {
            run.force(&record)?;
            Err(FuseFsError::Unflushed {
                dir: dir.to_owned(),
                reason: first_reason(&error),
            })
        }
        result => result,
    }
}

fn first_reason(error: &FuseFsError) -> String {
    match error {
        FuseFsError::Deadline {
            what, timeout_s, ..
        } => format!("{what} did not finish within {timeout_s} s"),
        FuseFsError::Unmount { reason, .. } => reason.clone(),
        other => other.to_string(),
    }
}

/// `EROFS` comes from a filesystem that was writable when it was mounted.
fn reason_of(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(libc::EROFS) => {
            "the kernel's filesystem has stopped itself after a failed IO (see dmesg)".to_owned()
        }
        _ => error.to_string(),
    }
}

struct Run<'a> {
    state: &'a RuntimeDir,
    timeout: Duration,
    until: Instant,
}

impl Run<'_> {
    fn kernel(
        &self,
        dir: &Path,
        device: &Path,
        file: &Path,
        view_dir: &Path,
    ) -> Result<(), FuseFsError> {
        if is_mounted(dir, |entry| Path::new(&entry.source) == device)? {
            self.step(dir, "writing the data", || {
                rustix::fs::syncfs(File::open(dir)?).map_err(io::Error::from)
            })?;
            self.step(dir, "unmounting", || {
                Ok(rustix::mount::unmount(dir, UnmountFlags::NOFOLLOW)?)
            })?;
        }
        if !loopdev::wait_detached(device, file, self.until) {
            return Err(self.late(dir, "detaching the loop device"));
        }
        self.view(view_dir)?;
        self.forget_kernel(dir, view_dir)
    }

    /// Flushes through the view, so that its failures are ours, then unmounts it and waits for the daemon.
    fn view(&self, dir: &Path) -> Result<(), FuseFsError> {
        let Some(record) = self.state.load(dir)? else {
            return Ok(());
        };
        let What::View { daemon, .. } = record.what else {
            return Err(FuseFsError::NotMounted {
                dir: dir.to_owned(),
            });
        };
        let handle = daemon.handle();
        if is_view(dir)? {
            if handle.is_some() {
                self.step(dir, "flushing the volumes", || flush_view(dir))?;
            }
            self.step(dir, "unmounting", || unmount_view(dir, false))?;
        }
        let ended = |handle| wait_readable(handle, self.until).map_err(poll_failed);
        if !handle.as_ref().map_or(Ok(true), ended)? {
            return Err(self.late(dir, "the daemon's last flush"));
        }
        self.forget_view(dir)
    }

    /// A daemon that ends well removes its record.
    fn forget_view(&self, dir: &Path) -> Result<(), FuseFsError> {
        let Some(record) = self.state.load(dir)? else {
            return Ok(());
        };
        self.state.remove(dir)?;
        let died = "the view's daemon had died".to_owned();
        let reason = match record.what {
            What::View { failure, .. } => failure.unwrap_or(died),
            What::Kernel { .. } => died,
        };
        Err(FuseFsError::Unflushed {
            dir: dir.to_owned(),
            reason,
        })
    }

    fn forget_kernel(&self, dir: &Path, view_dir: &Path) -> Result<(), FuseFsError> {
        // Left behind only if something else was put there, which is not ours to remove.
        let _ = std::fs::remove_dir(view_dir);
        let _ = std::fs::remove_file(view_dir.with_extension("log"));
        self.state.remove(dir)
    }

    /// Runs one step until the deadline; `EBUSY` means in use.
    fn step(
        &self,
        dir: &Path,
        what: &'static str,
        step: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), FuseFsError> {
        let system = |source| FuseFsError::System { what, source };
        match supervised(self.until, step).map_err(system)? {
            Step::Done(Ok(())) => Ok(()),
            Step::Done(Err(error)) if error.raw_os_error() == Some(libc::EBUSY) => {
                Err(FuseFsError::Busy {
                    dir: dir.to_owned(),
                })
            }
            Step::Done(Err(error)) => Err(FuseFsError::Unmount {
                dir: dir.to_owned(),
                reason: format!("{what}: {}", reason_of(&error)),
            }),
            Step::TimedOut => Err(self.late(dir, what)),
        }
    }

    fn late(&self, dir: &Path, what: &'static str) -> FuseFsError {
        let timeout_s = self.timeout.as_secs();
        FuseFsError::Deadline {
            dir: dir.to_owned(),
            what,
            timeout_s,
        }
    }

    /// Ends the view first, so that everything above it fails instead of waiting.
    fn force(&self, record: &Record) -> Result<(), FuseFsError> {
        let view_dir = match &record.what {
            What::View { .. } => &record.dir,
            What::Kernel { view_dir, .. } => view_dir,
        };
        self.kill_view(view_dir)?;
        if let What::Kernel { device, file, .. } = &record.what {
            detach(&record.dir)?;
            if !loopdev::wait_detached(device, file, Instant::now() + FORCE_STEP) {
                tracing::warn!("{} is still attached; see losetup", device.display());
            }
        }
        detach(view_dir)?;
        self.state.remove(view_dir)?;
        match &record.what {
            What::View { .. } => Ok(()),
            What::Kernel { .. } => self.forget_kernel(&record.dir, view_dir),
        }
    }

    /// Aborts the FUSE connection and kills the daemon: either alone fails all its requests.
    fn kill_view(&self, view_dir: &Path) -> Result<(), FuseFsError> {
        if let Some(entry) = mounted_at(view_dir)? {
            let abort = PathBuf::from(format!("/sys/fs/fuse/connections/{}/abort", entry.minor));
            if let Err(error) = std::fs::write(&abort, "1") {
                tracing::debug!("{}: {error}", abort.display());
            }
        }
        let Some(What::View { daemon, .. }) = self.state.load(view_dir)?.map(|record| record.what)
        else {
            return Ok(());
        };
        if let Some(handle) = daemon.handle() {
            // It may have ended by itself meanwhile.
            let _ = pidfd_send_signal(&handle, Signal::KILL);
            wait_readable(&handle, Instant::now() + FORCE_STEP).map_err(poll_failed)?;
        }
        Ok(())
    }
}

/// fsync of the view's root flushes all its volumes. A daemon that has just died is found out later.
fn flush_view(dir: &Path) -> io::Result<()> {
    match File::open(dir).and_then(|root| root.sync_all()) {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOTCONN | libc::ECONNABORTED)
            ) =>
        {
            Ok(())
        }
        result => result,
    }
}

/// Takes whatever is mounted on `dir` out of the tree.
fn detach(dir: &Path) -> Result<(), FuseFsError> {
    let what = "detaching";
    let system = |source| FuseFsError::System { what, source };
    if mounted_at(dir)?.is_some() {
        match supervised(Instant::now() + FORCE_STEP, || unmount_view(dir, true)).map_err(system)? {
            Step::Done(result) => result.map_err(system)?,
            Step::TimedOut => tracing::warn!("{}: still being detached", dir.display()),
        }
    }
    Ok(())
}

fn is_view(dir: &Path) -> Result<bool, FuseFsError> {
    is_mounted(dir, |entry| entry.filesystem.starts_with("fuse"))
}

fn is_mounted(dir: &Path, ours: impl FnOnce(&MountEntry) -> bool) -> Result<bool, FuseFsError> {
    Ok(mounted_at(dir)?.is_some_and(|entry| ours(&entry)))
}

fn mounted_at(dir: &Path) -> Result<Option<MountEntry>, FuseFsError> {
    let what = "reading /proc/self/mountinfo";
    mountinfo::mounted_at(dir).map_err(|source| FuseFsError::System { what, source })
}

fn poll_failed(source: io::Error) -> FuseFsError {
    FuseFsError::System {
        what: "waiting for the daemon",
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_we_did_not_mount_is_not_ours_to_unmount() {
        let dir = tempfile::tempdir().unwrap();
        let state = RuntimeDir::open(Some(dir.path())).unwrap();
        let options = UmountOptions {
            timeout: Duration::from_secs(1),
            force: true,
        };
        let error = umount(Path::new("/proc"), &state, options).unwrap_err();
        assert!(matches!(error, FuseFsError::NotMounted { .. }));
        assert!(mountinfo::mounted_at(Path::new("/proc")).unwrap().is_some());
    }
}
