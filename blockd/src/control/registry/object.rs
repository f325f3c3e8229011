//! The objects of the registry and the keys under which they lie.

use super::lease::{LeaseRecord, LeaseState};
use super::lineage::{OriginRecord, RollbackRecord};
use super::moves::{MovePhase, MoveRecord};
use super::name::{NameError, check_name};
use super::networks::{AddressRecord, NetworkRecord, SubnetworkRecord};
use super::nodes::DrainRecord;
use super::routes::{self, RouteError, RouteRun};
use super::scrub::ScrubRecord;
use super::settings::VolumeSettings;
use super::transaction::Refusal;
use crate::control::network::Prefix;
use crate::control::schedule::ScheduleProgress;
use crate::id::{Epoch, NodeNo, SnapshotId, TicketId, VolumeId, page_count};
use crate::limits::{
    PAGE_BLOCKS_MAX, REGISTRY_TEXT_BYTES_MAX, ROUTE_RUNS_MAX, VOLUME_OWNERS_MAX, VOLUME_PAGES_MAX,
};
use core::net::SocketAddr;
use serde::{Deserialize, Serialize};
use std::fmt;

/// A 128-bit number that is the same nowhere else; text and serialised form are 32 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UniqueId(pub u128);

impl fmt::Display for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UniqueId({self})")
    }
}

impl From<UniqueId> for String {
    fn from(id: UniqueId) -> String {
        id.to_string()
    }
}

impl TryFrom<String> for UniqueId {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, NameError> {
        let digits = text.len() == 32 && text.bytes().all(|b| b.is_ascii_hexdigit());
        let value = u128::from_str_radix(&text, 16).ok().filter(|_| digits);
        value.map(UniqueId).ok_or(NameError::UniqueId)
    }
}

/// Name of an object in the registry.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub enum Key {
    /// The one cluster.
    Cluster,
    /// A node by its number.
    Node(NodeNo),
    /// A volume by its id.
    Volume(VolumeId),
    /// The volume that has this name.
    VolumeName(String),
    /// A snapshot by its id.
    Snapshot(VolumeId, SnapshotId),
    /// The snapshot of the volume that has this name.
    SnapshotName(VolumeId, String),
    /// The exclusive writer lease of a volume.
    Lease(VolumeId),
    /// What the operator of a volume chose.
    VolumeSettings(VolumeId),
    /// The last scrub of a volume.
    Scrub(VolumeId),
    /// What its scheduled snapshots have come to.
    Schedule(VolumeId),
    /// The moves of the pages of a volume.
    Move(VolumeId),
    /// The wish that a node own nothing.
    Drain(NodeNo),
    /// There while the snapshot is protected from being deleted.
    Protected(VolumeId, SnapshotId),
    /// There while the snapshot, or with id 0 the volume itself, is off-line (S001-06).
    Offline(VolumeId, SnapshotId),
    /// The last rollback of a volume.
    Rollback(VolumeId),
    /// What a clone was made of, as long as it needs that.
    Origin(VolumeId),
    /// An address of a node.
    Address(SocketAddr),
    /// A subnetwork by its prefix.
    Subnetwork(Prefix),
    /// A network by its name.
    Network(String),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Cluster => f.write_str("cluster"),
            Key::Node(number) => write!(f, "node {number}"),
            Key::Volume(id) => write!(f, "volume {id}"),
            Key::VolumeName(name) => write!(f, "volume name {name}"),
            Key::Snapshot(volume, id) => write!(f, "snapshot {id} of volume {volume}"),
            Key::SnapshotName(volume, name) => {
                write!(f, "snapshot name {name} of volume {volume}")
            }
            Key::Lease(volume) => write!(f, "lease of volume {volume}"),
            Key::VolumeSettings(volume) => write!(f, "settings of volume {volume}"),
            Key::Scrub(volume) => write!(f, "scrub of volume {volume}"),
            Key::Schedule(volume) => write!(f, "schedule of volume {volume}"),
            Key::Move(volume) => write!(f, "page move of volume {volume}"),
            Key::Drain(node) => write!(f, "drain of node {node}"),
            Key::Protected(volume, id) => {
                write!(f, "protection of snapshot {id} of volume {volume}")
            }
            Key::Offline(volume, id) => {
                write!(f, "off-line mark of snapshot {id} of volume {volume}")
            }
            Key::Rollback(volume) => write!(f, "rollback of volume {volume}"),
            Key::Origin(volume) => write!(f, "origin of volume {volume}"),
            Key::Address(address) => write!(f, "address {address}"),
            Key::Subnetwork(prefix) => write!(f, "subnetwork {prefix}"),
            Key::Network(name) => write!(f, "network {name}"),
        }
    }
}

