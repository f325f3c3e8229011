//! Snapshots on the server that gets the command: it coordinates the owners (S003-22 to S003-29),
//! lists, and deletes.

use super::admin::{catch_up, find_snapshot, no_volume, refused};
use super::peer_server::SnapshotUsages;
use super::{Member, Node, fault};
use crate::admin::{
    AdminError, AdminErrorKind, AdminReply, SnapshotDetails, SnapshotInfo, SnapshotName,
};
use crate::control::registry::change::{
    abort_snapshots, begin_snapshots, commit_snapshots, delete_snapshot, forget_snapshot,
};
use crate::control::registry::{
    ChangeError, RegistryState, SnapshotRecord, SnapshotState, Transaction, VolumeRecord,
};
use crate::control::snapshot::{
    Action, Answer, CommitResult, Coordinator, CoordinatorEvent, Limits, Order, Part, Plan,
    Procedure, UnfinishedWatch, Verdict,
};
use crate::id::{NodeNo, SnapshotId, TicketId, VolumeId};
use crate::io::host::random_u64;
use crate::io::link::{decode_control, encode_control};
use crate::io::wire::{Frame, Kind};
use crate::limits::{
    SNAPSHOT_PARK_MAX_MS, SNAPSHOT_RELEASE_MS, SNAPSHOT_RETRY_MS, SNAPSHOT_TAKEN_MS,
};
use crate::node::registry::{RegistryError, UpdateError};
use crate::planted::{Plant, planted};
use futures_util::future::{Either, LocalBoxFuture, join_all, select};
use futures_util::stream::{FuturesUnordered, StreamExt};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// Tries of a snapshot whose routing table or ticket was overtaken by another change.
const TRIES: usize = 3;

/// How long `snapshot list` waits for a server to count what its snapshots hold.
const USAGE_PATIENCE_MS: u64 = 10_000;

/// Takes one point in time of all targets, by this procedure.
pub(super) async fn create(
    node: &Rc<Node>,
    member: &Member,
    targets: Vec<SnapshotName>,
    procedure: Option<Procedure>,
) -> Result<AdminReply, AdminError> {
    if targets.is_empty() {
        return Err(refused(AdminErrorKind::Invalid, "no VOL@SNAP was named"));
    }
    if let Some(twice) = (1..targets.len()).find(|at| targets[..*at].contains(&targets[*at])) {
        let SnapshotName { volume, snapshot } = &targets[twice];
        let text = format!("{volume}@{snapshot} is named twice");
        return Err(refused(AdminErrorKind::Invalid, text));
    }
    let hold_max_ms = node.config.snapshot_hold_max_ms;
    let mut verdict = run(member, &targets, procedure, limits(hold_max_ms, 0)).await?;
    for again in 1..TRIES {
        match verdict.0 {
            Verdict::Aborted(_) => {
                sleep(Duration::from_millis(SNAPSHOT_RETRY_MS)).await;
                verdict = run(member, &targets, procedure, limits(hold_max_ms, again)).await?;
            }
            Verdict::Committed | Verdict::Unknown => break,
        }
    }
    member.publish();
    match verdict {
        (Verdict::Committed, records) => {
            let state = member.registry.state();
            // Without what they hold: that would be a walk of the table of every owner.
            let infos = records.iter();
            let infos = infos.filter_map(|record| info_with(&state, record, None, None));
            Ok(AdminReply::Snapshots(infos.collect()))
        }
        (Verdict::Aborted(why), _) => Err(refused(
            AdminErrorKind::Conflict,
            format!("no snapshot was taken: {why}; try again"),
        )),
        (Verdict::Unknown, _) => Err(refused(
            AdminErrorKind::Unavailable,
            "the registry did not answer the commit: `snapshot list` shows whether it was taken",
        )),
    }
}

/// That of the volumes, if they agree; else `barrier`, which covers what the others do and makes
/// no write wait.
fn procedure_of(state: &RegistryState, records: &[SnapshotRecord]) -> Procedure {
    let mut wanted = records
        .iter()
        .map(|record| state.settings(record.volume).procedure());
    let first = wanted.next().unwrap_or_default();
    if wanted.all(|other| other == first) {
        first
    } else {
        Procedure::default()
    }
}

/// A barrier that was too short for a server, or for a long request over several pages, is tried
/// again with a longer one.
fn limits(hold_max_ms: u64, again: usize) -> Limits {
    let park_max_ms = SNAPSHOT_PARK_MAX_MS.get(again).copied();
    Limits {
        hold_max_ms,
        park_max_ms: park_max_ms.unwrap_or(hold_max_ms).min(hold_max_ms),
        taken_max_ms: SNAPSHOT_TAKEN_MS,
    }
}

