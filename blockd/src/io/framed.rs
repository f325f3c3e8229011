//! Frames on a byte stream: batched reading, vectored writing, and the serving loop.
//!
//! A connection is one task. It parses as many frames as a receive brought, polls each request
//! once in place, keeps only those that have to wait, and sends all replies that are ready with
//! one vectored write. Cost per request is dominated by wake-ups and system calls
//! (`notes/block.md` B3), so neither is spent per frame.

use super::wire::{self, Decoded, Frame, WireError};
use crate::limits::{
    PEER_OUTPUT_BYTES, PEER_RECEIVE_BYTES, PEER_REQUESTS_IN_FLIGHT, PEER_WAITING_BYTES,
};
use bytes::{Buf, Bytes, BytesMut};
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::collections::VecDeque;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

/// Pieces handed to one vectored write; the kernel takes at most 1024.
const WRITE_PIECES: usize = 64;

/// Why a connection ended before its time.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error("peer connection: {0}")]
    Io(#[from] io::Error),
    #[error("the peer closed the connection in the middle of a frame")]
    Truncated,
}

/// Reads and writes frames on a stream.
pub struct FrameStream<S> {
    stream: S,
    input: BytesMut,
    headers: BytesMut,
    output: VecDeque<Bytes>,
    output_bytes: usize,
    /// The frames that lie in `output`, in order.
    queued: VecDeque<Queued>,
}

/// What is left of a frame in the output.
struct Queued {
    request_id: u64,
    pieces: usize,
    /// The kernel has its first byte.
    begun: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> FrameStream<S> {
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            input: BytesMut::new(),
            headers: BytesMut::new(),
            output: VecDeque::new(),
            output_bytes: 0,
            queued: VecDeque::new(),
        }
    }

    /// Queues a frame; [`Self::poll_flush`] sends it.
    pub fn push(&mut self, frame: Frame) {
        self.queued.push_back(Queued {
            request_id: frame.request_id,
            pieces: 1 + frame.payload.0.len(),
            begun: false,
        });
        frame.encode_header(&mut self.headers);
        let header = self.headers.split().freeze();
        for piece in std::iter::once(header).chain(frame.payload.0) {
            self.output_bytes += piece.len();
            self.output.push_back(piece);
        }
    }

    /// Takes a queued frame back, unless the kernel has some of it.
    pub fn take_back(&mut self, request_id: u64) {
        let waits = |frame: &Queued| frame.request_id == request_id && !frame.begun;
        let Some(index) = self.queued.iter().position(waits) else {
            return;
        };
        let before: usize = self
            .queued
            .iter()
            .take(index)
            .map(|frame| frame.pieces)
            .sum();
        let pieces = self.queued.remove(index).map_or(0, |frame| frame.pieces);
        let taken = self.output.drain(before..before + pieces);
        self.output_bytes -= taken.map(|piece| piece.len()).sum::<usize>();
    }

    /// The next frame, or `None` when the peer closed between frames.
    pub fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Option<Frame>, ConnectionError>> {
        loop {
            let needs = match wire::decode(&mut self.input)? {
                Decoded::Frame(frame) => return Poll::Ready(Ok(Some(*frame))),
                Decoded::Needs(total) => total.saturating_sub(self.input.len()),
            };
            if self.input.capacity() - self.input.len() < needs {
                self.input.reserve(needs.max(PEER_RECEIVE_BYTES));
            }
            let read = pin!(self.stream.read_buf(&mut self.input));
            match ready!(read.poll(cx))? {
                0 if self.input.is_empty() => return Poll::Ready(Ok(None)),
                0 => return Poll::Ready(Err(ConnectionError::Truncated)),
                _ => {}
            }
        }
    }

    /// Ready when everything queued has been handed to the kernel.
    pub fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.is_empty() {
            let mut slices = [IoSlice::new(&[]); WRITE_PIECES];
            let count = self.output.len().min(WRITE_PIECES);
            for (slice, piece) in slices.iter_mut().zip(&self.output) {
                *slice = IoSlice::new(piece);
            }
            let stream = Pin::new(&mut self.stream);
            let written = ready!(stream.poll_write_vectored(cx, &slices[..count]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.consume(written);
        }
        Poll::Ready(Ok(()))
    }

    fn consume(&mut self, mut written: usize) {
        self.output_bytes -= written;
        while let (Some(piece), Some(frame)) = (self.output.front_mut(), self.queued.front_mut()) {
            if piece.len() > written {
                frame.begun |= written > 0;
                piece.advance(written);
                return;
            }
            written -= piece.len();
            self.output.pop_front();
            frame.begun = true;
            frame.pieces -= 1;
            if frame.pieces == 0 {
                self.queued.pop_front();
            }
        }
    }

    /// Waits for one frame.
    ///
    /// # Errors
    /// As [`Self::poll_frame`].
    pub async fn next(&mut self) -> Result<Option<Frame>, ConnectionError> {
        poll_fn(|cx| self.poll_frame(cx)).await
    }

    /// Sends one frame and waits until the kernel has it.
    ///
    /// # Errors
    /// When the stream cannot be written.
    pub async fn send(&mut self, frame: Frame) -> io::Result<()> {
        self.push(frame);
        poll_fn(|cx| self.poll_flush(cx)).await
    }
}

