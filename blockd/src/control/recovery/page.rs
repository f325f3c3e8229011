//! Who owns a page: the last known table against the stores that have it.

use super::PageFact;
use crate::id::{Epoch, NodeNo};
use std::collections::BTreeSet;

/// A store that has the page.
pub(super) type PageHolder = (NodeNo, PageFact);

/// What is to be said of the decision.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum PageIssue {
    /// Other servers have an older or equal copy, which nobody will read.
    OtherCopies(Vec<NodeNo>),
    /// The server of the table has nothing of it, another one has: that one was chosen.
    OwnerEmpty { table: NodeNo, chosen: NodeNo },
    /// The server of the table is not given; another one has a copy that may be older.
    OwnerMissing { table: NodeNo, chosen: NodeNo },
    /// Several servers have it at the same epoch with different data.
    Tie {
        epoch: Epoch,
        chosen: NodeNo,
        others: Vec<NodeNo>,
    },
    /// The server of the table is not given, and nobody else has it.
    Unavailable(NodeNo),
}

impl PageIssue {
    pub(super) fn is_doubt(&self) -> bool {
        !matches!(self, PageIssue::OtherCopies(_))
    }

    pub(super) fn text(&self) -> String {
        let list = |nodes: &[NodeNo]| {
            let nodes: Vec<String> = nodes.iter().map(NodeNo::to_string).collect();
            nodes.join(", ")
        };
        match self {
            PageIssue::OtherCopies(nodes) => {
                format!("node {} also has a copy, which is not used", list(nodes))
            }
            PageIssue::OwnerEmpty { table, chosen } => format!(
                "belongs to node {table} by the last known table, but only node {chosen} has data: \
                 node {chosen} was chosen"
            ),
            PageIssue::OwnerMissing { table, chosen } => format!(
                "belongs to node {table}, which is not given; the copy of node {chosen} was chosen \
                 and may be older"
            ),
            PageIssue::Tie {
                epoch,
                chosen,
                others,
            } => format!(
                "node {chosen} and node {} have different data of the same epoch {epoch}: node \
                 {chosen} was chosen",
                list(others)
            ),
            PageIssue::Unavailable(node) => {
                format!("belongs to node {node}, which is not given, and nobody else has a copy")
            }
        }
    }
}

/// The owner of a page. `table` is the one of the last known table, which has `table_epoch`; `None`
/// only if there are holders.
pub(super) fn decide(
    holders: &[PageHolder],
    table: Option<NodeNo>,
    table_epoch: Epoch,
    present: &BTreeSet<NodeNo>,
) -> Option<(NodeNo, Option<PageIssue>)> {
    let Some(newest) = holders.iter().map(|(_, fact)| fact.epoch).max() else {
        let owner = table?;
        let is_lost = !present.contains(&owner);
        return Some((owner, is_lost.then_some(PageIssue::Unavailable(owner))));
    };
    let holds = |node: NodeNo| holders.iter().any(|(holder, _)| *holder == node);
    let from_table = table.filter(|_| newest <= table_epoch);
    if let Some(owner) = from_table.filter(|owner| holds(*owner)) {
        return Some((owner, other_copies(holders, owner)));
    }
    let best: Vec<&PageHolder> = holders
        .iter()
        .filter(|(_, fact)| fact.epoch == newest)
        .collect();
    let preferred = table.filter(|node| best.iter().any(|(holder, _)| holder == node));
    let chosen = preferred.or_else(|| best.iter().map(|(node, _)| *node).min())?;
    let issue = match from_table {
        Some(table) if present.contains(&table) => Some(PageIssue::OwnerEmpty { table, chosen }),
        Some(table) => Some(PageIssue::OwnerMissing { table, chosen }),
        None if best.iter().all(|(_, fact)| fact.digest == best[0].1.digest) => {
            other_copies(holders, chosen)
        }
        None => Some(PageIssue::Tie {
            epoch: newest,
            chosen,
            others: best
                .iter()
                .map(|(node, _)| *node)
                .filter(|node| *node != chosen)
                .collect(),
        }),
    };
    Some((chosen, issue))
}

fn other_copies(holders: &[PageHolder], owner: NodeNo) -> Option<PageIssue> {
    let others = holders
        .iter()
        .map(|(node, _)| *node)
        .filter(|node| *node != owner);
    let others: Vec<NodeNo> = others.collect();
    (!others.is_empty()).then_some(PageIssue::OtherCopies(others))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::PageNo;

    const TABLE_EPOCH: Epoch = Epoch(2);

    /// Every way in which three servers can have a page or not (epochs 1 to 3, two contents), every
    /// table, and every set of servers given that includes the holders.
    fn every_case(mut check: impl FnMut(&[PageHolder], Option<NodeNo>, &BTreeSet<NodeNo>)) -> u32 {
        let mut cases = 0;
        for code in 0..7_u32.pow(3) {
            let copy = |node: u16| {
                let kind = code / 7_u32.pow(u32::from(node) - 1) % 7;
                let fact = PageFact {
                    page: PageNo(0),
                    epoch: Epoch(kind.saturating_sub(1) / 2 + 1),
                    digest: kind.saturating_sub(1) % 2,
                    head_end_bytes: 1,
                };
                (kind > 0).then_some((NodeNo(node), fact))
            };
            let holders: Vec<PageHolder> = (1..=3).filter_map(copy).collect();
            for table in [None, Some(1), Some(2), Some(3), Some(4)].map(|n| n.map(NodeNo)) {
                for set in 0..16_u16 {
                    let present = (1..=4).filter(|n| set >> (n - 1) & 1 == 1).map(NodeNo);
                    let present: BTreeSet<NodeNo> = present.collect();
                    if holders.iter().all(|(node, _)| present.contains(node)) {
                        check(&holders, table, &present);
                        cases += 1;
                    }
                }
            }
        }
        cases
    }

    #[test]
    fn the_highest_epoch_wins_and_what_could_be_otherwise_is_a_doubt() {
        let cases = every_case(|holders, table, present| {
            let Some((owner, issue)) = decide(holders, table, TABLE_EPOCH, present) else {
                assert!(holders.is_empty() && table.is_none());
                return;
            };
            let doubt = issue.as_ref().is_some_and(PageIssue::is_doubt);
            let context = format!("{holders:?} {table:?} {present:?}: {owner} {issue:?}");
            let newest = holders.iter().map(|(_, fact)| fact.epoch).max();
            let chosen = holders.iter().find(|(node, _)| *node == owner);
            // Data newer than the table is never given up.
            if newest.is_some_and(|newest| TABLE_EPOCH < newest) {
                assert_eq!(chosen.map(|(_, fact)| fact.epoch), newest, "{context}");
            }
            // A server that is not given never goes unnoticed.
            assert!(doubt || present.contains(&owner), "{context}");
            // Without a doubt, either the table says so, or nobody else has other data as new.
            let rivals = holders.iter().any(|(node, fact)| {
                *node != owner
                    && Some(fact.epoch) == newest
                    && chosen.is_none_or(|(_, ours)| {
                        ours.epoch < fact.epoch || ours.digest != fact.digest
                    })
            });
            let by_table =
                table == Some(owner) && newest.is_none_or(|newest| newest <= TABLE_EPOCH);
            assert!(doubt || by_table || !rivals, "{context}");
            // Where somebody has data, a server without any is chosen by nothing.
            assert!(holders.is_empty() || chosen.is_some(), "{context}");
        });
        assert!(cases > 5_000, "{cases}");
    }
}
