//! Crashes the page store at every device operation of random workloads, and shows that the checker
//! catches planted faults.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout
)]

mod checks;
mod faults;
mod harness;

use blockd::data::page_store::{Engine, StoreError};
use blockd::io::disk::DiskFile;
use blockd::io::sim_disk::{CrashKeeps, DiskOp, SimDisk, SimRandom};
use harness::{History, Reader, Runner, STORE_ID, options, verified};
use std::sync::Arc;

const OPS: usize = 240;
/// Superblocks written by format, open and close.
const SUPERBLOCKS_ANYWAY: usize = 3;

fn workload(seed: u64) -> (Vec<DiskOp>, History) {
    let disk = Arc::new(SimDisk::new());
    disk.record();
    disk.cold_one_in(5 + seed % 7);
    let mut runner = Runner::new(Arc::clone(&disk), seed);
    (0..OPS).for_each(|_| runner.step());
    runner.close();
    (disk.take_trace(), runner.history)
}

fn keeps(random: &mut SimRandom) -> CrashKeeps {
    match random.below(4) {
        0 => CrashKeeps::All,
        1 => CrashKeeps::Nothing,
        _ => CrashKeeps::Some((16 + random.below(224)) as u8),
    }
}

/// Recovers the crashed device and checks it.
fn recover(
    disk: SimDisk,
    history: &History,
    done: usize,
    survives: bool,
    read: Reader,
) -> Result<Arc<SimDisk>, String> {
    let disk = Arc::new(disk);
    let engine = Engine::open(Arc::clone(&disk), options(), STORE_ID).map_err(|e| e.to_string())?;
    history.check(&engine, done, survives, read)?;
    let audit = engine.audit();
    match audit.damage_count() {
        0 => Ok(disk),
        _ => Err(format!("tables: {:?}", audit.listed)),
    }
}

/// After a recovery the store must go on working, close and open again.
fn go_on(disk: Arc<SimDisk>, seed: u64) {
    let mut before = Vec::new();
    let mut runner = Runner::new(Arc::clone(&disk), seed);
    for page in 0..harness::PAGES.len() {
        before.push(verified(&runner.engine, harness::at(page, 0, harness::BLOCKS), None).unwrap());
    }
    let data = harness::fill(0, 3, 200, 0x7fff_0000);
    let (at, mut placement) = (harness::at(0, 3, 200), Default::default());
    runner
        .attempt(|e, f| e.write(at, &data, blockd::id::Epoch(2), &mut placement, f))
        .unwrap();
    before[0][3 * 512..][..200 * 512].copy_from_slice(&data);
    runner.close();
    let engine = Engine::open(disk, options(), STORE_ID).unwrap();
    for (page, bytes) in before.iter().enumerate() {
        let found = verified(&engine, harness::at(page, 0, harness::BLOCKS), None).unwrap();
        assert!(found == *bytes, "page {page} changed over close and open");
    }
}

#[test]
fn every_device_operation_of_200_workloads_survives_a_crash() {
    let workloads: u64 = std::env::var("BLOCKD_CRASH_WORKLOADS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(200);
    let first: u64 = std::env::var("BLOCKD_CRASH_SEED")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1);
    let (mut points, mut checkpoints) = (0, 0);
    for seed in first..first + workloads {
        let (trace, history) = workload(seed);
        let disk = SimDisk::new();
        let mut random = SimRandom(seed ^ 0xc4a5);
        for done in 0..=trace.len() {
            let keeps = keeps(&mut random);
            let crashed = disk.crashed(keeps, &mut random);
            let outcome = recover(crashed, &history, done, keeps == CrashKeeps::All, verified);
            let disk_after = outcome.unwrap_or_else(|e| {
                panic!(
                    "seed {seed}, {done} of {} operations, {keeps:?}: {e}",
                    trace.len()
                )
            });
            if random.below(8) == 0 {
                checks::assert_sound(
                    &disk_after,
                    true,
                    &format!("seed {seed}, {done} operations"),
                );
            }
            if random.below(16) == 0 {
                go_on(disk_after, seed + done as u64);
            }
            points += 1;
            if let Some(op) = trace.get(done) {
                disk.replay(op);
                checkpoints += usize::from(matches!(op, DiskOp::Sync(DiskFile::Super)));
            }
        }
    }
    checkpoints -= SUPERBLOCKS_ANYWAY * workloads as usize;
    println!(
        "{workloads} workloads, {points} crash points, {checkpoints} checkpoints, no violation"
    );
    assert!(
        workloads as usize * 2 < checkpoints,
        "the workloads must checkpoint under way"
    );
}

