//! The old interface of nbd.ko: a device lives as long as a thread of ours sits in NBD_DO_IT.
//!
//! For kernels whose netlink family is missing (before 4.12) or cannot carry an identifier (before 5.14). It has no reconnect and no
//! resize: the sockets must be ones that never die, such as a socketpair to the caller itself (proxy mode), and a resize takes effect
//! when the volume is attached again.
//!
//! ```text
//! _IO(0xab, n)   0 SET_SOCK fd   1 SET_BLKSIZE bytes   3 DO_IT   4 CLEAR_SOCK   7 SET_SIZE_BLOCKS n   8 DISCONNECT   10 SET_FLAGS
//! ```

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use super::ConnectRequest;
use super::error::KernelError;
use super::sysfs::Device;

const SET_SOCK: libc::c_ulong = 0xab00;
const SET_BLKSIZE: libc::c_ulong = 0xab01;
const DO_IT: libc::c_ulong = 0xab03;
const CLEAR_SOCK: libc::c_ulong = 0xab04;
const SET_SIZE_BLOCKS: libc::c_ulong = 0xab07;
const DISCONNECT: libc::c_ulong = 0xab08;
const SET_FLAGS: libc::c_ulong = 0xab0a;

const ACTION: &str = "set an NBD device up by ioctl";

/// A connected device; it is disconnected when this is dropped, and by the kernel if the process dies.
pub struct IoctlDevice {
    device: Device,
    file: Arc<File>,
    thread: Option<JoinHandle<()>>,
}

impl IoctlDevice {
    /// Connects the device of the request, or the first free one. `backend` and `dead_timeout` are not used.
    ///
    /// Errors: `Busy`, `AllBusy`, `NoDevice`, `NoPermission`, `Refused`.
    pub fn connect(request: &ConnectRequest<'_>) -> Result<Self, KernelError> {
        match request.index {
            Some(index) => Self::connect_to(Device(index), request),
            None => Self::connect_free(request),
        }
    }

    /// The device.
    #[must_use]
    pub fn device(&self) -> Device {
        self.device
    }

    /// Takes the device down and waits until the kernel has let go of it. Requests in flight fail with EIO.
    pub fn disconnect(mut self) -> Result<(), KernelError> {
        self.stop()
    }

    fn connect_free(request: &ConnectRequest<'_>) -> Result<Self, KernelError> {
        let devices = (0..).map(Device).take_while(|device| device.exists());
        let mut count = 0;
        for device in devices {
            count += 1;
            if device.is_connected() {
                continue;
            }
            // Another process may have taken it since.
            match Self::connect_to(device, request) {
                Err(KernelError::Busy { .. }) => {}
                other => return other,
            }
        }
        Err(KernelError::AllBusy(count))
    }

    fn connect_to(device: Device, request: &ConnectRequest<'_>) -> Result<Self, KernelError> {
        if device.is_connected() {
            return Err(device.busy());
        }
        let file = Arc::new(device.open()?);
        set_up(&file, request).map_err(|error| failure(device, error))?;
        let kept = Arc::clone(&file);
        let thread = std::thread::Builder::new()
            .name(format!("nbd{}", device.0))
            .spawn(move || serve(&kept))
            .map_err(|error| failure(device, error))?;
        let mut connected = Self {
            device,
            file,
            thread: Some(thread),
        };
        connected.wait_until_up()?;
        Ok(connected)
    }

    /// NBD_DO_IT makes the device live and returns only at its end, so its thread is watched instead.
    fn wait_until_up(&mut self) -> Result<(), KernelError> {
        const STEP: std::time::Duration = std::time::Duration::from_millis(2);
        while !self.device.is_connected() {
            if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                return Err(failure(
                    self.device,
                    io::Error::from_raw_os_error(libc::EIO),
                ));
            }
            std::thread::sleep(STEP);
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<(), KernelError> {
        let Some(thread) = self.thread.take() else {
            return Ok(());
        };
        let stopped = ioctl(&self.file, DISCONNECT, 0);
        let cleared = ioctl(&self.file, CLEAR_SOCK, 0);
        let ended = thread.join();
        let result = stopped.and(cleared);
        result.map_err(|error| failure(self.device, error))?;
        ended.map_err(|_| {
            failure(
                self.device,
                io::Error::other("the thread in NBD_DO_IT panicked"),
            )
        })
    }
}

impl Drop for IoctlDevice {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            tracing::warn!(device = %self.device.path().display(), "not disconnected: {error}");
        }
    }
}

fn set_up(file: &File, request: &ConnectRequest<'_>) -> io::Result<()> {
    let argument = |number: u64| {
        libc::c_ulong::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
    };
    for socket in request.sockets {
        ioctl(file, SET_SOCK, descriptor(*socket)?)?;
    }
    let configured = [
        (SET_BLKSIZE, u64::from(request.block_bytes)),
        (
            SET_SIZE_BLOCKS,
            request.size_bytes / u64::from(request.block_bytes.max(1)),
        ),
        (SET_FLAGS, request.flags),
    ]
    .into_iter()
    .try_for_each(|(command, number)| ioctl(file, command, argument(number)?));
    if configured.is_err() {
        ioctl(file, CLEAR_SOCK, 0)?;
    }
    configured
}

/// The thread of a device.
fn serve(file: &File) {
    if let Err(error) = ioctl(file, DO_IT, 0) {
        tracing::warn!("NBD_DO_IT ended: {error}");
    }
}

fn descriptor(socket: BorrowedFd<'_>) -> io::Result<libc::c_ulong> {
    libc::c_ulong::try_from(socket.as_raw_fd())
        .map_err(|_| io::Error::from_raw_os_error(libc::EBADF))
}

fn ioctl(file: &File, command: libc::c_ulong, argument: libc::c_ulong) -> io::Result<()> {
    // SAFETY: the commands take a number or a descriptor by value; the file is open for the call.
    match unsafe { libc::ioctl(file.as_raw_fd(), command, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn failure(device: Device, error: io::Error) -> KernelError {
    match error.raw_os_error() {
        Some(libc::EBUSY) => device.busy(),
        Some(libc::EPERM | libc::EACCES) => KernelError::NoPermission(ACTION),
        _ => KernelError::Refused {
            action: ACTION,
            source: error,
        },
    }
}
