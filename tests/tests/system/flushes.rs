//! What a FLUSH vouches for: everything that was acknowledged before it, whichever server and connection
//! that came through (S003-11, S003-23, promise 3).

use super::slow_disk::slow;
use blockd_tests::{Cluster, NbdConnection, NbdError};
use std::thread::spawn;

const EIO: u32 = 5;
const LEN: u32 = 65_536;

/// The first byte of a page of the slow server.
fn page_of_slow(cluster: &Cluster) -> u64 {
    let route = cluster.route(0, "v");
    let run = route.runs.iter().find(|run| run.owner.0 == 3).unwrap();
    u64::from(run.first_page) * u64::from(route.page_blocks) * 512
}

fn bytes(of: u8) -> Vec<u8> {
    vec![of; LEN as usize]
}

/// Two connections of one client, as `NBD_FLAG_CAN_MULTI_CONN` allows: it flushes through the first one
/// what it wrote through the second one, to a page that neither server has.
struct TwoWays {
    flushing: NbdConnection,
    writing: NbdConnection,
    at: u64,
}

impl TwoWays {
    fn new(cluster: &Cluster) -> Self {
        Self {
            flushing: cluster.nbd(0, "v"),
            writing: cluster.nbd(1, "v"),
            at: page_of_slow(cluster),
        }
    }

    fn write(&mut self, byte: u8) {
        self.writing.write(self.at, &bytes(byte)).unwrap();
    }

    /// Both ways show the same.
    fn shows(&mut self, byte: u8) {
        for connection in [&mut self.flushing, &mut self.writing] {
            assert!(connection.read(self.at, LEN).unwrap() == bytes(byte));
        }
    }
}

/// S003-11, S003-23: a FLUSH through server 1 ends when the disk of server 3 has what server 3 acknowledged
/// to server 2, and not before; that survives kill -9 of all.
#[test]
fn a_flush_waits_for_what_another_connection_wrote() {
    let mut cluster = Cluster::three();
    let disk = slow(&mut cluster);
    cluster.create("v", 12 << 20);
    let TwoWays {
        mut flushing,
        mut writing,
        at,
    } = TwoWays::new(&cluster);
    writing.write(at, &bytes(1)).unwrap();
    flushing.flush().unwrap();
    disk.stop();
    writing.write(at, &bytes(2)).unwrap();
    let flushing = spawn(move || flushing.flush().unwrap());
    disk.wait_stopped();
    assert!(!flushing.is_finished(), "it vouched for what no disk has");
    disk.go_on();
    flushing.join().unwrap();
    cluster
        .servers
        .iter_mut()
        .for_each(blockd_tests::Server::kill);
    cluster
        .servers
        .iter_mut()
        .for_each(blockd_tests::Server::start);
    cluster.wait_writable();
    TwoWays::new(&cluster).shows(2);
}

/// S003-11, promise 3: the owner dies with what another connection wrote since the last flush. After a kill
/// -9 the next FLUSH vouches for it. After a power loss (the machine has another boot id) nobody can:
/// that FLUSH fails, once, on each connection, and what was flushed before is there.
#[test]
fn a_flush_after_the_owners_death_vouches_or_fails() {
    let mut cluster = Cluster::three();
    let disk = slow(&mut cluster);
    cluster.create("v", 12 << 20);
    let mut ways = TwoWays::new(&cluster);
    ways.write(1);
    ways.flushing.flush().unwrap();
    ways.write(2);
    restart(&mut cluster);
    ways.flushing.flush().unwrap();
    ways.shows(2);
    ways.write(3);
    disk.lose_power();
    restart(&mut cluster);
    for connection in [&mut ways.flushing, &mut ways.writing] {
        let refused = connection.flush();
        assert!(matches!(refused, Err(NbdError::Errno(EIO))), "{refused:?}");
        connection.flush().unwrap();
    }
    // The kernel of this machine has not really lost anything.
    ways.shows(3);
}

/// kill -9 of the slow server.
fn restart(cluster: &mut Cluster) {
    cluster.servers[2].kill();
    cluster.servers[2].start();
    cluster.wait_writable();
}
