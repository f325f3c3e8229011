//! One volume of a plan: its table, size and snapshots.

use super::page::{PageHolder, PageIssue, decide};
use super::{Builder, STEP, VolumeFact};
use crate::control::registry::routes::flat;
use crate::control::registry::{Key, Object, SnapshotRecord, SnapshotState, VolumeRecord};
use crate::id::{
    BLOCK_BYTES, DEFAULT_PAGE_BLOCKS, Epoch, NodeNo, RouteRun, SnapshotId, TicketId, VolumeId,
};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

/// Ranges of pages of one volume and kind that are named; the rest is counted.
const RANGES_NAMED: usize = 8;

/// A store that has something of a volume.
#[derive(Clone, Copy)]
pub(super) struct Holder<'a> {
    pub(super) node: NodeNo,
    pub(super) volume: &'a VolumeFact,
}

/// A volume as it will be.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumePlan {
    pub id: VolumeId,
    pub name: String,
    pub size_bytes: u64,
    pub page_blocks: u32,
    pub epoch: Epoch,
    /// Pages of each owner.
    pub owners: BTreeMap<NodeNo, u64>,
    /// Pages that some store has.
    pub stored_pages: u64,
    /// Pages of a server that is not given.
    pub unavailable_pages: u64,
    pub snapshots: Vec<String>,
}

pub(super) fn record_of(object: &Object) -> Option<VolumeRecord> {
    match object {
        Object::Volume(record) => Some(record.clone()),
        _ => None,
    }
}

