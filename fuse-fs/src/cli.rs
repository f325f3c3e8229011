//! The command `fuse-fs`: arguments, log, exit codes; the work is in the modules named per subcommand.

use crate::adapter::ViewOptions;
use crate::backend::{Connect, ConnectOptions, TargetName};
use crate::check_command::{self, CheckCommand};
use crate::daemon::{self, Serve, Started};
use crate::error::{EXIT_USAGE, FuseFsError, fsck};
use crate::ext4_source::Source;
use crate::helper::{self, Invocation};
use crate::kernel_mount::{self, KernelMount};
use crate::mkfs_command::{self, MAX_LABEL_BYTES, MkfsCommand};
use crate::mount::grow_command;
use crate::mount::options::MountOptions;
use crate::mount::serve::{self, OwnMount};
use crate::mount::stats_command;
use crate::mountinfo;
use crate::state_file::RuntimeDir;
use crate::umount::{self, UmountOptions};
use clap::{Args, Parser, Subcommand};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tracing_subscriber::EnvFilter;

/// Volumes and snapshots of blockd as files, and mounted as filesystems.
#[derive(Debug, Parser)]
#[command(name = "fuse-fs", version)]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Shows every volume and snapshot as a file: DIR/volumes/NAME, DIR/snapshots/NAME@SNAP.
    Volumes(Volumes),
    /// Mounts the filesystem on a volume (or, read-only, on a snapshot).
    Mount(Mount),
    /// Checks the ext4 filesystem on a volume or snapshot, or in a file; changes nothing.
    ///
    /// Exit codes are those of fsck: 0 clean, 4 errors found, 8 not checked, 16 usage.
    Check(Check),
    /// Makes an ext4 filesystem on a volume, or in a file, as mke2fs of Debian 12 does.
    Mkfs(Mkfs),
    /// Shows what a mount of `mount` has done: requests, errors, latencies.
    Stats(Stats),
    /// Lets the filesystem of a `mount` fill its volume, while it is used: after `blockctl volume resize`.
    Grow(Grow),
    /// Unmounts what `volumes` or `mount` mounted, after its data is flushed.
    Umount(Umount),
}

#[derive(Debug, Args)]
struct Common {
    #[command(flatten)]
    servers: Servers,
    #[command(flatten)]
    runtime: Runtime,
}

#[derive(Debug, Args)]
struct Servers {
    /// Servers of the group, HOST or HOST:PORT; any of them will do.
    #[arg(long, env = "BLOCKD_SERVERS", value_delimiter = ',')]
    servers: Vec<String>,
    /// Seconds that an IO waits for servers that do not answer before it fails with EIO.
    #[arg(long, value_name = "SECONDS", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    io_deadline: u64,
}

impl Servers {
    fn connect_options(&self) -> Result<ConnectOptions, FuseFsError> {
        let given = self.servers.iter().map(|server| server.trim().to_owned());
        let servers: Vec<_> = given.filter(|server| !server.is_empty()).collect();
        if servers.is_empty() {
            return Err(FuseFsError::NoServers);
        }
        let io_deadline = Duration::from_secs(self.io_deadline);
        Ok(ConnectOptions {
            servers,
            io_deadline,
        })
    }
}

#[derive(Debug, Args)]
struct Runtime {
    /// Where the state of mounts is kept [default: /run/blockd, or $XDG_RUNTIME_DIR/blockd of a user].
    #[arg(long, value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Volumes {
    dir: PathBuf,
    #[command(flatten)]
    common: Common,
    /// Stay in the foreground and log to standard error.
    #[arg(short, long)]
    foreground: bool,
    /// Let other users in, within the modes of the files.
    #[arg(long)]
    allow_other: bool,
    /// Cache data in the kernel: only while no other host or NBD client uses the volumes.
    #[arg(long)]
    cache: bool,
    /// Log to this file (in the background, nothing is logged otherwise).
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// A loop device will lie on the view.
    #[arg(long, hide = true)]
    for_loop: bool,
}

