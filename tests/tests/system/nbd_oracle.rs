//! The table of NBD's rules against `nbd-server` on memory and on a file, and against `blockd`,
//! over TCP and unix.

use blockd_tests::nbd_raw::{Address, Endpoint};
use blockd_tests::nbd_table::{LARGE, SIZE, Target, judge};
use blockd_tests::{Cluster, NbdServer};

#[test]
fn nbd_server_on_memory() {
    let size = SIZE.to_string();
    let writable = NbdServer::memory(&size, &["--name", "vol1"]);
    let read_only = NbdServer::memory(&size, &["--read-only"]);
    let large = NbdServer::memory(&LARGE.to_string(), &["--name", "large"]);
    judge_both("nbd-server on memory", [&writable, &read_only, &large]);
}

#[test]
fn nbd_server_on_a_file() {
    let writable = NbdServer::file(SIZE, &["--name", "vol1"]);
    let read_only = NbdServer::file(SIZE, &["--read-only"]);
    let large = NbdServer::file(LARGE, &["--name", "large"]);
    judge_both("nbd-server on a file", [&writable, &read_only, &large]);
}

/// Over TCP and over the unix socket.
fn judge_both(name: &'static str, [writable, read_only, large]: [&NbdServer; 3]) {
    for transport in 0..2 {
        judge(&Target {
            name,
            export: writable.endpoints("vol1")[transport].clone(),
            read_only: read_only.endpoints("")[transport].clone(),
            large: large.endpoints("large")[transport].clone(),
            has_names: true,
        });
    }
}

/// A volume over three servers, through one of them; the other two own most of it.
#[test]
fn blockd() {
    let cluster = Cluster::three();
    cluster.create("empty", SIZE);
    cluster.snapshot("empty@snap");
    cluster.create("vol1", SIZE);
    cluster.snapshot("vol1@before");
    cluster.create("large", LARGE);
    for (server, is_unix) in [(0, false), (1, true)] {
        let server = &cluster.servers[server];
        let at = match is_unix {
            false => Address::Tcp(server.nbd_address()),
            true => Address::Unix(server.socket()),
        };
        judge(&Target {
            name: "blockd",
            export: Endpoint::new(at.clone(), "vol1"),
            read_only: Endpoint::new(at.clone(), "empty@snap"),
            large: Endpoint::new(at, "large"),
            has_names: true,
        });
    }
}
