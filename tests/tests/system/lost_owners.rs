//! Owners that die, stop or fall silent under requests of other servers' clients.

use blockd::client::{Client, Volume};
use blockd_tests::{Cluster, MIB, NbdConnection, Random, Register};
use rustix::process::Signal;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
/// An NBD open waits this long at the most for an owner that says nothing (1 s) and for a
/// registry without its leader, plus what a loaded machine adds.
const OPENED_WITHIN: Duration = Duration::from_secs(8);

/// Ends the workers also when the test panics.
struct Stop(Arc<AtomicBool>);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn block(round: u8, write: u8) -> Vec<u8> {
    [round, write].repeat(BLOCK / 2)
}

/// Promise 1 (review e7): a client's connection is lost while its writes wait for a dead owner, it
/// sends them again over another one and overwrites them; the copies of the lost connection must
/// never be executed behind that.
#[test]
fn a_lost_connections_writes_never_overwrite_newer_ones() {
    stale_copies(64);
}

/// The same with more writes than a connection may have in flight (128): that it was lost must be
/// seen although none of its requests is answered and no further one is started.
#[test]
fn a_lost_connection_with_all_its_requests_in_flight_is_noticed() {
    stale_copies(150);
}

fn stale_copies(blocks: u64) {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 4 * MIB, 8192, &[2]);
    for round in 1..=8 {
        let mut first = cluster.nbd(0, "v");
        let mut second = cluster.nbd(0, "v");
        cluster.servers[1].kill();
        let old = block(round, 1);
        let at = |number: u64| number * BLOCK as u64;
        for number in 0..blocks {
            first.send_write(at(number), &old).unwrap();
        }
        // Waiting writes are tried every 20 ms: which connection's come first is left to chance.
        sleep(Duration::from_millis(100 + 7 * u64::from(round)));
        drop(first);
        let sender = std::thread::spawn(move || {
            let numbers = BTreeMap::from_iter((0..blocks).map(|number| {
                let cookie = second.send_write(at(number), &old).unwrap();
                (cookie, number)
            }));
            (second, numbers)
        });
        sleep(Duration::from_millis(100));
        cluster.servers[1].start();
        let (mut second, mut again) = sender.join().unwrap();
        let mut overwritten = BTreeSet::new();
        while overwritten.len() < again.len() {
            let cookie = second.next_reply().unwrap();
            if let Some(number) = again.get(&cookie) {
                second.send_write(at(*number), &block(round, 2)).unwrap();
            } else {
                assert!(overwritten.insert(cookie), "{cookie} answered twice");
            }
        }
        again.clear();
        check_newest(&mut second, round, blocks);
        sleep(Duration::from_millis(200));
        check_newest(&mut second, round, blocks);
    }
}

fn check_newest(connection: &mut NbdConnection, round: u8, blocks: u64) {
    let len = u32::try_from(blocks).unwrap() * BLOCK as u32;
    let found = connection.read(0, len).unwrap();
    let newest = block(round, 2);
    let old = found.chunks(BLOCK).filter(|found| *found != newest).count();
    assert_eq!(
        old, 0,
        "round {round}: of {blocks} blocks so many were overwritten by an older write"
    );
}

/// Review e5: an owner that is stopped cleanly and started again is a pause for users of the
/// library and for NBD clients of the other servers: no error, no wrong byte, no failed flush.
#[test]
fn a_clean_restart_of_an_owner_is_a_pause() {
    const REGION: u64 = MIB;
    let mut cluster = Cluster::three();
    let (random, seed) = Random::fresh();
    cluster.create_on("v", 6 * REGION, 64, &[]);
    let stop = Arc::new(AtomicBool::new(false));
    let stopper = Stop(Arc::clone(&stop));
    let requests = Arc::new(AtomicU64::new(0));
    let mut workers = vec![];
    for number in 0..6_u64 {
        let mut user: Box<dyn User> = match number {
            0 | 1 => Box::new(cluster.nbd(0, "v")),
            2 | 3 => Box::new(cluster.nbd(2, "v")),
            _ => Box::new(LibraryUser::new(&cluster, "v")),
        };
        let (stop, requests) = (Arc::clone(&stop), Arc::clone(&requests));
        let mut random = Random::new(seed ^ number);
        workers.push(std::thread::spawn(move || {
            let mut register = Register::new(number + 1, number * REGION, REGION);
            while !stop.load(Ordering::Relaxed) {
                use_once(user.as_mut(), &mut register, &mut random);
                requests.fetch_add(1, Ordering::Relaxed);
            }
            register
        }));
    }
    let mut random = random;
    for round in 0..8 {
        let before = requests.load(Ordering::Relaxed);
        sleep(Duration::from_millis(random.within(50..300)));
        let status = cluster.servers[1].stop();
        assert!(status.success(), "seed {seed}, round {round}: {status}");
        sleep(Duration::from_millis(random.within(0..300)));
        cluster.servers[1].start();
        let failed = workers.iter().any(std::thread::JoinHandle::is_finished);
        assert!(!failed, "seed {seed}, round {round}: a user saw an error");
        assert!(
            requests.load(Ordering::Relaxed) > before,
            "round {round}: no requests at all"
        );
    }
    sleep(Duration::from_millis(500));
    drop(stopper);
    for worker in workers {
        let register = worker.join().unwrap();
        let (at, len) = (register.start_bytes(), REGION as u32);
        for index in 0..3 {
            let found = cluster.nbd(index, "v").read(at, len).unwrap();
            register.check(at, &found, &format!("seed {seed}, server {index}"));
        }
    }
    let requests = requests.load(Ordering::Relaxed);
    eprintln!("clean restarts: seed {seed}, 8 restarts under {requests} requests");
}

