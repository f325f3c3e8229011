//! The server that got the command.

use super::{Answer, Order, Preparation, Procedure};
use crate::id::{Epoch, NodeNo, SnapshotId, Stamp, TicketId, VolumeId};
use crate::planted::{Plant, planted};
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

/// How long things may take, in milliseconds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Limits {
    /// From the beginning until all parts are ready.
    pub hold_max_ms: u64,
    /// `barrier`: from the mark of a part until it is told to take.
    pub park_max_ms: u64,
    /// From then on until all parts are taken: nothing waits any more, the owners sync their logs.
    pub taken_max_ms: u64,
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
    #[error(
        "not all servers were ready in time: one is slow, a change over several pages goes on, or one \
         that a restart interrupted is waited for (30 s at the most)"
    )]
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
    /// The incarnation that is ready, and its clock if it stamps.
    ready: Option<(u64, Stamp)>,
    taken: bool,
}

/// The state machine of one run of the procedure.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Coordinator {
    me: NodeNo,
    ticket: TicketId,
    procedure: Procedure,
    limits: Limits,
    deadline_ms: u64,
    phase: Phase,
    parts: BTreeMap<Part, Progress>,
}

impl Coordinator {
    /// A run over these parts by the server `me`, which begins at `now_ms`.
    #[must_use]
    pub fn new(
        me: NodeNo,
        ticket: TicketId,
        procedure: Procedure,
        plans: &[Plan],
        limits: Limits,
        now_ms: u64,
    ) -> Self {
        let progress = |plan: &Plan| {
            let (plan, ready, taken) = (*plan, None, false);
            (plan.part, Progress { plan, ready, taken })
        };
        Self {
            me,
            ticket,
            procedure,
            limits,
            deadline_ms: now_ms.saturating_add(limits.hold_max_ms),
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
        let orders = self.parts.values();
        let orders = orders.map(|p| Action::Send(p.plan.part, self.prepare(&p.plan)));
        orders.collect()
    }

    fn prepare(&self, plan: &Plan) -> Order {
        Order::PrepareBy(Preparation {
            procedure: self.procedure,
            coordinator: self.me,
            snapshot: plan.snapshot,
            epoch: plan.epoch,
            hold_max_ms: self.limits.hold_max_ms,
            park_max_ms: self.limits.park_max_ms,
        })
    }

    fn answer(&mut self, part: Part, answer: Answer) -> Vec<Action> {
        let Some(progress) = self.parts.get_mut(&part) else {
            return Vec::new();
        };
        match (self.phase, answer) {
            (Phase::Preparing, Answer::Ready { incarnation, .. }) => {
                progress.ready = Some((incarnation, Stamp::default()));
            }
            (Phase::Preparing, Answer::ReadyAt { incarnation, now }) => {
                progress.ready = Some((incarnation, now));
            }
            (Phase::Taking, Answer::Ready { .. } | Answer::ReadyAt { .. }) => {}
            (Phase::Taking, Answer::Taken) => progress.taken = true,
            (Phase::Taking, _) if planted(Plant::CommitWithoutTicket) => progress.taken = true,
            (Phase::Preparing, _) if planted(Plant::CommitWithoutTicket) => {
                progress.ready = Some((0, Stamp::default()));
            }
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
                self.deadline_ms = self.deadline_ms.saturating_add(self.limits.taken_max_ms);
                self.take()
            }
            Phase::Taking if self.parts.values().all(|p| p.taken) => {
                self.phase = Phase::Committing;
                vec![Action::Commit]
            }
            _ => Vec::new(),
        }
    }

    /// S003-42, U-07: the time of the cut is later than every participant's clock was.
    fn take(&self) -> Vec<Action> {
        let ready = || {
            let parts = self.parts.iter();
            parts
                .filter_map(|(part, p)| p.ready.map(|(incarnation, now)| (*part, incarnation, now)))
        };
        let times = ready().map(|(_, _, now)| now);
        let latest = match planted(Plant::EarlyCut) {
            true => times.min(),
            false => times.max(),
        };
        let latest = latest.unwrap_or_default();
        let order = |incarnation| match self.procedure {
            Procedure::Barrier | Procedure::Hold => Order::Take { incarnation },
            Procedure::Stamp => Order::TakeAt {
                incarnation,
                at: latest.next(),
            },
        };
        let orders = ready().map(|(part, incarnation, _)| Action::Send(part, order(incarnation)));
        orders.collect()
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
    const LIMITS: Limits = Limits {
        hold_max_ms: 500,
        park_max_ms: 50,
        taken_max_ms: 0,
    };

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

    fn begun(procedure: Procedure) -> Coordinator {
        let plan = |node| Plan {
            part: part(node),
            snapshot: SnapshotId(1),
            epoch: Epoch(2),
        };
        let plans = [161, 162, 163].map(plan);
        let mut c = Coordinator::new(NodeNo(161), T, procedure, &plans, LIMITS, 0);
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

    /// S003-24: the prepares of all owners go out in one step, so that the own server's, which has not
    /// been answered, keeps nobody waiting.
    #[test]
    fn prepare_goes_to_the_others_before_the_own_one_has_ended() {
        let plan = |node| Plan {
            part: part(node),
            snapshot: SnapshotId(1),
            epoch: Epoch(2),
        };
        for me in [161, 162, 163] {
            let plans = [161, 162, 163].map(plan);
            let mut c = Coordinator::new(NodeNo(me), T, Procedure::Hold, &plans, LIMITS, 0);
            let sent = c.step(0, CoordinatorEvent::Started);
            let prepared = |action: &Action| match action {
                Action::Send(part, Order::PrepareBy(_)) => Some(part.node.0),
                _ => None,
            };
            let nodes: Vec<u16> = sent.iter().filter_map(prepared).collect();
            assert_eq!(nodes, [161, 162, 163], "{sent:?}");
            assert_eq!(c.step(1, ready(me)), [], "nothing has waited for it");
        }
    }

    /// S003-38: with one late `ready`, its own even, no `take` goes out before it.
    #[test]
    fn take_waits_for_every_ready_and_commit_for_every_taken() {
        let mut c = begun(Procedure::Barrier);
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
            let mut c = begun(Procedure::Barrier);
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

    /// S003-42, U-07: the cut is behind the clocks of all participants, the fastest too.
    #[test]
    fn the_stamp_of_the_cut_is_later_than_every_clock() {
        let mut c = begun(Procedure::Stamp);
        let ready = |node: u16, now| {
            let incarnation = u64::from(node);
            let now = Stamp(now);
            CoordinatorEvent::Answer(part(node), Answer::ReadyAt { incarnation, now })
        };
        assert_eq!(c.step(1, ready(161, 10)), []);
        assert_eq!(c.step(1, ready(162, 5000)), []);
        let take = |node| {
            let (incarnation, at) = (u64::from(node), Stamp(5001));
            Action::Send(part(node), Order::TakeAt { incarnation, at })
        };
        assert_eq!(c.step(2, ready(163, 7)), [161, 162, 163].map(take));
    }

    #[test]
    fn a_server_that_has_taken_its_part_may_be_lost() {
        let mut c = begun(Procedure::Barrier);
        for node in [161, 162, 163] {
            c.step(1, ready(node));
        }
        c.step(2, taken(161));
        assert_eq!(c.step(3, CoordinatorEvent::PeerLost(NodeNo(161))), []);
        assert_ne!(c.step(3, CoordinatorEvent::PeerLost(NodeNo(162))), []);
    }
}
