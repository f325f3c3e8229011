//! Volumes over servers: the table, requests through any server, and a volume's life.

use blockd::admin::{AdminErrorKind, AdminRequest, RouteInfo};
use blockd::id::NodeNo;
use blockd_tests::{Cluster, MIB, Random, Register};
use bytes::Bytes;
use std::collections::BTreeMap;

/// Pages of each owner.
fn shares(route: &RouteInfo) -> BTreeMap<NodeNo, u64> {
    let mut shares = BTreeMap::new();
    for run in &route.runs {
        *shares.entry(run.owner).or_default() += u64::from(run.page_count);
    }
    shares
}

/// The owner of each page.
fn owners(route: &RouteInfo) -> Vec<NodeNo> {
    let of = |run: &blockd::id::RouteRun| vec![run.owner; run.page_count as usize];
    route.runs.iter().flat_map(of).collect()
}

/// The table as every server shows it, which must be the same (S003-04 to S003-06).
fn common_route(cluster: &Cluster, volume: &str) -> RouteInfo {
    let route = cluster.route(0, volume);
    for index in 1..cluster.servers.len() {
        let other = cluster.route(index, volume);
        assert_eq!(other, route, "server {} shows another table", index + 1);
    }
    route
}

/// S003-01, 02, 04, 05, 06: pages are spread evenly over all servers or the subset that was asked
/// for, whatever the size of a page, and every server has the same table.
#[test]
fn pages_are_spread_evenly_and_all_servers_agree() {
    let cluster = Cluster::three();
    for (name, size_bytes, page_blocks) in [
        ("default", 300 * MIB, 8192),
        ("small", 4 * MIB, 8),
        ("middle", 96 * MIB, 256),
        ("huge", 9 << 30, 1 << 20),
        ("odd", 25 * MIB + 512, 8192),
    ] {
        let info = cluster.create_on(name, size_bytes, page_blocks, &[]);
        assert_eq!(
            (info.size_bytes, info.page_blocks),
            (size_bytes, page_blocks)
        );
        let route = common_route(&cluster, name);
        let pages = size_bytes.div_ceil(u64::from(page_blocks) * 512);
        assert_eq!(route.page_count, pages, "{name}");
        assert_eq!(
            owners(&route).len() as u64,
            pages,
            "{name}: a page without an owner"
        );
        let shares = shares(&route);
        let (most, least) = (
            shares.values().max().unwrap(),
            shares.values().min().unwrap(),
        );
        let longest = route
            .runs
            .iter()
            .map(|run| u64::from(run.page_count))
            .max()
            .unwrap();
        assert_eq!(shares.len(), 3, "{name}: {shares:?}");
        assert!(most - least <= longest, "{name}: {shares:?}");
    }
    cluster.create_on("subset", 40 * MIB, 8192, &[1, 3]);
    let route = common_route(&cluster, "subset");
    assert_eq!(
        shares(&route),
        BTreeMap::from([(NodeNo(1), 5), (NodeNo(3), 5)])
    );
    cluster.create_on("single", 40 * MIB, 8192, &[2]);
    let route = common_route(&cluster, "single");
    assert_eq!(shares(&route), BTreeMap::from([(NodeNo(2), 10)]));
}

/// S003-03, 07, 08, 10, 33: requests at random places, of any length and over several pages and
/// owners, are the same through every server, whatever the size of a page.
#[test]
fn every_server_takes_every_request() {
    let cluster = Cluster::three();
    for page_blocks in [8, 256, 8192, 1 << 20] {
        let name = format!("v{page_blocks}");
        let size_bytes = (12 * MIB).max(u64::from(page_blocks) * 512 * 3);
        cluster.create_on(&name, size_bytes, page_blocks, &[]);
        exercise(&cluster, &name, size_bytes, page_blocks);
    }
    cluster.create_on("subset", 12 * MIB, 256, &[1, 3]);
    exercise(&cluster, "subset", 12 * MIB, 256);
}

/// Writes through one server, reads through the two others, around the boundaries of pages.
fn exercise(cluster: &Cluster, name: &str, size_bytes: u64, page_blocks: u32) {
    let mut random = Random::new(u64::from(page_blocks));
    let mut connections: Vec<_> = (0..3).map(|index| cluster.nbd(index, name)).collect();
    let page_bytes = u64::from(page_blocks) * 512;
    let window = size_bytes.min(4 * MIB);
    let start = if size_bytes > 12 * MIB {
        page_bytes - window / 2
    } else {
        0
    };
    let mut register = Register::new(1, start, window);
    for round in 0..60 {
        let (at, len) = register.pick(&mut random, [2, 40, 1024][round % 3]);
        let through = random.index(3);
        if random.one_in(5) {
            connections[through].trim(at, len).unwrap();
            register.acknowledge(at, len, blockd_tests::Content::Zeros);
        } else {
            let (content, data) = register.data(at, len);
            connections[through].write(at, &data).unwrap();
            register.acknowledge(at, len, content);
        }
        for other in [1, 2] {
            let found = connections[(through + other) % 3].read(at, len).unwrap();
            register.check(at, &found, &format!("{name}, written through {through}"));
        }
    }
    let whole = u32::try_from(window).unwrap();
    for (index, connection) in connections.iter_mut().enumerate() {
        let found = connection.read(start, whole).unwrap();
        register.check(start, &found, &format!("{name} through server {index}"));
    }
    let volume = cluster.open(name);
    let found = cluster.block(volume.read(start, whole)).unwrap();
    register.check(start, &found, &format!("{name} by the client library"));
}

