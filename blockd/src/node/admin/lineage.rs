//! Rollback, clone and flatten on the server that gets the command.

use super::volume::{details_of, drop_beyond, record};
use super::{Answer, catch_up, find_snapshot, refused};
use crate::admin::{
    AdminError, AdminErrorKind, AdminReply, RollbackInfo, SnapshotName, VolumeClone,
};
use crate::control::calendar::utc;
use crate::control::registry::lineage::{begin_flatten, clone_volume, end_flatten, roll_back};
use crate::control::registry::routes::owners;
use crate::control::registry::{
    ChangeError, OriginRecord, RegistryState, Transaction, VolumeRecord,
};
use crate::id::{Epoch, NodeNo, VolumeId};
use crate::node::lineage::ask;
use crate::node::{Member, Node, snapshot};
use std::rc::Rc;

/// Names that a rollback tries for the snapshot of what the volume was.
const SAFETY_TRIES: u32 = 4;

/// `before-rollback-20261121-131101`, with a number behind it if there is one of this second.
fn safety_name(state: &RegistryState, volume: VolumeId, now_unix_ms: u64) -> String {
    let now = utc(now_unix_ms);
    let digits: String = now.chars().filter(char::is_ascii_digit).collect();
    let (date, time) = digits.split_at(8.min(digits.len()));
    let name = format!("before-rollback-{date}-{time}");
    let is_free = |name: &String| state.snapshot_by_name(volume, name).is_none();
    let mut names =
        std::iter::once(name.clone()).chain((2..).map(|number| format!("{name}-{number}")));
    names.find(is_free).unwrap_or_default()
}

/// A safety snapshot, then one transaction that says what the volume is from now on; then every
/// owner is waited for.
pub(super) async fn rollback(node: &Rc<Node>, member: &Member, target: &SnapshotName) -> Answer {
    catch_up(member).await?;
    let volume = record(&member.registry.state(), &target.volume)?;
    let (id, size_bytes) = find_snapshot(&member.registry.state(), &volume, &target.snapshot)?;
    check_possible(member, volume.id)?;
    let (safety, last) = take_safety(node, member, &volume).await?;
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        let now = record(state, &target.volume)?;
        // The owners need not have carried out one that came after `safety` was begun, and what was
        // written since is in no snapshot.
        if last_rollback(state, volume.id) != last {
            return Err(rolled_back_by_others(&volume));
        }
        let (safety, _) = find_snapshot(state, &now, &safety.snapshot)?;
        let at_unix_ms = member.clock.unix_ms();
        Ok(roll_back(state, volume.id, id, safety, at_unix_ms)?)
    };
    let made = member.registry.update(build).await?;
    member.publish();
    let heard = ask(member, &made.owners, volume.id, made.epoch).await;
    let unheard = made
        .owners
        .iter()
        .zip(heard)
        .filter(|(_, heard)| heard.is_none());
    let now = record(&member.registry.state(), &target.volume)?;
    if size_bytes < now.size_bytes {
        drop_beyond(member, &now, size_bytes).await?;
    }
    Ok(AdminReply::RolledBack(RollbackInfo {
        volume: target.volume.clone(),
        snapshot: target.snapshot.clone(),
        safety: safety.snapshot,
        epoch: made.epoch,
        size_bytes: now.size_bytes,
        snapshot_size_bytes: size_bytes,
        unheard: unheard.map(|(node, _)| *node).collect(),
    }))
}

fn last_rollback(state: &RegistryState, volume: VolumeId) -> Option<Epoch> {
    state.rollback(volume).map(|rollback| rollback.epoch)
}

fn rolled_back_by_others(volume: &VolumeRecord) -> AdminError {
    let text = format!(
        "volume {} is being rolled back by others: try again",
        volume.name
    );
    refused(AdminErrorKind::Conflict, text)
}

/// Takes the snapshot of what the volume was; gives the rollback that was the last one before.
/// Another rollback may take the name of this second first.
async fn take_safety(
    node: &Rc<Node>,
    member: &Member,
    volume: &VolumeRecord,
) -> Result<(SnapshotName, Option<Epoch>), AdminError> {
    for _ in 0..SAFETY_TRIES {
        let now_ms = member.clock.unix_ms();
        let state = member.registry.state();
        let last = last_rollback(&state, volume.id);
        let safety = SnapshotName {
            volume: volume.name.clone(),
            snapshot: safety_name(&state, volume.id, now_ms),
        };
        match snapshot::create(node, member, vec![safety.clone()], None).await {
            Err(error) if error.kind == AdminErrorKind::Exists => catch_up(member).await?,
            taken => return taken.map(|_| (safety, last)),
        }
    }
    Err(rolled_back_by_others(volume))
}

/// Refuses before the safety snapshot is taken what the transaction would refuse after it.
fn check_possible(member: &Member, volume: VolumeId) -> Result<(), AdminError> {
    let state = member.registry.state();
    let lease = state.lease(volume);
    let Some(holder) = lease.holder() else {
        return Ok(());
    };
    let name = state.volume(volume).map(|volume| volume.name.clone());
    let leased = ChangeError::Leased(name.unwrap_or_default(), holder.to_string());
    Err(leased.into())
}

/// A volume that is what a snapshot is.
pub(super) async fn clone(member: &Member, wanted: &VolumeClone) -> Answer {
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        let parent = record(state, &wanted.source.volume)?;
        let (snapshot, _) = find_snapshot(state, &parent, &wanted.source.snapshot)?;
        let now = member.clock.unix_ms();
        let (name, offline) = (&wanted.name, wanted.offline);
        Ok(clone_volume(
            state, parent.id, snapshot, name, now, offline,
        )?)
    };
    let made = member.registry.update(build).await?;
    catch_up(member).await?;
    details_of(member, &made).await
}

/// Goes on with making a clone independent, and says how far it is; to be repeated until it is done.
pub(super) async fn flatten(member: &Member, name: &str) -> Answer {
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        let volume = record(state, name)?;
        let Some(origin) = state.origin(volume.id).cloned() else {
            let text = format!("volume {name} is no clone, or not any more");
            return Err(refused(AdminErrorKind::Conflict, text));
        };
        Ok((begin_flatten(state, volume.id)?, (volume, origin)))
    };
    let (volume, origin) = member.registry.update(build).await?;
    catch_up(member).await?;
    drive(member, &origin).await;
    details_of(member, &volume).await
}

/// Has every owner copy up, and ends the dependence when all have.
pub(in crate::node) async fn drive(member: &Member, origin: &OriginRecord) {
    let state = member.registry.state();
    let Some(volume) = state.volume(origin.volume) else {
        return;
    };
    let nodes: Vec<NodeNo> = owners(&volume.routes).into_keys().collect();
    let heard = ask(member, &nodes, origin.volume, Epoch(0)).await;
    let is_finished = |status: Option<_>| {
        let status: Option<crate::node::lineage::LineageStatus> = status;
        status
            .and_then(|status| status.flatten)
            .is_some_and(|flatten| flatten.finished)
    };
    if !heard.into_iter().all(is_finished) {
        return;
    }
    let build = |state: &RegistryState| -> Result<(Transaction, ()), ChangeError> {
        Ok((end_flatten(state, origin.volume)?, ()))
    };
    match member.registry.update(build).await {
        Ok(()) => tracing::info!(volume = %origin.volume, "clone is independent"),
        Err(error) => tracing::info!(volume = %origin.volume, %error, "flattening is ended later"),
    }
    member.publish();
}
