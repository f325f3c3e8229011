//! Requests that make no sense: refused with what, where and what to do, and nothing changes.

use blockd::admin::{AdminErrorKind, AdminRequest, SnapshotName, VolumeCreate};
use blockd::id::NodeNo;
use blockd_tests::{Cluster, MIB, binary, try_run};

fn create(name: &str, size_bytes: u64) -> VolumeCreate {
    VolumeCreate {
        name: name.to_owned(),
        size_bytes,
        servers: vec![],
        page_blocks: 8192,
        format: None,
    }
}

fn snapshot(volume: &str, snapshot: &str) -> AdminRequest {
    let (volume, snapshot) = (volume.to_owned(), snapshot.to_owned());
    let targets = vec![SnapshotName { volume, snapshot }];
    AdminRequest::SnapshotCreate { targets }
}

/// Refused with this kind and with these words in the message.
fn refuses(cluster: &Cluster, request: AdminRequest, kind: AdminErrorKind, words: &[&str]) {
    let refusal = cluster.refused(request.clone());
    assert_eq!(refusal.kind, kind, "{request:?}: {refusal}");
    for word in words {
        assert!(
            refusal.message.contains(word),
            "{request:?}: no {word:?} in: {refusal}"
        );
    }
}

/// Sizes of zero, beyond the limits or no multiple of a block; impossible pages and servers.
#[test]
fn impossible_sizes_pages_and_servers() {
    let cluster = Cluster::three();
    let volume = |change: &dyn Fn(&mut VolumeCreate)| {
        let mut wanted = create("bad", 64 * MIB);
        change(&mut wanted);
        AdminRequest::VolumeCreate(wanted)
    };
    let invalid = AdminErrorKind::Invalid;
    for (size_bytes, words) in [
        (0, &["0 bytes", "give a size"][..]),
        (1, &["multiple", "512"]),
        (MIB + 1, &["multiple", "512"]),
        (1 << 47, &["pages", "possible"]),
        (u64::MAX - 511, &["pages", "possible"]),
    ] {
        refuses(
            &cluster,
            volume(&|wanted| wanted.size_bytes = size_bytes),
            invalid,
            words,
        );
    }
    for page_blocks in [0, 3, 8191, 1 << 21, u32::MAX] {
        let words = &["page", "power of two"];
        refuses(
            &cluster,
            volume(&|wanted| wanted.page_blocks = page_blocks),
            invalid,
            words,
        );
    }
    let twice = volume(&|wanted| wanted.servers = vec![NodeNo(1), NodeNo(1)]);
    refuses(&cluster, twice, invalid, &["1", "twice"]);
    for number in [4, 65_535] {
        let unknown = volume(&|wanted| wanted.servers = vec![NodeNo(1), NodeNo(number)]);
        refuses(
            &cluster,
            unknown,
            AdminErrorKind::NotFound,
            &[&number.to_string()],
        );
    }
    cluster.create("good", 64 * MIB);
    for size_bytes in [0, 513, 1 << 50] {
        let resize = AdminRequest::VolumeResize {
            name: "good".to_owned(),
            size_bytes,
            allow_shrink: true,
        };
        refuses(&cluster, resize, invalid, &[]);
    }
    assert_eq!(cluster.show("good").size_bytes, 64 * MIB);
    let refusal = cluster.refused(AdminRequest::VolumeShow { name: "bad".into() });
    assert_eq!(refusal.kind, AdminErrorKind::NotFound);
}

/// Malformed, duplicate and unknown names of volumes, snapshots, clusters and nodes.
#[test]
fn bad_names() {
    let cluster = Cluster::three();
    cluster.create("taken", MIB);
    cluster.snapshot("taken@s");
    let long = "x".repeat(129);
    let rename = |name: &str, new_name: &str| AdminRequest::VolumeRename {
        name: name.to_owned(),
        new_name: new_name.to_owned(),
    };
    for name in [
        "", "-x", ".x", "a b", "a/b", "a@b", "a\nb", "\u{e4}", "a\0", "../x", &long,
    ] {
        let invalid = AdminErrorKind::Invalid;
        refuses(
            &cluster,
            AdminRequest::VolumeCreate(create(name, MIB)),
            invalid,
            &["name"],
        );
        refuses(&cluster, rename("taken", name), invalid, &["name"]);
        refuses(&cluster, snapshot("taken", name), invalid, &["name"]);
    }
    let exists = AdminErrorKind::Exists;
    refuses(
        &cluster,
        AdminRequest::VolumeCreate(create("taken", MIB)),
        exists,
        &["taken"],
    );
    refuses(&cluster, snapshot("taken", "s"), exists, &["taken", "s"]);
    let not_found = AdminErrorKind::NotFound;
    refuses(&cluster, rename("absent", "other"), not_found, &["absent"]);
    refuses(&cluster, snapshot("absent", "s"), not_found, &["absent"]);
    let absent = || "absent".to_owned();
    for request in [
        AdminRequest::VolumeShow { name: absent() },
        AdminRequest::VolumeDelete { name: absent() },
        AdminRequest::RouteShow { volume: absent() },
        AdminRequest::SnapshotList {
            volume: Some(absent()),
        },
        AdminRequest::Open {
            volume: absent(),
            snapshot: None,
        },
        AdminRequest::Open {
            volume: "taken".to_owned(),
            snapshot: Some(absent()),
        },
    ] {
        refuses(&cluster, request, not_found, &["absent"]);
    }
    let define = AdminRequest::ClusterDefine {
        name: "second".to_owned(),
    };
    refuses(&cluster, define, exists, &["test"]);
    assert_eq!(cluster.snapshots("taken").len(), 1);
}

