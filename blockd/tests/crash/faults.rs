//! Failing devices, rotten bits, full file systems, and what the tables cost in memory.

use crate::harness::{BLOCKS, STORE_ID, at, fill, options, value_of, verified, write};
use blockd::data::page_store::{Engine, StoreError, StoreOptions};
use blockd::id::{Epoch, PageNo, SnapshotId, VolumeId};
use blockd::io::disk::{Disk, DiskFile};
use blockd::io::sim_disk::{CrashKeeps, SimDisk, SimFault, SimRandom};
use std::sync::Arc;

type Sim = Engine<SimDisk>;

fn open(disk: &Arc<SimDisk>) -> Result<Sim, StoreError> {
    Engine::open(Arc::clone(disk), options(), STORE_ID)
}

/// Runs jobs until nothing is to be done; stops at the first failure.
fn upkeep(engine: &mut Sim, disk: &SimDisk) -> Result<(), StoreError> {
    loop {
        let maintenance = engine.next_maintenance()?;
        let sync = engine.next_sync(true)?;
        if maintenance.is_none() && sync.is_none() {
            return Ok(());
        }
        for job in [maintenance, sync].into_iter().flatten() {
            engine.finish(job.run(disk))?;
        }
    }
}

/// A short life: writes, snapshot, overwrites, trims, delete, checkpoint. Acknowledged values per
/// block go to `model`; a failed write leaves `u32::MAX` (either value).
fn life(engine: &mut Sim, disk: &SimDisk, model: &mut [u32]) -> Result<(), StoreError> {
    let mut put = |engine: &mut Sim, block: usize, count: usize, value: u32| {
        let data = fill(0, block, count, value);
        let outcome = if value == 0 {
            engine.zero(at(0, block, count), Epoch(1), &[])
        } else {
            write(engine, at(0, block, count), &data, Epoch(1))
        };
        model[block..block + count].fill(if outcome.is_ok() { value } else { u32::MAX });
        outcome.map(drop)
    };
    put(engine, 0, 256, 1)?;
    put(engine, 300, 30, 2)?;
    upkeep(engine, disk)?;
    engine.take_snapshot(VolumeId(1), SnapshotId(1))?;
    put(engine, 8, 8, 3)?;
    put(engine, 301, 3, 4)?;
    engine.request_apply();
    upkeep(engine, disk)?;
    put(engine, 128, 128, 5)?;
    put(engine, 16, 50, 0)?;
    engine.request_checkpoint();
    upkeep(engine, disk)?;
    if let blockd::data::page_store::Step::Done(groups) =
        engine.drop_snapshot(VolumeId(1), SnapshotId(1))?
    {
        for key in groups {
            while engine.sweep_group(VolumeId(1), key, &[])?
                == blockd::data::page_store::Step::Done(true)
            {}
        }
    }
    engine.request_apply();
    upkeep(engine, disk)?;
    engine.request_checkpoint();
    upkeep(engine, disk)
}

fn check(engine: &Sim, model: &[u32], what: &str) {
    let bytes = verified(engine, at(0, 0, BLOCKS), None).unwrap_or_else(|e| panic!("{what}: {e}"));
    for (block, expected) in model.iter().enumerate() {
        let value = value_of(0, block, &bytes[block * 512..][..512]);
        assert!(
            *expected == u32::MAX || value == Ok(*expected),
            "{what}: block {block}: {value:?}, not {expected}"
        );
    }
}

fn operations_of_a_life() -> u64 {
    let disk = Arc::new(SimDisk::new());
    let mut engine = open(&disk).unwrap();
    let start = disk.operations();
    life(&mut engine, &disk, &mut [0; BLOCKS]).unwrap();
    disk.operations() - start
}

#[test]
fn after_any_failed_operation_the_store_stops_and_recovers() {
    let operations = operations_of_a_life();
    for nth in 0..operations {
        let disk = Arc::new(SimDisk::new());
        let mut engine = open(&disk).unwrap();
        disk.fail_nth(nth, SimFault::Io);
        let mut model = [0; BLOCKS];
        let error = life(&mut engine, &disk, &mut model).unwrap_err();
        assert!(
            matches!(error, StoreError::Failed { .. }),
            "operation {nth}: {error}"
        );
        let again = write(&mut engine, at(0, 0, 8), &fill(0, 0, 8, 9), Epoch(1));
        assert!(
            matches!(again, Err(StoreError::Failed { .. })),
            "operation {nth}: still writing"
        );
        assert!(engine.failure().is_some(), "operation {nth}: not told");
        let crashed = Arc::new(disk.crashed(CrashKeeps::All, &mut SimRandom(nth)));
        check(
            &open(&crashed).unwrap(),
            &model,
            &format!("after operation {nth} failed"),
        );
    }
    println!("EIO at each of {operations} operations");
}

