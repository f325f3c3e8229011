//! Accept loops over TCP and unix sockets: caps, backlog, socket options and the graceful drain.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::{AddressFamily, sockopt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener, UnixSocket, UnixStream};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use crate::admission::{Admission, Caps, Seat};
use crate::connection::{ServeOptions, serve_connection};
use crate::export::Exports;
use crate::limits;
use crate::peer::Peer;

/// Kernel buffer of a unix socket in bytes: its default holds only three 64 KiB writes. The system may grant less.
const UNIX_BUFFER_BYTES: usize = 1 << 20;
/// Pause after a failed accept (out of file descriptors), so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// A socket that listens.
#[derive(Debug)]
pub enum Listener {
    /// TCP; connections get TCP_NODELAY.
    Tcp(TcpListener),
    /// Unix stream socket.
    Unix(UnixListener),
}

/// A connection as it was accepted.
enum Accepted {
    Tcp(TcpStream, SocketAddr),
    Unix(UnixStream),
}

impl Accepted {
    fn address(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(_, address) => Some(*address),
            Self::Unix(_) => None,
        }
    }
}

impl Listener {
    /// Listens on a TCP address. Needs a tokio runtime.
    pub fn bind_tcp(addr: SocketAddr) -> io::Result<Self> {
        let socket = if addr.is_ipv4() {
            TcpSocket::new_v4()?
        } else {
            TcpSocket::new_v6()?
        };
        socket.set_reuseaddr(true)?;
        socket.bind(addr)?;
        Ok(Self::Tcp(socket.listen(limits::LISTEN_BACKLOG)?))
    }

    /// Listens on a path; replaces a socket there on which nobody listens any more. Needs a tokio runtime.
    pub fn bind_unix(path: &Path) -> io::Result<Self> {
        let bind = || -> io::Result<_> {
            let socket = UnixSocket::new_stream()?;
            socket.bind(path)?;
            socket.listen(limits::LISTEN_BACKLOG)
        };
        match bind() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_abandoned(path) => {
                std::fs::remove_file(path)?;
                bind().map(Self::Unix)
            }
            bound => bound.map(Self::Unix),
        }
    }

    /// Takes over a socket that listens already (systemd socket activation). Needs a tokio runtime.
    pub fn from_fd(fd: OwnedFd) -> io::Result<Self> {
        let family = rustix::net::getsockname(&fd)?.address_family();
        rustix::io::ioctl_fionbio(&fd, true)?;
        match family {
            AddressFamily::UNIX => UnixListener::from_std(fd.into()).map(Self::Unix),
            AddressFamily::INET | AddressFamily::INET6 => {
                TcpListener::from_std(fd.into()).map(Self::Tcp)
            }
            family => Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("socket family {family:?} is not supported"),
            )),
        }
    }

    /// Address for humans.
    pub fn describe(&self) -> String {
        match self {
            Self::Tcp(tcp) => tcp
                .local_addr()
                .map_or_else(|_| "tcp".to_owned(), |addr| format!("tcp {addr}")),
            Self::Unix(unix) => {
                let addr = unix.local_addr().ok();
                let path = addr.as_ref().and_then(|addr| addr.as_pathname());
                path.map_or_else(
                    || "unix".to_owned(),
                    |path| format!("unix {}", path.display()),
                )
            }
        }
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        match self {
            Self::Tcp(tcp) => tcp
                .poll_accept(cx)
                .map_ok(|(stream, peer)| Accepted::Tcp(stream, peer)),
            Self::Unix(unix) => unix
                .poll_accept(cx)
                .map_ok(|(stream, _)| Accepted::Unix(stream)),
        }
    }
}

