//! The network between simulated hosts: streams with delay, cuts in one or both directions, and breaks.
//!
//! As over TCP the bytes of one stream arrive in order or the stream breaks; loss is delay.

use crate::machine::{Incarnation, lock};
use crate::random::Random;
use crate::trace;
use blockd::io::net::{BoxStream, Listen, Network};
use futures_util::future::BoxFuture;
use std::collections::{BTreeMap, VecDeque};
use std::future::{Future, poll_fn};
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, Weak};
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

/// Bytes under way in one direction of a stream before its writer has to wait.
const WINDOW_BYTES: usize = 256 << 10;

/// Which hosts hear each other, and how late.
pub(crate) struct Net {
    state: Mutex<State>,
}

struct State {
    random: Random,
    listeners: BTreeMap<SocketAddr, Listener>,
    /// `cut[from][to]`: nothing arrives.
    cut: Vec<Vec<bool>>,
    /// Of 256 messages so many are late, and by so many ms at the most.
    late: u64,
    late_ms: u64,
    pipes: Vec<Weak<Pipe>>,
    next_port: u16,
    /// Wakers of connects that wait for a cut to heal.
    waiting: Vec<Waker>,
}

struct Listener {
    incarnation: Arc<Incarnation>,
    queue: VecDeque<(SimStream, SocketAddr)>,
    waker: Option<Waker>,
}

/// One direction of a stream.
struct Pipe {
    from: usize,
    to: usize,
    inner: Mutex<Flow>,
}

#[derive(Default)]
struct Flow {
    queue: VecDeque<(Instant, Vec<u8>, usize)>,
    bytes: usize,
    last: Option<Instant>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    fin: bool,
    reset: bool,
    /// The other host has lost power: nothing is heard until it is back.
    silent: bool,
    /// Its reader believes that it is broken; its writer does not know yet.
    lost: bool,
}

fn wake(waiting: &mut Option<Waker>) {
    if let Some(waker) = waiting.take() {
        waker.wake();
    }
}

impl Flow {
    fn wake(&mut self) {
        wake(&mut self.reader);
        wake(&mut self.writer);
    }
}

/// The address of a host.
#[must_use]
pub(crate) fn address(host: usize) -> SocketAddr {
    let last = u8::try_from(host + 1).unwrap_or(u8::MAX);
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(10, 0, 0, last)), 10_808)
}

fn host_of(address: &SocketAddr) -> usize {
    match address.ip() {
        IpAddr::V4(ip) => usize::from(ip.octets()[3]).saturating_sub(1),
        IpAddr::V6(_) => 0,
    }
}

impl Net {
    #[must_use]
    pub(crate) fn new(hosts: usize, random: Random) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                random,
                listeners: BTreeMap::new(),
                cut: vec![vec![false; hosts]; hosts],
                late: 0,
                late_ms: 0,
                pipes: Vec::new(),
                next_port: 20_000,
                waiting: Vec::new(),
            }),
        })
    }

    /// The network as a host has it.
    #[must_use]
    pub(crate) fn of(self: &Arc<Self>, incarnation: Arc<Incarnation>) -> Arc<dyn Network> {
        Arc::new(SimNetwork {
            net: Arc::clone(self),
            incarnation,
        })
    }

    /// Of 256 messages `late` come late, by up to `late_ms`.
    pub(crate) fn set_delay(&self, late: u64, late_ms: u64) {
        let mut state = lock(&self.state);
        (state.late, state.late_ms) = (late, late_ms);
    }

    /// Cuts one direction, or heals it.
    pub(crate) fn set_cut(&self, from: usize, to: usize, cut: bool) {
        lock(&self.state).cut[from][to] = cut;
        if !cut {
            self.wake_all();
        }
    }

    /// Heals all cuts.
    pub(crate) fn heal(&self) {
        lock(&self.state)
            .cut
            .iter_mut()
            .for_each(|row| row.fill(false));
        self.wake_all();
    }

    fn wake_all(&self) {
        for pipe in self.pipes() {
            lock(&pipe.inner).wake();
        }
        let waiting = std::mem::take(&mut lock(&self.state).waiting);
        waiting.into_iter().for_each(Waker::wake);
    }

    fn pipes(&self) -> Vec<Arc<Pipe>> {
        let mut state = lock(&self.state);
        state.pipes.retain(|pipe| pipe.strong_count() > 0);
        state.pipes.iter().filter_map(Weak::upgrade).collect()
    }

    fn is_cut(&self, from: usize, to: usize) -> bool {
        lock(&self.state).cut[from][to]
    }

    /// Breaks all streams between two hosts (`None`: any).
    pub(crate) fn reset(&self, one: usize, other: Option<usize>) {
        for pipe in self.pipes() {
            let ends = [pipe.from, pipe.to];
            if ends.contains(&one) && other.is_none_or(|other| ends.contains(&other)) {
                let mut flow = lock(&pipe.inner);
                flow.reset = true;
                flow.queue.clear();
                flow.wake();
            }
        }
    }

    /// Lets a host believe that its streams to another one are broken. What it has sent comes late,
    /// and only then does the other side hear of it.
    pub(crate) fn lose(&self, one: usize, other: usize, late_ms: u64) {
        let then = Instant::now() + Duration::from_millis(late_ms);
        for pipe in self.pipes() {
            let mut flow = lock(&pipe.inner);
            if (pipe.from, pipe.to) == (other, one) {
                flow.lost = true;
                flow.queue.clear();
            } else if (pipe.from, pipe.to) == (one, other) {
                flow.queue
                    .iter_mut()
                    .for_each(|sent| sent.0 = sent.0.max(then));
                flow.last = flow.last.max(Some(then));
            }
            flow.wake();
        }
    }

    /// A host is gone: its process (peers hear of it), or its power (they do not).
    pub(crate) fn die(&self, host: usize, silently: bool) {
        let gone = lock(&self.state).listeners.remove(&address(host));
        drop(gone);
        if !silently {
            return self.reset(host, None);
        }
        for pipe in self.pipes() {
            if [pipe.from, pipe.to].contains(&host) {
                lock(&pipe.inner).silent = true;
            }
        }
    }

    fn arrival(&self, flow: &mut Flow) -> Instant {
        let mut state = lock(&self.state);
        let late = state.late;
        let mut at = Instant::now();
        if late > 0 && state.random.below(256) < late {
            let most = state.late_ms;
            at += Duration::from_millis(state.random.below(most) + 1);
        }
        let at = flow.last.map_or(at, |last| last.max(at));
        flow.last = Some(at);
        at
    }
}

