//! The running transaction: what it changed, who is changing it, and how far the ones before it have come.
//!
//! ```text
//! running (handles change blocks) -> committing (frozen, written to the log) -> committed -> home (checkpoint)
//! ```
//!
//! Operations share the barrier; a commit takes it alone, only to put a new running transaction in the place of
//! the old one. Whoever waits for the barrier must therefore not be waited for by who is inside.

use crate::ext4::error::FsError;
use std::collections::{BTreeSet, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{OwnedRwLockReadGuard, RwLock, RwLockWriteGuard, watch};

/// The number of a transaction since the filesystem was opened, from 1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tid(pub u64);

impl Tid {
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// What became free in a transaction, to be given away again after its commit.
#[derive(Debug, Default)]
pub struct Freed {
    /// Blocks of data.
    pub data: Vec<Range<u64>>,
    /// Blocks of metadata; they are revoked.
    pub metadata: HashSet<u64>,
    pub inodes: Vec<u32>,
}

/// The transaction that operations change.
#[derive(Debug, Default)]
pub(super) struct Running {
    pub(super) tid: Tid,
    pub(super) changed: HashSet<u64>,
    pub(super) groups: BTreeSet<u32>,
    pub(super) freed: Freed,
    /// Blocks that open handles may still change.
    promised: usize,
}

impl Running {
    pub(super) fn is_empty(&self) -> bool {
        self.changed.is_empty() && self.freed.metadata.is_empty()
    }
}

/// How far the transactions have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub committed: Tid,
    pub aborted: bool,
}

/// All transactions that have not come home.
pub struct Transactions {
    barrier: Arc<RwLock<()>>,
    running: Mutex<Running>,
    /// Blocks that one transaction may change.
    max_blocks: usize,
    progress: watch::Sender<Progress>,
    /// The youngest that was written to the log; a commit of nothing does not count.
    flushed: AtomicU64,
    aborted: AtomicBool,
    reason: Mutex<String>,
}

/// Inside the running transaction.
pub(super) struct Ticket {
    _inside: OwnedRwLockReadGuard<()>,
    pub(super) tid: Tid,
    credits: usize,
}

impl Transactions {
    #[must_use]
    pub fn new(max_blocks: usize) -> Self {
        let running = Running {
            tid: Tid(1),
            ..Running::default()
        };
        let progress = Progress {
            committed: Tid(0),
            aborted: false,
        };
        Self {
            barrier: Arc::default(),
            running: Mutex::new(running),
            max_blocks,
            progress: watch::Sender::new(progress),
            flushed: AtomicU64::new(0),
            aborted: AtomicBool::new(false),
            reason: Mutex::default(),
        }
    }

    pub(super) fn running(&self) -> MutexGuard<'_, Running> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn max_blocks(&self) -> usize {
        self.max_blocks
    }

    /// Enters the running transaction with so many credits; or the transaction that has to commit before.
    pub(super) async fn enter(&self, credits: u32) -> Result<Result<Ticket, Tid>, FsError> {
        let inside = self.barrier.clone().read_owned().await;
        self.check()?;
        let credits = credits as usize;
        let mut running = self.running();
        let busy = running.changed.len() + running.promised;
        if busy > 0 && busy + credits > self.max_blocks {
            return Ok(Err(running.tid));
        }
        running.promised += credits;
        let tid = running.tid;
        Ok(Ok(Ticket {
            _inside: inside,
            tid,
            credits,
        }))
    }

    pub(super) fn leave(&self, ticket: &Ticket) {
        self.running().promised -= ticket.credits;
    }

    /// Waits until nobody is inside, and keeps everybody out.
    pub(super) async fn close_barrier(&self) -> RwLockWriteGuard<'_, ()> {
        self.barrier.write().await
    }

    /// Puts a new transaction in the place of the running one. The barrier is closed.
    pub(super) fn swap(&self) -> Running {
        let mut running = self.running();
        let next = Running {
            tid: running.tid.next(),
            ..Running::default()
        };
        std::mem::replace(&mut running, next)
    }

    pub(super) fn committed(&self, tid: Tid) {
        self.progress
            .send_modify(|progress| progress.committed = tid);
    }

    /// `tid` was written to the log, and with that the device was flushed.
    pub(super) fn flushed(&self, tid: Tid) {
        self.flushed.fetch_max(tid.0, Ordering::AcqRel);
    }

    /// Whether the device was flushed by a commit that began at the end of `tid` or later.
    pub(super) fn has_flushed(&self, tid: Tid) -> bool {
        self.flushed.load(Ordering::Acquire) >= tid.0
    }

    #[must_use]
    pub fn is_committed(&self, tid: Tid) -> bool {
        self.progress.borrow().committed >= tid
    }

    /// Waits until `tid` has committed.
    ///
    /// # Errors
    /// [`FsError::Aborted`].
    pub async fn wait_for(&self, tid: Tid) -> Result<(), FsError> {
        let mut progress = self.progress.subscribe();
        let arrived = |progress: &Progress| progress.committed >= tid || progress.aborted;
        let reached = progress.wait_for(arrived).await;
        match reached {
            Ok(progress) if progress.committed >= tid => Ok(()),
            _ => Err(self.abort_error()),
        }
    }

    /// The journal is given up.
    pub fn abort(&self, reason: &str) {
        if self.end(reason) {
            tracing::error!("the journal is given up: {reason}");
        }
    }

    /// Nothing is written any more. The first reason is kept; whether it is this one.
    pub(super) fn end(&self, reason: &str) -> bool {
        let first = !self.aborted.swap(true, Ordering::AcqRel);
        if first {
            let mut kept = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
            reason.clone_into(&mut kept);
            drop(kept);
            self.progress
                .send_modify(|progress| progress.aborted = true);
        }
        first
    }

    /// # Errors
    /// [`FsError::Aborted`].
    pub fn check(&self) -> Result<(), FsError> {
        if self.aborted.load(Ordering::Acquire) {
            Err(self.abort_error())
        } else {
            Ok(())
        }
    }

    fn abort_error(&self) -> FsError {
        let reason = self.reason.lock().unwrap_or_else(PoisonError::into_inner);
        FsError::Aborted {
            reason: reason.clone(),
        }
    }
}
