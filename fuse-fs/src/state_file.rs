//! What this host has mounted: one small JSON file per directory, so that `umount` finds it again.

use crate::error::FuseFsError;
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// Version of the format written here; others are refused, not guessed.
const VERSION: u32 = 1;
const ROOT_DIR: &str = "/run/blockd";

/// A process that can still be told from another one with the same pid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    pub pid: i32,
    /// Field 22 of `/proc/PID/stat`, in clock ticks since boot.
    pub start_ticks: u64,
}

impl ProcessRef {
    /// This process.
    ///
    /// # Errors
    /// `/proc` cannot be read.
    pub fn current() -> io::Result<Self> {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let start_ticks = start_ticks(pid)?;
        Ok(Self { pid, start_ticks })
    }

    /// A handle to it, or `None` if it has ended.
    #[must_use]
    pub fn handle(&self) -> Option<OwnedFd> {
        let handle = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // Looked at after the handle is there: the pid cannot pass to another process in between.
        (start_ticks(self.pid).ok()? == self.start_ticks).then_some(handle)
    }
}

/// When the process started; an error if it has ended, reaped or not.
fn start_ticks(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let ticks = ticks_of_stat(&stat);
    ticks.ok_or_else(|| io::Error::other("the process has ended"))
}

/// The name in parentheses may hold anything; the fields after it are the state and numbers.
fn ticks_of_stat(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let ended = matches!(fields.next()?, "Z" | "X");
    fields.nth(18).filter(|_| !ended)?.parse().ok()
}

/// What is mounted on a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum What {
    /// A view, served by `daemon`; `failure` is what it left behind when its last flush failed.
    View {
        daemon: ProcessRef,
        failure: Option<String>,
    },
    /// A filesystem of the kernel over `device` on `file`, which is in the view at `view_dir`.
    Kernel {
        target: String,
        filesystem: String,
        device: PathBuf,
        file: PathBuf,
        view_dir: PathBuf,
    },
}

/// One state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    /// Absolute, as the kernel's mount table has it.
    pub dir: PathBuf,
    #[serde(flatten)]
    pub what: What,
}

/// The directory with the state files and the hidden views.
#[derive(Clone, Debug)]
pub struct RuntimeDir {
    path: PathBuf,
}

impl RuntimeDir {
    /// `given`, or `$XDG_RUNTIME_DIR/blockd` of a user, or `/run/blockd` of root; made if missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(given: Option<&Path>) -> Result<Self, FuseFsError> {
        let path = given.map_or_else(default_dir, Path::to_owned);
        let made = fs::create_dir_all(&path).and_then(|()| path.canonicalize());
        let path = made.map_err(|error| state_error(&path, error))?;
        Ok(Self { path })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A private directory for the hidden view below the mount on `dir`; made if missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn make_view_dir(&self, dir: &Path) -> Result<PathBuf, FuseFsError> {
        let path = self.path.join(format!("view-{}", key(dir)));
        let made = match fs::create_dir(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => fs::set_permissions(&path, Permissions::from_mode(0o700)),
        };
        made.map_err(|error| state_error(&path, error))?;
        Ok(path)
    }

    /// What is recorded for `dir`.
    ///
    /// # Errors
    /// The file is there and cannot be read, or is of another version.
    pub fn load(&self, dir: &Path) -> Result<Option<Record>, FuseFsError> {
        let file = self.file(dir);
        let bytes = match fs::read(&file) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(state_error(&file, error)),
        };
        let record: Record =
            serde_json::from_slice(&bytes).map_err(|error| state_error(&file, error))?;
        if record.version != VERSION {
            let reason = format!(
                "written by another version ({}) of fuse-fs; use that one",
                record.version
            );
            return Err(FuseFsError::State { file, reason });
        }
        Ok((record.dir == dir).then_some(record))
    }

    /// Records what is mounted on `dir`, replacing the file as a whole.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, dir: &Path, what: What) -> Result<(), FuseFsError> {
        let record = Record {
            version: VERSION,
            dir: dir.to_owned(),
            what,
        };
        let file = self.file(dir);
        let new = file.with_extension("new");
        let text = serde_json::to_vec_pretty(&record).map_err(|error| state_error(&file, error))?;
        let written = fs::write(&new, text).and_then(|()| fs::rename(&new, &file));
        written.map_err(|error| state_error(&file, error))
    }

    /// Forgets what is mounted on `dir`.
    ///
    /// # Errors
    /// The file is there and cannot be removed.
    pub fn remove(&self, dir: &Path) -> Result<(), FuseFsError> {
        let file = self.file(dir);
        match fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(state_error(&file, error)),
            _ => Ok(()),
        }
    }

    fn file(&self, dir: &Path) -> PathBuf {
        self.path.join(format!("mount-{}.json", key(dir)))
    }
}

fn default_dir() -> PathBuf {
    let user =
        std::env::var_os("XDG_RUNTIME_DIR").filter(|_| !rustix::process::geteuid().is_root());
    user.map_or_else(
        || PathBuf::from(ROOT_DIR),
        |dir| Path::new(&dir).join("blockd"),
    )
}

/// FNV-1a of the path: short, and the same in every version.
fn key(dir: &Path) -> String {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let hash = dir
        .as_os_str()
        .as_bytes()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, step);
    format!("{hash:016x}")
}

fn state_error(file: &Path, error: impl std::fmt::Display) -> FuseFsError {
    let file = file.to_owned();
    FuseFsError::State {
        file,
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> What {
        let daemon = ProcessRef::current().unwrap();
        What::View {
            daemon,
            failure: None,
        }
    }

    #[test]
    fn a_record_is_found_by_its_directory_only() {
        let dir = tempfile::tempdir().unwrap();
        let state = RuntimeDir::open(Some(dir.path())).unwrap();
        state.save(Path::new("/mnt/a b"), view()).unwrap();
        assert_eq!(
            state.load(Path::new("/mnt/a b")).unwrap().unwrap().what,
            view()
        );
        assert_eq!(state.load(Path::new("/mnt/c")).unwrap(), None);
        state.remove(Path::new("/mnt/a b")).unwrap();
        state.remove(Path::new("/mnt/a b")).unwrap();
        assert_eq!(state.load(Path::new("/mnt/a b")).unwrap(), None);
    }

    #[test]
    fn other_versions_and_broken_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let state = RuntimeDir::open(Some(dir.path())).unwrap();
        let mnt = Path::new("/mnt");
        state.save(mnt, view()).unwrap();
        let file = state.file(mnt);
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
        assert!(
            state
                .load(mnt)
                .unwrap_err()
                .to_string()
                .contains("another version (2)")
        );
        fs::write(&file, "{").unwrap();
        assert!(state.load(mnt).is_err());
    }

    #[test]
    fn a_zombie_has_ended() {
        let stat = |state| {
            format!(
                "7 (a) b) {state} {}",
                (4..30).map(|n| format!("{n} ")).collect::<String>()
            )
        };
        assert_eq!(ticks_of_stat(&stat("S")), Some(22));
        assert_eq!(ticks_of_stat(&stat("Z")), None);
        assert_eq!(ticks_of_stat("7 (a"), None);
    }

    #[test]
    fn another_process_with_the_pid_is_not_ours() {
        let own = ProcessRef::current().unwrap();
        assert!(own.handle().is_some());
        let other = ProcessRef {
            start_ticks: own.start_ticks + 1,
            ..own
        };
        assert!(other.handle().is_none());
        assert!(
            ProcessRef {
                pid: 0,
                start_ticks: 0
            }
            .handle()
            .is_none()
        );
    }
}
