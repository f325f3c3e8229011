//! Runs seeds, tells what they covered, and makes a failure small.

use crate::child::{Child, Outcome, watch_panics};
use crate::coverage;
use crate::faults::Kind;
use crate::machine::Medium;
use crate::plants;
use crate::regressions;
use crate::run::{self, ALL_FAULTS, Options};
use crate::trace;
use clap::Parser;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Simulates a whole cluster under faults, one run a seed.
#[derive(Parser)]
struct Args {
    /// Seeds to run (with --minutes: at the most).
    #[arg(long, default_value_t = 100)]
    seeds: u64,
    /// First seed; a fresh one unless given.
    #[arg(long)]
    seed: Option<u64>,
    /// Runs the seeds that once found a fault, too.
    #[arg(long)]
    regressions: bool,
    /// Ends after so many minutes.
    #[arg(long)]
    minutes: Option<f64>,
    /// Runs at a time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// Operations of a run.
    #[arg(long, default_value_t = 1000)]
    ops: u64,
    /// Kinds of faults that may happen, as a number with a bit for each.
    #[arg(long, default_value_t = ALL_FAULTS)]
    faults: u32,
    /// Plants a fault in the program: the run must fail.
    #[arg(long)]
    plant: Option<String>,
    /// Runs every so many seeds twice and compares the traces.
    #[arg(long, default_value_t = 50)]
    twice: u64,
    /// Writes what the one seed did to this file.
    #[arg(long)]
    log: Option<std::path::PathBuf>,
    /// Goes on after violations, up to so many.
    #[arg(long, default_value_t = 1)]
    failures: usize,
    /// Does not look for a shorter run that fails.
    #[arg(long)]
    no_shrink: bool,
    /// Appends the totals to this file.
    #[arg(long)]
    totals: Option<std::path::PathBuf>,
    /// Checks that every planted fault is caught by the seed that the list names.
    #[arg(long)]
    check_plants: bool,
    /// Prints no coverage.
    #[arg(long)]
    quiet: bool,
}

struct Failure {
    options: Options,
    problems: Vec<String>,
}

#[derive(Default)]
struct Totals {
    seeds: u64,
    repeated: u64,
    counts: BTreeMap<String, u64>,
    failures: Vec<Failure>,
}

pub(crate) fn main() -> ExitCode {
    let args = Args::parse();
    trace::install();
    let template = run::template();
    watch_panics();
    if args.check_plants {
        return plants::check_all(&template, args.ops);
    }
    if let Some(name) = &args.plant
        && let Err(text) = plants::plant(name)
    {
        eprintln!("{text}");
        return ExitCode::from(2);
    }
    let fresh = SystemTime::now().duration_since(UNIX_EPOCH);
    let fresh = fresh.map_or(0, |since| since.as_secs() % 1_000_000 * 1_000_000);
    let first = args.seed.unwrap_or(fresh);
    if let Some(path) = &args.log {
        return one(&template, &args, first, path);
    }
    println!("seeds from {first}, {} operations each", args.ops);
    let begun = Instant::now();
    let totals = many(&template, &args, first);
    let took = begun.elapsed().as_secs_f64();
    report(&args, &totals, first, took);
    match totals.failures.first() {
        None => ExitCode::SUCCESS,
        Some(failure) => {
            if !args.no_shrink {
                shrink(&template, failure.options);
            }
            ExitCode::FAILURE
        }
    }
}

