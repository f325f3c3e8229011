//! Networks, subnetworks and the addresses of nodes (S004-102 to S004-112).
//!
//! An address lies under itself, a subnetwork under its prefix, a network under its name, so that no two
//! of a kind can be the same whoever defines them at once (S004-106).

use super::change::{ChangeError, reading};
use super::name::check_name;
use super::object::{Key, Object, UniqueId};
use super::state::RegistryState;
use super::transaction::Transaction;
use crate::control::network::{Candidate, Prefix, Priority, Service, in_order};
use crate::id::{NodeNo, Revision};
use core::net::{IpAddr, SocketAddr};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// The network of subnetworks that nobody has put into another one.
pub const DEFAULT_NETWORK: &str = "default";

/// An address of a node (S004-106, FIG. 19).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AddressRecord {
    pub id: UniqueId,
    pub address: SocketAddr,
    pub mask_bits: u8,
    pub node: NodeNo,
}

/// Addresses that reach each other without a router (S004-107, FIG. 20).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SubnetworkRecord {
    pub id: UniqueId,
    pub prefix: Prefix,
    /// For people.
    pub name: String,
    /// Name of its network.
    pub network: String,
}

/// Subnetworks that are worth the same (S004-108, FIG. 21).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NetworkRecord {
    pub id: UniqueId,
    pub name: String,
    /// The service routing table.
    pub priorities: BTreeMap<Service, Priority>,
}

/// A change of a service routing table; without a priority the service is taken out of it.
pub type PriorityChange = (Service, Option<Priority>);

impl AddressRecord {
    /// Its subnetwork (S004-109).
    #[must_use]
    pub fn prefix(&self) -> Prefix {
        Prefix::of(self.address.ip(), self.mask_bits)
    }
}

impl RegistryState {
    /// Addresses of all nodes, in order.
    pub fn addresses(&self) -> impl Iterator<Item = &AddressRecord> {
        let all = self.objects_from(Key::Address(SocketAddr::from(([0; 4], 0))));
        all.map_while(|(_, object)| match object {
            Object::Address(record) => Some(record),
            _ => None,
        })
    }

    /// Subnetworks by prefix.
    pub fn subnetworks(&self) -> impl Iterator<Item = &SubnetworkRecord> {
        let all = self.objects_from(Key::Subnetwork(Prefix::of(IpAddr::from([0; 4]), 0)));
        all.map_while(|(_, object)| match object {
            Object::Subnetwork(record) => Some(record),
            _ => None,
        })
    }

    /// Networks by name.
    pub fn networks(&self) -> impl Iterator<Item = &NetworkRecord> {
        let all = self.objects_from(Key::Network(String::new()));
        all.map_while(|(_, object)| match object {
            Object::Network(record) => Some(record),
            _ => None,
        })
    }

    /// A subnetwork by its prefix.
    #[must_use]
    pub fn subnetwork(&self, prefix: Prefix) -> Option<&SubnetworkRecord> {
        match self.get(&Key::Subnetwork(prefix))? {
            Object::Subnetwork(record) => Some(record),
            _ => None,
        }
    }

    /// A network by its name.
    #[must_use]
    pub fn network(&self, name: &str) -> Option<&NetworkRecord> {
        match self.get(&Key::Network(name.to_owned()))? {
            Object::Network(record) => Some(record),
            _ => None,
        }
    }

    /// Changes whenever a node, an address, a subnetwork or a network does.
    #[must_use]
    pub fn networks_version(&self) -> (usize, Revision) {
        let nodes = self.nodes().map(|record| Key::Node(record.number));
        let addresses = self.addresses().map(|record| Key::Address(record.address));
        let subnetworks = self.subnetworks().map(|r| Key::Subnetwork(r.prefix));
        let networks = self.networks().map(|r| Key::Network(r.name.clone()));
        let parts = nodes.chain(addresses).chain(subnetworks).chain(networks);
        parts.fold((0, Revision(0)), |(count, newest), key| {
            (count + 1, newest.max(self.revision_of(&key)))
        })
    }

    /// What the network of an address is worth to a service.
    #[must_use]
    pub fn priority(&self, address: &AddressRecord, service: Service) -> Option<Priority> {
        let subnetwork = self.subnetwork(address.prefix())?;
        let network = self.network(&subnetwork.network)?;
        network.priorities.get(&service).copied()
    }

