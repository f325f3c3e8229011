//! Volumes: create, list, resize, rename, delete, and what a client needs to open one.

use super::super::peer_server::Usage;
use super::{Answer, catch_up, check_online, no_volume, refused};
use crate::admin::{
    AdminError, AdminErrorKind, AdminReply, FlattenInfo, OpenInfo, RouteInfo, VolumeCreate,
    VolumeDetails, VolumeInfo,
};
use crate::control::registry::change::{
    VolumeSpec, create_volume, delete_volume, rename_volume, resize_volume,
};
use crate::control::registry::nodes::open_nodes;
use crate::control::registry::routes::owners;
use crate::control::registry::{RegistryState, SnapshotState, VolumeRecord};
use crate::data::router::RoutingTable;
use crate::id::{BLOCK_BYTES, Epoch, NodeNo, PageNo, SnapshotId, VolumeId, locate, page_count};
use crate::io::link::decode_control;
use crate::io::wire::{Frame, Kind, Status};
use crate::node::Member;
use crate::node::lineage::ask;
use futures_util::future::join_all;

pub(super) fn record(state: &RegistryState, name: &str) -> Result<VolumeRecord, AdminError> {
    state
        .volume_by_name(name)
        .cloned()
        .ok_or_else(|| no_volume(name))
}

fn check_size(size_bytes: u64) -> Result<(), AdminError> {
    match size_bytes {
        0 => Err(refused(
            AdminErrorKind::Invalid,
            "a volume of 0 bytes: give a size, as in 4GiB",
        )),
        bytes if bytes % BLOCK_BYTES != 0 => {
            let text = format!("{bytes} bytes are no multiple of the block of {BLOCK_BYTES} bytes");
            Err(refused(AdminErrorKind::Invalid, text))
        }
        _ => Ok(()),
    }
}

/// Creates a volume over the named servers, or over all.
pub(super) async fn create(member: &Member, create: VolumeCreate) -> Answer {
    check_size(create.size_bytes)?;
    let build = |state: &RegistryState| {
        let all = || open_nodes(state).map(|node| node.number).collect();
        let spec = VolumeSpec {
            name: create.name.clone(),
            size_bytes: create.size_bytes,
            page_blocks: create.page_blocks,
            servers: match create.servers.is_empty() {
                true => all(),
                false => create.servers.clone(),
            },
            format: create.format.clone(),
            created_unix_s: member.clock.unix_ms() / 1000,
        };
        create_volume(state, &spec)
    };
    let made = member.registry.update(build).await?;
    catch_up(member).await?;
    Ok(AdminReply::Volume(info(member, &made).await))
}

/// All volumes, in the order of their ids.
pub(super) async fn list(member: &Member) -> Answer {
    catch_up(member).await?;
    let state = member.registry.state();
    let records: Vec<VolumeRecord> = state.volumes().cloned().collect();
    let infos = join_all(records.iter().map(|record| info(member, record))).await;
    Ok(AdminReply::Volumes(infos))
}

pub(super) async fn show(member: &Member, name: &str) -> Answer {
    catch_up(member).await?;
    let record = record(&member.registry.state(), name)?;
    Ok(AdminReply::Volume(info(member, &record).await))
}

/// One volume with what belongs to snapshots and clones.
pub(super) async fn details(member: &Member, name: &str) -> Answer {
    catch_up(member).await?;
    let record = record(&member.registry.state(), name)?;
    details_of(member, &record).await
}

