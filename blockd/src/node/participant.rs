//! The snapshot procedure on a server that owns pages: orders in, the owner's gate and the page
//! store moved, answers out.
//!
//! The decisions are those of `control::snapshot::Participant`. The part is taken by one log
//! record, writes go on at once, and `taken` is answered when that record is durable: a snapshot
//! that the registry commits survives power loss of every server.
//!
//! Invariant: between the store's answer that the part is made and the machine's next step nothing
//! else runs. So what is parked is exactly what was executed behind the mark, and no part is made
//! for a ticket that has expired.

use super::{Member, fault};
use crate::admin::HoldInfo;
use crate::control::snapshot::{
    Answer, Gate, Order, Output, Participant, ParticipantEvent, Procedure, Run,
};
use crate::data::cut::Width;
use crate::data::owner::VolumeState;
use crate::data::page_store::{PageStore, StoreError};
use crate::id::{SnapshotId, Stamp, TicketId, VolumeId};
use crate::io::hlc::Hlc;
use crate::io::link::{decode_control, encode_control};
use crate::io::wire::{Frame, Status};
use crate::planted::{Plant, planted};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

/// The participants of all volumes of this server.
#[derive(Clone)]
pub(crate) struct Participants {
    machines: Rc<RefCell<HashMap<VolumeId, Participant>>>,
    store: PageStore,
    hlc: Arc<Hlc>,
    /// Another number at every start of the server: a hold does not survive a restart.
    incarnation: u64,
    started: Instant,
}

impl Participants {
    pub(crate) fn new(store: PageStore, hlc: Arc<Hlc>, incarnation: u64) -> Self {
        Self {
            machines: Rc::default(),
            store,
            hlc,
            incarnation,
            started: Instant::now(),
        }
    }

