//! A device of the kernel on TCP connections to the servers themselves: nothing is copied through this process, which only looks on.
//!
//! The kernel tells of a dead connection (LINK_DEAD) and of none in particular, so a duplicate of each
//! socket is kept: it shows which one died, and shuts one down for a planned move. The replacement
//! goes to the next server in order. Requests that were in flight are sent again when the queue's
//! `io_timeout` strikes: that is the stall after a server's death.
//!
//! Between servers a request may be sent twice, and nothing but the timeout keeps a first copy that is
//! still on its way from being carried out after the second: a server drops what its lost clients had
//! asked for, but not what it has passed on. Proxy mode has no such gap and is the default.

use super::error::{AttachError, AttachErrorKind};
use super::proxy::{BLOCK_BYTES, blocking, disconnect, refusal, resized, settle, wanted};
use super::record::Record;
use crate::admin::{AdminReply, AdminRequest};
use crate::client::{Client, Volume};
use nbd_server::kernel::{ConnectRequest, Device, Kernel, LinkDeadEvents, LinkEvent};
use nbd_server::{ServerInfo, open_export};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::net::{Shutdown, TcpStream as StdTcpStream};
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval, timeout};

/// With one connection a request is only looked at again when it is this old, so the value bounds the
/// stall and a slow answer costs a line in the kernel's log.
const IO_TIMEOUT: Duration = Duration::from_millis(500);
/// With more, a slower answer costs its connection, which is then made again.
const SLOW_IO_TIMEOUT: Duration = Duration::from_secs(1);
/// During a planned move, so that what is in flight is sent again at once.
const MOVE_IO_TIMEOUT: Duration = Duration::from_millis(20);
/// How long a server may take for the handshake.
const OPEN_LIMIT: Duration = Duration::from_secs(2);
/// How often dead connections are looked for that no event told of, and replaced if that failed.
const LOOK: Duration = Duration::from_millis(250);
/// Looks between two probes of a connection's server, and probes in a row that fail until it is left.
const LOOKS_PER_PROBE: u32 = 8;
const PROBES: u32 = 2;
/// Bit READ_ONLY of the transmission flags.
const READ_ONLY: u64 = 1 << 1;

/// A connected device.
pub(super) struct DirectDevice {
    kernel: Kernel,
    device: Device,
    backend: String,
    moves: mpsc::Sender<Move>,
    gone: oneshot::Receiver<()>,
    refused_bytes: Option<u64>,
    is_down: bool,
}

/// A planned move to the server of this peer address.
struct Move {
    to: String,
    answer: oneshot::Sender<Result<(), AttachError>>,
}

impl DirectDevice {
    /// Connects a device, or looks after the one that `before` had.
    pub(super) async fn connect(
        client: &Client,
        volume: &Volume,
        record: &Record,
        before: Option<Device>,
    ) -> Result<Self, AttachError> {
        if record.spec.exclusive {
            return Err(AttachError::new(
                AttachErrorKind::Invalid,
                "--exclusive needs --ha proxy: a server that the kernel talks to holds no lease",
            ));
        }
        let kernel = blocking(Kernel::open).await?.map_err(refusal)?;
        let events = kernel.link_dead_events().map_err(refusal)?;
        let mut links = Links {
            kernel,
            device: Device(0),
            backend: record.key.to_string(),
            read_only: record.spec.read_only,
            client: client.clone(),
            volume: volume.clone(),
            servers: servers(client).await?,
            links: Vec::new(),
        };
        match before {
            Some(device) => links.adopt(device, record.spec.connections).await?,
            None => links.connect(record).await?,
        }
        let (moves, asked) = mpsc::channel(1);
        let (gone_sender, gone) = oneshot::channel();
        let (device, backend) = (links.device, links.backend.clone());
        tokio::task::spawn_local(async move {
            links.watch(events, asked).await;
            let _ = gone_sender.send(());
        });
        Ok(Self {
            kernel,
            device,
            backend,
            moves,
            gone,
            refused_bytes: None,
            is_down: false,
        })
    }

    pub(super) fn path(&self) -> PathBuf {
        self.device.path()
    }

