//! An open volume of the client library: straight to the owners, with retry and replay.
//!
//! Every operation holds `order` shared; a replay holds it alone, so that no change is in flight
//! while older ones are sent again, and a newer one cannot be overwritten by an older.

use super::replay::{Change, Replay};
use super::{Client, ClientError, Extent, IoErrorKind};
use crate::admin::{AdminErrorKind, OpenInfo};
use crate::data::error::DataError;
use crate::data::forward::{self, ForwardError, PartIo};
use crate::data::router::{Part, RoutingTable};
use crate::id::NodeNo;
use crate::io::link::LinkError;
use crate::io::wire::{Frame, Kind, Run, decode_extents, decode_runs};
use crate::limits::{CLIENT_REPLAY_BYTES, FORWARD_RETRY_MS, REQUEST_PART_BYTES};
use bytes::{Bytes, BytesMut};
use futures_util::future::{join_all, try_join_all};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// An open volume or snapshot. Cheap to clone, `Send + Sync`; operations run concurrently.
#[derive(Clone)]
pub struct Volume {
    shared: Arc<Shared>,
}

struct Shared {
    client: Client,
    name: String,
    opened: RwLock<Arc<Opened>>,
    refreshing: tokio::sync::Mutex<()>,
    replay: Mutex<Replay>,
    order: tokio::sync::RwLock<()>,
    next_span: AtomicU64,
}

struct Opened {
    info: OpenInfo,
    table: RoutingTable,
    addresses: HashMap<NodeNo, String>,
}

/// Why one try did not succeed.
#[derive(Debug)]
enum TryError {
    Forward(ForwardError),
    /// An owner has lost acknowledged changes: replay first.
    Lost,
}

impl<E: Into<ForwardError>> From<E> for TryError {
    fn from(error: E) -> Self {
        Self::Forward(error.into())
    }
}

impl Opened {
    fn new(info: OpenInfo) -> Self {
        let volume = &info.volume;
        let runs = info.route.runs.clone();
        let (epoch, size) = (info.route.epoch, volume.size_bytes);
        let table = RoutingTable::new(volume.id, epoch, size, volume.page_blocks, runs);
        Self {
            table: table.unwrap_or_else(|_| RoutingTable::empty(volume.id)),
            addresses: info.nodes.iter().cloned().collect(),
            info,
        }
    }
}

impl Volume {
    pub(super) fn new(client: Client, name: String, info: OpenInfo) -> Self {
        Self {
            shared: Arc::new(Shared {
                client,
                name,
                opened: RwLock::new(Arc::new(Opened::new(info))),
                refreshing: tokio::sync::Mutex::default(),
                replay: Mutex::default(),
                order: tokio::sync::RwLock::default(),
                next_span: AtomicU64::new(1),
            }),
        }
    }

    fn opened(&self) -> Arc<Opened> {
        let opened = self.shared.opened.read();
        Arc::clone(&opened.unwrap_or_else(PoisonError::into_inner))
    }

