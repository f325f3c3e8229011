//! Progress on stderr, only when that is a terminal (`indicatif` sees to it).

use indicatif::{ProgressBar, ProgressStyle};
use std::time::Duration;

const TICK: Duration = Duration::from_millis(100);

/// Bytes of a total that is set later.
pub(crate) fn bytes(what: &'static str) -> ProgressBar {
    bar(what, 0, "{msg} [{bar:30}] {bytes}/{total_bytes}")
}

/// Things out of `total`.
pub(crate) fn count(what: &'static str, total: u64) -> ProgressBar {
    bar(what, total, "{msg} [{bar:30}] {pos}/{len}")
}

/// Something whose length is not known.
pub(crate) fn spinner(what: &'static str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(what);
    spinner.enable_steady_tick(TICK);
    spinner
}

fn bar(what: &'static str, total: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("=> ");
    let bar = ProgressBar::new(total).with_style(style).with_message(what);
    bar.enable_steady_tick(TICK);
    bar
}
