//! By which addresses this server reaches the others, for each service (S004-110, S004-116).

use crate::control::network::Service;
use crate::control::registry::RegistryState;
use crate::id::{NodeNo, Revision};
use crate::io::link::Peers;
use std::cell::Cell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

/// The requesters of a server, each with the service whose order of addresses it follows.
pub(crate) struct Paths {
    requesters: Vec<(Service, Arc<Peers>)>,
    /// What the paths were made of.
    made_of: Cell<(usize, Revision)>,
}

impl Paths {
    pub(crate) fn new(requesters: Vec<(Service, Arc<Peers>)>) -> Self {
        Self {
            requesters,
            made_of: Cell::default(),
        }
    }

    /// Follows the networks of a new state.
    pub(crate) fn publish(&self, state: &RegistryState, me: NodeNo) {
        let made_of = state.networks_version();
        if self.made_of.replace(made_of) == made_of {
            return;
        }
        for (service, peers) in &self.requesters {
            peers.publish_paths(paths(state, *service, me));
        }
    }
}

fn paths(state: &RegistryState, service: Service, me: NodeNo) -> HashMap<String, Vec<String>> {
    let all = state.nodes().filter_map(|record| {
        let known = &record.peer_address;
        let order = state.service_order(service, me, |node| node == record.number);
        let mut paths: Vec<String> = order.iter().map(SocketAddr::to_string).collect();
        let mut own = state.addresses().filter(|own| own.node == record.number);
        // An address that the server does not know itself, as behind a translation of addresses.
        if !own.any(|own| own.address.to_string() == *known) {
            paths.push(known.clone());
        }
        (paths.len() > 1 || paths.first() != Some(known)).then(|| (known.clone(), paths))
    });
    all.collect()
}
