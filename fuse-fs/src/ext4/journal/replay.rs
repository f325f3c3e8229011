//! Finds the transactions that a journal committed, and for each block the newest copy in the log.
//!
//! The log is a ring. A transaction counts from the moment its commit block is there; a block that a later
//! transaction revoked is not replayed: it may hold data of a file since.

use crate::ext4::bytes::part;
use crate::ext4::crc::{self, crc32_be};
use crate::ext4::error::{Ext4Error, Finding, Place};
use crate::ext4::extent::Run;
use crate::ext4::image::Image;
use crate::ext4::journal::layout::{
    JournalSuperblock, KIND_COMMIT, KIND_DESCRIPTOR, KIND_REVOKE, Tag, commit_time, header,
    magic_bytes, sum_matches,
};
use crate::ext4::map;
use std::collections::HashMap;

/// Blocks of the log that one read fetches.
const READ_AHEAD_BLOCKS: u64 = 64;

/// The newest copy of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logged {
    /// Where on the device it lies.
    pub journal_block: u64,
    escaped: bool,
}

impl Logged {
    /// Makes `block` what the log says it is; `raw` is the log's block.
    pub fn restore(&self, raw: &[u8], block: &mut [u8]) {
        block.copy_from_slice(raw);
        if self.escaped {
            block[..4].copy_from_slice(&magic_bytes());
        }
    }
}

/// What the log holds that is not yet in its place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    blocks: HashMap<u64, Logged>,
    /// Transactions that were committed.
    pub transactions: u32,
    /// The journal was given up with an error.
    pub error: u32,
    /// A sequence that no block of the log has, not even of a transaction without its commit block.
    pub next_sequence: u32,
}

impl Replay {
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// The blocks of the filesystem that the log holds.
    pub fn numbers(&self) -> impl Iterator<Item = u64> {
        self.blocks.keys().copied()
    }

    #[must_use]
    pub fn newest(&self, block: u64) -> Option<Logged> {
        self.blocks.get(&block).copied()
    }
}

/// One committed transaction; the log blocks of its tags are numbers in the journal.
struct Transaction {
    sequence: u32,
    logged: Vec<(Tag, u32)>,
    revoked: Vec<u64>,
}

/// Reads the journal of `image`, if it has one that must be replayed.
///
/// # Errors
/// [`Ext4Error::Corrupt`] if the journal cannot be used; what is wrong inside it goes to `findings`.
pub async fn replay(image: &Image<'_>, findings: &mut Vec<Finding>) -> Result<Replay, Ext4Error> {
    if !image.has_journal() {
        return Ok(Replay::default());
    }
    let mut log = Log::open(image).await?;
    let mut replay = Replay {
        error: log.superblock.error,
        next_sequence: log.superblock.sequence.wrapping_add(1),
        ..Replay::default()
    };
    if log.superblock.start == 0 {
        return Ok(replay);
    }
    if !image.needs_recovery() {
        return Err(corrupt(
            "it holds transactions, but the superblock says that there are none",
        ));
    }
    if log.superblock.has_fast_commits() {
        let features = vec!["a journal with fast commits that was not replayed".to_owned()];
        return Err(Ext4Error::Unsupported { features });
    }
    let transactions = log.scan(findings).await?;
    let revoked = revocations(&transactions);
    replay.transactions = transactions.len() as u32;
    replay.next_sequence = replay.next_sequence.wrapping_add(replay.transactions);
    for transaction in &transactions {
        log.apply(transaction, &revoked, &mut replay, findings)
            .await?;
    }
    Ok(replay)
}

fn corrupt(problem: impl Into<String>) -> Ext4Error {
    Ext4Error::corrupt(Place::Journal, problem)
}

fn find(findings: &mut Vec<Finding>, problem: String) {
    let place = Place::Journal;
    findings.push(Finding { place, problem });
}

