//! A full disk: writes are answered ENOSPC, nothing else breaks, space that is freed works again.

use blockd::client::{ClientError, IoErrorKind};
use blockd_tests::{Cluster, ClusterOptions, MIB, NbdConnection, NbdError, Random, Server, Tmpfs};

const ENOSPC: u32 = 28;
const DISK: u64 = 160 * MIB;
const LOG: u64 = 16 * MIB;
const STEP: usize = 1 << 20;

/// One server with a small disk among three; `RESERVE` stays free for its registry.
fn cluster() -> (Cluster, Tmpfs) {
    let mut cluster = Cluster::undefined(&ClusterOptions {
        servers: 3,
        config: format!("log_bytes = {LOG}\nreserve_bytes = {}\n", 16 * MIB),
    });
    let disk = Tmpfs::mount(&cluster.path("disk"), DISK);
    cluster.servers[1].state = disk.path().join("state");
    cluster.servers.iter_mut().for_each(Server::start);
    cluster.define("test");
    (cluster, disk)
}

/// Writes one MiB after the other until the server refuses; how many were acknowledged.
fn fill(connection: &mut NbdConnection, limit: u64) -> u64 {
    for step in 0..limit {
        let data = Random::new(step).bytes(STEP);
        match connection.write(step * MIB, &data) {
            Ok(()) => {}
            Err(NbdError::Errno(ENOSPC)) => return step,
            Err(error) => panic!("step {step}: {error:?} instead of ENOSPC"),
        }
    }
    panic!("{limit} MiB fit on a disk of {} MiB", DISK / MIB);
}

/// ENOSPC for writes to the full server only; reads, flushes, other servers and administration go
/// on; all that was acknowledged stays, also over a kill; TRIM makes room.
#[test]
fn a_full_disk_refuses_writes_and_nothing_else() {
    let (mut cluster, _disk) = cluster();
    cluster.create_on("full", 512 * MIB, 8192, &[2]);
    cluster.create_on("spread", 48 * MIB, 256, &[]);
    cluster.create_on("elsewhere", 32 * MIB, 8192, &[1, 3]);
    let mut connection = cluster.nbd(0, "full");
    let written = fill(&mut connection, 400);
    assert!(
        written >= 40,
        "only {written} MiB of {} were used",
        DISK / MIB
    );
    connection.flush().unwrap();
    let check = |cluster: &Cluster, from: u64| {
        let mut connection = cluster.nbd(2, "full");
        for step in from..written {
            let found = connection.read(step * MIB, 1 << 20).unwrap();
            assert!(
                found == Random::new(step).bytes(STEP),
                "MiB {step} has changed"
            );
        }
    };
    check(&cluster, 0);
    let volume = cluster.open("full");
    let refused = cluster.block(volume.write(500 * MIB, vec![1; STEP].into()));
    match refused {
        Err(ClientError::Io {
            reason: IoErrorKind::NoSpace,
            ..
        }) => {}
        other => panic!("{other:?} instead of no space"),
    }
    cluster.nbd(1, "elsewhere").write(0, &[4; 8 << 20]).unwrap();
    cluster.create("another", MIB);
    cluster
        .admin(blockd::admin::AdminRequest::ClusterStatus)
        .unwrap();
    cluster.servers[1].kill();
    cluster.servers[1].start();
    cluster.wait_writable();
    check(&cluster, 0);
    let mut connection = cluster.nbd(0, "full");
    connection.trim(0, 24 << 20).unwrap();
    connection.flush().unwrap();
    let room = (0..16).map(|step| (step, Random::new(1000 + step).bytes(STEP)));
    for (step, data) in room {
        write_soon(&mut connection, (300 + step) * MIB, &data);
    }
    connection.flush().unwrap();
    check(&cluster, 24);
    for step in 0..16 {
        let found = connection.read((300 + step) * MIB, 1 << 20).unwrap();
        assert!(
            found == Random::new(1000 + step).bytes(STEP),
            "written after TRIM, now changed"
        );
    }
}

/// Freed space may need a checkpoint before it can be used.
fn write_soon(connection: &mut NbdConnection, at: u64, data: &[u8]) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    loop {
        match connection.write(at, data) {
            Ok(()) => return,
            Err(NbdError::Errno(ENOSPC)) if std::time::Instant::now() < deadline => {
                std::thread::sleep(std::time::Duration::from_millis(50));
            }
            Err(error) => panic!("still no room after TRIM or delete: {error:?}"),
        }
    }
}

/// Deleting a snapshot and a volume on a full disk works and makes room.
#[test]
fn deleting_makes_room_on_a_full_disk() {
    let (cluster, _disk) = cluster();
    cluster.create_on("full", 512 * MIB, 8192, &[2]);
    let mut connection = cluster.nbd(0, "full");
    let data = Random::new(7).bytes(STEP);
    for step in 0..30 {
        connection.write(step * MIB, &data).unwrap();
    }
    cluster.snapshot("full@s");
    let written = fill(&mut connection, 400);
    assert!(
        written < 120,
        "{written} MiB fit beside a snapshot of 30 MiB"
    );
    cluster.delete_snapshot("full@s");
    write_soon(&mut connection, 300 * MIB, &data);
    let name = "full".to_owned();
    cluster
        .admin(blockd::admin::AdminRequest::VolumeDelete { name })
        .unwrap();
    cluster.create_on("next", 512 * MIB, 8192, &[2]);
    let mut connection = cluster.nbd(2, "next");
    for step in 0..40 {
        write_soon(&mut connection, step * MIB, &data);
    }
    assert!(connection.read(39 * MIB, 1 << 20).unwrap() == data);
}
