//! Where an attached volume can be found: a device of the kernel, or a unix socket.

use super::error::{AttachError, AttachErrorKind};
use super::leg::{Leg, LegExports};
use super::record::{Record, StateDir};
use nbd_server::{Listener, ServeOptions, Server, Shutdown, ShutdownSender};
use std::future::pending;
use std::io;
use std::path::{Path, PathBuf};
use tokio::task::JoinHandle;

pub(super) enum Place {
    Socket(SocketPlace),
}

impl Place {
    /// Makes what the record's specification asks for. `before` is the record of a daemon that died:
    /// a device that the kernel still has for it is taken over.
    pub(super) async fn make(
        leg: &Leg,
        record: &mut Record,
        before: Option<&Record>,
        dir: &StateDir,
    ) -> Result<Self, AttachError> {
        match record.spec.socket.clone() {
            Some(path) => SocketPlace::listen(leg, &path).map(Self::Socket),
            None => Err(AttachError::new(AttachErrorKind::Invalid, "--socket only")),
        }
    }

    /// `/dev/blockd/VOL`.
    pub(super) fn link(&self) -> Option<PathBuf> {
        match self {
            Self::Socket(_) => None,
        }
    }

    /// Gives a device the size of its volume.
    pub(super) async fn resize(&mut self, size_bytes: u64) {
        match self {
            // New connections see it.
            Self::Socket(_) => {}
        }
    }

    /// Returns when somebody else has taken the device down.
    pub(super) async fn ended(&mut self) {
        match self {
            Self::Socket(_) => pending().await,
        }
    }

    /// Ends it; without `force` only if nobody uses it.
    pub(super) async fn take_down(&mut self, force: bool) -> Result<(), AttachError> {
        match self {
            Self::Socket(socket) => {
                socket.close().await;
                Ok(())
            }
        }
    }
}

/// A unix socket with the full NBD handshake, for QEMU and libnbd.
pub(super) struct SocketPlace {
    path: PathBuf,
    shutdown: ShutdownSender,
    server: Option<JoinHandle<()>>,
}

impl SocketPlace {
    fn listen(leg: &Leg, path: &Path) -> Result<Self, AttachError> {
        let listener = Listener::bind_unix(path).map_err(|error| match error.kind() {
            io::ErrorKind::AddrInUse => AttachError::new(
                AttachErrorKind::Busy,
                format!(
                    "{}: a process listens there, or it is no socket; choose another path",
                    path.display()
                ),
            ),
            _ => AttachError::system(path.display(), &error),
        })?;
        let (shutdown, given) = Shutdown::new();
        let options = ServeOptions {
            shutdown: given,
            ..ServeOptions::default()
        };
        let server = Server::new(LegExports(leg.clone()), options);
        let server = tokio::task::spawn_local(server.run(vec![listener]));
        Ok(Self {
            path: path.to_owned(),
            shutdown,
            server: Some(server),
        })
    }

    /// Answers what was read, then ends all connections.
    async fn close(&mut self) {
        self.shutdown.give();
        if let Some(server) = self.server.take() {
            let _ = server.await;
        }
        if let Err(error) = std::fs::remove_file(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "not removed");
        }
    }
}
