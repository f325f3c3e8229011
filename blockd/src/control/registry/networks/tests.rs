use super::super::change::{define_cluster, define_node};
use super::super::object::NodeRecord;
use super::*;

fn commit(state: &mut RegistryState, change: Result<(Transaction, ()), ChangeError>) {
    state.apply(&change.unwrap().0).unwrap();
}

/// Nodes 1 to 3 without addresses.
fn nodes() -> RegistryState {
    let mut state = RegistryState::default();
    let cluster = define_cluster(&state, "c", UniqueId(1)).unwrap();
    state.apply(&cluster).unwrap();
    for number in 1..=3 {
        let record = NodeRecord {
            number: NodeNo(number),
            name: format!("n{number}"),
            unique_id: UniqueId(100 + u128::from(number)),
            peer_address: format!("10.1.0.{number}:10808"),
            nbd_address: String::new(),
            registry_server: true,
            site: String::new(),
        };
        let define = define_node(&state, record).unwrap();
        state.apply(&define).unwrap();
    }
    state
}

fn at(network: u8, node: u8) -> SocketAddr {
    SocketAddr::from(([10, network, 0, node], 10808))
}

/// Each node on networks 10.1 and 10.2, as it publishes it itself.
fn published() -> RegistryState {
    let mut state = nodes();
    for node in 1..=3 {
        let wanted = [(at(1, node), 24), (at(2, node), 24)].into();
        let first_id = u128::from(node) << 8;
        let change = publish_addresses(&state, NodeNo(u16::from(node)), &wanted, first_id);
        commit(&mut state, change);
    }
    state
}

fn order(state: &RegistryState, me: u16, of: u16) -> Vec<SocketAddr> {
    state.service_order(Service::Registry, NodeNo(me), |node| node == NodeNo(of))
}

/// S004-105: an address in no known subnetwork defines one; S004-106: with an id of its own.
#[test]
fn subnetworks_of_new_addresses_define_themselves() {
    let mut state = published();
    let prefixes: Vec<String> = state.subnetworks().map(|s| s.prefix.to_string()).collect();
    assert_eq!(prefixes, ["10.1.0.0/24", "10.2.0.0/24"]);
    assert!(state.subnetworks().all(|s| s.network == DEFAULT_NETWORK));
    assert_eq!(state.addresses().count(), 6);
    let ids: BTreeSet<UniqueId> = state.addresses().map(|a| a.id).collect();
    assert_eq!(ids.len(), 6);
    // S004-92: one adapter is gone, one is new, one has another mask.
    let wanted = [(at(1, 1), 16), (at(3, 1), 24)].into();
    let kept = state
        .addresses()
        .find(|a| a.address == at(1, 1))
        .unwrap()
        .id;
    let change = publish_addresses(&state, NodeNo(1), &wanted, 9999);
    commit(&mut state, change);
    let mine: Vec<_> = state.addresses().filter(|a| a.node == NodeNo(1)).collect();
    assert_eq!(mine.len(), 2);
    assert_eq!((mine[0].id, mine[0].mask_bits), (kept, 16));
    let added: Prefix = "10.3.0.0/24".parse().unwrap();
    assert!(state.subnetwork(added).is_some());
    let again = publish_addresses(&state, NodeNo(1), &wanted, 1).unwrap().0;
    assert!(again.changes.is_empty(), "{again:?}");
}

/// S004-106: no address twice, also of two nodes that publish it at once.
#[test]
fn an_address_belongs_to_one_node() {
    let mut state = published();
    let wanted = [(at(1, 1), 24)].into();
    let refused = publish_addresses(&state, NodeNo(2), &wanted, 7);
    assert_eq!(refused, Err(ChangeError::AddressTaken(at(1, 1), NodeNo(1))));
    let new = [(at(5, 5), 24)].into();
    let (one, _) = publish_addresses(&state, NodeNo(1), &new, 7).unwrap();
    let (other, _) = publish_addresses(&state, NodeNo(2), &new, 8).unwrap();
    state.apply(&one).unwrap();
    let second = state.apply(&other).unwrap();
    assert!(
        matches!(second, super::super::Outcome::Conflict { .. }),
        "{second:?}"
    );
    let unknown = publish_addresses(&state, NodeNo(9), &new, 7);
    assert_eq!(unknown, Err(ChangeError::NoNode(NodeNo(9))));
}

/// S004-110, S004-111, S004-116: one change of a mapping or a priority changes the order of all
/// addresses of the subnetwork, on all nodes.
#[test]
fn one_change_turns_the_order_of_a_whole_subnetwork() {
    let mut state = published();
    let version = state.networks_version();
    // S004-112: nothing is said: both are one hop away, and the nodes begin with different ones.
    assert_eq!(order(&state, 1, 2), [at(2, 2), at(1, 2)]);
    assert_eq!(order(&state, 2, 3), [at(1, 3), at(2, 3)]);
    let three = [(Service::Registry, Some(Priority::Of(3)))];
    let change = define_network(&state, "back", UniqueId(5), &three);
    commit(&mut state, change);
    let change = modify_subnetwork(&state, "10.2.0.0/24", Some("rack"), Some("back"));
    commit(&mut state, change);
    assert_ne!(state.networks_version(), version);
    for (me, of) in [(1, 2), (2, 1), (2, 3), (3, 1)] {
        let node = u8::try_from(of).unwrap();
        assert_eq!(order(&state, me, of), [at(2, node), at(1, node)]);
    }
    // Another service has said nothing of it.
    let data = state.service_order(Service::Data, NodeNo(2), |node| node == NodeNo(3));
    assert_eq!(data, [at(1, 3), at(2, 3)]);
    let change = modify_network(
        &state,
        DEFAULT_NETWORK,
        None,
        &[(Service::Registry, Some(Priority::Of(4)))],
    );
    commit(&mut state, change);
    assert_eq!(order(&state, 1, 2), [at(1, 2), at(2, 2)]);
    let change = modify_network(&state, DEFAULT_NETWORK, None, &[(Service::Registry, None)]);
    commit(&mut state, change);
    assert_eq!(order(&state, 1, 2), [at(2, 2), at(1, 2)]);
}

