//! What `nbd_server::kernel` does with a real kernel; `tests/system/kernel.rs` runs it in the guest, as root.
//!
//! Usage: in-guest SCENARIO...; prints `ok SCENARIO` for each, and panics at the first that fails.
//!        in-guest probe FILE; writes to FILE until /tmp/stop is there, see `probe`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::print_stdout)]

use blockd_tests::{binary, run};
use nbd_server::kernel::{
    ConnectRequest, Device, DeviceUser, IoctlDevice, Kernel, KernelError, LinkEvent, QueueSettings,
};
use nbd_server::open_export;
use std::fs::File;
use std::io::Write as _;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};

const MIB: u64 = 1 << 20;
const BACKEND: &str = "blockd-test-7";
/// Longest wait for what the kernel does by itself; nothing is judged by it.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if let [probe, path] = words.as_slice()
        && probe == "probe"
    {
        return self::probe(path);
    }
    for scenario in words {
        match scenario.as_str() {
            "refusals" => refusals(),
            "filesystem" => filesystem(),
            "resize" => resize(),
            "reconnect" => reconnect(),
            "dead-timeout" => dead_timeout(),
            "partitions" => partitions(),
            "ioctl" => ioctl(),
            other => panic!("no scenario {other}"),
        }
        println!("ok {scenario}");
    }
}

/// One durable write of 4 KiB after the other; /tmp/count has their number, /tmp/slow a line for each that took long, in ms.
fn probe(path: &str) {
    const SLOW: Duration = Duration::from_millis(10);
    let file = File::create(path).unwrap();
    let append = |line: String| {
        let slow = File::options().create(true).append(true).open("/tmp/slow");
        slow.unwrap().write_all(line.as_bytes()).unwrap();
    };
    let mut count = 0_u64;
    while !Path::new("/tmp/stop").exists() {
        let before = Instant::now();
        file.write_all_at(&count.to_le_bytes().repeat(512), count % 16 * 4096)
            .unwrap();
        file.sync_data().unwrap();
        let took = before.elapsed();
        if took > SLOW {
            append(format!("{}\n", took.as_millis()));
        }
        count += 1;
        std::fs::write("/tmp/count", count.to_string()).unwrap();
        sleep(Duration::from_millis(5));
    }
}

/// A server of 128 MiB of memory in a process of its own.
struct MemoryServer {
    address: String,
    process: Child,
}

impl MemoryServer {
    fn start(port: u16) -> Self {
        let address = format!("127.0.0.1:{port}");
        let mut command = Command::new(binary("nbd-server"));
        command.args(["--memory", "128MiB", "--listen", &address]);
        let server = Self {
            address,
            process: command.spawn().unwrap(),
        };
        wait_for(|| std::net::TcpStream::connect(&server.address).is_ok());
        server
    }

    /// A socket past its handshake, for the kernel, and the flags of the export.
    fn open(&self) -> (std::net::TcpStream, u64) {
        let runtime = runtime();
        let (stream, info) = runtime.block_on(async {
            let mut stream = TcpStream::connect(&self.address).await.unwrap();
            let info = open_export(&mut stream, "").await.unwrap();
            assert_eq!(info.size_bytes, 128 * MIB);
            (stream.into_std().unwrap(), info)
        });
        stream.set_nonblocking(false).unwrap();
        (stream, info.flags.into())
    }
}

impl Drop for MemoryServer {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// A device of 64 MiB over one connection.
struct Attached {
    kernel: Kernel,
    device: Device,
    socket: std::net::TcpStream,
}

impl Attached {
    fn new(server: &MemoryServer, dead_timeout: Duration) -> Self {
        let kernel = Kernel::open().unwrap();
        let (socket, flags) = server.open();
        let index = kernel
            .connect(&request(&[socket.as_fd()], flags, dead_timeout))
            .unwrap();
        let device = Device(index);
        device
            .tune(QueueSettings {
                io_timeout: Some(Duration::from_millis(200)),
                no_scheduler: true,
                ..QueueSettings::default()
            })
            .unwrap();
        Self {
            kernel,
            device,
            socket,
        }
    }

    fn open(&self) -> File {
        let path = self.device.path();
        File::options().read(true).write(true).open(path).unwrap()
    }

