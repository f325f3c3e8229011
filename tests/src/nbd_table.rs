//! What an NBD server has to do, as one table of rows that is run against every server.
//!
//! A row names the rule it stands for: `A.1` handshake options, `A.2` transmission flags, `A.3`
//! commands, `A.4` edge cases (the project's protocol tables, recommended column), `EXT` the
//! extended headers (branch extension-ext-header of NetworkBlockDevice/nbd). After each case the
//! connection must be closed, or alive and in step: a known pattern is read back.

mod commands;
mod contexts;
mod extended;
mod flags;
mod handshake;
mod options;
mod transport;

use crate::nbd_raw::{Endpoint, Mode, RawNbd, wire};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Size in bytes of both exports of a [`Target`].
pub const SIZE: u64 = 128 << 20;
/// Size in bytes of the large export: more than 32 bits count.
pub const LARGE: u64 = 16 << 30;
/// Where the pattern is; no row writes there.
const PATTERN_AT: u64 = 96 << 20;
const PATTERN_BYTES: usize = 4096;
/// Rows that take longer are named in the output.
const SLOW: Duration = Duration::from_millis(500);
/// A range that rows may write to and that nobody else uses.
const SCRATCH: u64 = 64 << 20;

/// A server under judgement.
#[derive(Clone, Debug)]
pub struct Target {
    pub name: &'static str,
    /// Writable, [`SIZE`] bytes.
    pub export: Endpoint,
    /// The same size, read-only.
    pub read_only: Endpoint,
    /// Writable, empty, [`LARGE`] bytes.
    pub large: Endpoint,
    /// Whether names other than the exports' are unknown.
    pub has_names: bool,
}

/// One case of one row.
struct Row {
    name: String,
    check: Box<dyn Fn(&Target)>,
}

impl Row {
    fn new(row: &str, case: &str, check: impl Fn(&Target) + 'static) -> Self {
        Self {
            name: format!("{row}: {case}"),
            check: Box::new(check),
        }
    }
}

/// Runs every row against a server and fails with the list of those that do not hold.
pub fn judge(target: &Target) {
    let mut raw = RawNbd::opened(&target.export, Mode::Simple);
    assert_eq!(raw.write(0, PATTERN_AT, &pattern()), 0);
    let mut rows = handshake::rows();
    rows.extend(options::rows());
    rows.extend(flags::rows());
    rows.extend(commands::rows());
    rows.extend(contexts::rows());
    rows.extend(transport::rows());
    rows.extend(extended::rows());
    let holds = |row: &Row| {
        let start = Instant::now();
        let held = catch_unwind(AssertUnwindSafe(|| (row.check)(target))).is_ok();
        if start.elapsed() > SLOW {
            eprintln!("{}: {:?}", row.name, start.elapsed());
        }
        held
    };
    let failed: Vec<&str> = rows
        .iter()
        .filter(|row| !holds(row))
        .map(|row| row.name.as_str())
        .collect();
    let (total, name) = (rows.len(), target.name);
    assert!(
        failed.is_empty(),
        "{} of {total} rows do not hold on {name}:\n  {}",
        failed.len(),
        failed.join("\n  ")
    );
}

fn pattern() -> Vec<u8> {
    (0..PATTERN_BYTES)
        .map(|at| (at * 7 + at / 256) as u8)
        .collect()
}

/// The connection is usable and in step.
fn alive(raw: &mut RawNbd) {
    let found = raw.read(PATTERN_AT, PATTERN_BYTES as u64);
    assert!(found == pattern(), "the pattern reads as something else");
    assert_eq!(raw.ask(wire::FLUSH, 0, 0, 0).errno, 0);
}

/// The handshake is in step: the export can be opened and read.
fn opens(raw: &mut RawNbd, target: &Target) {
    assert_eq!(raw.go(&target.export.export).size_bytes, SIZE);
    alive(raw);
}
