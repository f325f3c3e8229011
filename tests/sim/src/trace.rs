//! What happened: a hash over everything, counts of states, the owners' execution records, and a
//! readable log if one is wanted.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// What one run saw.
#[derive(Default)]
pub(crate) struct Trace {
    hash: Cell<u64>,
    counts: RefCell<BTreeMap<String, u64>>,
    /// (volume, page, epoch) and the node that executed there.
    executed: RefCell<BTreeMap<(u64, u64, u64), u64>>,
    problems: RefCell<Vec<String>>,
    log: RefCell<Option<Vec<String>>>,
    start: Cell<Option<tokio::time::Instant>>,
    /// The moment of the last look at the clock, and the events since.
    moment: Cell<(Option<tokio::time::Instant>, u64)>,
    fatal: Cell<Option<Box<dyn FnOnce()>>>,
}

thread_local! {
    static TRACE: Trace = Trace::default();
}

/// Starts anew; with `log` a line is kept for every event.
pub(crate) fn begin(log: bool) {
    TRACE.with(|trace| {
        trace.hash.set(0x00c0_ffee);
        trace.counts.borrow_mut().clear();
        trace.executed.borrow_mut().clear();
        trace.problems.borrow_mut().clear();
        *trace.log.borrow_mut() = log.then(Vec::new);
        trace.start.set(Some(tokio::time::Instant::now()));
    });
}

/// Events at one moment of simulated time after which the run counts as going round in circles.
const EVENTS_MAX: u64 = 300_000;

/// Mixes a number into the hash of the run.
pub(crate) fn mix(value: u64) {
    TRACE.with(|trace| {
        let (since, events) = trace.moment.get();
        trace.moment.set((since, events + 1));
        if events.is_multiple_of(EVENTS_MAX / 8) {
            check_progress(trace, since, events);
        }
        let mixed = (trace.hash.get().rotate_left(5) ^ value).wrapping_mul(0x517c_c1b7_2722_0a95);
        trace.hash.set(mixed);
    });
}

/// Ends the run if no time passes any more.
fn check_progress(trace: &Trace, since: Option<tokio::time::Instant>, events: u64) {
    let now = tokio::time::Instant::now();
    if since != Some(now) {
        trace.moment.set((Some(now), 1));
    } else if events > EVENTS_MAX {
        problem("the run goes round in circles: no time passes".to_owned());
        if let Some(end) = trace.fatal.take() {
            end();
        }
    }
}

/// What ends the process when the run cannot go on.
pub(crate) fn on_fatal(end: impl FnOnce() + 'static) {
    TRACE.with(|trace| trace.fatal.set(Some(Box::new(end))));
}

/// Counts a kind of fault or a state.
pub(crate) fn count(what: &str) {
    TRACE.with(|trace| {
        let mut counts = trace.counts.borrow_mut();
        match counts.get_mut(what) {
            Some(count) => *count += 1,
            None => drop(counts.insert(what.to_owned(), 1)),
        }
    });
}

/// Notes a violation.
pub(crate) fn problem(text: String) {
    say(|| format!("VIOLATION {text}"));
    TRACE.with(|trace| trace.problems.borrow_mut().push(text));
}

/// A line of the log, made only if there is one.
pub(crate) fn say(line: impl FnOnce() -> String) {
    TRACE.with(|trace| {
        let Ok(mut log) = trace.log.try_borrow_mut() else {
            return;
        };
        if let Some(log) = log.as_mut() {
            let start = trace.start.get().unwrap_or_else(tokio::time::Instant::now);
            log.push(format!("{:>8.3} {}", start.elapsed().as_secs_f64(), line()));
        }
    });
}

/// What is left of a run.
pub(crate) struct Summary {
    pub hash: u64,
    pub counts: BTreeMap<String, u64>,
    pub problems: Vec<String>,
    pub log: Vec<String>,
}

/// Ends the run.
#[must_use]
pub(crate) fn end() -> Summary {
    TRACE.with(|trace| Summary {
        hash: trace.hash.get(),
        counts: trace.counts.take(),
        problems: trace.problems.take(),
        log: trace.log.take().unwrap_or_default(),
    })
}

/// Lets the events of the program come here.
pub(crate) fn install() {
    let installed = tracing::subscriber::set_global_default(Collector);
    installed.unwrap_or_else(|error| panic!("{error}"));
}

/// Takes the events of the program.
struct Collector;

#[derive(Default)]
struct Fields {
    message: String,
    text: String,
    numbers: BTreeMap<&'static str, u64>,
}

impl Visit for Fields {
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.numbers.insert(field.name(), value);
        let _ = write!(self.text, " {}={value}", field.name());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.message = format!("{value:?}");
        } else {
            let _ = write!(self.text, " {}={value:?}", field.name());
        }
    }
}

const EXECUTED: &str = "blockd::executed";

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        let ours = metadata.target().starts_with("blockd");
        metadata.target() == EXECUTED || (ours && *metadata.level() <= Level::DEBUG)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let metadata = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        if metadata.target() == EXECUTED {
            return executed(&fields.numbers);
        }
        let verdict = match fields.text.find("verdict=") {
            Some(at) => fields.text[at..].split([' ', '(']).next().unwrap_or(""),
            None => "",
        };
        count(format!("log: {} {verdict}", fields.message).trim_end());
        say(|| format!("{} {}{}", metadata.level(), fields.message, fields.text));
    }

    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Promise 6: one server executes changes of a page in an epoch.
fn executed(numbers: &BTreeMap<&'static str, u64>) {
    let number = |name| numbers.get(name).copied().unwrap_or_default();
    let (key, node) = (
        (number("volume"), number("page"), number("epoch")),
        number("node"),
    );
    say(|| {
        format!(
            "node {node} changes volume {} page {} in epoch {}",
            key.0, key.1, key.2
        )
    });
    let before = TRACE.with(|trace| trace.executed.borrow_mut().insert(key, node));
    if before.is_some_and(|before| before != node) {
        problem(format!(
            "two owners: nodes {} and {node} both executed changes of volume {} page {} in epoch {}",
            before.unwrap_or_default(),
            key.0,
            key.1,
            key.2
        ));
    }
}
