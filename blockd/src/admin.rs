//! Administration: what `blockctl` asks of a server and what it answers.
//!
//! The values travel as postcard in the payload of an `admin` frame (see `io::wire`) and are
//! printed by `blockctl --json` as they are. Adding a variant at the end keeps older peers
//! readable; anything else takes a new protocol version. In JSON (`node::http`) a request is written
//! `{"volume_show": {"name": "data"}}`; postcard writes no names, so these and the defaults are JSON's alone.

mod effect;
pub mod json;

pub use effect::Effect;

use crate::control::network::{Prefix, Service};
use crate::control::registry::{
    AddressRecord, LeaseHolder, LeaseState, MovePhase, MoveWish, NetworkRecord, PriorityChange,
    ScrubRecord, SubnetworkRecord,
};
use crate::control::snapshot::Procedure;
use crate::data::page_store::DamagedRange;
use crate::id::{
    DEFAULT_PAGE_BLOCKS, Epoch, LeaseEpoch, NodeNo, Revision, RouteRun, ScrubPosition, SnapshotId,
    TicketId, VolumeId,
};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// A request to any server of the group; each is carried out by the server that receives it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum AdminRequest {
    /// Makes this server, which belongs to no cluster, the first node of a new cluster.
    ClusterDefine {
        name: String,
    },
    ClusterStatus,
    /// Defines the server at `address` (peer address) as a node, and brings it online if asked.
    NodeDefine {
        address: String,
        name: Option<String>,
        #[serde(default)]
        online: bool,
    },
    NodeList,
    VolumeCreate(VolumeCreate),
    VolumeList,
    VolumeShow {
        name: String,
    },
    VolumeResize {
        name: String,
        size_bytes: u64,
        #[serde(default)]
        allow_shrink: bool,
    },
    VolumeRename {
        name: String,
        new_name: String,
    },
    VolumeDelete {
        name: String,
    },
    /// One point in time over all targets (S003-29).
    SnapshotCreate {
        targets: Vec<SnapshotName>,
    },
    SnapshotList {
        volume: Option<String>,
    },
    SnapshotDelete {
        target: SnapshotName,
    },
    RouteShow {
        volume: String,
    },
    Version,
    /// What a client needs to open `VOL` or `VOL@SNAP` and go straight to the owners.
    Open {
        volume: String,
        snapshot: Option<String>,
    },
    /// Who the server is, whether it belongs to a cluster or not.
    Identify,
    /// Sent by the server that defines a node to the server that is to become it.
    Join(JoinOffer),
    /// Leases that are held, or closed and not yet open to everybody.
    LeaseList,
    LeaseShow {
        volume: String,
    },
    /// Makes `holder` the only writer of the volume; may be repeated with the same holder id.
    LeaseAcquire {
        volume: VolumeId,
        holder: LeaseHolder,
    },
    /// Says that the holder of this epoch lives.
    LeaseRenew {
        volume: VolumeId,
        epoch: LeaseEpoch,
    },
    LeaseRelease {
        volume: VolumeId,
        epoch: LeaseEpoch,
    },
    /// Takes the lease from whoever holds it.
    LeaseBreak {
        volume: String,
    },
    /// Changes one setting of a volume; a value as `volume set` takes it.
    VolumeSet {
        name: String,
        key: String,
        value: String,
    },
    VolumeGet {
        name: String,
    },
    /// Verifies what one node stores of a volume, from a position on, for about a second.
    ScrubStep {
        volume: VolumeId,
        node: NodeNo,
        from: ScrubPosition,
        /// Bytes a second that the node reads at the most.
        rate_bytes: u64,
    },
    /// Keeps what a scrub came to, to be shown.
    ScrubKeep(ScrubRecord),
    ScrubShow {
        volume: String,
    },
    /// As `SnapshotCreate`, by this procedure (S003-45).
    SnapshotCreateBy {
        targets: Vec<SnapshotName>,
        procedure: Procedure,
    },
    /// What keeps requests waiting on all servers.
    HoldList,
    /// Moves pages of a volume to a node; answers the move as it begins.
    PageMove {
        volume: String,
        /// First page and number of pages; `None`: all.
        pages: Option<(u32, u32)>,
        to: NodeNo,
        /// Bytes a second, at the most; 0: by what clients leave.
        #[serde(default)]
        rate_bytes: u64,
    },
    /// Evens space, then load, over the nodes; `None`: all volumes. Answers the moves that it takes.
    VolumeRebalance {
        volume: Option<String>,
        #[serde(default)]
        rate_bytes: u64,
    },
    /// Moves under way and, of each volume, the last one that ended.
    MoveList {
        volume: Option<String>,
    },
    MoveWish {
        volume: String,
        wish: MoveWish,
    },
    /// Moves all pages away from a node and gives it none any more, or ends that.
    NodeDrain {
        node: NodeNo,
        drain: bool,
        #[serde(default)]
        rate_bytes: u64,
    },
    /// What nodes are to own nothing and how far that is.
    DrainList,
    /// Verifiers under which nodes gave pages of a volume away; for clients.
    MoveGiven {
        volume: VolumeId,
    },
    /// As `VolumeShow`, with what belongs to snapshots and clones.
    VolumeDetails {
        name: String,
    },
    /// As `SnapshotList`, with what may keep a snapshot from being deleted or opened.
    SnapshotDetails {
        volume: Option<String>,
    },
    SnapshotRename {
        target: SnapshotName,
        new_name: String,
    },
    SnapshotProtect {
        target: SnapshotName,
        protected: bool,
    },
    /// Takes `VOL` or `VOL@SNAP` off-line, or brings it back (S001-06).
    SetOffline {
        target: String,
        offline: bool,
    },
    /// Makes the volume what the snapshot is; a snapshot of what it was is taken first.
    SnapshotRollback {
        target: SnapshotName,
    },
    VolumeClone(VolumeClone),
    /// Makes a clone independent of its parent; repeated until the reply names no origin.
    VolumeFlatten {
        name: String,
    },
    /// Takes a drained node that is gone for good out of the cluster.
    NodeForget {
        node: NodeNo,
    },
    /// Networks, subnetworks and addresses of nodes (S004-103).
    NetworkList,
    NetworkDefine {
        name: String,
        priorities: Vec<PriorityChange>,
    },
    NetworkModify {
        name: String,
        new_name: Option<String>,
        priorities: Vec<PriorityChange>,
    },
    NetworkUndefine {
        name: String,
    },
    SubnetworkDefine {
        prefix: Prefix,
        name: Option<String>,
        network: String,
    },
    SubnetworkModify {
        /// Name or prefix.
        subnetwork: String,
        new_name: Option<String>,
        network: Option<String>,
    },
    SubnetworkUndefine {
        subnetwork: String,
    },
    /// In which order nodes try the addresses of the others for a service (S004-110).
    ServiceOrder {
        service: Service,
    },
}

