//! Ctrl-C and `kill` while there is something to undo.

use crate::failure::Failure;
use std::path::PathBuf;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// From its making on, SIGINT and SIGTERM no longer end the process by themselves.
pub(crate) struct Interrupt {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupt {
    pub(crate) fn listen() -> Result<Self, Failure> {
        let listen = |kind| {
            signal(kind).map_err(|source| Failure::File {
                what: "listening for",
                path: PathBuf::from("signals"),
                source,
            })
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
        })
    }

    /// Returns once one of the signals has come since `listen`.
    pub(crate) async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}
