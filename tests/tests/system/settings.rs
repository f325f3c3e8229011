//! Settings of volumes: `volume set` and `volume get`.

use blockd_tests::{Cluster, MIB, binary, run, try_run};
use serde_json::{Value, json};
use std::thread::sleep;
use std::time::{Duration, Instant};

fn get(cluster: &Cluster, words: &str) -> Value {
    serde_json::from_str(&cluster.blockctl(&format!("volume get {words} --json"))).unwrap()
}

/// S003-45: the operator chooses the procedure per volume. Settings stay over restarts and renames
/// and go with the volume; what is no key or value is refused with the list of what is possible.
#[test]
fn settings_stay_with_their_volume() {
    let mut cluster = Cluster::three();
    cluster.create("v", 64 * MIB);
    cluster.create("w", 64 * MIB);
    assert_eq!(
        get(&cluster, "v procedure"),
        json!({"volume": "v", "procedure": "barrier"})
    );
    let shown = cluster.blockctl("volume set v procedure hold");
    assert_eq!(shown, "procedure  hold\nsnapshots  none\n");
    cluster.blockctl("volume rename v x");
    for server in &mut cluster.servers {
        server.kill();
        server.start();
    }
    cluster.wait_writable();
    assert_eq!(get(&cluster, "x")["procedure"], "hold");
    assert_eq!(get(&cluster, "w")["procedure"], "barrier");
    cluster.blockctl("volume delete x");
    cluster.create("x", 64 * MIB);
    assert_eq!(get(&cluster, "x")["procedure"], "barrier");
    for (words, wanted) in [
        (
            "set w colour red",
            "the settings of a volume are procedure, snapshots",
        ),
        ("set w procedure never", "give barrier, hold or stamp"),
        ("set nosuch procedure hold", "there is no volume"),
        ("get w colour", "the settings of a volume are procedure"),
        ("get nosuch", "there is no volume"),
    ] {
        let ran = cluster.try_blockctl(&format!("volume {words}"));
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.stderr.contains(wanted), "{ran:?}");
    }
}

fn set_schedule(cluster: &Cluster, volume: &str, schedule: &str) -> Value {
    let servers = cluster.server_list();
    let words = [
        "--servers",
        &servers,
        "--json",
        "volume",
        "set",
        volume,
        "snapshots",
        schedule,
    ];
    serde_json::from_str(&run(60, binary("blockctl"), words)).unwrap()
}

fn automatic(cluster: &Cluster, volume: &str) -> Vec<String> {
    let names = cluster
        .snapshots(volume)
        .into_iter()
        .map(|snapshot| snapshot.name);
    names.filter(|name| name.starts_with("auto-")).collect()
}

/// Waits until the newest scheduled snapshot of the volume is another one; all of them.
fn next_snapshot(cluster: &Cluster, volume: &str) -> Vec<String> {
    let before = automatic(cluster, volume);
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let now = automatic(cluster, volume);
        if now.last() > before.last() {
            return now;
        }
        assert!(Instant::now() < deadline, "no snapshot after {before:?}");
        sleep(Duration::from_millis(100));
    }
}

/// S003-31 (scheduled snapshots): taken at their times by one server, also while the registry's leader
/// changes; the newest are kept, and what people took stays; next, last and errors are shown.
#[test]
fn snapshots_are_taken_and_deleted_by_schedule() {
    let mut cluster = Cluster::three();
    cluster.create("v", 64 * MIB);
    cluster.snapshot("v@mine");
    let set = set_schedule(&cluster, "v", "every 2s keep 3, daily at 02:30 keep 7");
    assert_eq!(set["snapshots"], "every 2s keep 3, daily at 02:30 keep 7");
    assert_eq!(set["schedule"][1]["snapshot_count"], 0);
    for _ in 0..6 {
        next_snapshot(&cluster, "v");
    }
    sleep(Duration::from_millis(500));
    let kept = automatic(&cluster, "v");
    assert!((3..=4).contains(&kept.len()), "{kept:?}");
    assert!(
        kept.iter()
            .all(|name| name.starts_with("auto-2s-20") && name.len() == 27),
        "{kept:?}"
    );
    assert!(
        cluster
            .snapshots("v")
            .iter()
            .any(|snapshot| snapshot.name == "mine")
    );
    let shown = get(&cluster, "v snapshots");
    let rule = &shown["schedule"][0];
    assert_eq!(rule["last_error"], Value::Null);
    let (next, last) = (rule["next_unix_s"].as_u64(), rule["last_unix_s"].as_u64());
    assert!(next > last && last > Some(0), "{shown}");
    assert!(cluster.blockctl("volume get v").contains("RULE"), "a table");

    let status = cluster
        .admin(blockd::admin::AdminRequest::ClusterStatus)
        .unwrap();
    let blockd::admin::AdminReply::Cluster(status) = status else {
        panic!("{status:?}");
    };
    let leader = usize::from(status.leader.unwrap().0) - 1;
    cluster.servers[leader].kill();
    cluster.wait_writable_but(leader);
    // Owners that are down take no snapshots: the others go on trying.
    let error = || get(&cluster, "v snapshots")["schedule"][0]["last_error"].clone();
    let deadline = Instant::now() + Duration::from_secs(40);
    while error() == Value::Null {
        assert!(Instant::now() < deadline, "a failed snapshot is not shown");
        sleep(Duration::from_millis(200));
    }
    cluster.servers[leader].start();
    cluster.wait_writable();
    let deadline = Instant::now() + Duration::from_secs(60);
    let before = automatic(&cluster, "v");
    while automatic(&cluster, "v").last() <= before.last() {
        assert!(Instant::now() < deadline, "no snapshots any more");
        sleep(Duration::from_millis(200));
    }
    let names = next_snapshot(&cluster, "v");
    let mut once = names.clone();
    once.dedup();
    assert_eq!(once, names, "taken twice");
    assert_eq!(get(&cluster, "v")["schedule"][0]["last_error"], Value::Null);

    set_schedule(&cluster, "v", "none");
    sleep(Duration::from_secs(3));
    let names = automatic(&cluster, "v");
    sleep(Duration::from_secs(3));
    assert_eq!(
        automatic(&cluster, "v"),
        names,
        "none ends it and deletes nothing"
    );
    let servers = cluster.server_list();
    let words = [
        "--servers",
        &servers,
        "volume",
        "set",
        "v",
        "snapshots",
        "every day keep 3",
    ];
    let ran = try_run(60, binary("blockctl"), words);
    assert!(
        ran.code == Some(1) && ran.stderr.contains("s, m, h or d"),
        "{ran:?}"
    );
    cluster.blockctl("volume delete v --force");
}
