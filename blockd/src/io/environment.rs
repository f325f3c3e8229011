//! All that a server takes from its machine, so that a simulator can give something else.
//!
//! Time is tokio's (a simulator pauses it); randomness is the kernel's through libc.

use super::host;
use super::net::{Network, Tcp};
use super::state_dir::{Directory, StateDir};
use std::path::Path;
use std::sync::Arc;

/// The wall clock: may be wrong, and may jump.
pub trait Clock: Send + Sync {
    /// Milliseconds since 1970.
    fn unix_ms(&self) -> u64;
}

/// The clock of the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn unix_ms(&self) -> u64 {
        host::unix_ms()
    }
}

/// The machine of a server.
#[derive(Clone)]
pub struct Environment {
    pub network: Arc<dyn Network>,
    pub clock: Arc<dyn Clock>,
    pub state: Arc<dyn StateDir>,
}

impl Environment {
    /// This machine, with the state in a directory.
    #[must_use]
    pub fn real(state: &Path) -> Self {
        Self {
            network: Arc::new(Tcp),
            clock: Arc::new(SystemClock),
            state: Arc::new(Directory(state.to_owned())),
        }
    }
}
