//! `blockctl attach --socket`: QEMU and libnbd on a unix socket that outlives its servers.

use blockd::admin::AdminRequest;
use blockd_tests::{Attachments, Cluster, MIB, NbdConnection, run, try_run};
use std::path::Path;
use std::thread::{sleep, spawn};
use std::time::{Duration, Instant};

/// Time between a restart and the next kill.
const CALM: Duration = Duration::from_secs(2);
/// How long a server stays away.
const AWAY: Duration = Duration::from_millis(700);
const PATIENCE: Duration = Duration::from_secs(60);

fn uri(export: &str, socket: &Path) -> String {
    format!("nbd+unix:///{export}?socket={}", socket.display())
}

fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never {what}");
        sleep(Duration::from_millis(50));
    }
}

/// Each server in turn is killed and restarted under fio, which checks every block it reads.
#[test]
fn fio_sees_no_error_while_each_server_dies() {
    let mut cluster = Cluster::three();
    cluster.create("v", 256 * MIB);
    let attachments = Attachments::new(&cluster);
    let uri = uri("v", &attachments.socket("v"));
    let directory = cluster.path("fio");
    std::fs::create_dir_all(&directory).unwrap();
    let fio = spawn(move || {
        let job = [
            "--name=v",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            "--rw=randrw",
            "--bs=4k-64k",
            "--iodepth=16",
            "--size=64m",
            "--io_size=4g",
            "--time_based",
            "--runtime=12",
            "--rate=8m",
            "--verify=crc32c",
            "--verify_backlog=64",
            "--verify_fatal=1",
            "--verify_state_save=0",
            "--fsync=50",
        ];
        let script = format!("cd {} && exec fio {}", directory.display(), job.join(" "));
        try_run(120, "sh", ["-c", &script]).ok()
    });
    let mut kills = 0;
    while !fio.is_finished() {
        let server = &mut cluster.servers[kills % 3];
        server.kill();
        sleep(AWAY);
        server.start();
        kills += 1;
        sleep(CALM);
    }
    let ran = fio.join().unwrap();
    assert!(ran.stdout.contains("err= 0"), "{ran:?}");
    let status = attachments.status("v");
    assert!(kills >= 3, "{kills} kills");
    assert!(status["reconnects"].as_u64() >= Some(2), "{status}");
    assert_eq!(status["errors"], 0, "{status}");
    assert_eq!(status["last_error"], serde_json::Value::Null);
    assert!(status["longest_stall_ms"].as_u64() >= Some(400), "{status}");
    eprintln!("attach: {kills} kills, {status}");
}

/// A request waits for a server that is away, and `status` says so.
#[test]
fn status_tells_of_a_request_that_waits() {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 8 * MIB, 8192, &[2]);
    let attachments = Attachments::new(&cluster);
    let socket = attachments.socket("v");
    cluster.servers[1].kill();
    let waiting = spawn(move || {
        let mut nbd = NbdConnection::unix(&socket, "").unwrap();
        nbd.write(4096, &[7; 4096]).unwrap();
        nbd.read(0, 8192).unwrap()
    });
    wait_until("waiting", || attachments.status("v")["state"] == "waiting");
    let status = attachments.status("v");
    assert_eq!(status["requests_in_flight"], 1, "{status}");
    cluster.servers[1].start();
    let data = waiting.join().unwrap();
    assert!(data[..4096].iter().all(|byte| *byte == 0));
    assert!(data[4096..].iter().all(|byte| *byte == 7));
    let status = attachments.status("v");
    assert_eq!(
        (&status["state"], &status["errors"]),
        (&"serving".into(), &0.into())
    );
    assert!(status["longest_stall_ms"].as_u64() > Some(1000), "{status}");
}

#[test]
fn attaching_again_is_the_same_attachment() {
    let cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    let attachments = Attachments::new(&cluster);
    let socket = attachments.socket("v");
    let pid = attachments.status("v")["pid"].clone();
    assert_eq!(attachments.socket("v"), socket);
    assert_eq!(attachments.status("v")["pid"], pid);
    let elsewhere = attachments.try_blockctl(["--json", "attach", "v", "--socket", "/nowhere/x"]);
    assert_eq!(elsewhere.code, Some(1));
    assert!(elsewhere.stderr.contains("\"conflict\""), "{elsewhere:?}");
    assert!(
        elsewhere.stderr.contains(socket.to_str().unwrap()),
        "{elsewhere:?}"
    );
    attachments.blockctl(["detach", "v"]);
    assert_eq!(attachments.list().len(), 0);
    assert!(!socket.exists());
    let gone = attachments.try_blockctl(["--json", "detach", "v"]);
    assert_eq!(gone.code, Some(1));
    assert!(gone.stderr.contains("\"not_attached\""), "{gone:?}");
}

/// Two commands at once make one attachment.
#[test]
fn a_race_of_attaches_has_one_winner_and_no_loser() {
    let cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    let attachments = Attachments::new(&cluster);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| attachments.socket("v"));
        }
    });
    assert_eq!(attachments.list().len(), 1);
}

