//! Who is at the other end of a connection, as far as that is proven.

use std::fmt;
use std::net::SocketAddr;

/// The client of one connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// Its address; `None` on a unix socket or a pipe.
    pub address: Option<SocketAddr>,
    /// Whether the connection is inside TLS (now).
    pub tls: bool,
    /// The names that TLS proved: common name and DNS names (in lower case) of the client's certificate, or the user of its
    /// pre-shared key. Empty if the client showed none.
    pub names: Vec<String>,
}

impl Peer {
    /// A client at this address that has proven nothing; `None` on a unix socket or a pipe.
    pub fn at(address: Option<SocketAddr>) -> Self {
        Self {
            address,
            ..Self::default()
        }
    }

    /// The same client inside TLS.
    pub(crate) fn inside_tls(&self, names: Vec<String>) -> Self {
        Self {
            address: self.address,
            tls: true,
            names,
        }
    }
}

/// For logs and refusals: `10.0.0.1:4711, TLS as alice, alice.example`.
impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write!(f, "{address}")?,
            None => f.write_str("a local socket")?,
        }
        match (self.tls, self.names.as_slice()) {
            (false, _) => Ok(()),
            (true, []) => f.write_str(", TLS without a name"),
            (true, names) => write!(f, ", TLS as {}", names.join(", ")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_described_by_what_it_proved() {
        let plain = Peer::at("10.0.0.1:4711".parse().ok());
        assert_eq!(plain.to_string(), "10.0.0.1:4711");
        let named = plain.inside_tls(vec!["alice".to_owned(), "a.example".to_owned()]);
        assert_eq!(named.to_string(), "10.0.0.1:4711, TLS as alice, a.example");
        let local = Peer::at(None).inside_tls(Vec::new());
        assert_eq!(local.to_string(), "a local socket, TLS without a name");
    }
}
