//! The history of a volume, as all stores that hold pages of it share it: its snapshots and rollbacks.
//!
//! Eras count differently in every store. What stores agree on is the order of snapshots and
//! rollbacks, and to which era each rollback led. So a version is placed by what bounds its era from
//! below, and that place stays right whatever snapshots are taken on either side meanwhile.
//! A rollback needs its place even when its snapshot was deleted since: the era to which it
//! led ends there for one branch, and goes on for the other.
//!
//! A store that gets its first page of a volume takes over the sender's history before (S003-13).

use super::engine::{Engine, Step};
use super::error::StoreError;
use super::line::Turn;
use super::record::Change;
use super::volume::Volume;
use crate::id::{SnapshotId, VolumeId};
use crate::io::disk::Disk;
use serde::{Deserialize, Serialize};

/// Where in the history of its volume a version lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EraPlace {
    /// The newest snapshot that does not see it; `None`: all see it.
    pub after: Option<SnapshotId>,
    /// Rollbacks before it.
    pub rollbacks: u32,
    /// Of the rollbacks that led to an era before it, the one that led to the newest, counted from 1;
    /// 0: none did.
    pub led_before: u32,
}

/// Snapshots and rollbacks of a volume, by the eras of one store.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    /// With the last era that each one sees, in the order of these.
    pub snapshots: Vec<(SnapshotId, u32)>,
    /// Eras that rollbacks began, each with the one that it follows, in order.
    pub rollbacks: Vec<(u32, u32)>,
    /// Routing epoch of the last rollback.
    pub rolled_back: u32,
}

impl History {
    /// The snapshots, oldest first.
    #[must_use]
    pub fn order(&self) -> Vec<SnapshotId> {
        self.snapshots.iter().map(|(id, _)| *id).collect()
    }

    fn is_sound(&self) -> bool {
        self.snapshots.is_sorted_by(|a, b| a.1 < b.1)
            && self.rollbacks.is_sorted_by(|a, b| a.0 < b.0)
            && self.rollbacks.iter().all(|(era, to)| to < era)
    }

    /// The records that make it, in the order of the eras.
    fn changes(&self, volume: VolumeId) -> Vec<Change> {
        let snapshots = self.snapshots.iter();
        let snapshots = snapshots.map(|(id, era)| {
            let change = Change::TakeSnapshotAt(volume, *id, *era);
            ((*era, true), change)
        });
        let rollbacks = self.rollbacks.iter().map(|(era, to)| {
            let turn = Turn { era: *era, to: *to };
            ((*era, false), Change::Turn(volume, turn, self.rolled_back))
        });
        let mut changes: Vec<((u32, bool), Change)> = snapshots.chain(rollbacks).collect();
        changes.sort_by_key(|(at, _)| *at);
        changes.into_iter().map(|(_, change)| change).collect()
    }
}

impl Volume {
    /// The place of an era.
    pub(super) fn place(&self, era: u32) -> EraPlace {
        let older = self.snapshots_between(0, era).end;
        let rollbacks = self.turns.partition_point(|turn| turn.era <= era);
        let led = (1..).zip(&self.turns).filter(|(_, turn)| turn.to < era);
        EraPlace {
            after: older.checked_sub(1).map(|at| self.snapshots()[at].0),
            rollbacks: u32::try_from(rollbacks).unwrap_or(u32::MAX),
            led_before: led.max_by_key(|(_, turn)| turn.to).map_or(0, |(at, _)| at),
        }
    }

    /// The era at the place of a version of a sender whose snapshots are `order`. A snapshot that
    /// was dropped here already counts as the one before it.
    pub(super) fn era_at(&self, order: &[SnapshotId], place: EraPlace) -> Option<u32> {
        let turn = |number: u32| match number.checked_sub(1) {
            Some(at) => self.turns.get(at as usize).copied().map(Some),
            None => Some(None),
        };
        let begun = turn(place.rollbacks)?.map_or(0, |turn| turn.era);
        let behind = turn(place.led_before)?.map_or(0, |turn| turn.to + 1);
        let behind_snapshot = match place.after {
            None => 0,
            Some(after) => {
                let at = order.iter().position(|id| *id == after)?;
                let mut known = order[..=at].iter().rev();
                let last = known.find_map(|id| self.era_of(*id));
                last.map_or(0, |last| last + 1)
            }
        };
        Some(begun.max(behind).max(behind_snapshot))
    }
}

