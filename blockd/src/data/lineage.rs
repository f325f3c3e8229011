//! What an owner's store must have done before the owner serves a volume at a routing epoch: be a clone,
//! or none any more; be rolled back.
//!
//! The registry says it, with the routing table of a new epoch; here it is carried out, once. Until
//! then the volume keeps its former table: requests of the new epoch wait, those of the former one
//! are served, but no new change begins. When the last one has ended the store does its part, by one
//! record of its log. So a change, or a span of changes over several owners, is before a rollback
//! everywhere or after it everywhere.
//! A span that was overtaken, because an owner that it had yet to reach was rolled back before, is let
//! go by the others and is done again as a whole.
//!
//! It is durable before anybody is told that it is done: a server that lost it, and whose copy of the
//! registry is older, would serve what was before.

use super::cut::Width;
use super::error::DataError;
use super::fence::Fence;
use super::owner::{Owner, VolumeState};
use super::page_store::{Parent, StoreError};
use super::router::RoutingTable;
use crate::id::{Epoch, SnapshotId};
use crate::limits::{FORWARD_DEADLINE_MS, LINEAGE_RETRY_MS};
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// What the registry says about one volume.
#[derive(Clone, Debug)]
pub struct Published {
    pub table: RoutingTable,
    pub fence: Fence,
    /// `None`: this server has no pages of it and gets none.
    pub lineage: Option<Lineage>,
    /// Why the volume is not served: it is off-line.
    pub offline: Option<Rc<str>>,
}

/// What the store of this server must make of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lineage {
    /// It is a clone. Also a server that has nothing of the parent must know: there, too, what a clone
    /// makes zeros is told from what it never wrote.
    pub parent: Option<Parent>,
    /// It was rolled back to this snapshot, at this routing epoch.
    pub rollback: Option<(SnapshotId, Epoch)>,
}

/// What is to be done for one volume, and whether it is off-line.
#[derive(Default)]
pub(super) struct LineageGate {
    pending: RefCell<Option<(RoutingTable, Option<Lineage>)>>,
    /// Since when a task waits for its turn, and changes for it.
    waits: Cell<Option<Instant>>,
    offline: RefCell<Option<Rc<str>>>,
}

impl LineageGate {
    /// True if nothing is to be done.
    pub(super) fn is_settled(&self) -> bool {
        self.pending.borrow().is_none()
    }

    /// Refuses what concerns the volume itself while it is off-line (S001-06).
    pub(super) fn check_online(&self, snapshot: Option<SnapshotId>) -> Result<(), DataError> {
        match (&*self.offline.borrow(), snapshot) {
            (Some(why), None) => Err(DataError::Leased(why.as_ref().to_owned())),
            _ => Ok(()),
        }
    }
}

/// Changes that wait until the store is what a routing epoch wants it to be. They have no
/// deadline: it ends with the changes that began before.
#[derive(Clone, Copy, Debug)]
pub struct LineageHold {
    pub epoch: Epoch,
    pub rollback: Option<SnapshotId>,
    pub since: Instant,
}

impl VolumeState {
    /// What keeps changes waiting for the store, if anything does.
    #[must_use]
    pub fn lineage_hold(&self) -> Option<LineageHold> {
        let since = self.lineage.waits.get()?;
        let pending = self.lineage.pending.borrow();
        let (table, lineage) = pending.as_ref()?;
        Some(LineageHold {
            epoch: table.epoch,
            rollback: lineage.and_then(|lineage| Some(lineage.rollback?.0)),
            since,
        })
    }

    /// Whether the store has done everything that came with the newest routing table heard of.
    #[must_use]
    pub fn is_settled(&self) -> bool {
        self.lineage.is_settled()
    }
}