/// Whether the path is a socket that a dead process left behind: nobody listens on it.
fn is_abandoned(path: &Path) -> bool {
    let tried = std::os::unix::net::UnixStream::connect(path);
    tried.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

/// Serves connections of any number of listeners, one task each.
#[derive(Debug)]
pub struct Server<P> {
    exports: P,
    options: ServeOptions,
    caps: Caps,
    drain_deadline: Duration,
}

impl<P: Exports> Server<P> {
    /// A server with the limits of [`limits`].
    pub fn new(exports: P, options: ServeOptions) -> Self {
        Self {
            exports,
            options,
            caps: Caps::default(),
            drain_deadline: limits::DRAIN_DEADLINE,
        }
    }

    /// Serves at most so many connections at a time; further ones are closed when they are accepted. One in `limits::LOCAL_SHARE` is
    /// kept for unix sockets if there is such a listener.
    pub fn connections_max(mut self, connections_max: usize) -> Self {
        self.caps.total = connections_max;
        self
    }

    /// Serves at most so many connections of one address (of one /64 network in IPv6) at a time.
    pub fn connections_per_address_max(mut self, connections_max: usize) -> Self {
        self.caps.per_address = connections_max;
        self
    }

    /// Waits at most so long for requests in flight after the shutdown signal.
    pub fn drain_deadline(mut self, drain_deadline: Duration) -> Self {
        self.drain_deadline = drain_deadline;
        self
    }

    /// Accepts until the shutdown signal of the options, then lets every connection answer what it has read.
    ///
    /// Must run within a `tokio::task::LocalSet`, whose thread runs every connection.
    pub async fn run(self, listeners: Vec<Listener>) {
        let mut connections = JoinSet::new();
        let has_local = listeners
            .iter()
            .any(|listener| matches!(listener, Listener::Unix(_)));
        let admission = Admission::new(self.caps, has_local);
        let mut first = 0;
        let mut shutdown = std::pin::pin!(self.options.shutdown.clone().given());
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = accept_any(&listeners, &mut first) => match accepted {
                    Ok(accepted) => self.admit(accepted, &admission, &mut connections),
                    Err(error) => {
                        warn!(%error, "accept failed; raise the limit of open files if it says so");
                        tokio::time::sleep(ACCEPT_PAUSE).await;
                    }
                },
            }
        }
        drop(listeners);
        info!(connections = connections.len(), "draining");
        let drained = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(self.drain_deadline, drained)
            .await
            .is_err()
        {
            warn!(
                connections = connections.len(),
                "requests in flight are dropped after the drain deadline"
            );
        }
    }

    fn admit(&self, accepted: Accepted, admission: &Admission, connections: &mut JoinSet<()>) {
        let peer = Peer::at(accepted.address());
        let seat = match admission.admit(peer.address.map(|address| address.ip())) {
            Ok(seat) => seat,
            Err(full) => {
                warn!(%peer, %full, "a new connection is closed");
                return;
            }
        };
        let (exports, options) = (self.exports.clone(), self.options.clone());
        match accepted {
            Accepted::Tcp(stream, _) => {
                tune_tcp(&stream);
                connections.spawn_local(serve(stream, peer, exports, options, seat));
            }
            Accepted::Unix(stream) => {
                tune(sockopt::set_socket_send_buffer_size(
                    stream.as_fd(),
                    UNIX_BUFFER_BYTES,
                ));
                connections.spawn_local(serve(stream, peer, exports, options, seat));
            }
        }
    }
}

fn tune_tcp(stream: &TcpStream) {
    tune(stream.set_nodelay(true));
    tune(sockopt::set_socket_keepalive(stream.as_fd(), true));
    tune(sockopt::set_tcp_keepidle(
        stream.as_fd(),
        limits::KEEPALIVE_IDLE,
    ));
}

/// A socket that cannot be tuned still works.
fn tune<E: std::fmt::Display>(outcome: Result<(), E>) {
    if let Err(error) = outcome {
        debug!(%error, "a socket option was refused");
    }
}

/// Accepts from the listener number `first`, or the next one that is ready; then the one behind it has its turn, so that a busy one
/// does not keep the others waiting.
async fn accept_any(listeners: &[Listener], first: &mut usize) -> io::Result<Accepted> {
    poll_fn(|cx| {
        for index in (*first..listeners.len()).chain(0..*first) {
            if let Poll::Ready(accepted) = listeners[index].poll_accept(cx) {
                *first = (index + 1) % listeners.len();
                return Poll::Ready(accepted);
            }
        }
        Poll::Pending
    })
    .await
}

async fn serve<S, P>(stream: S, peer: Peer, exports: P, options: ServeOptions, _seat: Seat)
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Exports,
{
    debug!(%peer, "connected");
    match serve_connection(stream, peer.clone(), exports, options).await {
        Ok(()) => debug!(%peer, "disconnected"),
        Err(error) => info!(%peer, %error, "connection ended"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn listeners_take_turns() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let tcp = Listener::bind_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let Listener::Tcp(socket) = &tcp else {
            unreachable!()
        };
        let addr = socket.local_addr().unwrap();
        let listeners = [tcp, Listener::bind_unix(&path).unwrap()];
        let _clients: Vec<_> = (0..3)
            .map(|_| {
                let tcp = std::net::TcpStream::connect(addr).unwrap();
                (tcp, std::os::unix::net::UnixStream::connect(&path).unwrap())
            })
            .collect();
        let (mut first, mut over_tcp) = (0, Vec::new());
        for _ in 0..6 {
            let accepted = accept_any(&listeners, &mut first).await.unwrap();
            over_tcp.push(accepted.address().is_some());
        }
        assert!(
            over_tcp.windows(2).all(|pair| pair[0] != pair[1]),
            "{over_tcp:?}"
        );
    }
}
