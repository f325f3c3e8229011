//! Every interleaving, loss, duplicate and death of the three procedures for 1 to 3 servers,
//! enumerated; and planted faults, each of which must be found.
//!
//! A message that was sent stays in the network and may be delivered at any time, again and again
//! or never: that covers every order, every loss and every duplicate.
//!
//! The registry is modelled by what the shell does with it: a compare-and-set from pending to
//! committed or discarded; when the coordinator is dead, a sweeper discards what is pending. Besides
//! the machines there is the owner's gate and mark (`data/cut.rs`), in a few lines.

mod load;

use super::*;
use crate::id::{NodeNo, TicketId, VolumeId};
use load::{Load, Span, Write};
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeSet, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault};

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

/// What is done wrong, to see that it is found.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Fault {
    None,
    /// Ready is said while requests still execute.
    ReadyBeforeQuiet,
    /// A server takes as soon as it is ready itself.
    TakeBeforeAllReady,
    /// Writes behind the mark are acknowledged at once.
    CompletionsNotParked,
    /// Reads show writes behind the mark.
    ReadsNotParked,
    /// A span may begin while the gate is closed.
    SpansLetIn,
    /// The cut is behind the slowest clock only.
    CutTooEarly,
    /// A participant's clock stays before the cut that it has taken.
    ClockNotRaised,
    /// Replies and requests carry no clock.
    ClockNotCarried,
    /// `taken` is said before the part is durable.
    TakenBeforeSynced,
}

