use super::*;
use crate::control::registry::routes::{check, flat, spread};
use proptest::prelude::*;

const PAGE: u64 = 4 << 20;

fn node(number: u16, used_bytes: u64, is_open: bool) -> NodeSpace {
    NodeSpace {
        node: NodeNo(number),
        used_bytes,
        free_bytes: (1 << 40) - used_bytes,
        is_open,
    }
}

/// A volume whose pages are all full, spread over these nodes.
fn volume(id: u64, pages: u32, on: &[u16]) -> VolumeSpace {
    let on: Vec<NodeNo> = on.iter().map(|number| NodeNo(*number)).collect();
    let routes = spread(pages, &on, 0).unwrap();
    let bytes = owners(&routes).into_iter().map(|(node, pages)| {
        let held = Held {
            bytes: u64::from(pages) * PAGE,
            load: 0,
        };
        (node, held)
    });
    VolumeSpace {
        volume: VolumeId(id),
        page_bytes: PAGE,
        held: bytes.collect(),
        routes,
    }
}

fn nodes_of(count: u16, closed: &[u16], volumes: &[VolumeSpace]) -> Vec<NodeSpace> {
    let used = |number| -> u64 {
        let held = volumes.iter().filter_map(|v| v.held.get(&NodeNo(number)));
        held.map(|held| held.bytes).sum()
    };
    (1..=count)
        .map(|number| node(number, used(number), !closed.contains(&number)))
        .collect()
}

/// The volumes as they are when the plan was carried out.
fn carried_out(
    volumes: &[VolumeSpace],
    plan: &BTreeMap<VolumeId, Vec<RouteRun>>,
) -> Vec<VolumeSpace> {
    let mut after = volumes.to_vec();
    for volume in &mut after {
        for run in plan.get(&volume.volume).into_iter().flatten() {
            let before = flat(&volume.routes);
            for page in run.first_page..run.first_page + run.page_count {
                let from = before[page as usize];
                let pages = volume.pages(from).max(1);
                let held = volume.held.entry(from).or_default();
                let (bytes, load) = (held.bytes / pages, held.load / pages);
                (held.bytes, held.load) = (held.bytes - bytes, held.load - load);
                let held = volume.held.entry(run.owner).or_default();
                (held.bytes, held.load) = (held.bytes + bytes, held.load + load);
                volume.routes = assign(&volume.routes, page, 1, run.owner);
            }
        }
    }
    after
}

fn pages_by_node(volumes: &[VolumeSpace]) -> BTreeMap<NodeNo, u64> {
    let mut pages = BTreeMap::new();
    for volume in volumes {
        for (node, count) in owners(&volume.routes) {
            *pages.entry(node).or_default() += u64::from(count);
        }
    }
    pages
}

fn moved(plan: &BTreeMap<VolumeId, Vec<RouteRun>>) -> u64 {
    let runs = plan.values().flatten();
    runs.map(|run| u64::from(run.page_count)).sum()
}

/// S003-13: a server that was added gets its share, and no page moves that need not.
#[test]
fn a_new_server_gets_its_share() {
    let volumes = [volume(1, 90, &[1, 2])];
    let moves = plan(&nodes_of(3, &[], &volumes), &volumes);
    assert_eq!(moved(&moves), 30);
    assert!(moves[&VolumeId(1)].iter().all(|run| run.owner == NodeNo(3)));
    let after = carried_out(&volumes, &moves);
    assert!(pages_by_node(&after).values().all(|pages| *pages == 30));
}

#[test]
fn a_drained_server_loses_all_and_gets_nothing() {
    let volumes = [volume(1, 90, &[1, 2, 3]), volume(2, 7, &[2])];
    let moves = plan(&nodes_of(3, &[2], &volumes), &volumes);
    let after = pages_by_node(&carried_out(&volumes, &moves));
    assert_eq!(
        after.keys().copied().collect::<Vec<_>>(),
        [NodeNo(1), NodeNo(3)]
    );
    assert_eq!(moved(&moves), 37);
}

#[test]
fn pages_come_from_all_over_the_volume() {
    let volumes = [volume(1, 1000, &[1])];
    let moves = plan(&nodes_of(2, &[], &volumes), &volumes);
    let striped = [volume(1, 1000, &[1, 2])];
    let from_striped = plan(&nodes_of(4, &[], &striped), &striped);
    assert_eq!(moved(&moves), 500);
    let pages: Vec<u32> = from_striped[&VolumeId(1)]
        .iter()
        .map(|run| run.first_page)
        .collect();
    let first_half = pages.iter().filter(|page| **page < 500).count();
    assert!(
        (200..=300).contains(&first_half),
        "{first_half} of {}",
        pages.len()
    );
}

