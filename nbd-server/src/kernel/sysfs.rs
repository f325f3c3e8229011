//! One `/dev/nbdN`: what sysfs and /proc say of it, and the settings of its request queue.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::KernelError;

/// A sector of sysfs' `size` and of the BLK* ioctls, in bytes, whatever the device's block size.
const SECTOR_BYTES: u64 = 512;
/// Re-reads the partition table (linux/fs.h); rustix and libc do not name it.
const BLKRRPART: libc::c_ulong = 0x125f;

/// A device by its index; it need not exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Device(pub u32);

/// Who uses a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceUser {
    /// Mounted here (the device or one of its partitions).
    Mount(PathBuf),
    /// A swap area is on it.
    Swap,
    /// Held by another block device (device mapper, md).
    Holder(String),
    /// A process has it open.
    Process {
        /// Its id.
        pid: u32,
        /// Its name, cut to 15 bytes by the kernel.
        name: String,
    },
    /// Connected to this backend.
    Backend(String),
}

impl fmt::Display for DeviceUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Mount(path) => write!(f, "mounted on {} (umount it first)", path.display()),
            Self::Swap => write!(f, "used as swap (swapoff it first)"),
            Self::Holder(name) => write!(f, "held by the block device {name} (stop that first)"),
            Self::Process { pid, name } => write!(f, "open in process {pid} ({name})"),
            Self::Backend(backend) => write!(f, "connected to {backend:?}"),
        }
    }
}

/// Settings of a device's request queue; `None` leaves the kernel's value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueSettings {
    /// Age at which a request without an answer is looked at again: with one connection it is sent again if its socket has died, with
    /// more it costs the connection that is slow. In steps of a timer tick (4 ms), at least 1 ms.
    pub io_timeout: Option<Duration>,
    /// Largest request in KiB.
    pub max_sectors_kb: Option<u32>,
    /// Read-ahead in KiB.
    pub read_ahead_kb: Option<u32>,
    /// Requests that wait in the queue, 4 or more.
    pub nr_requests: Option<u32>,
    /// No scheduler: the server orders better.
    pub no_scheduler: bool,
}

impl Device {
    /// `/dev/nbdN`.
    #[must_use]
    pub fn path(self) -> PathBuf {
        PathBuf::from(format!("/dev/nbd{}", self.0))
    }

    /// The device of a path or name: `/dev/nbd3`, `nbd3` or a symbolic link to the former (`/dev/blockd/VOL`).
    #[must_use]
    pub fn from_path(path: &Path) -> Option<Self> {
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let number = real.file_name()?.to_str()?.strip_prefix("nbd")?;
        number.parse().ok().map(Self)
    }

    /// Whether the kernel has it, connected or not.
    #[must_use]
    pub fn exists(self) -> bool {
        self.sysfs("").exists()
    }

    /// Whether it has sockets: the file `pid` is there exactly then. It says nothing of the health of the connection.
    #[must_use]
    pub fn is_connected(self) -> bool {
        self.sysfs("pid").exists()
    }

    /// What it was connected with as `ConnectRequest::backend`; `None` without a connection or an identifier.
    #[must_use]
    pub fn backend(self) -> Option<String> {
        let text = fs::read_to_string(self.sysfs("backend")).ok()?;
        Some(text.trim_end_matches('\n').to_owned())
    }

    /// Size in bytes; 0 while it is not connected.
    pub fn size_bytes(self) -> Result<u64, KernelError> {
        Ok(self.read_number("size")? * SECTOR_BYTES)
    }

    /// Whether writes are refused.
    pub fn is_read_only(self) -> Result<bool, KernelError> {
        Ok(self.read_number("ro")? != 0)
    }

    /// Mounts, swap areas, holders and open processes of it and of its partitions; the calling process is not among them. As root this
    /// is complete but for other mount namespaces.
    pub fn users(self) -> Result<Vec<DeviceUser>, KernelError> {
        let names = self.names()?;
        let mut users = mounts(&names)?;
        users.extend(swaps(&names));
        for name in &names {
            users.extend(self.holders(name));
        }
        users.extend(processes(&names));
        Ok(users)
    }

