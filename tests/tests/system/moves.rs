//! Pages that move between servers under clients (S003-12, S003-18, S003-19, S003-34).

use super::chains::{Load, PAGE, PAGE_BLOCKS};
use blockd::admin::RouteInfo;
use blockd::id::NodeNo;
use blockd_tests::{
    Cluster, Content, MIB, NbdConnection, NbdError, Random, Register, Server, binary, run,
};
use serde_json::Value;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

/// Every page's owner, as a server shows it.
pub(crate) fn owners_of(cluster: &Cluster, index: usize, volume: &str) -> BTreeSet<NodeNo> {
    let route: RouteInfo = cluster.route(index, volume);
    route.runs.iter().map(|run| run.owner).collect()
}

pub(crate) fn move_all(cluster: &Cluster, volume: &str, to: u16) {
    cluster.blockctl(&format!("page move {volume} all --to {to} --rate 1GiB"));
    assert_eq!(owners_of(cluster, 0, volume), [NodeNo(to)].into());
}

/// Who reads and writes while pages move: each has a range of its own and checks every byte.
pub(crate) struct Clients {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Register>>,
    longest_us: Arc<AtomicU64>,
    pub(crate) requests: Arc<AtomicU64>,
}

impl Clients {
    /// One through each server.
    pub(crate) fn start(cluster: &Cluster, volume: &'static str, size_bytes: u64) -> Self {
        let all: Vec<usize> = (0..cluster.servers.len()).collect();
        Self::through(cluster, volume, size_bytes, &all)
    }

    pub(crate) fn through(
        cluster: &Cluster,
        volume: &'static str,
        size_bytes: u64,
        servers: &[usize],
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (longest_us, requests) = (Arc::default(), Arc::new(AtomicU64::new(0)));
        let share = size_bytes / servers.len() as u64 / 4096 * 4096;
        let threads = servers.iter().zip(0..).map(|(server, number)| {
            let client = Client {
                address: cluster.servers[*server].nbd_address(),
                volume,
                register: Register::new(number + 1, number * share, share),
                random: Random::new(number + 7),
                stop: Arc::clone(&stop),
                longest_us: Arc::clone(&longest_us),
                requests: Arc::clone(&requests),
            };
            spawn(move || client.run())
        });
        Self {
            threads: threads.collect(),
            stop,
            longest_us,
            requests,
        }
    }

    /// The longest time that a request took so far.
    pub(crate) fn longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.load(Ordering::Relaxed))
    }

    /// Fails if a client has.
    pub(crate) fn check_running(&self) {
        assert!(
            self.threads.iter().all(|thread| !thread.is_finished()),
            "a client failed"
        );
    }

    /// Stops them; what the volume must hold.
    pub(crate) fn finish(self) -> Vec<Register> {
        self.stop.store(true, Ordering::Relaxed);
        let threads = self.threads.into_iter();
        threads.map(|thread| thread.join().unwrap()).collect()
    }
}

struct Client {
    address: String,
    volume: &'static str,
    register: Register,
    random: Random,
    stop: Arc<AtomicBool>,
    longest_us: Arc<AtomicU64>,
    requests: Arc<AtomicU64>,
}

impl Client {
    fn run(mut self) -> Register {
        let mut connection = NbdConnection::tcp(&self.address, self.volume).unwrap();
        while !self.stop.load(Ordering::Relaxed) {
            let started = Instant::now();
            let done = self.request(&mut connection);
            let took = u64::try_from(started.elapsed().as_micros()).unwrap();
            self.longest_us.fetch_max(took, Ordering::Relaxed);
            self.requests.fetch_add(1, Ordering::Relaxed);
            done.unwrap_or_else(|error| panic!("{}: {error:?}", self.address));
        }
        self.register
    }

    fn request(&mut self, connection: &mut NbdConnection) -> Result<(), NbdError> {
        let blocks = [8, 64, 1024][self.random.index(3)];
        let (at, len) = self.register.pick(&mut self.random, blocks);
        match self.random.within(0..20) {
            0..=9 => {
                let (content, data) = self.register.data(at, len);
                connection.write(at, &data)?;
                self.register.acknowledge(at, len, content);
            }
            10 => {
                connection.trim(at, len)?;
                self.register.acknowledge(at, len, Content::Zeros);
            }
            11 => connection.flush()?,
            _ => {
                let found = connection.read(at, len)?;
                self.register.check(at, &found, &self.address);
            }
        }
        Ok(())
    }
}

