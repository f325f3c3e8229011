//! The sweep: what nobody holds on to is freed (promise 8).
//!
//! A volume or snapshot whose record is gone from the registry was deleted, or never came to be,
//! while this server was down or its coordinator died. Before anything is dropped the registry
//! is read through its majority: ids are never used twice and a record is committed before its
//! first byte is stored, so what a confirmed state does not have can only be garbage. An id that
//! the state has not reached yet is left alone all the same.

use super::{Member, Node, admin, lineage, moves, snapshot};
use crate::control::registry::{RegistryState, SnapshotState};
use crate::control::snapshot::UnfinishedWatch;
use crate::id::{SnapshotId, VolumeId};
use crate::limits::SWEEP_INTERVAL_MS;
use crate::planted::{Plant, planted};
use std::rc::Rc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Sweeps for ever.
pub(crate) async fn run(node: Rc<Node>) {
    let mut ticks = interval(Duration::from_millis(SWEEP_INTERVAL_MS));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let started = Instant::now();
    let mut watch = UnfinishedWatch::default();
    loop {
        ticks.tick().await;
        let Some(member) = node.member() else {
            continue;
        };
        let state = member.registry.state();
        let now_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        watch.tick(now_ms, unfinished(&state));
        let planted = planted(Plant::SweepLive) || planted(Plant::SweepPending);
        if (has_garbage(&member, &state) || planted)
            && let Ok(confirmed) = member.registry.barrier().await
        {
            member.publish();
            sweep_store(&member, &confirmed).await;
        }
        moves::sweep(&member).await;
        for origin in state.origins().filter(|origin| origin.flattening) {
            lineage::flatten_if_asked(&member, origin.volume);
        }
        if member.registry.status().leader == Some(member.number()) {
            snapshot::sweep_records(&member, &watch).await;
            for origin in state.origins().filter(|origin| origin.flattening) {
                admin::drive(&member, origin).await;
            }
        }
    }
}

/// Snapshot records that are neither committed nor gone.
pub(super) fn unfinished(state: &RegistryState) -> impl Iterator<Item = (VolumeId, SnapshotId)> {
    let records = state
        .volumes()
        .flat_map(|volume| state.snapshots(volume.id));
    let unfinished = records.filter(|record| record.state != SnapshotState::Committed);
    unfinished.map(|record| (record.volume, record.id))
}

fn has_garbage(member: &Member, state: &RegistryState) -> bool {
    let store = &member.owner().store;
    store.volumes().into_iter().any(|volume| {
        let mut snapshots = store.snapshots(volume).into_iter();
        state.volume(volume).is_none()
            || snapshots.any(|snapshot| state.snapshot(volume, snapshot).is_none())
    })
}

async fn sweep_store(member: &Member, confirmed: &RegistryState) {
    let store = &member.owner().store;
    let reached = confirmed.cluster().map(|cluster| cluster.next_volume);
    for volume in store
        .volumes()
        .into_iter()
        .filter(|volume| Some(*volume) < reached)
    {
        let Some(record) = confirmed.volume(volume) else {
            if planted(Plant::SweepKeepsVolumes) {
                continue;
            }
            log(store.delete_volume(volume).await, "volume", &volume);
            continue;
        };
        // A rollback that is still to be carried out needs its snapshot.
        let is_settled = member
            .owner()
            .volume(volume)
            .is_some_and(|state| state.is_settled());
        let known = store.snapshots(volume).into_iter().filter(|_| is_settled);
        for snapshot in known.filter(|snapshot| *snapshot < record.next_snapshot) {
            let found = confirmed.snapshot(volume, snapshot);
            let is_pending = found.is_some_and(|found| found.state == SnapshotState::Pending);
            if found.is_none()
                || planted(Plant::SweepLive)
                || (planted(Plant::SweepPending) && is_pending)
            {
                let dropped = store.delete_snapshot(volume, snapshot).await;
                log(
                    dropped,
                    "snapshot",
                    &format_args!("{snapshot} of volume {volume}"),
                );
            }
        }
    }
}

fn log<E: std::fmt::Display>(result: Result<(), E>, what: &str, id: &dyn std::fmt::Display) {
    match result {
        Ok(()) => tracing::info!(%id, "swept a {what} that the registry does not have"),
        Err(error) => tracing::warn!(%id, %error, "cannot sweep a {what}"),
    }
}