    fn is_listed(&self) -> bool {
        let devices = self.kernel.status().unwrap();
        devices
            .iter()
            .any(|device| device.index == self.device.0 && device.connected)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.kernel.disconnect(self.device.0).unwrap();
        wait_for(|| !self.device.is_connected());
    }
}

fn request<'a>(
    sockets: &'a [std::os::fd::BorrowedFd<'a>],
    flags: u64,
    dead_timeout: Duration,
) -> ConnectRequest<'a> {
    ConnectRequest {
        index: None,
        sockets,
        size_bytes: 64 * MIB,
        block_bytes: 512,
        flags,
        dead_timeout,
        backend: BACKEND,
    }
}

fn refusals() {
    let server = MemoryServer::start(10_901);
    let attached = Attached::new(&server, PATIENCE);
    let (kernel, index) = (attached.kernel, attached.device.0);
    assert!(attached.is_listed());
    assert_eq!(attached.device.backend().as_deref(), Some(BACKEND));
    assert_eq!(attached.device.size_bytes().unwrap(), 64 * MIB);
    assert!(!attached.device.is_read_only().unwrap());

    let (other, flags) = server.open();
    let sockets = [other.as_fd()];
    let mut taken = request(&sockets, flags, PATIENCE);
    taken.index = Some(index);
    let busy = kernel.connect(&taken).unwrap_err();
    assert!(matches!(busy, KernelError::Busy { .. }), "{busy}");
    assert!(busy.to_string().contains(BACKEND), "{busy}");

    let wrong = kernel
        .reconnect(index, "blockd-test-8", &sockets)
        .unwrap_err();
    assert!(matches!(wrong, KernelError::WrongBackend { .. }), "{wrong}");
    let idle = kernel.reconnect(15, BACKEND, &sockets).unwrap_err();
    assert!(matches!(idle, KernelError::NotConnected(15)), "{idle}");
    let missing = kernel.disconnect(4000).unwrap_err();
    assert!(matches!(missing, KernelError::NoDevice(4000)), "{missing}");
    // A file is no socket.
    let file = File::open("/proc/version").unwrap();
    let refused = kernel.connect(&request(&[file.as_fd()], flags, PATIENCE));
    assert!(
        matches!(refused, Err(KernelError::Refused { .. })),
        "{refused:?}"
    );
}

fn filesystem() {
    let server = MemoryServer::start(10_902);
    let attached = Attached::new(&server, PATIENCE);
    let device = attached.device.path().display().to_string();
    run(120, "mkfs.ext4", ["-q", &device]);
    std::fs::create_dir_all("/mnt/nbd").unwrap();
    run(60, "mount", [&device, "/mnt/nbd"]);
    std::fs::write("/mnt/nbd/file", vec![7; 1 << 20]).unwrap();
    let users = attached.device.users().unwrap();
    assert_eq!(users, [DeviceUser::Mount("/mnt/nbd".into())]);
    let busy = attached.device.rescan_partitions();
    assert!(matches!(busy, Err(KernelError::Busy { .. })), "{busy:?}");
    run(60, "umount", ["/mnt/nbd"]);
    assert_eq!(attached.device.users().unwrap(), []);
    run(120, "e2fsck", ["-fn", &device]);
    run(60, "blkdiscard", [&device]);
}

fn resize() {
    let server = MemoryServer::start(10_903);
    let attached = Attached::new(&server, PATIENCE);
    let (kernel, index) = (attached.kernel, attached.device.0);
    let file = attached.open();
    kernel.resize(index, BACKEND, 128 * MIB).unwrap();
    assert_eq!(attached.device.size_bytes().unwrap(), 128 * MIB);
    file.write_all_at(b"end", 128 * MIB - 3).unwrap();
    file.sync_all().unwrap();
    let shrinks = kernel.resize(index, BACKEND, 64 * MIB).unwrap_err();
    assert!(matches!(shrinks, KernelError::Shrinks { .. }), "{shrinks}");
}

/// Writes one block after the other, each durable, until it is told to stop.
struct Writer {
    stop: Arc<AtomicBool>,
    written: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<()>,
}

impl Writer {
    fn start(file: File) -> Self {
        let (stop, written) = (
            Arc::new(AtomicBool::new(false)),
            Arc::new(AtomicU64::new(0)),
        );
        let (stopped, count) = (Arc::clone(&stop), Arc::clone(&written));
        let thread = spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let number = count.load(Ordering::Relaxed);
                let block = number.to_le_bytes().repeat(512);
                file.write_all_at(&block, number % 1000 * 4096).unwrap();
                file.sync_data().unwrap();
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Self {
            stop,
            written,
            thread,
        }
    }

