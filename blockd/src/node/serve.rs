//! Starting and stopping a server.

use super::audit::{AUDIT_FILE, AuditLog};
use super::config::Config;
use super::facts::FactsFile;
use super::handover_file::HandoverFileError;
use super::identity::{Identity, IdentityError, Membership, claim};
use super::lease::Leases;
use super::lease_file::{LeaseFile, LeaseFileError};
use super::moves::{self, Moves};
use super::paths::Paths;
use super::registry::{RaftTransport, Registry, RegistryError, RegistryOptions};
use super::{
    Member, Node, adapters, http, lease, lineage, nbd, participant, peer_server, schedule, sweep,
};
use crate::control::network::Service;
use crate::data::owner::Owner;
use crate::data::page_store::{PageStore, StoreError, StoreOptions};
use crate::data::volume::Group;
use crate::id::{NodeNo, VolumeId};
use crate::io::environment::Environment;
use crate::io::hlc::Hlc;
use crate::io::host;
use crate::io::link::Peers;
use crate::io::wire::{Frame, Kind, Status};
use crate::planted::{Plant, planted};
use bytes::Bytes;
use nbd_server::{Guarded, Listener, ServeOptions, Shutdown, TlsError};
use std::cell::{OnceCell, RefCell};
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use tokio::runtime::{Builder, Handle};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::LocalSet;

/// Why a server cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
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
    HandoverFile(#[from] HandoverFileError),
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
    let nbd_listeners = nbd_listeners(&config)?;
    let http_listener = http::listen(&config)?;
    let tls = config.nbd_tls.load()?;
    let mut environment = Environment::real(&config.state);
    if let Some(skew) = config.clock_skew {
        environment.clock = Arc::new(skew);
    }
    let server = Server::start(config, environment, control).await?;
    let node = &server.node;
    node.audit
        .get_or_init(|| AuditLog::start(node.config.state.join(AUDIT_FILE)));
    tokio::task::spawn_local(adapters::run(Rc::clone(node)));
    http::start(node, http_listener);
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
    let volumes = nbd::NbdExports(Rc::clone(node));
    let exports = Guarded::new(volumes, node.config.nbd_access.clone());
    tracing::info!(listen = %node.config.listen, "ready");
    nbd_server::Server::new(exports, options)
        .connections_max(node.config.nbd_connections)
        .connections_per_address_max(node.config.nbd_connections_per_address)
        .run(nbd_listeners)
        .await;
    server.stop().await
}

/// A server without its NBD side: the page store, the registry, and the peer protocol.
pub struct Server {
    pub(super) node: Rc<Node>,
}

impl Server {
    /// Opens the state and serves peers. Needs a tokio `LocalSet`; `control` is the runtime of the
    /// registry.
    ///
    /// # Errors
    /// [`ServeError`].
    pub async fn start(
        config: Config,
        environment: Environment,
        control: Handle,
    ) -> Result<Self, ServeError> {
        let mut listeners = Vec::new();
        for address in &config.adapters {
            let listening = environment.network.listen(*address).await;
            listeners.push(listening.map_err(|source| ServeError::Listen {
                what: "peer protocol",
                address: address.to_string(),
                source,
            })?);
        }
        let node = start(config, environment, control).await?;
        peer_server::accept_all(&node, listeners);
        tokio::task::spawn_local(sweep::run(Rc::clone(&node)));
        tokio::task::spawn_local(lease::run(Rc::clone(&node)));
        tokio::task::spawn_local(schedule::run(Rc::clone(&node)));
        Ok(Self { node })
    }

    /// Stops the registry and closes the store.
    ///
    /// # Errors
    /// The store cannot be closed.
    pub async fn stop(&self) -> Result<(), ServeError> {
        if let Some(member) = self.node.member() {
            let state = member.registry.state();
            if let Err(error) = self.node.facts_file(&member.membership).save(&state) {
                tracing::warn!(%error, "facts for a recovery are not written");
            }
            member.registry.shutdown().await;
        }
        Ok(self.node.store.close().await?)
    }
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

/// Opens the state directory and, if the server is a member, its registry.
async fn start(
    config: Config,
    environment: Environment,
    control: Handle,
) -> Result<Rc<Node>, ServeError> {
    let state = &*environment.state;
    let mut options = StoreOptions::default();
    options.log_bytes = config.log_bytes.unwrap_or(options.log_bytes);
    options.free_bytes_min = config.reserve_bytes.unwrap_or(options.free_bytes_min);
    let path = state.path().join("store");
    let store = PageStore::open_on(&path, || state.store(), &state.device(), options)?;
    let identity = Identity::open(state)?;
    claim(state, "store", &format!("server {}", identity.unique_id))?;
    let membership = identity.cluster.clone();
    let number = membership.as_ref().map(|cluster| cluster.number);
    let hlc = Arc::new(Hlc::new(Arc::clone(&environment.clock)));
    let peers = peers(
        &environment,
        &hlc,
        membership.as_ref().map(|cluster| cluster.id.clone()),
        number.unwrap_or_default(),
    )?;
    let node = Rc::new(Node {
        hlc,
        verifier: verifier(&state.boot_id(), store.losses(), &identity.unique_id),
        identity: RefCell::new(identity),
        store,
        peers,
        control,
        connections: peer_server::Connections::default(),
        member: OnceCell::new(),
        joining: tokio::sync::Mutex::new(()),
        audit: OnceCell::new(),
        scrubbing: tokio::sync::Mutex::new(()),
        config,
        environment: environment.clone(),
    });
    match membership {
        Some(membership) if membership.registry_is_lost(state) => {
            tracing::error!("{}", node.why_no_member());
        }
        Some(membership) => drop(node.start_member(membership).await?),
        None => {}
    }
    Ok(node)
}

/// Connections of a new requester.
pub(super) fn peers(
    environment: &Environment,
    hlc: &Arc<Hlc>,
    cluster_id: Option<String>,
    number: NodeNo,
) -> Result<Arc<Peers>, ServeError> {
    let requester = host::random_u64().map_err(ServeError::Random)?;
    let network = Arc::clone(&environment.network);
    let hlc = Arc::clone(hlc);
    Ok(Arc::new(Peers::new(
        network, hlc, requester, cluster_id, number,
    )))
}

/// The write verifier (promise 3, after NFSv3 COMMIT): an acknowledged write is in the page cache
/// or on disk, so it is lost only if the machine stops, or the disk loses what it had taken. The
/// verifier is one of the machine's boot and of the losses that the store has found.
fn verifier(boot: &str, losses: u32, unique_id: &str) -> u64 {
    let boot = match losses {
        _ if planted(Plant::KeepVerifier) => String::new(),
        0 => boot.to_owned(),
        _ => format!("{boot}{losses}"),
    };
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
        identity.save(&*self.environment.state)?;
        *self.identity.borrow_mut() = identity;
        self.peers
            .set_identity(membership.id.clone(), membership.number);
        self.start_member(membership).await
    }

