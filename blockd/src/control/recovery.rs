//! Recovery of a lost registry: from what every server's store and facts say, the state with which
//! a new incarnation of the cluster begins.
//!
//! - The newest facts of all servers are a whole state: what they do not have was deleted, what is
//!   in a store under an id that they had not reached came after them.
//! - A page belongs to the server of the table, unless a store has the page at a higher epoch than
//!   the table's: then the table is older than the data.
//! - Every epoch of the new state is higher than any that the old cluster can have reached, and the
//!   cluster has a new id: servers and clients of the old one are refused.
//! - What is missing, or could be decided in another way, is a doubt: it is decided all the same, and
//!   said.

mod page;
mod volume;

use crate::control::registry::{
    ClusterRecord, Key, LeaseRecord, LeaseState, NodeRecord, Object, Refusal, RegistryState,
    Transaction, UniqueId,
};
use crate::id::{Epoch, LeaseEpoch, NodeNo, PageNo, Revision, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use volume::Holder;

pub use volume::VolumePlan;

/// Added to epochs, ids and revisions: more than the old cluster can have gone on behind the newest
/// facts, which are written within a second or so of a change.
const STEP: u32 = 1000;

/// An object of the registry, as facts keep it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoredObject {
    pub revision: Revision,
    pub key: Key,
    pub object: Object,
}

/// Which state of the registry facts are.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FactsHead {
    pub cluster_name: String,
    pub cluster_id: String,
    /// The server that wrote them.
    pub node: NodeNo,
    pub unique_id: String,
    pub revision: Revision,
    /// Milliseconds since 1970; shown, never compared.
    pub written_unix_ms: u64,
}

/// Facts of one server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Facts {
    pub head: FactsHead,
    pub objects: Vec<StoredObject>,
    /// Objects that this program does not know.
    pub unknown: u64,
}

/// A page as one store has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(from = "(PageNo, Epoch, u32, u32)", into = "(PageNo, Epoch, u32, u32)")]
pub struct PageFact {
    pub page: PageNo,
    /// The highest epoch that wrote to it.
    pub epoch: Epoch,
    /// Equal only if all that is stored of the page is equal.
    pub digest: u32,
    /// Bytes of the page up to the last one stored in the volume itself.
    pub head_end_bytes: u32,
}

impl From<(PageNo, Epoch, u32, u32)> for PageFact {
    fn from((page, epoch, digest, head_end_bytes): (PageNo, Epoch, u32, u32)) -> Self {
        PageFact {
            page,
            epoch,
            digest,
            head_end_bytes,
        }
    }
}

impl From<PageFact> for (PageNo, Epoch, u32, u32) {
    fn from(fact: PageFact) -> Self {
        (fact.page, fact.epoch, fact.digest, fact.head_end_bytes)
    }
}

/// What one store has of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeFact {
    pub volume: VolumeId,
    /// Oldest first.
    pub snapshots: Vec<SnapshotId>,
    /// In order; pages of which nothing is stored are left out.
    pub pages: Vec<PageFact>,
}

/// Who a server is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ServerFact {
    pub node: NodeNo,
    pub unique_id: String,
    pub node_name: String,
    pub peer_address: String,
    pub cluster_name: String,
    pub cluster_id: String,
    /// Whether its registry directory is still there.
    pub has_registry: bool,
    /// Lease epochs that it has confirmed.
    pub leases: Vec<(VolumeId, LeaseEpoch)>,
}

/// All that one server contributes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServerExport {
    pub server: ServerFact,
    pub facts: Option<Facts>,
    pub volumes: Vec<VolumeFact>,
}

/// Why no plan can be made.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PlanError {
    #[error("no server is given: name state directories or exports")]
    NoServers,
    #[error(
        "servers of two clusters are given, {0} and {1}: give those of one; after an unfinished \
         `blockd recover apply`, finish it with the same plan"
    )]
    TwoClusters(String, String),
    #[error("node {0} is given twice")]
    Twice(NodeNo),
    #[error("the rebuilt {key} is not valid: {reason}")]
    Invalid { key: String, reason: Refusal },
}

/// Something that the operator should know about a plan.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Remark {
    /// Missing, or decided where more than one answer is possible.
    pub doubt: bool,
    pub text: String,
}

/// A voter of the new registry: a server that was given.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PlannedNode {
    pub number: NodeNo,
    pub unique_id: String,
    pub name: String,
    pub peer_address: String,
}

