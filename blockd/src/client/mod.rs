//! The client library: a volume as one object, whatever servers hold its pages.
//!
//! A [`Client`] knows several servers of a group and treats them as one. A [`Volume`] has the
//! routing table and goes straight to the owner of each page. A server that dies or restarts is a
//! pause: unanswered requests are sent again, and writes that were acknowledged but not flushed
//! are kept until a FLUSH with an unchanged write verifier (promise 3 of the design).

mod change;
mod patience;
mod replay;
mod volume;

pub use crate::data::forward::Since;
pub use crate::id::LayerRun;
pub use volume::Volume;

use crate::admin::{AdminError, AdminErrorKind, AdminReply, AdminRequest, OpenInfo};
use crate::id::{NodeNo, VolumeId};
use crate::io::host::random_u64;
use crate::io::link::{LinkError, Peers, decode_control, encode_control};
use crate::io::wire::{Frame, Kind, Status};
use crate::node::config::with_peer_port;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

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
    servers: Vec<String>,
    /// Index of the server that answered last.
    preferred: AtomicUsize,
    peers: Peers,
    options: ClientOptions,
    /// Spans of all volumes share the connections, so their ids come from one counter.
    next_span: AtomicU64,
}

impl Client {
    /// `servers` are peer addresses, `HOST[:PORT]`; the first that answers is used.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] when none answers before the deadline.
    pub async fn connect(servers: &[String], options: ClientOptions) -> Result<Self, ClientError> {
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
                servers,
                preferred: AtomicUsize::new(0),
                next_span: AtomicU64::new(1),
                peers: Peers::new(requester, None, NodeNo(0)),
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
        let deadline = Instant::now() + self.shared.options.admin_deadline;
        let mut reason = "no server is named".to_owned();
        loop {
            for _ in &self.shared.servers {
                let server = self.server();
                match timeout_at(deadline, self.ask(server, &request)).await {
                    Ok(Ok(reply)) => return reply,
                    Ok(Err(LinkError::Lost { reason, .. })) if changes(&request) => {
                        return Err(self.unreachable(format!(
                            "{reason}; whether the request was carried out is unknown"
                        )));
                    }
                    Ok(Err(error)) => reason = error.to_string(),
                    Err(_) => return Err(self.unreachable(format!("{server}: no answer in time"))),
                }
                self.shared.preferred.fetch_add(1, Ordering::Relaxed);
            }
            // Servers that start may be a moment late; those that refuse at once stay refused.
            if Instant::now() + ADMIN_PAUSE > deadline || !is_waiting_worthwhile(&request) {
                return Err(self.unreachable(reason));
            }
            sleep(ADMIN_PAUSE).await;
        }
    }

    fn server(&self) -> &str {
        let servers = &self.shared.servers;
        let index = self.shared.preferred.load(Ordering::Relaxed) % servers.len().max(1);
        servers.get(index).map_or("", String::as_str)
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
            servers: self.shared.servers.join(", "),
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
        let (volume, snapshot) = match name.split_once('@') {
            None => (name.to_owned(), None),
            Some((volume, snapshot)) => (volume.to_owned(), Some(snapshot.to_owned())),
        };
        match self.admin(AdminRequest::Open { volume, snapshot }).await? {
            AdminReply::Open(info) => Ok(info),
            _ => Err(self.unreachable("answered something else than was asked".to_owned())),
        }
    }
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
    )
}

/// An open volume waits for its servers to come back; a user at a terminal is told at once.
fn is_waiting_worthwhile(request: &AdminRequest) -> bool {
    matches!(request, AdminRequest::Open { .. })
}

#[cfg(test)]
mod tests;
