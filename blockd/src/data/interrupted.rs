//! Changes over several pages that were under way when this owner stopped (S003-33).
//!
//! Some of their parts may have been executed. Each keeps the gate of its volume open, as it did before,
//! so that no snapshot is taken and no page handed over that has half of it: until its requester has
//! come back for the rest, or must have given it up.

use super::cut::{Executing, Width};
use super::error::DataError;
use super::owner::{Owner, VolumeState};
use crate::id::VolumeId;
use crate::io::link::SpanList;
use crate::limits::FORWARD_DEADLINE_MS;
use crate::planted::{Plant, planted};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::sleep;

/// The gates of the interrupted spans of a volume, by their ids.
#[derive(Default)]
pub(super) struct Interrupted {
    gates: RefCell<HashMap<u64, Executing>>,
}

impl Interrupted {
    /// Forgets all of them.
    pub(super) fn let_go(&self) {
        self.gates.take();
    }
}

impl Owner {
    /// Lets in a span of another server or a client; one that was interrupted goes on.
    ///
    /// # Errors
    /// [`DataError::Held`] while a snapshot is being taken or pages are handed over; [`DataError::NoSpace`].
    pub async fn begin_span(&self, state: &VolumeState, id: u64) -> Result<Executing, DataError> {
        let interrupted = state.interrupted.gates.borrow_mut().remove(&id);
        if let Some(gate) = interrupted {
            return Ok(gate);
        }
        let mut gate = state.try_span()?;
        gate.is_noted(self.store.begin_span(state.id, id).await?);
        Ok(gate)
    }

    /// The requester of a span needs nothing more of it: one that was interrupted has ended.
    pub fn end_span(&self, volume: VolumeId, id: u64) {
        if let Some(state) = self.volume(volume) {
            state.interrupted.gates.borrow_mut().remove(&id);
        }
    }

    /// As [`Self::end_span`] of all that a requester has begun and that do not go on.
    pub fn end_spans(&self, list: &SpanList) {
        for state in self.volumes() {
            let mut gates = state.interrupted.gates.borrow_mut();
            gates.retain(|id, _| !list.has_ended(*id));
        }
    }

    /// Opens the gates of what was under way before the start.
    pub(super) fn resume_spans(&self, state: &Rc<VolumeState>) {
        let interrupted = self.store.interrupted_spans(state.id);
        if interrupted.is_empty() || planted(Plant::ForgetSpans) {
            return;
        }
        tracing::info!(volume = %state.id, spans = interrupted.len(), "changes over several pages were interrupted");
        for (id, mark) in interrupted {
            let Ok(mut gate) = state.cut.try_execute(Width::Wide) else {
                continue;
            };
            gate.belongs_to(state.moving.interrupted_span());
            gate.is_noted(mark);
            state.interrupted.gates.borrow_mut().insert(id, gate);
        }
        tokio::task::spawn_local(give_up(Rc::clone(state)));
    }
}

/// Whoever has not come back for so long has told its user that the change failed.
async fn give_up(state: Rc<VolumeState>) {
    sleep(Duration::from_millis(FORWARD_DEADLINE_MS)).await;
    let left = state.interrupted.gates.take().len();
    if 0 < left {
        tracing::warn!(volume = %state.id, spans = left, "nobody came back for changes over several pages");
    }
}