    /// The addresses of these nodes in the order in which node `me` tries them for a service (FIG. 22).
    #[must_use]
    pub fn service_order(
        &self,
        service: Service,
        me: NodeNo,
        nodes: impl Fn(NodeNo) -> bool,
    ) -> Vec<SocketAddr> {
        let mine = self.addresses().filter(|record| record.node == me);
        let near: BTreeSet<Prefix> = mine.map(AddressRecord::prefix).collect();
        let wanted = self.addresses().filter(|record| nodes(record.node));
        let candidates: Vec<Candidate> = wanted
            .map(|record| Candidate {
                address: record.address,
                priority: self.priority(record, service),
                distance: distance(record, me, &near),
            })
            .collect();
        in_order(&candidates, me.0)
    }
}

/// Hops (S004-113): none to an address of its own, one inside a subnetwork, two through a router.
fn distance(to: &AddressRecord, me: NodeNo, near: &BTreeSet<Prefix>) -> u32 {
    match to.node == me {
        true => 0,
        false if near.contains(&to.prefix()) => 1,
        false => 2,
    }
}

/// Makes these the addresses of a node, with the lengths of their masks. A subnetwork that is not there
/// yet is defined by that (S004-105). New objects get successive ids from `first_id` on.
///
/// # Errors
/// There is no such node, or an address belongs to another one.
pub fn publish_addresses(
    state: &RegistryState,
    node: NodeNo,
    wanted: &BTreeMap<SocketAddr, u8>,
    first_id: u128,
) -> Result<(Transaction, ()), ChangeError> {
    state.node(node).ok_or(ChangeError::NoNode(node))?;
    let mut ids = (0..).map(|n| UniqueId(first_id.wrapping_add(n)));
    let mut new_id = || ids.next().unwrap_or_default();
    let mut transaction = reading(state, &[Key::Node(node)]);
    let ours = state.addresses().filter(|record| record.node == node);
    for gone in ours.filter(|record| !wanted.contains_key(&record.address)) {
        transaction = transaction.remove(Key::Address(gone.address));
    }
    for (address, mask_bits) in wanted {
        let key = Key::Address(*address);
        let known = known_address(state, &key, node)?;
        let record = AddressRecord {
            id: known.map_or_else(&mut new_id, |known| known.id),
            address: *address,
            mask_bits: *mask_bits,
            node,
        };
        if known != Some(&record) {
            transaction = transaction
                .expect(key.clone(), state.revision_of(&key))
                .put(key, Object::Address(record));
        }
    }
    let prefixes = wanted.iter().map(|(at, bits)| Prefix::of(at.ip(), *bits));
    let unknown = prefixes.filter(|prefix| state.subnetwork(*prefix).is_none());
    Ok((
        define_unknown(state, transaction, &unknown.collect(), new_id)?,
        (),
    ))
}

/// What is known of an address, which must not be another node's.
fn known_address<'a>(
    state: &'a RegistryState,
    key: &Key,
    node: NodeNo,
) -> Result<Option<&'a AddressRecord>, ChangeError> {
    match state.get(key) {
        Some(Object::Address(known)) if known.node != node => {
            Err(ChangeError::AddressTaken(known.address, known.node))
        }
        Some(Object::Address(known)) => Ok(Some(known)),
        _ => Ok(None),
    }
}

/// Defines subnetworks, mapped to the default network.
fn define_unknown(
    state: &RegistryState,
    mut transaction: Transaction,
    prefixes: &BTreeSet<Prefix>,
    mut new_id: impl FnMut() -> UniqueId,
) -> Result<Transaction, ChangeError> {
    if prefixes.is_empty() {
        return Ok(transaction);
    }
    transaction = match state.network(DEFAULT_NETWORK) {
        Some(_) => mapped_to(state, transaction, DEFAULT_NETWORK)?,
        None => new_network(transaction, DEFAULT_NETWORK, new_id(), &[]),
    };
    for prefix in prefixes {
        let record = SubnetworkRecord {
            id: new_id(),
            prefix: *prefix,
            name: default_name(*prefix),
            network: DEFAULT_NETWORK.to_owned(),
        };
        let key = Key::Subnetwork(*prefix);
        transaction = new_object(transaction, key, Object::Subnetwork(record));
    }
    Ok(transaction)
}

