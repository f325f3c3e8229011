//! The offline check: no false alarm on any crash state, and no damage that it misses.

use super::harness::{self, STORE_ID, options, verified};
use super::{keeps, workload};
use blockd::data::page_store::{CheckOptions, Engine, Finding, Severity, StoreCheck, check_store};
use blockd::io::disk::{Disk, DiskFile};
use blockd::io::sim_disk::{CrashKeeps, DiskOp, SimDisk, SimRandom};
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::sync::Arc;

pub(crate) fn check(disk: &SimDisk, data: bool) -> StoreCheck {
    check_store(disk, CheckOptions { data }, &mut |_| {})
}

fn damage(check: &StoreCheck) -> Vec<&Finding> {
    let damage = |finding: &&Finding| finding.severity == Severity::Damage;
    check.findings.listed.iter().filter(damage).collect()
}

/// Fails if the check finds damage, or if a store that it calls sound has none of its data.
pub(crate) fn assert_sound(disk: &SimDisk, data: bool, context: &str) {
    let check = check(disk, data);
    assert!(damage(&check).is_empty(), "{context}: {:?}", check.findings);
}

/// A closed store with a few volumes, snapshots and checkpoints, and one that was killed.
fn stores(seed: u64) -> [Arc<SimDisk>; 2] {
    let (trace, _) = workload(seed);
    let disk = SimDisk::new();
    let killed_at = trace.len() * 3 / 4;
    trace[..killed_at].iter().for_each(|op| disk.replay(op));
    let mut random = SimRandom(seed);
    let killed = Arc::new(disk.crashed(CrashKeeps::All, &mut random));
    drop(Engine::open(Arc::clone(&killed), options(), STORE_ID).unwrap());
    trace[killed_at..].iter().for_each(|op| disk.replay(op));
    [Arc::new(disk.crashed(CrashKeeps::All, &mut random)), killed]
}

/// What a reader of the damaged store gets: everything right, or an error.
fn harm(disk: &SimDisk, before: &SimDisk) -> bool {
    let all = |disk: &SimDisk| -> Option<Vec<Vec<u8>>> {
        let copy = Arc::new(disk.crashed(CrashKeeps::All, &mut SimRandom(1)));
        let engine = Engine::open(copy, options(), STORE_ID).ok()?;
        let mut views = Vec::new();
        for (page, (volume, _)) in harness::PAGES.iter().enumerate() {
            let snapshots = engine.snapshots(*volume).into_iter().map(Some);
            for view in snapshots.chain([None]) {
                views.push(verified(&engine, harness::at(page, 0, harness::BLOCKS), view).ok()?);
            }
        }
        Some(views)
    };
    all(disk) != all(before)
}

/// Every single bit of every kind of metadata in force: what changes what a reader gets is found,
/// without reading the data, except where the data itself is hit.
#[test]
fn a_flipped_bit_that_matters_is_found() {
    let mut found: BTreeMap<&str, (u32, u32)> = BTreeMap::new();
    let mut random = SimRandom(7);
    for seed in 1..=4 {
        for disk in stores(seed) {
            assert_sound(&disk, true, "before the flip");
            for file in DiskFile::ALL {
                let len = disk.len_bytes(file).unwrap().min(1 << 20);
                for _ in 0..40 {
                    let pos = random.below(len);
                    let damaged = disk.crashed(CrashKeeps::All, &mut random);
                    damaged.flip_bit(file, pos, random.below(8) as u8);
                    let is_found = !damage(&check(&damaged, true)).is_empty();
                    let entry = found.entry(file.name()).or_default();
                    entry.0 += u32::from(is_found);
                    if harm(&damaged, &disk) {
                        entry.1 += 1;
                        assert!(
                            is_found,
                            "seed {seed}: flip in {} at {pos} is missed",
                            file.name()
                        );
                    }
                }
            }
        }
    }
    println!("found, of which with harm, by file: {found:?}");
    for file in ["log", "slab", "meta"] {
        assert!(found[file].1 > 0, "the test flips what matters: {found:?}");
    }
}

