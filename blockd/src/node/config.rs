//! What an operator can set: a TOML file, overridden by the command line of `blockd serve`.

use super::access::{AccessToken, TokenError, Tokens};
use crate::io::hlc::Skew;
use crate::limits::NODE_ADDRESSES_MAX;
use nbd_server::limits::{CONNECTIONS_MAX, CONNECTIONS_PER_ADDRESS_MAX};
use nbd_server::{Access, Rule, RuleError, TlsSettings};
use serde::Deserialize;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// Port of the peer protocol: servers, clients and administration.
pub const PEER_PORT: u16 = 10_808;
/// Port of NBD, as assigned by IANA.
pub const NBD_PORT: u16 = 10_809;

/// Port of the HTTP face: administration and metrics.
pub const HTTP_PORT: u16 = 10_810;

/// The configuration file; every key is optional and documented in the README.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// `ADDR[:PORT]` of the peer protocol.
    pub listen: Option<String>,
    /// `ADDR[:PORT]` list of further addresses of the peer protocol, on other networks.
    pub adapters: Option<Vec<String>>,
    /// `ADDR[:PORT]` list of NBD; the address of `listen` unless set.
    pub nbd_listen: Option<Vec<String>>,
    /// Path of the NBD unix socket.
    pub nbd_unix: Option<PathBuf>,
    /// TLS on all NBD sockets: `off`, `on` or `require`.
    pub nbd_tls: Option<String>,
    /// Directory of the certificates for it.
    pub nbd_tls_certificates: Option<PathBuf>,
    /// File of pre-shared keys instead.
    pub nbd_tls_psk: Option<PathBuf>,
    /// Whether clients must show a certificate, too.
    pub nbd_tls_verify_peer: Option<bool>,
    /// Who may open what over NBD; without rules, everyone everything.
    pub nbd_access: Option<Vec<AccessRule>>,
    /// NBD connections at a time.
    pub nbd_connections: Option<usize>,
    /// NBD connections at a time from one address.
    pub nbd_connections_per_address: Option<usize>,
    /// `ADDR[:PORT]` of HTTP; besides, there is a unix socket in the state directory.
    pub http_listen: Option<String>,
    /// Who may ask what over it; without tokens, everyone on this machine everything.
    pub http_access: Option<Vec<AccessToken>>,
    /// Bytes of the store's log when a state directory is first used.
    pub log_bytes: Option<u64>,
    /// Bytes that writes leave free on the file system of the state directory.
    pub reserve_bytes: Option<u64>,
    /// Milliseconds for which a snapshot may hold writes.
    pub snapshot_hold_max_ms: Option<u64>,
    /// For tests: how wrong the wall clock is.
    pub clock_skew: Option<Skew>,
}

/// A rule as it is written; see [`Rule`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AccessRule {
    pub exports: Vec<String>,
    pub names: Vec<String>,
    pub addresses: Vec<String>,
}

impl AccessRule {
    fn resolve(&self) -> Result<Rule, RuleError> {
        Ok(Rule {
            exports: parse_all(&self.exports)?,
            names: parse_all(&self.names)?,
            addresses: parse_all(&self.addresses)?,
        })
    }
}

fn parse_all<T: FromStr<Err = RuleError>>(texts: &[String]) -> Result<Vec<T>, RuleError> {
    texts.iter().map(|text| text.parse()).collect()
}

/// The configuration in force: nothing is left to be decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub state: PathBuf,
    pub listen: SocketAddr,
    /// All addresses of the peer protocol, `listen` first.
    pub adapters: Vec<SocketAddr>,
    pub nbd_listen: Vec<SocketAddr>,
    pub nbd_unix: Option<PathBuf>,
    pub nbd_tls: TlsSettings,
    pub nbd_access: Access,
    pub nbd_connections: usize,
    pub nbd_connections_per_address: usize,
    pub http_listen: Option<SocketAddr>,
    pub http_access: Tokens,
    pub log_bytes: Option<u64>,
    pub reserve_bytes: Option<u64>,
    pub snapshot_hold_max_ms: u64,
    pub clock_skew: Option<Skew>,
}

