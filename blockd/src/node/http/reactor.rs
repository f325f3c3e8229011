//! The way to the reactor, which alone may look at a [`Node`].

use super::super::Node;
use super::failure::Failure;
use futures_util::future::LocalBoxFuture;
use std::future::Future;
use std::rc::Rc;
use tokio::sync::{mpsc, oneshot};
use tokio::task::spawn_local;

/// Work that waits for the reactor to take it; there is never more than one a connection.
const WAITING: usize = 16;

type Work = Box<dyn FnOnce(Rc<Node>) -> LocalBoxFuture<'static, ()> + Send>;

/// A handle for other threads.
#[derive(Clone)]
pub(super) struct Reactor(mpsc::Sender<Work>);

impl Reactor {
    /// Takes work from now on. Needs a tokio `LocalSet`.
    pub(super) fn start(node: &Rc<Node>) -> Self {
        let (sender, mut waiting) = mpsc::channel::<Work>(WAITING);
        let node = Rc::clone(node);
        spawn_local(async move {
            while let Some(work) = waiting.recv().await {
                spawn_local(work(Rc::clone(&node)));
            }
        });
        Self(sender)
    }

    /// Does it in a task of its own: what was begun is carried out also when the client goes away.
    pub(super) async fn run<T, F>(
        &self,
        work: impl FnOnce(Rc<Node>) -> F + Send + 'static,
    ) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = T> + 'static,
    {
        let (answer, answered) = oneshot::channel();
        let boxed: Work = Box::new(|node| {
            Box::pin(async move {
                let _nobody_waits = answer.send(work(node).await).is_err();
            })
        });
        let sent = self.0.send(boxed).await;
        sent.map_err(|_| Failure::stopping())?;
        answered.await.map_err(|_| Failure::stopping())
    }
}
