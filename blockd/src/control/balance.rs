//! Where pages should be: space even over the servers, then load, moving the fewest pages (S003-13).
//!
//! A pure function of what the servers hold. Pages of one volume on one server count alike, by the
//! mean of their data, and a thin page for a small share of its size, so that new volumes are spread.
//! Every page that moves for space goes from a server above its share to one below, at once to its place; below
//! a tolerance nothing moves, so that a balanced cluster stays as it is. For load, busy pages are exchanged for idle
//! ones where space has no room.

use crate::control::registry::routes::{assign, owners};
use crate::id::{NodeNo, RouteRun, VolumeId};
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// A page without data counts as this share of its size.
const THIN_SHARE: u64 = 64;
/// Servers whose space differs from their share by less than one part in this many are even.
const SPACE_TOLERANCE: u64 = 20;
/// The same of load.
const LOAD_TOLERANCE: u64 = 5;
/// Requests a second of a server below which load is not worth a move.
const LOAD_MIN: u64 = 100;

/// Pages are exchanged for such that have at most one part in this many of their load for each byte.
const WORTH_EXCHANGING: u128 = 2;
/// Shifts of load for each server; more are left to the next plan.
const EXCHANGES: usize = 4;

/// A server's space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NodeSpace {
    pub node: NodeNo,
    pub used_bytes: u64,
    pub free_bytes: u64,
    /// Whether it may own pages; one that may not loses all.
    pub is_open: bool,
}

/// What a server holds of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    pub bytes: u64,
    /// Requests a second.
    pub load: u64,
}

/// The pages of a volume that may move.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeSpace {
    pub volume: VolumeId,
    pub routes: Vec<RouteRun>,
    pub page_bytes: u64,
    pub held: BTreeMap<NodeNo, Held>,
}

/// The pages that should move, by volume, with their new owners.
#[must_use]
pub fn plan(nodes: &[NodeSpace], volumes: &[VolumeSpace]) -> BTreeMap<VolumeId, Vec<RouteRun>> {
    let mut balance = Balance::new(nodes, volumes);
    balance.evacuate();
    balance.even_space();
    balance.even_load();
    let after = balance.volumes.iter();
    let moved = volumes.iter().zip(after).map(|(before, after)| {
        let runs = differences(&before.routes, &after.routes);
        (before.volume, runs)
    });
    moved.filter(|(_, runs)| !runs.is_empty()).collect()
}

/// Runs of `after` whose pages have another owner in `before`.
fn differences(before: &[RouteRun], after: &[RouteRun]) -> Vec<RouteRun> {
    let mut changed = Vec::new();
    for run in after {
        let end = run.first_page + run.page_count;
        let old = before.iter().filter(|old| {
            old.owner != run.owner
                && old.first_page < end
                && run.first_page < old.first_page + old.page_count
        });
        changed.extend(old.map(|old| {
            let first_page = old.first_page.max(run.first_page);
            RouteRun {
                first_page,
                page_count: (old.first_page + old.page_count).min(end) - first_page,
                owner: run.owner,
            }
        }));
    }
    changed
}

/// What one server has, and how much it should have.
#[derive(Clone, Copy, Debug)]
struct Level {
    node: NodeNo,
    bytes: u64,
    load: u64,
    capacity: u64,
    share: u64,
    is_open: bool,
}

impl Level {
    fn surplus(&self) -> u64 {
        self.bytes.saturating_sub(self.share)
    }

    fn deficit(&self) -> u64 {
        self.share.saturating_sub(self.bytes)
    }

    fn tolerance(&self) -> u64 {
        self.share / SPACE_TOLERANCE
    }
}

/// Pages of a volume that go to an idler server, and such that come back from there.
struct Exchange {
    busy: (usize, u64),
    idle: Option<(usize, u64)>,
}

struct Balance {
    levels: Vec<Level>,
    volumes: Vec<VolumeSpace>,
}

impl VolumeSpace {
    fn pages(&self, node: NodeNo) -> u64 {
        u64::from(owners(&self.routes).get(&node).copied().unwrap_or(0))
    }

    /// What a page of the volume on this server counts, in bytes and requests.
    fn weight(&self, node: NodeNo) -> Held {
        let held = self.held.get(&node).copied().unwrap_or_default();
        let pages = self.pages(node).max(1);
        Held {
            bytes: (held.bytes / pages + self.page_bytes / THIN_SHARE).max(1),
            load: held.load / pages,
        }
    }
}

