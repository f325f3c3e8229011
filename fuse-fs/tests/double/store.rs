//! The double: sparse files `NAME` and `NAME@SNAP` of a directory as volumes and snapshots.
//!
//! The file `fault` in the directory, if there, holds what goes wrong: `hang`, `fail`, `panic` on
//! every IO, or `hang-flush`, `fail-flush` on flushes only; with `fenced` the lease is lost, and changes
//! are refused. The file `flushes` gets a byte per flush. A lease is a lock of the volume's file.

use blockd::id::{Epoch, SnapshotId, VolumeId};
use bytes::Bytes;
use fuse_fs::backend::{
    Answer, Backend, BackendError, Connect, ConnectOptions, Extent, Listing, OpenTarget, Space,
    TargetInfo, TargetName, WriterLease,
};
use rustix::fs::{FallocateFlags, FlockOperation, SeekFrom, flock};
use std::fs::{self, File};
use std::future::Future;
use std::io::{self, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// As the product's: the seam's second user.
pub(crate) fn connect(options: ConnectOptions) -> Answer<'static, Arc<dyn Backend>> {
    Box::pin(async move {
        let dir = PathBuf::from(&options.servers[0]);
        if !dir.is_dir() {
            return Err(BackendError::new(
                libc::ENOENT,
                format!("{}: no server there", dir.display()),
            ));
        }
        Ok(Arc::new(Store { dir }) as Arc<dyn Backend>)
    })
}

const _: Connect = connect;

struct Store {
    dir: PathBuf,
}

struct Target {
    dir: PathBuf,
    path: PathBuf,
    file: File,
    size_bytes: AtomicU64,
    read_only: bool,
}

fn failed(error: io::Error) -> BackendError {
    BackendError::new(error.raw_os_error().unwrap_or(libc::EIO), error.to_string())
}

fn done<'a, T: Send + 'a>(result: io::Result<T>) -> Answer<'a, T> {
    Box::pin(std::future::ready(result.map_err(failed)))
}

/// What is to go wrong with an operation, `flush` or not.
async fn fault(dir: &Path, flush: bool) -> Result<(), BackendError> {
    let text = fs::read_to_string(dir.join("fault")).unwrap_or_default();
    match (text.trim(), flush) {
        ("hang", _) | ("hang-flush", true) => std::future::pending().await,
        ("fail", _) | ("fail-flush", true) => Err(BackendError::new(libc::EIO, "planted fault")),
        ("panic", _) => panic!("planted panic"),
        _ => Ok(()),
    }
}

/// Time between two looks at what another process does.
const PAUSE: Duration = Duration::from_millis(20);

fn is_fenced(dir: &Path) -> bool {
    let text = fs::read_to_string(dir.join("fault")).unwrap_or_default();
    text.trim() == "fenced"
}

fn check_fence(dir: &Path) -> Result<(), BackendError> {
    match is_fenced(dir) {
        true => Err(BackendError::new(
            libc::EPERM,
            "fenced: the lease was broken",
        )),
        false => Ok(()),
    }
}

/// The lock of a volume's file; it ends with the process.
struct Held {
    dir: PathBuf,
    _locked: File,
}

impl WriterLease for Held {
    fn lost(&self) -> Pin<Box<dyn Future<Output = String> + Send + '_>> {
        Box::pin(async move {
            while !is_fenced(&self.dir) {
                tokio::time::sleep(PAUSE).await;
            }
            "the lease was broken".to_owned()
        })
    }

    fn release(self: Box<Self>) -> Answer<'static, ()> {
        done(Ok(()))
    }
}

async fn acquire(dir: &Path, path: &Path, wait: Duration) -> Result<Held, BackendError> {
    let until = Instant::now() + wait;
    let file = File::open(path).map_err(failed)?;
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() >= until {
            let text = "held by another process of this host; see `blockctl lease`";
            return Err(BackendError::new(libc::EBUSY, text));
        }
        tokio::time::sleep(PAUSE).await;
    }
    Ok(Held {
        dir: dir.to_owned(),
        _locked: file,
    })
}

impl Store {
    fn info(&self, name: &TargetName) -> io::Result<TargetInfo> {
        let of = |text: String| fs::metadata(self.dir.join(text));
        let own = of(name.to_string())?;
        Ok(TargetInfo {
            name: name.clone(),
            volume_id: VolumeId(of(name.volume.clone())?.ino()),
            snapshot_id: name.snapshot.as_ref().map(|_| SnapshotId(own.ino() as u32)),
            size_bytes: own.len(),
            epoch: Epoch(3),
            allocated_bytes: Some(own.blocks() * 512),
            created_unix_s: 1_700_000_000,
        })
    }

