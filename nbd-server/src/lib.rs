//! NBD (newstyle) server for any [`Export`]: the protocol, its limits and the accept loops; it knows nothing of what is exported.
//!
//! ```text
//! Server       accepts, caps, drains                 server.rs, admission.rs
//! connection   handshake, then transmission          connection.rs, handshake.rs, transmission.rs
//! bytes        pure parsers and builders             wire.rs, option.rs, request.rs, decoder.rs, reply.rs
//! TLS          credentials, the encrypted stream           tls/
//! rules        who may open what                           peer.rs, access.rs
//! memory       payload budget, queue of replies      budget.rs, output.rs
//! client       the handshake of a client              client.rs
//! kernel       nbd.ko as the client: /dev/nbdX             kernel/
//! ```
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

mod access;
mod admission;
mod budget;
mod client;
mod connection;
mod decoder;
mod error;
mod export;
mod handshake;
pub mod kernel;
pub mod limits;
mod option;
mod output;
mod peer;
mod reply;
mod request;
mod server;
mod shutdown;
mod tls;
mod transmission;
mod wire;

pub use access::{Access, AddressRange, Guarded, Pattern, Rule, RuleError};
pub use budget::Budget;
pub use client::{OpenExportError, ServerInfo, open_export};
pub use connection::{ConnectionError, ServeOptions, serve_connection, serve_transmission};
pub use error::{ExportError, NbdErrno, OpenError};
pub use export::{
    Export, ExportEntry, ExportInfo, Exports, Extent, MetaContext, ReadPart, ReadReply, ZeroFlags,
};
pub use peer::Peer;
pub use server::{Listener, Server};
pub use shutdown::{Shutdown, ShutdownSender};
pub use tls::{CA_FILE, CERTIFICATE_FILE, KEY_FILE, Tls, TlsError, TlsMode, TlsSettings};
