//! What a check found.

use crate::ext4::error::{Finding, Place};

/// Findings that are kept; more are counted.
const MAX_FINDINGS: usize = 1000;

/// What a check found, and what it has looked at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Sorted by place, at most 1000.
    pub findings: Vec<Finding>,
    /// All, also those beyond the limit.
    pub findings_count: u64,
    /// What is worth knowing and not wrong.
    pub notes: Vec<String>,
    pub files: u64,
    pub directories: u64,
    pub used_blocks: u64,
    pub blocks: u64,
    pub used_inodes: u64,
    pub inodes: u64,
    pub block_bytes: u32,
    /// Transactions that were replayed in memory.
    pub transactions: u32,
}

impl Report {
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.findings_count == 0
    }

    /// Adds that something is wrong at `place`.
    pub fn find(&mut self, place: Place, problem: impl Into<String>) {
        let problem = problem.into();
        self.add(Finding { place, problem });
    }

    /// Adds a finding.
    pub fn add(&mut self, finding: Finding) {
        self.findings_count += 1;
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(finding);
        }
    }
}
