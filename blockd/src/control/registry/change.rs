//! The changes that the product makes, as transactions built from the state they were read from.
//! Each expects what it read, so that a change in between is a conflict.

use super::lease::check_not_held;
use super::name::{NameError, check_name};
use super::object::{
    ClusterRecord, Key, NodeRecord, Object, SnapshotRecord, SnapshotState, UniqueId, VolumeRecord,
    pages,
};
use super::routes::{self, RouteError};
use super::state::RegistryState;
use super::transaction::Transaction;
use crate::control::network::Service;
use crate::id::{Epoch, LeaseEpoch, NodeNo, SnapshotId, TicketId, VolumeId};
use core::net::SocketAddr;

/// Why a change is not possible in this state.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ChangeError {
    /// The cluster is not defined yet.
    #[error("there is no cluster yet: define it first")]
    NoCluster,
    /// The cluster is defined already; carries its name.
    #[error("this is cluster {0} already")]
    ClusterExists(String),
    /// A node with this number, name or peer address is there.
    #[error("node number {0} is taken by another node")]
    NodeTaken(NodeNo),
    /// No such node.
    #[error("there is no node {0}")]
    NoNode(NodeNo),
    /// A volume of this name is there.
    #[error("volume {0} exists already")]
    VolumeExists(String),
    /// No such volume.
    #[error("there is no volume {0}")]
    NoVolume(VolumeId),
    /// Snapshots are left.
    #[error("volume {0} has snapshots: delete them first")]
    HasSnapshots(String),
    /// A snapshot of this name is there.
    #[error("snapshot {0}@{1} exists already")]
    SnapshotExists(String, String),
    /// The snapshot is protected; names of volume and snapshot.
    #[error("snapshot {0}@{1} is protected: `blockctl snapshot unprotect {0}@{1}` first")]
    Protected(String, String),
    /// Clones depend on the snapshot; names of volume, snapshot and clones.
    #[error(
        "snapshot {0}@{1} has clones ({2}): make them independent with `blockctl volume flatten`, \
         or delete them first"
    )]
    HasClones(String, String, String),
    /// The volume depends on no snapshot.
    #[error("volume {0} is no clone, or not any more")]
    NoClone(VolumeId),
    /// Clones of clones up to the limit; the name of the last one.
    #[error("volume {0} is a clone of clones already: `blockctl volume flatten {0}` first")]
    TooDeep(String),
    /// Names of a volume and its snapshot, and a server that owns pages and was not asked then.
    #[error("node {2} owns pages of volume {0}, but took no part in snapshot {0}@{1}")]
    NotInSnapshot(String, String, NodeNo),
    /// No such snapshot.
    #[error("volume {0} has no snapshot {1}")]
    NoSnapshot(VolumeId, SnapshotId),
    /// The snapshot is in another state than the change needs.
    #[error("snapshot {1} of volume {0} is {2:?}")]
    SnapshotState(VolumeId, SnapshotId, SnapshotState),
    /// The routing table changed since the prepare (S003-34).
    #[error("volume {0} changed to epoch {1} during the snapshot: try again")]
    EpochChanged(VolumeId, Epoch),
    /// Another one holds the exclusive lease of the volume; carries names of both.
    #[error("volume {0} is leased exclusively to {1}")]
    Leased(String, String),
    /// The lease is not held, or is in another state, at this epoch.
    #[error("the lease of volume {0} has moved on from epoch {1}")]
    LeaseNotHeld(VolumeId, LeaseEpoch),
    /// Another move of the volume's pages is under way; carries what asked for it.
    #[error(
        "pages of volume {0} are being moved already ({1}): wait for it, or `blockctl move cancel {0}`"
    )]
    Moving(String, String),
    /// No move is under way.
    #[error("no pages of volume {0} are being moved")]
    NoMove(String),
    /// All pages are where they are wanted.
    #[error("nothing to move: the pages of volume {0} are there already")]
    NothingToMove(String),
    /// The move is at another step by now.
    #[error("the move of pages of volume {0} has gone on")]
    MoveWentOn(String),
    /// The node shall own nothing.
    #[error("node {0} is drained: `blockctl node undrain {0}` lets it own pages again")]
    Drained(NodeNo),
    /// The node may own pages.
    #[error("node {0} is not drained: `blockctl node drain {0}` first")]
    NotDrained(NodeNo),
    /// The node has something of a volume, or gets it; carries the name.
    #[error(
        "node {0} has pages or snapshots of volume {1}, or pages are on their way to it: wait for \
         `blockctl node drain {0}`"
    )]
    Owns(NodeNo, String),
    /// Every other node is drained.
    #[error("node {0} is the last one that may own pages: define another one first")]
    LastNode(NodeNo),
    /// The address belongs to another node.
    #[error("address {0} is one of node {1}: give each node addresses of its own")]
    AddressTaken(SocketAddr, NodeNo),
    /// A network of this name is there.
    #[error("network {0} exists already")]
    NetworkExists(String),
    /// No such network.
    #[error("there is no network {0}: `blockctl network define {0}` makes it")]
    NoNetwork(String),
    /// Subnetworks are mapped to the network; names of both.
    #[error("network {0} has subnetwork {1}: `blockctl subnet modify {1} --network OTHER` first")]
    NetworkInUse(String, String),
    /// A subnetwork with this prefix or name is there.
    #[error("subnetwork {0} exists already")]
    SubnetworkExists(String),
    /// No such subnetwork.
    #[error("there is no subnetwork {0}: give its name or prefix, see `blockctl network tree`")]
    NoSubnetwork(String),
    /// A node has an address in the subnetwork.
    #[error("subnetwork {0} has address {1} of node {2}")]
    SubnetworkInUse(String, SocketAddr, NodeNo),
    /// The service would be kept off every address of a node.
    #[error("node {0} would have no address left for {1}: leave it one network")]
    CutOff(NodeNo, Service),
    /// All ids of a kind are used.
    #[error("no number is left for a new {0}")]
    NumbersUsedUp(&'static str),
    /// A name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A size or a list of servers.
    #[error(transparent)]
    Route(#[from] RouteError),
}

/// What a new volume shall be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeSpec {
    /// Name, not in use.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Blocks of a page, a power of two.
    pub page_blocks: u32,
    /// Servers that get the pages, each once.
    pub servers: Vec<NodeNo>,
    /// Filesystem that will be made on it, if any.
    pub format: Option<String>,
    /// Seconds since 1970, shown to users.
    pub created_unix_s: u64,
}

