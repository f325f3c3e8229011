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
