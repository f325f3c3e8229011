//! The page store: pages of many volumes, with snapshots, in one directory of one server.
//!
//! Read in this order: `types` and `shell` (what callers see; `moving` and `runner` are parts of `shell`),
//! `version`, `line`, `volume` and `tables` (what is stored), `record` and `log` (how a change is made),
//! `engine`, `read`, `layers`, `place`, `write`, `tree`, `sweep`, `lineage`, `transfer`, `spans` (requests),
//! `maintain` (syncs, applying, checkpoints), `recover` (opening); `audit`, `check`, `scrub` (whether all is
//! well), `image` (what a store that is not in use holds).
//!
//! Files of a store: `super` (superblock), `log` (write-ahead ring), `slab` (64 KiB slots), `meta` (what
//! each slot holds), `catalog-a` and `catalog-b` (volumes and snapshots). Each format is described at
//! the top of its module.

mod audit;
mod buffers;
mod catalog;
mod check;
mod codec;
mod engine;
mod eras;
mod error;
mod finding;
mod hash;
mod history;
mod image;
mod lanes;
mod layers;
mod line;
mod lineage;
mod log;
mod maintain;
mod meta;
mod moving;
mod place;
mod read;
mod record;
mod recover;
mod runner;
mod scrub;
mod shell;
mod slots;
mod spans;
mod superblock;
mod sweep;
mod tables;
mod transfer;
mod tree;
mod types;
mod usage;
mod version;
mod volume;
mod write;

pub use check::{CheckOptions, CheckProgress, StoreCheck, StoreSummary, check_store};
pub use engine::{ColdRead, Engine, Fetched, PAGE_BYTES_MAX, Step};
pub use error::StoreError;
pub use finding::{DamagedRange, Finding, Findings, Place, Severity};
pub use history::{EraPlace, History};
pub use image::{PageImage, StoreImage};
pub use maintain::{ApplyJob, CommitJob, Job, JobDone, MetaJob, SyncJob};
pub use place::Placement;
pub use scrub::{BadChunk, ChunkBuffer, Scrubbed, StoredChunk};
pub use shell::PageStore;
pub use spans::OpenMark;
pub use transfer::{Exported, MovedChunk, MovedVersion};
pub use types::{PageAt, Parent, ReadPart, SnapshotUsage, StoreOptions, StoreUsage, VolumeUsage};
pub use usage::UsageScan;
