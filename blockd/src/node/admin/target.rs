//! `VOL` and `VOL@SNAP` as targets: another name, protection, off-line (S001-06).

use super::{Answer, catch_up, find_snapshot, no_volume, refused};
use crate::admin::{AdminError, AdminErrorKind, AdminReply, SnapshotName};
use crate::control::registry::marks::{protect_snapshot, rename_snapshot, set_offline as set_mark};
use crate::control::registry::{Mark, RegistryState, Transaction, split_volume_name};
use crate::id::{SnapshotId, VolumeId};
use crate::node::Member;

fn mark(member: &Member, wanted: bool) -> Option<Mark> {
    wanted.then(|| Mark {
        since_unix_ms: member.clock.unix_ms(),
    })
}

/// Ids of a volume and of its committed snapshot, by their names.
fn find(
    state: &RegistryState,
    target: &SnapshotName,
) -> Result<(VolumeId, SnapshotId), AdminError> {
    let volume = state.volume_by_name(&target.volume);
    let volume = volume.ok_or_else(|| no_volume(&target.volume))?;
    let (id, _) = find_snapshot(state, volume, &target.snapshot)?;
    Ok((volume.id, id))
}

/// One registry transaction, and everything that it changes known here.
async fn change(
    member: &Member,
    build: impl Fn(&RegistryState) -> Result<Transaction, AdminError>,
) -> Answer {
    let build = |state: &RegistryState| Ok::<_, AdminError>((build(state)?, ()));
    member.registry.update(build).await?;
    catch_up(member).await?;
    Ok(AdminReply::Done)
}

pub(super) async fn rename(member: &Member, target: &SnapshotName, new_name: &str) -> Answer {
    change(member, |state| {
        let (volume, id) = find(state, target)?;
        Ok(rename_snapshot(state, volume, id, new_name)?)
    })
    .await
}

pub(super) async fn protect(member: &Member, target: &SnapshotName, protected: bool) -> Answer {
    change(member, |state| {
        let (volume, id) = find(state, target)?;
        Ok(protect_snapshot(
            state,
            volume,
            id,
            mark(member, protected),
        )?)
    })
    .await
}

pub(super) async fn set_offline(member: &Member, target: &str, offline: bool) -> Answer {
    change(member, |state| {
        let (volume, id) = match split_volume_name(target)? {
            (volume, None) => {
                let volume = state
                    .volume_by_name(volume)
                    .ok_or_else(|| no_volume(volume))?;
                (volume.id, None)
            }
            (volume, Some(snapshot)) => {
                let (volume, snapshot) = (volume.to_owned(), snapshot.to_owned());
                let (volume, id) = find(state, &SnapshotName { volume, snapshot })?;
                (volume, Some(id))
            }
        };
        Ok(set_mark(state, volume, id, mark(member, offline))?)
    })
    .await
}

/// Refuses to open what is off-line.
pub(in crate::node) fn check_online(
    state: &RegistryState,
    volume: VolumeId,
    id: Option<SnapshotId>,
    name: &str,
) -> Result<(), AdminError> {
    if !state.is_offline(volume, id) {
        return Ok(());
    }
    let text = format!("{name} is off-line: `blockctl volume online {name}` first");
    Err(refused(AdminErrorKind::Conflict, text))
}
