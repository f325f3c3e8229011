//! Opening a store: format an empty one, or rebuild the tables from checkpoint and log.
//!
//! The log is walked twice. First the record heads only: how far the chain (lsn, checksum of the
//! record before) goes, and the highest lsn known durable (`proven`) by any record or the superblock.
//! Where the chain ends the rest of the ring is searched for records that prove the missing one was
//! durable: then it is corruption and the store stays closed. Otherwise the end is a torn tail.
//! Then the records are executed. Up to `proven` the data is not looked at: reads verify it; nor is
//! that of pointers up to the lsn that a mark calls synced in the slab. Beyond, the first record whose
//! data does not verify was never flushed, nor was anything after it: cut.
//!
//! What was cut may have been acknowledged: the superblock counts that before the log goes on, as who
//! was answered must hear of it also when the machine did not stop, but the disk lost a write.

use super::catalog::{self, Catalog};
use super::engine::Engine;
use super::error::StoreError;
use super::hash::FastMap;
use super::log::{Log, LogPoint};
use super::maintain::{Upkeep, catalog_file};
use super::meta::{META_PAGE_BYTES, META_SLOTS, MetaCopy, MetaPage};
use super::record::{
    Change, HEAD_BYTES_MAX, RECORD_ALIGN, Record, decode, has_long_table, has_magic,
};
use super::superblock::Superblock;
use super::tables::{Redo, Tables};
use super::types::StoreOptions;
use super::version::{Group, SUBS, bits};
use crate::id::CHUNK_BYTES;
use crate::io::disk::{Disk, DiskFile};
use crate::planted::{Plant, planted};
use std::collections::HashSet;
use std::io::IoSlice;
use std::sync::Arc;

const LOG_BYTES_MIN: u64 = 1 << 20;
const LOG_BYTES_MAX: u64 = 64 << 30;
const SCAN_BYTES: usize = 1 << 20;

fn read_error(file: DiskFile) -> impl Fn(std::io::Error) -> StoreError {
    move |error| StoreError::read(file, error)
}

fn failed(action: &'static str, error: std::io::Error) -> StoreError {
    StoreError::Failed {
        action,
        source: Arc::new(error),
    }
}

fn corrupt(what: &'static str, detail: impl Into<String>) -> StoreError {
    StoreError::Corrupt {
        what,
        detail: detail.into(),
    }
}

impl<D: Disk> Engine<D> {
    /// Opens the store on a device; formats an empty one, for which `new_id` must be random.
    pub fn open(disk: Arc<D>, options: StoreOptions, new_id: u64) -> Result<Engine<D>, StoreError> {
        check_options(&options)?;
        let mut superblock = match Superblock::read(&*disk)? {
            Some(found) => found,
            None => format(&*disk, &options, new_id)?,
        };
        let mut tables = Tables::default();
        let mut upkeep = Upkeep::default();
        load_meta(&*disk, &superblock, &mut tables, &mut upkeep.copies)?;
        load_catalog(&*disk, &superblock, &mut tables)?;
        tables.slots.extend_to(superblock.slots);
        let chain = Chain::walk(&*disk, &superblock)?;
        chain.check(&superblock)?;
        let proven = chain.proven;
        let (head, last_pointer) = redo(&*disk, &superblock, &chain, &mut tables)?;
        chain.cut(&*disk, &mut superblock, head)?;
        free_unowned(&mut tables, head.lsn);
        let log = Log {
            size_bytes: superblock.log_bytes,
            seed: superblock.seed(),
            head,
            tail: superblock.start.pos,
            durable: superblock.durable.min(head.lsn),
            recorded: proven.min(head.lsn),
            carried: proven.min(head.lsn),
            last_change: head.lsn,
            durable_pos: superblock.start.pos,
        };
        upkeep.superblock = superblock;
        upkeep.last_pointer = last_pointer;
        upkeep.in_slab = head;
        let mut engine = Engine::assemble(disk, options, tables, log, upkeep);
        engine.settle()?;
        Ok(engine)
    }