#[test]
fn the_socket_has_the_volume_under_its_name_and_as_the_default() {
    let cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    let attachments = Attachments::new(&cluster);
    let socket = attachments.socket("v");
    for export in ["", "v"] {
        let size = run(30, "nbdinfo", ["--size", &uri(export, &socket)]);
        assert_eq!(size.trim(), (8 * MIB).to_string());
    }
    assert_ne!(try_run(30, "nbdinfo", [&uri("w", &socket)]).code, Some(0));
}

/// Data and holes pass through, with the tools of libnbd and QEMU.
#[test]
fn tools_copy_over_the_socket() {
    let cluster = Cluster::three();
    cluster.create("v", 64 * MIB);
    let attachments = Attachments::new(&cluster);
    let socket = attachments.socket("v");
    let uri = uri("v", &socket);
    let (image, back) = (cluster.path("image"), cluster.path("back"));
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(64 * MIB).unwrap();
    let bytes: Vec<u8> = (0..9 * MIB).map(|at| (at * 31 / 7) as u8).collect();
    std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 3 * MIB).unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    run(60, "nbdcopy", ["--flush", &path(&image), &uri]);
    run(60, "nbdcopy", [&uri, &path(&back)]);
    run(60, "cmp", [&image, &back]);
    let words = [
        "-f",
        "raw",
        &uri,
        "-c",
        "write -f -P 9 1M 8k",
        "-c",
        "write -z 4M 64k",
    ];
    run(60, "qemu-io", words);
    let words = [
        "-f",
        "raw",
        &uri,
        "-c",
        "read -P 9 1M 8k",
        "-c",
        "read -P 0 4M 64k",
    ];
    let read = run(60, "qemu-io", words);
    assert!(!read.contains("verification failed"), "{read}");
    let map = run(60, "nbdinfo", ["--map", "--totals", &uri]);
    assert!(map.contains("hole"), "{map}");
}

#[test]
fn snapshots_and_read_only_attachments_refuse_writes() {
    let cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    cluster.snapshot("v@s");
    let attachments = Attachments::new(&cluster);
    let snapshot = attachments.socket("v@s");
    assert_eq!(attachments.status("v@s")["read_only"], true);
    assert!(
        NbdConnection::unix(&snapshot, "v@s")
            .unwrap()
            .write(0, &[1; 512])
            .is_err()
    );
    let path = cluster.path("ro.sock");
    let path = path.to_str().unwrap();
    attachments.blockctl(["attach", "v", "--read-only", "--socket", path]);
    assert!(
        NbdConnection::unix(Path::new(path), "v")
            .unwrap()
            .write(0, &[1; 512])
            .is_err()
    );
    let writable = attachments.try_blockctl(["attach", "v", "--socket", path]);
    assert_eq!(writable.code, Some(1), "{writable:?}");
    assert_eq!(attachments.list().len(), 2);
}

/// Another server is asked first, also one that the attachment did not know.
#[test]
fn move_changes_the_server_that_is_asked_first() {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 8 * MIB, 8192, &[2]);
    let attachments = Attachments::new(&cluster);
    let socket = attachments.socket("v");
    let mut nbd = NbdConnection::unix(&socket, "").unwrap();
    nbd.write(0, &[5; 4096]).unwrap();
    let third = cluster.servers[2].peer_address();
    attachments.blockctl(["attachment", "move", "v", "--to", &third]);
    let status = attachments.status("v");
    assert_eq!(status["servers"][0]["address"], third.as_str(), "{status}");
    assert_eq!(status["moves"], 1);
    // The server that was left owns nothing: its end is not noticed, and the volume still opens.
    cluster.servers[0].kill();
    assert!(nbd.read(0, 4096).unwrap().iter().all(|byte| *byte == 5));
    let nobody = attachments.try_blockctl([
        "--json",
        "--timeout",
        "2s",
        "attachment",
        "move",
        "v",
        "--to",
        "127.0.0.1:9",
    ]);
    assert_eq!(nobody.code, Some(3), "{nobody:?}");
    assert_eq!(
        attachments.status("v")["servers"][0]["address"],
        third.as_str()
    );
    assert_eq!(attachments.status("v")["errors"], 0);
    cluster.servers[0].start();
}

/// A server of another cluster is refused, and nothing changes.
#[test]
fn move_to_another_cluster_is_refused() {
    let (ours, theirs) = (Cluster::three(), Cluster::three());
    ours.create("v", 8 * MIB);
    theirs.create("v", 8 * MIB);
    let attachments = Attachments::new(&ours);
    let socket = attachments.socket("v");
    let other = theirs.servers[0].peer_address();
    let refused = attachments.try_blockctl(["attachment", "move", "v", "--to", &other]);
    assert_ne!(refused.code, Some(0), "{refused:?}");
    assert!(refused.stderr.contains("cluster"), "{refused:?}");
    let mut nbd = NbdConnection::unix(&socket, "").unwrap();
    nbd.write(0, &[5; 4096]).unwrap();
    assert_eq!(attachments.status("v")["moves"], 0);
}