    /// Gives the device the size of its volume.
    pub(super) async fn resize(&mut self, size_bytes: u64) {
        if !self.is_down && self.refused_bytes != Some(size_bytes) {
            let done = resized(self.kernel, self.device, &self.backend, size_bytes).await;
            self.refused_bytes = (!done).then_some(size_bytes);
        }
    }

    /// Makes the server of this peer address the one that is used (the first one, of several).
    pub(super) async fn move_to(&mut self, to: &str) -> Result<(), AttachError> {
        let (answer, answered) = oneshot::channel();
        let to = to.to_owned();
        let gone = || AttachError::new(AttachErrorKind::System, "the device is being taken down");
        let asked = self.moves.send(Move { to, answer }).await;
        asked.map_err(|_| gone())?;
        answered.await.map_err(|_| gone())?
    }

    /// Returns when the device was taken down by somebody else. Cancel-safe.
    pub(super) async fn gone(&mut self) {
        let _ = (&mut self.gone).await;
        self.is_down = true;
    }

    /// Takes the device down; without `force` only if nobody uses it.
    pub(super) async fn disconnect(&mut self, force: bool) -> Result<(), AttachError> {
        if self.is_down {
            return Ok(());
        }
        let (kernel, device) = (self.kernel, self.device);
        blocking(move || disconnect(kernel, device, force)).await??;
        self.is_down = true;
        Ok(())
    }
}

/// A server by its two addresses.
#[derive(Clone, Debug)]
struct Target {
    peer: String,
    nbd: String,
}

/// One connection of the device.
struct Link {
    /// Its server's place in the list.
    server: usize,
    /// The duplicate; `None` for one that a daemon before this one has made.
    socket: Option<StdTcpStream>,
    failed_probes: u32,
}

impl Link {
    /// Whether it is down, as far as its duplicate shows: the server has closed it, or somebody has shut it down.
    fn is_dead(&self) -> bool {
        let Some(socket) = &self.socket else {
            return false;
        };
        let ended = PollFlags::HUP | PollFlags::ERR | PollFlags::RDHUP;
        let mut polled = [PollFd::new(socket, ended)];
        let now = Timespec::default();
        poll(&mut polled, Some(&now)).is_ok() && polled[0].revents().intersects(ended)
    }
}

/// The connections of a device, for the task that looks after them.
struct Links {
    kernel: Kernel,
    device: Device,
    backend: String,
    read_only: bool,
    client: Client,
    volume: Volume,
    /// In the order in which they are tried.
    servers: Vec<Target>,
    links: Vec<Link>,
}

impl Links {
    async fn connect(&mut self, record: &Record) -> Result<(), AttachError> {
        let mut sockets = Vec::new();
        let mut found = None;
        for number in 0..record.spec.connections.max(1) as usize {
            // More servers than connections are spread over; fewer are used again.
            let first = number % self.servers.len();
            let (server, socket, info) = self.open_any(first).await?;
            found.get_or_insert(info);
            sockets.push(socket.try_clone().map_err(system)?);
            self.links.push(Link {
                server,
                socket: Some(socket),
                failed_probes: 0,
            });
        }
        let info = found.ok_or_else(|| no_server("there is none"))?;
        if sockets.len() > 1 && !info.can_multi_conn() {
            return Err(AttachError::new(
                AttachErrorKind::Invalid,
                "the server does not allow several connections (CAN_MULTI_CONN)",
            ));
        }
        let (kernel, backend, index) = (self.kernel, self.backend.clone(), wanted(record)?);
        let dead_timeout = record.spec.dead_timeout;
        let read_only = if self.read_only { READ_ONLY } else { 0 };
        let connected = blocking(move || {
            let sockets: Vec<_> = sockets.iter().map(|socket| socket.as_fd()).collect();
            kernel.connect(&ConnectRequest {
                index,
                sockets: &sockets,
                size_bytes: info.size_bytes,
                block_bytes: BLOCK_BYTES,
                flags: u64::from(info.flags) | read_only,
                dead_timeout,
                backend: &backend,
            })
        });
        self.device = Device(connected.await?.map_err(refusal)?);
        settle(self.device, self.io_timeout()).await;
        Ok(())
    }

