//! The cluster and its nodes: define, join, list.

use super::super::identity::Membership;
use super::super::peer_server::Usage;
use super::super::registry::Phase;
use super::{Answer, catch_up, refused};
use crate::admin::{
    AdminError, AdminErrorKind, AdminReply, AdminRequest, ClusterStatus, Identity, JoinOffer,
    NodeInfo,
};
use crate::control::registry::change::{define_cluster, define_node as node_change};
use crate::control::registry::nodes::{self as registry_nodes, next_number};
use crate::control::registry::routes::owners;
use crate::control::registry::{
    ChangeError, NodeRecord, Transaction, UniqueId, VolumeRecord, check_name,
};
use crate::id::{NodeNo, VolumeId};
use crate::io::host::random_u128;
use crate::io::link::{LinkError, decode_control, encode_control};
use crate::io::wire::{Frame, Kind, Status};
use crate::node::config::with_peer_port;
use crate::node::moves::change_owners;
use crate::node::{Member, Node};
use futures_util::future::join_all;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::timeout;

/// How long a listing waits for a node that does not answer.
const PROBE: Duration = Duration::from_secs(2);

/// Makes this server, which belongs to no cluster, node 1 of a new one.
pub(super) async fn define(node: &Rc<Node>, name: &str) -> Answer {
    check_name(name)?;
    let _joining = node.joining.lock().await;
    if let Some(member) = node.member() {
        let ours = &member.membership;
        if ours.name == name && member.registry.state().cluster().is_none() {
            return found(node, &member).await;
        }
        let text = format!("this server belongs to cluster {} ({})", ours.name, ours.id);
        return Err(refused(AdminErrorKind::Exists, text));
    }
    if node.identity.borrow().cluster.is_some() {
        return Err(refused(AdminErrorKind::Conflict, node.why_no_member()));
    }
    let membership = Membership {
        name: name.to_owned(),
        id: UniqueId(random_u128().map_err(internal)?).to_string(),
        number: NodeNo(1),
        node_name: "n1".to_owned(),
        address: node.config.listen.to_string(),
        registry_made: false,
    };
    let member = node.become_member(membership).await.map_err(internal)?;
    found(node, &member).await
}

/// Starts the registry of a new cluster; also completes a definition that a crash cut short.
async fn found(node: &Rc<Node>, member: &Rc<Member>) -> Answer {
    let membership = &member.membership;
    member.registry.initialize().await?;
    let id: UniqueId = parse_id(&membership.id)?;
    let first = own_record(node, membership)?;
    let define = |state: &_| -> Result<(Transaction, ()), ChangeError> {
        Ok((define_cluster(state, &membership.name, id)?, ()))
    };
    member.registry.update(define).await?;
    let define = |state: &_| -> Result<(Transaction, ()), ChangeError> {
        Ok((node_change(state, first.clone())?, ()))
    };
    member.registry.update(define).await?;
    member.publish();
    status(node, member).await
}

fn own_record(node: &Node, membership: &Membership) -> Result<NodeRecord, AdminError> {
    Ok(NodeRecord {
        number: membership.number,
        name: membership.node_name.clone(),
        unique_id: parse_id(&node.identity.borrow().unique_id)?,
        peer_address: membership.address.clone(),
        nbd_address: nbd_address(node),
        registry_server: true,
        site: String::new(),
    })
}

fn nbd_address(node: &Node) -> String {
    let first = node.config.nbd_listen.first();
    first.map(ToString::to_string).unwrap_or_default()
}

fn parse_id(hex: &str) -> Result<UniqueId, AdminError> {
    u128::from_str_radix(hex, 16)
        .map(UniqueId)
        .map_err(|_| internal(format!("{hex:?} is no unique id")))
}

fn internal(error: impl ToString) -> AdminError {
    refused(AdminErrorKind::Internal, error.to_string())
}

