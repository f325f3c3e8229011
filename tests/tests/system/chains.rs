//! Writers whose writes depend on each other, and what their snapshots must hold (S003-25, 33).

use blockd::client::{ClientError, Volume};
use blockd_tests::{Chain, Cluster, NbdConnection, NbdError, Progress, Tag};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

/// Bytes of a page in these tests (64 blocks): pages of all servers lie close together.
pub(crate) const PAGE: u64 = 32 << 10;
pub(crate) const PAGE_BLOCKS: u32 = 64;
const BLOCK: usize = 4096;

/// Where the steps of a chain go: volume, byte, and the server that is asked.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) volume: &'static str,
    pub(crate) offset: u64,
    pub(crate) server: usize,
}

/// A chain being written.
pub(crate) struct Writer {
    pub(crate) places: Vec<Place>,
    pub(crate) progress: Arc<Progress>,
    thread: JoinHandle<()>,
}

/// Pairs of blocks on both sides of a page boundary, written with one request each.
pub(crate) struct Spanner {
    pub(crate) volume: &'static str,
    pub(crate) offset: u64,
    pub(crate) progress: Arc<Progress>,
    thread: JoinHandle<()>,
}

/// One NBD connection that is made again when its server died.
struct Patient {
    address: String,
    volume: &'static str,
    connection: Option<NbdConnection>,
}

impl Patient {
    fn new(cluster: &Cluster, server: usize, volume: &'static str) -> Self {
        Self {
            address: cluster.servers[server].nbd_address(),
            volume,
            connection: None,
        }
    }

    /// Writes until it is acknowledged; the same bytes each time.
    fn write(&mut self, offset: u64, data: &[u8]) {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            match self.try_write(offset, data) {
                Ok(()) => return,
                Err(NbdError::Errno(errno)) => panic!("{}: errno {errno}", self.address),
                Err(NbdError::Lost(error)) => {
                    assert!(
                        Instant::now() < deadline,
                        "{} stays away: {error}",
                        self.address
                    );
                    self.connection = None;
                    sleep(Duration::from_millis(10));
                }
            }
        }
    }

    fn try_write(&mut self, offset: u64, data: &[u8]) -> Result<(), NbdError> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(NbdConnection::tcp(&self.address, self.volume)?),
        };
        connection.write(offset, data)
    }
}

/// Writes a chain, each place through its server's NBD, until told to stop.
pub(crate) fn write_chain(cluster: &Cluster, places: Vec<Place>, stop: &Arc<AtomicBool>) -> Writer {
    let progress = Arc::new(Progress::default());
    let mut connections: Vec<Patient> = places
        .iter()
        .map(|place| Patient::new(cluster, place.server, place.volume))
        .collect();
    let thread = std::thread::spawn({
        let (places, progress, stop) = (places.clone(), Arc::clone(&progress), Arc::clone(stop));
        move || {
            let chain = Chain {
                places: places.len() as u64,
            };
            for number in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let (place, value) = chain.write(number);
                progress.issue();
                connections[place].write(places[place].offset, &Tag::block(value, BLOCK));
                progress.acknowledge();
            }
        }
    });
    Writer {
        places,
        progress,
        thread,
    }
}

/// Writes pairs across a page boundary through the server's NBD, or through the client library.
pub(crate) fn write_spans(
    cluster: &Cluster,
    volume: &'static str,
    boundary: u64,
    through: Option<usize>,
    stop: &Arc<AtomicBool>,
) -> Spanner {
    let progress = Arc::new(Progress::default());
    let offset = boundary - BLOCK as u64;
    let mut write: Box<dyn FnMut(Vec<u8>) + Send> = match through {
        Some(server) => {
            let mut connection = Patient::new(cluster, server, volume);
            Box::new(move |data| connection.write(offset, &data))
        }
        None => {
            let (opened, handle) = (cluster.open(volume), cluster.handle());
            Box::new(move |data| library_write(&handle, &opened, offset, data).unwrap())
        }
    };
    let thread = std::thread::spawn({
        let (progress, stop) = (Arc::clone(&progress), Arc::clone(stop));
        move || {
            for value in 1.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                progress.issue();
                write(Tag::block(value, 2 * BLOCK));
                progress.acknowledge();
            }
        }
    });
    Spanner {
        volume,
        offset,
        progress,
        thread,
    }
}

fn library_write(
    handle: &tokio::runtime::Handle,
    volume: &Volume,
    offset: u64,
    data: Vec<u8>,
) -> Result<(), ClientError> {
    handle.block_on(volume.write(offset, data.into()))
}

impl Writer {
    pub(crate) fn join(self) {
        self.thread.join().unwrap();
    }

    pub(crate) fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }
}

impl Spanner {
    pub(crate) fn join(self) {
        self.thread.join().unwrap();
    }

    pub(crate) fn is_running(&self) -> bool {
        !self.thread.is_finished()
    }
}