    /// Takes over what a daemon that died has left. Its connections live on in the kernel; a dead one takes the socket that is offered.
    async fn adopt(&mut self, device: Device, connections: u32) -> Result<(), AttachError> {
        self.device = device;
        for _ in 0..connections.max(1) {
            let (server, socket, _) = self.open_any(0).await?;
            self.give(&socket).await?;
            self.links.push(Link {
                server,
                socket: None,
                failed_probes: 0,
            });
        }
        Ok(())
    }

    fn io_timeout(&self) -> Duration {
        match self.links.len() {
            0 | 1 => IO_TIMEOUT,
            _ => SLOW_IO_TIMEOUT,
        }
    }

    /// Looks after the connections until the device is taken down.
    async fn watch(&mut self, mut events: LinkDeadEvents, mut asked: mpsc::Receiver<Move>) {
        let mut looks = interval(LOOK);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut look = 0;
        while self.is_ours() {
            tokio::select! {
                event = events.next() => match event {
                    Ok(LinkEvent::Dead(index)) if index != self.device.0 => {}
                    Ok(LinkEvent::Dead(_)) => self.heal(true).await,
                    Ok(LinkEvent::Missed) => self.heal(false).await,
                    Err(error) => tracing::warn!("{error}"),
                },
                moved = asked.recv() => match moved {
                    Some(Move { to, answer }) => {
                        let _ = answer.send(self.move_to(&to, &mut events).await);
                    }
                    None => return,
                },
                _ = looks.tick() => {
                    look += 1;
                    if look % LOOKS_PER_PROBE == 0 {
                        self.probe().await;
                    }
                    self.heal(false).await;
                    self.offer_again().await;
                }
            }
        }
    }

    fn is_ours(&self) -> bool {
        self.device.is_connected() && self.device.backend().as_ref() == Some(&self.backend)
    }

    /// Replaces every dead connection; `told` says that there is one, even if none is known to be.
    async fn heal(&mut self, told: bool) {
        let mut dead: Vec<usize> = (0..self.links.len())
            .filter(|index| self.links[*index].is_dead())
            .collect();
        if dead.is_empty() && told {
            self.offer_again().await;
            dead.extend(self.links.iter().position(|link| link.socket.is_none()));
        }
        for index in dead {
            match self.replace(index).await {
                Ok(()) => tracing::info!(
                    device = self.device.0,
                    server = self.servers[self.links[index].server].peer,
                    "a dead connection was replaced"
                ),
                Err(error) => tracing::warn!("no new connection: {error}"),
            }
        }
    }

    /// Offers the only connection's socket once more. The kernel drops, without a word, a socket that it is given before it has seen
    /// that the one before is dead, and it tells of the death a moment before it has marked it (`nbd_mark_nsock_dead`): an offer in
    /// between is lost, and no further event comes. A socket that it has taken it does not take again while that lives, and the
    /// duplicate shows a death before the kernel marks it, so an offer too many changes nothing.
    async fn offer_again(&self) {
        if let [link] = self.links.as_slice()
            && let Some(socket) = &link.socket
            && !link.is_dead()
            && let Err(error) = self.give(socket).await
        {
            tracing::warn!("no new connection: {error}");
        }
    }

