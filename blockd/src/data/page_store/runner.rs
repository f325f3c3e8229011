//! What runs behind a store's handle: jobs to the lanes, their outcomes back, and who waits for them.

use super::engine::{ColdRead, Engine, Fetched, Step};
use super::error::StoreError;
use super::lanes::{Lanes, Outcome};
use super::scrub::{BadChunk, ChunkBuffer, StoredChunk};
use super::spans::Spans;
use crate::io::device::Device;
use crate::io::disk::Disk;
use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, mpsc};
use tokio::task::spawn_local;

/// Rounds of upkeep to wait for when there is no space.
const SPACE_ROUNDS: u32 = 8;

pub(super) type StoreEngine = Engine<Arc<dyn Disk>>;

/// The state that all handles of a store share.
pub(super) struct Runner {
    pub(super) engine: RefCell<StoreEngine>,
    pub(super) device: Device,
    pub(super) lanes: RefCell<Option<Lanes>>,
    /// Some job has ended.
    pub(super) progress: Notify,
    /// Lsn that flushes wait for.
    pub(super) flush_wanted: Cell<u64>,
    pub(super) timer_armed: Cell<bool>,
    pub(super) sync_interval: Duration,
    /// Changes over several pages that are under way.
    pub(super) spans: Spans,
}

/// Takes what the worker threads have done until the store is gone.
pub(super) async fn take_outcomes(
    runner: Weak<Runner>,
    mut outcomes: mpsc::UnboundedReceiver<Outcome>,
) {
    while let Some(outcome) = outcomes.recv().await {
        let Some(runner) = runner.upgrade() else {
            return;
        };
        if let Err(error) = runner.engine.borrow_mut().finish(outcome) {
            tracing::error!(%error, "the page store has stopped");
        }
        runner.kick();
        runner.progress.notify_waiters();
    }
}

impl Runner {
    /// Those of the chunks that do not verify.
    pub(super) async fn verify(
        &self,
        chunks: Vec<StoredChunk>,
    ) -> Result<Vec<BadChunk>, StoreError> {
        let disk = self.engine.borrow().disk();
        let work = move || {
            let mut buffer = ChunkBuffer::default();
            let bad = chunks
                .iter()
                .filter_map(|chunk| chunk.verify(&*disk, &mut buffer));
            bad.collect()
        };
        self.device.run(work).await.map_err(|_| StoreError::Closed)
    }

    /// Starts whatever can be started. An error is latched in the engine and met by the next request.
    pub(super) fn kick(&self) {
        let lanes = self.lanes.borrow();
        let Some(lanes) = lanes.as_ref() else { return };
        let mut engine = self.engine.borrow_mut();
        if let Ok(Some(job)) = engine.next_maintenance() {
            lanes.send(job);
        }
        let wanted = engine.durable_lsn() < self.flush_wanted.get();
        if let Ok(Some(job)) = engine.next_sync(wanted) {
            lanes.send(job);
        }
    }

    pub(super) fn after_change(self: &Rc<Self>) {
        self.kick();
        if self.timer_armed.replace(true) {
            return;
        }
        let (weak, interval) = (Rc::downgrade(self), self.sync_interval);
        spawn_local(async move {
            tokio::time::sleep(interval).await;
            let Some(runner) = weak.upgrade() else { return };
            runner.timer_armed.set(false);
            let mut engine = runner.engine.borrow_mut();
            runner.flush_wanted.set(engine.last_lsn());
            engine.request_apply();
            drop(engine);
            runner.kick();
        });
    }

    pub(super) async fn wait_for_progress(&self) -> Result<(), StoreError> {
        let progress = self.progress.notified();
        self.kick();
        self.check_running()?;
        progress.await;
        Ok(())
    }

    /// Fails if no progress is to be expected.
    fn check_running(&self) -> Result<(), StoreError> {
        let engine = self.engine.borrow();
        match engine.failure() {
            Some(error) => Err(error),
            None if engine.is_stalled() => Err(StoreError::NoSpace),
            None => Ok(()),
        }
    }

    pub(super) async fn wait_for_space(&self) -> Result<(), StoreError> {
        let stalled = self.check_running();
        {
            let mut engine = self.engine.borrow_mut();
            if stalled.is_err() {
                engine.request_apply();
            } else if !engine.is_checkpointing() {
                engine.request_checkpoint();
            }
        }
        stalled?;
        self.wait_for_progress().await
    }

    pub(super) async fn flush(&self) -> Result<(), StoreError> {
        let (target, failure) = {
            let engine = self.engine.borrow();
            (engine.last_lsn(), engine.failure())
        };
        if let Some(error) = failure {
            return Err(error);
        }
        self.flush_wanted.set(self.flush_wanted.get().max(target));
        while self.engine.borrow().durable_lsn() < target {
            let progress = self.progress.notified();
            self.kick();
            if let Some(error) = self.engine.borrow().failure() {
                return Err(error);
            }
            progress.await;
        }
        Ok(())
    }

    pub(super) async fn fetch(&self, reads: Vec<ColdRead>) -> Result<Vec<Fetched>, StoreError> {
        let pending = {
            let lanes = self.lanes.borrow();
            let lanes = lanes.as_ref().ok_or(StoreError::Closed)?;
            reads
                .into_iter()
                .map(|read| lanes.fetch(read))
                .collect::<Vec<_>>()
        };
        let mut fetched = Vec::with_capacity(pending.len());
        for one in pending {
            fetched.push(one.await.map_err(|_| StoreError::Closed)??);
        }
        Ok(fetched)
    }

    /// Makes a request until it is done.
    pub(super) async fn attempt<T>(
        &self,
        mut request: impl FnMut(&mut StoreEngine, &[Fetched]) -> Result<Step<T>, StoreError>,
    ) -> Result<T, StoreError> {
        let mut fetched = Vec::new();
        let mut rounds = 0;
        loop {
            let step = request(&mut self.engine.borrow_mut(), &fetched);
            match step {
                Ok(Step::Done(answer)) => return Ok(answer),
                Ok(Step::Cold(reads)) => fetched.extend(self.fetch(reads).await?),
                Ok(Step::Full) => self.wait_for_space().await?,
                Ok(Step::More) => tokio::task::yield_now().await,
                Err(StoreError::NoSpace) if rounds < SPACE_ROUNDS && self.frees_are_pending() => {
                    rounds += 1;
                    self.engine.borrow_mut().request_apply();
                    self.wait_for_progress().await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn frees_are_pending(&self) -> bool {
        0 < self.engine.borrow().pending_frees()
    }
}