fn one(template: &[Medium], args: &Args, seed: u64, path: &std::path::Path) -> ExitCode {
    let options = Options {
        seed,
        ops: args.ops,
        mask: args.faults,
        log: true,
    };
    let outcome = attempt(template, options);
    let _ = std::fs::write(path, outcome.log.join("\n"));
    println!("seed {seed}: hash {:016x}", outcome.hash);
    outcome
        .problems
        .iter()
        .for_each(|text| println!("  {text}"));
    match outcome.problems.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

/// One run, waited for.
pub(crate) fn attempt(template: &[Medium], options: Options) -> Outcome {
    match Child::start(template, options) {
        Ok(child) => child.wait(),
        Err(error) => Outcome {
            problems: vec![format!("cannot start a process: {error}")],
            ..Outcome::default()
        },
    }
}

fn many(template: &[Medium], args: &Args, first: u64) -> Totals {
    let mut totals = Totals::default();
    let until = args
        .minutes
        .map(|minutes| Instant::now() + Duration::from_secs_f64(minutes * 60.0));
    let known = regressions::SEEDS.iter().map(|(seed, _)| *seed);
    let known = known.filter(|_| args.regressions);
    let mut seeds = known.chain(first..first + args.seeds);
    let mut next = first;
    let mut repeat: Vec<(Options, u64)> = Vec::new();
    let mut expected: BTreeMap<u64, u64> = BTreeMap::new();
    let mut running: Vec<Child> = Vec::new();
    let mut told = Instant::now();
    loop {
        let over = until.is_some_and(|until| Instant::now() >= until)
            || totals.failures.len() >= args.failures;
        while running.len() < args.jobs {
            let options = match repeat.pop() {
                Some((options, hash)) => {
                    expected.insert(options.seed, hash);
                    options
                }
                None => match seeds.next().filter(|_| !over) {
                    Some(seed) => {
                        next = seed + 1;
                        Options {
                            seed,
                            ops: args.ops,
                            mask: args.faults,
                            log: false,
                        }
                    }
                    None => break,
                },
            };
            match Child::start(template, options) {
                Ok(child) => running.push(child),
                Err(error) => {
                    eprintln!("cannot start a process: {error}");
                    return totals;
                }
            }
        }
        if running.is_empty() {
            return totals;
        }
        let ended = wait_for_one(&mut running);
        let (options, outcome) = (ended.options, ended.outcome());
        if let Some(hash) = expected.remove(&options.seed) {
            totals.repeated += 1;
            if hash != outcome.hash {
                let text = format!("not deterministic: {hash:x}, then {:x}", outcome.hash);
                fail(&mut totals, options, vec![text]);
            }
            continue;
        }
        totals.seeds += 1;
        for (what, count) in &outcome.counts {
            *totals.counts.entry(what.clone()).or_default() += count;
        }
        if !outcome.problems.is_empty() {
            fail(&mut totals, options, outcome.problems);
        } else if args.twice > 0 && options.seed.is_multiple_of(args.twice) {
            repeat.push((options, outcome.hash));
        }
        if let Some(path) = &args.totals
            && told.elapsed() > Duration::from_secs(30)
        {
            told = Instant::now();
            let line = format!(
                "seeds {first}..{next}: {} run, {} twice, {} violations\n",
                totals.seeds,
                totals.repeated,
                totals.failures.len()
            );
            append(path, &line);
        }
    }
}

fn append(path: &std::path::Path, line: &str) {
    use std::io::Write;
    let file = std::fs::File::options()
        .append(true)
        .create(true)
        .open(path);
    if let Ok(mut file) = file {
        let _ = file.write_all(line.as_bytes());
    }
}

fn fail(totals: &mut Totals, options: Options, problems: Vec<String>) {
    println!("VIOLATION seed {}", options.seed);
    let story = regressions::SEEDS
        .iter()
        .find(|(seed, _)| *seed == options.seed);
    if let Some((_, story)) = story {
        println!("  it once found: {story}");
    }
    problems
        .iter()
        .take(6)
        .for_each(|text| println!("  {text}"));
    totals.failures.push(Failure { options, problems });
}

/// Waits until one of the runs has ended.
fn wait_for_one(running: &mut Vec<Child>) -> Child {
    loop {
        let mut polled: Vec<libc::pollfd> = running
            .iter()
            .map(|child| libc::pollfd {
                fd: child.descriptor(),
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        let count = polled.len() as libc::nfds_t;
        // SAFETY: an array of this length.
        unsafe { libc::poll(polled.as_mut_ptr(), count, -1) };
        for index in 0..running.len() {
            if polled[index].revents != 0 && running[index].take() {
                return running.swap_remove(index);
            }
        }
    }
}

fn report(args: &Args, totals: &Totals, first: u64, took: f64) {
    if !args.quiet {
        println!("coverage (count in all runs):");
        for (what, count) in &coverage::with_zeros(&totals.counts) {
            println!("  {count:>9}  {what}");
        }
    }
    let line = format!(
        "{} seeds from {first}, {} of them twice, in {took:.1} s: {:.1} seeds/s, {} violations",
        totals.seeds,
        totals.repeated,
        totals.seeds as f64 / took,
        totals.failures.len()
    );
    println!("{line}");
    if let Some(path) = &args.totals {
        append(path, &format!("{line}\n"));
        for failure in &totals.failures {
            let first = failure.problems.first().map_or("", String::as_str);
            append(path, &format!("  seed {}: {first}\n", failure.options.seed));
        }
    }
}

/// Looks for fewer operations and fewer kinds of faults that still fail, and keeps the log.
fn shrink(template: &[Medium], failing: Options) {
    let mut least = failing;
    let fails = |options| !attempt(template, options).problems.is_empty();
    let (mut low, mut high) = (0, failing.ops);
    while high - low > 1 + failing.ops / 200 {
        let middle = low + (high - low) / 2;
        let options = Options {
            ops: middle,
            ..least
        };
        match fails(options) {
            true => high = middle,
            false => low = middle,
        }
    }
    least.ops = high;
    for kind in Kind::ALL {
        let mask = least.mask & !(1 << kind as u32);
        if mask != least.mask && fails(Options { mask, ..least }) {
            least.mask = mask;
        }
    }
    let logged = Options { log: true, ..least };
    let outcome = attempt(template, logged);
    let path = std::env::temp_dir().join(format!("blockd-sim-{}.log", least.seed));
    let _ = std::fs::write(&path, outcome.log.join("\n"));
    println!(
        "shortest: --seed {} --ops {} --faults {} (trace in {})",
        least.seed,
        least.ops,
        least.mask,
        path.display()
    );
    outcome
        .problems
        .iter()
        .take(6)
        .for_each(|text| println!("  {text}"));
    let tail = outcome.log.len().saturating_sub(30);
    outcome.log[tail..]
        .iter()
        .for_each(|line| println!("    {line}"));
}
