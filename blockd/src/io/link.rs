//! The requesting side of a peer connection: pipelined calls, and a pool that reconnects.
//!
//! A [`Link`] is one connection. When it breaks, every open call fails with
//! [`LinkError::Lost`] and the link stays closed; [`Peers`] makes a new one for the next call.
//! A requester names itself with a random id and counts its connections: a server that gets the
//! next connection of an id first ends the one before, so that a request that was sent twice is
//! never executed a second time after the answer to its repetition.

mod open_spans;
#[cfg(test)]
mod tests;

pub use open_spans::SpanList;

use super::framed::FrameStream;
use super::hlc::Hlc;
use super::net::{BoxStream, Network, Tcp, connect_first};
use super::wire::{self, Frame, Kind, Status};
use crate::id::{NodeNo, Stamp, VolumeId};
use crate::limits::{PATH_LOOK_MS, PEER_HELLO_MS, PEER_STALL_MS};
use bytes::Bytes;
use futures_util::task::AtomicWaker;
use open_spans::OpenSpans;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, Interval, interval, timeout};

/// First payload of a connection, in both directions.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub min_version: u8,
    pub max_version: u8,
    /// Random per process and address; equal on all connections of one requester.
    pub requester: u64,
    /// Grows with every connection that this requester makes to this server.
    pub connection: u64,
    /// The requester's cluster, if it belongs to one or insists on one.
    pub cluster_id: Option<String>,
    /// The requester's node, 0 for clients.
    pub node: NodeNo,
}

/// The server's answer to a [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    pub version: u8,
    pub cluster_id: Option<String>,
    pub node: NodeNo,
    /// Changes when writes that were acknowledged but not flushed may be lost (promise 3).
    pub verifier: u64,
}

/// Why a call got no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum LinkError {
    #[error("cannot connect to {address}: {reason}")]
    Connect { address: String, reason: String },
    #[error("{address} refused the connection: {reason}")]
    Refused {
        address: String,
        status: u16,
        reason: String,
    },
    #[error("connection to {address} lost: {reason}")]
    Lost { address: String, reason: String },
}

/// One connection to a server; clones share it. Closes when the last clone is dropped.
#[derive(Clone)]
pub struct Link {
    owner: Arc<LinkOwner>,
}

struct LinkOwner {
    shared: Arc<Shared>,
}

struct Shared {
    address: String,
    /// Made by the path that is tried first.
    by_first_path: bool,
    /// Set if both sides know stamps.
    hlc: Option<Arc<Hlc>>,
    welcome: Welcome,
    state: Mutex<State>,
    waker: AtomicWaker,
}

#[derive(Default)]
struct State {
    outbox: Vec<Frame>,
    /// Calls that were given up after their frames had left the outbox.
    given_up: Vec<u64>,
    open_calls: HashMap<u64, oneshot::Sender<Frame>>,
    next_id: u64,
    /// Set once, when the connection has ended.
    ended: Option<String>,
    dropped: bool,
}

/// A call that waits for its answer. Given up, its frame is taken back if the kernel has nothing of
/// it yet: what nobody waits for any more must not be executed later than necessary.
struct OpenCall<'a> {
    shared: &'a Shared,
    id: u64,
}

impl Drop for OpenCall<'_> {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        if state.open_calls.remove(&self.id).is_none() {
            return;
        }
        let queued = state
            .outbox
            .iter()
            .position(|frame| frame.request_id == self.id);
        match queued {
            Some(index) => drop(state.outbox.remove(index)),
            None => state.given_up.push(self.id),
        }
        drop(state);
        self.shared.waker.wake();
    }
}

impl Drop for LinkOwner {
    fn drop(&mut self) {
        self.shared.lock().dropped = true;
        self.shared.waker.wake();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stamp(&self) -> Stamp {
        self.hlc.as_ref().map_or(Stamp(0), |hlc| hlc.tick())
    }

    fn lost(&self, reason: &str) -> LinkError {
        LinkError::Lost {
            address: self.address.clone(),
            reason: reason.to_owned(),
        }
    }
}

impl Link {
    /// Connects, says hello and starts the connection's task on the current runtime.
    ///
    /// # Errors
    /// [`LinkError::Connect`] or [`LinkError::Refused`] (wrong cluster or version).
    pub async fn connect(address: &str, hello: &Hello) -> Result<Self, LinkError> {
        let paths = [address.to_owned()];
        Self::connect_over(&Tcp, None, (address, &paths), hello).await
    }

