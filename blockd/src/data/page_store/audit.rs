//! The invariants of the tables, checked one by one: of a store that is not in use, and of a running
//! engine in tests.

use super::engine::Engine;
use super::finding::{Finding, Findings, Place};
use super::record::ChunkAt;
use super::tables::Tables;
use super::version::{ALL, SUBS, Version, bits};
use super::volume::{Volume, group_at};
use crate::id::VolumeId;
use crate::io::disk::Disk;

/// A set of slots; a bit each.
#[derive(Default)]
struct SlotSet(Vec<u64>);

impl SlotSet {
    /// False if it was in the set.
    fn insert(&mut self, slot: u32) -> bool {
        let (word, bit) = (slot as usize / 64, 1 << (slot % 64));
        if self.0.len() <= word {
            self.0.resize(word + 1, 0);
        }
        let is_new = self.0[word] & bit == 0;
        self.0[word] |= bit;
        is_new
    }
}

/// Checks every invariant of the tables of a store.
pub(super) fn audit(tables: &Tables, findings: &mut Findings) {
    let mut audit = Audit {
        findings,
        slots_end: tables.slots.end(),
        taken: SlotSet::default(),
    };
    let mut slots_used = 0;
    for (id, volume) in &tables.volumes {
        slots_used += audit.volume(VolumeId(*id), volume);
    }
    if slots_used != tables.slots_used {
        let what = format!(
            "{slots_used} slots are in use, {} are counted",
            tables.slots_used
        );
        audit.report(what, None);
    }
}

impl<D: Disk> Engine<D> {
    /// Checks the invariants of the tables in memory; what is wrong with them.
    pub fn audit(&self) -> Findings {
        let mut findings = Findings::default();
        audit(&self.tables, &mut findings);
        findings
    }
}

struct Audit<'a> {
    findings: &'a mut Findings,
    slots_end: u32,
    taken: SlotSet,
}

impl Audit<'_> {
    fn report(&mut self, what: String, place: Option<Place>) {
        let mut finding = Finding::damage("store/meta", what).so(
            "reads of this place may give wrong data or errors",
            "restore this server's store from a copy; report it, as no fault of a disk does this",
        );
        finding.place = place;
        self.findings.add(finding);
    }

    /// Gives the slots that the volume uses.
    fn volume(&mut self, id: VolumeId, volume: &Volume) -> u64 {
        self.snapshots(id, volume);
        let (mut slots, mut data_subs) = (0, 0);
        for (key, group) in &volume.groups {
            let first = group_at(id, *key);
            for versions in group.chains() {
                let chunk = first.chunk.saturating_add(u16::from(versions[0].chunk));
                self.versions(volume, ChunkAt { chunk, ..first }, versions);
                slots += versions.len() as u64;
                data_subs += versions
                    .iter()
                    .map(|v| u64::from(v.data().count_ones()))
                    .sum::<u64>();
            }
        }
        if data_subs != volume.data_subs {
            let what = format!(
                "volume {id} holds {data_subs} sub-blocks, {} are counted",
                volume.data_subs
            );
            self.report(what, Some(Place::volume(id)));
        }
        slots
    }

    fn snapshots(&mut self, id: VolumeId, volume: &Volume) {
        let eras = volume.snapshots().iter().map(|(_, era)| *era);
        let ends = eras.clone().skip(1).chain([volume.era]);
        if let Some((era, next)) = eras.zip(ends).find(|(era, next)| next <= era) {
            let what = format!("volume {id}: a snapshot of era {era} stands before era {next}");
            self.report(what, Some(Place::volume(id)));
        }
        let mut ids: Vec<_> = volume.snapshots().iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        if let Some(twice) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
            let what = format!("volume {id}: snapshot {} is there twice", twice[0]);
            self.report(what, Some(Place::volume(id)));
        }
    }

    /// `versions` are those of one chunk, newest first; see `version` for what must hold.
    fn versions(&mut self, volume: &Volume, at: ChunkAt, versions: &[Version]) {
        let place = Some(Place {
            volume: at.volume,
            page: Some(at.page),
            chunk: Some(at.chunk),
        });
        for version in versions {
            let below = volume.line(version.era).of(versions).skip(1);
            let older: Vec<&Version> = below.collect();
            for what in version_problems(version, &older, volume) {
                self.report(what, place);
            }
            if self.slots_end <= version.slot {
                let what = format!(
                    "slot {} lies beyond the {} of the slab",
                    version.slot, self.slots_end
                );
                self.report(what, place);
            }
            if !self.taken.insert(version.slot) {
                self.report(format!("slot {} is used twice", version.slot), place);
            }
        }
    }
}

fn version_problems(version: &Version, older: &[&Version], volume: &Volume) -> Vec<String> {
    let slot = version.slot;
    let mut problems = Vec::new();
    let mut require = |holds: bool, what: &str| {
        if !holds {
            problems.push(format!("the version in slot {slot} {what}"));
        }
    };
    require(
        version.era <= volume.era,
        "is of an era that the volume has not reached",
    );
    require(
        version.zero & !version.present == 0,
        "has zeros that it does not decide",
    );
    require(
        version.copied & !version.present == 0,
        "has copies that it does not decide",
    );
    if let Some(next) = older.first() {
        require(next.era < version.era, "is not newer than the one below it");
        // Where branches part, what all of them decide is forgotten.
        let closed = match volume.turns.is_empty() {
            true => next.present,
            false => next.present | version.present,
        };
        let is_closed = closed == ALL || older.len() == 1;
        require(
            version.present == ALL || is_closed,
            "is partial over a partial one that is not the oldest",
        );
    }
    require(
        bits(version.copied).all(|sub| is_copy(version, older, sub)),
        "has a copy that is not what lies below it",
    );
    problems
}

/// Whether a copied sub-block is what the older versions decide it to be. Where none does it may be
/// what a clone had of its parent.
fn is_copy(version: &Version, older: &[&Version], sub: usize) -> bool {
    debug_assert!(sub < SUBS);
    let bit = 1 << sub;
    let below = older.iter().find(|v| v.present & bit != 0);
    let is_zero = below.is_none_or(|v| v.zero & bit != 0);
    match version.zero & bit != 0 {
        true => is_zero,
        false => below.is_none_or(|v| v.zero & bit == 0 && v.crcs[sub] == version.crcs[sub]),
    }
}
