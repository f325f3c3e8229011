//! What tests of a store in a directory share.

use blockd::data::page_store::{PageStore, StoreOptions};
use std::path::Path;

/// Bytes of the log of [`open`].
pub(crate) const LOG_BYTES: u64 = 1 << 20;

/// Opens the store in a directory, with a small log.
pub(crate) fn open(dir: &Path) -> PageStore {
    let options = StoreOptions {
        log_bytes: LOG_BYTES,
        free_bytes_min: 0,
        ..StoreOptions::default()
    };
    PageStore::open(dir, options).unwrap()
}

/// Runs until everything in it is dropped, as in a crash.
pub(crate) fn session<T>(body: impl Future<Output = T>) -> T {
    let runtime = { tokio::runtime::Builder::new_current_thread() }
        .enable_all()
        .build()
        .unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, body)
}
