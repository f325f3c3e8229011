//! An open volume of the client library: straight to the owners, with retry and replay.
//!
//! Reads, flushes and what they share with changes (see `change.rs`).

use super::lease::LeaseMark;
use super::patience::Patience;
use super::replay::{Change, Replay};
use super::{Client, ClientError, Extent, IoErrorKind, OwnerState};
use crate::admin::{AdminErrorKind, AdminReply, AdminRequest, OpenInfo};
use crate::data::error::DataError;
use crate::data::forward::{self, ForwardError, PartIo, Since};
use crate::data::router::{Part, RoutingTable};
use crate::data::span::zero_pieces;
use crate::id::{LayerRun, NodeNo, PageNo};
use crate::io::link::Link;
use crate::io::wire::{Frame, Kind, Run, decode_extents, decode_runs};
use crate::limits::REQUEST_PART_BYTES;
use crate::planted::{Plant, planted};
use bytes::{Bytes, BytesMut};
use futures_util::future::try_join_all;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// An open volume or snapshot. Cheap to clone, `Send + Sync`; operations run concurrently.
#[derive(Clone)]
pub struct Volume {
    pub(super) shared: Arc<Shared>,
}

pub(super) struct Shared {
    pub(super) client: Client,
    pub(super) name: String,
    opened: RwLock<Arc<Opened>>,
    refreshing: tokio::sync::Mutex<()>,
    replay: Mutex<Replay>,
    pub(super) lease: LeaseMark,
    /// Held shared by every operation, and alone by a replay: no change is in flight while older
    /// ones are sent again, so that a newer one cannot be overwritten by an older.
    pub(super) order: tokio::sync::RwLock<()>,
}

pub(super) struct Opened {
    info: OpenInfo,
    pub(super) table: RoutingTable,
    addresses: HashMap<NodeNo, String>,
}