/// What is wrong with a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration file {path}: {reason}")]
    Read { path: PathBuf, reason: String },
    #[error("configuration file {path}: {reason}")]
    Syntax { path: PathBuf, reason: String },
    #[error(
        "{key}: {value:?} is no ADDR[:PORT] (examples: 127.0.0.1, 10.0.0.1:10808, [::1]:10808)"
    )]
    Address { key: &'static str, value: String },
    #[error("{key}: {value} is outside its limits: {limits}")]
    Limit {
        key: &'static str,
        value: u64,
        limits: &'static str,
    },
    #[error("nbd_tls: {0}")]
    TlsMode(nbd_server::TlsError),
    #[error("nbd_access, rule {number}: {source}")]
    Rule { number: usize, source: RuleError },
    #[error(
        "nbd_access: a rule asks for names, which nobody has without nbd_tls_verify_peer or nbd_tls_psk"
    )]
    NamesWithoutTls,
    #[error(
        "nbd_listen: {0} is not a loopback address, so data would cross the network in the clear: give \
         --nbd-tls-certificates DIR or --nbd-tls-psk FILE, or say --nbd-tls off if that is wanted"
    )]
    PlainNbd(SocketAddr),
    #[error(
        "http_listen: {0} is not a loopback address, so whoever reaches it could do everything: add \
         [[http_access]] tables with tokens to the configuration file, or name a loopback address"
    )]
    OpenHttp(SocketAddr),
    #[error("http_access: {0}")]
    Token(#[from] TokenError),
    #[error("{0}: {1} is no address that other servers could reach; name one of this machine's")]
    Unspecified(&'static str, SocketAddr),
    #[error("adapters: {0} addresses are more than {NODE_ADDRESSES_MAX}")]
    TooManyAdapters(usize),
    #[error("listen: not set; give --listen ADDR[:PORT] or the key `listen` of the configuration")]
    NoListen,
}

impl ConfigFile {
    /// Reads a configuration file.
    ///
    /// # Errors
    /// It cannot be read, or has an unknown key or a value of the wrong type (with its line).
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Read {
            path: path.to_owned(),
            reason: error.to_string(),
        })?;
        toml::from_str(&text).map_err(|error| ConfigError::Syntax {
            path: path.to_owned(),
            reason: error.to_string(),
        })
    }

    /// `self` where it is set, else `below`.
    #[must_use]
    pub fn or(self, below: Self) -> Self {
        Self {
            listen: self.listen.or(below.listen),
            adapters: self.adapters.or(below.adapters),
            nbd_listen: self.nbd_listen.or(below.nbd_listen),
            nbd_unix: self.nbd_unix.or(below.nbd_unix),
            nbd_tls: self.nbd_tls.or(below.nbd_tls),
            nbd_tls_certificates: self.nbd_tls_certificates.or(below.nbd_tls_certificates),
            nbd_tls_psk: self.nbd_tls_psk.or(below.nbd_tls_psk),
            nbd_tls_verify_peer: self.nbd_tls_verify_peer.or(below.nbd_tls_verify_peer),
            nbd_access: self.nbd_access.or(below.nbd_access),
            nbd_connections: self.nbd_connections.or(below.nbd_connections),
            nbd_connections_per_address: self
                .nbd_connections_per_address
                .or(below.nbd_connections_per_address),
            http_listen: self.http_listen.or(below.http_listen),
            http_access: self.http_access.or(below.http_access),
            log_bytes: self.log_bytes.or(below.log_bytes),
            reserve_bytes: self.reserve_bytes.or(below.reserve_bytes),
            snapshot_hold_max_ms: self.snapshot_hold_max_ms.or(below.snapshot_hold_max_ms),
            clock_skew: self.clock_skew.or(below.clock_skew),
        }
    }

    fn tls_settings(&self) -> Result<TlsSettings, ConfigError> {
        let mode = self.nbd_tls.as_deref().map(str::parse);
        Ok(TlsSettings {
            mode: mode.transpose().map_err(ConfigError::TlsMode)?,
            certificates: self.nbd_tls_certificates.clone(),
            verify_peer: self.nbd_tls_verify_peer.unwrap_or(false),
            psk: self.nbd_tls_psk.clone(),
        })
    }

    /// Checks everything and fills in the defaults.
    ///
    /// # Errors
    /// [`ConfigError`] naming the key.
    pub fn resolve(self, state: PathBuf) -> Result<Config, ConfigError> {
        let nbd_tls = self.tls_settings()?;
        let listen = self.listen.ok_or(ConfigError::NoListen)?;
        let listen = parse_address("listen", &listen, PEER_PORT)?;
        let adapters = resolve_adapters(listen, self.adapters.as_deref().unwrap_or_default())?;
        let nbd_listen = match self.nbd_listen {
            None => vec![SocketAddr::new(listen.ip(), NBD_PORT)],
            Some(list) => list
                .iter()
                .map(|text| parse_address("nbd_listen", text, NBD_PORT))
                .collect::<Result<_, _>>()?,
        };
        let far = nbd_listen
            .iter()
            .find(|address| !address.ip().is_loopback());
        if let Some(address) = far.filter(|_| nbd_tls == TlsSettings::default()) {
            return Err(ConfigError::PlainNbd(*address));
        }
        let hold = self
            .snapshot_hold_max_ms
            .unwrap_or(crate::limits::SNAPSHOT_HOLD_MAX_MS);
        if !(10..=10_000).contains(&hold) {
            return Err(ConfigError::Limit {
                key: "snapshot_hold_max_ms",
                value: hold,
                limits: "10 to 10000",
            });
        }
        let nbd_access = resolve_access(self.nbd_access.as_deref().unwrap_or_default())?;
        if nbd_access.asks_for_names() && !nbd_tls.proves_names() {
            return Err(ConfigError::NamesWithoutTls);
        }
        let http_access = Tokens::new(self.http_access.as_deref().unwrap_or_default())?;
        let http_listen = resolve_http(self.http_listen.as_deref(), &http_access)?;
        Ok(Config {
            state,
            listen,
            adapters,
            nbd_listen,
            nbd_unix: self.nbd_unix,
            nbd_tls,
            nbd_access,
            nbd_connections: self.nbd_connections.unwrap_or(CONNECTIONS_MAX),
            nbd_connections_per_address: self
                .nbd_connections_per_address
                .unwrap_or(CONNECTIONS_PER_ADDRESS_MAX),
            http_listen,
            http_access,
            log_bytes: self.log_bytes,
            reserve_bytes: self.reserve_bytes,
            snapshot_hold_max_ms: hold,
            clock_skew: self.clock_skew,
        })
    }
}

