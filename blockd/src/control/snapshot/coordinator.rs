//! The server that got the command.

use super::{Answer, Order};
use crate::id::{Epoch, NodeNo, SnapshotId, TicketId, VolumeId};
use std::collections::BTreeMap;

/// One volume on one server that owns pages of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Part {
    /// The server.
    pub node: NodeNo,
    /// The volume.
    pub volume: VolumeId,
}

/// What is wanted of one part.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Plan {
    /// Where.
    pub part: Part,
    /// The pending snapshot in the registry.
    pub snapshot: SnapshotId,
    /// Epoch of the volume when the pending snapshot was begun.
    pub epoch: Epoch,
}

/// What happens to the coordinator.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CoordinatorEvent {
    /// Begin.
    Started,
    /// A participant answered.
    Answer(Part, Answer),
    /// A server is not reachable.
    PeerLost(NodeNo),
    /// The registry answered the commit.
    CommitDone(CommitResult),
    /// Time passed.
    Tick,
}

/// What became of the registry transaction of [`Action::Commit`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum CommitResult {
    /// The snapshots are visible.
    Committed,
    /// They are not and will not be: a conflict or another epoch.
    Refused,
    /// No answer: only the registry knows.
    Unknown,
}

/// Why there is no snapshot.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum Abort {
    /// A participant answered something else than was hoped for.
    #[error("server {node} answered {1:?} for volume {volume}", node = .0.node, volume = .0.volume)]
    Answer(Part, Answer),
    /// A server was lost.
    #[error("server {0} was lost")]
    PeerLost(NodeNo),
    /// The time for which writes may be held is over.
    #[error("not all servers were ready within the time for which writes may be held")]
    TooLate,
    /// The routing table or the pending snapshot changed meanwhile.
    #[error("the volume or the snapshot was changed meanwhile")]
    NotCommitted,
}

/// How it ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Verdict {
    /// Visible.
    Committed,
    /// Never visible.
    Aborted(Abort),
    /// The commit was not answered; read the registry: pending means never, once it is swept.
    Unknown,
}

/// What the server has to do, in this order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Tell a participant, under the ticket; the own server too.
    Send(Part, Order),
    /// Commit the pending snapshots in the registry, then report [`CoordinatorEvent::CommitDone`].
    Commit,
    /// Remove the pending snapshots from the registry.
    Discard,
    /// Tell the administrator.
    Finished(Verdict),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Phase {
    New,
    Preparing,
    Taking,
    Committing,
    Done(Verdict),
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Progress {
    plan: Plan,
    /// The incarnation that is ready.
    ready: Option<u64>,
    taken: bool,
}

/// The state machine of one run of the procedure.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Coordinator {
    ticket: TicketId,
    hold_max_ms: u64,
    taken_max_ms: u64,
    deadline_ms: u64,
    phase: Phase,
    parts: BTreeMap<Part, Progress>,
}

impl Coordinator {
    /// A run over these parts, all of which have to be ready `hold_max_ms` after `now_ms`
    /// and to be taken `taken_max_ms` later: by then nothing is held, the owners sync their logs.
    #[must_use]
    pub fn new(
        ticket: TicketId,
        plans: &[Plan],
        hold_max_ms: u64,
        taken_max_ms: u64,
        now_ms: u64,
    ) -> Self {
        let progress = |plan: &Plan| {
            (
                plan.part,
                Progress {
                    plan: *plan,
                    ready: None,
                    taken: false,
                },
            )
        };
        Self {
            ticket,
            hold_max_ms,
            taken_max_ms,
            deadline_ms: now_ms.saturating_add(hold_max_ms),
            phase: Phase::New,
            parts: plans.iter().map(progress).collect(),
        }
    }

    /// The ticket of all its messages.
    #[must_use]
    pub fn ticket(&self) -> TicketId {
        self.ticket
    }

    /// When [`CoordinatorEvent::Tick`] is due, while participants hold writes.
    #[must_use]
    pub fn deadline_ms(&self) -> Option<u64> {
        matches!(self.phase, Phase::Preparing | Phase::Taking).then_some(self.deadline_ms)
    }

