//! Routing tables of many volumes over many servers, without the servers.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use blockd::control::registry::change::{VolumeSpec, create_volume, define_cluster, define_node};
use blockd::control::registry::{
    Key, NodeRecord, RegistryState, Transaction, UniqueId, VolumeRecord,
};
use blockd::data::router::RoutingTable;
use blockd::id::{BLOCK_BYTES, NodeNo, PageNo, locate};
use blockd::limits::PAGE_BLOCKS_MAX;
use std::collections::BTreeMap;
use std::time::Instant;

const SERVERS: u16 = 16;
const VOLUMES: u64 = 1_000;

fn node(number: u16) -> NodeRecord {
    NodeRecord {
        number: NodeNo(number),
        name: format!("n{number}"),
        unique_id: UniqueId(number.into()),
        peer_address: format!("10.0.0.{number}:10808"),
        nbd_address: format!("10.0.0.{number}:10809"),
        registry_server: true,
        site: String::new(),
    }
}

fn spec(number: u64, servers: Vec<NodeNo>, size_bytes: u64, page_blocks: u32) -> VolumeSpec {
    VolumeSpec {
        name: format!("v{number}"),
        size_bytes,
        page_blocks,
        servers,
        format: None,
        created_unix_s: 0,
    }
}

/// The transactions that make a cluster of so many servers.
fn cluster() -> (RegistryState, Vec<Transaction>) {
    let (mut state, mut log) = (RegistryState::default(), Vec::new());
    let define = define_cluster(&state, "c", UniqueId(1)).unwrap();
    commit(&mut state, &mut log, define);
    for number in 1..=SERVERS {
        let define = define_node(&state, node(number)).unwrap();
        commit(&mut state, &mut log, define);
    }
    (state, log)
}

fn commit(state: &mut RegistryState, log: &mut Vec<Transaction>, transaction: Transaction) {
    state.apply(&transaction).unwrap();
    log.push(transaction);
}

fn table(volume: &VolumeRecord) -> RoutingTable {
    let (size, blocks) = (volume.size_bytes, volume.page_blocks);
    RoutingTable::new(volume.id, volume.epoch, size, blocks, volume.routes.clone()).unwrap()
}

/// S003-01, S003-06: 1,000 volumes over 1 to 16 servers; every server that applies the same
/// transactions has the same table of every (volume, epoch), by hash; the pages are even over the
/// servers of the volume and on nobody else.
#[test]
fn a_thousand_volumes_over_sixteen_servers() {
    let (mut state, mut log) = cluster();
    for number in 0..VOLUMES {
        let count = 1 + number % u64::from(SERVERS);
        let first = number % u64::from(SERVERS);
        let servers = (0..count).map(|n| NodeNo(u16::try_from((first + n) % 16).unwrap() + 1));
        let size_bytes = (1 + number * 7919 % 300) * (1 << 30);
        let wanted = spec(number, servers.collect(), size_bytes, 8192);
        let made = create_volume(&state, &wanted).unwrap().0;
        commit(&mut state, &mut log, made);
    }
    let began = Instant::now();
    let hashes = |state: &RegistryState| -> Vec<_> {
        state
            .volumes()
            .map(|volume| (volume.id, volume.epoch, table(volume).crc()))
            .collect()
    };
    let ours = hashes(&state);
    assert_eq!(ours.len() as u64, VOLUMES);
    assert!(
        began.elapsed().as_secs() < 10,
        "publishing 1,000 tables took {:?}",
        began.elapsed()
    );
    for server in 1..SERVERS {
        let mut other = RegistryState::default();
        log.iter()
            .for_each(|transaction| drop(other.apply(transaction).unwrap()));
        assert_eq!(hashes(&other), ours, "server {server} has other tables");
    }
    for (number, volume) in (0..).zip(state.volumes()) {
        let mut pages: BTreeMap<NodeNo, u32> = BTreeMap::new();
        for run in &volume.routes {
            *pages.entry(run.owner).or_default() += run.page_count;
        }
        let longest = volume
            .routes
            .iter()
            .map(|run| run.page_count)
            .max()
            .unwrap();
        let (least, most) = (pages.values().min().unwrap(), pages.values().max().unwrap());
        assert_eq!(pages.len() as u64, 1 + number % 16, "volume {number}");
        assert!(
            most - least <= longest || pages.len() == 1,
            "volume {number}: {pages:?}"
        );
    }
}

/// S003-02, S003-03: a page is any power of two of blocks from 1 to 2^20, and nothing else; block b is
/// on page b div page_blocks.
#[test]
fn a_page_is_a_power_of_two_of_blocks() {
    let (state, _) = cluster();
    for power in 0..=20 {
        let page_blocks = 1_u32 << power;
        let page_bytes = u64::from(page_blocks) * BLOCK_BYTES;
        let wanted = spec(0, vec![NodeNo(1), NodeNo(2)], 5 * page_bytes, page_blocks);
        let volume = create_volume(&state, &wanted).unwrap().1;
        assert_eq!(volume.page_count(), 5, "2^{power}");
        let table = table(&volume);
        for block in [
            0,
            u64::from(page_blocks) - 1,
            u64::from(page_blocks),
            5 * u64::from(page_blocks) - 1,
        ] {
            let (page, offset) = (
                block / u64::from(page_blocks),
                block % u64::from(page_blocks) * BLOCK_BYTES,
            );
            assert_eq!(locate(block * BLOCK_BYTES, page_blocks), (page, offset));
            let part = table
                .parts(block * BLOCK_BYTES, BLOCK_BYTES)
                .next()
                .unwrap();
            assert_eq!(u64::from(part.page.0), page, "2^{power}, block {block}");
            assert_eq!(
                table.owner(PageNo(u32::try_from(page).unwrap())),
                Some(part.owner)
            );
        }
    }
    for page_blocks in [
        0,
        3,
        6,
        8191,
        8193,
        PAGE_BLOCKS_MAX + 1,
        2 * PAGE_BLOCKS_MAX,
        u32::MAX,
    ] {
        let wanted = spec(0, vec![NodeNo(1)], 1 << 40, page_blocks);
        assert!(
            create_volume(&state, &wanted).is_err(),
            "{page_blocks} blocks"
        );
    }
    assert!(state.get(&Key::Cluster).is_some());
}