/// The youngest transaction that revoked each block. The log holds them in order.
fn revocations(transactions: &[Transaction]) -> HashMap<u64, u32> {
    let of = |transaction: &Transaction| {
        let sequence = transaction.sequence;
        transaction
            .revoked
            .iter()
            .map(move |block| (*block, sequence))
            .collect::<Vec<_>>()
    };
    transactions.iter().flat_map(of).collect()
}

/// Sequence numbers wrap around.
fn not_before(a: u32, b: u32) -> bool {
    a.wrapping_sub(b) < 1 << 31
}

struct Log<'a> {
    image: &'a Image<'a>,
    superblock: JournalSuperblock,
    runs: Vec<Run>,
    /// The blocks that were read last, and the number of the first.
    cached: (u64, Vec<u8>),
}

impl<'a> Log<'a> {
    async fn open(image: &'a Image<'a>) -> Result<Self, Ext4Error> {
        let number = image.superblock.journal_inode;
        if number == 0 {
            let features = vec!["an external journal".to_owned()];
            return Err(Ext4Error::Unsupported { features });
        }
        let (inode, bytes) = image.inode(number).await?;
        if inode.links == 0 || !inode.checksum_matches(&bytes, &image.superblock) {
            return Err(corrupt(format!(
                "its inode {number} is not in use, or has a wrong checksum"
            )));
        }
        let runs = map::runs(image, &inode).await?;
        let length =
            whole_blocks(&runs).min(inode.size_bytes / u64::from(image.superblock.block_bytes));
        let first = runs
            .first()
            .filter(|_| length > 0)
            .ok_or_else(|| corrupt("it is empty"))?;
        let block = image.raw_blocks(first.physical, 1).await?;
        let superblock = JournalSuperblock::read(&block, image.superblock.block_bytes, length)
            .map_err(corrupt)?;
        let cached = (0, Vec::new());
        Ok(Self {
            image,
            superblock,
            runs,
            cached,
        })
    }

    /// Where block `number` of the journal lies, and how many follow it there.
    fn place(&self, number: u64) -> Result<(u64, u64), Ext4Error> {
        let at = self
            .runs
            .partition_point(|run| run.logical + run.blocks <= number);
        let run = self.runs.get(at).filter(|run| run.logical <= number);
        let run = run.ok_or_else(|| corrupt(format!("its block {number} is not allocated")))?;
        let within = number - run.logical;
        Ok((run.physical + within, run.blocks - within))
    }

    async fn block(&mut self, number: u32) -> Result<&[u8], Ext4Error> {
        let size = self.image.superblock.block_bytes as usize;
        let number = u64::from(number);
        let (first, bytes) = &self.cached;
        if !(*first..first + (bytes.len() / size) as u64).contains(&number) {
            let (place, follow) = self.place(number)?;
            let count = follow.min(READ_AHEAD_BLOCKS) as u32;
            self.cached = (number, self.image.raw_blocks(place, count).await?);
        }
        let at = (number - self.cached.0) as usize * size;
        Ok(part(&self.cached.1, at, at + size))
    }

    fn next(&self, number: u32) -> u32 {
        if number + 1 >= self.superblock.end {
            self.superblock.first
        } else {
            number + 1
        }
    }

    /// The committed transactions, oldest first.
    async fn scan(&mut self, findings: &mut Vec<Finding>) -> Result<Vec<Transaction>, Ext4Error> {
        let format = self.superblock.clone();
        let mut committed = Vec::new();
        let mut open = Open::new(format.sequence);
        let mut at = format.start;
        let mut left = format.end - format.first;
        while left > 0 {
            let block = self.block(at).await?.to_vec();
            let Some((kind, sequence)) = header(&block) else {
                break;
            };
            if sequence != open.transaction.sequence {
                break;
            }
            (at, left) = (self.next(at), left - 1);
            match kind {
                KIND_DESCRIPTOR => {
                    open.check_tail(&format, &block);
                    open.sum(&format, &block);
                    for tag in format.tags(&block) {
                        open.transaction.logged.push((tag, at));
                        if format.sums_transactions() {
                            let logged = self.block(at).await?.to_vec();
                            open.sum(&format, &logged);
                        }
                        if left == 0 {
                            return Ok(committed);
                        }
                        (at, left) = (self.next(at), left - 1);
                    }
                }
                KIND_REVOKE => {
                    open.check_tail(&format, &block);
                    open.transaction.revoked.extend(format.revoked(&block));
                }
                KIND_COMMIT => match open.commit(&format, &block) {
                    Ok(transaction) => committed.push(transaction),
                    Err(problem) => {
                        problem
                            .into_iter()
                            .for_each(|problem| find(findings, problem));
                        break;
                    }
                },
                _ => break,
            }
        }
        Ok(committed)
    }

