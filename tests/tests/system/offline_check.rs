//! `blockd check` on state directories of real servers: sound ones, used ones and damaged ones.

use blockd_tests::{Cluster, ClusterOptions, MIB, Ran, Random, binary, try_run};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn one() -> Cluster {
    Cluster::start(&ClusterOptions {
        servers: 1,
        config: format!("log_bytes = {}\n", 4 * MIB),
    })
}

fn check(state: &Path, more: &[&str]) -> Ran {
    let arguments = ["check", "--state", state.to_str().unwrap()];
    try_run(60, binary("blockd"), arguments.iter().chain(more))
}

/// The content of every file below a directory; the socket of HTTP has none.
fn contents(directory: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            found.extend(contents(&entry.path()));
        } else if kind.is_file() {
            found.insert(entry.path(), fs::read(entry.path()).unwrap());
        }
    }
    found
}

/// A stopped or killed server with data, snapshots and a lease history.
fn used(kill: bool) -> (Cluster, PathBuf) {
    let mut cluster = one();
    cluster.create("v", 16 * MIB);
    let data = Random::new(5).bytes(6 << 20);
    let mut nbd = cluster.nbd(0, "v");
    nbd.write(MIB, &data).unwrap();
    cluster.snapshot("v@a");
    nbd.write(2 * MIB, &data[..1 << 20]).unwrap();
    nbd.flush().unwrap();
    cluster.snapshot("v@b");
    drop(nbd);
    match kill {
        true => cluster.servers[0].kill(),
        false => assert!(cluster.servers[0].stop().success()),
    }
    let state = cluster.servers[0].state.clone();
    (cluster, state)
}

