//! Loopback addresses that belong to one test as long as it runs.

use std::net::{Ipv4Addr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

/// Port whose listener on host 254 marks a block as taken.
const CLAIM_PORT: u16 = 10_700;
static NEXT: AtomicU32 = AtomicU32::new(0);

/// The addresses 127.a.b.1 to 127.a.b.253, claimed for this process.
#[derive(Debug)]
pub struct AddressBlock {
    net: (u8, u8),
    _claim: TcpListener,
}

impl AddressBlock {
    /// Claims a block that no other test of this machine has.
    #[must_use]
    pub fn claim() -> Self {
        for _ in 0..60_000 {
            let number = std::process::id().wrapping_mul(7) + NEXT.fetch_add(1, Ordering::Relaxed);
            let octet = |value: u32| u8::try_from(value % 250 + 2).unwrap();
            let net = (octet(number / 250), octet(number));
            let claim = TcpListener::bind((Ipv4Addr::new(127, net.0, net.1, 254), CLAIM_PORT));
            if let Ok(claim) = claim {
                return Self { net, _claim: claim };
            }
        }
        panic!("no free block of loopback addresses");
    }

    /// The address of the server with this number, from 1 on.
    #[must_use]
    pub fn of(&self, number: u8) -> Ipv4Addr {
        Ipv4Addr::new(127, self.net.0, self.net.1, number)
    }
}