    /// Notes the blocks of `transaction` that nobody revoked as the newest.
    async fn apply(
        &mut self,
        transaction: &Transaction,
        revoked: &HashMap<u64, u32>,
        replay: &mut Replay,
        findings: &mut Vec<Finding>,
    ) -> Result<(), Ext4Error> {
        let sequence = transaction.sequence;
        let format = self.superblock.clone();
        for (tag, at) in &transaction.logged {
            let gone = |by: &u32| not_before(*by, sequence);
            if revoked.get(&tag.block).is_some_and(gone) {
                continue;
            }
            // A growth is logged before the superblock that has it is in its place.
            if tag.block >= self.image.device_blocks() {
                find(
                    findings,
                    format!(
                        "transaction {sequence} has block {} outside the filesystem",
                        tag.block
                    ),
                );
            } else if !format.logged_matches(tag, sequence, self.block(*at).await?) {
                find(
                    findings,
                    format!(
                        "transaction {sequence} has block {} with a wrong checksum",
                        tag.block
                    ),
                );
            } else {
                let (journal_block, escaped) = (self.place(u64::from(*at))?.0, tag.escaped);
                replay.blocks.insert(
                    tag.block,
                    Logged {
                        journal_block,
                        escaped,
                    },
                );
            }
        }
        Ok(())
    }
}

/// Blocks from the first that are mapped without a hole.
fn whole_blocks(runs: &[Run]) -> u64 {
    let mut end = 0;
    for run in runs {
        if run.logical != end {
            break;
        }
        end += run.blocks;
    }
    end
}

/// A transaction whose commit block was not yet met.
struct Open {
    transaction: Transaction,
    /// Of everything logged so far, for journals of the first version.
    sum: u32,
    /// A descriptor or revoke block with a wrong checksum; older blocks in a reused log have one.
    broken: bool,
    newest_commit: (u64, u32),
}

impl Open {
    fn new(sequence: u32) -> Self {
        Self {
            transaction: Transaction {
                sequence,
                logged: Vec::new(),
                revoked: Vec::new(),
            },
            sum: crc::START,
            broken: false,
            newest_commit: (0, 0),
        }
    }

    fn check_tail(&mut self, format: &JournalSuperblock, block: &[u8]) {
        self.broken |= !format.tail_matches(block);
    }

    fn sum(&mut self, format: &JournalSuperblock, block: &[u8]) {
        if format.sums_transactions() {
            self.sum = crc32_be(self.sum, block);
        }
    }

    /// Closes the transaction and opens the next. The log ends here if the commit is not valid, with a problem
    /// unless the block is what an earlier round of the ring left.
    fn commit(
        &mut self,
        format: &JournalSuperblock,
        block: &[u8],
    ) -> Result<Transaction, Option<String>> {
        let sequence = self.transaction.sequence;
        let stale = commit_time(block) < self.newest_commit;
        let valid = format.commit_matches(block)
            && (!format.sums_transactions() || sum_matches(block, self.sum));
        if !valid || self.broken {
            let what = if valid { "a block" } else { "its commit block" };
            return Err((!stale)
                .then(|| format!("transaction {sequence} has {what} with a wrong checksum")));
        }
        let mut next = Self::new(sequence.wrapping_add(1));
        next.newest_commit = commit_time(block);
        Ok(std::mem::replace(self, next).transaction)
    }
}