/// One run of the procedure under a new ticket.
async fn run(
    member: &Member,
    targets: &[SnapshotName],
    procedure: Option<Procedure>,
    limits: Limits,
) -> Result<(Verdict, Vec<SnapshotRecord>), AdminError> {
    let random = random_u64();
    let ticket = random.map_err(|error| refused(AdminErrorKind::Internal, error.to_string()))?;
    let ticket = TicketId(ticket);
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        let wanted = targets.iter().map(|target| {
            let volume = state.volume_by_name(&target.volume);
            let volume = volume.ok_or_else(|| no_volume(&target.volume))?;
            Ok((volume.id, target.snapshot.clone()))
        });
        let wanted: Vec<_> = wanted.collect::<Result<_, AdminError>>()?;
        let now_ms = member.clock.unix_ms();
        let (transaction, records) = begin_snapshots(state, &wanted, ticket, now_ms)?;
        let procedure = procedure.unwrap_or_else(|| procedure_of(state, &records));
        Ok((transaction, (records, procedure)))
    };
    let (records, procedure) = member.registry.update_at_once(build).await?;
    member.publish();
    let plans: Vec<Plan> = records.iter().flat_map(plans_of).collect();
    let me = member.number();
    let machine = Coordinator::new(me, ticket, procedure, &plans, limits, 0);
    let verdict = coordinate(member, machine, limits.hold_max_ms, &records).await;
    Ok((verdict, records))
}

/// Drives the coordinator's state machine: its actions out, their results in.
async fn coordinate(
    member: &Member,
    mut machine: Coordinator,
    hold_max_ms: u64,
    records: &[SnapshotRecord],
) -> Verdict {
    let ticket = machine.ticket();
    let started = Instant::now();
    let now_ms = || u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut running = FuturesUnordered::<LocalBoxFuture<'_, Option<CoordinatorEvent>>>::new();
    let mut actions: VecDeque<Action> = machine.step(now_ms(), CoordinatorEvent::Started).into();
    let mut answers = Answers::default();
    loop {
        while let Some(action) = actions.pop_front() {
            match action {
                Action::Send(part, order) => {
                    let patience = Duration::from_millis(patience_ms(order, hold_max_ms));
                    running.push(Box::pin(send(member, ticket, part, order, patience)));
                }
                Action::Commit => running.push(Box::pin(commit(member, records))),
                Action::Discard => running.push(Box::pin(discard(member, records))),
                Action::Finished(verdict) => {
                    tracing::info!(?ticket, ?verdict, took_ms = now_ms(), "snapshot");
                    while running.next().await.is_some() {}
                    return verdict;
                }
            }
        }
        let tick_ms = machine.deadline_ms().unwrap_or(u64::MAX / 2) + 1;
        let tick = started + Duration::from_millis(tick_ms.min(1 << 32));
        let event = match select(running.next(), pin!(sleep_until(tick))).await {
            Either::Left((Some(event), _)) => event,
            Either::Left((None, tick)) => {
                tick.await;
                Some(CoordinatorEvent::Tick)
            }
            Either::Right(_) => Some(CoordinatorEvent::Tick),
        };
        if let Some(event) = event {
            answers.count(&event);
            actions.extend(machine.step(now_ms(), event));
        }
    }
}

/// What the coordinator has heard so far: behind each answer it may die in a test (S003-35).
#[derive(Default)]
struct Answers {
    ready: u32,
    taken: u32,
}

impl Answers {
    fn count(&mut self, event: &CoordinatorEvent) {
        match event {
            CoordinatorEvent::Answer(_, Answer::Ready { .. } | Answer::ReadyAt { .. }) => {
                self.ready += 1;
                fault::point(&format!("snapshot-ready-{}", self.ready));
            }
            CoordinatorEvent::Answer(_, Answer::Taken) => {
                self.taken += 1;
                fault::point(&format!("snapshot-taken-{}", self.taken));
            }
            CoordinatorEvent::CommitDone(CommitResult::Committed) => {
                fault::point("snapshot-committed");
            }
            _ => {}
        }
    }
}

/// S003-23: only servers that own at least one page of the volume are addressed.
fn plans_of(record: &SnapshotRecord) -> impl Iterator<Item = Plan> + '_ {
    record.owners.iter().map(|node| Plan {
        part: Part {
            node: *node,
            volume: record.volume,
        },
        snapshot: record.id,
        epoch: record.epoch,
    })
}

