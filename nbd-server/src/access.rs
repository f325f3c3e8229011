//! Who may see and open which exports: rules over the name of the export, the proven names and the address of the client.
//!
//! No rule at all means everyone and everything. Otherwise an export is for a client if one rule says so, and hidden from it if none
//! does: it is neither listed nor told apart from one that does not exist.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

use crate::error::OpenError;
use crate::export::{ExportEntry, Exports};
use crate::peer::Peer;

/// What is wrong with a rule.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum RuleError {
    /// An empty pattern matches nothing that exists.
    #[error("a pattern is empty; `*` stands for everything")]
    EmptyPattern,
    /// Neither an address, a range nor `unix`.
    #[error(
        "`{0}` is no address, no ADDRESS/BITS and not `unix` (examples: 10.1.0.0/16, ::1, unix)"
    )]
    Address(String),
    /// `KEY=VALUE` was expected.
    #[error("`{0}` is not name=PATTERN or address=RANGE")]
    Condition(String),
}

/// A name in which `*` stands for any characters, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pattern(String);

impl Pattern {
    /// Whether the whole text fits.
    pub fn matches(&self, text: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = text.strip_prefix(first) else {
            return false;
        };
        let Some(last) = parts.next_back() else {
            return rest.is_empty();
        };
        for part in parts {
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

impl FromStr for Pattern {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        match text {
            "" => Err(RuleError::EmptyPattern),
            text => Ok(Self(text.to_owned())),
        }
    }
}

/// Where a client may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressRange {
    /// A unix socket or a pipe.
    Unix,
    /// Addresses whose first `bits` bits are those of `address`.
    Net {
        /// Any address of the range.
        address: IpAddr,
        /// 0 to 32 or 128.
        bits: u8,
    },
}

impl AddressRange {
    /// Whether a client's address is inside; an IPv4 address in IPv6 form counts as IPv4.
    pub fn contains(&self, address: Option<IpAddr>) -> bool {
        match (*self, address.map(|address| address.to_canonical())) {
            (Self::Unix, None) => true,
            (Self::Net { address, bits }, Some(peer)) => same_prefix(address, peer, bits),
            _ => false,
        }
    }
}

fn same_prefix(a: IpAddr, b: IpAddr, bits: u8) -> bool {
    let differing_bits = match (a, b) {
        (IpAddr::V4(a), IpAddr::V4(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        (IpAddr::V6(a), IpAddr::V6(b)) => (a.to_bits() ^ b.to_bits()).leading_zeros(),
        _ => return false,
    };
    differing_bits >= u32::from(bits)
}

impl FromStr for AddressRange {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        if text == "unix" {
            return Ok(Self::Unix);
        }
        let bad = || RuleError::Address(text.to_owned());
        let (address, bits) = match text.split_once('/') {
            None => (text, None),
            Some((address, bits)) => (address, Some(bits.parse::<u8>().map_err(|_| bad())?)),
        };
        let address: IpAddr = address.parse().map_err(|_| bad())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.unwrap_or(most);
        match bits <= most {
            true => Ok(Self::Net { address, bits }),
            false => Err(bad()),
        }
    }
}

/// Gives the exports that match to the clients that match. An empty list is no condition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rule {
    /// One of these fits the name of the export.
    pub exports: Vec<Pattern>,
    /// One of these fits one of the client's proven names.
    pub names: Vec<Pattern>,
    /// One of these has the client's address.
    pub addresses: Vec<AddressRange>,
}

impl Rule {
    fn allows(&self, export: &str, peer: &Peer) -> bool {
        let is_named = |pattern: &Pattern| peer.names.iter().any(|name| pattern.matches(name));
        let ip = peer.address.map(|address| address.ip());
        (self.exports.is_empty() || self.exports.iter().any(|pattern| pattern.matches(export)))
            && (self.names.is_empty() || self.names.iter().any(is_named))
            && (self.addresses.is_empty() || self.addresses.iter().any(|range| range.contains(ip)))
    }
}

/// `name=PATTERN` and `address=RANGE`, separated by commas; of several with the same key, one has to fit. For every export.
impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let mut rule = Self::default();
        for condition in text.split(',') {
            match condition.split_once('=') {
                Some(("name", pattern)) => rule.names.push(pattern.parse()?),
                Some(("address", range)) => rule.addresses.push(range.parse()?),
                _ => return Err(RuleError::Condition(condition.to_owned())),
            }
        }
        Ok(rule)
    }
}

/// All rules of a server.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access(Arc<[Rule]>);

impl Access {
    /// No rule means that everyone may open everything.
    pub fn new(rules: Vec<Rule>) -> Self {
        Self(rules.into())
    }

    /// Whether this client may see and open an export.
    pub fn allows(&self, export: &str, peer: &Peer) -> bool {
        self.0.is_empty() || self.0.iter().any(|rule| rule.allows(export, peer))
    }

    /// Whether a rule asks for a proven name, which no client has unless TLS asks for one.
    pub fn asks_for_names(&self) -> bool {
        self.0.iter().any(|rule| !rule.names.is_empty())
    }
}

/// Exports behind rules: to each client only what is for it.
#[derive(Clone, Debug)]
pub struct Guarded<P> {
    exports: P,
    access: Access,
}

