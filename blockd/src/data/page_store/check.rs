//! The check of a store that nobody uses: everything that its files say of each other.
//!
//! It reads what recovery reads and changes nothing. What a crash may leave behind (a torn tail of
//! the log, half-written copies that are not in force) is no damage. It goes on after each finding,
//! as far as the rest can still be judged.

use super::audit::audit;
use super::error::StoreError;
use super::finding::{DamagedRange, Finding, Findings, Place};
use super::image::StoreImage;
use super::maintain::catalog_file;
use super::meta::{META_PAGE_BYTES, META_SLOTS, MetaCopy, MetaPage};
use super::recover::{Chain, free_unowned, read_catalog, redo};
use super::scrub::ChunkBuffer;
use super::superblock::{Copy, Superblock};
use super::tables::Tables;
use super::version::GROUP_CHUNKS;
use super::volume::{group_at, group_key};
use super::{engine::PAGE_BYTES_MAX, record::ChunkAt};
use crate::id::{CHUNK_BYTES, SUB_BLOCK_BYTES, VolumeId};
use crate::io::disk::{Disk, DiskFile};
use serde::Serialize;

/// Meta pages that are read at once.
const META_BATCH: u32 = 64;
/// Suspects named, when a meta page is missing.
const SUSPECTS_MAX: usize = 64;

const RESTORE: &str = "restore this server's store from a copy of its files";

/// What a check looks at, besides the structure.
#[derive(Clone, Copy, Debug, Default)]
pub struct CheckOptions {
    /// Also every stored sub-block against its checksum.
    pub data: bool,
}

/// How far a check is.
#[derive(Clone, Copy, Debug)]
pub struct CheckProgress {
    pub what: &'static str,
    pub done: u64,
    pub total: u64,
}

/// What the store holds, if it could be read.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StoreSummary {
    pub checkpoint: u64,
    pub log_records: u64,
    /// Bytes behind the last whole record that the next start cuts off: writes that were never
    /// flushed.
    pub torn_tail: bool,
    pub volumes: u64,
    pub slots_used: u64,
    pub slots_total: u64,
    pub allocated_bytes: u64,
    /// Bytes verified with `data`.
    pub verified_bytes: u64,
}

/// The outcome of a check.
pub struct StoreCheck {
    pub findings: Findings,
    pub summary: StoreSummary,
    /// What the next start would recover; `None` if it would refuse.
    pub image: Option<StoreImage>,
}

/// Checks the files of a store. Memory is what recovery takes, 80 bytes a chunk or so.
pub fn check_store<D: Disk + ?Sized>(
    disk: &D,
    options: CheckOptions,
    progress: &mut dyn FnMut(CheckProgress),
) -> StoreCheck {
    let mut check = Check {
        disk,
        progress,
        findings: Findings::default(),
        summary: StoreSummary::default(),
    };
    let tables = check.run(options);
    StoreCheck {
        findings: check.findings,
        summary: check.summary,
        image: tables.map(StoreImage::new),
    }
}

struct Check<'a, D: ?Sized> {
    disk: &'a D,
    progress: &'a mut dyn FnMut(CheckProgress),
    findings: Findings,
    summary: StoreSummary,
}

