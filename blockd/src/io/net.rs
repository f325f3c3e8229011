//! The network of a server or client behind one seam: byte streams between addresses.
//!
//! [`Tcp`] is the real one. A simulator gives its own, so that every delay, cut and loss is chosen by
//! a seed. A call through the seam costs one indirect call beside a system call.

use futures_util::future::BoxFuture;
use std::io;
use std::net::SocketAddr;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};

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

/// TCP of the operating system, without delay of small messages and with keepalive.
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
    Ok(Box::new(stream))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn vectored_writes_pass_through_the_seam() {
        let at = "127.0.0.1:0".parse().unwrap();
        let listener = TcpListener::bind::<SocketAddr>(at).await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let stream = Tcp.connect(&address).await.unwrap();
        assert!(stream.is_write_vectored());
    }
}
