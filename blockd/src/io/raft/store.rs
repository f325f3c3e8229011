//! The registry's file, `registry.redb`.
//!
//! | table  | key             | value                                                          |
//! |--------|-----------------|----------------------------------------------------------------|
//! | `meta` | `format`        | u32 little-endian: 1                                            |
//! | `meta` | `node`          | u16 little-endian: number of the node whose file it is          |
//! | `meta` | `vote`          | V, openraft `Vote`                                              |
//! | `meta` | `committed`     | V, `Option<LogId>`: all before is agreed (may lag)              |
//! | `meta` | `purged`        | V, `LogId`: the log begins behind it                            |
//! | `meta` | `snapshot_meta` | V, `SnapshotMeta`: last log entry and membership in the snapshot |
//! | `meta` | `snapshot`      | V, `Machine`: the state and the outcomes of late                |
//! | `log`  | index, u64      | V, openraft `Entry`                                             |
//!
//! V is one version byte (1), then postcard. Every commit is durable (redb syncs).

use super::codec::{CodecError, decode, encode};
use crate::id::NodeNo;
use crate::io::device::Device;
use redb::{
    Database, ReadTransaction, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

pub(super) const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
pub(super) const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");
/// Format of the file that this program reads and writes.
const FORMAT: u32 = 1;

/// Why the file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// redb failed; the text says what.
    #[error("{0}")]
    Redb(String),
    /// A value is not readable.
    #[error("value {key} {source}")]
    Value {
        /// Which one.
        key: String,
        /// Why.
        source: CodecError,
    },
    /// Written by a newer program.
    #[error("format {0} is newer than this program's format {FORMAT}: update blockd on this node")]
    Newer(u32),
    /// The state directory is another node's.
    #[error(
        "it belongs to node {found}, not to node {wanted}: use the state directory of this node"
    )]
    OtherNode {
        /// In the file.
        found: NodeNo,
        /// Of this daemon.
        wanted: NodeNo,
    },
    /// Not a registry file, or half of one.
    #[error(
        "it has no valid {0} field: it is no registry file or it is damaged; restore the state directory or join as a new node"
    )]
    NoField(&'static str),
    /// [`Store::close`] was called.
    #[error("the file is closed")]
    Closed,
}

impl<E: Into<redb::Error>> From<E> for StoreError {
    fn from(error: E) -> Self {
        StoreError::Redb(error.into().to_string())
    }
}

/// The open file.
pub struct Store {
    path: PathBuf,
    device: Device,
    database: RwLock<Option<Database>>,
    /// The value of `committed` that the next commit carries.
    committed: Mutex<Option<Vec<u8>>>,
}

impl Store {
    /// Opens the file, or makes it for node `me`.
    ///
    /// # Errors
    /// It is in use, damaged, of another node or of a newer program.
    pub fn open(path: &Path, me: NodeNo) -> Result<Arc<Self>, StoreError> {
        let database = Database::create(path)?;
        let store = Self::of(database, path, Device::Blocking, me)?;
        sync_directory(path)?;
        Ok(store)
    }

    /// Takes an open file, new or of node `me`; `path` is for messages.
    ///
    /// # Errors
    /// It is damaged, of another node or of a newer program.
    pub fn of(
        database: Database,
        path: &Path,
        device: Device,
        me: NodeNo,
    ) -> Result<Arc<Self>, StoreError> {
        let store = Self {
            path: path.to_owned(),
            device,
            database: RwLock::new(Some(database)),
            committed: Mutex::default(),
        };
        store.write(|transaction| {
            transaction.open_table(LOG)?;
            check_identity(transaction, me)
        })?;
        Ok(Arc::new(store))
    }

    /// How work on the file is done.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Where the file is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Closes the file; later use gives [`StoreError::Closed`].
    pub fn close(&self) {
        if self.carried().is_some()
            && let Err(error) = self.write(|_| Ok(()))
        {
            tracing::warn!(%error, path = %self.path.display(), "closing the registry file");
        }
        let mut database = self
            .database
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        *database = None;
    }