/// An object that is not there yet.
fn new_object(transaction: Transaction, key: Key, object: Object) -> Transaction {
    transaction
        .expect(key.clone(), Revision(0))
        .put(key, object)
}

/// The name of a subnetwork that is given none.
#[must_use]
pub fn default_name(prefix: Prefix) -> String {
    format!("subnet-{prefix}").replace(['/', ':'], "-")
}

/// Defines a network.
///
/// # Errors
/// It is there, or the name is bad.
pub fn define_network(
    state: &RegistryState,
    name: &str,
    id: UniqueId,
    changes: &[PriorityChange],
) -> Result<(Transaction, ()), ChangeError> {
    check_name(name)?;
    if state.network(name).is_some() {
        return Err(ChangeError::NetworkExists(name.to_owned()));
    }
    Ok((new_network(Transaction::new(), name, id, changes), ()))
}

fn new_network(
    transaction: Transaction,
    name: &str,
    id: UniqueId,
    changes: &[PriorityChange],
) -> Transaction {
    let mut record = NetworkRecord {
        id,
        name: name.to_owned(),
        priorities: BTreeMap::new(),
    };
    record.change(changes);
    let key = Key::Network(record.name.clone());
    new_object(transaction, key, Object::Network(record))
}

impl NetworkRecord {
    fn change(&mut self, changes: &[PriorityChange]) {
        for (service, priority) in changes {
            match priority {
                Some(priority) => drop(self.priorities.insert(*service, *priority)),
                None => drop(self.priorities.remove(service)),
            }
        }
    }
}

/// Renames a network, changes its service routing table, or both; its subnetworks stay in it.
///
/// # Errors
/// It is not there, the name is bad or taken, or a node would have no address left for a service.
pub fn modify_network(
    state: &RegistryState,
    name: &str,
    new_name: Option<&str>,
    changes: &[PriorityChange],
) -> Result<(Transaction, ()), ChangeError> {
    let found = state.network(name);
    let mut record = found
        .ok_or_else(|| ChangeError::NoNetwork(name.to_owned()))?
        .clone();
    record.change(changes);
    let old = Key::Network(name.to_owned());
    let mut transaction = reading(state, std::slice::from_ref(&old));
    if let Some(new_name) = new_name.filter(|new_name| *new_name != name) {
        check_name(new_name)?;
        if state.network(new_name).is_some() {
            return Err(ChangeError::NetworkExists(new_name.to_owned()));
        }
        record.name = new_name.to_owned();
        transaction = moved_subnetworks(state, transaction.remove(old), name, new_name)
            .expect(Key::Network(record.name.clone()), Revision(0));
    }
    let key = Key::Network(record.name.clone());
    let transaction = transaction.put(key, Object::Network(record));
    check_reachable(state, &transaction)?;
    Ok((transaction, ()))
}

fn moved_subnetworks(
    state: &RegistryState,
    transaction: Transaction,
    from: &str,
    to: &str,
) -> Transaction {
    let mapped = state.subnetworks().filter(|record| record.network == from);
    mapped.fold(transaction, |transaction, record| {
        let key = Key::Subnetwork(record.prefix);
        let mut record = record.clone();
        record.network = to.to_owned();
        transaction
            .expect(key.clone(), state.revision_of(&key))
            .put(key, Object::Subnetwork(record))
    })
}

/// Takes a network away.
///
/// # Errors
/// It is not there, or subnetworks are mapped to it.
pub fn undefine_network(
    state: &RegistryState,
    name: &str,
) -> Result<(Transaction, ()), ChangeError> {
    let key = Key::Network(name.to_owned());
    if state.network(name).is_none() {
        return Err(ChangeError::NoNetwork(name.to_owned()));
    }
    let mut mapped = state.subnetworks().filter(|record| record.network == name);
    if let Some(mapped) = mapped.next() {
        let (name, subnetwork) = (name.to_owned(), mapped.name.clone());
        return Err(ChangeError::NetworkInUse(name, subnetwork));
    }
    let transaction = reading(state, std::slice::from_ref(&key));
    Ok((transaction.remove(key), ()))
}

