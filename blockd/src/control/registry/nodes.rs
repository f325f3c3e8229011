//! Nodes that shall own nothing any more, and nodes that are gone for good.

use super::change::{ChangeError, reading};
use super::moves::{MovePhase, MoveRecord};
use super::object::{Key, NodeRecord, Object};
use super::routes::owners;
use super::state::RegistryState;
use super::transaction::Transaction;
use crate::id::NodeNo;
use serde::{Deserialize, Serialize};

/// A server that shall own nothing (S003-13).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DrainRecord {
    pub node: NodeNo,
    /// Bytes a second that are copied away at the most.
    pub rate_bytes: u64,
    /// Milliseconds since 1970; shown, never compared.
    pub since_unix_ms: u64,
}

/// Says that a server shall own nothing.
///
/// # Errors
/// There is no such node, or no other one would be left.
pub fn drain_node(
    state: &RegistryState,
    record: &DrainRecord,
) -> Result<(Transaction, ()), ChangeError> {
    if state.node(record.node).is_none() {
        return Err(ChangeError::NoNode(record.node));
    }
    if !open_nodes(state).any(|node| node.number != record.node) {
        return Err(ChangeError::LastNode(record.node));
    }
    let key = Key::Drain(record.node);
    let transaction = reading(state, std::slice::from_ref(&key));
    Ok((transaction.put(key, Object::Drain(record.clone())), ()))
}

/// Lets a server own pages again.
///
/// # Errors
/// There is no such node.
pub fn undrain_node(state: &RegistryState, node: NodeNo) -> Result<(Transaction, ()), ChangeError> {
    if state.node(node).is_none() {
        return Err(ChangeError::NoNode(node));
    }
    let key = Key::Drain(node);
    if state.drain(node).is_none() {
        return Ok((Transaction::new(), ()));
    }
    let transaction = reading(state, std::slice::from_ref(&key));
    Ok((transaction.remove(key), ()))
}

/// Nodes that may get pages.
pub fn open_nodes(state: &RegistryState) -> impl Iterator<Item = &NodeRecord> {
    state
        .nodes()
        .filter(|node| state.drain(node.number).is_none())
}

/// The number of the next node: none is ever used twice.
#[must_use]
pub fn next_number(state: &RegistryState) -> NodeNo {
    let all = Key::Drain(NodeNo(0))..=Key::Drain(NodeNo(u16::MAX));
    let drained = state.range(all).filter_map(|object| match object {
        Object::Drain(record) => Some(record.node.0),
        _ => None,
    });
    let known = state.nodes().map(|node| node.number.0);
    NodeNo(known.chain(drained).max().unwrap_or(0).saturating_add(1))
}

/// Takes a node that owns nothing out of the cluster: what it has is garbage, wherever it is. Its
/// drain record stays, so that its number is never given to another one.
///
/// # Errors
/// There is no such node, it is not drained, owns pages or has parts of snapshots, or pages are on their
/// way to it.
pub fn forget_node(state: &RegistryState, node: NodeNo) -> Result<(Transaction, ()), ChangeError> {
    if state.node(node).is_none() {
        return Err(ChangeError::NoNode(node));
    }
    if state.drain(node).is_none() {
        return Err(ChangeError::NotDrained(node));
    }
    for volume in state.volumes() {
        let mut snapshots = state.snapshots(volume.id);
        let mut batches = state.page_move(volume.id).into_iter();
        if owners(&volume.routes).contains_key(&node)
            || snapshots.any(|snapshot| snapshot.owners.contains(&node))
            || batches.any(|record| is_awaited(record, node))
        {
            return Err(ChangeError::Owns(node, volume.name.clone()));
        }
    }
    let volumes = state.volumes().map(|volume| Key::Volume(volume.id));
    let moves = state.page_moves().map(|record| Key::Move(record.volume));
    let keys = [Key::Cluster, Key::Node(node), Key::Drain(node)].into_iter();
    let keys: Vec<Key> = keys.chain(volumes).chain(moves).collect();
    let ended = state.page_moves().filter_map(|record| {
        let volume = state.volume(record.volume)?;
        let is_last = matches!(record.phase, MovePhase::Dropping(batch) if batch.from == node);
        let phase = is_last.then(|| record.resting(volume))?;
        Some(MoveRecord {
            phase,
            ..record.clone()
        })
    });
    let transaction = ended.fold(reading(state, &keys), |transaction, record| {
        transaction.put(Key::Move(record.volume), Object::Move(record))
    });
    Ok((transaction.remove(Key::Node(node)), ()))
}

/// Whether pages are to come to a node, or a batch that was copied from it may still be released to it.
fn is_awaited(record: &MoveRecord, node: NodeNo) -> bool {
    match record.phase {
        MovePhase::Copying(batch) => batch.to == node || batch.from == node,
        _ => !record.is_over() && record.left.iter().any(|run| run.owner == node),
    }
}