    /// How often an opening of the store has found changes missing that may have been acknowledged.
    pub fn losses(&self) -> u32 {
        self.upkeep.superblock.losses
    }

    /// Makes durable what was recovered, before anything is served from it.
    fn settle(&mut self) -> Result<(), StoreError> {
        let disk = self.disk();
        let failed = |e| failed("sync after recovery", e);
        disk.sync(DiskFile::Slab)
            .and_then(|()| disk.sync(DiskFile::Log))
            .map_err(failed)?;
        self.synced(self.log.head, self.log.carried);
        if self.log.recorded < self.log.head.lsn && self.log.has_room(64, 0) {
            self.commit(
                &Change::Mark {
                    in_slab: self.log.head.lsn,
                },
                &[],
            )?;
            disk.sync(DiskFile::Log).map_err(failed)?;
            self.synced(self.log.head, self.log.carried);
        }
        self.upkeep.superblock.sequence += 1;
        self.upkeep.superblock.clean = false;
        self.upkeep.superblock.durable = self.log.durable;
        self.upkeep.superblock.write(&*disk).map_err(failed)
    }
}

fn check_options(options: &StoreOptions) -> Result<(), StoreError> {
    let bytes = options.log_bytes;
    if (LOG_BYTES_MIN..=LOG_BYTES_MAX).contains(&bytes)
        && bytes.is_multiple_of(u64::from(CHUNK_BYTES))
    {
        return Ok(());
    }
    let problem = format!("{bytes} is not a multiple of 64 KiB from 1 MiB to 64 GiB");
    Err(StoreError::BadOption {
        option: "log_bytes",
        problem,
    })
}

/// Writes an empty store. The superblock comes last: before it there is no store.
fn format<D: Disk>(
    disk: &D,
    options: &StoreOptions,
    new_id: u64,
) -> Result<Superblock, StoreError> {
    for file in [DiskFile::Slab, DiskFile::Meta, DiskFile::CatalogB] {
        if disk.len_bytes(file).map_err(read_error(file))? != 0 {
            return Err(corrupt(
                "superblock",
                format!("none of 4 copies is valid, but {} has data", file.name()),
            ));
        }
    }
    let failed = |e: std::io::Error| match e.kind() {
        std::io::ErrorKind::StorageFull => StoreError::NoSpace,
        _ => StoreError::Failed {
            action: "format",
            source: Arc::new(e),
        },
    };
    let zeros = vec![0; SCAN_BYTES];
    let mut pos = 0;
    while pos < options.log_bytes {
        let len = options.log_bytes.saturating_sub(pos).min(SCAN_BYTES as u64);
        let part = &zeros[..usize::try_from(len).unwrap_or(SCAN_BYTES)];
        disk.write_at(DiskFile::Log, pos, &[IoSlice::new(part)])
            .map_err(failed)?;
        pos += len;
    }
    let catalog =
        catalog::encode(&Catalog::default()).map_err(|e| corrupt("catalog", e.to_string()))?;
    disk.write_at(DiskFile::CatalogA, 0, &[IoSlice::new(&catalog)])
        .map_err(failed)?;
    disk.sync(DiskFile::Log)
        .and_then(|()| disk.sync(DiskFile::CatalogA))
        .map_err(failed)?;
    disk.write_at(
        DiskFile::Super,
        0,
        &[IoSlice::new(&zeros[..4 * META_PAGE_BYTES])],
    )
    .map_err(failed)?;
    let superblock = Superblock {
        store_id: new_id,
        sequence: 1,
        clean: true,
        log_bytes: options.log_bytes,
        catalog_crc: crc32fast::hash(&catalog),
        catalog_bytes: catalog.len() as u64,
        ..Superblock::default()
    };
    superblock.write(disk).map_err(failed)?;
    Ok(superblock)
}

