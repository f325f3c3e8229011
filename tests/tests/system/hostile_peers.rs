//! Garbage, half requests, lying lengths and idle crowds on every port: memory stays bounded and
//! everyone else is served.

use blockd::id::VolumeId;
use blockd::io::wire::{Frame, HEADER_BYTES, Kind, MAX_PAYLOAD_BYTES};
use blockd_tests::{Cluster, ClusterOptions, MIB, Random, Server};
use bytes::BytesMut;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Duration;

const IDLE_BYTES_MAX: u64 = 60 * MIB;
const CROWD: usize = 1000;

/// The memory of an idle server, member of a cluster with volumes and a snapshot (the issue's
/// "an idle server is under 60 MiB").
#[test]
fn an_idle_server_is_small() {
    let cluster = Cluster::three();
    for number in 0..10 {
        cluster.create(&format!("v{number}"), 64 << 30);
    }
    cluster.snapshot("v0@s");
    for server in &cluster.servers {
        let resident = server.resident_bytes();
        eprintln!("idle server {}: {} KiB", server.number, resident >> 10);
        assert!(resident < IDLE_BYTES_MAX, "{} MiB", resident / MIB);
    }
}

fn connect(address: &str) -> TcpStream {
    let stream = TcpStream::connect(address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    stream
        .set_write_timeout(Some(Duration::from_secs(30)))
        .unwrap();
    stream
}

/// Reads what the server says until it closes; it must close, and say little.
fn ends(mut stream: TcpStream, what: &str) {
    let mut heard = vec![];
    let ended = (&mut stream).take(1 << 20).read_to_end(&mut heard);
    match ended {
        Ok(len) => assert!(len < 1 << 20, "{what}: the server talks without end"),
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{what}: the server neither answers nor closes: {error}"),
    }
}

/// Whether the server still does its work, and its memory is bounded.
fn check_alive(cluster: &Cluster, limit_bytes: u64) {
    for (index, server) in cluster.servers.iter().enumerate() {
        let mut connection = cluster.nbd(index, "v");
        connection.write(0, &[7; 4096]).unwrap();
        assert_eq!(connection.read(0, 4096).unwrap(), [7; 4096]);
        let resident = server.resident_bytes();
        assert!(
            resident < limit_bytes,
            "server {}: {} MiB",
            server.number,
            resident / MIB
        );
        assert!(!server.log().contains("panicked"), "{}", server.log());
    }
}

/// Random bytes on the peer port and on both NBD ports, in pieces and at once.
#[test]
fn garbage_on_every_port() {
    let cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    let mut random = Random::new(1);
    for round in 0..120 {
        let server = &cluster.servers[round % 3];
        let peer = round % 2 == 0;
        let address = if peer {
            server.peer_address()
        } else {
            server.nbd_address()
        };
        let mut stream = connect(&address);
        let len = [1, 20, 64, 4096, 300_000][random.index(5)];
        let mut garbage = random.bytes(len);
        if round % 5 == 0 && len > 20 {
            garbage[..2].copy_from_slice(&0x4b42_u16.to_le_bytes());
        }
        // The server may close before it has taken everything.
        let _ = stream.write_all(&garbage);
        let _ = stream.shutdown(Shutdown::Write);
        ends(stream, "garbage");
    }
    let mut unix = UnixStream::connect(cluster.servers[0].socket()).unwrap();
    unix.write_all(&random.bytes(100)).unwrap();
    drop(unix);
    check_alive(&cluster, 2 * IDLE_BYTES_MAX);
}

/// A frame whose header is right and says that more follows than may, or than ever comes.
#[test]
fn lying_lengths_on_the_peer_port() {
    let cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    let server = &cluster.servers[0];
    for length in [MAX_PAYLOAD_BYTES + 1, u32::MAX, MAX_PAYLOAD_BYTES] {
        let mut header = BytesMut::new();
        Frame::request(Kind::Hello, VolumeId(0)).encode_header(&mut header);
        header[52..56].copy_from_slice(&length.to_le_bytes());
        let crc = crc32(&header[..HEADER_BYTES - 4]);
        header[HEADER_BYTES - 4..].copy_from_slice(&crc.to_le_bytes());
        let crowd: Vec<TcpStream> = (0..20)
            .map(|_| {
                let mut stream = connect(&server.peer_address());
                stream.write_all(&header).unwrap();
                stream
            })
            .collect();
        check_alive(&cluster, 2 * IDLE_BYTES_MAX);
        for stream in crowd {
            stream.shutdown(Shutdown::Write).unwrap();
            ends(stream, "lying length");
        }
    }
    let mut hello = BytesMut::new();
    Frame::request(Kind::Hello, VolumeId(0)).encode_header(&mut hello);
    for cut in [1, 2, 30, 63] {
        let mut stream = connect(&server.peer_address());
        stream.write_all(&hello[..cut]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        ends(stream, "half a frame");
    }
    check_alive(&cluster, 2 * IDLE_BYTES_MAX);
}

/// CRC32 (IEEE), bit by bit: not the code under test.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        let shift = |crc: u32, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg());
        (0..8).fold(crc ^ u32::from(*byte), shift)
    };
    !bytes.iter().fold(u32::MAX, step)
}

