//! NBD (newstyle) server for any [`Export`]: the protocol, its limits and the accept loops; it knows nothing of what is exported.
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod error;
mod export;
pub mod limits;

pub use error::{ExportError, NbdErrno, OpenError};
pub use export::{
    Export, ExportEntry, ExportInfo, Exports, Extent, ReadPart, ReadReply, ZeroFlags,
};