impl<D: Disk> Engine<D> {
    /// The history of a volume in this store.
    pub fn history(&self, volume: VolumeId) -> History {
        let Some(found) = self.tables.volumes.get(&volume.0).filter(|v| !v.deleted) else {
            return History::default();
        };
        let rollbacks = found.turns.iter().map(|turn| (turn.era, turn.to));
        History {
            snapshots: found.snapshots().to_vec(),
            rollbacks: rollbacks.collect(),
            rolled_back: found.rolled_back,
        }
    }

    /// Gives a volume of which nothing is held here the history of another store.
    pub fn adopt_history(
        &mut self,
        volume: VolumeId,
        history: &History,
    ) -> Result<Step<()>, StoreError> {
        self.check_writable()?;
        self.check_volume(volume)?;
        let known = self.tables.volumes.get(&volume.0);
        if !history.is_sound() || known.is_some_and(|known| !known.groups.is_empty()) {
            return Err(StoreError::BadRequest {
                offset_bytes: 0,
                len_bytes: 0,
                problem: "a history that is unsound, or of a volume that has pages here",
            });
        }
        let parent = known.and_then(|known| known.parent);
        let forget = known.map(|_| Change::DropVolume(volume));
        let attach = parent.map(|parent| Change::Clone(volume, parent));
        let changes = forget.into_iter().chain(attach);
        let changes: Vec<Change> = changes.chain(history.changes(volume)).collect();
        if !self.has_room(64 * changes.len() as u64) {
            return Ok(Step::Full);
        }
        changes
            .iter()
            .try_for_each(|change| self.commit(change, &[]))?;
        Ok(Step::Done(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Snapshots 1 and 2 at eras 1 and 4, a rollback to era 1 began era 5, one to era 3, whose
    /// snapshot was deleted since, era 6.
    fn volume(deleted: &[u32]) -> Volume {
        let mut volume = Volume::default();
        let snapshots = [(SnapshotId(1), 1), (SnapshotId(2), 4)];
        let left = snapshots
            .into_iter()
            .filter(|(id, _)| !deleted.contains(&id.0));
        volume.set_snapshots(left.collect());
        volume.turns = vec![Turn { era: 5, to: 1 }, Turn { era: 6, to: 3 }];
        volume.era = 6;
        volume
    }

    #[test]
    fn eras_that_some_view_tells_apart_have_places_of_their_own() {
        for deleted in [&[][..], &[1], &[2], &[1, 2]] {
            let volume = volume(deleted);
            let order: Vec<SnapshotId> = volume.snapshots().iter().map(|(id, _)| *id).collect();
            let found = (0..=6).map(|era| volume.era_at(&order, volume.place(era)).unwrap());
            // Era 1 ends where a rollback led, 3 likewise, and 4 with a snapshot.
            assert_eq!(
                found.collect::<Vec<_>>(),
                [0, 0, 2, 2, 4, 5, 6],
                "{deleted:?}"
            );
        }
    }

    #[test]
    fn a_rollback_that_is_unknown_here_has_no_place() {
        let place = EraPlace {
            rollbacks: 3,
            ..EraPlace::default()
        };
        assert_eq!(volume(&[]).era_at(&[], place), None);
    }

    #[test]
    fn only_a_history_that_can_be_is_sound() {
        let history = |snapshots: &[u32], rollbacks: &[(u32, u32)]| History {
            snapshots: (1..)
                .map(SnapshotId)
                .zip(snapshots.iter().copied())
                .collect(),
            rollbacks: rollbacks.to_vec(),
            rolled_back: 9,
        };
        assert!(history(&[1, 4, 6], &[(5, 1), (6, 3)]).is_sound());
        assert!(!history(&[4, 4], &[]).is_sound());
        assert!(!history(&[], &[(5, 5)]).is_sound());
        assert!(!history(&[], &[(5, 1), (5, 0)]).is_sound());
        let order = history(&[5, 6], &[(6, 3)]).changes(VolumeId(1));
        let turn = Turn { era: 6, to: 3 };
        assert_eq!(
            order,
            [
                Change::TakeSnapshotAt(VolumeId(1), SnapshotId(1), 5),
                Change::Turn(VolumeId(1), turn, 9),
                Change::TakeSnapshotAt(VolumeId(1), SnapshotId(2), 6),
            ]
        );
    }
}
