//! The state of the registry: what the transactions so far have made.

use super::lease::LeaseRecord;
use super::moves::MoveRecord;
use super::nodes::DrainRecord;
use super::object::{ClusterRecord, Key, NodeRecord, Object, SnapshotRecord, VolumeRecord};
use super::transaction::{Outcome, Refusal, Transaction};
use crate::id::{NodeNo, Revision, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;

/// All objects, each with the revision that last changed it. Cloning shares the objects.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct RegistryState {
    revision: Revision,
    objects: BTreeMap<Key, (Revision, Arc<Object>)>,
}

impl RegistryState {
    /// A state with these objects, all changed last at this revision.
    #[must_use]
    pub fn restored(revision: Revision, objects: BTreeMap<Key, Object>) -> Self {
        let objects = objects
            .into_iter()
            .map(|(key, object)| (key, (revision, Arc::new(object))));
        Self {
            revision,
            objects: objects.collect(),
        }
    }

    /// The last revision; counts the transactions that changed something.
    #[must_use]
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// Executes a transaction. The same state and transaction give the same result everywhere.
    ///
    /// # Errors
    /// The transaction is malformed; the state is as before.
    pub fn apply(&mut self, transaction: &Transaction) -> Result<Outcome, Refusal> {
        transaction.check()?;
        if let Some((key, found)) = self.first_conflict(transaction) {
            return Ok(Outcome::Conflict { key, found });
        }
        if !transaction.changes.is_empty() {
            self.revision = Revision(self.revision.0 + 1);
        }
        for (key, object) in &transaction.changes {
            match object {
                Some(object) => {
                    let entry = (self.revision, Arc::new(object.clone()));
                    self.objects.insert(key.clone(), entry);
                }
                None => drop(self.objects.remove(key)),
            }
        }
        Ok(Outcome::Committed(self.revision))
    }

    fn first_conflict(&self, transaction: &Transaction) -> Option<(Key, Revision)> {
        let found = |key: &Key| (key.clone(), self.revision_of(key));
        let wrong = transaction
            .expect
            .iter()
            .find(|(key, want)| self.revision_of(key) != *want);
        wrong.map(|(key, _)| found(key))
    }

    /// The revision that last changed the object; 0 if there is none.
    #[must_use]
    pub fn revision_of(&self, key: &Key) -> Revision {
        self.objects
            .get(key)
            .map_or(Revision(0), |(revision, _)| *revision)
    }

    /// The object under a key.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<&Object> {
        self.objects.get(key).map(|(_, object)| &**object)
    }

    /// Every object with its key and revision, in the order of the keys.
    pub fn objects(&self) -> impl Iterator<Item = (&Key, Revision, &Object)> {
        self.objects
            .iter()
            .map(|(key, (revision, object))| (key, *revision, &**object))
    }

    pub(super) fn range(
        &self,
        keys: std::ops::RangeInclusive<Key>,
    ) -> impl Iterator<Item = &Object> {
        self.objects.range(keys).map(|(_, (_, object))| &**object)
    }

    /// Objects from a key on.
    pub(super) fn objects_from(&self, key: Key) -> impl Iterator<Item = (&Key, &Object)> {
        let from = self.objects.range(key..);
        from.map(|(key, (_, object))| (key, &**object))
    }

    /// The cluster, once it is defined.
    #[must_use]
    pub fn cluster(&self) -> Option<&ClusterRecord> {
        match self.get(&Key::Cluster)? {
            Object::Cluster(record) => Some(record),
            _ => None,
        }
    }

    /// Nodes by number.
    pub fn nodes(&self) -> impl Iterator<Item = &NodeRecord> {
        let all = Key::Node(NodeNo(0))..=Key::Node(NodeNo(u16::MAX));
        self.objects
            .range(all)
            .filter_map(|(_, (_, object))| match &**object {
                Object::Node(record) => Some(record),
                _ => None,
            })
    }

    /// A node by its number.
    #[must_use]
    pub fn node(&self, number: NodeNo) -> Option<&NodeRecord> {
        match self.get(&Key::Node(number))? {
            Object::Node(record) => Some(record),
            _ => None,
        }
    }

    /// Volumes by id.
    pub fn volumes(&self) -> impl Iterator<Item = &VolumeRecord> {
        let all = Key::Volume(VolumeId(0))..=Key::Volume(VolumeId(u64::MAX));
        self.objects
            .range(all)
            .filter_map(|(_, (_, object))| match &**object {
                Object::Volume(record) => Some(record),
                _ => None,
            })
    }

    /// A volume by its id.
    #[must_use]
    pub fn volume(&self, id: VolumeId) -> Option<&VolumeRecord> {
        match self.get(&Key::Volume(id))? {
            Object::Volume(record) => Some(record),
            _ => None,
        }
    }

    /// A volume by its name.
    #[must_use]
    pub fn volume_by_name(&self, name: &str) -> Option<&VolumeRecord> {
        match self.get(&Key::VolumeName(name.to_owned()))? {
            Object::VolumeName(id) => self.volume(*id),
            _ => None,
        }
    }

    /// Leases by volume, in every state; of volumes that were ever leased.
    pub fn leases(&self) -> impl Iterator<Item = &LeaseRecord> {
        let all = Key::Lease(VolumeId(0))..=Key::Lease(VolumeId(u64::MAX));
        self.objects
            .range(all)
            .filter_map(|(_, (_, object))| match &**object {
                Object::Lease(record) => Some(record),
                _ => None,
            })
    }

    /// The moves of the pages of a volume, under way or ended.
    #[must_use]
    pub fn page_move(&self, volume: VolumeId) -> Option<&MoveRecord> {
        match self.get(&Key::Move(volume))? {
            Object::Move(record) => Some(record),
            _ => None,
        }
    }

    /// Moves by volume.
    pub fn page_moves(&self) -> impl Iterator<Item = &MoveRecord> {
        let all = Key::Move(VolumeId(0))..=Key::Move(VolumeId(u64::MAX));
        self.objects
            .range(all)
            .filter_map(|(_, (_, object))| match &**object {
                Object::Move(record) => Some(record),
                _ => None,
            })
    }

    /// The wish that a node own nothing, if there is one.
    #[must_use]
    pub fn drain(&self, node: NodeNo) -> Option<&DrainRecord> {
        match self.get(&Key::Drain(node))? {
            Object::Drain(record) => Some(record),
            _ => None,
        }
    }

    /// Snapshots of a volume by id, in every state; users see only the committed ones.
    pub fn snapshots(&self, volume: VolumeId) -> impl Iterator<Item = &SnapshotRecord> {
        let all =
            Key::Snapshot(volume, SnapshotId(0))..=Key::Snapshot(volume, SnapshotId(u32::MAX));
        self.objects
            .range(all)
            .filter_map(|(_, (_, object))| match &**object {
                Object::Snapshot(record) => Some(record),
                _ => None,
            })
    }

    /// A snapshot by its id, in every state.
    #[must_use]
    pub fn snapshot(&self, volume: VolumeId, id: SnapshotId) -> Option<&SnapshotRecord> {
        match self.get(&Key::Snapshot(volume, id))? {
            Object::Snapshot(record) => Some(record),
            _ => None,
        }
    }

    /// A snapshot by its name, in every state.
    #[must_use]
    pub fn snapshot_by_name(&self, volume: VolumeId, name: &str) -> Option<&SnapshotRecord> {
        match self.get(&Key::SnapshotName(volume, name.to_owned()))? {
            Object::SnapshotName(id) => self.snapshot(volume, *id),
            _ => None,
        }
    }
}
