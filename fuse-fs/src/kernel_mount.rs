//! `mount --kernel`: a hidden view, a loop device on the volume's file, the kernel's filesystem on it.

use crate::backend::TargetName;
use crate::daemon::check_mount_point;
use crate::error::FuseFsError;
use crate::loopdev::{self, LoopDevice, LoopOptions};
use crate::mountinfo;
use crate::state_file::{RuntimeDir, What};
use crate::superblock::{self, Found};
use crate::umount::{self, UmountOptions};
use crate::volumes;
use rustix::mount::MountFlags;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Logical block of the loop device when the filesystem allows it: the volume's sub-block.
const LARGE_BLOCK_BYTES: u32 = 4096;
const SMALL_BLOCK_BYTES: u32 = 512;
/// How long cleaning up after a mount that failed may take.
const UNDO: Duration = Duration::from_secs(30);

const NOT_REPLAYED: &str = "the snapshot's journal could not be replayed (dmesg says why): changes that the \
    filesystem had only in its journal are missing; for a complete one, fsfreeze it while the snapshot is made";
/// What tells ext4 and xfs to leave the journal alone.
const SKIP_JOURNAL: [&str; 2] = ["noload", "norecovery"];

/// What becomes of a snapshot's journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Journal {
    /// The kernel replays it, into the memory that the hidden view lays over the snapshot.
    Replay,
    Skip,
}

/// What to mount, and where.
pub struct KernelMount {
    pub target: TargetName,
    /// Absolute.
    pub dir: PathBuf,
    pub servers: Vec<String>,
    pub io_deadline: Duration,
    /// The filesystem type; found in the superblock if absent.
    pub filesystem: Option<String>,
    /// As in mount(8), comma-separated.
    pub options: String,
}

/// Sentences that tell the user what was done for him.
pub type Notes = Vec<String>;

/// Mounts the filesystem on `mount.target`; a mount that exists already is a note, not a failure.
///
/// # Errors
/// What failed; everything made before it is taken down again.
pub fn mount(mount: &KernelMount, state: &RuntimeDir) -> Result<Notes, FuseFsError> {
    if !rustix::process::geteuid().is_root() {
        return Err(FuseFsError::NotRoot {
            what: "fuse-fs mount --kernel",
        });
    }
    if mounted_already(mount, state)? {
        return Ok(vec![format!(
            "{} is already mounted on {}",
            mount.target,
            mount.dir.display()
        )]);
    }
    check_mount_point(&mount.dir)?;
    take_down_remains(&mount.dir, state)?;
    match attempt(mount, Journal::Replay, state) {
        Err(error @ FuseFsError::Mount { .. }) if mount.target.snapshot.is_some() => {
            tracing::warn!("{error}; once more without the journal");
            // The first failure is what the user must hear of.
            attempt(mount, Journal::Skip, state).map_err(|_| error)
        }
        result => result,
    }
}

/// Each attempt has a view of its own, so that none sees what a replay that failed left in memory.
fn attempt(
    mount: &KernelMount,
    journal: Journal,
    state: &RuntimeDir,
) -> Result<Notes, FuseFsError> {
    let view_dir = state.make_view_dir(&mount.dir)?;
    let result = start_view(mount, &view_dir, state)
        .and_then(|()| mount_on_view(mount, journal, &view_dir, state));
    if result.is_err() {
        let undo = UmountOptions {
            timeout: UNDO,
            force: true,
        };
        // The first failure is what the user must hear of.
        let _ = umount::umount(&view_dir, state, undo);
        let _ = std::fs::remove_dir(&view_dir);
    }
    result
}

fn mounted_already(mount: &KernelMount, state: &RuntimeDir) -> Result<bool, FuseFsError> {
    let Some(record) = state.load(&mount.dir)? else {
        return Ok(false);
    };
    let What::Kernel { target, device, .. } = record.what else {
        return Ok(false);
    };
    let system = |source| FuseFsError::System {
        what: "reading /proc/self/mountinfo",
        source,
    };
    let entry = mountinfo::mounted_at(&mount.dir).map_err(system)?;
    let same = |entry: mountinfo::MountEntry| Path::new(&entry.source) == device;
    Ok(target == mount.target.to_string() && entry.is_some_and(same))
}

/// A plain umount(8) leaves our view behind; it is taken down before a new one is made.
fn take_down_remains(dir: &Path, state: &RuntimeDir) -> Result<(), FuseFsError> {
    match state.load(dir)? {
        Some(_) => umount::umount(
            dir,
            state,
            UmountOptions {
                timeout: UNDO,
                force: false,
            },
        ),
        None => Ok(()),
    }
}

