//! Scheduled snapshots: the registry's leader takes and deletes what `control::schedule` says.

use super::{Member, Node, snapshot};
use crate::admin::{AdminError, AdminErrorKind, AdminReply, SnapshotName};
use crate::control::registry::schedule::note_schedule;
use crate::control::registry::{ChangeError, RegistryState, SnapshotState};
use crate::control::schedule::{RuleProgress, ScheduleAction};
use crate::id::{SnapshotId, VolumeId};
use crate::limits::SCHEDULE_TICK_MS;
use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

/// Volumes for which something is being done.
type Busy = Rc<RefCell<HashSet<VolumeId>>>;

/// Looks at the schedules for ever, while this server leads the registry.
pub(crate) async fn run(node: Rc<Node>) {
    let busy = Busy::default();
    let mut ticks = interval(Duration::from_millis(SCHEDULE_TICK_MS));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        if let Some(member) = node.member()
            && member.registry.status().leader == Some(member.number())
        {
            tick(&node, &member, &busy);
        }
    }
}

fn tick(node: &Rc<Node>, member: &Rc<Member>, busy: &Busy) {
    let state = member.registry.state();
    let now_unix_s = member.clock.unix_ms() / 1000;
    for volume in state.volumes().map(|volume| volume.id) {
        let due = !plan(&state, volume, now_unix_s).is_empty();
        if due && busy.borrow_mut().insert(volume) {
            let (node, member, busy) = (Rc::clone(node), Rc::clone(member), Rc::clone(busy));
            tokio::task::spawn_local(async move {
                serve(&node, &member, volume).await;
                busy.borrow_mut().remove(&volume);
            });
        }
    }
}

fn plan(state: &RegistryState, volume: VolumeId, now_unix_s: u64) -> Vec<ScheduleAction> {
    let schedule = state.settings(volume).schedule();
    if schedule.rules.is_empty() {
        return Vec::new();
    }
    let committed = state
        .snapshots(volume)
        .filter(|snapshot| snapshot.state == SnapshotState::Committed);
    let existing: Vec<_> = committed.map(|s| (s.id, s.name.clone())).collect();
    schedule.plan(&state.schedule_progress(volume), &existing, now_unix_s)
}

/// Carries out what is to do for a volume, by the newest state that a majority has.
async fn serve(node: &Rc<Node>, member: &Member, volume: VolumeId) {
    let Ok(state) = member.registry.barrier().await else {
        return;
    };
    let Some(name) = state.volume(volume).map(|volume| volume.name.clone()) else {
        return;
    };
    for action in plan(&state, volume, member.clock.unix_ms() / 1000) {
        match action {
            ScheduleAction::Take {
                label,
                due_unix_s,
                name: snapshot,
            } => {
                let taken = take(node, member, &name, &snapshot).await;
                let now_unix_s = member.clock.unix_ms() / 1000;
                note(member, volume, &label, |rule| match taken {
                    Ok(id) => rule.taken(due_unix_s, id),
                    Err(error) => rule.failed(now_unix_s, error),
                })
                .await;
            }
            ScheduleAction::Delete {
                label,
                id,
                name: snapshot,
            } => {
                let target = target(&name, &snapshot);
                let deleted = snapshot::delete(member, &target).await;
                note(member, volume, &label, |rule| {
                    if let Err(error) = &deleted {
                        rule.refused(id, format!("{name}@{snapshot} stays: {error}"));
                    }
                })
                .await;
            }
        }
    }
}

fn target(volume: &str, snapshot: &str) -> SnapshotName {
    SnapshotName {
        volume: volume.to_owned(),
        snapshot: snapshot.to_owned(),
    }
}

/// Takes a snapshot, or finds the one that a former leader took and did not note.
async fn take(
    node: &Rc<Node>,
    member: &Member,
    volume: &str,
    snapshot: &str,
) -> Result<SnapshotId, String> {
    let targets = vec![target(volume, snapshot)];
    let taken = snapshot::create(node, member, targets, None).await;
    match taken {
        Ok(AdminReply::Snapshots(taken)) if taken.len() == 1 => Ok(taken[0].id),
        Err(AdminError {
            kind: AdminErrorKind::Exists,
            message,
        }) => {
            let state = member.registry.state();
            let volume = state.volume_by_name(volume).map(|volume| volume.id);
            let found = volume.and_then(|volume| state.snapshot_by_name(volume, snapshot));
            let found = found.filter(|found| found.state == SnapshotState::Committed);
            found.map(|found| found.id).ok_or(message)
        }
        Err(error) => Err(error.message),
        Ok(_) => Err("no snapshot was taken".to_owned()),
    }
}

async fn note(
    member: &Member,
    volume: VolumeId,
    label: &str,
    change: impl FnOnce(&mut RuleProgress) + Clone,
) {
    let build = |state: &RegistryState| -> Result<_, ChangeError> {
        Ok((note_schedule(state, volume, label, change.clone())?, ()))
    };
    if let Err(error) = member.registry.update(build).await {
        tracing::info!(%volume, label, %error, "scheduled snapshot not noted");
    }
}
