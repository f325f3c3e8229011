//! What is attached on this host: one directory, and in it a record, a lock and a control socket for each attachment.
//!
//! The daemon of an attachment holds its lock as long as it lives, so a record whose lock is free
//! belongs to a daemon that is gone; its device may still wait for a new one. Files of the
//! attachment KEY: `KEY.json`, `KEY.lock`, `KEY.sock`, `KEY.log`.

use super::error::{AttachError, AttachErrorKind};
use crate::id::{LeaseEpoch, SnapshotId, VolumeId};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Version of the record files.
const VERSION: u32 = 1;
/// The directory of root, which systemd units and udev rules know, too.
const ROOT_DIR: &str = "/run/blockd";
const SUBDIR: &str = "attachments";

/// How the kernel's requests reach the servers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ha {
    /// Through the daemon, which keeps and repeats what is not answered.
    Proxy,
    /// By the kernel itself over TCP; the daemon only gives it new connections.
    Direct,
}

/// What the user asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// `VOL` or `VOL@SNAP`.
    pub target: String,
    /// Peer addresses, the first that answers is asked.
    pub servers: Vec<String>,
    /// A certain `/dev/nbdN`; any free one if not given.
    pub device: Option<PathBuf>,
    /// A unix socket in place of a device; absolute.
    pub socket: Option<PathBuf>,
    pub read_only: bool,
    pub exclusive: bool,
    /// Connections between the kernel and the daemon or servers, at least 1.
    pub connections: u32,
    pub ha: Ha,
    /// How long a request waits for servers that do not answer, before it fails.
    pub dead_timeout: Duration,
    /// How long the servers may take to answer when the attachment is made.
    pub open_timeout: Duration,
}

/// A volume or snapshot, unique over all clusters and times.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct VolumeKey {
    pub cluster_id: String,
    pub volume: VolumeId,
    pub snapshot: Option<SnapshotId>,
}

impl fmt::Display for VolumeKey {
    /// The backend identifier of the kernel's device, and the name of the files.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blockd-{}-{}", self.cluster_id, self.volume)?;
        match self.snapshot {
            Some(snapshot) => write!(f, "-{snapshot}"),
            None => Ok(()),
        }
    }
}

/// One attachment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    version: u32,
    pub key: VolumeKey,
    pub spec: Spec,
    /// `/dev/nbdN`, once the kernel has it.
    pub device: Option<PathBuf>,
    pub pid: u32,
    pub attached_unix_ms: u64,
    /// Of the writer lease, if the attachment has or had one.
    #[serde(default)]
    pub lease_epoch: Option<LeaseEpoch>,
}

impl Record {
    #[must_use]
    pub fn new(key: VolumeKey, spec: Spec, attached_unix_ms: u64) -> Self {
        Self {
            version: VERSION,
            key,
            spec,
            device: None,
            pid: std::process::id(),
            attached_unix_ms,
            lease_epoch: None,
        }
    }

    /// Where the volume is: the device or the socket.
    #[must_use]
    pub fn place(&self) -> Option<&Path> {
        self.device.as_deref().or(self.spec.socket.as_deref())
    }

    /// Whether a user who names a device, a socket, the volume or `/dev/blockd/VOL` means this one.
    #[must_use]
    pub fn is_meant_by(&self, name: &str) -> bool {
        let path = Path::new(name);
        let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let by_path = self.place() == Some(path) || self.place() == Some(full.as_path());
        let by_kernel_name = self.device.as_deref() == Some(&*Path::new("/dev").join(name));
        self.spec.target == name || by_path || by_kernel_name
    }
}

