//! The state of a server behind one seam: its page store, its registry file, its small files.
//!
//! [`Directory`] is the real one. A simulator keeps all in memory and loses what was not synced.

use super::device::Device;
use super::disk::{Disk, FileDisk};
use super::host;
use redb::{Database, DatabaseError};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What a server keeps, and where.
pub trait StateDir: Send + Sync {
    /// Its name, for messages.
    fn path(&self) -> &Path;

    /// The content of a small text file; `None` if there is none.
    fn read(&self, name: &str) -> io::Result<Option<String>>;

    /// Makes the text the content of a small file, all or nothing; durable when it returns.
    fn replace(&self, name: &str, text: &str) -> io::Result<()>;

    /// Opens the files of the page store, made if absent. `WouldBlock`: another process has them.
    fn store(&self) -> io::Result<Arc<dyn Disk>>;

    /// Opens the file of the registry, made if absent.
    fn registry(&self) -> Result<Database, DatabaseError>;

    /// Whether there is a file of the registry.
    fn has_registry(&self) -> bool {
        matches!(self.read("registry/belongs-to"), Ok(Some(_)))
    }

    /// Bytes that may still be stored here; 0 if that is not known.
    fn free_bytes(&self) -> u64;

    /// Changes when what was not synced may be lost.
    fn boot_id(&self) -> String;

    /// How work on its files is done.
    fn device(&self) -> Device;
}

/// A directory of the operating system. `store` and `registry` are directories below it.
#[derive(Clone, Debug)]
pub struct Directory(pub PathBuf);

impl Directory {
    fn below(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.0.join(name);
        fs::create_dir_all(&path)?;
        Ok(path)
    }
}

impl StateDir for Directory {
    fn path(&self) -> &Path {
        &self.0
    }

    fn read(&self, name: &str) -> io::Result<Option<String>> {
        match fs::read_to_string(self.0.join(name)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn replace(&self, name: &str, text: &str) -> io::Result<()> {
        let (path, new) = (self.0.join(name), self.0.join(format!("{name}.new")));
        fs::create_dir_all(path.parent().unwrap_or(&self.0))?;
        let mut file = File::create(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_data()?;
        fs::rename(&new, &path)?;
        sync_parent(&path)
    }

    fn store(&self) -> io::Result<Arc<dyn Disk>> {
        Ok(Arc::new(FileDisk::open(&self.below("store")?)?))
    }

    fn registry(&self) -> Result<Database, DatabaseError> {
        let path = self.below("registry").map_err(redb::StorageError::Io)?;
        let path = path.join("registry.redb");
        let database = Database::create(&path)?;
        sync_parent(&path).map_err(redb::StorageError::Io)?;
        Ok(database)
    }

    fn has_registry(&self) -> bool {
        self.0.join("registry/registry.redb").exists()
    }

    fn free_bytes(&self) -> u64 {
        let asked = rustix::fs::statvfs(&self.0);
        asked.map_or(0, |fs| fs.f_bavail.saturating_mul(fs.f_frsize))
    }

    fn boot_id(&self) -> String {
        host::boot_id()
    }

    fn device(&self) -> Device {
        Device::Blocking
    }
}

/// Makes the name of a file durable.
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    File::open(parent)?.sync_all()
}
