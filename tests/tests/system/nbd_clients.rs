//! The independent NBD clients against every server, over TCP and unix (S003-10, S003-11).

use blockd_tests::{Cluster, MIB, Random, Server, run, try_run};
use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

const SIZE: u64 = 24 * MIB;

/// An image of `SIZE` bytes: data, zeros that are written, and holes.
fn image(path: &Path, seed: u64) -> PathBuf {
    let mut random = Random::new(seed);
    let mut file = fs::File::create(path).unwrap();
    file.set_len(SIZE).unwrap();
    for (at, len) in [
        (0, 3 * MIB),
        (5 * MIB + 4096, 12_288),
        (9 * MIB, 6 * MIB),
        (SIZE - 512, 512),
    ] {
        file.seek(SeekFrom::Start(at)).unwrap();
        file.write_all(&random.bytes(usize::try_from(len).unwrap()))
            .unwrap();
    }
    path.to_owned()
}

/// Every way to reach an export: server by server, TCP and unix.
fn all_uris(cluster: &Cluster, export: &str) -> Vec<String> {
    cluster
        .servers
        .iter()
        .flat_map(|server| server.uris(export))
        .collect()
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Patterns by `qemu-io`: aligned and unaligned writes, zeroes, discard, flush, FUA, asynchronous
/// requests; what one server was told, the next one shows.
#[test]
fn qemu_io() {
    let cluster = Cluster::three();
    cluster.create("v", SIZE);
    let uris = all_uris(&cluster, "v");
    for (number, uri) in uris.iter().enumerate() {
        let pattern = number + 1;
        let next = &uris[(number + 2) % uris.len()];
        let write = [
            format!("write -P {pattern} 0 1M"),
            format!("write -P {pattern} 4095k 10k"),
            format!("write -f -P {pattern} 6M 4k"),
            format!("aio_write -P {pattern} 7M 1M"),
            format!("aio_write -P {pattern} 8M 1M"),
            "aio_flush".to_owned(),
            "write -P 0xee 12M 256k".to_owned(),
            "write -z 12M 64k".to_owned(),
            "write -z -u 12352k 64k".to_owned(),
            "discard 12416k 64k".to_owned(),
            format!("write -P {pattern} 1234567 7654321"),
            "flush".to_owned(),
        ];
        let check = [
            format!("read -P {pattern} 0 1M"),
            format!("read -P {pattern} 4095k 10k"),
            format!("read -P {pattern} 6M 4k"),
            format!("read -P {pattern} 7M 1M"),
            "read -P 0 12M 192k".to_owned(),
            "read -P 0xee 12480k 64k".to_owned(),
            format!("read -P {pattern} 1234567 7654321"),
        ];
        for (through, commands) in [(uri, &write[..]), (uri, &check[..]), (next, &check[..])] {
            let mut arguments = vec!["-f", "raw", through];
            arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
            let ran = try_run(60, "qemu-io", arguments).ok();
            for sign in ["failed", "Pattern verification", "rror"] {
                assert!(!ran.stdout.contains(sign), "{through}: {}", ran.stdout);
            }
        }
        run(60, "qemu-io", ["-f", "raw", uri, "-c", "write -z -u 0 24M"]);
    }
}

/// `qemu-img convert`, `compare` and `map` both ways.
#[test]
fn qemu_img() {
    let cluster = Cluster::three();
    for (number, server) in cluster.servers.iter().enumerate() {
        for (kind, other) in [(0, 1), (1, 0)] {
            let name = format!("v{number}{kind}");
            cluster.create(&name, SIZE);
            let uri = &server.uris(&name)[kind];
            let raw = image(&cluster.path(&name), number as u64);
            let convert = ["convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8"];
            run(
                60,
                "qemu-img",
                convert.iter().copied().chain([text(&raw), uri]),
            );
            let behind = &cluster.servers[(number + 1) % 3].uris(&name)[other];
            run(
                60,
                "qemu-img",
                ["compare", "-f", "raw", "-F", "raw", text(&raw), behind],
            );
            let back = cluster.path("back");
            run(
                60,
                "qemu-img",
                ["convert", "-f", "raw", "-O", "raw", behind, text(&back)],
            );
            run(60, "cmp", [&raw, &back]);
            let changed = format!("write -P 1 {}M 4k", 4 + number);
            run(60, "qemu-io", ["-f", "raw", uri, "-c", &changed]);
            let compared = ["compare", "-f", "raw", "-F", "raw", text(&raw), behind];
            let differs = try_run(60, "qemu-img", compared);
            assert_eq!(
                differs.code,
                Some(1),
                "a difference was not seen: {differs:?}"
            );
        }
    }
}

/// Data and holes as `qemu-img map` and `nbdinfo --map` see them, equal through every server.
#[test]
fn maps_show_what_was_written() {
    let cluster = Cluster::three();
    cluster.create("v", SIZE);
    let mut connection = cluster.nbd(0, "v");
    connection.write(0, &[7; 1 << 20]).unwrap();
    connection.write(10 * MIB, &[7; 1 << 20]).unwrap();
    connection.write(15 * MIB, &[7; 2 << 20]).unwrap();
    connection.trim(16 * MIB, 1 << 20).unwrap();
    let data = [(0, MIB), (10 * MIB, MIB), (15 * MIB, MIB)];
    for uri in all_uris(&cluster, "v") {
        let map = run(60, "qemu-img", ["map", "-f", "raw", "--output=json", &uri]);
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let extent = |entry: &serde_json::Value| {
            let zero = entry["zero"].as_bool().unwrap();
            (!zero).then(|| {
                (
                    entry["start"].as_u64().unwrap(),
                    entry["length"].as_u64().unwrap(),
                )
            })
        };
        let found: Vec<_> = map.as_array().unwrap().iter().filter_map(extent).collect();
        assert_eq!(merged(found), data, "{uri}");
        let map = run(60, "nbdinfo", ["--map", "--json", &uri]);
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let extent = |entry: &serde_json::Value| {
            let is_data = entry["type"] == 0;
            is_data.then(|| {
                (
                    entry["offset"].as_u64().unwrap(),
                    entry["length"].as_u64().unwrap(),
                )
            })
        };
        let found: Vec<_> = map.as_array().unwrap().iter().filter_map(extent).collect();
        assert_eq!(merged(found), data, "{uri}");
    }
}

/// Joins extents that follow each other.
fn merged(extents: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    let mut all: Vec<(u64, u64)> = Vec::new();
    for (start, len) in extents {
        match all.last_mut() {
            Some(last) if last.0 + last.1 == start => last.1 += len,
            _ => all.push((start, len)),
        }
    }
    all
}

/// `nbdinfo` and `nbd-client -l`: one group, one list, the same sizes and flags everywhere; a
/// snapshot is read-only (S003-11, S003-20).
#[test]
fn every_server_describes_the_same_exports() {
    let cluster = Cluster::three();
    cluster.create("v", SIZE);
    cluster.create_on("w", 2 * SIZE, 256, &[2]);
    cluster.snapshot("v@s");
    for server in &cluster.servers {
        for uri in server.uris("v") {
            let json = run(60, "nbdinfo", ["--json", &uri]);
            let json: serde_json::Value = serde_json::from_str(&json).unwrap();
            let export = &json["exports"][0];
            assert_eq!(export["export-size"], SIZE, "{uri}");
            for feature in ["is_read_only", "is_rotational"] {
                assert_eq!(export[feature], false, "{uri} {feature}");
            }
            let can = ["multi_conn", "flush", "fua", "trim", "zero", "cache", "df"];
            for feature in can {
                assert_eq!(export[format!("can_{feature}")], true, "{uri} {feature}");
            }
            run(60, "nbdinfo", ["--can", "multi-conn", &uri]);
            run(60, "nbdinfo", ["--can", "structured-reply", &uri]);
            assert_eq!(
                run(60, "nbdinfo", ["--size", &uri]).trim(),
                SIZE.to_string()
            );
        }
        for uri in server.uris("v@s") {
            run(60, "nbdinfo", ["--is", "read-only", &uri]);
            let write = ["-f", "raw", &uri, "-c", "write 0 4k"];
            assert_ne!(
                try_run(60, "qemu-io", write).code,
                Some(0),
                "{uri} was written to"
            );
        }
        for uri in server.uris("absent") {
            let absent = try_run(60, "nbdinfo", ["--size", &uri]);
            assert_ne!(absent.code, Some(0), "{uri} exists");
            assert!(
                absent.stderr.contains("absent"),
                "the error names no export: {absent:?}"
            );
        }
        lists_all_exports(server);
    }
}

fn lists_all_exports(server: &Server) {
    for uri in server.uris("") {
        let json = run(60, "nbdinfo", ["--list", "--json", &uri]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let exports = json["exports"].as_array().unwrap();
        let mut found: Vec<_> = exports
            .iter()
            .map(|export| {
                (
                    export["export-name"].as_str().unwrap(),
                    export["export-size"].as_u64().unwrap(),
                )
            })
            .collect();
        found.sort_unstable();
        assert_eq!(
            found,
            [("v", SIZE), ("v@s", SIZE), ("w", 2 * SIZE)],
            "{uri}"
        );
    }
    let address = server.address.to_string();
    let socket = server.socket();
    for arguments in [vec!["-l", &address], vec!["-l", "-u", text(&socket)]] {
        let listed = run(60, "nbd-client", &arguments);
        for name in ["v", "v@s", "w"] {
            let names = |line: &str| line.split([' ', ':']).next() == Some(name);
            assert!(listed.lines().any(names), "{arguments:?}: {listed}");
        }
    }
}

/// `qemu-nbd --list` shows each export with its contexts, and `qemu-img bench` runs.
#[test]
fn qemu_nbd_list_and_bench() {
    let cluster = Cluster::three();
    cluster.create("v", SIZE);
    cluster.snapshot("v@s");
    let server = &cluster.servers[1];
    let (address, socket) = (server.address.to_string(), server.socket());
    for arguments in [vec!["-L", "-b", &address], vec!["-L", "-k", text(&socket)]] {
        let listed = run(60, "qemu-nbd", &arguments);
        assert!(listed.contains("exports available: 2"), "{listed}");
        for word in ["'v'", "'v@s'", "base:allocation", "readonly", "multi"] {
            assert!(listed.contains(word), "{word}: {listed}");
        }
    }
    for uri in server.uris("v") {
        let write = ["-w", "--flush-interval=100", "--pattern=7"];
        for more in [&[][..], &write] {
            let bench = [
                "bench", "-f", "raw", "-c", "2000", "-d", "32", "-s", "4096", &uri,
            ];
            run(60, "qemu-img", bench.iter().chain(more));
        }
    }
}

/// Malformed requests of libnbd without its checks: the right errors, and the connection lives.
#[test]
fn nbdsh_without_strict_mode() {
    let script = r"
h.set_strict_mode(0)
def errno(f, *args, **kw):
    try:
        f(*args, **kw)
        return 'OK'
    except nbd.Error as e:
        return e.errno
size = h.get_size()
for f, end in ((h.pread, 'EINVAL'), (h.trim, 'EINVAL'), (h.cache, 'EINVAL'), (h.zero, 'ENOSPC')):
    for offset in (size, size - 511, 2**63, 2**64 - 512):
        assert errno(f, 512, offset) == end, (f, offset)
    for flags in (1 << 14, nbd.CMD_FLAG_REQ_ONE):
        assert errno(f, 512, 0, flags=flags) == 'EINVAL', (f, flags)
assert errno(h.pwrite, b'x' * 512, size) == 'ENOSPC'
assert errno(h.pwrite, b'x' * 512, 0, flags=nbd.CMD_FLAG_DF) == 'EINVAL'
assert errno(h.block_status, 0, 0, lambda *a: 0) == 'EINVAL'
for f in (h.trim, h.zero):
    assert errno(f, 0, 0) == 'OK'
    assert errno(f, 512, 0, flags=nbd.CMD_FLAG_FUA) == 'OK'
assert errno(h.flush) == 'OK'
h.pwrite(b'y' * 512, 0, nbd.CMD_FLAG_FUA)
assert h.pread(2, 511) == b'y\0'
print('done')
";
    let cluster = Cluster::three();
    cluster.create("v", SIZE);
    for uri in cluster.servers[2].uris("v") {
        let shell = [
            "PATH=/usr/bin:/bin",
            "nbdsh",
            "--base-allocation",
            "-u",
            &uri,
            "-c",
            script,
        ];
        assert_eq!(run(60, "env", shell).trim(), "done");
    }
}

/// `nbdcopy` with four connections in and out of every server.
#[test]
fn nbdcopy_with_four_connections() {
    let cluster = Cluster::three();
    cluster.create("v", SIZE);
    let uris = all_uris(&cluster, "v");
    for (number, uri) in uris.iter().enumerate() {
        let raw = image(&cluster.path("raw"), 100 + number as u64);
        run(
            60,
            "nbdcopy",
            ["--connections=4", "--flush", text(&raw), uri],
        );
        let behind = &uris[(number + 3) % uris.len()];
        for from in [uri, behind] {
            let back = cluster.path("back");
            fs::File::create(&back).unwrap().set_len(SIZE).unwrap();
            run(
                60,
                "nbdcopy",
                ["--connections=4", "--requests=64", from, text(&back)],
            );
            run(60, "cmp", [&raw, &back]);
        }
    }
}

/// fio writes with crc32c headers at a queue depth of 32 in four jobs, and verifies through
/// another server.
#[test]
fn fio_crc32c_verify() {
    let cluster = Cluster::three();
    cluster.create("v", 64 * MIB);
    let uris = all_uris(&cluster, "v");
    for (number, uri) in uris.iter().enumerate() {
        let behind = &uris[(number + 3) % uris.len()];
        let seed = format!("--randseed={}", 1000 + number);
        for (mode, through) in [("--do_verify=1", uri), ("--verify_only=1", behind)] {
            let uri = format!("--uri={through}");
            let arguments = [
                "--name=v",
                "--ioengine=nbd",
                &uri,
                &seed,
                mode,
                "--rw=randwrite",
                "--bs=4k",
                "--iodepth=32",
                "--numjobs=4",
                "--size=6m",
                "--offset_increment=16m",
                "--verify=crc32c",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--thread",
                "--group_reporting",
                "--minimal",
            ];
            run(60, "fio", arguments);
        }
    }
}

/// The `nbd` crate's client, which knows only the oldest of the newstyle handshakes.
#[test]
fn nbd_crate() {
    let cluster = Cluster::three();
    cluster.create("v", SIZE);
    let mut random = Random::new(11);
    for server in &cluster.servers {
        let data = random.bytes(3 << 20);
        let tcp = TcpStream::connect(server.nbd_address()).unwrap();
        let mut client = crate_client(tcp);
        client.seek(SeekFrom::Start(3 * MIB)).unwrap();
        client.write_all(&data).unwrap();
        for reader in &cluster.servers {
            let mut client = crate_client(UnixStream::connect(reader.socket()).unwrap());
            client.seek(SeekFrom::Start(3 * MIB)).unwrap();
            let mut found = vec![0; data.len()];
            client.read_exact(&mut found).unwrap();
            assert!(found == data, "server {} shows other data", reader.number);
        }
    }
}

fn crate_client<S: Read + Write>(mut stream: S) -> nbd::client::NbdClient<S> {
    let export = nbd::client::handshake(&mut stream, b"v").unwrap();
    assert_eq!(export.size, SIZE);
    nbd::client::NbdClient::new(stream, &export)
}
