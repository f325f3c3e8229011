//! Replies as JSON: what `blockctl --json` prints and what the HTTP face answers.

use super::{
    AdminReply, HoldsInfo, LeaseInfo, MoveInfo, NetworksInfo, ServiceOrder, SettingsInfo,
    SnapshotDetails, VolumeDetails,
};
use crate::control::network::Priority;
use crate::control::registry::{MovePhase, ScrubRecord, SubnetworkRecord};
use serde_json::{Map, Value, json};

/// The value inside a reply, as documented in the README; `{"done":true}` for a bare success.
#[must_use]
pub fn reply(reply: &AdminReply) -> Value {
    match reply {
        AdminReply::Done => json!({"done": true}),
        AdminReply::Cluster(cluster) => json!(cluster),
        AdminReply::Node(node) => json!(node),
        AdminReply::Nodes(nodes) => json!(nodes),
        AdminReply::Volume(volume) => json!(volume),
        AdminReply::Volumes(volumes) => json!(volumes),
        AdminReply::Snapshots(snapshots) => json!(snapshots),
        AdminReply::Route(route) => json!(route),
        AdminReply::Version(version) => json!(version),
        AdminReply::Open(open) => json!(open),
        AdminReply::Identity(identity) => json!(identity),
        AdminReply::Refused(refusal) => json!(refusal),
        AdminReply::ScrubStep(step) => json!(step),
        AdminReply::Scrub(record) => json!(record),
        AdminReply::Leases(leases) => leases.iter().map(lease).collect(),
        AdminReply::Lease(one) | AdminReply::LeaseConflict(one) => lease(one),
        AdminReply::Settings(of_volume) => settings(of_volume),
        AdminReply::Holds(found) => holds(found),
        AdminReply::Moves(moves) => moves.iter().map(page_move).collect(),
        AdminReply::Drains(drains) => json!(drains),
        AdminReply::Given(given) => json!(given),
        AdminReply::VolumeDetails(details) => volume(details),
        AdminReply::RolledBack(rollback) => json!(rollback),
        AdminReply::Networks(found) => networks(found),
        AdminReply::ServiceOrder(found) => orders(found),
        AdminReply::SnapshotDetails(snapshots) => snapshots.iter().map(snapshot).collect(),
    }
}

/// The keys of `more` beside those of `info`.
fn beside(info: Value, more: Value) -> Value {
    match (info, more) {
        (Value::Object(mut all), Value::Object(more)) => {
            all.extend(more);
            Value::Object(all)
        }
        (info, _) => info,
    }
}

/// A volume, and what belongs to snapshots and clones beside it.
#[must_use]
pub fn volume(volume: &VolumeDetails) -> Value {
    let VolumeDetails {
        info,
        offline,
        origin,
        clones,
        flatten,
        copied_up_bytes,
    } = volume;
    let more = json!({
        "offline": offline,
        "origin": origin,
        "clones": clones,
        "flatten": flatten,
        "copied_up_bytes": copied_up_bytes,
    });
    beside(json!(info), more)
}

/// A snapshot, and what may keep it from being deleted or opened beside it.
#[must_use]
pub fn snapshot(snapshot: &SnapshotDetails) -> Value {
    let SnapshotDetails {
        info,
        used_bytes,
        protected,
        offline,
        clones,
    } = snapshot;
    let more = json!({
        "used_bytes": used_bytes,
        "protected": protected,
        "offline": offline,
        "clones": clones,
    });
    beside(json!(info), more)
}

/// The holder's keys stand beside those of the lease; `null` if nobody holds or held it.
#[must_use]
pub fn lease(lease: &LeaseInfo) -> Value {
    let (state, holder, ended) = lease.parts();
    json!({
        "volume": lease.volume,
        "volume_id": lease.volume_id,
        "epoch": lease.epoch,
        "state": state,
        "ended": ended,
        "holder_id": holder.map(|holder| format!("{:016x}", holder.id)),
        "host": holder.map(|holder| &holder.host),
        "pid": holder.map(|holder| holder.pid),
        "purpose": holder.map(|holder| &holder.purpose),
        "ttl_ms": holder.map(|holder| holder.ttl_ms),
        "since_unix_ms": holder.map(|holder| holder.since_unix_ms),
    })
}