/// Opens the export as the oldest clients do; what follows is transmission.
fn transmission(address: &str) -> TcpStream {
    let mut stream = connect(address);
    nbd::client::handshake(&mut stream, b"v").unwrap();
    stream
}

/// NBD requests that are cut off, too long, outside the volume or unknown.
#[test]
fn half_and_lying_nbd_requests() {
    let cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    let address = cluster.servers[1].nbd_address();
    let request = |kind: u16, offset: u64, len: u32| {
        let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
        request.extend([0, 0]);
        request.extend(kind.to_be_bytes());
        request.extend(77_u64.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(len.to_be_bytes());
        request
    };
    for half in [
        request(0, 0, 4096)[..20].to_vec(),
        request(1, 0, 4096),
        request(1, 0, 64 << 20),
        request(1, 0, u32::MAX),
        vec![0xff; 28],
    ] {
        let crowd: Vec<TcpStream> = (0..8)
            .map(|_| {
                let mut stream = transmission(&address);
                stream.write_all(&half).unwrap();
                stream
            })
            .collect();
        check_alive(&cluster, 4 * IDLE_BYTES_MAX);
        for stream in crowd {
            // The server may have closed already.
            let _ = stream.shutdown(Shutdown::Write);
            ends(stream, "half an NBD request");
        }
    }
    let mut stream = transmission(&address);
    for (kind, offset, len) in [
        (0, 8 * MIB, 1),
        (0, u64::MAX, 4096),
        (0, 0, u32::MAX),
        (4, 8 * MIB - 512, 1024),
        (6, u64::MAX - 100, 200),
        (99, 0, 0),
    ] {
        stream.write_all(&request(kind, offset, len)).unwrap();
        let mut reply = [0; 16];
        stream.read_exact(&mut reply).unwrap();
        assert_eq!(reply[..4], 0x6744_6698_u32.to_be_bytes(), "kind {kind}");
        assert_ne!(
            reply[4..8],
            [0; 4],
            "kind {kind} at {offset} of {len} bytes was accepted"
        );
        assert_eq!(reply[8..], 77_u64.to_be_bytes());
    }
    check_alive(&cluster, 4 * IDLE_BYTES_MAX);
}

/// A thousand connections that say nothing, on the peer port and on NBD, in every phase.
#[test]
fn a_thousand_idle_connections() {
    let config = "nbd_connections = 2000\nnbd_connections_per_address = 2000\n".to_owned();
    let cluster = Cluster::start(&ClusterOptions {
        config,
        ..ClusterOptions::default()
    });
    cluster.create("v", 8 * MIB);
    let server = &cluster.servers[2];
    let silent: Vec<TcpStream> = (0..CROWD)
        .map(|_| connect(&server.peer_address()))
        .collect();
    report(server, "1000 silent peers");
    check_alive(&cluster, 2 * IDLE_BYTES_MAX);
    drop(silent);
    let address = server.nbd_address();
    let silent: Vec<TcpStream> = (0..CROWD).map(|_| connect(&address)).collect();
    report(server, "1000 silent NBD handshakes");
    check_alive(&cluster, 3 * IDLE_BYTES_MAX);
    drop(silent);
    let mut opened: Vec<TcpStream> = (0..CROWD).map(|_| transmission(&address)).collect();
    report(server, "1000 idle NBD connections");
    check_alive(&cluster, 8 * IDLE_BYTES_MAX);
    let stream = opened.last_mut().unwrap();
    let mut client = nbd::client::NbdClient::new(
        stream,
        &nbd::Export {
            size: 8 * MIB,
            ..nbd::Export::default()
        },
    );
    let mut block = [0; 4096];
    client.read_exact(&mut block).unwrap();
    assert_eq!(block, [7; 4096]);
}

fn report(server: &Server, what: &str) {
    eprintln!("{what}: {} MiB resident", server.resident_bytes() / MIB);
}