    /// Sets the queue up. The settings are lost with the connection.
    pub fn tune(self, settings: QueueSettings) -> Result<(), KernelError> {
        let io_timeout_ms = settings
            .io_timeout
            .map(|timeout| timeout.as_millis().max(1));
        let numbers = [
            ("queue/io_timeout", io_timeout_ms),
            (
                "queue/max_sectors_kb",
                settings.max_sectors_kb.map(u128::from),
            ),
            (
                "queue/read_ahead_kb",
                settings.read_ahead_kb.map(u128::from),
            ),
            ("queue/nr_requests", settings.nr_requests.map(u128::from)),
        ];
        if settings.no_scheduler {
            self.write("queue/scheduler", "none")?;
        }
        for (name, number) in numbers {
            if let Some(number) = number {
                self.write(name, &number.to_string())?;
            }
        }
        Ok(())
    }

    /// Reads the partition table anew; `Busy` if a partition is in use, in which case the old table stays.
    pub fn rescan_partitions(self) -> Result<(), KernelError> {
        let file = self.open()?;
        // SAFETY: BLKRRPART takes no argument; the descriptor is open for the call.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), BLKRRPART) };
        let error = io::Error::last_os_error();
        match (answer, error.raw_os_error()) {
            (0, _) => Ok(()),
            (_, Some(libc::EBUSY)) => Err(self.busy()),
            // A device whose driver allows no partitions has none to rescan.
            (_, Some(libc::EINVAL)) => Ok(()),
            (_, Some(libc::EPERM | libc::EACCES)) => {
                Err(KernelError::NoPermission("read a partition table"))
            }
            _ => Err(KernelError::file(self.path(), error)),
        }
    }

    /// `Busy` with all that is known of the users.
    pub(super) fn busy(self) -> KernelError {
        let mut users = self.users().unwrap_or_default();
        users.extend(self.backend().map(DeviceUser::Backend));
        KernelError::Busy {
            device: self.path().display().to_string(),
            users,
        }
    }

    /// Opens the device read-only.
    pub(super) fn open(self) -> Result<File, KernelError> {
        File::open(self.path()).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => KernelError::NoDevice(self.0),
            io::ErrorKind::PermissionDenied => KernelError::NoPermission("open an NBD device"),
            _ => KernelError::file(self.path(), error),
        })
    }

    fn sysfs(self, file: &str) -> PathBuf {
        PathBuf::from(format!("/sys/block/nbd{}/{file}", self.0))
    }

    fn read_number(self, file: &str) -> Result<u64, KernelError> {
        let path = self.sysfs(file);
        let text = fs::read_to_string(&path).map_err(|error| self.file_error(&path, error))?;
        let bad =
            |error| KernelError::file(&path, io::Error::new(io::ErrorKind::InvalidData, error));
        text.trim().parse().map_err(bad)
    }

    fn write(self, file: &str, value: &str) -> Result<(), KernelError> {
        let path = self.sysfs(file);
        fs::write(&path, value).map_err(|error| self.file_error(&path, error))
    }

    fn file_error(self, path: &Path, error: io::Error) -> KernelError {
        match error.kind() {
            io::ErrorKind::NotFound if !self.exists() => KernelError::NoDevice(self.0),
            io::ErrorKind::PermissionDenied => {
                KernelError::NoPermission("change the queue of an NBD device")
            }
            _ => KernelError::file(path, error),
        }
    }

    /// The kernel's names of the device and its partitions.
    fn names(self) -> Result<Vec<String>, KernelError> {
        let device = format!("nbd{}", self.0);
        let directory = self.sysfs("");
        let entries =
            fs::read_dir(&directory).map_err(|error| self.file_error(&directory, error))?;
        let partition = format!("{device}p");
        let partitions = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.starts_with(&partition));
        Ok(std::iter::once(device.clone()).chain(partitions).collect())
    }

    fn holders(self, name: &str) -> Vec<DeviceUser> {
        let device = format!("nbd{}", self.0);
        let directory = if name == device {
            self.sysfs("holders")
        } else {
            self.sysfs(&format!("{name}/holders"))
        };
        let entries = fs::read_dir(directory).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .map(DeviceUser::Holder)
            .collect()
    }
}

