//! A volume as an entry server sees it: bytes in, pages out, whoever owns them (S003-07 to S003-11).
//!
//! A request is cut at page boundaries; parts that are ours go to the [`Owner`], the others are
//! forwarded, all at once. A request that cannot be served now (an owner restarts, a routing table
//! is behind, a snapshot holds the volume) is tried again until `FORWARD_DEADLINE_MS`.
//!
//! A write over several pages is announced to all its owners before any part is sent (S003-33):
//! an owner that has agreed does not take a snapshot before the part was executed, and one that
//! holds already refuses, so that the whole request waits until the snapshot is taken.

use super::cut::Executing;
use super::error::DataError;
use super::forward::{self, ForwardError, PartIo, Since};
use super::owner::{Owner, Target, VolumeState};
use super::page_store::ReadPart;
use super::router::{Part, RoutingTable};
use super::span::{Span, zero_pieces};
use crate::id::{LayerRun, LeaseEpoch, NodeNo, SnapshotId};
use crate::io::link::{Link, Peers};
use crate::io::wire::{Frame, Kind, Run, decode_extents, decode_runs};
use crate::limits::{FORWARD_DEADLINE_MS, FORWARD_RETRY_MS, OPEN_PROBE_MS};
use crate::planted::{Plant, planted};
use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep, timeout};

/// This server's view of the group: itself as an owner, and how to reach the others.
pub struct Group {
    pub owner: Rc<Owner>,
    pub peers: Arc<Peers>,
    addresses: RefCell<HashMap<NodeNo, String>>,
}

/// One open volume or snapshot. Clones share the write verifiers of one connection.
#[derive(Clone)]
pub struct Volume {
    group: Rc<Group>,
    state: Rc<VolumeState>,
    snapshot: Option<(SnapshotId, u64)>,
    /// The verifier of each owner when this connection last knew all its writes to be safe.
    verifiers: Rc<RefCell<HashMap<NodeNo, u64>>>,
}

/// What a part of a request gave.
enum PartReply {
    Data(Vec<ReadPart>),
    Extents(Vec<(u32, bool)>),
    Layers(Vec<LayerRun>),
    Done,
}

impl Group {
    #[must_use]
    pub fn new(owner: Rc<Owner>, peers: Arc<Peers>) -> Self {
        peers.begin_spans_of(owner.me);
        Self {
            owner,
            peers,
            addresses: RefCell::default(),
        }
    }

    /// Takes over the peer addresses of the nodes.
    pub fn publish_addresses(&self, addresses: HashMap<NodeNo, String>) {
        *self.addresses.borrow_mut() = addresses;
    }

    /// The peer address of a node, if it is defined.
    #[must_use]
    pub fn address(&self, node: NodeNo) -> Option<String> {
        self.addresses.borrow().get(&node).cloned()
    }

    async fn link(&self, node: NodeNo) -> Result<Link, ForwardError> {
        let address = self.address(node).ok_or_else(|| {
            DataError::Unavailable(format!("node {node} is not defined in the registry"))
        })?;
        Ok(self.peers.link(&address).await?)
    }

    async fn call(&self, node: NodeNo, request: Frame) -> Result<Frame, ForwardError> {
        forward::call(&self.link(node).await?, request).await
    }
}

impl Volume {
    /// Opens a volume, or with `snapshot` that snapshot and its size in bytes.
    #[must_use]
    pub fn new(
        group: Rc<Group>,
        state: Rc<VolumeState>,
        snapshot: Option<(SnapshotId, u64)>,
    ) -> Self {
        Self {
            group,
            state,
            snapshot,
            verifiers: Rc::default(),
        }
    }