/// Counts the workloads in which a changed trace shows a violation.
fn caught(
    change: fn(&[DiskOp]) -> Vec<Vec<DiskOp>>,
    mode: CrashKeeps,
    read: Reader,
) -> (usize, String) {
    let (mut count, mut example) = (0, String::new());
    for seed in 1..=8 {
        let (trace, history) = workload(seed);
        let trace = change(&trace);
        let disk = SimDisk::new();
        let mut random = SimRandom(seed);
        for (done, ops) in trace.iter().enumerate() {
            ops.iter().for_each(|op| disk.replay(op));
            let crashed = disk.crashed(mode, &mut random);
            if let Err(error) = recover(crashed, &history, done + 1, mode == CrashKeeps::All, read)
            {
                example = format!("seed {seed}, operation {done}: {error}");
                count += 1;
                break;
            }
        }
    }
    (count, example)
}

/// The log is written only when it is synced: what a store does that acknowledges first.
fn late_log(trace: &[DiskOp]) -> Vec<Vec<DiskOp>> {
    let mut held = Vec::new();
    let mut delay = |op: &DiskOp| {
        held.push(op.clone());
        match op {
            DiskOp::Write(DiskFile::Log, ..) => Vec::new(),
            DiskOp::Sync(DiskFile::Log) => std::mem::take(&mut held),
            _ => held.pop().into_iter().collect(),
        }
    };
    trace.iter().map(&mut delay).collect()
}

/// Syncs of the slab do nothing.
fn no_slab_sync(trace: &[DiskOp]) -> Vec<Vec<DiskOp>> {
    let skip = |op: &DiskOp| matches!(op, DiskOp::Sync(DiskFile::Slab));
    trace
        .iter()
        .map(|op| {
            if skip(op) {
                Vec::new()
            } else {
                vec![op.clone()]
            }
        })
        .collect()
}

/// Every third write to the slab is acknowledged and lost.
fn lost_slab_writes(trace: &[DiskOp]) -> Vec<Vec<DiskOp>> {
    let mut writes = 0;
    let lose = |op: &DiskOp| {
        let is_write = matches!(op, DiskOp::Write(DiskFile::Slab, ..));
        writes += usize::from(is_write);
        if is_write && writes % 3 == 0 {
            Vec::new()
        } else {
            vec![op.clone()]
        }
    };
    trace.iter().map(lose).collect()
}

fn unverified(
    engine: &Engine<SimDisk>,
    at: blockd::data::page_store::PageAt,
    snapshot: Option<blockd::id::SnapshotId>,
) -> Result<Vec<u8>, StoreError> {
    engine.salvage(at, snapshot)
}

#[test]
fn planted_fault_acknowledge_before_the_log_is_written_is_caught() {
    let (count, example) = caught(late_log, CrashKeeps::All, verified);
    println!("acknowledge before the log is written: caught in {count} of 8 workloads ({example})");
    assert_eq!(count, 8);
}

#[test]
fn planted_fault_checkpoint_without_syncing_the_slab_is_caught() {
    let (count, example) = caught(no_slab_sync, CrashKeeps::Nothing, verified);
    println!("checkpoint without syncing the slab: caught in {count} of 8 workloads ({example})");
    assert_eq!(count, 8);
}

/// A checksum beside the data is valid for old data too. Reading as such a store does, lost writes
/// come out as wrong bytes; our store says that the sub-block is bad and gives no byte of it.
#[test]
fn planted_fault_checksum_with_the_data_only_is_caught() {
    let (count, example) = caught(lost_slab_writes, CrashKeeps::Nothing, unverified);
    println!("checksum stored with the data only: caught in {count} of 8 workloads ({example})");
    assert_eq!(count, 8);
    assert!(
        example.contains("allowed"),
        "a wrong value, not an error: {example}"
    );
    let (count, example) = caught(lost_slab_writes, CrashKeeps::Nothing, verified);
    assert_eq!(count, 8);
    assert!(
        example.contains("checksum mismatch"),
        "an error, not a wrong value: {example}"
    );
}
