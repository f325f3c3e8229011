//! `blockctl network` and `blockctl subnet`: which way the traffic between servers takes.

use crate::args::Cli;
use crate::command::{ask_and_print, connect, print_reply};
use crate::failure::Failure;
use crate::output::table;
use blockd::admin::{AdminErrorKind, AdminReply, AdminRequest, NetworksInfo, ServiceOrder, json};
use blockd::control::network::{Prefix, Priority, Service};
use blockd::control::registry::{NetworkRecord, PriorityChange, SubnetworkRecord};
use clap::Subcommand;
use serde_json::Value;
use std::fmt::Write as _;

#[derive(Debug, Subcommand)]
pub(crate) enum NetworkVerb {
    /// Define a network
    Define {
        name: String,
        /// What it is worth to registry, administration, data or moves: the highest number is tried first; never
        #[arg(long = "priority", value_name = "SERVICE=N", value_parser = parse_priority)]
        priorities: Vec<PriorityChange>,
    },
    /// Rename a network, or change what it is worth to services
    Modify {
        name: String,
        #[arg(long = "name", value_name = "NEW")]
        new_name: Option<String>,
        /// SERVICE=N, SERVICE=never, or SERVICE=none to say nothing any more
        #[arg(long = "priority", value_name = "SERVICE=N", value_parser = parse_priority)]
        priorities: Vec<PriorityChange>,
    },
    /// Take a network without subnetworks away
    Undefine { name: String },
    /// All networks with what they are worth to services
    List,
    /// One network with its subnetworks and addresses
    Show { name: String },
    /// Networks, their subnetworks, and the addresses of nodes in them
    Tree,
    /// In which order each node tries the addresses of the others for a service
    Order {
        #[arg(value_name = "SERVICE")]
        service: Service,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum SubnetVerb {
    /// Define a subnetwork; those of the nodes' addresses define themselves
    Define {
        /// Like 10.0.1.0/24
        prefix: Prefix,
        #[arg(long, value_name = "NETWORK")]
        network: String,
        #[arg(long)]
        name: Option<String>,
    },
    /// Rename a subnetwork, or map it to another network
    Modify {
        /// Its name or prefix
        subnet: String,
        #[arg(long = "name", value_name = "NEW")]
        new_name: Option<String>,
        #[arg(long, value_name = "NETWORK")]
        network: Option<String>,
    },
    /// Take a subnetwork away in which no node has an address
    Undefine { subnet: String },
    /// All subnetworks
    List,
    /// One subnetwork with the addresses in it
    Show { subnet: String },
}

fn parse_priority(text: &str) -> Result<PriorityChange, String> {
    let (service, priority) = text
        .split_once('=')
        .ok_or("write SERVICE=N, like registry=3")?;
    let service: Service = service.parse().map_err(|e| format!("{e}"))?;
    let priority = match priority {
        "none" => None,
        other => Some(other.parse::<Priority>().map_err(|e| format!("{e}"))?),
    };
    Ok((service, priority))
}

pub(crate) async fn run(cli: &Cli, verb: &NetworkVerb) -> Result<(), Failure> {
    let request = match verb {
        NetworkVerb::Define { name, priorities } => AdminRequest::NetworkDefine {
            name: name.clone(),
            priorities: priorities.clone(),
        },
        NetworkVerb::Modify {
            name,
            new_name,
            priorities,
        } => AdminRequest::NetworkModify {
            name: name.clone(),
            new_name: new_name.clone(),
            priorities: priorities.clone(),
        },
        NetworkVerb::Undefine { name } => AdminRequest::NetworkUndefine { name: name.clone() },
        NetworkVerb::Show { name } => return show_network(cli, name).await,
        NetworkVerb::List | NetworkVerb::Tree => AdminRequest::NetworkList,
        NetworkVerb::Order { service } => AdminRequest::ServiceOrder { service: *service },
    };
    match verb {
        NetworkVerb::List if !cli.json => {
            let networks = ask(cli).await?;
            crate::output::print(&networks_table(&networks))
        }
        _ => ask_and_print(cli, request).await,
    }
}

pub(crate) async fn run_subnet(cli: &Cli, verb: &SubnetVerb) -> Result<(), Failure> {
    let request = match verb {
        SubnetVerb::Define {
            prefix,
            network,
            name,
        } => AdminRequest::SubnetworkDefine {
            prefix: *prefix,
            name: name.clone(),
            network: network.clone(),
        },
        SubnetVerb::Modify {
            subnet,
            new_name,
            network,
        } => AdminRequest::SubnetworkModify {
            subnetwork: subnet.clone(),
            new_name: new_name.clone(),
            network: network.clone(),
        },
        SubnetVerb::Undefine { subnet } => AdminRequest::SubnetworkUndefine {
            subnetwork: subnet.clone(),
        },
        SubnetVerb::Show { subnet } => return show_subnets(cli, Some(subnet)).await,
        SubnetVerb::List => return show_subnets(cli, None).await,
    };
    ask_and_print(cli, request).await
}

async fn ask(cli: &Cli) -> Result<NetworksInfo, Failure> {
    match connect(cli).await?.ask(AdminRequest::NetworkList).await? {
        AdminReply::Networks(networks) => Ok(networks),
        _ => Err(Failure::UnexpectedReply { what: "networks" }),
    }
}

fn missing(what: &str, name: &str) -> Failure {
    Failure::Refused {
        kind: AdminErrorKind::NotFound,
        message: format!("there is no {what} {name}: see `blockctl network tree`"),
    }
}

async fn show_network(cli: &Cli, name: &str) -> Result<(), Failure> {
    let mut networks = ask(cli).await?;
    networks.networks.retain(|network| network.name == name);
    if networks.networks.is_empty() {
        return Err(missing("network", name));
    }
    print_reply(cli, &AdminReply::Networks(networks))
}

async fn show_subnets(cli: &Cli, which: Option<&str>) -> Result<(), Failure> {
    let mut networks = ask(cli).await?;
    if let Some(which) = which {
        let is_it = |s: &SubnetworkRecord| s.name == which || s.prefix.to_string() == which;
        networks.subnetworks.retain(is_it);
        if networks.subnetworks.is_empty() {
            return Err(missing("subnetwork", which));
        }
    }
    let all = networks.subnetworks.iter();
    if cli.json {
        let all: Vec<Value> = all
            .map(|subnet| json::subnetwork(&networks, subnet))
            .collect();
        return crate::output::print(&Value::from(all).to_string());
    }
    let rows = all.map(|subnet| {
        let nodes = networks
            .addresses_of(subnet)
            .map(|a| format!("{} ({})", a.address, a.node));
        let prefix = subnet.prefix.to_string();
        let inside = nodes.collect::<Vec<_>>().join(", ");
        vec![subnet.name.clone(), prefix, subnet.network.clone(), inside]
    });
    let header = ["SUBNET", "PREFIX", "NETWORK", "ADDRESSES (NODE)"];
    crate::output::print(&table(&header, &[], rows))
}

pub(crate) fn networks_text(networks: &NetworksInfo) -> String {
    let mut text = String::new();
    for network in &networks.networks {
        let _ = writeln!(text, "network {}  {}", network.name, worth(network));
        for subnet in networks.subnetworks_of(network) {
            let _ = writeln!(text, "  subnet {}  {}", subnet.name, subnet.prefix);
            for address in networks.addresses_of(subnet) {
                let _ = writeln!(text, "    {}  node {}", address.address, address.node);
            }
        }
    }
    match text.is_empty() {
        true => "no networks yet".to_owned(),
        false => text.trim_end().to_owned(),
    }
}

fn worth(network: &NetworkRecord) -> String {
    let all = network.priorities.iter();
    let all: Vec<String> = all.map(|(s, p)| format!("{s} {p}")).collect();
    match all.is_empty() {
        true => "no priorities".to_owned(),
        false => all.join(", "),
    }
}

fn networks_table(networks: &NetworksInfo) -> String {
    let rows = networks.networks.iter().map(|network| {
        let subnets = networks
            .subnetworks_of(network)
            .map(|subnet| subnet.name.clone());
        let subnets = subnets.collect::<Vec<_>>().join(", ");
        vec![network.name.clone(), worth(network), subnets]
    });
    table(&["NETWORK", "PRIORITIES", "SUBNETS"], &[], rows)
}

pub(crate) fn orders_text(orders: &[ServiceOrder]) -> String {
    let rows = orders.iter().map(|order| {
        let addresses = order.addresses.iter();
        let addresses = addresses.map(|(address, node)| format!("{address} ({node})"));
        let addresses = addresses.collect::<Vec<_>>().join(", ");
        vec![order.node.to_string(), addresses]
    });
    table(&["NODE", "TRIES (NODE)"], &[0], rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockd::control::registry::{AddressRecord, UniqueId};
    use blockd::id::NodeNo;

    fn networks() -> NetworksInfo {
        let address = |text: &str, node| AddressRecord {
            id: UniqueId(3),
            address: text.parse().unwrap(),
            mask_bits: 24,
            node: NodeNo(node),
        };
        NetworksInfo {
            networks: vec![NetworkRecord {
                id: UniqueId(1),
                name: "back".to_owned(),
                priorities: [
                    (Service::Registry, Priority::Of(3)),
                    (Service::Moves, Priority::Never),
                ]
                .into(),
            }],
            subnetworks: vec![SubnetworkRecord {
                id: UniqueId(2),
                prefix: "10.0.1.0/24".parse().unwrap(),
                name: "rack".to_owned(),
                network: "back".to_owned(),
            }],
            addresses: vec![address("10.0.1.1:10808", 1), address("10.0.2.1:10808", 2)],
        }
    }

    /// S004-103: cluster, network, subnetwork, address.
    #[test]
    fn the_tree_has_a_line_for_each_object() {
        assert_eq!(
            networks_text(&networks()),
            "network back  registry 3, moves never\n  subnet rack  10.0.1.0/24\n    10.0.1.1:10808  node 1"
        );
        let json = json::networks(&networks());
        assert_eq!(json[0]["priorities"]["registry"], 3);
        assert_eq!(json[0]["priorities"]["moves"], "never");
        assert_eq!(json[0]["subnetworks"][0]["addresses"][0]["node"], 1);
        assert_eq!(networks_text(&NetworksInfo::default()), "no networks yet");
    }

    #[test]
    fn priorities_are_read() {
        let read = parse_priority("registry=3").unwrap();
        assert_eq!(read, (Service::Registry, Some(Priority::Of(3))));
        assert_eq!(parse_priority("data=none").unwrap().1, None);
        assert_eq!(
            parse_priority("data=never").unwrap().1,
            Some(Priority::Never)
        );
        for bad in ["registry", "clients=1", "data=0", "data="] {
            assert!(parse_priority(bad).is_err(), "{bad}");
        }
    }
}
