//! The process that serves a view: in the background once it is usable, until unmounted or signalled.
//!
//! Forking is done by programs that have one thread: `fuse-fs` starts its runtime after it.

use crate::adapter::{MountedView, ViewOptions};
use crate::backend::{BackendError, Connect, ConnectOptions};
use crate::error::{EXIT_FAILED, FuseFsError};
use crate::mountinfo;
use crate::overlay;
use crate::state_file::{ProcessRef, RuntimeDir, What};
use crate::view::View;
use rustix::mount::UnmountFlags;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// The backend has its own deadline; ours is later and only catches what that one misses.
pub(crate) const DEADLINE_MARGIN: Duration = Duration::from_secs(5);
/// Threads of the runtime that carries the requests.
const MAX_WORKERS: usize = 4;
/// How long tasks that hang may hold up the end of the process.
pub(crate) const SHUTDOWN: Duration = Duration::from_secs(1);

/// The two sides of [`fork`].
pub enum Forked {
    /// Reads what the other side reports.
    Parent(PipeReader, i32),
    /// Reports.
    Child(PipeWriter),
}

/// Forks; the child's pipe tells the parent what became of it.
///
/// # Errors
/// No pipe or no process.
pub fn fork() -> io::Result<Forked> {
    let (reader, writer) = io::pipe()?;
    // SAFETY: the callers have one thread, so the child has all of the parent's state.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child(writer)),
        pid => Ok(Forked::Parent(reader, pid)),
    }
}

/// Gives up standard input, output and error, so that nobody waits for our end to see theirs.
fn leave_terminal() -> io::Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null")?;
    for fd in 0..=2 {
        // SAFETY: both are file descriptors of this process, and 0 to 2 are its own.
        unsafe { libc::dup2(null.as_raw_fd(), fd) };
    }
    Ok(())
}

/// What became of a step that ran in its own process.
#[derive(Debug)]
pub enum Step {
    Done(io::Result<()>),
    /// It is still stuck in the kernel, and is left there.
    TimedOut,
}

/// Runs `step` in a process of its own and waits for it until `until`: system calls on a filesystem
/// whose servers are away cannot be interrupted. To be called by programs with one thread.
///
/// # Errors
/// No pipe or no process.
pub fn supervised(until: Instant, step: impl FnOnce() -> io::Result<()>) -> io::Result<Step> {
    match fork()? {
        Forked::Child(mut writer) => {
            let errno = leave_terminal()
                .and_then(|()| step())
                .err()
                .map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
            let _ = writer.write_all(&errno.to_ne_bytes());
            // SAFETY: ends the child without running what the parent has registered.
            unsafe { libc::_exit(0) }
        }
        Forked::Parent(mut reader, pid) => {
            if !wait_readable(&reader, until)? {
                // SAFETY: our own child, not yet waited for.
                unsafe { libc::kill(pid, libc::SIGKILL) };
                return Ok(Step::TimedOut);
            }
            let mut errno = [0; 4];
            reader.read_exact(&mut errno)?;
            // SAFETY: our own child, which has written its last word.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
            Ok(Step::Done(match i32::from_ne_bytes(errno) {
                0 => Ok(()),
                errno => Err(io::Error::from_raw_os_error(errno)),
            }))
        }
    }
}