    /// Carries out an order and answers it.
    pub(crate) async fn answer(&self, member: &Member, request: &Frame) -> Frame {
        let order: Order = match decode_control(request.payload.clone()) {
            Ok(order) => order,
            Err(_) => return request.refuse(Status::Malformed, "unreadable snapshot order"),
        };
        let Some(state) = member.owner().volume(request.volume) else {
            return request.refuse(Status::Gone, "no such volume");
        };
        let ticket = TicketId(request.aux);
        // In a task of its own: an order is carried out to its end also when the coordinator's
        // connection ends, or the machine would wait for ever for what it has asked for.
        let this = self.clone();
        let carried_out = tokio::task::spawn_local(async move {
            let moved = ParticipantEvent::EpochChanged(state.table().epoch);
            this.carry_out(&state, moved).await;
            if matches!(order, Order::Take { .. } | Order::TakeAt { .. }) {
                fault::point("snapshot-taking");
            }
            let event = ParticipantEvent::Order(ticket, order);
            let answer = this.carry_out(&state, event).await;
            if answer == Some(Answer::Taken) {
                fault::point("snapshot-took");
            }
            answer
        });
        let answer = carried_out.await.unwrap_or(Some(Answer::Failed));
        // A repeated order has no answer before the first one has.
        let answer = answer.unwrap_or(Answer::Busy);
        request.answer(Status::Ok, encode_control(&answer))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// One step of the volume's machine. What it opens or closes is so when this returns; the
    /// rest of what it wants is left to be done.
    fn step(&self, state: &VolumeState, event: ParticipantEvent) -> Vec<Output> {
        let mut machines = self.machines.borrow_mut();
        let epoch = state.table().epoch;
        let machine = machines
            .entry(state.id)
            .or_insert_with(|| Participant::new(epoch, self.incarnation));
        let outputs = machine.step(self.now_ms(), event);
        for output in &outputs {
            match output {
                Output::Close { gate, .. } => state.cut.close(width(*gate)),
                Output::Open => self.open(state),
                _ => {}
            }
        }
        outputs
    }

    /// Takes an event to its end: every output done, its result reported, until nothing is left.
    async fn carry_out(&self, state: &Rc<VolumeState>, event: ParticipantEvent) -> Option<Answer> {
        let mut outputs = VecDeque::from(self.step(state, event));
        let mut answer = None;
        while let Some(output) = outputs.pop_front() {
            let event = match output {
                Output::Close { ticket, gate } => self.drain(state, ticket, gate).await,
                Output::StampWrites { ticket } => self.split_eras(state, ticket).await,
                Output::Make {
                    ticket,
                    snapshot,
                    at,
                    park,
                } => {
                    let made = self.make(state, ticket, snapshot, at, park).await;
                    ParticipantEvent::Made {
                        ticket,
                        snapshot,
                        made,
                    }
                }
                Output::Sync { ticket } => {
                    let synced =
                        planted(Plant::TakenBeforeSync) || self.store.flush().await.is_ok();
                    ParticipantEvent::Synced { ticket, synced }
                }
                Output::Drop { snapshot } => {
                    self.drop_part(state.id, snapshot);
                    continue;
                }
                Output::Reply(_, reply) => {
                    answer = Some(reply);
                    continue;
                }
                Output::Open => continue,
            };
            outputs.extend(self.step(state, event));
            if matches!(event, ParticipantEvent::Made { .. }) && state.cut.mark().is_some() {
                self.expire_later(state);
                self.sync_early();
            }
        }
        answer
    }

    /// A mark is made durable while it goes round, so that `take` finds it done.
    fn sync_early(&self) {
        if planted(Plant::TakenBeforeSync) {
            return;
        }
        let store = self.store.clone();
        tokio::task::spawn_local(async move { store.flush().await });
    }

    async fn drain(
        &self,
        state: &Rc<VolumeState>,
        ticket: TicketId,
        gate: Gate,
    ) -> ParticipantEvent {
        let deadline = self.expire_later(state);
        match timeout_at(deadline, state.cut.quiet(width(gate))).await {
            Ok(()) => ParticipantEvent::Quiet {
                ticket,
                held: state.cut.waiting(),
            },
            Err(_) => ParticipantEvent::Tick,
        }
    }

    /// Takes the part while its ticket wants it; a full log frees itself within milliseconds.
    async fn make(
        &self,
        state: &Rc<VolumeState>,
        ticket: TicketId,
        snapshot: SnapshotId,
        at: Option<Stamp>,
        park: bool,
    ) -> bool {
        while self.is_making(state.id, ticket) {
            match self.take(state, snapshot, at) {
                Ok(()) => {
                    if park {
                        state.cut.park(snapshot);
                    }
                    return true;
                }
                Err(MakeError::Store(StoreError::LogFull)) => {
                    sleep(Duration::from_millis(1)).await;
                }
                Err(error) => {
                    tracing::error!(volume = %state.id, %error, "snapshot not taken");
                    return false;
                }
            }
        }
        false
    }

    /// Stamps writes while the ticket wants it.
    async fn split_eras(&self, state: &Rc<VolumeState>, ticket: TicketId) -> ParticipantEvent {
        let mut now = None;
        while self.is_making(state.id, ticket) {
            match self.store.split_eras(state.id) {
                Ok(before) => {
                    state.cut.begin_stamps(before);
                    now = Some(self.hlc.tick());
                    break;
                }
                Err(StoreError::LogFull) => sleep(Duration::from_millis(1)).await,
                Err(error) => {
                    tracing::error!(volume = %state.id, %error, "writes cannot be stamped");
                    break;
                }
            }
        }
        ParticipantEvent::Stamping { ticket, now }
    }

    /// S003-44: what was stamped before `at` has been executed, as a write is stamped then; what is
    /// executed from now on gets a later stamp.
    fn take(
        &self,
        state: &VolumeState,
        snapshot: SnapshotId,
        at: Option<Stamp>,
    ) -> Result<(), MakeError> {
        let Some(at) = at else {
            return Ok(self.store.take_snapshot(state.id, snapshot)?);
        };
        self.hlc.observe(at);
        if self.hlc.tick() < at {
            return Err(MakeError::Clock(at));
        }
        let era = state.cut.era_before(at).ok_or(MakeError::NotStamped)?;
        Ok(self.store.take_snapshot_at(state.id, snapshot, era)?)
    }

    fn open(&self, state: &VolumeState) {
        let split = state.cut.is_stamping();
        state.cut.open();
        if split {
            let (joined, volume) = (self.store.join_eras(state.id), state.id);
            tokio::task::spawn_local(async move {
                if let Err(error) = joined.await {
                    tracing::info!(%volume, %error, "eras are merged at the next start");
                }
            });
        }
    }

    fn is_making(&self, volume: VolumeId, ticket: TicketId) -> bool {
        let machines = self.machines.borrow();
        let machine = machines.get(&volume);
        machine.is_some_and(|machine| machine.is_making(ticket))
    }

    /// Lets the run end at its deadline, whatever becomes of the coordinator (U-08).
    fn expire_later(&self, state: &Rc<VolumeState>) -> Instant {
        let deadline_ms = self.run(state.id).map_or(0, |run| run.deadline_ms);
        let deadline = self.started + Duration::from_millis(deadline_ms + 1);
        let this = self.clone();
        let state = Rc::clone(state);
        tokio::task::spawn_local(async move {
            sleep_until(deadline).await;
            if planted(Plant::HoldForever) {
                return;
            }
            this.carry_out(&state, ParticipantEvent::Tick).await;
        });
        deadline
    }

    fn run(&self, volume: VolumeId) -> Option<Run> {
        self.machines
            .borrow()
            .get(&volume)
            .and_then(Participant::run)
    }

    /// What waits on this server for a snapshot.
    pub(crate) fn holds(&self, member: &Member) -> Vec<HoldInfo> {
        let machines = self.machines.borrow();
        let runs = machines.iter().filter_map(|(id, machine)| {
            let state = member.owner().volume(*id)?;
            Some((state, machine.run()?))
        });
        runs.map(|(state, run)| self.hold(member, &state, &run))
            .collect()
    }

    fn hold(&self, member: &Member, state: &VolumeState, run: &Run) -> HoldInfo {
        let now_ms = self.now_ms();
        let what = match run.procedure {
            Procedure::Barrier => "requests over several pages wait, completions are parked",
            Procedure::Hold => "changes wait",
            Procedure::Stamp => "requests over several pages wait",
        };
        HoldInfo {
            volume: state.id,
            server: member.number(),
            ticket: run.ticket,
            coordinator: run.coordinator,
            reason: format!("snapshot {} by {}: {what}", run.snapshot, run.procedure),
            age_ms: now_ms.saturating_sub(run.begun_ms),
            left_ms: Some(run.deadline_ms.saturating_sub(now_ms)),
            waiting: state.cut.waiting(),
            parked: state.cut.parked(),
        }
    }

    /// In the background: space is freed group by group.
    fn drop_part(&self, volume: VolumeId, snapshot: SnapshotId) {
        let store = self.store.clone();
        tokio::task::spawn_local(async move {
            if let Err(error) = store.delete_snapshot(volume, snapshot).await {
                tracing::info!(%volume, %snapshot, %error, "aborted snapshot is swept later");
            }
        });
    }
}

/// Why a part is not made.
#[derive(Debug, thiserror::Error)]
enum MakeError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the clock of this server cannot follow to {0}: set the clocks of the servers right")]
    Clock(Stamp),
    #[error("the writes are not stamped")]
    NotStamped,
}

fn width(gate: Gate) -> Width {
    match gate {
        Gate::Wide => Width::Wide,
        Gate::All => Width::Narrow,
    }
}
