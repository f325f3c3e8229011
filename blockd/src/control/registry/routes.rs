//! Routing tables as runs of pages, and how pages are spread over servers.

use crate::id::NodeNo;
use crate::limits::{PAGE_BLOCKS_MAX, ROUTE_RUNS_MAX, ROUTE_RUNS_TARGET, VOLUME_PAGES_MAX};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};

pub use crate::id::RouteRun;

/// Why a routing table cannot be made or is no routing table.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error, Serialize, Deserialize)]
pub enum RouteError {
    /// No server to give pages to.
    #[error("no server is given to hold the volume: name at least one")]
    NoServers,
    /// Node number 0, or a server named twice.
    #[error("server {0} is no node or is named twice")]
    BadServer(NodeNo),
    /// The page size in blocks.
    #[error("a page of {0} blocks is not possible: give a power of two up to {PAGE_BLOCKS_MAX}")]
    PageBlocks(u32),
    /// The number of pages.
    #[error("a volume of {0} pages is not possible: it has 1 to {VOLUME_PAGES_MAX} pages")]
    PageCount(u64),
    /// The runs do not follow each other from page 0 to the last page.
    #[error("the routing table has a gap or an overlap at page {0}")]
    Gap(u32),
    /// Runs over the limit.
    #[error("the routing table has {0} runs, over {ROUTE_RUNS_MAX}: move pages together first")]
    TooManyRuns(usize),
}

/// Pages in a run of a volume of `page_count` pages: a power of two, 1 up to 1024 pages.
#[must_use]
pub fn run_pages(page_count: u32) -> u32 {
    page_count
        .div_ceil(ROUTE_RUNS_TARGET)
        .max(1)
        .next_power_of_two()
}

/// Spreads `page_count` pages over `servers` in turn, beginning with server `start` modulo
/// their number (so that small volumes do not all begin on the same server).
///
/// # Errors
/// No servers, a server named twice, or a page count out of its limits.
pub fn spread(
    page_count: u32,
    servers: &[NodeNo],
    start: u64,
) -> Result<Vec<RouteRun>, RouteError> {
    check_servers(servers)?;
    let start = usize::try_from(start % servers.len() as u64).unwrap_or(0);
    let mut runs = Vec::new();
    fill(&mut runs, page_count, servers, start)?;
    Ok(runs)
}

/// Adds pages up to `page_count`; pages that exist keep their owner, the new ones go to
/// `servers` in turn, after the run at the end is filled up.
///
/// # Errors
/// As [`spread`], or more runs than a table may have.
pub fn extend(
    runs: &[RouteRun],
    page_count: u32,
    servers: &[NodeNo],
) -> Result<Vec<RouteRun>, RouteError> {
    check_servers(servers)?;
    let mut runs = runs.to_vec();
    let last = runs
        .last()
        .and_then(|run| servers.iter().position(|s| *s == run.owner));
    let next = last.map_or_else(|| least_loaded(&runs, servers), |at| at + 1);
    if last.is_some() {
        fill_last(&mut runs, page_count);
    }
    fill(&mut runs, page_count, servers, next)?;
    Ok(runs)
}

/// Cuts the table to its first `page_count` pages.
#[must_use]
pub fn cut(runs: &[RouteRun], page_count: u32) -> Vec<RouteRun> {
    let kept = runs.iter().filter(|run| run.first_page < page_count);
    kept.map(|run| RouteRun {
        page_count: run.page_count.min(page_count - run.first_page),
        ..*run
    })
    .collect()
}