/// Defines the cluster, once.
///
/// # Errors
/// It is defined, or the name is bad.
pub fn define_cluster(
    state: &RegistryState,
    name: &str,
    id: UniqueId,
) -> Result<Transaction, ChangeError> {
    if let Some(cluster) = state.cluster() {
        return Err(ChangeError::ClusterExists(cluster.name.clone()));
    }
    check_name(name)?;
    let cluster = ClusterRecord {
        name: name.to_owned(),
        id,
        next_volume: VolumeId(1),
    };
    Ok(reading(state, &[Key::Cluster]).put(Key::Cluster, Object::Cluster(cluster)))
}

/// Defines a node, or changes the addresses of the one with the same number and unique id.
///
/// # Errors
/// Another node has the number, or the name is bad.
pub fn define_node(state: &RegistryState, node: NodeRecord) -> Result<Transaction, ChangeError> {
    check_name(&node.name)?;
    let other = |n: &NodeRecord| {
        (n.number == node.number) != (n.unique_id == node.unique_id)
            || (n.number != node.number && n.name == node.name)
    };
    if let Some(other) = state.nodes().find(|n| other(n)) {
        return Err(ChangeError::NodeTaken(other.number));
    }
    let key = Key::Node(node.number);
    Ok(reading(state, &[Key::Cluster, key.clone()]).put(key, Object::Node(node)))
}

