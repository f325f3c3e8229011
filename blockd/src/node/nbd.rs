//! Volumes and snapshots as NBD exports `VOL` and `VOL@SNAP` (S003-08 to S003-11).

use super::admin::check_online;
use super::{Member, Node, Server};
use crate::control::registry::{
    RegistryState, SnapshotRecord, SnapshotState, VolumeRecord, split_volume_name,
};
use crate::data::error::DataError;
use crate::data::forward::Since;
use crate::data::owner::Owner;
use crate::data::page_store;
use crate::data::volume::Volume;
use crate::id::{CHUNK_BYTES, Epoch, LayerRun, SnapshotId};
use crate::limits::{STATUS_BYTES_MAX, STATUS_PAGES_MAX};
use bytes::Bytes;
use nbd_server::{
    Export, ExportEntry, ExportError, ExportInfo, Exports, Extent, MetaContext, NbdErrno,
    OpenError, Peer, ReadPart, ReadReply, ZeroFlags,
};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// How long an NBD client that opens an export waits for the registry's majority, and then for the store.
const REGISTRY_PATIENCE: Duration = Duration::from_secs(1);

/// All volumes and snapshots of the cluster, through this server.
#[derive(Clone)]
pub(crate) struct NbdExports(pub(crate) Rc<Node>);

/// One opened volume or snapshot.
#[derive(Clone)]
pub(crate) struct NbdExport {
    volume: Volume,
    description: Rc<str>,
    /// Older snapshots by name, as they were when the export was opened: a later one of the same
    /// name is another one.
    bitmaps: Rc<[(Arc<str>, Since)]>,
}

impl NbdExports {
    fn member(&self) -> Result<Rc<Member>, OpenError> {
        self.0.member().ok_or_else(|| {
            OpenError::Policy(
                "this server belongs to no cluster yet; use blockctl node define".into(),
            )
        })
    }
}

impl Exports for NbdExports {
    type Export = NbdExport;

    async fn list(&self, _peer: &Peer) -> Result<Vec<ExportEntry>, OpenError> {
        let state = self.member()?.registry.state();
        let mut entries = Vec::new();
        for volume in state.volumes() {
            entries.push(ExportEntry {
                name: volume.name.clone(),
                description: describe(volume, None),
            });
            for snapshot in committed(&state, volume) {
                entries.push(ExportEntry {
                    name: format!("{}@{}", volume.name, snapshot.name),
                    description: describe(volume, Some(&snapshot.name)),
                });
            }
        }
        Ok(entries)
    }

    async fn open(&self, name: &str, _peer: &Peer) -> Result<NbdExport, OpenError> {
        let member = self.member()?;
        let unknown =
            || OpenError::Unknown(format!("there is no volume or snapshot {name:?}").into());
        // What another server acknowledged (a resize, a delete) is seen here, too (S003-11); without
        // a majority this server's copy of the registry is all there is.
        let newest = timeout(REGISTRY_PATIENCE, member.registry.barrier());
        if let Ok(Ok(_)) = newest.await {
            member.publish();
        }
        await_store(&member, name).await;
        let export = open_in(&member, name)?.ok_or_else(unknown)?;
        export.volume.learn_verifiers().await;
        Ok(export)
    }
}

impl Server {
    /// Opens a volume or snapshot as an NBD client of this server has it.
    ///
    /// # Errors
    /// [`OpenError`].
    pub async fn open(&self, name: &str) -> Result<Volume, OpenError> {
        let exports = NbdExports(Rc::clone(&self.node));
        let export = exports.open(name, &Peer::default()).await?;
        Ok(export.volume)
    }
}

