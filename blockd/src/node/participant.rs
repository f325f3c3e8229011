//! The snapshot procedure on a server that owns pages: orders in, the owner's gate and the page
//! store moved, answers out.
//!
//! The decisions are those of `control::snapshot::Participant`. The part is taken by one log
//! record, writes go on at once, and `taken` is answered when that record is durable: a snapshot
//! that the registry commits survives power loss of every server.

use super::Member;
use crate::control::snapshot::{Answer, Order, Output, Participant, ParticipantEvent};
use crate::data::owner::VolumeState;
use crate::data::page_store::{PageStore, StoreError};
use crate::id::{SnapshotId, TicketId, VolumeId};
use crate::io::link::{decode_control, encode_control};
use crate::io::wire::{Frame, Status};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

/// The participants of all volumes of this server.
#[derive(Clone)]
pub(crate) struct Participants {
    machines: Rc<RefCell<HashMap<VolumeId, Participant>>>,
    store: PageStore,
    /// Another number at every start of the server: a hold does not survive a restart.
    incarnation: u64,
    started: Instant,
}

impl Participants {
    pub(crate) fn new(store: PageStore, incarnation: u64) -> Self {
        Self {
            machines: Rc::default(),
            store,
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
        // connection ends, or the machine would wait for ever for writes that finished.
        let this = self.clone();
        let carried_out = tokio::task::spawn_local(async move {
            match order {
                Order::Prepare { .. } => this.prepare(&state, ticket, order).await,
                Order::Take { .. } => this.take(&state, ticket, order).await,
                Order::Release => this.release(&state, ticket).await,
            }
        });
        let answer = carried_out.await.unwrap_or(Answer::Failed);
        request.answer(Status::Ok, encode_control(&answer))
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// One step of the volume's machine; the writes that it releases are counted by the gate.
    fn step(&self, state: &VolumeState, event: ParticipantEvent) -> Vec<Output> {
        let now_ms = self.now_ms();
        let mut machines = self.machines.borrow_mut();
        let epoch = state.table().epoch;
        let machine = machines
            .entry(state.id)
            .or_insert_with(|| Participant::new(epoch, self.incarnation));
        let outputs = machine.step(now_ms, event);
        for output in &outputs {
            match output {
                Output::HoldWrites => state.hold(),
                Output::ReleaseWrites { count } => {
                    state.release();
                    for _ in 0..*count {
                        machine.step(now_ms, ParticipantEvent::WriteFinished);
                    }
                }
                _ => {}
            }
        }
        outputs
    }

    /// The gate counts the writes; the machine hears of those that execute as of one.
    async fn prepare(&self, state: &Rc<VolumeState>, ticket: TicketId, order: Order) -> Answer {
        self.step(state, ParticipantEvent::EpochChanged(state.table().epoch));
        let draining = self.deadline_ms(state).is_none() && state.executing() > 0;
        if draining {
            self.step(state, ParticipantEvent::WriteArrived);
        }
        let prepared = self.step(state, ParticipantEvent::Order(ticket, order));
        if !prepared.contains(&Output::HoldWrites) {
            if draining {
                self.step(state, ParticipantEvent::WriteFinished);
            }
            return reply(&prepared).unwrap_or(Answer::Busy);
        }
        let deadline = self.expire_later(state);
        if !draining {
            return reply(&prepared).unwrap_or(Answer::Failed);
        }
        let quiet = timeout_at(deadline, state.quiet()).await.is_ok();
        for _ in 0..state.waiting() {
            let arrived = self.step(state, ParticipantEvent::WriteArrived);
            if arrived.contains(&Output::StartWrite) {
                self.step(state, ParticipantEvent::WriteFinished);
            }
        }
        let drained = self.step(state, ParticipantEvent::WriteFinished);
        reply(&drained).filter(|_| quiet).unwrap_or(Answer::Expired)
    }

    fn deadline_ms(&self, state: &VolumeState) -> Option<u64> {
        let machines = self.machines.borrow();
        machines.get(&state.id).and_then(Participant::deadline_ms)
    }

    /// Lets the hold end at its deadline, whatever becomes of the coordinator (U-08).
    fn expire_later(&self, state: &Rc<VolumeState>) -> Instant {
        let deadline_ms = self.deadline_ms(state).unwrap_or_default();
        let deadline = self.started + Duration::from_millis(deadline_ms + 1);
        let this = self.clone();
        let state = Rc::clone(state);
        tokio::task::spawn_local(async move {
            sleep_until(deadline).await;
            this.step(&state, ParticipantEvent::Tick);
        });
        deadline
    }

    async fn take(&self, state: &VolumeState, ticket: TicketId, order: Order) -> Answer {
        let outputs = self.step(state, ParticipantEvent::Order(ticket, order));
        let wanted = outputs.iter().find_map(|output| match output {
            Output::MakeSnapshot { snapshot, .. } => Some(*snapshot),
            _ => None,
        });
        let Some(snapshot) = wanted else {
            return reply(&outputs).unwrap_or(Answer::Unknown);
        };
        let deadline_ms = self.deadline_ms(state).unwrap_or_default();
        let made = self.make(state.id, snapshot, deadline_ms).await;
        if let Err(error) = &made {
            tracing::error!(volume = %state.id, %error, "snapshot not taken");
        }
        let event = ParticipantEvent::SnapshotMade {
            ticket,
            snapshot,
            made: made.is_ok(),
        };
        let outputs = self.step(state, event);
        self.drop_parts(state.id, &outputs).await;
        match self.store.flush().await {
            Ok(()) => reply(&outputs).unwrap_or(Answer::Failed),
            Err(_) => Answer::Failed,
        }
    }

    /// Takes the part; a full log frees itself within milliseconds.
    async fn make(
        &self,
        volume: VolumeId,
        snapshot: SnapshotId,
        deadline_ms: u64,
    ) -> Result<(), StoreError> {
        loop {
            match self.store.take_snapshot(volume, snapshot) {
                Err(StoreError::LogFull) if self.now_ms() < deadline_ms => {
                    sleep(Duration::from_millis(1)).await;
                }
                made => return made,
            }
        }
    }

    async fn release(&self, state: &VolumeState, ticket: TicketId) -> Answer {
        let outputs = self.step(state, ParticipantEvent::Order(ticket, Order::Release));
        self.drop_parts(state.id, &outputs).await;
        Answer::Expired
    }

    async fn drop_parts(&self, volume: VolumeId, outputs: &[Output]) {
        for output in outputs {
            if let Output::DropSnapshot { snapshot } = output
                && let Err(error) = self.store.delete_snapshot(volume, *snapshot).await
            {
                tracing::info!(%volume, %snapshot, %error, "aborted snapshot is swept later");
            }
        }
    }
}

fn reply(outputs: &[Output]) -> Option<Answer> {
    outputs.iter().find_map(|output| match output {
        Output::Reply(_, answer) => Some(*answer),
        _ => None,
    })
}
