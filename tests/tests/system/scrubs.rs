//! `blockctl volume scrub`: exact about damage, quiet without, and beside a load.

use blockd_tests::{Cluster, MIB, Ran, Random, binary, try_run};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::fs;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

fn blockctl(cluster: &Cluster, arguments: &[&str]) -> Ran {
    let servers = cluster.server_list();
    let all = ["--servers", &servers, "--json"]
        .into_iter()
        .chain(arguments.iter().copied());
    try_run(120, binary("blockctl"), all)
}

fn json(ran: &Ran) -> Value {
    serde_json::from_str(&ran.stdout).unwrap_or_else(|e| panic!("{e}: {ran:?}"))
}

/// Damage on the disk of one server is reported with page, offset, server and the snapshots that see
/// it, and nothing else is; the result stays with the volume.
#[test]
fn damage_is_reported_exactly() {
    let mut cluster = Cluster::three();
    cluster.create("v", 12 * MIB);
    let data = Random::new(9).bytes(12 << 20);
    let volume = cluster.open("v");
    cluster.block(volume.write(0, data.clone().into())).unwrap();
    cluster.snapshot("v@old");
    cluster
        .block(volume.write(5 * MIB, vec![7; 8192].into()))
        .unwrap();
    cluster.snapshot("v@new");
    cluster.block(volume.flush()).unwrap();
    let ran = blockctl(&cluster, &["volume", "scrub", "v"]).ok();
    let clean = json(&ran);
    assert_eq!(
        (&clean["damaged_bytes"], &clean["complete"]),
        (&0.into(), &true.into())
    );
    assert_eq!(clean["verified_bytes"], (12 << 20) + 8192);

    // The owner of page 1, which is stopped cleanly so that all is in its slab.
    let owner = usize::from(
        cluster
            .route(0, "v")
            .runs
            .iter()
            .find(|run| run.first_page == 1)
            .unwrap()
            .owner
            .0,
    ) - 1;
    assert!(cluster.servers[owner].stop().success());
    let slab = cluster.servers[owner].state.join("store/slab");
    let mut bytes = fs::read(&slab).unwrap();
    let find = |bytes: &[u8], wanted: &[u8]| {
        let at = (0..bytes.len() / 4096)
            .map(|n| n * 4096)
            .find(|at| &bytes[*at..at + 4096] == wanted);
        at.unwrap()
    };
    // Two neighbours that `old` sees alone, and one that all three see.
    let only_old = find(&bytes, &data[5 << 20..(5 << 20) + 4096]);
    let all_three = find(&bytes, &data[6 << 20..(6 << 20) + 4096]);
    for at in [only_old, only_old + 4096, all_three] {
        bytes[at + 11] ^= 0x80;
    }
    fs::write(&slab, bytes).unwrap();
    cluster.servers[owner].start();
    cluster.wait_writable();

    let ran = blockctl(&cluster, &["volume", "scrub", "v", "--rate", "1GiB"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let found = json(&ran);
    let ranges: Vec<_> = found["damaged"]
        .as_array()
        .unwrap()
        .iter()
        .map(|range| {
            let at = range["offset_bytes"].as_u64().unwrap();
            let len = range["len_bytes"].as_u64().unwrap();
            let file_at = range["file_offset_bytes"].as_u64().unwrap();
            (
                at,
                len,
                file_at,
                range["node"].clone(),
                range["seen_by"].clone(),
            )
        })
        .collect();
    let node = Value::from(owner + 1);
    assert_eq!(
        ranges,
        [
            (
                5 << 20,
                8192,
                only_old as u64,
                node.clone(),
                serde_json::json!(["v@old"])
            ),
            (
                6 << 20,
                4096,
                all_three as u64,
                node,
                serde_json::json!(["v", "v@old", "v@new"])
            ),
        ],
        "{found}"
    );
    let shown = json(&blockctl(&cluster, &["volume", "show", "v"]).ok());
    assert_eq!(shown["scrub"]["damaged_bytes"], 12288);
    assert_eq!(shown["scrub"]["verified_bytes"], (12 << 20) + 8192);
    // What the scrub calls damaged is exactly what cannot be read.
    let mut nbd = cluster.nbd(owner, "v");
    assert!(nbd.read(6 * MIB, 4096).is_err());
    assert!(nbd.read(6 * MIB + 4096, 4096).unwrap() == data[(6 << 20) + 4096..(6 << 20) + 8192]);
    assert!(nbd.read(5 * MIB, 8192).unwrap() == [7; 8192]);
    let missing = blockctl(&cluster, &["volume", "scrub", "nosuch"]);
    assert!(
        missing.code == Some(1) && missing.stderr.contains("not_found"),
        "{missing:?}"
    );
}

/// Beside writes and snapshots there is no false alarm, and the writes go on meanwhile.
#[test]
fn a_scrub_beside_writes_finds_nothing() {
    let cluster = Cluster::three();
    cluster.create("v", 16 * MIB);
    let volume = cluster.open("v");
    cluster
        .block(volume.write(0, vec![1; 16 << 20].into()))
        .unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut random = Random::new(3);
            let mut slowest = std::time::Duration::ZERO;
            let mut count = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let len = [4096, 65536, 300_000][usize::try_from(random.within(0..3)).unwrap()];
                let at = random.within(0..(16 << 20) - len);
                let began = Instant::now();
                let byte = u8::try_from(count % 251).unwrap();
                cluster
                    .block(volume.write(at, vec![byte; usize::try_from(len).unwrap()].into()))
                    .unwrap();
                slowest = slowest.max(began.elapsed());
                count += 1;
            }
            (count, slowest)
        });
        for round in 0..6 {
            cluster.snapshot(&format!("v@s{round}"));
            let ran = blockctl(&cluster, &["volume", "scrub", "--all", "--rate", "100MiB"]).ok();
            assert_eq!(json(&ran)[0]["damaged_bytes"], 0, "{ran:?}");
        }
        stop.store(true, Ordering::Relaxed);
        let (count, slowest) = writer.join().unwrap();
        assert!(count > 20, "{count} writes, the slowest took {slowest:?}");
    });
}