/// `VOL@SNAP`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotName {
    pub volume: String,
    pub snapshot: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeCreate {
    pub name: String,
    pub size_bytes: u64,
    /// Empty means every node of the cluster.
    #[serde(default)]
    pub servers: Vec<NodeNo>,
    /// A power of two from 1 to 2^20 (S003-02).
    #[serde(default = "default_page_blocks")]
    pub page_blocks: u32,
    /// The filesystem that `blockctl` will make on it; recorded, not made, by the server.
    pub format: Option<String>,
}

fn default_page_blocks() -> u32 {
    DEFAULT_PAGE_BLOCKS
}

/// The identity that a joining server takes on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinOffer {
    pub cluster_name: String,
    pub cluster_id: String,
    pub number: NodeNo,
    pub name: String,
    /// The address under which the others reach the joining server.
    pub address: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminReply {
    Done,
    Cluster(ClusterStatus),
    Node(NodeInfo),
    Nodes(Vec<NodeInfo>),
    Volume(VolumeInfo),
    Volumes(Vec<VolumeInfo>),
    Snapshots(Vec<SnapshotInfo>),
    Route(RouteInfo),
    Version(VersionInfo),
    Open(OpenInfo),
    Identity(Identity),
    /// The request was understood and refused, with the reason and what to do about it.
    Refused(AdminError),
    Leases(Vec<LeaseInfo>),
    Lease(LeaseInfo),
    /// The lease was not acquired: this one holds it.
    LeaseConflict(LeaseInfo),
    Settings(SettingsInfo),
    ScrubStep(ScrubStep),
    /// The last scrub of a volume, if there was one.
    Scrub(Option<ScrubRecord>),
    Holds(HoldsInfo),
    Moves(Vec<MoveInfo>),
    Drains(Vec<DrainInfo>),
    Given(Vec<(NodeNo, u64)>),
    VolumeDetails(VolumeDetails),
    SnapshotDetails(Vec<SnapshotDetails>),
    RolledBack(RollbackInfo),
    Networks(NetworksInfo),
    ServiceOrder(Vec<ServiceOrder>),
}

