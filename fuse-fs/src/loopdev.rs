//! Loop devices: a block device of the kernel on a file of the view.

use crate::error::FuseFsError;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const CONTROL: &str = "/dev/loop-control";
/// From `linux/loop.h`, which libc does not carry.
const LOOP_CLR_FD: libc::c_ulong = 0x4c01;
const LOOP_CONFIGURE: libc::c_ulong = 0x4c0a;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4c82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// Others take free devices too: how often a device may be gone before we give up.
const ATTEMPTS: u32 = 32;
/// Bytes of the file's name that the kernel keeps, with the final zero.
const LO_NAME_SIZE: usize = 64;
/// How often a device that is being released is looked at again.
const POLL: Duration = Duration::from_millis(20);

#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; LO_NAME_SIZE],
    crypt_name: [u8; LO_NAME_SIZE],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

// The kernel's struct loop_config.
const _: () = assert!(size_of::<LoopInfo64>() == 232 && size_of::<LoopConfig>() == 304);

/// How a file is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopOptions {
    pub read_only: bool,
    /// Logical block of the device: 512 or 4096.
    pub block_bytes: u32,
}

/// A loop device on a file. It detaches by itself after its last user, this object included.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    _held: File,
}

impl LoopDevice {
    /// Attaches `file` to a free loop device.
    ///
    /// # Errors
    /// [`FuseFsError::NoLoop`] without loop devices, [`FuseFsError::Loop`] when the kernel refuses.
    pub fn attach(file: &Path, options: LoopOptions) -> Result<Self, FuseFsError> {
        let control = open_device(Path::new(CONTROL), true)?;
        let refused = |device: &Path, source| FuseFsError::Loop {
            device: device.display().to_string(),
            file: file.to_owned(),
            source,
        };
        let backing = open_file(file, !options.read_only)
            .map_err(|error| refused(Path::new(CONTROL), error))?;
        for _ in 0..ATTEMPTS {
            let number = request(control.as_raw_fd(), LOOP_CTL_GET_FREE, 0)
                .map_err(|error| refused(Path::new(CONTROL), error))?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let held = open_device(&path, !options.read_only)?;
            match configure(&held, &backing, file, options) {
                Ok(()) => return Ok(Self { path, _held: held }),
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(refused(&path, error)),
            }
        }
        Err(refused(
            Path::new(CONTROL),
            io::Error::from_raw_os_error(libc::EBUSY),
        ))
    }

    /// `/dev/loopN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

fn open_file(path: &Path, write: bool) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
}

fn open_device(path: &Path, write: bool) -> Result<File, FuseFsError> {
    open_file(path, write).map_err(|source| FuseFsError::NoLoop {
        device: path.display().to_string(),
        source,
    })
}

/// Direct IO first: the volume's file has no page cache to share; buffered if the kernel refuses.
fn configure(device: &File, backing: &File, name: &Path, options: LoopOptions) -> io::Result<()> {
    match configure_once(device, backing, name, options, LO_FLAGS_DIRECT_IO) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            configure_once(device, backing, name, options, 0)
        }
        result => result,
    }
}

fn configure_once(
    device: &File,
    backing: &File,
    name: &Path,
    options: LoopOptions,
    flags: u32,
) -> io::Result<()> {
    let read_only = if options.read_only {
        LO_FLAGS_READ_ONLY
    } else {
        0
    };
    let config = LoopConfig {
        fd: u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?,
        block_size: options.block_bytes,
        info: LoopInfo64 {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: LO_FLAGS_AUTOCLEAR | read_only | flags,
            file_name: short_name(name),
            crypt_name: [0; LO_NAME_SIZE],
            encrypt_key: [0; 32],
            init: [0; 2],
        },
        reserved: [0; 8],
    };
    request(
        device.as_raw_fd(),
        LOOP_CONFIGURE,
        std::ptr::from_ref(&config).expose_provenance(),
    )
    .map(|_| ())
}

/// The end of the path: it tells more than the beginning.
fn short_name(name: &Path) -> [u8; LO_NAME_SIZE] {
    let bytes = name.as_os_str().as_encoded_bytes();
    let tail = bytes
        .get(bytes.len().saturating_sub(LO_NAME_SIZE - 1)..)
        .unwrap_or_default();
    let mut out = [0; LO_NAME_SIZE];
    for (to, from) in out.iter_mut().zip(tail) {
        *to = *from;
    }
    out
}

fn request(fd: RawFd, code: libc::c_ulong, argument: usize) -> io::Result<i32> {
    // SAFETY: the fd is open; `argument` is 0 or the address of a live LoopConfig, which
    // LOOP_CONFIGURE only reads.
    let answer = unsafe { libc::ioctl(fd, code, argument) };
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(answer)
    }
}

/// The file that `device` (`/dev/loopN`) is attached to, as the kernel names it; `None` if detached.
#[must_use]
pub fn backing_file(device: &Path) -> Option<PathBuf> {
    let name = device.file_name()?.to_str()?;
    let text = std::fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()?;
    let path = text.trim_end_matches('\n');
    (!path.is_empty()).then(|| PathBuf::from(path))
}

/// Waits until `device` is no longer attached to `file`; asks it to detach when it is still held.
/// Returns whether it is gone.
#[must_use]
pub fn wait_detached(device: &Path, file: &Path, until: Instant) -> bool {
    let attached = || backing_file(device).is_some_and(|backing| backing == file);
    let mut asked = false;
    while attached() {
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(POLL);
        if !asked && attached() {
            asked = true;
            if let Ok(device) = open_file(device, false) {
                // Fails when it has just gone, which is what we wait for.
                let _ = request(device.as_raw_fd(), LOOP_CLR_FD, 0);
            }
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_names_keep_their_end() {
        let long = format!("/run/{}/volumes/vol", "x".repeat(100));
        let name = short_name(Path::new(&long));
        assert!(name.ends_with(b"/volumes/vol\0"));
        assert!(short_name(Path::new("/a")).starts_with(b"/a\0"));
    }

    #[test]
    fn what_is_no_loop_device_has_no_file() {
        assert_eq!(backing_file(Path::new("/dev/null")), None);
        assert!(wait_detached(
            Path::new("/dev/null"),
            Path::new("/x"),
            Instant::now()
        ));
    }
}
