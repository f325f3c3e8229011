//! nbd.ko, the kernel's NBD client: makes `/dev/nbdX` of connected sockets, looks after it and takes it down again.
//!
//! ```text
//! Kernel           generic netlink: connect, reconnect, resize, disconnect, status   mod.rs, netlink.rs
//! LinkDeadEvents   which device lost a socket                                        events.rs
//! IoctlDevice      the same for kernels without the netlink family                   ioctl.rs
//! Device           sysfs: size, backend, users, queue settings, partitions           sysfs.rs
//! ```
//!
//! The calls block for as long as the kernel takes (microseconds; `disconnect` waits for the requests in flight), so an asynchronous
//! caller runs them on a blocking thread. What nbd.ko does with a dead socket: every request on it waits, new ones too, until a
//! `reconnect`; after `ConnectRequest::dead_timeout` without one they fail with EIO. Requests that were in flight are sent again only
//! when their `io_timeout` (`QueueSettings`) strikes. An error in a reply becomes an IO error of the device, so a server that goes down
//! must close the socket and not answer ESHUTDOWN.

mod error;
mod events;
mod ioctl;
mod netlink;
mod sysfs;

use std::os::fd::BorrowedFd;
use std::process::Command;
use std::time::Duration;

pub use error::KernelError;
pub use events::{LinkDeadEvents, LinkEvent};
pub use ioctl::IoctlDevice;
pub use sysfs::{Device, DeviceUser, QueueSettings};

use crate::export::ExportInfo;
use crate::option;
use crate::request::Headers;
use netlink::{Attributes, Family, NetlinkError, Socket, attribute, command};

/// What to connect.
#[derive(Clone, Copy, Debug)]
pub struct ConnectRequest<'a> {
    /// The device; `None` lets the kernel choose a free one, or make one.
    pub index: Option<u32>,
    /// Connected stream sockets (TCP or unix) past their handshake, one a hardware queue; the kernel takes its own reference, so they
    /// may be closed afterwards, and whoever keeps one can still `shutdown` it. More than one needs CAN_MULTI_CONN in `flags`.
    pub sockets: &'a [BorrowedFd<'a>],
    /// Size of the device in bytes, a multiple of `block_bytes`.
    pub size_bytes: u64,
    /// Logical block size: a power of 2 from 512 to 4096.
    pub block_bytes: u32,
    /// Transmission flags as GO gives them (`transmission_flags`, `ServerInfo::flags`).
    pub flags: u64,
    /// How long requests wait for a `reconnect` after the last socket died before they fail with EIO; whole seconds, rounded up, at
    /// least 1.
    pub dead_timeout: Duration,
    /// Identity of what is connected; `reconnect` and `resize` must name the same.
    pub backend: &'a str,
}

/// A device of `Kernel::status`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceStatus {
    /// N of `/dev/nbdN`.
    pub index: u32,
    /// Whether it is set up; the sockets may be dead all the same.
    pub connected: bool,
}

/// The generic netlink family `nbd` of the running kernel.
#[derive(Clone, Copy, Debug)]
pub struct Kernel {
    family: Family,
}

impl Kernel {
    /// Finds the family; loads the module with `modprobe nbd` if it is not there.
    ///
    /// Errors: `NoModule`; `TooOld` before Linux 5.14, whose devices have no backend identifier (`IoctlDevice` works there).
    pub fn open() -> Result<Self, KernelError> {
        let family = match find_family()? {
            Some(family) => family,
            None => {
                load_module()?;
                find_family()?.ok_or(TOO_OLD_FAMILY)?
            }
        };
        if family.max_attribute < u32::from(attribute::BACKEND_IDENTIFIER) {
            return Err(TOO_OLD_BACKEND);
        }
        Ok(Self { family })
    }

