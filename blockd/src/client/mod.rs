//! The client library: a volume as one object, whatever servers hold its pages.
//!
//! A [`Client`] knows several servers of a group and treats them as one. A [`Volume`] has the
//! routing table and goes straight to the owner of each page. A server that dies or restarts is a
//! pause: unanswered requests are sent again, and writes that were acknowledged but not flushed
//! are kept until a FLUSH with an unchanged write verifier (promise 3 of the design).

mod change;
mod lease;
mod patience;
mod replay;
mod volume;

pub use crate::data::forward::Since;
pub use crate::id::LayerRun;
pub use lease::{HolderText, Lease};
pub use volume::Volume;

use crate::admin::{AdminError, AdminErrorKind, AdminReply, AdminRequest, LeaseInfo, OpenInfo};
use crate::id::{NodeNo, VolumeId};
use crate::io::hlc::Hlc;
use crate::io::host::random_u64;
use crate::io::link::{LinkError, Peers, decode_control, encode_control};
use crate::io::net::{Network, Tcp};
use crate::io::wire::{Frame, Kind, Status};
use crate::node::config::with_peer_port;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// What can go wrong for a user of the library.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("none of the servers {servers} answered: {reason}")]
    Unreachable { servers: String, reason: String },
    #[error("{0}")]
    Refused(#[from] crate::admin::AdminError),
    #[error("{what} at byte {offset_bytes} ({len_bytes} bytes): {reason}")]
    Io {
        what: &'static str,
        offset_bytes: u64,
        len_bytes: u64,
        reason: IoErrorKind,
    },
    /// The lease was not acquired: this one holds it.
    #[error("{0}")]
    Leased(Box<LeaseInfo>),
    /// A change was refused: somebody else is, or was meanwhile, the only writer.
    #[error("{what} at byte {offset_bytes} ({len_bytes} bytes) refused: {reason}")]
    Fenced {
        what: &'static str,
        offset_bytes: u64,
        len_bytes: u64,
        reason: String,
    },
}

/// Why one IO failed; maps to an errno with [`IoErrorKind::errno`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoErrorKind {
    #[error("outside the volume")]
    OutOfRange,
    #[error("the target is read-only")]
    ReadOnly,
    #[error("the server has no space left")]
    NoSpace,
    #[error("stored data is damaged or the store has failed")]
    Damaged,
    #[error("the volume does not exist any more")]
    Gone,
    #[error("no answer before the deadline")]
    Deadline,
    #[error("a server runs an older version, which cannot do this")]
    OlderServer,
}

impl IoErrorKind {
    /// The errno that a filesystem or block device answers.
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Self::OutOfRange => libc::EINVAL,
            Self::ReadOnly => libc::EROFS,
            Self::NoSpace => libc::ENOSPC,
            Self::Damaged | Self::Deadline => libc::EIO,
            Self::Gone => libc::ENXIO,
            Self::OlderServer => libc::EOPNOTSUPP,
        }
    }
}

/// How patient a client is.
#[derive(Clone, Copy, Debug)]
pub struct ClientOptions {
    /// How long an IO may wait for a server that does not answer, before it fails.
    pub io_deadline: Duration,
    /// How long an administrative request may take.
    pub admin_deadline: Duration,
}

/// A run of a volume: bytes that read as zeros (`hole`) or may hold data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    pub len_bytes: u64,
    pub hole: bool,
}

/// A server that owns pages of a volume, and the connection to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnerState {
    pub node: NodeNo,
    pub address: String,
    pub connected: bool,
    /// Connections made so far: 1 unless one was lost.
    pub connections: u64,
}

impl Default for ClientOptions {
    fn default() -> Self {
        Self {
            io_deadline: Duration::from_secs(60),
            admin_deadline: Duration::from_secs(30),
        }
    }
}

/// A handle to a group of servers. Cheap to clone; needs a tokio runtime.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    /// In the order in which they are asked; the one that answered last is in front.
    servers: Mutex<Vec<String>>,
    peers: Arc<Peers>,
    options: ClientOptions,
}

impl Client {
    /// `servers` are peer addresses, `HOST[:PORT]`; the first that answers is used.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] when none answers before the deadline.
    pub async fn connect(servers: &[String], options: ClientOptions) -> Result<Self, ClientError> {
        Self::connect_over(Arc::new(Tcp), servers, options).await
    }