/// Starts `fuse-fs volumes` on the hidden directory; it returns when the view is usable.
fn start_view(mount: &KernelMount, view_dir: &Path, state: &RuntimeDir) -> Result<(), FuseFsError> {
    let failed = |reason: String| FuseFsError::View {
        dir: view_dir.to_owned(),
        reason,
    };
    let program = std::env::current_exe().map_err(|error| failed(error.to_string()))?;
    let mut command = Command::new(program);
    command.arg("volumes").arg(view_dir).arg("--for-loop");
    command.arg("--servers").arg(mount.servers.join(","));
    command
        .arg("--io-deadline")
        .arg(mount.io_deadline.as_secs().to_string());
    command.arg("--runtime-dir").arg(state.path());
    command.arg("--log").arg(view_dir.with_extension("log"));
    let output = command
        .output()
        .map_err(|error| failed(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(reason_of(&output.stderr, view_dir))),
    }
}

/// What the view's process said, without what our own message says again.
fn reason_of(stderr: &[u8], view_dir: &Path) -> String {
    let said = String::from_utf8_lossy(stderr);
    let view = FuseFsError::View {
        dir: view_dir.to_owned(),
        reason: String::new(),
    };
    let said = said.trim();
    said.strip_prefix(&format!("fuse-fs: {view}"))
        .unwrap_or(said)
        .to_owned()
}

fn mount_on_view(
    mount: &KernelMount,
    journal: Journal,
    view_dir: &Path,
    state: &RuntimeDir,
) -> Result<Notes, FuseFsError> {
    let file = file_of(&mount.target, view_dir);
    let found = probe(&mount.target, &file)?;
    let plan = plan(mount, found, journal)?;
    let options = LoopOptions {
        read_only: mount.target.snapshot.is_some() && !plan.replays(),
        block_bytes: plan.block_bytes,
    };
    let device = LoopDevice::attach(&file, options)?;
    let record = What::Kernel {
        target: mount.target.to_string(),
        filesystem: plan.filesystem.clone(),
        device: device.path().to_owned(),
        file: file.clone(),
        view_dir: view_dir.to_owned(),
    };
    state.save(&mount.dir, record)?;
    if let Err(source) = call_mount(device.path(), &mount.dir, &plan) {
        state.remove(&mount.dir)?;
        let path = device.path().to_owned();
        drop(device);
        if !loopdev::wait_detached(&path, &file, Instant::now() + UNDO) {
            tracing::warn!("{} is still attached; see losetup", path.display());
        }
        return Err(FuseFsError::Mount {
            filesystem: plan.filesystem,
            target: mount.target.to_string(),
            dir: mount.dir.clone(),
            source,
        });
    }
    Ok(plan.notes)
}

fn file_of(target: &TargetName, view_dir: &Path) -> PathBuf {
    let listing = match target.snapshot {
        Some(_) => volumes::SNAPSHOTS_NAME,
        None => volumes::VOLUMES_NAME,
    };
    view_dir.join(listing).join(target.to_string())
}

fn probe(target: &TargetName, file: &Path) -> Result<Option<Found>, FuseFsError> {
    let target = target.to_string();
    let mut head = [0; superblock::PROBE_BYTES];
    let read = File::open(file).and_then(|file| file.read_at(&mut head, 0));
    match read {
        Ok(len) => Ok(superblock::detect(head.get(..len).unwrap_or_default())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(FuseFsError::UnknownTarget { target })
        }
        Err(source) => Err(FuseFsError::Superblock { target, source }),
    }
}

/// Everything that mount(2) is told.
#[derive(Debug)]
struct Plan {
    filesystem: String,
    block_bytes: u32,
    flags: MountFlags,
    /// Options for the filesystem itself.
    data: Vec<String>,
    notes: Notes,
}

fn plan(mount: &KernelMount, found: Option<Found>, journal: Journal) -> Result<Plan, FuseFsError> {
    let target = mount.target.to_string();
    let named = mount.filesystem.clone();
    let filesystem = named.or_else(|| found.as_ref().map(|found| found.filesystem.to_owned()));
    let filesystem = filesystem.ok_or(FuseFsError::UnknownFilesystem { target })?;
    let (flags, data) = split_options(&mount.options);
    let large = found
        .as_ref()
        .is_some_and(|found| found.unit_bytes >= LARGE_BLOCK_BYTES);
    let block_bytes = if large {
        LARGE_BLOCK_BYTES
    } else {
        SMALL_BLOCK_BYTES
    };
    let mut plan = Plan {
        filesystem,
        block_bytes,
        flags,
        data,
        notes: Vec::new(),
    };
    if mount.target.snapshot.is_some() {
        plan.read_only(journal);
    }
    Ok(plan)
}

