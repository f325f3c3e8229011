//! Every interleaving, loss, duplicate and death of the procedure for 1 to 3 servers, enumerated.
//!
//! A message that was sent stays in the network and may be delivered at any time, again and again
//! or never: that covers every order, every loss and every duplicate.
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

/// What the part on disk shows of the client's write to this server.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Image {
    Without,
    With,
    /// Made while the write was executing.
    Torn,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Server {
    machine: Participant,
    starts: u64,
    part: Option<Image>,
    /// Whether this server's clock is behind every deadline that was set before.
    late: bool,
    making: bool,
    write: Write,
}

/// The coordinator; how an ended one got there makes no difference.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
enum Process {
    Runs(Coordinator),
    Committed,
    Aborted,
    Unsure,
    Dead,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct World {
    /// Whether the coordinator's clock is behind its deadline; clocks run as they like.
    late: bool,
    coordinator: Process,
    commit_asked: bool,
    record: Record,
    servers: Vec<Server>,
    network: BTreeSet<Message>,
    deaths_left: u8,
}

fn clock_ms(late: bool) -> u64 {
    if late { 2 * HOLD_MS + 1 } else { 1 }
}

fn part(at: usize) -> Part {
    Part {
        node: NodeNo(u16::try_from(at).unwrap() + 1),
        volume: VolumeId(1),
    }
}

impl World {
    fn new(servers: usize, deaths_left: u8) -> Self {
        let plan = |at| Plan {
            part: part(at),
            snapshot: SNAPSHOT,
            epoch: EPOCH,
        };
        let plans: Vec<_> = (0..servers).map(plan).collect();
        let server = Server {
            machine: Participant::new(EPOCH, 1),
            starts: 1,
            part: None,
            late: false,
            making: false,
            write: Write::NotIssued,
        };
        let mut world = World {
            late: false,
            coordinator: Process::Runs(Coordinator::new(TICKET, &plans, HOLD_MS, 0, 0)),
            commit_asked: false,
            record: Record::Pending,
            servers: vec![server; servers],
            network: BTreeSet::new(),
            deaths_left,
        };
        world.coordinate(CoordinatorEvent::Started);
        world
    }

    fn coordinate(&mut self, event: CoordinatorEvent) {
        let now_ms = clock_ms(self.late);
        let Process::Runs(coordinator) = &mut self.coordinator else {
            return;
        };
        let actions = coordinator.step(now_ms, event);
        for action in actions {
            match action {
                Action::Send(to, order) => {
                    self.network
                        .insert(Message::To(usize::from(to.node.0) - 1, order));
                }
                Action::Commit => self.commit_asked = true,
                Action::Discard if self.record == Record::Pending => {
                    self.record = Record::Discarded;
                }
                Action::Discard => {}
                Action::Finished(verdict) => self.finish(verdict),
            }
        }
    }

    fn finish(&mut self, verdict: Verdict) {
        self.commit_asked = false;
        self.network
            .retain(|message| matches!(message, Message::To(..)));
        self.coordinator = match verdict {
            Verdict::Committed => Process::Committed,
            Verdict::Aborted(_) => Process::Aborted,
            Verdict::Unknown => Process::Unsure,
        };
    }

    fn participate(&mut self, at: usize, event: ParticipantEvent) {
        let (server, mut answers) = (&mut self.servers[at], Vec::new());
        let now_ms = clock_ms(server.late);
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
                Output::Reply(_, Answer::Ready { incarnation, .. }) => {
                    answers.push(Answer::Ready {
                        held: 0,
                        incarnation,
                    });
                }
                Output::Reply(_, answer) => answers.push(answer),
                Output::HoldWrites => {}
            }
        }
        if matches!(self.coordinator, Process::Runs(_)) {
            self.network
                .extend(answers.into_iter().map(|answer| Message::From(at, answer)));
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

    /// The store takes the part while the machine still thinks what it thinks.
    fn make(&mut self, at: usize, made: bool) {
        let server = &mut self.servers[at];
        server.making = false;
        if made {
            server.part = Some(match server.write {
                Write::Acknowledged => Image::With,
                Write::Executing => Image::Torn,
                Write::NotIssued | Write::Parked => Image::Without,
            });
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
        server.starts += 1;
        server.machine = Participant::new(EPOCH, server.starts);
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
            next.push(self.after(|w| w.deliver(*message)));
        }
        for at in 0..self.servers.len() {
            self.server_successors(at, &mut next);
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
        let tick = ParticipantEvent::Tick;
        next.push(self.after(|w| w.servers[at].late = true));
        next.push(self.after(|w| w.participate(at, tick)));
        if self.deaths_left > 0 {
            next.push(self.after(|w| w.kill_server(at)));
        }
        if matches!(self.coordinator, Process::Runs(_)) {
            let lost = CoordinatorEvent::PeerLost(part(at).node);
            next.push(self.after(|w| w.coordinate(lost)));
        }
    }

    fn coordinator_successors(&self, next: &mut Vec<World>) {
        match self.coordinator {
            Process::Runs(_) => {
                if self.commit_asked {
                    next.push(self.after(World::commit));
                    next.push(self.after(|w| w.commit_unanswered(false)));
                    next.push(self.after(|w| w.commit_unanswered(true)));
                }
                next.push(self.after(|w| w.late = true));
                next.push(self.after(|w| w.coordinate(CoordinatorEvent::Tick)));
                if self.deaths_left > 0 {
                    next.push(self.after(|w| {
                        w.coordinator = Process::Dead;
                        w.commit_asked = false;
                        w.network
                            .retain(|message| matches!(message, Message::To(..)));
                        w.deaths_left -= 1;
                    }));
                }
            }
            _ if self.record == Record::Pending => {
                next.push(self.after(|w| w.record = Record::Discarded));
            }
            _ => {}
        }
    }

    /// What holds in every reachable state.
    fn check(&self) {
        if self.record == Record::Committed {
            let whole = |s: &Server| matches!(s.part, Some(Image::With | Image::Without));
            assert!(self.servers.iter().all(whole), "partial or torn: {self:#?}");
            let (first, last) = (&self.servers[0], &self.servers[self.servers.len() - 1]);
            let closed = last.part != Some(Image::With) || first.part == Some(Image::With);
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
            assert!(deadline_ms <= clock_ms(server.late) + HOLD_MS, "{self:#?}");
            let mut machine = server.machine.clone();
            machine.step(deadline_ms + 1, ParticipantEvent::Tick);
            assert_eq!(
                (machine.deadline_ms(), machine.held()),
                (None, 0),
                "{self:#?}"
            );
        }
        match self.coordinator {
            Process::Committed => assert_eq!(self.record, Record::Committed),
            Process::Aborted => assert_ne!(self.record, Record::Committed, "{self:#?}"),
            _ => {}
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
fn one_server_and_two_deaths() {
    let (states, committed) = explore(World::new(1, 2));
    assert!(
        states > 100 && committed > 0,
        "{states} states, {committed} committed"
    );
}

#[test]
fn two_servers_and_a_death() {
    let (states, committed) = explore(World::new(2, 1));
    assert!(
        states > 1000 && committed > 0,
        "{states} states, {committed} committed"
    );
}

#[test]
fn three_servers() {
    let (states, committed) = explore(World::new(3, 0));
    assert!(
        states > 1000 && committed > 0,
        "{states} states, {committed} committed"
    );
}