/// A server of another cluster is not taken over, and a client of another cluster is refused.
#[test]
fn servers_and_clients_of_another_cluster() {
    let cluster = Cluster::three();
    let other = Cluster::start(&blockd_tests::ClusterOptions {
        servers: 1,
        ..blockd_tests::ClusterOptions::default()
    });
    let theirs = other.servers[0].peer_address();
    let define = AdminRequest::NodeDefine {
        address: theirs.clone(),
        name: None,
        online: true,
    };
    let words = &["another cluster", "empty state directory", &theirs];
    refuses(&cluster, define, AdminErrorKind::Conflict, words);
    let hello = blockd::io::link::Hello {
        min_version: 1,
        max_version: 1,
        requester: 42,
        connection: 1,
        cluster_id: Some("0".repeat(32)),
        node: NodeNo(1),
    };
    let linked = cluster.block(blockd::io::link::Link::connect(&theirs, &hello));
    match linked.map(|_| ()) {
        Err(blockd::io::link::LinkError::Refused { reason, .. }) => {
            assert!(reason.contains("belongs to cluster"), "{reason}");
        }
        other => panic!("a request for another cluster was welcomed: {other:?}"),
    }
    let newer = blockd::io::link::Hello {
        min_version: 9,
        max_version: 12,
        cluster_id: None,
        ..hello
    };
    let linked = cluster.block(blockd::io::link::Link::connect(&theirs, &newer));
    match linked.map(|_| ()) {
        Err(blockd::io::link::LinkError::Refused { reason, .. }) => {
            assert!(reason.contains("9 to 12"), "{reason}");
        }
        other => panic!("an unknown protocol version was welcomed: {other:?}"),
    }
    other.create("still-works", MIB);
    cluster.create("still-works", MIB);
}

/// The same through the command line: exit codes, and messages on stderr.
#[test]
fn blockctl_says_what_is_wrong() {
    let cluster = Cluster::three();
    let servers = cluster.server_list();
    let blockctl = |arguments: &[&str]| {
        let all = ["--servers", &servers]
            .into_iter()
            .chain(arguments.iter().copied());
        try_run(40, binary("blockctl"), all)
    };
    blockctl(&["volume", "create", "v", "--size", "64MiB"])
        .ok()
        .code
        .unwrap();
    blockctl(&["snapshot", "create", "v@s"]).ok().code.unwrap();
    for (arguments, code, words) in [
        (&["volume", "create", "w", "--size", "0"][..], 2, "size"),
        (&["volume", "create", "w", "--size", "-4GiB"], 2, "negative"),
        (&["volume", "create", "w", "--size", "4XB"], 2, "4XB"),
        (
            &["volume", "create", "w", "--size", "4000000TiB"],
            2,
            "4000000TiB",
        ),
        (&["volume", "create", "v", "--size", "1GiB"], 1, "v"),
        (&["volume", "create", "a/b", "--size", "1GiB"], 1, "name"),
        (&["volume", "delete", "v"], 1, "snapshot"),
        (&["volume", "show", "absent"], 1, "absent"),
        (&["snapshot", "create", "v"], 2, "VOL@SNAP"),
        (&["snapshot", "create", "v@s"], 1, "s"),
        (&["snapshot", "delete", "v@absent"], 1, "absent"),
        (&["route", "show", "absent"], 1, "absent"),
        (
            &["node", "define", "127.255.255.1", "--online"],
            1,
            "127.255.255.1",
        ),
        (&["cluster", "define", "again"], 1, "test"),
        (&["nonsense"], 2, "nonsense"),
    ] {
        let ran = blockctl(arguments);
        assert_eq!(ran.code, Some(code), "{ran:?}");
        assert!(ran.stderr.contains(words), "no {words:?}: {ran:?}");
        assert!(!ran.stderr.contains("panicked"), "{ran:?}");
    }
    let nobody = cluster.addresses.of(200).to_string();
    let alone = ["--servers", &nobody, "--timeout", "2s", "volume", "list"];
    let ran = try_run(40, binary("blockctl"), alone);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert!(ran.stderr.contains(&nobody), "{ran:?}");
    let listed = blockctl(&["--json", "volume", "list"]).ok().stdout;
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    assert_eq!(listed.as_array().unwrap().len(), 1, "{listed}");
}