pub(super) async fn details_of(member: &Member, record: &VolumeRecord) -> Answer {
    let state = member.registry.state();
    let nodes: Vec<NodeNo> = owners(&record.routes).into_keys().collect();
    let statuses = ask(member, &nodes, record.id, Epoch(0)).await;
    let origin = state.origin(record.id);
    let copied_up = statuses
        .iter()
        .map(|status| status.map(|s| s.copied_up_bytes));
    Ok(AdminReply::VolumeDetails(VolumeDetails {
        info: info(member, record).await,
        offline: state.is_offline(record.id, None),
        origin: origin.and_then(|origin| {
            let snapshot = state.snapshot(origin.parent, origin.snapshot)?;
            Some(format!(
                "{}@{}",
                state.volume(origin.parent)?.name,
                snapshot.name
            ))
        }),
        clones: state.clones(record.id, None),
        copied_up_bytes: copied_up.sum(),
        flatten: origin.filter(|origin| origin.flattening).map(|_| {
            let known = statuses
                .iter()
                .flatten()
                .filter_map(|status| status.flatten);
            known.fold(FlattenInfo::default(), |all, one| FlattenInfo {
                pages_done: all.pages_done + one.pages_done,
                pages_total: all.pages_total + one.pages_total,
            })
        }),
    }))
}

/// Changes the size. Shrinking loses what is beyond the new end, and is refused unless asked for.
/// A shrink that is repeated clears what an owner that was down did not. Before a growth every owner clears what is beyond the old end: an owner that was down during an
/// earlier shrink may still have data there.
pub(super) async fn resize(
    member: &Member,
    name: &str,
    size_bytes: u64,
    allow_shrink: bool,
) -> Answer {
    check_size(size_bytes)?;
    catch_up(member).await?;
    let now = record(&member.registry.state(), name)?;
    if size_bytes > now.size_bytes {
        drop_beyond(member, &now, now.size_bytes).await?;
    }
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        let before = record(state, name)?;
        if before.epoch != now.epoch {
            let text = format!("volume {name} was changed meanwhile: try again");
            return Err(refused(AdminErrorKind::Conflict, text));
        }
        if size_bytes < before.size_bytes {
            check_shrink(state, &before, size_bytes, allow_shrink)?;
        }
        let servers = growing_servers(state, &before);
        let (transaction, after) = resize_volume(state, before.id, size_bytes, &servers)?;
        Ok((transaction, after))
    };
    let after = member.registry.update(build).await?;
    member.publish();
    if after.size_bytes <= now.size_bytes {
        drop_beyond(member, &after, after.size_bytes)
            .await
            .map_err(|error| {
                let text = format!("volume {name} has {size_bytes} bytes now, but {error}");
                refused(error.kind, text)
            })?;
    }
    Ok(AdminReply::Volume(info(member, &after).await))
}

/// Servers that get new pages of a volume: those that have pages, or all if these are drained.
fn growing_servers(state: &RegistryState, volume: &VolumeRecord) -> Vec<NodeNo> {
    let open: Vec<NodeNo> = open_nodes(state).map(|node| node.number).collect();
    let mut servers: Vec<NodeNo> = owners(&volume.routes).into_keys().collect();
    servers.retain(|server| open.contains(server));
    if servers.is_empty() { open } else { servers }
}

fn check_shrink(
    state: &RegistryState,
    before: &VolumeRecord,
    size_bytes: u64,
    allow_shrink: bool,
) -> Result<(), AdminError> {
    let name = &before.name;
    if !allow_shrink {
        let text = format!(
            "volume {name} has {} bytes, {size_bytes} would cut data off: say --allow-shrink if \
             that is wanted",
            before.size_bytes
        );
        return Err(refused(AdminErrorKind::Conflict, text));
    }
    let larger = |bytes| bytes > size_bytes;
    match state
        .snapshots(before.id)
        .find(|snapshot| larger(snapshot.size_bytes))
    {
        None => Ok(()),
        Some(snapshot) => {
            let text = format!(
                "snapshot {name}@{} is larger than {size_bytes} bytes: delete it first",
                snapshot.name
            );
            Err(refused(AdminErrorKind::Conflict, text))
        }
    }
}

