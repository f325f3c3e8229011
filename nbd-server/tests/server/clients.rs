//! Real clients against the built server, over unix sockets and TCP, on memory and on a file.

use std::io::{Read, Seek, SeekFrom, Write};

use crate::support::{TestServer, pattern_file, run, try_run};

fn file_server(size_bytes: u64, more: &[&str]) -> TestServer {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    std::fs::File::create(&path)
        .unwrap()
        .set_len(size_bytes)
        .unwrap();
    let path = path.to_str().unwrap().to_owned();
    TestServer::start(&[&[path.as_str()], more].concat(), dir)
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let server = TestServer::memory("64MiB", &["--name", "vol1"]);
    for uri in [server.uri("vol1"), server.tcp_uri("vol1"), server.uri("")] {
        assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), "67108864");
        for can in [
            "read",
            "write",
            "flush",
            "fua",
            "trim",
            "zero",
            "fast-zero",
            "df",
            "cache",
            "structured-reply",
            "multi-conn",
        ] {
            run("nbdinfo", &["--can", can, &uri]);
        }
        assert!(!try_run("nbdinfo", &["--is", "read-only", &uri]).0);
    }
    let json = run("nbdinfo", &["--json", &server.uri("vol1")]);
    assert!(
        json.contains("\"base:allocation\"") && json.contains("\"block_size_preferred\": 4096"),
        "{json}"
    );
    let list = run("nbdinfo", &["--list", &server.uri("")]);
    assert!(
        list.contains("vol1") && list.contains("description: memory"),
        "{list}"
    );
    let (ok, text) = try_run("qemu-io", &["-f", "raw", &server.uri("other"), "-c", "map"]);
    assert!(
        !ok && text.contains("there is no export `other` here"),
        "{text}"
    );
}

#[test]
fn maps_show_holes_of_memory_and_file() {
    for server in [TestServer::memory("1MiB", &[]), file_server(1 << 20, &[])] {
        let uri = server.uri("");
        run("qemu-io", &["-f", "raw", &uri, "-c", "write -P 5 256k 64k"]);
        let map: Vec<String> = run("nbdinfo", &["--map", &uri])
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        let expected = "0 262144 3 hole,zero 262144 65536 0 data 327680 720896 3 hole,zero";
        assert_eq!(map.join(" "), expected);
        run(
            "qemu-io",
            &["-f", "raw", &uri, "-c", "write -z -u 256k 64k"],
        );
        let map = run("nbdinfo", &["--map", &uri]);
        assert_eq!(
            map.split_whitespace().collect::<Vec<_>>(),
            ["0", "1048576", "3", "hole,zero"]
        );
    }
}

#[test]
fn copies_are_equal_with_four_connections_and_with_qemu() {
    for server in [TestServer::memory("32MiB", &[]), file_server(32 << 20, &[])] {
        let (image, back) = (server.path("image"), server.path("back"));
        pattern_file(&image, 16 << 20);
        let (image, back) = (image.to_str().unwrap(), back.to_str().unwrap());
        for uri in [server.uri(""), server.tcp_uri("")] {
            run("nbdcopy", &["--flush", "--connections=4", image, &uri]);
            run("nbdcopy", &["--connections=4", &uri, back]);
            run("cmp", &[image, back]);
            run(
                "nbdcopy",
                &[
                    "--no-extents",
                    "--connections=4",
                    "--requests=64",
                    &uri,
                    "null:",
                ],
            );
            run(
                "qemu-io",
                &[
                    "-f",
                    "raw",
                    &uri,
                    "-c",
                    "discard 0 32M",
                    "-c",
                    "write -P 9 1M 2M",
                ],
            );
            run(
                "qemu-img",
                &[
                    "convert", "-n", "-f", "raw", "-O", "raw", "-W", "-m", "8", image, &uri,
                ],
            );
            run(
                "qemu-img",
                &["compare", "-f", "raw", "-F", "raw", image, &uri],
            );
            let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
            assert!(
                map.contains("\"zero\": true") && map.contains("\"data\": true"),
                "{map}"
            );
        }
    }
}