impl Balance {
    fn new(nodes: &[NodeSpace], volumes: &[VolumeSpace]) -> Self {
        let level = |space: &NodeSpace| {
            let thin = volumes
                .iter()
                .map(|volume| volume.pages(space.node) * (volume.page_bytes / THIN_SHARE).max(1));
            let loads = volumes
                .iter()
                .filter_map(|volume| volume.held.get(&space.node));
            Level {
                node: space.node,
                bytes: space.used_bytes + thin.sum::<u64>(),
                load: loads.map(|held| held.load).sum(),
                capacity: space.used_bytes.saturating_add(space.free_bytes).max(1),
                share: 0,
                is_open: space.is_open,
            }
        };
        let mut balance = Self {
            levels: nodes.iter().map(level).collect(),
            volumes: volumes.to_vec(),
        };
        balance.set_shares();
        balance
    }

    /// Each open server's share of all that is on open servers or must go there.
    fn set_shares(&mut self) {
        let leaving = self.levels.iter().filter(|level| !level.is_open);
        let leaving: u64 = leaving.map(|level| self.movable(level.node)).sum();
        let open = || self.levels.iter().filter(|level| level.is_open);
        let bytes = leaving + open().map(|level| level.bytes).sum::<u64>();
        let capacity: u128 = open().map(|level| u128::from(level.capacity)).sum();
        for level in self.levels.iter_mut().filter(|level| level.is_open) {
            let share = u128::from(bytes) * u128::from(level.capacity) / capacity.max(1);
            level.share = u64::try_from(share).unwrap_or(u64::MAX);
        }
    }

    fn movable(&self, node: NodeNo) -> u64 {
        let volumes = self.volumes.iter();
        volumes
            .map(|volume| volume.pages(node) * volume.weight(node).bytes)
            .sum()
    }

    /// The open server that is furthest below its share.
    fn emptiest(&self) -> Option<Level> {
        let open = self.levels.iter().filter(|level| level.is_open);
        let room = |level: &&Level| i128::from(level.share) - i128::from(level.bytes);
        open.max_by_key(room).copied()
    }

    fn evacuate(&mut self) {
        let closed = self.levels.iter().filter(|level| !level.is_open);
        let closed: Vec<NodeNo> = closed.map(|level| level.node).collect();
        for node in closed {
            for index in 0..self.volumes.len() {
                while self.volumes[index].pages(node) > 0 {
                    let Some(to) = self.emptiest() else { return };
                    let weight = self.volumes[index].weight(node).bytes;
                    let pages = (to.deficit() / weight).max(1);
                    self.shift(index, node, to.node, pages);
                }
            }
        }
    }

    fn even_space(&mut self) {
        let is_even = |level: &Level| {
            !level.is_open || level.surplus().max(level.deficit()) <= level.tolerance()
        };
        if self.levels.iter().all(is_even) {
            return;
        }
        loop {
            let open = || self.levels.iter().filter(|level| level.is_open);
            let mut full: Vec<Level> = open()
                .filter(|level| level.surplus() > 0)
                .copied()
                .collect();
            full.sort_by_key(|level| std::cmp::Reverse(level.surplus()));
            let Some(to) = self.emptiest() else { return };
            let shift = full.into_iter().find_map(|from| {
                let (surplus, deficit) = (from.surplus(), to.deficit());
                let (index, pages) = self.heaviest(from.node, surplus, deficit)?;
                Some((index, from.node, pages))
            });
            let Some((index, from, pages)) = shift else {
                return;
            };
            self.shift(index, from, to.node, pages);
        }
    }

    /// The volume whose pages bring bytes away from a server in the fewest moves; one page if that
    /// makes both servers more even, although it is more than one of them needs.
    fn heaviest(&self, node: NodeNo, surplus: u64, deficit: u64) -> Option<(usize, u64)> {
        let volumes = self.volumes.iter().enumerate();
        let movable = volumes.filter_map(|(index, volume)| {
            let weight = volume.weight(node).bytes;
            let one = u64::from(surplus + deficit >= 2 * weight);
            let pages = (surplus.min(deficit) / weight).max(one);
            let pages = pages.min(volume.pages(node));
            (pages > 0).then_some((weight, index, pages))
        });
        movable
            .max_by_key(|(weight, index, _)| (*weight, std::cmp::Reverse(*index)))
            .map(|(_, index, pages)| (index, pages))
    }

    /// Moves busy pages to idle servers. Where that would make space uneven, idle pages come back in exchange.
    fn even_load(&mut self) {
        let open = self.levels.iter().filter(|level| level.is_open);
        let loads: Vec<u64> = open.map(|level| level.load).collect();
        let mean = loads.iter().sum::<u64>() / (loads.len() as u64).max(1);
        if mean < LOAD_MIN {
            return;
        }
        for _ in 0..EXCHANGES * self.levels.len() {
            let open = || self.levels.iter().filter(|level| level.is_open);
            let busiest = open().max_by_key(|level| level.load).copied();
            let idlest = open().min_by_key(|level| level.load).copied();
            let (Some(from), Some(to)) = (busiest, idlest) else {
                return;
            };
            if from.load <= mean + mean / LOAD_TOLERANCE {
                return;
            }
            let excess = (from.load.saturating_sub(mean)).min(mean.saturating_sub(to.load));
            let Some(exchange) = self.exchange(from, to, excess) else {
                return;
            };
            let (index, pages) = exchange.busy;
            self.shift(index, from.node, to.node, pages);
            if let Some((index, pages)) = exchange.idle {
                self.shift(index, to.node, from.node, pages);
            }
        }
    }

