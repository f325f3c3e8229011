//! What a snapshot that is being taken keeps waiting, of one volume on its owner.
//!
//! The gate refuses changes to begin: all of them (`hold`), or those that the store does not carry
//! out in one step (`barrier`, `stamp`), which a cut could tear. The mark parks completions: a
//! change that was executed behind it is acknowledged, and shown to readers, when it is lifted. The
//! stamps (`stamp`) say when each write was executed, so that a cut can be made by time afterwards.
//!
//! Invariants: while the gate is closed to a width and its count is zero, no change of that width
//! reaches the page store. While a mark stands, nobody but the store knows of what came behind it.

use super::error::DataError;
use super::moving::OpenSpan;
use super::page_store::OpenMark;
use crate::id::{SnapshotId, Stamp};
use crate::planted::{Plant, planted};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use tokio::sync::Notify;

/// How much a change does.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Width {
    /// One step of the store.
    Narrow,
    /// Several: it lies on several pages, or is a long one within a page.
    Wide,
}

impl Width {
    #[must_use]
    pub fn of(at_once: bool) -> Self {
        if at_once { Self::Narrow } else { Self::Wide }
    }
}

/// When the writes of a volume were executed: stamps and eras, which rise together.
#[derive(Debug)]
struct Stamps {
    /// Last era of what was executed before.
    before: u32,
    writes: Vec<(Stamp, u32)>,
}

/// The gate and the mark of one volume.
#[derive(Default)]
pub struct Cut {
    /// Changes of this width and more wait.
    closed: Cell<Option<Width>>,
    /// Changes that passed the gate and have not been executed, and those of them that are wide.
    executing: Cell<u32>,
    wide: Cell<u32>,
    /// The snapshot that was taken in the log, while its completions are parked.
    mark: Cell<Option<SnapshotId>>,
    /// The volume is about to be rolled back: no change begins.
    turning: Cell<bool>,
    /// While writes are stamped.
    stamps: RefCell<Option<Stamps>>,
    waiting: Cell<u32>,
    parked: Cell<u32>,
    changed: Notify,
}

/// A change that passed the gate; it has been executed, or given up, when this is dropped.
pub struct Executing {
    cut: Rc<Cut>,
    width: Width,
    span: Option<OpenSpan>,
    mark: Option<Rc<OpenMark>>,
}

impl Executing {
    /// Keeps a span open for as long.
    pub fn belongs_to(&mut self, span: OpenSpan) {
        self.span = Some(span);
    }

    /// Keeps a span noted as begun for as long.
    pub fn is_noted(&mut self, mark: Rc<OpenMark>) {
        self.mark = Some(mark);
    }
}

impl Drop for Executing {
    fn drop(&mut self) {
        self.cut.count(self.width, |count| count - 1);
        let turning = self.cut.turning.get().then_some(Width::Narrow);
        let closed = turning.or(self.cut.closed.get());
        if closed.is_some_and(|width| self.cut.executing(width) == 0) {
            self.cut.changed.notify_waiters();
        }
    }
}

/// Counts one that waits, also when the wait is given up.
struct Waiting<'a>(&'a Cell<u32>);

impl<'a> Waiting<'a> {
    fn new(count: &'a Cell<u32>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Cut {
    /// From now on changes of this width and more wait (S003-36).
    pub fn close(&self, width: Width) {
        if planted(Plant::HoldNothing) {
            return;
        }
        self.closed.set(Some(width));
    }

    /// From now on the completions of what is executed are parked, and what would show it.
    pub fn park(&self, mark: SnapshotId) {
        if planted(Plant::ParkNothing) {
            return;
        }
        self.mark.set(Some(mark));
    }

    /// From now on no change begins, or they begin again; independent of the gate of a snapshot.
    pub fn turn(&self, turning: bool) {
        self.turning.set(turning);
        self.changed.notify_waiters();
    }

    /// True if no change is being executed.
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.executing.get() == 0
    }

    /// Lets go whatever waits or is parked (S003-28).
    pub fn open(&self) {
        self.closed.set(None);
        self.mark.set(None);
        self.stamps.replace(None);
        self.changed.notify_waiters();
    }

    /// From now on writes are stamped (S003-41); what was executed has eras up to `before`.
    pub fn begin_stamps(&self, before: u32) {
        let writes = Vec::new();
        self.stamps.replace(Some(Stamps { before, writes }));
    }

    /// Whether writes are stamped.
    #[must_use]
    pub fn is_stamping(&self) -> bool {
        self.stamps.borrow().is_some()
    }

