//! `blockd check`: the files of a state directory that no server uses.

use crate::outcome::{Outcome, print};
use blockd::data::page_store::{CheckOptions, CheckProgress, Finding, Severity};
use blockd::node::check::{StateCheck, check_state};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::fmt::Write as _;
use std::path::PathBuf;

#[derive(clap::Args)]
pub(crate) struct Check {
    /// State directory of a server that is stopped.
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// Also reads all data and verifies its checksums.
    #[arg(long)]
    data: bool,
    /// One JSON value on stdout.
    #[arg(long)]
    json: bool,
}

/// Prints what is found; nothing is changed.
pub(crate) fn run(arguments: &Check) -> anyhow::Result<Outcome> {
    let options = CheckOptions {
        data: arguments.data,
    };
    let bar = progress_bar();
    // The reader of the registry's file may panic on a damaged one; the finding says so.
    std::panic::set_hook(Box::new(|_| {}));
    let check = check_state(&arguments.state, options, &mut |at| show(&bar, at))?;
    bar.finish_and_clear();
    print(&match arguments.json {
        true => format!("{}\n", to_json(arguments, &check)),
        false => to_text(arguments, &check),
    })?;
    Ok(match check.findings.damage_count() {
        0 => Outcome::Done,
        _ => Outcome::Damage,
    })
}

fn progress_bar() -> ProgressBar {
    let template = "{msg} [{bar:30}] {percent}%";
    let style = ProgressStyle::with_template(template);
    ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn show(bar: &ProgressBar, at: CheckProgress) {
    bar.set_message(at.what);
    bar.set_length(at.total);
    bar.set_position(at.done);
}

fn to_json(arguments: &Check, check: &StateCheck) -> serde_json::Value {
    json!({
        "state": arguments.state,
        "clean": check.findings.damage_count() == 0,
        "findings": check.findings.listed,
        "unlisted": check.findings.unlisted,
        "store": check.store,
    })
}

fn to_text(arguments: &Check, check: &StateCheck) -> String {
    let mut text = String::new();
    check
        .findings
        .listed
        .iter()
        .for_each(|finding| text += &finding_text(finding));
    if check.findings.unlisted > 0 {
        let _ = writeln!(text, "and {} more, not listed", check.findings.unlisted);
    }
    let store = &check.store;
    let tail = if store.torn_tail {
        ", with a torn tail that the next start cuts off"
    } else {
        ""
    };
    let _ = writeln!(
        text,
        "store: checkpoint {}, {} volumes, {} of {} slots used, {} bytes stored, {} log records{tail}",
        store.checkpoint,
        store.volumes,
        store.slots_used,
        store.slots_total,
        store.allocated_bytes,
        store.log_records
    );
    if arguments.data {
        let _ = writeln!(text, "{} bytes of data verified", store.verified_bytes);
    }
    let state = arguments.state.display();
    match check.findings.damage_count() {
        0 => text + &format!("{state}: clean\n"),
        1 => text + &format!("{state}: 1 thing is damaged\n"),
        count => text + &format!("{state}: {count} things are damaged\n"),
    }
}

fn finding_text(finding: &Finding) -> String {
    let severity = match finding.severity {
        Severity::Note => "note",
        Severity::Damage => "DAMAGE",
    };
    let mut text = format!("{severity}: {}", finding.file);
    if let Some(offset) = finding.offset_bytes {
        let _ = write!(text, " at byte {offset}");
    }
    let _ = writeln!(text, ": {}", finding.what);
    if let Some(place) = &finding.place {
        let _ = write!(text, "  where: volume {}", place.volume);
        if let Some(page) = place.page {
            let _ = write!(text, ", page {page}");
        }
        if let Some(chunk) = place.chunk {
            let _ = write!(text, ", chunk {chunk}");
        }
        text.push('\n');
    }
    let _ = writeln!(text, "  follows: {}", finding.consequence);
    let _ = writeln!(text, "  to do: {}", finding.action);
    text
}
