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

/// Of servers that were defined by one of the addresses that they have. One that was defined by another,
/// as behind a translation of addresses, is reached by that only: its own mean something else out here.
fn paths(state: &RegistryState, service: Service, me: NodeNo) -> HashMap<String, Vec<String>> {
    let all = state.nodes().filter_map(|record| {
        let known = &record.peer_address;
        let mut own = state.addresses().filter(|own| own.node == record.number);
        if !own.any(|own| own.address.to_string() == *known) {
            return None;
        }
        let order = state.service_order(service, me, |node| node == record.number);
        let paths: Vec<String> = order.iter().map(SocketAddr::to_string).collect();
        (paths.len() > 1 || paths.first() != Some(known)).then(|| (known.clone(), paths))
    });
    all.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::registry::change::{define_cluster, define_node};
    use crate::control::registry::networks::publish_addresses;
    use crate::control::registry::{NodeRecord, UniqueId};

    /// S004-110: node 2 has two addresses and was defined by one of them; node 3 by a name.
    #[test]
    fn a_server_that_was_defined_by_an_address_of_others_is_reached_by_that() {
        let mut state = RegistryState::default();
        let cluster = define_cluster(&state, "c", UniqueId(1)).unwrap();
        state.apply(&cluster).unwrap();
        for (number, peer_address) in [(2, "10.1.0.2:10808"), (3, "third.example:10808")] {
            let record = NodeRecord {
                number: NodeNo(number),
                name: format!("n{number}"),
                unique_id: UniqueId(number.into()),
                peer_address: peer_address.to_owned(),
                nbd_address: String::new(),
                registry_server: true,
                site: String::new(),
            };
            let define = define_node(&state, record).unwrap();
            state.apply(&define).unwrap();
            let address = |network| SocketAddr::from(([10, network, 0, number as u8], 10808));
            let wanted = [(address(1), 24), (address(2), 24)].into();
            let (publish, ()) = publish_addresses(&state, NodeNo(number), &wanted, 9).unwrap();
            state.apply(&publish).unwrap();
        }
        let found = paths(&state, Service::Data, NodeNo(1));
        let two = ["10.2.0.2:10808", "10.1.0.2:10808"].map(str::to_owned);
        assert_eq!(found, [("10.1.0.2:10808".to_owned(), two.to_vec())].into());
    }
}
