//! TLS by STARTTLS: whether it is offered, with which credentials, and the step from the socket to the encrypted stream.
//!
//! The encrypted stream starts with the first byte behind the option: nothing that the client sent before is kept (CVE-2021-3716).

mod certificates;
mod names;
mod psk;
mod reload;
mod stream;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;
use tokio::io::{AsyncRead, AsyncWrite};

use certificates::Certificates;
pub use certificates::{CA_FILE, CERTIFICATE_FILE, KEY_FILE};
use psk::Keys;
pub(crate) use stream::Encrypted;

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
    #[error("TLS is to be offered, but with neither certificates nor pre-shared keys")]
    NoCredentials,
    /// Certificates and pre-shared keys.
    #[error("TLS is to be offered with certificates and with pre-shared keys; choose one of them")]
    TwoCredentials,
    /// Client certificates are to be asked for, but TLS is off.
    #[error("client certificates are to be verified, but TLS with certificates is off")]
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

fn bad(path: &Path, reason: impl fmt::Display) -> TlsError {
    TlsError::Content {
        path: path.to_owned(),
        reason: reason.to_string(),
    }
}

/// What an operator sets about TLS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsSettings {
    /// Unless set: `Require` with certificates or keys, `Off` without.
    pub mode: Option<TlsMode>,
    /// Directory of [`CERTIFICATE_FILE`], [`KEY_FILE`] and, to verify clients, [`CA_FILE`].
    pub certificates: Option<PathBuf>,
    /// Only clients with a certificate that the authority in [`CA_FILE`] signed.
    pub verify_peer: bool,
    /// File of pre-shared keys, instead of certificates.
    pub psk: Option<PathBuf>,
}

impl TlsSettings {
    /// Loads what is to be offered; `None` when TLS is off.
    ///
    /// # Errors
    /// The settings contradict each other, or a file is missing, unreadable or wrong; the error names it.
    pub fn load(&self) -> Result<Option<Tls>, TlsError> {
        let default = match (&self.certificates, &self.psk) {
            (None, None) => TlsMode::Off,
            _ => TlsMode::Require,
        };
        let mode = self.mode.unwrap_or(default);
        if self.verify_peer && (mode == TlsMode::Off || self.certificates.is_none()) {
            return Err(TlsError::NothingToVerify);
        }
        if mode == TlsMode::Off {
            return Ok(None);
        }
        Ok(Some(Tls {
            required: mode == TlsMode::Require,
            credentials: Arc::new(self.credentials()?),
        }))
    }

    /// Whether clients inside TLS prove a name, by certificate or by key.
    pub fn proves_names(&self) -> bool {
        self.mode != Some(TlsMode::Off) && (self.verify_peer || self.psk.is_some())
    }

    fn credentials(&self) -> Result<Credentials, TlsError> {
        match (&self.certificates, &self.psk) {
            (None, None) => Err(TlsError::NoCredentials),
            (Some(_), Some(_)) => Err(TlsError::TwoCredentials),
            (Some(dir), None) => {
                Certificates::load(dir, self.verify_peer).map(Credentials::Certificates)
            }
            (None, Some(file)) => Keys::load(file).map(Credentials::Keys),
        }
    }
}

enum Credentials {
    Certificates(Certificates),
    Keys(Keys),
}

/// TLS as it is offered to every connection; cheap to clone.
#[derive(Clone)]
pub struct Tls {
    required: bool,
    credentials: Arc<Credentials>,
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Tls");
        shown
            .field("required", &self.required)
            .finish_non_exhaustive()
    }
}

impl Tls {
    /// Whether a connection without TLS can do nothing.
    pub fn is_required(&self) -> bool {
        self.required
    }

    /// The TLS handshake; the stream inside TLS, and the names that the client proved.
    pub(crate) async fn accept<S>(&self, stream: S) -> io::Result<(Encrypted<S>, Vec<String>)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        match self.credentials.as_ref() {
            Credentials::Certificates(certificates) => {
                let (stream, names) = certificates.accept(stream).await?;
                Ok((Encrypted::Certificates(Box::new(stream)), names))
            }
            Credentials::Keys(keys) => {
                let (stream, names) = keys.accept(stream).await?;
                Ok((Encrypted::Keys(Box::new(stream)), names))
            }
        }
    }
}
