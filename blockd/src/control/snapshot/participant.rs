//! One volume on one server during a snapshot.

use super::{Answer, Order, Preparation, Procedure};
use crate::id::{Epoch, NodeNo, SnapshotId, Stamp, TicketId};
use crate::limits::{SNAPSHOT_HOLD_CAP_MS, SNAPSHOT_TICKETS_KEPT};
use std::collections::VecDeque;

/// What happens to a participant.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ParticipantEvent {
    /// The coordinator of this ticket says something.
    Order(TicketId, Order),
    /// Nothing that the gate refuses is executing any more.
    Quiet {
        /// From [`Output::Close`].
        ticket: TicketId,
        /// Requests that wait at the gate.
        held: u32,
    },
    /// Writes are stamped, or the store could not begin it.
    Stamping {
        /// From [`Output::StampWrites`].
        ticket: TicketId,
        /// What was executed before has an earlier stamp, what is executed later a later one.
        now: Option<Stamp>,
    },
    /// The store has taken the part, or could not.
    Made {
        /// From [`Output::Make`].
        ticket: TicketId,
        /// From [`Output::Make`].
        snapshot: SnapshotId,
        /// Whether it is in the log.
        made: bool,
    },
    /// The part is durable, or the store has failed.
    Synced {
        /// From [`Output::Sync`].
        ticket: TicketId,
        /// Whether it survives power loss.
        synced: bool,
    },
    /// The routing table of the volume changed.
    EpochChanged(Epoch),
    /// Time passed.
    Tick,
}

/// Which changes a volume refuses to begin.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Gate {
    /// Those that take several log records: spans, and large ones within a page.
    Wide,
    /// All.
    All,
}

/// What the server has to do, in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    /// From now on changes wait; report [`ParticipantEvent::Quiet`] when none of them executes.
    Close {
        /// The run of the procedure.
        ticket: TicketId,
        /// Which ones.
        gate: Gate,
    },
    /// From now on every write is told from the others by its stamp; report
    /// [`ParticipantEvent::Stamping`] in the same step.
    StampWrites {
        /// The run of the procedure.
        ticket: TicketId,
    },
    /// Take the part in the log, then report [`ParticipantEvent::Made`] in the same step.
    Make {
        /// The run of the procedure.
        ticket: TicketId,
        /// The snapshot.
        snapshot: SnapshotId,
        /// Of what was stamped before; `None` is of everything until now.
        at: Option<Stamp>,
        /// Park what was executed after it, in the same step.
        park: bool,
    },
    /// Nothing waits, is parked or stamped any more.
    Open,
    /// Make the part durable, then report [`ParticipantEvent::Synced`].
    Sync {
        /// The run of the procedure.
        ticket: TicketId,
    },
    /// Drop a part that was taken.
    Drop {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Answer the coordinator.
    Reply(TicketId, Answer),
}

/// A ticket that is not decided yet: it keeps something waiting.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Run {
    /// The run of the procedure.
    pub ticket: TicketId,
    /// How.
    pub procedure: Procedure,
    /// The server that coordinates; 0 if it did not say.
    pub coordinator: NodeNo,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// When it was begun here.
    pub begun_ms: u64,
    /// It expires when this has passed.
    pub deadline_ms: u64,
    park_max_ms: u64,
}

/// `barrier` makes its part before it is ready, the others after it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Idle,
    /// What was executing is finishing.
    Draining(Run),
    /// The store is taking the part, or is being made ready to stamp.
    Making(Run),
    /// The coordinator has been told.
    Ready(Run),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Decision {
    /// The part is in the log, and nothing waits for it any more.
    Syncing(SnapshotId),
    Taken(SnapshotId),
    Expired,
}

/// The state machine of one volume on one server.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Participant {
    incarnation: u64,
    epoch: Epoch,
    phase: Phase,
    decided: VecDeque<(TicketId, Decision)>,
}

