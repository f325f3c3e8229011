//! The connection with the kernel: what is asked of it, and how it begins and ends.

use super::adapter::Adapter;
use super::awake;
use super::files::Files;
use super::options::{Atime, MountOptions};
use crate::adapter::{MAX_BACKGROUND, MAX_WRITE_BYTES, check_fuse, reader_threads};
use crate::error::FuseFsError;
use fuser::{BackgroundSession, Config, InitFlags, KernelConfig, MountOption, Session, SessionACL};
use std::io;
use std::path::Path;
use std::sync::Arc;
use tokio::runtime::Handle;

/// A filesystem that is mounted; the kernel's requests are served until it is unmounted.
pub struct MountedFiles {
    session: BackgroundSession,
}

impl MountedFiles {
    /// Mounts `files` on `dir` and serves them; usable when this returns. `source` is what the
    /// kernel's table of mounts shows.
    ///
    /// # Errors
    /// [`FuseFsError::NoFuse`] without the device, [`FuseFsError::System`] for `low_latency` where that cannot be,
    /// [`FuseFsError::Mount`] otherwise.
    pub fn mount(
        files: Arc<Files>,
        source: &str,
        dir: &Path,
        options: &MountOptions,
        runtime: &Handle,
    ) -> Result<Self, FuseFsError> {
        check_fuse()?;
        let read_only = files.is_read_only();
        let adapter = Adapter::new(files, options.clone(), runtime.clone());
        let kernel = adapter.kernel.clone();
        if options.low_latency {
            awake::check()?;
            runtime.spawn(awake::keep_awake(adapter.stats.clone()));
        }
        let failed = |error: io::Error| FuseFsError::Mount {
            filesystem: "ext4 (our own)".to_owned(),
            target: source.to_owned(),
            dir: dir.to_owned(),
            source: error,
        };
        let config = config(source, options, read_only);
        let session = Session::new(adapter, dir, &config).map_err(failed)?;
        kernel.reach(session.notifier());
        Ok(Self {
            session: session.spawn().map_err(failed)?,
        })
    }

    /// Waits until the kernel has ended the connection: unmounted, and the last file closed.
    ///
    /// # Errors
    /// What ended it, if it was not an unmount.
    pub fn wait(self) -> io::Result<()> {
        self.session.join()
    }
}

fn config(source: &str, options: &MountOptions, read_only: bool) -> Config {
    let root = rustix::process::geteuid().is_root();
    let pick = |given: Option<bool>, yes, no| if given.unwrap_or(root) { yes } else { no };
    let all = options.allow_other.unwrap_or(root);
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(source.to_owned()),
        // Named so that `fuser` passes it on to the kernel, which shows it as the type.
        MountOption::CUSTOM("subtype=blockd".to_owned()),
        MountOption::DefaultPermissions,
        pick(options.devices, MountOption::Dev, MountOption::NoDev),
        pick(options.suid, MountOption::Suid, MountOption::NoSuid),
    ];
    let chosen = [
        (read_only, MountOption::RO),
        (!options.exec, MountOption::NoExec),
        (options.sync, MountOption::Sync),
        (options.dirsync, MountOption::DirSync),
        (options.atime == Atime::Never, MountOption::NoAtime),
    ];
    let chosen = chosen.into_iter().filter(|(wanted, _)| *wanted);
    config
        .mount_options
        .extend(chosen.map(|(_, option)| option));
    config.acl = if all {
        SessionACL::All
    } else {
        SessionACL::Owner
    };
    config.n_threads = Some(reader_threads());
    config.clone_fd = true;
    config
}

/// Tells the kernel what this mount can do. Locks are left to it: only this host writes.
pub(super) fn negotiate(options: &MountOptions, config: &mut KernelConfig) -> io::Result<()> {
    let chosen = [
        (true, InitFlags::FUSE_ASYNC_DIO),
        (true, InitFlags::FUSE_PARALLEL_DIROPS),
        (true, InitFlags::FUSE_DO_READDIRPLUS),
        (true, InitFlags::FUSE_READDIRPLUS_AUTO),
        (true, InitFlags::FUSE_CACHE_SYMLINKS),
        (true, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP),
        // The umask comes with the request: a default ACL takes its place.
        (true, InitFlags::FUSE_DONT_MASK),
        (true, InitFlags::FUSE_HAS_IOCTL_DIR),
        // Set-uid bits are ours to clear: the kernel need not ask for them before each write.
        (true, InitFlags::FUSE_HANDLE_KILLPRIV_V2),
        (options.writeback, InitFlags::FUSE_WRITEBACK_CACHE),
        (options.acl, InitFlags::FUSE_POSIX_ACL),
    ];
    for (_, flag) in chosen.into_iter().filter(|(wanted, _)| *wanted) {
        if let Err(missing) = config.add_capabilities(flag) {
            tracing::debug!("the kernel has no {missing:?}");
        }
    }
    let limits = [
        config.set_max_write(MAX_WRITE_BYTES).is_ok(),
        config.set_max_background(MAX_BACKGROUND).is_ok(),
    ];
    match limits {
        [true, true] => Ok(()),
        _ => Err(io::Error::other(
            "the kernel's limits for FUSE are below ours",
        )),
    }
}
