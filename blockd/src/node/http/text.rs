//! The Prometheus text format, version 0.0.4.
//!
//! Written here, as it is three kinds of lines: of the crates, `prometheus-client` writes OpenMetrics
//! only, and all of them keep counters of their own, where ours are taken at the scrape.

use std::fmt::Write as _;

/// The media type.
pub(super) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Names and values.
pub(super) type Labels<'a> = Vec<(&'static str, &'a str)>;

/// A page of metrics.
#[derive(Default)]
pub(super) struct Page(String);

impl Page {
    /// A value that goes up and down.
    pub(super) fn gauge<'a>(&mut self, name: &str, help: &str, samples: impl Samples<'a>) {
        self.family("gauge", name, help, samples);
    }

    /// A value that only grows while the process lives.
    pub(super) fn counter<'a>(&mut self, name: &str, help: &str, samples: impl Samples<'a>) {
        self.family("counter", name, help, samples);
    }

    fn family<'a>(&mut self, kind: &str, name: &str, help: &str, samples: impl Samples<'a>) {
        let text = &mut self.0;
        let _infallible = write!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (labels, value) in samples {
            text.push_str(name);
            push_labels(text, &labels);
            let _infallible = writeln!(text, " {value}");
        }
    }

    pub(super) fn into_text(self) -> String {
        self.0
    }
}

/// Samples of one family.
pub(super) trait Samples<'a>: IntoIterator<Item = (Labels<'a>, f64)> {}

impl<'a, I: IntoIterator<Item = (Labels<'a>, f64)>> Samples<'a> for I {}

/// The one sample of a family without labels.
pub(super) fn one<'a>(value: u64) -> [(Labels<'a>, f64); 1] {
    [(Vec::new(), value as f64)]
}

fn push_labels(text: &mut String, labels: &Labels<'_>) {
    for (index, (name, value)) in labels.iter().enumerate() {
        text.push(if index == 0 { '{' } else { ',' });
        text.push_str(name);
        text.push_str("=\"");
        value.chars().for_each(|c| push_escaped(text, c));
        text.push('"');
    }
    if !labels.is_empty() {
        text.push('}');
    }
}

fn push_escaped(text: &mut String, c: char) {
    match c {
        '\\' => text.push_str("\\\\"),
        '"' => text.push_str("\\\""),
        '\n' => text.push_str("\\n"),
        c => text.push(c),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_is_its_help_its_type_and_its_samples() {
        let mut page = Page::default();
        page.gauge("a_bytes", "Size.", one(1 << 46));
        let labels = vec![("volume", "q\"\\\n"), ("node", "1")];
        page.counter("b_total", "Count.", [(labels, 0.5)]);
        let wanted = "# HELP a_bytes Size.\n# TYPE a_bytes gauge\na_bytes 70368744177664\n\
                      # HELP b_total Count.\n# TYPE b_total counter\n\
                      b_total{volume=\"q\\\"\\\\\\n\",node=\"1\"} 0.5\n";
        assert_eq!(page.into_text(), wanted);
    }
}