/// A store in use is not looked at; after kill -9 and after a clean stop it is clean, and nothing of
/// it is changed.
#[test]
fn sound_directories_are_clean_and_left_as_they_are() {
    let cluster = one();
    let ran = check(&cluster.servers[0].state, &[]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    assert!(ran.stderr.contains("in use"), "{ran:?}");
    for kill in [true, false] {
        let (_cluster, state) = used(kill);
        let before = contents(&state);
        let ran = check(&state, &["--data"]).ok();
        assert!(ran.stdout.contains("clean"), "{ran:?}");
        let ran = check(&state, &["--data", "--json"]).ok();
        let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(json["clean"], true);
        assert_eq!(json["store"]["volumes"], 1);
        assert!(
            json["store"]["verified_bytes"].as_u64().unwrap() >= 7 << 20,
            "{json}"
        );
        assert!(contents(&state) == before, "the check changed something");
    }
    let ran = check(Path::new("/nonexistent"), &[]);
    assert_eq!(ran.code, Some(3), "{ran:?}");
    let ran = try_run(10, binary("blockd"), ["check"]);
    assert_eq!(ran.code, Some(2), "{ran:?}");
}

/// Each file of the directory damaged in turn, and each named with its place.
#[test]
fn every_damaged_file_is_named() {
    let (_cluster, state) = used(false);
    let flip = |path: &Path, at: usize| {
        let mut bytes = fs::read(path).unwrap();
        bytes[at] ^= 0x10;
        fs::write(path, bytes).unwrap();
    };
    fs::write(state.join("leases"), "blockd-leases 1 00000000\nx").unwrap();
    let leases = check(&state, &[]);
    assert!(
        leases.code == Some(1) && leases.stdout.contains("DAMAGE: leases"),
        "{leases:?}"
    );
    fs::remove_file(state.join("leases")).unwrap();
    for (file, at) in [
        ("node", 40),
        ("facts", 200),
        ("store/belongs-to", 3),
        ("registry/belongs-to", 3),
        ("store/meta", 4096 + 80),
        ("registry/registry.redb", 3),
    ] {
        let path = state.join(file);
        let whole = fs::read(&path).unwrap();
        for damaged in [true, false] {
            match damaged {
                true => flip(&path, at.min(whole.len() - 1)),
                false => fs::write(&path, &whole).unwrap(),
            }
            let ran = check(&state, &[]);
            // Copies of a structure that are not in force may be damaged without any loss.
            let named = ran.stdout.contains(&format!(": {file}"));
            assert_eq!(named, damaged, "{file}: {ran:?}");
            assert!(!ran.stderr.contains("panicked"), "{ran:?}");
        }
    }
    let registry = state.join("registry/registry.redb");
    let mut bytes = fs::read(&registry).unwrap();
    let name: Vec<usize> = (0..bytes.len() - 4)
        .filter(|at| &bytes[*at..at + 4] == b"test")
        .collect();
    assert!(!name.is_empty());
    name.iter().for_each(|at| bytes[*at] ^= 1);
    fs::write(&registry, bytes).unwrap();
    let ran = check(&state, &[]);
    assert!(
        ran.code == Some(1) && ran.stdout.contains("registry.redb"),
        "{ran:?}"
    );
    fs::remove_file(state.join("store/slab")).unwrap();
    let ran = check(&state, &[]);
    assert!(
        ran.code == Some(1) && ran.stdout.contains("slab"),
        "{ran:?}"
    );
}

/// A byte of data: found with `--data` only, with the exact place and who sees it.
#[test]
fn a_damaged_byte_of_data_is_found_at_its_place() {
    let (_cluster, state) = used(false);
    let slab = state.join("store/slab");
    let mut bytes = fs::read(&slab).unwrap();
    let wanted = &Random::new(5).bytes(6 << 20)[..4096];
    let copies: Vec<usize> = (0..bytes.len() / 4096)
        .map(|n| n * 4096)
        .filter(|at| &bytes[*at..at + 4096] == wanted)
        .collect();
    // At 1 MiB of the volume, and once more at 2 MiB after the snapshot.
    assert_eq!(copies.len(), 2);
    for at in &copies {
        bytes[at + 100] ^= 1;
    }
    fs::write(&slab, bytes).unwrap();
    drop(check(&state, &[]).ok());
    let ran = check(&state, &["--data", "--json"]);
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    let findings = json["findings"].as_array().unwrap();
    assert_eq!(findings.len(), 2, "{json}");
    for finding in findings {
        let at = finding["offset_bytes"].as_u64().unwrap();
        assert!(copies.contains(&usize::try_from(at).unwrap()), "{finding}");
        let what = finding["what"].as_str().unwrap();
        let shared = what.contains("4096 bytes at offset 1048576 of page 0");
        let newer = what.contains("4096 bytes at offset 2097152 of page 0");
        assert!(shared || newer, "{what}");
        let seen = finding["consequence"].as_str().unwrap();
        assert_eq!(seen.contains("snapshot 1"), shared, "{seen}");
        assert!(
            seen.contains("volume itself") && seen.contains("snapshot 2"),
            "{seen}"
        );
    }
}

/// Files cut and overwritten at random: always an answer in time, never a panic.
#[test]
fn ruined_directories_give_an_answer() {
    let (cluster, state) = used(true);
    let files: Vec<(PathBuf, Vec<u8>)> = contents(&state).into_iter().collect();
    let mut random = Random::new(77);
    for round in 0..60 {
        let ruin = cluster.path("ruin");
        for (path, bytes) in &files {
            let to = ruin.join(path.strip_prefix(&state).unwrap());
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::write(&to, bytes).unwrap();
        }
        for _ in 0..1 + random.within(0..3) {
            let (path, bytes) =
                &files[usize::try_from(random.within(0..files.len() as u64)).unwrap()];
            let to = ruin.join(path.strip_prefix(&state).unwrap());
            let mut bytes = bytes.clone();
            let at = usize::try_from(random.within(0..bytes.len() as u64 + 1)).unwrap();
            match random.within(0..3) {
                0 => bytes.truncate(at),
                1 => bytes.get_mut(at).into_iter().for_each(|byte| *byte ^= 0x55),
                _ => {
                    let end = bytes.len().min(at + 5000);
                    let noise = random.bytes(end - at);
                    bytes[at..end].copy_from_slice(&noise);
                }
            }
            fs::write(&to, bytes).unwrap();
        }
        let ran = check(&ruin, &["--data"]);
        assert!(matches!(ran.code, Some(0 | 1)), "round {round}: {ran:?}");
        assert!(!ran.stderr.contains("panicked"), "round {round}: {ran:?}");
        fs::remove_dir_all(&ruin).unwrap();
    }
}
