//! A device of the kernel whose requests come to this process, over a socketpair a connection.
//!
//! The kernel sees sockets that answer late but do not die, so a lost server is nothing that it
//! notices. A socket dies with this process, or when the kernel closes it: with several connections
//! a request that waits for `SLOW_IO_TIMEOUT` costs its connection. Either way the kernel keeps what
//! was not answered, and sends it again over the socket that `RECONFIGURE` gives it, after the
//! `io_timeout` of the queue.

use super::error::{AttachError, AttachErrorKind};
use super::leg::Leg;
use super::record::{Record, StateDir};
use nbd_server::kernel::{
    ConnectRequest, Device, IoctlDevice, Kernel, KernelError, QueueSettings, transmission_flags,
};
use nbd_server::{Export as _, ServeOptions, serve_transmission};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

/// Logical block size in bytes: the smallest, so that any partition table and filesystem fits.
pub(super) const BLOCK_BYTES: u32 = 512;
/// With one connection the timer costs nothing but a line in the kernel's log for a request that
/// waits, and bounds the stall after the death of this process.
const IO_TIMEOUT: Duration = Duration::from_secs(5);
/// With more it costs the connection: the kernel's default.
const SLOW_IO_TIMEOUT: Duration = Duration::from_secs(30);
/// Largest request in KiB: fewer round trips for streams; the default of 6.1 is 128.
const MAX_SECTORS_KB: u32 = 1024;
/// Read-ahead in KiB: several requests in flight for one reader.
const READ_AHEAD_KB: u32 = 4096;
/// Kernel buffer of a socket in bytes; the default holds only three 64 KiB writes.
const SOCKET_BYTES: usize = 1 << 20;
/// Pause before a connection that the kernel has closed is made again, and the one if that was
/// tried just now.
const RETRY: Duration = Duration::from_millis(20);
const SLOW_RETRY: Duration = Duration::from_millis(500);

/// How the device is held.
enum Driver {
    Netlink(Kernel),
    /// Kernels before 5.14: no reconnect, no resize; the device lives as long as this process.
    Ioctl(Option<IoctlDevice>),
}

/// A connected device.
pub(super) struct ProxyDevice {
    driver: Driver,
    device: Device,
    backend: String,
    leg: Leg,
    /// Tells of each connection that has ended.
    ended: mpsc::Receiver<()>,
    ender: mpsc::Sender<()>,
    /// Connections that have ended and are to be made again, and when that was tried last.
    missing: u32,
    reconnected: Option<Instant>,
    /// Size in bytes that the device could not be given: it is said once.
    refused_bytes: Option<u64>,
    is_down: bool,
}

impl ProxyDevice {
    /// Connects a device, or gives the one that `before` had new connections.
    pub(super) async fn connect(
        leg: &Leg,
        record: &Record,
        before: Option<Device>,
    ) -> Result<Self, AttachError> {
        let backend = record.key.to_string();
        let connections = record.spec.connections;
        let (ours, theirs) = pairs(connections)?;
        let request = Request {
            index: wanted(record)?,
            size_bytes: leg.info().size_bytes,
            flags: transmission_flags(&leg.info()),
            dead_timeout: record.spec.dead_timeout,
            backend: backend.clone(),
            sockets: theirs,
        };
        let (driver, device) = blocking(move || request.connect(before)).await??;
        let (ender, ended) = mpsc::channel(connections.max(1) as usize);
        let connected = Self {
            driver,
            device,
            backend,
            leg: leg.clone(),
            ended,
            ender,
            missing: 0,
            reconnected: None,
            refused_bytes: None,
            is_down: false,
        };
        ours.into_iter().for_each(|socket| connected.serve(socket));
        let slow = connections > 1;
        settle(device, if slow { SLOW_IO_TIMEOUT } else { IO_TIMEOUT }).await;
        Ok(connected)
    }

    pub(super) fn path(&self) -> PathBuf {
        self.device.path()
    }

    /// Serves one connection in a task of its own.
    fn serve(&self, socket: UnixStream) {
        let (leg, ender, device) = (self.leg.clone(), self.ender.clone(), self.device);
        tokio::task::spawn_local(async move {
            let served = serve_transmission(socket, leg, ServeOptions::default()).await;
            tracing::info!(device = device.0, ?served, "connection to the kernel ended");
            let _ = ender.send(()).await;
        });
    }

    /// Gives the device the size of its volume.
    pub(super) async fn resize(&mut self, size_bytes: u64) {
        let Driver::Netlink(kernel) = self.driver else {
            return;
        };
        if self.is_down || self.refused_bytes == Some(size_bytes) {
            return;
        }
        let done = resized(kernel, self.device, &self.backend, size_bytes).await;
        self.refused_bytes = (!done).then_some(size_bytes);
    }