/// The state with which the cluster begins anew.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Plan {
    pub cluster_name: String,
    /// Of the new incarnation.
    pub cluster_id: UniqueId,
    pub old_cluster_id: String,
    pub revision: Revision,
    /// The voters.
    pub nodes: Vec<PlannedNode>,
    pub objects: BTreeMap<Key, Object>,
    pub volumes: Vec<VolumePlan>,
    pub remarks: Vec<Remark>,
}

impl Plan {
    #[must_use]
    pub fn doubts(&self) -> usize {
        self.remarks.iter().filter(|remark| remark.doubt).count()
    }
}

/// Makes the plan; `new_id` is random.
///
/// # Errors
/// See [`PlanError`].
pub fn plan(servers: &[ServerExport], new_id: UniqueId) -> Result<Plan, PlanError> {
    check_servers(servers)?;
    let mut builder = Builder::new(servers);
    builder.nodes();
    builder.registries();
    builder.volumes();
    builder.leases();
    let plan = builder.finish(new_id);
    check_objects(&plan.objects)?;
    Ok(plan)
}

fn check_servers(servers: &[ServerExport]) -> Result<(), PlanError> {
    let first = &servers.first().ok_or(PlanError::NoServers)?.server;
    let mut seen = BTreeSet::new();
    for ServerExport { server, .. } in servers {
        if server.cluster_id != first.cluster_id {
            let (one, other) = (first.cluster_id.clone(), server.cluster_id.clone());
            return Err(PlanError::TwoClusters(one, other));
        }
        if !seen.insert(server.node) {
            return Err(PlanError::Twice(server.node));
        }
    }
    Ok(())
}

fn check_objects(objects: &BTreeMap<Key, Object>) -> Result<(), PlanError> {
    objects.iter().try_for_each(|(key, object)| {
        let transaction = Transaction::new().put(key.clone(), object.clone());
        transaction.check().map_err(|reason| PlanError::Invalid {
            key: key.to_string(),
            reason,
        })
    })
}

struct Builder<'a> {
    servers: &'a [ServerExport],
    present: BTreeSet<NodeNo>,
    cluster: ClusterRecord,
    revision: Revision,
    objects: BTreeMap<Key, Object>,
    volumes: Vec<VolumePlan>,
    remarks: Vec<Remark>,
}

impl<'a> Builder<'a> {
    fn new(servers: &'a [ServerExport]) -> Self {
        let ours = &servers[0].server;
        let facts = servers.iter().filter_map(|server| server.facts.as_ref());
        let facts = facts
            .filter(|facts| facts.head.cluster_id == ours.cluster_id)
            .max_by_key(|facts| facts.head.revision);
        let mut builder = Self {
            servers,
            present: servers.iter().map(|server| server.server.node).collect(),
            cluster: ClusterRecord {
                name: ours.cluster_name.clone(),
                id: UniqueId(0),
                next_volume: VolumeId(1),
            },
            revision: facts.map_or(Revision(0), |facts| facts.head.revision),
            objects: BTreeMap::new(),
            volumes: Vec::new(),
            remarks: Vec::new(),
        };
        match facts {
            Some(facts) => builder.take_facts(facts),
            None => builder.doubt(
                "no server has facts: names, sizes and settings of volumes are not known, and are \
                 guessed from the data",
            ),
        }
        builder
    }

    fn take_facts(&mut self, facts: &Facts) {
        let objects = facts.objects.iter();
        self.objects = objects
            .map(|stored| (stored.key.clone(), stored.object.clone()))
            .collect();
        if let Some(Object::Cluster(cluster)) = self.objects.get(&Key::Cluster) {
            self.cluster = cluster.clone();
        }
        let head = &facts.head;
        self.note(format!(
            "the newest facts are those of node {}, revision {}",
            head.node, head.revision
        ));
        if facts.unknown > 0 {
            let text = format!(
                "{} objects of the facts are not known to this blockd and would be lost: use the \
                 version that wrote them",
                facts.unknown
            );
            self.doubt(text);
        }
    }

    fn note(&mut self, text: impl Into<String>) {
        self.remarks.push(Remark {
            doubt: false,
            text: text.into(),
        });
    }

    fn doubt(&mut self, text: impl Into<String>) {
        self.remarks.push(Remark {
            doubt: true,
            text: text.into(),
        });
    }

