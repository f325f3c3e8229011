//! Changes over several pages that are under way, so that a restart does not forget them (S003-33).
//!
//! A snapshot must not be taken between two parts of a span. The owner keeps its gate open for as long
//! (`data::owner`), but a gate dies with the process, and the parts that were executed stay. So the log
//! has a record before the first part and one behind the last: what was begun and has not ended when
//! the store is opened may have been executed in part. The records need no sync, as the log
//! loses them only with all that came after them.

use super::engine::{Engine, Step};
use super::error::StoreError;
use super::log::RESERVE_MARKS;
use super::record::Change;
use super::runner::Runner;
use super::shell::PageStore;
use crate::id::VolumeId;
use crate::io::disk::Disk;
use std::cell::RefCell;
use std::collections::{BTreeSet, HashMap};
use std::rc::{Rc, Weak};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender};

/// A span: the volume, and the id that its requester gave it, the same at each try and no other's.
type SpanKey = (VolumeId, u64);

impl<D: Disk> Engine<D> {
    /// Notes that a span may be executed in part from now on.
    pub fn begin_span(&mut self, volume: VolumeId, span: u64) -> Result<Step<()>, StoreError> {
        self.check_writable()?;
        self.check_volume(volume)?;
        if self.tables.spans.contains(&(volume.0, span)) {
            return Ok(Step::Done(()));
        }
        self.note_span(&Change::SpanBegun(volume, span))
    }

    /// Notes that nothing more of a span comes.
    pub fn end_span(&mut self, volume: VolumeId, span: u64) -> Result<Step<()>, StoreError> {
        self.check_writable()?;
        if !self.tables.spans.contains(&(volume.0, span)) {
            return Ok(Step::Done(()));
        }
        self.note_span(&Change::SpanEnded(volume, span))
    }

    fn note_span(&mut self, change: &Change) -> Result<Step<()>, StoreError> {
        if !self.log.has_room(64, RESERVE_MARKS) {
            return Ok(Step::Full);
        }
        self.commit(change, &[])?;
        Ok(Step::Done(()))
    }

    /// Volumes that have spans which have begun and not ended.
    fn volumes_with_spans(&self) -> BTreeSet<VolumeId> {
        let spans = self.tables.spans.iter();
        spans.map(|(volume, _)| VolumeId(*volume)).collect()
    }

    /// Spans of a volume that have begun and not ended, in order.
    pub fn open_spans(&self, volume: VolumeId) -> Vec<u64> {
        let spans = self
            .tables
            .spans
            .range((volume.0, 0)..=(volume.0, u64::MAX));
        spans.map(|(_, span)| *span).collect()
    }
}

/// The spans that somebody has under way, and where their ends are told.
pub(super) struct Spans {
    open: RefCell<HashMap<SpanKey, Weak<OpenMark>>>,
    ended: UnboundedSender<SpanKey>,
}

/// A span that is noted in the log as begun; as ended some time after the last of these is dropped.
pub struct OpenMark {
    key: SpanKey,
    ended: UnboundedSender<SpanKey>,
}

impl Drop for OpenMark {
    fn drop(&mut self) {
        // Without a receiver the store is gone, and this stays open in its log.
        let _ = self.ended.send(self.key);
    }
}

impl Spans {
    pub(super) fn new(ended: UnboundedSender<SpanKey>) -> Self {
        Self {
            open: RefCell::default(),
            ended,
        }
    }

    fn is_open(&self, key: &SpanKey) -> bool {
        let open = self.open.borrow();
        open.get(key).is_some_and(|mark| 0 < mark.strong_count())
    }

    fn open(&self, key: SpanKey) -> Rc<OpenMark> {
        let mut open = self.open.borrow_mut();
        if let Some(mark) = open.get(&key).and_then(Weak::upgrade) {
            return mark;
        }
        let ended = self.ended.clone();
        let mark = Rc::new(OpenMark { key, ended });
        open.insert(key, Rc::downgrade(&mark));
        mark
    }
}

impl PageStore {
    /// Notes that a span may be executed in part from now on, before any part is. One that was begun
    /// before, over another connection, is the same.
    pub async fn begin_span(
        &self,
        volume: VolumeId,
        span: u64,
    ) -> Result<Rc<OpenMark>, StoreError> {
        let mark = self.runner.spans.open((volume, span));
        self.runner
            .attempt(|engine, _| engine.begin_span(volume, span))
            .await?;
        self.runner.after_change();
        Ok(mark)
    }

    /// Volumes that have spans which have begun and not ended.
    #[must_use]
    pub fn volumes_with_spans(&self) -> BTreeSet<VolumeId> {
        self.runner.engine.borrow().volumes_with_spans()
    }

    /// Spans of a volume that had begun before the store was opened, with the mark of each.
    #[must_use]
    pub fn interrupted_spans(&self, volume: VolumeId) -> Vec<(u64, Rc<OpenMark>)> {
        let (engine, spans) = (self.runner.engine.borrow(), &self.runner.spans);
        let noted = engine.open_spans(volume).into_iter();
        let left = noted.filter(|span| !spans.is_open(&(volume, *span)));
        left.map(|span| (span, spans.open((volume, span))))
            .collect()
    }
}

/// Notes the ends of spans until the store is gone.
pub(super) async fn note_ends(runner: Weak<Runner>, mut ended: UnboundedReceiver<SpanKey>) {
    while let Some((volume, span)) = ended.recv().await {
        let Some(runner) = runner.upgrade() else {
            return;
        };
        if runner.spans.is_open(&(volume, span)) {
            continue;
        }
        runner.spans.open.borrow_mut().remove(&(volume, span));
        let noted = runner
            .attempt(|engine, _| engine.end_span(volume, span))
            .await;
        match noted {
            Ok(()) => runner.after_change(),
            Err(error) => tracing::debug!(%volume, span, %error, "the end of a span is not noted"),
        }
    }
}