    /// Connects a device and gives its index.
    ///
    /// Errors: `Busy` if `index` is connected already, `NoPermission`, `Refused` (sizes, sockets that are no stream sockets).
    pub fn connect(&self, request: &ConnectRequest<'_>) -> Result<u32, KernelError> {
        const ACTION: &str = "connect an NBD device";
        let answer = connect_attributes(request)
            .and_then(|attributes| self.ask(command::CONNECT, attributes))
            .map_err(|error| match (error.errno(), request.index) {
                (Some(libc::EBUSY), Some(index)) => Device(index).busy(),
                _ => failure(ACTION, error),
            })?;
        let answer = answer.ok_or_else(|| failure(ACTION, netlink::no_answer()))?;
        netlink::index_of(&answer).map_err(|error| failure(ACTION, error))
    }

    /// Gives a device new sockets for its dead ones, in any order.
    ///
    /// The kernel ignores, without an error, every socket that finds no dead one to replace: the caller must have shut the old ones
    /// down (`shutdown(2)` of a duplicate) and have seen `LinkDeadEvents` tell so, or it has changed nothing.
    ///
    /// Errors: `NoDevice`, `NotConnected`, `WrongBackend`, `NoPermission`, `Refused`.
    pub fn reconnect(
        &self,
        index: u32,
        backend: &str,
        sockets: &[BorrowedFd<'_>],
    ) -> Result<(), KernelError> {
        let attributes = device_attributes(index, backend)
            .and_then(|attributes| attributes.with_sockets(sockets));
        self.reconfigure("reconnect an NBD device", index, backend, attributes)
    }

    /// Changes the size of a connected device, also while it is mounted.
    ///
    /// Errors: `Shrinks`, and those of `reconnect`.
    pub fn resize(&self, index: u32, backend: &str, size_bytes: u64) -> Result<(), KernelError> {
        check_device(index, backend)?;
        let now_bytes = Device(index).size_bytes()?;
        if size_bytes < now_bytes {
            return Err(KernelError::Shrinks {
                index,
                now_bytes,
                wanted_bytes: size_bytes,
            });
        }
        let attributes = device_attributes(index, backend)
            .and_then(|attributes| attributes.with(attribute::SIZE_BYTES, size_bytes));
        self.reconfigure("resize an NBD device", index, backend, attributes)
    }

    /// Takes a device down; requests in flight fail with EIO, so whatever is mounted must be unmounted first (`Device::users`).
    /// A device that is not connected is left as it is.
    ///
    /// Errors: `NoDevice`, `NoPermission`.
    pub fn disconnect(&self, index: u32) -> Result<(), KernelError> {
        let attributes = Attributes::default().with(attribute::INDEX, index);
        attributes
            .and_then(|attributes| self.ask(command::DISCONNECT, attributes))
            .map(|_| ())
            .map_err(|error| match error.errno() {
                Some(libc::EINVAL) => KernelError::NoDevice(index),
                _ => failure("disconnect an NBD device", error),
            })
    }

    /// Every device that the driver has made, by index.
    pub fn status(&self) -> Result<Vec<DeviceStatus>, KernelError> {
        const ACTION: &str = "list the NBD devices";
        let answer = self.ask(command::STATUS, Attributes::default());
        let answer = answer.and_then(|answer| answer.ok_or_else(netlink::no_answer));
        let devices = answer.and_then(|answer| netlink::devices_of(&answer));
        let devices = devices.map_err(|error| failure(ACTION, error))?;
        let status = |(index, connected)| DeviceStatus { index, connected };
        Ok(devices.into_iter().map(status).collect())
    }

    /// Listens to dead links from now on. Needs a tokio runtime with IO.
    pub fn link_dead_events(&self) -> Result<LinkDeadEvents, KernelError> {
        LinkDeadEvents::subscribe(self.family)
    }

    fn reconfigure(
        &self,
        action: &'static str,
        index: u32,
        backend: &str,
        attributes: Result<Attributes, NetlinkError>,
    ) -> Result<(), KernelError> {
        check_device(index, backend)?;
        attributes
            .and_then(|attributes| self.ask(command::RECONFIGURE, attributes))
            .map(|_| ())
            .map_err(|error| failure(action, error))
    }

    fn ask(
        &self,
        command: u8,
        attributes: Attributes,
    ) -> Result<Option<netlink::Message>, NetlinkError> {
        Socket::open()?.ask(self.family.id, netlink::FAMILY_VERSION, command, attributes)
    }
}

const TOO_OLD_FAMILY: KernelError = KernelError::TooOld {
    missing: "the module is loaded and has no netlink family",
    since: "4.12",
};
const TOO_OLD_BACKEND: KernelError = KernelError::TooOld {
    missing: "its devices carry no backend identifier, so a device could be given the wrong volume",
    since: "5.14",
};

/// Transmission flags of an export that is served with simple replies, as the kernel wants them.
#[must_use]
pub fn transmission_flags(info: &ExportInfo) -> u64 {
    u64::from(option::transmission_flags(info, Headers::Simple, false))
}

fn find_family() -> Result<Option<Family>, KernelError> {
    Family::find().map_err(|error| failure("look the NBD driver up", error))
}

fn load_module() -> Result<(), KernelError> {
    let output = Command::new("modprobe").arg("nbd").output();
    let output = output.map_err(|error| KernelError::NoModule(error.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    Err(KernelError::NoModule(text.trim().to_owned()))
}

fn connect_attributes(request: &ConnectRequest<'_>) -> Result<Attributes, NetlinkError> {
    let timeout_secs = dead_timeout_secs(request.dead_timeout);
    let mut attributes = Attributes::default();
    if let Some(index) = request.index {
        attributes = attributes.with(attribute::INDEX, index)?;
    }
    attributes
        .with(attribute::SIZE_BYTES, request.size_bytes)?
        .with(attribute::BLOCK_SIZE_BYTES, u64::from(request.block_bytes))?
        .with(attribute::SERVER_FLAGS, request.flags)?
        .with(attribute::DEAD_CONN_TIMEOUT, timeout_secs)?
        .with(attribute::BACKEND_IDENTIFIER, request.backend)?
        .with_sockets(request.sockets)
}

/// The kernel takes 0 for "fail at once".
fn dead_timeout_secs(timeout: Duration) -> u64 {
    let partial = u64::from(timeout.subsec_nanos() > 0);
    timeout.as_secs().saturating_add(partial).max(1)
}

fn device_attributes(index: u32, backend: &str) -> Result<Attributes, NetlinkError> {
    Attributes::default()
        .with(attribute::INDEX, index)?
        .with(attribute::BACKEND_IDENTIFIER, backend)
}

/// Tells apart what the kernel answers with EINVAL alike. It checks the backend again, so a race is harmless.
fn check_device(index: u32, backend: &str) -> Result<(), KernelError> {
    let device = Device(index);
    if !device.exists() {
        return Err(KernelError::NoDevice(index));
    }
    if !device.is_connected() {
        return Err(KernelError::NotConnected(index));
    }
    match device.backend() {
        Some(found) if found == backend => Ok(()),
        found => Err(KernelError::WrongBackend {
            index,
            found,
            wanted: backend.to_owned(),
        }),
    }
}

fn failure(action: &'static str, error: NetlinkError) -> KernelError {
    match error {
        NetlinkError::Io(error) if error.raw_os_error() == Some(libc::EPERM) => {
            KernelError::NoPermission(action)
        }
        NetlinkError::Io(source) => KernelError::Refused { action, source },
        NetlinkError::Codec(reason) => KernelError::BadAnswer { action, reason },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dead_timeout_is_never_zero_and_never_shorter_than_asked() {
        let secs = |timeout| dead_timeout_secs(timeout);
        assert_eq!(secs(Duration::ZERO), 1);
        assert_eq!(secs(Duration::from_millis(1500)), 2);
        assert_eq!(secs(Duration::from_secs(3600)), 3600);
        assert_eq!(secs(Duration::MAX), u64::MAX);
    }

    #[test]
    fn the_kernel_is_told_what_the_export_can() {
        let mut info = ExportInfo::new(4096);
        assert_eq!(transmission_flags(&info) & 0b1_0010_1111, 0b1_0010_1101);
        info.read_only = true;
        assert_eq!(transmission_flags(&info) & 0b0_0010_1111, 0b0_0000_1111);
    }

    #[test]
    fn a_device_that_is_not_there_is_named_in_the_error() {
        let error = check_device(4_000_000, "vol").unwrap_err();
        assert!(error.to_string().contains("/dev/nbd4000000"), "{error}");
    }
}