/// Thin volumes are spread, too, so that what will be written is.
#[test]
fn empty_pages_count_a_little() {
    let mut thin = volume(1, 40, &[1]);
    thin.held.clear();
    let moves = plan(&nodes_of(2, &[], &[thin.clone()]), &[thin]);
    assert_eq!(moved(&moves), 20);
}

fn load_by_node(volumes: &[VolumeSpace]) -> BTreeMap<NodeNo, u64> {
    let mut loads = BTreeMap::new();
    for (node, held) in volumes.iter().flat_map(|volume| &volume.held) {
        *loads.entry(*node).or_default() += held.load;
    }
    loads
}

/// A volume of each server of which only the first is busy.
fn one_busy(servers: u16) -> Vec<VolumeSpace> {
    let volumes = (1..=servers).map(|number| volume(number.into(), 100, &[number]));
    let mut volumes: Vec<VolumeSpace> = volumes.collect();
    volumes[0].held.get_mut(&NodeNo(1)).unwrap().load = 10_000;
    volumes
}

/// When space is even, busy pages go to idle servers, and idle ones come back, so that it stays so.
#[test]
fn load_is_evened_after_space() {
    for servers in 2..6 {
        let volumes = one_busy(servers);
        let moves = plan(&nodes_of(servers, &[], &volumes), &volumes);
        let after = carried_out(&volumes, &moves);
        let (loads, mean) = (load_by_node(&after), 10_000 / u64::from(servers));
        let most = *loads.values().max().unwrap();
        assert!(most <= mean + mean / LOAD_TOLERANCE + 100, "{loads:?}");
        let pages = pages_by_node(&after);
        let differs = |pages: &u64| pages.abs_diff(100) > 100 / SPACE_TOLERANCE + 1;
        assert!(!pages.values().any(differs), "{pages:?}");
        assert!(moved(&moves) <= 2 * 10_000 / 100, "{}", moved(&moves));
        let again = plan(&nodes_of(servers, &[], &after), &after);
        assert_eq!(moved(&again), 0, "{servers} servers, {again:?}");
    }
}

/// Pages that are as busy as those that would come back stay.
#[test]
fn equal_loads_are_not_exchanged() {
    let mut volumes = one_busy(2);
    volumes[1].held.get_mut(&NodeNo(2)).unwrap().load = 6_000;
    let moves = plan(&nodes_of(2, &[], &volumes), &volumes);
    assert!(moved(&moves) <= 100 / SPACE_TOLERANCE, "{moves:?}");
}

proptest! {
    /// Whatever the cluster: pages are conserved, nothing goes to or stays on a drained server, no
    /// page moves that need not, all is even afterwards, and then nothing moves any more.
    #[test]
    fn every_plan_converges_and_moves_no_more_than_needed(
        sizes in prop::collection::vec((1_u32..400, 1_u8..255), 1..5),
        count in 2_u16..6,
        closed in 0_u16..8,
    ) {
        let volumes: Vec<VolumeSpace> = sizes.iter().zip(1..).map(|((pages, mask), id)| {
            let on: Vec<u16> = (1..=count).filter(|n| mask >> n & 1 == 1).collect();
            volume(id, *pages, if on.is_empty() { &[1] } else { &on })
        }).collect();
        let closed: Vec<u16> = if closed <= count { vec![closed] } else { vec![] };
        let nodes = nodes_of(count, &closed, &volumes);
        let moves = plan(&nodes, &volumes);
        let after = carried_out(&volumes, &moves);
        for (before, after) in volumes.iter().zip(&after) {
            let pages: u32 = before.routes.iter().map(|run| run.page_count).sum();
            check(&after.routes, pages).unwrap();
        }
        let pages = pages_by_node(&after);
        prop_assert!(closed.iter().all(|node| !pages.contains_key(&NodeNo(*node))));
        let open = u64::from(count) - closed.iter().filter(|node| **node > 0).count() as u64;
        let total: u64 = pages.values().sum();
        let before = pages_by_node(&volumes);
        let share = total / open;
        let needed: u64 = before.iter().map(|(node, pages)| match closed.contains(&node.0) {
            true => *pages,
            false => pages.saturating_sub(share),
        }).sum();
        prop_assert!(moved(&moves) <= needed, "{} moved, {needed} needed", moved(&moves));
        let slack = share / SPACE_TOLERANCE + 2;
        for number in (1..=count).filter(|number| !closed.contains(number)) {
            let has = pages.get(&NodeNo(number)).copied().unwrap_or(0);
            prop_assert!(has.abs_diff(share) <= slack, "node {number}: {has}, share {share}");
        }
        let again = plan(&nodes_of(count, &closed, &after), &after);
        prop_assert_eq!(moved(&again), 0);
    }
}
