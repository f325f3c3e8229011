//! Archives of snapshots in a directory and in an S3-compatible server: incremental, verifiable,
//! resumable, and restored to the same bytes.

use super::exports::{SIZE, Writer, same, uri};
use blockd_tests::{Cluster, MIB, Ran, Random, S3Server, binary};
use bytes::Bytes;
use serde_json::Value;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A cluster's `blockctl` in the environment of an S3 server.
struct Ctl<'a> {
    cluster: &'a Cluster,
    s3: &'a S3Server,
}

impl Ctl<'_> {
    fn command(&self, words: &str) -> Command {
        let mut command = Command::new(binary("blockctl"));
        command.args(["--servers", &self.cluster.server_list()]);
        command
            .args(words.split_whitespace())
            .envs(self.s3.environment());
        command
    }

    fn try_run(&self, words: &str) -> Ran {
        let output = self.command(words).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ran {
            command: words.to_owned(),
            code: output.status.code(),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }

    fn json(&self, words: &str) -> Value {
        let ran = self.try_run(&format!("{words} --json")).ok();
        serde_json::from_str(&ran.stdout).unwrap()
    }

    fn fails(&self, words: &str, wanted: &str) {
        let ran = self.try_run(words);
        assert_eq!(ran.code, Some(1), "{ran:?}");
        assert!(ran.stderr.contains(wanted), "no {wanted:?} in {ran:?}");
    }
}

/// S003-31, S003-32, S003-17 and "Done when" 4: archives of a volume that is written to, in a
/// directory and in a bucket, take only what changed since the newest snapshot that they have, and
/// restored in another cluster every snapshot has the same bytes.
#[test]
fn archives_in_a_directory_and_a_bucket_are_restored_identically() {
    let (here, there) = (Cluster::three(), Cluster::three());
    let s3 = S3Server::start();
    s3.refuse_every_put(5);
    let (ctl, other) = (
        Ctl {
            cluster: &here,
            s3: &s3,
        },
        Ctl {
            cluster: &there,
            s3: &s3,
        },
    );
    let directory = format!("file://{}", here.path("archive").display());
    let urls = [directory.as_str(), "s3://bucket/of/v"];
    here.create_on("v", SIZE, 2048, &[]);
    let writer = Writer::start(&here, "v", 21);
    writer.wait_for(2000);
    here.snapshot("v@a");
    let full: Vec<Value> = urls
        .iter()
        .map(|url| ctl.json(&format!("snapshot archive v@a {url}")))
        .collect();
    writer.wait_for(200);
    here.snapshot("v@b");
    writer.wait_for(200);
    here.snapshot("v@c");
    for (url, full) in urls.iter().zip(&full) {
        assert_eq!(full["from"], Value::Null);
        let of_c = ctl.json(&format!("snapshot archive v@c {url}"));
        assert_eq!(of_c["from"], "a");
        let (small, all) = (&of_c["stored_bytes"], &full["stored_bytes"]);
        assert!(
            2 * small.as_u64().unwrap() < all.as_u64().unwrap(),
            "{small} of {all}"
        );
        let again = ctl.json(&format!("snapshot archive v@c {url}"));
        assert_eq!(
            (&again["sent_parts"], &again["parts"]),
            (&Value::from(0), &of_c["parts"])
        );
    }
    here.delete_snapshot("v@c");
    writer.wait_for(100);
    here.snapshot("v@d");
    writer.finish(&here);
    for (number, url) in urls.iter().enumerate() {
        // The newest archived snapshot that still exists is a.
        assert_eq!(
            ctl.json(&format!("snapshot archive v@d {url}"))["from"],
            "a"
        );
        let listed = ctl.json(&format!("snapshot archives {url}"));
        let names: Vec<&str> = listed
            .as_array()
            .unwrap()
            .iter()
            .map(|s| s["snapshot"].as_str().unwrap())
            .collect();
        assert_eq!(names, ["a", "c", "d"]);
        let verified = other.json(&format!("snapshot archive-verify {url}"));
        assert_eq!(
            (&verified["snapshots"], &verified["problem_count"]),
            (&Value::from(3), &Value::from(0))
        );
        other.json(&format!("snapshot restore {url} r{number}"));
        same(&uri(&here, "v@d"), &uri(&there, &format!("r{number}@d")));
        other.json(&format!("snapshot restore {url} o{number} --at a"));
        same(&uri(&here, "v@a"), &uri(&there, &format!("o{number}@a")));
        other.json(&format!("snapshot restore {url} c{number} --at c"));
    }
    same(&uri(&there, "c0@c"), &uri(&there, "c1@c"));
    here.create("w", 8 * MIB);
    here.snapshot("w@a");
    ctl.fails(
        &format!("snapshot archive w@a {directory}"),
        "is the archive of volume v",
    );
    ctl.fails(
        &format!("snapshot archive v@b {directory} --from d"),
        "not an older snapshot",
    );
    ctl.fails(
        "snapshot archive v@b nowhere",
        "file:///DIR or s3://BUCKET/PREFIX",
    );
    ctl.fails(
        "snapshot archives file:///nowhere/at/all",
        "archive file:///nowhere/at/all",
    );
    other.fails(
        &format!("snapshot restore {directory} x --at b"),
        "has no snapshot b",
    );
}

