//! When a value may have become the content of a block, and for how long a look at it counts.
//!
//! A write takes effect between its call and its answer; if it failed, at any time after its call; if
//! its owner lost power before its own client flushed, also when that client replays it. A look (a
//! read, or an acknowledged write) kills all values whose effect ended before the look began; but if
//! the owner then loses power and nobody had flushed in between, they may come back. What a client
//! wrote before such a loss is the content again at some moment before its next flush is answered
//! (promise 3), and its changes come back in their order: after a flush nothing shows what the client
//! had itself written over.

use crate::history::{Loss, Moment, NEVER, Op, Tag, What};
use std::collections::BTreeMap;

/// A value was the content of a block at some moment in `from..=to`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    pub from: Moment,
    pub to: Moment,
    pub tag: Tag,
    pub op: usize,
    pub kind: LookKind,
    /// The loss after which it does not count any more.
    pub until: Moment,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LookKind {
    Read,
    Change,
    /// A change that its client has made good after a loss of power.
    Replay,
}

#[derive(Default)]
pub(super) struct Block {
    pub looks: Vec<Look>,
    /// Last moment at which a value may have become the content; for zeros of each writer of zeros.
    pub last_effect: BTreeMap<Tag, Moment>,
    /// (called, last effect) of each writer of zeros.
    pub zeros: Vec<(Moment, Moment)>,
    /// After these moments nothing shows the value: its own client wrote over it and flushed.
    pub gone: BTreeMap<Tag, Moment>,
    /// Values that their clients have not written over.
    own: Vec<(usize, Tag, Moment)>,
}

pub(super) struct Intervals<'a> {
    pub ops: &'a [Op],
    pub blocks: BTreeMap<(usize, u32), Block>,
    losses: &'a [Loss],
    /// When each server was started.
    starts: &'a [(usize, Moment)],
    owner: &'a dyn Fn(usize, u32) -> usize,
    /// Successful flushes of each volume: client, call, answer.
    flushes: BTreeMap<usize, Vec<(usize, Moment, Moment)>>,
}

impl<'a> Intervals<'a> {
    pub(super) fn new(
        ops: &'a [Op],
        losses: &'a [Loss],
        starts: &'a [(usize, Moment)],
        owner: &'a dyn Fn(usize, u32) -> usize,
    ) -> Self {
        let mut this = Self {
            ops,
            blocks: BTreeMap::new(),
            losses,
            starts,
            owner,
            flushes: BTreeMap::new(),
        };
        for op in ops {
            if op.what == What::Flush && op.answered != NEVER {
                let flush = (op.client, op.invoked, op.answered);
                this.flushes.entry(op.volume).or_default().push(flush);
            }
        }
        for (index, op) in ops.iter().enumerate() {
            match &op.what {
                What::Write | What::Zero => this.add_change(index, op),
                What::Read(shown) => this.add_read(index, op, shown),
                What::Flush => {}
            }
        }
        this
    }

    fn add_change(&mut self, index: usize, op: &Op) {
        let tag = match op.what {
            What::Write => index as Tag + 1,
            _ => 0,
        };
        let flushed = self.flushed(op, op.answered).map(|(_, answered)| answered);
        for block in op.first..op.first + op.blocks {
            let last = self.last_effect(op, block);
            let until = self.until(op.volume, block, op.invoked, op.answered);
            let entry = self.blocks.entry((op.volume, block)).or_default();
            match tag {
                0 => entry.zeros.push((op.invoked, last)),
                _ => drop(entry.last_effect.insert(tag, last)),
            }
            if op.answered == NEVER {
                continue;
            }
            entry.looks.push(Look {
                from: op.invoked,
                to: op.answered,
                tag,
                op: index,
                kind: LookKind::Change,
                until,
            });
            entry.write_over(op, tag, flushed);
            self.add_replay(index, op, tag, block);
        }
    }

    /// The change is the content again between the last loss before its client's flush, and that.
    fn add_replay(&mut self, index: usize, op: &Op, tag: Tag, block: u32) {
        // A flush that was under way may have covered it already: then it is not sent again.
        let may_cover = |at, (from, to)| op.answered < to && from < at;
        let lost = self.uncovered(op, block);
        let lost = lost.filter(|at| !self.own_flushes(op).any(|flush| may_cover(*at, flush)));
        let made_good = lost.filter_map(|at| Some((at, self.flushed(op, at)?)));
        let Some((from, (called, to))) = made_good.max() else {
            return;
        };
        let until = self.until(op.volume, block, from, called - 1);
        let entry = self.blocks.entry((op.volume, block)).or_default();
        entry.looks.push(Look {
            from,
            to,
            tag,
            op: index,
            kind: LookKind::Replay,
            until,
        });
    }