/// How long an answer is waited for: what comes later than the coordinator's deadline is no use.
fn patience_ms(order: Order, hold_max_ms: u64) -> u64 {
    match order {
        Order::Prepare { .. } | Order::PrepareBy(_) => hold_max_ms,
        Order::Take { .. } | Order::TakeAt { .. } => SNAPSHOT_TAKEN_MS,
        Order::Release => SNAPSHOT_RELEASE_MS,
    }
}

async fn send(
    member: &Member,
    ticket: TicketId,
    part: Part,
    order: Order,
    patience: Duration,
) -> Option<CoordinatorEvent> {
    let mut request = Frame::request(Kind::Snapshot, part.volume);
    request.aux = ticket.0;
    request.payload = encode_control(&order);
    let Ok(answer) = timeout(patience, member.call(part.node, request)).await else {
        return Some(CoordinatorEvent::Tick);
    };
    let answer = answer.ok();
    let answer: Option<Answer> = answer.and_then(|reply| decode_control(reply.payload).ok());
    Some(match answer {
        Some(answer) => CoordinatorEvent::Answer(part, answer),
        None => CoordinatorEvent::PeerLost(part.node),
    })
}

async fn commit(member: &Member, records: &[SnapshotRecord]) -> Option<CoordinatorEvent> {
    let build = |state: &RegistryState| -> Result<(Transaction, ()), ChangeError> {
        Ok((commit_snapshots(state, records)?, ()))
    };
    let result = match member.registry.update_at_once(build).await {
        Ok(()) => CommitResult::Committed,
        Err(UpdateError::Registry(RegistryError::UnknownOutcome(_))) => CommitResult::Unknown,
        Err(error) => {
            tracing::warn!(%error, "snapshot not committed");
            CommitResult::Refused
        }
    };
    Some(CoordinatorEvent::CommitDone(result))
}

async fn discard(member: &Member, records: &[SnapshotRecord]) -> Option<CoordinatorEvent> {
    let build = |state: &RegistryState| -> Result<(Transaction, ()), ChangeError> {
        Ok((abort_snapshots(state, records), ()))
    };
    if let Err(error) = member.registry.update(build).await {
        tracing::info!(%error, "pending snapshot is swept later");
    }
    None
}

/// Committed snapshots of one volume or of all.
fn committed<'a>(
    state: &'a RegistryState,
    volume: Option<&str>,
) -> Result<Vec<&'a SnapshotRecord>, AdminError> {
    let volumes: Vec<&VolumeRecord> = match volume {
        None => state.volumes().collect(),
        Some(name) => vec![state.volume_by_name(name).ok_or_else(|| no_volume(name))?],
    };
    let records = volumes.iter().flat_map(|volume| state.snapshots(volume.id));
    let committed = records.filter(|record| record.state == SnapshotState::Committed);
    Ok(committed.collect())
}

/// Committed snapshots with their sizes.
pub(super) async fn list(member: &Member, volume: Option<&str>) -> Result<AdminReply, AdminError> {
    catch_up(member).await?;
    let state = member.registry.state();
    let records = committed(&state, volume)?;
    let infos = join_all(records.iter().map(|record| info(member, &state, record))).await;
    Ok(AdminReply::Snapshots(infos.into_iter().flatten().collect()))
}

/// Committed snapshots with their sizes, and with what may keep them from being deleted or opened.
/// Every owner is asked once for all snapshots of a volume.
pub(super) async fn details(
    member: &Member,
    volume: Option<&str>,
) -> Result<AdminReply, AdminError> {
    catch_up(member).await?;
    let state = member.registry.state();
    let records = committed(&state, volume)?;
    let parts = records.iter().flat_map(|record| {
        let owners = record.owners.iter();
        owners.map(|node| (record.volume, *node))
    });
    let parts: BTreeSet<(VolumeId, NodeNo)> = parts.collect();
    let asked = parts
        .into_iter()
        .map(async |part| (part, usages(member, part).await));
    let usages: HashMap<_, _> = join_all(asked).await.into_iter().collect();
    let details = records.iter().filter_map(|record| {
        let usage = |node: &NodeNo| {
            let usages = usages.get(&(record.volume, *node))?.as_ref()?;
            let found = usages.iter().find(|(id, ..)| *id == record.id);
            Some(found.map_or([0; 3], |(_, bytes)| *bytes))
        };
        let usage: Option<Vec<[u64; 3]>> = record.owners.iter().map(usage).collect();
        let sum = |of: usize| Some(usage.as_ref()?.iter().map(|bytes| bytes[of]).sum());
        Some(SnapshotDetails {
            info: info_with(&state, record, sum(0), sum(1))?,
            used_bytes: sum(2),
            protected: state.is_protected(record.volume, record.id),
            offline: state.is_offline(record.volume, Some(record.id)),
            clones: state.clones(record.volume, Some(record.id)),
        })
    });
    Ok(AdminReply::SnapshotDetails(details.collect()))
}

