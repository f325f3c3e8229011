//! `blockd recover`: what a server contributes to the recovery of a lost registry, the file of a
//! plan, and how a plan is made true in a state directory.
//!
//! ```text
//! export   line 1   "blockd-export" SP 1 SP CRC32 of the rest (8 hex digits) LF
//!          line 2   JSON: node, unique_id, node_name, peer_address, cluster_name, cluster_id,
//!                   has_registry, leases
//!          line 3   JSON: line 2 of the facts, or null
//!          rest     JSON, a line each: objects as in the facts; volumes of the store (volume,
//!                   snapshots, pages: a list of [page, epoch, digest, head_end_bytes])
//! plan     line 1   "blockd-plan" SP 1 SP CRC32 of the rest LF
//!          line 2   JSON: cluster_name, cluster_id, old_cluster_id, revision, nodes, volumes, remarks
//!          rest     JSON, a line for each object of the registry: key, object
//! ```

use super::check::{CheckError, StateCheck, check_state};
use super::facts::{self, FactsFile};
use super::identity::{Identity, IdentityError, Membership};
use super::lease_file::{LeaseFile, LeaseFileError};
use super::text_file::{TextError, TextFormat, failed};
use crate::control::recovery::{
    Facts, FactsHead, Plan, PlanError, PlannedNode, Remark, ServerExport, ServerFact, StoredObject,
    VolumeFact, VolumePlan, plan,
};
use crate::control::registry::{Key, Object, UniqueId};
use crate::data::page_store::{CheckOptions, StoreImage};
use crate::id::{NodeNo, Revision};
use crate::io::host::random_u128;
use crate::io::raft::offline::seed;
use crate::io::state_dir::{Directory, StateDir};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const EXPORT: TextFormat = TextFormat {
    magic: "blockd-export",
    format: 1,
};
const PLAN: TextFormat = TextFormat {
    magic: "blockd-plan",
    format: 1,
};

/// Why a step of a recovery is not possible.
#[derive(Debug, thiserror::Error)]
pub enum RecoverError {
    #[error(transparent)]
    Check(#[from] CheckError),
    #[error(transparent)]
    Text(#[from] TextError),
    #[error(transparent)]
    Identity(#[from] IdentityError),
    #[error(transparent)]
    Leases(#[from] LeaseFileError),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(
        "the store of {0} is damaged so that a server would not start on it: `blockd check` says \
         where; recover without this server, or restore its store first"
    )]
    Store(PathBuf),
    #[error("{0} belongs to no cluster: there is nothing to recover from it")]
    NoMember(PathBuf),
    #[error(
        "{path} belongs to server {unique_id} of cluster {cluster_id}, which the plan does not have"
    )]
    NotPlanned {
        path: PathBuf,
        unique_id: String,
        cluster_id: String,
    },
    #[error("cannot make the registry of {path}: {reason}")]
    Seed { path: PathBuf, reason: String },
    #[error("cannot read random bits from the kernel: {0}")]
    Random(io::Error),
}

/// Lines 3 and on of an export.
#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum ExportLine {
    Object(StoredObject),
    Volume(VolumeFact),
}

/// An object of a plan.
#[derive(Serialize, Deserialize)]
struct PlanLine {
    key: Key,
    object: Object,
}

/// Line 2 of a plan.
#[derive(Serialize, Deserialize)]
struct PlanHead {
    cluster_name: String,
    cluster_id: UniqueId,
    old_cluster_id: String,
    revision: Revision,
    nodes: Vec<PlannedNode>,
    volumes: Vec<VolumePlan>,
    remarks: Vec<Remark>,
}

/// What the server of a state directory contributes. The directory must not be in use, and is only
/// read.
///
/// # Errors
/// [`RecoverError`].
pub fn export(state: &Path) -> Result<ServerExport, RecoverError> {
    let check = check_state(state, CheckOptions::default(), &mut |_| {})?;
    let directory = Directory(state.to_owned());
    let (identity, member) = membership(state, &check)?;
    let image = check.image.as_ref();
    let image = image.ok_or_else(|| RecoverError::Store(state.to_owned()))?;
    let mut leases: Vec<_> = LeaseFile::open(&directory)?
        .epochs()
        .iter()
        .map(|(volume, epoch)| (*volume, *epoch))
        .collect();
    leases.sort_unstable();
    Ok(ServerExport {
        server: ServerFact {
            node: member.number,
            unique_id: identity.unique_id,
            node_name: member.node_name,
            peer_address: member.address,
            cluster_name: member.name,
            cluster_id: member.id,
            has_registry: state.join("registry/registry.redb").exists(),
            leases,
        },
        facts: facts::read(&directory).unwrap_or(None),
        volumes: volume_facts(image),
    })
}