/// What the test does with a volume, over whatever it is reached; any error is a panic.
trait User: Send {
    fn read(&mut self, offset: u64, len: u32) -> Vec<u8>;
    fn write(&mut self, offset: u64, data: Vec<u8>);
    fn flush(&mut self);
}

impl User for NbdConnection {
    fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        NbdConnection::read(self, offset, len).expect("NBD read")
    }
    fn write(&mut self, offset: u64, data: Vec<u8>) {
        NbdConnection::write(self, offset, &data).expect("NBD write");
    }
    fn flush(&mut self) {
        NbdConnection::flush(self).expect("NBD flush");
    }
}

struct LibraryUser {
    volume: Volume,
    handle: tokio::runtime::Handle,
    _client: Client,
}

impl LibraryUser {
    fn new(cluster: &Cluster, volume: &str) -> Self {
        let client = cluster.client_of(&[0, 1, 2]);
        Self {
            volume: cluster.block(client.open(volume)).unwrap(),
            handle: cluster.handle(),
            _client: client,
        }
    }
}

impl User for LibraryUser {
    fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        let found = self.handle.block_on(self.volume.read(offset, len));
        found.expect("library read").to_vec()
    }
    fn write(&mut self, offset: u64, data: Vec<u8>) {
        let written = self.handle.block_on(self.volume.write(offset, data.into()));
        written.expect("library write");
    }
    fn flush(&mut self) {
        let flushed = self.handle.block_on(self.volume.flush());
        flushed.expect("library flush");
    }
}

/// One random request; lengths reach over several pages of 32 KiB.
fn use_once(user: &mut dyn User, register: &mut Register, random: &mut Random) {
    let (at, len) = register.pick(random, [8, 200][random.clone().index(2)]);
    match random.within(0..8) {
        0 => user.flush(),
        1..=3 => register.check(at, &user.read(at, len), "a user"),
        _ => {
            let (content, data) = register.data(at, len);
            user.write(at, data);
            register.acknowledge(at, len, content);
        }
    }
}

/// Review e9: an owner that accepts connections and says nothing (SIGSTOP) does not keep clients
/// from opening the volume on the other servers and from using the pages of the others; its own
/// pages are served again when it goes on.
#[test]
fn a_silent_owner_does_not_prevent_opens() {
    let cluster = Cluster::three();
    cluster.create_on("v", 3 * MIB, 2048, &[]);
    let route = cluster.route(0, "v");
    for silent in 0..3 {
        let goes_on = Paused::new(&cluster, silent);
        for index in (0..3).filter(|index| *index != silent) {
            let started = Instant::now();
            let mut connection = cluster.nbd(index, "v");
            let took = started.elapsed();
            assert!(took < OPENED_WITHIN, "opened after {took:?}");
            for run in &route.runs {
                if usize::from(run.owner.0) != silent + 1 {
                    let at = u64::from(run.first_page) * MIB;
                    connection.write(at, &[index as u8; 4096]).unwrap();
                }
            }
        }
        drop(goes_on);
        let mut connection = cluster.nbd((silent + 1) % 3, "v");
        for run in &route.runs {
            let at = u64::from(run.first_page) * MIB;
            connection.write(at, &[9; 4096]).unwrap();
            assert_eq!(connection.read(at, 4096).unwrap(), [9; 4096]);
        }
        cluster.wait_writable();
    }
}

/// A server under SIGSTOP, until this is dropped.
struct Paused<'a>(&'a Cluster, usize);

impl<'a> Paused<'a> {
    fn new(cluster: &'a Cluster, index: usize) -> Self {
        cluster.servers[index].signal(Signal::STOP);
        Self(cluster, index)
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.servers[self.1].signal(Signal::CONT);
    }
}
