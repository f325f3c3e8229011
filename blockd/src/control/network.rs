//! Which address of a service is tried first (S004-102 to S004-119).
//!
//! Addresses belong to subnetworks by their masks, subnetworks to networks by definition. A network
//! has a priority for each service, and the addresses on networks of a higher one come first (FIG. 22).
//! Among equals the nearest come first, and of those at one distance every client begins with another
//! one, so that the load is spread (FIG. 24).

use core::net::{IpAddr, SocketAddr};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// What makes traffic between servers that can be kept to chosen networks (S004-102).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Service {
    /// Agreement on facts: the registry's log, votes and heartbeats.
    Registry,
    /// Orders between servers: administration, snapshots, leases.
    Administration,
    /// Requests of clients that a server forwards to the owner of the page.
    Data,
    /// Pages on their way to another owner.
    Moves,
}

impl Service {
    pub const ALL: [Self; 4] = [
        Self::Registry,
        Self::Administration,
        Self::Data,
        Self::Moves,
    ];

    /// The name in commands and listings.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Registry => "registry",
            Self::Administration => "administration",
            Self::Data => "data",
            Self::Moves => "moves",
        }
    }
}

impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A text that names no service.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no service {0:?}: registry, administration, data and moves are there")]
pub struct UnknownService(String);

impl FromStr for Service {
    type Err = UnknownService;

    fn from_str(text: &str) -> Result<Self, UnknownService> {
        let mut all = Self::ALL.into_iter();
        all.find(|service| service.name() == text)
            .ok_or_else(|| UnknownService(text.to_owned()))
    }
}

/// What a network is worth to a service: a higher number is tried first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Priority {
    /// The service is kept off the network.
    Never,
    Of(u16),
}

impl fmt::Display for Priority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Never => f.write_str("never"),
            Self::Of(number) => write!(f, "{number}"),
        }
    }
}

/// A text that is no priority.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no priority: give a number from 1 to 65535, or never")]
pub struct BadPriority(String);

impl FromStr for Priority {
    type Err = BadPriority;

    fn from_str(text: &str) -> Result<Self, BadPriority> {
        match text.parse() {
            Ok(number) if number > 0 => Ok(Self::Of(number)),
            _ if text == "never" => Ok(Self::Never),
            _ => Err(BadPriority(text.to_owned())),
        }
    }
}

/// The addresses whose first bits are these: `192.168.55.0/24`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Prefix {
    address: IpAddr,
    bits: u8,
}

/// A text that is no prefix, or one with bits behind its mask.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no prefix of addresses: write one like 192.168.55.0/24 or fd00:1::/64")]
pub struct BadPrefix(String);

impl Prefix {
    /// Address AND mask (S004-109); a mask longer than the address is one of all its bits.
    #[must_use]
    pub fn of(address: IpAddr, mask_bits: u8) -> Self {
        match address {
            IpAddr::V4(v4) => {
                let bits = mask_bits.min(32);
                let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
                Self {
                    address: IpAddr::V4((u32::from(v4) & mask).into()),
                    bits,
                }
            }
            IpAddr::V6(v6) => {
                let bits = mask_bits.min(128);
                let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
                Self {
                    address: IpAddr::V6((u128::from(v6) & mask).into()),
                    bits,
                }
            }
        }
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.bits)
    }
}

impl FromStr for Prefix {
    type Err = BadPrefix;

    fn from_str(text: &str) -> Result<Self, BadPrefix> {
        let parts = text.split_once('/');
        let parsed = parts.and_then(|(address, bits)| {
            let (address, bits) = (address.parse().ok()?, bits.parse().ok()?);
            let prefix = Self::of(address, bits);
            (prefix == Self { address, bits }).then_some(prefix)
        });
        parsed.ok_or_else(|| BadPrefix(text.to_owned()))
    }
}

impl TryFrom<String> for Prefix {
    type Error = BadPrefix;

    fn try_from(text: String) -> Result<Self, BadPrefix> {
        text.parse()
    }
}

impl From<Prefix> for String {
    fn from(prefix: Prefix) -> Self {
        prefix.to_string()
    }
}

/// An address at which a service can be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    pub address: SocketAddr,
    /// Of the network that it is on; `None` if nothing is said there.
    pub priority: Option<Priority>,
    /// Hops from the client.
    pub distance: u32,
}

/// The addresses in the order in which this client tries them (FIG. 22, S004-110). Where nothing is
/// said comes behind every number. What the service is kept off is left out, unless it is all there is:
/// a server that cannot be reached at all would be worth less.
#[must_use]
pub fn in_order(candidates: &[Candidate], client: u16) -> Vec<SocketAddr> {
    let allowed = |candidate: &&Candidate| candidate.priority != Some(Priority::Never);
    let any = candidates.iter().any(|candidate| allowed(&candidate));
    let mut equals: BTreeMap<_, Vec<(u32, SocketAddr)>> = BTreeMap::new();
    for candidate in candidates.iter().filter(|c| !any || allowed(c)) {
        let worth = std::cmp::Reverse(candidate.priority);
        let equal = equals.entry(worth).or_default();
        equal.push((candidate.distance, candidate.address));
    }
    let ordered = equals.into_values();
    ordered.flat_map(|equal| rotated(equal, client)).collect()
}

