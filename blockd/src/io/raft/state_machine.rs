//! openraft's state machine: the pure registry in memory, its snapshot in the registry's file.

use super::log_store::on_disk;
use super::store::{META, Store, StoreError, bytes_of, value_of};
use super::{Applied, TypeConfig};
use crate::control::registry::{Machine, RegistryState};
use openraft::storage::RaftStateMachine;
use openraft::{
    BasicNode, Entry, EntryPayload, ErrorSubject, ErrorVerb, LogId, RaftSnapshotBuilder, Snapshot,
    SnapshotMeta, StorageError, StoredMembership,
};
use std::io::Cursor;
use std::sync::Arc;
use tokio::sync::watch;

type Meta = SnapshotMeta<u64, BasicNode>;

/// What the rest of the node sees of the state machine.
#[derive(Clone)]
pub struct Published {
    /// The state; changes only if a transaction changed something.
    pub state: watch::Receiver<Arc<RegistryState>>,
    /// Index of the last log entry that is in the state; set after the state. 0: none.
    pub applied: watch::Receiver<u64>,
}

/// The state machine of one registry server.
pub struct StateMachine {
    store: Arc<Store>,
    machine: Machine,
    last_applied: Option<LogId<u64>>,
    membership: StoredMembership<u64, BasicNode>,
    state: watch::Sender<Arc<RegistryState>>,
    applied: watch::Sender<u64>,
}

/// A view of the state machine from which a snapshot is made.
pub struct SnapshotBuilder {
    store: Arc<Store>,
    machine: Machine,
    meta: Meta,
}

impl StateMachine {
    /// The state as the snapshot in the file has it; openraft applies the rest of the log.
    ///
    /// # Errors
    /// The snapshot is not readable.
    pub fn open(store: Arc<Store>) -> Result<(Self, Published), StoreError> {
        let saved =
            load(&store)?.map(|(meta, data)| Ok::<_, StoreError>((meta, machine_of(&data)?)));
        let (meta, machine) = saved.transpose()?.unwrap_or_default();
        let (state, state_seen) = watch::channel(Arc::new(machine.state().clone()));
        let (applied, applied_seen) = watch::channel(index_of(meta.last_log_id));
        let opened = Self {
            store,
            machine,
            last_applied: meta.last_log_id,
            membership: meta.last_membership,
            state,
            applied,
        };
        Ok((
            opened,
            Published {
                state: state_seen,
                applied: applied_seen,
            },
        ))
    }

    fn execute(&mut self, entry: Entry<TypeConfig>) -> Applied {
        self.last_applied = Some(entry.log_id);
        match entry.payload {
            EntryPayload::Blank => Applied::Nothing,
            EntryPayload::Normal(command) => Applied::Decided(self.machine.execute(&command)),
            EntryPayload::Membership(membership) => {
                self.membership = StoredMembership::new(Some(entry.log_id), membership);
                Applied::Nothing
            }
        }
    }

    /// Shows the state first, then how far it is: who waits for an index finds it in the state.
    fn publish(&self) {
        let machine = &self.machine;
        self.state.send_if_modified(|seen| {
            let changed = seen.revision() != machine.state().revision();
            if changed {
                *seen = Arc::new(machine.state().clone());
            }
            changed
        });
        self.applied.send_replace(index_of(self.last_applied));
    }
}

fn index_of(id: Option<LogId<u64>>) -> u64 {
    id.map_or(0, |id| id.index)
}

fn machine_of(data: &[u8]) -> Result<Machine, StoreError> {
    value_of("snapshot", data)
}

fn load(store: &Store) -> Result<Option<(Meta, Vec<u8>)>, StoreError> {
    store.read(|transaction| {
        let table = transaction.open_table(META)?;
        match (table.get("snapshot_meta")?, table.get("snapshot")?) {
            (Some(meta), Some(data)) => {
                let meta = value_of("snapshot_meta", meta.value())?;
                Ok(Some((meta, data.value().to_vec())))
            }
            _ => Ok(None),
        }
    })
}

fn save(store: &Store, meta: &Meta, data: &[u8]) -> Result<(), StoreError> {
    let meta = bytes_of("snapshot_meta", meta)?;
    store.write(|transaction| {
        let mut table = transaction.open_table(META)?;
        table.insert("snapshot_meta", meta.as_slice())?;
        table.insert("snapshot", data)?;
        Ok(())
    })
}

fn snapshot(meta: Meta, data: Vec<u8>) -> Snapshot<TypeConfig> {
    Snapshot {
        meta,
        snapshot: Box::new(Cursor::new(data)),
    }
}

impl RaftSnapshotBuilder<TypeConfig> for SnapshotBuilder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<TypeConfig>, StorageError<u64>> {
        let (machine, meta) = (self.machine.clone(), self.meta.clone());
        let work = move |store: &Store| {
            let data = bytes_of("snapshot", &machine)?;
            save(store, &meta, &data)?;
            Ok(snapshot(meta, data))
        };
        on_disk(
            &self.store,
            ErrorSubject::Snapshot(None),
            ErrorVerb::Write,
            work,
        )
        .await
    }
}

impl RaftStateMachine<TypeConfig> for StateMachine {
    type SnapshotBuilder = SnapshotBuilder;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId<u64>>, StoredMembership<u64, BasicNode>), StorageError<u64>> {
        Ok((self.last_applied, self.membership.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Applied>, StorageError<u64>>
    where
        I: IntoIterator<Item = Entry<TypeConfig>> + Send,
        I::IntoIter: Send,
    {
        let applied = entries
            .into_iter()
            .map(|entry| self.execute(entry))
            .collect();
        self.publish();
        Ok(applied)
    }

    async fn get_snapshot_builder(&mut self) -> SnapshotBuilder {
        let meta = SnapshotMeta {
            last_log_id: self.last_applied,
            last_membership: self.membership.clone(),
            snapshot_id: self
                .last_applied
                .map_or_else(|| "empty".to_owned(), |id| id.to_string()),
        };
        SnapshotBuilder {
            store: Arc::clone(&self.store),
            machine: self.machine.clone(),
            meta,
        }
    }

    async fn begin_receiving_snapshot(
        &mut self,
    ) -> Result<Box<Cursor<Vec<u8>>>, StorageError<u64>> {
        Ok(Box::new(Cursor::new(Vec::new())))
    }

    async fn install_snapshot(
        &mut self,
        meta: &Meta,
        received: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError<u64>> {
        let (data, saved) = (received.into_inner(), meta.clone());
        let work = move |store: &Store| {
            let machine = machine_of(&data)?;
            save(store, &saved, &data)?;
            Ok(machine)
        };
        let subject = ErrorSubject::Snapshot(Some(meta.signature()));
        self.machine = on_disk(&self.store, subject, ErrorVerb::Write, work).await?;
        self.last_applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.publish();
        Ok(())
    }

    async fn get_current_snapshot(
        &mut self,
    ) -> Result<Option<Snapshot<TypeConfig>>, StorageError<u64>> {
        let saved = on_disk(
            &self.store,
            ErrorSubject::Snapshot(None),
            ErrorVerb::Read,
            load,
        );
        Ok(saved.await?.map(|(meta, data)| snapshot(meta, data)))
    }
}
