//! A counter over two volumes, under fio and page moves, during many group snapshots by each procedure
//! (S003-25, S003-34).

use super::chains::{PAGE, PAGE_BLOCKS, Place, Writer, write_chain};
use blockd::control::snapshot::Procedure;
use blockd_tests::{Chain, Cluster, Progress, Tag, binary, try_run};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// Snapshots by each procedure; more of them with this variable set.
const ROUNDS: u64 = 20;
const ROUNDS_VARIABLE: &str = "BLOCKD_SNAPSHOT_ROUNDS";
/// The page of the counter on each volume; the load writes the others.
const COUNTER_PAGE: u64 = 0;
const PAGES: u64 = 64;

fn rounds() -> u64 {
    let given = std::env::var(ROUNDS_VARIABLE).ok();
    given.map_or(ROUNDS, |text| text.parse().unwrap())
}

/// Where a counter writes to one volume.
pub(crate) enum Way {
    /// NBD through this server.
    Nbd(usize),
    /// A client library, one for both volumes.
    Library,
}

/// Writes 1 to the first volume and, once that is acknowledged, 1 to the second one, then 2.
pub(crate) struct Counter {
    pub(crate) progress: Arc<Progress>,
    pub(crate) thread: JoinHandle<()>,
}

type Write = Box<dyn FnMut(u64, Vec<u8>) + Send>;

impl Counter {
    pub(crate) fn start(
        cluster: &Cluster,
        block: u64,
        ways: [Way; 2],
        stop: &Arc<AtomicBool>,
    ) -> Self {
        let [a, b] = ways;
        let mut writes = [writer(cluster, "a", &a), writer(cluster, "b", &b)];
        let (progress, stop) = (Arc::new(Progress::default()), Arc::clone(stop));
        let count = Arc::clone(&progress);
        let thread = std::thread::spawn(move || {
            for number in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (place, value) = CHAIN.write(number);
                count.issue();
                writes[place](offset(block), Tag::block(value, 4096));
                count.acknowledge();
            }
        });
        Self { progress, thread }
    }
}

pub(crate) const CHAIN: Chain = Chain { places: 2 };

pub(crate) fn offset(block: u64) -> u64 {
    COUNTER_PAGE * PAGE + block * 4096
}

fn writer(cluster: &Cluster, volume: &'static str, way: &Way) -> Write {
    match way {
        Way::Nbd(server) => {
            let mut connection = cluster.nbd(*server, volume);
            Box::new(move |offset, data| connection.write(offset, &data).unwrap())
        }
        Way::Library => {
            let (opened, handle) = (cluster.open(volume), cluster.handle());
            Box::new(move |offset, data| {
                handle.block_on(opened.write(offset, data.into())).unwrap();
            })
        }
    }
}

/// Random writes to the other pages of a volume, through one server.
struct Fio(Child);

impl Fio {
    fn start(cluster: &Cluster, server: usize, volume: &str) -> Self {
        let uri = &cluster.servers[server].uris(volume)[0];
        let (from, size) = ((COUNTER_PAGE + 1) * PAGE, (PAGES - COUNTER_PAGE - 1) * PAGE);
        // It dies with this test: nobody else would end it.
        let mut fio = Command::new("setpriv");
        fio.args([
            "--pdeathsig=KILL",
            "fio",
            "--thread",
            "--name=load",
            "--ioengine=nbd",
            "--rw=randwrite",
            "--bs=4k",
            "--iodepth=8",
        ]);
        fio.args(["--time_based", "--runtime=3600", "--rate_iops=800"]);
        fio.arg(format!("--uri={uri}"));
        fio.arg(format!("--offset={from}"))
            .arg(format!("--size={size}"));
        fio.current_dir(cluster.directory());
        Self(
            fio.stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap(),
        )
    }

    fn check_running(&mut self) {
        assert_eq!(self.0.try_wait().unwrap(), None, "fio has ended");
    }
}