/// The networks of the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworksInfo {
    pub networks: Vec<NetworkRecord>,
    pub subnetworks: Vec<SubnetworkRecord>,
    pub addresses: Vec<AddressRecord>,
}

impl NetworksInfo {
    /// The subnetworks of a network.
    pub fn subnetworks_of(
        &self,
        network: &NetworkRecord,
    ) -> impl Iterator<Item = &SubnetworkRecord> {
        let all = self.subnetworks.iter();
        all.filter(move |subnet| subnet.network == network.name)
    }

    /// The addresses in a subnetwork.
    pub fn addresses_of(&self, subnet: &SubnetworkRecord) -> impl Iterator<Item = &AddressRecord> {
        let all = self.addresses.iter();
        all.filter(move |address| address.prefix() == subnet.prefix)
    }
}

/// The order in which one node tries addresses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceOrder {
    pub node: NodeNo,
    /// Of all other nodes, with whose each one is.
    pub addresses: Vec<(SocketAddr, NodeNo)>,
}

/// What a step of a scrub found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubStep {
    pub verified_bytes: u64,
    pub damaged: Vec<DamagedRange>,
    /// Where to go on; `None` if the node has nothing more of the volume.
    pub next: Option<ScrubPosition>,
}

/// Why a request was refused: a kind for programs and a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct AdminError {
    pub kind: AdminErrorKind,
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum AdminErrorKind {
    /// The request makes no sense whatever the state (bad name, size zero).
    Invalid,
    NotFound,
    Exists,
    /// It would be right at another time (snapshot exists, hold in progress).
    Conflict,
    /// A server or the registry's majority cannot be reached.
    Unavailable,
    Internal,
    /// Whoever asks may not.
    Forbidden,
}

impl AdminErrorKind {
    /// The name in `--json` errors.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::NotFound => "not_found",
            Self::Exists => "exists",
            Self::Conflict => "conflict",
            Self::Unavailable => "unavailable",
            Self::Internal => "internal",
            Self::Forbidden => "forbidden",
        }
    }
}