impl<D: Disk + ?Sized> Check<'_, D> {
    fn run(&mut self, options: CheckOptions) -> Option<Tables> {
        let superblock = self.superblock()?;
        self.summary.checkpoint = superblock.checkpoint;
        let mut tables = Tables::default();
        let meta = self.meta(&superblock, &mut tables);
        let catalog = self.catalog(&superblock, &mut tables);
        tables.slots.extend_to(superblock.slots);
        let complete = self.log(&superblock, &mut tables, meta && catalog);
        if meta && catalog {
            audit(&tables, &mut self.findings);
        }
        self.slab_length(&tables);
        if options.data {
            self.data(&tables);
        }
        self.count(&tables);
        (meta && catalog && complete).then_some(tables)
    }

    fn count(&mut self, tables: &Tables) {
        let subs: u64 = tables.volumes.values().map(|v| v.data_subs).sum();
        self.summary.volumes = tables.volumes.values().filter(|v| !v.deleted).count() as u64;
        self.summary.slots_used = tables.slots_used;
        self.summary.slots_total = u64::from(tables.slots.end());
        self.summary.allocated_bytes = subs * u64::from(SUB_BLOCK_BYTES);
    }

    fn damage(&mut self, finding: Finding) {
        self.findings.add(finding);
    }

    fn refuses(&mut self, file: &str, error: &StoreError) {
        let finding = Finding::damage(file, error.to_string());
        self.damage(finding.so("the server does not start on this store", RESTORE));
    }

    /// The superblock in force. The copy that is not may be torn by a crash.
    fn superblock(&mut self) -> Option<Superblock> {
        let copies = match Superblock::copies(self.disk) {
            Ok(copies) => copies,
            Err(error) => {
                self.refuses("store/super", &error);
                return None;
            }
        };
        for (pos, _) in copies.iter().filter(|(_, copy)| *copy == Copy::Damaged) {
            let finding = Finding::note("store/super", "a copy of the superblock does not verify");
            self.damage(finding.offset(*pos).so(
                "none: there are others. A crash during a checkpoint leaves this, as does a bad disk",
                "nothing; the next checkpoints replace it",
            ));
        }
        let valid = copies.into_iter().filter_map(|(_, copy)| match copy {
            Copy::Valid(superblock) => Some(superblock),
            Copy::Empty | Copy::Damaged => None,
        });
        let newest = valid.max_by_key(|superblock| superblock.sequence);
        match newest {
            None => self.no_superblock(),
            Some(superblock) => self.plausible(superblock),
        }
    }

    fn no_superblock(&mut self) -> Option<Superblock> {
        let files = [DiskFile::Slab, DiskFile::Meta, DiskFile::CatalogB];
        let holds = |file: &DiskFile| self.disk.len_bytes(*file).is_ok_and(|len| len > 0);
        if files.iter().any(holds) {
            let finding = Finding::damage("store/super", "no copy of the superblock verifies");
            self.damage(finding.so(
                "the server does not start: nothing says where its data is",
                RESTORE,
            ));
        } else {
            let finding = Finding::note("store/super", "the store was never used");
            self.damage(finding.so("none: the next start formats it", "nothing"));
        }
        None
    }

    fn plausible(&mut self, superblock: Superblock) -> Option<Superblock> {
        let len = self.disk.len_bytes(DiskFile::Log).unwrap_or(0);
        if 0 < superblock.log_bytes && superblock.log_bytes <= len {
            return Some(superblock);
        }
        let what = format!("the log has {len} bytes of {}", superblock.log_bytes);
        let finding = Finding::damage("store/log", what).offset(len);
        self.damage(finding.so("writes since the last checkpoint may be lost", RESTORE));
        (superblock.log_bytes > 0).then_some(superblock)
    }

    /// Loads the meta pages in force; false if some are missing.
    fn meta(&mut self, superblock: &Superblock, tables: &mut Tables) -> bool {
        let pages = superblock.slots.div_ceil(META_SLOTS);
        let len = self.disk.len_bytes(DiskFile::Meta).unwrap_or(0);
        let stored = len.div_ceil(2 * META_PAGE_BYTES as u64);
        let stored = u32::try_from(stored).unwrap_or(u32::MAX).min(pages);
        let mut seen = MetaSeen::default();
        for first in (0..stored).step_by(META_BATCH as usize) {
            let count = META_BATCH.min(stored - first);
            if !self.meta_batch(superblock, first..first + count, tables, &mut seen) {
                return false;
            }
            (self.progress)(CheckProgress {
                what: "meta pages",
                done: u64::from(first + count),
                total: u64::from(stored),
            });
        }
        let complete = seen.digest == superblock.meta_digest;
        self.judge_meta(complete, &seen);
        complete
    }

    fn meta_batch(
        &mut self,
        superblock: &Superblock,
        numbers: std::ops::Range<u32>,
        tables: &mut Tables,
        seen: &mut MetaSeen,
    ) -> bool {
        let mut buf = vec![0; numbers.len() * 2 * META_PAGE_BYTES];
        let pos = MetaCopy::A.pos(numbers.start);
        if let Err(error) = self.disk.read_at(DiskFile::Meta, pos, &mut buf) {
            self.refuses("store/meta", &StoreError::read(DiskFile::Meta, error));
            return false;
        }
        for (number, pair) in numbers.zip(buf.chunks_exact(2 * META_PAGE_BYTES)) {
            let Some(page) = seen.in_force(number, pair, superblock.checkpoint) else {
                continue;
            };
            seen.digest ^= page.digest();
            for content in page.records() {
                let beyond = superblock.slots <= content.version.slot;
                let at = content.at;
                if beyond || PAGE_BYTES_MAX / CHUNK_BYTES <= u32::from(at.chunk) {
                    self.impossible_record(number, at, content.version.slot);
                } else {
                    tables.load(content);
                }
            }
        }
        true
    }

    fn impossible_record(&mut self, number: u32, at: ChunkAt, slot: u32) {
        let what = format!(
            "meta page {number}: slot {slot} is said to hold chunk {} of page {}, and one of both cannot be",
            at.chunk, at.page
        );
        let finding = Finding::damage("store/meta", what).place(Place::volume(at.volume));
        self.damage(finding.so("the data of that chunk is not found", RESTORE));
    }

    fn judge_meta(&mut self, complete: bool, seen: &MetaSeen) {
        if complete {
            if let Some((number, pos)) = seen.damaged.first() {
                let count = seen.damaged_count;
                let what = format!(
                    "{count} copies of meta pages that are not in force do not verify, the first of page {number}"
                );
                let finding = Finding::note("store/meta", what).offset(*pos);
                self.damage(finding.so("none: a crash during a checkpoint leaves them", "nothing"));
            }
            return;
        }
        let consequence = "the server does not start: it does not know where all its data is";
        if seen.damaged.is_empty() {
            let what = "the meta pages are not those of the checkpoint: a write was lost";
            return self.damage(Finding::damage("store/meta", what).so(consequence, RESTORE));
        }
        for (number, pos) in &seen.damaged {
            let what = format!(
                "a copy of meta page {number} does not verify, and one in force is missing"
            );
            let finding = Finding::damage("store/meta", what).offset(*pos);
            self.damage(finding.so(consequence, RESTORE));
        }
    }

    /// Loads the catalog; false if it is damaged.
    fn catalog(&mut self, superblock: &Superblock, tables: &mut Tables) -> bool {
        let file = format!("store/{}", catalog_file(superblock.checkpoint).name());
        let catalog = match read_catalog(self.disk, superblock) {
            Ok(catalog) => catalog,
            Err(error) => {
                self.refuses(&file, &error);
                return false;
            }
        };
        let named = catalog.volumes.iter().map(|entry| entry.volume.0);
        let mut named: Vec<u64> = named.collect();
        named.sort_unstable();
        tables.load_catalog(catalog);
        let stray: Vec<u64> = tables.volumes.keys().copied().collect();
        for id in stray
            .into_iter()
            .filter(|id| named.binary_search(id).is_err())
        {
            let finding = Finding::damage(
                &file,
                format!("volume {id} has chunks, but the catalog does not have it"),
            );
            self.damage(
                finding
                    .place(Place::volume(VolumeId(id)))
                    .so("its snapshots are lost", RESTORE),
            );
        }
        true
    }

    /// Walks the log, and executes it over whole tables; false if a durable record is missing.
    fn log(&mut self, superblock: &Superblock, tables: &mut Tables, whole: bool) -> bool {
        let chain = match Chain::walk(self.disk, superblock) {
            Ok(chain) => chain,
            Err(error) => {
                self.refuses("store/log", &error);
                return false;
            }
        };
        self.summary.log_records = chain.records.len() as u64;
        let complete = match chain.check(superblock) {
            Ok(()) => true,
            Err(error) => {
                let at = chain.end.pos % superblock.log_bytes;
                let finding = Finding::damage("store/log", error.to_string()).offset(at);
                self.damage(finding.so(
                    "the server does not start: writes behind this place were acknowledged as durable",
                    RESTORE,
                ));
                false
            }
        };
        if !whole {
            let finding = Finding::note(
                "store/log",
                "the log was walked, not executed, as the tables below it are damaged",
            );
            self.damage(finding.so("more may be wrong than is listed", "see the other findings"));
            return complete;
        }
        let end = chain.end.lsn;
        match redo(self.disk, superblock, &chain, tables) {
            Ok((head, _)) => {
                self.summary.torn_tail = head.lsn < end;
                free_unowned(tables, head.lsn);
                complete
            }
            Err(error) => {
                self.refuses("store/log", &error);
                false
            }
        }
    }

    /// The slab must reach behind every sub-block that it is said to hold.
    fn slab_length(&mut self, tables: &Tables) {
        let Ok(len) = self.disk.len_bytes(DiskFile::Slab) else {
            return self.damage(Finding::damage("store/slab", "its length cannot be read"));
        };
        for (id, volume) in &tables.volumes {
            for (key, group) in &volume.groups {
                let first = group_at(VolumeId(*id), *key);
                for version in group.all() {
                    let chunk = first.chunk.saturating_add(u16::from(version.chunk));
                    let at = ChunkAt { chunk, ..first };
                    if len < tables.stored(at, version).slab_end() {
                        self.short_slab(at, version.slot, len);
                    }
                }
            }
        }
    }

    fn short_slab(&mut self, at: ChunkAt, slot: u32, len: u64) {
        let what = format!("the slab has {len} bytes and ends before the data of slot {slot}");
        let finding = Finding::damage("store/slab", what)
            .offset(u64::from(slot) * u64::from(CHUNK_BYTES))
            .place(place(at));
        self.damage(finding.so(
            "reads of this chunk give EIO",
            "write the chunk anew or roll back to a copy",
        ));
    }

    /// Verifies every stored sub-block, in the order of the slab.
    fn data(&mut self, tables: &Tables) {
        let mut order: Vec<(u32, u64, u64, u8)> = Vec::new();
        for (id, volume) in &tables.volumes {
            for (key, group) in &volume.groups {
                order.extend(group.all().map(|v| (v.slot, *id, *key, v.chunk)));
            }
        }
        order.sort_unstable();
        let total = order.len() as u64 * u64::from(CHUNK_BYTES);
        let mut buffer = ChunkBuffer::default();
        for (done, (slot, id, key, chunk)) in (1..).zip(order) {
            self.chunk_data(tables, (VolumeId(id), key, chunk, slot), &mut buffer);
            if done % 256 == 0 || done * u64::from(CHUNK_BYTES) == total {
                (self.progress)(CheckProgress {
                    what: "data",
                    done: done * u64::from(CHUNK_BYTES),
                    total,
                });
            }
        }
    }

    fn chunk_data(
        &mut self,
        tables: &Tables,
        (id, key, chunk, slot): (VolumeId, u64, u8, u32),
        buffer: &mut ChunkBuffer,
    ) {
        let first = group_at(id, key);
        let at = ChunkAt {
            chunk: first.chunk.saturating_add(u16::from(chunk)),
            ..first
        };
        let group = tables.volumes.get(&id.0);
        let group = group.and_then(|v| v.groups.get(&group_key(at.page, at.chunk / GROUP_CHUNKS)));
        let version = group.and_then(|g| g.chunk(chunk).iter().find(|v| v.slot == slot));
        let Some(version) = version else { return };
        let stored = tables.stored(at, version);
        self.summary.verified_bytes += stored.len_bytes();
        if let Some(bad) = stored.verify(self.disk, buffer) {
            for range in tables.damage(&bad) {
                self.bad_range(&range, place(at));
            }
        }
    }

    fn bad_range(&mut self, range: &DamagedRange, place: Place) {
        let what = format!(
            "{} bytes at offset {} of page {} of volume {} do not have their checksum",
            range.len_bytes, range.offset_bytes, range.page, range.volume
        );
        let finding = Finding::damage(&format!("store/{}", range.file), what)
            .offset(range.file_offset_bytes)
            .place(place);
        self.damage(finding.so(
            format!(
                "reads of this range give EIO; it is shown by {}",
                range.views()
            ),
            "write the range anew, or restore it from a snapshot or a backup",
        ));
    }
}

