//! kill -9 of any server in the middle of IO, again and again ("Done when" 4, promises 1 to 3).

use blockd::client::{Client, ClientOptions, Volume};
use blockd_tests::{Cluster, Content, MIB, NbdConnection, NbdError, Random, Register, Server};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

const KILLS: u32 = 60;
const WORKERS: u64 = 6;
const REGION: u64 = MIB;
const PAGE_BLOCKS: u32 = 256;
/// An IO of a library user may be slow, but never this slow, while servers restart at once.
const IO_MAX: Duration = Duration::from_secs(30);

#[derive(Default)]
struct Counts {
    reads: AtomicU64,
    changes: AtomicU64,
    flushes: AtomicU64,
    nbd_requests: AtomicU64,
    nbd_reconnects: AtomicU64,
    longest_ms: AtomicU64,
}

/// Ends the workers also when the test panics.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// at least 50 random kills of any of three servers: users of the client library see no error
/// and no wrong byte, NBD clients reconnect and find all that was acknowledged, snapshots stay.
#[test]
fn sixty_kills_of_any_server() {
    let mut cluster = Cluster::three();
    let (mut random, seed) = Random::fresh();
    cluster.create_on("v", (WORKERS + 3) * REGION, PAGE_BLOCKS, &[]);
    let counts = Arc::new(Counts::default());
    let stop = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (0..WORKERS)
        .map(|number| {
            let client = cluster.client_of(&[0, 1, 2]);
            let (counts, stop) = (Arc::clone(&counts), Arc::clone(&stop));
            let worker = library_user(client, number, seed, counts, stop);
            cluster.handle().spawn(worker)
        })
        .collect();
    let nbd_workers: Vec<_> = (0..3)
        .map(|index| {
            let address = cluster.servers[index].nbd_address();
            let (counts, stop) = (Arc::clone(&counts), Arc::clone(&stop));
            std::thread::spawn(move || nbd_user(&address, index as u64, seed, &counts, &stop))
        })
        .collect();
    let stopper = Stop(Arc::clone(&stop));
    let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
    let mut refused = 0;
    for kill in 0..KILLS {
        kill_and_restart(&mut cluster, &mut random);
        if kill % 6 == 5 {
            let target = format!("v@s{kill}");
            match cluster.snapshot_at(random.index(3), &[&target]) {
                Ok(_) => snapshots.push((target.clone(), image(&cluster, &target))),
                Err(error) => {
                    refused += 1;
                    eprintln!("snapshot {target}: {error}");
                }
            }
        }
        let failed = workers.iter().any(|worker| worker.is_finished())
            || nbd_workers.iter().any(|worker| worker.is_finished());
        assert!(
            !failed,
            "seed {seed}: a worker has ended after {} kills",
            kill + 1
        );
    }
    drop(stopper);
    let registers: Vec<Register> = workers
        .into_iter()
        .map(|worker| cluster.block(worker).unwrap())
        .collect();
    let nbd_registers: Vec<Register> = nbd_workers
        .into_iter()
        .map(|worker| worker.join().unwrap())
        .collect();
    check_everything(&mut cluster, &registers, &nbd_registers, &snapshots);
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    eprintln!(
        "crash: seed {seed}, {KILLS} kills, {} reads and {} changes and {} flushes by the library \
         (longest {} ms), {} NBD requests with {} reconnects, {} snapshots intact, {refused} refused",
        count(&counts.reads),
        count(&counts.changes),
        count(&counts.flushes),
        count(&counts.longest_ms),
        count(&counts.nbd_requests),
        count(&counts.nbd_reconnects),
        snapshots.len(),
    );
    assert!(
        snapshots.len() >= 3,
        "only {} snapshots were taken",
        snapshots.len()
    );
    assert!(
        count(&counts.nbd_reconnects) >= 10,
        "the kills did not reach the NBD clients"
    );
}