/// The writers of a test and how far they were at some moment.
pub(crate) struct Load {
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) writers: Vec<Writer>,
    pub(crate) spanners: Vec<Spanner>,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Load {
    /// Chains over all servers and both volumes, each place through another server, and spans over
    /// pages of different owners.
    pub(crate) fn start(cluster: &Cluster, volumes: [&'static str; 2]) -> Self {
        Self::start_through(cluster, volumes, |lane, step| lane + step)
    }

    /// As [`Self::start`], but each chain goes through one server, over several connections.
    pub(crate) fn start_each_through_one(cluster: &Cluster, volumes: [&'static str; 2]) -> Self {
        Self::start_through(cluster, volumes, |lane, _| lane)
    }

    /// `entry` is the number of the server, modulo 3, for a lane and a step.
    fn start_through(
        cluster: &Cluster,
        volumes: [&'static str; 2],
        entry: impl Fn(u64, u64) -> u64,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let place = |volume, page: u64, block: u64, server| Place {
            volume,
            offset: page * PAGE + block * BLOCK as u64,
            server,
        };
        let [v, w] = volumes;
        let chains = (0..4_u64).map(|lane| {
            let server = |step: u64| usize::try_from(entry(lane, step) % 3).unwrap();
            let places = vec![
                place(v, lane, 2, server(0)),
                place(v, lane + 1, 3, server(1)),
                place(w, lane + 2, 4, server(2)),
                place(v, lane + 3, 5, server(1)),
                place(w, lane + 3, 6, server(0)),
            ];
            write_chain(cluster, places, &stop)
        });
        let writers = chains.collect();
        let spans = [(v, Some(0)), (w, Some(1)), (v, Some(2)), (w, None)];
        let spanners = (20..).zip(spans).map(|(page, (volume, through))| {
            write_spans(cluster, volume, page * PAGE, through, &stop)
        });
        let spanners = spanners.collect();
        Self {
            stop,
            writers,
            spanners,
        }
    }

    /// Waits until each spanner has had another write acknowledged. The entry server of one may have died
    /// half-way in a write, which nobody completes before its client has sent it again.
    pub(crate) fn await_spans(&self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        for spanner in &self.spanners {
            let before = spanner.progress.acknowledged();
            while spanner.progress.acknowledged() == before {
                assert!(Instant::now() < deadline, "no write over two pages ends");
                sleep(Duration::from_millis(1));
            }
        }
    }

    /// Acknowledged and issued writes of each writer, then of each spanner.
    pub(crate) fn marks(&self) -> Vec<(u64, u64)> {
        let writers = self.writers.iter().map(|writer| &writer.progress);
        let all = writers.chain(self.spanners.iter().map(|spanner| &spanner.progress));
        all.map(|progress| (progress.acknowledged(), progress.issued()))
            .collect()
    }

    pub(crate) fn check_running(&self) {
        assert!(
            self.writers.iter().all(Writer::is_running),
            "a chain's writer has ended"
        );
        assert!(
            self.spanners.iter().all(Spanner::is_running),
            "a spanning writer has ended"
        );
    }

    /// Checks `@SNAP` of both volumes through one server against the marks before the command and
    /// after the completion (S003-25, S003-33).
    pub(crate) fn check(
        &self,
        cluster: &Cluster,
        server: usize,
        snapshot: &str,
        before: &[(u64, u64)],
        after: &[(u64, u64)],
    ) {
        let read = |volume: &str, offset, len| {
            let mut connection = cluster.nbd(server, &format!("{volume}@{snapshot}"));
            connection.read(offset, len).unwrap()
        };
        for (number, writer) in self.writers.iter().enumerate() {
            let values: Vec<u64> = writer
                .places
                .iter()
                .map(|place| Tag::read(&read(place.volume, place.offset, 4096)).unwrap())
                .collect();
            let chain = Chain {
                places: values.len() as u64,
            };
            let checked = chain.check(&values, before[number].0, after[number].1);
            checked.unwrap_or_else(|error| panic!("{snapshot}, chain {number}: {error}"));
        }
        for (number, spanner) in self.spanners.iter().enumerate() {
            let data = read(spanner.volume, spanner.offset, 8192);
            let found = Tag::read(&data);
            let (left, right) = (&data[..8], &data[4096..4104]);
            let value = found.unwrap_or_else(|| {
                panic!("{snapshot}, span {number} is torn: {left:?} and {right:?}")
            });
            let mark = self.writers.len() + number;
            let allowed = before[mark].0..=after[mark].1;
            assert!(
                allowed.contains(&value),
                "{snapshot}, span {number}: {value}, {allowed:?}"
            );
        }
    }

    /// Stops the writers and fails if one of them failed.
    pub(crate) fn finish(mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.writers.drain(..).for_each(Writer::join);
        self.spanners.drain(..).for_each(Spanner::join);
    }
}
