//! Programs that the tests run: the project's own and the independent clients.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::{Command, Output};

/// What a program printed and how it ended.
#[derive(Debug)]
pub struct Ran {
    pub command: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Fails unless the program ended with 0.
    #[must_use]
    pub fn ok(self) -> Self {
        assert!(
            self.code == Some(0),
            "{} ended with {:?}\n{}\n{}",
            self.command,
            self.code,
            self.stdout,
            self.stderr
        );
        self
    }
}

/// Path of a binary of this workspace, built for the same profile as the running test or program.
#[must_use]
pub fn binary(name: &str) -> PathBuf {
    let me = std::env::current_exe().unwrap();
    let mut profile = me.parent().unwrap();
    if profile.ends_with("deps") {
        profile = profile.parent().unwrap();
    }
    let path = profile.join(name);
    assert!(
        path.exists(),
        "{} is missing: run `cargo build --workspace` first",
        path.display()
    );
    path
}

/// Runs a program for at most `limit_s` seconds and hands back how it ended.
pub fn try_run<S: AsRef<OsStr>>(
    limit_s: u32,
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = S>,
) -> Ran {
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=5", &limit_s.to_string()])
        .arg(program.as_ref());
    command
        .args(arguments)
        .env("LC_ALL", "C")
        .env_remove("BLOCKD_SERVERS");
    let shown = format!("{command:?}");
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let ran = Ran {
        command: shown,
        code: status.code(),
        stdout: text(stdout),
        stderr: text(stderr),
    };
    assert!(
        ran.code != Some(127),
        "{ran:?}: not installed? see scripts/deps.sh test"
    );
    assert!(ran.code != Some(124), "not done after {limit_s} s: {ran:?}");
    ran
}

/// Runs a program that must succeed; what it printed on stdout.
pub fn run<S: AsRef<OsStr>>(
    limit_s: u32,
    program: impl AsRef<OsStr>,
    arguments: impl IntoIterator<Item = S>,
) -> String {
    try_run(limit_s, program, arguments).ok().stdout
}
