//! One mount from its command to its end: lease, recovery, mount, service, last flush, release.

use super::files::Files;
use super::options::MountOptions;
use super::session::MountedFiles;
use super::snapshots::Snapshots;
use super::timely::TimelyDevice;
use super::tuning;
use crate::backend::{Backend, BackendError, Connect, ConnectOptions, TargetName, WriterLease};
use crate::daemon::{self, DEADLINE_MARGIN, Ready, SHUTDOWN, Signals};
use crate::error::FuseFsError;
use crate::ext4::device::TargetDevice;
use crate::ext4::error::FsError;
use crate::ext4::filesystem::{Filesystem, Options};
use crate::ext4::time::Timestamp;
use crate::state_file::RuntimeDir;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Metadata that is kept in memory.
const METADATA_BYTES: u64 = 256 << 20;
/// Data of files that waits to be written.
const DIRTY_BYTES: u64 = 256 << 20;

/// What to mount, and where.
pub struct OwnMount {
    pub target: TargetName,
    /// Absolute.
    pub dir: PathBuf,
    pub servers: ConnectOptions,
    pub options: MountOptions,
    pub state: RuntimeDir,
}

/// A filesystem that is open, and the right to write it.
struct Opened {
    files: Arc<Files>,
    lease: Option<Box<dyn WriterLease>>,
}

/// Mounts and serves until it is unmounted; what was acknowledged is durable when this returns.
///
/// # Errors
/// It cannot be mounted, or the last flush failed.
pub fn run(connect: Connect, mount: &OwnMount, ready: Ready) -> Result<(), FuseFsError> {
    daemon::check_mount_point(&mount.dir)?;
    let system = |what| move |source| FuseFsError::System { what, source };
    let runtime = daemon::runtime().map_err(system("starting the runtime"))?;
    let result = runtime.block_on(async {
        let opened = open(connect, mount).await?;
        let served = serve(mount, &opened, ready, runtime.handle()).await;
        let closed = opened.files.close().await;
        if let Some(lease) = opened.lease
            && let Err(error) = lease.release().await
        {
            tracing::warn!("the lease was not released, it will expire: {error}");
        }
        served.and_then(|()| daemon::finish(&mount.state, &mount.dir, closed))
    });
    runtime.shutdown_timeout(SHUTDOWN);
    result
}

async fn serve(
    mount: &OwnMount,
    opened: &Opened,
    ready: Ready,
    runtime: &tokio::runtime::Handle,
) -> Result<(), FuseFsError> {
    let system = |what| move |source| FuseFsError::System { what, source };
    let (files, dir, source) = (&opened.files, &mount.dir, mount.target.to_string());
    let signals = Signals::listen().map_err(system("listening to signals"))?;
    let mounted = MountedFiles::mount(files.clone(), &source, dir, &mount.options, runtime)?;
    tuning::tune(dir);
    let ready = daemon::record(&mount.state, dir, None)
        .and_then(|()| ready.usable().map_err(system("leaving the terminal")));
    if let Err(error) = ready {
        let _ = daemon::unmount_view(dir, true);
        return Err(error);
    }
    let join = move || mounted.wait();
    let ended = daemon::wait_for_end(signals, join, async || files.sync().await, dir);
    tokio::pin!(ended);
    let ended = tokio::select! {
        ended = &mut ended => ended,
        reason = lost(opened) => {
            // The servers refuse every change from now on: the next commit gives the journal up.
            tracing::error!("{source}: the lease is lost: {reason}");
            ended.await
        }
    };
    ended.map_err(system("serving the mount"))
}

async fn lost(opened: &Opened) -> String {
    match &opened.lease {
        Some(lease) => lease.lost().await,
        None => std::future::pending().await,
    }
}

async fn open(connect: Connect, mount: &OwnMount) -> Result<Opened, FuseFsError> {
    let target = mount.target.to_string();
    let failed = |error: BackendError| FuseFsError::Open {
        target: target.clone(),
        reason: error.to_string(),
    };
    let backend = connect(mount.servers.clone()).await.map_err(failed)?;
    let volume = backend.open(&mount.target).await.map_err(failed)?;
    let lease = match volume.is_read_only() {
        true => None,
        false => {
            let purpose = format!("mount on {}", mount.dir.display());
            let lease = volume.acquire(&purpose, mount.options.wait).await;
            Some(lease.map_err(failed)?)
        }
    };
    // The size may have changed while another one held the volume.
    volume.refresh().await.map_err(failed)?;
    let read_only = mount.options.read_only || volume.is_read_only();
    let deadline = mount.servers.io_deadline + DEADLINE_MARGIN;
    let below = Arc::new(TargetDevice(volume.clone()));
    let device = TimelyDevice::new(below, deadline);
    let fs = Filesystem::open(Arc::new(device), options(mount, read_only)).await;
    let fs = fs.map_err(|source| unreadable(&target, source))?;
    if !read_only && fs.is_read_only() {
        let features = fs.unwritable_features().join(", ");
        tracing::warn!("{target}: mounted read-only: it uses {features}");
    }
    let snapshots = mount
        .target
        .snapshot
        .is_none()
        .then(|| snapshots(mount, backend));
    let files = Arc::new(Files::new(fs, volume, snapshots, mount.options.atime));
    Ok(Opened { files, lease })
}

fn snapshots(mount: &OwnMount, backend: Arc<dyn Backend>) -> Snapshots {
    let deadline = mount.servers.io_deadline + DEADLINE_MARGIN;
    Snapshots::new(
        backend,
        mount.target.volume.clone(),
        deadline,
        options(mount, true),
    )
}

fn unreadable(target: &str, error: FsError) -> FuseFsError {
    let target = target.to_owned();
    match error {
        FsError::Ext4(source) => FuseFsError::Ext4 { target, source },
        other => FuseFsError::Open {
            target,
            reason: other.to_string(),
        },
    }
}

fn options(mount: &OwnMount, read_only: bool) -> Options {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO);
    Options {
        read_only,
        discard: mount.options.discard,
        clock: Arc::new(kernel_time),
        seed: now.as_nanos() as u64 ^ u64::from(std::process::id()),
        cache_bytes: METADATA_BYTES,
        dirty_limit_bytes: mount.options.cache_bytes.unwrap_or(DIRTY_BYTES),
        commit_interval: mount.options.commit,
    }
}

/// The clock by which the kernel stamps what it writes back: it is behind the exact one by up to a
/// tick, and a file must not seem changed before it was made.
fn kernel_time() -> Timestamp {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: a place for the time, and a clock that Linux has had since 2.6.32.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &mut now) };
    Timestamp {
        seconds: now.tv_sec,
        nanos: u32::try_from(now.tv_nsec).unwrap_or(0),
    }
}