    fn all(&self, listing: Listing) -> io::Result<Vec<TargetInfo>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            let name =
                TargetName::parse(&name).filter(|_| !matches!(name.as_str(), "fault" | "flushes"));
            found.extend(
                name.filter(|name| name.snapshot.is_some() == (listing == Listing::Snapshots)),
            );
        }
        found.iter().map(|name| self.info(name)).collect()
    }

    fn target(&self, name: &TargetName) -> io::Result<Arc<dyn OpenTarget>> {
        let read_only = name.snapshot.is_some();
        let path = self.dir.join(name.to_string());
        let file = File::options().read(true).write(!read_only).open(&path)?;
        let size_bytes = AtomicU64::new(file.metadata()?.len());
        Ok(Arc::new(Target {
            dir: self.dir.clone(),
            path,
            file,
            size_bytes,
            read_only,
        }))
    }
}

impl Backend for Store {
    fn list(&self, listing: Listing) -> Answer<'_, Vec<TargetInfo>> {
        done(self.all(listing))
    }

    fn find<'a>(&'a self, name: &'a TargetName) -> Answer<'a, TargetInfo> {
        done(self.info(name))
    }

    fn open<'a>(&'a self, name: &'a TargetName) -> Answer<'a, Arc<dyn OpenTarget>> {
        done(self.target(name))
    }

    fn grow<'a>(&'a self, volume: &'a str, size_bytes: u64) -> Answer<'a, ()> {
        let file = File::options().write(true).open(self.dir.join(volume));
        done(file.and_then(|file| file.set_len(size_bytes)))
    }

    fn snapshot<'a>(&'a self, name: &'a TargetName) -> Answer<'a, ()> {
        Box::pin(async move {
            let (volume, snapshot) = (self.dir.join(&name.volume), self.dir.join(name.to_string()));
            if snapshot.exists() {
                return Err(BackendError::new(libc::EEXIST, "the snapshot exists"));
            }
            fs::copy(volume, snapshot).map(|_| ()).map_err(failed)
        })
    }

    fn space(&self) -> Answer<'_, Space> {
        done(Ok(Space {
            allocated_bytes: 1 << 30,
            free_bytes: 3 << 30,
        }))
    }
}

impl OpenTarget for Target {
    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::SeqCst)
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Answer<'_, Bytes> {
        Box::pin(async move {
            fault(&self.dir, false).await?;
            let mut data = vec![0; len_bytes as usize];
            self.file
                .read_exact_at(&mut data, offset_bytes)
                .map_err(failed)?;
            Ok(data.into())
        })
    }

    fn write(&self, offset_bytes: u64, data: Bytes) -> Answer<'_, ()> {
        Box::pin(async move {
            fault(&self.dir, false).await?;
            check_fence(&self.dir)?;
            assert!(
                offset_bytes + data.len() as u64 <= self.size_bytes(),
                "write past the end"
            );
            self.file.write_all_at(&data, offset_bytes).map_err(failed)
        })
    }

    fn zero(&self, offset_bytes: u64, len_bytes: u64, keep_allocated: bool) -> Answer<'_, ()> {
        Box::pin(async move {
            fault(&self.dir, false).await?;
            let how = match keep_allocated {
                true => FallocateFlags::ZERO_RANGE,
                false => FallocateFlags::PUNCH_HOLE,
            };
            let how = how | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, how, offset_bytes, len_bytes)
                .map_err(|error| failed(error.into()))
        })
    }

    fn flush(&self) -> Answer<'_, ()> {
        Box::pin(async move {
            fault(&self.dir, true).await?;
            let mut count = File::options()
                .create(true)
                .append(true)
                .open(self.dir.join("flushes"))
                .map_err(failed)?;
            count.write_all(b".").map_err(failed)
        })
    }

    fn extents(&self, offset_bytes: u64, len_bytes: u64) -> Answer<'_, Vec<Extent>> {
        Box::pin(async move {
            fault(&self.dir, false).await?;
            let (mut at, end) = (offset_bytes, offset_bytes + len_bytes);
            let mut runs = Vec::new();
            while at < end {
                let data = rustix::fs::seek(&self.file, SeekFrom::Data(at))
                    .unwrap_or(end)
                    .min(end);
                let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(data))
                    .unwrap_or(end)
                    .min(end);
                runs.push(Extent {
                    len_bytes: data - at,
                    hole: true,
                });
                runs.push(Extent {
                    len_bytes: hole - data,
                    hole: false,
                });
                at = hole.max(data);
            }
            Ok(runs)
        })
    }

    fn refresh(&self) -> Answer<'_, ()> {
        let size = self.file.metadata().map(|metadata| metadata.len());
        done(size.map(|size_bytes| self.size_bytes.store(size_bytes, Ordering::SeqCst)))
    }

    fn acquire(&self, _purpose: &str, wait: Duration) -> Answer<'_, Box<dyn WriterLease>> {
        Box::pin(async move {
            let held = acquire(&self.dir, &self.path, wait).await?;
            Ok(Box::new(held) as Box<dyn WriterLease>)
        })
    }
}
