//! Settings of volumes: `volume set` and `volume get`.

use blockd_tests::{Cluster, MIB};
use serde_json::{Value, json};

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
    assert_eq!(
        cluster.blockctl("volume set v procedure hold"),
        "procedure  hold\n"
    );
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
        ("set w colour red", "the settings of a volume are procedure"),
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
