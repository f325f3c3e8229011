//! One volume on one server during a snapshot.

use super::{Answer, Order};
use crate::id::{Epoch, SnapshotId, TicketId};
use crate::limits::{SNAPSHOT_HOLD_CAP_MS, SNAPSHOT_TICKETS_KEPT};
use std::collections::VecDeque;

/// What happens to a participant.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ParticipantEvent {
    /// The coordinator of this ticket says something.
    Order(TicketId, Order),
    /// A write wants to begin; the answer is [`Output::StartWrite`] or [`Output::ParkWrite`].
    WriteArrived,
    /// A write that was started is done, well or not.
    WriteFinished,
    /// The store has durably taken the part, or could not.
    SnapshotMade {
        /// From [`Output::MakeSnapshot`].
        ticket: TicketId,
        /// From [`Output::MakeSnapshot`].
        snapshot: SnapshotId,
        /// Whether it is there.
        made: bool,
    },
    /// The routing table of the volume changed.
    EpochChanged(Epoch),
    /// Time passed.
    Tick,
}

/// What the server has to do, in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Output {
    /// Let the write that arrived begin.
    StartWrite,
    /// Keep the write that arrived until [`Output::ReleaseWrites`].
    ParkWrite,
    /// From now on writes are parked.
    HoldWrites,
    /// Begin all parked writes; they count as started.
    ReleaseWrites {
        /// How many.
        count: u32,
    },
    /// Take the part of the snapshot, then report [`ParticipantEvent::SnapshotMade`].
    MakeSnapshot {
        /// The run of the procedure.
        ticket: TicketId,
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Drop a part that was taken.
    DropSnapshot {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// Answer the coordinator of the ticket.
    Reply(TicketId, Answer),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Hold {
    ticket: TicketId,
    snapshot: SnapshotId,
    deadline_ms: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    Idle,
    /// Writes that were executing are finishing.
    Draining(Hold),
    /// Nothing executes.
    Ready(Hold),
    /// The store is taking the part.
    Taking(Hold),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Decision {
    Taken(SnapshotId),
    Expired,
}

/// The state machine of one volume on one server.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Participant {
    incarnation: u64,
    epoch: Epoch,
    executing: u32,
    held: u32,
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
            executing: 0,
            held: 0,
            phase,
            decided,
        }
    }

    /// When [`ParticipantEvent::Tick`] is due at the latest, if writes are held.
    #[must_use]
    pub fn deadline_ms(&self) -> Option<u64> {
        self.hold().map(|hold| hold.deadline_ms)
    }

    /// Writes held at the moment.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.held
    }

    /// Takes in an event at `now_ms` and says what to do.
    pub fn step(&mut self, now_ms: u64, event: ParticipantEvent) -> Vec<Output> {
        let mut out = Vec::new();
        if self.hold().is_some_and(|hold| now_ms > hold.deadline_ms) {
            self.expire(&mut out);
        }
        match event {
            ParticipantEvent::Order(ticket, order) => self.order(now_ms, ticket, order, &mut out),
            ParticipantEvent::WriteArrived => out.push(self.write_arrived()),
            ParticipantEvent::WriteFinished => {
                self.executing = self.executing.saturating_sub(1);
                self.check_ready(&mut out);
            }
            ParticipantEvent::SnapshotMade {
                ticket,
                snapshot,
                made,
            } => {
                self.snapshot_made(ticket, snapshot, made, &mut out);
            }
            ParticipantEvent::EpochChanged(epoch) => self.epoch_changed(epoch, &mut out),
            ParticipantEvent::Tick => {}
        }
        out
    }

    fn hold(&self) -> Option<Hold> {
        match self.phase {
            Phase::Idle => None,
            Phase::Draining(hold) | Phase::Ready(hold) | Phase::Taking(hold) => Some(hold),
        }
    }

    fn write_arrived(&mut self) -> Output {
        if self.phase == Phase::Idle {
            self.executing += 1;
            return Output::StartWrite;
        }
        self.held += 1;
        Output::ParkWrite
    }

    fn order(&mut self, now_ms: u64, ticket: TicketId, order: Order, out: &mut Vec<Output>) {
        match order {
            Order::Prepare {
                snapshot,
                epoch,
                hold_max_ms,
            } => {
                let deadline_ms = now_ms.saturating_add(hold_max_ms.min(SNAPSHOT_HOLD_CAP_MS));
                self.prepare(
                    Hold {
                        ticket,
                        snapshot,
                        deadline_ms,
                    },
                    epoch,
                    out,
                );
            }
            Order::Take { incarnation } => self.take(ticket, incarnation, out),
            Order::Release => self.release(ticket, out),
        }
    }

    fn prepare(&mut self, hold: Hold, epoch: Epoch, out: &mut Vec<Output>) {
        if let Some(decision) = self.decision(hold.ticket) {
            return out.push(Output::Reply(hold.ticket, answer_of(decision)));
        }
        match self.hold() {
            Some(current) if current.ticket == hold.ticket => self.reply_if_ready(out),
            Some(_) => out.push(Output::Reply(hold.ticket, Answer::Busy)),
            None if epoch != self.epoch => {
                out.push(Output::Reply(hold.ticket, Answer::OtherEpoch(self.epoch)));
            }
            None => {
                self.phase = Phase::Draining(hold);
                out.push(Output::HoldWrites);
                self.check_ready(out);
            }
        }
    }

    fn check_ready(&mut self, out: &mut Vec<Output>) {
        if let (Phase::Draining(hold), 0) = (self.phase, self.executing) {
            self.phase = Phase::Ready(hold);
            self.reply_if_ready(out);
        }
    }

    fn reply_if_ready(&self, out: &mut Vec<Output>) {
        if let Phase::Ready(hold) = self.phase {
            out.push(Output::Reply(
                hold.ticket,
                Answer::Ready {
                    held: self.held,
                    incarnation: self.incarnation,
                },
            ));
        }
    }

    fn take(&mut self, ticket: TicketId, incarnation: u64, out: &mut Vec<Output>) {
        if let Some(decision) = self.decision(ticket) {
            return out.push(Output::Reply(ticket, answer_of(decision)));
        }
        match self.phase {
            _ if incarnation != self.incarnation => {
                out.push(Output::Reply(ticket, Answer::Unknown));
            }
            Phase::Ready(hold) if hold.ticket == ticket => {
                self.phase = Phase::Taking(hold);
                out.push(Output::MakeSnapshot {
                    ticket,
                    snapshot: hold.snapshot,
                });
            }
            Phase::Taking(hold) if hold.ticket == ticket => {}
            Phase::Draining(hold) if hold.ticket == ticket => {
                self.expire(out);
                out.push(Output::Reply(ticket, Answer::Expired));
            }
            _ => out.push(Output::Reply(ticket, Answer::Unknown)),
        }
    }

    fn snapshot_made(
        &mut self,
        ticket: TicketId,
        snapshot: SnapshotId,
        made: bool,
        out: &mut Vec<Output>,
    ) {
        match self.phase {
            Phase::Taking(hold) if hold.ticket == ticket => {
                let decision = if made {
                    Decision::Taken(snapshot)
                } else {
                    Decision::Expired
                };
                self.decide(ticket, decision, out);
                let answer = if made { Answer::Taken } else { Answer::Failed };
                out.push(Output::Reply(ticket, answer));
            }
            _ if made => {
                out.push(Output::DropSnapshot { snapshot });
                out.push(Output::Reply(ticket, Answer::Expired));
            }
            _ => out.push(Output::Reply(ticket, Answer::Expired)),
        }
    }

    fn release(&mut self, ticket: TicketId, out: &mut Vec<Output>) {
        match self.decision(ticket) {
            Some(Decision::Taken(snapshot)) => {
                self.decided.retain(|(decided, _)| *decided != ticket);
                self.remember(ticket, Decision::Expired);
                out.push(Output::DropSnapshot { snapshot });
            }
            Some(Decision::Expired) => {}
            None if self.hold().is_some_and(|hold| hold.ticket == ticket) => self.expire(out),
            None => self.remember(ticket, Decision::Expired),
        }
    }

    fn epoch_changed(&mut self, epoch: Epoch, out: &mut Vec<Output>) {
        if epoch != self.epoch {
            self.epoch = epoch;
            self.expire(out);
        }
    }

    fn expire(&mut self, out: &mut Vec<Output>) {
        if let Some(hold) = self.hold() {
            self.decide(hold.ticket, Decision::Expired, out);
        }
    }

    /// The only place that ends a hold.
    fn decide(&mut self, ticket: TicketId, decision: Decision, out: &mut Vec<Output>) {
        self.remember(ticket, decision);
        self.phase = Phase::Idle;
        self.executing += self.held;
        out.push(Output::ReleaseWrites {
            count: std::mem::take(&mut self.held),
        });
    }

    fn remember(&mut self, ticket: TicketId, decision: Decision) {
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

fn answer_of(decision: Decision) -> Answer {
    match decision {
        Decision::Taken(_) => Answer::Taken,
        Decision::Expired => Answer::Expired,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const T: TicketId = TicketId(7);
    const S: SnapshotId = SnapshotId(3);
    const E: Epoch = Epoch(5);
    const I: u64 = 11;

    fn prepare(hold_max_ms: u64) -> ParticipantEvent {
        ParticipantEvent::Order(
            T,
            Order::Prepare {
                snapshot: S,
                epoch: E,
                hold_max_ms,
            },
        )
    }

    fn order(order: Order) -> ParticipantEvent {
        ParticipantEvent::Order(T, order)
    }

    /// Runs a table of (time, event, expected outputs).
    fn run(p: &mut Participant, table: &[(u64, ParticipantEvent, &[Output])]) {
        for (row, (now, event, want)) in table.iter().enumerate() {
            assert_eq!(p.step(*now, *event), *want, "row {row}: {event:?}");
        }
    }

    /// S003-36, 37: ready only when nothing executes, with the number of writes held.
    #[test]
    fn fig_7_holds_drains_takes_and_releases() {
        use ParticipantEvent::{SnapshotMade, WriteArrived, WriteFinished};
        let made = SnapshotMade {
            ticket: T,
            snapshot: S,
            made: true,
        };
        run(
            &mut Participant::new(E, I),
            &[
                (0, WriteArrived, &[Output::StartWrite]),
                (1, prepare(100), &[Output::HoldWrites]),
                (2, WriteArrived, &[Output::ParkWrite]),
                (
                    3,
                    WriteFinished,
                    &[Output::Reply(
                        T,
                        Answer::Ready {
                            held: 1,
                            incarnation: I,
                        },
                    )],
                ),
                (
                    4,
                    order(Order::Take { incarnation: I }),
                    &[Output::MakeSnapshot {
                        ticket: T,
                        snapshot: S,
                    }],
                ),
                (5, WriteArrived, &[Output::ParkWrite]),
                (
                    6,
                    made,
                    &[
                        Output::ReleaseWrites { count: 2 },
                        Output::Reply(T, Answer::Taken),
                    ],
                ),
                (
                    7,
                    order(Order::Take { incarnation: I }),
                    &[Output::Reply(T, Answer::Taken)],
                ),
                (8, WriteArrived, &[Output::StartWrite]),
                (
                    9,
                    order(Order::Release),
                    &[Output::DropSnapshot { snapshot: S }],
                ),
                (
                    10,
                    order(Order::Take { incarnation: I }),
                    &[Output::Reply(T, Answer::Expired)],
                ),
            ],
        );
    }

    #[test]
    fn a_take_after_the_deadline_is_expired_whether_or_not_a_tick_came() {
        let released = Output::ReleaseWrites { count: 0 };
        let expired = Output::Reply(T, Answer::Expired);
        for tick in [false, true] {
            let mut p = Participant::new(E, I);
            p.step(0, prepare(100));
            assert_eq!(p.step(100, ParticipantEvent::Tick), []);
            if tick {
                assert_eq!(p.step(101, ParticipantEvent::Tick), [released]);
                assert_eq!(
                    p.step(102, order(Order::Take { incarnation: I })),
                    [expired]
                );
            } else {
                assert_eq!(
                    p.step(102, order(Order::Take { incarnation: I })),
                    [released, expired]
                );
            }
            assert_eq!(
                p.step(103, prepare(100)),
                [expired],
                "a ticket is decided once"
            );
        }
    }

    #[test]
    fn a_part_that_is_made_too_late_is_dropped() {
        let mut p = Participant::new(E, I);
        p.step(0, prepare(100));
        p.step(1, order(Order::Take { incarnation: I }));
        assert_eq!(
            p.step(101, ParticipantEvent::Tick),
            [Output::ReleaseWrites { count: 0 }]
        );
        let made = ParticipantEvent::SnapshotMade {
            ticket: T,
            snapshot: S,
            made: true,
        };
        let dropped = Output::DropSnapshot { snapshot: S };
        assert_eq!(
            p.step(102, made),
            [dropped, Output::Reply(T, Answer::Expired)]
        );
    }

    #[test]
    fn refusals() {
        let mut p = Participant::new(E, I);
        let unknown = Output::Reply(T, Answer::Unknown);
        assert_eq!(p.step(0, order(Order::Take { incarnation: I })), [unknown]);
        let old = Order::Prepare {
            snapshot: S,
            epoch: Epoch(4),
            hold_max_ms: 1,
        };
        assert_eq!(
            p.step(0, order(old)),
            [Output::Reply(T, Answer::OtherEpoch(E))]
        );
        p.step(0, prepare(100));
        let other = Order::Prepare {
            snapshot: S,
            epoch: E,
            hold_max_ms: 1,
        };
        let busy = Output::Reply(TicketId(8), Answer::Busy);
        assert_eq!(
            p.step(1, ParticipantEvent::Order(TicketId(8), other)),
            [busy]
        );
        let moved = ParticipantEvent::EpochChanged(Epoch(6));
        assert_eq!(p.step(2, moved), [Output::ReleaseWrites { count: 0 }]);
    }

    #[test]
    fn a_take_for_a_hold_before_the_restart_does_not_take_a_later_one() {
        let mut p = Participant::new(E, I + 1);
        p.step(0, prepare(100));
        let take = order(Order::Take { incarnation: I });
        assert_eq!(p.step(1, take), [Output::Reply(T, Answer::Unknown)]);
    }

    #[test]
    fn a_prepare_behind_its_release_does_not_hold() {
        let mut p = Participant::new(E, I);
        assert_eq!(p.step(0, order(Order::Release)), []);
        assert_eq!(p.step(1, prepare(100)), [Output::Reply(T, Answer::Expired)]);
        assert_eq!(p.deadline_ms(), None);
    }

    #[test]
    fn the_hold_and_the_memory_are_bounded() {
        let mut p = Participant::new(E, I);
        p.step(0, prepare(u64::MAX));
        assert_eq!(p.deadline_ms(), Some(SNAPSHOT_HOLD_CAP_MS));
        for ticket in 0..1000 {
            p.step(0, ParticipantEvent::Order(TicketId(ticket), Order::Release));
        }
        assert_eq!(p.decided.len(), SNAPSHOT_TICKETS_KEPT);
    }
}
