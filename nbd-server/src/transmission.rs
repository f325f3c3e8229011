//! The transmission phase: one task per connection that receives, executes and answers.
//!
//! A turn decodes every request that is in the receive buffer, polls each once on the spot, gathers the replies and sends them with
//! one vectored write. Only a request that is not ready at its first poll is put aside; replies leave in the order of completion.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::BufMut;
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use crate::budget::Holding;
use crate::connection::{ConnectionError, ServeOptions};
use crate::decoder::{Decoder, Job, Step};
use crate::error::ExportError;
use crate::export::{Export, MetaContext};
use crate::limits;
use crate::output::{Output, Sent};
use crate::reply::{self, Outcome};
use crate::request::{self, Agreement, Command, Request};

/// A request that was executed.
struct Completion {
    request: Request,
    command: Command,
    held_bytes: u32,
    outcome: Result<Outcome, ExportError>,
}

/// Executes a request; `contexts` are those of the agreement, if it asks for any of them.
async fn execute<E: Export>(
    export: E,
    job: Job,
    contexts: Option<Arc<[MetaContext]>>,
) -> Completion {
    let Job {
        request,
        command,
        payload,
        held_bytes,
    } = job;
    let (offset, len) = (request.offset, request.len_bytes);
    let outcome = match command {
        Command::Read { .. } if len == 0 => Ok(Outcome::Read(payload.into())),
        Command::Read { .. } => export.read(offset, len as u32).await.map(Outcome::Read),
        Command::Write { fua } => export
            .write(offset, payload, fua)
            .await
            .map(|()| Outcome::Done),
        Command::Flush => export.flush().await.map(|()| Outcome::Done),
        Command::Trim { fua } => export.trim(offset, len, fua).await.map(|()| Outcome::Done),
        Command::Zero(flags) => export
            .write_zeroes(offset, len, flags)
            .await
            .map(|()| Outcome::Done),
        Command::Cache => export.cache(offset, len).await.map(|()| Outcome::Done),
        Command::Status { contexts: set, one } => {
            let contexts = contexts.unwrap_or_default();
            status(&export, &contexts, (set, one), offset, len).await
        }
        Command::StatusOf { .. } | Command::Nothing => Ok(Outcome::Done),
    };
    Completion {
        request,
        command,
        held_bytes,
        outcome,
    }
}

/// Status in every context of the set, each with its id; of the first run only if `one`. What is not sent is not kept while the other
/// contexts are asked: the budget bytes are those of the reply.
async fn status<E: Export>(
    export: &E,
    contexts: &[MetaContext],
    (set, one): (u64, bool),
    offset: u64,
    len_bytes: u64,
) -> Result<Outcome, ExportError> {
    let count_max = if one { 1 } else { limits::EXTENTS_MAX };
    let mut answers = Vec::new();
    for (index, context) in contexts.iter().enumerate() {
        if set & (1 << index) != 0 {
            let extents = export.block_status(context, offset, len_bytes).await?;
            let merged = reply::merge_extents(&extents, len_bytes, count_max);
            answers.push((index as u32 + 1, merged));
        }
    }
    Ok(Outcome::Status(answers))
}

/// Serves requests until the client leaves, breaks the protocol, or the shutdown signal is given.
pub(crate) async fn transmit<S, E>(
    stream: S,
    export: E,
    agreed: Agreement,
    options: ServeOptions,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    E: Export,
{
    let mut shutdown = pin!(options.shutdown.given());
    let mut transmission = Transmission {
        stream,
        export,
        start: execute::<E>,
        decoder: Decoder::new(agreed.headers),
        agreed,
        output: Output::default(),
        holding: Holding::new(options.budget),
        running: FuturesUnordered::new(),
        spare: None,
        unanswered: 0,
        ending: None,
        drain: Drain::default(),
        stall: Stall {
            deadline: options.stall_deadline,
            timer: None,
            moved_bytes: 0,
            judged: false,
        },
        shut: false,
    };
    poll_fn(|cx| {
        if !transmission.drain.begun && transmission.ending.is_none() {
            transmission.drain.begun = shutdown.as_mut().poll(cx).is_ready();
        }
        transmission.poll(cx)
    })
    .await
}

/// Why no further request was started in this turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pause {
    /// More must be received.
    Receive,
    /// Replies must be sent first, or the budget must give bytes.
    Full,
    /// Nothing more is read.
    Ended,
}

