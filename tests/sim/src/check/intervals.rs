//! When a value may have become the content of a block, and for how long a look at it counts.
//!
//! A write takes effect between its call and its answer; if it failed, at any time after its call; if
//! its owner lost power before its own client flushed, also when that client replays it. A rollback is
//! a change of all blocks to what the snapshot shows, which no loss undoes. A look (a
//! read, or an acknowledged change) kills all values whose effect ended before the look began; but if
//! the owner then loses power and nobody had flushed in between, they may come back. What a client
//! wrote before such a loss is the content again at some moment before its next flush is answered
//! (promise 3), and its changes come back in their order: after a flush nothing shows what the client
//! had itself written over.
//!
//! A client that goes through one server sends nothing again. So its changes take effect between call and
//! answer only; and a flush that succeeds says that nothing which the same client was answered before was
//! lost: such changes no earlier loss undoes.
//!
//! Where pages move a loss counts at every server that may have had the block, and nothing is known of
//! what is sent again: it depends on who had executed it. A rollback may bring back what was written
//! over, and what a client sends again after a loss may come before it.

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
    /// (called, last effect) of each change that makes a value the content.
    effects: BTreeMap<Tag, Vec<(Moment, Moment)>>,
    /// Values that their own clients wrote over: when that was called, and when it was flushed.
    gone: BTreeMap<Tag, (Moment, Moment)>,
    /// When a rollback may have brought back a value the last time.
    restored: BTreeMap<Tag, Moment>,
    /// Values that their clients have not written over.
    own: Vec<(usize, Tag, Moment)>,
}

/// Gives the servers that may own a block of a volume, each from a moment on.
pub(super) type Owners<'a> = &'a dyn Fn(usize, u32) -> Vec<(Moment, usize)>;

/// Clients that go through one server: see `History::entries`.
pub(super) type Entries = BTreeMap<usize, (usize, usize)>;

pub(super) struct Intervals<'a> {
    pub ops: &'a [Op],
    pub blocks: BTreeMap<(usize, u32), Block>,
    losses: &'a [Loss],
    /// When each server was started.
    starts: &'a [(usize, Moment)],
    /// Clients that go through one server: which, and how often it had been started.
    entries: &'a Entries,
    /// Servers that may own a block, each from a moment on.
    owners: Owners<'a>,
    /// Successful flushes of each volume: client, call, answer.
    flushes: BTreeMap<usize, Vec<(usize, Moment, Moment)>>,
    /// Rollbacks of each volume: call, answer.
    rollbacks: BTreeMap<usize, Vec<(Moment, Moment)>>,
}

impl<'a> Intervals<'a> {
    pub(super) fn new(
        ops: &'a [Op],
        losses: &'a [Loss],
        starts: &'a [(usize, Moment)],
        entries: &'a Entries,
        owners: Owners<'a>,
    ) -> Self {
        let mut this = Self {
            ops,
            blocks: BTreeMap::new(),
            losses,
            starts,
            entries,
            owners,
            flushes: BTreeMap::new(),
            rollbacks: BTreeMap::new(),
        };
        for op in ops {
            match op.what {
                What::Flush if op.answered != NEVER => {
                    let flush = (op.client, op.invoked, op.answered);
                    this.flushes.entry(op.volume).or_default().push(flush);
                }
                What::Become(_) => {
                    let rollbacks = this.rollbacks.entry(op.volume).or_default();
                    rollbacks.push((op.invoked, op.answered));
                }
                _ => {}
            }
        }
        for (index, op) in ops.iter().enumerate() {
            match &op.what {
                What::Write | What::Zero | What::Become(_) => this.add_change(index, op),
                What::Read(shown) => this.add_read(index, op, shown),
                What::Flush => {}
            }
        }
        this
    }

