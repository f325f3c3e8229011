//! Planning of moves: what the servers hold is asked, the balancer decides. The registry's leader
//! plans for drained servers, again and again, so that whatever they still own or get leaves them.

use crate::admin::AdminError;
use crate::control::balance::{self, Held, NodeSpace, VolumeSpace};
use crate::control::registry::moves::{MoveSpec, plan_move};
use crate::control::registry::routes::owners;
use crate::control::registry::{MovePhase, MoveRecord, RegistryState, VolumeRecord};
use crate::id::{BLOCK_BYTES, NodeNo, RouteRun, VolumeId};
use crate::io::link::decode_control;
use crate::io::wire::{Frame, Kind};
use crate::limits::{DRAIN_RETRY_MS, LOAD_SAMPLE_MS, OPEN_PROBE_MS};
use crate::node::Member;
use futures_util::future::join_all;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// Whether load is taken into account, which takes a moment.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(in crate::node) enum Loads {
    Ignored,
    Sampled,
}

/// The pages of these volumes that should move, with their new owners.
pub(in crate::node) async fn plan(
    member: &Member,
    volumes: &[VolumeRecord],
    loads: Loads,
) -> Result<BTreeMap<VolumeId, Vec<RouteRun>>, AdminError> {
    let state = member.registry.state();
    let numbers: Vec<NodeNo> = state.nodes().map(|node| node.number).collect();
    let loads = match loads {
        Loads::Ignored => BTreeMap::new(),
        Loads::Sampled => sample(member, &numbers).await,
    };
    let asked = numbers
        .iter()
        .map(|node| member.usage(*node, VolumeId(0), None));
    let asked = join_all(asked).await;
    // A server that does not answer gets nothing, and keeps what it has.
    let nodes = numbers.iter().zip(asked).filter_map(|(node, usage)| {
        let is_open = state.drain(*node).is_none();
        let usage = usage?;
        Some(NodeSpace {
            node: *node,
            used_bytes: usage.allocated_bytes,
            free_bytes: usage.free_bytes,
            is_open,
        })
    });
    let nodes: Vec<NodeSpace> = nodes.collect();
    let mut spaces = Vec::new();
    for volume in volumes {
        spaces.push(space(member, volume, &loads).await);
    }
    Ok(balance::plan(&nodes, &spaces))
}

async fn space(
    member: &Member,
    volume: &VolumeRecord,
    loads: &BTreeMap<(NodeNo, VolumeId), u64>,
) -> VolumeSpace {
    let nodes: Vec<NodeNo> = owners(&volume.routes).into_keys().collect();
    let usages = join_all(
        nodes
            .iter()
            .map(|node| member.usage(*node, volume.id, None)),
    )
    .await;
    let held = nodes.iter().zip(usages).map(|(node, usage)| {
        let held = Held {
            bytes: usage.map_or(0, |usage| usage.allocated_bytes),
            load: loads.get(&(*node, volume.id)).copied().unwrap_or(0),
        };
        (*node, held)
    });
    VolumeSpace {
        volume: volume.id,
        routes: volume.routes.clone(),
        page_bytes: u64::from(volume.page_blocks) * BLOCK_BYTES,
        held: held.collect(),
    }
}

/// Requests a second of each volume on each server, over a moment.
async fn sample(member: &Member, nodes: &[NodeNo]) -> BTreeMap<(NodeNo, VolumeId), u64> {
    let before = counts(member, nodes).await;
    sleep(Duration::from_millis(LOAD_SAMPLE_MS)).await;
    let after = counts(member, nodes).await;
    let rates = after.into_iter().map(|(at, count)| {
        let since = count.saturating_sub(before.get(&at).copied().unwrap_or(count));
        (at, since * 1000 / LOAD_SAMPLE_MS)
    });
    rates.collect()
}

async fn counts(member: &Member, nodes: &[NodeNo]) -> BTreeMap<(NodeNo, VolumeId), u64> {
    let asked = nodes.iter().map(async |node| {
        let request = Frame::request(Kind::Load, VolumeId(0));
        let limit = Duration::from_millis(OPEN_PROBE_MS);
        let reply = timeout(limit, member.call(*node, request))
            .await
            .ok()?
            .ok()?;
        let counts: Vec<(VolumeId, u64)> = decode_control(reply.payload).ok()?;
        Some((*node, counts))
    });
    let known = join_all(asked).await.into_iter().flatten();
    known
        .flat_map(|(node, counts)| {
            let counts = counts.into_iter();
            counts.map(move |(volume, count)| ((node, volume), count))
        })
        .collect()
}

/// Plans moves away from drained servers, for ever, while this server leads the registry.
pub(super) async fn drain(member: Rc<Member>) {
    loop {
        sleep(Duration::from_millis(super::MOVE_TICK_MS)).await;
        let state = member.registry.state();
        let leads = member.registry.status().leader == Some(member.number());
        let stays = state.nodes().any(|node| state.drain(node.number).is_some());
        if !leads || !stays {
            continue;
        }
        let mut has_failed = false;
        for volume in state.volumes() {
            let Some(rate_bytes) = rate_of(&state, volume).filter(|_| !has_clones(&state, volume))
            else {
                continue;
            };
            let before = state.page_move(volume.id);
            has_failed |= before.is_some_and(|r| matches!(r.phase, MovePhase::Failed(_)));
            if before.is_none_or(MoveRecord::is_over)
                && let Err(error) = drain_volume(&member, volume, rate_bytes).await
            {
                tracing::warn!(volume = %volume.name, %error, "not drained yet");
                has_failed = true;
            }
        }
        if has_failed {
            sleep(Duration::from_millis(DRAIN_RETRY_MS)).await;
        }
    }
}

/// The rate at which a volume is to leave drained servers, if it has pages there.
fn rate_of(state: &RegistryState, volume: &VolumeRecord) -> Option<u64> {
    let owners = owners(&volume.routes);
    let drained = owners.keys().filter_map(|node| state.drain(*node));
    drained.map(|drain| drain.rate_bytes).min()
}

/// Whether clones of the volume have pages on drained servers. They go first: then nothing needs to
/// be copied up there.
fn has_clones(state: &RegistryState, volume: &VolumeRecord) -> bool {
    let clones = state.origins().filter(|origin| origin.parent == volume.id);
    let mut clones = clones.filter_map(|origin| state.volume(origin.volume));
    clones.any(|clone| rate_of(state, clone).is_some())
}

async fn drain_volume(
    member: &Member,
    volume: &VolumeRecord,
    rate_bytes: u64,
) -> Result<(), AdminError> {
    let mut wanted = plan(member, std::slice::from_ref(volume), Loads::Ignored).await?;
    let state = member.registry.state();
    let is_drained = |page: u32| {
        let owner = crate::control::registry::routes::owner(&volume.routes, page);
        owner.is_some_and(|owner| state.drain(owner).is_some())
    };
    let mut wanted = wanted.remove(&volume.id).unwrap_or_default();
    wanted.retain(|run| is_drained(run.first_page));
    if wanted.is_empty() {
        return Ok(());
    }
    let spec = MoveSpec {
        wanted,
        reason: "drain".to_owned(),
        rate_bytes,
        now_unix_ms: member.clock.unix_ms(),
    };
    let build = |state: &RegistryState| plan_move(state, volume.id, &spec);
    member.registry.update(build).await?;
    Ok(())
}