    /// Every server given is a node; nodes that are not given stay, with what they own.
    fn nodes(&mut self) {
        for ServerExport { server, .. } in self.servers {
            let key = Key::Node(server.node);
            if !self.objects.contains_key(&key) {
                let text = format!(
                    "node {} is not in the facts and is made from its identity",
                    server.node
                );
                self.note(text);
                self.objects.insert(key, Object::Node(node_of(server)));
            }
        }
        let known = self.objects.values().filter_map(|object| match object {
            Object::Node(record) => Some((record.number, record.name.clone())),
            _ => None,
        });
        let missing: Vec<_> = known
            .filter(|(node, _)| !self.present.contains(node))
            .collect();
        for (node, name) in missing {
            self.doubt(format!(
                "node {node} ({name}) is not given: what only it has is not available before it is \
                 back with its store, and `recover apply` is run on it with the same plan"
            ));
        }
    }

    fn registries(&mut self) {
        let with: Vec<String> = self
            .servers
            .iter()
            .filter(|server| server.server.has_registry)
            .map(|server| server.server.node.to_string())
            .collect();
        if with.is_empty() {
            return;
        }
        let text = format!(
            "the registry of node {} is still there: if a majority of servers have theirs, start \
             them and do not recover",
            with.join(", ")
        );
        if with.len() * 2 > self.servers.len() {
            self.doubt(text);
        } else {
            self.note(text);
        }
    }

    fn volumes(&mut self) {
        let mut holders: BTreeMap<VolumeId, Vec<Holder<'_>>> = BTreeMap::new();
        for server in self.servers {
            for volume in &server.volumes {
                let holder = Holder {
                    node: server.server.node,
                    volume,
                };
                holders.entry(volume.volume).or_default().push(holder);
            }
        }
        let records: Vec<_> = self
            .objects
            .values()
            .filter_map(volume::record_of)
            .collect();
        for record in records {
            let held = holders.remove(&record.id).unwrap_or_default();
            self.rebuild(record, &held);
        }
        for (id, held) in holders {
            if id < self.cluster.next_volume {
                let text = format!("volume {id} was deleted: what stores have of it will be swept");
                self.note(text);
            } else {
                self.invent(id, &held);
            }
        }
    }

    /// Nobody holds a lease in the new incarnation: its holder belongs to the old one and is refused.
    fn leases(&mut self) {
        let mut epochs: BTreeMap<VolumeId, LeaseEpoch> = BTreeMap::new();
        let confirmed = self.servers.iter().flat_map(|server| &server.server.leases);
        for (volume, epoch) in confirmed {
            let highest = epochs.entry(*volume).or_default();
            *highest = (*highest).max(*epoch);
        }
        for object in self.objects.values() {
            if let Object::Lease(record) = object {
                let highest = epochs.entry(record.volume).or_default();
                *highest = (*highest).max(record.epoch);
            }
        }
        for (volume, epoch) in epochs {
            if !self.objects.contains_key(&Key::Volume(volume)) {
                self.objects.remove(&Key::Lease(volume));
                continue;
            }
            let record = LeaseRecord {
                volume,
                epoch: LeaseEpoch(epoch.0.saturating_add(STEP)),
                state: LeaseState::Free,
            };
            self.objects
                .insert(Key::Lease(volume), Object::Lease(record));
        }
    }

    fn finish(mut self, new_id: UniqueId) -> Plan {
        self.cluster.id = new_id;
        let next = self.cluster.next_volume.0.saturating_add(u64::from(STEP));
        self.cluster.next_volume = VolumeId(next);
        let cluster = Object::Cluster(self.cluster.clone());
        self.objects.insert(Key::Cluster, cluster);
        let planned = |ServerExport { server, .. }: &ServerExport| PlannedNode {
            number: server.node,
            unique_id: server.unique_id.clone(),
            name: server.node_name.clone(),
            peer_address: server.peer_address.clone(),
        };
        let mut nodes: Vec<_> = self.servers.iter().map(planned).collect();
        nodes.sort_by_key(|node| node.number);
        Plan {
            cluster_name: self.cluster.name,
            cluster_id: new_id,
            old_cluster_id: self.servers[0].server.cluster_id.clone(),
            revision: Revision(self.revision.0.saturating_add(u64::from(STEP))),
            nodes,
            objects: self.objects,
            volumes: self.volumes,
            remarks: self.remarks,
        }
    }
}

/// All that a node record says and the identity does not is left empty.
fn node_of(server: &ServerFact) -> NodeRecord {
    NodeRecord {
        number: server.node,
        name: server.node_name.clone(),
        unique_id: UniqueId::try_from(server.unique_id.clone()).unwrap_or_default(),
        peer_address: server.peer_address.clone(),
        nbd_address: String::new(),
        registry_server: true,
        site: String::new(),
    }
}

impl Plan {
    /// The registry's state.
    #[must_use]
    pub fn state(&self) -> RegistryState {
        RegistryState::restored(self.revision, self.objects.clone())
    }
}

#[cfg(test)]
mod tests;