/// Why one try did not succeed.
#[derive(Debug)]
pub(super) enum TryError {
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
                lease: LeaseMark::default(),
                order: tokio::sync::RwLock::default(),
            }),
        }
    }

    pub(super) fn opened(&self) -> Arc<Opened> {
        let opened = self.shared.opened.read();
        Arc::clone(&opened.unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn replay_buffer(&self) -> MutexGuard<'_, Replay> {
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

    /// `VOL` or `VOL@SNAP`, as it was opened.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.shared.name
    }

    /// The server that owns a page.
    #[must_use]
    pub fn owner_of(&self, page: PageNo) -> Option<NodeNo> {
        self.opened().table.owner(page)
    }

    /// The servers that own pages, and how the connections to them are.
    #[must_use]
    pub fn owners(&self) -> Vec<OwnerState> {
        let opened = self.opened();
        let peers = &self.shared.client.shared.peers;
        let owner = |node: &NodeNo| {
            let address = opened.addresses.get(node).cloned().unwrap_or_default();
            let (connected, connections) = peers.connections(&address);
            OwnerState {
                node: *node,
                address,
                connected,
                connections,
            }
        };
        opened.table.owners().iter().map(owner).collect()
    }

    /// Exactly `len_bytes` bytes; holes read as zeros.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn read(&self, offset_bytes: u64, len_bytes: u32) -> Result<Bytes, ClientError> {
        let mut runs = self.read_runs(offset_bytes, len_bytes).await?;
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

    /// As [`Volume::read`], in runs of data and holes that together cover the range.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn read_runs(
        &self,
        offset_bytes: u64,
        len_bytes: u32,
    ) -> Result<Vec<Run>, ClientError> {
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
        Ok(runs)
    }

    /// Writes; acknowledged when the owners have it in their logs.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn write(&self, offset_bytes: u64, data: Bytes) -> Result<(), ClientError> {
        self.write_parts(offset_bytes, data, false).await
    }

    /// Writes; acknowledged when it is durable on the owners (FUA).
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn write_through(&self, offset_bytes: u64, data: Bytes) -> Result<(), ClientError> {
        self.write_parts(offset_bytes, data, true).await
    }

    async fn write_parts(
        &self,
        offset_bytes: u64,
        data: Bytes,
        fua: bool,
    ) -> Result<(), ClientError> {
        let mut at = 0;
        while at < data.len() {
            let end = data.len().min(at + REQUEST_PART_BYTES as usize);
            let change = Change::Write(data.slice(at..end));
            self.change("write", offset_bytes + at as u64, change, fua)
                .await?;
            at = end;
        }
        Ok(())
    }

    /// TRIM (`keep_allocated` false) or WRITE_ZEROES; reads give zeros afterwards. See [`zero_pieces`].
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn zero(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        keep_allocated: bool,
    ) -> Result<(), ClientError> {
        self.check_range("zero", offset_bytes, len_bytes)?;
        let page_bytes = self.opened().table.page_bytes();
        for (offset, len_bytes) in zero_pieces(offset_bytes, len_bytes, keep_allocated, page_bytes)
        {
            let change = Change::Zero {
                len_bytes,
                keep_allocated,
            };
            self.change("zero", offset, change, false).await?;
        }
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
        let owners = opened.table.owners();
        let asked = match planted(Plant::FlushOneOwner) {
            true => &owners[..owners.len().min(1)],
            false => owners,
        };
        let flushes = asked.iter().map(|node| {
            let mut request = Frame::request(Kind::Flush, opened.table.volume);
            request.epoch = opened.table.epoch;
            self.call(&opened, *node, request, None)
        });
        try_join_all(flushes).await?;
        self.ask_for_former_owners(opened.table.owners()).await?;
        let mut replay = self.replay_buffer();
        if replay.losses() > replay.made_good() {
            return Err(TryError::Lost);
        }
        replay.flushed(mark);
        Ok(())
    }

    /// Servers that gave all their pages away since the last flush: what they acknowledged is with
    /// the new owners, unless they lost it before.
    async fn ask_for_former_owners(&self, owners: &[NodeNo]) -> Result<(), TryError> {
        if !self.replay_buffer().has_former_owners(owners) {
            return Ok(());
        }
        let volume = self.opened().info.volume.id;
        let asked = self.shared.client.admin(AdminRequest::MoveGiven { volume });
        match asked.await {
            Ok(AdminReply::Given(given)) => {
                self.replay_buffer().former_owners(owners, &given);
                Ok(())
            }
            other => {
                let text = format!("no answer about former owners: {other:?}");
                Err(DataError::Unavailable(text).into())
            }
        }
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

    /// The snapshot `name` of this volume, for [`Self::layers`].
    ///
    /// # Errors
    /// [`ClientError::Refused`] when there is no such snapshot.
    pub async fn since(&self, name: &str) -> Result<Since, ClientError> {
        let opened = self.opened();
        let volume = self.shared.name.split('@').next().unwrap_or_default();
        let target = format!("{volume}@{name}");
        let info = self.shared.client.open_info(&target).await?;
        match info.snapshot {
            Some(id) if info.volume.id == opened.info.volume.id => {
                Ok(Since::new(id, info.size_bytes, opened.table.page_bytes()))
            }
            _ => Err(failed("since", 0, 0, IoErrorKind::Gone)),
        }
    }

    /// In which layers the range was written and what may differ from the snapshot `since`, older
    /// or newer, in order, covering the range exactly. Exact to 4 KiB that were written or zeroed
    /// meanwhile, whatever they hold now. Without `since`, all data counts as changed.
    ///
    /// # Errors
    /// [`ClientError`].
    pub async fn layers(
        &self,
        offset_bytes: u64,
        len_bytes: u64,
        since: Option<Since>,
    ) -> Result<Vec<LayerRun>, ClientError> {
        let snapshot = self.opened().info.snapshot;
        let io = PartIo::Layers { snapshot, since };
        let ended = self.run("layers", offset_bytes, len_bytes, &io).await?;
        let mut layers = Vec::new();
        for (part, reply) in ended {
            let runs = forward::layers_of(reply, part.len_bytes).map_err(|error| {
                let reason = match error {
                    DataError::Unavailable(_) => IoErrorKind::OlderServer,
                    _ => IoErrorKind::Damaged,
                };
                failed("layers", offset_bytes, len_bytes, reason)
            })?;
            runs.into_iter().for_each(|run| run.append_to(&mut layers));
        }
        Ok(layers)
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
        let info = match self.shared.client.open_info(&self.current_name()).await {
            Err(ClientError::Refused(refusal)) if refusal.kind == AdminErrorKind::NotFound => {
                self.open_renamed(refusal.into()).await?
            }
            Ok(info) if self.check_same(&info).is_err() => {
                let gone = failed("open", 0, 0, IoErrorKind::Gone);
                self.open_renamed(gone).await?
            }
            opened => opened?,
        };
        let mut opened = self
            .shared
            .opened
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *opened = Arc::new(Opened::new(info));
        Ok(())
    }

    /// The name that the volume had when it was last refreshed, with that of the snapshot.
    pub(crate) fn current_name(&self) -> String {
        let volume = &self.opened().info.volume.name;
        match self.shared.name.split_once('@') {
            Some((_, snapshot)) => format!("{volume}@{snapshot}"),
            None => volume.clone(),
        }
    }

    /// Opens the volume under the name that it has now; `gone` if there is none of its id.
    async fn open_renamed(&self, gone: ClientError) -> Result<OpenInfo, ClientError> {
        let client = &self.shared.client;
        let AdminReply::Volumes(volumes) = client.admin(AdminRequest::VolumeList).await? else {
            return Err(gone);
        };
        let id = self.opened().info.volume.id;
        let Some(volume) = volumes.into_iter().find(|volume| volume.id == id) else {
            return Err(gone);
        };
        let name = match self.opened().info.snapshot {
            Some(_) => match self.snapshot_renamed(&volume.name).await? {
                Some(name) => name,
                None => return Err(gone),
            },
            None => volume.name,
        };
        let info = client.open_info(&name).await?;
        self.check_same(&info).map(|()| info)
    }

    /// The name that the opened snapshot has now.
    async fn snapshot_renamed(&self, volume: &str) -> Result<Option<String>, ClientError> {
        let list = AdminRequest::SnapshotList {
            volume: Some(volume.to_owned()),
        };
        let AdminReply::Snapshots(snapshots) = self.shared.client.admin(list).await? else {
            return Ok(None);
        };
        let id = self.opened().info.snapshot;
        let found = snapshots.iter().find(|snapshot| Some(snapshot.id) == id);
        Ok(found.map(|found| format!("{volume}@{}", found.name)))
    }

    /// `Gone` unless `info` is of the volume that was opened.
    pub(super) fn check_same(&self, info: &OpenInfo) -> Result<(), ClientError> {
        let opened = &self.opened().info;
        match (info.volume.id, info.snapshot) == (opened.volume.id, opened.snapshot) {
            true => Ok(()),
            false => Err(failed("open", 0, 0, IoErrorKind::Gone)),
        }
    }

    pub(super) fn check_range(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<(), ClientError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.size_bytes() => Ok(()),
            _ => Err(failed(what, offset, len, IoErrorKind::OutOfRange)),
        }
    }

    /// Runs one read over all its parts, again and again until it succeeds or is hopeless.
    async fn run(
        &self,
        what: &'static str,
        offset: u64,
        len: u64,
        io: &PartIo,
    ) -> Result<Vec<(Part, Frame)>, ClientError> {
        self.check_range(what, offset, len)?;
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
        let opened = self.opened();
        let parts: Vec<Part> = opened.table.parts(offset, len).collect();
        let tries = parts.iter().map(async |part| {
            let request = forward::request(opened.table.volume, opened.table.epoch, part, io, None);
            Ok((*part, self.call(&opened, part.owner, request, None).await?))
        });
        try_join_all(tries).await
    }

    /// The connection to an owner, after a look at its verifier: while losses are not made good,
    /// only the replay of all losses up to `replaying` may go on.
    pub(super) async fn link(
        &self,
        opened: &Opened,
        node: NodeNo,
        replaying: Option<u64>,
    ) -> Result<Link, TryError> {
        let address = opened.addresses.get(&node);
        let address =
            address.ok_or_else(|| DataError::Unavailable(format!("node {node} is unknown")))?;
        let link = self.shared.client.shared.peers.link(address).await?;
        self.heard(node, link.welcome().verifier, replaying)?;
        Ok(link)
    }

    /// One request to one owner.
    pub(super) async fn call(
        &self,
        opened: &Opened,
        node: NodeNo,
        request: Frame,
        replaying: Option<u64>,
    ) -> Result<Frame, TryError> {
        let link = self.link(opened, node, replaying).await?;
        let reply = forward::call(&link, request).await?;
        self.heard(node, reply.aux, replaying)?;
        Ok(reply)
    }

    fn heard(&self, node: NodeNo, verifier: u64, replaying: Option<u64>) -> Result<(), TryError> {
        let mut replay = self.replay_buffer();
        replay.heard(node, verifier);
        match replay.losses() > replaying.unwrap_or(replay.made_good()) {
            true => Err(TryError::Lost),
            false => Ok(()),
        }
    }

    pub(super) fn patience(&self, what: &'static str, offset: u64, len: u64) -> Patience {
        let patience = self.shared.client.shared.options.io_deadline;
        Patience::new(patience, (what, offset, len))
    }
}

pub(super) fn failed(
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
