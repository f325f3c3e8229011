//! TLS and access rules of a server's NBD sockets, under real clients (S003-15).

#[path = "../../../nbd-server/tests/server/pki.rs"]
mod pki;
#[path = "../../../nbd-server/tests/server/tls_clients.rs"]
mod tls_clients;

use blockd_tests::nbd_raw::{Address, Endpoint, Stream};
use blockd_tests::{Cluster, ClusterOptions, MIB, Server, run, try_run};
use pki::{Pki, Validity};
use std::path::{Path, PathBuf};

const LIMIT_S: u32 = 60;

/// One server with the volumes `db`, `web` and the snapshot `db@mon`, and the authority of its certificate.
struct Bench {
    cluster: Cluster,
    pki: Pki,
}

impl Bench {
    fn start(config: &str) -> Self {
        let options = ClusterOptions {
            servers: 1,
            ..ClusterOptions::default()
        };
        let mut cluster = Cluster::undefined(&options);
        let pki = Pki::new(cluster.path("pki"));
        let server = &mut cluster.servers[0];
        let credentials = pki.server(&server.address.to_string());
        server.config = format!("nbd_tls_certificates = {credentials:?}\n{config}");
        server.start();
        cluster.define("test");
        cluster.create("db", 16 * MIB);
        cluster.create("web", 16 * MIB);
        cluster.snapshot("db@mon");
        Self { cluster, pki }
    }

    fn server(&self) -> &Server {
        &self.cluster.servers[0]
    }

    /// URIs inside TLS of an export for a client with these credentials: over TCP and the unix socket.
    fn uris(&self, export: &str, client: &Path) -> [String; 2] {
        let [tcp, unix] = self.server().uris(export);
        let client = client.display();
        [
            format!("{}?tls-certificates={client}", tcp.replace("nbd:", "nbds:")),
            format!(
                "{}&tls-certificates={client}",
                unix.replace("nbd+", "nbds+")
            ),
        ]
    }

    fn opens(&self, export: &str, client: &Path) -> bool {
        let [tcp, unix] = self.uris(export, client);
        let [by_tcp, by_unix] = [tcp, unix].map(|uri| opens(&uri));
        assert_eq!(by_tcp, by_unix, "{export}");
        by_tcp
    }

    fn client(&self, name: &str, validity: Validity) -> PathBuf {
        self.pki.client(name, &format!("{name}.example"), validity)
    }
}

fn opens(uri: &str) -> bool {
    try_run(LIMIT_S, "nbdinfo", [uri]).code == Some(0)
}

#[test]
fn rules_decide_who_opens_which_volume_and_snapshot() {
    let bench = Bench::start(
        "nbd_tls = 'on'\nnbd_tls_verify_peer = true\n\
         [[nbd_access]]\nexports = ['db', 'db@*']\nnames = ['alice']\n\
         [[nbd_access]]\nexports = ['*@*']\nnames = ['*.backup.example', 'backup.example']\n\
         [[nbd_access]]\nexports = ['web']\naddresses = ['127.0.0.0/8', 'unix']\n",
    );
    let alice = bench.client("alice", Validity::Now);
    let backup = bench.client("backup", Validity::Now);
    let image = bench.cluster.path("image");
    std::fs::write(&image, vec![0x5a; 16 * MIB as usize]).unwrap();
    let image = image.to_str().unwrap();
    for uri in bench.uris("db", &alice) {
        run(LIMIT_S, "nbdcopy", ["--flush", image, &uri]);
        run(LIMIT_S, "nbdcopy", [&uri, "null:"]);
    }
    for (client, opened) in [(&alice, [true, true, true]), (&backup, [false, true, true])] {
        let opens = ["db", "db@mon", "web"].map(|export| bench.opens(export, client));
        assert_eq!(opens, opened, "{client:?}");
    }
    let plain = ["db", "db@mon", "web"].map(|export| {
        let [tcp, _] = bench.server().uris(export);
        opens(&tcp)
    });
    assert_eq!(plain, [false, false, true]);
    let [tcp, _] = bench.server().uris("db");
    let refused = try_run(LIMIT_S, "qemu-io", ["-f", "raw", &tcp, "-c", "map"]);
    assert!(
        refused.stderr.contains("do not give export `db`"),
        "{}",
        refused.stderr
    );
    let [tcp, _] = bench.server().uris("");
    let list = run(LIMIT_S, "nbdinfo", ["--list", &tcp]);
    assert!(list.contains("web") && !list.contains("db"), "{list}");
}

