//! The encrypted stream, whichever library encrypts.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, BufReader, BufStream, ReadBuf};
use tokio_openssl::SslStream;
use tokio_rustls::server::TlsStream;

/// A connection inside TLS.
pub(crate) enum Encrypted<S> {
    Certificates(Box<TlsStream<BufReader<S>>>),
    Keys(Box<SslStream<BufStream<S>>>),
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Encrypted<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Certificates(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Keys(stream) => Pin::new(stream).poll_read(cx, buf),
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Encrypted<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Certificates(stream) => Pin::new(stream).poll_write(cx, buf),
            Self::Keys(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Certificates(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
            Self::Keys(stream) => Pin::new(stream).poll_write_vectored(cx, bufs),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Certificates(stream) => Pin::new(stream).poll_flush(cx),
            Self::Keys(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Certificates(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Keys(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