/// What lies under a key. The variant has to fit the key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Object {
    /// Under [`Key::Cluster`].
    Cluster(ClusterRecord),
    /// Under [`Key::Node`].
    Node(NodeRecord),
    /// Under [`Key::Volume`].
    Volume(VolumeRecord),
    /// Under [`Key::VolumeName`].
    VolumeName(VolumeId),
    /// Under [`Key::Snapshot`].
    Snapshot(SnapshotRecord),
    /// Under [`Key::SnapshotName`].
    SnapshotName(SnapshotId),
    /// Under [`Key::Lease`].
    Lease(LeaseRecord),
    /// Under [`Key::VolumeSettings`].
    VolumeSettings(VolumeSettings),
    /// Under [`Key::Scrub`].
    Scrub(ScrubRecord),
    /// Under [`Key::Schedule`].
    Schedule(ScheduleProgress),
    /// Under [`Key::Move`].
    Move(MoveRecord),
    /// Under [`Key::Drain`].
    Drain(DrainRecord),
    /// Under [`Key::Protected`] and [`Key::Offline`].
    Mark(Mark),
    /// Under [`Key::Rollback`].
    Rollback(RollbackRecord),
    /// Under [`Key::Origin`].
    Origin(OriginRecord),
    /// Under [`Key::Address`].
    Address(AddressRecord),
    /// Under [`Key::Subnetwork`].
    Subnetwork(SubnetworkRecord),
    /// Under [`Key::Network`].
    Network(NetworkRecord),
}

/// Says by being there that something is so.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Mark {
    /// Milliseconds since 1970 at the command; shown, never compared.
    pub since_unix_ms: u64,
}

/// The cluster itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClusterRecord {
    /// Name that the operator gave.
    pub name: String,
    /// Tells this cluster from every other one.
    pub id: UniqueId,
    /// Id of the next volume; ids are never used again.
    pub next_volume: VolumeId,
}

/// A node: one daemon and its state directory.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Number in the cluster, from 1.
    pub number: NodeNo,
    /// Name that the operator gave.
    pub name: String,
    /// Tells this state directory from every other one.
    pub unique_id: UniqueId,
    /// `ip:port` for peers.
    pub peer_address: String,
    /// `ip:port` for NBD clients.
    pub nbd_address: String,
    /// Whether the node votes in the registry.
    pub registry_server: bool,
    /// Site: servers that share a resource pool.
    pub site: String,
}

/// A volume and its routing table.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeRecord {
    /// Id, never used again.
    pub id: VolumeId,
    /// Name that users know.
    pub name: String,
    /// Size in bytes.
    pub size_bytes: u64,
    /// Blocks of a page, a power of two.
    pub page_blocks: u32,
    /// Grows with every change of `routes` or of the size.
    pub epoch: Epoch,
    /// Owner of every page, in runs: sorted, without a gap, page 0 to the last one.
    pub routes: Vec<RouteRun>,
    /// Filesystem that was made on it, if known.
    pub format: Option<String>,
    /// Seconds since 1970 at creation; shown, never compared.
    pub created_unix_s: u64,
    /// Id of the next snapshot; from 1.
    pub next_snapshot: SnapshotId,
}

/// How far a snapshot is; only a committed one is shown to users (S003-35).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotState {
    /// The procedure runs; invisible.
    Pending,
    /// Visible and complete on every owner.
    Committed,
    /// Invisible; the owners are dropping their parts.
    Deleting,
}

/// A snapshot of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotRecord {
    /// The volume that it shows.
    pub volume: VolumeId,
    /// Id in that volume, from 1.
    pub id: SnapshotId,
    /// Name after the `@`.
    pub name: String,
    /// The run of the procedure that made it; volumes of one group share it.
    pub ticket: TicketId,
    /// Only `Committed` is visible.
    pub state: SnapshotState,
    /// Size of the volume at the snapshot, in bytes.
    pub size_bytes: u64,
    /// Epoch of the volume's routing table at the snapshot.
    pub epoch: Epoch,
    /// Milliseconds since 1970 at the command; shown, never compared.
    pub created_unix_ms: u64,
    /// Servers that hold a part of it, sorted.
    pub owners: Vec<NodeNo>,
}

impl VolumeRecord {
    /// Number of pages; the last one may be partly used.
    #[must_use]
    pub fn page_count(&self) -> u32 {
        pages(self.size_bytes, self.page_blocks).unwrap_or(0)
    }
}

/// Pages of a volume of this size.
///
/// # Errors
/// The page size or the number of pages is out of its limits.
pub(super) fn pages(size_bytes: u64, page_blocks: u32) -> Result<u32, RouteError> {
    if !page_blocks.is_power_of_two() || page_blocks > PAGE_BLOCKS_MAX {
        return Err(RouteError::PageBlocks(page_blocks));
    }
    let count = page_count(size_bytes, page_blocks);
    let small = u32::try_from(count)
        .ok()
        .filter(|n| (1..=VOLUME_PAGES_MAX).contains(n));
    small.ok_or(RouteError::PageCount(count))
}

