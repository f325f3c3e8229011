//! One look at a server, for metrics: what only the reactor sees is copied there, and told elsewhere.

use crate::control::registry::RegistryState;
use crate::data::page_store::StoreUsage;
use crate::data::traffic::Count;
use crate::id::{NodeNo, VolumeId};
use crate::node::registry::RegistryStatus;
use crate::node::{Member, Node, peer_server};
use std::rc::Rc;
use std::sync::Arc;

/// What a server is at the moment.
pub(super) struct Look {
    pub(super) store: StoreUsage,
    pub(super) has_failed: bool,
    pub(super) free_bytes: u64,
    pub(super) member: Option<MemberLook>,
}

/// What it is in its cluster.
pub(super) struct MemberLook {
    pub(super) cluster: String,
    pub(super) number: NodeNo,
    pub(super) name: String,
    pub(super) state: Arc<RegistryState>,
    pub(super) registry: RegistryStatus,
    pub(super) volumes: Vec<VolumeLook>,
    /// Milliseconds for which each hold has lasted.
    pub(super) hold_ages_ms: Vec<u64>,
}

/// What it has and did of a volume.
pub(super) struct VolumeLook {
    pub(super) id: VolumeId,
    pub(super) allocated_bytes: u64,
    pub(super) reads: Count,
    pub(super) writes: Count,
    pub(super) zeroes: Count,
}

impl Look {
    pub(super) fn at(node: &Node) -> Self {
        Self {
            store: node.store.usage(),
            has_failed: node.store.failure().is_some(),
            free_bytes: node.free_bytes(),
            member: node.member().map(|member| MemberLook::at(&member)),
        }
    }
}

impl MemberLook {
    fn at(member: &Rc<Member>) -> Self {
        let membership = &member.membership;
        let state = member.registry.state();
        let holds = peer_server::holds(member).into_iter();
        Self {
            cluster: membership.name.clone(),
            number: membership.number,
            name: membership.node_name.clone(),
            volumes: state
                .volumes()
                .filter_map(|record| VolumeLook::at(member, record.id))
                .collect(),
            registry: member.registry.status(),
            hold_ages_ms: holds.map(|hold| hold.age_ms).collect(),
            state,
        }
    }
}

impl VolumeLook {
    fn at(member: &Member, id: VolumeId) -> Option<Self> {
        let owner = member.owner();
        let traffic = &owner.volume(id)?.traffic;
        Some(Self {
            id,
            allocated_bytes: owner.store.volume_usage(id).allocated_bytes,
            reads: traffic.reads.get(),
            writes: traffic.writes.get(),
            zeroes: traffic.zeroes.get(),
        })
    }
}
