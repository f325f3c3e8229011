//! NBD (newstyle) server for any [`Export`]: the protocol, its limits and the accept loops; it knows nothing of what is exported.
//!
//! ```text
//! Server       accepts, caps, drains                 server.rs
//! connection   handshake, then transmission          connection.rs, handshake.rs, transmission.rs
//! bytes        pure parsers and builders             wire.rs, option.rs, request.rs, decoder.rs, reply.rs
//! kernel       nbd.ko as the client: /dev/nbdX from connected sockets   kernel/
//! memory       payload budget, queue of replies      budget.rs, output.rs
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod budget;
mod connection;
mod decoder;
mod error;
mod export;
mod handshake;
pub mod kernel;
pub mod limits;
mod option;
mod output;
mod reply;
mod request;
mod server;
mod shutdown;
mod transmission;
mod wire;

pub use budget::Budget;
pub use connection::{ConnectionError, ServeOptions, serve_connection};
pub use error::{ExportError, NbdErrno, OpenError};
pub use export::{
    Export, ExportEntry, ExportInfo, Exports, Extent, ReadPart, ReadReply, ZeroFlags,
};
pub use server::{Listener, Server};
pub use shutdown::{Shutdown, ShutdownSender};