/// The addresses of the peer protocol, each once.
fn resolve_adapters(
    listen: SocketAddr,
    further: &[String],
) -> Result<Vec<SocketAddr>, ConfigError> {
    let further = further.iter().map(|text| {
        Ok::<_, ConfigError>(("adapters", parse_address("adapters", text, listen.port())?))
    });
    let mut all: Vec<SocketAddr> = Vec::new();
    for address in std::iter::once(Ok(("listen", listen))).chain(further) {
        let (key, address) = address?;
        if address.ip().is_unspecified() {
            return Err(ConfigError::Unspecified(key, address));
        }
        if !all.contains(&address) {
            all.push(address);
        }
    }
    match all.len() {
        0..=NODE_ADDRESSES_MAX => Ok(all),
        many => Err(ConfigError::TooManyAdapters(many)),
    }
}

fn resolve_access(rules: &[AccessRule]) -> Result<Access, ConfigError> {
    let resolve = |(index, rule): (usize, &AccessRule)| {
        rule.resolve().map_err(|source| ConfigError::Rule {
            number: index + 1,
            source,
        })
    };
    let rules = rules.iter().enumerate().map(resolve);
    Ok(Access::new(rules.collect::<Result<_, _>>()?))
}

/// Without tokens HTTP stays on the machine.
fn resolve_http(text: Option<&str>, tokens: &Tokens) -> Result<Option<SocketAddr>, ConfigError> {
    let parse = |text| parse_address("http_listen", text, HTTP_PORT);
    let address = text.map(parse).transpose()?;
    let far = address.filter(|address| !address.ip().is_loopback());
    match far.filter(|_| tokens.is_empty()) {
        Some(address) => Err(ConfigError::OpenHttp(address)),
        None => Ok(address),
    }
}