#[derive(Debug, Args)]
struct Mount {
    /// VOL or VOL@SNAP.
    target: String,
    dir: PathBuf,
    #[command(flatten)]
    common: Common,
    /// Use the kernel's own ext4 or xfs over a loop device (needs root).
    #[arg(long)]
    kernel: bool,
    /// Mount options as in mount(8).
    #[arg(short, long, value_name = "OPTS", value_delimiter = ',')]
    options: Vec<String>,
    /// Filesystem type with --kernel; found on the volume if absent.
    #[arg(short = 't', long = "type", value_name = "ext4|xfs", value_parser = ["ext4", "xfs"], requires = "kernel")]
    filesystem: Option<String>,
    /// Stay in the foreground and log to standard error.
    #[arg(short, long, conflicts_with = "kernel")]
    foreground: bool,
    /// Seconds to wait for another holder of the volume to end.
    #[arg(long, value_name = "SECONDS", conflicts_with = "kernel", value_parser = clap::value_parser!(u64).range(0..=86_400))]
    wait: Option<u64>,
    /// Log to this file (in the background, nothing is logged otherwise).
    #[arg(long, value_name = "FILE", conflicts_with = "kernel")]
    log: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct Check {
    #[command(flatten)]
    on: On,
    /// Print the result as one line of JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Mkfs {
    #[command(flatten)]
    on: On,
    /// The filesystem's label, at most 16 bytes.
    #[arg(short = 'L', long, default_value = "", value_parser = parse_label)]
    label: String,
    /// Overwrite a filesystem that is there.
    #[arg(long)]
    force: bool,
    /// Print what was made as one line of JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct On {
    /// VOL, or VOL@SNAP to look at a snapshot.
    #[arg(required_unless_present = "image", conflicts_with = "image")]
    target: Option<String>,
    /// A file or block device of this machine instead.
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    #[command(flatten)]
    servers: Servers,
}

#[derive(Debug, Args)]
struct Stats {
    dir: PathBuf,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Grow {
    dir: PathBuf,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
struct Umount {
    dir: PathBuf,
    /// Seconds to wait for the servers.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(0..=86_400))]
    timeout: u64,
    /// After the timeout, detach all the same; data that was not flushed is lost.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    runtime: Runtime,
}

/// Runs the command line of this process; `connect` reaches the servers.
#[must_use]
pub fn run(connect: Connect) -> ExitCode {
    let Invocation::Run(words) = helper::translate(std::env::args_os().collect()) else {
        return ExitCode::SUCCESS;
    };
    let arguments = match Arguments::try_parse_from(words) {
        Ok(arguments) => arguments,
        Err(error) => {
            let usage = if is_check() { fsck::USAGE } else { EXIT_USAGE };
            let code = if error.use_stderr() { usage } else { 0 };
            // A closed standard error leaves only the exit code to tell.
            let _ = error.print();
            return ExitCode::from(code);
        }
    };
    let result = match arguments.command {
        Verb::Volumes(volumes) => show(connect, &volumes),
        Verb::Mount(mount) if mount.kernel => mount_kernel(mount),
        Verb::Mount(mount) => mount_own(connect, mount),
        Verb::Stats(stats) => stats_command::run(&stats.dir, stats.json).map(|()| 0),
        Verb::Grow(grow) => grow_command::run(&grow.dir, grow.json).map(|()| 0),
        Verb::Check(arguments) => check(connect, &arguments),
        Verb::Mkfs(arguments) => mkfs(connect, arguments),
        Verb::Umount(umount) => unmount(&umount),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("fuse-fs: {error}");
            let code = error.exit_code();
            ExitCode::from(match is_check() {
                true if code == EXIT_USAGE => fsck::USAGE,
                true => fsck::NOT_CHECKED,
                false => code,
            })
        }
    }
}

/// `check` is run by those who know fsck, so its exit codes are fsck's and not mount's.
fn is_check() -> bool {
    std::env::args_os()
        .nth(1)
        .is_some_and(|verb| verb == "check")
}

fn show(connect: Connect, volumes: &Volumes) -> Result<u8, FuseFsError> {
    let serve = Serve {
        dir: absolute(&volumes.dir)?,
        state: RuntimeDir::open(volumes.common.runtime.runtime_dir.as_deref())?,
        servers: volumes.common.servers.connect_options()?,
        view: ViewOptions {
            allow_other: volumes.allow_other,
            cache: volumes.cache,
        },
        for_loop: volumes.for_loop,
    };
    start_log(volumes.log.as_deref())?;
    match daemon::start(volumes.foreground)? {
        Started::Parent(code) => Ok(code),
        Started::Daemon(ready) => daemon::serve(connect, &serve, ready).map(|()| 0),
    }
}

fn mount_kernel(mount: Mount) -> Result<u8, FuseFsError> {
    let target = target_name(&mount.target)?;
    start_log(None)?;
    let state = RuntimeDir::open(mount.common.runtime.runtime_dir.as_deref())?;
    let ConnectOptions {
        servers,
        io_deadline,
    } = mount.common.servers.connect_options()?;
    let wanted = KernelMount {
        target,
        dir: absolute(&mount.dir)?,
        servers,
        io_deadline,
        filesystem: mount.filesystem,
        options: mount.options.join(","),
    };
    for note in kernel_mount::mount(&wanted, &state)? {
        eprintln!("fuse-fs: note: {note}");
    }
    Ok(0)
}

fn mount_own(connect: Connect, mount: Mount) -> Result<u8, FuseFsError> {
    let options = MountOptions::parse(mount.options.iter().map(String::as_str));
    let mut options = options.map_err(|reason| FuseFsError::Option { reason })?;
    if let Some(seconds) = mount.wait {
        options.wait = Duration::from_secs(seconds);
    }
    let mut servers = mount.common.servers;
    if servers.servers.is_empty() {
        servers.servers.clone_from(&options.servers);
    }
    let own = OwnMount {
        target: target_name(&mount.target)?,
        dir: absolute(&mount.dir)?,
        servers: servers.connect_options()?,
        options,
        state: RuntimeDir::open(mount.common.runtime.runtime_dir.as_deref())?,
    };
    start_log(mount.log.as_deref())?;
    match daemon::start(mount.foreground)? {
        Started::Parent(code) => Ok(code),
        Started::Daemon(ready) => serve::run(connect, &own, ready).map(|()| 0),
    }
}

fn check(connect: Connect, check: &Check) -> Result<u8, FuseFsError> {
    start_log(None)?;
    let (source, json) = (source(&check.on)?, check.json);
    check_command::run(connect, &CheckCommand { source, json })
}

fn mkfs(connect: Connect, mkfs: Mkfs) -> Result<u8, FuseFsError> {
    start_log(None)?;
    let command = MkfsCommand {
        source: source(&mkfs.on)?,
        label: mkfs.label,
        force: mkfs.force,
        json: mkfs.json,
    };
    mkfs_command::run(connect, &command).map(|()| 0)
}

fn source(on: &On) -> Result<Source, FuseFsError> {
    if let Some(file) = &on.image {
        return Ok(Source::Image(file.clone()));
    }
    let target = target_name(on.target.as_deref().unwrap_or_default())?;
    Ok(Source::Volume(target, on.servers.connect_options()?))
}

fn parse_label(text: &str) -> Result<String, String> {
    match text.len() {
        0..=MAX_LABEL_BYTES => Ok(text.to_owned()),
        length => Err(format!("{length} bytes are more than {MAX_LABEL_BYTES}")),
    }
}

fn target_name(text: &str) -> Result<TargetName, FuseFsError> {
    TargetName::parse(text).ok_or_else(|| FuseFsError::TargetSyntax {
        target: text.to_owned(),
    })
}

fn unmount(arguments: &Umount) -> Result<u8, FuseFsError> {
    start_log(None)?;
    let state = RuntimeDir::open(arguments.runtime.runtime_dir.as_deref())?;
    let options = UmountOptions {
        timeout: Duration::from_secs(arguments.timeout),
        force: arguments.force,
    };
    umount::umount(&absolute(&arguments.dir)?, &state, options).map(|()| 0)
}

fn absolute(dir: &Path) -> Result<PathBuf, FuseFsError> {
    mountinfo::absolute(dir).map_err(|error| FuseFsError::Directory {
        dir: dir.to_owned(),
        reason: error.to_string(),
    })
}

/// Logs to `file`, or to standard error; `RUST_LOG` chooses what.
fn start_log(file: Option<&Path>) -> Result<(), FuseFsError> {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false);
    let Some(path) = file else {
        builder.with_writer(std::io::stderr).init();
        return Ok(());
    };
    let opened = File::options().create(true).append(true).open(path);
    let file = opened.map_err(|error| FuseFsError::State {
        file: path.to_owned(),
        reason: error.to_string(),
    })?;
    builder.with_writer(Arc::new(file)).init();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn servers_are_a_list() {
        let line = ["fuse-fs", "volumes", "/mnt", "--servers", "a:1,,b "];
        let Verb::Volumes(volumes) = Arguments::try_parse_from(line).unwrap().command else {
            panic!("not volumes")
        };
        let options = volumes.common.servers.connect_options().unwrap();
        assert_eq!(options.servers, ["a:1", "b"]);
    }

    #[test]
    fn absurd_numbers_are_refused() {
        for line in [
            ["fuse-fs", "umount", "/mnt", "--timeout", "-1"],
            ["fuse-fs", "volumes", "/mnt", "--io-deadline", "0"],
        ] {
            assert!(Arguments::try_parse_from(line).is_err(), "{line:?}");
        }
    }
}