fn membership(state: &Path, check: &StateCheck) -> Result<(Identity, Membership), RecoverError> {
    let read = || Identity::read(&Directory(state.to_owned()));
    let identity = match &check.identity {
        Some(identity) => Some(identity.clone()),
        None => read()?,
    };
    let member = identity
        .as_ref()
        .and_then(|identity| identity.cluster.clone());
    identity
        .zip(member)
        .ok_or_else(|| RecoverError::NoMember(state.to_owned()))
}

fn volume_facts(image: &StoreImage) -> Vec<VolumeFact> {
    let facts = image.volumes().into_iter().map(|volume| VolumeFact {
        volume,
        snapshots: image.snapshots(volume),
        pages: image
            .pages(volume)
            .into_iter()
            .map(|page| (page.page, page.epoch, page.digest, page.head_end_bytes).into())
            .collect(),
    });
    facts.collect()
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

/// The text of an export.
#[must_use]
pub fn export_text(export: &ServerExport) -> String {
    let head = export.facts.as_ref().map(|facts| &facts.head);
    let mut body = format!("{}\n{}\n", json(&export.server), json(&head));
    let objects = export.facts.iter().flat_map(|facts| &facts.objects);
    let lines = objects.map(json).chain(export.volumes.iter().map(json));
    lines.for_each(|line| {
        body += &(line
            + "
")
    });
    EXPORT.encode(&body)
}

/// Reads the file of an export.
///
/// # Errors
/// [`TextError`].
pub fn read_export(path: &Path) -> Result<ServerExport, RecoverError> {
    let text = fs::read_to_string(path).map_err(failed("read", path))?;
    Ok(parse_export(path, &text)?)
}

fn parse_export(path: &Path, text: &str) -> Result<ServerExport, TextError> {
    let mut lines = EXPORT.decode(path, text)?.lines();
    let damaged = |error: &dyn ToString| EXPORT.damaged(path, &error.to_string());
    let mut next = || lines.next().ok_or_else(|| damaged(&"a line is missing"));
    let server = serde_json::from_str(next()?).map_err(|e| damaged(&e))?;
    let head: Option<FactsHead> = serde_json::from_str(next()?).map_err(|e| damaged(&e))?;
    let (mut objects, mut volumes, mut unknown) = (Vec::new(), Vec::new(), 0);
    for line in lines {
        match serde_json::from_str(line) {
            Ok(ExportLine::Object(object)) => objects.push(object),
            Ok(ExportLine::Volume(volume)) => volumes.push(volume),
            Err(_) => unknown += 1,
        }
    }
    let facts = head.map(|head| Facts {
        head,
        objects,
        unknown,
    });
    Ok(ServerExport {
        server,
        facts,
        volumes,
    })
}

/// Plans the new incarnation of the cluster.
///
/// # Errors
/// [`RecoverError`].
pub fn make_plan(servers: &[ServerExport]) -> Result<Plan, RecoverError> {
    let id = UniqueId(random_u128().map_err(RecoverError::Random)?);
    Ok(plan(servers, id)?)
}

/// The text of a plan.
#[must_use]
pub fn plan_text(plan: &Plan) -> String {
    let head = PlanHead {
        cluster_name: plan.cluster_name.clone(),
        cluster_id: plan.cluster_id,
        old_cluster_id: plan.old_cluster_id.clone(),
        revision: plan.revision,
        nodes: plan.nodes.clone(),
        volumes: plan.volumes.clone(),
        remarks: plan.remarks.clone(),
    };
    let mut body = json(&head) + "\n";
    for (key, object) in &plan.objects {
        let line = PlanLine {
            key: key.clone(),
            object: object.clone(),
        };
        let _ = writeln!(body, "{}", json(&line));
    }
    PLAN.encode(&body)
}

/// Reads the file of a plan.
///
/// # Errors
/// [`TextError`].
pub fn read_plan(path: &Path) -> Result<Plan, RecoverError> {
    let text = fs::read_to_string(path).map_err(failed("read", path))?;
    let damaged = |error: &dyn ToString| PLAN.damaged(path, &error.to_string());
    let body = PLAN.decode(path, &text)?;
    let (head, lines) = body.split_once('\n').unwrap_or((body, ""));
    let head: PlanHead = serde_json::from_str(head).map_err(|e| damaged(&e))?;
    let objects = lines.lines().map(|line| {
        let line: PlanLine = serde_json::from_str(line).map_err(|e| damaged(&e))?;
        Ok((line.key, line.object))
    });
    let objects: Result<BTreeMap<_, _>, TextError> = objects.collect();
    Ok(Plan {
        cluster_name: head.cluster_name,
        cluster_id: head.cluster_id,
        old_cluster_id: head.old_cluster_id,
        revision: head.revision,
        nodes: head.nodes,
        objects: objects?,
        volumes: head.volumes,
        remarks: head.remarks,
    })
}

/// What `apply` did.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Applied {
    pub node: NodeNo,
    /// Where the former registry is now; `None` if there was none, or the plan was applied before.
    pub former_registry: Option<PathBuf>,
}

/// Makes a plan true in a state directory that is not in use: a registry that begins with the
/// planned state, and membership in the new incarnation. The page store is not touched. Repeating it
/// completes what was cut short.
///
/// # Errors
/// [`RecoverError`]; what was there before is there still, or aside.
pub fn apply(state: &Path, plan: &Plan) -> Result<Applied, RecoverError> {
    let check = check_state(state, CheckOptions::default(), &mut |_| {})?;
    let (mut identity, member) = membership(state, &check)?;
    let planned = planned_node(state, plan, &identity, &member)?;
    let former_registry = place_registry(state, plan, planned.number)?;
    let membership = Membership {
        name: plan.cluster_name.clone(),
        id: plan.cluster_id.to_string(),
        number: planned.number,
        node_name: planned.name,
        address: planned.peer_address,
        registry_made: true,
    };
    let directory: Arc<dyn StateDir> = Arc::new(Directory(state.to_owned()));
    let facts = FactsFile::new(Arc::clone(&directory), &identity.unique_id, &membership);
    identity.cluster = Some(membership);
    identity.save(&*directory)?;
    facts.save(&plan.state())?;
    drop(check);
    Ok(Applied {
        node: planned.number,
        former_registry,
    })
}

/// The node that the server is: given when the plan was made, or known by its record only.
fn planned_node(
    state: &Path,
    plan: &Plan,
    identity: &Identity,
    member: &Membership,
) -> Result<PlannedNode, RecoverError> {
    let given = plan
        .nodes
        .iter()
        .find(|node| node.unique_id == identity.unique_id);
    let known = plan.objects.values().find_map(|object| match object {
        Object::Node(record) if record.unique_id.to_string() == identity.unique_id => {
            Some(PlannedNode {
                number: record.number,
                unique_id: identity.unique_id.clone(),
                name: record.name.clone(),
                peer_address: record.peer_address.clone(),
            })
        }
        _ => None,
    });
    let is_of_cluster =
        [plan.old_cluster_id.clone(), plan.cluster_id.to_string()].contains(&member.id);
    let planned = given.cloned().or(known).filter(|_| is_of_cluster);
    planned.ok_or_else(|| RecoverError::NotPlanned {
        path: state.to_owned(),
        unique_id: identity.unique_id.clone(),
        cluster_id: member.id.clone(),
    })
}

/// Makes the new registry beside the old one, then swaps them.
fn place_registry(
    state: &Path,
    plan: &Plan,
    number: NodeNo,
) -> Result<Option<PathBuf>, RecoverError> {
    let (registry, new) = (state.join("registry"), state.join("registry.new"));
    let claim = format!("cluster {}", plan.cluster_id);
    if fs::read_to_string(registry.join("belongs-to")).is_ok_and(|text| text.trim() == claim) {
        return Ok(None);
    }
    if new.exists() {
        fs::remove_dir_all(&new).map_err(failed("remove", &new))?;
    }
    fs::create_dir_all(&new).map_err(failed("create", &new))?;
    let voters = plan
        .nodes
        .iter()
        .map(|node| (node.number, node.peer_address.clone()));
    seed(
        &new.join("registry.redb"),
        number,
        plan.state(),
        &voters.collect(),
    )
    .map_err(|error| RecoverError::Seed {
        path: new.clone(),
        reason: error.to_string(),
    })?;
    let directory = Directory(new.clone());
    let claimed = directory.replace("belongs-to", &format!("{claim}\n"));
    claimed.map_err(failed("write", &new))?;
    let former = set_aside(state, &registry)?;
    fs::rename(&new, &registry).map_err(failed("rename", &new))?;
    let synced = File::open(state).and_then(|directory| directory.sync_all());
    synced.map_err(failed("sync", state))?;
    Ok(former)
}

/// Renames what is left of a former registry.
fn set_aside(state: &Path, registry: &Path) -> Result<Option<PathBuf>, RecoverError> {
    if !registry.exists() {
        return Ok(None);
    }
    let names = (1..).map(|n: u32| state.join(format!("registry.before-recovery-{n}")));
    let free = names.into_iter().find(|path| !path.exists());
    let aside = free.unwrap_or_else(|| state.join("registry.before-recovery"));
    fs::rename(registry, &aside).map_err(failed("rename", registry))?;
    Ok(Some(aside))
}
