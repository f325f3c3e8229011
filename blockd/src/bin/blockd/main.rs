//! The daemon, `blockd serve`, and what is done to its state while it is stopped.

mod check;
mod outcome;
mod recover;

use anyhow::anyhow;
use blockd::node::config::ConfigFile;
use blockd::node::serve;
use clap::{Parser, Subcommand};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed; of `check`: something is damaged; of `recover plan`: it has doubts
  2  wrong usage
  3  of `check` and `recover`: it cannot be opened, or is not done";

/// Serves partitioned block volumes: NBD to clients, the peer protocol to other servers.
#[derive(Parser)]
#[command(name = "blockd", version, after_help = EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs a server until SIGTERM.
    Serve(Serve),
    /// Checks the files of a server that is stopped; repairs nothing.
    Check(check::Check),
    /// Builds the registry of a cluster anew, from the stores of its servers.
    #[command(subcommand)]
    Recover(recover::Recover),
}

#[derive(clap::Args)]
struct Serve {
    /// State directory: identity, registry and page store of this server. Made if missing.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Address of the peer protocol (port 10808 unless given).
    #[arg(long, value_name = "ADDR[:PORT]")]
    listen: Option<String>,
    /// Another address of the peer protocol, on another network; may be repeated.
    #[arg(long, value_name = "ADDR[:PORT]")]
    adapter: Vec<String>,
    /// Address of NBD (port 10809 unless given); may be repeated. Default: that of --listen.
    #[arg(long, value_name = "ADDR[:PORT]")]
    nbd_listen: Vec<String>,
    /// NBD on a unix socket, too.
    #[arg(long, value_name = "PATH")]
    nbd_unix: Option<PathBuf>,
    /// TLS for NBD with server-cert.pem and server-key.pem of this directory; they are read again when they change.
    #[arg(long, value_name = "DIR")]
    nbd_tls_certificates: Option<PathBuf>,
    /// TLS for NBD with the pre-shared keys of this file of psktool (USER:KEY) instead; it is read again when it changes.
    #[arg(long, value_name = "FILE", conflicts_with = "nbd_tls_certificates")]
    nbd_tls_psk: Option<PathBuf>,
    /// TLS on all NBD sockets, the unix one included: off, on (clients choose) or require. Default: require with certificates or keys, else off, which an address that is no loopback one needs to be told.
    #[arg(long, value_name = "MODE")]
    nbd_tls: Option<String>,
    /// Accept in TLS only clients with a certificate that an authority in ca-cert.pem of the directory signed.
    #[arg(long)]
    nbd_tls_verify_peer: bool,
    /// HTTP on this address (port 10810 unless given), besides the unix socket http.sock in the state directory: administration, metrics, health. No loopback address without tokens in the configuration.
    #[arg(long, value_name = "ADDR[:PORT]")]
    http: Option<String>,
    /// Configuration file (TOML); options given here win over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Serve(arguments) => serve_until_stopped(arguments),
        Command::Check(arguments) => outcome::exit_code(check::run(&arguments)),
        Command::Recover(command) => outcome::exit_code(recover::run(&command)),
    }
}

fn serve_until_stopped(arguments: Serve) -> ExitCode {
    let filter = EnvFilter::try_from_env("BLOCKD_LOG")
        .unwrap_or_else(|_| EnvFilter::new("info,openraft=error"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Serve) -> anyhow::Result<()> {
    let file = match &arguments.config {
        None => ConfigFile::default(),
        Some(path) => ConfigFile::read(path)?,
    };
    let command_line = ConfigFile {
        listen: arguments.listen,
        adapters: Some(arguments.adapter).filter(|list| !list.is_empty()),
        nbd_listen: Some(arguments.nbd_listen).filter(|list| !list.is_empty()),
        nbd_unix: arguments.nbd_unix,
        nbd_tls_psk: arguments.nbd_tls_psk,
        nbd_tls: arguments.nbd_tls,
        nbd_tls_certificates: arguments.nbd_tls_certificates,
        http_listen: arguments.http,
        nbd_tls_verify_peer: arguments.nbd_tls_verify_peer.then_some(true),
        ..ConfigFile::default()
    };
    let config = command_line.or(file).resolve(arguments.state)?;
    let state = config.state.display().to_string();
    serve(config).map_err(|error| anyhow!("server of {state}: {error}"))
}