/// The nearest first; of those at one distance, in their own order, client number c begins with number
/// c mod n (FIG. 24, S004-114).
///
/// Over n clients with successive numbers each of n begins once.
pub fn rotated<T: Ord>(servers: Vec<(u32, T)>, client: u16) -> impl Iterator<Item = T> {
    let mut by_distance: BTreeMap<u32, Vec<T>> = BTreeMap::new();
    for (distance, server) in servers {
        by_distance.entry(distance).or_default().push(server);
    }
    by_distance.into_values().flat_map(move |mut equidistant| {
        equidistant.sort();
        let first = usize::from(client) % equidistant.len();
        equidistant.rotate_left(first);
        equidistant
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// S004-115: the worked example, and the lists of all nodes from 0 to 6. Symbolic addresses are in
    /// the order of their bytes (U-14).
    #[test]
    fn equidistant_servers_are_tried_in_turn() {
        let servers = [(0, "1"), (1, "3"), (1, "7"), (1, "9"), (2, "12"), (2, "2")];
        let lists = [
            ["1", "3", "7", "9", "12", "2"],
            ["1", "7", "9", "3", "2", "12"],
            ["1", "9", "3", "7", "12", "2"],
            ["1", "3", "7", "9", "2", "12"],
            ["1", "7", "9", "3", "12", "2"],
            ["1", "9", "3", "7", "2", "12"],
            ["1", "3", "7", "9", "12", "2"],
        ];
        for (client, list) in (0..).zip(lists) {
            let found: Vec<&str> = rotated(servers.to_vec(), client).collect();
            assert_eq!(found, list, "node {client}");
        }
    }

    /// S004-114: nothing is lost or doubled, and over n successive clients each of n is first once.
    #[test]
    fn a_rotation_is_fair() {
        for count in 1..20_u32 {
            let servers: Vec<(u32, u32)> = (0..count).map(|n| (7, n)).collect();
            let of = |client| rotated(servers.clone(), client).collect::<Vec<_>>();
            let lists: Vec<Vec<u32>> = (100..).take(count as usize).map(of).collect();
            let mut firsts: Vec<u32> = lists.iter().map(|list| list[0]).collect();
            firsts.sort_unstable();
            assert_eq!(firsts, (0..count).collect::<Vec<_>>());
            for mut list in lists {
                list.sort_unstable();
                assert_eq!(list, (0..count).collect::<Vec<_>>());
            }
        }
        assert_eq!(rotated(Vec::<(u32, u32)>::new(), 3).count(), 0);
    }

    /// S004-109: address AND mask.
    #[test]
    fn an_address_belongs_to_the_subnetwork_of_its_mask() {
        let of = |address: &str, bits| Prefix::of(address.parse().unwrap(), bits).to_string();
        assert_eq!(of("192.168.55.15", 24), "192.168.55.0/24");
        assert_eq!(of("192.168.55.15", 0), "0.0.0.0/0");
        assert_eq!(of("192.168.55.15", 32), "192.168.55.15/32");
        assert_eq!(of("fd00:1:2:3:4::5", 64), "fd00:1:2:3::/64");
        assert_eq!(of("fd00::5", 0), "::/0");
        for bad in [
            "192.168.55.15/24",
            "10.0.0.0",
            "10.0.0.0/33",
            "x/8",
            "::/129",
            "/8",
        ] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
        assert_eq!(
            "10.0.0.0/8".parse::<Prefix>().unwrap().to_string(),
            "10.0.0.0/8"
        );
    }

    fn candidate(last: u8, priority: Option<Priority>, distance: u32) -> Candidate {
        Candidate {
            address: SocketAddr::from(([10, 0, 0, last], 10808)),
            priority,
            distance,
        }
    }

    fn lasts(candidates: &[Candidate], client: u16) -> Vec<u8> {
        let ordered = in_order(candidates, client).into_iter();
        let last = |address: SocketAddr| match address.ip() {
            IpAddr::V4(v4) => v4.octets()[3],
            IpAddr::V6(_) => 0,
        };
        ordered.map(last).collect()
    }

    /// S004-110: priorities 3, 2 and 1 of networks A, B and C for addresses 1, 2 and 3; a distance
    /// counts between equals only.
    #[test]
    fn a_higher_priority_is_tried_first() {
        let of = |number| Some(Priority::Of(number));
        let example = [
            candidate(3, of(1), 0),
            candidate(1, of(3), 9),
            candidate(2, of(2), 1),
        ];
        assert_eq!(lasts(&example, 5), [1, 2, 3]);
        let mixed = [
            candidate(1, None, 0),
            candidate(2, of(1), 2),
            candidate(3, of(1), 1),
            candidate(4, Some(Priority::Never), 0),
        ];
        assert_eq!(lasts(&mixed, 0), [3, 2, 1]);
    }

    /// S004-112: without priorities the nearest, then in turn.
    #[test]
    fn without_priorities_the_distance_decides() {
        let candidates = [1, 2, 3].map(|last| candidate(last, None, 2));
        assert_eq!(lasts(&candidates, 1), [2, 3, 1]);
        let nearer = [candidate(1, None, 2), candidate(2, None, 1)];
        assert_eq!(lasts(&nearer, 1), [2, 1]);
    }

    #[test]
    fn a_server_that_is_on_forbidden_networks_only_is_reached_there() {
        let never = Some(Priority::Never);
        assert_eq!(
            lasts(&[candidate(1, never, 1), candidate(2, never, 1)], 0),
            [1, 2]
        );
    }

    #[test]
    fn services_and_priorities_are_named() {
        for service in Service::ALL {
            assert_eq!(service.name().parse(), Ok(service));
        }
        assert!(
            "heartbeat"
                .parse::<Service>()
                .unwrap_err()
                .to_string()
                .contains("registry")
        );
        assert_eq!("never".parse(), Ok(Priority::Never));
        assert_eq!("3".parse(), Ok(Priority::Of(3)));
        for bad in ["0", "-1", "65536", "high"] {
            assert!(bad.parse::<Priority>().is_err(), "{bad}");
        }
    }
}
