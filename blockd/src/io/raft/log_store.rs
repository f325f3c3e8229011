//! openraft's log and vote in the registry's file.

use super::TypeConfig;
use super::recent::Recent;
use super::store::{LOG, META, Store, StoreError, bytes_of, value_of};
use openraft::storage::{LogFlushed, LogState, RaftLogStorage};
use openraft::{
    AnyError, Entry, ErrorSubject, ErrorVerb, LogId, RaftLogReader, StorageError, StorageIOError,
    Vote,
};
use redb::ReadableTable;
use std::fmt::Debug;
use std::ops::{Bound, RangeBounds};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of log entries that one message to another server shall carry, if it is more than one entry.
const BATCH_BYTES: usize = 1 << 20;

/// The log of one registry server. Clones share the file and what is in memory of it.
#[derive(Clone)]
pub struct LogStore {
    store: Arc<Store>,
    recent: Arc<Mutex<Recent>>,
}

impl LogStore {
    /// The log in this file.
    #[must_use]
    pub fn new(store: Arc<Store>) -> Self {
        Self {
            store,
            recent: Arc::default(),
        }
    }

    fn recent(&self) -> MutexGuard<'_, Recent> {
        self.recent.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Entries of the range, up to `bytes_max` bytes, but one at the least: of memory or of the file.
    async fn read(
        &self,
        range: (Bound<u64>, Bound<u64>),
        bytes_max: usize,
    ) -> Result<Vec<Entry<TypeConfig>>, StorageError<u64>> {
        let start = match range.0 {
            Bound::Included(first) => first,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match range.1 {
            Bound::Included(last) => last.checked_add(1),
            Bound::Excluded(end) => Some(end),
            Bound::Unbounded => None,
        };
        let recent = self.recent().read(start, end, bytes_max);
        if let Some(found) = recent {
            return Ok(found);
        }
        let read = move |store: &Store| entries(store, range, bytes_max);
        on_disk(&self.store, ErrorSubject::Logs, ErrorVerb::Read, read).await
    }
}

/// Runs file work where it may block.
pub(super) async fn on_disk<T: Send + 'static>(
    store: &Arc<Store>,
    subject: ErrorSubject<u64>,
    verb: ErrorVerb,
    work: impl FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StorageError<u64>> {
    let (store, device) = (Arc::clone(store), store.device().clone());
    let done = device.run(move || {
        work(&store).map_err(|e| format!("registry file {}: {e}", store.path().display()))
    });
    let done = done.await.unwrap_or_else(|e| Err(e.to_string()));
    done.map_err(|e| StorageIOError::new(subject, verb, AnyError::error(e)).into())
}

fn entry(index: u64, bytes: &[u8]) -> Result<Entry<TypeConfig>, StoreError> {
    value_of(&format!("log entry {index}"), bytes)
}

/// Entries of the range, up to `bytes_max` bytes, but one at the least.
fn entries(
    store: &Store,
    range: (Bound<u64>, Bound<u64>),
    bytes_max: usize,
) -> Result<Vec<Entry<TypeConfig>>, StoreError> {
    store.read(|transaction| {
        let table = transaction.open_table(LOG)?;
        let (mut found, mut bytes) = (Vec::new(), 0_usize);
        for item in table.range(range)? {
            let (index, value) = item?;
            bytes = bytes.saturating_add(value.value().len());
            if bytes > bytes_max && !found.is_empty() {
                break;
            }
            found.push(entry(index.value(), value.value())?);
        }
        Ok(found)
    })
}

fn log_state(store: &Store) -> Result<LogState<TypeConfig>, StoreError> {
    let purged: Option<LogId<u64>> = store.value("purged")?;
    let last = store.read(|transaction| {
        let table = transaction.open_table(LOG)?;
        let last = table.last()?;
        last.map(|(index, value)| entry(index.value(), value.value()))
            .transpose()
    })?;
    let last = last.map(|entry| entry.log_id).or(purged);
    Ok(LogState {
        last_purged_log_id: purged,
        last_log_id: last,
    })
}

fn append(store: &Store, encoded: &[(u64, Vec<u8>)]) -> Result<(), StoreError> {
    store.write(|transaction| {
        let mut table = transaction.open_table(LOG)?;
        for (index, bytes) in encoded {
            table.insert(index, bytes.as_slice())?;
        }
        Ok(())
    })
}

fn truncate(store: &Store, first: u64) -> Result<(), StoreError> {
    store.write(|transaction| {
        Ok(transaction
            .open_table(LOG)?
            .retain_in(first.., |_, _| false)?)
    })
}

fn purge(store: &Store, last: &LogId<u64>) -> Result<(), StoreError> {
    let purged = bytes_of("purged", last)?;
    store.write(|transaction| {
        transaction
            .open_table(META)?
            .insert("purged", purged.as_slice())?;
        Ok(transaction
            .open_table(LOG)?
            .retain_in(..=last.index, |_, _| false)?)
    })
}

impl RaftLogReader<TypeConfig> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + Send>(
        &mut self,
        range: RB,
    ) -> Result<Vec<Entry<TypeConfig>>, StorageError<u64>> {
        let range = (range.start_bound().cloned(), range.end_bound().cloned());
        self.read(range, usize::MAX).await
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<Entry<TypeConfig>>, StorageError<u64>> {
        let range = (Bound::Included(start), Bound::Excluded(end));
        self.read(range, BATCH_BYTES).await
    }
}

impl RaftLogStorage<TypeConfig> for LogStore {
    type LogReader = Self;