/// Waits until `fd` is readable, or `until`; whether it is.
///
/// # Errors
/// poll(2) fails.
pub fn wait_readable(fd: &impl AsRawFd, until: Instant) -> io::Result<bool> {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut poll = libc::pollfd {
            fd: fd.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        let left_ms = i32::try_from(left.as_micros().div_ceil(1000)).unwrap_or(i32::MAX);
        // SAFETY: one pollfd, alive for the call.
        match unsafe { libc::poll(&mut poll, 1, left_ms) } {
            0 => return Ok(false),
            1.. => return Ok(true),
            _ => {}
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Tells whoever waits that the view is usable; in the foreground there is nobody.
pub enum Ready {
    Foreground,
    Background(PipeWriter),
}

impl Ready {
    /// The view is usable: the parent exits with 0, and this process leaves its terminal.
    pub(crate) fn usable(self) -> io::Result<()> {
        let Self::Background(mut writer) = self else {
            return Ok(());
        };
        std::env::set_current_dir("/")?;
        leave_terminal()?;
        writer.write_all(&[0])
    }
}

/// The parent's exit code, when this is the parent.
pub enum Started {
    Parent(u8),
    Daemon(Ready),
}

/// Splits off the daemon and waits, as the parent, until it is usable or has failed.
///
/// # Errors
/// No process can be made.
pub fn start(foreground: bool) -> Result<Started, FuseFsError> {
    let failed = |source| FuseFsError::System {
        what: "starting the daemon",
        source,
    };
    if foreground {
        return Ok(Started::Daemon(Ready::Foreground));
    }
    match fork().map_err(failed)? {
        Forked::Child(writer) => {
            rustix::process::setsid().map_err(|error| failed(error.into()))?;
            Ok(Started::Daemon(Ready::Background(writer)))
        }
        Forked::Parent(mut reader, pid) => {
            let mut word = [0];
            if reader.read_exact(&mut word).is_ok() {
                return Ok(Started::Parent(0));
            }
            Ok(Started::Parent(exit_code_of(pid)))
        }
    }
}

/// The daemon ended before it was usable; it has said why on our standard error.
fn exit_code_of(pid: i32) -> u8 {
    let mut status = 0;
    // SAFETY: our own child, and a place for its status.
    unsafe { libc::waitpid(pid, &mut status, 0) };
    match libc::WIFEXITED(status) {
        true => u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(EXIT_FAILED),
        false => EXIT_FAILED,
    }
}

/// What to serve, and where.
pub struct Serve {
    /// Absolute.
    pub dir: PathBuf,
    pub state: RuntimeDir,
    pub servers: ConnectOptions,
    pub view: ViewOptions,
    /// A loop device will lie on the view, for one mount: this process must not wait for its own
    /// writes, and snapshots can be written, in memory.
    pub for_loop: bool,
}

/// Mounts the view and serves it until it is unmounted.
///
/// # Errors
/// It cannot be mounted, or the last flush failed.
pub fn serve(connect: Connect, serve: &Serve, ready: Ready) -> Result<(), FuseFsError> {
    check_mount_point(&serve.dir)?;
    if serve.for_loop {
        stay_out_of_reclaim();
    }
    let system = |what| move |source| FuseFsError::System { what, source };
    let runtime = runtime().map_err(system("starting the runtime"))?;
    let result = runtime.block_on(async {
        let view_failed = |reason: String| FuseFsError::View {
            dir: serve.dir.clone(),
            reason,
        };
        let backend = connect(serve.servers.clone()).await;
        let backend = backend.map_err(|error| view_failed(error.to_string()))?;
        let view = Arc::new(View::new(
            backend,
            serve.servers.io_deadline + DEADLINE_MARGIN,
            serve.for_loop.then_some(overlay::LIMIT_BYTES),
        ));
        let signals = Signals::listen().map_err(system("listening to signals"))?;
        let mounted = MountedView::mount(view.clone(), &serve.dir, serve.view, runtime.handle())?;
        let ready = record(&serve.state, &serve.dir, None)
            .and_then(|()| ready.usable().map_err(system("leaving the terminal")));
        if let Err(error) = ready {
            let _ = unmount_view(&serve.dir, true);
            return Err(error);
        }
        let join = move || mounted.wait();
        wait_for_end(signals, join, async || view.flush_all().await, &serve.dir)
            .await
            .map_err(system("serving the view"))?;
        finish(&serve.state, &serve.dir, view.flush_all().await)
    });
    runtime.shutdown_timeout(SHUTDOWN);
    result
}

pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
    // The other half is for the readers of FUSE requests; a worker more on few cores costs wake-ups only.
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads((cores / 2).clamp(1, MAX_WORKERS))
        .enable_all()
        .build()
}

/// Notes that this process serves what is mounted on `dir`.
pub(crate) fn record(
    state: &RuntimeDir,
    dir: &Path,
    failure: Option<String>,
) -> Result<(), FuseFsError> {
    let own = ProcessRef::current();
    let daemon = own.map_err(|source| FuseFsError::System {
        what: "reading /proc",
        source,
    })?;
    state.save(dir, What::View { daemon, failure })
}

/// After the last flush; `fuse-fs umount` reads its failure from the state file.
pub(crate) fn finish(
    state: &RuntimeDir,
    dir: &Path,
    flushed: Result<(), BackendError>,
) -> Result<(), FuseFsError> {
    match flushed {
        Ok(()) => state.remove(dir),
        Err(error) => {
            let reason = error.to_string();
            record(state, dir, Some(reason.clone()))?;
            Err(FuseFsError::Unflushed {
                dir: dir.to_owned(),
                reason,
            })
        }
    }
}

/// What asks a mount to end. It is listened to before anybody is told that the mount is usable.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Serves until the kernel ends the connection, which `join` waits for. The first signal flushes and
/// unmounts, lazily if the mount is in use; a second one ends the process at once.
pub(crate) async fn wait_for_end(
    mut signals: Signals,
    join: impl FnOnce() -> io::Result<()> + Send + 'static,
    flush: impl AsyncFn() -> Result<(), BackendError>,
    dir: &Path,
) -> io::Result<()> {
    let (sender, mut ended) = oneshot::channel();
    std::thread::spawn(move || sender.send(join()));
    for asked in 0u32.. {
        tokio::select! {
            result = &mut ended => return result.unwrap_or(Ok(())),
            () = signals.next() => {}
        }
        if asked > 0 {
            tracing::warn!("second signal: the mount is left as it is");
            break;
        }
        if let Err(error) = flush().await {
            tracing::error!("flush before unmounting: {error}");
        }
        let dir = dir.to_owned();
        // Not waited for: unmounting sends requests that this process answers.
        tokio::task::spawn_blocking(move || unmount_or_detach(&dir));
    }
    Ok(())
}

fn unmount_or_detach(dir: &Path) {
    if let Err(error) = unmount_view(dir, false) {
        tracing::warn!(
            "{}: {error}; detached, and served until its last user is gone",
            dir.display()
        );
        if let Err(error) = unmount_view(dir, true) {
            tracing::error!("{}: {error}", dir.display());
        }
    }
}

/// Unmounts a view; `lazily` takes it out of the tree while its files stay open. Users who are not
/// root go through fusermount3.
///
/// # Errors
/// `EBUSY` while it is in use, and what umount2(2) says.
pub fn unmount_view(dir: &Path, lazily: bool) -> io::Result<()> {
    let flags = if lazily {
        UnmountFlags::DETACH
    } else {
        UnmountFlags::empty()
    };
    match rustix::mount::unmount(dir, flags | UnmountFlags::NOFOLLOW) {
        Err(rustix::io::Errno::PERM) => fusermount(dir, lazily),
        result => Ok(result?),
    }
}

fn fusermount(dir: &Path, lazily: bool) -> io::Result<()> {
    let mut command = Command::new("fusermount3");
    command
        .arg("-u")
        .args(lazily.then_some("-z"))
        .arg("--")
        .arg(dir);
    match command.status()?.success() {
        true => Ok(()),
        false => Err(io::Error::from_raw_os_error(libc::EBUSY)),
    }
}

/// `dir` is a directory with nothing mounted on it.
///
/// # Errors
/// [`FuseFsError::Directory`] or [`FuseFsError::InUse`].
pub fn check_mount_point(dir: &Path) -> Result<(), FuseFsError> {
    let system = |source| FuseFsError::System {
        what: "reading /proc/self/mountinfo",
        source,
    };
    if let Some(entry) = mountinfo::mounted_at(dir).map_err(system)? {
        let what = format!("{} ({})", entry.source, entry.filesystem);
        return Err(FuseFsError::InUse {
            dir: dir.to_owned(),
            what,
        });
    }
    let reason = match std::fs::metadata(dir) {
        Ok(metadata) if metadata.is_dir() => return Ok(()),
        Ok(_) => "not a directory".to_owned(),
        Err(error) => format!("{error}; make the directory first"),
    };
    Err(FuseFsError::Directory {
        dir: dir.to_owned(),
        reason,
    })
}

/// Under memory pressure the kernel writes dirty pages of the loop device through this process:
/// neither its allocations nor its page faults may wait for those writes. Best effort, since both
/// need privileges (CAP_SYS_RESOURCE, CAP_IPC_LOCK) that a container may lack.
fn stay_out_of_reclaim() {
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::debug!("PR_SET_IO_FLUSHER: {error}");
    }
    // SAFETY: only changes how this process's pages are treated.
    let locked =
        unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) };
    if locked != 0 {
        tracing::debug!("mlockall: {}", io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_reports_its_errno() {
        let until = Instant::now() + Duration::from_secs(30);
        let step = supervised(until, || Err(io::Error::from_raw_os_error(libc::EBUSY))).unwrap();
        let Step::Done(Err(error)) = step else {
            panic!("{step:?}")
        };
        assert_eq!(error.raw_os_error(), Some(libc::EBUSY));
        assert!(matches!(
            supervised(until, || Ok(())).unwrap(),
            Step::Done(Ok(()))
        ));
    }

    #[test]
    fn a_stuck_step_does_not_hold_us_up() {
        let (mut reader, _writer) = io::pipe().unwrap();
        let until = Instant::now() + Duration::from_millis(50);
        let step = supervised(until, || reader.read_exact(&mut [0])).unwrap();
        assert!(matches!(step, Step::TimedOut));
    }

    #[test]
    fn mount_points_are_directories_without_a_mount() {
        let dir = tempfile::tempdir().unwrap();
        check_mount_point(dir.path()).unwrap();
        let missing = check_mount_point(&dir.path().join("missing")).unwrap_err();
        assert_eq!(missing.exit_code(), 1);
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(
            check_mount_point(file.path())
                .unwrap_err()
                .to_string()
                .contains("not a directory")
        );
        assert!(matches!(
            check_mount_point(Path::new("/proc")),
            Err(FuseFsError::InUse { .. })
        ));
    }
}