/// S003-31: a restore and a verification refuse what is damaged or missing, by name, and leave no
/// volume behind.
#[test]
fn damaged_and_missing_objects_are_named() {
    let cluster = Cluster::three();
    let s3 = S3Server::start();
    let ctl = Ctl {
        cluster: &cluster,
        s3: &s3,
    };
    let url = "s3://bucket/v";
    cluster.create("v", 8 * MIB);
    let volume = cluster.open("v");
    for (number, name) in ["a", "b"].iter().enumerate() {
        let data = Bytes::from(Random::new(number as u64).bytes(1 << 20));
        cluster
            .block(volume.write(number as u64 * MIB, data))
            .unwrap();
        cluster.snapshot(&format!("v@{name}"));
        ctl.json(&format!("snapshot archive v@{name} {url}"));
    }
    let keys: Vec<String> = s3.objects().keys().cloned().collect();
    assert_eq!(keys.len(), 4, "{keys:?}");
    for key in &keys {
        let object = key.strip_prefix("bucket/v/").unwrap().to_owned();
        let whole = s3.objects()[key].clone();
        let mut flipped = whole.clone();
        let middle = whole.len() / 2;
        flipped[middle] ^= 1;
        for damage in [
            Some(flipped),
            Some(whole[..middle].to_vec()),
            Some(Vec::new()),
            None,
        ] {
            match damage.clone() {
                Some(bytes) => s3.objects().insert(key.clone(), bytes),
                None => s3.objects().remove(key),
            };
            // A manifest of the newest snapshot that is gone was never there.
            if damage.is_some() || !key.ends_with("-b") {
                ctl.fails(&format!("snapshot restore {url} x"), &object);
                assert!(
                    cluster
                        .try_blockctl("volume show x")
                        .stderr
                        .contains("no volume")
                );
            }
            let ran = ctl.try_run(&format!("snapshot archive-verify {url} --json"));
            let newest_gone = damage.is_none() && key.ends_with("-b");
            let base_gone = damage.is_none() && key.ends_with("-a");
            assert_eq!(ran.code, Some(i32::from(!newest_gone)), "{ran:?}");
            if !newest_gone && !base_gone {
                assert!(ran.stdout.contains(&object), "{object}: {ran:?}");
            }
        }
        s3.objects().insert(key.clone(), whole);
    }
    ctl.json(&format!("snapshot restore {url} x"));
    same(&uri(&cluster, "v@b"), &uri(&cluster, "x@b"));
}

/// S003-31: an archive run that is killed goes on where it was: what is there is not sent again.
#[test]
fn a_killed_archive_goes_on_where_it_was() {
    let cluster = Cluster::three();
    let s3 = S3Server::start();
    let ctl = Ctl {
        cluster: &cluster,
        s3: &s3,
    };
    cluster.create("v", 256 * MIB);
    let volume = cluster.open("v");
    for at in 0..128 {
        let data = Bytes::from(Random::new(at).bytes(1 << 20));
        cluster.block(volume.write(2 * at * MIB, data)).unwrap();
    }
    cluster.snapshot("v@a");
    s3.slow_puts(200);
    for round in 1..=2 {
        let mut command = ctl.command("snapshot archive v@a s3://bucket/v");
        let mut child = command.stderr(Stdio::null()).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while s3.puts().len() < 2 * round {
            assert!(Instant::now() < deadline, "nothing is sent");
            assert!(
                child.try_wait().unwrap().is_none(),
                "done before it was killed"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        ctl.fails("snapshot restore s3://bucket/v x", "has no snapshots");
    }
    // What was on its way when the process died may still be stored.
    std::thread::sleep(Duration::from_millis(500));
    let before = s3.puts();
    s3.slow_puts(0);
    let done = ctl.json("snapshot archive v@a s3://bucket/v");
    let puts = s3.puts();
    let mut names = puts.clone();
    names.sort();
    names.dedup();
    assert_eq!(
        names.len(),
        puts.len(),
        "an object was sent twice: {puts:?}"
    );
    let sent = done["sent_parts"].as_u64().unwrap();
    assert_eq!(
        sent as usize,
        puts.len() - before.len() - 1,
        "all but the manifest"
    );
    assert!(sent < done["parts"].as_u64().unwrap(), "{done}");
    ctl.json("snapshot restore s3://bucket/v x");
    same(&uri(&cluster, "v@a"), &uri(&cluster, "x@a"));
    assert_eq!(
        ctl.json("snapshot archive-verify s3://bucket/v")["problem_count"],
        0
    );
}
