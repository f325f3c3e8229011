//! The signal that asks connections and accept loops to finish what they have begun and stop.
//!
//! A connection that drains executes and answers every request that it has read, then closes, and takes nothing in after that. It
//! never answers ESHUTDOWN: nbd.ko and QEMU (10.0, measured, also with reconnect-delay) hand that to their users as an IO error, but
//! send what is unanswered again over a new connection when the old one is closed; to libnbd both are an error of the call. The
//! protocol asks for no more ("Terminating the transmission phase"). In the handshake, where a refusal is harmless, clients are told
//! ERR_SHUTDOWN.

use tokio::sync::watch;

/// Gives the signal; dropping it without giving the signal means that it never comes.
#[derive(Debug)]
pub struct ShutdownSender(watch::Sender<bool>);

/// Receives the signal; cheap to clone.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Receiver<bool>);

impl Shutdown {
    /// A signal and its giver.
    pub fn new() -> (ShutdownSender, Self) {
        let (sender, receiver) = watch::channel(false);
        (ShutdownSender(sender), Self(receiver))
    }

    /// A signal that never comes.
    pub fn never() -> Self {
        Self::new().1
    }

    /// Whether the signal was given.
    pub fn is_given(&self) -> bool {
        *self.0.borrow()
    }

    /// Waits for the signal.
    pub async fn given(mut self) {
        if self.0.wait_for(|given| *given).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

impl ShutdownSender {
    /// Gives the signal.
    pub fn give(&self) {
        self.0.send_replace(true);
    }
}
