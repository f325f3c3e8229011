//! Every interleaving, loss, duplicate and death of the procedure for 1 to 3 servers, enumerated.
//!
//! The registry is modelled by what the shell does with it: a compare-and-set from pending to
//! committed or discarded; when the coordinator is dead, a sweeper discards what is pending. One
//! client writes w1 to the first server and, once that is acknowledged, w2 to the last one.

use super::*;
use crate::id::{NodeNo, TicketId, VolumeId};
use std::collections::{BTreeSet, HashSet};

const TICKET: TicketId = TicketId(9);
const SNAPSHOT: SnapshotId = SnapshotId(1);
const EPOCH: Epoch = Epoch(4);
const HOLD_MS: u64 = 100;

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
enum Message {
    To(usize, Order),
    From(usize, Answer),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Record {
    Pending,
    Committed,
    Discarded,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Write {
    NotIssued,
    Executing,
    Parked,
    Acknowledged,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Server {
    machine: Participant,
    /// The part on disk, with whether this server's write of the client is in it.
    part: Option<bool>,
    making: bool,
    write: Write,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct World {
    /// 0: before every deadline; 1 and 2: behind those of what was prepared before.
    late: u8,
    coordinator: Option<Coordinator>,
    commit_asked: bool,
    record: Record,
    servers: Vec<Server>,
    network: BTreeSet<Message>,
    deaths_left: u8,
    duplicates: bool,
}

fn part(at: usize) -> Part {
    Part {
        node: NodeNo(u16::try_from(at).unwrap() + 1),
        volume: VolumeId(1),
    }
}

impl World {
    fn new(servers: usize, duplicates: bool, deaths_left: u8) -> Self {
        let plan = |at| Plan {
            part: part(at),
            snapshot: SNAPSHOT,
            epoch: EPOCH,
        };
        let plans: Vec<_> = (0..servers).map(plan).collect();
        let server = Server {
            machine: Participant::new(EPOCH),
            part: None,
            making: false,
            write: Write::NotIssued,
        };
        let mut world = World {
            late: 0,
            coordinator: Some(Coordinator::new(TICKET, &plans, HOLD_MS, 0, 0)),
            commit_asked: false,
            record: Record::Pending,
            servers: vec![server; servers],
            network: BTreeSet::new(),
            deaths_left,
            duplicates,
        };
        world.coordinate(CoordinatorEvent::Started);
        world
    }

    fn now_ms(&self) -> u64 {
        1 + u64::from(self.late) * 2 * HOLD_MS
    }

    fn coordinate(&mut self, event: CoordinatorEvent) {
        let now_ms = self.now_ms();
        let Some(coordinator) = &mut self.coordinator else {
            return;
        };
        for action in coordinator.step(now_ms, event) {
            match action {
                Action::Send(to, order) => {
                    self.network
                        .insert(Message::To(usize::from(to.node.0) - 1, order));
                }
                Action::Commit => self.commit_asked = true,
                Action::Discard if self.record == Record::Pending => {
                    self.record = Record::Discarded;
                }
                Action::Discard | Action::Finished(_) => {}
            }
        }
    }

    fn participate(&mut self, at: usize, event: ParticipantEvent) {
        let now_ms = self.now_ms();
        let server = &mut self.servers[at];
        for output in server.machine.step(now_ms, event) {
            match output {
                Output::StartWrite => server.write = Write::Executing,
                Output::ParkWrite => server.write = Write::Parked,
                Output::ReleaseWrites { count } => {
                    assert_eq!(count, u32::from(server.write == Write::Parked));
                    if count == 1 {
                        server.write = Write::Executing;
                    }
                }
                Output::MakeSnapshot { .. } => server.making = true,
                Output::DropSnapshot { .. } => server.part = None,
                Output::Reply(_, answer) => {
                    self.network.insert(Message::From(at, answer));
                }
                Output::HoldWrites => {}
            }
        }
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::To(at, order) => {
                self.participate(at, ParticipantEvent::Order(TICKET, order));
            }
            Message::From(at, answer) => {
                self.coordinate(CoordinatorEvent::Answer(part(at), answer));
            }
        }
    }

    /// The part on disk has the write if it was executed, acknowledged or not.
    fn make(&mut self, at: usize, made: bool) {
        self.servers[at].making = false;
        if made {
            self.servers[at].part = Some(self.servers[at].write == Write::Acknowledged);
        }
        let event = ParticipantEvent::SnapshotMade {
            ticket: TICKET,
            snapshot: SNAPSHOT,
            made,
        };
        self.participate(at, event);
    }

    /// kill -9 and restart: parts and acknowledged writes are on disk, the rest is lost.
    fn kill_server(&mut self, at: usize) {
        let server = &mut self.servers[at];
        server.machine = Participant::new(EPOCH);
        server.making = false;
        if server.write != Write::Acknowledged {
            server.write = Write::NotIssued;
        }
        self.deaths_left -= 1;
    }

    fn commit(&mut self) {
        self.commit_asked = false;
        let pending = self.record == Record::Pending;
        let result = if pending {
            CommitResult::Committed
        } else {
            CommitResult::Refused
        };
        if pending {
            self.record = Record::Committed;
        }
        self.coordinate(CoordinatorEvent::CommitDone(result));
    }

    /// The registry executed the commit, or never got it; the answer was lost.
    fn commit_unanswered(&mut self, executed: bool) {
        self.commit_asked = false;
        if executed && self.record == Record::Pending {
            self.record = Record::Committed;
        }
        self.coordinate(CoordinatorEvent::CommitDone(CommitResult::Unknown));
    }

    fn after(&self, change: impl FnOnce(&mut World)) -> World {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    fn successors(&self) -> Vec<World> {
        let mut next = Vec::new();
        for message in &self.network {
            next.push(self.after(|w| {
                w.network.remove(message);
                w.deliver(*message);
            }));
            next.push(self.after(|w| drop(w.network.remove(message))));
            if self.duplicates {
                next.push(self.after(|w| w.deliver(*message)));
            }
        }
        for at in 0..self.servers.len() {
            self.server_successors(at, &mut next);
        }
        if self.late < 2 {
            next.push(self.after(|w| w.late += 1));
        }
        self.coordinator_successors(&mut next);
        next
    }

    fn server_successors(&self, at: usize, next: &mut Vec<World>) {
        let server = &self.servers[at];
        if server.making {
            next.push(self.after(|w| w.make(at, true)));
            next.push(self.after(|w| w.make(at, false)));
        }
        let last = self.servers.len() - 1;
        let may_issue = at == 0 || (at == last && self.servers[0].write == Write::Acknowledged);
        if server.write == Write::NotIssued && may_issue {
            next.push(self.after(|w| w.participate(at, ParticipantEvent::WriteArrived)));
        }
        if server.write == Write::Executing {
            next.push(self.after(|w| {
                w.servers[at].write = Write::Acknowledged;
                w.participate(at, ParticipantEvent::WriteFinished);
            }));
        }
        if self.late > 0 {
            next.push(self.after(|w| w.participate(at, ParticipantEvent::Tick)));
        }
        if self.deaths_left > 0 {
            next.push(self.after(|w| w.kill_server(at)));
        }
        if self.coordinator.is_some() {
            let lost = CoordinatorEvent::PeerLost(part(at).node);
            next.push(self.after(|w| w.coordinate(lost)));
        }
    }

    fn coordinator_successors(&self, next: &mut Vec<World>) {
        match &self.coordinator {
            Some(_) => {
                if self.commit_asked {
                    next.push(self.after(World::commit));
                    next.push(self.after(|w| w.commit_unanswered(false)));
                    next.push(self.after(|w| w.commit_unanswered(true)));
                }
                if self.late > 0 {
                    next.push(self.after(|w| w.coordinate(CoordinatorEvent::Tick)));
                }
                if self.deaths_left > 0 {
                    next.push(self.after(|w| {
                        w.coordinator = None;
                        w.deaths_left -= 1;
                    }));
                }
            }
            None if self.record == Record::Pending => {
                next.push(self.after(|w| w.record = Record::Discarded));
            }
            None => {}
        }
    }

    /// What holds in every reachable state.
    fn check(&self) {
        if self.record == Record::Committed {
            assert!(
                self.servers.iter().all(|s| s.part.is_some()),
                "partial: {self:#?}"
            );
            let (first, last) = (&self.servers[0], &self.servers[self.servers.len() - 1]);
            let closed = last.part != Some(true) || first.part == Some(true);
            assert!(closed, "w2 is in, w1 before it is not: {self:#?}");
        }
        for server in &self.servers {
            let Some(deadline_ms) = server.machine.deadline_ms() else {
                assert!(
                    server.write != Write::Parked,
                    "parked without a hold: {self:#?}"
                );
                continue;
            };
            assert!(deadline_ms <= self.now_ms() + HOLD_MS, "{self:#?}");
            let mut machine = server.machine.clone();
            machine.step(deadline_ms + 1, ParticipantEvent::Tick);
            assert_eq!(
                (machine.deadline_ms(), machine.held()),
                (None, 0),
                "{self:#?}"
            );
        }
        let ended = self.coordinator.as_ref().and_then(Coordinator::verdict);
        if let Some(Verdict::Committed) = ended {
            assert_eq!(self.record, Record::Committed);
        }
        if let Some(Verdict::Aborted(_)) = ended {
            assert_ne!(
                self.record,
                Record::Committed,
                "visible after an abort: {self:#?}"
            );
        }
    }
}

/// Visits every reachable state; gives their number and how many of them are committed.
fn explore(start: World) -> (usize, usize) {
    let (mut seen, mut todo) = (HashSet::from([start.clone()]), vec![start]);
    let mut committed = 0;
    while let Some(world) = todo.pop() {
        world.check();
        committed += usize::from(world.record == Record::Committed);
        todo.extend(
            world
                .successors()
                .into_iter()
                .filter(|next| seen.insert(next.clone())),
        );
    }
    (seen.len(), committed)
}

#[test]
fn one_server_with_duplicates_and_two_deaths() {
    let (states, committed) = explore(World::new(1, true, 2));
    assert!(
        states > 100 && committed > 0,
        "{states} states, {committed} committed"
    );
}

#[test]
fn two_servers_with_duplicates_and_a_death() {
    let (states, committed) = explore(World::new(2, true, 1));
    assert!(
        states > 10_000 && committed > 0,
        "{states} states, {committed} committed"
    );
}

#[test]
fn three_servers() {
    let (states, committed) = explore(World::new(3, false, 0));
    assert!(
        states > 10_000 && committed > 0,
        "{states} states, {committed} committed"
    );
}