#[test]
fn a_daemon_that_was_killed_is_started_again() {
    let cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    let attachments = Attachments::new(&cluster);
    let socket = attachments.socket("v");
    let mut nbd = NbdConnection::unix(&socket, "").unwrap();
    nbd.write(0, &[5; 4096]).unwrap();
    attachments.kill_daemon("v");
    wait_until("unserved", || attachments.list()[0]["state"] == "unserved");
    let moved = attachments.try_blockctl(["attachment", "move", "v", "--to", "127.0.0.1"]);
    assert!(moved.stderr.contains("blockctl attach v"), "{moved:?}");
    attachments.socket("v");
    assert_eq!(attachments.status("v")["state"], "serving");
    let mut nbd = NbdConnection::unix(&socket, "").unwrap();
    assert!(nbd.read(0, 4096).unwrap().iter().all(|byte| *byte == 5));
    attachments.kill_daemon("v");
    wait_until("unserved", || attachments.list()[0]["state"] == "unserved");
    attachments.blockctl(["detach", "v"]);
    assert_eq!(attachments.list().len(), 0);
}

/// A new size reaches an attached volume by itself, also under another name.
#[test]
fn a_resize_is_seen_by_the_next_connection() {
    let cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    let attachments = Attachments::new(&cluster);
    let socket = attachments.socket("v");
    let rename = AdminRequest::VolumeRename {
        name: "v".to_owned(),
        new_name: "w".to_owned(),
    };
    cluster.admin(rename).unwrap();
    let resize = AdminRequest::VolumeResize {
        name: "w".to_owned(),
        size_bytes: 24 * MIB,
        allow_shrink: false,
    };
    cluster.admin(resize).unwrap();
    wait_until("larger", || {
        attachments.status("v")["size_bytes"] == 24 * MIB
    });
    let mut nbd = NbdConnection::unix(&socket, "").unwrap();
    assert_eq!(nbd.size_bytes(), 24 * MIB);
    nbd.write(20 * MIB, &[3; 4096]).unwrap();
}

/// The second writer is told who the first one is; the first one's death on this host frees it.
#[test]
fn exclusive_names_the_holder() {
    let cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    let first = Attachments::new(&cluster);
    let path = cluster.path("x.sock");
    let words = [
        "attach",
        "v",
        "--exclusive",
        "--socket",
        path.to_str().unwrap(),
    ];
    first.blockctl(words);
    let status = first.status("v");
    assert_eq!(status["exclusive"], true, "{status}");
    let mut nbd = NbdConnection::unix(&path, "").unwrap();
    nbd.write(0, &[5; 4096]).unwrap();
    assert!(cluster.nbd(0, "v").write(0, &[6; 4096]).is_err(), "fenced");
    let second = Attachments::elsewhere(&cluster, "run2");
    let other = cluster.path("y.sock");
    let other = other.to_str().unwrap();
    let refused = second.try_blockctl(["--json", "attach", "v", "--exclusive", "--socket", other]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    let pid = status["pid"].to_string();
    assert!(refused.stderr.contains(&pid), "{refused:?}");
    first.kill_daemon("v");
    wait_until("unserved", || first.list()[0]["state"] == "unserved");
    first.blockctl(words);
    let mut nbd = NbdConnection::unix(&path, "").unwrap();
    assert!(nbd.read(0, 4096).unwrap().iter().all(|byte| *byte == 5));
    nbd.write(0, &[8; 4096]).unwrap();
    first.blockctl(["detach", "v"]);
    let mut anybody = cluster.nbd(0, "v");
    anybody.write(0, &[9; 4096]).unwrap();
}

#[test]
fn errors_say_what_is_missing() {
    let mut cluster = Cluster::three();
    cluster.create("v", 8 * MIB);
    let attachments = Attachments::new(&cluster);
    let none = attachments.try_blockctl(["--json", "attach", "w", "--socket", "/nowhere/x"]);
    assert!(none.stderr.contains("\"not_found\""), "{none:?}");
    let nowhere = attachments.try_blockctl(["attach", "v", "--socket", "/nowhere/x"]);
    assert!(nowhere.stderr.contains("/nowhere/x"), "{nowhere:?}");
    assert_eq!(attachments.list().len(), 0, "nothing is left behind");
    if !Path::new("/sys/module/nbd").exists() {
        let no_module = attachments.try_blockctl(["--json", "attach", "v"]);
        assert_eq!(no_module.code, Some(1));
        assert!(no_module.stderr.contains("\"no_module\""), "{no_module:?}");
        assert!(no_module.stderr.contains("--socket"), "{no_module:?}");
    }
    cluster.servers.iter_mut().for_each(|server| server.kill());
    let away = attachments.try_blockctl(["--timeout", "1s", "attach", "v", "--socket", "/tmp/x"]);
    assert_eq!(away.code, Some(3), "{away:?}");
}
