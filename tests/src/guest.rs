//! A virtual machine with Debian's kernel, for what needs a real `/dev/nbdX`.
//!
//! QEMU boots `scripts/guest-image.sh`'s kernel without KVM (no stock kernel boots on the KVM of our
//! test machines). The guest's root is the host's under an overlay in memory: every program of
//! the host runs there, and nothing that it writes gets out; /tmp, /run and /mnt are its own, the
//! host's stay visible below /host. Its network is QEMU's own: 127.0.0.1 is the guest, every other
//! loopback address is the host's, so servers have the same addresses on both sides.

use crate::address::AddressBlock;
use crate::program::{Ran, binary};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

/// Longest time that a boot may take on a machine that does a lot besides.
const BOOT: Duration = Duration::from_secs(240);
/// How much longer than a command's own limit its answer is waited for.
const GRACE_S: u32 = 30;
/// Port of tests/guest/agent.
const AGENT_PORT: u16 = 7000;

/// A running guest; it is killed when this is dropped, or when the test's process dies.
pub struct Guest {
    process: Child,
    agent: SocketAddr,
    directory: tempfile::TempDir,
    _addresses: AddressBlock,
}

impl Guest {
    /// Boots a guest and waits until it runs commands.
    #[must_use]
    pub fn boot() -> Self {
        Self::boot_with(&[])
    }

    /// As [`Self::boot`], with further arguments of QEMU.
    #[must_use]
    pub fn boot_with(arguments: &[&str]) -> Self {
        let image = image();
        let addresses = AddressBlock::claim();
        let agent = SocketAddr::from((addresses.of(253), AGENT_PORT));
        let directory = tempfile::tempdir().unwrap();
        let process = qemu(&image, agent, &directory.path().join("console"))
            .args(arguments)
            .spawn()
            .expect("QEMU starts; see scripts/deps.sh test");
        let guest = Self {
            process,
            agent,
            directory,
            _addresses: addresses,
        };
        guest.wait_up();
        guest
    }

    /// Runs a shell command for at most `limit_s` seconds (then its code is 124).
    pub fn run(&self, limit_s: u32, command: &str) -> Ran {
        ask(self.agent, limit_s, command)
            .unwrap_or_else(|error| panic!("no answer to {command:?}: {error}\n{}", self.console()))
    }

    /// Runs a shell command while the test goes on.
    pub fn start(&self, limit_s: u32, command: &str) -> GuestJob {
        let (agent, command) = (self.agent, command.to_owned());
        GuestJob(spawn(move || ask(agent, limit_s, &command).unwrap()))
    }

    /// The kernel's messages.
    pub fn dmesg(&self) -> String {
        self.run(20, "dmesg").ok().stdout
    }

    /// What the kernel printed before the agent was there, and in a panic.
    pub fn console(&self) -> String {
        let bytes = std::fs::read(self.directory.path().join("console")).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn wait_up(&self) {
        let deadline = Instant::now() + BOOT;
        while ask(self.agent, 5, "true").is_err() {
            assert!(
                Instant::now() < deadline,
                "the guest did not boot\n{}",
                self.console()
            );
            sleep(Duration::from_millis(200));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may have ended already; either way it is gone afterwards.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A command that runs in the guest.
pub struct GuestJob(JoinHandle<Ran>);

impl GuestJob {
    /// Whether it has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// Waits for its end.
    #[must_use]
    pub fn wait(self) -> Ran {
        self.0.join().unwrap()
    }
}

/// The directory of kernel and initrd, made if need be.
fn image() -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let image = source.join("target/guest");
    let status = Command::new(source.join("scripts/guest-image.sh"))
        .arg(&image)
        .status()
        .unwrap();
    assert!(status.success(), "scripts/guest-image.sh failed");
    image
}

/// QEMU under a parent death signal, so that no end of the test leaves it behind.
fn qemu(image: &Path, agent: SocketAddr, console: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
    command.args(["-machine", "q35", "-accel", "tcg,thread=multi"]);
    command.args(["-cpu", "max", "-smp", "2", "-m", "1024"]);
    command.args([
        "-nographic",
        "-no-reboot",
        "-nodefaults",
        "-monitor",
        "none",
    ]);
    command
        .arg("-serial")
        .arg(format!("file:{}", console.display()));
    command.arg("-kernel").arg(image.join("vmlinuz"));
    command.arg("-initrd").arg(image.join("initrd"));
    // The programs under test, which the guest would not see if they are in one of its own directories.
    let build = binary("blockctl").parent().unwrap().display().to_string();
    command.arg("-append").arg(format!(
        "console=ttyS0 quiet panic=-1 rdinit=/init mitigations=off no_timer_check BUILD={build}"
    ));
    command
        .arg("-netdev")
        .arg(format!("user,id=net,hostfwd=tcp:{agent}-:{AGENT_PORT}"));
    command.args(["-device", "virtio-net-pci,netdev=net,romfile="]);
    command
        .arg("-virtfs")
        .arg("local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap");
    command.stdin(Stdio::null());
    command
}

/// One question to tests/guest/agent; its format is described there.
fn ask(agent: SocketAddr, limit_s: u32, command: &str) -> std::io::Result<Ran> {
    let mut stream = TcpStream::connect(agent)?;
    stream.set_read_timeout(Some(Duration::from_secs((limit_s + GRACE_S).into())))?;
    stream.write_all(format!("{limit_s} {}\n{command}", command.len()).as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    parse(command, &answer).ok_or_else(|| std::io::Error::other("the answer is incomplete"))
}

fn parse(command: &str, answer: &[u8]) -> Option<Ran> {
    let end = answer.iter().position(|byte| *byte == b'\n')?;
    let (head, output) = (
        std::str::from_utf8(&answer[..end]).ok()?,
        &answer[end + 1..],
    );
    let mut numbers = head.split(' ').map(str::parse::<usize>);
    let mut next = || numbers.next()?.ok();
    let (code, out_bytes, err_bytes) = (next()?, next()?, next()?);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(Ran {
        command: format!("in the guest: {command}"),
        code: i32::try_from(code).ok(),
        stdout: text(output.get(..out_bytes)?),
        stderr: text(output.get(out_bytes..out_bytes + err_bytes)?),
    })
}