/// Gives pages to a server; neighbours of the same owner become one run.
#[must_use]
pub fn assign(runs: &[RouteRun], first_page: u32, page_count: u32, owner: NodeNo) -> Vec<RouteRun> {
    let end = first_page.saturating_add(page_count);
    let mut all = Vec::new();
    for run in runs {
        let run_end = run.first_page + run.page_count;
        let cuts = [first_page, end].map(|cut| cut.clamp(run.first_page, run_end));
        let parts = [
            (run.first_page, cuts[0], run.owner),
            (cuts[0], cuts[1], owner),
            (cuts[1], run_end, run.owner),
        ];
        for (first_page, end, owner) in parts.into_iter().filter(|(first, end, _)| first < end) {
            let page_count = end - first_page;
            push(
                &mut all,
                RouteRun {
                    first_page,
                    page_count,
                    owner,
                },
            );
        }
    }
    all
}

/// Owner of a page; `None` behind the end of the volume.
#[must_use]
pub fn owner(runs: &[RouteRun], page: u32) -> Option<NodeNo> {
    let behind = runs.partition_point(|run| run.first_page <= page);
    let run = runs.get(behind.checked_sub(1)?)?;
    (page - run.first_page < run.page_count).then_some(run.owner)
}

/// Every server that owns a page, with the number of its pages.
#[must_use]
pub fn owners(runs: &[RouteRun]) -> BTreeMap<NodeNo, u32> {
    let mut owners = BTreeMap::new();
    for run in runs {
        *owners.entry(run.owner).or_default() += run.page_count;
    }
    owners
}

/// The table with one owner per page, as the router keeps it.
#[must_use]
pub fn flat(runs: &[RouteRun]) -> Vec<NodeNo> {
    let runs = runs
        .iter()
        .flat_map(|run| std::iter::repeat_n(run.owner, run.page_count as usize));
    runs.collect()
}

/// Checks that the runs are sorted and cover the pages 0 to `page_count` without a gap.
///
/// # Errors
/// The first page at which they do not.
pub fn check(runs: &[RouteRun], page_count: u32) -> Result<(), RouteError> {
    if runs.len() > ROUTE_RUNS_MAX {
        return Err(RouteError::TooManyRuns(runs.len()));
    }
    let mut next = 0_u32;
    for run in runs {
        if run.owner == NodeNo(0) {
            return Err(RouteError::BadServer(run.owner));
        }
        let end = next
            .checked_add(run.page_count)
            .filter(|_| run.page_count > 0);
        next = end
            .filter(|_| run.first_page == next)
            .ok_or(RouteError::Gap(next))?;
    }
    if next == page_count {
        Ok(())
    } else {
        Err(RouteError::Gap(next.min(page_count)))
    }
}

fn check_servers(servers: &[NodeNo]) -> Result<(), RouteError> {
    let first = servers.first().ok_or(RouteError::NoServers)?;
    let mut seen = BTreeSet::from([NodeNo(0)]);
    let twice = servers.iter().find(|server| !seen.insert(**server));
    twice
        .map_or(Ok(()), |server| Err(RouteError::BadServer(*server)))
        .and(Ok(first))
        .map(|_| ())
}

fn covered(runs: &[RouteRun]) -> u32 {
    runs.last().map_or(0, |run| run.first_page + run.page_count)
}

fn least_loaded(runs: &[RouteRun], servers: &[NodeNo]) -> usize {
    let load = owners(runs);
    let pages = |at: &usize| {
        servers
            .get(*at)
            .and_then(|s| load.get(s))
            .copied()
            .unwrap_or(0)
    };
    (0..servers.len()).min_by_key(pages).unwrap_or(0)
}

fn fill_last(runs: &mut [RouteRun], page_count: u32) {
    let room = page_count.saturating_sub(covered(runs));
    if let Some(run) = runs.last_mut() {
        run.page_count += run_pages(page_count)
            .saturating_sub(run.page_count)
            .min(room);
    }
}

