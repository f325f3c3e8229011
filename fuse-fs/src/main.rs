//! `fuse-fs`: volumes and snapshots of blockd as files and as mounted filesystems.

use fuse_fs::backend::{Answer, Backend, BackendError, ConnectOptions};
use std::process::ExitCode;
use std::sync::Arc;

fn connect(options: ConnectOptions) -> Answer<'static, Arc<dyn Backend>> {
    let servers = options.servers.join(",");
    let message = format!("{servers}: this build of fuse-fs has no client for servers");
    Box::pin(std::future::ready(Err(BackendError::new(
        libc::ENOSYS,
        message,
    ))))
}

fn main() -> ExitCode {
    fuse_fs::cli::run(connect)
}