/// Loads the newest copy of every meta page that belongs to the checkpoint.
fn load_meta<D: Disk + ?Sized>(
    disk: &D,
    superblock: &Superblock,
    tables: &mut Tables,
    copies: &mut Vec<MetaCopy>,
) -> Result<(), StoreError> {
    let mut digest = 0;
    let mut pair = vec![0; 2 * META_PAGE_BYTES];
    for number in 0..superblock.slots.div_ceil(META_SLOTS) {
        let pos = MetaCopy::A.pos(number);
        disk.read_at(DiskFile::Meta, pos, &mut pair)
            .map_err(read_error(DiskFile::Meta))?;
        let mut best: Option<(MetaCopy, MetaPage)> = None;
        for (copy, bytes) in [MetaCopy::A, MetaCopy::B]
            .into_iter()
            .zip(pair.chunks_exact(META_PAGE_BYTES))
        {
            let mut buf = Box::new([0; META_PAGE_BYTES]);
            buf.copy_from_slice(bytes);
            let page =
                MetaPage::parse(buf, number).filter(|p| p.checkpoint() <= superblock.checkpoint);
            let Some(page) = page else { continue };
            if best
                .as_ref()
                .is_none_or(|(_, old)| old.checkpoint() < page.checkpoint())
            {
                best = Some((copy, page));
            }
        }
        copies.push(best.as_ref().map_or(MetaCopy::None, |(copy, _)| *copy));
        if let Some((_, page)) = best {
            digest ^= page.digest();
            page.records().for_each(|content| tables.load(content));
        }
    }
    if digest != superblock.meta_digest {
        return Err(corrupt(
            "meta",
            "the pages found are not those of the checkpoint; a write was lost",
        ));
    }
    Ok(())
}

fn load_catalog<D: Disk + ?Sized>(
    disk: &D,
    superblock: &Superblock,
    tables: &mut Tables,
) -> Result<(), StoreError> {
    tables.load_catalog(read_catalog(disk, superblock)?);
    Ok(())
}

/// The catalog of the checkpoint.
pub(super) fn read_catalog<D: Disk + ?Sized>(
    disk: &D,
    superblock: &Superblock,
) -> Result<Catalog, StoreError> {
    let file = catalog_file(superblock.checkpoint);
    let len = disk.len_bytes(file).map_err(read_error(file))?;
    let bytes = usize::try_from(superblock.catalog_bytes).unwrap_or(usize::MAX);
    if len < superblock.catalog_bytes {
        return Err(corrupt(
            "catalog",
            format!("{} has {len} bytes of {bytes}", file.name()),
        ));
    }
    let mut buf = vec![0; bytes];
    disk.read_at(file, 0, &mut buf).map_err(read_error(file))?;
    if crc32fast::hash(&buf) != superblock.catalog_crc {
        return Err(corrupt(
            "catalog",
            format!("{} has another checksum than recorded", file.name()),
        ));
    }
    catalog::decode(&buf).map_err(|e| corrupt("catalog", e.to_string()))
}

/// Reads the head of the record at a position, if a valid one is there.
fn head_at<D: Disk + ?Sized>(
    disk: &D,
    superblock: &Superblock,
    pos: u64,
) -> Result<Option<Record>, StoreError> {
    let at = pos % superblock.log_bytes;
    let len = (superblock.log_bytes - at).min(HEAD_BYTES_MAX as u64);
    let mut buf = [0; HEAD_BYTES_MAX];
    let buf = &mut buf[..usize::try_from(len).unwrap_or(HEAD_BYTES_MAX)];
    let first = buf.len().min(2 * RECORD_ALIGN);
    disk.read_at(DiskFile::Log, at, &mut buf[..first])
        .map_err(read_error(DiskFile::Log))?;
    if has_magic(buf) && first < buf.len() && has_long_table(buf) {
        disk.read_at(DiskFile::Log, at, buf)
            .map_err(read_error(DiskFile::Log))?;
    }
    Ok(decode(buf, superblock.seed())
        .filter(|record| at + record.len_bytes as u64 <= superblock.log_bytes))
}

/// The records from the checkpoint on.
pub(super) struct Chain {
    /// With their positions.
    pub(super) records: Vec<(u64, Record)>,
    /// Where it ends.
    pub(super) end: LogPoint,
    /// The highest lsn known durable.
    pub(super) proven: u64,
    /// Positions in the log of later records that do not hang together with these.
    behind: Vec<u64>,
}