struct SimNetwork {
    net: Arc<Net>,
    incarnation: Arc<Incarnation>,
}

impl Network for SimNetwork {
    fn connect<'a>(&'a self, to: &'a str) -> BoxFuture<'a, io::Result<BoxStream>> {
        Box::pin(async move {
            let to: SocketAddr = to
                .parse()
                .map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
            let (me, other) = (self.incarnation.host, host_of(&to));
            poll_fn(|cx| {
                let mut state = lock(&self.net.state);
                if state.cut[me][other] || state.cut[other][me] {
                    state.waiting.push(cx.waker().clone());
                    return Poll::Pending;
                }
                Poll::Ready(())
            })
            .await;
            self.net.connect(&self.incarnation, to)
        })
    }

    fn listen(&self, address: SocketAddr) -> BoxFuture<'_, io::Result<Box<dyn Listen>>> {
        Box::pin(async move {
            // A host that is back does not know the streams of before.
            self.net.reset(self.incarnation.host, None);
            let listener = Listener {
                incarnation: Arc::clone(&self.incarnation),
                queue: VecDeque::new(),
                waker: None,
            };
            let before = lock(&self.net.state).listeners.insert(address, listener);
            drop(before);
            Ok(Box::new(SimListener {
                net: Arc::clone(&self.net),
                incarnation: Arc::clone(&self.incarnation),
                address,
            }) as Box<dyn Listen>)
        })
    }
}

impl Net {
    fn connect(self: &Arc<Self>, me: &Arc<Incarnation>, to: SocketAddr) -> io::Result<BoxStream> {
        if me.is_dead() {
            return Err(io::ErrorKind::NetworkDown.into());
        }
        let mut state = lock(&self.state);
        let (from, other) = (me.host, host_of(&to));
        trace::mix((from * 16 + other) as u64 + 7000);
        state.next_port = state.next_port.wrapping_add(1).max(20_000);
        let back = SocketAddr::new(address(from).ip(), state.next_port);
        let Some(listener) = state.listeners.get_mut(&to) else {
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        let pipe = |from, to| {
            Arc::new(Pipe {
                from,
                to,
                inner: Mutex::default(),
            })
        };
        let (out, back_pipe) = (pipe(from, other), pipe(other, from));
        let stream = |rx: &Arc<Pipe>, tx: &Arc<Pipe>, incarnation: &Arc<Incarnation>| SimStream {
            net: Arc::clone(self),
            incarnation: Arc::clone(incarnation),
            rx: Arc::clone(rx),
            tx: Arc::clone(tx),
            timer: None,
        };
        let theirs = stream(&out, &back_pipe, &listener.incarnation);
        let ours = stream(&back_pipe, &out, me);
        listener.queue.push_back((theirs, back));
        wake(&mut listener.waker);
        state
            .pipes
            .extend([Arc::downgrade(&out), Arc::downgrade(&back_pipe)]);
        Ok(Box::new(ours))
    }
}

struct SimListener {
    net: Arc<Net>,
    incarnation: Arc<Incarnation>,
    address: SocketAddr,
}

impl Drop for SimListener {
    fn drop(&mut self) {
        let mut state = lock(&self.net.state);
        let current = state.listeners.get(&self.address);
        if current.is_some_and(|current| Arc::ptr_eq(&current.incarnation, &self.incarnation)) {
            let gone = state.listeners.remove(&self.address);
            drop(state);
            drop(gone);
        }
    }
}

impl Listen for SimListener {
    fn accept(&mut self) -> BoxFuture<'_, io::Result<(BoxStream, SocketAddr)>> {
        Box::pin(poll_fn(|cx| {
            let mut state = lock(&self.net.state);
            let Some(listener) = state.listeners.get_mut(&self.address) else {
                return Poll::Pending;
            };
            match listener.queue.pop_front() {
                Some((stream, from)) => Poll::Ready(Ok((Box::new(stream) as BoxStream, from))),
                None => {
                    listener.waker = Some(cx.waker().clone());
                    Poll::Pending
                }
            }
        }))
    }
}

