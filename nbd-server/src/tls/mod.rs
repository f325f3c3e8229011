//! TLS by STARTTLS: whether it is offered, with which credentials, and the step from the socket to the encrypted stream.
//!
//! The encrypted stream starts with the first byte behind the option: nothing that the client sent before is kept (CVE-2021-3716).

mod certificates;
mod names;

use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio_rustls::rustls::ServerConnection;
use tokio_rustls::server::TlsStream;

use certificates::Certificates;
pub use certificates::{CA_FILE, CERTIFICATE_FILE, KEY_FILE};

/// Ciphertext that is received at once: rustls itself would ask the socket for 4 KiB at a time.
const RECEIVE_BYTES: usize = 64 << 10;
/// Ciphertext that may wait for the socket.
const SEND_BYTES: usize = 256 << 10;

/// What the server makes of STARTTLS (NBD protocol, "TLS versions").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    /// Refuses it (NOTLS).
    Off,
    /// Offers it (SELECTIVETLS).
    On,
    /// Accepts nothing else (FORCEDTLS), on unix sockets, too.
    Require,
}

impl FromStr for TlsMode {
    type Err = TlsError;

    fn from_str(text: &str) -> Result<Self, TlsError> {
        match text {
            "off" => Ok(Self::Off),
            "on" => Ok(Self::On),
            "require" => Ok(Self::Require),
            _ => Err(TlsError::Mode(text.to_owned())),
        }
    }
}

/// Why TLS cannot be offered.
#[derive(Debug, Error)]
pub enum TlsError {
    /// No such mode.
    #[error("TLS mode `{0}` is unknown; use off, on or require")]
    Mode(String),
    /// On or require, but nothing to offer.
    #[error("TLS is to be offered, but with no certificates")]
    NoCredentials,
    /// Client certificates are to be asked for, but TLS is off.
    #[error("client certificates are to be verified, but TLS is off")]
    NothingToVerify,
    /// A file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what its name says.
    #[error("{path}: {reason}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Each file is good, but they do not belong together.
    #[error("{certificate} and {key} do not belong together")]
    Mismatch {
        /// The certificate of the server.
        certificate: PathBuf,
        /// Its key.
        key: PathBuf,
    },
}

/// What an operator sets about TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsSettings {
    /// Unless set: `Require` with certificates, `Off` without.
    pub mode: Option<TlsMode>,
    /// Directory of [`CERTIFICATE_FILE`], [`KEY_FILE`] and, to verify clients, [`CA_FILE`].
    pub certificates: Option<PathBuf>,
    /// Only clients with a certificate that the authority in [`CA_FILE`] signed.
    pub verify_peer: bool,
}

impl TlsSettings {
    /// Loads what is to be offered; `None` when TLS is off.
    ///
    /// # Errors
    /// The settings contradict each other, or a file is missing, unreadable or wrong; the error names it.
    pub fn load(&self) -> Result<Option<Tls>, TlsError> {
        let default = match self.certificates {
            Some(_) => TlsMode::Require,
            None => TlsMode::Off,
        };
        match (self.mode.unwrap_or(default), &self.certificates) {
            (TlsMode::Off, _) if self.verify_peer => Err(TlsError::NothingToVerify),
            (TlsMode::Off, _) => Ok(None),
            (_, None) => Err(TlsError::NoCredentials),
            (mode, Some(dir)) => Ok(Some(Tls {
                required: mode == TlsMode::Require,
                certificates: Arc::new(Certificates::load(dir, self.verify_peer)?),
            })),
        }
    }
}

/// TLS as it is offered to every connection; cheap to clone.
#[derive(Clone, Debug)]
pub struct Tls {
    required: bool,
    certificates: Arc<Certificates>,
}

impl Tls {
    /// Whether a connection without TLS can do nothing.
    pub fn is_required(&self) -> bool {
        self.required
    }

    /// Whether clients inside TLS have proven a name.
    pub fn proves_names(&self) -> bool {
        self.certificates.verifies_peer()
    }

    /// The TLS handshake; the stream inside TLS, and the names that the client proved.
    pub(crate) async fn accept<S>(
        &self,
        stream: S,
    ) -> io::Result<(TlsStream<BufReader<S>>, Vec<String>)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = BufReader::with_capacity(RECEIVE_BYTES, stream);
        let set_up = |session: &mut ServerConnection| session.set_buffer_limit(Some(SEND_BYTES));
        let stream = self
            .certificates
            .acceptor()
            .accept_with(stream, set_up)
            .await?;
        let certificates = stream.get_ref().1.peer_certificates();
        let names = certificates
            .and_then(<[_]>::first)
            .map(names::of_certificate);
        Ok((stream, names.unwrap_or_default()))
    }
}