    /// As [`Self::connect`], over this network.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub async fn connect_over(
        network: Arc<dyn Network>,
        servers: &[String],
        options: ClientOptions,
    ) -> Result<Self, ClientError> {
        let servers: Vec<String> = servers
            .iter()
            .map(|server| with_peer_port(server))
            .collect();
        let requester = random_u64().map_err(|error| ClientError::Unreachable {
            servers: servers.join(", "),
            reason: error.to_string(),
        })?;
        let client = Self {
            shared: Arc::new(Shared {
                servers: Mutex::new(servers),
                peers: Arc::new(Peers::new(
                    network,
                    Arc::new(Hlc::follower()),
                    requester,
                    None,
                    NodeNo(0),
                )),
                options,
            }),
        };
        client.admin(AdminRequest::Version).await?;
        Ok(client)
    }

    /// Sends one administrative request; a refusal becomes [`ClientError::Refused`].
    ///
    /// # Errors
    /// [`ClientError`]. A request that changes something is not repeated once it was sent: when
    /// its answer is lost, the error says so.
    pub async fn admin(&self, request: AdminRequest) -> Result<AdminReply, ClientError> {
        self.admin_within(self.shared.options.admin_deadline, request)
            .await
    }

    /// As [`Self::admin`], in this time.
    async fn admin_within(
        &self,
        limit: Duration,
        request: AdminRequest,
    ) -> Result<AdminReply, ClientError> {
        let deadline = Instant::now() + limit;
        let mut reason = "no server is named".to_owned();
        loop {
            for _ in self.servers() {
                let server = self.server();
                let limit = self.share_of(deadline, &request);
                match timeout_at(limit, self.ask(&server, &request)).await {
                    Ok(Ok(reply)) => return reply,
                    Ok(Err(LinkError::Lost { reason, .. })) if changes(&request) => {
                        return Err(self.unreachable(format!(
                            "{reason}; whether the request was carried out is unknown"
                        )));
                    }
                    Ok(Err(error)) => reason = error.to_string(),
                    Err(_) => reason = format!("{server}: no answer in time"),
                }
                self.pass_over(&server);
                if Instant::now() >= deadline {
                    return Err(self.unreachable(reason));
                }
            }
            // Servers that start may be a moment late; those that refuse at once stay refused.
            if Instant::now() + ADMIN_PAUSE > deadline || !is_waiting_worthwhile(&request) {
                return Err(self.unreachable(reason));
            }
            sleep(ADMIN_PAUSE).await;
        }
    }

    /// A server that falls silent may use up its share of the time only, if others can be asked.
    fn share_of(&self, deadline: Instant, request: &AdminRequest) -> Instant {
        if changes(request) {
            return deadline;
        }
        let servers = u32::try_from(self.lock_servers().len()).unwrap_or(1);
        let now = Instant::now();
        now + deadline.saturating_duration_since(now) / servers.max(1)
    }

    /// The servers in the order in which they are asked.
    #[must_use]
    pub fn servers(&self) -> Vec<String> {
        self.lock_servers().clone()
    }

    /// The cluster of the servers, once one of them has answered.
    #[must_use]
    pub fn cluster_id(&self) -> Option<String> {
        self.shared.peers.cluster_id()
    }

    fn lock_servers(&self) -> MutexGuard<'_, Vec<String>> {
        let servers = self.shared.servers.lock();
        servers.unwrap_or_else(PoisonError::into_inner)
    }

    fn server(&self) -> String {
        self.lock_servers().first().cloned().unwrap_or_default()
    }

    /// Asks the others first, unless somebody else has said so already.
    fn pass_over(&self, server: &str) {
        let mut servers = self.lock_servers();
        if servers.first().is_some_and(|first| first == server) {
            servers.rotate_left(1);
        }
    }

    /// Asks `server` first from now on, a new one or one of those known, once it has shown that it
    /// serves the cluster and `volume`. Connections that nothing needs any more are closed; the
    /// data of the volume goes between this client and the owners as before.
    ///
    /// # Errors
    /// It does not answer, belongs to another cluster, or does not know the volume.
    pub async fn prefer(&self, server: &str, volume: &Volume) -> Result<(), ClientError> {
        let server = with_peer_port(server);
        let info = self.open_at(&server, volume).await?;
        let mut needed: Vec<String> = info.nodes.into_iter().map(|(_, address)| address).collect();
        needed.push(server.clone());
        let mut servers = self.lock_servers();
        servers.retain(|known| *known != server);
        servers.insert(0, server);
        drop(servers);
        self.shared.peers.close_others(&needed);
        Ok(())
    }

    /// Asks one server whether it serves the cluster and `volume`.
    ///
    /// # Errors
    /// It does not answer, belongs to another cluster, or does not know the volume.
    pub async fn check_serves(&self, server: &str, volume: &Volume) -> Result<(), ClientError> {
        self.open_at(server, volume).await.map(|_| ())
    }

    async fn open_at(&self, server: &str, volume: &Volume) -> Result<OpenInfo, ClientError> {
        let limit = self.shared.options.admin_deadline;
        let asked = timeout(
            limit,
            self.ask(server, &open_request(&volume.current_name())),
        )
        .await;
        let unreachable = |reason: String| ClientError::Unreachable {
            servers: server.to_owned(),
            reason,
        };
        let asked = asked.map_err(|_| unreachable("no answer in time".to_owned()))?;
        let AdminReply::Open(info) = asked.map_err(|error| unreachable(error.to_string()))?? else {
            return Err(unreachable(
                "answered something else than was asked".to_owned(),
            ));
        };
        volume.check_same(&info)?;
        Ok(info)
    }

    async fn ask(
        &self,
        server: &str,
        request: &AdminRequest,
    ) -> Result<Result<AdminReply, ClientError>, LinkError> {
        let mut frame = Frame::request(Kind::Admin, VolumeId(0));
        frame.payload = encode_control(request);
        let link = self.shared.peers.link(server).await?;
        if let Some(cluster) = &link.welcome().cluster_id {
            // From now on a server of another cluster refuses this client.
            self.shared.peers.insist(cluster);
        }
        let reply = link.call(frame).await?;
        let refused = |kind, message| Ok(Err(AdminError { kind, message }.into()));
        if reply.status != Status::Ok {
            return refused(AdminErrorKind::Unavailable, reply.text());
        }
        match decode_control(reply.payload) {
            Ok(AdminReply::Refused(error)) => Ok(Err(error.into())),
            Ok(reply) => Ok(Ok(reply)),
            Err(_) => {
                let message = format!("{server} answered something that this version cannot read");
                refused(AdminErrorKind::Internal, message)
            }
        }
    }

    fn unreachable(&self, reason: String) -> ClientError {
        ClientError::Unreachable {
            servers: self.servers().join(", "),
            reason,
        }
    }

    /// Opens `VOL` or `VOL@SNAP`.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when there is no such volume or snapshot.
    pub async fn open(&self, name: &str) -> Result<Volume, ClientError> {
        let info = self.open_info(name).await?;
        Ok(Volume::new(self.clone(), name.to_owned(), info))
    }

    async fn open_info(&self, name: &str) -> Result<OpenInfo, ClientError> {
        match self.admin(open_request(name)).await? {
            AdminReply::Open(info) => Ok(info),
            _ => Err(self.unexpected()),
        }
    }

    fn unexpected(&self) -> ClientError {
        self.unreachable("answered something else than was asked".to_owned())
    }
}