impl Chain {
    /// Follows the chain of records.
    pub(super) fn walk<D: Disk + ?Sized>(
        disk: &D,
        superblock: &Superblock,
    ) -> Result<Chain, StoreError> {
        let (mut end, mut proven) = (superblock.start, superblock.durable);
        let mut records = Vec::new();
        let full = superblock.start.pos + superblock.log_bytes;
        while let Some(record) = head_at(disk, superblock, end.pos)? {
            let next = end.pos + record.len_bytes as u64;
            if record.lsn != end.lsn + 1 || record.prev_crc != end.crc || full < next {
                break;
            }
            proven = proven.max(record.durable);
            let pos = end.pos;
            end = LogPoint {
                pos: next,
                lsn: record.lsn,
                crc: record.crc,
            };
            records.push((pos, record));
        }
        let mut behind = Vec::new();
        if !superblock.clean || !records.is_empty() {
            proven = proven.max(search_behind(disk, superblock, end, &mut behind)?);
        }
        Ok(Chain {
            records,
            end,
            proven,
            behind,
        })
    }

    /// The log ends at `head`. What else there is of records is wiped, so that it is never taken for
    /// the log's, and a loss is noted before.
    fn cut<D: Disk + ?Sized>(
        &self,
        disk: &D,
        superblock: &mut Superblock,
        head: LogPoint,
    ) -> Result<(), StoreError> {
        let kept = self.records.partition_point(|(_, r)| r.lsn <= head.lsn);
        let cut = &self.records[kept..];
        // Of a write that was broken off and never answered no more is there than its record, and
        // a pointer is logged only when its data is there.
        let may_be_answered = !self.behind.is_empty()
            || 1 < cut.len()
            || cut.iter().any(|(_, record)| is_pointer(&record.change));
        if may_be_answered {
            superblock.sequence += 1;
            superblock.losses += 1;
            superblock.clean = false;
            let written = superblock.write(disk);
            written.map_err(|e| failed("note of a loss", e))?;
        }
        let wiped = cut.iter().map(|(pos, _)| *pos);
        for pos in wiped.chain(self.behind.iter().copied()) {
            let nothing = [IoSlice::new(&[0; RECORD_ALIGN])];
            disk.write_at(DiskFile::Log, pos % superblock.log_bytes, &nothing)
                .map_err(|e| failed("cut of the log", e))?;
        }
        Ok(())
    }

    /// Fails if a record is missing that was durable.
    pub(super) fn check(&self, superblock: &Superblock) -> Result<(), StoreError> {
        if self.proven <= self.end.lsn {
            return Ok(());
        }
        let detail = format!(
            "record {} at byte {} is damaged, but {} was durable",
            self.end.lsn + 1,
            self.end.pos % superblock.log_bytes,
            self.proven
        );
        Err(corrupt("log", detail))
    }
}

/// Looks for records beyond the end of the chain; gives the highest lsn that one says is durable.
fn search_behind<D: Disk + ?Sized>(
    disk: &D,
    superblock: &Superblock,
    end: LogPoint,
    behind: &mut Vec<u64>,
) -> Result<u64, StoreError> {
    let mut proven = 0;
    let mut buf = vec![0; SCAN_BYTES];
    let mut pos = 0;
    while pos < superblock.log_bytes {
        let len = usize::try_from((superblock.log_bytes - pos).min(SCAN_BYTES as u64))
            .unwrap_or(SCAN_BYTES);
        disk.read_at(DiskFile::Log, pos, &mut buf[..len])
            .map_err(read_error(DiskFile::Log))?;
        for (at, bytes) in (pos..)
            .step_by(RECORD_ALIGN)
            .zip(buf[..len].chunks_exact(RECORD_ALIGN))
        {
            if has_magic(bytes)
                && let Some(record) = head_at(disk, superblock, at)?
                && end.lsn < record.lsn
            {
                proven = proven.max(record.durable);
                behind.push(at);
            }
        }
        pos += len as u64;
    }
    Ok(proven)
}