/// What the part on disk shows.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Image {
    write: bool,
    span: bool,
    /// Made while something was executing that the gate should have kept out.
    torn: bool,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Server {
    machine: Participant,
    starts: u64,
    /// Whether this server's clock is behind every deadline that was set before.
    late: bool,
    clock: u64,
    gate: Option<Gate>,
    parking: bool,
    stamping: bool,
    draining: bool,
    making: Option<(Option<Stamp>, bool)>,
    syncing: bool,
    part: Option<Image>,
    durable: bool,
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
    procedure: Procedure,
    fault: Fault,
    load: Load,
    /// Whether the coordinator's clock is behind its deadline; clocks run as they like.
    late: bool,
    coordinator: Process,
    commit_asked: bool,
    record: Record,
    servers: Vec<Server>,
    network: BTreeSet<Message>,
    /// Whether a deadline may pass.
    deadlines: bool,
    /// Deaths, failures and lost peers that may still happen.
    misfortunes_left: u8,
    /// What the client has heard of the servers' clocks.
    heard: u64,
    span: Span,
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
    /// `clocks` are those of the servers, which do not agree.
    fn new(procedure: Procedure, load: Load, clocks: &[u64], misfortunes_left: u8) -> Self {
        let plan = |at| Plan {
            part: part(at),
            snapshot: SNAPSHOT,
            epoch: EPOCH,
        };
        let plans: Vec<_> = (0..clocks.len()).map(plan).collect();
        let server = |clock: &u64| Server {
            machine: Participant::new(EPOCH, 1),
            starts: 1,
            late: false,
            clock: *clock,
            gate: None,
            parking: false,
            stamping: false,
            draining: false,
            making: None,
            syncing: false,
            part: None,
            durable: false,
            write: Write::NotIssued,
        };
        let limits = Limits {
            hold_max_ms: HOLD_MS,
            park_max_ms: HOLD_MS,
            taken_max_ms: 0,
        };
        let machine = Coordinator::new(NodeNo(1), TICKET, procedure, &plans, limits, 0);
        let mut world = World {
            procedure,
            fault: Fault::None,
            load,
            late: false,
            coordinator: Process::Runs(machine),
            commit_asked: false,
            record: Record::Pending,
            servers: clocks.iter().map(server).collect(),
            network: BTreeSet::new(),
            deadlines: clocks.len() < 3,
            misfortunes_left,
            heard: 0,
            span: Span::default(),
        };
        world.coordinate(CoordinatorEvent::Started);
        world
    }

    fn with(self, fault: Fault) -> Self {
        Self { fault, ..self }
    }

    fn without_deadlines(self) -> Self {
        let deadlines = false;
        Self { deadlines, ..self }
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
                    let order = self.spoilt(order);
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

    fn spoilt(&self, order: Order) -> Order {
        match order {
            Order::TakeAt { incarnation, at } if self.fault == Fault::CutTooEarly => {
                let at = Stamp(at.0.min(3));
                Order::TakeAt { incarnation, at }
            }
            order => order,
        }
    }

    fn finish(&mut self, verdict: Verdict) {
        self.commit_asked = false;
        self.forget_answers();
        self.coordinator = match verdict {
            Verdict::Committed => Process::Committed,
            Verdict::Aborted(_) => Process::Aborted,
            Verdict::Unknown => Process::Unsure,
        };
    }

    fn forget_answers(&mut self) {
        self.network
            .retain(|message| matches!(message, Message::To(..)));
    }

    fn participate(&mut self, at: usize, event: ParticipantEvent) {
        let (server, mut answers) = (&mut self.servers[at], Vec::new());
        let now_ms = clock_ms(server.late);
        let mut stamping = None;
        for output in server.machine.step(now_ms, event) {
            match output {
                Output::Close { gate, .. } => {
                    server.gate = Some(gate);
                    server.draining = true;
                }
                Output::StampWrites { ticket } => {
                    server.stamping = true;
                    server.clock += 1;
                    let now = Some(Stamp(server.clock));
                    stamping = Some(ParticipantEvent::Stamping { ticket, now });
                }
                Output::Make { at, park, .. } => server.making = Some((at, park)),
                Output::Open => {
                    server.gate = None;
                    (server.parking, server.stamping) = (false, false);
                }
                Output::Sync { .. } => server.syncing = true,
                Output::Drop { .. } => server.part = None,
                Output::Reply(_, answer) => answers.push(answer),
            }
        }
        self.answered(at, &answers);
        if let Some(event) = stamping {
            self.participate(at, event);
        }
    }

    fn answered(&mut self, at: usize, answers: &[Answer]) {
        for answer in answers {
            if let (Fault::TakeBeforeAllReady, Answer::Ready { incarnation, .. }) =
                (self.fault, *answer)
            {
                self.network
                    .insert(Message::To(at, Order::Take { incarnation }));
            }
            if matches!(self.coordinator, Process::Runs(_)) {
                self.network.insert(Message::From(at, *answer));
            }
        }
        if self.fault == Fault::TakenBeforeSynced && self.servers[at].syncing {
            self.network.insert(Message::From(at, Answer::Taken));
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

    fn is_quiet(&self, at: usize) -> bool {
        let writes = self.servers[at].write == Write::Executing;
        let spans = self.span.is_open(at);
        match self.servers[at].gate {
            Some(Gate::All) => !writes && !spans,
            _ => !spans,
        }
    }

    fn quiet(&mut self, at: usize) {
        let server = &mut self.servers[at];
        server.draining = false;
        let event = ParticipantEvent::Quiet {
            ticket: TICKET,
            held: 0,
        };
        self.participate(at, event);
    }

    /// The shell makes the part only while the machine wants it, and the store no part twice.
    fn make(&mut self, at: usize, well: bool) {
        let torn = !self.is_quiet(at);
        let span = self.span.is_executed(at);
        let server = &mut self.servers[at];
        let Some((cut, park)) = server.making.take() else {
            return;
        };
        let made = well && server.part.is_none() && server.machine.is_making(TICKET);
        if made {
            let write = server.write.is_in(cut);
            server.part = Some(Image { write, span, torn });
            server.durable = false;
            server.parking = park && self.fault != Fault::CompletionsNotParked;
            if self.fault != Fault::ClockNotRaised {
                server.clock = server.clock.max(cut.unwrap_or_default().0);
            }
        }
        let event = ParticipantEvent::Made {
            ticket: TICKET,
            snapshot: SNAPSHOT,
            made,
        };
        self.participate(at, event);
    }

    fn synced(&mut self, at: usize, synced: bool) {
        let server = &mut self.servers[at];
        server.syncing = false;
        server.durable |= synced;
        let ticket = TICKET;
        self.participate(at, ParticipantEvent::Synced { ticket, synced });
    }

    /// The clock is not set back: a restart with one that is behind is not covered (DESIGN.md).
    ///
    /// Kill and restart: what was executed is in the log; a part counts only if it was synced.
    fn kill_server(&mut self, at: usize) {
        let server = &mut self.servers[at];
        server.starts += 1;
        server.machine = Participant::new(EPOCH, server.starts);
        server.gate = None;
        (server.parking, server.stamping) = (false, false);
        (server.draining, server.making, server.syncing) = (false, None, false);
        server.part = server.part.filter(|_| server.durable);
        if matches!(server.write, Write::Waiting | Write::Executing) {
            server.write = Write::NotIssued;
        }
        server.write.forget_stamp();
        if self.procedure == Procedure::Stamp {
            self.lose_orders(at);
        }
        self.span.lost(at);
    }

    /// `stamp` needs that no prepare reaches a later start of a server than it was sent to, as the
    /// clock of that start may be behind. A connection is of one start, and an order of one connection.
    fn lose_orders(&mut self, at: usize) {
        self.network
            .retain(|message| !matches!(message, Message::To(to, _) if *to == at));
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

    /// None when there is no snapshot and never will be: what the servers do then is each one's own
    /// matter, which is enumerated with one server.
    fn successors(&self) -> Vec<World> {
        let mut next = Vec::new();
        let runs = matches!(self.coordinator, Process::Runs(_));
        if self.record == Record::Discarded && !runs && self.servers.len() > 1 {
            return next;
        }
        for message in &self.network {
            next.push(self.after(|w| w.deliver(*message)));
        }
        for at in 0..self.servers.len() {
            self.server_successors(at, &mut next);
        }
        self.coordinator_successors(&mut next);
        self.load_successors(&mut next);
        next
    }

    fn server_successors(&self, at: usize, next: &mut Vec<World>) {
        let server = &self.servers[at];
        if server.draining && (self.is_quiet(at) || self.fault == Fault::ReadyBeforeQuiet) {
            next.push(self.after(|w| w.quiet(at)));
        }
        if server.making.is_some() {
            next.push(self.after(|w| w.make(at, true)));
        }
        if server.syncing {
            next.push(self.after(|w| w.synced(at, true)));
        }
        if self.deadlines {
            let tick = ParticipantEvent::Tick;
            next.push(self.after(|w| w.servers[at].late = true));
            next.push(self.after(|w| w.participate(at, tick)));
        }
        if self.misfortunes_left > 0 {
            self.misfortunes_of(at, next);
        }
    }

    fn misfortunes_of(&self, at: usize, next: &mut Vec<World>) {
        let server = &self.servers[at];
        let unlucky = |change: &dyn Fn(&mut World)| {
            self.after(|w| {
                w.misfortunes_left -= 1;
                change(w);
            })
        };
        next.push(unlucky(&|w| w.kill_server(at)));
        if server.making.is_some() {
            next.push(unlucky(&|w| w.make(at, false)));
        }
        if server.syncing {
            next.push(unlucky(&|w| w.synced(at, false)));
        }
        if matches!(self.coordinator, Process::Runs(_)) {
            let lost = CoordinatorEvent::PeerLost(part(at).node);
            next.push(unlucky(&|w| w.coordinate(lost)));
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
                if self.deadlines {
                    next.push(self.after(|w| w.late = true));
                    next.push(self.after(|w| w.coordinate(CoordinatorEvent::Tick)));
                }
                if self.misfortunes_left > 0 {
                    next.push(self.after(|w| {
                        w.coordinator = Process::Dead;
                        w.commit_asked = false;
                        w.forget_answers();
                        w.misfortunes_left -= 1;
                    }));
                }
            }
            _ if self.record == Record::Pending => {
                next.push(self.after(|w| w.record = Record::Discarded));
            }
            _ => {}
        }
    }

    /// What holds in every reachable state; the text says what does not.
    fn check(&self) -> Result<(), &'static str> {
        if self.record == Record::Committed {
            self.check_committed()?;
        }
        for server in &self.servers {
            let Some(deadline_ms) = server.machine.deadline_ms() else {
                let is_open = server.gate.is_none() && !server.parking && !server.stamping;
                ensure(is_open, "something waits without a deadline")?;
                continue;
            };
            let bound = clock_ms(server.late) + HOLD_MS;
            ensure(deadline_ms <= bound, "a deadline that is too late")?;
            let mut machine = server.machine.clone();
            let outputs = machine.step(deadline_ms + 1, ParticipantEvent::Tick);
            ensure(outputs.contains(&Output::Open), "not open at the deadline")?;
        }
        match self.coordinator {
            Process::Committed => ensure(self.record == Record::Committed, "a lie of success"),
            Process::Aborted => ensure(self.record != Record::Committed, "a lie of failure"),
            _ => Ok(()),
        }
    }

    fn check_committed(&self) -> Result<(), &'static str> {
        let parts: Option<Vec<Image>> = self.servers.iter().map(|server| server.part).collect();
        let parts = parts.ok_or("a part is missing")?;
        ensure(parts.iter().all(|part| !part.torn), "a part is torn")?;
        let (first, last) = (parts[0], parts[parts.len() - 1]);
        ensure(first.write || !last.write, "w2 is in, w1 before it is not")?;
        ensure(first.span == last.span, "a span is in by half")
    }
}

fn ensure(holds: bool, problem: &'static str) -> Result<(), &'static str> {
    if holds { Ok(()) } else { Err(problem) }
}

/// Visits every reachable state, told apart by a hash of 64 bits; gives their number and how many of them are committed, or the
/// first state that must not be.
fn explore(start: World) -> Result<(usize, usize), String> {
    let hash = |world: &World| BuildHasherDefault::<DefaultHasher>::default().hash_one(world);
    let (mut seen, mut todo) = (HashSet::from([hash(&start)]), vec![start]);
    let mut committed = 0;
    while let Some(world) = todo.pop() {
        world
            .check()
            .map_err(|problem| format!("{problem}: {world:#?}"))?;
        committed += usize::from(world.record == Record::Committed);
        todo.extend(
            world
                .successors()
                .into_iter()
                .filter(|next| seen.insert(hash(next))),
        );
    }
    Ok((seen.len(), committed))
}

const ALL: [Procedure; 3] = [Procedure::Barrier, Procedure::Hold, Procedure::Stamp];

fn right(start: World) {
    let (procedure, load, clocks) = (start.procedure, start.load, start.servers.len());
    let explored = explore(start);
    let (states, committed) = explored.unwrap_or_else(|error| panic!("{error}"));
    eprintln!("{procedure:?} {load:?} on {clocks}: {states} states, {committed} committed");
    assert!(states > 100 && committed > 0, "{procedure:?}");
}

/// S003-35: any death at any step.
#[test]
fn one_server_and_two_deaths() {
    for procedure in ALL {
        right(World::new(procedure, Load::Writes, &[0], 2));
    }
}

/// S003-25, 35, 39: a write that depends on one to another server is not in without it.
#[test]
fn dependent_writes_on_two_servers_and_a_death() {
    for procedure in [Procedure::Barrier, Procedure::Hold] {
        right(World::new(procedure, Load::Writes, &[0, 0], 1));
    }
}

/// S003-25, 35, 43, 44: the same with clocks that differ by more than the procedure takes.
#[test]
fn dependent_writes_on_two_servers_with_wrong_clocks() {
    for clocks in [[10, 0], [0, 10]] {
        let start = |deaths| World::new(Procedure::Stamp, Load::Writes, &clocks, deaths);
        right(start(0));
        right(start(1).without_deadlines());
    }
}

/// S003-33, U-09: a span is in with both halves or not at all.
#[test]
fn spans_over_two_servers_and_a_death() {
    for procedure in ALL {
        right(World::new(procedure, Load::Spans, &[0, 0], 1));
    }
}

#[test]
fn three_servers() {
    for procedure in ALL {
        for clocks in [[10, 0, 5], [0, 10, 5]] {
            right(World::new(procedure, Load::Writes, &clocks, 0));
        }
    }
}

/// A checker that has never caught anything is not believed.
#[test]
fn planted_faults_are_found() {
    use Fault::*;
    use Procedure::*;
    let faults = [
        (Hold, Load::Writes, ReadyBeforeQuiet),
        (Barrier, Load::Spans, ReadyBeforeQuiet),
        (Stamp, Load::Spans, ReadyBeforeQuiet),
        (Barrier, Load::Writes, TakeBeforeAllReady),
        (Hold, Load::Writes, TakeBeforeAllReady),
        (Barrier, Load::Spans, TakeBeforeAllReady),
        (Barrier, Load::Writes, CompletionsNotParked),
        (Barrier, Load::Writes, ReadsNotParked),
        (Barrier, Load::Spans, SpansLetIn),
        (Hold, Load::Spans, SpansLetIn),
        (Stamp, Load::Spans, SpansLetIn),
        (Stamp, Load::Writes, CutTooEarly),
        (Stamp, Load::Writes, ClockNotRaised),
        (Stamp, Load::Writes, ClockNotCarried),
        (Barrier, Load::Writes, TakenBeforeSynced),
    ];
    for (procedure, load, fault) in faults {
        let found = [&[0, 10][..], &[10, 0], &[0, 10, 5]].iter().any(|clocks| {
            let deaths = u8::from(fault == TakenBeforeSynced);
            explore(World::new(procedure, load, clocks, deaths).with(fault)).is_err()
        });
        assert!(found, "{procedure:?}, {load:?}: {fault:?} was not found");
    }
}
