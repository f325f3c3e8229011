//! X.509 credentials of the server, in the files that QEMU, libnbd and nbdkit use too; read again when they change.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{NoClientAuth, NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::{Error, InconsistentKeys, RootCertStore, ServerConfig};
use tracing::{info, warn};

use super::TlsError;

/// Certificates of the authorities that sign clients' certificates.
pub const CA_FILE: &str = "ca-cert.pem";
/// Certificate of the server, with intermediate ones behind it.
pub const CERTIFICATE_FILE: &str = "server-cert.pem";
/// Private key of the server.
pub const KEY_FILE: &str = "server-key.pem";

const UNUSABLE_KEY: &str = "no usable key: RSA from 2048 bits, ECDSA P-256 or P-384 or Ed25519 is needed, unencrypted; \
    an ECDSA key of GnuTLS may have to be written anew with `openssl pkey`";

/// What tells one version of a file from the next: device, inode, length, and seconds and nanoseconds of its last change.
type Stamp = Option<[i64; 5]>;

/// The files, and what was made of them.
#[derive(Debug)]
pub(super) struct Certificates {
    dir: PathBuf,
    verify_peer: bool,
    loaded: Mutex<Loaded>,
}

struct Loaded {
    /// Of the files as they were when they were last read, well or not.
    stamps: [Stamp; 3],
    acceptor: TlsAcceptor,
}

impl std::fmt::Debug for Loaded {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Loaded").finish_non_exhaustive()
    }
}

impl Certificates {
    pub(super) fn load(dir: &Path, verify_peer: bool) -> Result<Self, TlsError> {
        let stamps = stamps(dir);
        let acceptor = acceptor(dir, verify_peer)?;
        Ok(Self {
            dir: dir.to_owned(),
            verify_peer,
            loaded: Mutex::new(Loaded { stamps, acceptor }),
        })
    }

    pub(super) fn verifies_peer(&self) -> bool {
        self.verify_peer
    }

    /// For one handshake; made anew if the files have changed and are good, else what was good last.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        // Before the files are read, so that a change in between is seen the next time.
        let stamps = stamps(&self.dir);
        if stamps != loaded.stamps {
            loaded.stamps = stamps;
            match acceptor(&self.dir, self.verify_peer) {
                Ok(acceptor) => {
                    info!(dir = %self.dir.display(), "the certificates have changed and are used");
                    loaded.acceptor = acceptor;
                }
                Err(error) => {
                    warn!(%error, "the certificates have changed; the former ones stay in use")
                }
            }
        }
        loaded.acceptor.clone()
    }
}

fn stamps(dir: &Path) -> [Stamp; 3] {
    [CA_FILE, CERTIFICATE_FILE, KEY_FILE].map(|file| {
        std::fs::metadata(dir.join(file))
            .ok()
            .map(|file| stamp(&file))
    })
}

fn stamp(file: &Metadata) -> [i64; 5] {
    [
        file.dev().cast_signed(),
        file.ino().cast_signed(),
        file.size().cast_signed(),
        file.ctime(),
        file.ctime_nsec(),
    ]
}

fn acceptor(dir: &Path, verify_peer: bool) -> Result<TlsAcceptor, TlsError> {
    let provider = Arc::new(ring::default_provider());
    let verifier = match verify_peer {
        true => client_verifier(&dir.join(CA_FILE), &provider)?,
        false => Arc::new(NoClientAuth),
    };
    let certified = certified_key(dir, &provider)?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| bad(dir, error))?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(certified)));
    // No session is resumed: every connection proves its certificate as the files are now.
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

/// The certificate of the server with its key.
fn certified_key(dir: &Path, provider: &CryptoProvider) -> Result<CertifiedKey, TlsError> {
    let (certificate, key) = (dir.join(CERTIFICATE_FILE), dir.join(KEY_FILE));
    let chain = read_certificates(&certificate)?;
    let key_der = PrivateKeyDer::from_pem_file(&key).map_err(|error| unreadable(&key, error))?;
    let signer = provider.key_provider.load_private_key(key_der);
    let signer = signer.map_err(|_| bad(&key, UNUSABLE_KEY))?;
    let certified = CertifiedKey::new(chain, signer);
    match certified.keys_match() {
        Ok(()) | Err(Error::InconsistentKeys(InconsistentKeys::Unknown)) => Ok(certified),
        Err(Error::InconsistentKeys(_)) => Err(TlsError::Mismatch { certificate, key }),
        Err(error) => Err(bad(&certificate, error)),
    }
}

fn client_verifier(
    ca: &Path,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = RootCertStore::empty();
    for authority in read_certificates(ca)? {
        roots.add(authority).map_err(|error| bad(ca, error))?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), Arc::clone(provider));
    verifier.build().map_err(|error| bad(ca, error))
}

/// One certificate or more.
fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    match read {
        Ok(certificates) if certificates.is_empty() => {
            Err(unreadable(path, pem::Error::NoItemsFound))
        }
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(unreadable(path, error)),
    }
}

fn unreadable(path: &Path, error: pem::Error) -> TlsError {
    let path = path.to_owned();
    match error {
        pem::Error::Io(source) => TlsError::Read { path, source },
        pem::Error::NoItemsFound => TlsError::Content {
            path,
            reason: "it holds nothing of its kind in PEM form".to_owned(),
        },
        error => bad(&path, error),
    }
}

fn bad(path: &Path, error: impl std::fmt::Display) -> TlsError {
    TlsError::Content {
        path: path.to_owned(),
        reason: error.to_string(),
    }
}
