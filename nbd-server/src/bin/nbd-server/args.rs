//! The command line.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::Parser;
use nbd_server::{Access, Rule, TlsMode, TlsSettings, limits};

/// Serve a file or memory over NBD.
///
/// Without --unix, --listen, --stdio and inherited sockets (LISTEN_FDS) it listens on TCP 127.0.0.1:10809.
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    /// File or block device to serve.
    #[arg(required_unless_present = "memory", conflicts_with = "memory")]
    pub(crate) file: Option<PathBuf>,
    /// Serve so much memory instead, all zero (64MiB, 1GiB, 4096).
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) memory: Option<u64>,
    /// Export name; without it every name opens the export.
    #[arg(long)]
    pub(crate) name: Option<String>,
    /// Refuse writes.
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Serve one connection on standard input and output (inetd).
    #[arg(long, conflicts_with_all = ["unix", "listen"])]
    pub(crate) stdio: bool,
    /// Listen on a unix socket; a stale one is replaced.
    #[arg(long, value_name = "PATH")]
    pub(crate) unix: Vec<PathBuf>,
    /// Listen on a TCP address.
    #[arg(long, value_name = "ADDR:PORT")]
    pub(crate) listen: Vec<SocketAddr>,
    /// Offer TLS with server-cert.pem and server-key.pem of this directory; they are read again when they change.
    #[arg(long, value_name = "DIR", help_heading = "TLS and access")]
    pub(crate) tls_certificates: Option<PathBuf>,
    /// Offer TLS with the pre-shared keys of this file of psktool (USER:KEY) instead; it is read again when it changes.
    #[arg(
        long,
        value_name = "FILE",
        conflicts_with = "tls_certificates",
        help_heading = "TLS and access"
    )]
    pub(crate) tls_psk: Option<PathBuf>,
    /// TLS on all sockets, unix sockets included: off, on (clients choose) or require. Default: require with certificates or keys, else off.
    #[arg(long, value_name = "MODE", help_heading = "TLS and access")]
    pub(crate) tls: Option<TlsMode>,
    /// Accept in TLS only clients with a certificate that an authority in ca-cert.pem of the directory signed.
    #[arg(long, help_heading = "TLS and access")]
    pub(crate) tls_verify_peer: bool,
    /// Serve only clients that fit; may be repeated (one has to fit).
    ///
    /// name=PATTERN fits the common name or a DNS name of the client's verified certificate, or the user of its key (`*` is any text), address=ADDR[/BITS] its
    /// address, address=unix a unix socket. Separated by commas all kinds must fit: name=alice,name=*.example,address=10.0.0.0/8.
    #[arg(long, value_name = "RULE", help_heading = "TLS and access")]
    pub(crate) allow: Vec<Rule>,
    /// Connections that are served at a time; with --unix a sixteenth of them is kept for unix sockets.
    #[arg(long, value_name = "N", default_value_t = limits::CONNECTIONS_MAX, help_heading = "TLS and access")]
    pub(crate) connections: usize,
    /// Connections from one address that are served at a time (IPv6: from one /64 network).
    #[arg(long, value_name = "N", default_value_t = limits::CONNECTIONS_PER_ADDRESS_MAX, help_heading = "TLS and access")]
    pub(crate) connections_per_address: usize,
    /// Exit when the parent process exits.
    #[arg(long)]
    pub(crate) exit_with_parent: bool,
    /// Log what happens to standard error.
    #[arg(short, long)]
    pub(crate) verbose: bool,
}

impl Args {
    pub(crate) fn tls_settings(&self) -> TlsSettings {
        TlsSettings {
            mode: self.tls,
            certificates: self.tls_certificates.clone(),
            verify_peer: self.tls_verify_peer,
            psk: self.tls_psk.clone(),
        }
    }

    pub(crate) fn access(&self) -> Access {
        Access::new(self.allow.clone())
    }
}

/// Bytes of a size such as `4096`, `64KiB`, `1G` (powers of 1024) or `5MB` (powers of 1000).
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number
        .parse()
        .map_err(|_| format!("`{text}` does not start with a whole number"))?;
    let unit_bytes = unit_bytes(unit)
        .ok_or_else(|| format!("unit `{unit}` is unknown; use KiB, MiB, GiB or TiB"))?;
    let size_bytes = number
        .checked_mul(unit_bytes)
        .filter(|size| i64::try_from(*size).is_ok());
    size_bytes.ok_or_else(|| format!("`{text}` is too large"))
}

fn unit_bytes(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    let base: u64 = if unit.len() == 2 && unit.ends_with('b') {
        1000
    } else {
        1024
    };
    let power = match unit.trim_end_matches("ib").trim_end_matches('b') {
        "" => 0,
        "k" => 1,
        "m" => 2,
        "g" => 3,
        "t" => 4,
        _ => return None,
    };
    Some(base.pow(power))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_understood() {
        let cases = [
            ("4096", 4096),
            ("1K", 1024),
            ("64KiB", 65536),
            ("5MB", 5_000_000),
            ("1GiB", 1 << 30),
            ("2t", 2 << 40),
            ("7b", 7),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn wrong_sizes_are_explained() {
        for text in [
            "",
            "GiB",
            "1X",
            "-1",
            "1.5G",
            "9223372036854775808",
            "16777216T",
        ] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
