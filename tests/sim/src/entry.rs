//! Clients that go through one server, as NBD clients do: the server forwards what it does not own.
//!
//! A connection lives in the tasks of its server and dies with it. What was under way then has an
//! unknown outcome, and the client goes on through another server. Nobody sends anything again.

use crate::trace;
use crate::workload::VOLUMES;
use crate::world::{SERVERS, World};
use blockd::data::error::DataError;
use blockd::data::page_store::ReadPart;
use blockd::data::volume::Volume;
use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio::time::sleep;

/// What a client asks of its server.
pub(crate) enum Request {
    Read(u64, u32),
    Write(u64, Bytes, bool),
    Zero(u64, u64, bool),
    Flush,
}

/// The answer, and for whom a flush answers: see [`Connection::client`].
struct Reply {
    client: usize,
    result: Result<Vec<u8>, DataError>,
}

type Job = (Request, oneshot::Sender<Reply>);

/// Why a request has no good answer.
#[derive(Debug)]
pub(crate) enum EntryError {
    Refused(DataError),
    /// The connection ended first.
    Lost,
    /// A flush that another one overtook which had failed: it does not answer for what that one told of.
    Overtaken,
}

/// A connection to an export.
pub(crate) struct Connection {
    /// Who the checkers take this for. A flush answers for what the same one was answered before; after
    /// one that failed it is another one.
    client: Rc<Cell<usize>>,
    jobs: RefCell<Option<mpsc::UnboundedSender<Job>>>,
}

impl Connection {
    pub(crate) fn client(&self) -> usize {
        self.client.get()
    }

    fn is_open(&self) -> bool {
        self.jobs
            .borrow()
            .as_ref()
            .is_some_and(|jobs| !jobs.is_closed())
    }

    /// Goes without a goodbye.
    fn close(&self) {
        self.jobs.borrow_mut().take();
    }

    /// # Errors
    /// [`EntryError`].
    pub(crate) async fn call(&self, request: Request) -> Result<Vec<u8>, EntryError> {
        let (client, is_flush) = (self.client(), matches!(request, Request::Flush));
        let (answer, answered) = oneshot::channel();
        let (jobs, job) = (self.jobs.borrow().clone(), (request, answer));
        match jobs {
            Some(jobs) => drop(jobs.send(job)),
            None => drop(job),
        }
        let reply = answered.await.map_err(|_| EntryError::Lost)?;
        match reply.result {
            Ok(_) if is_flush && reply.client != client => Err(EntryError::Overtaken),
            result => result.map_err(EntryError::Refused),
        }
    }
}

/// The connections of one client host.
pub(crate) struct Entry {
    world: Rc<World>,
    host: Cell<usize>,
    connections: [RefCell<Option<Rc<Connection>>>; VOLUMES.len()],
    connecting: Mutex<()>,
}

impl Entry {
    pub(crate) fn new(world: Rc<World>, number: usize) -> Self {
        Self {
            world,
            host: Cell::new(number % SERVERS),
            connections: Default::default(),
            connecting: Mutex::default(),
        }
    }

    /// The connection to a volume, made anew if the former one has ended.
    pub(crate) async fn connection(&self, volume: usize) -> Rc<Connection> {
        let _connecting = self.connecting.lock().await;
        let known = self.connections[volume].borrow().clone();
        if let Some(known) = known.filter(|known| known.is_open()) {
            return known;
        }
        loop {
            let host = self.host.get();
            if let Some(connection) = connect(&self.world, host, VOLUMES[volume].0).await {
                let connection = Rc::new(connection);
                *self.connections[volume].borrow_mut() = Some(Rc::clone(&connection));
                return connection;
            }
            self.host.set((host + 1) % SERVERS);
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Breaks the connection to a volume; the next one goes to another server.
    pub(crate) fn leave(&self, volume: usize) {
        trace::count("entry: left by its client");
        self.host.set((self.host.get() + 1) % SERVERS);
        if let Some(connection) = self.connections[volume].take() {
            connection.close();
        }
    }
}

async fn connect(world: &Rc<World>, host: usize, name: &'static str) -> Option<Connection> {
    let (opened, opening) = oneshot::channel();
    let (jobs, queue) = mpsc::unbounded_channel();
    let client = Rc::new(Cell::new(0));
    let (server, its) = (world.server(host)?, Rc::clone(&client));
    let its_world = Rc::clone(world);
    world.within(host, async move {
        let Ok(volume) = server.open(name).await else {
            return;
        };
        its.set(its_world.history.enter(host));
        let _ = opened.send(());
        serve(&its_world, host, volume, &its, queue).await;
    });
    opening.await.ok()?;
    trace::count("entry: connected");
    trace::say(|| format!("client {} enters {name} at server {host}", client.get()));
    Some(Connection {
        client,
        jobs: RefCell::new(Some(jobs)),
    })
}

/// Executes what comes until the client goes; what is under way then is dropped.
async fn serve(
    world: &World,
    host: usize,
    volume: Volume,
    client: &Cell<usize>,
    mut jobs: mpsc::UnboundedReceiver<Job>,
) {
    let mut running = FuturesUnordered::new();
    loop {
        tokio::select! {
            biased;
            job = jobs.recv() => match job {
                Some((request, answer)) => running.push(execute(world, host, &volume, client, request, answer)),
                None => return,
            },
            Some(()) = running.next() => {}
        }
    }
}

async fn execute(
    world: &World,
    host: usize,
    volume: &Volume,
    client: &Cell<usize>,
    request: Request,
    answer: oneshot::Sender<Reply>,
) {
    let (begun, is_flush) = (client.get(), matches!(request, Request::Flush));
    let result = ask(volume, request).await;
    if world.is_dead(host) {
        return;
    }
    if is_flush && result.is_err() {
        client.set(world.history.enter(host));
    }
    let client = begun;
    let _ = answer.send(Reply { client, result });
}

async fn ask(volume: &Volume, request: Request) -> Result<Vec<u8>, DataError> {
    match request {
        Request::Read(at, len) => return Ok(joined(volume.read(at, len).await?)),
        Request::Write(at, data, fua) => volume.write(at, data, fua).await?,
        Request::Zero(at, len, keep) => volume.zero(at, len, keep, false).await?,
        Request::Flush => volume.flush().await?,
    }
    Ok(Vec::new())
}

fn joined(parts: Vec<ReadPart>) -> Vec<u8> {
    let mut data = Vec::new();
    for part in parts {
        match part {
            ReadPart::Data(bytes) => data.extend_from_slice(&bytes),
            ReadPart::Hole(len) => data.resize(data.len() + len as usize, 0),
        }
    }
    data
}
