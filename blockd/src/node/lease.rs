//! Exclusive writer leases on a server: as an owner it confirms lease epochs, as the registry's
//! leader it hears of renewals, ends what has expired and opens what is closed.
//!
//! Costs: an acquire or a release is one registry transaction (a release two), and for each owner
//! one message, one read of the registry's index and one small file that is synced. A renewal is one
//! message to the leader and writes nothing.

use super::lease_file::LeaseFile;
use super::{Member, Node};
use crate::control::lease::{HeldLease, LeaseWatch};
use crate::control::registry::routes::owners;
use crate::control::registry::{
    ChangeError, LeaseEnd, LeaseRecord, LeaseState, RegistryState, Transaction, VolumeRecord, lease,
};
use crate::data::error::DataError;
use crate::data::fence::{Fence, Writers};
use crate::id::{LeaseEpoch, NodeNo, VolumeId};
use crate::io::link::{decode_control, encode_control};
use crate::io::state_dir::StateDir;
use crate::io::wire::{Frame, Kind, Payload, Status};
use crate::limits::{LEASE_CONFIRM_MS, LEASE_TICK_MS};
use futures_util::future::try_join_all;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::collections::HashSet;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout, timeout_at};

/// Time between two tries to reach an owner that shall confirm.
const CONFIRM_PAUSE: Duration = Duration::from_millis(100);

/// What servers say to each other about a lease; the payload of `Kind::Lease`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum LeaseOrder {
    /// To an owner: let nobody write under an earlier epoch, and answer when nobody does.
    Confirm(LeaseEpoch),
    /// To the registry's leader: the holder of this epoch lives.
    Renewed(LeaseEpoch),
}

/// What this server keeps of leases besides the registry.
pub(crate) struct Leases {
    watch: RefCell<LeaseWatch>,
    file: tokio::sync::Mutex<LeaseFile>,
    state: Arc<dyn StateDir>,
    /// Volumes whose lease this server is ending.
    ending: RefCell<HashSet<VolumeId>>,
}

/// The fence that a volume's lease puts up at its owners.
pub(super) fn fence(state: &RegistryState, volume: &VolumeRecord) -> Fence {
    let record = state.lease(volume.id);
    let name = &volume.name;
    let (writers, text) = match &record.state {
        LeaseState::Free => (Writers::All, String::new()),
        LeaseState::Held(holder) => (
            Writers::Holder,
            format!("volume {name} is leased exclusively to {holder}"),
        ),
        LeaseState::Closed(holder, why) => (
            Writers::Nobody,
            format!("volume {name} is closed to writers: the lease of {holder} was {why}"),
        ),
    };
    Fence {
        epoch: record.epoch,
        writers,
        text: text.into(),
    }
}

impl Leases {
    pub(super) fn new(file: LeaseFile, state: Arc<dyn StateDir>) -> Self {
        Self {
            watch: RefCell::default(),
            file: tokio::sync::Mutex::new(file),
            state,
            ending: RefCell::default(),
        }
    }

    /// Carries out an order of another server.
    pub(super) async fn answer(&self, member: &Member, request: &Frame) -> Frame {
        let volume = request.volume;
        let done = match decode_control(request.payload.clone()) {
            Ok(LeaseOrder::Confirm(epoch)) => self.confirm(member, volume, epoch).await,
            Ok(LeaseOrder::Renewed(epoch)) => self.heard(member, volume, epoch).await,
            Err(_) => Err(DataError::Malformed("unreadable lease order")),
        };
        match done {
            Ok(()) => request.answer(Status::Ok, Payload::default()),
            Err(error) => error.reply_to(request),
        }
    }

    /// As an owner: when this returns, no change of an epoch before `epoch` is or will be executed
    /// here, not even after a restart.
    pub(super) async fn confirm(
        &self,
        member: &Member,
        volume: VolumeId,
        epoch: LeaseEpoch,
    ) -> Result<(), DataError> {
        let unavailable = |text: &dyn ToString| DataError::Unavailable(text.to_string());
        let registry = member.registry.barrier().await;
        let registry = registry.map_err(|error| unavailable(&error))?;
        member.publish();
        let state = member.owner().volume(volume).ok_or(DataError::Gone)?;
        if registry.lease(volume).epoch < epoch {
            return Err(unavailable(&"the registry does not have this lease epoch"));
        }
        let limit = Duration::from_millis(LEASE_CONFIRM_MS);
        let fenced = timeout(limit, state.fenced()).await;
        let fenced =
            fenced.map_err(|_| unavailable(&"earlier changes are still being executed"))?;
        let mut file = self.file.lock().await;
        // The newest state: it has every volume that is in the file and was not deleted.
        let newest = member.registry.state();
        let mut next = file.clone();
        if next.confirm(volume, fenced, |volume| newest.volume(volume).is_some()) {
            let state = Arc::clone(&self.state);
            let save = move || next.save(&*state).map(|()| next);
            let saved = self
                .state
                .device()
                .run(save)
                .await
                .map_err(|error| unavailable(&error))?;
            *file = saved.map_err(|error| DataError::Damaged(error.to_string()))?;
        }
        state.confirm_lease(fenced);
        Ok(())
    }