/// A server, as it introduces itself to the one that defines it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub unique_id: String,
    pub nbd_address: String,
    /// Name and id of the cluster that it belongs to.
    pub cluster: Option<(String, String)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterStatus {
    pub name: String,
    pub id: String,
    /// The node that answered.
    pub answered_by: NodeNo,
    /// 1: readable, not confirmed by a majority; 2: writable (document 004).
    pub phase: u8,
    pub leader: Option<NodeNo>,
    pub revision: Revision,
    pub nodes: Vec<NodeInfo>,
    pub volume_count: u64,
    pub snapshot_count: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeInfo {
    pub number: NodeNo,
    pub name: String,
    pub unique_id: String,
    pub peer_address: String,
    pub nbd_address: String,
    pub registry_server: bool,
    /// Whether the answering server reaches it now.
    pub reachable: bool,
    /// Bytes in allocated chunks, and free bytes of the file system below; `None` if unreachable.
    pub allocated_bytes: Option<u64>,
    pub free_bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeInfo {
    pub id: VolumeId,
    pub name: String,
    pub size_bytes: u64,
    pub page_blocks: u32,
    pub epoch: Epoch,
    pub format: Option<String>,
    pub created_unix_s: u64,
    pub owners: Vec<NodeNo>,
    /// Over all owners; `None` if one of them cannot be reached.
    pub allocated_bytes: Option<u64>,
    pub snapshot_count: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    pub volume: String,
    pub name: String,
    pub id: SnapshotId,
    pub size_bytes: u64,
    pub created_unix_ms: u64,
    /// What the snapshot shows and what only it holds; `None` if an owner cannot be reached.
    pub referenced_bytes: Option<u64>,
    pub unique_bytes: Option<u64>,
}

/// A volume, and what belongs to snapshots and clones.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeDetails {
    pub info: VolumeInfo,
    pub offline: bool,
    /// `VOL@SNAP` that it was cloned from, while it needs that.
    pub origin: Option<String>,
    /// Volumes that need a snapshot of it.
    pub clones: Vec<String>,
    pub flatten: Option<FlattenInfo>,
    /// Copied between versions of chunks, and from the parent, since the servers were started;
    /// `None` if one of them cannot be reached.
    pub copied_up_bytes: Option<u64>,
}

/// How far a clone is from being independent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlattenInfo {
    /// Over all owners that can be reached.
    pub pages_done: u64,
    pub pages_total: u64,
}

/// A clone to be made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeClone {
    pub source: SnapshotName,
    pub name: String,
    /// Off-line from the beginning.
    #[serde(default)]
    pub offline: bool,
}

/// A rollback that was done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RollbackInfo {
    pub volume: String,
    pub snapshot: String,
    /// Name of the snapshot of what the volume was before.
    pub safety: String,
    pub epoch: Epoch,
    /// The volume keeps its size; behind the end of the snapshot it reads as zeros.
    pub size_bytes: u64,
    pub snapshot_size_bytes: u64,
    /// Owners that have not said that they carried it out; they do before they serve the volume.
    pub unheard: Vec<NodeNo>,
}

/// A snapshot, and what may keep it from being deleted or opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotDetails {
    pub info: SnapshotInfo,
    /// What it holds and the head does not share; `None` if an owner cannot be reached.
    pub used_bytes: Option<u64>,
    pub protected: bool,
    pub offline: bool,
    /// Volumes that were cloned from it and need it.
    pub clones: Vec<String>,
}

/// S003-05: the pages of one volume that each server holds, run-length encoded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteInfo {
    pub volume: String,
    pub epoch: Epoch,
    pub page_blocks: u32,
    pub page_count: u64,
    pub runs: Vec<RouteRun>,
    /// CRC32 of the runs: equal on every server for one (volume, epoch) (S003-06).
    pub table_crc: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionInfo {
    pub server: String,
    pub protocol: u8,
    pub node: NodeNo,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenInfo {
    pub volume: VolumeInfo,
    /// Set for `VOL@SNAP`: the target is read-only and has the size of that moment.
    pub snapshot: Option<SnapshotId>,
    pub size_bytes: u64,
    pub route: RouteInfo,
    /// Peer addresses of the owners.
    pub nodes: Vec<(NodeNo, String)>,
}

/// What keeps requests of one volume waiting on one server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldInfo {
    pub volume: VolumeId,
    pub server: NodeNo,
    /// Who will end it, if the deadline does not: the run of a procedure and its coordinator.
    pub ticket: TicketId,
    pub coordinator: NodeNo,
    /// For people: what for, and what it does.
    pub reason: String,
    pub age_ms: u64,
    /// Milliseconds until it ends by itself; `None`: it lasts until its owner ends it.
    pub left_ms: Option<u64>,
    /// Requests that wait to begin, and those that are executed and wait to be answered.
    pub waiting: u32,
    pub parked: u32,
}

