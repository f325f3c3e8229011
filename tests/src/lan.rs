//! Hosts with networks between them: a network namespace each, and a bridge for each network.
//!
//! Host h has address 10.N.0.h/24 on network N. Everything goes away when this is dropped.

use std::net::Ipv4Addr;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

/// Networks of this process so far: each has names of its own.
static MADE: AtomicU32 = AtomicU32::new(0);

/// Namespaces of hosts, and one of the switches between them.
pub struct Lan {
    name: String,
    hosts: u8,
    networks: u8,
}

impl Lan {
    /// Hosts 1 to `hosts` on networks 1 to `networks`, all connected.
    #[must_use]
    pub fn new(hosts: u8, networks: u8) -> Self {
        let count = MADE.fetch_add(1, Ordering::Relaxed);
        let lan = Self {
            name: format!("bd{}x{count}", std::process::id()),
            hosts,
            networks,
        };
        lan.build();
        lan
    }

    fn build(&self) {
        let switch = self.switch();
        ip(&format!("netns add {switch}"));
        for network in 1..=self.networks {
            ip(&format!("-n {switch} link add n{network} type bridge"));
            ip(&format!("-n {switch} link set n{network} up"));
        }
        for host in 1..=self.hosts {
            let namespace = self.namespace(host);
            ip(&format!("netns add {namespace}"));
            ip(&format!("-n {namespace} link set lo up"));
            for network in 1..=self.networks {
                self.plug_in(host, network);
            }
        }
    }

    fn plug_in(&self, host: u8, network: u8) {
        let (switch, namespace) = (self.switch(), self.namespace(host));
        let port = port(host, network);
        let cable = format!("link add {port} netns {switch} type veth");
        ip(&format!("{cable} peer name e{network} netns {namespace}"));
        ip(&format!("-n {switch} link set {port} master n{network} up"));
        let address = Self::address(host, network);
        ip(&format!(
            "-n {namespace} addr add {address}/24 dev e{network}"
        ));
        ip(&format!("-n {namespace} link set e{network} up"));
    }

    fn switch(&self) -> String {
        format!("{}sw", self.name)
    }

    /// The network namespace of a host.
    #[must_use]
    pub fn namespace(&self, host: u8) -> String {
        format!("{}h{host}", self.name)
    }

    /// The address of a host on a network.
    #[must_use]
    pub fn address(host: u8, network: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, network, 0, host)
    }

    /// Takes a host off a network: what it sends and what is sent to it is lost without a word.
    pub fn cut(&self, host: u8, network: u8) {
        let (switch, port) = (self.switch(), port(host, network));
        ip(&format!("-n {switch} link set {port} nomaster"));
    }

    pub fn heal(&self, host: u8, network: u8) {
        let (switch, port) = (self.switch(), port(host, network));
        ip(&format!("-n {switch} link set {port} master n{network}"));
    }

    /// Bytes that a host has sent and received on a network so far.
    #[must_use]
    pub fn bytes(&self, host: u8, network: u8) -> u64 {
        let namespace = self.namespace(host);
        let shown = ip(&format!("-n {namespace} -s -j link show e{network}"));
        let links: serde_json::Value = serde_json::from_str(&shown).unwrap();
        let stats = &links[0]["stats64"];
        let bytes = |way: &str| stats[way]["bytes"].as_u64().unwrap();
        bytes("rx") + bytes("tx")
    }
}

impl Drop for Lan {
    fn drop(&mut self) {
        let hosts = (1..=self.hosts).map(|host| self.namespace(host));
        for namespace in hosts.chain([self.switch()]) {
            let _ = Command::new("ip")
                .args(["netns", "del", &namespace])
                .status();
        }
    }
}

fn port(host: u8, network: u8) -> String {
    format!("h{host}n{network}")
}

fn ip(words: &str) -> String {
    let ran = Command::new("ip").args(words.split(' ')).output();
    let ran = ran.unwrap_or_else(|error| panic!("ip: {error}; see scripts/deps.sh test"));
    let complaint = String::from_utf8_lossy(&ran.stderr);
    assert!(ran.status.success(), "ip {words}: {complaint}");
    String::from_utf8(ran.stdout).unwrap()
}