/// A server that is away is said, with its own exit code; `--resume` goes on there.
#[test]
fn a_scrub_without_a_server_is_not_complete() {
    let mut cluster = Cluster::three();
    cluster.create("v", 12 * MIB);
    let volume = cluster.open("v");
    cluster
        .block(volume.write(0, vec![1; 12 << 20].into()))
        .unwrap();
    cluster.servers[2].kill();
    cluster.wait_writable_but(2);
    let ran = blockctl(&cluster, &["--timeout", "10s", "volume", "scrub", "v"]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    let found = json(&ran);
    assert_eq!(
        (&found["complete"], &found["failed_on"]),
        (&false.into(), &serde_json::json!([3]))
    );
    cluster.servers[2].start();
    cluster.wait_writable();
    let rest = json(&blockctl(&cluster, &["volume", "scrub", "v", "--resume"]).ok());
    assert_eq!(
        (&rest["complete"], &rest["verified_bytes"]),
        (&true.into(), &(4 << 20).into())
    );
}

/// Ctrl-c pauses a scrub, which keeps to its rate; `--resume` verifies the rest and no more.
#[test]
fn a_paused_scrub_goes_on_where_it_was() {
    let cluster = Cluster::three();
    cluster.create("v", 36 * MIB);
    let volume = cluster.open("v");
    cluster
        .block(volume.write(0, vec![1; 36 << 20].into()))
        .unwrap();
    let servers = cluster.server_list();
    let arguments = [
        "--servers",
        &servers,
        "--json",
        "volume",
        "scrub",
        "v",
        "--rate",
        "2MiB",
    ];
    let mut command = Command::new(binary("blockctl"));
    let child = command
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    sleep(Duration::from_millis(3500));
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let part: Value = serde_json::from_slice(&output.stdout).unwrap();
    let verified = part["verified_bytes"].as_u64().unwrap();
    // Three servers for three seconds or so, at 2 MiB a second each.
    assert!((3 << 20..27 << 20).contains(&verified), "{part}");
    assert_eq!(part["complete"], false);
    let shown = json(&blockctl(&cluster, &["volume", "show", "v"]).ok());
    assert_eq!(shown["scrub"]["complete"], false);
    let rest = json(&blockctl(&cluster, &["volume", "scrub", "v", "--resume"]).ok());
    let whole = verified + rest["verified_bytes"].as_u64().unwrap();
    // What a server had begun when the client left is verified once more.
    assert!((36 << 20..=44 << 20).contains(&whole), "{part} {rest}");
    assert_eq!(rest["complete"], true);
}