    /// Returns when the device was taken down by somebody else. Connections that the kernel has
    /// closed are made again. Cancel-safe.
    pub(super) async fn gone(&mut self) {
        loop {
            while self.missing == 0 {
                self.ended.recv().await;
                self.missing += 1;
            }
            if !self.is_ours() {
                self.is_down = true;
                return;
            }
            // The kernel drops a socket that finds no dead one to replace; its end tells us again.
            sleep(self.pause()).await;
            match self.reconnect().await {
                Ok(()) => self.missing -= 1,
                Err(error) => tracing::warn!("no new connection to the kernel: {error}"),
            }
        }
    }

    fn pause(&mut self) -> Duration {
        let now = Instant::now();
        let before = self.reconnected.replace(now);
        match before.is_some_and(|before| now - before < SLOW_RETRY) {
            true => SLOW_RETRY,
            false => RETRY,
        }
    }

    fn is_ours(&self) -> bool {
        match self.driver {
            Driver::Netlink(_) => {
                self.device.is_connected()
                    && self.device.backend().as_deref() == Some(self.backend.as_str())
            }
            Driver::Ioctl(_) => false,
        }
    }

    async fn reconnect(&self) -> Result<(), AttachError> {
        let Driver::Netlink(kernel) = self.driver else {
            return Ok(());
        };
        let (ours, theirs) = pairs(1)?;
        let (index, backend) = (self.device.0, self.backend.clone());
        let given = blocking(move || kernel.reconnect(index, &backend, &borrowed(&theirs)));
        given.await?.map_err(refusal)?;
        ours.into_iter().for_each(|socket| self.serve(socket));
        Ok(())
    }

    /// Takes the device down; without `force` only if nobody uses it.
    pub(super) async fn disconnect(&mut self, force: bool) -> Result<(), AttachError> {
        if self.is_down {
            return Ok(());
        }
        let device = self.device;
        match &mut self.driver {
            Driver::Netlink(kernel) => {
                let kernel = *kernel;
                blocking(move || disconnect(kernel, device, force)).await??;
            }
            Driver::Ioctl(held) => {
                let held = held.take();
                blocking(move || {
                    let _claim = claim(device, force)?;
                    held.map_or(Ok(()), IoctlDevice::disconnect)
                        .map_err(refusal)
                })
                .await??;
            }
        }
        self.is_down = true;
        Ok(())
    }
}

/// Queue and partitions; both read the device, so it must be served already.
pub(super) async fn settle(device: Device, io_timeout: Duration) {
    let settings = QueueSettings {
        io_timeout: Some(io_timeout),
        max_sectors_kb: Some(MAX_SECTORS_KB),
        read_ahead_kb: Some(READ_AHEAD_KB),
        no_scheduler: true,
        ..QueueSettings::default()
    };
    let settled = blocking(move || {
        device.tune(settings)?;
        device.rescan_partitions()
    });
    if let Ok(Err(error)) | Err(error) = settled.await.map(|done| done.map_err(refusal)) {
        tracing::warn!("the device works with other settings: {error}");
    }
}

/// Gives a device the size of its volume; `false`, once it is said, if it cannot have it.
pub(super) async fn resized(
    kernel: Kernel,
    device: Device,
    backend: &str,
    size_bytes: u64,
) -> bool {
    let backend = backend.to_owned();
    let resized = blocking(move || match device.size_bytes()? {
        now_bytes if now_bytes == size_bytes => Ok(false),
        _ => kernel.resize(device.0, &backend, size_bytes).map(|()| true),
    });
    match resized.await {
        Ok(Ok(changed)) => {
            if changed {
                tracing::info!(size_bytes, "resized");
            }
            true
        }
        Ok(Err(error)) => {
            tracing::warn!("{error}");
            false
        }
        Err(error) => {
            tracing::warn!("{error}");
            true
        }
    }
}

/// A device to connect, with the kernel's ends of the pairs.
struct Request {
    index: Option<u32>,
    size_bytes: u64,
    flags: u64,
    dead_timeout: Duration,
    backend: String,
    sockets: Vec<StdUnixStream>,
}

impl Request {
    fn connect(&self, before: Option<Device>) -> Result<(Driver, Device), AttachError> {
        let kernel = match Kernel::open() {
            Ok(kernel) => kernel,
            Err(KernelError::TooOld { .. }) => return self.connect_by_ioctl(),
            Err(error) => return Err(refusal(error)),
        };
        let sockets = borrowed(&self.sockets);
        if let Some(device) = before {
            let given = kernel.reconnect(device.0, &self.backend, &sockets);
            given.map_err(refusal)?;
            return Ok((Driver::Netlink(kernel), device));
        }
        let index = kernel.connect(&self.as_kernel_wants(&sockets));
        Ok((Driver::Netlink(kernel), Device(index.map_err(refusal)?)))
    }

    fn connect_by_ioctl(&self) -> Result<(Driver, Device), AttachError> {
        let sockets = borrowed(&self.sockets);
        let connected = IoctlDevice::connect(&self.as_kernel_wants(&sockets)).map_err(refusal)?;
        let device = connected.device();
        Ok((Driver::Ioctl(Some(connected)), device))
    }

