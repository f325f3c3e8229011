//! Administration, metrics and health over HTTP, judged by curl, `blockctl --json` and promtool.

use blockd_tests::{Cluster, ClusterOptions, Http, MIB, Random, Server, run};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Free space changes from one look to the next, and the revision, as servers publish their addresses.
fn steady(mut value: Value) -> Value {
    match &mut value {
        Value::Object(object) => {
            object.remove("free_bytes");
            object.remove("revision");
            object
                .values_mut()
                .for_each(|field| *field = steady(field.take()));
        }
        Value::Array(list) => list.iter_mut().for_each(|one| *one = steady(one.take())),
        _ => {}
    }
    value
}

fn printed(cluster: &Cluster, words: &str) -> Value {
    let text = cluster.blockctl(&format!("{words} --json"));
    steady(serde_json::from_str(&text).unwrap())
}

/// The value of a path that must be there.
fn got(http: &Http, path: &str) -> Value {
    let answer = http.get(path);
    assert_eq!(answer.status, 200, "{path}: {answer:?}");
    steady(answer.json())
}

fn done(http: &Http, path: &str, body: Value) -> Value {
    let answer = http.post(path, &body.to_string());
    assert_eq!(answer.status, 200, "{path}: {answer:?}");
    answer.json()
}

/// Every listing is that of `blockctl --json`, by its path and as a request.
#[test]
fn what_http_lists_is_what_blockctl_prints() {
    let cluster = Cluster::three();
    cluster.create("v", 64 * MIB);
    cluster.create_on("w", 8 * MIB, 8192, &[1]);
    cluster.snapshot("v@s");
    cluster.blockctl("snapshot protect v@s");
    cluster.blockctl("volume clone v@s c");
    cluster.blockctl("page move w all --to 2");
    let http = Http::unix(&cluster.servers[0]);
    let daily = json!({"key": "snapshots", "value": "daily keep 2"});
    done(&http, "/v1/volumes/w/settings", daily);
    for (path, words) in [
        ("/v1/cluster", "cluster status"),
        ("/v1/nodes", "node list"),
        ("/v1/drains", "node drain --list"),
        ("/v1/moves", "move list"),
        ("/v1/holds", "io holds"),
        ("/v1/leases", "lease list"),
        ("/v1/volumes", "volume list"),
        ("/v1/volumes/v", "volume show v"),
        ("/v1/volumes/c", "volume show c"),
        ("/v1/volumes/w/settings", "volume get w"),
        ("/v1/volumes/w/route", "route show w"),
        ("/v1/volumes/w/move", "move list w"),
        ("/v1/volumes/w/lease", "lease show w"),
        ("/v1/snapshots", "snapshot list"),
        ("/v1/volumes/v/snapshots", "snapshot list v"),
    ] {
        assert_eq!(got(&http, path), printed(&cluster, words), "{path}");
    }
    for (request, words) in [
        (json!("node_list"), "node list"),
        (json!({"volume_details": {"name": "v"}}), "volume show v"),
        (
            json!({"snapshot_details": {"volume": null}}),
            "snapshot list",
        ),
    ] {
        let answered = steady(done(&http, "/v1/admin", request));
        assert_eq!(answered, printed(&cluster, words), "{words}");
    }
    let version = got(&http, "/v1/version");
    assert_eq!(version["server"], printed(&cluster, "version")["server"]);
}