struct Transmission<S, E, M, F> {
    stream: S,
    export: E,
    agreed: Agreement,
    start: M,
    decoder: Decoder,
    output: Output,
    holding: Holding,
    running: FuturesUnordered<Pin<Box<F>>>,
    /// The allocation of a request that was ready at once, for the next one.
    spare: Option<Pin<Box<F>>>,
    unanswered: u32,
    ending: Option<Result<(), ConnectionError>>,
    drain: Drain,
    stall: Stall,
    /// This side is closed.
    shut: bool,
}

impl<S, E, M, F> Transmission<S, E, M, F>
where
    S: AsyncRead + AsyncWrite + Unpin,
    E: Export,
    M: Fn(E, Job, Option<Arc<[MetaContext]>>) -> F,
    F: Future<Output = Completion>,
{
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        loop {
            let pause = self.start_requests(cx);
            self.reap(cx);
            let sent = self.send(cx);
            let again = match pause {
                Pause::Receive => self.receive(cx),
                Pause::Full => sent || !self.drain.begun && self.receive_ahead(cx),
                Pause::Ended if self.running.is_empty() && self.output.is_empty() => {
                    return self.close(cx);
                }
                Pause::Ended => self.drain.done && self.receive_ahead(cx),
            };
            if !again {
                return self.rest(cx);
            }
        }
    }

    /// Starts what is in the receive buffer, within the limits.
    fn start_requests(&mut self, cx: &mut Context<'_>) -> Pause {
        while self.ending.is_none() {
            if self.unanswered >= limits::IN_FLIGHT_MAX {
                return Pause::Full;
            }
            let (export, agreed, holding) = (&self.export, &self.agreed, &mut self.holding);
            let admit = |request: &Request| request::admit(request, &export.info(), agreed);
            match self.decoder.next(admit, |bytes| holding.take(cx, bytes)) {
                Step::Receive if self.drain.begun => {
                    self.drain.done = true;
                    self.ending = Some(Ok(()));
                }
                Step::Receive => return Pause::Receive,
                Step::Wait => return Pause::Full,
                Step::Run(job) => self.run_narrowed(cx, job),
                Step::Refuse(request, error) => self.refuse(request, error),
                Step::End(ending) => self.ending = Some(ending),
            }
            if self.output.is_much() {
                self.send(cx);
            }
        }
        Pause::Ended
    }

    /// Runs a request; one whose payload says what it is about is refused if that makes no sense.
    fn run_narrowed(&mut self, cx: &mut Context<'_>, job: Job) {
        let Command::StatusOf { one } = job.command else {
            return self.run(cx, job);
        };
        let (info, agreed) = (self.export.info(), &self.agreed);
        match request::narrow(&job.request, one, &job.payload, &info, agreed) {
            Ok((request, command)) => self.run(
                cx,
                Job {
                    request,
                    command,
                    ..job
                },
            ),
            Err(error) => {
                self.holding.put_back(u64::from(job.held_bytes));
                self.refuse(job.request, error);
            }
        }
    }

    /// Polls a new request once; only if it is not ready is it put aside.
    fn run(&mut self, cx: &mut Context<'_>, job: Job) {
        self.unanswered += 1;
        let asks_status = matches!(job.command, Command::Status { .. });
        let contexts = asks_status.then(|| Arc::clone(&self.agreed.contexts));
        let future = (self.start)(self.export.clone(), job, contexts);
        let mut boxed = match self.spare.take() {
            Some(mut spare) => {
                spare.set(future);
                spare
            }
            None => Box::pin(future),
        };
        match boxed.as_mut().poll(cx) {
            Poll::Ready(completion) => {
                self.spare = Some(boxed);
                self.answer(completion);
            }
            Poll::Pending => self.running.push(boxed),
        }
    }

    fn refuse(&mut self, request: Request, error: ExportError) {
        self.unanswered += 1;
        reply::put_reply(
            &mut self.output,
            &request,
            Command::Nothing,
            self.agreed.headers,
            Err(error),
            0,
        );
    }

    fn answer(&mut self, completion: Completion) {
        let Completion {
            request,
            command,
            held_bytes,
            outcome,
        } = completion;
        reply::put_reply(
            &mut self.output,
            &request,
            command,
            self.agreed.headers,
            outcome,
            u64::from(held_bytes),
        );
    }

    /// Answers what has completed since.
    fn reap(&mut self, cx: &mut Context<'_>) {
        while !self.running.is_empty() {
            match self.running.poll_next_unpin(cx) {
                Poll::Ready(Some(completion)) => self.answer(completion),
                Poll::Ready(None) | Poll::Pending => return,
            }
        }
    }

    /// Sends what the socket takes; `true` if that answered requests.
    fn send(&mut self, cx: &mut Context<'_>) -> bool {
        let mut total = Sent::default();
        while !self.output.is_empty() {
            let left_bytes = self.output.left_bytes();
            match self.output.poll_send(&mut self.stream, cx) {
                Poll::Ready(Ok(sent)) => {
                    self.stall.moved_bytes += left_bytes - self.output.left_bytes();
                    total.add(sent);
                }
                Poll::Ready(Err(error)) => {
                    self.fail(error.into());
                    total.add(self.output.discard());
                }
                Poll::Pending => break,
            }
        }
        // A stream may keep what it took (TLS does) until it is told that nothing follows.
        if let Poll::Ready(Err(error)) = Pin::new(&mut self.stream).poll_flush(cx) {
            self.fail(error.into());
        }
        self.unanswered -= total.replies;
        self.holding.put_back(total.held_bytes);
        total.replies > 0
    }

    /// Receives once; `true` if that changed something.
    fn receive(&mut self, cx: &mut Context<'_>) -> bool {
        let is_payload = self.decoder.holds_partial_payload();
        let (target, max_bytes) = self.decoder.receive_target();
        let mut target = target.limit(max_bytes);
        let received = match pin!(self.stream.read_buf(&mut target)).poll(cx) {
            // Inside TLS: the client closed without the goodbye of TLS, as many do.
            Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Poll::Ready(Ok(0))
            }
            received => received,
        };
        match received {
            Poll::Ready(Ok(0)) if self.decoder.is_between_requests() => {
                self.ending = Some(Ok(()));
                self.abandon();
            }
            Poll::Ready(Ok(0)) => {
                self.fail(ConnectionError::Io(io::ErrorKind::UnexpectedEof.into()));
                self.abandon();
            }
            Poll::Ready(Ok(bytes)) if is_payload => self.stall.moved_bytes += bytes,
            Poll::Ready(Ok(_)) => {}
            Poll::Ready(Err(error)) => {
                self.fail(error.into());
                self.abandon();
            }
            Poll::Pending => return false,
        }
        true
    }

    /// Receives while nothing more is started, as far as the buffer has room: that the client is
    /// gone must be seen also when all its requests wait. Behind a full buffer it is not seen: what
    /// the socket still holds may end in DISC, so that its hang-up alone (RDHUP) does not tell.
    fn receive_ahead(&mut self, cx: &mut Context<'_>) -> bool {
        let (_, max_bytes) = self.decoder.receive_target();
        max_bytes > 0 && !self.decoder.has_goodbye() && self.receive(cx)
    }

    /// The client is gone without a goodbye. It may send its unanswered requests again over another
    /// connection, and they must not be executed behind those: what still waits is dropped.
    fn abandon(&mut self) {
        self.running.clear();
        self.output.discard();
    }

    /// Reads nothing more; what is running goes on. The first reason counts.
    fn fail(&mut self, error: ConnectionError) {
        if !matches!(self.ending, Some(Err(_))) {
            self.ending = Some(Err(error));
        }
    }

    /// Nothing can be done now: waits, but not for ever if this connection keeps bytes from others.
    fn rest(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        let waits_for_peer = !self.output.is_empty() || self.decoder.holds_partial_payload();
        if self
            .stall
            .poll(cx, &self.holding, waits_for_peer)
            .is_ready()
        {
            return Poll::Ready(Err(ConnectionError::Stalled(self.stall.deadline)));
        }
        Poll::Pending
    }

    fn close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        // A peer that is gone cannot be told so; the reason for the end is what matters. Once is enough: OpenSSL, told again, waits for
        // the peer's goodbye.
        if !self.shut {
            self.shut = Pin::new(&mut self.stream).poll_shutdown(cx).is_ready();
        }
        let waits = !self.shut || self.drain.done;
        if waits && self.drain.poll_grace(cx).is_pending() {
            let closed = self.shut && poll_closed(&mut self.stream, cx).is_ready();
            if !closed {
                return Poll::Pending;
            }
        }
        Poll::Ready(self.ending.take().unwrap_or(Ok(())))
    }
}