/// Holds with the names of their volumes.
#[must_use]
pub fn holds(holds: &HoldsInfo) -> Value {
    let list = holds.holds.iter().map(|(volume, hold)| {
        json!({
            "volume": volume,
            "server": hold.server,
            "ticket": format!("{:016x}", hold.ticket.0),
            "coordinator": hold.coordinator,
            "reason": hold.reason,
            "age_ms": hold.age_ms,
            "left_ms": hold.left_ms,
            "waiting": hold.waiting,
            "parked": hold.parked,
        })
    });
    json!({"holds": list.collect::<Vec<_>>(), "unreachable": holds.unreachable})
}

/// `phase` is a word; what belongs to it stands beside it.
#[must_use]
pub fn page_move(one: &MoveInfo) -> Value {
    let (phase, batch, error) = match &one.phase {
        MovePhase::Planned => ("planned", None, None),
        MovePhase::Copying(batch) => ("copying", Some(batch), None),
        MovePhase::Flipped(batch, _) => ("flipped", Some(batch), None),
        MovePhase::Dropping(batch) => ("dropping", Some(batch), None),
        MovePhase::Paused => ("paused", None, None),
        MovePhase::Done => ("done", None, None),
        MovePhase::Cancelled => ("cancelled", None, None),
        MovePhase::Failed(why) => ("failed", None, Some(why)),
    };
    json!({
        "volume": one.volume,
        "reason": one.reason,
        "phase": phase,
        "batch": batch,
        "error": error,
        "trouble": one.trouble,
        "wish": one.wish,
        "pages_total": one.pages_total,
        "pages_moved": one.pages_moved,
        "bytes_moved": one.bytes_moved,
        "rate_bytes": one.rate_bytes,
        "started_unix_ms": one.started_unix_ms,
        "left": one.left,
    })
}

/// The settings stand beside the volume's name, each under its key.
#[must_use]
pub fn settings(settings: &SettingsInfo) -> Value {
    let mut object = Map::new();
    object.insert("volume".to_owned(), settings.volume.clone().into());
    for (key, value) in &settings.settings {
        object.insert(key.clone(), value.clone().into());
    }
    if object.contains_key("snapshots") {
        let rules = settings.schedule.iter().map(|rule| json!(rule));
        object.insert("schedule".to_owned(), rules.collect());
    }
    Value::Object(object)
}

/// The key `scrub` of `volume show`.
#[must_use]
pub fn scrub(last: Option<&ScrubRecord>) -> Value {
    let value = |record: &ScrubRecord| {
        json!({
            "started_unix_ms": record.started_unix_ms,
            "ended_unix_ms": record.ended_unix_ms,
            "complete": record.paused_at.is_empty(),
            "verified_bytes": record.verified_bytes,
            "damaged_bytes": record.damaged_bytes,
        })
    };
    last.map_or(Value::Null, value)
}

/// A subnetwork with the addresses in it.
#[must_use]
pub fn subnetwork(networks: &NetworksInfo, subnet: &SubnetworkRecord) -> Value {
    let addresses: Vec<_> = networks.addresses_of(subnet).collect();
    json!({
        "id": subnet.id,
        "name": subnet.name,
        "prefix": subnet.prefix,
        "network": subnet.network,
        "addresses": addresses,
    })
}

/// Networks with their subnetworks, and these with the addresses in them.
#[must_use]
pub fn networks(networks: &NetworksInfo) -> Value {
    let all = networks.networks.iter().map(|network| {
        let subnets = networks
            .subnetworks_of(network)
            .map(|subnet| subnetwork(networks, subnet));
        let priorities = network.priorities.iter().map(|(service, priority)| {
            let priority = match priority {
                Priority::Never => json!("never"),
                Priority::Of(number) => json!(number),
            };
            (service.name().to_owned(), priority)
        });
        json!({
            "id": network.id,
            "name": network.name,
            "priorities": priorities.collect::<serde_json::Map<_, _>>(),
            "subnetworks": subnets.collect::<Vec<_>>(),
        })
    });
    all.collect()
}

/// The order in which each node tries addresses.
#[must_use]
pub fn orders(orders: &[ServiceOrder]) -> Value {
    let all = orders.iter().map(|order| {
        let addresses = order.addresses.iter();
        let addresses = addresses.map(|(address, node)| json!({"address": address, "node": node}));
        json!({"node": order.node, "addresses": addresses.collect::<Vec<_>>()})
    });
    all.collect()
}
