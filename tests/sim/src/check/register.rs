//! Promises 1 to 3: every block is a register with crash semantics.

use super::intervals::{Intervals, LookKind};

pub(super) fn check(intervals: &Intervals<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for ((volume, block), entry) in &intervals.blocks {
        let mut looks = entry.looks.clone();
        looks.sort_unstable_by_key(|look| std::cmp::Reverse(look.from));
        for read in looks.iter().filter(|look| look.kind == LookKind::Read) {
            let Some(last) = entry.last_effect(read.tag, read.to) else {
                found.push(format!(
                    "volume {volume} block {block}: read {} shows a value of operation {} that was \
                     never written there by then",
                    read.op,
                    i64::from(read.tag) - 1
                ));
                continue;
            };
            if let Some(gone) = entry.gone(read.tag).filter(|gone| *gone < read.from) {
                found.push(format!(
                    "volume {volume} block {block}: read {} (called at {}) shows operation {}, which \
                     its own client wrote over, flushed at {gone}",
                    read.op,
                    read.from,
                    i64::from(read.tag) - 1
                ));
                break;
            }
            let killer = looks
                .iter()
                .take_while(|look| look.from > last)
                .find(|look| look.tag != read.tag && look.to < read.from && look.until > read.to);
            if let Some(killer) = killer {
                found.push(format!(
                    "volume {volume} block {block}: read {} (moments {} to {}) shows operation {} \
                     (last effect {last}) although {} {} (moments {} to {}) showed operation {} before",
                    read.op,
                    read.from,
                    read.to,
                    i64::from(read.tag) - 1,
                    match killer.kind {
                        LookKind::Read => "read",
                        LookKind::Change => "change",
                        LookKind::Replay => "replayed change",
                    },
                    killer.op,
                    killer.from,
                    killer.to,
                    i64::from(killer.tag) - 1,
                ));
                break;
            }
        }
    }
    found
}
