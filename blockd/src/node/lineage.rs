//! Rollbacks, clones and flattening on a server that owns pages: what its store must be, and the copying up.

use super::Member;
use crate::admin::HoldInfo;
use crate::control::registry::routes::{self, owners};
use crate::control::registry::{MoveRecord, RegistryState, VolumeRecord};
use crate::data::error::DataError;
use crate::data::lineage::{Lineage, LineageHold};
use crate::data::owner::VolumeState;
use crate::data::page_store::{Parent, StoreError};
use crate::id::{Epoch, NodeNo, TicketId, VolumeId};
use crate::io::link::{decode_control, encode_control};
use crate::io::wire::{Frame, Kind, Payload};
use crate::limits::{FLATTEN_BYTES_PER_S, LINEAGE_CONFIRM_MS};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// What a server says of a volume when it is where it was asked to be; payload of a reply to
/// `Kind::Lineage`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LineageStatus {
    /// Bytes copied up since the server was started.
    pub(crate) copied_up_bytes: u64,
    /// How far the flattening is here; `None`: none goes on.
    pub(crate) flatten: Option<FlattenStatus>,
}

/// Progress of a flattening on one server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FlattenStatus {
    pub(crate) pages_done: u64,
    pub(crate) pages_total: u64,
    /// Nothing of the clone needs the parent here any more.
    pub(crate) finished: bool,
}

/// Flattenings that go on, or have finished here, by volume.
#[derive(Default)]
pub(crate) struct Flattenings(RefCell<HashMap<VolumeId, FlattenStatus>>);

/// What the store of `me` must make of a volume; `None` if it has no pages of it and gets none.
pub(super) fn of(state: &RegistryState, me: NodeNo, volume: &VolumeRecord) -> Option<Lineage> {
    let owns = owners(&volume.routes).contains_key(&me);
    let record = state.page_move(volume.id);
    let gets = record
        .and_then(MoveRecord::batch)
        .is_some_and(|batch| batch.to == me);
    let parent = state.origin(volume.id).map(|origin| Parent {
        volume: origin.parent,
        snapshot: origin.snapshot,
    });
    // A new owner takes the rollbacks over with its first pages.
    let rollback = state
        .rollback(volume.id)
        .filter(|rollback| owns && rollback.owners.contains(&me));
    let rollback = rollback.map(|rollback| (rollback.snapshot, rollback.epoch));
    (owns || gets).then_some(Lineage { parent, rollback })
}

/// What waits on this server until stores are what the registry wants them to be.
pub(super) fn holds(member: &Member) -> Vec<HoldInfo> {
    let state = member.registry.state();
    let held = state.volumes().filter_map(|record| {
        let volume = member.owner().volume(record.id)?;
        let hold = volume.lineage_hold()?;
        Some(hold_info(member, &volume, &hold))
    });
    held.collect()
}

/// The run that ends it is the routing epoch with which it came.
fn hold_info(member: &Member, state: &VolumeState, hold: &LineageHold) -> HoldInfo {
    let what = hold.rollback.map_or_else(
        || format!("table {} of the volume", hold.epoch),
        |snapshot| format!("rollback to snapshot {snapshot}"),
    );
    HoldInfo {
        volume: state.id,
        server: member.number(),
        ticket: TicketId(hold.epoch.0.into()),
        coordinator: member.number(),
        reason: format!("{what}: changes wait until those that began before have ended"),
        age_ms: u64::try_from(hold.since.elapsed().as_millis()).unwrap_or(u64::MAX),
        left_ms: None,
        waiting: state.cut.waiting(),
        parked: state.cut.parked(),
    }
}

