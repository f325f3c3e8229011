//! Long-lived clients that reconnect by themselves, through kill -9 and restart of their server.

use blockd_tests::nbd_raw::Endpoint;
use blockd_tests::{Cluster, MIB, NbdServer};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// A `qemu-io` that stays connected.
struct QemuIo {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl QemuIo {
    /// QEMU waits so long for a server that is away.
    fn open(socket: &Path, export: &str) -> Self {
        let image = format!(
            "driver=nbd,server.type=unix,server.path={},export={export},reconnect-delay=60",
            socket.display()
        );
        let mut command = Command::new("timeout");
        command.args(["120", "qemu-io", "--image-opts", &image]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Self {
            stdin: child.stdin.take().unwrap(),
            stdout: BufReader::new(child.stdout.take().unwrap()),
            child,
        }
    }

    /// Runs a read or write of 64 KiB, which must succeed.
    fn run(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
        let mut heard = String::new();
        while !heard.contains(" bytes at offset ") {
            let read = self.stdout.read_line(&mut heard).unwrap();
            let failed = read == 0 || heard.contains("ailed") || heard.contains("rror");
            assert!(!failed, "{command}: {heard}");
        }
        assert!(heard.contains("65536/65536"), "{command}: {heard}");
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        // It may have ended already; either way it is gone afterwards.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What was written before the restart is there after it, through the same client.
fn survives(socket: &Path, export: &str, mut restart: impl FnMut()) {
    let mut client = QemuIo::open(socket, export);
    for round in 1..=3 {
        client.run(&format!("write -f -P {round} {round}M 64k"));
        restart();
        client.run(&format!("read -P {round} {round}M 64k"));
        client.run(&format!("write -P {} {round}M 64k", round + 10));
    }
}

#[test]
fn qemu_reconnects_to_nbd_server() {
    let mut server = NbdServer::file(8 * MIB, &["--name", "v"]);
    let socket = server.socket();
    survives(&socket, "v", || {
        server.kill();
        server.spawn();
    });
}

#[test]
fn qemu_reconnects_to_blockd() {
    let mut cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    let socket = cluster.servers[0].socket();
    let server = &mut cluster.servers[0];
    survives(&socket, "v", || {
        server.kill();
        server.start();
    });
}

/// nbdkit between client and server; its retry filter opens the server again.
struct Nbdkit(Child);

impl Nbdkit {
    fn start(socket: &Path, behind: &Endpoint) -> Self {
        let mut command = Command::new("nbdkit");
        command.args(["-f", "-U"]).arg(socket);
        command.args(["--filter=retry", "nbd", &format!("uri={}", behind.uri())]);
        command.args([
            "retry=30",
            "retries=100",
            "retry-delay=1",
            "retry-exponential=no",
        ]);
        let child = command.spawn().unwrap();
        while std::os::unix::net::UnixStream::connect(socket).is_err() {
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Self(child)
    }
}

impl Drop for Nbdkit {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn nbdkit_retries_over_nbd_server() {
    let mut server = NbdServer::file(8 * MIB, &["--name", "v"]);
    let socket = server.path("kit.sock");
    let _kit = Nbdkit::start(&socket, &server.endpoints("v")[0]);
    survives(&socket, "", || {
        server.kill();
        server.spawn();
    });
}