/// What a volume holds, through every server.
pub(crate) fn check_everywhere(cluster: &Cluster, volume: &str, registers: &[Register]) {
    for (index, server) in cluster.servers.iter().enumerate() {
        if !server.is_running() {
            continue;
        }
        let mut connection = cluster.nbd(index, volume);
        for register in registers {
            let (start, mut at) = (register.start_bytes(), 0);
            while at < register.len_bytes() {
                let len = (register.len_bytes() - at).min(8 * MIB);
                let found = connection
                    .read(start + at, u32::try_from(len).unwrap())
                    .unwrap();
                register.check(start + at, &found, &format!("server {}", index + 1));
                at += len;
            }
        }
    }
}

/// Each server holds exactly the pages that the table gives to it (S003-19), once all is swept: by their
/// bytes, and page by page. The servers are dead afterwards.
pub(crate) fn check_one_owner(cluster: &mut Cluster, volume: &str, allocated: u64) {
    wait_swept(cluster, volume, allocated);
    let (route, wanted) = (cluster.route(0, volume), pages_with_data(cluster, volume));
    let id = cluster.show(volume).id.0;
    cluster.servers.iter_mut().for_each(Server::kill);
    let mut held = BTreeSet::new();
    for server in &cluster.servers {
        let pages = pages_in_store(server, id);
        let owner = NodeNo(u16::from(server.number));
        let owned = pages_of(&route, owner);
        let foreign: Vec<_> = pages.difference(&owned).collect();
        assert!(foreign.is_empty(), "server {owner} holds {foreign:?}");
        held.extend(pages);
    }
    let lost: Vec<_> = wanted.difference(&held).collect();
    assert!(lost.is_empty(), "no store holds {lost:?}");
}

/// The pages that a table gives to a server.
fn pages_of(route: &RouteInfo, owner: NodeNo) -> BTreeSet<u64> {
    let runs = route.runs.iter().filter(|run| run.owner == owner);
    runs.flat_map(|run| run.first_page..run.first_page + run.page_count)
        .map(u64::from)
        .collect()
}

/// The pages of which the volume shows anything but zeros.
fn pages_with_data(cluster: &Cluster, volume: &str) -> BTreeSet<u64> {
    let page_bytes = u64::from(cluster.route(0, volume).page_blocks) * 512;
    let mut connection = cluster.nbd(0, volume);
    let pages = 0..connection.size_bytes() / page_bytes;
    let len = u32::try_from(page_bytes).unwrap();
    let mut has_data = |page: &u64| {
        let found = connection.read(page * page_bytes, len).unwrap();
        found.iter().any(|byte| *byte != 0)
    };
    pages.filter(|page| has_data(page)).collect()
}

/// The pages of a volume in the store of a server that does not run, as the store itself lists them.
fn pages_in_store(server: &Server, volume: u64) -> BTreeSet<u64> {
    let state = server.state.to_str().unwrap();
    let exported = run(
        60,
        binary("blockd"),
        ["recover", "export", "--state", state],
    );
    let lines = exported
        .lines()
        .filter(|line| line.starts_with("{\"volume\""));
    let volumes = lines.map(|line| serde_json::from_str::<Value>(line).unwrap());
    let pages = volumes
        .filter(|found| found["volume"] == volume)
        .flat_map(|found| found["pages"].as_array().unwrap().clone());
    pages.map(|page| page[0].as_u64().unwrap()).collect()
}

fn wait_swept(cluster: &Cluster, volume: &str, allocated: u64) {
    let deadline = Instant::now() + Duration::from_secs(40);
    let mut found;
    loop {
        let nodes: Value = serde_json::from_str(&cluster.blockctl("node list --json")).unwrap();
        let held = nodes.as_array().unwrap().iter();
        found = held
            .map(|node| node["allocated_bytes"].as_u64().unwrap())
            .collect::<Vec<_>>();
        let owned = cluster.show(volume).allocated_bytes.unwrap();
        if found.iter().sum::<u64>() == owned && owned == allocated {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "held {found:?}, owned {owned}, should be {allocated}"
        );
        sleep(Duration::from_millis(200));
    }
}

/// S003-12, S003-19: all pages go round the servers while clients of every server read, write, trim
/// and flush: no error, no wrong byte; and nothing is left behind. How long the longest pause may be,
/// `scripts/bench.sh moves` judges.
#[test]
fn pages_go_round_under_clients_of_every_server() {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 96 * MIB, 8192, &[1]);
    let clients = Clients::start(&cluster, "v", 96 * MIB);
    let mut moves = 0;
    for round in 0..4 {
        for to in [2, 3, 1] {
            move_all(&cluster, "v", to);
            clients.check_running();
            moves += 1;
        }
        let half = format!("page move v 0-{} --to 2", 7 + round);
        cluster.blockctl(&half);
        assert_eq!(cluster.route(1, "v").runs.len(), 2);
    }
    let longest = clients.longest();
    let requests = clients.requests.load(Ordering::Relaxed);
    let registers = clients.finish();
    check_everywhere(&cluster, "v", &registers);
    let allocated = cluster.show("v").allocated_bytes.unwrap();
    check_one_owner(&mut cluster, "v", allocated);
    eprintln!("moves: {moves} of 24 pages under {requests} requests, longest pause {longest:?}");
}