/// A request that was not ready at once, with the payload bytes that it keeps in memory.
struct Waiting<F> {
    answer: Pin<Box<F>>,
    payload_bytes: usize,
}

impl<F: Future<Output = Frame>> Future for Waiting<F> {
    type Output = (Frame, usize);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let payload_bytes = self.payload_bytes;
        self.answer
            .as_mut()
            .poll(cx)
            .map(|reply| (reply, payload_bytes))
    }
}

/// Answers every request of a connection with `handler` until the peer closes it.
///
/// Requests run concurrently and complete out of order. The peer is read no further while it has
/// `PEER_REQUESTS_IN_FLIGHT` requests or `PEER_WAITING_BYTES` of payload open, or does not take its
/// replies. When it closes, requests that still wait are dropped: it will send them again over its
/// next connection, and they must not be executed behind that.
///
/// # Errors
/// [`ConnectionError`] when the stream breaks or carries something that is no frame.
pub async fn serve<S, H, F>(mut frames: FrameStream<S>, handler: H) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    H: Fn(Frame) -> F,
    F: Future<Output = Frame>,
{
    let mut waiting = FuturesUnordered::<Waiting<F>>::new();
    let mut waiting_bytes = 0;
    poll_fn(|cx| {
        loop {
            let mut progress = false;
            while let Poll::Ready(Some((reply, payload_bytes))) = waiting.poll_next_unpin(cx) {
                waiting_bytes -= payload_bytes;
                frames.push(reply);
                progress = true;
            }
            while waiting.len() < PEER_REQUESTS_IN_FLIGHT
                && waiting_bytes < PEER_WAITING_BYTES
                && frames.output_bytes < PEER_OUTPUT_BYTES
            {
                match frames.poll_frame(cx)? {
                    Poll::Ready(Some(request)) => {
                        let payload_bytes = request.payload.len();
                        let mut answer = Box::pin(handler(request));
                        match answer.as_mut().poll(cx) {
                            Poll::Ready(reply) => frames.push(reply),
                            Poll::Pending => {
                                waiting_bytes += payload_bytes;
                                waiting.push(Waiting {
                                    answer,
                                    payload_bytes,
                                });
                            }
                        }
                        progress = true;
                    }
                    Poll::Ready(None) => return Poll::Ready(Ok(())),
                    Poll::Pending => break,
                }
            }
            let _unsent = frames.poll_flush(cx)?;
            if !progress {
                return Poll::Pending;
            }
        }
    })
    .await
}
