//! Who may do what over HTTP, what is written down of it, and clients that mean harm.

use blockd::node::config::HTTP_PORT;
use blockd_tests::{Cluster, ClusterOptions, Http, MIB, Server, run};
use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

/// The table of a token, with the digest as sha256sum has it.
fn table(name: &str, role: &str) -> String {
    let printed = run(
        20,
        "sh",
        ["-c", &format!("printf %s token-of-{name} | sha256sum")],
    );
    let digest = printed.split_whitespace().next().unwrap();
    format!("[[http_access]]\nname = '{name}'\nrole = '{role}'\ntoken_sha256 = '{digest}'\n")
}

/// One server that serves HTTP over TCP, to these.
fn serving(tables: &str) -> Cluster {
    let mut cluster = Cluster::undefined(&ClusterOptions {
        servers: 1,
        ..ClusterOptions::default()
    });
    let server = &mut cluster.servers[0];
    server.config += &format!("http_listen = '{}'\n{tables}", server.address);
    server.start();
    cluster.define("test");
    cluster
}

fn token_of(cluster: &Cluster, name: &str) -> Http {
    Http::tcp(&cluster.servers[0]).bearer(&format!("token-of-{name}"))
}

/// Read-only looks, an operator changes, an administrator takes away; nobody else is answered.
#[test]
fn each_role_does_what_it_may() {
    let roles = [("root", "admin"), ("op", "operator"), ("eye", "read-only")];
    let tables: String = roles.iter().map(|(name, role)| table(name, role)).collect();
    let cluster = serving(&tables);
    let nobody = Http::tcp(&cluster.servers[0]);
    for stranger in [nobody.clone(), nobody.bearer("token-of-nobody")] {
        for path in ["/v1/volumes", "/metrics", "/healthz", "/v1/none"] {
            let answer = stranger.get(path);
            assert_eq!(answer.status, 401, "{answer:?}");
            assert_eq!(answer.error().0, "unauthorized");
        }
    }
    let [root, op, eye] = roles.map(|(name, _)| token_of(&cluster, name));
    for http in [&root, &op, &eye] {
        for path in ["/v1/volumes", "/metrics", "/healthz", "/v1/cluster"] {
            assert_eq!(http.get(path).status, 200, "{path}");
        }
    }
    let create = json!({"name": "v", "size_bytes": 8 * MIB}).to_string();
    let refused = eye.post("/v1/volumes", &create);
    assert_eq!(refused.status, 403, "{refused:?}");
    assert_eq!(
        refused.error().1,
        "eye is read-only: this needs the role operator"
    );
    assert_eq!(op.post("/v1/volumes", &create).status, 200);
    let snapshot = json!({"targets": [{"volume": "v", "snapshot": "s"}]}).to_string();
    assert_eq!(op.post("/v1/snapshots", &snapshot).status, 200);
    let shrink = json!({"size_bytes": MIB, "allow_shrink": true}).to_string();
    assert_eq!(op.post("/v1/volumes/v/resize", &shrink).status, 403);
    assert_eq!(
        op.post("/v1/volumes/v/snapshots/s/rollback", "{}").status,
        403
    );
    let rollback = r#"{"snapshot_rollback": {"target": {"volume": "v", "snapshot": "s"}}}"#;
    assert_eq!(op.post("/v1/admin", rollback).status, 403);
    for path in [
        "/v1/volumes/v",
        "/v1/volumes/v/snapshots/s",
        "/v1/nodes/1",
        "/v1/volumes/v/lease",
    ] {
        assert_eq!(op.delete(path).status, 403, "{path}");
    }
    assert_eq!(root.delete("/v1/volumes/v/snapshots/s").status, 200);
    assert_eq!(root.delete("/v1/volumes/v").status, 200);
}

/// Without tokens TCP is for this machine, and for no web page; the socket is its owner's.
#[test]
fn without_tokens_http_stays_on_the_machine() {
    let cluster = serving("");
    let http = Http::tcp(&cluster.servers[0]);
    assert_eq!(http.get("/v1/volumes").status, 200);
    let rebound = http.with("Host: page.example").get("/v1/volumes");
    assert_eq!(
        (rebound.status, rebound.error().0.as_str()),
        (403, "forbidden")
    );
    let socket = std::fs::metadata(Http::socket(&cluster.servers[0])).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
}

/// An address that others reach is refused at the start unless there are tokens.
#[test]
fn an_open_door_to_the_network_is_refused() {
    let mut cluster = Cluster::undefined(&ClusterOptions {
        servers: 1,
        ..ClusterOptions::default()
    });
    let server = &mut cluster.servers[0];
    let config = server.config.clone() + "http_listen = '0.0.0.0'\n";
    server.config.clone_from(&config);
    server.spawn();
    assert_eq!(server.wait_end().code(), Some(1));
    let log = server.log();
    assert!(
        log.contains("http_listen: 0.0.0.0:10810 is not a loopback address"),
        "{log}"
    );
    assert!(log.contains("[[http_access]]"), "{log}");
    server.config = config + "[[http_access]]\nname = 'a'\nrole = 'admin'\ntoken_sha256 = 'abc'\n";
    server.spawn();
    assert_eq!(server.wait_end().code(), Some(1));
    assert!(server.log().contains("sha256sum"), "{}", server.log());
}