/// Bytes of any length at any offset: read-modify-write of parts of blocks, at the ends of pages.
#[test]
fn unaligned_requests_touch_only_their_bytes() {
    let cluster = Cluster::three();
    cluster.create_on("v", MIB, 8, &[]);
    let mut image = vec![0_u8; 64 << 10];
    let mut random = Random::new(5);
    let mut connections: Vec<_> = (0..3).map(|index| cluster.nbd(index, "v")).collect();
    for _ in 0..150 {
        let at = random.within(0..60_000);
        let longest = [10, 600, 5000][random.index(3)];
        let len = random.within(1..longest);
        let len = len.min(image.len() as u64 - at);
        let range = usize::try_from(at).unwrap()..usize::try_from(at + len).unwrap();
        let data = random.bytes(range.len());
        connections[random.index(3)].write(at, &data).unwrap();
        image[range.clone()].copy_from_slice(&data);
        let found = connections[random.index(3)]
            .read(at, u32::try_from(len).unwrap())
            .unwrap();
        assert_eq!(found, image[range], "{len} bytes at {at}");
    }
    for connection in &mut connections {
        assert!(
            connection.read(0, 64 << 10).unwrap() == image,
            "the whole image differs"
        );
    }
}

/// S003-12 in part: a volume grows and shrinks under open users; what was cut off reads as zeros
/// when it comes back, and what was kept stays.
#[test]
fn a_volume_grows_and_shrinks() {
    let cluster = Cluster::three();
    cluster.create("v", 32 * MIB);
    let volume = cluster.open("v");
    let kept = Random::new(1).bytes(MIB as usize);
    cluster
        .block(volume.write(3 * MIB, kept.clone().into()))
        .unwrap();
    cluster
        .block(volume.write(30 * MIB, Bytes::from(vec![9; MIB as usize])))
        .unwrap();
    let resize = |size_bytes, allow_shrink| AdminRequest::VolumeResize {
        name: "v".to_owned(),
        size_bytes,
        allow_shrink,
    };
    cluster.admin(resize(64 * MIB, false)).unwrap();
    common_route(&cluster, "v");
    assert_eq!(cluster.nbd(1, "v").size_bytes(), 64 * MIB);
    cluster.block(volume.refresh()).unwrap();
    let end = Bytes::from(vec![5; 512]);
    cluster
        .block(volume.write(64 * MIB - 512, end.clone()))
        .unwrap();
    assert_eq!(
        cluster.block(volume.read(64 * MIB - 512, 512)).unwrap(),
        end
    );
    let refusal = cluster.refused(resize(10 * MIB + 512, false));
    assert_eq!(refusal.kind, AdminErrorKind::Conflict);
    assert!(refusal.message.contains("--allow-shrink"), "{refusal}");
    cluster.admin(resize(10 * MIB + 512, true)).unwrap();
    for index in 0..3 {
        assert_eq!(cluster.nbd(index, "v").size_bytes(), 10 * MIB + 512);
    }
    cluster.admin(resize(64 * MIB, false)).unwrap();
    common_route(&cluster, "v");
    for index in 0..3 {
        let mut connection = cluster.nbd(index, "v");
        let found = connection.read(0, 32 << 20).unwrap();
        assert!(found[3 << 20..4 << 20] == kept, "what was kept has changed");
        assert!(
            found[4 << 20..].iter().all(|byte| *byte == 0),
            "what was cut off came back"
        );
        let found = connection.read(64 * MIB - 512, 512).unwrap();
        assert_eq!(found, vec![0; 512], "what was cut off came back");
    }
}

/// A rename changes the name and nothing else; a volume that is made anew under the name of a
/// deleted one holds zeros and not the old data.
#[test]
fn renamed_keeps_its_data_and_recreated_has_none() {
    let cluster = Cluster::three();
    cluster.create("old", 24 * MIB);
    let volume = cluster.open("old");
    let data = Bytes::from(Random::new(3).bytes(24 << 20));
    cluster.block(volume.write(0, data.clone())).unwrap();
    let rename = AdminRequest::VolumeRename {
        name: "old".to_owned(),
        new_name: "new".to_owned(),
    };
    cluster.admin(rename).unwrap();
    for index in 0..3 {
        assert!(cluster.nbd(index, "new").read(0, 24 << 20).unwrap() == data);
    }
    let name = "new".to_owned();
    cluster
        .admin(AdminRequest::VolumeDelete { name: name.clone() })
        .unwrap();
    let refusal = cluster.refused(AdminRequest::VolumeShow { name });
    assert_eq!(refusal.kind, AdminErrorKind::NotFound);
    cluster.create("new", 24 * MIB);
    for index in 0..3 {
        let found = cluster.nbd(index, "new").read(0, 24 << 20).unwrap();
        assert!(
            found.iter().all(|byte| *byte == 0),
            "data of the deleted volume came back"
        );
    }
    assert_eq!(
        cluster.show("new").allocated_bytes,
        Some(0),
        "the old data still takes space"
    );
}
