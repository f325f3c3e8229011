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

#[cfg(test)]
mod tests {
    use super::*;

    const T: TicketId = TicketId(3);

    fn part(node: u16) -> Part {
        Part {
            node: NodeNo(node),
            volume: VolumeId(18),
        }
    }

    fn ready(node: u16) -> CoordinatorEvent {
        CoordinatorEvent::Answer(
            part(node),
            Answer::Ready {
                held: 0,
                incarnation: u64::from(node),
            },
        )
    }

    fn begun() -> Coordinator {
        let plan = |node| Plan {
            part: part(node),
            snapshot: SnapshotId(1),
            epoch: Epoch(2),
        };
        let mut c = Coordinator::new(T, &[161, 162, 163].map(plan), 500, 0, 0);
        assert_eq!(
            c.step(0, CoordinatorEvent::Started).len(),
            3,
            "only the owners are asked"
        );
        c
    }

    fn taken(node: u16) -> CoordinatorEvent {
        CoordinatorEvent::Answer(part(node), Answer::Taken)
    }

    /// S003-38: with one late `ready`, its own even, no `take` goes out before it.
    #[test]
    fn take_waits_for_every_ready_and_commit_for_every_taken() {
        let mut c = begun();
        assert_eq!(c.step(1, ready(161)), []);
        assert_eq!(c.step(2, ready(163)), []);
        assert_eq!(c.step(3, ready(163)), [], "a repeated answer counts once");
        let take = |node| {
            Action::Send(
                part(node),
                Order::Take {
                    incarnation: u64::from(node),
                },
            )
        };
        assert_eq!(c.step(400, ready(162)), [161, 162, 163].map(take));
        assert_eq!(c.step(401, taken(161)), []);
        assert_eq!(c.step(401, taken(162)), []);
        assert_eq!(c.step(402, taken(163)), [Action::Commit]);
        assert_eq!(c.deadline_ms(), None, "the registry has its own deadline");
        let done = CoordinatorEvent::CommitDone(CommitResult::Committed);
        assert_eq!(c.step(9000, done), [Action::Finished(Verdict::Committed)]);
        assert_eq!(c.step(9001, CoordinatorEvent::PeerLost(NodeNo(161))), []);
    }

    /// S003-35: whatever is missing, refusing or late ends in a release of all and a discard.
    #[test]
    fn everything_else_aborts_and_releases_all() {
        let refused = |answer| CoordinatorEvent::Answer(part(162), answer);
        let cases = [
            (
                1,
                refused(Answer::Busy),
                Abort::Answer(part(162), Answer::Busy),
            ),
            (
                1,
                refused(Answer::Unknown),
                Abort::Answer(part(162), Answer::Unknown),
            ),
            (
                1,
                refused(Answer::Expired),
                Abort::Answer(part(162), Answer::Expired),
            ),
            (
                1,
                refused(Answer::Taken),
                Abort::Answer(part(162), Answer::Taken),
            ),
            (
                1,
                CoordinatorEvent::PeerLost(NodeNo(163)),
                Abort::PeerLost(NodeNo(163)),
            ),
            (501, CoordinatorEvent::Tick, Abort::TooLate),
            (501, ready(162), Abort::TooLate),
        ];
        for (now_ms, event, why) in cases {
            let mut c = begun();
            c.step(1, ready(161));
            let mut want = [161, 162, 163]
                .map(|n| Action::Send(part(n), Order::Release))
                .to_vec();
            want.extend([Action::Discard, Action::Finished(Verdict::Aborted(why))]);
            assert_eq!(c.step(now_ms, event), want, "{event:?}");
            assert_eq!(c.step(now_ms, ready(162)), [], "it ended");
            assert_eq!(c.verdict(), Some(Verdict::Aborted(why)));
        }
    }

    #[test]
    fn a_server_that_has_taken_its_part_may_be_lost() {
        let mut c = begun();
        for node in [161, 162, 163] {
            c.step(1, ready(node));
        }
        c.step(2, taken(161));
        assert_eq!(c.step(3, CoordinatorEvent::PeerLost(NodeNo(161))), []);
        assert_ne!(c.step(3, CoordinatorEvent::PeerLost(NodeNo(162))), []);
    }
}
