//! Two networks between servers: which traffic takes which, and what happens when one is cut
//! (S004-102 to S004-119).

use blockd_tests::{Cluster, Lan, MIB, NbdConnection, Ran, Server, binary, try_run};
use serde_json::Value;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Until what was asked for must be so.
const PATIENCE: Duration = Duration::from_secs(30);

/// Three servers, each a host of its own with an adapter on both networks.
struct Hosts {
    lan: Lan,
    servers: Vec<Server>,
    _directory: tempfile::TempDir,
}

impl Hosts {
    fn start() -> Self {
        let lan = Lan::new(3, 3);
        let directory = tempfile::tempdir().unwrap();
        let server = |host: u8| {
            let path = directory.path().join(format!("s{host}"));
            let mut server = Server::new(host, Lan::address(host, 1), &path);
            server.namespace = Some(lan.namespace(host));
            server.config = config(host, &[2]);
            server.start();
            server
        };
        let servers = (1..=3).map(server).collect();
        let hosts = Self {
            lan,
            servers,
            _directory: directory,
        };
        hosts.blockctl("cluster define c");
        hosts.blockctl("node define 10.1.0.2 --online");
        hosts.blockctl("node define 10.1.0.3 --online");
        hosts.wait("six addresses", || hosts.addresses().len() == 6);
        hosts
    }

    /// Runs `blockctl` on host 1.
    fn try_blockctl(&self, words: &str) -> Ran {
        let program = self.servers[0].program(&binary("blockctl"));
        let servers = "10.1.0.1,10.2.0.1";
        let words = ["--servers", servers].into_iter().chain(words.split(' '));
        let own = program.get_args().map(|word| word.to_str().unwrap());
        try_run(60, program.get_program(), own.chain(words))
    }

    fn blockctl(&self, words: &str) -> String {
        self.try_blockctl(words).ok().stdout
    }

    fn json(&self, words: &str) -> Value {
        serde_json::from_str(&self.blockctl(&format!("{words} --json"))).unwrap()
    }

    fn addresses(&self) -> Vec<String> {
        let tree = self.json("network tree");
        let subnets = tree.as_array().unwrap().iter();
        let subnets = subnets.flat_map(|network| network["subnetworks"].as_array().unwrap());
        let addresses = subnets.flat_map(|subnet| subnet["addresses"].as_array().unwrap());
        addresses
            .map(|address| address["address"].as_str().unwrap().to_owned())
            .collect()
    }

    /// The first address that each node tries of each other one.
    fn firsts(&self, service: &str) -> Vec<String> {
        let orders = self.json(&format!("network order {service}"));
        let nodes = orders.as_array().unwrap().iter();
        nodes
            .map(|node| node["addresses"][0]["address"].as_str().unwrap().to_owned())
            .collect()
    }

    fn wait(&self, what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < deadline, "{what}: not so in {PATIENCE:?}");
            sleep(Duration::from_millis(100));
        }
    }

    /// Bytes of all hosts on networks 1 and 2 while something is done.
    fn bytes_during(&self, work: impl FnOnce()) -> [u64; 2] {
        let now = || [1, 2].map(|n| (1..=3).map(|host| self.lan.bytes(host, n)).sum::<u64>());
        let before = now();
        work();
        let after = now();
        [after[0] - before[0], after[1] - before[1]]
    }

    /// Writes 32 MiB of pages that other servers own through server 1.
    fn write(&self, value: u8) {
        let uri = self.servers[0].socket();
        let mut connection = NbdConnection::unix(&uri, "v").unwrap();
        for at in 0..32 {
            let data = vec![value; MIB as usize];
            connection.write(at * MIB, &data).unwrap();
        }
    }
}

/// Further adapters on these networks; NBD on the unix socket only.
fn config(host: u8, networks: &[u8]) -> String {
    let adapters = networks.iter().map(|n| Lan::address(host, *n).to_string());
    let adapters: Vec<String> = adapters.collect();
    format!(
        "adapters = {adapters:?}\nnbd_listen = []\nlog_bytes = {}\n",
        64 * MIB
    )
}

/// S004-106, S004-107, S004-108: the objects have their fields, and what names no service, network or
/// prefix is refused with the names that there are.
#[test]
fn networks_subnetworks_and_addresses_have_their_fields() {
    let cluster = Cluster::three();
    let json = |words: &str| -> Value {
        serde_json::from_str(&cluster.blockctl(&format!("{words} --json"))).unwrap()
    };
    let deadline = Instant::now() + PATIENCE;
    let inside = loop {
        // Before the first address there is no such subnetwork.
        let shown = cluster
            .try_blockctl("subnet show 127.0.0.0/8 --json")
            .stdout;
        let shown: Value = serde_json::from_str(&shown).unwrap_or_default();
        match shown[0]["addresses"].as_array() {
            Some(inside) if inside.len() == 3 => break inside.clone(),
            _ => assert!(Instant::now() < deadline, "{shown}"),
        }
        sleep(Duration::from_millis(100));
    };
    for (address, server) in inside.iter().zip(&cluster.servers) {
        assert_eq!(address["address"], server.peer_address());
        assert_eq!(
            (&address["mask_bits"], &address["node"]),
            (&8.into(), &server.number.into())
        );
        assert_eq!(address["id"].as_str().unwrap().len(), 32);
    }
    cluster.blockctl("network define back --priority registry=3 --priority moves=never");
    cluster.blockctl("subnet define 192.168.55.0/24 --network back --name lab");
    let shown = json("subnet show lab");
    let fields = ["prefix", "name", "network"].map(|field| shown[0][field].as_str().unwrap());
    assert_eq!(fields, ["192.168.55.0/24", "lab", "back"]);
    let shown = json("network show back");
    let priorities = serde_json::json!({"registry": 3, "moves": "never"});
    assert_eq!(shown[0]["priorities"], priorities);
    assert!(shown[0]["id"].is_string() && shown[0]["subnetworks"][0]["id"].is_string());
    for (words, code, part) in [
        (
            "network define x --priority clients=1",
            2,
            "registry, administration",
        ),
        ("network define x --priority data=0", 2, "never"),
        ("network define back", 1, "exists"),
        ("network undefine back", 1, "lab"),
        ("network undefine x", 1, "no network x"),
        ("network show x", 1, "network tree"),
        (
            "subnet define 10.0.0.1/8 --network back",
            2,
            "192.168.55.0/24",
        ),
        (
            "subnet define 10.0.0.0/8 --network x",
            1,
            "network define x",
        ),
        ("subnet undefine 127.0.0.0/8", 1, "node 1"),
        (
            "network modify default --priority data=never",
            1,
            "no address left",
        ),
    ] {
        let ran = cluster.try_blockctl(words);
        assert_eq!(ran.code, Some(code), "{ran:?}");
        assert!(ran.stderr.contains(part), "{words}: {}", ran.stderr);
    }
    cluster.blockctl("subnet undefine lab");
    cluster.blockctl("network undefine back");
}

