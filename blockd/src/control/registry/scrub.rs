//! The last scrub of a volume.

use super::object::{Key, Object};
use super::state::RegistryState;
use super::transaction::Transaction;
use crate::id::{NodeNo, ScrubPosition, VolumeId};
use serde::{Deserialize, Serialize};

/// What the last scrub of a volume came to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScrubRecord {
    /// The volume.
    pub volume: VolumeId,
    /// Milliseconds since 1970; shown, never compared.
    pub started_unix_ms: u64,
    /// The same, when it ended or was paused.
    pub ended_unix_ms: u64,
    /// Bytes that were verified.
    pub verified_bytes: u64,
    /// Bytes without their checksum.
    pub damaged_bytes: u64,
    /// Where it goes on; empty if it was complete.
    pub paused_at: Vec<(NodeNo, ScrubPosition)>,
}

impl RegistryState {
    /// The last scrub of a volume.
    #[must_use]
    pub fn scrub(&self, volume: VolumeId) -> Option<&ScrubRecord> {
        match self.get(&Key::Scrub(volume))? {
            Object::Scrub(record) => Some(record),
            _ => None,
        }
    }
}

/// Keeps the outcome of a scrub, unless the volume is gone; the later one counts.
#[must_use]
pub fn keep_scrub(state: &RegistryState, record: &ScrubRecord) -> Transaction {
    let volume = Key::Volume(record.volume);
    let expected = state.revision_of(&volume);
    match state.volume(record.volume) {
        None => Transaction::new(),
        Some(_) => Transaction::new()
            .expect(volume, expected)
            .put(Key::Scrub(record.volume), Object::Scrub(record.clone())),
    }
}
