//! STARTTLS and access rules under real clients, and under a raw one that breaks the rules.

use std::io::Read;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::pki::{Pki, Validity};
use crate::support::{TestServer, pattern_file, run, try_run};
use crate::tls_clients::{self, ACK, Raw, STARTTLS};

/// An authority, and a server with credentials of it on 32 MiB of memory.
struct Bench {
    pki: Pki,
    server: TestServer,
}

impl Bench {
    fn start(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let pki = Pki::new(dir.path().join("pki"));
        let server = Self::server(&pki, args, dir);
        Self { pki, server }
    }

    fn server(pki: &Pki, args: &[&str], dir: TempDir) -> TestServer {
        let credentials = pki.server("127.0.0.1");
        let always = [
            "--memory",
            "32MiB",
            "--tls-certificates",
            text(&credentials),
        ];
        TestServer::start(&[&always, args].concat(), dir)
    }

    fn alice(&self) -> PathBuf {
        self.pki.client("alice", "a.clients.example", Validity::Now)
    }

    fn bob(&self) -> PathBuf {
        self.pki.client("bob", "b.other.example", Validity::Now)
    }

    /// URI over TCP and TLS of a client with these credentials.
    fn uri(&self, client: &Path) -> String {
        let port = self.server.tcp().rsplit(':').next().unwrap();
        format!("nbds://localhost:{port}/?tls-certificates={}", text(client))
    }

    fn unix_uri(&self, client: &Path) -> String {
        let socket = self.server.socket();
        format!(
            "nbds+unix:///?socket={}&tls-certificates={}",
            text(&socket),
            text(client)
        )
    }

    /// What qemu-img and qemu-io call this server, for a client with these credentials.
    fn qemu_image(&self) -> String {
        let port = self.server.tcp().rsplit(':').next().unwrap();
        format!("driver=nbd,host=localhost,port={port},tls-creds=tls0")
    }