/// What HTTP changes is changed, through any server.
#[test]
fn what_http_changes_is_changed() {
    let cluster = Cluster::three();
    let http = Http::unix(&cluster.servers[1]);
    let made = done(
        &http,
        "/v1/volumes",
        json!({"name": "v", "size_bytes": 8 * MIB}),
    );
    assert_eq!(steady(made), printed(&cluster, "volume list")[0]);
    let body = json!({"targets": [{"volume": "v", "snapshot": "s"}]});
    let taken = done(&http, "/v1/snapshots", body);
    assert_eq!(taken["snapshots"][0]["name"], "s");
    assert!(taken["took_ms"].is_number(), "{taken}");
    let body = json!({"snapshot_create_by": {
        "targets": [{"volume": "v", "snapshot": "t"}], "procedure": "hold"}});
    done(&http, "/v1/admin", body);
    let snapshot = "/v1/volumes/v/snapshots/s";
    done(
        &http,
        &format!("{snapshot}/rename"),
        json!({"new_name": "u"}),
    );
    let snapshot = "/v1/volumes/v/snapshots/u";
    done(
        &http,
        &format!("{snapshot}/protect"),
        json!({"protected": true}),
    );
    assert_eq!(http.delete(snapshot).status, 409);
    done(
        &http,
        &format!("{snapshot}/protect"),
        json!({"protected": false}),
    );
    let undone = done(&http, &format!("{snapshot}/rollback"), json!({}));
    assert_eq!(undone["snapshot"], "u");
    done(&http, &format!("{snapshot}/clone"), json!({"name": "c"}));
    done(&http, "/v1/volumes/c/offline", json!({"offline": true}));
    assert_eq!(printed(&cluster, "volume show c")["offline"], true);
    assert_eq!(http.delete("/v1/volumes/c").status, 200);
    let names: Vec<String> = cluster.snapshots("v").into_iter().map(|s| s.name).collect();
    assert!(
        names.contains(&"t".to_owned()) && names.contains(&"u".to_owned()),
        "{names:?}"
    );
    for name in names {
        assert_eq!(
            http.delete(&format!("/v1/volumes/v/snapshots/{name}"))
                .status,
            200
        );
    }
    done(
        &http,
        "/v1/volumes/v/resize",
        json!({"size_bytes": 16 * MIB}),
    );
    done(&http, "/v1/volumes/v/rename", json!({"new_name": "w"}));
    assert_eq!(cluster.show("w").size_bytes, 16 * MIB);
    let settings = json!({"key": "procedure", "value": "stamp"});
    let set = done(&http, "/v1/volumes/w/settings", settings);
    assert_eq!(set["procedure"], "stamp");
    done(&http, "/v1/nodes/3/drain", json!({"drain": true}));
    assert_eq!(printed(&cluster, "node drain --list")[0]["node"], 3);
    done(&http, "/v1/nodes/3/drain", json!({"drain": false}));
    assert_eq!(printed(&cluster, "node drain --list"), json!([]));
    assert_eq!(http.delete("/v1/volumes/w").status, 200);
    assert_eq!(printed(&cluster, "volume list"), json!([]));
}

/// A refusal has the status of its kind, and says what, where and what to do.
#[test]
fn errors_have_a_status_a_kind_and_a_message() {
    let mut cluster = Cluster::undefined(&ClusterOptions {
        servers: 1,
        ..ClusterOptions::default()
    });
    cluster.servers[0].start();
    let http = Http::unix(&cluster.servers[0]);
    let refused = |answer: blockd_tests::HttpAnswer, status: u16, kind: &str, said: &str| {
        let (found, message) = answer.error();
        assert_eq!(
            (answer.status, found.as_str()),
            (status, kind),
            "{answer:?}"
        );
        assert!(message.contains(said), "{answer:?}");
    };
    refused(
        http.get("/v1/volumes"),
        503,
        "unavailable",
        "cluster define",
    );
    cluster.define("test");
    cluster.create("v", 8 * MIB);
    cluster.snapshot("v@s");
    let create = r#"{"name": "v", "size_bytes": 512}"#;
    refused(http.post("/v1/volumes", create), 409, "exists", "v");
    let create = r#"{"name": "w", "size_bytes": 5}"#;
    refused(http.post("/v1/volumes", create), 400, "invalid", "multiple");
    let create = r#"{"name": "w"}"#;
    refused(
        http.post("/v1/volumes", create),
        400,
        "invalid",
        "size_bytes",
    );
    refused(http.post("/v1/volumes", "{"), 400, "invalid", "no JSON");
    refused(
        http.post("/v1/admin", "\"dance\""),
        400,
        "invalid",
        "unknown variant",
    );
    refused(http.delete("/v1/volumes/v"), 409, "conflict", "snapshots");
    refused(http.get("/v1/volumes/none"), 404, "not_found", "none");
    refused(http.delete("/v1/nodes/x"), 400, "invalid", "no number");
    refused(http.get("/v1/none"), 404, "not_found", "no such path");
    refused(http.delete("/metrics"), 405, "invalid", "DELETE");
    let form = ["--data", "name=w&size_bytes=512"];
    refused(
        http.ask("/v1/volumes", &form),
        415,
        "invalid",
        "application/json",
    );
    assert_eq!(printed(&cluster, "volume list")[0]["name"], "v");
}

/// The value of a sample.
fn sample(page: &str, name: &str) -> f64 {
    let line = page.lines().find_map(|line| line.strip_prefix(name));
    let line = line.unwrap_or_else(|| panic!("no {name} in\n{page}"));
    line.trim().parse().unwrap()
}

