//! Where file work is done that waits for a device.

use std::sync::Arc;
use std::time::Duration;

/// How such work is kept off the task that asks for it.
#[derive(Clone)]
pub enum Device {
    /// The device blocks: the work is done on other threads.
    Blocking,
    /// The device is simulated and does not block: the work is done in place after a time that this
    /// gives, so that everything stays on one thread and in one order.
    Simulated(Arc<dyn Fn() -> Duration + Send + Sync>),
}

impl Device {
    /// Does the work.
    ///
    /// # Errors
    /// The work panicked, or the runtime is shutting down.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, tokio::task::JoinError> {
        match self {
            Device::Blocking => tokio::task::spawn_blocking(work).await,
            Device::Simulated(latency) => {
                tokio::time::sleep(latency()).await;
                Ok(work())
            }
        }
    }
}