/// Creates a volume and gives its record.
///
/// # Errors
/// The name is taken or bad, a server is no node, or the size is out of its limits.
pub fn create_volume(
    state: &RegistryState,
    spec: &VolumeSpec,
) -> Result<(Transaction, VolumeRecord), ChangeError> {
    check_name(&spec.name)?;
    let mut cluster = state.cluster().ok_or(ChangeError::NoCluster)?.clone();
    if state.volume_by_name(&spec.name).is_some() {
        return Err(ChangeError::VolumeExists(spec.name.clone()));
    }
    let volume = new_volume(state, spec, cluster.next_volume)?;
    let next = cluster.next_volume.0.checked_add(1);
    cluster.next_volume = VolumeId(next.ok_or(ChangeError::NumbersUsedUp("volume"))?);
    let name = Key::VolumeName(spec.name.clone());
    let transaction = reading(state, &[Key::Cluster, name.clone()])
        .put(Key::Cluster, Object::Cluster(cluster))
        .put(name, Object::VolumeName(volume.id))
        .put(Key::Volume(volume.id), Object::Volume(volume.clone()));
    Ok((transaction, volume))
}

fn new_volume(
    state: &RegistryState,
    spec: &VolumeSpec,
    id: VolumeId,
) -> Result<VolumeRecord, ChangeError> {
    known(state, &spec.servers)?;
    let page_count = pages(spec.size_bytes, spec.page_blocks)?;
    Ok(VolumeRecord {
        id,
        name: spec.name.clone(),
        size_bytes: spec.size_bytes,
        page_blocks: spec.page_blocks,
        epoch: Epoch(1),
        routes: routes::spread(page_count, &spec.servers, id.0)?,
        format: spec.format.clone(),
        created_unix_s: spec.created_unix_s,
        next_snapshot: SnapshotId(1),
    })
}

/// Gives a volume another name.
///
/// # Errors
/// There is no such volume, or the name is taken or bad.
pub fn rename_volume(
    state: &RegistryState,
    id: VolumeId,
    name: &str,
) -> Result<Transaction, ChangeError> {
    check_name(name)?;
    let volume = state.volume(id).ok_or(ChangeError::NoVolume(id))?;
    if state.volume_by_name(name).is_some() {
        return Err(ChangeError::VolumeExists(name.to_owned()));
    }
    let old = Key::VolumeName(volume.name.clone());
    let new = Key::VolumeName(name.to_owned());
    let renamed = VolumeRecord {
        name: name.to_owned(),
        ..volume.clone()
    };
    Ok(reading(state, &[Key::Volume(id), old.clone(), new.clone()])
        .remove(old)
        .put(new, Object::VolumeName(id))
        .put(Key::Volume(id), Object::Volume(renamed)))
}

/// Changes the size; new pages are spread over `servers`, cut pages are gone. A new epoch.
///
/// # Errors
/// There is no such volume, the size or the servers are not possible, or pages would be cut from
/// under the holder of its lease.
pub fn resize_volume(
    state: &RegistryState,
    id: VolumeId,
    size_bytes: u64,
    servers: &[NodeNo],
) -> Result<(Transaction, VolumeRecord), ChangeError> {
    let mut volume = state.volume(id).ok_or(ChangeError::NoVolume(id))?.clone();
    if size_bytes < volume.size_bytes {
        check_not_held(state, id)?;
    }
    let (before, after) = (volume.page_count(), pages(size_bytes, volume.page_blocks)?);
    if after > before {
        known(state, servers)?;
        volume.routes = routes::extend(&volume.routes, after, servers)?;
    } else {
        volume.routes = routes::cut(&volume.routes, after);
    }
    volume.size_bytes = size_bytes;
    volume.epoch = next_epoch(volume.epoch)?;
    let transaction = reading(state, &[Key::Volume(id), Key::Lease(id)]);
    let object = Object::Volume(volume.clone());
    Ok((transaction.put(Key::Volume(id), object), volume))
}

/// Deletes a volume without snapshots, its lease, settings and schedule.
///
/// # Errors
/// There is no such volume, it has snapshots, or its lease is held.
pub fn delete_volume(state: &RegistryState, id: VolumeId) -> Result<Transaction, ChangeError> {
    let volume = state.volume(id).ok_or(ChangeError::NoVolume(id))?;
    if state.snapshots(id).next().is_some() {
        return Err(ChangeError::HasSnapshots(volume.name.clone()));
    }
    check_not_held(state, id)?;
    let keys = [
        Key::Volume(id),
        Key::VolumeName(volume.name.clone()),
        Key::Lease(id),
        Key::VolumeSettings(id),
        Key::Scrub(id),
        Key::Schedule(id),
        Key::Move(id),
        Key::Offline(id, SnapshotId(0)),
        Key::Rollback(id),
        Key::Origin(id),
    ];
    let transaction = reading(state, &keys);
    Ok(keys.into_iter().fold(transaction, Transaction::remove))
}