/// promtool takes the page, and what was written is in it.
#[test]
fn metrics_are_what_was_done() {
    let cluster = Cluster::three();
    cluster.create_on("v", 16 * MIB, 8192, &[2]);
    let volume = cluster.open("v");
    let data = Random::new(1).bytes(MIB as usize);
    cluster.block(volume.write(0, data.into())).unwrap();
    cluster.block(volume.flush()).unwrap();
    cluster.block(volume.read(4096, 8192)).unwrap();
    cluster.block(volume.zero(0, 65536, false)).unwrap();
    cluster.snapshot("v@s");
    let http = Http::unix(&cluster.servers[1]);
    let page = || {
        let answer = http.get("/metrics");
        assert_eq!(answer.status, 200);
        let file = cluster.path("metrics");
        std::fs::write(&file, &answer.text).unwrap();
        let check = format!("promtool check metrics < {}", file.display());
        assert_eq!(run(60, "sh", ["-c", &check]), "", "promtool's remarks");
        answer.text
    };
    let first = page();
    for (name, value) in [
        ("blockd_member", 1),
        ("blockd_nodes", 3),
        ("blockd_registry_phase", 2),
        ("blockd_store_failed", 0),
        ("blockd_holds", 0),
        ("blockd_volume_size_bytes{volume=\"v\"}", 16 * MIB),
        ("blockd_volume_snapshots{volume=\"v\"}", 1),
        ("blockd_volume_allocated_bytes{volume=\"v\"}", MIB - 65536),
        (
            "blockd_volume_bytes_total{volume=\"v\",kind=\"write\"}",
            MIB,
        ),
        (
            "blockd_volume_bytes_total{volume=\"v\",kind=\"read\"}",
            8192,
        ),
        (
            "blockd_volume_bytes_total{volume=\"v\",kind=\"zero\"}",
            65536,
        ),
        ("blockd_volume_errors_total{volume=\"v\",kind=\"write\"}", 0),
    ] {
        assert_eq!(sample(&first, &format!("{name} ")), value as f64, "{name}");
    }
    assert!(sample(&first, "process_resident_memory_bytes ") > 1e6);
    http.get("/v1/volumes/none");
    let asked =
        "blockd_http_requests_total{method=\"GET\",path=\"/v1/volumes/{volume}\",status=\"404\"} ";
    assert_eq!(sample(&page(), asked), 1.0);
    cluster.blockctl("page move v all --to 1");
    let moved = "blockd_move_pages_moved{volume=\"v\",state=\"done\"} ";
    assert_eq!(sample(&page(), moved), 4.0);
}

/// Alive from the start; ready once it is a member of a cluster that can be changed.
#[test]
fn health_is_told_before_and_after_the_cluster_is_made() {
    let mut cluster = Cluster::undefined(&ClusterOptions::default());
    cluster.servers.iter_mut().for_each(Server::start);
    let http = Http::unix(&cluster.servers[0]);
    assert_eq!(got(&http, "/healthz"), json!({"ok": true, "reason": null}));
    let unready = http.get("/readyz");
    assert_eq!(
        (unready.status, &unready.json()["ok"]),
        (503, &json!(false))
    );
    assert!(unready.text.contains("cluster define"), "{unready:?}");
    cluster.define("test");
    cluster.wait_writable();
    assert_eq!(got(&http, "/readyz"), json!({"ok": true, "reason": null}));
    cluster.servers[1].kill();
    cluster.servers[2].kill();
    let deadline = Instant::now() + Duration::from_secs(60);
    while http.get("/readyz").status != 503 {
        assert!(Instant::now() < deadline, "ready without a majority");
    }
    assert!(http.get("/readyz").text.contains("no leader"));
    assert_eq!(http.get("/healthz").status, 200);
}

/// A server that was killed leaves its socket; the next start has its own.
#[test]
fn a_socket_of_a_former_run_is_no_obstacle() {
    let mut cluster = Cluster::start(&ClusterOptions {
        servers: 1,
        ..ClusterOptions::default()
    });
    let http = Http::unix(&cluster.servers[0]);
    cluster.servers[0].kill();
    assert!(Http::socket(&cluster.servers[0]).exists());
    cluster.servers[0].start();
    cluster.wait_writable();
    assert_eq!(http.get("/healthz").status, 200);
}
