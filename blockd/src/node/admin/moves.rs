//! Moving pages, evening servers out, emptying them: the registry is told, and the servers do it.

use super::super::moves::{self, Loads};
use super::{Answer, catch_up, no_volume, refused};
use crate::admin::{AdminError, AdminErrorKind, AdminReply, DrainInfo, MoveInfo};
use crate::control::registry::moves::{MoveSpec, plan_move, responsible, wish_move};
use crate::control::registry::nodes::{drain_node, undrain_node};
use crate::control::registry::routes::owners;
use crate::control::registry::{
    ChangeError, DrainRecord, MoveRecord, MoveWish, RegistryState, VolumeRecord,
};
use crate::id::{NodeNo, RouteRun, VolumeId};
use crate::io::link::decode_control;
use crate::io::wire::{Frame, Kind};
use crate::limits::{MOVE_RATE_MIN_BYTES, OPEN_PROBE_MS};
use crate::node::Member;
use futures_util::future::join_all;
use std::time::Duration;
use tokio::time::timeout;

/// 0 is none.
fn check_rate(rate_bytes: u64) -> Result<(), AdminError> {
    match rate_bytes {
        0 | MOVE_RATE_MIN_BYTES.. => Ok(()),
        _ => {
            let text = "a rate below 1 MiB a second would never end: give more, as in 200MiB";
            Err(refused(AdminErrorKind::Invalid, text))
        }
    }
}

fn named<'a>(state: &'a RegistryState, name: &str) -> Result<&'a VolumeRecord, AdminError> {
    state.volume_by_name(name).ok_or_else(|| no_volume(name))
}

/// Moves pages of a volume to a node.
pub(super) async fn page_move(
    member: &Member,
    name: &str,
    pages: Option<(u32, u32)>,
    to: NodeNo,
    rate_bytes: u64,
) -> Answer {
    check_rate(rate_bytes)?;
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        let volume = named(state, name)?;
        let wanted = vec![chosen(volume, pages, to)?];
        let spec = MoveSpec {
            wanted,
            reason: format!("page move to node {to}"),
            rate_bytes,
            now_unix_ms: member.clock.unix_ms(),
        };
        Ok(plan_move(state, volume.id, &spec)?)
    };
    let record = member.registry.update(build).await?;
    Ok(AdminReply::Moves(vec![info(
        &member.registry.state(),
        &record,
    )]))
}

fn chosen(
    volume: &VolumeRecord,
    pages: Option<(u32, u32)>,
    owner: NodeNo,
) -> Result<RouteRun, AdminError> {
    let all = volume.page_count();
    let (first_page, page_count) = pages.unwrap_or((0, all));
    let end = first_page
        .checked_add(page_count)
        .filter(|_| page_count > 0);
    if end.is_none_or(|end| end > all) {
        let text = format!(
            "volume {} has pages 0 to {}: give a range of them, as in 0-99",
            volume.name,
            all - 1
        );
        return Err(refused(AdminErrorKind::Invalid, text));
    }
    Ok(RouteRun {
        first_page,
        page_count,
        owner,
    })
}

/// Evens one volume, or all, out over the nodes.
pub(super) async fn rebalance(member: &Member, name: Option<&str>, rate_bytes: u64) -> Answer {
    check_rate(rate_bytes)?;
    catch_up(member).await?;
    let state = member.registry.state();
    let volumes: Vec<VolumeRecord> = match name {
        Some(name) => vec![named(&state, name)?.clone()],
        None => {
            let is_free =
                |volume: &&VolumeRecord| state.page_move(volume.id).is_none_or(MoveRecord::is_over);
            state.volumes().filter(is_free).cloned().collect()
        }
    };
    let plan = moves::plan(member, &volumes, Loads::Sampled).await?;
    let mut infos = Vec::new();
    for (volume, wanted) in plan {
        let spec = MoveSpec {
            wanted,
            reason: "rebalance".to_owned(),
            rate_bytes,
            now_unix_ms: member.clock.unix_ms(),
        };
        let build = |state: &RegistryState| plan_move(state, volume, &spec);
        let record = member.registry.update(build).await?;
        infos.push(info(&member.registry.state(), &record));
    }
    Ok(AdminReply::Moves(infos))
}