/// Executes the records; gives the end of the log and the lsn of the last pointer.
pub(super) fn redo<D: Disk + ?Sized>(
    disk: &D,
    superblock: &Superblock,
    chain: &Chain,
    tables: &mut Tables,
) -> Result<(LogPoint, u64), StoreError> {
    let Chain {
        records, proven, ..
    } = chain;
    let (mut head, mut last_pointer) = (superblock.start, 0);
    let in_slab = records.iter().map(|(_, record)| match record.change {
        Change::Mark { in_slab } => in_slab,
        _ => 0,
    });
    let in_slab = in_slab.max().unwrap_or(0);
    let mut allocated: FastMap<u32, u64> = FastMap::default();
    let last = records.last().map_or(0, |(_, record)| record.lsn);
    for (pos, record) in records {
        let data_pos = pos % superblock.log_bytes + record.head_bytes as u64;
        let is_pointer = is_pointer(&record.change);
        let is_sure = record.lsn <= *proven || (is_pointer && record.lsn <= in_slab);
        if !is_sure && !verifies(disk, &record.change, data_pos)? {
            break;
        }
        if planted(Plant::CutValidRecords) && record.lsn + 2 > last {
            break;
        }
        allocated.extend(
            tables
                .allocates(&record.change)
                .map(|slot| (slot, record.lsn)),
        );
        let misfit =
            |m: super::tables::Misfit| corrupt("log", format!("record {}: {}", record.lsn, m.0));
        tables
            .execute(record.lsn, &record.change, data_pos)
            .map_err(misfit)?;
        if is_pointer {
            last_pointer = record.lsn;
        }
        head = LogPoint {
            pos: pos + record.len_bytes as u64,
            lsn: record.lsn,
            crc: record.crc,
        };
    }
    tables.forget_redo_before(&allocated);
    Ok((head, last_pointer))
}

fn is_pointer(change: &Change) -> bool {
    matches!(change, Change::Pointer { .. })
}

/// True if the data of a record is there: behind it in the log, or in the slab for pointers.
fn verifies<D: Disk + ?Sized>(
    disk: &D,
    change: &Change,
    data_pos: u64,
) -> Result<bool, StoreError> {
    let (file, pos, crcs): (_, _, Vec<u32>) = match change {
        Change::Data { mask, crcs, .. } => (
            DiskFile::Log,
            data_pos,
            bits(*mask).map(|sub| crcs[sub]).collect(),
        ),
        Change::Pointer { slot, crcs, .. } => (
            DiskFile::Slab,
            u64::from(*slot) * u64::from(CHUNK_BYTES),
            crcs.iter().flatten().copied().collect(),
        ),
        _ => return Ok(true),
    };
    let mut buf = vec![0; CHUNK_BYTES as usize];
    for (pos, crcs) in (pos..).step_by(CHUNK_BYTES as usize).zip(crcs.chunks(SUBS)) {
        let part = &mut buf[..crcs.len() * 4096];
        disk.read_at(file, pos, part).map_err(read_error(file))?;
        if part
            .chunks(4096)
            .zip(crcs)
            .any(|(bytes, crc)| crc32fast::hash(bytes) != *crc)
        {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Queues every slot that no version has and no record frees, so that its space is given back.
pub(super) fn free_unowned(tables: &mut Tables, lsn: u64) {
    let owned = tables
        .volumes
        .values()
        .flat_map(|v| v.groups.values())
        .flat_map(Group::all);
    let mut used: HashSet<u32> = owned.map(|version| version.slot).collect();
    used.extend(tables.redo.iter().filter_map(|entry| match entry {
        Redo::Free { slot, .. } => Some(*slot),
        _ => None,
    }));
    for slot in (0..tables.slots.end()).filter(|slot| !used.contains(slot)) {
        tables.redo.push_back(Redo::Free {
            lsn,
            slot,
            warm: false,
        });
        tables.freed_in_redo += 1;
    }
}
