//! Promise 4: a snapshot is a point in time over all its volumes, closed under "acknowledged before
//! issued", and requests over several pages are in it whole or not at all.
//!
//! For every block the snapshot shows a value. The change that wrote it is in. A change of the block
//! that was called after that value's last effect is out. Nothing that is out may have been known to
//! anybody (acknowledged, or read) before something that is in was called.
//!
//! A snapshot by time stamps promises less (`blockd/DESIGN.md`, "Snapshots"): its clocks go from one
//! client to the next only with the messages of the program. So there it counts only what the caller
//! itself had been answered, or what the same run of the same server had executed.

use super::intervals::{Intervals, LookKind};
use crate::history::{Moment, NEVER, Snap};
use blockd::control::registry::settings::Procedure;
use std::collections::BTreeMap;

/// A way on which the knowledge of one change comes to whoever calls another one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Channel {
    Any,
    Client(usize),
    /// A server, and how often it had been started.
    Server(usize, usize),
}

/// The channels of a snapshot on which `client` is at a moment, when it uses a block.
fn channels(
    intervals: &Intervals<'_>,
    snap: &Snap,
    client: usize,
    place: (usize, u32),
    at: Moment,
) -> Vec<Channel> {
    match snap.procedure {
        Procedure::Barrier | Procedure::Hold => vec![Channel::Any],
        Procedure::Stamp => {
            let server = intervals.server(place, at);
            let server = server.map(|(server, run)| Channel::Server(server, run));
            let client = match intervals.entry(client) {
                Some((server, run)) => Channel::Server(server, run),
                None => Channel::Client(client),
            };
            std::iter::once(client).chain(server).collect()
        }
    }
}

pub(super) fn check(intervals: &Intervals<'_>, snap: &Snap) -> Vec<String> {
    let mut found = Vec::new();
    // (moment, change)
    let mut latest_in: BTreeMap<Channel, (Moment, usize)> = BTreeMap::new();
    // (moment, change, block)
    let mut earliest_out: BTreeMap<Channel, (Moment, usize, u32)> = BTreeMap::new();
    let mut inside: BTreeMap<usize, u32> = BTreeMap::new();
    let mut outside: BTreeMap<usize, u32> = BTreeMap::new();
    for ((volume, block), tag) in &snap.shown {
        let empty = Default::default();
        let entry = intervals.blocks.get(&(*volume, *block)).unwrap_or(&empty);
        let Some(last) = entry.last_effect(*tag, snap.answered) else {
            found.push(format!(
                "snapshot {}: volume {volume} block {block} shows operation {}, called after the \
                 snapshot was answered, or never written there",
                snap.name,
                i64::from(*tag) - 1
            ));
            continue;
        };
        if let Some(gone) = entry.gone(*tag).filter(|gone| *gone < snap.invoked) {
            found.push(format!(
                "snapshot {}: called at {}, shows operation {} in volume {volume} block {block}, which \
                 its own client wrote over, flushed at {gone}",
                snap.name,
                snap.invoked,
                i64::from(*tag) - 1
            ));
        }
        if *tag > 0 {
            let op = *tag as usize - 1;
            let (called, client) = (intervals.ops[op].invoked, intervals.ops[op].client);
            for channel in channels(intervals, snap, client, (*volume, *block), called) {
                let latest = latest_in.entry(channel).or_default();
                *latest = (*latest).max((called, op));
            }
            inside.insert(op, *block);
        }
        for look in &entry.looks {
            let change = match look.kind {
                LookKind::Change | LookKind::Replay => look.op,
                LookKind::Read if look.tag > 0 => look.tag as usize - 1,
                LookKind::Read => continue,
            };
            let called = intervals.ops[change].invoked;
            let is_out = look.tag != *tag && called > last && called < snap.answered;
            if is_out && look.until > snap.answered {
                let client = intervals.ops[look.op].client;
                for channel in channels(intervals, snap, client, (*volume, *block), look.to) {
                    let earliest = earliest_out.entry(channel).or_insert((NEVER, 0, 0));
                    *earliest = (*earliest).min((look.to, change, *block));
                }
                if look.kind == LookKind::Change {
                    outside.insert(change, *block);
                }
            }
        }
    }
    for (channel, (known, out, block)) in earliest_out {
        let (called, latest) = latest_in.get(&channel).copied().unwrap_or_default();
        if known < called {
            found.push(format!(
                "snapshot {}: operation {latest} (called at {called}) is in, operation {out} (known \
                 at {known}, block {block}) is not",
                snap.name
            ));
        }
        if known < snap.invoked {
            found.push(format!(
                "snapshot {}: called at {}, lacks operation {out}, known at {known} (block {block})",
                snap.name, snap.invoked
            ));
        }
    }
    for (op, block) in &inside {
        if let Some(lacking) = outside.get(op) {
            found.push(format!(
                "snapshot {}: operation {op} is in at block {block} and not in at block {lacking}",
                snap.name
            ));
        }
    }
    found
}
