//! The files of a page store behind one seam, so that a simulator can stand in for the device.
//!
//! Invariant for every implementation: a write is visible to later reads at once, and is on stable
//! storage only after a later `sync` of its file has returned.

use rustix::fs::{Advice, FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::{Errno, ReadWriteFlags};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// A file of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DiskFile {
    /// Superblock copies.
    Super,
    /// Write-ahead log ring.
    Log,
    /// Chunk slots.
    Slab,
    /// Page records, two copies of each meta page.
    Meta,
    /// Catalog of volumes and snapshots, even checkpoints.
    CatalogA,
    /// Catalog of volumes and snapshots, odd checkpoints.
    CatalogB,
}

impl DiskFile {
    /// All files, in the order of their index.
    pub const ALL: [DiskFile; 6] = [
        DiskFile::Super,
        DiskFile::Log,
        DiskFile::Slab,
        DiskFile::Meta,
        DiskFile::CatalogA,
        DiskFile::CatalogB,
    ];

    /// Name of the file in the directory of the store.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            DiskFile::Super => "super",
            DiskFile::Log => "log",
            DiskFile::Slab => "slab",
            DiskFile::Meta => "meta",
            DiskFile::CatalogA => "catalog-a",
            DiskFile::CatalogB => "catalog-b",
        }
    }
}