    fn wait_progress(&self) {
        let before = self.written.load(Ordering::Relaxed);
        wait_for(|| self.written.load(Ordering::Relaxed) > before + 2);
    }

    fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap();
    }
}

fn reconnect() {
    let server = MemoryServer::start(10_904);
    let mut attached = Attached::new(&server, PATIENCE);
    let runtime = runtime();
    let _context = runtime.enter();
    let mut events = attached.kernel.link_dead_events().unwrap();
    let writer = Writer::start(attached.open());
    for round in 0..3 {
        writer.wait_progress();
        attached.socket.shutdown(Shutdown::Both).unwrap();
        let event = runtime.block_on(async {
            let event = tokio::time::timeout(PATIENCE, events.next());
            event.await.expect("the link is known to be dead").unwrap()
        });
        assert_eq!(event, LinkEvent::Dead(attached.device.0), "round {round}");
        let (socket, _) = server.open();
        let before = Instant::now();
        attached
            .kernel
            .reconnect(attached.device.0, BACKEND, &[socket.as_fd()])
            .unwrap();
        attached.socket = socket;
        writer.wait_progress();
        println!("reconnected, going on after {:?}", before.elapsed());
    }
    writer.end();
    assert!(attached.is_listed());
}

fn dead_timeout() {
    // Where nothing has been read yet: the cache needs no server.
    const FAR: u64 = 32 * MIB;
    let server = MemoryServer::start(10_905);
    let mut attached = Attached::new(&server, Duration::from_secs(2));
    let file = attached.open();
    attached.socket.shutdown(Shutdown::Both).unwrap();
    let mut block = vec![0; 4096];
    let error = file.read_exact_at(&mut block, FAR).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO), "{error}");
    // A dead device comes back all the same.
    let (socket, _) = server.open();
    let given = attached
        .kernel
        .reconnect(attached.device.0, BACKEND, &[socket.as_fd()]);
    given.unwrap();
    attached.socket = socket;
    file.read_exact_at(&mut block, FAR).unwrap();
}

fn partitions() {
    let server = MemoryServer::start(10_906);
    let attached = Attached::new(&server, PATIENCE);
    let mut table = vec![0; 512];
    // One entry of an MBR: type 0x83 from sector 2048, 4096 sectors.
    table[450] = 0x83;
    table[454..458].copy_from_slice(&2048_u32.to_le_bytes());
    table[458..462].copy_from_slice(&4096_u32.to_le_bytes());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    let file = attached.open();
    file.write_all_at(&table, 0).unwrap();
    file.sync_all().unwrap();
    drop(file);
    attached.device.rescan_partitions().unwrap();
    let partition = format!("/sys/block/nbd{0}/nbd{0}p1/size", attached.device.0);
    assert_eq!(std::fs::read_to_string(partition).unwrap().trim(), "4096");
}

fn ioctl() {
    let server = MemoryServer::start(10_907);
    let (socket, flags) = server.open();
    let sockets = [socket.as_fd()];
    let held = IoctlDevice::connect(&request(&sockets, flags, PATIENCE)).unwrap();
    let device = held.device();
    assert_eq!(device.size_bytes().unwrap(), 64 * MIB);
    let file = File::options()
        .read(true)
        .write(true)
        .open(device.path())
        .unwrap();
    file.write_all_at(b"by ioctl", 4096).unwrap();
    file.sync_all().unwrap();
    let mut wanted = request(&sockets, flags, PATIENCE);
    wanted.index = Some(device.0);
    let busy = IoctlDevice::connect(&wanted)
        .err()
        .expect("it is connected");
    assert!(matches!(busy, KernelError::Busy { .. }), "{busy}");
    drop(file);
    held.disconnect().unwrap();
    assert!(!device.is_connected());
    // The device can be used again.
    let (socket, flags) = server.open();
    let again = IoctlDevice::connect(&request(&[socket.as_fd()], flags, PATIENCE)).unwrap();
    assert_eq!(again.device(), device);
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

fn wait_for(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain");
        sleep(Duration::from_millis(10));
    }
}
