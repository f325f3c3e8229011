//! The page store: pages of many volumes, with snapshots, in one directory of one server.

mod error;
mod shell;
mod types;

pub use error::StoreError;
pub use shell::PageStore;
pub use types::{PageAt, ReadPart, SnapshotUsage, StoreOptions, StoreUsage, VolumeUsage};