    async fn replace(&mut self, index: usize) -> Result<(), AttachError> {
        let used: Vec<usize> = self.links.iter().map(|link| link.server).collect();
        let mut last = no_server("there is none");
        for server in candidates(self.servers.len(), used[index], &used) {
            match self.open(server).await {
                Ok((socket, _)) => {
                    self.give(&socket).await?;
                    self.links[index] = Link {
                        server,
                        socket: Some(socket),
                        failed_probes: 0,
                    };
                    return Ok(());
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Asks the server of each connection whether it still opens the volume; one that does not is left for another that does.
    async fn probe(&mut self) {
        for index in 0..self.links.len() {
            let server = self.links[index].server;
            let failed = self.open(server).await.is_err();
            let link = &mut self.links[index];
            link.failed_probes = if failed { link.failed_probes + 1 } else { 0 };
            if link.failed_probes < PROBES {
                continue;
            }
            let used: Vec<usize> = self.links.iter().map(|link| link.server).collect();
            for other in candidates(self.servers.len(), server, &used) {
                if other != server && self.open(other).await.is_ok() {
                    tracing::warn!(server = self.servers[server].peer, "does not answer, left");
                    shut_down(&self.links[index]);
                    break;
                }
            }
        }
    }

    async fn move_to(&mut self, to: &str, events: &mut LinkDeadEvents) -> Result<(), AttachError> {
        let server = match self.servers.iter().position(|target| target.peer == to) {
            Some(server) => server,
            None => {
                self.servers = servers(&self.client).await?;
                let found = self.servers.iter().position(|target| target.peer == to);
                found.ok_or_else(|| no_server(to))?
            }
        };
        if self.links[0].server == server {
            return Ok(());
        }
        if self.links[0].socket.is_none() {
            return Err(AttachError::new(
                AttachErrorKind::Conflict,
                "the connection was made by a daemon that is gone; it moves when it fails",
            ));
        }
        // Everything that can fail comes before the old connection is touched.
        let (socket, _) = self.open(server).await?;
        self.hurry(true).await;
        shut_down(&self.links[0]);
        let dead = async {
            while !matches!(events.next().await, Ok(LinkEvent::Dead(index)) if index == self.device.0)
            {
            }
        };
        let _ = timeout(OPEN_LIMIT, dead).await;
        let given = self.give(&socket).await;
        if given.is_ok() {
            self.links[0] = Link {
                server,
                socket: Some(socket),
                failed_probes: 0,
            };
        }
        self.hurry(false).await;
        given
    }

    /// Shortens the time until requests of a dead connection are sent again; not with several connections, whose slow answers would
    /// cost them. Returns when the requests in flight have it.
    async fn hurry(&self, on: bool) {
        if self.links.len() > 1 {
            return;
        }
        let device = self.device;
        let io_timeout = if on {
            MOVE_IO_TIMEOUT
        } else {
            self.io_timeout()
        };
        let tuned = blocking(move || {
            device.tune(nbd_server::kernel::QueueSettings {
                io_timeout: Some(io_timeout),
                ..Default::default()
            })
        });
        if let Ok(Err(error)) = tuned.await {
            tracing::warn!("{error}");
        }
        if on {
            tokio::time::sleep(5 * MOVE_IO_TIMEOUT).await;
        }
    }

    async fn give(&self, socket: &StdTcpStream) -> Result<(), AttachError> {
        let (kernel, index, backend) = (self.kernel, self.device.0, self.backend.clone());
        let socket = socket.try_clone().map_err(system)?;
        let given = blocking(move || kernel.reconnect(index, &backend, &[socket.as_fd()]));
        given.await?.map_err(refusal)
    }

    /// A connection to `first`, or to the next server that gives one.
    async fn open_any(
        &self,
        first: usize,
    ) -> Result<(usize, StdTcpStream, ServerInfo), AttachError> {
        let mut last = no_server("there is none");
        for number in 0..self.servers.len() {
            let server = (first + number) % self.servers.len();
            match self.open(server).await {
                Ok((socket, info)) => return Ok((server, socket, info)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// A connection past its handshake to a server that serves the same volume, no smaller and as writable as before.
    async fn open(&self, server: usize) -> Result<(StdTcpStream, ServerInfo), AttachError> {
        let target = &self.servers[server];
        let opened = timeout(OPEN_LIMIT, self.open_by_name(target));
        let late = |_| no_server(&format!("{}: no answer in time", target.nbd));
        let (socket, info) = opened.await.map_err(late)??;
        if info.size_bytes < self.volume.size_bytes() {
            let text = format!("{}: the export is smaller than the volume was", target.nbd);
            return Err(AttachError::new(AttachErrorKind::Conflict, text));
        }
        if info.is_read_only() && !self.read_only && !self.volume.is_read_only() {
            let text = format!("{}: the export is read-only, the device is not", target.nbd);
            return Err(AttachError::new(AttachErrorKind::Conflict, text));
        }
        Ok((socket, info))
    }

    /// Opens by the volume's name of now. The name must be the same volume's before and after, as a volume may be renamed and
    /// another one get its name.
    async fn open_by_name(
        &self,
        target: &Target,
    ) -> Result<(StdTcpStream, ServerInfo), AttachError> {
        self.client.check_serves(&target.peer, &self.volume).await?;
        let name = self.volume.current_name();
        let opened = handshake(target, &name).await?;
        self.client.check_serves(&target.peer, &self.volume).await?;
        match name == self.volume.current_name() {
            true => Ok(opened),
            false => Err(no_server(&format!("{}: renamed meanwhile", target.nbd))),
        }
    }
}

async fn handshake(
    target: &Target,
    export: &str,
) -> Result<(StdTcpStream, ServerInfo), AttachError> {
    let unreachable =
        |error: &dyn std::fmt::Display| no_server(&format!("{}: {error}", target.nbd));
    let stream = TcpStream::connect(&target.nbd).await;
    let mut stream = stream.map_err(|error| unreachable(&error))?;
    stream.set_nodelay(true).map_err(system)?;
    let info = open_export(&mut stream, export).await;
    let info = info.map_err(|error| unreachable(&error))?;
    let stream = stream.into_std().map_err(system)?;
    stream.set_nonblocking(false).map_err(system)?;
    Ok((stream, info))
}

/// The servers of the client, first its own in their order, then the other nodes of the cluster.
async fn servers(client: &Client) -> Result<Vec<Target>, AttachError> {
    let AdminReply::Cluster(cluster) = client.admin(AdminRequest::ClusterStatus).await? else {
        return Err(no_server("the cluster's state is not known"));
    };
    let named = client.servers();
    let rank = |peer: &String| {
        named
            .iter()
            .position(|name| name == peer)
            .unwrap_or(named.len())
    };
    let mut targets: Vec<Target> = cluster
        .nodes
        .into_iter()
        .map(|node| Target {
            peer: node.peer_address,
            nbd: node.nbd_address,
        })
        .collect();
    targets.sort_by_key(|target| rank(&target.peer));
    match targets.is_empty() {
        true => Err(no_server("the cluster has no nodes")),
        false => Ok(targets),
    }
}

/// The servers to try for a connection that was at `current`: those without another connection, those with one, itself; each group in
/// the order of the list, from behind `current` on.
fn candidates(count: usize, current: usize, used: &[usize]) -> Vec<usize> {
    let others = (1..count).map(|step| (current + step) % count);
    let (busy, free): (Vec<usize>, Vec<usize>) = others.partition(|server| used.contains(server));
    free.into_iter().chain(busy).chain([current]).collect()
}

/// Ends a connection for the kernel, which has the same socket.
fn shut_down(link: &Link) {
    if let Some(socket) = &link.socket
        && let Err(error) = socket.shutdown(Shutdown::Both)
    {
        tracing::info!("the connection was down already: {error}");
    }
}

fn no_server(reason: &str) -> AttachError {
    let text = format!("no server to connect the device to: {reason}");
    AttachError::new(AttachErrorKind::Unreachable, text)
}

fn system(error: std::io::Error) -> AttachError {
    AttachError::system("a connection to a server", &error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dead_server_is_the_last_one_that_is_tried_again() {
        assert_eq!(candidates(3, 0, &[0]), [1, 2, 0]);
        assert_eq!(candidates(3, 2, &[2]), [0, 1, 2]);
        assert_eq!(candidates(1, 0, &[0]), [0]);
    }

    #[test]
    fn connections_spread_over_the_servers() {
        assert_eq!(candidates(3, 0, &[0, 1]), [2, 1, 0]);
        assert_eq!(candidates(2, 1, &[0, 1]), [0, 1]);
    }

    #[test]
    fn a_closed_connection_is_seen_by_its_duplicate() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = StdTcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (theirs, _) = listener.accept().unwrap();
        let link = Link {
            server: 0,
            socket: Some(socket),
            failed_probes: 0,
        };
        assert!(!link.is_dead());
        shut_down(&link);
        assert!(link.is_dead());
        drop(theirs);
        assert!(link.is_dead());
    }
}
