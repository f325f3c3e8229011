//! Busy pages go to idle servers, in exchange for idle ones, so that space stays even.

use super::moves::owners_of;
use blockd::id::NodeNo;
use blockd_tests::{Cluster, MIB, Random};
use bytes::Bytes;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const SIZE: u64 = 64 * MIB;
/// Pages of 64 KiB.
const PAGE_BLOCKS: u32 = 128;
const READ: u64 = 4096;
/// A volume of each server, by its number.
const VOLUMES: [&str; 3] = ["busy", "second", "third"];

/// Servers that hold as much as each other.
fn even_cluster() -> (Cluster, Bytes) {
    let cluster = Cluster::three();
    let data = Bytes::from(Random::new(11).bytes(usize::try_from(SIZE).unwrap()));
    for (name, owner) in VOLUMES.into_iter().zip(1..) {
        cluster.create_on(name, SIZE, PAGE_BLOCKS, &[owner]);
        let volume = cluster.open(name);
        for at in (0..SIZE).step_by(MIB as usize) {
            let from = usize::try_from(at).unwrap();
            let piece = data.slice(from..from + MIB as usize);
            cluster.block(volume.write(at, piece)).unwrap();
        }
        cluster.block(volume.flush()).unwrap();
    }
    (cluster, data)
}

/// Pages of a volume by owner.
fn pages_of(cluster: &Cluster, volume: &str) -> BTreeMap<u16, u32> {
    let mut pages = BTreeMap::new();
    for run in cluster.route(0, volume).runs {
        *pages.entry(run.owner.0).or_insert(0) += run.page_count;
    }
    pages
}

/// Reads all over the volume, and compares; how many requests had an answer.
fn read_until(cluster: &Cluster, data: &Bytes, ended: &Arc<AtomicBool>) -> Arc<AtomicU64> {
    let answered = Arc::new(AtomicU64::new(0));
    for reader in 0..8 {
        let (volume, data) = (cluster.open("busy"), data.clone());
        let (ended, answered) = (ended.clone(), answered.clone());
        cluster.handle().spawn(async move {
            let mut random = Random::new(100 + reader);
            while !ended.load(Ordering::Relaxed) {
                let at = random.within(0..SIZE / READ) * READ;
                let found = volume.read(at, READ as u32).await.unwrap();
                let from = usize::try_from(at).unwrap();
                assert_eq!(found, data.slice(from..from + READ as usize), "at {at}");
                answered.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    answered
}

fn rebalance(cluster: &Cluster) {
    cluster.blockctl("volume rebalance --all --rate 1GiB");
}

/// S003-13: space is even, so nothing moves until a server has more to do than the others; then its busy pages
/// are shared by all, and idle ones come back for them, under the readers' eyes.
#[test]
fn busy_pages_go_to_idle_servers() {
    let (cluster, data) = even_cluster();
    rebalance(&cluster);
    for (name, owner) in VOLUMES.into_iter().zip(1..) {
        assert_eq!(
            owners_of(&cluster, 0, name),
            [NodeNo(owner)].into(),
            "{name}"
        );
    }
    let ended = Arc::new(AtomicBool::new(false));
    let answered = read_until(&cluster, &data, &ended);
    rebalance(&cluster);
    let pages = pages_of(&cluster, "busy");
    let total = u32::try_from(SIZE / (u64::from(PAGE_BLOCKS) * 512)).unwrap();
    eprintln!("rebalance: {pages:?} of {total} pages");
    assert_eq!(pages.values().sum::<u32>(), total);
    for idle in [2, 3] {
        let got = pages.get(&idle).copied().unwrap_or(0);
        assert!(got > total / 6, "server {idle} helps: {pages:?}");
    }
    let mut held = BTreeMap::new();
    for (owner, pages) in VOLUMES.iter().flat_map(|name| pages_of(&cluster, name)) {
        *held.entry(owner).or_insert(0) += pages;
    }
    // A twentieth of its share is what space may differ by, and some pages of rounding.
    let differs = |pages: &u32| pages.abs_diff(total) > total / 20 + 4;
    assert!(!held.values().any(differs), "space stays even: {held:?}");
    let before = answered.load(Ordering::Relaxed);
    let deadline = Instant::now() + Duration::from_secs(30);
    while answered.load(Ordering::Relaxed) < before + 1000 {
        assert!(Instant::now() < deadline, "the readers stand still");
        std::thread::sleep(Duration::from_millis(10));
    }
    ended.store(true, Ordering::Relaxed);
}