    fn replay_buffer(&self) -> MutexGuard<'_, Replay> {
        let replay = self.shared.replay.lock();
        replay.unwrap_or_else(PoisonError::into_inner)
    }

    /// What the servers said when the volume was opened or last refreshed.
    #[must_use]
    pub fn info(&self) -> OpenInfo {
        self.opened().info.clone()
    }

    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.opened().info.size_bytes
    }

    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.opened().info.snapshot.is_some()
    }

    /// Exactly `len_bytes` bytes; holes read as zeros.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn read(&self, offset_bytes: u64, len_bytes: u32) -> Result<Bytes, ClientError> {
        let snapshot = self.opened().info.snapshot;
        let io = PartIo::Read(snapshot);
        let ended = self
            .run("read", offset_bytes, u64::from(len_bytes), &io)
            .await?;
        let mut runs = Vec::new();
        for (part, reply) in ended {
            let decoded = decode_runs(reply, part.len_bytes);
            runs.extend(decoded.map_err(|_| {
                failed(
                    "read",
                    offset_bytes,
                    u64::from(len_bytes),
                    IoErrorKind::Damaged,
                )
            })?);
        }
        if let [Run::Data(_)] = runs.as_slice()
            && let Some(Run::Data(data)) = runs.pop()
        {
            return Ok(data);
        }
        let mut all = BytesMut::with_capacity(len_bytes as usize);
        for run in runs {
            match run {
                Run::Data(data) => all.extend_from_slice(&data),
                Run::Hole(len) => all.resize(all.len() + len as usize, 0),
            }
        }
        Ok(all.freeze())
    }

    /// Writes; acknowledged when the owners have it in their logs.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn write(&self, offset_bytes: u64, data: Bytes) -> Result<(), ClientError> {
        let mut at = 0;
        while at < data.len() {
            let end = data.len().min(at + REQUEST_PART_BYTES as usize);
            let change = Change::Write(data.slice(at..end));
            self.change("write", offset_bytes + at as u64, change)
                .await?;
            at = end;
        }
        Ok(())
    }

    /// TRIM (`keep_allocated` false) or WRITE_ZEROES; reads give zeros afterwards.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn zero(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        keep_allocated: bool,
    ) -> Result<(), ClientError> {
        let change = Change::Zero {
            len_bytes,
            keep_allocated,
        };
        self.change("zero", offset_bytes, change).await
    }

    async fn change(
        &self,
        what: &'static str,
        offset: u64,
        change: Change,
    ) -> Result<(), ClientError> {
        let len = change.len_bytes();
        if self.is_read_only() {
            return Err(failed(what, offset, len, IoErrorKind::ReadOnly));
        }
        if self.replay_buffer().buffered_bytes() > CLIENT_REPLAY_BYTES {
            self.flush().await?;
        }
        self.run(what, offset, len, &io_of(&change)).await?;
        self.replay_buffer().acknowledged(offset, change);
        Ok(())
    }

    /// Everything acknowledged before is durable on every owner when this returns.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn flush(&self) -> Result<(), ClientError> {
        if self.is_read_only() {
            return Ok(());
        }
        let mut patience = self.patience("flush", 0, 0);
        loop {
            match self.try_flush().await {
                Ok(()) => return Ok(()),
                Err(error) => patience.after(self, error).await?,
            }
        }
    }

    async fn try_flush(&self) -> Result<(), TryError> {
        let _order = self.shared.order.read().await;
        let mark = self.replay_buffer().mark();
        let opened = self.opened();
        let flushes = opened.table.owners().iter().map(|node| {
            let request = Frame::request(Kind::Flush, opened.table.volume);
            self.call(&opened, *node, request)
        });
        try_join_all(flushes).await?;
        self.replay_buffer().flushed(mark);
        Ok(())
    }

    /// Allocation of the range, in order, covering it exactly.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn extents(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
    ) -> Result<Vec<Extent>, ClientError> {
        let io = PartIo::Extents(self.opened().info.snapshot);
        let ended = self.run("extents", offset_bytes, len_bytes, &io).await?;
        let mut extents: Vec<Extent> = Vec::new();
        for (part, reply) in ended {
            let list = decode_extents(reply, part.len_bytes);
            let damaged = failed("extents", offset_bytes, len_bytes, IoErrorKind::Damaged);
            for (len, allocated) in list.map_err(|_| damaged)? {
                let (len_bytes, hole) = (u64::from(len), !allocated);
                match extents.last_mut() {
                    Some(last) if last.hole == hole => last.len_bytes += len_bytes,
                    _ => extents.push(Extent { len_bytes, hole }),
                }
            }
        }
        Ok(extents)
    }

    /// Reads size and routing table anew (after a resize).
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn refresh(&self) -> Result<(), ClientError> {
        let before = self.opened();
        let _refreshing = self.shared.refreshing.lock().await;
        if !Arc::ptr_eq(&before, &self.opened()) {
            return Ok(());
        }
        let info = self.shared.client.open_info(&self.shared.name).await?;
        if info.volume.id != before.info.volume.id {
            return Err(failed("refresh", 0, 0, IoErrorKind::Gone));
        }
        let mut opened = self
            .shared
            .opened
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *opened = Arc::new(Opened::new(info));
        Ok(())
    }

    /// Runs one request over all its parts, again and again until it succeeds or is hopeless.
    async fn run(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
        io: &PartIo,
    ) -> Result<Vec<(Part, Frame)>, ClientError> {
        if offset
            .checked_add(len)
            .is_none_or(|end| end > self.size_bytes())
        {
            return Err(failed(what, offset, len, IoErrorKind::OutOfRange));
        }
        let mut patience = self.patience(what, offset, len);
        loop {
            match self.try_run(offset, len, io).await {
                Ok(ended) => return Ok(ended),
                Err(error) => patience.after(self, error).await?,
            }
        }
    }

    async fn try_run(
        &self,
        offset: u64,
        len: u64,
        io: &PartIo,
    ) -> Result<Vec<(Part, Frame)>, TryError> {
        let _order = self.shared.order.read().await;
        self.try_parts(offset, len, io).await
    }

    async fn try_parts(
        &self,
        offset: u64,
        len: u64,
        io: &PartIo,
    ) -> Result<Vec<(Part, Frame)>, TryError> {
        let opened = self.opened();
        let parts: Vec<Part> = opened.table.parts(offset, len).collect();
        if parts.len() < 2 || !io.changes() {
            let tries = parts
                .iter()
                .map(|part| self.try_part(&opened, *part, io, None));
            return try_join_all(tries).await;
        }
        let span = self.begin_span(&opened, &parts).await?;
        let tries = parts
            .iter()
            .map(|part| self.try_part(&opened, *part, io, Some(span)));
        let ended: Result<Vec<_>, _> = join_all(tries).await.into_iter().collect();
        if ended.is_err() {
            self.cancel_span(&opened, span).await;
        }
        ended
    }

    async fn try_part(
        &self,
        opened: &Opened,
        part: Part,
        io: &PartIo,
        span: Option<u64>,
    ) -> Result<(Part, Frame), TryError> {
        let table = &opened.table;
        let request = forward::request(table.volume, table.epoch, &part, io, span);
        Ok((part, self.call(opened, part.owner, request).await?))
    }

    /// S003-33: the owners agree to the request before any of its parts is sent.
    async fn begin_span(&self, opened: &Opened, parts: &[Part]) -> Result<u64, TryError> {
        let id = self.shared.next_span.fetch_add(1, Ordering::Relaxed);
        let mut counts: HashMap<NodeNo, u32> = HashMap::new();
        for part in parts {
            *counts.entry(part.owner).or_default() += 1;
        }
        let begins = counts.into_iter().map(|(node, count)| {
            let mut request = Frame::request(Kind::SpanBegin, opened.table.volume);
            (request.aux, request.len_bytes, request.epoch) = (id, count, opened.table.epoch);
            self.call(opened, node, request)
        });
        match join_all(begins).await.into_iter().find_map(Result::err) {
            None => Ok(id),
            Some(error) => {
                self.cancel_span(opened, id).await;
                Err(error)
            }
        }
    }

    async fn cancel_span(&self, opened: &Opened, id: u64) {
        let cancels = opened.table.owners().iter().map(|node| {
            let mut request = Frame::request(Kind::SpanCancel, opened.table.volume);
            request.aux = id;
            self.call(opened, *node, request)
        });
        for result in join_all(cancels).await {
            if let Err(error) = result {
                tracing::debug!(?error, span = id, "span not cancelled");
            }
        }
    }

    /// One request to one owner, after a look at its verifier.
    async fn call(&self, opened: &Opened, node: NodeNo, request: Frame) -> Result<Frame, TryError> {
        let address = opened.addresses.get(&node);
        let address = address.ok_or(DataError::Unavailable(format!("node {node} is unknown")))?;
        let link = self.shared.client.shared.peers.link(address).await?;
        self.heard(node, link.welcome().verifier)?;
        let reply = link.call(request).await?;
        match DataError::of_reply(&reply) {
            Some(error) => Err(error.into()),
            None => Ok(reply),
        }
    }

    fn heard(&self, node: NodeNo, verifier: u64) -> Result<(), TryError> {
        let mut replay = self.replay_buffer();
        replay.heard(node, verifier);
        if replay.is_lost() {
            Err(TryError::Lost)
        } else {
            Ok(())
        }
    }

    /// Sends all unflushed changes again, in order, with nothing else in flight.
    async fn replay(&self) -> Result<(), TryError> {
        let _order = self.shared.order.write().await;
        let changes = {
            let mut replay = self.replay_buffer();
            if !replay.is_lost() {
                return Ok(());
            }
            replay.begin()
        };
        tracing::warn!(changes = changes.len(), volume = %self.shared.name, "replaying");
        for (offset, change) in changes {
            self.try_parts(offset, change.len_bytes(), &io_of(&change))
                .await?;
        }
        Ok(())
    }

    fn patience(&self, what: &'static str, offset: u64, len: u64) -> Patience {
        Patience {
            deadline: Instant::now() + self.shared.client.shared.options.io_deadline,
            request: (what, offset, len),
        }
    }
}