    /// Runs `f` in a read transaction. Blocks on the disk.
    pub(super) fn read<T>(
        &self,
        f: impl FnOnce(&ReadTransaction) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        f(&database.as_ref().ok_or(StoreError::Closed)?.begin_read()?)
    }

    fn carried(&self) -> MutexGuard<'_, Option<Vec<u8>>> {
        self.committed
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the value of `committed` at the next commit.
    pub(super) fn carry_committed(&self, bytes: Vec<u8>) {
        *self.carried() = Some(bytes);
    }

    /// Runs `f` in a write transaction and commits. Blocks on the disk.
    pub(super) fn write(
        &self,
        f: impl FnOnce(&WriteTransaction) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let database = self.database.read().unwrap_or_else(PoisonError::into_inner);
        let transaction = database.as_ref().ok_or(StoreError::Closed)?.begin_write()?;
        f(&transaction)?;
        if let Some(committed) = self.carried().take() {
            let mut meta = transaction.open_table(META)?;
            meta.insert("committed", committed.as_slice())?;
        }
        Ok(transaction.commit()?)
    }

    /// A value of the table `meta`.
    pub(super) fn value<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, StoreError> {
        self.read(|transaction| {
            let table = transaction.open_table(META)?;
            let bytes = table.get(key)?;
            bytes.map(|bytes| value_of(key, bytes.value())).transpose()
        })
    }

    /// Sets a value of the table `meta`.
    pub(super) fn set_value<T: Serialize>(&self, key: &str, value: &T) -> Result<(), StoreError> {
        let bytes = bytes_of(key, value)?;
        self.write(|transaction| {
            transaction
                .open_table(META)?
                .insert(key, bytes.as_slice())?;
            Ok(())
        })
    }
}

/// Makes the file's name durable too.
fn sync_directory(path: &Path) -> Result<(), StoreError> {
    let directory = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let synced = std::fs::File::open(directory).and_then(|d| d.sync_all());
    synced.map_err(|e| StoreError::Redb(format!("sync of {}: {e}", directory.display())))
}

/// The bytes of a value; `key` is for the message.
pub(super) fn bytes_of<T: Serialize>(key: &str, value: &T) -> Result<Vec<u8>, StoreError> {
    encode(value).map_err(|source| StoreError::Value {
        key: key.to_owned(),
        source,
    })
}

/// The value of bytes; `key` is for the message.
pub(super) fn value_of<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, StoreError> {
    decode(bytes).map_err(|source| StoreError::Value {
        key: key.to_owned(),
        source,
    })
}

/// Writes format and node number into a new file, checks them in an old one.
fn check_identity(transaction: &WriteTransaction, me: NodeNo) -> Result<(), StoreError> {
    let mut table = transaction.open_table(META)?;
    let field = |table: &redb::Table<'_, &str, &[u8]>, key: &str| -> Result<_, StoreError> {
        Ok(table.get(key)?.map(|bytes| bytes.value().to_vec()))
    };
    let Some(format) = field(&table, "format")? else {
        table.insert("format", FORMAT.to_le_bytes().as_slice())?;
        table.insert("node", me.0.to_le_bytes().as_slice())?;
        return Ok(());
    };
    let format = format.try_into().map(u32::from_le_bytes);
    match format.map_err(|_| StoreError::NoField("format"))? {
        0 => return Err(StoreError::NoField("format")),
        newer if newer > FORMAT => return Err(StoreError::Newer(newer)),
        _ => {}
    }
    let node = field(&table, "node")?.and_then(|bytes| bytes.try_into().ok());
    let found = NodeNo(u16::from_le_bytes(node.ok_or(StoreError::NoField("node"))?));
    if found == me {
        Ok(())
    } else {
        Err(StoreError::OtherNode { found, wanted: me })
    }
}