impl Owner {
    /// Takes over what the registry says of a volume, now or when its store has done its part.
    pub(super) fn take_over(self: &Rc<Self>, state: &Rc<VolumeState>, published: Published) {
        let Published {
            table,
            lineage,
            offline,
            ..
        } = published;
        *state.lineage.offline.borrow_mut() = offline;
        *state.lineage.pending.borrow_mut() = Some((table, lineage));
        if self.settle(state) {
            return;
        }
        state.cut.turn(true);
        if state.lineage.waits.get().is_none() {
            state.lineage.waits.set(Some(Instant::now()));
            tokio::task::spawn_local(settle_later(Rc::downgrade(self), Rc::clone(state)));
        }
    }

    /// Does what is to be done, unless changes are being executed that must end first.
    fn settle(&self, state: &VolumeState) -> bool {
        let pending = state.lineage.pending.borrow().clone();
        let Some((table, lineage)) = pending else {
            return true;
        };
        if self.waits_for_rollback(state) {
            // It takes back what they have done here.
            state.interrupted.let_go();
            if !state.cut.is_quiet() {
                return false;
            }
        }
        if let Err(error) = self.carry_out(state, &table, lineage) {
            if state.lineage.waits.get().is_none() {
                tracing::warn!(volume = %state.id, %error, "the volume waits for its store");
            }
            return false;
        }
        *state.lineage.pending.borrow_mut() = None;
        self.set_table(state, table);
        state.cut.turn(false);
        true
    }

    /// Whether the store is still to be rolled back.
    fn waits_for_rollback(&self, state: &VolumeState) -> bool {
        let pending = state.lineage.pending.borrow();
        let lineage = pending.as_ref().and_then(|(_, lineage)| *lineage);
        let rollback = lineage.and_then(|lineage| lineage.rollback);
        rollback.is_some_and(|(_, epoch)| self.store.rolled_back(state.id) < epoch)
    }

    /// Whether a span that goes on at `epoch` elsewhere keeps this server from a rollback that came
    /// with that epoch. The rollback takes back what the span has done here, so the span may be let
    /// go, and must: it cannot go on here before that.
    pub async fn is_overtaken(&self, state: &VolumeState, epoch: Epoch) -> bool {
        let has_heard =
            |owner: &Self| epoch <= state.table().epoch || owner.waits_for_rollback(state);
        let deadline = Instant::now() + Duration::from_millis(FORWARD_DEADLINE_MS / 10);
        self.await_tables(deadline, has_heard).await;
        state.table().epoch < epoch && self.waits_for_rollback(state)
    }

    fn carry_out(
        &self,
        state: &VolumeState,
        table: &RoutingTable,
        lineage: Option<Lineage>,
    ) -> Result<(), StoreError> {
        let Some(lineage) = lineage else {
            return Ok(());
        };
        let (store, volume) = (&self.store, state.id);
        let rolled_back = store.rolled_back(volume);
        if table.epoch < rolled_back {
            return Err(StoreError::Behind {
                volume,
                epoch: rolled_back,
            });
        }
        match lineage.parent {
            Some(parent) => store.clone_volume(volume, parent)?,
            None => store.detach(volume)?,
        }
        match lineage.rollback {
            Some((snapshot, epoch)) if rolled_back < epoch => {
                store.roll_back(volume, snapshot, epoch)
            }
            _ => Ok(()),
        }
    }
}

/// Settles a volume when its changes have ended, however long that takes.
async fn settle_later(owner: Weak<Owner>, state: Rc<VolumeState>) {
    let pause = Duration::from_millis(LINEAGE_RETRY_MS);
    loop {
        // A change that ended is told at once; what the store refused is tried again later.
        let quiet = timeout(pause, state.cut.quiet(Width::Narrow)).await;
        let Some(owner) = owner.upgrade() else { return };
        let is_known = owner
            .volume(state.id)
            .is_some_and(|known| Rc::ptr_eq(&known, &state));
        if !is_known || owner.settle(&state) {
            state.lineage.waits.set(None);
            return;
        }
        drop(owner);
        if quiet.is_ok() {
            sleep(pause).await;
        }
    }
}
