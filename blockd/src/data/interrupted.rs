//! Changes over several pages that were under way when this owner stopped, or when it lost the connection
//! to their requester (S003-33).
//!
//! Some of their parts may have been executed. Each keeps the gate of its volume open, as it did before,
//! so that no snapshot is taken and no page handed over that has half of it: until its requester has
//! come back for the rest, or must have given it up.

use super::cut::{Executing, Width};
use super::error::DataError;
use super::owner::{Owner, VolumeState};
use crate::id::VolumeId;
use crate::io::link::SpanList;
use crate::limits::{FORWARD_DEADLINE_MS, SPAN_GRACE_MS};
use crate::planted::{Plant, planted};
use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// The gates of the interrupted spans of a volume, by their ids.
#[derive(Default)]
pub(super) struct Interrupted {
    gates: RefCell<HashMap<u64, Kept>>,
}

struct Kept {
    gate: Executing,
    /// When its requester must have given it up.
    until: Instant,
}

impl Interrupted {
    fn keep(&self, id: u64, gate: Executing, until: Instant) {
        self.gates.borrow_mut().insert(id, Kept { gate, until });
    }

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
        if let Some(Kept { gate, .. }) = interrupted {
            return Ok(gate);
        }
        let mut gate = state.try_span()?;
        gate.is_noted(self.store.begin_span(state.id, id).await?);
        Ok(gate)
    }

    /// The requester of a span needs nothing more of it: one that was interrupted has ended.
    pub fn end_span(self: &Rc<Self>, volume: VolumeId, id: u64) {
        self.now_and_resumed(move |owner| {
            if let Some(state) = owner.volume(volume) {
                state.interrupted.gates.borrow_mut().remove(&id);
            }
        });
    }

    /// As [`Self::end_span`] of all that a requester has begun and that do not go on.
    pub fn end_spans(self: &Rc<Self>, list: SpanList) {
        self.now_and_resumed(move |owner| {
            for state in owner.volumes() {
                let mut gates = state.interrupted.gates.borrow_mut();
                gates.retain(|id, _| !list.has_ended(*id));
            }
        });
    }

    /// Ends spans. After a start their volume may be unknown until the registry has told of it: then once more, as
    /// what has ended once has ended for ever.
    fn now_and_resumed(self: &Rc<Self>, end: impl Fn(&Self) + 'static) {
        end(self);
        if self.has_resumed() {
            return;
        }
        let owner = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let deadline = Instant::now() + Duration::from_millis(FORWARD_DEADLINE_MS);
            owner.await_tables(deadline, Self::has_resumed).await;
            owner.spans_resumed.set(true);
            end(&owner);
        });
    }

    /// Whether every volume is known of which spans were under way before the start.
    #[must_use]
    pub fn has_resumed(&self) -> bool {
        if !self.spans_resumed.get() {
            let volumes = self.store.volumes_with_spans();
            let resumed = volumes.into_iter().all(|id| self.volume(id).is_some());
            self.spans_resumed.set(resumed);
        }
        self.spans_resumed.get()
    }

    /// Keeps the gate of a span whose connection was lost: for who comes back for the rest, before long.
    pub fn interrupt_span(&self, volume: VolumeId, id: u64, gate: Executing) {
        if let Some(state) = self.volume(volume) {
            let until = Instant::now() + Duration::from_millis(SPAN_GRACE_MS);
            state.interrupted.keep(id, gate, until);
            tokio::task::spawn_local(give_up(state, until));
        }
    }

    /// Opens the gates of what was under way before the start.
    pub(super) fn resume_spans(&self, state: &Rc<VolumeState>) {
        let interrupted = self.store.interrupted_spans(state.id);
        if interrupted.is_empty() || planted(Plant::ForgetSpans) {
            return;
        }
        tracing::info!(volume = %state.id, spans = interrupted.len(), "changes over several pages were interrupted");
        let until = Instant::now() + Duration::from_millis(FORWARD_DEADLINE_MS);
        for (id, mark) in interrupted {
            let Ok(mut gate) = state.cut.try_execute(Width::Wide) else {
                continue;
            };
            gate.belongs_to(state.moving.interrupted_span());
            gate.is_noted(mark);
            state.interrupted.keep(id, gate, until);
        }
        tokio::task::spawn_local(give_up(Rc::clone(state), until));
    }
}

/// Whoever has not come back by then has told its user that the change failed, or is dead.
async fn give_up(state: Rc<VolumeState>, until: Instant) {
    sleep_until(until).await;
    let mut gates = state.interrupted.gates.borrow_mut();
    let before = gates.len();
    gates.retain(|_, kept| until < kept.until);
    if gates.len() < before {
        tracing::warn!(volume = %state.id, spans = before - gates.len(), "nobody came back for changes over several pages");
    }
}