/// Waits until the store has done what came with the newest table of the volume: until then the volume
/// has its former size, and after a start none.
async fn await_store(member: &Member, name: &str) {
    let volume_name = split_volume_name(name).map_or(name, |(volume, _)| volume);
    let state = member.registry.state();
    let Some(id) = state.volume_by_name(volume_name).map(|record| record.id) else {
        return;
    };
    let is_settled = |owner: &Owner| owner.volume(id).is_none_or(|state| state.is_settled());
    let deadline = Instant::now() + REGISTRY_PATIENCE;
    member.owner().await_tables(deadline, is_settled).await;
}

/// Opens by name as far as this server's copy of the registry knows it.
fn open_in(member: &Member, name: &str) -> Result<Option<NbdExport>, OpenError> {
    let (volume_name, snapshot_name) =
        split_volume_name(name).map_err(|error| OpenError::Unknown(error.to_string().into()))?;
    let state = member.registry.state();
    let Some(record) = state.volume_by_name(volume_name) else {
        return Ok(None);
    };
    let snapshot = match snapshot_name {
        None => None,
        Some(snapshot_name) => match state.snapshot_by_name(record.id, snapshot_name) {
            Some(s) if s.state == SnapshotState::Committed => Some((s.id, s.size_bytes)),
            _ => return Ok(None),
        },
    };
    check_online(&state, record.id, snapshot.map(|(id, _)| id), name)
        .map_err(|error| OpenError::Policy(error.message.into()))?;
    let Some(volume_state) = member.owner().volume(record.id) else {
        return Ok(None);
    };
    if volume_state.table().epoch == Epoch(0) {
        let text = format!(
            "volume {volume_name} is not served here yet: its store has to catch up; try again, or another server"
        );
        return Err(OpenError::Policy(text.into()));
    }
    let group = Rc::clone(&member.group);
    let page_bytes = volume_state.table().page_bytes();
    let is_older = |older: &&SnapshotRecord| snapshot.is_none_or(|(id, _)| older.id < id);
    let bitmap = |older: &SnapshotRecord| {
        let since = Since::new(older.id, older.size_bytes, page_bytes);
        (older.name.as_str().into(), since)
    };
    let bitmaps = committed(&state, record).filter(is_older).map(bitmap);
    Ok(Some(NbdExport {
        bitmaps: bitmaps.collect(),
        volume: Volume::new(group, volume_state, snapshot as Option<(SnapshotId, u64)>),
        description: describe(record, snapshot_name).into(),
    }))
}

/// The snapshots of a volume that users see, oldest first.
fn committed<'a>(
    state: &'a RegistryState,
    volume: &VolumeRecord,
) -> impl Iterator<Item = &'a SnapshotRecord> {
    let all = state.snapshots(volume.id);
    all.filter(|snapshot| snapshot.state == SnapshotState::Committed)
}

fn describe(volume: &VolumeRecord, snapshot: Option<&str>) -> String {
    let format = volume.format.as_deref().unwrap_or("no filesystem recorded");
    match snapshot {
        None => format!("volume {}, {format}", volume.name),
        Some(snapshot) => format!("snapshot {snapshot} of volume {}, {format}", volume.name),
    }
}

impl Export for NbdExport {
    fn info(&self) -> ExportInfo {
        let mut info = ExportInfo::new(self.volume.size_bytes());
        info.read_only = self.volume.is_read_only();
        // Whole chunks are zeroed by a record of 64 bytes; smaller pages have none.
        info.fast_zero = self.volume.page_bytes() >= CHUNK_BYTES;
        info
    }

    fn description(&self) -> String {
        self.description.as_ref().to_owned()
    }

    async fn read(&self, offset: u64, len: u32) -> Result<ReadReply, ExportError> {
        let mut parts = self.volume.read(offset, len).await.map_err(refuse)?;
        if parts.len() == 1 {
            return Ok(ReadReply::One(nbd_part(parts.remove(0))));
        }
        Ok(ReadReply::Parts(parts.into_iter().map(nbd_part).collect()))
    }

    async fn write(&self, offset: u64, data: Bytes, fua: bool) -> Result<(), ExportError> {
        self.volume.write(offset, data, fua).await.map_err(refuse)
    }