/// The newest pair of superblocks, the catalog in force and meta pages, each wiped as a whole.
#[test]
fn a_lost_structure_is_found_and_named() {
    let wipe = |disk: &SimDisk, file, pos, len: usize| {
        disk.write_at(file, pos, &[IoSlice::new(&vec![0xa5; len])])
            .unwrap();
    };
    for seed in 1..=6 {
        let [closed, _] = stores(seed);
        for (file, pos, len, name) in [
            (DiskFile::Super, 0, 16384, "store/super"),
            (DiskFile::Meta, 0, 8192, "store/meta"),
        ] {
            let damaged = closed.crashed(CrashKeeps::All, &mut SimRandom(1));
            wipe(&damaged, file, pos, len);
            let check = check(&damaged, false);
            let found = damage(&check);
            assert!(
                found.iter().any(|f| f.file == name),
                "seed {seed}: {found:?}"
            );
            assert!(check.image.is_none(), "what cannot be opened has no image");
        }
        let damaged = closed.crashed(CrashKeeps::All, &mut SimRandom(1));
        wipe(&damaged, DiskFile::CatalogA, 0, 64);
        wipe(&damaged, DiskFile::CatalogB, 0, 64);
        let check = check(&damaged, false);
        assert!(
            damage(&check)
                .iter()
                .any(|f| f.file.starts_with("store/catalog"))
        );
    }
}

/// Any bytes anywhere: an answer, within bounds, and no panic.
#[test]
fn random_damage_gives_an_answer() {
    let rounds: u64 = std::env::var("BLOCKD_CHECK_ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(400);
    let mut random = SimRandom(99);
    let stores: Vec<Arc<SimDisk>> = (1..=4).flat_map(stores).collect();
    for round in 0..rounds {
        let disk = &stores[random.below(stores.len() as u64) as usize];
        let damaged = disk.crashed(CrashKeeps::All, &mut random);
        for _ in 0..=random.below(8) {
            let file = DiskFile::ALL[random.below(DiskFile::ALL.len() as u64) as usize];
            let len = damaged.len_bytes(file).unwrap().max(1);
            let (pos, count) = (random.below(len), 1 + random.below(8192));
            match random.below(3) {
                0 => damaged.flip_bit(file, pos, random.below(8) as u8),
                1 => {
                    let bytes: Vec<u8> = (0..count).map(|_| random.next_u64() as u8).collect();
                    damaged
                        .write_at(file, pos, &[IoSlice::new(&bytes)])
                        .unwrap();
                }
                _ => damaged.punch(file, pos, len - pos).unwrap(),
            }
        }
        let outcome = check(&damaged, true);
        let opens = Engine::open(Arc::new(damaged), options(), STORE_ID).is_ok();
        if outcome.image.is_none() && opens {
            let never_used = outcome
                .findings
                .listed
                .iter()
                .any(|f| f.what.contains("never used"));
            assert!(
                never_used,
                "round {round}: opens, but the check says that it does not: {:?}",
                outcome.findings
            );
        }
    }
}

/// Crash states as they are found, before any recovery: a torn tail is no damage.
#[test]
fn a_crash_state_is_no_damage() {
    let mut states = 0;
    for seed in 301..=312 {
        let (trace, _) = workload(seed);
        let disk = SimDisk::new();
        let mut random = SimRandom(seed);
        for op in &trace {
            disk.replay(op);
            if matches!(op, DiskOp::Sync(DiskFile::Super)) || random.below(4) == 0 {
                let keeps = keeps(&mut random);
                let crashed = disk.crashed(keeps, &mut random);
                assert_sound(&crashed, false, &format!("seed {seed}, {keeps:?}"));
                states += 1;
            }
        }
    }
    println!("{states} crash states, no damage found");
    assert!(states > 1000);
}
