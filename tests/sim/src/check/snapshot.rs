//! Promise 4: a snapshot is a point in time over all its volumes, closed under "acknowledged before
//! issued", and requests over several pages are in it whole or not at all.
//!
//! For every block the snapshot shows a value. The change that wrote it is in. A change of the block
//! that was called after that value's last effect is out. Nothing that is out may have been known to
//! anybody (acknowledged, or read) before something that is in was called.

use super::intervals::Intervals;
use crate::history::{Moment, NEVER, Snap};
use std::collections::BTreeMap;

pub(super) fn check(intervals: &Intervals<'_>, snap: &Snap) -> Vec<String> {
    let mut found = Vec::new();
    // (moment, change)
    let mut latest_in: (Moment, usize) = (0, 0);
    let mut earliest_out: (Moment, usize, u32) = (NEVER, 0, 0);
    let mut inside: BTreeMap<usize, u32> = BTreeMap::new();
    let mut outside: BTreeMap<usize, u32> = BTreeMap::new();
    for ((volume, block), tag) in &snap.shown {
        let empty = Default::default();
        let entry = intervals.blocks.get(&(*volume, *block)).unwrap_or(&empty);
        let Some(last) = entry.last_effect(*tag, snap.answered, intervals.ops) else {
            found.push(format!(
                "snapshot {}: volume {volume} block {block} shows operation {}, called after the \
                 snapshot was answered, or never written there",
                snap.name,
                i64::from(*tag) - 1
            ));
            continue;
        };
        if *tag > 0 {
            let op = *tag as usize - 1;
            latest_in = latest_in.max((intervals.ops[op].invoked, op));
            inside.insert(op, *block);
        }
        for look in &entry.looks {
            let change = match look.is_read {
                false => look.op,
                true if look.tag > 0 => look.tag as usize - 1,
                true => continue,
            };
            let called = intervals.ops[change].invoked;
            let is_out = look.tag != *tag && called > last && called < snap.answered;
            if is_out && look.until > snap.answered {
                earliest_out = earliest_out.min((look.to, change, *block));
                if !look.is_read {
                    outside.insert(change, *block);
                }
            }
        }
    }
    let (known, out, block) = earliest_out;
    if known < latest_in.0 {
        found.push(format!(
            "snapshot {}: operation {} (called at {}) is in, operation {out} (known at {known}, block \
             {block}) is not",
            snap.name, latest_in.1, latest_in.0
        ));
    }
    if known < snap.invoked {
        found.push(format!(
            "snapshot {}: called at {}, lacks operation {out}, known at {known} (block {block})",
            snap.name, snap.invoked
        ));
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
