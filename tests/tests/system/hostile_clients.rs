//! NBD clients that want to exhaust a server: everyone else is served meanwhile, memory stays under
//! a stated bound, and what they held is given back.

use blockd_tests::nbd_raw::wire::{
    EXPORT_NAME, FLUSH, GO, INFO, LIST, LIST_META, READ, REP_ACK, STRUCTURED_REPLY, WRITE,
};
use blockd_tests::nbd_raw::{
    Address, Endpoint, Mode, RawNbd, Stream, info_payload, meta_payload, option_head,
};
use blockd_tests::{Cluster, MIB, NbdServer, Usage};
use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
use rustix::process::Pid;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::thread::sleep;
use std::time::{Duration, Instant};

const SIZE: u64 = 128 * MIB;
/// Payload bytes that all connections may hold together (nbd_server::limits::SHARED_PAYLOAD_BYTES).
const BUDGET_BYTES: u64 = 256 * MIB;
/// What idle and refused connections may cost together.
const CROWD_BYTES: u64 = 48 * MIB;
const PATIENCE: Duration = Duration::from_secs(30);
/// Connections that the servers may open among themselves meanwhile; a crowd is of 50 and more.
const OF_ITS_OWN: usize = 6;
/// The address that hostile clients come from; honest ones use another.
const HOSTILE: u8 = 66;

/// A server, and the ways to it.
struct Victim {
    tcp: Endpoint,
    unix: Endpoint,
    hostile: Ipv4Addr,
    pid: Pid,
    before: Usage,
}

impl Victim {
    fn new([tcp, unix]: [Endpoint; 2], hostile: Ipv4Addr, pid: Pid) -> Self {
        let before = Usage::of(pid);
        let victim = Self {
            tcp,
            unix,
            hostile,
            pid,
            before,
        };
        // Data for reads, and what a server keeps after its first requests.
        let mut raw = RawNbd::opened(&victim.unix, Mode::Structured);
        for at in (0..SIZE).step_by(8 << 20) {
            assert_eq!(raw.write(0, at, &vec![0x5a; 8 << 20]), 0);
        }
        assert_eq!(raw.ask(FLUSH, 0, 0, 0).errno, 0);
        drop(raw);
        sleep(Duration::from_millis(50));
        Usage::forget_peak(pid);
        let before = Usage::of(pid);
        Self { before, ..victim }
    }

