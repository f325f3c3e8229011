//! How many connections are served at a time: in total, and from one address.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::rc::Rc;

use thiserror::Error;

use crate::limits;

/// The network part of an IPv6 address: whoever has one address has all that share it.
const NETWORK: u128 = !0 << 64;

/// Why a connection is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(crate) enum Full {
    #[error("the server serves {0} connections already")]
    Server(usize),
    #[error("the server serves {0} TCP connections already and keeps the others for local ones")]
    Remote(usize),
    #[error("its address has {0} connections already")]
    Address(usize),
}

/// At most so many connections.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Caps {
    pub(crate) total: usize,
    pub(crate) per_address: usize,
}

impl Default for Caps {
    fn default() -> Self {
        Self {
            total: limits::CONNECTIONS_MAX,
            per_address: limits::CONNECTIONS_PER_ADDRESS_MAX,
        }
    }
}

/// Counts the connections that are served.
#[derive(Debug)]
pub(crate) struct Admission {
    caps: Caps,
    /// Of the total, at most so many that are not local.
    remote_max: usize,
    /// By address; local ones count under `None`, and only in total.
    served: Rc<RefCell<HashMap<Option<IpAddr>, usize>>>,
}

impl Admission {
    /// Seats within these caps; one in `limits::LOCAL_SHARE` is only for local connections if there can be any.
    pub(crate) fn new(caps: Caps, has_local: bool) -> Self {
        let kept = if has_local {
            caps.total / limits::LOCAL_SHARE
        } else {
            0
        };
        Self {
            caps,
            remote_max: caps.total - kept,
            served: Rc::default(),
        }
    }

    /// A seat for a connection from this address, until it is dropped.
    pub(crate) fn admit(&self, address: Option<IpAddr>) -> Result<Seat, Full> {
        let address = address.map(counted_as);
        let mut served = self.served.borrow_mut();
        let total = served.values().sum::<usize>();
        if total >= self.caps.total {
            return Err(Full::Server(self.caps.total));
        }
        let remote = total - served.get(&None).copied().unwrap_or_default();
        if address.is_some() && remote >= self.remote_max {
            return Err(Full::Remote(self.remote_max));
        }
        let count = served.entry(address).or_default();
        if address.is_some() && *count >= self.caps.per_address {
            return Err(Full::Address(self.caps.per_address));
        }
        *count += 1;
        Ok(Seat {
            address,
            served: Rc::clone(&self.served),
        })
    }
}

fn counted_as(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & NETWORK).into(),
        address => address,
    }
}

/// Stands for one connection that is served.
#[derive(Debug)]
pub(crate) struct Seat {
    address: Option<IpAddr>,
    served: Rc<RefCell<HashMap<Option<IpAddr>, usize>>>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut served = self.served.borrow_mut();
        if let Some(count) = served.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                served.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn admission(total: usize, per_address: usize) -> Admission {
        Admission::new(Caps { total, per_address }, true)
    }

    fn ip(text: &str) -> Option<IpAddr> {
        text.parse().ok()
    }

    #[test]
    fn one_address_does_not_take_everything() {
        let admission = admission(4, 2);
        let seats = [
            admission.admit(ip("10.0.0.1")),
            admission.admit(ip("::ffff:10.0.0.1")),
        ];
        assert!(seats.iter().all(Result::is_ok));
        assert_eq!(
            admission.admit(ip("10.0.0.1")).unwrap_err(),
            Full::Address(2)
        );
        let other = admission.admit(ip("10.0.0.2")).unwrap();
        drop(seats);
        assert!(admission.admit(ip("10.0.0.1")).is_ok());
        drop(other);
        assert!(
            admission.served.borrow().is_empty(),
            "nothing is remembered of who is gone"
        );
    }

    #[test]
    fn addresses_of_one_ipv6_network_count_as_one() {
        let admission = admission(9, 1);
        let _seat = admission.admit(ip("fd00::1")).unwrap();
        assert_eq!(
            admission.admit(ip("fd00::2")).unwrap_err(),
            Full::Address(1)
        );
        assert!(admission.admit(ip("fd00:0:0:1::2")).is_ok());
    }

    #[test]
    fn local_connections_count_in_total_only() {
        let admission = admission(2, 1);
        let _seats = [
            admission.admit(None).unwrap(),
            admission.admit(None).unwrap(),
        ];
        assert_eq!(admission.admit(None).unwrap_err(), Full::Server(2));
        assert_eq!(
            admission.admit(ip("10.0.0.1")).unwrap_err(),
            Full::Server(2)
        );
    }
    #[test]
    fn remote_connections_leave_seats_for_local_ones() {
        let admission = admission(32, 32);
        let mut remote: Vec<_> = (0..30)
            .map(|_| admission.admit(ip("10.0.0.1")).unwrap())
            .collect();
        let refused = admission.admit(ip("10.0.0.2")).unwrap_err();
        assert_eq!(refused, Full::Remote(30));
        let _local = [
            admission.admit(None).unwrap(),
            admission.admit(None).unwrap(),
        ];
        assert_eq!(admission.admit(None).unwrap_err(), Full::Server(32));
        remote.pop();
        assert!(admission.admit(ip("10.0.0.2")).is_ok());
        let caps = Caps {
            total: 32,
            per_address: 32,
        };
        let without_local = Admission::new(caps, false);
        let seats: Vec<_> = (0..32)
            .map(|_| without_local.admit(ip("10.0.0.1")))
            .collect();
        assert!(seats.iter().all(Result::is_ok));
    }
}