    /// Stamps the write that was executed in this step.
    pub fn stamp(&self, now: impl FnOnce() -> (Stamp, u32)) {
        if let Some(stamps) = &mut *self.stamps.borrow_mut() {
            stamps.writes.push(now());
        }
    }

    /// The last era of what was executed before `at`; `None` if writes are not stamped (S003-42).
    #[must_use]
    pub fn era_before(&self, at: Stamp) -> Option<u32> {
        let stamps = self.stamps.borrow();
        let stamps = stamps.as_ref()?;
        let earlier = stamps.writes.partition_point(|(stamp, _)| *stamp < at);
        let last = earlier.checked_sub(1).map(|index| stamps.writes[index].1);
        Some(last.unwrap_or(stamps.before))
    }

    /// Waits until no change of this width or more is executing; only meaningful while closed to it.
    pub async fn quiet(&self, width: Width) {
        loop {
            let changed = self.changed.notified();
            if self.executing(width) == 0 || planted(Plant::SkipQuiet) {
                return;
            }
            changed.await;
        }
    }

    fn executing(&self, width: Width) -> u32 {
        match width {
            Width::Narrow => self.executing.get(),
            Width::Wide => self.wide.get(),
        }
    }

    fn count(&self, width: Width, change: impl Fn(u32) -> u32) {
        self.executing.set(change(self.executing.get()));
        if width == Width::Wide {
            self.wide.set(change(self.wide.get()));
        }
    }

    /// Whether anything is closed or parked.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.closed.get().is_some() || self.mark.get().is_some() || self.is_stamping()
    }

    /// Changes that passed the gate and have not been executed.
    #[must_use]
    pub fn all_executing(&self) -> u32 {
        self.executing.get()
    }

    /// Changes that wait at the gate now.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.waiting.get()
    }

    /// Completions and reads that are parked now.
    #[must_use]
    pub fn parked(&self) -> u32 {
        self.parked.get()
    }

    /// The mark behind which everything is parked now.
    #[must_use]
    pub fn mark(&self) -> Option<SnapshotId> {
        self.mark.get()
    }

    /// Waits until this mark is lifted; not at all without one.
    pub async fn unparked(&self, mark: Option<SnapshotId>) {
        if mark.is_none() {
            return;
        }
        let _parked = Waiting::new(&self.parked);
        loop {
            let changed = self.changed.notified();
            if self.mark.get() != mark {
                return;
            }
            changed.await;
        }
    }

    /// Passes the gate at once, or says that the volume is held.
    ///
    /// # Errors
    /// [`DataError::Held`].
    pub fn try_execute(self: &Rc<Self>, width: Width) -> Result<Executing, DataError> {
        let ignored = width == Width::Wide && planted(Plant::SpanIgnoresHold);
        let closed = self.closed.get().is_some_and(|closed| closed <= width) && !ignored;
        if self.turning.get() || closed {
            return Err(DataError::Held);
        }
        self.count(width, |count| count + 1);
        let cut = Rc::clone(self);
        Ok(Executing {
            cut,
            width,
            span: None,
            mark: None,
        })
    }

    /// Passes the gate when it is open; that it is closed is bounded by a deadline.
    pub async fn execute(self: &Rc<Self>, width: Width) -> Executing {
        loop {
            let changed = self.changed.notified();
            if let Ok(executing) = self.try_execute(width) {
                return executing;
            }
            let waiting = Waiting::new(&self.waiting);
            changed.await;
            drop(waiting);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// S003-42, the writes of FIG. 8 on three servers: 130 and 132 were executed before prepare,
    /// then 136 and 134; T is later than those and earlier than 138.
    #[test]
    fn fig_8_has_130_132_136_134_and_not_138() {
        let cut = Cut::default();
        assert_eq!(cut.era_before(Stamp(9)), None);
        let (era_of_132, at) = (2, Stamp(1370));
        cut.begin_stamps(era_of_132);
        assert_eq!(cut.era_before(at), Some(era_of_132));
        for (stamp, era) in [(1360, 3), (1340 + 25, 4), (1380, 5)] {
            cut.stamp(|| (Stamp(stamp), era));
        }
        assert_eq!(cut.era_before(at), Some(4));
        assert_eq!(cut.era_before(Stamp(1380)), Some(4), "T itself is not in");
        assert_eq!(cut.era_before(Stamp(1381)), Some(5));
        cut.open();
        assert!(!cut.is_stamping());
    }
}
