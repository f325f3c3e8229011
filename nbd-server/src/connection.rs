//! One connection from greeting to goodbye.

use std::io;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::budget::Budget;
use crate::export::{Export, Exports};
use crate::handshake::{self, Opened};
use crate::limits;
use crate::request::Agreement;
use crate::shutdown::Shutdown;
use crate::transmission;

/// How connections are served.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Time for the whole handshake.
    pub handshake_deadline: Duration,
    /// How long a connection may hold payload bytes without progress of its socket while others wait for the budget.
    pub stall_deadline: Duration,
    /// Payload bytes that all connections with a clone of these options share.
    pub budget: Budget,
    /// Asks connections to end: see [`Shutdown`].
    pub shutdown: Shutdown,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            handshake_deadline: limits::HANDSHAKE_DEADLINE,
            stall_deadline: limits::STALL_DEADLINE,
            budget: Budget::default(),
            shutdown: Shutdown::never(),
        }
    }
}

/// Why a connection ended other than by the client's goodbye.
#[derive(Debug, Error)]
pub enum ConnectionError {
    /// The socket failed or the client vanished.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The client took too long to say what it wants.
    #[error(
        "the handshake was not finished within {0:?}; raise the handshake deadline if the client is merely slow"
    )]
    HandshakeDeadline(Duration),
    /// The client sent handshake flags that were not offered.
    #[error("the client sent handshake flags {0:#x}, of which some were not offered")]
    ClientFlags(u32),
    /// An option does not start with its magic number.
    #[error(
        "an option does not start with IHAVEOPT: the client is out of sync or speaks no newstyle NBD"
    )]
    OptionMagic,
    /// An option is larger than `limits::OPTION_DRAIN_BYTES`.
    #[error("an option of {0} bytes is too large to be skipped")]
    OptionTooLarge(u32),
    /// More than `limits::OPTIONS_MAX` options.
    #[error("the client sent {} options and opened nothing", limits::OPTIONS_MAX)]
    TooManyOptions,
    /// A client without fixed newstyle negotiation sent something else than EXPORT_NAME.
    #[error("the client did not agree to fixed newstyle but sent option {0}")]
    NotFixed(u32),
    /// EXPORT_NAME, which has no error reply, named no export that can be opened.
    #[error("EXPORT_NAME failed and has no error reply: {0}")]
    ExportName(String),
    /// A request does not start with its magic number.
    #[error("a request does not start with its magic number: the client is out of sync")]
    RequestMagic,
    /// A refused WRITE is larger than `limits::DRAIN_BYTES`.
    #[error("a payload of {0} bytes is too large to be skipped")]
    PayloadTooLarge(u64),
    /// The client held payload bytes without progress while others waited.
    #[error("the client made no progress for {0:?} while others waited for the payload budget")]
    Stalled(Duration),
}

/// Serves one connection until the client says goodbye or closes between two requests (both `Ok`), breaks the protocol or vanishes, or
/// the shutdown signal is given (`Ok`).
///
/// Every request that was started runs to its end before this returns. Dropping the future drops them.
pub async fn serve_connection<S, P>(
    mut stream: S,
    exports: P,
    options: ServeOptions,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Exports,
{
    let drained = async {
        options.shutdown.clone().given().await;
        tokio::time::sleep(limits::DRAIN_GRACE).await;
    };
    let negotiated = handshake::negotiate(&mut stream, &exports, &options.shutdown);
    let opened = tokio::select! {
        opened = tokio::time::timeout(options.handshake_deadline, negotiated) => {
            opened.map_err(|_| ConnectionError::HandshakeDeadline(options.handshake_deadline))??
        }
        () = drained => None,
    };
    match opened {
        Some(Opened { export, agreed }) => {
            transmission::transmit(stream, export, agreed, options).await
        }
        None => Ok(()),
    }
}

/// Serves the transmission phase alone, with simple replies, as `serve_connection` does after its handshake: for a peer that was told
/// size and flags in another way, such as a kernel that holds the other end of a socketpair.
pub async fn serve_transmission<S, E>(
    stream: S,
    export: E,
    options: ServeOptions,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    E: Export,
{
    transmission::transmit(stream, export, Agreement::default(), options).await
}