fn place(at: ChunkAt) -> Place {
    Place {
        volume: at.volume,
        page: Some(at.page),
        chunk: Some(at.chunk),
    }
}

/// What the walk over the meta pages has met.
#[derive(Default)]
struct MetaSeen {
    digest: u64,
    /// Number and position of copies that do not verify, the first ones.
    damaged: Vec<(u32, u64)>,
    damaged_count: u64,
}

impl MetaSeen {
    /// The copy of a page that the checkpoint left in force.
    fn in_force(&mut self, number: u32, pair: &[u8], checkpoint: u64) -> Option<MetaPage> {
        let copies = [MetaCopy::A, MetaCopy::B].into_iter();
        let pages = copies
            .zip(pair.chunks_exact(META_PAGE_BYTES))
            .filter_map(|(copy, bytes)| {
                let mut buf = Box::new([0; META_PAGE_BYTES]);
                buf.copy_from_slice(bytes);
                let page = MetaPage::parse(buf, number);
                if page.is_none() && bytes.iter().any(|byte| *byte != 0) {
                    self.damaged_count += 1;
                    if self.damaged.len() < SUSPECTS_MAX {
                        self.damaged.push((number, copy.pos(number)));
                    }
                }
                page.filter(|page| page.checkpoint() <= checkpoint)
            });
        // Of equal ones the first, as in recovery.
        pages.reduce(|best, page| {
            if best.checkpoint() < page.checkpoint() {
                page
            } else {
                best
            }
        })
    }
}