    async fn get_log_state(&mut self) -> Result<LogState<TypeConfig>, StorageError<u64>> {
        on_disk(&self.store, ErrorSubject::Logs, ErrorVerb::Read, log_state).await
    }

    async fn get_log_reader(&mut self) -> Self {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError<u64>> {
        let vote = *vote;
        let save = move |store: &Store| store.set_value("vote", &vote);
        on_disk(&self.store, ErrorSubject::Vote, ErrorVerb::Write, save).await
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError<u64>> {
        let read = |store: &Store| store.value("vote");
        on_disk(&self.store, ErrorSubject::Vote, ErrorVerb::Read, read).await
    }

    /// The next append carries it. A loss costs nothing but a wait for the leader.
    async fn save_committed(
        &mut self,
        committed: Option<LogId<u64>>,
    ) -> Result<(), StorageError<u64>> {
        let error = |e| StorageIOError::write_logs(AnyError::error(e));
        let bytes = bytes_of("committed", &committed).map_err(error)?;
        self.store.carry_committed(bytes);
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>, StorageError<u64>> {
        let read = |store: &Store| Ok(store.value("committed")?.flatten());
        on_disk(&self.store, ErrorSubject::Logs, ErrorVerb::Read, read).await
    }

    async fn append<I>(
        &mut self,
        entries: I,
        callback: LogFlushed<TypeConfig>,
    ) -> Result<(), StorageError<u64>>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + Send,
        I::IntoIter: Send,
    {
        let entries: Vec<_> = entries.into_iter().collect();
        let work = move |store: &Store| {
            let encode = |e: &Entry<TypeConfig>| Ok((e.log_id.index, bytes_of("log entry", e)?));
            let encoded = entries
                .iter()
                .map(encode)
                .collect::<Result<Vec<_>, StoreError>>()?;
            append(store, &encoded)?;
            let lengths = encoded.into_iter().map(|(_, bytes)| bytes.len());
            Ok(entries.into_iter().zip(lengths).collect::<Vec<_>>())
        };
        let written = on_disk(&self.store, ErrorSubject::Logs, ErrorVerb::Write, work).await?;
        let mut recent = self.recent();
        written
            .into_iter()
            .for_each(|(entry, len_bytes)| recent.push(entry, len_bytes));
        drop(recent);
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.recent().truncate(log_id.index);
        let work = move |store: &Store| truncate(store, log_id.index);
        on_disk(&self.store, ErrorSubject::Logs, ErrorVerb::Delete, work).await
    }

    async fn purge(&mut self, log_id: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.recent().purge(log_id.index);
        let work = move |store: &Store| purge(store, &log_id);
        on_disk(&self.store, ErrorSubject::Logs, ErrorVerb::Delete, work).await
    }
}
