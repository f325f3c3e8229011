//! The sockets of HTTP, and a connection on one of them.
//!
//! A client that is slow costs one of a bounded number of connections, for a bounded time.

use crate::limits::{HTTP_CONNECTION_MS, HTTP_CONNECTIONS, HTTP_REQUEST_MS};
use crate::node::config::Config;
use crate::node::{Node, ServeError};
use axum::serve::Listener;
use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::fs::{Mode, fchmod};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, bind, listen as listen_on, socket};
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio::time::timeout;

/// The unix socket's name in the state directory.
const SOCKET_FILE: &str = "http.sock";
/// Connections that the kernel holds until they are accepted.
const BACKLOG: i32 = 128;

/// By which way a request came.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    Unix,
    Tcp(SocketAddr),
}

/// Listens on the address that the configuration names.
///
/// # Errors
/// [`ServeError::Listen`].
pub(crate) fn listen(config: &Config) -> Result<Option<std::net::TcpListener>, ServeError> {
    let Some(address) = config.http_listen else {
        return Ok(None);
    };
    let listening = std::net::TcpListener::bind(address)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener));
    let listener = listening.map_err(|source| ServeError::Listen {
        what: "HTTP",
        address: address.to_string(),
        source,
    })?;
    Ok(Some(listener))
}

/// Serves both sockets on the control thread.
pub(super) fn serve(node: &Node, tcp: Option<std::net::TcpListener>, router: &Router) {
    let _control = node.control.enter();
    let failed = |error| tracing::warn!(%error, "HTTP is not served on its unix socket");
    let unix = listen_unix(&node.config.state.join(SOCKET_FILE));
    let unix = unix.and_then(tokio::net::UnixListener::from_std);
    if let Ok(listener) = unix.map_err(failed) {
        let router = router.clone();
        node.control
            .spawn(accept(listener, router, |_| Origin::Unix));
    }
    let failed = |error| tracing::warn!(%error, "HTTP is not served on its address");
    let tcp = tcp.map(tokio::net::TcpListener::from_std).transpose();
    if let Ok(Some(listener)) = tcp.map_err(failed) {
        node.control
            .spawn(accept(listener, router.clone(), Origin::Tcp));
    }
}

/// A socket that only its owner may connect to, from its first moment: Linux makes its file with the
/// mode of the descriptor. The store is ours by now, so a socket that is there is of a former run.
fn listen_unix(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
    fchmod(&listener, Mode::RUSR | Mode::WUSR)?;
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    listen_on(&listener, BACKLOG)?;
    let listener = UnixListener::from(listener);
    listener.set_nonblocking(true)?;
    Ok(listener)
}

async fn accept<L: Listener>(mut listener: L, router: Router, origin: fn(L::Addr) -> Origin) {
    let free = Arc::new(Semaphore::new(HTTP_CONNECTIONS));
    while let Ok(permit) = Arc::clone(&free).acquire_owned().await {
        let (stream, from) = listener.accept().await;
        let router = router.clone().layer(Extension(origin(from)));
        tokio::spawn(async move {
            connection(stream, router).await;
            drop(permit);
        });
    }
}

/// One request and its answer.
async fn connection(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(Duration::from_millis(HTTP_REQUEST_MS))
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    match timeout(Duration::from_millis(HTTP_CONNECTION_MS), served).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "HTTP connection ended"),
        Err(_) => tracing::debug!("HTTP connection ended: its time is over"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_socket_is_its_owners_and_replaces_that_of_a_former_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(SOCKET_FILE);
        drop(listen_unix(&path).unwrap());
        let listener = listen_unix(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        std::os::unix::net::UnixStream::connect(&path).unwrap();
        drop(listener);
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_an_error() {
        let path = Path::new("/tmp").join("x".repeat(200)).join(SOCKET_FILE);
        assert!(listen_unix(&path).is_err());
    }
}
