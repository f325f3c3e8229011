//! Starting and stopping a server.

use super::config::Config;
use super::identity::{Identity, IdentityError, Membership, claim};
use super::lease::Leases;
use super::lease_file::{LeaseFile, LeaseFileError};
use super::registry::{RaftTransport, Registry, RegistryError, RegistryOptions};
use super::{Member, Node, lease, nbd, participant, peer_server, sweep};
use crate::data::owner::Owner;
use crate::data::page_store::{PageStore, StoreError, StoreOptions};
use crate::data::volume::Group;
use crate::id::VolumeId;
use crate::io::host;
use crate::io::link::Peers;
use crate::io::wire::{Frame, Kind, Status};
use bytes::Bytes;
use nbd_server::{Guarded, Listener, ServeOptions, Shutdown, TlsError};
use std::cell::{OnceCell, RefCell};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::LocalSet;

/// Why a server cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error("cannot {action} {path}: {source}")]
    Path {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("cannot listen on {address} ({what}): {source}")]
    Listen {
        what: &'static str,
        address: String,
        source: io::Error,
    },
    #[error("nbd_tls: {0}")]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    LeaseFile(#[from] LeaseFileError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("cannot read random bits from the kernel: {0}")]
    Random(io::Error),
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
}

/// Runs a server until SIGTERM or SIGINT.
///
/// # Errors
/// [`ServeError`] when it cannot start, or cannot close its store.
pub fn serve(config: Config) -> Result<(), ServeError> {
    let (control, _stop_control) = start_control()?;
    let runtime = Builder::new_current_thread()
        .enable_all()
        .event_interval(31)
        .build()
        .map_err(ServeError::Thread)?;
    LocalSet::new().block_on(&runtime, run(config, control))
}

/// The control thread lives until the sender is dropped.
fn start_control() -> Result<(Handle, oneshot::Sender<()>), ServeError> {
    let runtime = Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(ServeError::Thread)?;
    let handle = runtime.handle().clone();
    let (stop, stopped) = oneshot::channel::<()>();
    let body = move || drop(runtime.block_on(stopped));
    let thread = std::thread::Builder::new().name("control".to_owned());
    thread.spawn(body).map_err(ServeError::Thread)?;
    Ok((handle, stop))
}

async fn run(config: Config, control: Handle) -> Result<(), ServeError> {
    let peer_listener = listen("peer protocol", config.listen).await?;
    let nbd_listeners = nbd_listeners(&config)?;
    let tls = config.nbd_tls.load()?;
    let node = start(config, control).await?;
    tokio::task::spawn_local(peer_server::accept(Rc::clone(&node), peer_listener));
    tokio::task::spawn_local(sweep::run(Rc::clone(&node)));
    tokio::task::spawn_local(lease::run(Rc::clone(&node)));
    let (stop, stopped) = Shutdown::new();
    tokio::task::spawn_local(async move {
        stop_signal().await;
        tracing::info!("stopping");
        stop.give();
    });
    let options = ServeOptions {
        shutdown: stopped,
        tls,
        ..ServeOptions::default()
    };
    let volumes = nbd::NbdExports(Rc::clone(&node));
    let exports = Guarded::new(volumes, node.config.nbd_access.clone());
    tracing::info!(listen = %node.config.listen, "ready");
    nbd_server::Server::new(exports, options)
        .connections_max(node.config.nbd_connections)
        .connections_per_address_max(node.config.nbd_connections_per_address)
        .run(nbd_listeners)
        .await;
    if let Some(member) = node.member() {
        member.registry.shutdown().await;
    }
    Ok(node.store.close().await?)
}

fn nbd_listeners(config: &Config) -> Result<Vec<Listener>, ServeError> {
    let failed = |address: String| {
        move |source| ServeError::Listen {
            what: "NBD",
            address,
            source,
        }
    };
    let tcp = config.nbd_listen.iter();
    let tcp = tcp.map(|at| Listener::bind_tcp(*at).map_err(failed(at.to_string())));
    let unix = config.nbd_unix.iter();
    let unix = unix.map(|at| Listener::bind_unix(at).map_err(failed(at.display().to_string())));
    tcp.chain(unix).collect()
}

async fn stop_signal() {
    let (Ok(mut term), Ok(mut int)) = (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = term.recv() => {}
        _ = int.recv() => {}
    }
}

async fn listen(what: &'static str, address: SocketAddr) -> Result<TcpListener, ServeError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| ServeError::Listen {
            what,
            address: address.to_string(),
            source,
        })
}