/// Who this server is. One that has lost its registry says that it belongs to no cluster.
pub(super) fn identify(node: &Node) -> AdminReply {
    let is_member = node.member().is_some();
    let identity = node.identity.borrow();
    AdminReply::Identity(Identity {
        unique_id: identity.unique_id.clone(),
        nbd_address: nbd_address(node),
        cluster: identity
            .cluster
            .as_ref()
            .filter(|_| is_member)
            .map(|cluster| (cluster.name.clone(), cluster.id.clone())),
    })
}

/// Takes on the identity that a member of the cluster offers.
pub(super) async fn join(node: &Rc<Node>, offer: JoinOffer) -> Answer {
    let _joining = node.joining.lock().await;
    let ours = node.identity.borrow().cluster.clone();
    if let Some(ours) = ours {
        let same = ours.id == offer.cluster_id && ours.number == offer.number;
        if same && node.member().is_some() {
            return Ok(identify(node));
        }
        if !same {
            let text = format!(
                "the server belongs to cluster {} ({}) as node {}; to move it, give it an empty \
                 state directory",
                ours.name, ours.id, ours.number
            );
            return Err(refused(AdminErrorKind::Conflict, text));
        }
    }
    let membership = Membership {
        name: offer.cluster_name,
        id: offer.cluster_id,
        number: offer.number,
        node_name: offer.name,
        address: offer.address,
        registry_made: false,
    };
    node.become_member(membership).await.map_err(internal)?;
    Ok(identify(node))
}

/// Defines the server at `address` as a node; with `online` it also joins the registry. Repeating
/// it completes what a failure cut short.
pub(super) async fn define_node(
    node: &Rc<Node>,
    member: &Member,
    address: String,
    name: Option<String>,
    online: bool,
) -> Answer {
    let address = with_peer_port(&address);
    let them = match ask(node, &address, AdminRequest::Identify).await? {
        AdminReply::Identity(identity) => identity,
        _ => {
            return Err(internal(
                "the server answered something else than its identity",
            ));
        }
    };
    if let Some((name, id)) = them
        .cluster
        .as_ref()
        .filter(|c| c.1 != member.membership.id)
    {
        let text = format!(
            "the server at {address} belongs to another cluster, {name} ({id}); to move it, give \
             it an empty state directory"
        );
        return Err(refused(AdminErrorKind::Conflict, text));
    }
    let unique_id = parse_id(&them.unique_id)?;
    let build = |state: &crate::control::registry::RegistryState| {
        let known = state.nodes().find(|node| node.unique_id == unique_id);
        let number = known.map_or_else(|| next_number(state), |node| node.number);
        let record = NodeRecord {
            number,
            name: name
                .clone()
                .or(known.map(|node| node.name.clone()))
                .unwrap_or(format!("n{number}")),
            unique_id,
            peer_address: address.clone(),
            nbd_address: them.nbd_address.clone(),
            registry_server: true,
            site: String::new(),
        };
        Ok::<_, ChangeError>((node_change(state, record.clone())?, record))
    };
    let record = member.registry.update(build).await?;
    if online {
        let votes = member.registry.status().voters.contains(&record.number);
        if votes && them.cluster.is_none() {
            // It has lost its registry: the group must forget what that server has acknowledged.
            member.registry.remove_voter(record.number).await?;
        }
        let offer = JoinOffer {
            cluster_name: member.membership.name.clone(),
            cluster_id: member.membership.id.clone(),
            number: record.number,
            name: record.name.clone(),
            address: address.clone(),
        };
        ask(node, &address, AdminRequest::Join(offer)).await?;
        member.registry.add_voter(record.number, address).await?;
    }
    member.publish();
    Ok(AdminReply::Node(node_info(member, &record).await))
}

