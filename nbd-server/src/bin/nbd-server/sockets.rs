//! Where connections come from: listeners by option, inherited sockets, or standard input and output.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use anyhow::Context;
use nbd_server::{Exports, Listener, Peer, ServeOptions, serve_connection};
use rustix::net::AddressFamily;
use tracing::warn;

use crate::args::Args;

/// The registered port of NBD.
const PORT: u16 = 10809;
/// First inherited socket (sd_listen_fds).
const LISTEN_FDS_START: i32 = 3;

/// Every listener that the command line and the environment ask for.
pub(crate) fn listeners(args: &Args) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Vec::new();
    for fd in inherited() {
        listeners
            .push(Listener::from_fd(fd).context("cannot use an inherited socket (LISTEN_FDS)")?);
    }
    for path in &args.unix {
        listeners
            .push(bind_unix(path).with_context(|| format!("cannot listen on {}", path.display()))?);
    }
    for addr in &args.listen {
        listeners.push(bind_tcp(*addr)?);
    }
    if listeners.is_empty() {
        listeners.push(bind_tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, PORT)))?);
    }
    Ok(listeners)
}

fn bind_tcp(addr: SocketAddr) -> anyhow::Result<Listener> {
    Listener::bind_tcp(addr).with_context(|| format!("cannot listen on {addr}"))
}

/// Binds, after removing a socket at which nobody listens any more.
fn bind_unix(path: &Path) -> anyhow::Result<Listener> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket {
        match std::os::unix::net::UnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)?
            }
            _ => anyhow::bail!("another server listens there"),
        }
    }
    Ok(Listener::bind_unix(path)?)
}

/// Removes the unix sockets that were bound.
pub(crate) fn clean_up(args: &Args) {
    for path in &args.unix {
        if let Err(error) = std::fs::remove_file(path) {
            warn!(path = %path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Sockets handed over by systemd or a test (LISTEN_PID, LISTEN_FDS), if they are meant for this process.
fn inherited() -> Vec<OwnedFd> {
    let number = |name: &str| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse::<i32>().ok())
    };
    let own = i32::try_from(std::process::id()).ok();
    let count = match number("LISTEN_PID") {
        pid if pid == own => number("LISTEN_FDS").unwrap_or(0),
        _ => 0,
    };
    // SAFETY: LISTEN_PID names this process, so by the protocol these descriptors were opened for it; nothing else here uses them.
    (0..count)
        .map(|index| unsafe { OwnedFd::from_raw_fd(LISTEN_FDS_START + index) })
        .collect()
}

/// Serves one connection: on a socket if standard input is one, else on the pipes.
pub(crate) async fn serve_stdio<P: Exports>(
    exports: P,
    options: ServeOptions,
) -> anyhow::Result<()> {
    let input = std::io::stdin().as_fd().try_clone_to_owned()?;
    match rustix::net::getsockname(&input).map(|addr| addr.address_family()) {
        Ok(AddressFamily::UNIX) => {
            rustix::io::ioctl_fionbio(&input, true)?;
            let stream = tokio::net::UnixStream::from_std(input.into())?;
            serve_connection(stream, Peer::at(None), exports, options).await?;
        }
        Ok(AddressFamily::INET | AddressFamily::INET6) => {
            rustix::io::ioctl_fionbio(&input, true)?;
            let stream = tokio::net::TcpStream::from_std(input.into())?;
            stream.set_nodelay(true)?;
            let peer = Peer::at(Some(stream.peer_addr()?));
            serve_connection(stream, peer, exports, options).await?;
        }
        _ => {
            let stream = tokio::io::join(tokio::io::stdin(), tokio::io::stdout());
            serve_connection(stream, Peer::at(None), exports, options).await?
        }
    }
    Ok(())
}
