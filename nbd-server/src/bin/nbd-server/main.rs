//! Serves a file or memory over NBD: on TCP, unix sockets, inherited sockets or standard input and output.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod args;
mod file;
mod memory;
mod single;
mod sockets;

use anyhow::Context;
use clap::Parser;
use nbd_server::{Export, Guarded, ServeOptions, Server, Shutdown, ShutdownSender, Tls};
use rustix::process::{Signal, set_parent_process_death_signal};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;
use tracing::{Level, info};

use crate::args::Args;
use crate::file::FileExport;
use crate::memory::MemoryExport;
use crate::single::Single;

/// Threads for file IO that would block.
const HELPER_THREADS: usize = 8;

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let level = if args.verbose {
        Level::DEBUG
    } else {
        Level::WARN
    };
    tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(std::io::stderr)
        .init();
    if args.exit_with_parent {
        set_parent_process_death_signal(Some(Signal::TERM))
            .context("cannot ask for a signal at the parent's death")?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(HELPER_THREADS)
        .build()?;
    LocalSet::new().block_on(&runtime, serve(args))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    match (args.memory, &args.file) {
        (Some(size_bytes), _) => {
            let export = MemoryExport::new(size_bytes, args.read_only);
            serve_export(&args, export).await
        }
        (None, Some(path)) => {
            let export = FileExport::open(path, args.read_only)
                .with_context(|| format!("cannot open {}", path.display()))?;
            serve_export(&args, export).await
        }
        (None, None) => anyhow::bail!("nothing to serve: give a file or --memory SIZE"),
    }
}

async fn serve_export<E: Export>(args: &Args, export: E) -> anyhow::Result<()> {
    let (sender, shutdown) = Shutdown::new();
    tokio::task::spawn_local(stop_on_signal(sender)?);
    let options = ServeOptions {
        shutdown,
        tls: load_tls(args)?,
        ..ServeOptions::default()
    };
    let single = Single::new(args.name.clone(), export);
    let exports = Guarded::new(single, args.access());
    if args.stdio {
        return sockets::serve_stdio(exports, options).await;
    }
    let listeners = sockets::listeners(args)?;
    listeners
        .iter()
        .for_each(|listener| info!("listening on {}", listener.describe()));
    Server::new(exports, options)
        .connections_max(args.connections)
        .connections_per_address_max(args.connections_per_address)
        .run(listeners)
        .await;
    sockets::clean_up(args);
    Ok(())
}

fn load_tls(args: &Args) -> anyhow::Result<Option<Tls>> {
    let settings = args.tls_settings();
    anyhow::ensure!(
        settings.proves_names() || !args.access().asks_for_names(),
        "--allow name=... fits nobody without --tls-verify-peer or --tls-psk"
    );
    Ok(settings.load()?)
}

/// Gives the shutdown signal at SIGTERM and SIGINT.
fn stop_on_signal(sender: ShutdownSender) -> std::io::Result<impl Future<Output = ()>> {
    let (mut term, mut interrupt) = (
        signal(SignalKind::terminate())?,
        signal(SignalKind::interrupt())?,
    );
    Ok(async move {
        tokio::select! {
            _ = term.recv() => {}
            _ = interrupt.recv() => {}
        }
        sender.give();
        std::future::pending().await
    })
}
