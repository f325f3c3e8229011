//! A relay in front of a server's peer port that delays, counts and records what passes: a network
//! between the servers, where netem is not available.
//!
//! It learns from the hello who sends, so that one half of a cluster can be far from the other.

use crate::cluster::Cluster;
use blockd::admin::AdminRequest;
use blockd::id::{NodeNo, PageNo, VolumeId};
use blockd::io::link::{Hello, decode_control};
use blockd::io::wire::{Decoded, Frame, Kind, Status, decode};
use blockd::node::config::PEER_PORT;
use bytes::BytesMut;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

/// Addresses of relays lie this far above those of the servers.
const OFFSET: u8 = 100;

/// A frame that passed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passed {
    /// Node that made the connection; 0 is a client.
    pub from: NodeNo,
    /// Number of the server behind the relay.
    pub to: u8,
    pub reply: bool,
    pub kind: Kind,
    pub status: Status,
    pub volume: VolumeId,
    pub page: PageNo,
}

#[derive(Default)]
struct Shared {
    passed: Mutex<Vec<Passed>>,
    /// What requesters sent, a connection each, with the node that made it.
    sent: Mutex<Vec<(NodeNo, Vec<u8>)>>,
    stop: AtomicBool,
}

/// How long bytes take between two nodes, one way.
pub type Delay = Arc<dyn Fn(NodeNo, u8) -> Duration + Send + Sync>;

/// The relays of a cluster; everything between its servers, and from its clients, passes them.
pub struct Network {
    shared: Arc<Shared>,
}

impl Network {
    /// Puts a relay in front of every server and makes it the address by which all others know it.
    #[must_use]
    pub fn between(cluster: &Cluster, delay: &Delay) -> Self {
        let network = Self {
            shared: Arc::default(),
        };
        for server in &cluster.servers {
            let at = cluster.addresses.of(OFFSET + server.number);
            network.relay(at, server.address, server.number, delay);
            let define = AdminRequest::NodeDefine {
                address: format!("{at}:{PEER_PORT}"),
                name: None,
                online: true,
            };
            cluster.admin_at(0, define).unwrap();
        }
        cluster.wait_writable();
        network
    }

    fn relay(&self, at: Ipv4Addr, server: Ipv4Addr, number: u8, delay: &Delay) {
        let listener = TcpListener::bind((at, PEER_PORT)).unwrap();
        let (shared, delay) = (Arc::clone(&self.shared), Arc::clone(delay));
        spawn(move || {
            for client in listener.incoming() {
                if shared.stop.load(Ordering::Relaxed) {
                    return;
                }
                if let (Ok(client), Ok(server)) = (client, TcpStream::connect((server, PEER_PORT)))
                {
                    join(client, server, number, &shared, &delay);
                }
            }
        });
    }

    /// Forgets what passed so far.
    pub fn forget(&self) {
        self.shared.passed.lock().unwrap().clear();
    }

    /// The data requests and replies about a volume that passed, in order of their arrival.
    #[must_use]
    pub fn passed(&self, volume: VolumeId) -> Vec<Passed> {
        let passed = self.shared.passed.lock().unwrap();
        let of_data = |frame: &&Passed| {
            frame.volume == volume && matches!(frame.kind, Kind::Read | Kind::Write | Kind::Zero)
        };
        passed.iter().filter(of_data).cloned().collect()
    }

    /// What each connection of a node has sent so far, byte by byte.
    #[must_use]
    pub fn sent_by(&self, node: NodeNo) -> Vec<Vec<u8>> {
        let sent = self.shared.sent.lock().unwrap();
        let of_node = sent.iter().filter(|(from, _)| *from == node);
        of_node.map(|(_, bytes)| bytes.clone()).collect()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn join(client: TcpStream, server: TcpStream, to: u8, shared: &Arc<Shared>, delay: &Delay) {
    client.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();
    let from = Arc::new(AtomicU16::new(0));
    let index = {
        let mut sent = shared.sent.lock().unwrap();
        sent.push((NodeNo(0), Vec::new()));
        sent.len() - 1
    };
    let pair = [
        (
            client.try_clone().unwrap(),
            server.try_clone().unwrap(),
            Some(index),
        ),
        (server, client, None),
    ];
    for (source, target, record) in pair {
        let wire = Wire {
            from: Arc::clone(&from),
            to,
            record,
            shared: Arc::clone(shared),
            frames: BytesMut::new(),
        };
        let (from, delay) = (Arc::clone(&from), Arc::clone(delay));
        let (sender, receiver) = channel();
        spawn(move || deliver(&receiver, target));
        spawn(move || {
            wire.pump(source, |bytes| {
                let late = delay(NodeNo(from.load(Ordering::Relaxed)), to);
                sender.send((Instant::now() + late, bytes)).is_ok()
            });
        });
    }
}

/// Hands bytes on when they are due, in order.
fn deliver(due: &Receiver<(Instant, Vec<u8>)>, mut target: TcpStream) {
    for (at, bytes) in due {
        sleep(at.saturating_duration_since(Instant::now()));
        if target.write_all(&bytes).is_err() {
            break;
        }
    }
    // The other side may be gone already; either way nothing more comes.
    let _ = target.shutdown(Shutdown::Write);
}

/// One direction of a connection.
struct Wire {
    from: Arc<AtomicU16>,
    to: u8,
    /// Where to record what is sent.
    record: Option<usize>,
    shared: Arc<Shared>,
    frames: BytesMut,
}

impl Wire {
    fn pump(mut self, mut source: TcpStream, send: impl Fn(Vec<u8>) -> bool) {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match source.read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(len) => {
                    self.look(&buffer[..len]);
                    if self.shared.stop.load(Ordering::Relaxed) || !send(buffer[..len].to_vec()) {
                        return;
                    }
                }
            }
        }
    }

    fn look(&mut self, bytes: &[u8]) {
        if let Some(index) = self.record {
            self.shared.sent.lock().unwrap()[index]
                .1
                .extend_from_slice(bytes);
        }
        self.frames.extend_from_slice(bytes);
        while let Ok(Decoded::Frame(frame)) = decode(&mut self.frames) {
            self.note(&frame);
        }
    }

    fn note(&self, frame: &Frame) {
        if frame.kind == Kind::Hello && !frame.reply {
            let hello: Hello = decode_control(frame.payload.clone()).unwrap();
            self.from.store(hello.node.0, Ordering::Relaxed);
            if let Some(index) = self.record {
                self.shared.sent.lock().unwrap()[index].0 = hello.node;
            }
        }
        self.shared.passed.lock().unwrap().push(Passed {
            from: NodeNo(self.from.load(Ordering::Relaxed)),
            to: self.to,
            reply: frame.reply,
            kind: frame.kind,
            status: frame.status,
            volume: frame.volume,
            page: frame.page,
        });
    }
}
