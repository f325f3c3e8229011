//! Administration on the server: one function a request, each a registry change with what must
//! happen around it. Any server carries out any request (S003-10, S003-22).

mod cluster;
mod holds;
mod lease;
mod lineage;
mod moves;
mod network;
mod settings;
mod target;
mod volume;

pub(super) use lineage::drive;
pub(super) use target::check_online;
pub(super) use volume::find_snapshot;

use super::access::Caller;
use super::audit::Outcome;
use super::registry::{RegistryError, UpdateError};
use super::{Member, Node, scrub, snapshot};
use crate::admin::{AdminError, AdminErrorKind, AdminReply, AdminRequest, Effect, VersionInfo};
use crate::control::registry::{ChangeError, NameError, SettingError};
use crate::id::NodeNo;
use crate::io::link::{decode_control, encode_control};
use crate::io::wire::{self, Frame, Status};
use std::net::SocketAddr;
use std::rc::Rc;
use tokio::time::Instant;

pub(super) type Answer = Result<AdminReply, AdminError>;

/// Carries out the request in a frame.
pub(super) async fn answer(node: &Rc<Node>, frame: &Frame, from: SocketAddr) -> Frame {
    let request: AdminRequest = match decode_control(frame.payload.clone()) {
        Ok(request) => request,
        Err(_) => return frame.refuse(Status::Malformed, "unknown administrative request"),
    };
    let reply = carry_out(node, &Caller::admin(from), request).await;
    let reply = reply.unwrap_or_else(AdminReply::Refused);
    frame.answer(Status::Ok, encode_control(&reply))
}

/// Carries out a request, if its caller may ask for it. What changes something is noted in the audit log.
pub(super) async fn carry_out(node: &Rc<Node>, caller: &Caller, request: AdminRequest) -> Answer {
    let effect = request.effect();
    let audit = node.audit.get().filter(|_| Effect::GoesOn < effect);
    let audited = audit.map(|log| (log, request.clone()));
    let began = Instant::now();
    let answer = match caller.check(effect) {
        Ok(()) => dispatch(node, request).await,
        Err(refusal) => Err(refusal),
    };
    if let Some((log, request)) = audited {
        log.note(&Outcome {
            unix_ms: node.environment.clock.unix_ms(),
            caller,
            request: &request,
            error: answer.as_ref().err(),
            took: began.elapsed(),
        });
    }
    answer
}

