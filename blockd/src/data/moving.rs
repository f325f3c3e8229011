//! Pages that are moving away from this owner: what changed since it was copied, and what is held
//! while ownership is handed over (S003-19).
//!
//! Changes are noted when they end, so what is taken from the notes and read from the store
//! afterwards is never older than the note. The hold is of the moving pages only, but for changes
//! over several pages, which may lie on them: new ones wait, and open ones end first. So a change
//! over several pages never lies half on the old and half on the new side of a hand-over.
//!
//! Invariant: while changes are held and all that began before have ended, nothing changes the pages
//! in the store; while everything is held, nothing of them is answered.

use super::error::DataError;
use crate::id::{CHUNK_BYTES, PageNo};
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::ops::Range;
use std::rc::Rc;
use tokio::sync::Notify;

/// What waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hold {
    #[default]
    Nothing,
    /// Changes: the last tail is copied.
    Changes,
    /// Reads and flushes, too: somebody else may be the owner already.
    Everything,
}

/// A chunk of a page.
pub type ChunkNo = (PageNo, u16);

/// The moving pages of one volume on their owner.
#[derive(Default)]
pub struct Moving {
    pages: RefCell<Range<u32>>,
    dirty: RefCell<BTreeSet<ChunkNo>>,
    hold: Cell<Hold>,
    /// Counts the holds of changes.
    turn: Cell<u32>,
    /// Changes of any page that are being executed, and those of them that began before this turn.
    executing: Cell<u32>,
    earlier: Cell<u32>,
    /// Changes over several pages that were let in and have not ended.
    spans: Cell<u32>,
    waiting: Cell<u32>,
    changed: Notify,
}

/// A change that is being executed; it has ended, whatever became of it, when this is dropped.
pub struct Noted {
    moving: Rc<Moving>,
    turn: u32,
    page: PageNo,
    /// Bytes in the page.
    bytes: Range<u32>,
}

impl Drop for Noted {
    fn drop(&mut self) {
        let moving = &self.moving;
        moving.note(self.page, &self.bytes);
        moving.executing.set(moving.executing.get() - 1);
        if self.turn != moving.turn.get() {
            moving.earlier.set(moving.earlier.get() - 1);
            moving.look();
        }
    }
}

/// A change over several pages; it has ended when this is dropped.
pub struct OpenSpan(Rc<Moving>);

impl Drop for OpenSpan {
    fn drop(&mut self) {
        self.0.spans.set(self.0.spans.get() - 1);
        self.0.look();
    }
}

impl Moving {
    /// Begins to note what changes in these pages.
    pub fn begin(&self, pages: Range<u32>) {
        *self.pages.borrow_mut() = pages;
        self.dirty.borrow_mut().clear();
    }

    /// These pages may belong to somebody else: nothing of them is answered before that is known.
    pub fn doubt(&self, pages: Range<u32>) {
        self.begin(pages);
        self.hold.set(Hold::Everything);
    }

    /// Holds less or more.
    pub fn hold(&self, hold: Hold) {
        if self.hold.get() == Hold::Nothing && hold != Hold::Nothing {
            self.turn.set(self.turn.get().wrapping_add(1));
            self.earlier.set(self.executing.get());
        }
        self.hold.set(hold);
        self.changed.notify_waiters();
    }

    /// Ends the move: what waits goes on, and finds the owner of now.
    pub fn end(&self) {
        self.begin(0..0);
        self.hold(Hold::Nothing);
    }

    /// Requests that a hold keeps waiting now.
    #[must_use]
    pub fn waiting(&self) -> u32 {
        self.waiting.get()
    }

    /// Waits until all that began before the hold has ended.
    pub async fn quiet(&self) {
        loop {
            let changed = self.changed.notified();
            if self.earlier.get() == 0 && self.spans.get() == 0 {
                return;
            }
            changed.await;
        }
    }

    /// What changed since the notes were taken last.
    #[must_use]
    pub fn take_dirty(&self) -> BTreeSet<ChunkNo> {
        self.dirty.take()
    }

    /// Chunks that changed since the notes were taken last.
    #[must_use]
    pub fn dirty_chunks(&self) -> usize {
        self.dirty.borrow().len()
    }

    /// Whether a request of this page waits: a change, or anything.
    #[must_use]
    pub fn holds(&self, page: PageNo, least: Hold) -> bool {
        self.hold.get() >= least && self.pages.borrow().contains(&page.0)
    }

