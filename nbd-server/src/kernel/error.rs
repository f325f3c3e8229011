//! What can go wrong between us and nbd.ko, in words that say what to do.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

use super::sysfs::DeviceUser;

/// Why the kernel's NBD driver did not do as asked.
#[derive(Debug, Error)]
pub enum KernelError {
    /// The driver is not loaded and could not be.
    #[error(
        "this kernel has no NBD driver: nbd is neither built in nor loaded, and `modprobe nbd` failed ({0}); install the package with \
         the kernel's modules, load nbd on the host if this is a container, or attach with --socket, which needs no driver"
    )]
    NoModule(String),
    /// The driver lacks something that is asked for.
    #[error(
        "the NBD driver of this kernel is too old: {missing}; use Linux {since} or later, or attach with --socket"
    )]
    TooOld {
        /// What is missing, in words.
        missing: &'static str,
        /// The first kernel release that has it.
        since: &'static str,
    },
    /// CAP_SYS_ADMIN is missing.
    #[error(
        "no permission to {0}: NBD devices need CAP_SYS_ADMIN in the host's first user namespace; run this as root (in a container: \
         privileged, with /dev of the host)"
    )]
    NoPermission(&'static str),
    /// The device is connected, open, mounted or held.
    #[error("{device} is busy: {}", users_text(users))]
    Busy {
        /// `/dev/nbdN`.
        device: String,
        /// Who uses it, as far as /proc tells.
        users: Vec<DeviceUser>,
    },
    /// Every existing device is connected (ioctl interface only; netlink makes new ones).
    #[error(
        "all {0} NBD devices are in use; detach one, or load the driver with more (modprobe nbd nbds_max=64)"
    )]
    AllBusy(usize),
    /// There is no device of this index.
    #[error("there is no /dev/nbd{0}; `ls -d /sys/block/nbd*` shows the devices that exist")]
    NoDevice(u32),
    /// The device exists and is not connected.
    #[error("/dev/nbd{0} is not connected; attach a volume to it first")]
    NotConnected(u32),
    /// The device is connected to something else than the caller thinks.
    #[error(
        "/dev/nbd{index} belongs to {}, not to {wanted:?}; nothing was changed",
        backend_text(found)
    )]
    WrongBackend {
        /// Device.
        index: u32,
        /// What sysfs says; `None` if it was connected without an identifier.
        found: Option<String>,
        /// What the caller holds it for.
        wanted: String,
    },
    /// A resize to less.
    #[error(
        "/dev/nbd{index} has {now_bytes} bytes and is not made smaller ({wanted_bytes} bytes): its filesystem would lose its end"
    )]
    Shrinks {
        /// Device.
        index: u32,
        /// Size of the device in bytes.
        now_bytes: u64,
        /// Size asked for in bytes.
        wanted_bytes: u64,
    },
    /// The driver refused for a reason it puts into the kernel's log only.
    #[error("the kernel refused to {action}: {source}; `dmesg | grep nbd` has its reason")]
    Refused {
        /// What was asked, as an infinitive.
        action: &'static str,
        /// The error number.
        source: io::Error,
    },
    /// The kernel's answer makes no sense.
    #[error("the kernel's answer to {action} was not understood: {reason}")]
    BadAnswer {
        /// What was asked, as an infinitive.
        action: &'static str,
        /// What is wrong with the answer.
        reason: String,
    },
    /// A file below /sys, /proc or /dev failed.
    #[error("{}: {source}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

impl KernelError {
    /// An error of a file, with its path.
    pub(super) fn file(path: impl Into<PathBuf>, source: io::Error) -> Self {
        Self::File {
            path: path.into(),
            source,
        }
    }
}

fn users_text(users: &[DeviceUser]) -> String {
    if users.is_empty() {
        return "something that /proc does not show uses it; try another device".to_owned();
    }
    let texts: Vec<String> = users.iter().map(ToString::to_string).collect();
    texts.join(", ")
}

fn backend_text(found: &Option<String>) -> String {
    match found {
        Some(backend) => format!("{backend:?}"),
        None => "a connection without an identifier".to_owned(),
    }
}