    /// As [`Self::connect`], over this network and by the first of these paths that answers; requests
    /// and replies carry the clock.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_over(
        network: &dyn Network,
        hlc: Option<&Arc<Hlc>>,
        (address, paths): (&str, &[String]),
        hello: &Hello,
    ) -> Result<Self, LinkError> {
        let connect = |reason: String| LinkError::Connect {
            address: address.to_owned(),
            reason,
        };
        let limit = Duration::from_millis(PEER_HELLO_MS);
        let stream = timeout(limit, connect_first(network, paths)).await;
        let (stream, by_first_path) = stream
            .map_err(|_| connect("timed out".to_owned()))?
            .map_err(|error| connect(error.to_string()))?;
        let mut frames = FrameStream::new(stream);
        let welcome = timeout(limit, say_hello(&mut frames, address, hello)).await;
        let welcome = welcome.map_err(|_| connect("no answer to the hello".to_owned()))??;
        let is_stamped = welcome.version >= wire::STAMPED_VERSION;
        let shared = Arc::new(Shared {
            address: address.to_owned(),
            by_first_path,
            hlc: hlc.filter(|_| is_stamped).map(Arc::clone),
            welcome,
            state: Mutex::default(),
            waker: AtomicWaker::new(),
        });
        tokio::spawn(run(frames, Arc::clone(&shared)));
        Ok(Self {
            owner: Arc::new(LinkOwner { shared }),
        })
    }

    #[must_use]
    pub fn welcome(&self) -> &Welcome {
        &self.owner.shared.welcome
    }

    /// The server's address.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.owner.shared.address
    }

    #[must_use]
    pub fn is_ended(&self) -> bool {
        self.owner.shared.lock().ended.is_some()
    }

    /// Sends a request whose answer nobody waits for; nothing happens if the connection has ended.
    pub fn post(&self, mut request: Frame) {
        let shared = &self.owner.shared;
        request.stamp = shared.stamp();
        {
            let mut state = shared.lock();
            if state.ended.is_some() {
                return;
            }
            state.next_id += 1;
            request.request_id = state.next_id;
            state.outbox.push(request);
        }
        shared.waker.wake();
    }

    /// Sends a request and waits for its answer; answers of an error status are `Ok` here. Dropped
    /// before, the request is not sent if none of it was sent yet.
    ///
    /// # Errors
    /// [`LinkError::Lost`] if the connection ends first: the request may or may not have been
    /// executed, but will not be executed after the requester's next connection was welcomed.
    pub async fn call(&self, mut request: Frame) -> Result<Frame, LinkError> {
        let shared = &self.owner.shared;
        request.stamp = shared.stamp();
        let (sender, receiver) = oneshot::channel();
        let open_call = {
            let mut state = shared.lock();
            if let Some(reason) = &state.ended {
                return Err(shared.lost(reason));
            }
            state.next_id += 1;
            request.request_id = state.next_id;
            let id = request.request_id;
            state.open_calls.insert(id, sender);
            state.outbox.push(request);
            OpenCall { shared, id }
        };
        shared.waker.wake();
        let answered = receiver.await;
        drop(open_call);
        match answered {
            Ok(reply) => Ok(reply),
            Err(_) => Err(shared.lost(shared.lock().ended.as_deref().unwrap_or("closed"))),
        }
    }
}

async fn say_hello(
    frames: &mut FrameStream<BoxStream>,
    address: &str,
    hello: &Hello,
) -> Result<Welcome, LinkError> {
    let lost = |reason: String| LinkError::Connect {
        address: address.to_owned(),
        reason,
    };
    let mut request = Frame::request(Kind::Hello, VolumeId(0));
    request.payload = encode_control(hello);
    frames
        .send(request)
        .await
        .map_err(|error| lost(error.to_string()))?;
    let reply = frames
        .next()
        .await
        .map_err(|error| lost(error.to_string()))?;
    let reply = reply.ok_or_else(|| lost("closed during the hello".to_owned()))?;
    if reply.status != Status::Ok {
        return Err(LinkError::Refused {
            address: address.to_owned(),
            status: reply.status as u16,
            reason: reply.text(),
        });
    }
    decode_control(reply.payload).map_err(|error| lost(error.to_string()))
}

/// Encodes a control payload.
#[must_use]
pub fn encode_control<T: Serialize>(value: &T) -> wire::Payload {
    Bytes::from(postcard::to_stdvec(value).unwrap_or_default()).into()
}

/// Decodes a control payload.
///
/// # Errors
/// When the bytes are not exactly such a value.
pub fn decode_control<T: for<'a> Deserialize<'a>>(
    payload: wire::Payload,
) -> Result<T, postcard::Error> {
    match postcard::take_from_bytes(&payload.into_bytes())? {
        (value, []) => Ok(value),
        _ => Err(postcard::Error::DeserializeBadEncoding),
    }
}

/// The connection's task: sends what callers queue, hands replies to them, watches for stalls.
async fn run(mut frames: FrameStream<BoxStream>, shared: Arc<Shared>) {
    let mut ticks = interval(Duration::from_millis(PEER_STALL_MS / 8));
    let mut heard = Instant::now();
    let reason = poll_fn(|cx| step(cx, &mut frames, &shared, &mut ticks, &mut heard)).await;
    let mut state = shared.lock();
    state.ended = Some(reason);
    state.open_calls.clear();
    state.outbox.clear();
}