/// Opens the state directory and, if the server is a member, its registry.
async fn start(config: Config, control: Handle) -> Result<Rc<Node>, ServeError> {
    let state = config.state.clone();
    let store_dir = state.join("store");
    fs::create_dir_all(&store_dir).map_err(|source| ServeError::Path {
        action: "create",
        path: store_dir.clone(),
        source,
    })?;
    let mut options = StoreOptions::default();
    options.log_bytes = config.log_bytes.unwrap_or(options.log_bytes);
    options.free_bytes_min = config.reserve_bytes.unwrap_or(options.free_bytes_min);
    let store = PageStore::open(&store_dir, options)?;
    let identity = Identity::open(&state)?;
    claim(&store_dir, &format!("server {}", identity.unique_id))?;
    let membership = identity.cluster.clone();
    let peers = Peers::new(
        host::random_u64().map_err(ServeError::Random)?,
        membership.as_ref().map(|cluster| cluster.id.clone()),
        membership
            .as_ref()
            .map(|cluster| cluster.number)
            .unwrap_or_default(),
    );
    let node = Rc::new(Node {
        verifier: verifier(&identity.unique_id),
        identity: RefCell::new(identity),
        store,
        peers: Arc::new(peers),
        control,
        connections: peer_server::Connections::default(),
        member: OnceCell::new(),
        joining: tokio::sync::Mutex::new(()),
        config,
    });
    if let Some(membership) = membership {
        node.start_member(membership).await?;
    }
    Ok(node)
}

/// The write verifier (promise 3, after NFSv3 COMMIT): an acknowledged write is in the page cache
/// or on disk, so it is lost only if the machine stops. The verifier is one of the machine's boot.
fn verifier(unique_id: &str) -> u64 {
    let boot = host::boot_id();
    let crc = |text: &str| u64::from(crc32fast::hash(text.as_bytes()));
    crc(&format!("{boot}{unique_id}")) << 32 | crc(&format!("{unique_id}{boot}"))
}

impl Node {
    /// Makes this server a member, durably.
    pub(super) async fn become_member(
        self: &Rc<Self>,
        membership: Membership,
    ) -> Result<Rc<Member>, ServeError> {
        let mut identity = self.identity.borrow().clone();
        identity.cluster = Some(membership.clone());
        identity.save(&self.config.state)?;
        *self.identity.borrow_mut() = identity;
        self.peers
            .set_identity(membership.id.clone(), membership.number);
        self.start_member(membership).await
    }

    async fn start_member(
        self: &Rc<Self>,
        membership: Membership,
    ) -> Result<Rc<Member>, ServeError> {
        let registry = self.open_registry(&membership).await?;
        let confirmed = LeaseFile::open(&self.config.state)?;
        let owner = Rc::new(Owner::new(
            membership.number,
            self.store.clone(),
            self.verifier,
            confirmed.epochs().clone(),
        ));
        let requester = host::random_u64().map_err(ServeError::Random)?;
        let cluster_id = Some(membership.id.clone());
        let forwarding = Arc::new(Peers::new(requester, cluster_id, membership.number));
        let group = Rc::new(Group::new(owner, forwarding));
        let incarnation = host::random_u64().map_err(ServeError::Random)?;
        let participant = participant::Participants::new(self.store.clone(), incarnation);
        let member = Rc::new(Member {
            membership,
            registry,
            peers: Arc::clone(&self.peers),
            group,
            participant,
            leases: Leases::new(confirmed),
        });
        member.publish();
        tokio::task::spawn_local(follow(Rc::clone(&member)));
        Ok(Rc::clone(self.member.get_or_init(|| member)))
    }

    /// Opens the registry on the control thread.
    async fn open_registry(&self, membership: &Membership) -> Result<Registry, ServeError> {
        let directory = self.config.state.join("registry");
        fs::create_dir_all(&directory).map_err(|source| ServeError::Path {
            action: "create",
            path: directory.clone(),
            source,
        })?;
        claim(&directory, &format!("cluster {}", membership.id))?;
        let requester = host::random_u64().map_err(ServeError::Random)?;
        let peers = Peers::new(requester, Some(membership.id.clone()), membership.number);
        let transport = transport(Arc::new(peers));
        let (number, address) = (membership.number, membership.address.clone());
        let opened = self
            .control
            .spawn(async move { open(&directory, number, address, transport).await });
        let stopped = |_| RegistryError::Stopped("the control thread has ended".to_owned());
        Ok(opened.await.map_err(stopped)??)
    }
}

async fn open(
    directory: &Path,
    number: crate::id::NodeNo,
    address: String,
    transport: RaftTransport,
) -> Result<Registry, RegistryError> {
    Registry::open(
        directory,
        number,
        address,
        transport,
        RegistryOptions::default(),
    )
    .await
}

/// Registry messages travel in frames of the peer protocol.
fn transport(peers: Arc<Peers>) -> RaftTransport {
    Arc::new(move |address, message| {
        let peers = Arc::clone(&peers);
        Box::pin(async move {
            let mut request = Frame::request(Kind::Registry, VolumeId(0));
            request.payload = Bytes::from(message).into();
            let reply = peers
                .call(&address, request)
                .await
                .map_err(io::Error::other)?;
            match reply.status {
                Status::Ok => Ok(reply.payload.into_bytes().to_vec()),
                _ => Err(io::Error::other(reply.text())),
            }
        })
    })
}

/// Publishes every new state of the registry to the data plane.
async fn follow(member: Rc<Member>) {
    let mut states = member.registry.watch();
    while states.changed().await.is_ok() {
        states.borrow_and_update();
        member.publish();
    }
}