impl<P> Guarded<P> {
    /// Puts exports behind rules.
    pub fn new(exports: P, access: Access) -> Self {
        Self { exports, access }
    }
}

impl<P: Exports> Exports for Guarded<P> {
    type Export = P::Export;

    async fn list(&self, peer: &Peer) -> Result<Vec<ExportEntry>, OpenError> {
        let mut entries = self.exports.list(peer).await?;
        entries.retain(|entry| self.access.allows(&entry.name, peer));
        Ok(entries)
    }

    async fn open(&self, name: &str, peer: &Peer) -> Result<P::Export, OpenError> {
        if !self.access.allows(name, peer) {
            let text = format!(
                "the rules of this server do not give export `{name}` to this client ({peer})"
            );
            return Err(OpenError::Policy(text.into()));
        }
        self.exports.open(name, peer).await
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap()
    }

    fn peer(address: &str, names: &[&str]) -> Peer {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        Peer {
            address: address.parse().ok(),
            tls: !names.is_empty(),
            names,
        }
    }

    #[test]
    fn patterns_match_whole_names() {
        for (text, fits, fails) in [
            ("vol1", &["vol1"][..], &["vol", "vol11", "Vol1", ""][..]),
            ("*", &["", "a", "a@b"], &[]),
            ("db-*", &["db-", "db-1@mon"], &["db", "xdb-1"]),
            (
                "*.example",
                &["a.example", ".example"],
                &["example", "a.example.org"],
            ),
            ("a*b*c", &["abc", "axxbyyc", "abbc"], &["ab", "acb", "xabc"]),
            ("ab*ba", &["abba", "abxba"], &["aba", "ab"]),
            ("*@*", &["vol@snap"], &["vol"]),
        ] {
            for name in fits {
                assert!(pattern(text).matches(name), "{text} {name}");
            }
            for name in fails {
                assert!(!pattern(text).matches(name), "{text} {name}");
            }
        }
    }

    #[test]
    fn ranges_contain_their_addresses_only() {
        for (text, inside, outside) in [
            ("10.1.0.0/16", "10.1.255.1", "10.2.0.1"),
            ("10.1.2.3", "10.1.2.3", "10.1.2.4"),
            ("10.1.2.3/31", "10.1.2.2", "10.1.2.4"),
            ("0.0.0.0/0", "1.2.3.4", "::1"),
            ("10.1.0.0/16", "::ffff:10.1.9.9", "::ffff:10.2.9.9"),
            ("fd00::/8", "fdff::1", "fe00::1"),
            ("::1", "::1", "::2"),
        ] {
            let range: AddressRange = text.parse().unwrap();
            assert!(range.contains(inside.parse().ok()), "{text} {inside}");
            assert!(!range.contains(outside.parse().ok()), "{text} {outside}");
            assert!(!range.contains(None), "{text}");
        }
        let unix: AddressRange = "unix".parse().unwrap();
        assert!(unix.contains(None) && !unix.contains("127.0.0.1".parse().ok()));
        for bad in [
            "",
            "10.1.0.0/33",
            "::/129",
            "10.1/16",
            "host",
            "10.0.0.0/",
            "10.0.0.0/-1",
        ] {
            assert!(bad.parse::<AddressRange>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_rule_holds_when_each_kind_of_condition_does() {
        let rule: Rule = "name=alice,name=*.backup,address=10.0.0.0/8"
            .parse()
            .unwrap();
        let access = Access::new(vec![rule]);
        assert!(access.asks_for_names());
        assert!(access.allows("any", &peer("10.0.0.1:1", &["alice"])));
        assert!(access.allows("any", &peer("10.0.0.1:1", &["x", "h.backup"])));
        assert!(!access.allows("any", &peer("10.0.0.1:1", &["bob"])));
        assert!(!access.allows("any", &peer("10.0.0.1:1", &[])));
        assert!(!access.allows("any", &peer("11.0.0.1:1", &["alice"])));
        for bad in ["", "alice", "user=alice", "name=", "address=x", "name=a,"] {
            assert!(bad.parse::<Rule>().is_err(), "{bad}");
        }
    }

    #[test]
    fn no_rule_gives_everything_and_any_rule_hides_the_rest() {
        assert!(Access::default().allows("x", &peer("1.2.3.4:5", &[])));
        let rule = Rule {
            exports: vec![pattern("db-*")],
            ..Rule::default()
        };
        let access = Access::new(vec![rule]);
        assert!(!access.asks_for_names());
        assert!(access.allows("db-1", &Peer::default()));
        assert!(!access.allows("web", &Peer::default()));
    }

    /// A pattern by definition: the star stands for one of the prefixes of what is left.
    fn matches_slowly(pattern: &[u8], text: &[u8]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some((b'*', rest)) => (0..=text.len()).any(|n| matches_slowly(rest, &text[n..])),
            Some((byte, rest)) => text.first() == Some(byte) && matches_slowly(rest, &text[1..]),
        }
    }

    proptest! {
        #[test]
        fn patterns_match_as_defined(text in "[ab]{0,9}", glob in "[ab*]{1,7}") {
            prop_assert_eq!(pattern(&glob).matches(&text), matches_slowly(glob.as_bytes(), text.as_bytes()));
        }
    }
}
