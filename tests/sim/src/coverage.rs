//! What runs shall come to: kinds of faults, and states of the protocols. A test that stays green because
//! nothing of a kind happens any more shows here as a zero.

use crate::faults::Kind;
use std::collections::BTreeMap;

/// States that are counted under their own names.
const STATES: &[&str] = &[
    "end: a snapshot of unknown outcome exists",
    "end: all servers lose power after a flush",
    "end: damage is told",
    "entry error: Damaged",
    "entry error: NoSpace",
    "entry error: Unavailable",
    "entry error: flush overtaken",
    "entry error: the connection ended",
    "entry: connected",
    "entry: left by its client",
    "fault: ENOSPC",
    "fault: Reset that one side hears of late",
    "fault: bit flipped",
    "fault: dies at a disk operation",
    "fault: late messages",
    "fault: lost write",
    "fault: misdirected write",
    "fault: read EIO",
    "fault: sync EIO",
    "fault: write EIO",
    "move: done",
    "operator: restart after a disk error",
    "operator: restart of a server that refused to start",
    "resize: done",
    "rollback: done",
    "rollback: not heard by all",
    "snapshot: Unavailable",
    "snapshot: aborted",
    "snapshot: deleted",
    "snapshot: taken by Barrier",
    "snapshot: taken by Hold",
    "snapshot: taken by Stamp",
    "snapshot: unknown",
    "state: log cut at a start",
    "volume: created",
    "volume: deleted",
    "volume: left to the end",
    "volume: not created",
    "wish: done",
];

/// What the program says when it goes another way than the straight one.
const LOGGED: &[&str] = &[
    "a page move went another way",
    "a step of a page move failed",
    "aborted snapshot is swept later",
    "cannot sweep a snapshot",
    "cannot sweep a volume",
    "dropping pages of other servers",
    "eras are merged at the next start",
    "gave up",
    "pages are doubted again after a restart",
    "pages are held: whose are they?",
    "pages handed over",
    "pages of other servers are not dropped",
    "peer connection ended",
    "pending snapshot is swept later",
    "replaying",
    "request failed",
    "snapshot not committed",
    "snapshot not taken",
    "snapshot record is removed later",
    "snapshot verdict=Aborted",
    "snapshot verdict=Committed",
    "snapshot verdict=Unknown",
    "space is freed later",
    "space of a deleted snapshot is not freed",
    "space of a deleted volume is not freed",
    "space of a rollback is freed at the next start",
    "space of the snapshot is freed later",
    "span ended by its deadline",
    "swept a snapshot that the registry does not have",
    "swept a volume that the registry does not have",
    "the change is made, but this server does not hear of it",
    "the page store has stopped",
    "the registry leader failed to answer",
    "the volume waits for its store",
    "whose the pages are is not known yet",
    "writes cannot be stamped",
];

/// The counts of all runs, and zeros for what they did not come to.
#[must_use]
pub(crate) fn with_zeros(counts: &BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    let kinds = Kind::ALL.iter().map(|kind| format!("fault: {kind:?}"));
    let states = STATES.iter().map(|state| (*state).to_owned());
    let logged = LOGGED.iter().map(|text| format!("log: {text}"));
    let expected = kinds.chain(states).chain(logged);
    let mut all: BTreeMap<String, u64> = expected.map(|what| (what, 0)).collect();
    all.extend(counts.iter().map(|(what, count)| (what.clone(), *count)));
    all
}