/// Every hold of the cluster at the moment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldsInfo {
    /// With the name of each one's volume.
    pub holds: Vec<(String, HoldInfo)>,
    /// Servers that did not answer.
    pub unreachable: Vec<NodeNo>,
}

/// The exclusive writer lease of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseInfo {
    pub volume: String,
    pub volume_id: VolumeId,
    pub epoch: LeaseEpoch,
    pub state: LeaseState,
}

/// A move of pages of one volume.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MoveInfo {
    pub volume: String,
    /// What asked for it.
    pub reason: String,
    pub phase: MovePhase,
    pub wish: MoveWish,
    pub pages_total: u64,
    pub pages_moved: u64,
    pub bytes_moved: u64,
    /// Bytes a second, at the most; `None`: by what clients leave.
    pub rate_bytes: Option<u64>,
    pub started_unix_ms: u64,
    /// Pages still to move, with their new owners.
    pub left: Vec<RouteRun>,
    /// Why it does not go on at the moment, as the server says whose step is next.
    pub trouble: Option<String>,
}

/// A node that shall own nothing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainInfo {
    pub node: NodeNo,
    pub since_unix_ms: u64,
    /// As [`MoveInfo::rate_bytes`].
    pub rate_bytes: Option<u64>,
    /// Pages that it owns still, and volumes of which it owns pages or holds parts of snapshots.
    pub pages_left: u64,
    pub volumes_left: Vec<String>,
    /// Why a move away from it does not go on, if one does not.
    pub trouble: Option<String>,
}

/// All settings of a volume, in the order in which they are shown.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SettingsInfo {
    pub volume: String,
    /// Keys and values.
    pub settings: Vec<(String, String)>,
    /// One for each rule of `snapshots`.
    pub schedule: Vec<ScheduleInfo>,
}

/// How a rule of scheduled snapshots is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScheduleInfo {
    /// As in `daily at 02:30 keep 7`.
    pub rule: String,
    pub next_unix_s: u64,
    /// Due time of the newest one that was taken.
    pub last_unix_s: Option<u64>,
    /// How many of them there are.
    pub snapshot_count: u64,
    /// What failed since.
    pub last_error: Option<String>,
}

impl MoveInfo {
    /// Whether it has not ended well or by order.
    #[must_use]
    pub fn is_on(&self) -> bool {
        !matches!(self.phase, MovePhase::Done | MovePhase::Cancelled)
    }
}

impl LeaseInfo {
    /// The state in a word, who holds or held it, and why it ended.
    #[must_use]
    pub fn parts(&self) -> (&'static str, Option<&LeaseHolder>, Option<String>) {
        match &self.state {
            LeaseState::Free => ("free", None, None),
            LeaseState::Held(holder) => ("held", Some(holder), None),
            LeaseState::Closed(holder, why) => ("closed", Some(holder), Some(why.to_string())),
        }
    }
}

impl std::fmt::Display for LeaseInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let volume = &self.volume;
        match &self.state {
            LeaseState::Free => write!(f, "volume {volume} is not leased"),
            LeaseState::Held(holder) => {
                write!(f, "volume {volume} is leased exclusively to {holder}")
            }
            LeaseState::Closed(holder, why) => {
                write!(
                    f,
                    "volume {volume} is closed to writers: the lease of {holder} was {why}"
                )?;
                f.write_str(", and not all its servers have confirmed that yet")
            }
        }
    }
}
