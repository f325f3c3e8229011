//! The peer port: who may connect, and what each frame does.
//!
//! A requester that connects again ends its connection before first, and is welcomed only after
//! that one has stopped executing. So a request that its requester sent again is not executed a
//! second time behind the answer to the repetition.

use super::{Member, Node, admin, lineage, moves, scrub};
use crate::admin::HoldInfo;
use crate::data::cut::Executing;
use crate::data::error::DataError;
use crate::data::owner::Target;
use crate::data::page_store::{PageAt, SnapshotUsage};
use crate::id::{SnapshotId, Stamp, VolumeId};
use crate::io::framed::{FrameStream, serve};
use crate::io::link::{Hello, SpanList, Welcome, decode_control, encode_control};
use crate::io::net::{BoxStream, Listen};
use crate::io::wire::{
    self, Frame, Kind, Payload, Run, Status, encode_extents, encode_layers, encode_runs, flags,
};
use crate::limits::{
    FORWARD_DEADLINE_MS, FORWARD_RETRY_MS, PEER_CONNECTIONS, PEER_HELLO_MS, REQUEST_PART_BYTES,
    SPAN_MAX_MS,
};
use crate::planted::{Plant, planted};
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::{sleep, timeout};

/// Space used, in the payload of a reply to `Kind::Usage`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Usage {
    /// Of the volume, or of the store when no volume was named.
    pub(crate) allocated_bytes: u64,
    pub(crate) referenced_bytes: u64,
    pub(crate) unique_bytes: u64,
    pub(crate) free_bytes: u64,
}

/// The live connection of each requester.
#[derive(Default)]
pub(crate) struct Connections(RefCell<HashMap<u64, Live>>);

struct Live {
    connection: u64,
    /// Dropped to end the connection.
    end: Option<oneshot::Sender<()>>,
    /// Resolves when it has stopped executing.
    ended: Option<oneshot::Receiver<()>>,
}

/// Spans that a connection has begun and not ended, by volume and id: the gates that they passed,
/// or `None` while the begin waits.
type Spans = Rc<RefCell<HashMap<(VolumeId, u64), Option<Rc<Executing>>>>>;

/// Accepts peer connections for ever, at all addresses of the server.
pub(crate) fn accept_all(node: &Rc<Node>, listeners: Vec<Box<dyn Listen>>) {
    let free = Arc::new(Semaphore::new(PEER_CONNECTIONS));
    for listener in listeners {
        tokio::task::spawn_local(accept(Rc::clone(node), listener, Arc::clone(&free)));
    }
}