    fn as_kernel_wants<'a>(&'a self, sockets: &'a [BorrowedFd<'a>]) -> ConnectRequest<'a> {
        ConnectRequest {
            index: self.index,
            sockets,
            size_bytes: self.size_bytes,
            block_bytes: BLOCK_BYTES,
            flags: self.flags,
            dead_timeout: self.dead_timeout,
            backend: &self.backend,
        }
    }
}

/// The device that a daemon which died has left, if it still waits for this volume.
pub(super) fn left_by(before: &Record) -> Option<Device> {
    let device = Device::from_path(before.device.as_deref()?)?;
    let backend = before.key.to_string();
    (device.is_connected() && device.backend() == Some(backend)).then_some(device)
}

/// The target that a device or partition (`nbd0`, `nbd0p1`, also below `/dev`) shows. Right from
/// the moment that the kernel has the device.
///
/// # Errors
/// It is none of ours.
pub fn name_of(dir: &StateDir, device: &str) -> Result<String, AttachError> {
    let name = device.trim_start_matches("/dev/");
    let index = name
        .strip_prefix("nbd")
        .and_then(|rest| rest.split('p').next()?.parse().ok());
    let backend = index.and_then(|index| Device(index).backend());
    let mut records = dir.list()?.into_iter();
    let record = records.find(|record| backend.as_ref() == Some(&record.key.to_string()));
    record.map(|record| record.spec.target).ok_or_else(|| {
        let text = format!("{device} is no device of an attachment");
        AttachError::new(AttachErrorKind::NotAttached, text)
    })
}

/// Takes down the device of an attachment without a daemon.
///
/// # Errors
/// It is in use and `force` is not set, or the kernel refuses.
pub async fn detach_unserved(record: &Record, force: bool) -> Result<(), AttachError> {
    let Some(device) = left_by(record) else {
        return Ok(());
    };
    blocking(move || disconnect(Kernel::open().map_err(refusal)?, device, force)).await?
}

pub(super) fn disconnect(kernel: Kernel, device: Device, force: bool) -> Result<(), AttachError> {
    let _claim = claim(device, force)?;
    kernel.disconnect(device.0).map_err(refusal)
}

/// Holds the device alone, so that nobody mounts it meanwhile, and writes out what is cached of it.
fn claim(device: Device, force: bool) -> Result<Option<std::fs::File>, AttachError> {
    if force {
        return Ok(None);
    }
    let path = device.path();
    let open = std::fs::File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(&path);
    let busy = |users: String| {
        let text = format!("{} is in use: {users}", path.display());
        AttachError::new(AttachErrorKind::Busy, text)
    };
    let file = match open {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            return Err(busy(users(device)));
        }
        opened => opened.map_err(|error| AttachError::system(path.display(), &error))?,
    };
    file.sync_all()
        .map_err(|error| AttachError::system(path.display(), &error))?;
    Ok(Some(file))
}

fn users(device: Device) -> String {
    let users = device.users().unwrap_or_default();
    let texts: Vec<String> = users.iter().map(ToString::to_string).collect();
    match texts.is_empty() {
        true => "by somebody whom /proc does not show".to_owned(),
        false => texts.join(", "),
    }
}

pub(super) fn wanted(record: &Record) -> Result<Option<u32>, AttachError> {
    let Some(path) = &record.spec.device else {
        return Ok(None);
    };
    match Device::from_path(path) {
        Some(device) => Ok(Some(device.0)),
        None => Err(AttachError::new(
            AttachErrorKind::Invalid,
            format!(
                "{} is no NBD device; name one like /dev/nbd0",
                path.display()
            ),
        )),
    }
}

/// So many socketpairs: our ends and the kernel's.
fn pairs(count: u32) -> Result<(Vec<UnixStream>, Vec<StdUnixStream>), AttachError> {
    let one = || -> io::Result<_> {
        let (ours, theirs) = StdUnixStream::pair()?;
        for socket in [&ours, &theirs] {
            rustix::net::sockopt::set_socket_send_buffer_size(socket, SOCKET_BYTES)?;
        }
        ours.set_nonblocking(true)?;
        Ok((UnixStream::from_std(ours)?, theirs))
    };
    let all: io::Result<Vec<_>> = (0..count.max(1)).map(|_| one()).collect();
    let all = all.map_err(|error| AttachError::system("socketpair", &error))?;
    Ok(all.into_iter().unzip())
}

fn borrowed(sockets: &[StdUnixStream]) -> Vec<BorrowedFd<'_>> {
    sockets.iter().map(|socket| socket.as_fd()).collect()
}

/// Runs what waits for the kernel, which may wait for us, on another thread.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, AttachError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| AttachError::new(AttachErrorKind::System, error.to_string()))
}

pub(super) fn refusal(error: KernelError) -> AttachError {
    let kind = match &error {
        KernelError::NoModule(_) | KernelError::TooOld { .. } => AttachErrorKind::NoModule,
        KernelError::NoPermission(_) => AttachErrorKind::Permission,
        KernelError::Busy { .. } | KernelError::AllBusy(_) => AttachErrorKind::Busy,
        KernelError::NoDevice(_) => AttachErrorKind::Invalid,
        _ => AttachErrorKind::System,
    };
    AttachError::new(kind, error.to_string())
}
