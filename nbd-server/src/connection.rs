//! One connection from greeting to goodbye.

use std::io;
use std::time::Duration;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tracing::debug;

use crate::budget::Budget;
use crate::export::{Export, Exports};
use crate::handshake::{self, Negotiated, Opened, Situation, TlsStage};
use crate::limits;
use crate::peer::Peer;
use crate::request::Agreement;
use crate::shutdown::Shutdown;
use crate::tls::{Encrypted, Tls};
use crate::transmission;

/// How connections are served.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// Time for the whole handshake.
    pub handshake_deadline: Duration,
    /// How long a connection may hold payload bytes and move less than one in `limits::STALL_SHARE` of them while others wait for the
    /// budget.
    pub stall_deadline: Duration,
    /// Payload bytes that all connections with a clone of these options share.
    pub budget: Budget,
    /// Asks connections to end: see [`Shutdown`].
    pub shutdown: Shutdown,
    /// What is offered at STARTTLS; `None` refuses it.
    pub tls: Option<Tls>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            handshake_deadline: limits::HANDSHAKE_DEADLINE,
            stall_deadline: limits::STALL_DEADLINE,
            budget: Budget::default(),
            shutdown: Shutdown::never(),
            tls: None,
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
    /// EXPORT_NAME, which has no error reply, came without TLS.
    #[error("the client sent EXPORT_NAME without TLS, which is required here")]
    TlsRequired,
    /// The TLS handshake failed.
    #[error("the TLS handshake failed: {0}")]
    TlsHandshake(io::Error),
    /// A request does not start with its magic number.
    #[error("a request does not start with its magic number: the client is out of sync")]
    RequestMagic,
    /// A refused WRITE is larger than `limits::DRAIN_BYTES`.
    #[error("a payload of {0} bytes is too large to be skipped")]
    PayloadTooLarge(u64),
    /// The client held payload bytes and moved too few of them while others waited.
    #[error(
        "the client moved too little of what it holds of the payload budget within {0:?} while others waited for it"
    )]
    Stalled(Duration),
}

/// Serves one connection until the client says goodbye or closes between two requests (both `Ok`), breaks the protocol or vanishes, or
/// the shutdown signal is given (`Ok`).
///
/// Every request that was started runs to its end before this returns. Dropping the future drops them.
pub async fn serve_connection<S, P>(
    stream: S,
    peer: Peer,
    exports: P,
    options: ServeOptions,
) -> Result<(), ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Exports,
{
    let deadline = options.handshake_deadline;
    let drained = async {
        options.shutdown.clone().given().await;
        tokio::time::sleep(limits::DRAIN_GRACE).await;
    };
    let ready = tokio::select! {
        ready = tokio::time::timeout(deadline, prepare(stream, peer, &exports, &options)) => {
            ready.map_err(|_| ConnectionError::HandshakeDeadline(deadline))??
        }
        () = drained => Ready::Left,
    };
    match ready {
        Ready::Plain(stream, opened) => {
            transmission::transmit(stream, opened.export, opened.agreed, options).await
        }
        Ready::Tls(stream, opened) => {
            transmission::transmit(stream, opened.export, opened.agreed, options).await
        }
        Ready::Left => Ok(()),
    }
}

/// A connection after its handshake.
enum Ready<S, E> {
    Plain(S, Opened<E>),
    Tls(Encrypted<S>, Opened<E>),
    Left,
}

/// The whole handshake, with the one of TLS in its midst if the client asks for it.
async fn prepare<S, P>(
    mut stream: S,
    peer: Peer,
    exports: &P,
    options: &ServeOptions,
) -> Result<Ready<S, P::Export>, ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Exports,
{
    let stage = match &options.tls {
        None => TlsStage::Off,
        Some(tls) if tls.is_required() => TlsStage::Required,
        Some(_) => TlsStage::Offered,
    };
    let flags = handshake::greet(&mut stream).await?;
    let situation = Situation {
        peer: &peer,
        tls: stage,
        shutdown: &options.shutdown,
    };
    match (
        handshake::negotiate(&mut stream, flags, exports, situation).await?,
        &options.tls,
    ) {
        (Negotiated::Opened(opened), _) => Ok(Ready::Plain(stream, opened)),
        (Negotiated::StartTls, Some(tls)) => {
            prepare_inside_tls(stream, flags, peer, exports, (tls, &options.shutdown)).await
        }
        (Negotiated::StartTls, None) | (Negotiated::Left, _) => Ok(Ready::Left),
    }
}

async fn prepare_inside_tls<S, P>(
    stream: S,
    flags: u16,
    peer: Peer,
    exports: &P,
    (tls, shutdown): (&Tls, &Shutdown),
) -> Result<Ready<S, P::Export>, ConnectionError>
where
    S: AsyncRead + AsyncWrite + Unpin,
    P: Exports,
{
    let accepted = tls.accept(stream).await;
    let (mut stream, names) = accepted.map_err(ConnectionError::TlsHandshake)?;
    let peer = peer.inside_tls(names);
    debug!(%peer, "inside TLS");
    let situation = Situation {
        peer: &peer,
        tls: TlsStage::Inside,
        shutdown,
    };
    match handshake::negotiate(&mut stream, flags, exports, situation).await? {
        Negotiated::Opened(opened) => Ok(Ready::Tls(stream, opened)),
        Negotiated::StartTls | Negotiated::Left => {
            // The client may be gone already.
            let _ = stream.shutdown().await;
            Ok(Ready::Left)
        }
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
