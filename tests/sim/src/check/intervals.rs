//! When a value may have become the content of a block, and for how long a look at it counts.
//!
//! A write takes effect between its call and its answer; if it failed, at any time after its call; if
//! its owner lost power before its own client flushed, also when that client replays it. A look (a
//! read, or an acknowledged write) kills all values whose effect ended before the look began; but if
//! the owner then loses power and nobody had flushed in between, they may come back.

use crate::history::{Loss, Moment, NEVER, Op, Tag, What};
use std::collections::BTreeMap;

/// A value was the content of a block at some moment in `from..=to`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    pub from: Moment,
    pub to: Moment,
    pub tag: Tag,
    pub op: usize,
    pub is_read: bool,
    /// The loss after which it does not count any more.
    pub until: Moment,
}

#[derive(Default)]
pub(super) struct Block {
    pub looks: Vec<Look>,
    /// Last moment at which a value may have become the content; for zeros of each writer of zeros.
    pub last_effect: BTreeMap<Tag, Moment>,
    /// (called, last effect) of each writer of zeros.
    pub zeros: Vec<(Moment, Moment)>,
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
        for block in op.first..op.first + op.blocks {
            let last = self.last_effect(op, block);
            let until = self.until(op.volume, block, op.invoked, op.answered);
            let entry = self.blocks.entry((op.volume, block)).or_default();
            match tag {
                0 => entry.zeros.push((op.invoked, last)),
                _ => drop(entry.last_effect.insert(tag, last)),
            }
            if op.answered != NEVER {
                entry.looks.push(Look {
                    from: op.invoked,
                    to: op.answered,
                    tag,
                    op: index,
                    is_read: false,
                    until,
                });
            }
        }
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
                is_read: true,
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
        let flushes = self.flushes.get(&op.volume);
        let own = || {
            let flushes = flushes.into_iter().flatten();
            flushes.filter(|(client, ..)| *client == op.client)
        };
        let replays = self
            .losses_of(op.volume, block)
            .filter(|at| *at > op.invoked)
            .filter(|at| !own().any(|(_, from, to)| *from > op.answered && to < at))
            .map(|at| {
                let flushed = own().find(|(_, from, _)| *from > at);
                flushed.map_or(NEVER, |(.., to)| *to)
            });
        replays.max().unwrap_or(0).max(op.answered)
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