/// Begins a snapshot of each volume under one ticket: the records are pending, so invisible.
///
/// # Errors
/// A volume is not there, or a name is taken or bad.
pub fn begin_snapshots(
    state: &RegistryState,
    wanted: &[(VolumeId, String)],
    ticket: TicketId,
    created_unix_ms: u64,
) -> Result<(Transaction, Vec<SnapshotRecord>), ChangeError> {
    let mut transaction = Transaction::new();
    let mut records = Vec::new();
    for (id, name) in wanted {
        let record = new_snapshot(state, *id, name, ticket, created_unix_ms)?;
        transaction = with_snapshot(state, transaction, &record)?;
        records.push(record);
    }
    Ok((transaction, records))
}

fn new_snapshot(
    state: &RegistryState,
    id: VolumeId,
    name: &str,
    ticket: TicketId,
    created_unix_ms: u64,
) -> Result<SnapshotRecord, ChangeError> {
    check_name(name)?;
    let volume = state.volume(id).ok_or(ChangeError::NoVolume(id))?;
    if state.get(&Key::SnapshotName(id, name.to_owned())).is_some() {
        return Err(ChangeError::SnapshotExists(
            volume.name.clone(),
            name.to_owned(),
        ));
    }
    Ok(SnapshotRecord {
        volume: id,
        id: volume.next_snapshot,
        name: name.to_owned(),
        ticket,
        state: SnapshotState::Pending,
        size_bytes: volume.size_bytes,
        epoch: volume.epoch,
        created_unix_ms,
        owners: routes::owners(&volume.routes).into_keys().collect(),
    })
}

fn with_snapshot(
    state: &RegistryState,
    transaction: Transaction,
    record: &SnapshotRecord,
) -> Result<Transaction, ChangeError> {
    let volume = state
        .volume(record.volume)
        .ok_or(ChangeError::NoVolume(record.volume))?;
    let next = volume.next_snapshot.0.checked_add(1);
    let next = SnapshotId(next.ok_or(ChangeError::NumbersUsedUp("snapshot"))?);
    let volume = VolumeRecord {
        next_snapshot: next,
        ..volume.clone()
    };
    let [key, name, snapshot] = snapshot_keys(record);
    let transaction = expecting(
        state,
        transaction,
        &[key.clone(), name.clone(), snapshot.clone()],
    );
    Ok(transaction
        .put(key, Object::Volume(volume))
        .put(name, Object::SnapshotName(record.id))
        .put(snapshot, Object::Snapshot(record.clone())))
}

/// Makes the pending snapshots visible, all or none, if no routing table changed meanwhile.
///
/// # Errors
/// One is gone or not pending, or a volume has another epoch.
pub fn commit_snapshots(
    state: &RegistryState,
    begun: &[SnapshotRecord],
) -> Result<Transaction, ChangeError> {
    let mut transaction = Transaction::new();
    for record in begun {
        let now = in_state(state, record.volume, record.id, SnapshotState::Pending)?;
        let volume = state
            .volume(record.volume)
            .ok_or(ChangeError::NoVolume(record.volume))?;
        if volume.epoch != now.epoch {
            return Err(ChangeError::EpochChanged(volume.id, volume.epoch));
        }
        let [key, _, snapshot] = snapshot_keys(now);
        let committed = SnapshotRecord {
            state: SnapshotState::Committed,
            ..now.clone()
        };
        transaction = expecting(state, transaction, &[key, snapshot.clone()])
            .put(snapshot, Object::Snapshot(committed));
    }
    Ok(transaction)
}