/// S004-113: an address of the same subnetwork is nearer than one behind a router.
#[test]
fn the_nearer_address_comes_first() {
    let mut state = published();
    let wanted = [(at(2, 1), 24)].into();
    let change = publish_addresses(&state, NodeNo(1), &wanted, 5);
    commit(&mut state, change);
    for me in [1, 4] {
        let near = state.service_order(Service::Moves, NodeNo(me), |node| node == NodeNo(2));
        let first = if me == 1 { at(2, 2) } else { at(1, 2) };
        assert_eq!(near[0], first, "node {me}");
    }
    assert_eq!(
        state.service_order(Service::Moves, NodeNo(1), |_| true)[0],
        at(2, 1)
    );
}

/// S004-104, S004-107: the six operations, and what they refuse.
#[test]
fn networks_and_subnetworks_are_defined_modified_and_undefined() {
    let mut state = published();
    let prefix: Prefix = "192.168.55.0/24".parse().unwrap();
    let subnetwork = |name: &str, network: &str| SubnetworkRecord {
        id: UniqueId(70),
        prefix,
        name: name.to_owned(),
        network: network.to_owned(),
    };
    let none = define_subnetwork(&state, subnetwork("lab", "back"));
    assert_eq!(none, Err(ChangeError::NoNetwork("back".to_owned())));
    let change = define_network(&state, "back", UniqueId(5), &[]);
    commit(&mut state, change);
    let twice = define_network(&state, "back", UniqueId(6), &[]);
    assert_eq!(twice, Err(ChangeError::NetworkExists("back".to_owned())));
    let change = define_subnetwork(&state, subnetwork("lab", "back"));
    commit(&mut state, change);
    assert!(define_subnetwork(&state, subnetwork("other", "back")).is_err());
    let taken = modify_subnetwork(&state, "10.1.0.0/24", Some("lab"), None);
    assert_eq!(taken, Err(ChangeError::SubnetworkExists("lab".to_owned())));
    // A new name stays with the subnetworks.
    let change = modify_network(&state, "back", Some("rear"), &[]);
    commit(&mut state, change);
    assert_eq!(state.subnetwork(prefix).unwrap().network, "rear");
    assert!(state.network("back").is_none());
    assert!(modify_network(&state, "rear", Some(DEFAULT_NETWORK), &[]).is_err());
    assert!(modify_network(&state, "rear", Some("-x"), &[]).is_err());
    let used = undefine_network(&state, "rear");
    assert!(
        matches!(used, Err(ChangeError::NetworkInUse(..))),
        "{used:?}"
    );
    let change = undefine_subnetwork(&state, "lab");
    commit(&mut state, change);
    let change = undefine_network(&state, "rear");
    commit(&mut state, change);
    assert!(undefine_network(&state, "rear").is_err());
    let inside = undefine_subnetwork(&state, "10.1.0.0/24");
    assert!(
        matches!(inside, Err(ChangeError::SubnetworkInUse(..))),
        "{inside:?}"
    );
    assert!(modify_subnetwork(&state, "nowhere", None, None).is_err());
}

/// A network goes while a subnetwork is mapped to it: one of the two is refused.
#[test]
fn a_network_is_not_taken_from_under_a_new_subnetwork() {
    let mut state = published();
    let change = define_network(&state, "back", UniqueId(5), &[]);
    commit(&mut state, change);
    let (undefine, ()) = undefine_network(&state, "back").unwrap();
    let (map, ()) = modify_subnetwork(&state, "10.2.0.0/24", None, Some("back")).unwrap();
    for (first, second) in [(&undefine, &map), (&map, &undefine)] {
        let mut state = state.clone();
        state.apply(first).unwrap();
        let second = state.apply(second).unwrap();
        assert!(
            matches!(second, super::super::Outcome::Conflict { .. }),
            "{second:?}"
        );
    }
}

/// S004-102: a service can be kept off networks, but no node be cut off by that.
#[test]
fn no_service_is_kept_off_every_address_of_a_node() {
    let mut state = published();
    let never = [(Service::Registry, Some(Priority::Never))];
    let refused = modify_network(&state, DEFAULT_NETWORK, None, &never);
    assert_eq!(
        refused,
        Err(ChangeError::CutOff(NodeNo(1), Service::Registry))
    );
    let change = define_network(&state, "back", UniqueId(5), &[]);
    commit(&mut state, change);
    let change = modify_subnetwork(&state, "10.2.0.0/24", None, Some("back"));
    commit(&mut state, change);
    let change = modify_network(&state, DEFAULT_NETWORK, None, &never);
    commit(&mut state, change);
    assert_eq!(order(&state, 1, 2), [at(2, 2)]);
    let back = modify_subnetwork(&state, "10.2.0.0/24", None, Some(DEFAULT_NETWORK));
    assert_eq!(back, Err(ChangeError::CutOff(NodeNo(1), Service::Registry)));
}