/// Held by the daemon of an attachment as long as it lives.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// The directory.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// `given/attachments`, or that of root or of this user; made if missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(given: Option<&Path>) -> Result<Self, AttachError> {
        let path = given.map_or_else(default_dir, Path::to_owned).join(SUBDIR);
        let made = fs::create_dir_all(&path).and_then(|()| path.canonicalize());
        let path = made.map_err(|error| AttachError::system(path.display(), &error))?;
        Ok(Self { path })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn file(&self, key: &VolumeKey, suffix: &str) -> PathBuf {
        self.path.join(format!("{key}.{suffix}"))
    }

    #[must_use]
    pub fn control_socket(&self, key: &VolumeKey) -> PathBuf {
        self.file(key, "sock")
    }

    #[must_use]
    pub fn log(&self, key: &VolumeKey) -> PathBuf {
        self.file(key, "log")
    }

    /// Takes the lock of an attachment; `None` while its daemon lives.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn try_lock(&self, key: &VolumeKey) -> Result<Option<Lock>, AttachError> {
        let path = self.file(key, "lock");
        let failed = |error: &io::Error| AttachError::system(path.display(), error);
        let open = File::options().create(true).append(true).open(&path);
        let file = open.map_err(|error| failed(&error))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(failed(&error.into())),
        }
    }

    /// Whether the daemon of an attachment lives.
    ///
    /// # Errors
    /// As [`StateDir::try_lock`].
    pub fn is_served(&self, key: &VolumeKey) -> Result<bool, AttachError> {
        Ok(self.try_lock(key)?.is_none())
    }

    /// Writes a record, replacing the file as a whole.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn save(&self, record: &Record) -> Result<(), AttachError> {
        let (file, new) = (
            self.file(&record.key, "json"),
            self.file(&record.key, "new"),
        );
        let text = serde_json::to_vec_pretty(record).map_err(io::Error::other);
        let written = text.and_then(|text| fs::write(&new, text));
        let written = written.and_then(|()| fs::rename(&new, &file));
        written.map_err(|error| AttachError::system(file.display(), &error))
    }

    /// The record of a volume, if there is one.
    ///
    /// # Errors
    /// It cannot be read, or another version wrote it.
    pub fn load(&self, key: &VolumeKey) -> Result<Option<Record>, AttachError> {
        read_record(&self.file(key, "json"))
    }

    /// All records, in order of their targets.
    ///
    /// # Errors
    /// As [`StateDir::load`].
    pub fn list(&self) -> Result<Vec<Record>, AttachError> {
        let failed = |error: &io::Error| AttachError::system(self.path.display(), error);
        let entries = fs::read_dir(&self.path).map_err(|error| failed(&error))?;
        let mut records = Vec::new();
        for entry in entries {
            let path = entry.map_err(|error| failed(&error))?.path();
            if path.extension().is_some_and(|suffix| suffix == "json") {
                records.extend(read_record(&path)?);
            }
        }
        records.sort_by(|a: &Record, b| a.spec.target.cmp(&b.spec.target));
        Ok(records)
    }

    /// The one record that `name` means.
    ///
    /// # Errors
    /// There is none, or two volumes of this name from different clusters.
    pub fn find(&self, name: &str) -> Result<Record, AttachError> {
        let mut meant = self.list()?;
        meant.retain(|record| record.is_meant_by(name));
        match meant.len() {
            1 => Ok(meant.remove(0)),
            0 => Err(AttachError::new(
                AttachErrorKind::NotAttached,
                format!("{name} is not attached here; see `blockctl attachment list`"),
            )),
            _ => Err(AttachError::new(
                AttachErrorKind::Conflict,
                format!("{name} of several clusters is attached here; name the device instead"),
            )),
        }
    }

    /// Forgets an attachment. Its lock file stays: another process may just be opening it.
    ///
    /// # Errors
    /// The record is there and cannot be removed.
    pub fn remove(&self, key: &VolumeKey) -> Result<(), AttachError> {
        for suffix in ["json", "sock", "log"] {
            let file = self.file(key, suffix);
            match fs::remove_file(&file) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(AttachError::system(file.display(), &error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn read_record(file: &Path) -> Result<Option<Record>, AttachError> {
    let bytes = match fs::read(file) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(AttachError::system(file.display(), &error)),
    };
    let broken = |reason: String| {
        let text = format!(
            "{}: {reason}; use the blockctl that wrote it, or detach and remove it",
            file.display()
        );
        AttachError::new(AttachErrorKind::System, text)
    };
    let record: Record =
        serde_json::from_slice(&bytes).map_err(|error| broken(error.to_string()))?;
    match record.version {
        VERSION => Ok(Some(record)),
        other => Err(broken(format!("a record of version {other}"))),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn record(target: &str, volume: u64) -> Record {
        let key = VolumeKey {
            cluster_id: "c".to_owned(),
            volume: VolumeId(volume),
            snapshot: None,
        };
        let spec = Spec {
            target: target.to_owned(),
            servers: vec!["127.0.0.1".to_owned()],
            device: None,
            socket: Some(PathBuf::from("/run/x.sock")),
            read_only: false,
            exclusive: false,
            connections: 1,
            ha: Ha::Proxy,
            dead_timeout: Duration::from_secs(3600),
            open_timeout: Duration::from_secs(30),
        };
        Record::new(key, spec, 7)
    }

    fn state() -> (tempfile::TempDir, StateDir) {
        let dir = tempfile::tempdir().unwrap();
        let state = StateDir::open(Some(dir.path())).unwrap();
        (dir, state)
    }

    #[test]
    fn a_record_is_found_by_every_name_that_a_user_may_type() {
        let (_dir, state) = state();
        let mut on_device = record("v", 1);
        on_device.spec.socket = None;
        on_device.device = Some(PathBuf::from("/dev/nbd7"));
        let on_socket = record("w@s", 2);
        state.save(&on_device).unwrap();
        state.save(&on_socket).unwrap();
        for name in ["v", "/dev/nbd7", "nbd7"] {
            assert_eq!(state.find(name).unwrap(), on_device, "{name}");
        }
        for name in ["w@s", "/run/x.sock"] {
            assert_eq!(state.find(name).unwrap(), on_socket, "{name}");
        }
        let missing = state.find("w").unwrap_err();
        assert_eq!(missing.kind, AttachErrorKind::NotAttached);
        state.remove(&on_device.key).unwrap();
        state.remove(&on_device.key).unwrap();
        assert_eq!(state.list().unwrap(), [on_socket]);
    }

    #[test]
    fn one_name_in_two_clusters_is_told_apart_by_the_place_only() {
        let (_dir, state) = state();
        let (mut a, mut b) = (record("v", 1), record("v", 1));
        b.key.cluster_id = "d".to_owned();
        a.spec.socket = Some(PathBuf::from("/run/a"));
        b.spec.socket = Some(PathBuf::from("/run/b"));
        state.save(&a).unwrap();
        state.save(&b).unwrap();
        assert_eq!(state.find("v").unwrap_err().kind, AttachErrorKind::Conflict);
        assert_eq!(state.find("/run/b").unwrap(), b);
    }

    #[test]
    fn the_lock_says_whether_a_daemon_lives() {
        let (_dir, state) = state();
        let key = record("v", 1).key;
        assert!(!state.is_served(&key).unwrap());
        let lock = state.try_lock(&key).unwrap().unwrap();
        assert!(state.is_served(&key).unwrap());
        drop(lock);
        assert!(!state.is_served(&key).unwrap());
    }

    #[test]
    fn records_of_other_versions_and_broken_ones_are_refused() {
        let (_dir, state) = state();
        let record = record("v", 1);
        state.save(&record).unwrap();
        let file = state.file(&record.key, "json");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replace("\"version\": 1", "\"version\": 2")).unwrap();
        assert!(
            state
                .load(&record.key)
                .unwrap_err()
                .message
                .contains("version 2")
        );
        fs::write(&file, "{").unwrap();
        assert!(state.list().is_err());
    }

    #[test]
    fn snapshots_have_keys_of_their_own() {
        let mut key = record("v", 5).key;
        assert_eq!(key.to_string(), "blockd-c-5");
        key.snapshot = Some(SnapshotId(2));
        assert_eq!(key.to_string(), "blockd-c-5-2");
    }
}