struct SimStream {
    net: Arc<Net>,
    incarnation: Arc<Incarnation>,
    rx: Arc<Pipe>,
    tx: Arc<Pipe>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl SimStream {
    fn wait_until(&mut self, at: Instant, cx: &mut Context<'_>) -> bool {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(at)));
        timer.as_mut().reset(at);
        timer.as_mut().poll(cx).is_ready()
    }
}

impl AsyncRead for SimStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.incarnation.is_dead() {
            return Poll::Ready(Err(io::ErrorKind::NetworkDown.into()));
        }
        loop {
            let rx = Arc::clone(&self.rx);
            let mut flow = lock(&rx.inner);
            if flow.reset || flow.lost {
                return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
            }
            if flow.silent || self.net.is_cut(rx.from, rx.to) {
                flow.reader = Some(cx.waker().clone());
                return Poll::Pending;
            }
            let fin = flow.fin;
            match flow.queue.front_mut() {
                Some((at, data, done)) if *at <= Instant::now() => {
                    let take = buf.remaining().min(data.len() - *done);
                    buf.put_slice(&data[*done..*done + take]);
                    *done += take;
                    if *done == data.len() {
                        flow.queue.pop_front();
                    }
                    flow.bytes -= take;
                    wake(&mut flow.writer);
                    return Poll::Ready(Ok(()));
                }
                Some((at, ..)) => {
                    let at = *at;
                    flow.reader = Some(cx.waker().clone());
                    drop(flow);
                    if !self.wait_until(at, cx) {
                        return Poll::Pending;
                    }
                }
                None if fin => return Poll::Ready(Ok(())),
                None => {
                    flow.reader = Some(cx.waker().clone());
                    return Poll::Pending;
                }
            }
        }
    }
}

impl SimStream {
    fn send(
        &self,
        cx: &mut Context<'_>,
        len: usize,
        fill: impl FnOnce(&mut Vec<u8>),
    ) -> Poll<io::Result<usize>> {
        if self.incarnation.is_dead() {
            return Poll::Ready(Err(io::ErrorKind::NetworkDown.into()));
        }
        let mut flow = lock(&self.tx.inner);
        if flow.reset {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if flow.lost {
            return Poll::Ready(Ok(len));
        }
        if flow.bytes >= WINDOW_BYTES {
            flow.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let mut data = Vec::with_capacity(len);
        fill(&mut data);
        trace::mix((self.tx.from * 16 + self.tx.to) as u64 | (len as u64) << 8);
        let at = self.net.arrival(&mut flow);
        flow.bytes += data.len();
        flow.queue.push_back((at, data, 0));
        wake(&mut flow.reader);
        Poll::Ready(Ok(len))
    }
}

impl AsyncWrite for SimStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.send(cx, buf.len(), |data| data.extend_from_slice(buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let len = bufs.iter().map(|buf| buf.len()).sum();
        self.send(cx, len, |data| {
            bufs.iter().for_each(|buf| data.extend_from_slice(buf));
        })
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut flow = lock(&self.tx.inner);
        flow.fin = true;
        flow.wake();
        Poll::Ready(Ok(()))
    }
}

impl Drop for SimStream {
    fn drop(&mut self) {
        if self.incarnation.is_dead() {
            return;
        }
        let mut flow = lock(&self.tx.inner);
        flow.fin = true;
        flow.wake();
        drop(flow);
        let mut flow = lock(&self.rx.inner);
        flow.reset = true;
        flow.wake();
    }
}