    /// Size now; that of a snapshot never changes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        match self.snapshot {
            Some((_, size_bytes)) => size_bytes,
            None => self.state.table().size_bytes,
        }
    }

    /// Bytes of a page.
    #[must_use]
    pub fn page_bytes(&self) -> u32 {
        self.state.table().page_bytes()
    }

    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.snapshot.is_some()
    }

    fn snapshot_id(&self) -> Option<SnapshotId> {
        self.snapshot.map(|(id, _)| id)
    }

    /// Reads a range; the parts cover it exactly, in order.
    ///
    /// # Errors
    /// [`DataError`].
    pub async fn read(
        &self,
        offset_bytes: u64,
        len_bytes: u32,
    ) -> Result<Vec<ReadPart>, DataError> {
        let io = PartIo::Read(self.snapshot_id());
        let replies = self
            .all_parts(offset_bytes, u64::from(len_bytes), &io)
            .await?;
        let mut data = Vec::new();
        for reply in replies {
            match reply {
                PartReply::Data(parts) if data.is_empty() => data = parts,
                PartReply::Data(parts) => data.extend(parts),
                PartReply::Extents(_) | PartReply::Layers(_) | PartReply::Done => {}
            }
        }
        Ok(data)
    }

    /// Allocation of a range: `(len_bytes, allocated)`, in order.
    ///
    /// # Errors
    /// [`DataError`].
    pub async fn extents(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Vec<(u32, bool)>, DataError> {
        let io = PartIo::Extents(self.snapshot_id());
        let replies = self.all_parts(offset_bytes, len_bytes, &io).await?;
        Ok(replies
            .into_iter()
            .flat_map(|reply| match reply {
                PartReply::Extents(extents) => extents,
                PartReply::Data(_) | PartReply::Layers(_) | PartReply::Done => vec![],
            })
            .collect())
    }

    /// Layers of a range, and what changed since a snapshot (`None`: what has data), in order.
    ///
    /// # Errors
    /// [`DataError`].
    pub async fn layers(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        since: Option<Since>,
    ) -> Result<Vec<LayerRun>, DataError> {
        let snapshot = self.snapshot_id();
        let io = PartIo::Layers { snapshot, since };
        let mut layers = Vec::new();
        for reply in self.all_parts(offset_bytes, len_bytes, &io).await? {
            if let PartReply::Layers(runs) = reply {
                runs.into_iter().for_each(|run| run.append_to(&mut layers));
            }
        }
        Ok(layers)
    }

    /// Writes a range.
    ///
    /// # Errors
    /// [`DataError`].
    pub async fn write(&self, offset_bytes: u64, data: Bytes, fua: bool) -> Result<(), DataError> {
        let len_bytes = data.len() as u64;
        self.change(offset_bytes, len_bytes, &PartIo::Write { data, fua })
            .await
    }

    /// Makes a range read as zeros (TRIM and WRITE_ZEROES); see [`zero_pieces`].
    ///
    /// # Errors
    /// [`DataError`]. If the range is not in the volume, nothing was changed.
    pub async fn zero(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        keep_allocated: bool,
        fua: bool,
    ) -> Result<(), DataError> {
        let io = PartIo::Zero {
            keep_allocated,
            fua,
        };
        self.check_change(offset_bytes, len_bytes)?;
        let page_bytes = self.page_bytes();
        for (offset, len) in zero_pieces(offset_bytes, len_bytes, keep_allocated, page_bytes) {
            self.change(offset, len, &io).await?;
        }
        Ok(())
    }

    async fn change(&self, offset: u64, len: u64, io: &PartIo) -> Result<(), DataError> {
        self.check_change(offset, len)?;
        if !self.state.table().spans_pages(offset, len) {
            self.all_parts(offset, len, io).await?;
            return Ok(());
        }
        self.change_span(offset, len, io).await
    }

    fn check_change(&self, offset: u64, len: u64) -> Result<(), DataError> {
        if self.is_read_only() {
            return Err(DataError::ReadOnly);
        }
        self.check_range(offset, len)
    }

    fn check_range(&self, offset: u64, len: u64) -> Result<(), DataError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size_bytes() => Ok(()),
            _ => Err(DataError::OutOfRange),
        }
    }

    async fn all_parts(
        &self,
        offset: u64,
        len: u64,
        io: &PartIo,
    ) -> Result<Vec<PartReply>, DataError> {
        loop {
            let epoch = self.state.table().epoch;
            let replies = self.parts_now(offset, len, io).await?;
            if io.changes() || replies.len() < 2 || self.state.table().epoch == epoch {
                return Ok(replies);
            }
            // A rollback may lie between two parts: what is read is of one epoch.
        }
    }

    async fn parts_now(
        &self,
        offset: u64,
        len: u64,
        io: &PartIo,
    ) -> Result<Vec<PartReply>, DataError> {
        self.check_range(offset, len)?;
        let table = self.state.table();
        let mut parts = table.parts(offset, len);
        let Some(first) = parts.next() else {
            return Ok(vec![]);
        };
        let rest: Vec<Part> = parts.collect();
        if rest.is_empty() {
            return Ok(vec![self.part(first, io).await?]);
        }
        let parts = std::iter::once(first).chain(rest);
        try_join_all(parts.map(|part| self.part(part, io))).await
    }

    async fn part(&self, part: Part, io: &PartIo) -> Result<PartReply, DataError> {
        let table = self.state.table();
        let mut error = match self.try_part(&table, part, io, None).await {
            Ok(reply) => return Ok(reply),
            Err(error) => error,
        };
        let mut retry = Retry::new();
        loop {
            retry.after(&self.group.owner, &self.state, error).await?;
            let table = self.state.table();
            error = match self.try_part(&table, part, io, None).await {
                Ok(reply) => return Ok(reply),
                Err(error) => error,
            };
        }
    }

    async fn try_part(
        &self,
        table: &RoutingTable,
        part: Part,
        io: &PartIo,
        span: Option<&SpanGate<'_>>,
    ) -> Result<PartReply, ForwardError> {
        let owner = table.owner(part.page).ok_or(DataError::OutOfRange)?;
        if owner == self.group.owner.me {
            let executing = span.and_then(|span| span.local);
            return Ok(self.local_part(table, part, io, executing).await?);
        }
        let span_id = span.map(|span| span.id);
        let request = forward::request(table.volume, table.epoch, &part, io, span_id);
        let reply = self.group.call(owner, request).await?;
        self.learn_verifier(owner, reply.aux);
        let malformed = |_| DataError::BAD_COVER;
        Ok(match io {
            PartIo::Read(_) => {
                let runs = decode_runs(reply, part.len_bytes).map_err(malformed)?;
                PartReply::Data(runs.into_iter().map(ReadPart::from).collect())
            }
            PartIo::Extents(_) => {
                PartReply::Extents(decode_extents(reply, part.len_bytes).map_err(malformed)?)
            }
            PartIo::Layers { .. } => PartReply::Layers(forward::layers_of(reply, part.len_bytes)?),
            PartIo::Write { .. } | PartIo::Zero { .. } => PartReply::Done,
        })
    }

    async fn local_part(
        &self,
        table: &RoutingTable,
        part: Part,
        io: &PartIo,
        span: Option<&Executing>,
    ) -> Result<PartReply, DataError> {
        let owner = &self.group.owner;
        let at = Target {
            page: part.page,
            offset_bytes: part.offset_bytes,
            len_bytes: part.len_bytes,
            epoch: table.epoch,
            lease: LeaseEpoch(0),
        };
        match io {
            PartIo::Read(snapshot) => {
                let parts = owner.read(table.volume, *snapshot, at).await?;
                return Ok(PartReply::Data(parts));
            }
            PartIo::Extents(snapshot) => {
                let extents = owner.extents(table.volume, *snapshot, at).await?;
                return Ok(PartReply::Extents(extents));
            }
            PartIo::Layers { snapshot, since } => {
                let since = since.and_then(|since| since.on(part.page));
                let layers = owner.layers(table.volume, *snapshot, since, at).await?;
                return Ok(PartReply::Layers(layers));
            }
            PartIo::Write { data, fua } => {
                let start = usize::try_from(part.at_bytes).unwrap_or(usize::MAX);
                let data = data.slice(start..start + part.len_bytes as usize);
                owner.write(table.volume, at, data, *fua, span).await?;
            }
            PartIo::Zero {
                keep_allocated,
                fua,
            } => {
                let volume = table.volume;
                owner.zero(volume, at, *keep_allocated, *fua, span).await?;
            }
        }
        Ok(PartReply::Done)
    }

    /// A change that touches several pages.
    async fn change_span(&self, offset: u64, len: u64, io: &PartIo) -> Result<(), DataError> {
        let group = &self.group;
        let mut span = Span::new(&group.peers, &self.state.table(), offset, len);
        let mut local = None;
        let mut retry = Retry::new();
        loop {
            match self.advance(&mut span, &mut local, io).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    if span.give_back() || self.is_overtaken(&error).await {
                        span.progress.lost(group.owner.me);
                        local = None;
                    }
                    retry.after(&group.owner, &self.state, error).await?;
                }
            }
        }
    }

    /// Whether a rollback of which another owner tells waits here for the gate of this span.
    async fn is_overtaken(&self, error: &ForwardError) -> bool {
        match error {
            ForwardError::Data(DataError::Stale(epoch)) => {
                self.group.owner.is_overtaken(&self.state, *epoch).await
            }
            _ => false,
        }
    }

    /// One try: the owners that have not agreed are asked, then what is left to do is sent, until
    /// a turn fails.
    async fn advance(
        &self,
        span: &mut Span,
        local: &mut Option<Executing>,
        io: &PartIo,
    ) -> Result<(), ForwardError> {
        let table = self.state.table();
        span.progress.route(&table);
        self.begin_span(&table, span, local).await?;
        let mut parts = span.progress.send();
        if planted(Plant::EntryHalfSpan) {
            parts.truncate(1);
        }
        let gate = SpanGate {
            id: span.id,
            local: local.as_ref(),
        };
        for (turn, parts) in (0..).zip(parts.chunks(io.turn_parts(table.page_bytes()))) {
            if turn > 0 {
                yield_now().await;
            }
            self.send_turn(&table, parts, span, &gate, io).await?;
        }
        Ok(())
    }

    async fn send_turn(
        &self,
        table: &RoutingTable,
        parts: &[(usize, Part)],
        span: &mut Span,
        gate: &SpanGate<'_>,
        io: &PartIo,
    ) -> Result<(), ForwardError> {
        let tries = parts
            .iter()
            .map(|(_, part)| self.try_part(table, *part, io, Some(gate)));
        let mut ended = Ok(());
        for ((index, part), result) in parts.iter().zip(join_all(tries).await) {
            match result {
                Ok(_) => span.progress.done(*index),
                Err(error) => {
                    if part.owner != self.group.owner.me && error.ends_span() {
                        span.progress.lost(part.owner);
                    }
                    ended = Err(error);
                }
            }
        }
        ended
    }

    async fn begin_span(
        &self,
        table: &RoutingTable,
        span: &mut Span,
        local: &mut Option<Executing>,
    ) -> Result<(), ForwardError> {
        let group = &self.group;
        let mut wanted = span.progress.to_begin();
        if wanted.remove(&group.owner.me) {
            self.state.check_lease(LeaseEpoch(0))?;
            *local = Some(self.state.try_span()?);
            span.progress.began(group.owner.me);
        }
        let links = wanted.into_iter().map(async |node| {
            let link = group.link(node).await?;
            Ok::<_, ForwardError>((node, link))
        });
        span.begin(table, LeaseEpoch(0), join_all(links).await)
            .await
    }

    /// Makes every acknowledged write of the volume durable, on every owner, whatever connection
    /// and server it came through (promise 3).
    ///
    /// # Errors
    /// [`DataError`]; `Damaged` when an owner may have lost writes since the last flush.
    pub async fn flush(&self) -> Result<(), DataError> {
        let before = self.verifiers.borrow().clone();
        let mut retry = Retry::new();
        loop {
            match self.try_flush(&before).await {
                Ok(lost) => return lost.map_or(Ok(()), |node| Err(lost_by(node))),
                Err(error) => retry.after(&self.group.owner, &self.state, error).await?,
            }
        }
    }

    /// Flushes on the owners of one routing table; gives a server that may have lost writes which
    /// this connection had been answered. `before` are the verifiers of when the flush began: one
    /// that ends meanwhile takes over newer ones, and answers for itself only.
    async fn try_flush(
        &self,
        before: &HashMap<NodeNo, u64>,
    ) -> Result<Option<NodeNo>, ForwardError> {
        let table = self.state.table();
        let owners = table.owners().iter();
        let flushes = owners.clone().map(|node| self.flush_owner(&table, *node));
        let verifiers = try_join_all(flushes).await?;
        let now: HashMap<NodeNo, u64> = owners.copied().zip(verifiers).collect();
        let lost = before.iter().find(|(node, verifier)| {
            let kept = now.get(node).copied();
            kept.or_else(|| self.state.given_by(**node)) != Some(**verifier)
        });
        self.take_over_verifiers(&table, before, now);
        let forgotten = planted(Plant::EntryForgetsVerifier);
        Ok(lost.map(|(node, _)| *node).filter(|_| !forgotten))
    }

    /// A server that has given all its pages away is forgotten: what it had under the verifier of
    /// then is durable with the new owners.
    fn take_over_verifiers(
        &self,
        table: &RoutingTable,
        before: &HashMap<NodeNo, u64>,
        now: HashMap<NodeNo, u64>,
    ) {
        let mut verifiers = self.verifiers.borrow_mut();
        if self.state.table().epoch == table.epoch {
            verifiers.retain(|node, _| !before.contains_key(node));
        }
        verifiers.extend(now);
    }

    /// Learns the verifiers of the owners that answer now, as the point from which this
    /// connection's flushes count.
    pub async fn learn_verifiers(&self) {
        let table = self.state.table();
        let others = table
            .owners()
            .iter()
            .filter(|node| **node != self.group.owner.me);
        let probe = Duration::from_millis(OPEN_PROBE_MS);
        join_all(others.map(async |node| {
            if let Ok(Ok(link)) = timeout(probe, self.group.link(*node)).await {
                self.learn_verifier(*node, link.welcome().verifier);
            }
        }))
        .await;
    }

    fn learn_verifier(&self, node: NodeNo, verifier: u64) {
        self.verifiers.borrow_mut().entry(node).or_insert(verifier);
    }

    async fn flush_owner(&self, table: &RoutingTable, node: NodeNo) -> Result<u64, ForwardError> {
        if node == self.group.owner.me {
            self.group.owner.flush(table.volume, table.epoch).await?;
            return Ok(self.group.owner.verifier);
        }
        let mut request = Frame::request(Kind::Flush, table.volume);
        request.epoch = table.epoch;
        Ok(self.group.call(node, request).await?.aux)
    }
}

