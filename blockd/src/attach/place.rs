//! Where an attached volume can be found: a device of the kernel, or a unix socket.

use super::direct::DirectDevice;
use super::error::{AttachError, AttachErrorKind};
use super::leg::{Leg, LegExports};
use super::names;
use super::proxy::{ProxyDevice, left_by};
use super::record::{Ha, Record, StateDir};
use crate::client::Client;
use nbd_server::kernel::Device;
use nbd_server::{Listener, ServeOptions, Server, Shutdown, ShutdownSender};
use std::future::pending;
use std::io;
use std::path::{Path, PathBuf};
use tokio::task::JoinHandle;

pub(super) enum Place {
    Socket(SocketPlace),
    Device {
        device: KernelDevice,
        link: Option<PathBuf>,
    },
}

impl Place {
    /// Makes what the record's specification asks for. `before` is the record of a daemon that died:
    /// a device that the kernel still has for it is taken over.
    pub(super) async fn make(
        client: &Client,
        leg: &Leg,
        record: &mut Record,
        before: Option<&Record>,
        dir: &StateDir,
    ) -> Result<Self, AttachError> {
        let left = before.and_then(|before| Some((before, left_by(before)?)));
        if let Some((before, device)) = &left {
            take_over(record, before, &device.path())?;
        }
        if let Some(path) = &record.spec.socket {
            return SocketPlace::listen(leg, path).map(Self::Socket);
        }
        // udev asks for the name as soon as the kernel has the device.
        dir.save(record)?;
        let left = left.map(|(_, device)| device);
        let device = KernelDevice::connect(client, leg, record, left).await?;
        record.device = Some(device.path());
        dir.save(record)?;
        let named = names::make(&record.spec.target, &device.path()).await;
        let link = named.inspect_err(|error| tracing::warn!("no link: {error}"));
        Ok(Self::Device {
            device,
            link: link.ok(),
        })
    }

    /// `/dev/blockd/VOL`.
    pub(super) fn link(&self) -> Option<PathBuf> {
        match self {
            Self::Socket(_) => None,
            Self::Device { link, .. } => link.clone(),
        }
    }

    /// Gives a device the size of its volume; new connections of a socket see it by themselves.
    pub(super) async fn resize(&mut self, size_bytes: u64) {
        if let Self::Device { device, .. } = self {
            device.resize(size_bytes).await;
        }
    }

    /// Moves a direct device's connection; in the other modes the client's order of servers is all there is to change.
    pub(super) async fn move_to(&mut self, peer_address: &str) -> Result<(), AttachError> {
        match self {
            Self::Device {
                device: KernelDevice::Direct(device),
                ..
            } => device.move_to(peer_address).await,
            Self::Device { .. } | Self::Socket(_) => Ok(()),
        }
    }

    /// Returns when somebody else has taken the device down.
    pub(super) async fn gone(&mut self) {
        match self {
            Self::Socket(_) => pending().await,
            Self::Device { device, .. } => device.gone().await,
        }
    }

    /// Ends it: a socket once it has answered what it has read, a device only if nobody uses it,
    /// unless forced.
    pub(super) async fn take_down(&mut self, force: bool) -> Result<(), AttachError> {
        match self {
            Self::Socket(socket) => socket.close().await,
            Self::Device { device, .. } => device.disconnect(force).await?,
        }
        self.remove_link();
        Ok(())
    }

    /// Takes `/dev/blockd/VOL` away, once the device is down.
    pub(super) fn remove_link(&self) {
        if let Self::Device {
            device,
            link: Some(link),
        } = self
        {
            names::remove(link, &device.path());
        }
    }
}

/// A device of the kernel, by who answers its requests.
pub(super) enum KernelDevice {
    Proxy(Box<ProxyDevice>),
    Direct(Box<DirectDevice>),
}

impl KernelDevice {
    async fn connect(
        client: &Client,
        leg: &Leg,
        record: &Record,
        left: Option<Device>,
    ) -> Result<Self, AttachError> {
        match record.spec.ha {
            Ha::Proxy => {
                let device = ProxyDevice::connect(leg, record, left).await?;
                Ok(Self::Proxy(Box::new(device)))
            }
            Ha::Direct => {
                let device = DirectDevice::connect(client, leg.volume(), record, left).await?;
                Ok(Self::Direct(Box::new(device)))
            }
        }
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Proxy(device) => device.path(),
            Self::Direct(device) => device.path(),
        }
    }

    async fn resize(&mut self, size_bytes: u64) {
        match self {
            Self::Proxy(device) => device.resize(size_bytes).await,
            Self::Direct(device) => device.resize(size_bytes).await,
        }
    }

    async fn gone(&mut self) {
        match self {
            Self::Proxy(device) => device.gone().await,
            Self::Direct(device) => device.gone().await,
        }
    }

    async fn disconnect(&mut self, force: bool) -> Result<(), AttachError> {
        match self {
            Self::Proxy(device) => device.disconnect(force).await,
            Self::Direct(device) => device.disconnect(force).await,
        }
    }
}

/// The device goes on as it was attached, whatever the command asks for now.
fn take_over(record: &mut Record, before: &Record, device: &Path) -> Result<(), AttachError> {
    let asked = &record.spec;
    let other = asked.device.as_deref().is_some_and(|asked| asked != device);
    if asked.socket.is_some() || other {
        let text = format!(
            "{volume} is attached here as {}, whose daemon is gone; `blockctl attach {volume}` \
             brings it back, `blockctl detach {volume}` gives it up",
            device.display(),
            volume = asked.target
        );
        return Err(AttachError::new(AttachErrorKind::Conflict, text));
    }
    let servers = asked.servers.clone();
    record.spec = before.spec.clone();
    record.spec.servers = servers;
    record.device = before.device.clone();
    record.attached_unix_ms = before.attached_unix_ms;
    tracing::info!(device = %device.display(), "taken over");
    Ok(())
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