#[test]
fn qemu_io_patterns_read_back() {
    let script = [
        "write -P 0xab 0 1M",
        "read -P 0xab 0 1M",
        "write -f -P 1 4k 4k",
        "read -P 1 4k 4k",
        "write -z 128k 64k",
    ];
    let more = [
        "read -P 0 128k 64k",
        "discard 256k 64k",
        "flush",
        "aio_write -P 7 1M 64k",
        "aio_flush",
        "read -P 7 1M 64k",
    ];
    let odd = [
        "write -P 3 511 3",
        "read -P 3 511 3",
        "read -P 0xab 500 11",
        "write -z -u 700k 5",
        "read -P 0 700k 5",
    ];
    for server in [TestServer::memory("8MiB", &[]), file_server(8 << 20, &[])] {
        for uri in [server.uri(""), server.tcp_uri("")] {
            let mut args = vec!["-f", "raw", uri.as_str()];
            args.extend(
                script
                    .iter()
                    .chain(&more)
                    .chain(&odd)
                    .flat_map(|command| ["-c", command]),
            );
            let text = run("qemu-io", &args);
            assert!(!text.contains("Pattern verification failed"), "{text}");
        }
    }
}

#[test]
fn read_only_is_enforced() {
    let server = file_server(1 << 20, &["--read-only"]);
    run("nbdinfo", &["--is", "read-only", &server.uri("")]);
    let script = "h.set_strict_mode(0)\ntry:\n    h.pwrite(b'x' * 512, 0)\n    print('written')\nexcept nbd.Error as e:\n    print(e.errno)\n";
    assert_eq!(
        run("nbdsh", &["-u", &server.uri(""), "-c", script]).trim(),
        "EPERM"
    );
}

#[test]
fn nbd_client_lists() {
    let server = TestServer::memory("1MiB", &["--name", "vol1"]);
    assert!(
        run(
            "nbd-client",
            &["-l", "-u", server.socket().to_str().unwrap()]
        )
        .contains("vol1")
    );
    let (host, port) = server.tcp().split_once(':').unwrap();
    assert!(run("nbd-client", &["-l", host, port]).contains("vol1"));
}

#[test]
fn fio_verifies_random_writes_at_depth_32() {
    for server in [TestServer::memory("64MiB", &[]), file_server(64 << 20, &[])] {
        for uri in [server.uri(""), server.tcp_uri("")] {
            let uri = format!("--uri={uri}");
            let args = [
                "--name=v",
                "--ioengine=nbd",
                &uri,
                "--rw=randwrite",
                "--bsrange=512-128k",
                "--iodepth=32",
                "--size=32m",
            ];
            run(
                "fio",
                &[
                    &args[..],
                    &[
                        "--verify=crc32c",
                        "--do_verify=1",
                        "--verify_fatal=1",
                        "--verify_state_save=0",
                    ],
                ]
                .concat(),
            );
        }
    }
}

#[test]
fn nbdsh_without_strict_mode_gets_errors_and_stays_connected() {
    let server = TestServer::memory("1MiB", &[]);
    let script = r#"
h.set_strict_mode(0)
def errno(f, *args, **kw):
    try:
        f(*args, **kw)
        return 'OK'
    except nbd.Error as e:
        return e.errno
size = h.get_size()
assert errno(h.pread, 512, size) == 'EINVAL'
assert errno(h.pread, 1, 2**63) == 'EINVAL'
assert errno(h.pwrite, b'x' * 512, size) == 'ENOSPC'
assert errno(h.zero, 512, size - 511) == 'ENOSPC'
assert errno(h.zero, 512, 0, flags=nbd.CMD_FLAG_FAST_ZERO) == 'OK'
assert errno(h.pwrite, b'x' * 512, 0, flags=nbd.CMD_FLAG_FAST_ZERO) == 'EINVAL'
assert errno(h.trim, 512, 2**64 - 512) == 'EINVAL'
assert errno(h.trim, 512, 0, flags=nbd.CMD_FLAG_FUA) == 'OK'
assert errno(h.pwrite, b'y' * 512, 0, flags=nbd.CMD_FLAG_FUA) == 'OK'
assert errno(h.flush) == 'OK'
assert errno(h.cache, 512, 0) == 'OK'
chunks = []
h.pread_structured(65536 * 2, 0, lambda buf, offset, s, err: chunks.append((s, offset, len(buf))))
assert chunks == [(nbd.READ_DATA, 0, 65536), (nbd.READ_HOLE, 65536, 65536)], chunks
chunks.clear()
h.pread_structured(65536 * 2, 0, lambda buf, offset, s, err: chunks.append((s, offset, len(buf))), nbd.CMD_FLAG_DF)
assert chunks == [(nbd.READ_DATA, 0, 131072)], chunks
assert h.pread(2, 511) == b'y\0'
print('done')
"#;
    assert_eq!(
        run("nbdsh", &["-u", &server.uri(""), "-c", script]).trim(),
        "done"
    );
    let options = format!(
        "h.set_opt_mode(True)\nh.add_meta_context('base:allocation')\nh.connect_uri('{}')\nassert h.opt_list(lambda n, d: 0) == 1\nh.opt_info()\nsize = h.get_size()\nh.opt_go()\nassert h.get_size() == size\nout = []\nh.block_status(65536, 0, lambda c, o, e, err: out.append((c, o, e)), nbd.CMD_FLAG_REQ_ONE)\nassert out == [('base:allocation', 0, [65536, 0])], out\nprint('done')",
        server.uri("")
    );
    assert_eq!(run("nbdsh", &["-c", &options]).trim(), "done");
}