async fn dispatch(node: &Rc<Node>, request: AdminRequest) -> Answer {
    match request {
        AdminRequest::Version => return Ok(AdminReply::Version(version(node))),
        AdminRequest::Identify => return Ok(cluster::identify(node)),
        AdminRequest::Join(offer) => return cluster::join(node, offer).await,
        AdminRequest::ClusterDefine { name } => return cluster::define(node, &name).await,
        _ => {}
    }
    let no_member = || refused(AdminErrorKind::Unavailable, node.why_no_member());
    let member = &*node.member().ok_or_else(no_member)?;
    match request {
        AdminRequest::ClusterStatus => cluster::status(node, member).await,
        AdminRequest::NodeDefine {
            address,
            name,
            online,
        } => cluster::define_node(node, member, address, name, online).await,
        AdminRequest::NodeList => Ok(AdminReply::Nodes(cluster::nodes(node, member).await)),
        AdminRequest::VolumeCreate(create) => volume::create(member, create).await,
        AdminRequest::VolumeList => volume::list(member).await,
        AdminRequest::VolumeShow { name } => volume::show(member, &name).await,
        AdminRequest::VolumeResize {
            name,
            size_bytes,
            allow_shrink,
        } => volume::resize(member, &name, size_bytes, allow_shrink).await,
        AdminRequest::VolumeRename { name, new_name } => {
            volume::rename(member, &name, &new_name).await
        }
        AdminRequest::VolumeDelete { name } => volume::delete(member, &name).await,
        AdminRequest::SnapshotCreate { targets } => {
            snapshot::create(node, member, targets, None).await
        }
        AdminRequest::HoldList => holds::list(member).await,
        AdminRequest::SnapshotCreateBy { targets, procedure } => {
            snapshot::create(node, member, targets, Some(procedure)).await
        }
        AdminRequest::SnapshotList { volume } => snapshot::list(member, volume.as_deref()).await,
        AdminRequest::SnapshotDelete { target } => snapshot::delete(member, &target).await,
        AdminRequest::RouteShow { volume } => volume::route(member, &volume).await,
        AdminRequest::Open { volume, snapshot } => {
            volume::open(member, &volume, snapshot.as_deref()).await
        }
        AdminRequest::LeaseList => lease::list(member).await,
        AdminRequest::LeaseShow { volume } => lease::show(member, &volume).await,
        AdminRequest::LeaseAcquire { volume, holder } => {
            lease::acquire(member, volume, holder).await
        }
        AdminRequest::LeaseRenew { volume, epoch } => lease::renew(member, volume, epoch).await,
        AdminRequest::LeaseRelease { volume, epoch } => lease::release(member, volume, epoch).await,
        AdminRequest::LeaseBreak { volume } => lease::break_lease(member, &volume).await,
        AdminRequest::VolumeSet { name, key, value } => {
            settings::set(member, &name, &key, &value).await
        }
        AdminRequest::VolumeGet { name } => settings::get(member, &name).await,
        AdminRequest::ScrubStep {
            volume,
            node,
            from,
            rate_bytes,
        } => scrub::order(member, volume, node, from, rate_bytes).await,
        AdminRequest::ScrubKeep(record) => scrub::keep(member, &record).await,
        AdminRequest::ScrubShow { volume } => scrub::show(member, &volume),
        AdminRequest::PageMove {
            volume,
            pages,
            to,
            rate_bytes,
        } => moves::page_move(member, &volume, pages, to, rate_bytes).await,
        AdminRequest::VolumeRebalance { volume, rate_bytes } => {
            moves::rebalance(member, volume.as_deref(), rate_bytes).await
        }
        AdminRequest::MoveList { volume } => moves::list(member, volume.as_deref()).await,
        AdminRequest::MoveWish { volume, wish } => moves::wish(member, &volume, wish).await,
        AdminRequest::NodeDrain {
            node,
            drain,
            rate_bytes,
        } => moves::drain(member, node, drain, rate_bytes).await,
        AdminRequest::NodeForget { node } => cluster::forget_node(member, node).await,
        AdminRequest::DrainList => moves::drains(member).await,
        AdminRequest::NetworkList => network::list(member).await,
        AdminRequest::NetworkDefine { name, priorities } => {
            network::define(member, &name, &priorities).await
        }
        AdminRequest::NetworkModify {
            name,
            new_name,
            priorities,
        } => network::modify(member, &name, new_name.as_deref(), &priorities).await,
        AdminRequest::NetworkUndefine { name } => network::undefine(member, &name).await,
        AdminRequest::SubnetworkDefine {
            prefix,
            name,
            network,
        } => network::define_subnetwork(member, prefix, name, network).await,
        AdminRequest::SubnetworkModify {
            subnetwork,
            new_name,
            network,
        } => {
            let (new_name, network) = (new_name.as_deref(), network.as_deref());
            network::modify_subnetwork(member, &subnetwork, new_name, network).await
        }
        AdminRequest::SubnetworkUndefine { subnetwork } => {
            network::undefine_subnetwork(member, &subnetwork).await
        }
        AdminRequest::ServiceOrder { service } => network::order(member, service).await,
        AdminRequest::MoveGiven { volume } => moves::given(member, volume).await,
        AdminRequest::VolumeDetails { name } => volume::details(member, &name).await,
        AdminRequest::SnapshotDetails { volume } => {
            snapshot::details(member, volume.as_deref()).await
        }
        AdminRequest::SnapshotRename { target, new_name } => {
            target::rename(member, &target, &new_name).await
        }
        AdminRequest::SnapshotProtect { target, protected } => {
            target::protect(member, &target, protected).await
        }
        AdminRequest::SnapshotRollback { target } => lineage::rollback(node, member, &target).await,
        AdminRequest::VolumeClone(wanted) => lineage::clone(member, &wanted).await,
        AdminRequest::VolumeFlatten { name } => lineage::flatten(member, &name).await,
        AdminRequest::SetOffline { target, offline } => {
            target::set_offline(member, &target, offline).await
        }
        AdminRequest::Version
        | AdminRequest::Identify
        | AdminRequest::Join(_)
        | AdminRequest::ClusterDefine { .. } => Err(refused(
            AdminErrorKind::Internal,
            "request already answered",
        )),
    }
}

