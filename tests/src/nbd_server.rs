//! The `nbd-server` program as a process of its own, and what it costs.

use crate::address::AddressBlock;
use crate::nbd_raw::{Address, Endpoint};
use crate::program::binary;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::Read;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(5);

/// A server of one export on an address of its own, over TCP and unix; killed when dropped.
pub struct NbdServer {
    arguments: Vec<String>,
    child: Option<Child>,
    /// The server listens on number 1.
    pub addresses: AddressBlock,
    directory: TempDir,
}

impl NbdServer {
    /// Serves so much memory (`64MiB`).
    #[must_use]
    pub fn memory(size: &str, more: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::start(directory, &[&["--memory", size], more].concat())
    }

    /// Serves a sparse file of so many bytes.
    #[must_use]
    pub fn file(size_bytes: u64, more: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let disk = directory.path().join("disk");
        File::create(&disk).unwrap().set_len(size_bytes).unwrap();
        Self::start(directory, &[&[disk.to_str().unwrap()], more].concat())
    }

    fn start(directory: TempDir, arguments: &[&str]) -> Self {
        let mut server = Self {
            arguments: arguments.iter().map(|part| (*part).to_owned()).collect(),
            child: None,
            addresses: AddressBlock::claim(),
            directory,
        };
        server.spawn();
        server
    }

    /// Starts the process (again, at the same addresses) and waits until it greets.
    pub fn spawn(&mut self) {
        let mut command = Command::new(binary("nbd-server"));
        command
            .args(&self.arguments)
            .arg("--unix")
            .arg(self.socket());
        command.args(["--listen", &self.tcp()]);
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.path("log"));
        command.stdin(Stdio::null()).stderr(log.unwrap());
        self.child = Some(command.spawn().unwrap());
        let deadline = Instant::now() + PATIENCE;
        while !self.greets() {
            assert!(Instant::now() < deadline, "not ready: {}", self.log());
            sleep(POLL);
        }
    }

    fn greets(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(self.tcp()) else {
            return false;
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.read_exact(&mut [0; 18]).is_ok()
    }

    /// The path of a file that goes away with the server.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.path("nbd.sock")
    }

    /// `HOST:PORT`.
    #[must_use]
    pub fn tcp(&self) -> String {
        format!("{}:10809", self.addresses.of(1))
    }

    /// The export over TCP and over the unix socket.
    #[must_use]
    pub fn endpoints(&self, export: &str) -> [Endpoint; 2] {
        [Address::Tcp(self.tcp()), Address::Unix(self.socket())].map(|at| Endpoint::new(at, export))
    }

    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(self.child.as_ref().expect("the server runs"))
    }

    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // The process may have ended already; either way it is gone afterwards.
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGTERM, and the exit status that follows.
    pub fn stop(&mut self) -> ExitStatus {
        kill_process(self.pid(), Signal::TERM).unwrap();
        self.child.take().unwrap().wait().unwrap()
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a process costs now.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    pub resident_bytes: u64,
    /// Highest `resident_bytes` since the start, or since [`Usage::forget_peak`].
    pub peak_bytes: u64,
    pub open_files: usize,
}

impl Usage {
    #[must_use]
    pub fn of(pid: Pid) -> Self {
        let root = format!("/proc/{}", pid.as_raw_nonzero());
        let status = fs::read_to_string(format!("{root}/status")).unwrap();
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let kib = line.unwrap().trim().trim_end_matches(" kB");
            kib.parse::<u64>().unwrap() << 10
        };
        Self {
            resident_bytes: bytes("VmRSS:"),
            peak_bytes: bytes("VmHWM:"),
            open_files: fs::read_dir(format!("{root}/fd")).unwrap().count(),
        }
    }

    /// Starts the peak anew (proc(5), `clear_refs`).
    pub fn forget_peak(pid: Pid) {
        fs::write(format!("/proc/{}/clear_refs", pid.as_raw_nonzero()), "5").unwrap();
    }
}