impl Plan {
    /// For a snapshot. Its volume may be mounted too, which has the same UUID.
    fn read_only(&mut self, journal: Journal) {
        self.flags |= MountFlags::RDONLY;
        let xfs = self.filesystem == "xfs";
        if xfs {
            self.add("nouuid");
        }
        if journal == Journal::Skip {
            self.add(if xfs { "norecovery" } else { "noload" });
            self.notes.push(NOT_REPLAYED.to_owned());
        }
    }

    /// Whether the kernel replays the journal, for which it must be able to write.
    fn replays(&self) -> bool {
        let skips = |option: &String| SKIP_JOURNAL.contains(&option.as_str());
        !self.data.iter().any(skips)
    }

    fn add(&mut self, option: &str) {
        if !self.data.iter().any(|own| own == option) {
            self.data.push(option.to_owned());
        }
    }
}

/// Splits the options of mount(8) into flags of mount(2) and what the filesystem itself reads.
fn split_options(options: &str) -> (MountFlags, Vec<String>) {
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    for option in options.split(',').map(str::trim) {
        match option {
            "" | "defaults" | "rw" | "suid" | "dev" | "exec" | "async" | "_netdev" | "nofail"
            | "auto" | "noauto" => {}
            "ro" => flags |= MountFlags::RDONLY,
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "sync" => flags |= MountFlags::SYNCHRONOUS,
            "dirsync" => flags |= MountFlags::DIRSYNC,
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            "strictatime" => flags |= MountFlags::STRICTATIME,
            "lazytime" => flags |= MountFlags::LAZYTIME,
            other => data.push(other.to_owned()),
        }
    }
    (flags, data)
}

fn call_mount(device: &Path, dir: &Path, plan: &Plan) -> io::Result<()> {
    let data = CString::new(plan.data.join(","))?;
    rustix::mount::mount(
        device,
        dir,
        plan.filesystem.as_str(),
        plan.flags,
        data.as_c_str(),
    )?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount_of(target: &str, options: &str) -> KernelMount {
        KernelMount {
            target: TargetName::parse(target).unwrap(),
            dir: "/mnt".into(),
            servers: vec!["a".to_owned()],
            io_deadline: Duration::from_secs(1),
            filesystem: None,
            options: options.to_owned(),
        }
    }

    fn found(filesystem: &'static str, unit_bytes: u32) -> Option<Found> {
        Some(Found {
            filesystem,
            unit_bytes,
        })
    }

    #[test]
    fn the_reason_of_a_view_is_told_once() {
        let dir = Path::new("/run/x");
        let own = b"fuse-fs: /run/x: cannot show the volumes: no server\n";
        assert_eq!(reason_of(own, dir), "no server");
        assert_eq!(reason_of(b"killed", dir), "killed");
    }

    #[test]
    fn options_go_to_the_kernel_or_to_the_filesystem() {
        let (flags, data) = split_options("defaults,noatime,ro, discard,commit=5,,_netdev");
        assert_eq!(flags, MountFlags::NOATIME | MountFlags::RDONLY);
        assert_eq!(data, ["discard", "commit=5"]);
    }

    #[test]
    fn small_filesystem_blocks_need_small_device_blocks() {
        let mount = mount_of("v", "");
        let of = |unit_bytes| plan(&mount, found("ext4", unit_bytes), Journal::Replay).unwrap();
        assert_eq!(of(1024).block_bytes, 512);
        assert_eq!(of(4096).block_bytes, 4096);
        assert!(of(4096).data.is_empty() && of(4096).flags.is_empty());
    }

    #[test]
    fn snapshots_are_mounted_read_only_with_or_without_their_journal() {
        let of = |filesystem, options, journal| {
            let plan = plan(&mount_of("v@s", options), found(filesystem, 4096), journal).unwrap();
            assert!(plan.flags.contains(MountFlags::RDONLY));
            assert_eq!(plan.notes.is_empty(), journal == Journal::Replay);
            (plan.data.join(","), plan.replays())
        };
        let is = |data: &str, replays| (data.to_owned(), replays);
        assert_eq!(of("ext4", "", Journal::Replay), is("", true));
        assert_eq!(of("xfs", "", Journal::Replay), is("nouuid", true));
        assert_eq!(of("ext4", "", Journal::Skip), is("noload", false));
        assert_eq!(of("xfs", "", Journal::Skip), is("nouuid,norecovery", false));
        assert_eq!(of("ext4", "noload", Journal::Replay), is("noload", false));
    }

    #[test]
    fn a_volume_without_a_filesystem_is_refused() {
        let error = plan(&mount_of("v", ""), None, Journal::Replay).unwrap_err();
        assert!(error.to_string().contains("mkfs.ext4"));
    }
}
