//! Payload bytes in flight: a budget that connections share, and the share that one connection holds.
//!
//! Bytes are taken before a payload is received or a read is started, and put back when the write is done or the reply is sent. A
//! connection that cannot take stops reading its socket, which is the client's backpressure. A few bytes of each connection are its
//! own: a client with small requests never waits for clients that hold the rest and do not read or send.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::limits;

/// Payload bytes that all connections with a clone of this budget may hold together.
#[derive(Clone, Debug)]
pub struct Budget {
    free_bytes: Arc<Semaphore>,
    waiting: Arc<AtomicUsize>,
}

impl Budget {
    /// A budget of so many bytes, at least what the largest connection may hold (`limits::CONNECTION_PAYLOAD_BYTES`).
    pub fn new(bytes: u64) -> Self {
        let bytes = bytes.max(limits::CONNECTION_PAYLOAD_BYTES);
        let permits = usize::try_from(bytes)
            .unwrap_or(usize::MAX)
            .min(Semaphore::MAX_PERMITS);
        Self {
            free_bytes: Arc::new(Semaphore::new(permits)),
            waiting: Arc::default(),
        }
    }

    /// Bytes that nobody holds.
    pub fn free_bytes(&self) -> u64 {
        self.free_bytes.available_permits() as u64
    }

    /// Whether a connection waits for bytes.
    pub(crate) fn is_contended(&self) -> bool {
        self.waiting.load(Ordering::Relaxed) > 0
    }
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(limits::SHARED_PAYLOAD_BYTES)
    }
}

type Waiting = Pin<Box<dyn Future<Output = Option<OwnedSemaphorePermit>> + Send>>;

/// What one connection holds of a budget; given back when dropped.
pub(crate) struct Holding {
    budget: Budget,
    /// Of the connection's own bytes, at most `limits::CONNECTION_OWN_BYTES`.
    own_bytes: u64,
    /// Of the budget.
    shared_bytes: u64,
    wait: Option<Waiting>,
}

impl Holding {
    pub(crate) fn new(budget: Budget) -> Self {
        Self {
            budget,
            own_bytes: 0,
            shared_bytes: 0,
            wait: None,
        }
    }

    /// Bytes that others may be waiting for.
    pub(crate) fn shared_bytes(&self) -> u64 {
        self.shared_bytes
    }

    pub(crate) fn is_contended(&self) -> bool {
        self.budget.is_contended()
    }

    /// Takes bytes; `false` if they are not free now. Then ask again for the same number of bytes, after this connection has put some
    /// back or when the task is woken.
    pub(crate) fn take(&mut self, cx: &mut Context<'_>, bytes: u32) -> bool {
        if bytes == 0 {
            return true;
        }
        let held_bytes = self.own_bytes + self.shared_bytes;
        if held_bytes + u64::from(bytes) > limits::CONNECTION_PAYLOAD_BYTES {
            return false;
        }
        if self.own_bytes + u64::from(bytes) <= limits::CONNECTION_OWN_BYTES {
            self.stop_waiting();
            self.own_bytes += u64::from(bytes);
            return true;
        }
        let taken = self.wait.is_none() && self.take_free(bytes) || self.wait_for(cx, bytes);
        self.shared_bytes += if taken { u64::from(bytes) } else { 0 };
        taken
    }

    fn take_free(&self, bytes: u32) -> bool {
        self.budget
            .free_bytes
            .try_acquire_many(bytes)
            .map(|permit| permit.forget())
            .is_ok()
    }

    fn wait_for(&mut self, cx: &mut Context<'_>, bytes: u32) -> bool {
        let budget = &self.budget;
        let wait = self.wait.get_or_insert_with(|| {
            budget.waiting.fetch_add(1, Ordering::Relaxed);
            let free_bytes = Arc::clone(&budget.free_bytes);
            Box::pin(async move { free_bytes.acquire_many_owned(bytes).await.ok() })
        });
        let Poll::Ready(permit) = wait.as_mut().poll(cx) else {
            return false;
        };
        self.stop_waiting();
        permit.map(|permit| permit.forget()).is_some()
    }

    fn stop_waiting(&mut self) {
        if self.wait.take().is_some() {
            self.budget.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Puts bytes back, those of the budget first.
    pub(crate) fn put_back(&mut self, bytes: u64) {
        let shared_bytes = bytes.min(self.shared_bytes);
        self.shared_bytes -= shared_bytes;
        self.own_bytes -= self.own_bytes.min(bytes - shared_bytes);
        if shared_bytes > 0 {
            self.budget.free_bytes.add_permits(shared_bytes as usize);
        }
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.stop_waiting();
        self.put_back(self.shared_bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    const HALF: u32 = (limits::CONNECTION_PAYLOAD_BYTES / 2) as u32;

    #[test]
    fn one_connection_never_holds_more_than_its_share() {
        let budget = Budget::default();
        let cx = &mut Context::from_waker(Waker::noop());
        let mut holding = Holding::new(budget.clone());
        assert!(holding.take(cx, HALF) && holding.take(cx, HALF));
        assert!(!holding.take(cx, 1));
        assert!(!budget.is_contended(), "its own limit is no contention");
        holding.put_back(1);
        assert!(holding.take(cx, 1));
        drop(holding);
        assert_eq!(budget.free_bytes(), limits::SHARED_PAYLOAD_BYTES);
    }

    #[test]
    fn small_requests_do_not_wait_for_others() {
        let budget = Budget::new(0);
        let cx = &mut Context::from_waker(Waker::noop());
        let (mut greedy, mut small) = (Holding::new(budget.clone()), Holding::new(budget.clone()));
        assert!(greedy.take(cx, HALF) && greedy.take(cx, HALF));
        let own = limits::CONNECTION_OWN_BYTES as u32;
        assert!(small.take(cx, own - 1) && small.take(cx, 1));
        assert!(!budget.is_contended());
        assert!(!small.take(cx, 1) && budget.is_contended());
        small.put_back(1);
        assert!(small.take(cx, 1) && !budget.is_contended());
        assert_eq!((budget.free_bytes(), small.shared_bytes()), (0, 0));
    }

    #[test]
    fn a_waiting_connection_gets_what_another_puts_back() {
        let budget = Budget::new(0);
        let cx = &mut Context::from_waker(Waker::noop());
        let (mut first, mut second) = (Holding::new(budget.clone()), Holding::new(budget.clone()));
        assert!(first.take(cx, HALF) && first.take(cx, HALF));
        assert!(!second.take(cx, HALF));
        assert!(budget.is_contended());
        first.put_back(u64::from(HALF));
        assert!(second.take(cx, HALF));
        assert!(!budget.is_contended());
        assert!(!second.take(cx, HALF));
        drop(second);
        assert!(!budget.is_contended(), "a dropped waiter does not wait");
        drop(first);
        assert_eq!(budget.free_bytes(), limits::CONNECTION_PAYLOAD_BYTES);
    }
}