    /// A connection over TCP from the hostile address.
    fn connect(&self) -> TcpStream {
        let Address::Tcp(to) = &self.tcp.at else {
            panic!("{:?}", self.tcp);
        };
        let to: SocketAddrV4 = to.parse().unwrap();
        let fd = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        bind(&fd, &SocketAddrV4::new(self.hostile, 0)).unwrap();
        connect(&fd, &to).unwrap();
        let stream = TcpStream::from(fd);
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// A connection from the hostile address in transmission.
    fn open(&self, mode: Mode) -> RawNbd {
        let mut raw = RawNbd::greeted_over(Box::new(self.connect()), 3).unwrap();
        raw.agree(mode);
        raw.go(&self.tcp.export);
        raw
    }

    /// Honest clients are served, over both transports.
    fn serves(&self) {
        for endpoint in [&self.tcp, &self.unix] {
            let mut raw = RawNbd::opened(endpoint, Mode::Structured);
            assert_eq!(raw.write(0, 4 * MIB, &[7; 4096]), 0);
            assert_eq!(raw.read(4 * MIB, 4096), [7; 4096]);
            assert_eq!(raw.ask(FLUSH, 0, 0, 0).errno, 0);
            assert!(raw.read(5 * MIB, 64 << 10).iter().all(|byte| *byte == 0x5a));
        }
    }

    /// The highest memory since the start was at most so much above the start.
    fn took_at_most(&self, bytes: u64, what: &str) {
        let peak = Usage::of(self.pid).peak_bytes;
        let took = peak.saturating_sub(self.before.resident_bytes);
        eprintln!("{what}: {} MiB of {} MiB", took / MIB, bytes / MIB);
        assert!(took <= bytes, "{what}: {} MiB", took / MIB);
    }

    /// All connections are gone from the server.
    fn releases(&self) {
        let deadline = Instant::now() + PATIENCE;
        while Usage::of(self.pid).open_files > self.before.open_files + OF_ITS_OWN {
            let files = Usage::of(self.pid).open_files;
            assert!(Instant::now() < deadline, "{files} files are open");
            sleep(Duration::from_millis(20));
        }
    }
}

/// Runs a scenario against `nbd-server` on memory and against a server of a `blockd` cluster.
fn against_both(scenario: impl Fn(&Victim)) {
    let server = NbdServer::memory(&SIZE.to_string(), &["--name", "v"]);
    let hostile = server.addresses.of(HOSTILE);
    scenario(&Victim::new(server.endpoints("v"), hostile, server.pid()));
    drop(server);
    let cluster = Cluster::three();
    cluster.create("v", SIZE);
    let server = &cluster.servers[0];
    let ways = [
        Address::Tcp(server.nbd_address()),
        Address::Unix(server.socket()),
    ];
    let ways = ways.map(|at| Endpoint::new(at, "v"));
    let hostile = cluster.addresses.of(HOSTILE);
    scenario(&Victim::new(ways, hostile, server.pid()));
    for server in &cluster.servers {
        assert!(!server.log().contains("panicked"), "{}", server.log());
    }
}

/// 2,000 handshakes that stop half way, from one address; its cap keeps seats for the others.
#[test]
fn half_open_handshakes() {
    against_both(|victim| {
        let stops: [&[u8]; 4] = [
            b"",
            b"\0\0",
            b"\0\0\0\x03",
            b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x10",
        ];
        let mut crowd = vec![];
        for number in 0..2000 {
            let mut stream = victim.connect();
            // A server that is full closes at once.
            let _ = stream.write_all(stops[number % stops.len()]);
            crowd.push(stream);
            if number == 200 {
                victim.serves();
            }
        }
        victim.serves();
        victim.took_at_most(CROWD_BYTES, "2000 half-open handshakes");
        drop(crowd);
        victim.releases();
        victim.serves();
    });
}

/// 200 clients that send their handshake and a request byte by byte.
#[test]
fn slow_clients() {
    against_both(|victim| {
        let payload = info_payload(victim.tcp.export.as_bytes(), &[3]);
        let head = option_head(GO, u32::try_from(payload.len()).unwrap());
        let handshake = [&b"\0\0\0\x03"[..], &head, &payload].concat();
        let mut crowd: Vec<TcpStream> = (0..200).map(|_| victim.connect()).collect();
        for byte in handshake {
            crowd
                .iter_mut()
                .for_each(|stream| stream.write_all(&[byte]).unwrap());
        }
        victim.serves();
        let read = *b"\x25\x60\x95\x13\0\0\0\0slow one\0\0\0\0\0\x80\0\0\0\0\x02\0";
        for byte in read {
            crowd
                .iter_mut()
                .for_each(|stream| stream.write_all(&[byte]).unwrap());
        }
        for stream in &mut crowd {
            let answer = everything(stream, 18 + 20 + 12 + 20 + 14 + 20 + 16 + 512);
            assert!(answer.ends_with(&[0x5a; 512]));
        }
        victim.serves();
        victim.took_at_most(CROWD_BYTES + 200 * (256 << 10), "200 slow clients");
        drop(crowd);
        victim.releases();
    });
}

/// What the server says, up to so many bytes.
fn everything(stream: &mut impl Read, len_bytes: u64) -> Vec<u8> {
    let mut heard = vec![];
    match stream.take(len_bytes).read_to_end(&mut heard) {
        Err(error) if error.kind() != ErrorKind::ConnectionReset => panic!("{error}"),
        _ => heard,
    }
}

/// Lengths of 4 GiB in options and requests are believed by nobody.
#[test]
fn lying_lengths() {
    against_both(|victim| {
        let lies: [Vec<u8>; 6] = [
            option_head(77, u32::MAX),
            option_head(GO, u32::MAX),
            option_head(EXPORT_NAME, u32::MAX),
            option(GO, b"\xff\xff\xff\xffname\0\0"),
            option(INFO, b"\0\0\0\x01v\xff\xff"),
            [
                option(STRUCTURED_REPLY, b""),
                option(LIST_META, b"\0\0\0\x01v\xff\xff\xff\xff"),
            ]
            .concat(),
        ];
        for round in 0..300 {
            let mut stream = victim.connect();
            stream.write_all(b"\0\0\0\x03").unwrap();
            stream.write_all(&lies[round % lies.len()]).unwrap();
            everything(&mut stream, 18);
        }
        for mode in Mode::ALL {
            for _ in 0..50 {
                let mut raw = victim.open(mode);
                let sent = raw.try_send(WRITE, 0, 0, u64::from(u32::MAX), &[1; 100]);
                assert!(sent.is_err() || raw.is_closed());
            }
        }
        victim.serves();
        victim.took_at_most(CROWD_BYTES, "lengths of 4 GiB");
        victim.releases();
    });
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let head = option_head(option, u32::try_from(data.len()).unwrap());
    [&head, data].concat()
}

/// 50 clients announce writes of 64 MiB and send a little of them: small requests of others do not
/// wait for them.
#[test]
fn announced_payloads() {
    against_both(|victim| {
        let mut crowd: Vec<RawNbd> = (0..50).map(|_| victim.open(Mode::Simple)).collect();
        for raw in &mut crowd {
            raw.try_send(WRITE, 0, 0, 64 * MIB, &[1; 1000]).unwrap();
        }
        victim.serves();
        victim.took_at_most(CROWD_BYTES, "50 payloads that never come");
        drop(crowd);
        victim.releases();
        let mut raw = RawNbd::opened(&victim.unix, Mode::Simple);
        assert_eq!(
            raw.read(0, 4096),
            [0x5a; 4096],
            "part of a payload was applied"
        );
    });
}

/// 40 clients ask for 64 MiB, 20 times each, and read nothing of it: small requests of others do
/// not wait for them, and the budget holds.
#[test]
fn replies_that_nobody_reads() {
    against_both(|victim| {
        let mut crowd: Vec<RawNbd> = (0..40).map(|_| victim.open(Mode::Simple)).collect();
        for raw in &mut crowd {
            for _ in 0..20 {
                raw.send(READ, 0, 0, 64 * MIB);
            }
        }
        victim.serves();
        victim.took_at_most(BUDGET_BYTES + CROWD_BYTES, "2.5 GiB of replies a round");
        drop(crowd);
        victim.releases();
        victim.serves();
    });
}

/// Options and requests without end whose replies nobody reads.
#[test]
fn floods() {
    against_both(|victim| {
        let list = option(LIST, b"").repeat(1000);
        let info = option(
            INFO,
            &info_payload(victim.tcp.export.as_bytes(), &[1, 2, 3]),
        )
        .repeat(1000);
        let meta = meta_payload(victim.tcp.export.as_bytes(), &vec![&b"base:"[..]; 4000]);
        let meta = [
            option(STRUCTURED_REPLY, b""),
            option(LIST_META, &meta).repeat(100),
        ]
        .concat();
        let mut crowd: Vec<Box<dyn Stream>> = vec![];
        for flood in [&list, &info, &meta].repeat(10) {
            let mut stream = victim.connect();
            stream.write_all(b"\0\0\0\x03").unwrap();
            pour(&mut stream, flood, 4 << 20);
            crowd.push(Box::new(stream));
        }
        let flushes = b"\x25\x60\x95\x13\0\0\0\x03 cookie \0\0\0\0\0\0\0\0\0\0\0\0".repeat(2000);
        for mode in [Mode::Simple, Mode::Structured] {
            for _ in 0..15 {
                let mut stream = victim.connect();
                let twin = stream.try_clone().unwrap();
                let mut raw = RawNbd::greeted_over(Box::new(twin), 3).unwrap();
                raw.agree(mode);
                raw.go(&victim.tcp.export);
                pour(&mut stream, &flushes, 8 << 20);
                crowd.push(Box::new(stream));
            }
        }
        victim.serves();
        victim.took_at_most(CROWD_BYTES, "floods");
        drop(crowd);
        victim.releases();
    });
}

/// Sends the bytes over and over until the server takes no more, or so many bytes.
fn pour(stream: &mut TcpStream, bytes: &[u8], max_bytes: usize) {
    stream
        .set_write_timeout(Some(Duration::from_millis(20)))
        .unwrap();
    let mut sent_bytes = 0;
    // A timeout is backpressure, an error a server that had enough.
    while sent_bytes < max_bytes && stream.write_all(bytes).is_ok() {
        sent_bytes += bytes.len();
    }
}

/// 2,000 clients that come, open and vanish; some in the middle of a request.
#[test]
fn vanishing_clients() {
    against_both(|victim| {
        for round in 0..2000 {
            let mut stream = victim.connect();
            match round % 4 {
                0 => {}
                1 => stream.write_all(b"\0\0\0\x03IHAVE").unwrap(),
                2 => drop(victim.open(Mode::Structured)),
                _ => {
                    let mut raw = victim.open(Mode::Simple);
                    raw.try_send(WRITE, 0, MIB, MIB, &[9; 5000]).unwrap();
                }
            }
        }
        victim.serves();
        victim.took_at_most(CROWD_BYTES, "2000 clients that vanish");
        victim.releases();
        let mut raw = RawNbd::greeted(&victim.unix, 3);
        assert_eq!(raw.option(LIST, b""), REP_ACK);
    });
}
