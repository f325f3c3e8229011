//! One server: the only place that sees the data plane, the control plane and IO together.
//!
//! Two threads with a tokio runtime each. The *reactor* serves NBD and peer connections and owns
//! the page store: a request of a warm page never leaves it. The *control* thread runs the
//! registry, whose log is synced to disk and must not delay a request. A server is nothing but a
//! page store until it is defined in a cluster; then it is a `Member`.

pub mod access;
mod adapters;
mod admin;
mod audit;
pub mod check;
pub mod config;
mod facts;
mod fault;
mod handover_file;
mod http;
mod identity;
mod inspect;
mod lease;
mod lease_file;
mod lineage;
mod moves;
mod nbd;
mod participant;
mod paths;
mod peer_server;
pub mod recover;
pub mod registry;
mod schedule;
mod scrub;
mod serve;
mod snapshot;
mod sweep;
pub mod text_file;

pub use identity::IdentityError;
pub use inspect::Inspection;
pub use serve::{ServeError, Server, serve};

use crate::control::registry::{RegistryState, VolumeRecord};
use crate::data::lineage::Published;
use crate::data::owner::Owner;
use crate::data::page_store::PageStore;
use crate::data::router::RoutingTable;
use crate::data::volume::Group;
use crate::id::NodeNo;
use crate::io::environment::{Clock, Environment};
use crate::io::hlc::Hlc;
use crate::io::link::Peers;
use config::Config;
use identity::{Identity, Membership};
use registry::Registry;
use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use tokio::runtime::Handle;

/// A running server.
pub(crate) struct Node {
    pub(crate) config: Config,
    pub(crate) environment: Environment,
    pub(crate) identity: RefCell<Identity>,
    pub(crate) store: PageStore,
    pub(crate) verifier: u64,
    pub(crate) hlc: Arc<Hlc>,
    /// For administration and snapshots: their orders must not queue behind forwarded writes that
    /// a snapshot holds.
    pub(crate) peers: Arc<Peers>,
    /// Runtime of the control thread.
    pub(crate) control: Handle,
    pub(crate) connections: peer_server::Connections,
    member: OnceCell<Rc<Member>>,
    /// Held while the server becomes a member.
    pub(crate) joining: tokio::sync::Mutex<()>,
    /// Set by `serve`: a server without it, as in a simulator, is not audited.
    pub(crate) audit: OnceCell<audit::AuditLog>,
    /// Held during a step of a scrub.
    pub(crate) scrubbing: tokio::sync::Mutex<()>,
}

/// What a server has from the moment it belongs to a cluster.
pub(crate) struct Member {
    pub(crate) membership: Membership,
    pub(crate) registry: Registry,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) peers: Arc<Peers>,
    pub(crate) group: Rc<Group>,
    pub(crate) participant: participant::Participants,
    pub(crate) leases: lease::Leases,
    pub(crate) moves: moves::Moves,
    pub(crate) flattenings: lineage::Flattenings,
    pub(crate) paths: paths::Paths,
}

/// Why nobody reads or writes a volume that is off-line.
fn offline(state: &RegistryState, volume: &VolumeRecord) -> Option<Rc<str>> {
    let online = admin::check_online(state, volume.id, None, &volume.name);
    online.err().map(|error| error.message.into())
}

impl Node {
    /// Free bytes of the file system below the state directory; 0 if it cannot be asked.
    pub(crate) fn free_bytes(&self) -> u64 {
        self.environment.state.free_bytes()
    }

    /// Why this server is no member now, and what to do.
    pub(crate) fn why_no_member(&self) -> &'static str {
        match self.identity.borrow().cluster {
            None => {
                "this server belongs to no cluster yet: `blockctl cluster define NAME` makes a new one \
                 of it, `blockctl node define ADDR --online` on a member adds it"
            }
            Some(_) => {
                "the registry of this server is lost, and it serves nothing until it has one: \
                 `blockctl node define ADDR --online` on another member gives it one, if a majority of \
                 the others has theirs; else see `blockd recover`"
            }
        }
    }

    pub(crate) fn member(&self) -> Option<Rc<Member>> {
        self.member.get().cloned()
    }
}

impl Member {
    pub(crate) fn number(&self) -> NodeNo {
        self.membership.number
    }

    pub(crate) fn owner(&self) -> &Rc<Owner> {
        &self.group.owner
    }

    /// Makes the registry's routing tables and addresses those of the data plane.
    fn publish(&self) {
        let state = self.registry.state();
        let tables = state.volumes().filter_map(|volume| {
            let routes = volume.routes.clone();
            let (size, page_blocks) = (volume.size_bytes, volume.page_blocks);
            RoutingTable::new(volume.id, volume.epoch, size, page_blocks, routes)
                .inspect_err(|error| tracing::error!(%error, "volume not served"))
                .ok()
                .map(|table| Published {
                    table,
                    fence: lease::fence(&state, volume),
                    lineage: lineage::of(&state, self.number(), volume),
                    offline: offline(&state, volume),
                })
        });
        let tables = tables.collect();
        let nodes = state.nodes();
        let addresses: HashMap<_, _> = nodes
            .map(|node| (node.number, node.peer_address.clone()))
            .collect();
        self.group.publish_addresses(addresses);
        self.paths.publish(&state, self.number());
        self.owner().publish(tables);
        for record in state.page_moves() {
            if let Some(volume) = self.owner().volume(record.volume) {
                volume.publish_given(&record.given);
            }
        }
    }
}