fn io_of(change: &Change) -> PartIo {
    match change {
        Change::Write(data) => PartIo::Write {
            data: data.clone(),
            fua: false,
        },
        Change::Zero { keep_allocated, .. } => PartIo::Zero {
            keep_allocated: *keep_allocated,
            fua: false,
        },
    }
}

fn failed(
    what: &'static str,
    offset_bytes: u64,
    len_bytes: u64,
    reason: IoErrorKind,
) -> ClientError {
    ClientError::Io {
        what,
        offset_bytes,
        len_bytes,
        reason,
    }
}

/// Decides whether a request is tried again, and prepares the next try.
struct Patience {
    deadline: Instant,
    request: (&'static str, u64, u64),
}

impl Patience {
    async fn after(&mut self, volume: &Volume, error: TryError) -> Result<(), ClientError> {
        let (what, offset, len) = self.request;
        let hopeless = |kind| Err(failed(what, offset, len, kind));
        let mut pause = Duration::from_millis(FORWARD_RETRY_MS);
        match &error {
            TryError::Lost => {
                if let Err(again) = volume.replay().await {
                    volume.replay_buffer().fail();
                    tracing::debug!(?again, "replay interrupted");
                } else {
                    pause = Duration::ZERO;
                }
            }
            TryError::Forward(ForwardError::Link(LinkError::Lost { .. })) => {}
            TryError::Forward(ForwardError::Link(_)) => pause *= 5,
            TryError::Forward(ForwardError::Data(error)) => match error {
                DataError::Held => pause = Duration::from_millis(1),
                DataError::Unavailable(_) => {}
                DataError::Stale(_) => self.refresh(volume).await?,
                DataError::NoSpace => return hopeless(IoErrorKind::NoSpace),
                DataError::ReadOnly => return hopeless(IoErrorKind::ReadOnly),
                DataError::OutOfRange => return hopeless(IoErrorKind::OutOfRange),
                DataError::Gone => return hopeless(IoErrorKind::Gone),
                DataError::Damaged(text) => {
                    tracing::error!(%text, "damaged");
                    return hopeless(IoErrorKind::Damaged);
                }
                DataError::Malformed(_) => return hopeless(IoErrorKind::Damaged),
            },
        }
        if Instant::now() + pause >= self.deadline {
            tracing::warn!(?error, "gave up");
            return hopeless(IoErrorKind::Deadline);
        }
        sleep(pause).await;
        Ok(())
    }

    async fn refresh(&self, volume: &Volume) -> Result<(), ClientError> {
        match volume.refresh().await {
            Err(ClientError::Unreachable { .. }) if Instant::now() < self.deadline => Ok(()),
            Err(ClientError::Refused(refusal))
                if refusal.kind == AdminErrorKind::Unavailable
                    && Instant::now() < self.deadline =>
            {
                Ok(())
            }
            other => other,
        }
    }
}
