//! Clients of STARTTLS that the tests of `nbd-server` and of `blockd` share: a raw one that breaks the rules, and fio.

use std::io::{Read, Write};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use super::pki::Pki;

pub(crate) const ACK: u32 = 1;
const INVALID: u32 = 0x8000_0003;
const TLS_REQD: u32 = 0x8000_0005;
const LIST: u32 = 3;
pub(crate) const STARTTLS: u32 = 5;
const GO: u32 = 7;
const STRUCTURED_REPLY: u32 = 8;
const SET_META_CONTEXT: u32 = 10;

/// A client that sends options one by one.
pub(crate) struct Raw<S>(pub(crate) S);

impl<S: Read + Write> Raw<S> {
    pub(crate) fn greeted(mut stream: S) -> Self {
        stream.read_exact(&mut [0; 18]).unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        Self(stream)
    }

    /// The same connection inside TLS.
    fn inside_tls(self, pki: &Pki) -> Raw<StreamOwned<ClientConnection, S>> {
        let mut roots = RootCertStore::empty();
        let authority = pki.anonymous().join("ca-cert.pem");
        roots
            .add(CertificateDer::from_pem_file(authority).unwrap())
            .unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("localhost").unwrap();
        let client = ClientConnection::new(Arc::new(config), name).unwrap();
        Raw(StreamOwned::new(client, self.0))
    }

    /// Type and payload of the first reply to an option.
    pub(crate) fn option(&mut self, option: u32, data: &[u8]) -> (u32, Vec<u8>) {
        self.0.write_all(&option_bytes(option, data)).unwrap();
        self.0.flush().unwrap();
        let mut head = [0; 20];
        self.0.read_exact(&mut head).unwrap();
        assert_eq!(head[8..12], option.to_be_bytes());
        let word = |at: usize| u32::from_be_bytes(head[at..at + 4].try_into().unwrap());
        let mut payload = vec![0; word(16) as usize];
        self.0.read_exact(&mut payload).unwrap();
        (word(12), payload)
    }
}

fn option_bytes(option: u32, data: &[u8]) -> Vec<u8> {
    let len_bytes = (data.len() as u32).to_be_bytes();
    [b"IHAVEOPT", &option.to_be_bytes()[..], &len_bytes, data].concat()
}

/// FORCEDTLS: each other option is answered TLS_REQD, EXPORT_NAME by closing.
pub(crate) fn nothing_but_starttls_and_abort_is_heard<S: Read + Write>(connect: impl Fn() -> S) {
    let mut raw = Raw::greeted(connect());
    for option in [LIST, 6, GO, STRUCTURED_REPLY, 9, SET_META_CONTEXT, 77] {
        assert_eq!(raw.option(option, b"").0, TLS_REQD, "{option}");
    }
    assert_eq!(raw.option(LIST, &[0; 70_000]).0, TLS_REQD);
    assert_eq!(raw.option(STARTTLS, b"x").0, INVALID);
    assert_eq!(raw.option(2, b"").0, ACK);
    let mut raw = Raw::greeted(connect());
    raw.0.write_all(&option_bytes(1, b"")).unwrap();
    assert_eq!(
        raw.0.read(&mut [0]).unwrap_or(0),
        0,
        "EXPORT_NAME is answered by closing"
    );
}

/// STARTTLS resets the negotiation, and a second one is invalid.
pub(crate) fn what_was_agreed_is_forgotten<S: Read + Write>(
    connect: impl Fn() -> S,
    pki: &Pki,
    export: &str,
) {
    let mut raw = Raw::greeted(connect());
    let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes()].concat();
    let context = [&name[..], b"\0\0\0\x01\0\0\0\x0fbase:allocation"].concat();
    assert_eq!(raw.option(STRUCTURED_REPLY, b"").0, ACK);
    assert_eq!(raw.option(SET_META_CONTEXT, &context).0, 4);
    raw.0.read_exact(&mut [0; 20]).unwrap();
    assert_eq!(raw.option(STARTTLS, b"").0, ACK);
    let mut raw = raw.inside_tls(pki);
    assert_eq!(raw.option(STARTTLS, b"").0, INVALID);
    assert_eq!(
        raw.option(SET_META_CONTEXT, &context).0,
        INVALID,
        "structured replies are off again"
    );
    let (kind, info) = raw.option(GO, &[&name[..], b"\0\0"].concat());
    assert_eq!((kind, &info[..2]), (3, &b"\0\0"[..]));
    let df = u16::from_be_bytes([info[10], info[11]]) & 1 << 7;
    assert_eq!(df, 0, "DF needs structured replies");
}

/// CVE-2021-3716: what an attacker puts behind STARTTLS must not be taken for what the client says inside TLS.
pub(crate) fn plaintext_is_never_heard<S: Read + Write>(connect: impl Fn() -> S, pki: &Pki) {
    for injected in [
        option_bytes(LIST, b""),
        option_bytes(STRUCTURED_REPLY, b""),
        vec![0; 1],
    ] {
        let mut raw = Raw::greeted(connect());
        let pipelined = [option_bytes(STARTTLS, b""), injected].concat();
        raw.0.write_all(&pipelined).unwrap();
        let mut ack = [0; 20];
        raw.0.read_exact(&mut ack).unwrap();
        assert_eq!(ack[12..16], ACK.to_be_bytes());
        // The genuine client goes on in good faith; its first bytes come behind the injected ones.
        let mut raw = raw.inside_tls(pki);
        let failed = raw.0.conn.complete_io(&mut raw.0.sock).is_err();
        assert!(
            failed,
            "the handshake must fail, or the injected bytes were kept for later"
        );
    }
}

/// fio's URI may not name files, so the credentials lie where libnbd looks for those of a user: not for root.
pub(crate) fn fio_verifies(uri: &str, credentials: &Path, home: &Path) {
    std::fs::create_dir_all(home.join(".pki")).unwrap();
    std::os::unix::fs::symlink(credentials, home.join(".pki/libnbd")).unwrap();
    let readable = Command::new("chmod")
        .args(["-R", "a+rX"])
        .arg(home.parent().unwrap())
        .status();
    assert!(readable.unwrap().success());
    let job = "fio --name=x --ioengine=nbd --rw=randwrite --bs=4k-64k --iodepth=16 --size=12M \
               --verify=crc32c --verify_state_save=0";
    let as_nobody = match rustix::process::getuid().is_root() {
        true => "timeout 120 setpriv --reuid=65534 --clear-groups",
        false => "timeout 120",
    };
    let words = format!("{as_nobody} {job} --uri={uri}");
    let mut words = words.split_whitespace();
    let ran = Command::new(words.next().unwrap())
        .args(words)
        .env("HOME", home)
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&ran.stdout);
    assert!(
        ran.status.success() && report.contains("err= 0"),
        "{report}\n{}",
        String::from_utf8_lossy(&ran.stderr)
    );
}
