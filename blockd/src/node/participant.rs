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
        let answer = match order {
            Order::Prepare { .. } => self.prepare(&state, ticket, order).await,
            Order::Take { .. } => self.take(&state, ticket, order).await,
            Order::Release => self.release(&state, ticket).await,
        };
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

    async fn prepare(&self, state: &Rc<VolumeState>, ticket: TicketId, order: Order) -> Answer {
        self.step(state, ParticipantEvent::EpochChanged(state.table().epoch));
        let executing = state.executing();
        for _ in 0..executing {
            self.step(state, ParticipantEvent::WriteArrived);
        }
        let outputs = self.step(state, ParticipantEvent::Order(ticket, order));
        let holding = outputs.contains(&Output::HoldWrites);
        if let (false, Some(answer)) = (holding && executing > 0, reply(&outputs)) {
            self.finish_writes(state, executing);
            return answer;
        }
        let deadline = self.expire_later(state);
        let quiet = timeout_at(deadline, state.quiet()).await.is_ok();
        for _ in 0..state.waiting() {
            self.step(state, ParticipantEvent::WriteArrived);
        }
        let outputs = self.finish_writes(state, executing);
        reply(&outputs).filter(|_| quiet).unwrap_or(Answer::Expired)
    }

    fn finish_writes(&self, state: &VolumeState, count: u32) -> Vec<Output> {
        let finish = |_| self.step(state, ParticipantEvent::WriteFinished);
        (0..count).flat_map(finish).collect()
    }

    /// Lets the hold end at its deadline, whatever becomes of the coordinator (U-08).
    fn expire_later(&self, state: &Rc<VolumeState>) -> Instant {
        let machines = self.machines.borrow();
        let deadline_ms = machines.get(&state.id).and_then(Participant::deadline_ms);
        let deadline = self.started + Duration::from_millis(deadline_ms.unwrap_or(0) + 1);
        drop(machines);
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
        let made = self.make(state.id, snapshot).await;
        if let Err(error) = &made {
            tracing::error!(volume = %state.id, %error, "snapshot not taken");
        }
        let event = ParticipantEvent::SnapshotMade {
            ticket,
            snapshot,
            made: made.is_ok(),
        };
        let outputs = self.step(state, event);
        match self.store.flush().await {
            Ok(()) => reply(&outputs).unwrap_or(Answer::Failed),
            Err(_) => Answer::Failed,
        }
    }

    /// Takes the part; a full log frees itself within milliseconds, and the hold has a deadline.
    async fn make(&self, volume: VolumeId, snapshot: SnapshotId) -> Result<(), StoreError> {
        loop {
            match self.store.take_snapshot(volume, snapshot) {
                Err(StoreError::LogFull) => sleep(Duration::from_millis(1)).await,
                made => return made,
            }
        }
    }

    async fn release(&self, state: &VolumeState, ticket: TicketId) -> Answer {
        let outputs = self.step(state, ParticipantEvent::Order(ticket, Order::Release));
        for output in outputs {
            if let Output::DropSnapshot { snapshot } = output {
                self.drop_part(state.id, snapshot).await;
            }
        }
        Answer::Expired
    }

    async fn drop_part(&self, volume: VolumeId, snapshot: SnapshotId) {
        if let Err(error) = self.store.delete_snapshot(volume, snapshot).await {
            tracing::info!(%volume, %snapshot, %error, "aborted snapshot is swept later");
        }
    }
}

fn reply(outputs: &[Output]) -> Option<Answer> {
    outputs.iter().find_map(|output| match output {
        Output::Reply(_, answer) => Some(*answer),
        _ => None,
    })
}