    async fn start_member(
        self: &Rc<Self>,
        membership: Membership,
    ) -> Result<Rc<Member>, ServeError> {
        let cluster_id = Some(membership.id.clone());
        let requester = || {
            peers(
                &self.environment,
                &self.hlc,
                cluster_id.clone(),
                membership.number,
            )
        };
        let (forwarding, agreeing) = (requester()?, requester()?);
        let registry = self.open_registry(&membership, &agreeing).await?;
        self.note_registry()?;
        let confirmed = LeaseFile::open(&*self.environment.state)?;
        let owner = Rc::new(Owner::new(
            membership.number,
            self.store.clone(),
            Arc::clone(&self.hlc),
            self.verifier,
            confirmed.epochs().clone(),
        ));
        let moves = Moves::open(&self.environment, &self.hlc, &membership)?;
        owner.doubt(moves.doubted().into_iter());
        let paths = Paths::new(vec![
            (Service::Registry, agreeing),
            (Service::Administration, Arc::clone(&self.peers)),
            (Service::Data, Arc::clone(&forwarding)),
            (Service::Moves, Arc::clone(moves.peers())),
        ]);
        let group = Rc::new(Group::new(owner, forwarding));
        let incarnation = host::random_u64().map_err(ServeError::Random)?;
        let participant =
            participant::Participants::new(self.store.clone(), Arc::clone(&self.hlc), incarnation);
        let member = Rc::new(Member {
            membership,
            registry,
            clock: Arc::clone(&self.environment.clock),
            peers: Arc::clone(&self.peers),
            group,
            participant,
            flattenings: lineage::Flattenings::default(),
            leases: Leases::new(confirmed, Arc::clone(&self.environment.state)),
            moves,
            paths,
        });
        member.publish();
        tokio::task::spawn_local(follow(Rc::clone(&member)));
        let facts = self.facts_file(&member.membership);
        tokio::task::spawn_local(facts.follow(member.registry.watch()));
        tokio::task::spawn_local(moves::run(Rc::clone(&member), self.verifier));
        Ok(Rc::clone(self.member.get_or_init(|| member)))
    }

    /// Before the registry answers for the first time: from now on this server may not do without it.
    fn note_registry(&self) -> Result<(), ServeError> {
        let mut identity = self.identity.borrow().clone();
        let made = identity
            .cluster
            .as_mut()
            .map(|cluster| &mut cluster.registry_made);
        if let Some(made) = made.filter(|made| !**made) {
            *made = true;
            identity.save(&*self.environment.state)?;
            *self.identity.borrow_mut() = identity;
        }
        Ok(())
    }

    fn facts_file(&self, membership: &Membership) -> FactsFile {
        let unique_id = &self.identity.borrow().unique_id;
        FactsFile::new(Arc::clone(&self.environment.state), unique_id, membership)
    }

    /// Opens the registry on the control thread.
    async fn open_registry(
        &self,
        membership: &Membership,
        peers: &Arc<Peers>,
    ) -> Result<Registry, ServeError> {
        let state = Arc::clone(&self.environment.state);
        claim(&*state, "registry", &format!("cluster {}", membership.id))?;
        let transport = transport(Arc::clone(peers));
        let (number, address) = (membership.number, membership.address.clone());
        let opened = self.control.spawn(async move {
            Registry::open_in(
                state,
                number,
                address,
                transport,
                RegistryOptions::default(),
            )
            .await
        });
        let stopped = |_| RegistryError::Stopped("the control thread has ended".to_owned());
        Ok(opened.await.map_err(stopped)??)
    }
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