#[test]
fn the_nbd_crate_opens_by_export_name() {
    let server = TestServer::memory("1MiB", &["--name", "vol1"]);
    let mut stream = std::net::TcpStream::connect(server.tcp()).unwrap();
    let export = nbd::client::handshake(&mut stream, b"vol1").unwrap();
    let mut disk = nbd::client::NbdClient::new(&mut stream, &export);
    disk.seek(SeekFrom::Start(4096)).unwrap();
    disk.write_all(b"through another client").unwrap();
    disk.seek(SeekFrom::Start(4094)).unwrap();
    let mut back = [1; 24];
    disk.read_exact(&mut back).unwrap();
    assert_eq!(&back, b"\0\0through another client");
}

#[test]
fn a_file_survives_the_server_and_a_stop_is_clean() {
    let server = file_server(1 << 20, &[]);
    run(
        "qemu-io",
        &[
            "-f",
            "raw",
            &server.uri(""),
            "-c",
            "write -P 0x5a 4k 8k",
            "-c",
            "flush",
        ],
    );
    let bytes = std::fs::read(server.path("disk")).unwrap();
    assert!(
        bytes[4096..12288].iter().all(|byte| *byte == 0x5a)
            && bytes[..4096].iter().all(|byte| *byte == 0)
    );
    let socket = server.socket();
    let dir = socket.parent().unwrap().to_owned();
    assert!(dir.exists() && socket.exists());
    assert!(server.stop(), "SIGTERM must end the server with success");
}

#[test]
fn standard_input_and_inherited_sockets_serve() {
    let program = env!("CARGO_BIN_EXE_nbd-server");
    let script = format!(
        "h.connect_command(['{program}', '--memory', '1MiB', '--stdio'])\nh.pwrite(b'a' * 512, 0)\nprint(h.pread(2, 511), h.get_size())"
    );
    assert_eq!(
        run("nbdsh", &["-c", &script]).trim(),
        "bytearray(b'a\\x00') 1048576"
    );
    let script = format!(
        "h.connect_systemd_socket_activation(['{program}', '--memory', '1MiB'])\nh.pwrite(b'b' * 512, 0)\nprint(h.pread(2, 511), h.get_size())"
    );
    assert_eq!(
        run("nbdsh", &["-c", &script]).trim(),
        "bytearray(b'b\\x00') 1048576"
    );
}

#[test]
fn wrong_arguments_are_explained() {
    let program = env!("CARGO_BIN_EXE_nbd-server");
    for (args, text) in [
        (&["--memory", "1X"][..], "unit `X` is unknown"),
        (
            &["/nonexistent/disk", "--stdio"][..],
            "cannot open /nonexistent/disk",
        ),
        (
            &["/dev/null"][..],
            "neither a regular file nor a block device",
        ),
        (&[][..], "required arguments"),
    ] {
        let (ok, output) = try_run(program, args);
        assert!(!ok && output.contains(text), "{args:?}: {output}");
    }
}