/// Takes a drained node that is gone for good out of the cluster. Repeating it completes what a
/// failure cut short.
pub(super) async fn forget_node(member: &Member, node: NodeNo) -> Answer {
    catch_up(member).await?;
    let state = member.registry.state();
    let votes = member.registry.status().voters.contains(&node);
    if let Some(record) = state.node(node) {
        if node_info(member, record).await.reachable {
            let text = format!("node {node} is up: stop the server before it is forgotten");
            return Err(refused(AdminErrorKind::Conflict, text));
        }
        if state.drain(node).is_none() {
            return Err(ChangeError::NotDrained(node).into());
        }
        let owns = |volume: &VolumeRecord| owners(&volume.routes).contains_key(&node);
        for volume in state.volumes().filter(|volume| !owns(volume)) {
            change_owners(member, volume.id, node, false).await?;
        }
        member
            .registry
            .update(|state| registry_nodes::forget_node(state, node))
            .await?;
    } else if !votes {
        return Err(ChangeError::NoNode(node).into());
    }
    if votes {
        member.registry.remove_voter(node).await?;
    }
    member.publish();
    Ok(AdminReply::Done)
}

/// One administrative request to another server, which need not be a member yet.
async fn ask(node: &Node, address: &str, request: AdminRequest) -> Answer {
    let mut frame = Frame::request(Kind::Admin, VolumeId(0));
    frame.payload = encode_control(&request);
    let reply = node.peers.call(address, frame).await;
    let reply = reply.map_err(|error| match &error {
        LinkError::Refused { status, .. } if *status == Status::WrongCluster as u16 => {
            let hint = "to move that server, give it an empty state directory";
            refused(AdminErrorKind::Conflict, format!("{error}; {hint}"))
        }
        _ => refused(AdminErrorKind::Unavailable, error.to_string()),
    })?;
    if reply.status != Status::Ok {
        return Err(refused(AdminErrorKind::Unavailable, reply.text()));
    }
    match decode_control(reply.payload) {
        Ok(AdminReply::Refused(error)) => Err(error),
        Ok(reply) => Ok(reply),
        Err(_) => Err(internal(format!("{address} answered something unreadable"))),
    }
}

/// The cluster as this server knows it.
pub(super) async fn status(node: &Rc<Node>, member: &Member) -> Answer {
    let unconfirmed = catch_up(member).await.err();
    if let Some(error) = unconfirmed {
        tracing::debug!(%error, "cluster status without a majority");
    }
    let (state, status) = (member.registry.state(), member.registry.status());
    let snapshots = state
        .volumes()
        .map(|v| state.snapshots(v.id).count() as u64);
    Ok(AdminReply::Cluster(ClusterStatus {
        name: member.membership.name.clone(),
        id: member.membership.id.clone(),
        answered_by: member.number(),
        phase: match status.phase {
            Phase::Readable => 1,
            Phase::Writable => 2,
        },
        leader: status.leader,
        revision: state.revision(),
        nodes: nodes(node, member).await,
        volume_count: state.volumes().count() as u64,
        snapshot_count: snapshots.sum(),
    }))
}

/// All nodes, each asked whether it can be reached now.
pub(super) async fn nodes(_node: &Rc<Node>, member: &Member) -> Vec<NodeInfo> {
    let state = member.registry.state();
    let records: Vec<NodeRecord> = state.nodes().cloned().collect();
    join_all(records.iter().map(|record| node_info(member, record))).await
}

async fn node_info(member: &Member, record: &NodeRecord) -> NodeInfo {
    let request = Frame::request(Kind::Usage, VolumeId(0));
    let call = member.peers.call(&record.peer_address, request);
    let usage: Option<Usage> = match timeout(PROBE, call).await {
        Ok(Ok(reply)) if reply.status == Status::Ok => decode_control(reply.payload).ok(),
        _ => None,
    };
    NodeInfo {
        number: record.number,
        name: record.name.clone(),
        unique_id: record.unique_id.to_string(),
        peer_address: record.peer_address.clone(),
        nbd_address: record.nbd_address.clone(),
        registry_server: record.registry_server,
        reachable: usage.is_some(),
        allocated_bytes: usage.map(|usage| usage.allocated_bytes),
        free_bytes: usage.map(|usage| usage.free_bytes),
    }
}