    /// Waits while requests of this page are held.
    pub async fn passed(&self, page: PageNo, least: Hold) {
        self.wait_while(|moving| moving.holds(page, least)).await;
    }

    /// Waits while any page may belong to somebody else.
    pub async fn settled(&self) {
        self.wait_while(|moving| moving.hold.get() == Hold::Everything)
            .await;
    }

    async fn wait_while(&self, is_held: impl Fn(&Self) -> bool) {
        if !is_held(self) {
            return;
        }
        let _waiting = Counted::new(&self.waiting);
        loop {
            let changed = self.changed.notified();
            if !is_held(self) {
                return;
            }
            changed.await;
        }
    }

    /// Notes a change that is going to be executed.
    #[must_use]
    pub fn change(self: &Rc<Self>, page: PageNo, bytes: Range<u32>) -> Noted {
        self.executing.set(self.executing.get() + 1);
        Noted {
            moving: Rc::clone(self),
            turn: self.turn.get(),
            page,
            bytes,
        }
    }

    /// Lets in a change over several pages.
    ///
    /// # Errors
    /// [`DataError::Held`] while pages are handed over.
    pub fn open_span(self: &Rc<Self>) -> Result<OpenSpan, DataError> {
        if self.hold.get() != Hold::Nothing {
            return Err(DataError::Held);
        }
        Ok(self.interrupted_span())
    }

    /// A change over several pages that was let in before the start.
    #[must_use]
    pub fn interrupted_span(self: &Rc<Self>) -> OpenSpan {
        self.spans.set(self.spans.get() + 1);
        OpenSpan(Rc::clone(self))
    }

    fn note(&self, page: PageNo, bytes: &Range<u32>) {
        if bytes.is_empty() || !self.pages.borrow().contains(&page.0) {
            return;
        }
        let chunks = bytes.start / CHUNK_BYTES..=(bytes.end - 1) / CHUNK_BYTES;
        let chunks = chunks.filter_map(|chunk| Some((page, u16::try_from(chunk).ok()?)));
        self.dirty.borrow_mut().extend(chunks);
    }

    fn look(&self) {
        if self.hold.get() != Hold::Nothing {
            self.changed.notify_waiters();
        }
    }
}

/// Counts one that waits, also when the wait is given up.
struct Counted<'a>(&'a Cell<u32>);

impl<'a> Counted<'a> {
    fn new(count: &'a Cell<u32>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;

    #[test]
    fn a_change_is_noted_when_it_ends_and_only_in_moving_pages() {
        let moving = Rc::new(Moving::default());
        moving.begin(2..4);
        let change = moving.change(PageNo(2), 65_000..140_000);
        assert!(moving.take_dirty().is_empty());
        drop(change);
        drop(moving.change(PageNo(4), 0..512));
        drop(moving.change(PageNo(3), 0..0));
        let dirty: Vec<_> = moving.take_dirty().into_iter().collect();
        assert_eq!(dirty, [0, 1, 2].map(|chunk| (PageNo(2), chunk)));
        assert_eq!(moving.dirty_chunks(), 0);
    }

    #[test]
    fn a_hold_is_quiet_when_earlier_changes_and_spans_have_ended() {
        let moving = Rc::new(Moving::default());
        moving.begin(0..1);
        let (change, span) = (moving.change(PageNo(9), 0..1), moving.open_span().unwrap());
        moving.hold(Hold::Changes);
        assert!(matches!(moving.open_span(), Err(DataError::Held)));
        let later = moving.change(PageNo(9), 0..1);
        assert!(moving.quiet().now_or_never().is_none());
        drop(change);
        assert!(moving.quiet().now_or_never().is_none());
        drop(span);
        assert!(moving.quiet().now_or_never().is_some());
        drop(later);
        assert!(
            moving
                .passed(PageNo(0), Hold::Changes)
                .now_or_never()
                .is_none()
        );
        assert!(
            moving
                .passed(PageNo(1), Hold::Changes)
                .now_or_never()
                .is_some()
        );
        assert!(
            moving
                .passed(PageNo(0), Hold::Everything)
                .now_or_never()
                .is_some()
        );
        moving.hold(Hold::Everything);
        assert!(
            moving
                .passed(PageNo(0), Hold::Everything)
                .now_or_never()
                .is_none()
        );
        moving.end();
        assert!(
            moving
                .passed(PageNo(0), Hold::Changes)
                .now_or_never()
                .is_some()
        );
    }
}