impl Object {
    /// Checks that the object fits its key and is within its limits.
    ///
    /// # Errors
    /// What does not fit.
    pub(super) fn check(&self, key: &Key) -> Result<(), Refusal> {
        match (key, self) {
            (Key::Cluster, Object::Cluster(record)) => named(&record.name),
            (Key::Node(number), Object::Node(record)) if *number == record.number => {
                check_node(record)
            }
            (Key::Volume(id), Object::Volume(record)) if *id == record.id => check_volume(record),
            (Key::VolumeName(name), Object::VolumeName(_))
            | (Key::SnapshotName(_, name), Object::SnapshotName(_)) => named(name),
            (Key::Snapshot(volume, id), Object::Snapshot(record))
                if (*volume, *id) == (record.volume, record.id) =>
            {
                check_snapshot(record)
            }
            (Key::Lease(volume), Object::Lease(record)) if *volume == record.volume => {
                check_lease(record)
            }
            (Key::Scrub(volume), Object::Scrub(record)) if *volume == record.volume => {
                match record.paused_at.len() {
                    0..=VOLUME_OWNERS_MAX => Ok(()),
                    many => Err(Refusal::TooManyOwners(many)),
                }
            }
            (Key::VolumeSettings(volume), Object::VolumeSettings(record))
                if *volume == record.volume =>
            {
                Ok(())
            }
            (Key::Schedule(volume), Object::Schedule(progress)) if *volume == progress.volume => {
                Ok(())
            }
            (Key::Move(volume), Object::Move(record)) if *volume == record.volume => {
                check_move(record)
            }
            (Key::Drain(node), Object::Drain(record)) if *node == record.node => Ok(()),
            (Key::Protected(..) | Key::Offline(..), Object::Mark(_)) => Ok(()),
            (Key::Rollback(id), Object::Rollback(record)) if *id == record.volume => {
                check_owners(&record.owners)
            }
            (Key::Origin(id), Object::Origin(record)) if *id == record.volume => {
                check_owners(&record.owners)
            }
            (Key::Address(address), Object::Address(record)) if *address == record.address => {
                match record.node {
                    NodeNo(0) => Err(Refusal::NodeZero),
                    _ => Ok(()),
                }
            }
            (Key::Subnetwork(prefix), Object::Subnetwork(record)) if *prefix == record.prefix => {
                named(&record.name)?;
                named(&record.network)
            }
            (Key::Network(name), Object::Network(record)) if *name == record.name => named(name),
            _ => Err(Refusal::WrongObject(key.clone())),
        }
    }
}

fn named(name: &str) -> Result<(), Refusal> {
    Ok(check_name(name)?)
}

fn text(field: &'static str, text: &str) -> Result<(), Refusal> {
    if text.len() > REGISTRY_TEXT_BYTES_MAX {
        return Err(Refusal::TextTooLong(field.to_owned()));
    }
    Ok(())
}

fn check_node(record: &NodeRecord) -> Result<(), Refusal> {
    if record.number == NodeNo(0) {
        return Err(Refusal::NodeZero);
    }
    named(&record.name)?;
    text("peer_address", &record.peer_address)?;
    text("nbd_address", &record.nbd_address)?;
    text("site", &record.site)
}

fn check_volume(record: &VolumeRecord) -> Result<(), Refusal> {
    named(&record.name)?;
    text("format", record.format.as_deref().unwrap_or(""))?;
    routes::check(
        &record.routes,
        pages(record.size_bytes, record.page_blocks)?,
    )?;
    Ok(())
}

fn check_lease(record: &LeaseRecord) -> Result<(), Refusal> {
    let (LeaseState::Held(holder) | LeaseState::Closed(holder, _)) = &record.state else {
        return Ok(());
    };
    text("host", &holder.host)?;
    text("purpose", &holder.purpose)
}

fn check_move(record: &MoveRecord) -> Result<(), Refusal> {
    if record.left.len() > ROUTE_RUNS_MAX {
        return Err(RouteError::TooManyRuns(record.left.len()).into());
    }
    if let MovePhase::Failed(why) = &record.phase {
        text("failure", why)?;
    }
    text("reason", &record.reason)
}

fn check_snapshot(record: &SnapshotRecord) -> Result<(), Refusal> {
    check_owners(&record.owners)?;
    named(&record.name)
}

fn check_owners(owners: &[NodeNo]) -> Result<(), Refusal> {
    match owners.len() {
        0..=VOLUME_OWNERS_MAX => Ok(()),
        more => Err(Refusal::TooManyOwners(more)),
    }
}