/// Moves under way, and the last one of each other volume that had one.
pub(super) async fn list(member: &Member, name: Option<&str>) -> Answer {
    catch_up(member).await?;
    let state = member.registry.state();
    let wanted = name.map(|name| named(&state, name)).transpose()?;
    let records = state
        .page_moves()
        .filter(|record| wanted.is_none_or(|volume| volume.id == record.volume));
    let infos = records.map(async |record| MoveInfo {
        trouble: trouble(member, &state, record).await,
        ..info(&state, record)
    });
    Ok(AdminReply::Moves(join_all(infos).await))
}

/// Why a move does not go on, as the server says whose step is next.
async fn trouble(member: &Member, state: &RegistryState, record: &MoveRecord) -> Option<String> {
    let node = responsible(state, record)?;
    let request = Frame::request(Kind::MoveTrouble, record.volume);
    let limit = Duration::from_millis(OPEN_PROBE_MS);
    match timeout(limit, member.call(node, request)).await {
        Ok(Ok(reply)) => decode_control(reply.payload).ok()?,
        Ok(Err(error)) => Some(error.message),
        Err(_) => Some(format!("node {node} does not answer")),
    }
}

pub(super) async fn wish(member: &Member, name: &str, wish: MoveWish) -> Answer {
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        Ok(wish_move(state, named(state, name)?.id, wish)?)
    };
    let record = member.registry.update(build).await?;
    Ok(AdminReply::Moves(vec![info(
        &member.registry.state(),
        &record,
    )]))
}

/// Lets a node own nothing, or pages again. The registry's leader plans the moves.
pub(super) async fn drain(member: &Member, node: NodeNo, drain: bool, rate_bytes: u64) -> Answer {
    let build = |state: &RegistryState| -> Result<_, ChangeError> {
        if !drain {
            return undrain_node(state, node);
        }
        let record = DrainRecord {
            node,
            rate_bytes,
            since_unix_ms: member.clock.unix_ms(),
        };
        drain_node(state, &record)
    };
    if drain {
        check_rate(rate_bytes)?;
    }
    member.registry.update(build).await?;
    drains(member).await
}

/// What nodes are to own nothing, and how far that is.
pub(super) async fn drains(member: &Member) -> Answer {
    catch_up(member).await?;
    let state = member.registry.state();
    let drained = state.nodes().filter_map(|node| state.drain(node.number));
    let infos = drained.map(|record| drain_info(&state, record));
    Ok(AdminReply::Drains(infos.collect()))
}

fn drain_info(state: &RegistryState, record: &DrainRecord) -> DrainInfo {
    let node = record.node;
    let pages = |volume: &VolumeRecord| owners(&volume.routes).get(&node).copied().unwrap_or(0);
    let is_left = |volume: &&VolumeRecord| {
        let dropping = state.page_move(volume.id).and_then(MoveRecord::batch);
        pages(volume) > 0
            || dropping.is_some_and(|batch| batch.from == node)
            || state.snapshots(volume.id).any(|s| s.owners.contains(&node))
    };
    let failed = state.volumes().filter(is_left).find_map(|volume| {
        use crate::control::registry::MovePhase::Failed;
        match &state.page_move(volume.id)?.phase {
            Failed(why) => Some(format!("volume {}: {why}", volume.name)),
            _ => None,
        }
    });
    DrainInfo {
        node,
        since_unix_ms: record.since_unix_ms,
        rate_bytes: Some(record.rate_bytes).filter(|rate| *rate != 0),
        pages_left: state.volumes().map(|volume| u64::from(pages(volume))).sum(),
        volumes_left: state
            .volumes()
            .filter(is_left)
            .map(|volume| volume.name.clone())
            .collect(),
        trouble: failed,
    }
}

/// Verifiers under which nodes gave pages of a volume away.
pub(super) async fn given(member: &Member, volume: VolumeId) -> Answer {
    catch_up(member).await?;
    let state = member.registry.state();
    let given = state.page_move(volume).map(|record| record.given.clone());
    Ok(AdminReply::Given(given.unwrap_or_default()))
}

fn info(state: &RegistryState, record: &MoveRecord) -> MoveInfo {
    let volume = state.volume(record.volume);
    MoveInfo {
        volume: volume.map_or_else(|| record.volume.to_string(), |v| v.name.clone()),
        reason: record.reason.clone(),
        phase: record.phase.clone(),
        wish: record.wish,
        pages_total: record.total_pages,
        pages_moved: record.moved_pages,
        bytes_moved: record.moved_bytes,
        rate_bytes: Some(record.rate_bytes).filter(|rate| *rate != 0),
        started_unix_ms: record.started_unix_ms,
        left: record.left.clone(),
        trouble: None,
    }
}
