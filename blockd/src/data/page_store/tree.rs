//! After a rollback the versions of a chunk are a tree: who sees each of them, and what only one
//! view sees.

use super::version::{Version, resolve};
use super::volume::Volume;

/// A version in the tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Node {
    /// It is the newest version that some view sees.
    pub(super) seen: bool,
    /// Versions of which it is the next older one, by index.
    pub(super) children: Vec<usize>,
}

/// The tree of the versions of a chunk, newest first.
///
/// Eras are walked in stretches between turns, the newest first, so that what hangs on a stretch is
/// known before the stretch itself. What is below the oldest version of a stretch hangs on the era to
/// which its turn leads.
pub(super) fn nodes(volume: &Volume, versions: &[Version]) -> Vec<Node> {
    let turns = &volume.turns;
    let mut nodes = vec![Node::default(); versions.len()];
    let mut hanging: Vec<Vec<(u32, Node)>> = vec![Vec::new(); turns.len() + 1];
    for stretch in (0..=turns.len()).rev() {
        let first = stretch.checked_sub(1).map_or(0, |before| turns[before].era);
        let after = turns.get(stretch).map(|turn| turn.era);
        let from = after.map_or(0, |after| versions.partition_point(|v| after <= v.era));
        let to = versions.partition_point(|v| first <= v.era);
        let mut foot = Node::default();
        let mut newer = None;
        for index in from..to {
            let end = newer.map_or(after, |newer: usize| Some(versions[newer].era));
            nodes[index].seen |= is_seen(volume, versions[index].era, end);
            nodes[index].children.extend(newer);
            newer = Some(index);
        }
        let end = newer.map_or(after, |newer| Some(versions[newer].era));
        foot.seen = is_seen(volume, first, end);
        foot.children.extend(newer);
        for (era, node) in std::mem::take(&mut hanging[stretch]) {
            let below = from + versions[from..to].partition_point(|v| era < v.era);
            let on = if below < to {
                &mut nodes[below]
            } else {
                &mut foot
            };
            on.seen |= node.seen;
            on.children.extend(node.children);
        }
        if let Some(turn) = stretch.checked_sub(1).map(|before| turns[before]) {
            let onto = turns.partition_point(|other| other.era <= turn.to);
            hanging[onto].push((turn.to, foot));
        }
    }
    nodes
}

/// True if a view has an era from `from` to before `end`; without an end the head has one.
fn is_seen(volume: &Volume, from: u32, end: Option<u32>) -> bool {
    end.is_none_or(|end| volume.is_seen(from, end))
}

/// Data sub-blocks that only the snapshot of this era shows.
pub(super) fn only_shown_by(volume: &Volume, versions: &[Version], era: u32) -> u32 {
    let newest = |era| volume.line(era).of(versions).next().map(|v| v.era);
    let Some(own) = newest(era) else { return 0 };
    let eras = volume.snapshots().iter().map(|(_, era)| *era);
    let viewers = eras
        .chain([u32::MAX])
        .filter(|era| newest(*era) == Some(own));
    if viewers.take(2).count() != 1 {
        return 0;
    }
    let mut shown = shown_by(volume, versions, own);
    for (node, other) in nodes(volume, versions).iter().zip(versions) {
        if node.seen && other.era != own {
            let theirs = shown_by(volume, versions, other.era);
            for (mask, their) in shown.iter_mut().zip(theirs) {
                *mask &= !their;
            }
        }
    }
    shown.iter().map(|mask| mask.count_ones()).sum()
}

/// For each version the data sub-blocks that a view of this era reads from it.
fn shown_by(volume: &Volume, versions: &[Version], era: u32) -> Vec<u16> {
    let mut masks = vec![0; versions.len()];
    let found = resolve(volume.line(era).of(versions), u16::MAX);
    for (sub, version) in found.into_iter().enumerate() {
        let Some(version) = version else { continue };
        let index = versions.partition_point(|v| version.era < v.era);
        masks[index] |= version.data() & 1 << sub;
    }
    masks
}

#[cfg(test)]
mod tests {
    use super::super::line::Turn;
    use super::super::version::SUBS;
    use super::*;
    use crate::id::SnapshotId;

    fn version(era: u32, present: u16) -> Version {
        Version {
            crcs: [0; SUBS],
            slot: era,
            era,
            present,
            zero: 0,
            copied: 0,
            chunk: 0,
        }
    }

    /// Snapshots at eras 1 and 4; a rollback to era 1 began era 5.
    fn volume() -> Volume {
        let mut volume = Volume::default();
        volume.set_snapshots(vec![(SnapshotId(1), 1), (SnapshotId(2), 4)]);
        volume.turns = vec![Turn { era: 5, to: 1 }];
        volume
    }

    #[test]
    fn branches_meet_where_the_rollback_led() {
        let volume = volume();
        let versions = [version(6, 1), version(3, 2), version(2, 4), version(0, 8)];
        let found = nodes(&volume, &versions);
        let node = |seen, children: &[usize]| Node {
            seen,
            children: children.to_vec(),
        };
        assert_eq!(
            found,
            [
                node(true, &[]),
                node(true, &[]),
                node(false, &[1]),
                node(true, &[2, 0]),
            ]
        );
        let without_head = nodes(&volume, &versions[1..]);
        assert_eq!(without_head[2], node(true, &[1]), "the head sees it, too");
    }

    #[test]
    fn only_what_no_other_branch_shows_is_counted() {
        let volume = volume();
        // The head decides 1, the second snapshot 3 of the sub-blocks that era 0 has.
        let versions = [version(6, 0b0001), version(3, 0b0011), version(0, 0b1111)];
        assert_eq!(only_shown_by(&volume, &versions, 4), 2);
        assert_eq!(only_shown_by(&volume, &versions, 1), 1, "sub-block 0");
        let versions = [version(6, 0b1111), version(3, 0b0011), version(0, 0b1111)];
        assert_eq!(only_shown_by(&volume, &versions, 1), 2);
    }
}