    /// How it ended, once it has.
    #[must_use]
    pub fn verdict(&self) -> Option<Verdict> {
        match self.phase {
            Phase::Done(verdict) => Some(verdict),
            _ => None,
        }
    }

    /// Takes in an event at `now_ms` and says what to do.
    pub fn step(&mut self, now_ms: u64, event: CoordinatorEvent) -> Vec<Action> {
        if self.deadline_ms().is_some_and(|deadline| now_ms > deadline) {
            return self.abort(Abort::TooLate);
        }
        match event {
            CoordinatorEvent::Started => self.start(),
            CoordinatorEvent::Answer(part, answer) => self.answer(part, answer),
            CoordinatorEvent::PeerLost(node) => self.peer_lost(node),
            CoordinatorEvent::CommitDone(result) => self.commit_done(result),
            CoordinatorEvent::Tick => Vec::new(),
        }
    }

    fn start(&mut self) -> Vec<Action> {
        if self.phase != Phase::New {
            return Vec::new();
        }
        self.phase = Phase::Preparing;
        let hold_max_ms = self.hold_max_ms;
        let prepare = |plan: &Plan| Order::Prepare {
            snapshot: plan.snapshot,
            epoch: plan.epoch,
            hold_max_ms,
        };
        let orders = self
            .parts
            .values()
            .map(|p| Action::Send(p.plan.part, prepare(&p.plan)));
        orders.collect()
    }

    fn answer(&mut self, part: Part, answer: Answer) -> Vec<Action> {
        let Some(progress) = self.parts.get_mut(&part) else {
            return Vec::new();
        };
        match (self.phase, answer) {
            (Phase::Preparing, Answer::Ready { incarnation, .. }) => {
                progress.ready = Some(incarnation);
            }
            (Phase::Taking, Answer::Ready { .. }) => {}
            (Phase::Taking, Answer::Taken) => progress.taken = true,
            (Phase::Preparing | Phase::Taking, other) => {
                return self.abort(Abort::Answer(part, other));
            }
            _ => return Vec::new(),
        }
        self.advance()
    }

    /// S003-38: `take` goes out only when every server, the own one too, is ready.
    fn advance(&mut self) -> Vec<Action> {
        match self.phase {
            Phase::Preparing if self.parts.values().all(|p| p.ready.is_some()) => {
                self.phase = Phase::Taking;
                self.deadline_ms = self.deadline_ms.saturating_add(self.taken_max_ms);
                let take = |(part, p): (&Part, &Progress)| {
                    Some(Action::Send(
                        *part,
                        Order::Take {
                            incarnation: p.ready?,
                        },
                    ))
                };
                self.parts.iter().filter_map(take).collect()
            }
            Phase::Taking if self.parts.values().all(|p| p.taken) => {
                self.phase = Phase::Committing;
                vec![Action::Commit]
            }
            _ => Vec::new(),
        }
    }

    /// A server that has taken its part has done all it has to.
    fn peer_lost(&mut self, node: NodeNo) -> Vec<Action> {
        let waiting = self
            .parts
            .iter()
            .any(|(part, p)| part.node == node && !p.taken);
        match self.phase {
            Phase::Preparing | Phase::Taking if waiting => self.abort(Abort::PeerLost(node)),
            _ => Vec::new(),
        }
    }

    fn commit_done(&mut self, result: CommitResult) -> Vec<Action> {
        match (self.phase, result) {
            (Phase::Committing, CommitResult::Refused) => self.abort(Abort::NotCommitted),
            (Phase::Committing, CommitResult::Committed) => self.finish(Verdict::Committed),
            (Phase::Committing, CommitResult::Unknown) => self.finish(Verdict::Unknown),
            _ => Vec::new(),
        }
    }

    fn abort(&mut self, why: Abort) -> Vec<Action> {
        let release = self
            .parts
            .keys()
            .map(|part| Action::Send(*part, Order::Release));
        let mut actions: Vec<_> = release.collect();
        actions.push(Action::Discard);
        actions.extend(self.finish(Verdict::Aborted(why)));
        actions
    }

    fn finish(&mut self, verdict: Verdict) -> Vec<Action> {
        self.phase = Phase::Done(verdict);
        vec![Action::Finished(verdict)]
    }
}