/// Frees what the owners have beyond a byte of a volume, so that zeros are found there.
pub(super) async fn drop_beyond(
    member: &Member,
    volume: &VolumeRecord,
    end_bytes: u64,
) -> Result<(), AdminError> {
    let (page, offset) = locate(end_bytes, volume.page_blocks);
    let drops = volume_owners(member, volume).into_iter().map(|node| {
        let mut request = Frame::request(Kind::VolumeDrop, volume.id);
        request.epoch = volume.epoch;
        request.len_bytes = 1;
        request.page = PageNo(u32::try_from(page).unwrap_or(u32::MAX));
        request.offset_bytes = u32::try_from(offset).unwrap_or(u32::MAX);
        member.call(node, request)
    });
    let ended: Result<Vec<Frame>, AdminError> = join_all(drops).await.into_iter().collect();
    ended.map(drop).map_err(|error| {
        let text = format!(
            "what lay beyond the end is not cleared on all servers ({error}); it will be before \
             the volume grows"
        );
        refused(AdminErrorKind::Unavailable, text)
    })
}

/// Servers that have, or before a shrink had, pages of the volume.
fn volume_owners(member: &Member, volume: &VolumeRecord) -> Vec<NodeNo> {
    let state = member.registry.state();
    let mut nodes: Vec<NodeNo> = state.nodes().map(|node| node.number).collect();
    let now = owners(&volume.routes);
    nodes.retain(|node| now.contains_key(node) || volume.epoch > Epoch(1));
    nodes
}

pub(super) async fn rename(member: &Member, name: &str, new_name: &str) -> Answer {
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        let id = record(state, name)?.id;
        Ok((rename_volume(state, id, new_name)?, id))
    };
    let id = member.registry.update(build).await?;
    catch_up(member).await?;
    let state = member.registry.state();
    let renamed = state.volume(id).ok_or_else(|| no_volume(new_name))?;
    Ok(AdminReply::Volume(info(member, renamed).await))
}

/// Deletes a volume without snapshots; owners that are down free its space when they return.
pub(super) async fn delete(member: &Member, name: &str) -> Answer {
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        let record = record(state, name)?;
        Ok((delete_volume(state, record.id)?, record))
    };
    let record = member.registry.update(build).await?;
    member.publish();
    for node in owners(&record.routes).into_keys() {
        let request = Frame::request(Kind::VolumeDrop, record.id);
        if let Err(error) = member.call(node, request).await {
            tracing::info!(%node, volume = %record.id, %error, "space is freed later");
        }
    }
    Ok(AdminReply::Done)
}

/// The routing table, as this server has it (S003-04 to S003-06).
pub(super) async fn route(member: &Member, name: &str) -> Answer {
    catch_up(member).await?;
    let record = record(&member.registry.state(), name)?;
    Ok(AdminReply::Route(route_info(&record)?))
}

fn route_info(record: &VolumeRecord) -> Result<RouteInfo, AdminError> {
    let runs = record.routes.clone();
    let (id, size) = (record.id, record.size_bytes);
    let table = RoutingTable::new(id, record.epoch, size, record.page_blocks, runs);
    let table = table.map_err(|error| refused(AdminErrorKind::Internal, error.to_string()))?;
    Ok(RouteInfo {
        volume: record.name.clone(),
        epoch: record.epoch,
        page_blocks: record.page_blocks,
        page_count: page_count(record.size_bytes, record.page_blocks),
        runs: record.routes.clone(),
        table_crc: table.crc(),
    })
}

/// What a client needs to go straight to the owners.
pub(super) async fn open(member: &Member, name: &str, snapshot: Option<&str>) -> Answer {
    catch_up(member).await?;
    let state = member.registry.state();
    let record = record(&state, name)?;
    let taken = match snapshot {
        None => None,
        Some(wanted) => Some(find_snapshot(&state, &record, wanted)?),
    };
    let target = match snapshot {
        None => name.to_owned(),
        Some(snapshot) => format!("{name}@{snapshot}"),
    };
    check_online(&state, record.id, taken.map(|(id, _)| id), &target)?;
    let address = |node: NodeNo| Some((node, state.node(node)?.peer_address.clone()));
    Ok(AdminReply::Open(OpenInfo {
        snapshot: taken.map(|(id, _)| id),
        size_bytes: taken.map_or(record.size_bytes, |(_, size_bytes)| size_bytes),
        route: route_info(&record)?,
        nodes: owners(&record.routes)
            .into_keys()
            .filter_map(address)
            .collect(),
        volume: info_without_usage(member, &record),
    }))
}

