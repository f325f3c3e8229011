//! `fuse-fs` over a directory instead of servers (`--servers DIR`): what the tests run.

mod store;

use std::process::ExitCode;

fn main() -> ExitCode {
    fuse_fs::cli::run(store::connect)
}