    fn add_read(&mut self, index: usize, op: &Op, shown: &[Tag]) {
        for (block, tag) in (op.first..).zip(shown) {
            let until = self.until(op.volume, block, op.invoked, op.answered);
            let entry = self.blocks.entry((op.volume, block)).or_default();
            entry.looks.push(Look {
                from: op.invoked,
                to: op.answered,
                tag: *tag,
                op: index,
                kind: LookKind::Read,
                until,
            });
        }
    }

    /// The server that has a block, and how often it had been started at a moment.
    pub(super) fn server(&self, (volume, block): (usize, u32), at: Moment) -> (usize, usize) {
        let server = (self.owner)(volume, block);
        let starts = self.starts.iter();
        let runs = starts.filter(|(node, start)| *node == server && *start < at);
        (server, runs.count())
    }

    fn losses_of(&self, volume: usize, block: u32) -> impl Iterator<Item = Moment> + '_ {
        let node = match self.losses.is_empty() {
            true => 0,
            false => (self.owner)(volume, block),
        };
        let losses = self.losses.iter().filter(move |loss| loss.node == node);
        losses.map(|loss| loss.at)
    }

    /// The last moment at which a change may take effect.
    fn last_effect(&self, op: &Op, block: u32) -> Moment {
        if op.answered == NEVER {
            return NEVER;
        }
        let replays = self
            .uncovered(op, block)
            .map(|at| self.flushed(op, at).map_or(NEVER, |(_, answered)| answered));
        replays.max().unwrap_or(0).max(op.answered)
    }

    /// Calls and answers of the flushes of a change's own client.
    fn own_flushes(&self, op: &Op) -> impl Iterator<Item = (Moment, Moment)> + use<'_, 'a> {
        let client = op.client;
        let flushes = self.flushes.get(&op.volume).into_iter().flatten();
        let own = flushes.filter(move |(flusher, ..)| *flusher == client);
        own.map(|(_, called, answered)| (*called, *answered))
    }

    /// Its client's first flush that was called after `at`: call and answer.
    fn flushed(&self, op: &Op, at: Moment) -> Option<(Moment, Moment)> {
        self.own_flushes(op).find(|(called, _)| *called > at)
    }

    /// Losses of its owner after its call that no flush of its client came before.
    fn uncovered(&self, op: &Op, block: u32) -> impl Iterator<Item = Moment> {
        let losses = self.losses_of(op.volume, block);
        losses.filter(move |at| {
            let covers = |(from, to)| from > op.answered && to < *at;
            *at > op.invoked && !self.own_flushes(op).any(covers)
        })
    }

    /// The first loss after which what was seen from `from` to `to` may be undone.
    pub(super) fn until(&self, volume: usize, block: u32, from: Moment, to: Moment) -> Moment {
        let safe = |at: Moment| {
            let flushes = self.flushes.get(&volume).into_iter().flatten();
            flushes
                .into_iter()
                .any(|(_, called, answered)| *called > to && *answered < at)
        };
        let losses = self.losses_of(volume, block);
        losses
            .filter(|at| *at > from && !safe(*at))
            .min()
            .unwrap_or(NEVER)
    }
}

impl Block {
    /// Notes what its client's earlier values become by this change, which was flushed by then.
    fn write_over(&mut self, op: &Op, tag: Tag, flushed: Option<Moment>) {
        let Some(flushed) = flushed else {
            return;
        };
        let earlier = |(client, _, answered): &mut (usize, Tag, Moment)| {
            *client == op.client && *answered < op.invoked
        };
        let over = self.own.extract_if(.., earlier);
        self.gone.extend(over.map(|(_, tag, _)| (tag, flushed)));
        if tag > 0 {
            self.own.push((op.client, tag, op.answered));
        }
    }

    /// The last moment at which `tag` may have become the content, of changes called before `before`;
    /// `None` if nobody ever wrote it here by then.
    pub(super) fn last_effect(&self, tag: Tag, before: Moment, ops: &[Op]) -> Option<Moment> {
        if tag == 0 {
            let zeros = self.zeros.iter().filter(|(called, _)| *called < before);
            return Some(zeros.map(|(_, last)| *last).max().unwrap_or(0));
        }
        let last = self.last_effect.get(&tag)?;
        (ops[tag as usize - 1].invoked < before).then_some(*last)
    }
}
