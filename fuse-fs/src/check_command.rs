//! `check`: opens what is to be checked, runs the check, prints the report.

use crate::backend::Connect;
use crate::daemon;
use crate::error::{FuseFsError, fsck};
use crate::ext4::check::{self, report::Report};
use crate::ext4_source::Source;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::io::{self, Write};

/// The arguments of `check`.
pub struct CheckCommand {
    pub source: Source,
    pub json: bool,
}

/// Checks, prints, and gives the exit code of fsck(8).
///
/// # Errors
/// What kept it from checking.
pub fn run(connect: Connect, command: &CheckCommand) -> Result<u8, FuseFsError> {
    let system = |source| FuseFsError::System {
        what: "starting the check",
        source,
    };
    let runtime = daemon::runtime().map_err(system)?;
    let name = command.source.to_string();
    let report = runtime.block_on(async {
        let device = command.source.open(connect, false).await?;
        let bar = ProgressBar::new(0).with_style(style());
        let progress = |what, done, total| {
            bar.set_length(total);
            bar.set_message(what);
            bar.set_position(done);
        };
        let checked = check::check(device.as_ref(), &progress).await;
        bar.finish_and_clear();
        checked.map_err(|source| FuseFsError::Ext4 {
            target: name.clone(),
            source,
        })
    })?;
    let text = if command.json {
        as_json(&name, &report)
    } else {
        as_text(&name, &report)
    };
    io::stdout().write_all(text.as_bytes()).map_err(system)?;
    Ok(if report.is_clean() { 0 } else { fsck::ERRORS })
}

/// `indicatif` shows it only if standard error is a terminal.
fn style() -> ProgressStyle {
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len}");
    style
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ")
}

fn as_text(name: &str, report: &Report) -> String {
    let mut lines: Vec<String> = report
        .findings
        .iter()
        .map(|finding| format!("{name}: {finding}"))
        .collect();
    let unshown = report.findings_count - report.findings.len() as u64;
    if unshown > 0 {
        lines.push(format!("{name}: {unshown} more"));
    }
    lines.extend(
        report
            .notes
            .iter()
            .map(|note| format!("{name}: note: {note}")),
    );
    let verdict = match report.findings_count {
        0 => "clean".to_owned(),
        1 => "1 error".to_owned(),
        count => format!("{count} errors"),
    };
    lines.push(format!(
        "{name}: {verdict}; {} files, {} directories, {}/{} inodes, {}/{} blocks of {} bytes",
        report.files,
        report.directories,
        report.used_inodes,
        report.inodes,
        report.used_blocks,
        report.blocks,
        report.block_bytes
    ));
    lines.join("\n") + "\n"
}

fn as_json(name: &str, report: &Report) -> String {
    let findings = report.findings.iter();
    let findings = findings
        .map(|finding| json!({"place": finding.place.to_string(), "problem": finding.problem}));
    let value = json!({
        "target": name,
        "clean": report.is_clean(),
        "findings_count": report.findings_count,
        "findings": findings.collect::<Vec<_>>(),
        "notes": report.notes,
        "files": report.files,
        "directories": report.directories,
        "inodes": report.inodes,
        "used_inodes": report.used_inodes,
        "blocks": report.blocks,
        "used_blocks": report.used_blocks,
        "block_bytes": report.block_bytes,
        "transactions_replayed": report.transactions,
    });
    value.to_string() + "\n"
}