/// Space of all snapshots of a volume on a server; `None` if it cannot be asked.
async fn usages(member: &Member, (volume, node): (VolumeId, NodeNo)) -> Option<SnapshotUsages> {
    let request = Frame::request(Kind::SnapshotUsages, volume);
    let patience = Duration::from_millis(USAGE_PATIENCE_MS);
    let reply = timeout(patience, member.call(node, request)).await;
    decode_control(reply.ok()?.ok()?.payload).ok()
}

fn info_with(
    state: &RegistryState,
    record: &SnapshotRecord,
    referenced_bytes: Option<u64>,
    unique_bytes: Option<u64>,
) -> Option<SnapshotInfo> {
    Some(SnapshotInfo {
        volume: state.volume(record.volume)?.name.clone(),
        name: record.name.clone(),
        id: record.id,
        size_bytes: record.size_bytes,
        created_unix_ms: record.created_unix_ms,
        referenced_bytes,
        unique_bytes,
    })
}

async fn info(
    member: &Member,
    state: &RegistryState,
    record: &SnapshotRecord,
) -> Option<SnapshotInfo> {
    let asked = record.owners.iter();
    let asked = asked.map(|node| member.usage(*node, record.volume, Some(record.id)));
    let usages = join_all(asked).await;
    let referenced = usages.iter().map(|usage| usage.map(|u| u.referenced_bytes));
    let unique = usages.iter().map(|usage| usage.map(|u| u.unique_bytes));
    info_with(state, record, referenced.sum(), unique.sum())
}

/// Hides a snapshot, drops its parts, and forgets it; owners that are down drop theirs when they
/// return.
pub(super) async fn delete(
    member: &Member,
    target: &SnapshotName,
) -> Result<AdminReply, AdminError> {
    let build = |state: &RegistryState| -> Result<_, AdminError> {
        let volume = state.volume_by_name(&target.volume);
        let volume = volume.ok_or_else(|| no_volume(&target.volume))?;
        let (id, _) = find_snapshot(state, volume, &target.snapshot)?;
        let record = state.snapshot(volume.id, id).cloned();
        let record = record.ok_or_else(|| no_volume(&target.volume))?;
        Ok((delete_snapshot(state, volume.id, id)?, record))
    };
    let record = member.registry.update(build).await?;
    member.publish();
    drop_everywhere(member, &record).await;
    forget(member, record.volume, record.id).await;
    Ok(AdminReply::Done)
}

async fn drop_everywhere(member: &Member, record: &SnapshotRecord) {
    let drops = record.owners.iter().map(|node| {
        let mut request = Frame::request(Kind::SnapshotDrop, record.volume);
        request.snapshot = record.id;
        member.call(*node, request)
    });
    for dropped in join_all(drops).await {
        if let Err(error) = dropped {
            tracing::info!(%error, "space of the snapshot is freed later");
        }
    }
}

/// Removes the record of a snapshot that is being deleted, or was left pending.
pub(super) async fn forget(member: &Member, volume: VolumeId, id: SnapshotId) {
    let build = |state: &RegistryState| -> Result<(Transaction, ()), ChangeError> {
        Ok((forget_snapshot(state, volume, id)?, ()))
    };
    if let Err(error) = member.registry.update(build).await {
        tracing::info!(%volume, %id, %error, "snapshot record is removed later");
    }
}

/// Ends snapshots whose coordinator died: pending, or deleted and not forgotten.
pub(super) async fn sweep_records(member: &Member, watch: &UnfinishedWatch) {
    let state = member.registry.state();
    let records = state
        .volumes()
        .flat_map(|volume| state.snapshots(volume.id));
    for record in records.filter(|record| watch.is_abandoned(record.volume, record.id)) {
        match record.state {
            SnapshotState::Pending if planted(Plant::KeepPending) => {}
            SnapshotState::Pending => {
                discard(member, std::slice::from_ref(record)).await;
            }
            SnapshotState::Deleting => {
                drop_everywhere(member, record).await;
                forget(member, record.volume, record.id).await;
            }
            SnapshotState::Committed => {}
        }
    }
}
