//! `fuse-fs`: volumes and snapshots of blockd as files and as mounted filesystems.

use std::process::ExitCode;

fn main() -> ExitCode {
    fuse_fs::cli::run(fuse_fs::client_backend::connect)
}