#[test]
fn without_space_only_the_request_fails_and_the_store_goes_on() {
    let operations = operations_of_a_life();
    for nth in 0..operations {
        let disk = Arc::new(SimDisk::new());
        let mut engine = open(&disk).unwrap();
        disk.fail_nth(nth, SimFault::NoSpace);
        let mut model = [0; BLOCKS];
        match life(&mut engine, &disk, &mut model) {
            Ok(()) => {}
            Err(StoreError::NoSpace) => check(&engine, &model, &format!("no space at {nth}")),
            // A superblock has its space since the format: no space there is a broken device.
            Err(StoreError::Failed {
                action: "checkpoint",
                ..
            }) => continue,
            Err(error) => panic!("operation {nth}: {error}"),
        }
        engine.request_apply();
        upkeep(&mut engine, &disk).unwrap();
        engine.request_checkpoint();
        upkeep(&mut engine, &disk).unwrap();
        check(&engine, &model, &format!("later, no space at {nth}"));
        drop(engine);
        check(
            &open(&disk).unwrap(),
            &model,
            &format!("opened again, no space at {nth}"),
        );
    }
    println!("ENOSPC at each of {operations} operations");
}

#[test]
fn a_full_file_system_refuses_writes_and_takes_them_again_after_a_trim() {
    let disk = Arc::new(SimDisk::new());
    let mut engine = open(&disk).unwrap();
    disk.set_capacity(Some((1 << 20) + (400 << 10)));
    let mut written = 0;
    let error = loop {
        let block = written * 128;
        let page = blockd::data::page_store::PageAt {
            page: PageNo(100),
            ..at(0, block, 128)
        };
        match write(&mut engine, page, &fill(0, block, 128, 7), Epoch(1)) {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(
        matches!(error, StoreError::NoSpace) && written > 2,
        "{error} after {written}"
    );
    let page = blockd::data::page_store::PageAt {
        page: PageNo(100),
        ..at(0, 0, 256)
    };
    engine.zero(page, Epoch(1), &[]).unwrap();
    engine.request_apply();
    upkeep(&mut engine, &disk).unwrap();
    write(&mut engine, at(0, 0, 128), &fill(0, 0, 128, 8), Epoch(1)).unwrap();
    assert_eq!(
        verified(&engine, at(0, 0, 128), None).unwrap(),
        fill(0, 0, 128, 8)
    );
}

#[test]
fn a_rotten_bit_in_the_slab_spoils_one_sub_block_only() {
    let disk = Arc::new(SimDisk::new());
    let mut engine = open(&disk).unwrap();
    write(&mut engine, at(0, 0, 256), &fill(0, 0, 256, 1), Epoch(1)).unwrap();
    disk.flip_bit(DiskFile::Slab, 5 * 4096 + 77, 3);
    for sub in 0..32 {
        let outcome = verified(&engine, at(0, sub * 8, 8), None);
        match outcome {
            Err(StoreError::BadSubBlock { offset_bytes, .. }) if sub == 5 => {
                assert_eq!(offset_bytes, 5 * 4096)
            }
            Ok(bytes) if sub != 5 => assert_eq!(bytes, fill(0, sub * 8, 8, 1)),
            other => panic!("sub-block {sub}: {other:?}"),
        }
    }
    // Repair is an ordinary write of the whole sub-block.
    write(&mut engine, at(0, 40, 8), &fill(0, 40, 8, 2), Epoch(1)).unwrap();
    assert_eq!(
        verified(&engine, at(0, 40, 8), None).unwrap(),
        fill(0, 40, 8, 2)
    );
}

#[test]
fn damage_that_recovery_meets_is_an_error_never_an_old_state() {
    let disk = Arc::new(SimDisk::new());
    let mut engine = open(&disk).unwrap();
    life(&mut engine, &disk, &mut [0; BLOCKS]).unwrap();
    for value in 1..20 {
        write(&mut engine, at(0, 0, 8), &fill(0, 0, 8, value), Epoch(1)).unwrap();
        upkeep(&mut engine, &disk).unwrap();
    }
    drop(engine);
    let mut random = SimRandom(3);
    for file in [
        DiskFile::Log,
        DiskFile::Meta,
        DiskFile::CatalogA,
        DiskFile::CatalogB,
    ] {
        let len = disk.len_bytes(file).unwrap().min(64 << 10);
        let (mut refused, mut same) = (0, 0);
        for _ in 0..400 {
            let damaged = Arc::new(disk.crashed(CrashKeeps::All, &mut random));
            damaged.flip_bit(file, random.below(len), random.below(8) as u8);
            match open(&damaged) {
                Err(StoreError::Corrupt { .. }) => refused += 1,
                Err(error) => panic!("{error}"),
                Ok(engine) => match verified(&engine, at(0, 0, 8), None) {
                    Ok(bytes) => {
                        assert_eq!(
                            bytes,
                            fill(0, 0, 8, 19),
                            "{file:?}: an older value came back"
                        );
                        same += 1;
                    }
                    Err(StoreError::BadSubBlock { .. }) => refused += 1,
                    Err(error) => panic!("{error}"),
                },
            }
        }
        println!("{file:?}: {refused} refused, {same} not affected");
    }
}

/// Swallows data, so that a large store costs no memory but that of its tables.
struct Sink(SimDisk);

impl Disk for Sink {
    fn read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> std::io::Result<()> {
        if file == DiskFile::Slab {
            Ok(())
        } else {
            self.0.read_at(file, pos, buf)
        }
    }
    fn try_read_at(&self, file: DiskFile, pos: u64, buf: &mut [u8]) -> std::io::Result<bool> {
        self.read_at(file, pos, buf).map(|()| true)
    }
    fn write_at(
        &self,
        file: DiskFile,
        pos: u64,
        parts: &[std::io::IoSlice<'_>],
    ) -> std::io::Result<()> {
        if file == DiskFile::Slab {
            Ok(())
        } else {
            self.0.write_at(file, pos, parts)
        }
    }
    fn sync(&self, file: DiskFile) -> std::io::Result<()> {
        self.0.sync(file)
    }
    fn punch(&self, file: DiskFile, pos: u64, len: u64) -> std::io::Result<()> {
        self.0.punch(file, pos, len)
    }
    fn len_bytes(&self, file: DiskFile) -> std::io::Result<u64> {
        self.0.len_bytes(file)
    }
    fn free_bytes(&self) -> std::io::Result<u64> {
        Ok(u64::MAX)
    }
}

fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/statm").unwrap();
    status.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4096
}

#[test]
fn the_tables_of_a_tib_fit_in_one_and_a_half_gib() {
    let disk = Arc::new(Sink(SimDisk::new()));
    let options = StoreOptions {
        log_bytes: 16 << 20,
        ..options()
    };
    let mut engine = Engine::open(Arc::clone(&disk), options, 1).unwrap();
    let data = vec![3; 4 << 20];
    let (before, gib) = (resident_bytes(), 16);
    for page in 0..gib * 256 {
        let at = blockd::data::page_store::PageAt {
            volume: VolumeId(1),
            page: PageNo(page),
            offset_bytes: 0,
            len_bytes: 4 << 20,
        };
        write(&mut engine, at, &data, Epoch(1)).unwrap();
        while let Some(job) = engine.next_sync(false).unwrap() {
            engine.finish(job.run(&*disk)).unwrap();
        }
        while let Some(job) = engine.next_maintenance().unwrap() {
            engine.finish(job.run(&*disk)).unwrap();
        }
    }
    engine.request_checkpoint();
    while let Some(job) = engine
        .next_maintenance()
        .unwrap()
        .or(engine.next_sync(true).unwrap())
    {
        engine.finish(job.run(&*disk)).unwrap();
    }
    let stated = engine.resident_bytes();
    let per_tib = stated * 1024 / u64::from(gib);
    let measured = resident_bytes().saturating_sub(before) * 1024 / u64::from(gib);
    println!(
        "tables: {} MiB per TiB stated; process grew by {} MiB per TiB (with the simulated log and meta pages)",
        per_tib >> 20,
        measured >> 20
    );
    assert!(per_tib <= 3 << 29, "{per_tib} bytes per TiB");
}
