//! What an operator can set: a TOML file, overridden by the command line of `blockd serve`.

use serde::Deserialize;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

/// Port of the peer protocol: servers, clients and administration.
pub const PEER_PORT: u16 = 10_808;
/// Port of NBD, as assigned by IANA.
pub const NBD_PORT: u16 = 10_809;

/// The configuration file; every key is optional and documented in the README.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConfigFile {
    /// `ADDR[:PORT]` of the peer protocol.
    pub listen: Option<String>,
    /// `ADDR[:PORT]` list of NBD; the address of `listen` unless set.
    pub nbd_listen: Option<Vec<String>>,
    /// Path of the NBD unix socket.
    pub nbd_unix: Option<PathBuf>,
    /// Bytes of the store's log when a state directory is first used.
    pub log_bytes: Option<u64>,
    /// Bytes that writes leave free on the file system of the state directory.
    pub reserve_bytes: Option<u64>,
    /// Milliseconds for which a snapshot may hold writes.
    pub snapshot_hold_max_ms: Option<u64>,
}

/// The configuration in force: nothing is left to be decided.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub state: PathBuf,
    pub listen: SocketAddr,
    pub nbd_listen: Vec<SocketAddr>,
    pub nbd_unix: Option<PathBuf>,
    pub log_bytes: Option<u64>,
    pub reserve_bytes: Option<u64>,
    pub snapshot_hold_max_ms: u64,
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
    #[error("listen: {0} is no address that other servers could reach; name one of this machine's")]
    Unspecified(SocketAddr),
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
            nbd_listen: self.nbd_listen.or(below.nbd_listen),
            nbd_unix: self.nbd_unix.or(below.nbd_unix),
            log_bytes: self.log_bytes.or(below.log_bytes),
            reserve_bytes: self.reserve_bytes.or(below.reserve_bytes),
            snapshot_hold_max_ms: self.snapshot_hold_max_ms.or(below.snapshot_hold_max_ms),
        }
    }

    /// Checks everything and fills in the defaults.
    ///
    /// # Errors
    /// [`ConfigError`] naming the key.
    pub fn resolve(self, state: PathBuf) -> Result<Config, ConfigError> {
        let listen = self.listen.ok_or(ConfigError::NoListen)?;
        let listen = parse_address("listen", &listen, PEER_PORT)?;
        if listen.ip().is_unspecified() {
            return Err(ConfigError::Unspecified(listen));
        }
        let nbd_listen = match self.nbd_listen {
            None => vec![SocketAddr::new(listen.ip(), NBD_PORT)],
            Some(list) => list
                .iter()
                .map(|text| parse_address("nbd_listen", text, NBD_PORT))
                .collect::<Result<_, _>>()?,
        };
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
        Ok(Config {
            state,
            listen,
            nbd_listen,
            nbd_unix: self.nbd_unix,
            log_bytes: self.log_bytes,
            reserve_bytes: self.reserve_bytes,
            snapshot_hold_max_ms: hold,
        })
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
            ("", "listen"),
        ] {
            let error = file(text).unwrap().resolve(PathBuf::new()).unwrap_err();
            assert!(error.to_string().starts_with(key), "{text}: {error}");
        }
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