fn fill(
    runs: &mut Vec<RouteRun>,
    page_count: u32,
    servers: &[NodeNo],
    start: usize,
) -> Result<(), RouteError> {
    if !(1..=VOLUME_PAGES_MAX).contains(&page_count) {
        return Err(RouteError::PageCount(u64::from(page_count)));
    }
    let mut next = covered(runs);
    for owner in servers.iter().cycle().skip(start % servers.len()) {
        let pages = run_pages(page_count).min(page_count.saturating_sub(next));
        if pages == 0 {
            break;
        }
        push(
            runs,
            RouteRun {
                first_page: next,
                page_count: pages,
                owner: *owner,
            },
        );
        next += pages;
    }
    if runs.len() > ROUTE_RUNS_MAX {
        Err(RouteError::TooManyRuns(runs.len()))
    } else {
        Ok(())
    }
}

/// Appends a run; joins it with the last one if they have the same owner.
fn push(runs: &mut Vec<RouteRun>, run: RouteRun) {
    match runs.last_mut() {
        Some(last) if last.owner == run.owner => last.page_count += run.page_count,
        _ => runs.push(run),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn servers(count: u16) -> Vec<NodeNo> {
        (1..=count).map(NodeNo).collect()
    }

    fn run(first_page: u32, page_count: u32, owner: u16) -> RouteRun {
        RouteRun {
            first_page,
            page_count,
            owner: NodeNo(owner),
        }
    }

    #[test]
    fn pages_are_given_away_and_runs_stay_joined() {
        let runs = [run(0, 4, 1), run(4, 4, 2), run(8, 4, 1)];
        assert_eq!(assign(&runs, 4, 4, NodeNo(1)), [run(0, 12, 1)]);
        assert_eq!(
            assign(&runs, 2, 4, NodeNo(3)),
            [run(0, 2, 1), run(2, 4, 3), run(6, 2, 2), run(8, 4, 1)]
        );
        assert_eq!(assign(&runs, 3, 1, NodeNo(2))[1], run(3, 5, 2));
        assert_eq!(assign(&runs, 11, 9, NodeNo(1)), runs);
    }

    /// (pages, servers, runs at the most, pages of a run at the most)
    #[test]
    fn small_volumes_are_fine_and_large_ones_bounded() {
        for (pages, count, runs_max, run_max) in [
            (1, 3, 1, 1),
            (1024, 3, 1024, 1),
            (8192, 4, 1024, 8),
            (262_144, 3, 1024, 256),
            (VOLUME_PAGES_MAX, 16, 1024, 16_384),
        ] {
            let runs = spread(pages, &servers(count), 0).unwrap();
            assert!(runs.len() <= runs_max, "{pages} pages: {} runs", runs.len());
            assert!(
                runs.iter().all(|r| r.page_count <= run_max),
                "{pages} pages"
            );
            check(&runs, pages).unwrap();
        }
        assert_eq!(spread(1000, &servers(1), 5).unwrap(), [run(0, 1000, 1)]);
    }

    #[test]
    fn small_volumes_begin_on_different_servers() {
        let first = |start| spread(1, &servers(3), start).unwrap()[0].owner.0;
        assert_eq!([0, 1, 2, 3].map(first), [1, 2, 3, 1]);
    }

    #[test]
    fn what_is_no_spread_is_refused() {
        assert_eq!(spread(1, &[], 0), Err(RouteError::NoServers));
        let twice = [NodeNo(1), NodeNo(2), NodeNo(1)];
        assert_eq!(spread(1, &twice, 0), Err(RouteError::BadServer(NodeNo(1))));
        assert_eq!(
            spread(1, &[NodeNo(0)], 0),
            Err(RouteError::BadServer(NodeNo(0)))
        );
        for pages in [0, VOLUME_PAGES_MAX + 1] {
            let refused = Err(RouteError::PageCount(u64::from(pages)));
            assert_eq!(spread(pages, &servers(2), 0), refused);
        }
    }

    #[test]
    fn a_table_with_a_gap_an_overlap_or_an_end_elsewhere_is_refused() {
        let cases: &[(&[RouteRun], u32, Option<u32>)] = &[
            (&[run(0, 2, 1), run(2, 3, 2)], 5, None),
            (&[run(0, 2, 1), run(3, 2, 2)], 5, Some(2)),
            (&[run(0, 2, 1), run(1, 4, 2)], 5, Some(2)),
            (&[run(0, 0, 1), run(0, 5, 2)], 5, Some(0)),
            (&[run(1, 4, 1)], 5, Some(0)),
            (&[run(0, 4, 1)], 5, Some(4)),
            (&[run(0, 6, 1)], 5, Some(5)),
            (
                &[run(0, u32::MAX, 1), run(u32::MAX, 7, 1)],
                6,
                Some(u32::MAX),
            ),
            (&[], 1, Some(0)),
        ];
        for (runs, pages, gap) in cases {
            let want = gap.map_or(Ok(()), |page| Err(RouteError::Gap(page)));
            assert_eq!(check(runs, *pages), want, "{runs:?}");
        }
        assert_eq!(
            check(&[run(0, 5, 0)], 5),
            Err(RouteError::BadServer(NodeNo(0)))
        );
    }

    #[test]
    fn growing_page_by_page_keeps_the_table_small_and_even() {
        let all = servers(3);
        let mut runs = spread(1, &all, 0).unwrap();
        for pages in 2..=20_000 {
            runs = extend(&runs, pages, &all).unwrap();
        }
        check(&runs, 20_000).unwrap();
        assert!(runs.len() <= 4096, "{} runs", runs.len());
        let loads = owners(&runs);
        let (least, most) = (loads.values().min().unwrap(), loads.values().max().unwrap());
        assert!(most - least <= 2 * run_pages(20_000), "{loads:?}");
    }

    #[test]
    fn new_pages_go_to_the_given_servers_only() {
        let runs = spread(10, &servers(2), 0).unwrap();
        let grown = extend(&runs, 40, &[NodeNo(7), NodeNo(8)]).unwrap();
        assert_eq!(cut(&grown, 10), runs);
        assert_eq!(owners(&grown)[&NodeNo(7)], 15);
        assert_eq!(owners(&grown)[&NodeNo(8)], 15);
    }

    proptest! {
        #[test]
        fn a_spread_is_gapless_even_and_found_page_by_page(
            pages in 1_u32..100_000, count in 1_u16..20, start in any::<u64>(), probe in any::<u32>()
        ) {
            let runs = spread(pages, &servers(count), start).unwrap();
            prop_assert_eq!(check(&runs, pages), Ok(()));
            let loads = owners(&runs);
            let least = if loads.len() < usize::from(count) { 0 } else { *loads.values().min().unwrap() };
            prop_assert!(loads.values().max().unwrap() - least <= run_pages(pages));
            let flat = flat(&runs);
            prop_assert_eq!(flat.len(), pages as usize);
            let page = probe % (pages + 10);
            prop_assert_eq!(owner(&runs, page), flat.get(page as usize).copied());
        }

        #[test]
        fn resizes_keep_the_owners_of_pages_that_stay(
            sizes in proptest::collection::vec(1_u32..5_000, 1..12), count in 1_u16..6, fewer in 1_u16..6
        ) {
            let mut runs = spread(sizes[0], &servers(count), 1).unwrap();
            for pages in sizes {
                let before = flat(&runs);
                let grows = pages as usize > before.len();
                runs = if grows { extend(&runs, pages, &servers(fewer)).unwrap() } else { cut(&runs, pages) };
                prop_assert_eq!(check(&runs, pages), Ok(()));
                let kept = before.len().min(pages as usize);
                let after = flat(&runs);
                prop_assert_eq!(&after[..kept], &before[..kept]);
                let mut added = BTreeMap::new();
                for owner in &after[kept..] {
                    *added.entry(*owner).or_insert(0_u32) += 1;
                }
                let least = if added.len() < usize::from(fewer) { 0 } else { *added.values().min().unwrap() };
                let most = added.values().max().copied().unwrap_or(0);
                prop_assert!(most - least.min(most) <= run_pages(pages), "{:?}", added);
            }
        }
    }
}