/// The end that the server wants.
#[derive(Default)]
struct Drain {
    /// Nothing more is received for execution.
    begun: bool,
    /// Everything that was received before is started.
    done: bool,
    linger: Option<Pin<Box<Sleep>>>,
}

impl Drain {
    /// Ready when closing took too long.
    fn poll_grace(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let grace = || Box::pin(tokio::time::sleep(limits::DRAIN_GRACE));
        self.linger.get_or_insert_with(grace).as_mut().poll(cx)
    }
}

/// Ready when the client has closed its side, too. Until then what it sends is dropped: to close a TCP socket with unread bytes would
/// reset the connection, and replies that are still on their way would be lost.
fn poll_closed<S: AsyncRead + Unpin>(stream: &mut S, cx: &mut Context<'_>) -> Poll<()> {
    let mut dropped = [0; 4096];
    loop {
        let mut buffer = ReadBuf::new(&mut dropped);
        match Pin::new(&mut *stream).poll_read(cx, &mut buffer) {
            Poll::Ready(Ok(())) if !buffer.filled().is_empty() => {}
            Poll::Ready(_) => return Poll::Ready(()),
            Poll::Pending => return Poll::Pending,
        }
    }
}

/// Watches that a client which holds bytes of the budget moves them while others wait for them.
struct Stall {
    deadline: Duration,
    timer: Option<Pin<Box<Sleep>>>,
    /// Of replies and of payloads that bytes were taken for, since the timer was set. Nothing else counts: a client could send for ever
    /// what is refused.
    moved_bytes: usize,
    /// Since the timer was set, bytes were held, only the client could move them, and others waited at its start.
    judged: bool,
}

impl Stall {
    /// Ready when the client must go. The timer runs for one deadline at a time and is not touched by every request.
    fn poll(&mut self, cx: &mut Context<'_>, holding: &Holding, waits_for_peer: bool) -> Poll<()> {
        let shared_bytes = holding.shared_bytes();
        if shared_bytes == 0 {
            self.judged = false;
            return Poll::Pending;
        }
        self.judged &= waits_for_peer;
        let deadline = self.deadline;
        let timer = self
            .timer
            .get_or_insert_with(|| Box::pin(tokio::time::sleep(deadline)));
        while timer.as_mut().poll(cx).is_ready() {
            let is_contended = waits_for_peer && holding.is_contended();
            let is_slow = (self.moved_bytes as u64) < shared_bytes.div_ceil(limits::STALL_SHARE);
            if self.judged && is_contended && is_slow {
                return Poll::Ready(());
            }
            self.judged = is_contended;
            self.moved_bytes = 0;
            timer.as_mut().reset(tokio::time::Instant::now() + deadline);
        }
        Poll::Pending
    }
}