fn version(node: &Node) -> VersionInfo {
    VersionInfo {
        server: env!("CARGO_PKG_VERSION").to_owned(),
        protocol: wire::VERSION,
        node: node.member().map_or(NodeNo(0), |member| member.number()),
    }
}

pub(super) fn refused(kind: AdminErrorKind, message: impl Into<String>) -> AdminError {
    AdminError {
        kind,
        message: message.into(),
    }
}

pub(super) fn no_volume(name: &str) -> AdminError {
    refused(
        AdminErrorKind::NotFound,
        format!("there is no volume {name:?}"),
    )
}

/// Makes this server's copy of the registry at least as new as every change acknowledged so far,
/// and its routing tables with it.
pub(super) async fn catch_up(member: &Member) -> Result<(), AdminError> {
    member.registry.barrier().await?;
    member.publish();
    Ok(())
}

impl From<RegistryError> for AdminError {
    fn from(error: RegistryError) -> Self {
        let kind = match error {
            RegistryError::Refused(_) => AdminErrorKind::Invalid,
            RegistryError::Contention(_) => AdminErrorKind::Conflict,
            RegistryError::NoLeader(_)
            | RegistryError::UnknownOutcome(_)
            | RegistryError::Stopped(_) => AdminErrorKind::Unavailable,
            RegistryError::File { .. } => AdminErrorKind::Internal,
        };
        refused(kind, error.to_string())
    }
}

impl From<ChangeError> for AdminError {
    fn from(error: ChangeError) -> Self {
        let kind = match &error {
            ChangeError::NoCluster
            | ChangeError::HasSnapshots(_)
            | ChangeError::Protected(..)
            | ChangeError::HasClones(..)
            | ChangeError::NotDrained(_)
            | ChangeError::Owns(..)
            | ChangeError::NoClone(_)
            | ChangeError::NetworkInUse(..)
            | ChangeError::SubnetworkInUse(..)
            | ChangeError::CutOff(..)
            | ChangeError::TooDeep(_)
            | ChangeError::NotInSnapshot(..) => AdminErrorKind::Conflict,
            ChangeError::ClusterExists(_)
            | ChangeError::NodeTaken(_)
            | ChangeError::VolumeExists(_)
            | ChangeError::AddressTaken(..)
            | ChangeError::NetworkExists(_)
            | ChangeError::SubnetworkExists(_)
            | ChangeError::SnapshotExists(..) => AdminErrorKind::Exists,
            ChangeError::NoNode(_)
            | ChangeError::NoVolume(_)
            | ChangeError::NoNetwork(_)
            | ChangeError::NoSubnetwork(_)
            | ChangeError::NoSnapshot(..) => AdminErrorKind::NotFound,
            ChangeError::SnapshotState(..)
            | ChangeError::EpochChanged(..)
            | ChangeError::Leased(..)
            | ChangeError::LeaseNotHeld(..)
            | ChangeError::Moving(..)
            | ChangeError::NoMove(_)
            | ChangeError::NothingToMove(_)
            | ChangeError::MoveWentOn(_)
            | ChangeError::Drained(_)
            | ChangeError::LastNode(_) => AdminErrorKind::Conflict,
            ChangeError::NumbersUsedUp(_) => AdminErrorKind::Internal,
            ChangeError::Name(_) | ChangeError::Route(_) => AdminErrorKind::Invalid,
        };
        refused(kind, error.to_string())
    }
}

impl From<NameError> for AdminError {
    fn from(error: NameError) -> Self {
        refused(AdminErrorKind::Invalid, error.to_string())
    }
}

impl From<SettingError> for AdminError {
    fn from(error: SettingError) -> Self {
        refused(AdminErrorKind::Invalid, error.to_string())
    }
}

impl<E: Into<AdminError>> From<UpdateError<E>> for AdminError {
    fn from(error: UpdateError<E>) -> Self {
        match error {
            UpdateError::Refused(error) => error.into(),
            UpdateError::Registry(error) => error.into(),
        }
    }
}