impl Drop for Fio {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// Moves the first pages of both volumes, those of the counters among them, round the servers.
struct Mover {
    thread: JoinHandle<u64>,
}

impl Mover {
    fn start(cluster: &Cluster, stop: &Arc<AtomicBool>) -> Self {
        let (servers, stop) = (cluster.server_list(), Arc::clone(stop));
        let thread = std::thread::spawn(move || {
            for moved in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return moved;
                }
                let (volume, to) = (["a", "b"][usize::from(moved % 2 == 1)], 1 + (moved / 2) % 3);
                let words = format!("--servers {servers} page move {volume} 0-7 --to {to}");
                let ran = try_run(120, binary("blockctl"), words.split(' '));
                let is_there = ran.stderr.contains("nothing to move");
                assert!(ran.code == Some(0) || is_there, "{ran:?}");
            }
            unreachable!()
        });
        Self { thread }
    }
}

/// A snapshot of both; the epochs of moving pages may make it begin anew (S003-34).
fn snapshot(cluster: &Cluster, server: usize, procedure: Procedure) -> u32 {
    for refused in 0..20 {
        match cluster.snapshot_by(server, &["a@s", "b@s"], procedure) {
            Ok(_) => return refused,
            Err(error) => assert!(error.to_string().contains("again"), "{error}"),
        }
    }
    panic!("no snapshot by {procedure} in 20 tries");
}

/// The volumes have their counters on different owners.
pub(crate) fn cluster() -> Cluster {
    let cluster = Cluster::three();
    cluster.create_on("a", PAGES * PAGE, PAGE_BLOCKS, &[1, 2]);
    cluster.create_on("b", PAGES * PAGE, PAGE_BLOCKS, &[3]);
    cluster
}

/// S003-25, 29, promise 4: however the counter reaches the two volumes, no snapshot of the group has
/// its second volume ahead of the first one, nor lacks what was acknowledged before the command.
fn never_is_b_ahead_of_a(procedure: Procedure, ways: Vec<[Way; 2]>) {
    let cluster = cluster();
    let stop = Arc::new(AtomicBool::new(false));
    let ways = (0..).zip(ways);
    let counters = ways.map(|(block, ways)| Counter::start(&cluster, block, ways, &stop));
    let counters: Vec<Counter> = counters.collect();
    let mut load = [Fio::start(&cluster, 1, "a"), Fio::start(&cluster, 0, "b")];
    let mover = Mover::start(&cluster, &stop);
    let (mut refused, mut ahead) = (0, i64::MIN);
    for round in 0..rounds() {
        let server = usize::try_from(round % 3).unwrap();
        let before: Vec<u64> = counters.iter().map(|c| c.progress.acknowledged()).collect();
        refused += snapshot(&cluster, server, procedure);
        let after: Vec<u64> = counters.iter().map(|c| c.progress.issued()).collect();
        let mut views = ["a@s", "b@s"].map(|name| cluster.nbd((server + 1) % 3, name));
        for (number, block) in (0..counters.len()).zip(0..) {
            let values = views.each_mut().map(|view| {
                let data = view.read(offset(block), 4096).unwrap();
                Tag::read(&data).unwrap()
            });
            let checked = CHAIN.check(&values, before[number], after[number]);
            checked.unwrap_or_else(|error| panic!("round {round}, counter {number}: {error}"));
            ahead = ahead.max(values[1].cast_signed() - values[0].cast_signed());
        }
        drop(views);
        cluster.delete_snapshot("a@s");
        cluster.delete_snapshot("b@s");
        load.iter_mut().for_each(Fio::check_running);
        assert!(counters.iter().all(|counter| !counter.thread.is_finished()));
        assert!(!mover.thread.is_finished(), "the mover has failed");
    }
    stop.store(true, Ordering::Relaxed);
    let total: u64 = counters.iter().map(|c| c.progress.acknowledged()).sum();
    let moved = mover.thread.join().unwrap();
    assert!(
        moved > 0 && ahead <= 0,
        "{moved} moves, B ahead of A by {ahead}"
    );
    eprintln!(
        "{procedure}: {} snapshots ({refused} begun anew) under {total} dependent writes and {moved} \
         moves; B - A at most {ahead}",
        rounds()
    );
    counters
        .into_iter()
        .for_each(|counter| counter.thread.join().unwrap());
}

