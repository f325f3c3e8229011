//! One `blockd` process: start, readiness, signals, memory.

use crate::program::binary;
use blockd::node::config::{NBD_PORT, PEER_PORT};
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Longest time that a start (with its recovery) or a clean stop may take.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);

/// A server's directory and address, and its process while it runs.
#[derive(Debug)]
pub struct Server {
    pub number: u8,
    pub address: Ipv4Addr,
    /// Holds the state directory (unless set elsewhere), the socket and the log.
    pub directory: PathBuf,
    pub state: PathBuf,
    pub config: String,
    /// Variables of the next start.
    pub environment: Vec<(String, String)>,
    /// Network namespace in which it runs; that of the test, if none.
    pub namespace: Option<String>,
    process: Option<Child>,
}

impl Server {
    /// A server that is not started yet.
    #[must_use]
    pub fn new(number: u8, address: Ipv4Addr, directory: &Path) -> Self {
        fs::create_dir_all(directory).unwrap();
        Self {
            number,
            address,
            directory: directory.to_owned(),
            state: directory.join("state"),
            config: String::new(),
            environment: Vec::new(),
            namespace: None,
            process: None,
        }
    }

    #[must_use]
    pub fn peer_address(&self) -> String {
        format!("{}:{PEER_PORT}", self.address)
    }

    #[must_use]
    pub fn nbd_address(&self) -> String {
        format!("{}:{NBD_PORT}", self.address)
    }

    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.directory.join("nbd.sock")
    }

    /// The NBD URIs of an export: over TCP and over the unix socket.
    #[must_use]
    pub fn uris(&self, export: &str) -> [String; 2] {
        [
            format!("nbd://{}/{export}", self.nbd_address()),
            format!("nbd+unix:///{export}?socket={}", self.socket().display()),
        ]
    }

    /// Starts the process without waiting for it.
    pub fn spawn(&mut self) {
        assert!(
            self.process.is_none(),
            "server {} runs already",
            self.number
        );
        let config = self.directory.join("blockd.toml");
        fs::write(&config, &self.config).unwrap();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .unwrap();
        let mut command = self.program(&binary("blockd"));
        command.arg("serve").arg("--state").arg(&self.state);
        command.args(["--listen", &self.address.to_string()]);
        command
            .arg("--nbd-unix")
            .arg(self.socket())
            .arg("--config")
            .arg(config);
        command.env("BLOCKD_LOG", "info,openraft=warn");
        command.envs(self.environment.iter().cloned());
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.process = Some(command.spawn().unwrap());
    }

    /// A program beside the server, which sees the networks that it sees.
    #[must_use]
    pub fn program(&self, path: &Path) -> Command {
        match &self.namespace {
            None => Command::new(path),
            Some(namespace) => {
                // `ip` becomes the program: it has its process id.
                let mut command = Command::new("ip");
                command.args(["netns", "exec", namespace]).arg(path);
                command
            }
        }
    }

    /// Starts the process and waits until it serves.
    pub fn start(&mut self) {
        self.spawn();
        self.wait_ready();
    }

    /// Waits until the server greets an NBD client.
    pub fn wait_ready(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.greets() {
            if let Some(status) = self.ended() {
                panic!("server {} ended with {status}\n{}", self.number, self.log());
            }
            assert!(
                Instant::now() < deadline,
                "server {} not ready\n{}",
                self.number,
                self.log()
            );
            sleep(POLL);
        }
    }

    fn greets(&self) -> bool {
        let Ok(mut stream) = UnixStream::connect(self.socket()) else {
            return false;
        };
        stream
            .set_read_timeout(Some(Duration::from_secs(1)))
            .unwrap();
        let mut greeting = [0; 8];
        stream.read_exact(&mut greeting).is_ok() && greeting == *b"NBDMAGIC"
    }

    /// The exit status, if the process has ended by itself.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.process.as_mut()?.try_wait().unwrap()
    }

    /// Waits for the process to end by itself.
    pub fn wait_end(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.ended() {
                self.process = None;
                return status;
            }
            assert!(
                Instant::now() < deadline,
                "server {} goes on\n{}",
                self.number,
                self.log()
            );
            sleep(POLL);
        }
    }

    #[must_use]
    pub fn is_running(&self) -> bool {
        self.process.is_some()
    }

    /// Sends a signal to the process.
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.process.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// SIGTERM, and the exit status that follows.
    pub fn stop(&mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.wait_end()
    }

    #[must_use]
    pub fn pid(&self) -> Pid {
        Pid::from_child(self.process.as_ref().expect("the server runs"))
    }

    /// Resident memory of the process in bytes.
    #[must_use]
    pub fn resident_bytes(&self) -> u64 {
        let path = format!("/proc/{}/status", self.pid().as_raw_nonzero());
        let status = fs::read_to_string(path).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))
            .unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
    }

    fn log_path(&self) -> PathBuf {
        self.directory.join("log")
    }

    /// What the server has logged, over all its starts.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(mut child) = self.process.take() {
            // The process may have ended already; either way it is gone afterwards.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