/// S003-12: fio writes and verifies by crc32c while pages move there and back: no error.
#[test]
fn fio_verifies_while_pages_move() {
    let cluster = Cluster::three();
    cluster.create("v", 64 * MIB);
    let uri = format!("nbd://{}/v", cluster.servers[2].nbd_address());
    let directory = cluster.path("fio");
    std::fs::create_dir_all(&directory).unwrap();
    let fio = spawn(move || {
        let job = [
            "--name=v",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            "--rw=randrw",
            "--bs=4k-64k",
            "--iodepth=16",
            "--size=64m",
            "--io_size=4g",
            "--time_based",
            "--runtime=10",
            "--rate=16m",
            "--verify=crc32c",
            "--verify_backlog=64",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--fsync=50",
            "--output-format=json",
            "--output=out",
        ];
        let script = format!("cd {} && exec fio {}", directory.display(), job.join(" "));
        run(120, "sh", ["-c", &script]);
        std::fs::read_to_string(directory.join("out")).unwrap()
    });
    let mut moves = 0;
    while !fio.is_finished() {
        for to in [1, 2, 3] {
            move_all(&cluster, "v", to);
            moves += 1;
        }
    }
    let ran = fio.join().unwrap();
    let json = ran.find('{').map(|at| &ran[at..]).unwrap();
    let result: Value = serde_json::from_str(json).unwrap();
    let job = &result["jobs"][0];
    let longest_ms =
        ["read", "write"].map(|way| job[way]["clat_ns"]["max"].as_u64().unwrap() / 1_000_000);
    eprintln!(
        "moves: {moves} rounds under fio, errors {}, longest {longest_ms:?} ms",
        job["error"]
    );
    assert_eq!(job["error"], 0, "{job}");
    assert!(moves >= 3, "{moves}");
    assert!(longest_ms.iter().all(|ms| *ms < 1000), "{longest_ms:?}");
}

/// S003-34: snapshots of two volumes as one point in time while pages of both move: they hold what
/// they must, also afterwards on the new owners, and as qemu-img reads them.
#[test]
fn snapshots_and_moves_are_ordered() {
    let cluster = Cluster::three();
    cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    cluster.create_on("w", 64 * PAGE, PAGE_BLOCKS, &[]);
    let load = Load::start(&cluster, ["v", "w"]);
    let stop = Arc::new(AtomicBool::new(false));
    let mover = spawn({
        let (stop, servers) = (Arc::clone(&stop), cluster.server_list());
        move || {
            let mut moves = 0;
            while !stop.load(Ordering::Relaxed) {
                for (volume, to) in [("v", 1), ("w", 2), ("v", 3), ("w", 1), ("v", 2), ("w", 3)] {
                    let words = format!("--servers {servers} page move {volume} all --to {to}");
                    let blockctl = binary("blockctl").display().to_string();
                    run(60, &blockctl, words.split(' '));
                    moves += 1;
                }
            }
            moves
        }
    });
    let mut taken = 0;
    let mut marks = Vec::new();
    for number in 0..30 {
        let name = format!("s{number}");
        let before = load.marks();
        let targets = [format!("v@{name}"), format!("w@{name}")];
        let snapshot = cluster.snapshot_at(number % 3, &[&targets[0], &targets[1]]);
        let after = load.marks();
        if snapshot.is_ok() {
            load.check(&cluster, number % 3, &name, &before, &after);
            marks.push((name, before, after));
            taken += 1;
        }
        load.check_running();
    }
    stop.store(true, Ordering::Relaxed);
    let moves = mover.join().unwrap();
    for (name, before, after) in &marks {
        load.check(&cluster, 0, name, before, after);
    }
    load.finish();
    eprintln!("moves: {moves} during {taken} of 30 group snapshots");
    assert!(
        taken >= 25 && moves >= 6,
        "{taken} snapshots, {moves} moves"
    );
    let images: Vec<Vec<u8>> = (0..3)
        .map(|index| {
            let image = cluster.path(&format!("image{index}"));
            let uri = format!(
                "nbd://{}/v@{}",
                cluster.servers[index].nbd_address(),
                marks[3].0
            );
            let target = image.display().to_string();
            run(
                60,
                "qemu-img",
                ["convert", "-f", "raw", "-O", "raw", &uri, &target],
            );
            std::fs::read(image).unwrap()
        })
        .collect();
    assert!(images.windows(2).all(|pair| pair[0] == pair[1]));
}