impl Participant {
    /// A volume on which nothing goes on, with this epoch of its routing table. `incarnation` is
    /// another number at every start of the server: without it a repeated prepare after a restart
    /// could begin a second hold that passes for the first one.
    #[must_use]
    pub fn new(epoch: Epoch, incarnation: u64) -> Self {
        let (phase, decided) = (Phase::Idle, VecDeque::new());
        Self {
            incarnation,
            epoch,
            phase,
            decided,
        }
    }

    /// When [`ParticipantEvent::Tick`] is due at the latest, if something waits.
    #[must_use]
    pub fn deadline_ms(&self) -> Option<u64> {
        self.run().map(|run| run.deadline_ms)
    }

    /// The ticket for which something waits.
    #[must_use]
    pub fn run(&self) -> Option<Run> {
        match self.phase {
            Phase::Idle => None,
            Phase::Draining(run) | Phase::Making(run) | Phase::Ready(run) => Some(run),
        }
    }

    /// Whether what the store was asked to do for this ticket is still wanted.
    #[must_use]
    pub fn is_making(&self, ticket: TicketId) -> bool {
        matches!(self.phase, Phase::Making(run) if run.ticket == ticket)
    }

    /// Takes in an event at `now_ms` and says what to do.
    pub fn step(&mut self, now_ms: u64, event: ParticipantEvent) -> Vec<Output> {
        let mut out = Vec::new();
        if self.run().is_some_and(|run| now_ms > run.deadline_ms) {
            self.expire(&mut out);
        }
        match event {
            ParticipantEvent::Order(ticket, order) => self.order(now_ms, ticket, order, &mut out),
            ParticipantEvent::Quiet { ticket, held } => self.quiet(ticket, held, &mut out),
            ParticipantEvent::Stamping { ticket, now } => self.stamping(ticket, now, &mut out),
            ParticipantEvent::Made {
                ticket,
                snapshot,
                made,
            } => self.made(now_ms, ticket, made.then_some(snapshot), &mut out),
            ParticipantEvent::Synced { ticket, synced } => self.synced(ticket, synced, &mut out),
            ParticipantEvent::EpochChanged(epoch) => self.epoch_changed(epoch, &mut out),
            ParticipantEvent::Tick => {}
        }
        out
    }

    fn order(&mut self, now_ms: u64, ticket: TicketId, order: Order, out: &mut Vec<Output>) {
        match order {
            Order::Prepare {
                snapshot,
                epoch,
                hold_max_ms,
            } => {
                let preparation = Preparation {
                    procedure: Procedure::Hold,
                    coordinator: NodeNo(0),
                    snapshot,
                    epoch,
                    hold_max_ms,
                    park_max_ms: 0,
                };
                self.prepare(now_ms, ticket, preparation, out);
            }
            Order::PrepareBy(preparation) => self.prepare(now_ms, ticket, preparation, out),
            Order::Take { incarnation } => self.take(ticket, incarnation, None, out),
            Order::TakeAt { incarnation, at } => self.take(ticket, incarnation, Some(at), out),
            Order::Release => self.release(ticket, out),
        }
    }

    fn prepare(
        &mut self,
        now_ms: u64,
        ticket: TicketId,
        wanted: Preparation,
        out: &mut Vec<Output>,
    ) {
        if let Some(decision) = self.decision(ticket) {
            return reply_decided(ticket, decision, out);
        }
        match self.run() {
            Some(run) if run.ticket == ticket => {}
            Some(_) => out.push(Output::Reply(ticket, Answer::Busy)),
            None if wanted.epoch != self.epoch => {
                out.push(Output::Reply(ticket, Answer::OtherEpoch(self.epoch)));
            }
            None => {
                self.phase = Phase::Draining(new_run(now_ms, ticket, wanted));
                let gate = match wanted.procedure {
                    Procedure::Hold => Gate::All,
                    Procedure::Barrier | Procedure::Stamp => Gate::Wide,
                };
                out.push(Output::Close { ticket, gate });
            }
        }
    }