/// Reads `ADDR[:PORT]`.
fn parse_address(key: &'static str, text: &str, port: u16) -> Result<SocketAddr, ConfigError> {
    let bad = || ConfigError::Address {
        key,
        value: text.to_owned(),
    };
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Ok(address);
    }
    let bare = text.trim_start_matches('[').trim_end_matches(']');
    let ip: IpAddr = bare.parse().map_err(|_| bad())?;
    Ok(SocketAddr::new(ip, port))
}

/// `HOST[:PORT]` of a server as a user names it, with the peer port filled in.
#[must_use]
pub fn with_peer_port(server: &str) -> String {
    match server.parse::<IpAddr>() {
        Ok(ip) => SocketAddr::new(ip, PEER_PORT).to_string(),
        Err(_)
            if server
                .rsplit_once(':')
                .is_some_and(|(_, port)| port.parse::<u16>().is_ok()) =>
        {
            server.to_owned()
        }
        Err(_) => format!("{server}:{PEER_PORT}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(text: &str) -> Result<ConfigFile, toml::de::Error> {
        toml::from_str(text)
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let command_line = ConfigFile {
            listen: Some("127.0.0.2".to_owned()),
            ..ConfigFile::default()
        };
        let merged = command_line.or(file("listen = '127.0.0.1'\nlog_bytes = 1048576").unwrap());
        let config = merged.resolve(PathBuf::from("/s")).unwrap();
        assert_eq!(config.listen.to_string(), "127.0.0.2:10808");
        assert_eq!(config.nbd_listen[0].to_string(), "127.0.0.2:10809");
        assert_eq!(config.log_bytes, Some(1 << 20));
    }

    #[test]
    fn unknown_keys_and_bad_values_are_named() {
        assert!(
            file("lisen = 'x'")
                .unwrap_err()
                .to_string()
                .contains("lisen")
        );
        for (text, key) in [
            ("listen = 'host:port:x'", "listen"),
            ("listen = '0.0.0.0'", "listen"),
            (
                "listen = '127.0.0.1'\nnbd_listen = ['nonsense']",
                "nbd_listen",
            ),
            (
                "listen = '127.0.0.1'\nsnapshot_hold_max_ms = 0",
                "snapshot_hold_max_ms",
            ),
            ("listen = '127.0.0.1'\nnbd_tls = 'yes'", "nbd_tls"),
            ("listen = '10.0.0.1'", "nbd_listen: 10.0.0.1:10809"),
            (
                "listen = '127.0.0.1'\nnbd_listen = ['127.0.0.1', '[::]:7']",
                "nbd_listen: [::]:7",
            ),
            (
                "listen = '127.0.0.1'\n[[nbd_access]]\naddresses = ['ten']",
                "nbd_access, rule 1",
            ),
            (
                "listen = '127.0.0.1'\n[[nbd_access]]\nnames = ['alice']",
                "nbd_access",
            ),
            (
                "listen = '127.0.0.1'\nadapters = ['::']",
                "adapters: [::]:10808",
            ),
            ("listen = '127.0.0.1'\nadapters = ['eth0']", "adapters"),
            (
                "listen = '127.0.0.1'\nhttp_listen = '0.0.0.0'",
                "http_listen",
            ),
            ("listen = '127.0.0.1'\nhttp_listen = 'ten'", "http_listen"),
            (
                "listen = '127.0.0.1'\n[[http_access]]\nname = 'a'\nrole = 'admin'\ntoken_sha256 = 'x'",
                "http_access",
            ),
            ("", "listen"),
        ] {
            let error = file(text).unwrap().resolve(PathBuf::new()).unwrap_err();
            assert!(error.to_string().starts_with(key), "{text}: {error}");
        }
    }

    /// S003-15: in the clear only where nobody listens, or by order.
    #[test]
    fn nbd_without_tls_stays_on_the_machine_unless_told_otherwise() {
        for text in [
            "listen = '127.0.0.3'",
            "listen = '::1'",
            "listen = '10.0.0.1'\nnbd_listen = ['127.0.0.1']",
            "listen = '10.0.0.1'\nnbd_listen = []\nnbd_unix = '/run/nbd.sock'",
            "listen = '10.0.0.1'\nnbd_tls = 'off'",
            "listen = '10.0.0.1'\nnbd_tls_psk = '/etc/keys.psk'",
            "listen = '10.0.0.1'\nnbd_tls_certificates = '/etc/pki'",
        ] {
            let resolved = file(text).unwrap().resolve(PathBuf::new());
            assert!(resolved.is_ok(), "{text}: {resolved:?}");
        }
        let error = file("listen = '10.0.0.1'").unwrap().resolve(PathBuf::new());
        let error = error.unwrap_err().to_string();
        for way_out in ["--nbd-tls-certificates", "--nbd-tls-psk", "--nbd-tls off"] {
            assert!(error.contains(way_out), "{error}");
        }
    }

    /// S004-106: no address twice, that of `listen` first, on its port unless another one is given.
    #[test]
    fn adapters_are_further_addresses() {
        let text = "listen = '127.0.0.1:7'\nadapters = ['127.0.0.2', '127.0.0.1', '[::1]:9']";
        let config = file(text).unwrap().resolve(PathBuf::new()).unwrap();
        let found: Vec<String> = config.adapters.iter().map(ToString::to_string).collect();
        assert_eq!(found, ["127.0.0.1:7", "127.0.0.2:7", "[::1]:9"]);
        let many = ConfigFile {
            listen: Some("127.0.0.1".to_owned()),
            adapters: Some((0..40).map(|n| format!("127.0.1.{n}")).collect()),
            ..ConfigFile::default()
        };
        assert!(many.resolve(PathBuf::new()).is_err());
    }

    #[test]
    fn http_leaves_the_machine_only_with_tokens() {
        let config = |text: &str| file(text).unwrap().resolve(PathBuf::new());
        let local = config("listen = '127.0.0.1'\nhttp_listen = '::1'").unwrap();
        assert_eq!(local.http_listen.unwrap().to_string(), "[::1]:10810");
        let far = "listen = '127.0.0.1'\nhttp_listen = '10.0.0.1:80'";
        let error = config(far).unwrap_err().to_string();
        assert!(error.contains("[[http_access]]"), "{error}");
        let digest = "0".repeat(64);
        let token = |role: &str| {
            format!(
                "{far}\n[[http_access]]\nname = 'a'\nrole = '{role}'\ntoken_sha256 = '{digest}'"
            )
        };
        assert!(config(&token("read-only")).is_ok());
        let error = file(&token("root")).unwrap_err().to_string();
        assert!(error.contains("read-only"), "{error}");
    }

    #[test]
    fn the_peer_port_is_filled_in() {
        assert_eq!(with_peer_port("127.0.0.1"), "127.0.0.1:10808");
        assert_eq!(with_peer_port("::1"), "[::1]:10808");
        assert_eq!(with_peer_port("host"), "host:10808");
        assert_eq!(with_peer_port("host:5"), "host:5");
        assert_eq!(with_peer_port("[::1]:7"), "[::1]:7");
    }
}