fn failed_lease(kind: AdminErrorKind, message: impl Into<String>) -> ClientError {
    let message = message.into();
    AdminError { kind, message }.into()
}

fn open_request(name: &str) -> AdminRequest {
    let (volume, snapshot) = match name.split_once('@') {
        None => (name.to_owned(), None),
        Some((volume, snapshot)) => (volume.to_owned(), Some(snapshot.to_owned())),
    };
    AdminRequest::Open { volume, snapshot }
}

const ADMIN_PAUSE: Duration = Duration::from_millis(200);

/// Whether carrying the request out a second time could do something else than the first.
fn changes(request: &AdminRequest) -> bool {
    !matches!(
        request,
        AdminRequest::ClusterStatus
            | AdminRequest::NodeList
            | AdminRequest::VolumeList
            | AdminRequest::VolumeShow { .. }
            | AdminRequest::SnapshotList { .. }
            | AdminRequest::RouteShow { .. }
            | AdminRequest::Version
            | AdminRequest::Identify
            | AdminRequest::Open { .. }
            | AdminRequest::LeaseList
            | AdminRequest::HoldList
            | AdminRequest::MoveGiven { .. }
            | AdminRequest::MoveList { .. }
            | AdminRequest::DrainList
            | AdminRequest::LeaseShow { .. }
            | AdminRequest::LeaseRenew { .. }
            | AdminRequest::VolumeGet { .. }
            | AdminRequest::VolumeDetails { .. }
            | AdminRequest::SnapshotDetails { .. }
    )
}

/// An open volume waits for its servers to come back; a user at a terminal is told at once.
fn is_waiting_worthwhile(request: &AdminRequest) -> bool {
    matches!(request, AdminRequest::Open { .. })
}

#[cfg(test)]
mod tests;