    async fn flush(&self) -> Result<(), ExportError> {
        self.volume.flush().await.map_err(refuse)
    }

    async fn trim(&self, offset: u64, len: u64, fua: bool) -> Result<(), ExportError> {
        let zeroed = self.volume.zero(offset, len, false, fua).await;
        zeroed.map_err(refuse)
    }

    async fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> Result<(), ExportError> {
        if flags.fast && flags.no_hole {
            let text = "zeroes that stay allocated are written: not faster than a write";
            return Err(ExportError::new(NbdErrno::NotSup, text));
        }
        let zeroed = self
            .volume
            .zero(offset, len, flags.no_hole, flags.fua)
            .await;
        zeroed.map_err(refuse)
    }

    async fn cache(&self, _offset: u64, _len: u64) -> Result<(), ExportError> {
        Ok(())
    }

    fn contexts(&self) -> Vec<MetaContext> {
        let bitmaps = self.bitmaps.iter().map(|(name, _)| Arc::clone(name));
        [MetaContext::Allocation, MetaContext::AllocationDepth]
            .into_iter()
            .chain(bitmaps.map(MetaContext::DirtyBitmap))
            .collect()
    }

    async fn block_status(
        &self,
        context: &MetaContext,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, ExportError> {
        let pages_max = STATUS_PAGES_MAX * u64::from(self.volume.page_bytes());
        let len = len.min(STATUS_BYTES_MAX).min(pages_max);
        let flags_of: fn(&LayerRun) -> u32 = match context {
            MetaContext::Allocation => return self.allocation(offset, len).await,
            MetaContext::AllocationDepth => |run| run.depth,
            MetaContext::DirtyBitmap(_) => |run| if run.changed { Extent::DIRTY } else { 0 },
        };
        let since = self.since(context)?;
        let layers = self.volume.layers(offset, len, since).await;
        let extent = |run: LayerRun| Extent {
            len: run.len_bytes,
            flags: flags_of(&run),
        };
        Ok(layers.map_err(refuse)?.into_iter().map(extent).collect())
    }
}

impl NbdExport {
    async fn allocation(&self, offset: u64, len: u64) -> Result<Vec<Extent>, ExportError> {
        let extents = self.volume.extents(offset, len).await.map_err(refuse)?;
        let extent = |(len_bytes, allocated): (u32, bool)| {
            Extent::allocation(u64::from(len_bytes), !allocated, !allocated)
        };
        Ok(extents.into_iter().map(extent).collect())
    }

    /// The snapshot that a dirty bitmap is about.
    fn since(&self, context: &MetaContext) -> Result<Option<Since>, ExportError> {
        let MetaContext::DirtyBitmap(wanted) = context else {
            return Ok(None);
        };
        let found = self.bitmaps.iter().find(|(name, _)| name == wanted);
        let unknown = || ExportError::new(NbdErrno::Inval, format!("no older snapshot {wanted}"));
        found.map(|(_, since)| Some(*since)).ok_or_else(unknown)
    }
}

fn nbd_part(part: page_store::ReadPart) -> ReadPart {
    match part {
        page_store::ReadPart::Data(data) => ReadPart::Data(data),
        page_store::ReadPart::Hole(len_bytes) => ReadPart::Hole(len_bytes),
    }
}

/// The one mapping from errors of the data plane to NBD's errno.
fn refuse(error: DataError) -> ExportError {
    let errno = match error {
        DataError::NoSpace => NbdErrno::NoSpc,
        DataError::ReadOnly | DataError::Leased(_) => NbdErrno::Perm,
        DataError::OutOfRange | DataError::Malformed(_) => NbdErrno::Inval,
        DataError::Stale(_)
        | DataError::Damaged(_)
        | DataError::Gone
        | DataError::Held
        | DataError::Unavailable(_) => NbdErrno::Io,
    };
    ExportError::new(errno, error.to_string())
}