/// kill -9 at a random time; now and then again while the server recovers, or two at a time.
fn kill_and_restart(cluster: &mut Cluster, random: &mut Random) {
    let victim = random.index(3);
    cluster.servers[victim].kill();
    let second = random.one_in(6).then(|| (victim + 1) % 3);
    if let Some(second) = second {
        cluster.servers[second].kill();
    }
    if random.one_in(3) {
        sleep(Duration::from_millis(random.within(0..300)));
    }
    if random.one_in(4) {
        cluster.servers[victim].spawn();
        sleep(Duration::from_millis(random.within(0..60)));
        cluster.servers[victim].kill();
    }
    for index in std::iter::once(victim).chain(second) {
        cluster.servers[index].start();
    }
    sleep(Duration::from_millis(random.within(0..250)));
}

/// Random reads, writes, zeroes and flushes of one region; any error or wrong byte is a panic.
async fn library_user(
    client: Client,
    number: u64,
    seed: u64,
    counts: Arc<Counts>,
    stop: Arc<AtomicBool>,
) -> Register {
    let volume = client.open("v").await.unwrap();
    let mut random = Random::new(seed ^ number);
    let mut register = Register::new(number + 1, number * REGION, REGION);
    while !stop.load(Ordering::Relaxed) {
        let longest = if random.one_in(8) { 700 } else { 24 };
        let (at, len) = register.pick(&mut random, longest);
        let started = Instant::now();
        match random.within(0..10) {
            0..4 => {
                let found = volume.read(at, len).await.unwrap();
                register.check(at, &found, "library user");
                counts.reads.fetch_add(1, Ordering::Relaxed);
            }
            4..8 => {
                let (content, data) = register.data(at, len);
                volume.write(at, data.into()).await.unwrap();
                register.acknowledge(at, len, content);
                counts.changes.fetch_add(1, Ordering::Relaxed);
            }
            8 => {
                volume
                    .zero(at, u64::from(len), random.one_in(2))
                    .await
                    .unwrap();
                register.acknowledge(at, len, Content::Zeros);
                counts.changes.fetch_add(1, Ordering::Relaxed);
            }
            _ => {
                volume.flush().await.unwrap();
                counts.flushes.fetch_add(1, Ordering::Relaxed);
            }
        }
        let took = started.elapsed();
        assert!(took < IO_MAX, "one request took {took:?}");
        let took_ms = u64::try_from(took.as_millis()).unwrap();
        counts.longest_ms.fetch_max(took_ms, Ordering::Relaxed);
    }
    register
}

/// A stock NBD client of one server: it reconnects, and repeats what was not acknowledged.
fn nbd_user(address: &str, number: u64, seed: u64, counts: &Counts, stop: &AtomicBool) -> Register {
    let mut random = Random::new(seed ^ (100 + number));
    let mut register = Register::new(100 + number, (WORKERS + number) * REGION, REGION);
    let mut connection = connect(address, stop).unwrap();
    let mut unanswered: Option<(u64, u32, Content, Vec<u8>)> = None;
    while !stop.load(Ordering::Relaxed) || unanswered.is_some() {
        let write = unanswered.take().unwrap_or_else(|| {
            let (at, len) = register.pick(&mut random, 64);
            let (content, data) = register.data(at, len);
            (at, len, content, data)
        });
        match nbd_round(&mut connection, &mut register, &write, random.within(0..4)) {
            Ok(()) => {
                counts.nbd_requests.fetch_add(2, Ordering::Relaxed);
            }
            Err(NbdError::Errno(errno)) => panic!("{address}: errno {errno} for a good request"),
            Err(NbdError::Lost(_)) => {
                counts.nbd_reconnects.fetch_add(1, Ordering::Relaxed);
                unanswered = Some(write);
                let Some(again) = connect(address, &AtomicBool::new(false)) else {
                    break;
                };
                connection = again;
            }
        }
    }
    register
}