/// Id and size of a committed snapshot.
pub(in crate::node) fn find_snapshot(
    state: &RegistryState,
    volume: &VolumeRecord,
    name: &str,
) -> Result<(SnapshotId, u64), AdminError> {
    let found = state.snapshot_by_name(volume.id, name);
    match found.filter(|snapshot| snapshot.state == SnapshotState::Committed) {
        Some(snapshot) => Ok((snapshot.id, snapshot.size_bytes)),
        None => {
            let text = format!("volume {:?} has no snapshot {name:?}", volume.name);
            Err(refused(AdminErrorKind::NotFound, text))
        }
    }
}

async fn info(member: &Member, record: &VolumeRecord) -> VolumeInfo {
    let nodes = owners(&record.routes).into_keys();
    let usages = join_all(nodes.map(|node| member.usage(node, record.id, None))).await;
    let allocated = usages
        .into_iter()
        .map(|usage| usage.map(|usage| usage.allocated_bytes));
    VolumeInfo {
        allocated_bytes: allocated.sum(),
        ..info_without_usage(member, record)
    }
}

fn info_without_usage(member: &Member, record: &VolumeRecord) -> VolumeInfo {
    let state = member.registry.state();
    let committed = state
        .snapshots(record.id)
        .filter(|snapshot| snapshot.state == SnapshotState::Committed);
    VolumeInfo {
        id: record.id,
        name: record.name.clone(),
        size_bytes: record.size_bytes,
        page_blocks: record.page_blocks,
        epoch: record.epoch,
        format: record.format.clone(),
        created_unix_s: record.created_unix_s,
        owners: owners(&record.routes).into_keys().collect(),
        allocated_bytes: None,
        snapshot_count: committed.count() as u64,
    }
}

impl Member {
    /// One request to a node's owner, over its peer port even if it is this one.
    pub(in crate::node) async fn call(
        &self,
        node: NodeNo,
        request: Frame,
    ) -> Result<Frame, AdminError> {
        let reply = self.send(node, request).await?;
        match reply.status {
            Status::Ok => Ok(reply),
            _ => {
                let text = format!("node {node}: {}", reply.text());
                Err(refused(AdminErrorKind::Unavailable, text))
            }
        }
    }

    /// As [`Self::call`], but an answer of an error status is `Ok`.
    pub(in crate::node) async fn send(
        &self,
        node: NodeNo,
        request: Frame,
    ) -> Result<Frame, AdminError> {
        let unavailable = |text: String| refused(AdminErrorKind::Unavailable, text);
        let address = self.group.address(node);
        let address = address.ok_or_else(|| unavailable(format!("node {node} is not defined")))?;
        let reply = self.peers.call(&address, request).await;
        reply.map_err(|error| unavailable(format!("node {node}: {error}")))
    }

    /// Space of a volume or snapshot on a node; `None` if it cannot be asked.
    pub(in crate::node) async fn usage(
        &self,
        node: NodeNo,
        volume: VolumeId,
        snapshot: Option<SnapshotId>,
    ) -> Option<Usage> {
        let mut request = Frame::request(Kind::Usage, volume);
        request.snapshot = snapshot.unwrap_or_default();
        let probe = std::time::Duration::from_secs(2);
        let reply = tokio::time::timeout(probe, self.call(node, request)).await;
        decode_control(reply.ok()?.ok()?.payload).ok()
    }
}
