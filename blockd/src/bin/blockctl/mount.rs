//! `mount`, `grow` and `umount`: handed over to `fuse-fs`, which runs on this host.

use crate::args::Mount;
use crate::failure::Failure;
use std::env;
use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// In place of a volume: what a mount has done.
const STATS: &str = "stats";

/// Becomes `fuse-fs mount`, or `fuse-fs stats`; returns only if that cannot be started.
pub(crate) fn mount(servers: &[String], mount: &Mount) -> Failure {
    let mut command = Command::new(fuse_fs());
    if mount.target == STATS {
        command.arg(STATS).args(&mount.options).arg(&mount.dir);
        return become_it(command);
    }
    command
        .args(["mount", "--servers"])
        .arg(servers.join(","))
        .args(&mount.options)
        .arg(&mount.target)
        .arg(&mount.dir);
    become_it(command)
}

/// Becomes `fuse-fs grow`; returns only if that cannot be started.
pub(crate) fn grow(dir: &Path, json: bool) -> Failure {
    let mut command = Command::new(fuse_fs());
    command.arg("grow").args(json.then_some("--json")).arg(dir);
    become_it(command)
}

/// Becomes `fuse-fs umount`; returns only if that cannot be started.
pub(crate) fn umount(dir: &Path, options: &[OsString]) -> Failure {
    let mut command = Command::new(fuse_fs());
    command.arg("umount").args(options).arg(dir);
    become_it(command)
}

fn become_it(mut command: Command) -> Failure {
    let error = command.exec();
    let tool = Path::new(command.get_program()).display().to_string();
    Failure::Tool {
        tool,
        reason: format!(
            "{error}; build it with `cargo build --release -p fuse-fs` and keep it beside blockctl or in PATH"
        ),
    }
}

/// The one beside this executable if there is one, else whatever PATH has.
fn fuse_fs() -> PathBuf {
    let name = OsStr::new("fuse-fs");
    let beside = env::current_exe().ok();
    beside
        .as_deref()
        .and_then(Path::parent)
        .map(|dir| dir.join(name))
        .filter(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from(name))
}