/// Removes those of the snapshots that are still pending; empty if there are none.
#[must_use]
pub fn abort_snapshots(state: &RegistryState, begun: &[SnapshotRecord]) -> Transaction {
    let pending =
        |r: &&SnapshotRecord| in_state(state, r.volume, r.id, SnapshotState::Pending).is_ok();
    let keys = begun.iter().filter(pending).map(snapshot_keys);
    keys.fold(Transaction::new(), |transaction, [_, name, snapshot]| {
        expecting(state, transaction, std::slice::from_ref(&snapshot))
            .remove(snapshot)
            .remove(name)
    })
}

/// Hides a committed snapshot, so that its owners can drop their parts.
///
/// # Errors
/// It is not there, not committed, protected, or clones depend on it.
pub fn delete_snapshot(
    state: &RegistryState,
    volume: VolumeId,
    id: SnapshotId,
) -> Result<Transaction, ChangeError> {
    let record = in_state(state, volume, id, SnapshotState::Committed)?;
    let protected = Key::Protected(volume, id);
    let of = state.volume(volume).ok_or(ChangeError::NoVolume(volume))?;
    let names = || (of.name.clone(), record.name.clone());
    if state.get(&protected).is_some() {
        let (volume, name) = names();
        return Err(ChangeError::Protected(volume, name));
    }
    let clones = state.clones(volume, Some(id));
    if !clones.is_empty() {
        let (volume, name) = names();
        return Err(ChangeError::HasClones(volume, name, clones.join(", ")));
    }
    let [_, name, snapshot] = snapshot_keys(record);
    let deleting = SnapshotRecord {
        state: SnapshotState::Deleting,
        ..record.clone()
    };
    Ok(reading(state, &[snapshot.clone(), protected])
        .remove(name)
        .remove(Key::Offline(volume, id))
        .put(snapshot, Object::Snapshot(deleting)))
}

/// Removes the record of a snapshot whose parts are dropped everywhere.
///
/// # Errors
/// It is not there or not being deleted.
pub fn forget_snapshot(
    state: &RegistryState,
    volume: VolumeId,
    id: SnapshotId,
) -> Result<Transaction, ChangeError> {
    let record = in_state(state, volume, id, SnapshotState::Deleting)?;
    let [_, _, snapshot] = snapshot_keys(record);
    Ok(reading(state, std::slice::from_ref(&snapshot)).remove(snapshot))
}

pub(super) fn in_state(
    state: &RegistryState,
    volume: VolumeId,
    id: SnapshotId,
    want: SnapshotState,
) -> Result<&SnapshotRecord, ChangeError> {
    let record = state
        .snapshot(volume, id)
        .ok_or(ChangeError::NoSnapshot(volume, id))?;
    if record.state == want {
        Ok(record)
    } else {
        Err(ChangeError::SnapshotState(volume, id, record.state))
    }
}

pub(super) fn snapshot_keys(record: &SnapshotRecord) -> [Key; 3] {
    let name = Key::SnapshotName(record.volume, record.name.clone());
    [
        Key::Volume(record.volume),
        name,
        Key::Snapshot(record.volume, record.id),
    ]
}

fn known(state: &RegistryState, servers: &[NodeNo]) -> Result<(), ChangeError> {
    let unknown = servers.iter().find(|server| state.node(**server).is_none());
    if let Some(server) = unknown {
        return Err(ChangeError::NoNode(*server));
    }
    let drained = servers
        .iter()
        .find(|server| state.drain(**server).is_some());
    drained.map_or(Ok(()), |server| Err(ChangeError::Drained(*server)))
}

pub(super) fn next_epoch(epoch: Epoch) -> Result<Epoch, ChangeError> {
    epoch
        .0
        .checked_add(1)
        .map(Epoch)
        .ok_or(ChangeError::NumbersUsedUp("epoch"))
}

pub(super) fn reading(state: &RegistryState, keys: &[Key]) -> Transaction {
    expecting(state, Transaction::new(), keys)
}

pub(super) fn expecting(
    state: &RegistryState,
    transaction: Transaction,
    keys: &[Key],
) -> Transaction {
    keys.iter().fold(transaction, |t, key| {
        t.expect(key.clone(), state.revision_of(key))
    })
}
