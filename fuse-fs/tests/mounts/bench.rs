//! A place to mount in: a store, a mount point, a runtime directory; everything is taken down on drop.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Upper bound of any command of a test; a test that reaches it has found a hang.
const PATIENCE_S: &str = "60";

pub(crate) struct Bench {
    root: TempDir,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let root = tempfile::Builder::new()
            .prefix("fuse-fs-test")
            .tempdir()
            .unwrap();
        for dir in ["store", "mnt", "fs", "run"] {
            fs::create_dir(root.path().join(dir)).unwrap();
        }
        Self { root }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().canonicalize().unwrap().join(name)
    }

    /// A volume, or with `NAME@SNAP` a snapshot, of zeros.
    pub(crate) fn volume(&self, name: &str, size_bytes: u64) -> PathBuf {
        let path = self.path("store").join(name);
        fs::File::create(&path)
            .unwrap()
            .set_len(size_bytes)
            .unwrap();
        path
    }

    pub(crate) fn fault(&self, what: &str) {
        fs::write(self.path("store/fault"), what).unwrap();
    }

    pub(crate) fn no_fault(&self) {
        fs::remove_file(self.path("store/fault")).unwrap();
    }

    pub(crate) fn flushes(&self) -> usize {
        fs::read(self.path("store/flushes")).map_or(0, |bytes| bytes.len())
    }

    /// Runs `fuse-fs` over the double.
    pub(crate) fn fuse_fs(&self, arguments: &[&str]) -> Output {
        let mut command = timeout(&double());
        command
            .args(arguments)
            .arg("--runtime-dir")
            .arg(self.path("run"));
        command
            .env("BLOCKD_SERVERS", self.path("store"))
            .output()
            .unwrap()
    }

    /// As [`Bench::fuse_fs`], and it must succeed.
    pub(crate) fn fuse_fs_ok(&self, arguments: &[&str]) -> String {
        check(arguments, self.fuse_fs(arguments))
    }

    /// What [`Bench::fuse_fs`] runs.
    pub(crate) fn program(&self) -> PathBuf {
        double()
    }

    /// As [`Bench::fuse_fs_ok`], of a command that knows no servers.
    pub(crate) fn stats(&self, arguments: &[&str]) -> String {
        check(
            arguments,
            timeout(&double()).args(arguments).output().unwrap(),
        )
    }

    /// Mounts the view on `mnt`; `options` are more arguments.
    pub(crate) fn view(&self, options: &[&str]) {
        let dir = self.path("mnt");
        let mut arguments = vec!["volumes", dir.to_str().unwrap()];
        arguments.extend(options);
        self.fuse_fs_ok(&arguments);
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        let listing = if name.contains('@') {
            "snapshots"
        } else {
            "volumes"
        };
        self.path("mnt").join(listing).join(name)
    }

    /// Mounts below this bench, innermost last.
    pub(crate) fn mounts(&self) -> Vec<String> {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let below = self.path("");
        let dirs = table
            .lines()
            .map(|line| line.split(' ').nth(4).unwrap().to_owned());
        dirs.filter(|dir| Path::new(dir).starts_with(&below))
            .collect()
    }

    /// Waits until nothing of this bench is mounted.
    pub(crate) fn wait_unmounted(&self) {
        wait_until("unmounted", || self.mounts().is_empty());
    }

    /// Pids of the daemons that serve this bench.
    pub(crate) fn daemons(&self) -> Vec<i32> {
        let store = self.path("store").into_os_string().into_string().unwrap();
        let of = |entry: fs::DirEntry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            let environment = fs::read(entry.path().join("environ")).ok()?;
            let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
            let (line, environment) = (text(line), text(environment));
            let program = ["fuse-fs-double", "mount.fuse.blockd"];
            let ours = program.iter().any(|name| line.contains(name))
                && (environment.contains(&store) || line.contains(&store));
            let zombie = fs::read_to_string(entry.path().join("stat"))
                .ok()?
                .contains(") Z ");
            (ours && !zombie).then_some(pid)
        };
        fs::read_dir("/proc")
            .unwrap()
            .filter_map(|entry| of(entry.ok()?))
            .collect()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for pid in self.daemons() {
            // SAFETY: a process that this bench started.
            unsafe { libc::kill(pid, libc::SIGKILL) };
        }
        for dir in self.mounts().iter().rev() {
            let _ = timeout(Path::new("umount")).arg("-l").arg(dir).status();
        }
    }
}

/// Polls a condition of the kernel, which offers no notification for it.
pub(crate) fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !condition() {
        assert!(Instant::now() < until, "not {what} after 30 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn timeout(program: &Path) -> Command {
    let mut command = Command::new("timeout");
    command.args(["-k", "5", PATIENCE_S]).arg(program);
    command
}

/// `cargo test` builds the double beside the tests: TARGET/debug/examples.
fn double() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let path = own
        .ancestors()
        .nth(2)
        .unwrap()
        .join("examples/fuse-fs-double");
    assert!(
        path.exists(),
        "{}: run `cargo build -p fuse-fs --examples`",
        path.display()
    );
    path
}

/// Runs a tool of the host; it must succeed.
pub(crate) fn tool(arguments: &[&str]) -> String {
    check(arguments, tool_output(arguments))
}

pub(crate) fn tool_output(arguments: &[&str]) -> Output {
    timeout(Path::new(arguments[0]))
        .args(&arguments[1..])
        .output()
        .unwrap()
}

pub(crate) fn check(what: &[&str], output: Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{what:?}: {}: {text}",
        output.status
    );
    text
}

pub(crate) fn str_of(path: &Path) -> &str {
    path.to_str().unwrap()
}