    fn quiet(&mut self, ticket: TicketId, held: u32, out: &mut Vec<Output>) {
        let run = match self.phase {
            Phase::Draining(run) if run.ticket == ticket => run,
            _ => return out.push(Output::Reply(ticket, Answer::Expired)),
        };
        match run.procedure {
            Procedure::Barrier => self.make(run, None, out),
            Procedure::Hold => {
                self.phase = Phase::Ready(run);
                out.push(Output::Reply(ticket, self.ready(held)));
            }
            Procedure::Stamp => {
                self.phase = Phase::Making(run);
                out.push(Output::StampWrites { ticket });
            }
        }
    }

    fn stamping(&mut self, ticket: TicketId, now: Option<Stamp>, out: &mut Vec<Output>) {
        let answer = match (self.phase, now) {
            (Phase::Making(run), Some(now)) if run.ticket == ticket => {
                self.phase = Phase::Ready(run);
                let incarnation = self.incarnation;
                Answer::ReadyAt { incarnation, now }
            }
            (Phase::Making(run), None) if run.ticket == ticket => {
                self.expire(out);
                Answer::Failed
            }
            _ => Answer::Expired,
        };
        out.push(Output::Reply(ticket, answer));
    }

    fn ready(&self, held: u32) -> Answer {
        Answer::Ready {
            held,
            incarnation: self.incarnation,
        }
    }

    fn make(&mut self, run: Run, at: Option<Stamp>, out: &mut Vec<Output>) {
        self.phase = Phase::Making(run);
        out.push(Output::Make {
            ticket: run.ticket,
            snapshot: run.snapshot,
            at,
            park: run.procedure == Procedure::Barrier,
        });
    }

    fn take(
        &mut self,
        ticket: TicketId,
        incarnation: u64,
        at: Option<Stamp>,
        out: &mut Vec<Output>,
    ) {
        if let Some(decision) = self.decision(ticket) {
            return reply_decided(ticket, decision, out);
        }
        let by_stamp = at.is_some();
        match self.phase {
            _ if incarnation != self.incarnation => {
                out.push(Output::Reply(ticket, Answer::Unknown));
            }
            Phase::Ready(run) if run.ticket == ticket => match run.procedure {
                Procedure::Barrier if !by_stamp => self.let_go(run, out),
                Procedure::Hold if !by_stamp => self.make(run, None, out),
                Procedure::Stamp if by_stamp => self.make(run, at, out),
                _ => out.push(Output::Reply(ticket, Answer::Unknown)),
            },
            Phase::Draining(run) | Phase::Making(run)
                if run.ticket == ticket && !self.was_ready(run) =>
            {
                self.expire(out);
                out.push(Output::Reply(ticket, Answer::Expired));
            }
            Phase::Making(run) if run.ticket == ticket => {}
            _ => out.push(Output::Reply(ticket, Answer::Unknown)),
        }
    }

    /// Whether the coordinator was told `ready` before the phase that `run` is in now.
    fn was_ready(&self, run: Run) -> bool {
        matches!(self.phase, Phase::Making(_)) && run.procedure != Procedure::Barrier
    }

    fn made(
        &mut self,
        now_ms: u64,
        ticket: TicketId,
        made: Option<SnapshotId>,
        out: &mut Vec<Output>,
    ) {
        match self.phase {
            Phase::Making(run) if run.ticket == ticket && made.is_none() => {
                self.expire(out);
                out.push(Output::Reply(ticket, Answer::Failed));
            }
            Phase::Making(run) if run.ticket == ticket => match run.procedure {
                Procedure::Barrier => {
                    let deadline_ms = now_ms.saturating_add(run.park_max_ms);
                    self.phase = Phase::Ready(Run { deadline_ms, ..run });
                    out.push(Output::Reply(ticket, self.ready(0)));
                }
                Procedure::Hold | Procedure::Stamp => self.let_go(run, out),
            },
            _ => {
                out.extend(made.map(|snapshot| Output::Drop { snapshot }));
                out.push(Output::Reply(ticket, Answer::Expired));
            }
        }
    }