    /// The busiest bytes of `from` with at most `excess` load, as far as `to` has room for them or has bytes to give
    /// back that are much less busy.
    fn exchange(&self, from: Level, to: Level, excess: u64) -> Option<Exchange> {
        let (index, busy) = self.densest(from.node)?;
        let wanted = excess.checked_div(busy.load)?;
        let wanted = wanted.min(self.volumes[index].pages(from.node));
        let spare = (to.share + to.tolerance()).saturating_sub(to.bytes);
        let spare = spare.min((from.bytes + from.tolerance()).saturating_sub(from.share));
        let fits = wanted.min(spare / busy.bytes);
        let alone = (fits > 0).then_some(Exchange {
            busy: (index, fits),
            idle: None,
        });
        let back = self.lightest(to.node).filter(|(_, idle)| {
            u128::from(idle.load) * u128::from(busy.bytes) * WORTH_EXCHANGING
                <= u128::from(busy.load) * u128::from(idle.bytes)
        });
        let Some((other, idle)) = back.filter(|_| fits < wanted) else {
            return alone;
        };
        let room = spare + self.volumes[other].pages(to.node) * idle.bytes;
        let pages = wanted.min(room / busy.bytes);
        let returned = (pages * busy.bytes).saturating_sub(spare);
        (pages > 0).then_some(Exchange {
            busy: (index, pages),
            idle: Some((other, returned.div_ceil(idle.bytes))),
        })
    }

    /// The volume with the most load for its bytes on a server, and what a page of it counts there.
    fn densest(&self, node: NodeNo) -> Option<(usize, Held)> {
        self.held_on(node)
            .filter(|(_, weight)| weight.load > 0)
            .max_by(|(_, one), (_, other)| compare_density(one, other))
    }

    fn lightest(&self, node: NodeNo) -> Option<(usize, Held)> {
        self.held_on(node)
            .min_by(|(_, one), (_, other)| compare_density(one, other))
    }

    fn held_on(&self, node: NodeNo) -> impl Iterator<Item = (usize, Held)> {
        let volumes = self.volumes.iter().enumerate();
        let held = volumes.filter(move |(_, volume)| volume.pages(node) > 0);
        held.map(move |(index, volume)| (index, volume.weight(node)))
    }

    /// Gives up to so many pages of a volume to another server, from all over it.
    fn shift(&mut self, index: usize, from: NodeNo, to: NodeNo, pages: u64) {
        let volume = &mut self.volumes[index];
        let (weight, all) = (volume.weight(from), volume.pages(from));
        let pages = pages.min(all);
        let runs = volume.routes.iter().filter(|run| run.owner == from);
        let runs: Vec<RouteRun> = runs.copied().collect();
        let wanted = (pages * runs.len() as u64).div_ceil(all.max(1)).max(1);
        let step = (runs.len() as u64 / wanted).max(1);
        let mut left = u32::try_from(pages).unwrap_or(u32::MAX);
        let order = (0..step).flat_map(|offset| runs.iter().skip(at(offset)).step_by(at(step)));
        for run in order {
            let count = run.page_count.min(left);
            let first = run.first_page + run.page_count - count;
            volume.routes = assign(&volume.routes, first, count, to);
            left -= count;
            if left == 0 {
                break;
            }
        }
        let held = volume.held.entry(from).or_default();
        let gone = Held {
            bytes: held.bytes / all.max(1) * pages,
            load: weight.load * pages,
        };
        (held.bytes, held.load) = (held.bytes - gone.bytes, held.load - gone.load);
        let held = volume.held.entry(to).or_default();
        (held.bytes, held.load) = (held.bytes + gone.bytes, held.load + gone.load);
        for level in &mut self.levels {
            let bytes = weight.bytes * pages;
            if level.node == from {
                level.bytes = level.bytes.saturating_sub(bytes);
                level.load = level.load.saturating_sub(gone.load);
            } else if level.node == to {
                (level.bytes, level.load) = (level.bytes + bytes, level.load + gone.load);
            }
        }
    }
}

/// By load for each byte.
fn compare_density(one: &Held, other: &Held) -> Ordering {
    let one_load = u128::from(one.load) * u128::from(other.bytes);
    one_load.cmp(&(u128::from(other.load) * u128::from(one.bytes)))
}

fn at(index: u64) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