/// Mount points of the devices of these names, by number: a mount may name its device by any path.
fn mounts(names: &[String]) -> Result<Vec<DeviceUser>, KernelError> {
    let numbers: Vec<String> = names
        .iter()
        .filter_map(|name| fs::read_to_string(format!("/sys/class/block/{name}/dev")).ok())
        .map(|text| text.trim().to_owned())
        .collect();
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(path).map_err(|error| KernelError::file(path, error))?;
    Ok(mounts_of(&text, &numbers))
}

/// Mount points in a mountinfo text (proc(5): id, parent, major:minor, root, mount point, ...) of devices by their numbers.
fn mounts_of(mountinfo: &str, numbers: &[String]) -> Vec<DeviceUser> {
    let mount_point = |line: &str| {
        let mut fields = line.split(' ').skip(2);
        let number = fields.next()?;
        let mount_point = fields.nth(1)?;
        let matches = numbers.iter().any(|wanted| wanted == number);
        matches.then(|| DeviceUser::Mount(PathBuf::from(mount_point.replace("\\040", " "))))
    };
    mountinfo.lines().filter_map(mount_point).collect()
}

fn swaps(names: &[String]) -> Option<DeviceUser> {
    let text = fs::read_to_string("/proc/swaps").ok()?;
    let used = |line: &str| {
        let path = line.split_whitespace().next().unwrap_or_default();
        names.iter().any(|name| path == format!("/dev/{name}"))
    };
    text.lines().any(used).then_some(DeviceUser::Swap)
}

/// Other processes that have one of these devices open.
fn processes(names: &[String]) -> Vec<DeviceUser> {
    let paths: Vec<PathBuf> = names
        .iter()
        .map(|name| Path::new("/dev").join(name))
        .collect();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    pids.filter(|pid| *pid != std::process::id() && has_open(*pid, &paths))
        .map(|pid| DeviceUser::Process {
            pid,
            name: process_name(pid),
        })
        .collect()
}

fn has_open(pid: u32, paths: &[PathBuf]) -> bool {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))
        .into_iter()
        .flatten()
        .flatten();
    entries
        .filter_map(|entry| fs::read_link(entry.path()).ok())
        .any(|target| paths.contains(&target))
}

fn process_name(pid: u32) -> String {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_by_the_number_of_its_device() {
        let mountinfo = "36 35 43:0 / /mnt/my\\040disk rw,noatime - ext4 /dev/blockd/demo rw\n\
                         37 35 8:1 / / rw - ext4 /dev/sda1 rw\n";
        let found = mounts_of(mountinfo, &["43:0".to_owned(), "43:1".to_owned()]);
        assert_eq!(found, [DeviceUser::Mount(PathBuf::from("/mnt/my disk"))]);
        assert_eq!(mounts_of(mountinfo, &["43:2".to_owned()]), []);
    }

    #[test]
    fn devices_are_known_by_path_and_name() {
        assert_eq!(Device::from_path(Path::new("/dev/nbd7")), Some(Device(7)));
        assert_eq!(Device::from_path(Path::new("nbd12")), Some(Device(12)));
        for other in ["/dev/nbd7p1", "/dev/sda", "nbd", "/"] {
            assert_eq!(Device::from_path(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn a_device_that_does_not_exist_says_so() {
        let device = Device(4_000_000);
        assert!(!device.exists() && !device.is_connected());
        assert_eq!(device.backend(), None);
        assert!(matches!(
            device.size_bytes(),
            Err(KernelError::NoDevice(4_000_000))
        ));
    }
}