fn step(
    cx: &mut Context<'_>,
    frames: &mut FrameStream<BoxStream>,
    shared: &Shared,
    ticks: &mut Interval,
    heard: &mut Instant,
) -> Poll<String> {
    shared.waker.register(cx.waker());
    loop {
        let (outbox, given_up) = {
            let mut state = shared.lock();
            if state.dropped {
                return Poll::Ready("closed by this side".to_owned());
            }
            let outbox = std::mem::take(&mut state.outbox);
            (outbox, std::mem::take(&mut state.given_up))
        };
        given_up.into_iter().for_each(|id| frames.take_back(id));
        let queued = !outbox.is_empty();
        outbox.into_iter().for_each(|frame| frames.push(frame));
        if let Poll::Ready(Err(error)) = frames.poll_flush(cx) {
            return Poll::Ready(error.to_string());
        }
        match frames.poll_frame(cx) {
            Poll::Ready(Ok(Some(reply))) => {
                *heard = Instant::now();
                if let Some(hlc) = &shared.hlc {
                    hlc.observe(reply.stamp);
                }
                let caller = shared.lock().open_calls.remove(&reply.request_id);
                caller.map(|caller| caller.send(reply));
            }
            Poll::Ready(Ok(None)) => return Poll::Ready("closed by the peer".to_owned()),
            Poll::Ready(Err(error)) => return Poll::Ready(error.to_string()),
            Poll::Pending if queued => {}
            Poll::Pending => break,
        }
    }
    while ticks.poll_tick(cx).is_ready() {
        if shared.lock().open_calls.is_empty() {
            *heard = Instant::now();
        } else if heard.elapsed() > Duration::from_millis(PEER_STALL_MS) {
            return Poll::Ready(format!("no answer for {} s", PEER_STALL_MS / 1000));
        }
    }
    Poll::Pending
}

/// Links to any number of servers, made when needed and made again when lost.
pub struct Peers {
    network: Arc<dyn Network>,
    hlc: Arc<Hlc>,
    requester: u64,
    spans: OpenSpans,
    cluster_id: Mutex<Option<String>>,
    node: Mutex<NodeNo>,
    slots: Mutex<HashMap<String, Arc<Slot>>>,
    /// Of addresses that are reached by others or in another order.
    paths: Mutex<HashMap<String, Vec<String>>>,
}

struct Slot {
    /// Another one for each address: one server may be known under two.
    requester: u64,
    link: Mutex<Option<Link>>,
    /// Held while connecting, with the number of connections tried so far.
    connecting: tokio::sync::Mutex<u64>,
    /// Connections that were welcomed.
    made: AtomicU64,
    /// When the first path was looked at last, while the link is of another one.
    looked: Mutex<Option<Instant>>,
}

impl Peers {
    /// `requester` must be random: it tells this process from all others.
    #[must_use]
    pub fn new(
        network: Arc<dyn Network>,
        hlc: Arc<Hlc>,
        requester: u64,
        cluster_id: Option<String>,
        node: NodeNo,
    ) -> Self {
        Self {
            network,
            hlc,
            requester,
            spans: OpenSpans::new(requester),
            cluster_id: Mutex::new(cluster_id),
            node: Mutex::new(node),
            slots: Mutex::default(),
            paths: Mutex::default(),
        }
    }

    /// Says by which addresses, in order, servers are reached that are known under another one
    /// (S004-110). Links to servers whose first path is another one than before are made anew for the
    /// next call, which ends them.
    pub fn publish_paths(&self, paths: HashMap<String, Vec<String>>) {
        let first = |all: &HashMap<String, Vec<String>>, address: &String| {
            let known = all.get(address).and_then(|paths| paths.first());
            known.unwrap_or(address).clone()
        };
        let mut known = lock(&self.paths);
        for (address, slot) in lock(&self.slots).iter() {
            if first(&known, address) != first(&paths, address) {
                lock(&slot.link).take();
            }
        }
        *known = paths;
    }

    fn paths(&self, address: &str) -> Vec<String> {
        let known = lock(&self.paths).get(address).cloned();
        known.unwrap_or_else(|| vec![address.to_owned()])
    }

    /// The spans of this requester are all that a node begins, before the first of them.
    pub fn begin_spans_of(&self, node: NodeNo) {
        self.spans.be_of(node);
    }

    /// The id of a new change over several pages, which no other requester has.
    #[must_use]
    pub fn begin_span(&self) -> u64 {
        self.spans.begin()
    }

    /// Nothing more of a span comes; servers to which there is no link hear it with the next one.
    pub fn end_span(&self, id: u64) {
        self.spans.end(id);
    }