/// Defines a subnetwork before a node has an address in it.
///
/// # Errors
/// It is there, a name is bad, or the network is not there.
pub fn define_subnetwork(
    state: &RegistryState,
    record: SubnetworkRecord,
) -> Result<(Transaction, ()), ChangeError> {
    check_name(&record.name)?;
    if state.subnetwork(record.prefix).is_some() {
        return Err(ChangeError::SubnetworkExists(record.prefix.to_string()));
    }
    check_subnetwork_name(state, &record)?;
    let transaction = mapped_to(state, Transaction::new(), &record.network)?;
    let key = Key::Subnetwork(record.prefix);
    Ok((new_object(transaction, key, Object::Subnetwork(record)), ()))
}

/// Renames a subnetwork, maps it to another network, or both (S004-111).
///
/// # Errors
/// It or the network is not there, the name is bad or taken, or a node would have no address left for
/// a service.
pub fn modify_subnetwork(
    state: &RegistryState,
    which: &str,
    new_name: Option<&str>,
    network: Option<&str>,
) -> Result<(Transaction, ()), ChangeError> {
    let mut record = find_subnetwork(state, which)?.clone();
    if let Some(name) = new_name {
        check_name(name)?;
        record.name = name.to_owned();
        check_subnetwork_name(state, &record)?;
    }
    if let Some(network) = network {
        record.network = network.to_owned();
    }
    let key = Key::Subnetwork(record.prefix);
    let transaction = reading(state, std::slice::from_ref(&key));
    let transaction =
        mapped_to(state, transaction, &record.network)?.put(key, Object::Subnetwork(record));
    check_reachable(state, &transaction)?;
    Ok((transaction, ()))
}

/// Takes a subnetwork away.
///
/// # Errors
/// It is not there, or a node has an address in it, which would define it again.
pub fn undefine_subnetwork(
    state: &RegistryState,
    which: &str,
) -> Result<(Transaction, ()), ChangeError> {
    let record = find_subnetwork(state, which)?;
    let mut inside = state.addresses().filter(|a| a.prefix() == record.prefix);
    if let Some(inside) = inside.next() {
        let (name, address) = (record.name.clone(), inside.address);
        return Err(ChangeError::SubnetworkInUse(name, address, inside.node));
    }
    let key = Key::Subnetwork(record.prefix);
    let transaction = reading(state, std::slice::from_ref(&key));
    Ok((transaction.remove(key), ()))
}

/// A subnetwork by its prefix or its name.
fn find_subnetwork<'a>(
    state: &'a RegistryState,
    which: &str,
) -> Result<&'a SubnetworkRecord, ChangeError> {
    let mut all = state.subnetworks();
    let found = all.find(|record| record.name == which || record.prefix.to_string() == which);
    found.ok_or_else(|| ChangeError::NoSubnetwork(which.to_owned()))
}

fn check_subnetwork_name(
    state: &RegistryState,
    record: &SubnetworkRecord,
) -> Result<(), ChangeError> {
    let mut others = state.subnetworks().filter(|r| r.prefix != record.prefix);
    match others.find(|other| other.name == record.name) {
        Some(other) => Err(ChangeError::SubnetworkExists(other.name.clone())),
        None => Ok(()),
    }
}

/// Maps to a network, which is changed by that, so that it cannot be taken away at the same time.
fn mapped_to(
    state: &RegistryState,
    transaction: Transaction,
    name: &str,
) -> Result<Transaction, ChangeError> {
    let found = state.network(name);
    let found = found.ok_or_else(|| ChangeError::NoNetwork(name.to_owned()))?;
    let key = Key::Network(name.to_owned());
    Ok(transaction
        .expect(key.clone(), state.revision_of(&key))
        .put(key, Object::Network(found.clone())))
}

/// No service may be kept off all addresses of a node: it could not be reached for taking that back.
fn check_reachable(state: &RegistryState, transaction: &Transaction) -> Result<(), ChangeError> {
    let mut after = state.clone();
    if after.apply(transaction).is_err() {
        return Ok(());
    }
    for service in Service::ALL {
        let mut open: BTreeMap<NodeNo, bool> = BTreeMap::new();
        for record in after.addresses() {
            let is_open = after.priority(record, service) != Some(Priority::Never);
            *open.entry(record.node).or_default() |= is_open;
        }
        if let Some((node, _)) = open.into_iter().find(|(_, is_open)| !is_open) {
            return Err(ChangeError::CutOff(node, service));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
