//! Volumes and snapshots as NBD exports `VOL` and `VOL@SNAP` (S003-08 to S003-11).

use super::{Member, Node};
use crate::control::registry::{SnapshotState, VolumeRecord, split_volume_name};
use crate::data::error::DataError;
use crate::data::page_store;
use crate::data::volume::Volume;
use crate::id::SnapshotId;
use bytes::Bytes;
use nbd_server::{
    Export, ExportEntry, ExportError, ExportInfo, Exports, Extent, MetaContext, NbdErrno,
    OpenError, Peer, ReadPart, ReadReply, ZeroFlags,
};
use std::rc::Rc;
use std::time::Duration;
use tokio::time::timeout;

/// How long an NBD client that opens an export waits for the registry's majority.
const REGISTRY_PATIENCE: Duration = Duration::from_secs(1);

/// All volumes and snapshots of the cluster, through this server.
#[derive(Clone)]
pub(crate) struct NbdExports(pub(crate) Rc<Node>);

/// One opened volume or snapshot.
#[derive(Clone)]
pub(crate) struct NbdExport {
    volume: Volume,
    description: Rc<str>,
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
            let committed = |state| state == SnapshotState::Committed;
            for snapshot in state.snapshots(volume.id).filter(|s| committed(s.state)) {
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
        let export = open_in(&member, name)?.ok_or_else(unknown)?;
        export.volume.learn_verifiers().await;
        Ok(export)
    }
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
    let Some(volume_state) = member.owner().volume(record.id) else {
        return Ok(None);
    };
    let group = Rc::clone(&member.group);
    Ok(Some(NbdExport {
        volume: Volume::new(group, volume_state, snapshot as Option<(SnapshotId, u64)>),
        description: describe(record, snapshot_name).into(),
    }))
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
        let zeroed = self
            .volume
            .zero(offset, len, flags.no_hole, flags.fua)
            .await;
        zeroed.map_err(refuse)
    }

    async fn cache(&self, _offset: u64, _len: u64) -> Result<(), ExportError> {
        Ok(())
    }

    async fn block_status(
        &self,
        _context: &MetaContext,
        offset: u64,
        len: u64,
    ) -> Result<Vec<Extent>, ExportError> {
        let extents = self.volume.extents(offset, len).await.map_err(refuse)?;
        let extent = |(len_bytes, allocated): (u32, bool)| {
            Extent::allocation(u64::from(len_bytes), !allocated, !allocated)
        };
        Ok(extents.into_iter().map(extent).collect())
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
        DataError::ReadOnly => NbdErrno::Perm,
        DataError::OutOfRange | DataError::Malformed(_) => NbdErrno::Inval,
        DataError::Stale(_)
        | DataError::Damaged(_)
        | DataError::Gone
        | DataError::Held
        | DataError::Unavailable(_) => NbdErrno::Io,
    };
    ExportError::new(errno, error.to_string())
}
