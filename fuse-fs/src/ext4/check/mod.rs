//! `fuse-fs check`: whether a filesystem is consistent, as `e2fsck -fn` judges it; nothing is written.
//!
//! | module | what, in the order of e2fsck's passes |
//! |---|---|
//! | `fixed` | superblock, descriptors, bitmaps, tables, the resize inode: what has its place |
//! | `orphans` | inodes that wait for their deletion |
//! | `inodes` | each inode, its blocks and its attributes |
//! | `directories` | each entry of each directory, and the index |
//! | `names` | that each directory hangs on the root, and each inode has as many names as it says |
//! | `summary` | bitmaps and counters against what was found |
//!
//! A finding does not end the check. Memory: one bit for each block and 16 bytes for each inode of the groups
//! in use, the block list of each directory, and a bounded number of reads ahead.

pub mod claims;
mod directories;
mod fixed;
mod inode_table;
mod inodes;
mod names;
mod orphans;
pub mod report;
mod summary;

use crate::ext4::device::Device;
use crate::ext4::error::{Ext4Error, Finding, Place};
use crate::ext4::image::Image;
use claims::Claims;
use directories::Directory;
use inode_table::InodeTable;
use report::Report;
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

/// Reads of the device in flight.
const READS_AHEAD: usize = 16;

/// Is told how far a check is: what is looked at, how many of it were, and how many there are.
pub type Progress<'a> = &'a dyn Fn(&'static str, u64, u64);

/// Checks the filesystem on `device`.
///
/// # Errors
/// What keeps it from being checked: there is none, it uses features that this code does not know, or the device
/// fails. A superblock that cannot be used is a finding, the only one.
pub async fn check(device: &dyn Device, progress: Progress<'_>) -> Result<Report, Ext4Error> {
    let mut findings = Vec::new();
    let image = match Image::open(device, &mut findings).await {
        Ok(image) => image,
        Err(Ext4Error::Corrupt(finding)) => return Ok(hopeless(finding)),
        Err(error) => return Err(error),
    };
    let unchecked = image.superblock.features.unchecked();
    if !unchecked.is_empty() {
        return Err(Ext4Error::Unsupported {
            features: unchecked,
        });
    }
    let checker = Checker::new(&image, progress, findings);
    checker.run().await?;
    Ok(checker.finish())
}

fn hopeless(finding: Finding) -> Report {
    let mut report = Report::default();
    report.add(finding);
    report.notes.push(
        "nothing else was checked; a backup of the superblock may be whole: see `e2fsck -b` and `mke2fs -n`".to_owned(),
    );
    report
}

/// What the passes share. All run in one task; no borrow lives over an await.
struct Checker<'a> {
    image: &'a Image<'a>,
    progress: Progress<'a>,
    report: RefCell<Report>,
    claims: RefCell<Claims>,
    inodes: RefCell<InodeTable>,
    orphans: RefCell<HashSet<u32>>,
    directories: RefCell<Vec<Directory>>,
    /// Of each directory but the root: which one names it, and what its ".." says.
    parents: RefCell<HashMap<u32, Parents>>,
    /// Of each xattr block: how many inodes it says use it, and how many do.
    xattr_blocks: RefCell<HashMap<u64, (u32, u32)>>,
}

/// The two ways from a directory to the one above; 0 while unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Parents {
    named_in: u32,
    dotdot: u32,
}

impl<'a> Checker<'a> {
    fn new(image: &'a Image<'a>, progress: Progress<'a>, findings: Vec<Finding>) -> Self {
        let mut report = Report {
            blocks: image.superblock.blocks_count,
            inodes: u64::from(image.superblock.inodes_count),
            block_bytes: image.superblock.block_bytes,
            transactions: image.replay.transactions,
            ..Report::default()
        };
        findings.into_iter().for_each(|finding| report.add(finding));
        Self {
            image,
            progress,
            report: RefCell::new(report),
            claims: RefCell::new(Claims::new(&image.superblock)),
            inodes: RefCell::new(InodeTable::new(&image.superblock)),
            orphans: RefCell::default(),
            directories: RefCell::default(),
            parents: RefCell::default(),
            xattr_blocks: RefCell::default(),
        }
    }

    async fn run(&self) -> Result<(), Ext4Error> {
        self.note_state();
        self.check_fixed().await?;
        self.collect_orphans().await?;
        self.check_inodes().await?;
        self.check_directories().await?;
        self.check_names();
        self.check_summary().await
    }

    fn finish(self) -> Report {
        let mut report = self.report.into_inner();
        report.findings.sort();
        report
    }

    fn note_state(&self) {
        let (superblock, replay) = (&self.image.superblock, &self.image.replay);
        if replay.transactions > 0 {
            self.note(format!(
                "it was not unmounted: {} transactions of the journal ({} blocks) were replayed in memory, the next mount does the same",
                replay.transactions,
                replay.len()
            ));
        }
        if replay.error != 0 {
            self.note(format!(
                "its journal was given up with error {}",
                replay.error
            ));
        }
        if superblock.errors_count > 0 {
            self.note(format!(
                "the kernel has counted {} errors on it",
                superblock.errors_count
            ));
        }
    }

    fn find(&self, place: Place, problem: impl Into<String>) {
        self.report.borrow_mut().find(place, problem);
    }

    fn note(&self, note: String) {
        self.report.borrow_mut().notes.push(note);
    }

    /// Marks blocks as used by `place`; whether nobody else uses them.
    fn claim(&self, place: Place, first: u64, blocks: u64) -> bool {
        let taken = self.claims.borrow_mut().claim(first, blocks);
        if let Some(block) = taken.first() {
            let more = match taken.len() {
                1 => String::new(),
                count => format!(" and {} more", count - 1),
            };
            self.find(
                place,
                format!("block {block}{more} is in use by something else, too"),
            );
        }
        taken.is_empty()
    }
}
