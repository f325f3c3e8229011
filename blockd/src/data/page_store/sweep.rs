//! Freeing what no view shows any more: after a snapshot was deleted, and after a rollback.
//!
//! A version that no view sees directly is merged with the one over it: either its sub-blocks that
//! the newer one lacks are copied up, or the newer one's are copied down over it, whichever moves
//! fewer bytes. After rollbacks there may be several over it, on different branches: then it only
//! forgets what all of them decide; or none: then it goes. One record does each, so a crash leaves it
//! done or undone.

use super::engine::{Engine, Fetched, Step};
use super::error::StoreError;
use super::read::SUB;
use super::record::{Change, ChunkAt, DataKind, RECORD_BYTES_MAX};
use super::tree::{self, Node};
use super::version::{ALL, Group, Version};
use super::volume::{Volume, group_at};
use super::write::{CopyUp, group_of};
use crate::id::VolumeId;
use crate::io::disk::Disk;
use std::collections::BTreeSet;

/// What is to be done about a version that no view sees directly.
pub(super) enum Todo<'a> {
    /// Merge it with the only one over it.
    Merge {
        newer: &'a Version,
        older: &'a Version,
    },
    /// Forget these sub-blocks of it: those over it decide them, or there are none.
    Forget { version: &'a Version, mask: u16 },
}

/// Sub-blocks of the older version that still count.
fn missing(newer: &Version, older: &Version) -> u16 {
    older.present & !newer.present
}

/// True if copying the older version's part up moves less than copying the newer's down.
fn is_up(newer: &Version, older: &Version) -> bool {
    (missing(newer, older) & older.data()).count_ones() <= newer.data().count_ones()
}

impl<D: Disk> Engine<D> {
    /// A write goes to this chunk. Behind a rollback it leaves the version of the branch from which
    /// the head came, for views of that branch. If there are none any more, no deletion will come
    /// that frees it: the group is to be swept.
    pub(super) fn note_turned(&mut self, at: ChunkAt) {
        let Some(volume) = self.tables.volumes.get(&at.volume.0) else {
            return;
        };
        let Some(turn) = volume.turns.last() else {
            return;
        };
        let newest = volume.chunk(at.page, at.chunk).first();
        if newest.is_some_and(|newest| newest.era < turn.era) {
            self.turned.insert((at.volume, group_of(at)));
        }
    }

    /// The groups that writes have left to be swept.
    pub fn take_turned(&mut self) -> BTreeSet<(VolumeId, u64)> {
        std::mem::take(&mut self.turned)
    }

    /// Does the next thing that is to be done in a group; `Done(false)` says that there was none.
    pub fn sweep_group(
        &mut self,
        volume: VolumeId,
        key: u64,
        fetched: &[Fetched],
    ) -> Result<Step<bool>, StoreError> {
        self.check_writable()?;
        let found = self.tables.volumes.get(&volume.0).filter(|v| !v.deleted);
        let todo = found.and_then(|found| first_todo(found, found.groups.get(&key)?));
        let first = group_at(volume, key);
        let at = |version: &Version| ChunkAt {
            chunk: first.chunk + u16::from(version.chunk),
            ..first
        };
        match todo {
            None => Ok(Step::Done(false)),
            Some(Todo::Forget { version, mask }) => {
                let (at, slot) = (at(version), version.slot);
                if !self.has_room(64) {
                    return Ok(Step::Full);
                }
                self.commit(&Change::Forget { at, slot, mask }, &[])?;
                Ok(Step::Done(true))
            }
            Some(Todo::Merge { newer, older }) => {
                let mut cold = Vec::new();
                let at = at(newer);
                let (copy, drop) = self.plan_merge(at, newer, older, fetched, &mut cold)?;
                if !cold.is_empty() {
                    return Ok(Step::Cold(cold));
                }
                self.merge(at, &copy, drop)
            }
        }
    }

    fn merge(&mut self, at: ChunkAt, copy: &CopyUp, drop: u32) -> Result<Step<bool>, StoreError> {
        if !self.has_room(RECORD_BYTES_MAX as u64) {
            return Ok(Step::Full);
        }
        if copy.mask != 0 {
            self.claim_space(u64::from(copy.mask.count_ones()) * SUB as u64)?;
        }
        self.log_copy(at, copy, DataKind::Merge { drop })?;
        Ok(Step::Done(true))
    }

    fn plan_merge(
        &self,
        at: ChunkAt,
        newer: &Version,
        older: &Version,
        fetched: &[Fetched],
        cold: &mut Vec<super::engine::ColdRead>,
    ) -> Result<(CopyUp, u32), StoreError> {
        let (keep, from, want) = if is_up(newer, older) {
            (newer, older, missing(newer, older))
        } else {
            (older, newer, newer.present)
        };
        let sources = self.tables.sources_in(std::iter::once(from), want);
        let copy = self.read_copy_up(at, keep.slot, &sources, want, fetched, cold)?;
        Ok((copy, from.slot))
    }
}

/// The first thing to do in a group, if there is any.
pub(super) fn first_todo<'a>(volume: &Volume, group: &'a Group) -> Option<Todo<'a>> {
    group.chains().find_map(|versions| {
        if volume.turns.is_empty() {
            return unseen(volume, versions);
        }
        let nodes = tree::nodes(volume, versions);
        let mut found = nodes.iter().zip(versions);
        found.find_map(|(node, version)| todo_in_tree(node, version, versions))
    })
}

/// Without rollbacks the one over a version is the one before it, and the first is seen.
fn unseen<'a>(volume: &Volume, versions: &'a [Version]) -> Option<Todo<'a>> {
    let mut pairs = versions.windows(2);
    let pair = pairs.find(|pair| !volume.is_seen(pair[1].era, pair[0].era))?;
    Some(Todo::Merge {
        newer: &pair[0],
        older: &pair[1],
    })
}

fn todo_in_tree<'a>(
    node: &Node,
    version: &'a Version,
    versions: &'a [Version],
) -> Option<Todo<'a>> {
    if node.seen {
        return None;
    }
    if let [child] = node.children[..] {
        let (newer, older) = (&versions[child], version);
        return Some(Todo::Merge { newer, older });
    }
    let over = node.children.iter().map(|child| versions[*child].present);
    let mask = over.fold(ALL, |mask, present| mask & present) & version.present;
    (mask != 0).then_some(Todo::Forget { version, mask })
}
