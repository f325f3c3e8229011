//! The command line of `attach`, `detach` and `attachment`.

use super::absolute;
use crate::args::Cli;
use crate::failure::Failure;
use crate::size::parse_duration;
use blockd::attach::{Ha, Spec};
use clap::{Args, Subcommand, ValueEnum};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where the attachments of this host are recorded.
#[derive(Debug, Args)]
pub(crate) struct Runtime {
    /// Directory of what is attached here; /run/blockd, or $XDG_RUNTIME_DIR/blockd of a user
    #[arg(long, env = "BLOCKD_RUNTIME_DIR", value_name = "DIR")]
    runtime_dir: Option<PathBuf>,
}

impl Runtime {
    pub(crate) fn dir(&self) -> Option<&Path> {
        self.runtime_dir.as_deref()
    }
}

#[derive(Debug, Args)]
pub(crate) struct Attach {
    /// The volume, or VOL@SNAP for read-only
    #[arg(value_name = "VOL[@SNAP]", required_unless_present = "all")]
    pub(crate) target: Option<String>,
    /// All lines of the tab file but those with `noauto`
    #[arg(long, conflicts_with_all = ["target", "foreground", "tab"])]
    pub(crate) all: bool,
    /// With the servers and options that the tab file has for this volume
    #[arg(long)]
    pub(crate) tab: bool,
    /// The tab file
    #[arg(
        long,
        env = "BLOCKD_TAB",
        value_name = "FILE",
        default_value = "/etc/blockdtab"
    )]
    pub(crate) tab_file: PathBuf,
    /// This device; any free one if not given
    #[arg(long, value_name = "/dev/nbdN", conflicts_with = "socket")]
    pub(crate) device: Option<PathBuf>,
    /// A unix socket for QEMU and libnbd in place of a device; needs no root
    #[arg(long, value_name = "PATH")]
    pub(crate) socket: Option<PathBuf>,
    /// Refuse all writes
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Let no other host write to the volume
    #[arg(long, conflicts_with = "read_only")]
    pub(crate) exclusive: bool,
    /// Connections between the kernel and the daemon or the servers
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=16))]
    pub(crate) connections: u32,
    /// How requests reach the servers
    #[arg(long, value_enum, default_value_t = HaArg::Proxy)]
    pub(crate) ha: HaArg,
    /// How long a request waits for servers that are away, before it fails: 1h, 90s
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_duration)]
    pub(crate) dead_timeout: Duration,
    /// Stay in the foreground (for systemd: Type=notify)
    #[arg(long)]
    pub(crate) foreground: bool,
    #[command(flatten)]
    pub(crate) runtime: Runtime,
}

/// [`Ha`] as it is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum HaArg {
    /// Through a daemon that keeps and repeats what is not answered
    Proxy,
    /// By the kernel over TCP
    Direct,
}

impl Attach {
    pub(crate) fn spec(&self, cli: &Cli) -> Result<Spec, Failure> {
        Ok(Spec {
            target: self.target.clone().unwrap_or_default(),
            servers: cli.servers.clone(),
            device: self.device.clone(),
            socket: self.socket.as_deref().map(absolute).transpose()?,
            read_only: self.read_only,
            exclusive: self.exclusive,
            connections: self.connections,
            ha: match self.ha {
                HaArg::Proxy => Ha::Proxy,
                HaArg::Direct => Ha::Direct,
            },
            dead_timeout: self.dead_timeout,
            open_timeout: cli.timeout,
        })
    }
}

#[derive(Debug, Args)]
pub(crate) struct Detach {
    /// The device, the volume, or the socket
    #[arg(value_name = "DEV|VOL")]
    pub(crate) name: String,
    /// Also while it is in use: what is not written yet is lost
    #[arg(long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) runtime: Runtime,
}

#[derive(Debug, Subcommand)]
pub(crate) enum AttachmentVerb {
    /// All that is attached on this host
    List {
        #[command(flatten)]
        runtime: Runtime,
    },
    /// One attachment in full
    Status {
        /// The device, the volume, or the socket
        #[arg(value_name = "DEV|VOL")]
        name: String,
        #[command(flatten)]
        runtime: Runtime,
    },
    /// Ask another server first, without a pause
    Move {
        /// The device, the volume, or the socket
        #[arg(value_name = "DEV|VOL")]
        name: String,
        /// The server, HOST or HOST:PORT; one of those known or a new one
        #[arg(long, value_name = "SERVER")]
        to: String,
        #[command(flatten)]
        runtime: Runtime,
    },
    /// The volume of a device or partition; for udev
    Name {
        /// As the kernel calls it: nbd0, nbd0p1
        #[arg(value_name = "DEV")]
        device: String,
        #[command(flatten)]
        runtime: Runtime,
    },
    /// The daemon itself
    #[command(hide = true)]
    Serve {
        #[command(flatten)]
        runtime: Runtime,
    },
}
