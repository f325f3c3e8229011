//! Starts the built server for a test and runs real clients against it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

/// A running server; killed when dropped.
pub(crate) struct TestServer {
    child: Child,
    dir: TempDir,
    tcp: String,
}

impl TestServer {
    /// Serves so much memory.
    pub(crate) fn memory(size: &str, more: &[&str]) -> Self {
        Self::start(
            &[&["--memory", size], more].concat(),
            tempfile::tempdir().unwrap(),
        )
    }

    /// Starts with these arguments, on a unix socket in `dir` and a free TCP port.
    pub(crate) fn start(args: &[&str], dir: TempDir) -> Self {
        let socket = dir.path().join("s");
        let mut child = Command::new(env!("CARGO_BIN_EXE_nbd-server"))
            .args(args)
            .args([
                "--unix",
                socket.to_str().unwrap(),
                "--listen",
                "127.0.0.1:0",
                "--verbose",
                "--exit-with-parent",
            ])
            .env("NO_COLOR", "1")
            .env("RUST_BACKTRACE", "0")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let line = lines
            .find_map(|line| line.ok().filter(|line| line.contains("listening on tcp")))
            .expect("the server must start");
        let tcp = line.rsplit(' ').next().unwrap().to_owned();
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, dir, tcp }
    }

    /// Path of a file next to the socket.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Path of the unix socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.path("s")
    }

    /// ADDR:PORT.
    pub(crate) fn tcp(&self) -> &str {
        &self.tcp
    }

    /// URI of an export over the unix socket.
    pub(crate) fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    /// URI of an export over TCP.
    pub(crate) fn tcp_uri(&self, name: &str) -> String {
        format!("nbd://{}/{name}", self.tcp)
    }

    /// Asks the server to stop and waits; whether it ended well.
    pub(crate) fn stop(mut self) -> bool {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap().success()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a client, at most 60 s; its output, both streams. Fails the test unless it succeeds.
pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let (ok, text) = try_run(program, args);
    assert!(ok, "{program} {args:?} failed:\n{text}");
    text
}

/// Runs a client, at most 60 s; whether it succeeded, and its output.
pub(crate) fn try_run(program: &str, args: &[&str]) -> (bool, String) {
    let mut command = Command::new("timeout");
    command
        .arg("60")
        .arg(program)
        .args(args)
        .env("PATH", "/usr/bin:/bin:/usr/sbin:/sbin")
        .env("RUST_BACKTRACE", "0")
        .stdin(Stdio::null());
    let output = command.output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

/// A file of so many pseudo-random bytes, with a hole of the same size behind them.
pub(crate) fn pattern_file(path: &Path, len_bytes: usize) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(len_bytes);
    while bytes.len() < len_bytes {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&(state ^ (state >> 29)).to_le_bytes());
    }
    std::fs::write(path, &bytes[..len_bytes]).unwrap();
    std::fs::OpenOptions::new()
        .write(true)
        .open(path)
        .unwrap()
        .set_len(len_bytes as u64 * 2)
        .unwrap();
}