fn nbd_round(
    connection: &mut NbdConnection,
    register: &mut Register,
    write: &(u64, u32, Content, Vec<u8>),
    kind: u64,
) -> Result<(), NbdError> {
    let (at, len, content, data) = write;
    match kind {
        0 => connection.write_fua(*at, data)?,
        _ => connection.write(*at, data)?,
    }
    register.acknowledge(*at, *len, *content);
    if kind == 1 {
        connection.flush()?;
    }
    let start = register.start_bytes();
    let found = connection.read(start, 64 << 10)?;
    register.check(start, &found, "NBD client");
    Ok(())
}

fn connect(address: &str, stop: &AtomicBool) -> Option<NbdConnection> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match NbdConnection::tcp(address, "v") {
            Ok(connection) => return Some(connection),
            Err(error) if Instant::now() > deadline => panic!("{address} stays away: {error:?}"),
            Err(_) if stop.load(Ordering::Relaxed) => return None,
            Err(_) => sleep(Duration::from_millis(10)),
        }
    }
}

fn image(cluster: &Cluster, name: &str) -> Vec<u8> {
    let volume = cluster.open(name);
    read_all(cluster, &volume)
}

fn read_all(cluster: &Cluster, volume: &Volume) -> Vec<u8> {
    let len = u32::try_from(volume.size_bytes()).unwrap();
    cluster.block(volume.read(0, len)).unwrap().to_vec()
}

/// After one more kill of every server at once: all data and all snapshots, through every server.
fn check_everything(
    cluster: &mut Cluster,
    registers: &[Register],
    nbd_registers: &[Register],
    snapshots: &[(String, Vec<u8>)],
) {
    cluster.servers.iter_mut().for_each(Server::kill);
    cluster.servers.iter_mut().for_each(Server::start);
    cluster.wait_writable();
    for index in 0..3 {
        let mut connection = cluster.nbd(index, "v");
        for register in registers.iter().chain(nbd_registers) {
            let len = u32::try_from(register.len_bytes()).unwrap();
            let found = connection.read(register.start_bytes(), len).unwrap();
            register.check(register.start_bytes(), &found, "at the end");
        }
        for (name, before) in snapshots {
            let mut connection = cluster.nbd(index, name);
            let len = u32::try_from(connection.size_bytes()).unwrap();
            assert!(
                connection.read(0, len).unwrap() == *before,
                "{name} has changed"
            );
        }
    }
    let listed: Vec<String> = cluster
        .snapshots("v")
        .iter()
        .map(|info| format!("v@{}", info.name))
        .collect();
    for (name, _) in snapshots {
        assert!(listed.contains(name), "{name} is not listed: {listed:?}");
    }
    for name in &listed {
        assert_eq!(image(cluster, name).len() as u64, (WORKERS + 3) * REGION);
    }
}

/// A server that does not answer (SIGSTOP) is a pause for a user of the library, too.
#[test]
fn a_stopped_server_is_a_pause() {
    let cluster = Cluster::three();
    cluster.create_on("v", 6 * MIB, PAGE_BLOCKS, &[]);
    let options = ClientOptions {
        io_deadline: Duration::from_secs(60),
        ..ClientOptions::default()
    };
    let client = cluster.client_with(&[0, 1, 2], options);
    let volume = cluster.block(client.open("v")).unwrap();
    let data = bytes::Bytes::from(Random::new(4).bytes(6 << 20));
    for victim in &cluster.servers {
        victim.signal(rustix::process::Signal::STOP);
        let write = cluster.handle().spawn({
            let (volume, data) = (volume.clone(), data.clone());
            async move { volume.write(0, data).await }
        });
        sleep(Duration::from_millis(400));
        assert!(
            !write.is_finished(),
            "a write over all owners ended without one of them"
        );
        victim.signal(rustix::process::Signal::CONT);
        cluster.block(write).unwrap().unwrap();
        cluster.block(volume.flush()).unwrap();
        assert!(read_all(&cluster, &volume) == data);
    }
}