/// S004-102, S004-103, S004-110, S004-111: system traffic keeps to the network that is worth most to it,
/// and one command turns it all round, while servers and clients work.
#[test]
fn traffic_takes_the_network_that_is_worth_most() {
    let hosts = Hosts::start();
    hosts.blockctl("volume create v --size 32MiB --servers 2,3");
    hosts.blockctl("network define back --priority data=5 --priority registry=5");
    hosts.blockctl("subnet modify 10.2.0.0/24 --name rack --network back");
    assert!(
        hosts
            .firsts("data")
            .iter()
            .all(|first| first.starts_with("10.2."))
    );
    assert!(
        hosts
            .firsts("registry")
            .iter()
            .all(|first| first.starts_with("10.2."))
    );
    hosts.write(1);
    let [front, back] = hosts.bytes_during(|| hosts.write(2));
    assert!(back > 32 * MIB && front < MIB, "{front} and {back} bytes");
    // The registry is kept off network 1: what an idle cluster says is said on network 2.
    hosts.blockctl("network modify default --priority registry=never");
    let idle = || sleep(Duration::from_secs(3));
    hosts.wait("the registry on network 2", || {
        let [front, back] = hosts.bytes_during(idle);
        eprintln!("idle: {front} bytes on network 1, {back} on network 2");
        back > 4 * front
    });
    hosts.blockctl("network modify default --priority data=9 --priority registry=9");
    hosts.write(3);
    let [front, back] = hosts.bytes_during(|| hosts.write(4));
    assert!(front > 32 * MIB && back < MIB, "{front} and {back} bytes");
    let refused = hosts.try_blockctl("subnet undefine rack");
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert!(refused.stderr.contains("10.2.0.1"), "{refused:?}");
}

/// S004-110: the network that a service prefers is cut: the next one carries it until it is back, a
/// client sees no error, and a change of the configuration goes through.
#[test]
fn the_next_network_carries_what_the_first_lost() {
    let hosts = Hosts::start();
    hosts.blockctl("volume create v --size 32MiB --servers 2,3");
    hosts.blockctl(
        "network define back --priority registry=5 --priority data=5 --priority administration=5",
    );
    hosts.blockctl("subnet modify 10.2.0.0/24 --network back");
    hosts.write(1);
    (1..=3).for_each(|host| hosts.lan.cut(host, 2));
    let [front, _] = hosts.bytes_during(|| hosts.write(2));
    assert!(front > 32 * MIB, "{front} bytes");
    hosts.blockctl("volume create w --size 8MiB");
    let status = hosts.json("cluster status");
    assert_eq!(status["phase"], 2, "{status}");
    (1..=3).for_each(|host| hosts.lan.heal(host, 2));
    hosts.wait("back on network 2", || {
        let [front, back] = hosts.bytes_during(|| hosts.write(3));
        back > 32 * MIB && front < MIB
    });
    (1..=3).for_each(|host| hosts.lan.cut(host, 1));
    hosts.write(3);
    hosts.blockctl("volume create x --size 8MiB");
    let mut connection = NbdConnection::unix(&hosts.servers[0].socket(), "v").unwrap();
    let read = connection.read(5 * MIB, 4096).unwrap();
    assert_eq!(read, vec![3; 4096]);
}

/// S004-92, S004-105: an adapter that was added while the server was off is there after its start,
/// without a word to the cluster; one that was taken out is gone.
#[test]
fn a_new_adapter_is_found_at_the_start() {
    let mut hosts = Hosts::start();
    hosts.servers[2].stop();
    hosts.servers[2].config = config(3, &[3]);
    hosts.servers[2].start();
    hosts.wait("the new address", || {
        let all = hosts.addresses();
        all.contains(&"10.3.0.3:10808".to_owned()) && !all.contains(&"10.2.0.3:10808".to_owned())
    });
    let shown = hosts.json("subnet show 10.3.0.0/24");
    assert_eq!(shown[0]["network"], "default");
    assert_eq!(shown[0]["addresses"][0]["node"], 3);
    hosts.blockctl("volume create v --size 32MiB --servers 3");
    hosts.write(1);
}