async fn accept(node: Rc<Node>, mut listener: Box<dyn Listen>, free: Arc<Semaphore>) {
    loop {
        match listener.accept().await {
            Ok((stream, from)) => {
                let Ok(permit) = Arc::clone(&free).try_acquire_owned() else {
                    tracing::warn!(%from, "peer connection refused: too many are open");
                    continue;
                };
                let node = Rc::clone(&node);
                tokio::task::spawn_local(async move {
                    if let Err(error) = connection(node, stream, from).await {
                        tracing::debug!(%from, %error, "peer connection ended");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a peer connection");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn connection(
    node: Rc<Node>,
    stream: BoxStream,
    from: SocketAddr,
) -> Result<(), crate::io::framed::ConnectionError> {
    let mut frames = FrameStream::new(stream);
    let limit = Duration::from_millis(PEER_HELLO_MS);
    let first = timeout(limit, frames.next()).await;
    let first = first.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
    let Some(request) = first else {
        return Ok(());
    };
    let hello = match check_hello(&node, &request) {
        Ok(hello) => hello,
        Err(refusal) => return Ok(frames.send(refusal).await?),
    };
    let Some((end, ended)) = node.connections.supersede(&hello).await else {
        let text = "a later connection of this requester is open already";
        return Ok(frames
            .send(request.refuse(Status::Unavailable, text))
            .await?);
    };
    let version = hello.max_version.min(wire::VERSION);
    frames.send(welcome(&node, &request, version)).await?;
    let spans = Spans::default();
    let served = serve(frames, |request| {
        let (node, spans) = (Rc::clone(&node), Rc::clone(&spans));
        async move { handle_stamped(node, from, spans, request).await }
    });
    let result = tokio::select! {
        biased;
        _ = end => Ok(()),
        result = served => result,
    };
    interrupt(&node, &spans);
    drop(ended);
    result
}

/// The requester may be back at once for the rest of what it was in the middle of.
fn interrupt(node: &Node, spans: &Spans) {
    let left = spans.take();
    let Some(member) = node.member().filter(|_| !planted(Plant::ForgetLostSpans)) else {
        return;
    };
    for ((volume, id), gate) in left {
        if let Some(gate) = gate.and_then(Rc::into_inner) {
            member.owner().interrupt_span(volume, id, gate);
        }
    }
}

fn check_hello(node: &Node, request: &Frame) -> Result<Hello, Frame> {
    if request.kind != Kind::Hello {
        return Err(request.refuse(Status::Malformed, "the first frame must be a hello"));
    }
    let hello: Hello = decode_control(request.payload.clone())
        .map_err(|_| request.refuse(Status::Malformed, "the hello cannot be decoded"))?;
    if hello.max_version < wire::MIN_VERSION || wire::VERSION < hello.min_version {
        let text = format!(
            "peer protocol {} to {} was offered, this server speaks {} to {}",
            hello.min_version,
            hello.max_version,
            wire::MIN_VERSION,
            wire::VERSION
        );
        return Err(request.refuse(Status::BadVersion, text));
    }
    let identity = node.identity.borrow();
    match (&hello.cluster_id, &identity.cluster) {
        (Some(theirs), Some(ours)) if *theirs != ours.id => {
            let text = format!(
                "this server belongs to cluster {} ({}), the request is for {theirs}",
                ours.name, ours.id
            );
            Err(request.refuse(Status::WrongCluster, text))
        }
        _ => Ok(hello),
    }
}

fn welcome(node: &Node, request: &Frame, version: u8) -> Frame {
    let identity = node.identity.borrow();
    let cluster = identity.cluster.as_ref();
    let welcome = Welcome {
        version,
        cluster_id: cluster.map(|cluster| cluster.id.clone()),
        node: cluster.map(|cluster| cluster.number).unwrap_or_default(),
        verifier: node.verifier,
    };
    request.answer(Status::Ok, encode_control(&welcome))
}

impl Connections {
    /// Ends the requester's earlier connection, and says how this one is ended and reports it.
    async fn supersede(
        &self,
        hello: &Hello,
    ) -> Option<(oneshot::Receiver<()>, oneshot::Sender<()>)> {
        let (end_sender, end) = oneshot::channel();
        let (ended_sender, ended) = oneshot::channel();
        let before = {
            let mut live = self.0.borrow_mut();
            if live.len() > 2 * PEER_CONNECTIONS {
                live.retain(|_, live| live.end.as_ref().is_some_and(|end| !end.is_closed()));
            }
            let newest = live.get(&hello.requester).map_or(0, |live| live.connection);
            if hello.connection <= newest {
                return None;
            }
            let now = Live {
                connection: hello.connection,
                end: Some(end_sender),
                ended: Some(ended),
            };
            live.insert(hello.requester, now)
        };
        if let Some(mut before) = before {
            if planted(Plant::KeepOldConnection) {
                std::mem::forget(before);
                return Some((end, ended_sender));
            }
            drop(before.end.take());
            if let Some(ended) = before.ended.take() {
                let _: Result<(), _> = ended.await;
            }
        }
        Some((end, ended_sender))
    }
}

/// U-07: what is executed here is later than what the requester knows of, and what it does after the
/// reply is later than that.
async fn handle_stamped(node: Rc<Node>, from: SocketAddr, spans: Spans, request: Frame) -> Frame {
    if request.stamp == Stamp(0) {
        return handle(node, from, spans, request).await;
    }
    node.hlc.observe(request.stamp);
    let hlc = Arc::clone(&node.hlc);
    let mut reply = handle(node, from, spans, request).await;
    reply.stamp = hlc.tick();
    reply
}

async fn handle(node: Rc<Node>, from: SocketAddr, spans: Spans, request: Frame) -> Frame {
    match request.kind {
        Kind::Admin => return administer(node, from, request).await,
        Kind::Hello => return request.refuse(Status::Malformed, "a second hello"),
        _ => {}
    }
    let member = match request.kind {
        Kind::SpanEnd => member_in_time(&node).await,
        _ => node.member(),
    };
    let Some(member) = member else {
        return request.refuse(Status::Unavailable, node.why_no_member());
    };
    let mut reply = match request.kind {
        Kind::Registry => {
            let message = request.payload.clone().into_bytes().to_vec();
            let answer = member.registry.handle_rpc(message).await;
            request.answer(Status::Ok, bytes::Bytes::from(answer).into())
        }
        Kind::Snapshot => member.participant.answer(&member, &request).await,
        Kind::Lease => member.leases.answer(&member, &request).await,
        Kind::Move | Kind::MoveData => moves::answer(&member, &request).await,
        _ => match execute_known(&node, &member, &spans, &request).await {
            Ok((frame_flags, payload)) => {
                let mut reply = request.answer(Status::Ok, payload);
                reply.flags = frame_flags;
                reply
            }
            Err(error) => error.reply_to(&request),
        },
    };
    reply.aux = node.verifier;
    reply
}

/// What ends at a server counts also while it starts.
async fn member_in_time(node: &Node) -> Option<Rc<Member>> {
    let started = async {
        loop {
            if let Some(member) = node.member() {
                return member;
            }
            sleep(Duration::from_millis(FORWARD_RETRY_MS)).await;
        }
    };
    let limit = Duration::from_millis(FORWARD_DEADLINE_MS);
    timeout(limit, started).await.ok()
}

/// In a task of its own: what was begun is carried out also when the requester goes away.
async fn administer(node: Rc<Node>, from: SocketAddr, request: Frame) -> Frame {
    let refusal = request.refuse(Status::Unavailable, "the request was not carried out");
    let carried_out =
        tokio::task::spawn_local(async move { admin::answer(&node, &request, from).await });
    carried_out.await.unwrap_or(refusal)
}

type Executed = Result<(u16, Payload), DataError>;

/// Executes a request once this server knows its volume: after a restart its copy of the registry
/// may be old, and a volume that it does not have yet is not gone.
async fn execute_known(
    node: &Node,
    member: &Rc<Member>,
    spans: &Spans,
    request: &Frame,
) -> Executed {
    let volume = request.volume;
    if volume != VolumeId(0) && member.owner().volume(volume).is_none() {
        member.registry.barrier().await.map_err(unavailable)?;
        member.publish();
    }
    execute(node, member, spans, request).await
}

async fn execute(node: &Node, member: &Rc<Member>, spans: &Spans, request: &Frame) -> Executed {
    let owner = member.owner();
    let volume = request.volume;
    let snapshot = Some(request.snapshot).filter(|id| *id != SnapshotId(0));
    match request.kind {
        Kind::Read => {
            let parts = owner.read(volume, snapshot, target(request)?).await?;
            Ok(encode_runs(parts.into_iter().map(Run::from).collect()))
        }
        Kind::Extents if request.flags & flags::LAYERS != 0 => {
            let at = untested_target(request);
            let layers = owner.layers(volume, snapshot, since(request)?, at).await?;
            Ok((flags::LAYERS, encode_layers(&layers)))
        }
        Kind::Extents => {
            let at = untested_target(request);
            let extents = owner.extents(volume, snapshot, at).await?;
            Ok((0, encode_extents(&extents)))
        }
        Kind::Write | Kind::Zero => {
            let span = span_of(member, spans, request).await?;
            change(member, request, span.as_deref()).await?;
            Ok((0, Payload::default()))
        }
        Kind::Flush => {
            owner.flush(volume, request.epoch).await?;
            Ok((0, Payload::default()))
        }
        Kind::SpanBegin => begin_span(member, spans, request).await,
        Kind::SpanEnd if volume == VolumeId(0) => {
            let list: SpanList = decode_control(request.payload.clone())
                .map_err(|_| DataError::Malformed("a list of spans that cannot be decoded"))?;
            owner.end_spans(list);
            Ok((0, Payload::default()))
        }
        Kind::SpanEnd => {
            spans.borrow_mut().remove(&(volume, request.aux));
            owner.end_span(volume, request.aux);
            Ok((0, Payload::default()))
        }
        Kind::SnapshotDrop => {
            lineage::settled(member, volume, request.epoch).await?;
            let dropped = owner.store.delete_snapshot(volume, request.snapshot).await;
            dropped?;
            Ok((0, Payload::default()))
        }
        Kind::Lineage => lineage::answer(member, request).await,
        Kind::SnapshotUsages => Ok((0, encode_control(&snapshot_usages(member, volume).await?))),
        Kind::VolumeDrop => drop_pages(member, request).await,
        Kind::Usage => Ok((
            0,
            encode_control(&usage(node, member, volume, snapshot).await?),
        )),
        Kind::Scrub => Ok((0, scrub::answer(node, member, request).await?)),
        Kind::Holds => Ok((0, encode_control(&holds(member)))),
        Kind::Load => Ok((0, encode_control(&owner.requests()))),
        Kind::MoveTrouble => Ok((0, encode_control(&member.moves.trouble(volume)))),
        Kind::Hello
        | Kind::Admin
        | Kind::Registry
        | Kind::Snapshot
        | Kind::Lease
        | Kind::Move
        | Kind::MoveData => Err(DataError::Malformed("not a request for an owner")),
    }
}

/// Everything that keeps requests waiting on this server.
pub(crate) fn holds(member: &Member) -> Vec<HoldInfo> {
    let mut holds = member.participant.holds(member);
    holds.extend(member.moves.holds(member));
    holds.extend(lineage::holds(member));
    holds
}

fn target(request: &Frame) -> Result<Target, DataError> {
    if request.len_bytes > REQUEST_PART_BYTES || request.len_bytes == 0 {
        return Err(DataError::Malformed(
            "a part of 0 bytes or more than 64 MiB",
        ));
    }
    Ok(untested_target(request))
}

/// The snapshot to compare with, in a request for layers.
fn since(request: &Frame) -> Result<Option<SnapshotId>, DataError> {
    let id = u32::try_from(request.aux);
    let id = id.map_err(|_| DataError::Malformed("a snapshot id of more than 32 bits"))?;
    Ok(Some(SnapshotId(id)).filter(|id| *id != SnapshotId(0)))
}

/// A range whose length only the page bounds, as no data of that length goes over the wire.
fn untested_target(request: &Frame) -> Target {
    Target {
        page: request.page,
        offset_bytes: request.offset_bytes,
        len_bytes: request.len_bytes,
        epoch: request.epoch,
        lease: request.lease(),
    }
}

async fn change(
    member: &Member,
    request: &Frame,
    span: Option<&Executing>,
) -> Result<(), DataError> {
    let fua = request.flags & flags::FUA != 0;
    let (owner, volume) = (member.owner(), request.volume);
    if request.kind == Kind::Zero {
        let keep = request.flags & flags::KEEP_ALLOCATED != 0;
        let at = untested_target(request);
        return owner.zero(volume, at, keep, fua, span).await;
    }
    let at = target(request)?;
    let data = request.payload.clone().into_bytes();
    if data.len() != at.len_bytes as usize {
        return Err(DataError::Malformed("the data is not as long as the range"));
    }
    owner.write(volume, at, data, fua, span).await
}

/// Begins a span, unless its end came while this waited for the routing table.
async fn begin_span(member: &Member, spans: &Spans, request: &Frame) -> Executed {
    let key = (request.volume, request.aux);
    if spans.borrow().contains_key(&key) {
        return Err(DataError::Malformed("the id of a span that goes on"));
    }
    spans.borrow_mut().insert(key, None);
    let passed = pass_span_gate(member, request).await;
    let goes_on = spans.borrow_mut().remove(&key).is_some();
    let gate = Rc::new(passed?);
    if !goes_on {
        return Err(DataError::Held);
    }
    spans.borrow_mut().insert(key, Some(Rc::clone(&gate)));
    end_late_span(spans, key, &gate);
    Ok((0, Payload::default()))
}

async fn pass_span_gate(member: &Member, request: &Frame) -> Result<Executing, DataError> {
    let owner = member.owner();
    let state = owner.catch_up(request.volume, request.epoch).await?;
    let epoch = state.table().epoch;
    if epoch != request.epoch {
        return Err(DataError::Stale(epoch));
    }
    state.check_lease(request.lease())?;
    owner.begin_span(&state, request.aux).await
}

fn end_late_span(spans: &Spans, key: (VolumeId, u64), gate: &Rc<Executing>) {
    let (spans, gate) = (Rc::downgrade(spans), Rc::downgrade(gate));
    tokio::task::spawn_local(async move {
        sleep(Duration::from_millis(SPAN_MAX_MS)).await;
        let (Some(spans), Some(_)) = (spans.upgrade(), gate.upgrade()) else {
            return;
        };
        if spans.borrow_mut().remove(&key).is_some() {
            tracing::warn!(volume = %key.0, span = key.1, "span ended by its deadline");
        }
    });
}

/// The gate of the span that this part belongs to. A span that is not known, because its deadline
/// passed, its connection was another one, or a rollback overtook it, must be begun again.
async fn span_of(
    member: &Member,
    spans: &Spans,
    request: &Frame,
) -> Result<Option<Rc<Executing>>, DataError> {
    if request.flags & flags::SPAN == 0 {
        return Ok(None);
    }
    let key = (request.volume, request.aux);
    if let Some(state) = member.owner().volume(request.volume)
        && member.owner().is_overtaken(&state, request.epoch).await
    {
        spans.borrow_mut().remove(&key);
    }
    match spans.borrow().get(&key) {
        Some(Some(gate)) => Ok(Some(Rc::clone(gate))),
        _ => Err(DataError::Held),
    }
}

/// Forgets a volume, or with `len_bytes` 1 everything from a page and offset on.
async fn drop_pages(member: &Member, request: &Frame) -> Executed {
    let (owner, volume) = (member.owner(), request.volume);
    if request.len_bytes == 0 {
        if owner.volume(volume).is_some() {
            member.registry.barrier().await.map_err(unavailable)?;
            member.publish();
        }
        if owner.volume(volume).is_some() {
            return Err(DataError::Malformed("the registry still has this volume"));
        }
        owner.store.delete_volume(volume).await?;
        return Ok((0, Payload::default()));
    }
    let state = owner.catch_up(volume, request.epoch).await?;
    let page_bytes = state.table().page_bytes();
    for page in owner.store.snapshot_pages(volume, None)? {
        let epoch = state.table().epoch;
        if epoch != request.epoch {
            return Err(DataError::Stale(epoch));
        }
        let offset_bytes = match page.cmp(&request.page) {
            std::cmp::Ordering::Less => continue,
            std::cmp::Ordering::Equal => request.offset_bytes.min(page_bytes),
            std::cmp::Ordering::Greater => 0,
        };
        let at = PageAt {
            volume,
            page,
            offset_bytes,
            len_bytes: page_bytes - offset_bytes,
        };
        if at.len_bytes > 0 {
            let _noted = state.moving.change(page, offset_bytes..page_bytes);
            owner.store.zero(at, false, request.epoch).await?;
        }
    }
    Ok((0, Payload::default()))
}

fn unavailable(error: super::registry::RegistryError) -> DataError {
    DataError::Unavailable(error.to_string())
}

/// Every snapshot of a volume with the bytes that it shows, those that only it holds, and those that
/// the head does not share.
pub(crate) type SnapshotUsages = Vec<(SnapshotId, [u64; 3])>;

async fn snapshot_usages(member: &Member, volume: VolumeId) -> Result<SnapshotUsages, DataError> {
    let usages = member.owner().store.snapshot_usages(volume, None).await?;
    let usages = usages.into_iter();
    let bytes = |of: SnapshotUsage| [of.referenced_bytes, of.unique_bytes, of.used_bytes];
    Ok(usages.map(|(id, usage)| (id, bytes(usage))).collect())
}

async fn usage(
    node: &Node,
    member: &Member,
    volume: VolumeId,
    snapshot: Option<SnapshotId>,
) -> Result<Usage, DataError> {
    let store = &member.owner().store;
    let totals = store.usage();
    let mut usage = Usage {
        allocated_bytes: totals.allocated_bytes,
        free_bytes: node.free_bytes(),
        ..Usage::default()
    };
    if volume != VolumeId(0) {
        usage.allocated_bytes = store.volume_usage(volume).allocated_bytes;
    }
    if let Some(snapshot) = snapshot {
        for (_, of_snapshot) in store.snapshot_usages(volume, Some(snapshot)).await? {
            usage.referenced_bytes = of_snapshot.referenced_bytes;
            usage.unique_bytes = of_snapshot.unique_bytes;
        }
    }
    Ok(usage)
}