#[test]
fn require_holds_on_every_socket_and_for_every_client() {
    let bench = Bench::start("nbd_tls_verify_peer = true\n");
    for uri in bench.server().uris("db") {
        let refused = try_run(LIMIT_S, "qemu-io", ["-f", "raw", &uri, "-c", "map"]);
        assert!(
            refused.stderr.contains("requires TLS"),
            "{}",
            refused.stderr
        );
    }
    assert!(bench.opens("db", &bench.client("alice", Validity::Now)));
    assert!(!bench.opens("db", &bench.client("late", Validity::Past)));
    assert!(!bench.opens("db", &bench.pki.anonymous()));
    let credentials = bench.client("alice", Validity::Now);
    let object = format!(
        "tls-creds-x509,id=t,dir={},endpoint=client",
        credentials.display()
    );
    let (host, port) = bench
        .server()
        .nbd_address()
        .rsplit_once(':')
        .map(|(host, port)| (host.to_owned(), port.to_owned()))
        .unwrap();
    let image = format!("driver=nbd,host={host},port={port},export=web,tls-creds=t");
    let io = [
        "-c",
        "write -P 3 0 1M",
        "-c",
        "read -P 3 0 1M",
        "-c",
        "flush",
    ];
    let report = run(
        LIMIT_S,
        "qemu-io",
        [&["--object", &object, "--image-opts", &image], &io[..]].concat(),
    );
    assert!(report.contains("read 1048576/1048576"), "{report}");
}

/// Connections to `db` over TCP and over the unix socket, which fail where they would hang.
fn ways(bench: &Bench) -> [impl Fn() -> Box<dyn Stream>; 2] {
    let server = bench.server();
    let at = [
        Address::Tcp(server.nbd_address()),
        Address::Unix(server.socket()),
    ];
    at.map(|at| {
        let endpoint = Endpoint::new(at, "db");
        move || endpoint.connect().unwrap()
    })
}

/// A.1, STARTTLS and FORCEDTLS: the rules that `nbd-server` is judged by, too.
#[test]
fn a_raw_client_finds_no_way_around_tls() {
    let required = Bench::start("");
    for connect in ways(&required) {
        tls_clients::nothing_but_starttls_and_abort_is_heard(connect);
    }
    let offered = Bench::start("nbd_tls = 'on'\n");
    for connect in ways(&offered) {
        tls_clients::what_was_agreed_is_forgotten(&connect, &offered.pki, "db");
        tls_clients::plaintext_is_never_heard(&connect, &offered.pki);
    }
    assert!(
        offered.opens("db", &offered.pki.anonymous()),
        "the server goes on"
    );
}

#[test]
fn clients_work_inside_tls() {
    let bench = Bench::start("nbd_tls_verify_peer = true\n");
    let credentials = bench.client("alice", Validity::Now);
    for uri in bench.uris("db", &credentials) {
        let connect = format!("h.set_uri_allow_local_file(True); h.connect_uri('{uri}')");
        let script = "h.set_strict_mode(0); h.pwrite(b'x'*70000, 12345); \
            assert h.pread(70000, 12345) == b'x'*70000; assert h.get_tls_negotiated(); h.shutdown()";
        let shell = ["PATH=/usr/bin:/bin", "nbdsh", "-c", &connect, "-c", script];
        run(LIMIT_S, "env", shell);
    }
    let address = bench.server().nbd_address();
    let (host, port) = address.rsplit_once(':').unwrap();
    let object = format!(
        "tls-creds-x509,id=t,dir={},endpoint=client",
        credentials.display()
    );
    let list = ["--list", "-b", host, "-p", port, "--tls-creds", "t"];
    let list = [&["--object", &object], &list[..]].concat();
    let listed = run(LIMIT_S, "qemu-nbd", list);
    assert!(listed.contains("exports available: 3"), "{listed}");
    let uri = format!("nbds://{address}/web");
    tls_clients::fio_verifies(&uri, &credentials, &bench.cluster.path("home"));
}

#[test]
fn a_server_without_its_certificates_does_not_start() {
    let options = ClusterOptions {
        servers: 1,
        ..ClusterOptions::default()
    };
    let mut cluster = Cluster::undefined(&options);
    let server = &mut cluster.servers[0];
    server.config = "nbd_tls_certificates = '/nonexistent'\n".to_owned();
    server.spawn();
    assert!(!server.wait_end().success());
    assert!(
        server.log().contains("/nonexistent/server-cert.pem"),
        "{}",
        server.log()
    );
}