    /// Posts a request if there is a link to `address` now.
    pub fn post(&self, address: &str, request: Frame) {
        let slot = lock(&self.slots).get(address).map(Arc::clone);
        if let Some(link) = slot.and_then(|slot| slot.live()) {
            link.post(request);
        }
    }

    /// Sets who this requester is from now on; existing links stay as they are.
    pub fn set_identity(&self, cluster_id: String, node: NodeNo) {
        *lock(&self.cluster_id) = Some(cluster_id);
        *lock(&self.node) = node;
    }

    /// Wants this cluster from now on, unless a cluster is set already.
    pub fn insist(&self, cluster_id: &str) {
        lock(&self.cluster_id).get_or_insert_with(|| cluster_id.to_owned());
    }

    /// The cluster that is wanted.
    #[must_use]
    pub fn cluster_id(&self) -> Option<String> {
        lock(&self.cluster_id).clone()
    }

    /// Whether there is a link to `address` now, and how many were made so far.
    #[must_use]
    pub fn connections(&self, address: &str) -> (bool, u64) {
        let slot = lock(&self.slots).get(address).map(Arc::clone);
        slot.map_or((false, 0), |slot| {
            (slot.live().is_some(), slot.made.load(Ordering::Relaxed))
        })
    }

    /// Closes the links to all addresses but these. A call over one of them goes on to its end.
    pub fn close_others(&self, needed: &[String]) {
        for (address, slot) in lock(&self.slots).iter() {
            if !needed.contains(address) {
                lock(&slot.link).take();
            }
        }
    }

    /// The link to `address`, connecting if there is none.
    ///
    /// # Errors
    /// As [`Link::connect`].
    pub async fn link(&self, address: &str) -> Result<Link, LinkError> {
        let slot = self.slot(address);
        if let Some(link) = slot.live() {
            if !link.owner.shared.by_first_path && slot.is_look_due() {
                self.look_at_first_path(address, &slot);
            }
            return Ok(link);
        }
        let mut connections = slot.connecting.lock().await;
        if let Some(link) = slot.live() {
            return Ok(link);
        }
        *connections += 1;
        let hello = self.hello(slot.requester, *connections);
        let (network, hlc) = (&*self.network, Some(&self.hlc));
        let paths = self.paths(address);
        let link = Link::connect_over(network, hlc, (address, &paths), &hello).await?;
        slot.made.fetch_add(1, Ordering::Relaxed);
        *lock(&slot.link) = Some(link.clone());
        // Only now: of a span that ends meanwhile either this tells, or its end finds the link.
        if let Some(announcement) = self.spans.announcement() {
            link.post(announcement);
        }
        Ok(link)
    }

    /// One call over the link to `address`.
    ///
    /// # Errors
    /// As [`Link::connect`] and [`Link::call`].
    pub async fn call(&self, address: &str, request: Frame) -> Result<Frame, LinkError> {
        self.link(address).await?.call(request).await
    }

    /// The link goes once the first path is open again; the next call makes one by that.
    fn look_at_first_path(&self, address: &str, slot: &Arc<Slot>) {
        let Some(first) = self.paths(address).into_iter().next() else {
            return;
        };
        let (network, slot) = (Arc::clone(&self.network), Arc::clone(slot));
        tokio::spawn(async move {
            let limit = Duration::from_millis(PEER_HELLO_MS);
            if let Ok(Ok(_)) = timeout(limit, network.connect(&first)).await {
                lock(&slot.link).take_if(|link| !link.owner.shared.by_first_path);
            }
        });
    }

    fn slot(&self, address: &str) -> Arc<Slot> {
        let mut slots = lock(&self.slots);
        if let Some(slot) = slots.get(address) {
            return Arc::clone(slot);
        }
        let slot = Arc::new(Slot {
            requester: self.requester.wrapping_add(slots.len() as u64),
            link: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
            made: AtomicU64::default(),
            looked: Mutex::default(),
        });
        slots.insert(address.to_owned(), Arc::clone(&slot));
        slot
    }

    fn hello(&self, requester: u64, connection: u64) -> Hello {
        Hello {
            min_version: wire::MIN_VERSION,
            max_version: wire::VERSION,
            requester,
            connection,
            cluster_id: lock(&self.cluster_id).clone(),
            node: *lock(&self.node),
        }
    }
}

impl Slot {
    /// Whether the first path is to be looked at now.
    fn is_look_due(&self) -> bool {
        let mut looked = lock(&self.looked);
        let interval = Duration::from_millis(PATH_LOOK_MS);
        let is_due = looked.is_none_or(|at| at.elapsed() > interval);
        if is_due {
            *looked = Some(Instant::now());
        }
        is_due
    }

    fn live(&self) -> Option<Link> {
        lock(&self.link).clone().filter(|link| !link.is_ended())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