/// Waits until this server has done everything that came with the routing table of the epoch.
pub(super) async fn settled(
    member: &Member,
    volume: VolumeId,
    epoch: Epoch,
) -> Result<(), DataError> {
    let registry = member.registry.barrier().await;
    registry.map_err(|error| DataError::Unavailable(error.to_string()))?;
    member.publish();
    let is_there = |owner: &crate::data::owner::Owner| {
        let state = owner.volume(volume);
        state.is_none_or(|state| state.is_settled() && epoch <= state.table().epoch)
    };
    let deadline = Instant::now() + Duration::from_millis(LINEAGE_CONFIRM_MS);
    match member.owner().await_tables(deadline, is_there).await {
        true => Ok(()),
        false => Err(DataError::Unavailable(
            "earlier changes of the volume are still being executed".to_owned(),
        )),
    }
}

/// Carries out `Kind::Lineage`.
pub(super) async fn answer(
    member: &Rc<Member>,
    request: &Frame,
) -> Result<(u16, Payload), DataError> {
    let volume = request.volume;
    settled(member, volume, request.epoch).await?;
    // A rollback that was answered is never taken back: after a loss of power a store that is ahead
    // of its copy of the registry serves nothing until that has been told.
    member.owner().store.flush().await?;
    flatten_if_asked(member, volume);
    let status = LineageStatus {
        copied_up_bytes: member.owner().store.volume_usage(volume).copied_up_bytes,
        flatten: member.flattenings.0.borrow().get(&volume).copied(),
    };
    Ok((0, encode_control(&status)))
}

/// Asks servers to be at an epoch; what each says, or `None` if it does not in time.
pub(super) async fn ask(
    member: &Member,
    nodes: &[NodeNo],
    volume: VolumeId,
    epoch: Epoch,
) -> Vec<Option<LineageStatus>> {
    let asked = nodes.iter().map(async |node| {
        let mut request = Frame::request(Kind::Lineage, volume);
        request.epoch = epoch;
        let patience = Duration::from_millis(LINEAGE_CONFIRM_MS);
        let reply = timeout(patience, member.call(*node, request)).await;
        decode_control(reply.ok()?.ok()?.payload).ok()
    });
    join_all(asked).await
}

/// Begins to flatten a clone here, if the registry says so and it does not go on.
pub(super) fn flatten_if_asked(member: &Rc<Member>, volume: VolumeId) {
    let state = member.registry.state();
    let origin = state.origin(volume);
    let mut all = member.flattenings.0.borrow_mut();
    let owns = state
        .volume(volume)
        .is_some_and(|volume| owners(&volume.routes).contains_key(&member.number()));
    if !owns || !origin.is_some_and(|origin| origin.flattening) {
        all.remove(&volume);
        return;
    }
    if all.contains_key(&volume) {
        return;
    }
    all.insert(volume, FlattenStatus::default());
    let member = Rc::clone(member);
    tokio::task::spawn_local(async move {
        if let Err(error) = flatten(&member, volume).await {
            tracing::warn!(%volume, %error, "flattening goes on later");
            member.flattenings.0.borrow_mut().remove(&volume);
        }
    });
}

/// Copies up page by page, at a bounded rate.
async fn flatten(member: &Member, volume: VolumeId) -> Result<(), StoreError> {
    let store = &member.owner().store;
    let mut pages = store.parent_pages(volume)?;
    let state = member.registry.state();
    let routes = state
        .volume(volume)
        .map_or(&[][..], |volume| &volume.routes);
    pages.retain(|page| routes::owner(routes, page.0) == Some(member.number()));
    let mut status = FlattenStatus {
        pages_total: pages.len() as u64,
        ..FlattenStatus::default()
    };
    for page in pages {
        note(member, volume, status);
        let started = Instant::now();
        let bytes = store.copy_up(volume, page).await?;
        status.pages_done += 1;
        let least = Duration::from_micros(bytes.saturating_mul(1_000_000) / FLATTEN_BYTES_PER_S);
        sleep(least.saturating_sub(started.elapsed())).await;
    }
    store.flush().await?;
    status.finished = true;
    note(member, volume, status);
    Ok(())
}

fn note(member: &Member, volume: VolumeId, status: FlattenStatus) {
    let mut all = member.flattenings.0.borrow_mut();
    if let Some(known) = all.get_mut(&volume) {
        *known = status;
    }
}