fn lost_by(node: NodeNo) -> DataError {
    DataError::Damaged(format!(
        "node {node} lost power after writes that were not flushed; they may be gone"
    ))
}

/// The gates that a part of a span passes without waiting.
struct SpanGate<'a> {
    id: u64,
    local: Option<&'a Executing>,
}

/// Decides whether an error is worth another try, and waits for it.
struct Retry {
    deadline: Instant,
}

impl Retry {
    fn new() -> Self {
        Self {
            deadline: Instant::now() + Duration::from_millis(FORWARD_DEADLINE_MS),
        }
    }

    /// Returns after a while if the request may succeed now.
    async fn after(
        &mut self,
        owner: &Owner,
        state: &VolumeState,
        error: ForwardError,
    ) -> Result<(), DataError> {
        let pause = match &error {
            ForwardError::Link(_) | ForwardError::Data(DataError::Unavailable(_)) => {
                Duration::from_millis(FORWARD_RETRY_MS)
            }
            ForwardError::Data(DataError::Stale(_) | DataError::Held) => Duration::from_millis(1),
            ForwardError::Data(error) => return Err(error.clone()),
        };
        if Instant::now() + pause >= self.deadline {
            return Err(DataError::Unavailable(error.to_string()));
        }
        if owner.volume(state.id).is_none() {
            return Err(DataError::Gone);
        }
        if let ForwardError::Data(DataError::Stale(epoch)) = error {
            let caught_up = |_: &Owner| state.table().epoch >= epoch;
            owner.await_tables(self.deadline, caught_up).await;
        }
        sleep(pause).await;
        Ok(())
    }
}

impl From<Run> for ReadPart {
    fn from(run: Run) -> Self {
        match run {
            Run::Data(data) => Self::Data(data),
            Run::Hole(len_bytes) => Self::Hole(len_bytes),
        }
    }
}

impl From<ReadPart> for Run {
    fn from(part: ReadPart) -> Self {
        match part {
            ReadPart::Data(data) => Self::Data(data),
            ReadPart::Hole(len_bytes) => Self::Hole(len_bytes),
        }
    }
}
