//! Changes between snapshots as NBD clients see them: incremental backup with QEMU's tools.

use blockd::admin::AdminRequest;
use blockd::id::VolumeId;
use blockd::io::wire::{Frame, Kind, Status, decode_layers, flags};
use blockd_tests::{Cluster, MIB, NbdConnection, Peer, Random, run, try_run};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const BLOCK: u64 = 4096;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The extents of one context of an export: (offset, length, status), neighbours merged.
fn map(uri: &str, context: &str) -> Vec<(u64, u64, u64)> {
    let option = format!("--map={context}");
    let json = run(60, "nbdinfo", [&option, "--json", uri]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let number = |entry: &serde_json::Value, key: &str| entry[key].as_u64().unwrap();
    let mut extents: Vec<(u64, u64, u64)> = Vec::new();
    for entry in json.as_array().unwrap() {
        let (at, len) = (number(entry, "offset"), number(entry, "length"));
        let status = number(entry, "type");
        match extents.last_mut() {
            Some(last) if last.2 == status && last.0 + last.1 == at => last.1 += len,
            _ => extents.push((at, len, status)),
        }
    }
    extents
}

fn dirty(uri: &str, snapshot: &str) -> Vec<(u64, u64)> {
    let extents = map(uri, &format!("qemu:dirty-bitmap:{snapshot}"));
    let dirty = extents.into_iter().filter(|extent| extent.2 == 1);
    dirty.map(|(at, len, _)| (at, len)).collect()
}

fn contexts(uri: &str) -> Vec<String> {
    let json = run(60, "nbdinfo", ["--json", uri]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let contexts = json["exports"][0]["contexts"].as_array().unwrap();
    let name = |name: &serde_json::Value| name.as_str().unwrap().to_owned();
    contexts.iter().map(name).collect()
}

/// What was written, trimmed and left alone, over three servers, as bitmaps and depths show it:
/// `nbdinfo`, `qemu-img map` and `blockd::client` agree through every server.
#[test]
fn every_server_tells_the_same_changes() {
    let cluster = Cluster::three();
    cluster.create_on("v", 12 * MIB, 2048, &[]);
    let mut connection = cluster.nbd(0, "v");
    connection.write(0, &[1; 6 << 20]).unwrap();
    cluster.snapshot("v@a");
    connection.write(MIB - 512, &[2; 1024]).unwrap();
    connection.trim(3 * MIB, 65_536).unwrap();
    cluster.snapshot("v@b");
    connection.write(8 * MIB + 4096, &[3; 8192]).unwrap();
    let since_b = [(8 * MIB + 4096, 8192)];
    let since_a_at_b = [(MIB - BLOCK, 2 * BLOCK), (3 * MIB, 65_536)];
    let since_a = [since_a_at_b[0], since_a_at_b[1], since_b[0]];
    for server in &cluster.servers {
        let [uri, unix] = server.uris("v");
        let [at_b, _] = server.uris("v@b");
        let names = ["base:allocation", "qemu:allocation-depth"];
        let bitmaps = ["qemu:dirty-bitmap:a", "qemu:dirty-bitmap:b"];
        assert_eq!(contexts(&uri), [names, bitmaps].concat());
        assert_eq!(contexts(&at_b), [&names[..], &bitmaps[..1]].concat());
        for uri in [&uri, &unix] {
            assert_eq!(dirty(uri, "a"), since_a);
            assert_eq!(dirty(uri, "b"), since_b);
        }
        assert_eq!(dirty(&at_b, "a"), since_a_at_b);
        let depths = [
            (0, MIB - BLOCK, 3),
            (MIB - BLOCK, 2 * BLOCK, 2),
            (MIB + BLOCK, 2 * MIB - BLOCK, 3),
            (3 * MIB, 65_536, 2),
            (3 * MIB + 65_536, 3 * MIB - 65_536, 3),
            (6 * MIB, 2 * MIB + BLOCK, 0),
            (8 * MIB + BLOCK, 8192, 1),
            (8 * MIB + 12_288, 4 * MIB - 12_288, 0),
        ];
        assert_eq!(map(&uri, "qemu:allocation-depth"), depths);
        run(60, "nbdinfo", ["--can", "fast-zero", &uri]);
        let absent = try_run(60, "nbdinfo", ["--map=qemu:dirty-bitmap:b", &at_b]);
        assert_ne!(absent.code, Some(0), "b is not older than itself");
        let options = format!(
            "driver=nbd,server.type=inet,server.host={},server.port=10809,export=v,\
             x-dirty-bitmap=qemu:dirty-bitmap:a",
            server.address
        );
        let seen = run(
            60,
            "qemu-img",
            ["map", "--output=json", "--image-opts", &options],
        );
        let seen: serde_json::Value = serde_json::from_str(&seen).unwrap();
        // QEMU shows the bitmap as if it were base:allocation: what is dirty has no data.
        let seen = seen.as_array().unwrap().iter();
        let seen = seen.filter(|entry| entry["data"] == false);
        let number = |entry: &serde_json::Value, key: &str| entry[key].as_u64().unwrap();
        let seen: Vec<_> = seen
            .map(|entry| (number(entry, "start"), number(entry, "length")))
            .collect();
        assert_eq!(seen, since_a);
    }
    let volume = cluster.open("v");
    let since = cluster.block(volume.since("a")).unwrap();
    let layers = cluster.block(volume.layers(0, 12 * MIB, Some(since)));
    let (mut at, mut changed) = (0, Vec::new());
    for run in layers.unwrap() {
        if run.changed {
            changed.push((at, run.len_bytes));
        }
        at += run.len_bytes;
    }
    assert_eq!((at, changed), (12 * MIB, since_a.to_vec()));
    assert!(cluster.block(volume.since("absent")).is_err());
}

/// A question for layers on the peer port: what cannot be answered is refused, and the connection
/// goes on; a question of the first version gets the answer of the first version.
#[test]
fn peers_ask_for_layers_cleanly() {
    let cluster = Cluster::three();
    let volume = cluster.create_on("v", MIB, 2048, &[1]);
    cluster.nbd(0, "v").write(0, &[1; 4096]).unwrap();
    let snapshot = cluster.snapshot("v@a");
    let peer = Peer::connect(&cluster, 0);
    let ask = |flag: u16, aux: u64| {
        let mut frame = Frame::request(Kind::Extents, volume.id);
        (frame.epoch, frame.len_bytes) = (volume.epoch, 1 << 20);
        (frame.flags, frame.aux) = (flag, aux);
        frame
    };
    let answer = peer.call(ask(flags::LAYERS, u64::from(snapshot.id.0)));
    assert_eq!((answer.status, answer.flags), (Status::Ok, flags::LAYERS));
    let layers = decode_layers(answer, 1 << 20).unwrap();
    assert_eq!(layers.len(), 2);
    assert!(layers[0].depth == 2 && layers.iter().all(|run| !run.changed));
    assert_eq!(peer.status(ask(flags::LAYERS, 99)), Status::Gone);
    assert_eq!(peer.status(ask(flags::LAYERS, 1 << 40)), Status::Malformed);
    let mut absent = ask(flags::LAYERS, 0);
    absent.volume = VolumeId(77);
    assert_eq!(peer.status(absent), Status::Gone);
    let plain = peer.call(ask(0, 0));
    assert_eq!((plain.status, plain.flags), (Status::Ok, 0));
    assert_eq!(plain.payload.len(), 12, "two runs of the first version");
}

/// A volume that changes, and the 4 KiB blocks that were touched since the last backup.
struct Source {
    random: Random,
    size_bytes: u64,
    touched: BTreeSet<u64>,
}

impl Source {
    fn change(&mut self, connection: &mut NbdConnection, count: usize) {
        for _ in 0..count {
            let at = self.random.within(0..self.size_bytes / 512) * 512;
            let len = match self.random.within(0..4) {
                0 => 512,
                1 => self.random.within(1..200) * 512,
                _ => self.random.within(1..16) * BLOCK,
            };
            let len = len.min(self.size_bytes - at);
            match self.random.within(0..4) {
                0 => connection.trim(at, u32::try_from(len).unwrap()).unwrap(),
                1 => connection
                    .write(at, &vec![0; usize::try_from(len).unwrap()])
                    .unwrap(),
                _ => {
                    let data = self.random.bytes(usize::try_from(len).unwrap());
                    connection.write(at, &data).unwrap();
                }
            }
            self.touched.extend(at / BLOCK..(at + len).div_ceil(BLOCK));
        }
    }
}

/// Issue 3, done-when 3: a full copy of a snapshot and a chain of increments, each of only what its
/// dirty bitmap says, is byte for byte the last snapshot: over three servers, with random writes,
/// trims and zeroes, snapshots deleted in between and after use, and a volume that grows.
#[test]
fn incremental_backups_restore_every_byte() {
    let cluster = Cluster::three();
    let (random, seed) = Random::fresh();
    eprintln!("incremental backups: seed {seed}");
    cluster.create_on("v", 24 * MIB, 2048, &[]);
    let mut source = Source {
        random,
        size_bytes: 24 * MIB,
        touched: BTreeSet::new(),
    };
    let data = source.random.bytes(16 << 20);
    cluster.nbd(0, "v").write(0, &data).unwrap();
    cluster.snapshot("v@s0");
    source.touched.clear();
    let mut backup = cluster.path("full.qcow2");
    let uri = &cluster.servers[1].uris("v@s0")[0];
    let convert = ["convert", "-f", "raw", "-O", "qcow2", uri, text(&backup)];
    run(60, "qemu-img", convert);
    for round in 1..=6_usize {
        let mut connection = cluster.nbd(round % 3, "v");
        source.change(&mut connection, 12);
        let middle = format!("v@middle{round}");
        cluster.snapshot(&middle);
        source.change(&mut connection, 12);
        if round % 2 == 0 {
            cluster.delete_snapshot(&middle);
        }
        if round == 3 || round == 4 {
            source.size_bytes += 9 * MIB + 512 * round as u64;
            let resize = AdminRequest::VolumeResize {
                name: "v".to_owned(),
                size_bytes: source.size_bytes,
                allow_shrink: false,
            };
            cluster.admin(resize).unwrap();
            let mut connection = cluster.nbd(round % 3, "v");
            source.change(&mut connection, 12);
        }
        let name = format!("v@s{round}");
        cluster.snapshot(&name);
        let next = change_after(&mut source, &cluster, round);
        backup = increment(&cluster, &source, round, &backup);
        let uri = &cluster.servers[(round + 2) % 3].uris(&name)[1];
        let compare = ["compare", "-f", "qcow2", "-F", "raw"];
        run(
            60,
            "qemu-img",
            compare.into_iter().chain([text(&backup), uri]),
        );
        cluster.delete_snapshot(&format!("v@s{}", round - 1));
        source.touched = next;
    }
    let restored = cluster.path("restored.raw");
    let convert = ["convert", "-f", "qcow2", "-O", "raw"];
    run(
        60,
        "qemu-img",
        convert.into_iter().chain([text(&backup), text(&restored)]),
    );
    let size = u32::try_from(source.size_bytes).unwrap();
    let last = cluster.nbd(0, "v@s6").read(0, size).unwrap();
    assert!(std::fs::read(&restored).unwrap() == last, "seed {seed}");
}

/// Writes after a snapshot, which its backup must not see; gives what they touch, which is the next one's.
fn change_after(source: &mut Source, cluster: &Cluster, round: usize) -> BTreeSet<u64> {
    let touched = std::mem::take(&mut source.touched);
    source.change(&mut cluster.nbd((round + 1) % 3, "v"), 6);
    std::mem::replace(&mut source.touched, touched)
}

/// The next image of the chain: what changed from `s(round - 1)` to `s(round)`.
fn increment(cluster: &Cluster, source: &Source, round: usize, below: &Path) -> PathBuf {
    let image = cluster.path(&format!("changes{round}.qcow2"));
    let size = source.size_bytes.to_string();
    let create = ["create", "-f", "qcow2", "-F", "qcow2", "-b"];
    let names = [text(below), text(&image), &size];
    run(60, "qemu-img", create.into_iter().chain(names));
    let uri = &cluster.servers[round % 3].uris(&format!("v@s{round}"))[0];
    let since = format!("s{}", round - 1);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/backup_changes.py");
    let done = run(60, script, [uri, &since, text(&image)]);
    let done: serde_json::Value = serde_json::from_str(&done).unwrap();
    let bytes = |key: &str| done[key].as_u64().unwrap();
    let (copied, zeroed) = (bytes("copied_bytes"), bytes("zeroed_bytes"));
    let touched = source.touched.len() as u64 * BLOCK;
    eprintln!("increment {round}: {copied} bytes copied, {zeroed} zeroed, {touched} touched");
    assert!(0 < copied && copied + zeroed <= touched);
    image
}
