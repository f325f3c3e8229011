//! The simulator: many runs of a whole cluster, each by its seed. See `blockd/DESIGN.md`.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod check;
mod child;
mod churn;
mod coverage;
mod driver;
mod entry;
mod faults;
mod handle;
mod history;
mod machine;
mod net;
mod plants;
mod random;
mod regressions;
mod run;
mod trace;
mod watch;
mod workload;
mod world;

fn main() -> std::process::ExitCode {
    driver::main()
}
