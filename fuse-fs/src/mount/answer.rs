//! How a request gets its answer: at once if nothing has to be waited for, else from a task.
//!
//! The reader of requests polls the work once. What is in memory is answered by that, without a task
//! and without a change of threads; whatever is not ready moves to the runtime with its reply, and what
//! always asks the servers starts there: polled twice, it would wake two threads. A
//! reply that is dropped answers `EIO`, so work that panics costs its own request only.

use super::stats::{Op, Stats};
use crate::adapter::Refuse;
use crate::backend::BackendError;
use fuser::Errno;
use futures_util::FutureExt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Instant;
use tokio::runtime::Handle;

/// Carries requests to their answers.
pub struct Answerer {
    runtime: Handle,
    stats: Arc<Stats>,
}

impl Answerer {
    #[must_use]
    pub fn new(runtime: Handle, stats: Arc<Stats>) -> Self {
        Self { runtime, stats }
    }

    /// Answers `reply` with what `work` gives.
    pub(crate) fn answer<R, W, T>(
        &self,
        op: Op,
        reply: R,
        work: W,
        send: impl FnOnce(R, T) + Send + 'static,
    ) where
        R: Refuse + Send + 'static,
        W: Future<Output = Result<T, BackendError>> + Send + 'static,
        T: Send,
    {
        let (stats, began) = (self.stats.clone(), Instant::now());
        let work = async move {
            let result = work.await;
            stats.ended(op, began, result.is_err());
            match result {
                Ok(value) => send(reply, value),
                Err(error) => {
                    report(op, &error);
                    reply.refuse(Errno::from_i32(error.errno));
                }
            }
        };
        let stats = self.stats.clone();
        let task = async move {
            if AssertUnwindSafe(work).catch_unwind().await.is_err() {
                stats.panicked();
            }
        };
        if op.waits() {
            self.runtime.spawn(task);
            return;
        }
        let mut task = Box::pin(task);
        // What the work starts, timers and tasks, belongs to the runtime.
        let _inside = self.runtime.enter();
        let mut context = Context::from_waker(Waker::noop());
        match task.as_mut().poll(&mut context) {
            Poll::Ready(()) => self.stats.answered_at_once(op),
            // The first poll in its task registers that task where this one registered nobody.
            Poll::Pending => drop(self.runtime.spawn(task)),
        }
    }
}

/// An error that the user cannot have caused is logged; the others are answers.
fn report(op: Op, error: &BackendError) {
    let what = op.name();
    match error.errno {
        libc::EIO | libc::EUCLEAN => tracing::warn!("{what}: {error}"),
        errno => tracing::debug!("{what}: {error} (errno {errno})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ext4::measures::Measures;
    use std::sync::mpsc::{Sender, channel};

    /// Tells what it was answered with; as the replies of `fuser` do, `EIO` when it is dropped.
    struct Told(Option<Sender<i32>>);

    impl Refuse for Told {
        fn refuse(mut self, errno: Errno) {
            self.tell(errno.code());
        }
    }

    impl Told {
        fn tell(&mut self, word: i32) {
            if let Some(sender) = self.0.take() {
                sender.send(word).unwrap();
            }
        }
    }

    impl Drop for Told {
        fn drop(&mut self) {
            self.tell(libc::EIO);
        }
    }

    fn told(
        op: Op,
        work: impl Future<Output = Result<i32, BackendError>> + Send + 'static,
    ) -> (i32, String) {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let stats = Arc::new(Stats::default());
        let answerer = Answerer::new(runtime.handle().clone(), stats.clone());
        let (sender, receiver) = channel();
        let send = |mut reply: Told, word| reply.tell(word);
        answerer.answer(op, Told(Some(sender)), work, send);
        let word = receiver.recv().unwrap();
        drop(runtime);
        (word, stats.json(&Measures::default()).to_string())
    }

    #[test]
    fn what_is_ready_is_answered_at_once_and_the_rest_from_a_task() {
        let (word, stats) = told(Op::Stat, async { Ok(7) });
        assert_eq!(word, 7);
        assert!(stats.contains("\"answered_at_once\":1"), "{stats}");
        let (word, stats) = told(Op::Read, async { Ok(8) });
        assert_eq!(word, 8);
        assert!(stats.contains("\"answered_at_once\":0"), "{stats}");
        let (word, stats) = told(Op::Stat, async {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            Err(BackendError::new(libc::ENOENT, "none"))
        });
        assert_eq!(word, libc::ENOENT);
        assert!(stats.contains("\"answered_at_once\":0"), "{stats}");
        assert!(stats.contains("\"errors\":1"), "{stats}");
    }

    #[test]
    fn a_panic_costs_its_own_request_only() {
        for op in [Op::Stat, Op::Read] {
            assert_eq!(told(op, async { panic!("at once") }).0, libc::EIO);
        }
        let later = async {
            tokio::task::yield_now().await;
            panic!("later")
        };
        assert_eq!(told(Op::Stat, later).0, libc::EIO);
    }
}