    /// As the registry's leader: the holder lives, if it is the holder.
    pub(super) async fn heard(
        &self,
        member: &Member,
        volume: VolumeId,
        epoch: LeaseEpoch,
    ) -> Result<(), DataError> {
        if !leads(member) {
            let text = "this server does not lead the registry";
            return Err(DataError::Unavailable(text.to_owned()));
        }
        let held = |state: &RegistryState| {
            let record = state.lease(volume);
            record.epoch == epoch && record.holder().is_some()
        };
        if !held(&member.registry.state()) {
            let newest = member.registry.barrier().await;
            let newest = newest.map_err(|error| DataError::Unavailable(error.to_string()))?;
            if !held(&newest) {
                let text = format!(
                    "the lease of epoch {epoch} is over: {}",
                    after(&newest, volume)
                );
                return Err(DataError::Leased(text));
            }
        }
        self.watch.borrow_mut().renewed(volume, epoch);
        Ok(())
    }
}

/// What became of a volume's lease.
fn after(state: &RegistryState, volume: VolumeId) -> String {
    let Some(volume) = state.volume(volume) else {
        return "the volume was deleted".to_owned();
    };
    match fence(state, volume) {
        fence if fence.writers == Writers::All => "the volume is open to all writers".to_owned(),
        fence => fence.text.as_ref().to_owned(),
    }
}

fn leads(member: &Member) -> bool {
    member.registry.status().leader == Some(member.number())
}

/// The frame of an order.
pub(super) fn order(volume: VolumeId, order: LeaseOrder) -> Frame {
    let mut request = Frame::request(Kind::Lease, volume);
    request.payload = encode_control(&order);
    request
}

/// Waits until every owner of the volume has confirmed the epoch of the record.
///
/// # Errors
/// Which one has not, and why.
pub(super) async fn confirmed(member: &Member, record: &LeaseRecord) -> Result<(), String> {
    let state = member.registry.state();
    let Some(volume) = state.volume(record.volume) else {
        return Err("the volume was deleted".to_owned());
    };
    let deadline = Instant::now() + Duration::from_millis(LEASE_CONFIRM_MS);
    let nodes = owners(&volume.routes).into_keys();
    let all = nodes.map(|node| confirmed_by(member, node, record, deadline));
    try_join_all(all).await.map(drop)
}

async fn confirmed_by(
    member: &Member,
    node: NodeNo,
    record: &LeaseRecord,
    deadline: Instant,
) -> Result<(), String> {
    let mut reason = format!("node {node} does not answer");
    loop {
        let request = order(record.volume, LeaseOrder::Confirm(record.epoch));
        match timeout_at(deadline, member.call(node, request)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(error)) => reason = error.message,
            Err(_) => return Err(reason),
        }
        if Instant::now() + CONFIRM_PAUSE >= deadline {
            return Err(reason);
        }
        sleep(CONFIRM_PAUSE).await;
    }
}

/// Opens a volume whose lease was closed, once every owner has confirmed that.
///
/// # Errors
/// What keeps it closed; the registry's leader goes on trying.
pub(super) async fn open(member: &Member, closed: &LeaseRecord) -> Result<(), String> {
    confirmed(member, closed).await?;
    let build = |state: &RegistryState| -> Result<(Transaction, ()), ChangeError> {
        Ok((lease::open(state, closed.volume, closed.epoch)?, ()))
    };
    let opened = member.registry.update(build).await;
    opened.map_err(|error| error.to_string())?;
    // So that no owner refuses others for a moment longer; without it they hear of it a little later.
    let _heard = confirmed(member, closed).await;
    Ok(())
}

/// Watches the leases for ever, while this server leads the registry.
pub(crate) async fn run(node: Rc<Node>) {
    let started = Instant::now();
    let mut ticks = interval(Duration::from_millis(LEASE_TICK_MS));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(member) = node.member() else {
            continue;
        };
        if leads(&member) {
            let now_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
            tick(&member, now_ms);
        } else {
            member.leases.watch.borrow_mut().forget();
        }
    }
}

fn tick(member: &Rc<Member>, now_ms: u64) {
    let state = member.registry.state();
    let held: Vec<HeldLease> = state.leases().filter_map(held).collect();
    let expired = member.leases.watch.borrow_mut().tick(now_ms, &held);
    for lease in expired {
        let why = LeaseEnd::Expired;
        end_once(member, lease.volume, async move |member: Rc<Member>| {
            close(&member, lease.volume, lease.epoch, why).await
        });
    }
    let closed = state.leases();
    for record in closed.filter(|record| matches!(record.state, LeaseState::Closed(..))) {
        let record = record.clone();
        end_once(member, record.volume, async move |member: Rc<Member>| {
            open(&member, &record).await
        });
    }
}

fn held(record: &LeaseRecord) -> Option<HeldLease> {
    Some(HeldLease {
        volume: record.volume,
        epoch: record.epoch,
        ttl_ms: record.holder()?.ttl_ms,
    })
}

async fn close(
    member: &Member,
    volume: VolumeId,
    epoch: LeaseEpoch,
    why: LeaseEnd,
) -> Result<(), String> {
    let build = |state: &RegistryState| lease::close(state, volume, epoch, why);
    let closed = member.registry.update(build).await;
    let closed = closed.map_err(|error| error.to_string())?;
    tracing::warn!(%volume, state = ?closed.state, "lease expired");
    open(member, &closed).await
}

/// Runs one step towards the end of a lease, unless one runs for this volume.
fn end_once<F>(member: &Rc<Member>, volume: VolumeId, step: impl FnOnce(Rc<Member>) -> F + 'static)
where
    F: Future<Output = Result<(), String>> + 'static,
{
    if !member.leases.ending.borrow_mut().insert(volume) {
        return;
    }
    let member = Rc::clone(member);
    tokio::task::spawn_local(async move {
        if let Err(reason) = step(Rc::clone(&member)).await {
            tracing::info!(%volume, reason, "the lease is ended later");
        }
        member.leases.ending.borrow_mut().remove(&volume);
    });
}
