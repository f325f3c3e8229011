//! X.509 credentials of the server, in the files that QEMU, libnbd and nbdkit use too.

use std::io;
use std::path::Path;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite, BufReader};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{NoClientAuth, NoServerSessionStorage, WebPkiClientVerifier};
use tokio_rustls::rustls::sign::{CertifiedKey, SingleCertAndKey};
use tokio_rustls::rustls::{
    Error, InconsistentKeys, RootCertStore, ServerConfig, ServerConnection,
};
use tokio_rustls::server::TlsStream;

use super::reload::Reloaded;
use super::{TlsError, bad, names};

/// Certificates of the authorities that sign clients' certificates.
pub const CA_FILE: &str = "ca-cert.pem";
/// Certificate of the server, with intermediate ones behind it.
pub const CERTIFICATE_FILE: &str = "server-cert.pem";
/// Private key of the server.
pub const KEY_FILE: &str = "server-key.pem";

/// Ciphertext that is received at once: rustls itself would ask the socket for 4 KiB at a time.
const RECEIVE_BYTES: usize = 64 << 10;
/// Ciphertext that may wait for the socket.
const SEND_BYTES: usize = 256 << 10;

const UNUSABLE_KEY: &str = "no usable key: RSA from 2048 bits, ECDSA P-256 or P-384 or Ed25519 is needed, unencrypted; \
    an ECDSA key of GnuTLS may have to be written anew with `openssl pkey`";

/// The files of a directory, and what was made of them.
pub(super) struct Certificates {
    acceptor: Reloaded<TlsAcceptor>,
}

impl Certificates {
    pub(super) fn load(dir: &Path, verify_peer: bool) -> Result<Self, TlsError> {
        let files = [CA_FILE, CERTIFICATE_FILE, KEY_FILE].map(|file| dir.join(file));
        let dir = dir.to_owned();
        let load = move || acceptor(&dir, verify_peer);
        Ok(Self {
            acceptor: Reloaded::new(files.into(), load)?,
        })
    }

    /// The TLS handshake; the stream inside TLS, and the names in the client's certificate.
    pub(super) async fn accept<S>(
        &self,
        stream: S,
    ) -> io::Result<(TlsStream<BufReader<S>>, Vec<String>)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let stream = BufReader::with_capacity(RECEIVE_BYTES, stream);
        let set_up = |session: &mut ServerConnection| session.set_buffer_limit(Some(SEND_BYTES));
        let stream = self.acceptor.get().accept_with(stream, set_up).await?;
        let certificates = stream.get_ref().1.peer_certificates();
        let names = certificates
            .and_then(<[_]>::first)
            .map(names::of_certificate);
        Ok((stream, names.unwrap_or_default()))
    }
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
    match error {
        pem::Error::Io(source) => TlsError::Read {
            path: path.to_owned(),
            source,
        },
        pem::Error::NoItemsFound => bad(path, "it holds nothing of its kind in PEM form"),
        error => bad(path, error),
    }
}