/// Who has each page.
fn pages_of(held: &[Holder<'_>]) -> BTreeMap<u32, Vec<PageHolder>> {
    let mut pages: BTreeMap<u32, Vec<PageHolder>> = BTreeMap::new();
    for holder in held {
        for fact in &holder.volume.pages {
            pages
                .entry(fact.page.0)
                .or_default()
                .push((holder.node, *fact));
        }
    }
    pages
}

/// One owner a page as runs.
fn runs_of(owners: &[NodeNo]) -> Vec<RouteRun> {
    let mut first_page = 0;
    let runs = owners.chunk_by(|a, b| a == b).map(|same| {
        let page_count = u32::try_from(same.len()).unwrap_or(u32::MAX);
        let run = RouteRun {
            first_page,
            page_count,
            owner: same[0],
        };
        first_page += page_count;
        run
    });
    runs.collect()
}

impl Builder<'_> {
    /// A volume that the facts know, from the stores that have something of it.
    pub(super) fn rebuild(&mut self, mut record: VolumeRecord, held: &[Holder<'_>]) {
        let table_epoch = record.epoch;
        let pages = pages_of(held);
        let mut owners = flat(&record.routes);
        self.fit_size(&mut record, &mut owners, &pages);
        let decided = self.decide_pages(&record, &mut owners, &pages, table_epoch);
        self.raise(&mut record, &pages);
        record.routes = runs_of(&owners);
        self.snapshots(&record, held, &owners);
        self.put(record, decided);
    }

    /// A volume that came after the facts: it is named by its id, and as large as its data.
    pub(super) fn invent(&mut self, id: VolumeId, held: &[Holder<'_>]) {
        let pages = pages_of(held);
        let Some((last, _)) = pages.last_key_value() else {
            return self.note(format!(
                "volume {id} came after the newest facts and has no data"
            ));
        };
        let facts = || pages.values().flatten().map(|(_, fact)| fact);
        let end = facts()
            .map(|fact| u64::from(fact.head_end_bytes))
            .max()
            .unwrap_or(0);
        let blocks = u32::try_from(end.div_ceil(BLOCK_BYTES)).unwrap_or(u32::MAX);
        let page_blocks = blocks.max(DEFAULT_PAGE_BLOCKS).next_power_of_two();
        let count = last + 1;
        let name = self.free_name(&format!("recovered-{id}"));
        let mut owners = vec![held[0].node; count as usize];
        let mut record = VolumeRecord {
            id,
            name: name.clone(),
            size_bytes: u64::from(count) * u64::from(page_blocks) * BLOCK_BYTES,
            page_blocks,
            epoch: Epoch(0),
            routes: Vec::new(),
            format: None,
            created_unix_s: 0,
            next_snapshot: SnapshotId(1),
        };
        self.doubt(format!(
            "volume {id} came after the newest facts: it is called {name}, and its size and page \
             size are guessed from its data"
        ));
        let decided = self.decide_pages(&record, &mut owners, &pages, Epoch(0));
        self.raise(&mut record, &pages);
        record.routes = runs_of(&owners);
        self.snapshots(&record, held, &owners);
        self.cluster.next_volume = self
            .cluster
            .next_volume
            .max(VolumeId(id.0.saturating_add(1)));
        let key = Key::VolumeName(record.name.clone());
        self.objects.insert(key, Object::VolumeName(id));
        self.put(record, decided);
    }

    fn free_name(&self, wanted: &str) -> String {
        let mut name = wanted.to_owned();
        while self.objects.contains_key(&Key::VolumeName(name.clone())) {
            name.push('x');
        }
        name
    }

    /// Pages behind the end: of a growth that the facts have missed, or left over from a shrink.
    fn fit_size(
        &mut self,
        record: &mut VolumeRecord,
        owners: &mut Vec<NodeNo>,
        pages: &BTreeMap<u32, Vec<PageHolder>>,
    ) {
        let count = u32::try_from(owners.len()).unwrap_or(u32::MAX);
        let grown =
            |holders: &&Vec<PageHolder>| holders.iter().any(|(_, fact)| record.epoch < fact.epoch);
        let beyond = || pages.range(count..);
        let last_grown = beyond()
            .filter(|(_, holders)| grown(holders))
            .map(|(page, _)| *page)
            .next_back();
        let name = record.name.clone();
        match last_grown {
            Some(last) => {
                let filler = owners.last().copied().unwrap_or(NodeNo(1));
                owners.resize(last as usize + 1, filler);
                let page_bytes = u64::from(record.page_blocks) * BLOCK_BYTES;
                record.size_bytes = (u64::from(last) + 1) * page_bytes;
                self.doubt(format!(
                    "volume {name} has grown since the newest facts; its new size is not known, and \
                     is taken as {} bytes, the end of its last page with data",
                    record.size_bytes
                ));
            }
            None if beyond().next().is_some() => self.note(format!(
                "volume {name}: {} pages behind its end are left over from a shrink and not used",
                beyond().count()
            )),
            None => {}
        }
    }

    /// Puts the owner of each page into `owners`; gives pages stored and pages unavailable.
    fn decide_pages(
        &mut self,
        record: &VolumeRecord,
        owners: &mut [NodeNo],
        pages: &BTreeMap<u32, Vec<PageHolder>>,
        table_epoch: Epoch,
    ) -> (u64, u64) {
        let mut issues: Vec<(u32, PageIssue)> = Vec::new();
        let (mut stored, mut unavailable) = (0, 0);
        for (page, owner) in (0_u32..).zip(owners.iter_mut()) {
            let holders = pages.get(&page).map_or(&[][..], Vec::as_slice);
            stored += u64::from(!holders.is_empty());
            let Some((decided, issue)) = decide(holders, Some(*owner), table_epoch, &self.present)
            else {
                continue;
            };
            *owner = decided;
            unavailable += u64::from(!self.present.contains(&decided));
            issues.extend(issue.map(|issue| (page, issue)));
        }
        self.page_remarks(&record.name, &issues);
        (stored, unavailable)
    }

    /// One remark for each run of pages with the same issue, and a count where there are many.
    fn page_remarks(&mut self, volume: &str, issues: &[(u32, PageIssue)]) {
        let same = |a: &(u32, PageIssue), b: &(u32, PageIssue)| a.0 + 1 == b.0 && a.1 == b.1;
        let mut named: BTreeMap<String, (bool, usize, usize)> = BTreeMap::new();
        for run in issues.chunk_by(same) {
            let (first, last) = (run[0].0, run[run.len() - 1].0);
            let text = run[0].1.text();
            let seen = named
                .entry(text.clone())
                .or_insert((run[0].1.is_doubt(), 0, 0));
            seen.1 += 1;
            if seen.1 > RANGES_NAMED {
                seen.2 += run.len();
                continue;
            }
            let pages = match first == last {
                true => format!("page {first}"),
                false => format!("each of pages {first} to {last}"),
            };
            self.remarks.push(super::Remark {
                doubt: run[0].1.is_doubt(),
                text: format!("volume {volume}, {pages}: {text}"),
            });
        }
        for (text, (doubt, _, more)) in named.into_iter().filter(|(_, (.., more))| *more > 0) {
            let text = format!("volume {volume}, {more} more pages: {text}");
            self.remarks.push(super::Remark { doubt, text });
        }
    }

    /// The epoch goes behind all that the old cluster can have used.
    fn raise(&mut self, record: &mut VolumeRecord, pages: &BTreeMap<u32, Vec<PageHolder>>) {
        let seen = pages.values().flatten().map(|(_, fact)| fact.epoch).max();
        let highest = record.epoch.max(seen.unwrap_or_default());
        if record.epoch < highest && record.epoch > Epoch(0) {
            let (name, epoch) = (&record.name, record.epoch);
            self.note(format!(
                "volume {name} was changed after the newest facts: they have epoch {epoch}, a store \
                 has {highest}"
            ));
        }
        record.epoch = Epoch(highest.0.saturating_add(STEP));
    }

    /// Snapshots that the facts have stay; later ones are taken over if every server has its part.
    fn snapshots(&mut self, record: &VolumeRecord, held: &[Holder<'_>], owners: &[NodeNo]) {
        let known: Vec<SnapshotRecord> = self
            .objects
            .values()
            .filter_map(|object| match object {
                Object::Snapshot(snapshot) if snapshot.volume == record.id => {
                    Some(snapshot.clone())
                }
                _ => None,
            })
            .collect();
        let has = |node: NodeNo, id: SnapshotId| {
            held.iter()
                .any(|h| h.node == node && h.volume.snapshots.contains(&id))
        };
        for snapshot in known.iter().filter(|s| s.state == SnapshotState::Committed) {
            let parts = snapshot
                .owners
                .iter()
                .filter(|node| self.present.contains(node));
            let missing: Vec<String> = parts
                .filter(|node| !has(**node, snapshot.id))
                .map(NodeNo::to_string)
                .collect();
            if !missing.is_empty() {
                self.doubt(format!(
                    "snapshot {}@{} is not in the store of node {}",
                    record.name,
                    snapshot.name,
                    missing.join(", ")
                ));
            }
        }
        let stored: BTreeSet<SnapshotId> = held
            .iter()
            .flat_map(|h| h.volume.snapshots.iter().copied())
            .collect();
        let owners: BTreeSet<NodeNo> = owners.iter().copied().collect();
        for id in stored
            .into_iter()
            .filter(|id| known.iter().all(|s| s.id != *id))
        {
            let complete = owners.iter().all(|node| has(*node, id));
            if record.next_snapshot <= id && complete {
                self.take_over_snapshot(record, id, &owners);
            } else {
                self.note(format!(
                    "volume {}: snapshot {id} was deleted or never completed, and will be swept",
                    record.name
                ));
            }
        }
    }

    fn take_over_snapshot(
        &mut self,
        record: &VolumeRecord,
        id: SnapshotId,
        owners: &BTreeSet<NodeNo>,
    ) {
        let name = format!("recovered-{id}");
        self.note(format!(
            "volume {}: snapshot {id} came after the newest facts, is complete, and is called {name}",
            record.name
        ));
        let snapshot = SnapshotRecord {
            volume: record.id,
            id,
            name: name.clone(),
            ticket: TicketId(0),
            state: SnapshotState::Committed,
            size_bytes: record.size_bytes,
            epoch: record.epoch,
            created_unix_ms: 0,
            owners: owners.iter().copied().collect(),
        };
        self.objects
            .insert(Key::SnapshotName(record.id, name), Object::SnapshotName(id));
        self.objects
            .insert(Key::Snapshot(record.id, id), Object::Snapshot(snapshot));
    }

    fn put(&mut self, mut record: VolumeRecord, (stored_pages, unavailable_pages): (u64, u64)) {
        let snapshots: Vec<_> = self
            .objects
            .values()
            .filter_map(|object| match object {
                Object::Snapshot(snapshot) if snapshot.volume == record.id => {
                    Some((snapshot.id, snapshot.name.clone()))
                }
                _ => None,
            })
            .collect();
        let highest = snapshots.iter().map(|(id, _)| id.0.saturating_add(1)).max();
        let next = record.next_snapshot.0.max(highest.unwrap_or(1));
        record.next_snapshot = SnapshotId(next.saturating_add(STEP));
        let mut owners: BTreeMap<NodeNo, u64> = BTreeMap::new();
        for run in &record.routes {
            *owners.entry(run.owner).or_default() += u64::from(run.page_count);
        }
        self.volumes.push(VolumePlan {
            id: record.id,
            name: record.name.clone(),
            size_bytes: record.size_bytes,
            page_blocks: record.page_blocks,
            epoch: record.epoch,
            owners,
            stored_pages,
            unavailable_pages,
            snapshots: snapshots.into_iter().map(|(_, name)| name).collect(),
        });
        self.objects
            .insert(Key::Volume(record.id), Object::Volume(record));
    }
}