    /// The part is in the log: nothing waits any more.
    fn let_go(&mut self, run: Run, out: &mut Vec<Output>) {
        self.decide(run.ticket, Decision::Syncing(run.snapshot), out);
        out.push(Output::Sync { ticket: run.ticket });
    }

    fn synced(&mut self, ticket: TicketId, synced: bool, out: &mut Vec<Output>) {
        let Some(Decision::Syncing(snapshot)) = self.decision(ticket) else {
            return out.push(Output::Reply(ticket, Answer::Expired));
        };
        let (decision, answer) = if synced {
            (Decision::Taken(snapshot), Answer::Taken)
        } else {
            (Decision::Expired, Answer::Failed)
        };
        self.remember(ticket, decision);
        out.push(Output::Reply(ticket, answer));
    }

    fn release(&mut self, ticket: TicketId, out: &mut Vec<Output>) {
        match self.decision(ticket) {
            Some(Decision::Taken(snapshot) | Decision::Syncing(snapshot)) => {
                self.remember(ticket, Decision::Expired);
                out.push(Output::Drop { snapshot });
            }
            Some(Decision::Expired) => {}
            None if self.run().is_some_and(|run| run.ticket == ticket) => self.expire(out),
            None => self.remember(ticket, Decision::Expired),
        }
        out.push(Output::Reply(ticket, Answer::Expired));
    }

    fn epoch_changed(&mut self, epoch: Epoch, out: &mut Vec<Output>) {
        if epoch != self.epoch {
            self.epoch = epoch;
            self.expire(out);
        }
    }

    fn expire(&mut self, out: &mut Vec<Output>) {
        let Some(run) = self.run() else { return };
        let marked = matches!(self.phase, Phase::Ready(_)) && run.procedure == Procedure::Barrier;
        self.decide(run.ticket, Decision::Expired, out);
        if marked {
            out.push(Output::Drop {
                snapshot: run.snapshot,
            });
        }
    }

    /// The only place that ends a run.
    fn decide(&mut self, ticket: TicketId, decision: Decision, out: &mut Vec<Output>) {
        self.remember(ticket, decision);
        self.phase = Phase::Idle;
        out.push(Output::Open);
    }

    fn remember(&mut self, ticket: TicketId, decision: Decision) {
        self.decided.retain(|(decided, _)| *decided != ticket);
        if self.decided.len() >= SNAPSHOT_TICKETS_KEPT {
            self.decided.pop_front();
        }
        self.decided.push_back((ticket, decision));
    }

    fn decision(&self, ticket: TicketId) -> Option<Decision> {
        let found = self.decided.iter().find(|(decided, _)| *decided == ticket);
        found.map(|(_, decision)| *decision)
    }
}

fn new_run(now_ms: u64, ticket: TicketId, wanted: Preparation) -> Run {
    let hold_max_ms = wanted.hold_max_ms.min(SNAPSHOT_HOLD_CAP_MS);
    Run {
        ticket,
        procedure: wanted.procedure,
        coordinator: wanted.coordinator,
        snapshot: wanted.snapshot,
        begun_ms: now_ms,
        deadline_ms: now_ms.saturating_add(hold_max_ms),
        park_max_ms: wanted.park_max_ms.min(SNAPSHOT_HOLD_CAP_MS),
    }
}

/// Whose outcome is not known yet is answered by the order that is being carried out.
fn reply_decided(ticket: TicketId, decision: Decision, out: &mut Vec<Output>) {
    let answer = match decision {
        Decision::Syncing(_) => return,
        Decision::Taken(_) => Answer::Taken,
        Decision::Expired => Answer::Expired,
    };
    out.push(Output::Reply(ticket, answer));
}

#[cfg(test)]
mod tests;