/// The lines of the audit log, once there are so many.
fn audited(server: &Server, count: usize) -> Vec<Value> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let text = std::fs::read_to_string(server.state.join("audit.log")).unwrap_or_default();
        let lines: Vec<Value> = text
            .lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect();
        if lines.len() >= count {
            return lines;
        }
        assert!(Instant::now() < deadline, "{count} lines are not in {text}");
    }
}

/// Every change is one line, by whatever way it was asked for: who, what, and what came of it.
#[test]
fn changes_are_written_down_with_who_made_them() {
    let cluster = serving(&(table("op", "operator") + &table("eye", "read-only")));
    let server = &cluster.servers[0];
    let op = token_of(&cluster, "op");
    op.get("/v1/volumes");
    op.post(
        "/v1/volumes",
        &json!({"name": "v", "size_bytes": 8 * MIB}).to_string(),
    );
    op.delete("/v1/volumes/v");
    token_of(&cluster, "eye").post("/v1/volumes/v/flatten", "{}");
    cluster.blockctl("volume list");
    cluster.blockctl("volume set v procedure hold");
    assert_eq!(cluster.try_blockctl("volume delete none").code, Some(1));
    Http::unix(server).delete("/v1/volumes/v");
    let lines = audited(server, 7);
    let told: Vec<Value> = lines
        .iter()
        .map(|line| {
            let request = line["request"].as_object().unwrap().keys().next();
            json!([request, line["role"], line["outcome"]])
        })
        .collect();
    let wanted = json!([
        ["cluster_define", "admin", "done"],
        ["volume_create", "operator", "done"],
        ["volume_delete", "operator", "forbidden"],
        ["volume_flatten", "read-only", "forbidden"],
        ["volume_set", "admin", "done"],
        ["volume_delete", "admin", "not_found"],
        ["volume_delete", "admin", "done"],
    ]);
    assert_eq!(json!(told), wanted);
    let who = |index: usize| lines[index]["who"].as_str().unwrap();
    assert_eq!((who(1), who(3), who(6)), ("op", "eye", "unix"));
    assert!(
        who(4).starts_with("127.") && who(4).contains(':'),
        "{}",
        who(4)
    );
    let set = json!({"volume_set": {"name": "v", "key": "procedure", "value": "hold"}});
    assert_eq!(lines[4]["request"], set);
    let time = lines[4]["time"].as_str().unwrap();
    assert!(time.starts_with("20") && time.ends_with('Z'), "{time}");
    assert!(lines[4]["took_ms"].as_f64().unwrap() > 0.0);
    assert!(lines[5]["message"].as_str().unwrap().contains("none"));
    for secret in ["token-of", "Bearer"] {
        assert!(!json!(lines).to_string().contains(secret));
    }
}

/// A log that cannot be written costs its lines, and a warning.
#[test]
fn an_audit_log_that_cannot_be_written_delays_nothing() {
    let cluster = serving("");
    let server = &cluster.servers[0];
    audited(server, 1);
    let path = server.state.join("audit.log");
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    cluster.create("v", 8 * MIB);
    cluster.blockctl("volume delete v");
    let deadline = Instant::now() + Duration::from_secs(60);
    while !server.log().contains("a line of the audit log is lost") {
        assert!(Instant::now() < deadline, "no warning");
    }
}

/// A body of more than 1 MiB is refused, whether it says so or not.
#[test]
fn a_long_body_is_refused() {
    let cluster = serving("");
    let file = cluster.path("long");
    std::fs::write(&file, vec![b' '; 2 << 20]).unwrap();
    let body = format!("@{}", file.display());
    let http = Http::unix(&cluster.servers[0]).with("Content-Type: application/json");
    for transfer in ["Accept: */*", "Transfer-Encoding: chunked"] {
        let answer = http.ask("/v1/admin", &["--header", transfer, "--data-binary", &body]);
        assert_eq!(answer.status, 413, "{answer:?}");
        assert!(answer.error().1.contains("1048576"), "{answer:?}");
    }
    assert_eq!(Http::unix(&cluster.servers[0]).get("/healthz").status, 200);
}

/// What a server says on this connection until it closes it.
fn told(mut stream: TcpStream) -> String {
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let mut text = Vec::new();
    match stream.read_to_end(&mut text) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("it is still open: {error}"),
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Clients that say nothing, or half of a request, get their time and no more; meanwhile the socket
/// answers, and behind them everybody.
#[test]
fn slow_clients_hold_up_nobody_for_ever() {
    let cluster = serving("");
    let server = &cluster.servers[0];
    let connect = |sent: &[u8]| {
        let mut stream = TcpStream::connect((server.address, HTTP_PORT)).unwrap();
        stream.write_all(sent).unwrap();
        stream
    };
    let head = connect(b"GET /v1/volumes HTTP/1.1\r\nHost: local");
    let body = connect(
        b"POST /v1/admin HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
          Content-Length: 100\r\n\r\n\"node_",
    );
    let silent: Vec<TcpStream> = (0..150).map(|_| connect(b"")).collect();
    assert_eq!(Http::unix(server).get("/v1/nodes").status, 200);
    assert_eq!(Http::tcp(server).get("/v1/nodes").status, 200);
    assert!(told(body).starts_with("HTTP/1.1 408 "));
    assert!(!told(head).contains("200 OK"));
    for stream in silent {
        assert_eq!(told(stream), "");
    }
}