    fn add_change(&mut self, index: usize, op: &Op) {
        let flushed = self.flushed(op, op.answered).map(|(_, answered)| answered);
        let is_rollback = matches!(op.what, What::Become(_));
        for block in op.first..op.first + op.blocks {
            let tag = match &op.what {
                What::Write => index as Tag + 1,
                What::Become(content) => content[block as usize],
                _ => 0,
            };
            let (last, until) = match op.what {
                What::Become(_) => (op.answered, NEVER),
                _ => (self.last_effect(op, block), self.change_until(op, block)),
            };
            let entry = self.blocks.entry((op.volume, block)).or_default();
            let effects = entry.effects.entry(tag).or_default();
            effects.push((op.invoked, last));
            if is_rollback {
                let restored = entry.restored.entry(tag).or_default();
                *restored = (*restored).max(last);
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
            if !is_rollback {
                entry.write_over(op, tag, flushed);
                self.add_replay(index, op, tag, block);
            }
        }
    }

    /// The change is the content again between the last loss before its client's flush, and that.
    fn add_replay(&mut self, index: usize, op: &Op, tag: Tag, block: u32) {
        if self.entry(op.client).is_some() {
            return;
        }
        // A flush that was under way may have covered it already: then it is not sent again.
        let may_cover = |at, (from, to)| op.answered < to && from < at;
        let lost = self.uncovered(op, block);
        let lost = lost.filter(|at| !self.own_flushes(op).any(|flush| may_cover(*at, flush)));
        // A flush answers for what was answered before it was called.
        let made_good = lost.filter_map(|at| Some((at, self.flushed(op, at.max(op.answered))?)));
        let Some((from, (called, to))) = made_good.max() else {
            return;
        };
        let mut rollbacks = self.rollbacks.get(&op.volume).into_iter().flatten();
        if rollbacks.any(|(called, answered)| *answered > op.invoked && *called < to)
            || (self.owners)(op.volume, block).len() > 1
        {
            return;
        }
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

    /// The server that has a block, and how often it had been started at a moment; `None` if it is
    /// not known which one had it then.
    pub(super) fn server(
        &self,
        (volume, block): (usize, u32),
        at: Moment,
    ) -> Option<(usize, usize)> {
        let [(_, server)] = (self.owners)(volume, block)[..] else {
            return None;
        };
        let starts = self.starts.iter();
        let runs = starts.filter(|(node, start)| *node == server && *start < at);
        Some((server, runs.count()))
    }

    fn losses_of(&self, volume: usize, block: u32) -> impl Iterator<Item = Moment> + '_ {
        let owners = match self.losses.is_empty() {
            true => Vec::new(),
            false => (self.owners)(volume, block),
        };
        let had = move |loss: &&Loss| {
            let mut owners = owners.iter();
            owners.any(|(from, node)| *node == loss.node && *from < loss.at)
        };
        self.losses.iter().filter(had).map(|loss| loss.at)
    }

    /// The server that a client goes through, and how often it had been started; `None` if it goes
    /// straight to the owners.
    pub(super) fn entry(&self, client: usize) -> Option<(usize, usize)> {
        self.entries.get(&client).copied()
    }

    /// The last moment at which a change may take effect.
    fn last_effect(&self, op: &Op, block: u32) -> Moment {
        if op.answered == NEVER || self.entry(op.client).is_some() {
            return op.answered;
        }
        let replays = self
            .uncovered(op, block)
            .map(|at| self.flushed(op, at.max(op.answered)))
            .map(|flush| flush.map_or(NEVER, |(_, answered)| answered));
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

    /// The first loss after which a change may be undone.
    fn change_until(&self, op: &Op, block: u32) -> Moment {
        let vouched = match self.entry(op.client) {
            Some(_) => self.flushed(op, op.answered),
            None => None,
        };
        let vouched = vouched.map_or(0, |(_, answered)| answered);
        self.until(op.volume, block, op.invoked.max(vouched), op.answered)
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
        self.gone
            .extend(over.map(|(_, tag, _)| (tag, (op.invoked, flushed))));
        if tag > 0 {
            self.own.push((op.client, tag, op.answered));
        }
    }

    /// After this moment nothing shows the value: its own client wrote over it and flushed.
    pub(super) fn gone(&self, tag: Tag) -> Option<Moment> {
        let (over, flushed) = self.gone.get(&tag)?;
        let restored = self.restored.get(&tag);
        restored
            .is_none_or(|restored| restored < over)
            .then_some(*flushed)
    }

    /// The last moment at which `tag` may have become the content, by changes called before `before`;
    /// `None` if nobody made it so by then. Every block begins with zeros.
    pub(super) fn last_effect(&self, tag: Tag, before: Moment) -> Option<Moment> {
        let effects = self.effects.get(&tag).into_iter().flatten();
        let lasts = effects.filter(|(called, _)| *called < before);
        let last = lasts.map(|(_, last)| *last).max();
        last.or((tag == 0).then_some(0))
    }
}
