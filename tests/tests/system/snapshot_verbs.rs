//! The verbs of snapshots and volumes through `blockctl`: rename, protect, off-line.

use blockd_tests::{Cluster, MIB, NbdConnection, Ran, Random, binary, try_run};
use bytes::Bytes;
use serde_json::Value;

/// Runs `blockctl` with these words; however it ends.
pub(crate) fn ctl(cluster: &Cluster, words: &str) -> Ran {
    let servers = cluster.server_list();
    let words = ["--servers", &servers].into_iter().chain(words.split(' '));
    try_run(60, binary("blockctl"), words)
}

/// Runs `blockctl`, which must do it.
pub(crate) fn done(cluster: &Cluster, words: &str) {
    drop(ctl(cluster, words).ok());
}

/// The JSON that `blockctl` prints for these words.
pub(crate) fn ctl_json(cluster: &Cluster, words: &str) -> Value {
    let ran = ctl(cluster, &format!("--json {words}")).ok();
    serde_json::from_str(&ran.stdout).unwrap()
}

/// Runs `blockctl`, which must refuse; what it says.
pub(crate) fn ctl_refused(cluster: &Cluster, words: &str) -> String {
    let ran = ctl(cluster, words);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    ran.stderr
}

/// S003-20: a snapshot gets another name, also while it is read; a protected one is not deleted,
/// and `volume delete --force` deletes nothing then.
#[test]
fn snapshots_are_renamed_and_protected() {
    let cluster = Cluster::three();
    cluster.create("v", 16 * MIB);
    let data = Bytes::from(Random::new(1).bytes(1 << 20));
    cluster
        .block(cluster.open("v").write(0, data.clone()))
        .unwrap();
    cluster.snapshot("v@a");
    cluster.snapshot("v@b");
    let open = cluster.open("v@a");
    done(&cluster, "snapshot rename v@a first");
    let taken = ctl_refused(&cluster, "snapshot rename v@first b");
    assert!(taken.contains("v@b exists already"), "{taken}");
    assert!(ctl_refused(&cluster, "snapshot rename v@first .x").contains("start"));
    assert!(NbdConnection::tcp(&cluster.servers[1].nbd_address(), "v@a").is_err());
    done(&cluster, "volume resize v 32MiB");
    assert!(
        cluster.block(open.read(0, 1 << 20)).unwrap() == data,
        "open under its old name"
    );
    for server in 0..3 {
        assert!(cluster.nbd(server, "v@first").read(0, 1 << 20).unwrap() == data);
    }
    done(&cluster, "snapshot protect v@first");
    let refused = ctl_refused(&cluster, "snapshot delete v@first");
    assert!(refused.contains("snapshot unprotect v@first"), "{refused}");
    let refused = ctl_refused(&cluster, "volume delete v --force");
    assert!(refused.contains("nothing was deleted"), "{refused}");
    let listed = ctl_json(&cluster, "snapshot list v");
    let protected = |at: usize| (listed[at]["name"].clone(), listed[at]["protected"].clone());
    assert_eq!(protected(0), ("first".into(), true.into()));
    assert_eq!(protected(1), ("b".into(), false.into()));
    done(&cluster, "snapshot unprotect v@first");
    done(&cluster, "snapshot delete v@first");
    done(&cluster, "volume delete v --force");
}

/// S001-06: what is off-line is not opened over NBD, attached or mounted, by any server, until it is
/// on-line again; the error says so. The volume of an off-line snapshot is not concerned.
#[test]
fn what_is_off_line_is_not_opened() {
    let cluster = Cluster::three();
    cluster.create("v", 16 * MIB);
    done(&cluster, "snapshot create v@s --offline");
    let expect = |name: &str, open: bool| {
        for server in &cluster.servers {
            let nbd = NbdConnection::tcp(&server.nbd_address(), name);
            assert_eq!(nbd.is_ok(), open, "{name} through server {}", server.number);
        }
        assert_eq!(
            cluster.block(cluster.client().open(name)).is_ok(),
            open,
            "{name}"
        );
    };
    expect("v@s", false);
    expect("v", true);
    let socket = cluster.path("socket");
    let attach = format!("attach v@s --socket {}", socket.display());
    for words in [
        &attach,
        &format!("mount v@s {}", cluster.directory().display()),
    ] {
        let ran = ctl(&cluster, words);
        assert_ne!(ran.code, Some(0), "{ran:?}");
        assert!(ran.stderr.contains("blockctl volume online v@s"), "{ran:?}");
    }
    assert_eq!(ctl_json(&cluster, "snapshot list v")[0]["offline"], true);
    done(&cluster, "volume online v@s");
    expect("v@s", true);
    done(&cluster, "volume offline v");
    expect("v", false);
    expect("v@s", true);
    assert_eq!(ctl_json(&cluster, "volume show v")["offline"], true);
    done(&cluster, "volume online v");
    expect("v", true);
}
