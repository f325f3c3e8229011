//! The network of a server or client behind one seam: byte streams between addresses.
//!
//! [`Tcp`] is the real one. A simulator gives its own, so that every delay, cut and loss is chosen by
//! a seed. A call through the seam costs one indirect call beside a system call.

use crate::limits::{PATH_HEAD_START_MS, PEER_UNACKED_MS};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;

/// A connected byte stream.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// A stream of any network.
pub type BoxStream = Box<dyn Stream>;

/// Where streams come from.
pub trait Network: Send + Sync {
    /// Connects to `HOST:PORT`; may take for ever.
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<BoxStream>>;

    /// Listens on an address of this machine.
    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Listen>>>;
}

/// A listening address.
pub trait Listen: Send {
    /// Waits for the next stream; gives the address of its other end, too.
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(BoxStream, SocketAddr)>>;
}

/// Connects to the first of several paths to one server that answers. Each has a head start before the
/// next one is tried beside it (after RFC 8305), so a path that is cut costs that and no more. Says
/// whether it is the first path.
///
/// # Errors
/// That of the last path, when all have failed.
pub async fn connect_first(
    network: &dyn Network,
    paths: &[String],
) -> io::Result<(BoxStream, bool)> {
    let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
    let mut trying = FuturesUnordered::new();
    let mut rest = paths.iter().enumerate();
    loop {
        trying.extend(rest.next().map(async |(index, path)| {
            let connected = network.connect(path).await;
            (connected, index == 0)
        }));
        tokio::select! {
            biased;
            done = trying.next() => match done {
                Some((Ok(stream), is_first)) => return Ok((stream, is_first)),
                Some((Err(error), _)) => failed = error,
                None => return Err(failed),
            },
            () = sleep(Duration::from_millis(PATH_HEAD_START_MS)), if rest.len() > 0 => {}
        }
    }
}

/// TCP of the operating system, without delay of small messages, with keepalive, and with an end when
/// the other machine acknowledges nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tcp;

impl Network for Tcp {
    fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<BoxStream>> {
        Box::pin(async move { prepare(TcpStream::connect(address).await?) })
    }

    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Listen>>> {
        Box::pin(async move { Ok(Box::new(TcpListener::bind(address).await?) as Box<dyn Listen>) })
    }
}

impl Listen for TcpListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(BoxStream, SocketAddr)>> {
        Box::pin(async move {
            let (stream, from) = TcpListener::accept(self).await?;
            Ok((prepare(stream)?, from))
        })
    }
}

fn prepare(stream: TcpStream) -> io::Result<BoxStream> {
    stream.set_nodelay(true)?;
    rustix::net::sockopt::set_socket_keepalive(&stream, true)?;
    rustix::net::sockopt::set_tcp_user_timeout(&stream, PEER_UNACKED_MS)?;
    Ok(Box::new(stream))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A network on which a path is refused, silent, or open after some milliseconds.
    struct Paths;

    impl Network for Paths {
        fn connect<'a>(&'a self, address: &'a str) -> BoxFuture<'a, io::Result<BoxStream>> {
            Box::pin(async move {
                match address {
                    "refused" => return Err(io::ErrorKind::ConnectionRefused.into()),
                    "silent" => std::future::pending().await,
                    millis => sleep(Duration::from_millis(millis.parse().unwrap())).await,
                }
                Ok(Box::new(tokio::io::duplex(1).0) as BoxStream)
            })
        }

        fn listen(&self, _: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Listen>>> {
            Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
        }
    }

    async fn connecting(paths: &[&str]) -> (io::Result<bool>, Duration) {
        let paths: Vec<String> = paths.iter().map(ToString::to_string).collect();
        let began = tokio::time::Instant::now();
        let connected = connect_first(&Paths, &paths).await;
        (connected.map(|(_, is_first)| is_first), began.elapsed())
    }

    /// S004-110: the paths are tried in their order, and one that is cut costs its head start.
    #[tokio::test(start_paused = true)]
    async fn the_next_path_is_tried_when_one_does_not_answer() {
        let head_start = Duration::from_millis(PATH_HEAD_START_MS);
        for (paths, is_first, took) in [
            (&["0", "0"][..], true, Duration::ZERO),
            (&["refused", "0"], false, Duration::ZERO),
            (&["silent", "0"], false, head_start),
            (&["silent", "silent", "0"], false, 2 * head_start),
            (&["250", "100"], true, Duration::from_millis(250)),
            (&["silent", "refused", "0"], false, head_start),
        ] {
            let (connected, found) = connecting(paths).await;
            assert_eq!(connected.unwrap(), is_first, "{paths:?}");
            assert_eq!(found, took, "{paths:?}");
        }
        let refused = connecting(&["refused", "refused"]).await.0.err().unwrap();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(connecting(&[]).await.0.is_err());
    }

    #[tokio::test]
    async fn vectored_writes_pass_through_the_seam() {
        let at = "127.0.0.1:0".parse().unwrap();
        let listener = TcpListener::bind::<SocketAddr>(at).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stream = Tcp.connect(&address).await.unwrap();
        assert!(stream.is_write_vectored());
    }
}