/// S003-25, S003-29: a group of three volumes, each with another owner and written through another server: a
/// counter that goes from A over B to C is in order in every snapshot of the group, by each procedure.
#[test]
fn a_counter_over_three_volumes_is_in_order_in_every_snapshot() {
    let cluster = Cluster::three();
    let volumes = ["a", "b", "c"];
    for (volume, owner) in volumes.into_iter().zip(1..) {
        cluster.create_on(volume, PAGES * PAGE, PAGE_BLOCKS, &[owner]);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let places = |block: u64, server: fn(usize) -> usize| {
        let place = |(step, volume)| Place {
            volume,
            offset: offset(block),
            server: server(step),
        };
        volumes.into_iter().enumerate().map(place).collect()
    };
    let ways: [fn(usize) -> usize; 3] = [|step| step, |step| (step + 1) % 3, |_| 0];
    let start = |(block, way)| write_chain(&cluster, places(block, way), &stop);
    let writers: Vec<Writer> = (0..).zip(ways).map(start).collect();
    let by_stamp = &writers[2..];
    for procedure in [Procedure::Barrier, Procedure::Hold, Procedure::Stamp] {
        // U-07: stamps are carried over one server.
        let judged = match procedure {
            Procedure::Stamp => by_stamp,
            _ => &writers,
        };
        (0..rounds()).for_each(|round| check_group(&cluster, procedure, round, judged));
    }
    assert!(writers.iter().all(Writer::is_running));
    stop.store(true, Ordering::Relaxed);
    let written = writers.iter().map(|writer| writer.progress.acknowledged());
    eprintln!("three volumes: {} dependent writes", written.sum::<u64>());
    writers.into_iter().for_each(Writer::join);
}

/// One snapshot of the three volumes, which holds the first writes of each chain and no others.
fn check_group(cluster: &Cluster, procedure: Procedure, round: u64, writers: &[Writer]) {
    let server = usize::try_from(round % 3).unwrap();
    let before: Vec<u64> = writers.iter().map(|w| w.progress.acknowledged()).collect();
    let targets = ["a@s", "b@s", "c@s"];
    cluster.snapshot_by(server, &targets, procedure).unwrap();
    let after: Vec<u64> = writers.iter().map(|w| w.progress.issued()).collect();
    let mut views = targets.map(|name| cluster.nbd((server + 1) % 3, name));
    for (number, writer) in writers.iter().enumerate() {
        let at = writer.places[0].offset;
        let values = views.each_mut().map(|view| {
            let data = view.read(at, 4096).unwrap();
            Tag::read(&data).unwrap()
        });
        let chain = Chain { places: 3 };
        let checked = chain.check(&values, before[number], after[number]);
        checked.unwrap_or_else(|error| panic!("{procedure}, round {round}: {error}"));
    }
    drop(views);
    targets
        .iter()
        .for_each(|name| cluster.delete_snapshot(name));
}

/// All ways from one volume to the other that there are: two servers, two connections of one
/// server, the client library, and between them.
fn all_ways() -> Vec<[Way; 2]> {
    vec![
        [Way::Nbd(0), Way::Nbd(1)],
        [Way::Nbd(2), Way::Nbd(0)],
        [Way::Nbd(1), Way::Library],
        [Way::Library, Way::Nbd(2)],
        [Way::Library, Way::Library],
    ]
}

#[test]
fn a_counter_is_in_order_in_every_snapshot_by_barrier() {
    never_is_b_ahead_of_a(Procedure::Barrier, all_ways());
}

#[test]
fn a_counter_is_in_order_in_every_snapshot_by_hold() {
    never_is_b_ahead_of_a(Procedure::Hold, all_ways());
}

/// U-07: where the clock is carried, which is over one server or one client.
#[test]
fn a_counter_is_in_order_in_every_snapshot_by_stamp() {
    let ways = vec![
        [Way::Nbd(0), Way::Nbd(0)],
        [Way::Nbd(1), Way::Nbd(1)],
        [Way::Nbd(2), Way::Nbd(2)],
        [Way::Library, Way::Library],
    ];
    never_is_b_ahead_of_a(Procedure::Stamp, ways);
}
