//! Networks, subnetworks and addresses (S004-103, S004-104).

use super::{Answer, catch_up, refused};
use crate::admin::{AdminError, AdminErrorKind, AdminReply, NetworksInfo, ServiceOrder};
use crate::control::network::{Prefix, Service};
use crate::control::registry::networks::{
    default_name, define_network, define_subnetwork as define_in, modify_network,
    modify_subnetwork as modify_in, undefine_network, undefine_subnetwork as undefine_in,
};
use crate::control::registry::{
    ChangeError, PriorityChange, RegistryState, SubnetworkRecord, Transaction, UniqueId,
};
use crate::id::NodeNo;
use crate::io::host::random_u128;
use crate::node::Member;
use std::collections::HashMap;

pub(super) async fn list(member: &Member) -> Answer {
    catch_up(member).await?;
    let state = member.registry.state();
    Ok(AdminReply::Networks(NetworksInfo {
        networks: state.networks().cloned().collect(),
        subnetworks: state.subnetworks().cloned().collect(),
        addresses: state.addresses().cloned().collect(),
    }))
}

/// The networks after a change.
async fn change(
    member: &Member,
    build: impl Fn(&RegistryState) -> Result<(Transaction, ()), ChangeError>,
) -> Answer {
    member.registry.update(build).await?;
    list(member).await
}

fn new_id() -> Result<UniqueId, AdminError> {
    let id = random_u128().map(UniqueId);
    id.map_err(|error| refused(AdminErrorKind::Internal, error.to_string()))
}

pub(super) async fn define(member: &Member, name: &str, priorities: &[PriorityChange]) -> Answer {
    let id = new_id()?;
    change(member, |state| define_network(state, name, id, priorities)).await
}

pub(super) async fn modify(
    member: &Member,
    name: &str,
    new_name: Option<&str>,
    priorities: &[PriorityChange],
) -> Answer {
    change(member, |state| {
        modify_network(state, name, new_name, priorities)
    })
    .await
}

pub(super) async fn undefine(member: &Member, name: &str) -> Answer {
    change(member, |state| undefine_network(state, name)).await
}

pub(super) async fn define_subnetwork(
    member: &Member,
    prefix: Prefix,
    name: Option<String>,
    network: String,
) -> Answer {
    let record = SubnetworkRecord {
        id: new_id()?,
        prefix,
        name: name.unwrap_or_else(|| default_name(prefix)),
        network,
    };
    change(member, |state| define_in(state, record.clone())).await
}

pub(super) async fn modify_subnetwork(
    member: &Member,
    which: &str,
    new_name: Option<&str>,
    network: Option<&str>,
) -> Answer {
    change(member, |state| modify_in(state, which, new_name, network)).await
}

pub(super) async fn undefine_subnetwork(member: &Member, which: &str) -> Answer {
    change(member, |state| undefine_in(state, which)).await
}

/// What each node makes of the networks; all compute the same.
pub(super) async fn order(member: &Member, service: Service) -> Answer {
    catch_up(member).await?;
    let state = member.registry.state();
    let whose: HashMap<_, NodeNo> = state.addresses().map(|r| (r.address, r.node)).collect();
    let orders = state.nodes().map(|record| {
        let order = state.service_order(service, record.number, |node| node != record.number);
        let whose = |address| (address, whose.get(&address).copied().unwrap_or_default());
        ServiceOrder {
            node: record.number,
            addresses: order.into_iter().map(whose).collect(),
        }
    });
    Ok(AdminReply::ServiceOrder(orders.collect()))
}