/// Blocking access to the files of one store. Positions and lengths are bytes.
pub trait Disk: Send + Sync {
    /// Fills `buf`; what lies behind the end of the file is zeros.
    fn read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<()>;
    /// Fills `buf` if that needs no device; `false` says that it would block (`buf` is undefined).
    fn try_read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<bool>;
    /// As `read_at`, but past the page cache, where the device allows that for this range: what is
    /// only in memory does not count.
    fn read_from_device(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        self.read_at(file, pos, buf)
    }
    /// Writes all parts one after the other from `pos` on.
    fn write_at(&self, file: DiskFile, pos: u64, parts: &[IoSlice<'_>]) -> io::Result<()>;
    /// Says that the range will be written in pieces that are no whole blocks: what the device has of
    /// it is wanted in memory. Waits for nothing.
    fn will_write(&self, _file: DiskFile, _pos: u64, _len: u64) {}
    /// Makes all earlier writes to the file durable.
    fn sync(&self, file: DiskFile) -> io::Result<()>;
    /// Makes the range read as zeros and gives its space back to the file system.
    fn punch(&self, file: DiskFile, pos: u64, len: u64) -> io::Result<()>;
    /// Length of the file.
    fn len_bytes(&self, file: DiskFile) -> io::Result<u64>;
    /// Bytes that may still be allocated.
    fn free_bytes(&self) -> io::Result<u64>;
}

/// The files in a directory, locked against a second process.
pub struct FileDisk {
    files: [File; DiskFile::ALL.len()],
    /// The file system knows no RWF_NOWAIT (tmpfs): its reads do not block.
    plain_reads: AtomicBool,
    /// The slab once more, for reads past the page cache; `None` where there are none (tmpfs).
    direct_slab: OnceLock<Option<File>>,
}

/// Bytes of one write call at most. The page cache makes folios as large as the write that first
/// touches them, and ext4 walks all blocks of a folio at each later write of 4 KiB into it: after
/// writes of 1 MiB that was 39 % of all CPU time under a random 4 KiB load.
const WRITE_BYTES_MAX: usize = 64 << 10;

impl FileDisk {
    /// Writes in pieces that end where multiples of `WRITE_BYTES_MAX` lie in the file.
    fn write_in_pieces(
        &self,
        file: DiskFile,
        mut pos: u64,
        parts: &[IoSlice<'_>],
    ) -> io::Result<()> {
        for part in parts {
            let mut rest: &[u8] = part;
            while !rest.is_empty() {
                let ahead = pos % WRITE_BYTES_MAX as u64;
                let len = rest.len().min(WRITE_BYTES_MAX - ahead as usize);
                self.file(file).write_all_at(&rest[..len], pos)?;
                rest = &rest[len..];
                pos += len as u64;
            }
        }
        Ok(())
    }

    /// Opens or creates the files. `WouldBlock` says that another process holds the lock.
    pub fn open(dir: &Path) -> io::Result<FileDisk> {
        std::fs::create_dir_all(dir)?;
        let open = |file: DiskFile| -> io::Result<File> {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC;
            let mode = Mode::RUSR | Mode::WUSR;
            Ok(File::from(rustix::fs::open(
                dir.join(file.name()),
                flags,
                mode,
            )?))
        };
        let first = open(DiskFile::Super)?;
        rustix::fs::flock(&first, FlockOperation::NonBlockingLockExclusive)?;
        let files = [
            first,
            open(DiskFile::Log)?,
            open(DiskFile::Slab)?,
            open(DiskFile::Meta)?,
            open(DiskFile::CatalogA)?,
            open(DiskFile::CatalogB)?,
        ];
        File::open(dir)?.sync_all()?;
        Ok(FileDisk::of(files))
    }

    /// Opens the files for reading alone; every write fails. `WouldBlock` says that another process
    /// holds the lock, `NotFound` that a file is missing.
    pub fn open_read_only(dir: &Path) -> io::Result<FileDisk> {
        let open = |file: DiskFile| {
            let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", file.name()));
            File::open(dir.join(file.name())).map_err(named)
        };
        let first = open(DiskFile::Super)?;
        rustix::fs::flock(&first, FlockOperation::NonBlockingLockExclusive)?;
        let files = [
            first,
            open(DiskFile::Log)?,
            open(DiskFile::Slab)?,
            open(DiskFile::Meta)?,
            open(DiskFile::CatalogA)?,
            open(DiskFile::CatalogB)?,
        ];
        Ok(FileDisk::of(files))
    }

    fn of(files: [File; DiskFile::ALL.len()]) -> FileDisk {
        FileDisk {
            files,
            plain_reads: AtomicBool::new(false),
            direct_slab: OnceLock::new(),
        }
    }

    fn direct_slab(&self) -> Option<&File> {
        let open = || {
            let slab = self.file(DiskFile::Slab).as_raw_fd();
            let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
            let path = format!("/proc/self/fd/{slab}");
            rustix::fs::open(path, flags, Mode::empty())
                .map(File::from)
                .ok()
        };
        self.direct_slab.get_or_init(open).as_ref()
    }

    fn file(&self, file: DiskFile) -> &File {
        &self.files[file as usize]
    }
}

impl Disk for FileDisk {
    fn read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.file(file).read_at(&mut buf[done..], pos + done as u64) {
                Ok(0) => {
                    buf[done..].fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn try_read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<bool> {
        if self.plain_reads.load(Ordering::Relaxed) {
            return self.read_at(file, pos, buf).map(|()| true);
        }
        let want = buf.len();
        let flags = ReadWriteFlags::NOWAIT;
        match rustix::io::preadv2(self.file(file), &mut [IoSliceMut::new(buf)], pos, flags) {
            Ok(n) => Ok(n == want),
            Err(Errno::AGAIN | Errno::INTR) => Ok(false),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.plain_reads.store(true, Ordering::Relaxed);
                self.read_at(file, pos, buf).map(|()| true)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// The alignment is the caller's; where it does not fit the device, the page cache answers.
    fn read_from_device(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        let direct = self.direct_slab().filter(|_| file == DiskFile::Slab);
        let Some(direct) = direct else {
            return self.read_at(file, pos, buf);
        };
        match direct.read_exact_at(buf, pos) {
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof
                ) =>
            {
                self.read_at(file, pos, buf)
            }
            read => read,
        }
    }

    fn write_at(&self, file: DiskFile, pos: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        if parts.iter().map(|part| part.len()).sum::<usize>() > WRITE_BYTES_MAX {
            return self.write_in_pieces(file, pos, parts);
        }
        let mut done = match rustix::io::pwritev(self.file(file), parts, pos) {
            Ok(n) => n,
            Err(Errno::INTR) => 0,
            Err(e) => return Err(e.into()),
        };
        let mut at = pos;
        for part in parts {
            let skip = done.min(part.len());
            done -= skip;
            if skip < part.len() {
                self.file(file)
                    .write_all_at(&part[skip..], at + skip as u64)?;
            }
            at += part.len() as u64;
        }
        Ok(())
    }

    fn will_write(&self, file: DiskFile, pos: u64, len: u64) {
        let len = std::num::NonZeroU64::new(len);
        // Only a hint.
        let _ = rustix::fs::fadvise(self.file(file), pos, len, Advice::WillNeed);
    }

    fn sync(&self, file: DiskFile) -> io::Result<()> {
        self.file(file).sync_data()
    }

    fn punch(&self, file: DiskFile, pos: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(self.file(file), flags, pos, len) {
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn len_bytes(&self, file: DiskFile) -> io::Result<u64> {
        Ok(self.file(file).metadata()?.len())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let stat = rustix::fs::fstatvfs(self.file(DiskFile::Slab))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

impl<D: Disk + ?Sized> Disk for std::sync::Arc<D> {
    fn read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read_at(file, pos, buf)
    }
    fn try_read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<bool> {
        (**self).try_read_at(file, pos, buf)
    }
    fn read_from_device(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> io::Result<()> {
        (**self).read_from_device(file, pos, buf)
    }
    fn write_at(&self, file: DiskFile, pos: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        (**self).write_at(file, pos, parts)
    }
    fn will_write(&self, file: DiskFile, pos: u64, len: u64) {
        (**self).will_write(file, pos, len);
    }

    fn sync(&self, file: DiskFile) -> io::Result<()> {
        (**self).sync(file)
    }
    fn punch(&self, file: DiskFile, pos: u64, len: u64) -> io::Result<()> {
        (**self).punch(file, pos, len)
    }
    fn len_bytes(&self, file: DiskFile) -> io::Result<u64> {
        (**self).len_bytes(file)
    }
    fn free_bytes(&self) -> io::Result<u64> {
        (**self).free_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_open_is_refused_and_reads_behind_the_end_are_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::open(dir.path()).unwrap();
        let Err(error) = FileDisk::open(dir.path()) else {
            panic!("two owners")
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let parts = [IoSlice::new(b"ab"), IoSlice::new(b"cd")];
        disk.write_at(DiskFile::Slab, 4096, &parts).unwrap();
        let mut buf = [7; 8];
        disk.read_at(DiskFile::Slab, 4096, &mut buf).unwrap();
        assert_eq!(&buf, b"abcd\0\0\0\0");
        disk.punch(DiskFile::Slab, 4096, 4096).unwrap();
        disk.read_at(DiskFile::Slab, 4096, &mut buf).unwrap();
        assert_eq!(buf, [0; 8]);
    }
}