    fn is_refused(&self, uri: &str) -> bool {
        !try_run("nbdinfo", &[uri]).0
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn qemu_credentials(client: &Path) -> String {
    format!(
        "tls-creds-x509,id=tls0,dir={},endpoint=client",
        text(client)
    )
}

#[test]
fn libnbd_clients_copy_inside_tls() {
    let bench = Bench::start(&["--tls-verify-peer"]);
    let alice = bench.alice();
    let (image, back) = (bench.server.path("image"), bench.server.path("back"));
    pattern_file(&image, 16 << 20);
    for uri in [bench.uri(&alice), bench.unix_uri(&alice)] {
        let info = run("nbdinfo", &[&uri]);
        assert!(
            info.contains("with TLS") && info.contains("base:allocation"),
            "{info}"
        );
        run(
            "nbdcopy",
            &["--flush", "--connections=4", text(&image), &uri],
        );
        run("nbdcopy", &["--connections=4", &uri, text(&back)]);
        run("cmp", &[text(&image), text(&back)]);
        let connect = format!("h.set_uri_allow_local_file(True); h.connect_uri('{uri}')");
        let script = "h.pwrite(b'x'*70000, 12345); assert h.pread(70000, 12345) == b'x'*70000; \
            assert h.get_tls_negotiated(); h.shutdown()";
        run("nbdsh", &["-c", &connect, "-c", script]);
    }
}

#[test]
fn qemu_clients_copy_inside_tls() {
    let bench = Bench::start(&["--tls-verify-peer"]);
    let credentials = qemu_credentials(&bench.alice());
    let image = bench.server.path("image");
    pattern_file(&image, 16 << 20);
    let (target, object) = (bench.qemu_image(), ["--object", &credentials]);
    let convert = [
        "convert",
        "-n",
        "-f",
        "raw",
        "--target-image-opts",
        text(&image),
        &target,
    ];
    run(
        "qemu-img",
        &[&convert[..1], &object, &convert[1..]].concat(),
    );
    let io = [
        "-c",
        "write -P 7 1M 64k",
        "-c",
        "read -P 7 1M 64k",
        "-c",
        "flush",
    ];
    let text = run(
        "qemu-io",
        &[&object, &["--image-opts", &target], &io[..]].concat(),
    );
    assert!(text.contains("read 65536/65536"), "{text}");
    let port = bench.server.tcp().rsplit(':').next().unwrap();
    let list = [
        "--list",
        "-b",
        "localhost",
        "-p",
        port,
        "--tls-creds",
        "tls0",
    ];
    let text = run("qemu-nbd", &[&object, &list[..]].concat());
    assert!(text.contains("exports available: 1"), "{text}");
}

#[test]
fn fio_verifies_inside_tls() {
    let bench = Bench::start(&["--tls-verify-peer"]);
    let uri = bench.uri(Path::new(""));
    let home = bench.server.path("home");
    tls_clients::fio_verifies(uri.split('?').next().unwrap(), &bench.alice(), &home);
}

#[test]
fn each_mode_treats_each_client_as_it_says() {
    for (mode, plain, tls) in [
        ("off", true, false),
        ("on", true, true),
        ("require", false, true),
    ] {
        let bench = Bench::start(&["--tls", mode]);
        let anonymous = bench.pki.anonymous();
        assert_eq!(
            try_run("nbdinfo", &[&bench.server.tcp_uri("")]).0,
            plain,
            "{mode}"
        );
        assert_eq!(
            try_run("nbdinfo", &[&bench.server.uri("")]).0,
            plain,
            "{mode}"
        );
        assert_eq!(!bench.is_refused(&bench.uri(&anonymous)), tls, "{mode}");
        assert_eq!(
            !bench.is_refused(&bench.unix_uri(&anonymous)),
            tls,
            "{mode}"
        );
    }
}

#[test]
fn a_client_without_tls_is_told_that_it_is_required() {
    let bench = Bench::start(&[]);
    let uri = bench.server.uri("");
    let (ok, text) = try_run("qemu-io", &["-f", "raw", &uri, "-c", "map"]);
    assert!(!ok && text.contains("this server requires TLS"), "{text}");
    let (ok, text) = try_run(
        "qemu-nbd",
        &["--list", "-k", self::text(&bench.server.socket())],
    );
    assert!(!ok && text.contains("this server requires TLS"), "{text}");
}

#[test]
fn only_clients_with_a_good_certificate_come_in() {
    let bench = Bench::start(&["--tls-verify-peer"]);
    let other = Pki::new(bench.server.path("other-pki"));
    let forger = other.client("alice", "a.clients.example", Validity::Now);
    // The forger trusts the server, but not the other way round.
    std::fs::copy(
        bench.alice().join("ca-cert.pem"),
        forger.join("ca-cert.pem"),
    )
    .unwrap();
    let expired = bench.pki.client("late", "late.example", Validity::Past);
    assert!(!bench.is_refused(&bench.uri(&bench.alice())));
    for refused in [bench.pki.anonymous(), forger, expired] {
        assert!(bench.is_refused(&bench.uri(&refused)), "{refused:?}");
        assert!(bench.is_refused(&bench.unix_uri(&refused)), "{refused:?}");
    }
    assert!(
        !bench.is_refused(&bench.uri(&bench.alice())),
        "the server goes on"
    );
}

#[test]
fn a_client_sees_a_server_of_another_authority() {
    let bench = Bench::start(&[]);
    let other = Pki::new(bench.server.path("other-pki"));
    assert!(bench.is_refused(&bench.uri(&other.anonymous())));
    assert!(!bench.is_refused(&bench.uri(&bench.pki.anonymous())));
}

#[test]
fn rules_by_name_give_and_hide() {
    let rules = [
        "--allow",
        "name=*.clients.example",
        "--allow",
        "address=unix,name=bob",
    ];
    let bench = Bench::start(&[&["--tls-verify-peer"], &rules[..]].concat());
    let (alice, bob) = (bench.alice(), bench.bob());
    assert!(!bench.is_refused(&bench.uri(&alice)) && !bench.is_refused(&bench.unix_uri(&alice)));
    assert!(bench.is_refused(&bench.uri(&bob)) && !bench.is_refused(&bench.unix_uri(&bob)));
    let list = |client: &Path| {
        let port = bench.server.tcp().rsplit(':').next().unwrap();
        let list = [
            "--list",
            "-b",
            "localhost",
            "-p",
            port,
            "--tls-creds",
            "tls0",
        ];
        let credentials = qemu_credentials(client);
        run(
            "qemu-nbd",
            &[&["--object", &credentials], &list[..]].concat(),
        )
    };
    assert!(list(&alice).contains("exports available: 1"));
    assert!(list(&bob).contains("exports available: 0"));
    let credentials = qemu_credentials(&bob);
    let open = [
        "--object",
        &credentials,
        "--image-opts",
        &bench.qemu_image(),
        "-c",
        "map",
    ];
    let (ok, text) = try_run("qemu-io", &open);
    assert!(
        !ok && text.contains("do not give export") && text.contains("TLS as bob"),
        "{text}"
    );
}

#[test]
fn rules_by_address_need_no_tls() {
    let local = TestServer::memory("1MiB", &["--allow", "address=127.0.0.0/8"]);
    assert!(try_run("nbdinfo", &[&local.tcp_uri("")]).0);
    assert!(
        !try_run("nbdinfo", &[&local.uri("")]).0,
        "a unix socket is no address"
    );
    let elsewhere = ["--allow", "address=10.0.0.0/8", "--allow", "address=unix"];
    let elsewhere = TestServer::memory("1MiB", &elsewhere);
    assert!(!try_run("nbdinfo", &[&elsewhere.tcp_uri("")]).0);
    assert!(try_run("nbdinfo", &[&elsewhere.uri("")]).0);
}

#[test]
fn one_address_gets_no_more_connections_than_its_share() {
    let server = TestServer::memory("1MiB", &["--connections-per-address", "3"]);
    let mut greeting = [0; 18];
    let mut kept: Vec<TcpStream> = (0..4)
        .map(|_| TcpStream::connect(server.tcp()).unwrap())
        .collect();
    for stream in &mut kept[..3] {
        stream.read_exact(&mut greeting).unwrap();
    }
    assert_eq!(
        kept[3].read(&mut greeting).unwrap_or(0),
        0,
        "the fourth is closed"
    );
    run("nbdinfo", &["--size", &server.uri("")]);
    let other = std::net::SocketAddr::from(([127, 0, 0, 2], 0));
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::STREAM,
        None,
    );
    let socket = socket.unwrap();
    rustix::net::bind(&socket, &other).unwrap();
    let server_address: std::net::SocketAddr = server.tcp().parse().unwrap();
    rustix::net::connect(&socket, &server_address).unwrap();
    TcpStream::from(socket).read_exact(&mut greeting).unwrap();
}

#[test]
fn clients_that_stop_within_the_tls_handshake_do_not_keep_others_out() {
    let bench = Bench::start(&[]);
    let mut half_open: Vec<Raw<UnixStream>> = (0..200)
        .map(|_| {
            let mut raw = Raw::greeted(unix_socket(&bench));
            assert_eq!(raw.option(STARTTLS, b"").0, ACK);
            raw
        })
        .collect();
    assert!(!bench.is_refused(&bench.uri(&bench.pki.anonymous())));
    let first = &mut half_open[0].0;
    first
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    let end = first.read(&mut [0]);
    assert_eq!(
        end.unwrap(),
        0,
        "the handshake has one deadline, TLS included"
    );
}

#[test]
fn certificates_are_read_again_when_they_change() {
    let bench = Bench::start(&[]);
    let credentials = bench.server.path("pki/server");
    let other = Pki::new(bench.server.path("other-pki"));
    assert!(bench.is_refused(&bench.uri(&other.anonymous())));
    let replace = |file: &str| {
        std::fs::copy(other.server("127.0.0.1").join(file), credentials.join(file)).unwrap();
    };
    replace("server-cert.pem");
    let between = bench.uri(&bench.pki.anonymous());
    assert!(
        !bench.is_refused(&between),
        "the former pair stays until the new one is whole"
    );
    replace("server-key.pem");
    assert!(!bench.is_refused(&bench.uri(&other.anonymous())));
    assert!(bench.is_refused(&between));
}

/// A file of psktool with a key of this user.
fn psk_file(path: PathBuf, user: &str) -> PathBuf {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    run("psktool", &["--username", user, "--pskfile", text(&path)]);
    path
}

fn psk_uris(server: &TestServer, user: &str, keys: &Path) -> [String; 2] {
    let port = server.tcp().rsplit(':').next().unwrap();
    let (socket, keys) = (server.socket(), text(keys));
    [
        format!("nbds://{user}@localhost:{port}/?tls-psk-file={keys}"),
        format!(
            "nbds+unix://{user}@/?socket={}&tls-psk-file={keys}",
            text(&socket)
        ),
    ]
}

#[test]
fn clients_with_a_shared_key_come_in() {
    let dir = tempfile::tempdir().unwrap();
    let keys = psk_file(dir.path().join("keys.psk"), "alice");
    psk_file(keys.clone(), "bob");
    let args = [
        "--memory",
        "32MiB",
        "--tls-psk",
        text(&keys),
        "--allow",
        "name=alice",
    ];
    let server = TestServer::start(&args, tempfile::tempdir().unwrap());
    let (image, back) = (server.path("image"), server.path("back"));
    pattern_file(&image, 16 << 20);
    for uri in psk_uris(&server, "alice", &keys) {
        assert!(run("nbdinfo", &[&uri]).contains("with TLS"));
        run(
            "nbdcopy",
            &["--flush", "--connections=4", text(&image), &uri],
        );
        run("nbdcopy", &["--connections=4", &uri, text(&back)]);
        run("cmp", &[text(&image), text(&back)]);
    }
    let port = server.tcp().rsplit(':').next().unwrap();
    let dir = text(keys.parent().unwrap());
    let of = |user| format!("tls-creds-psk,id=tls0,dir={dir},endpoint=client,username={user}");
    let image = format!("driver=nbd,host=localhost,port={port},tls-creds=tls0");
    let io = [
        "--image-opts",
        &image,
        "-c",
        "write -P 7 1M 64k",
        "-c",
        "read -P 7 1M 64k",
    ];
    run("qemu-io", &[&["--object", &of("alice")], &io[..]].concat());
    let (ok, text) = try_run("qemu-io", &[&["--object", &of("bob")], &io[..]].concat());
    assert!(
        !ok && text.contains("do not give export") && text.contains("TLS as bob"),
        "{text}"
    );
}

#[test]
fn clients_without_the_shared_key_do_not_come_in() {
    let dir = tempfile::tempdir().unwrap();
    let keys = psk_file(dir.path().join("keys.psk"), "alice");
    let stranger = psk_file(dir.path().join("other/keys.psk"), "alice");
    let server = TestServer::memory("1MiB", &["--tls-psk", text(&keys)]);
    let unknown = psk_file(dir.path().join("unknown/keys.psk"), "eve");
    for (user, keys) in [("alice", &stranger), ("eve", &unknown)] {
        for uri in psk_uris(&server, user, keys) {
            assert!(!try_run("nbdinfo", &[&uri]).0, "{uri}");
        }
    }
    assert!(!try_run("nbdinfo", &[&server.uri("")]).0);
    let pki = Pki::new(dir.path().join("pki"));
    let certificates = format!("&tls-certificates={}", text(&pki.anonymous()));
    let uri = server.uri("").replace("nbd+", "nbds+") + &certificates;
    assert!(!try_run("nbdinfo", &[&uri]).0, "no certificate is there");
    let [_, good] = psk_uris(&server, "alice", &keys);
    run("nbdinfo", &[&good]);
    std::fs::copy(&stranger, &keys).unwrap();
    let [_, new] = psk_uris(&server, "alice", &stranger);
    run("nbdinfo", &[&new]);
}

/// Runs the server with arguments that it must refuse; what it says.
fn refused_start(args: &[&str]) -> String {
    let output = Command::new("timeout")
        .args(["10", env!("CARGO_BIN_EXE_nbd-server"), "--memory", "1M"])
        .args(["--listen", "127.0.0.1:0"])
        .args(args)
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    assert!(matches!(output.status.code(), Some(1 | 2)), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn wrong_settings_are_explained() {
    let dir = tempfile::tempdir().unwrap();
    let pki = Pki::new(dir.path().join("pki"));
    let good = pki.server("127.0.0.1");
    let broken = |name: &str, file: &str, contents: Option<&[u8]>| {
        let copy = dir.path().join(name);
        run("cp", &["-r", text(&good), text(&copy)]);
        match contents {
            None => std::fs::remove_file(copy.join(file)).unwrap(),
            Some(contents) => std::fs::write(copy.join(file), contents).unwrap(),
        }
        copy
    };
    pki.make_key("party-key.pem");
    let strange_key = std::fs::read(dir.path().join("pki/party-key.pem")).unwrap();
    let not_a_key = b"-----BEGIN PRIVATE KEY-----\nMAA=\n-----END PRIVATE KEY-----\n";
    for (credentials, complaint) in [
        (
            broken("a", "server-cert.pem", None),
            "a/server-cert.pem: No such file",
        ),
        (
            broken("b", "server-key.pem", None),
            "b/server-key.pem: No such file",
        ),
        (
            broken("c", "ca-cert.pem", None),
            "c/ca-cert.pem: No such file",
        ),
        (
            broken("d", "server-cert.pem", Some(b"hello")),
            "d/server-cert.pem: it holds nothing",
        ),
        (
            broken("e", "server-key.pem", Some(not_a_key)),
            "e/server-key.pem: no usable key",
        ),
        (
            broken("f", "server-key.pem", Some(&strange_key)),
            "server-key.pem do not belong together",
        ),
    ] {
        let text = refused_start(&[
            "--tls-certificates",
            self::text(&credentials),
            "--tls-verify-peer",
        ]);
        assert!(text.contains(complaint), "{text}");
    }
    for (args, complaint) in [
        (&["--tls", "require"][..], "with neither certificates nor"),
        (&["--tls-psk", "/nonexistent"], "cannot read /nonexistent"),
        (&["--tls-verify-peer"], "but TLS with certificates is off"),
        (&["--tls", "maybe"], "use off, on or require"),
        (
            &["--allow", "name=alice"],
            "fits nobody without --tls-verify-peer",
        ),
        (
            &["--allow", "address=10.0.0.0/40"],
            "`10.0.0.0/40` is no address",
        ),
    ] {
        let text = refused_start(args);
        assert!(text.contains(complaint), "{args:?}: {text}");
    }
}

/// A connection that fails where it would hang.
fn unix_socket(bench: &Bench) -> UnixStream {
    let stream = UnixStream::connect(bench.server.socket()).unwrap();
    let limit = Some(Duration::from_secs(10));
    stream.set_read_timeout(limit).unwrap();
    stream
}

#[test]
fn nothing_but_starttls_and_abort_is_heard_where_tls_is_required() {
    let bench = Bench::start(&[]);
    tls_clients::nothing_but_starttls_and_abort_is_heard(|| unix_socket(&bench));
}

#[test]
fn what_was_agreed_before_tls_is_forgotten_inside() {
    let bench = Bench::start(&["--tls", "on"]);
    tls_clients::what_was_agreed_is_forgotten(|| unix_socket(&bench), &bench.pki, "");
}

#[test]
fn plaintext_behind_starttls_is_never_heard() {
    let bench = Bench::start(&["--tls", "on"]);
    tls_clients::plaintext_is_never_heard(|| unix_socket(&bench), &bench.pki);
    assert!(
        !bench.is_refused(&bench.uri(&bench.pki.anonymous())),
        "the server goes on"
    );
}
