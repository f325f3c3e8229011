//! Certificates for tests, made by certtool (package gnutls-bin) in the layout that QEMU, libnbd and nbdkit read.

use std::path::{Path, PathBuf};
use std::process::Command;

/// An authority that signs; its files go with the directory that it was given.
pub(crate) struct Pki {
    dir: PathBuf,
}

/// How long a certificate is valid.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Validity {
    Now,
    Past,
}

impl Pki {
    /// Makes an authority, and one key for all whom it certifies.
    pub(crate) fn new(dir: PathBuf) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        let pki = Self { dir };
        pki.make_key("authority-key.pem");
        pki.make_key("party-key.pem");
        pki.certtool(
            &[
                "--generate-self-signed",
                "--load-privkey",
                "authority-key.pem",
            ],
            "cn = Authority\nca\ncert_signing_key\nexpiration_days = 2\n",
            &pki.dir.join("ca-cert.pem"),
        );
        pki
    }

    /// Makes another key; certificates that are issued from now on are for this one.
    pub(crate) fn make_key(&self, name: &str) {
        let bits = ["--key-type", "rsa", "--bits", "2048"];
        let args = [&["--generate-privkey", "--no-text"], &bits[..]].concat();
        self.run(&args, &self.dir.join(name));
    }

    /// A directory with the credentials of a server named localhost at this IP address.
    pub(crate) fn server(&self, address: &str) -> PathBuf {
        let names = "cn = localhost\ndns_name = localhost\ntls_www_server\n";
        let names = format!("{names}ip_address = {address}\n");
        self.issue("server", "server", &names, Validity::Now)
    }

    /// A directory with the credentials of a client of this common name and DNS name.
    pub(crate) fn client(&self, common_name: &str, dns_name: &str, validity: Validity) -> PathBuf {
        let names = format!(
            "organization = Org\ncn = {common_name}\ndns_name = {dns_name}\ntls_www_client\n"
        );
        self.issue(common_name, "client", &names, validity)
    }

    /// A directory with nothing but the authority's certificate: a client without a name.
    pub(crate) fn anonymous(&self) -> PathBuf {
        self.party_dir("anonymous")
    }

    fn party_dir(&self, name: &str) -> PathBuf {
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::copy(self.dir.join("ca-cert.pem"), dir.join("ca-cert.pem")).unwrap();
        dir
    }

    fn issue(&self, name: &str, role: &str, names: &str, validity: Validity) -> PathBuf {
        let dir = self.party_dir(name);
        let until = match validity {
            Validity::Now => "expiration_days = 2",
            Validity::Past => {
                "activation_date = \"2020-01-01 00:00:00\"\nexpiration_date = \"2020-02-01 00:00:00\""
            }
        };
        let template = format!("{names}signing_key\nencryption_key\n{until}\n");
        let key = dir.join(format!("{role}-key.pem"));
        std::fs::copy(self.dir.join("party-key.pem"), key).unwrap();
        let sign = [
            "--generate-certificate",
            "--load-ca-certificate",
            "ca-cert.pem",
            "--load-ca-privkey",
            "authority-key.pem",
            "--load-privkey",
            "party-key.pem",
        ];
        self.certtool(&sign, &template, &dir.join(format!("{role}-cert.pem")));
        dir
    }

    fn certtool(&self, args: &[&str], template: &str, outfile: &Path) {
        std::fs::write(self.dir.join("template"), template).unwrap();
        let more = ["--template", "template", "--no-text"];
        self.run(&[args, &more].concat(), outfile);
    }

    fn run(&self, args: &[&str], outfile: &Path) {
        let output = Command::new("certtool")
            .args(args)
            .arg("--outfile")
            .arg(outfile)
            .current_dir(&self.dir)
            .output()
            .expect("certtool (package gnutls-bin) must be there");
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "certtool {args:?}: {text}");
    }
}
