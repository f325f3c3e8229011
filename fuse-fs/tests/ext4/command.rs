//! The command `fuse-fs check`: files, volumes and snapshots; text, JSON and exit codes.

use crate::image::{Workshop, fill, text};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// `cargo test` builds the double beside the tests: TARGET/debug/examples.
fn double() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.ancestors()
        .nth(2)
        .unwrap()
        .join("examples/fuse-fs-double")
}

fn fuse_fs(arguments: &[&str], store: &Path) -> Output {
    let mut command = Command::new(double());
    command.args(arguments);
    command.env("BLOCKD_SERVERS", store).output().unwrap()
}

fn check(arguments: &[&str], store: &Path) -> Output {
    fuse_fs(&[&["check"], arguments].concat(), store)
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn check_reports_as_fsck_does() {
    let shop = Workshop::new();
    let store = shop.path("store");
    fs::create_dir(&store).unwrap();
    let image = shop.make(16, "-t ext4 -O ^metadata_csum");
    shop.change(&image, |dir| fill(dir, 1));
    fs::copy(&image, store.join("vol")).unwrap();
    fs::copy(&image, store.join("vol@snap")).unwrap();

    let clean = check(&["vol"], &store);
    assert_eq!(clean.status.code(), Some(0), "{clean:?}");
    assert!(String::from_utf8_lossy(&clean.stdout).contains("vol: clean; "));

    // The link count of the root.
    let table = {
        let shown = crate::image::run("dumpe2fs", &[text(&image)]);
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        let line = shown
            .lines()
            .find(|line| line.contains("Inode table at"))
            .unwrap();
        line.split_whitespace()
            .nth(3)
            .unwrap()
            .split('-')
            .next()
            .unwrap()
            .parse::<u64>()
            .unwrap()
    };
    let volume = File::options().write(true).open(store.join("vol")).unwrap();
    volume
        .write_all_at(&[99], table * 1024 + 256 + 0x1a)
        .unwrap();
    let damaged = check(&["vol", "--json"], &store);
    assert_eq!(damaged.status.code(), Some(4), "{damaged:?}");
    let report = json(&damaged);
    assert_eq!(
        (&report["clean"], &report["findings_count"]),
        (&Value::Bool(false), &Value::from(1))
    );
    assert_eq!(report["findings"][0]["place"], "inode 2");
    assert_eq!(
        report["findings"][0]["problem"],
        "it says that it has 99 links, it has 5"
    );

    let snapshot = json(&check(&["vol@snap", "--json"], &store));
    assert_eq!(
        (&snapshot["clean"], &snapshot["target"]),
        (&Value::Bool(true), &Value::from("vol@snap"))
    );
    let file = json(&check(&["--image", text(&image), "--json"], &store));
    assert_eq!(file["files"], snapshot["files"]);
}

#[test]
fn what_cannot_be_checked_says_why() {
    let shop = Workshop::new();
    let store = shop.path("store");
    fs::create_dir(&store).unwrap();
    File::create(store.join("empty"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    for (arguments, code, what) in [
        (
            vec!["empty"],
            8,
            "empty: no ext2, ext3 or ext4 filesystem is there",
        ),
        (vec!["none"], 8, "none: "),
        (
            vec!["--image", "/no/such/file"],
            8,
            "/no/such/file: No such file",
        ),
        (vec!["a/b"], 16, "a/b: not VOL or VOL@SNAP"),
        (vec![], 16, "required"),
        (vec!["empty", "--image", "x"], 16, "cannot be used with"),
    ] {
        let output = check(&arguments, &store);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {said}");
        assert!(said.contains(what), "{arguments:?}: {said}");
    }
    fs::write(store.join("fault"), "fail").unwrap();
    let output = check(&["empty"], &store);
    assert_eq!(output.status.code(), Some(8), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stderr).contains("planted fault"),
        "{output:?}"
    );
}

#[test]
fn mkfs_overwrites_only_by_force() {
    let shop = Workshop::new();
    let store = shop.path("store");
    fs::create_dir(&store).unwrap();
    for name in ["vol", "vol@snap"] {
        File::create(store.join(name))
            .unwrap()
            .set_len(64 << 20)
            .unwrap();
    }
    let first = fuse_fs(&["mkfs", "vol", "--label", "first", "--json"], &store);
    assert_eq!(first.status.code(), Some(0), "{first:?}");
    let made = json(&first);
    assert_eq!(
        (&made["blocks"], &made["inodes"]),
        (&Value::from(65_536), &Value::from(16_384))
    );
    assert_eq!(check(&["vol"], &store).status.code(), Some(0));

    let second = fuse_fs(&["mkfs", "vol"], &store);
    let said = String::from_utf8_lossy(&second.stderr).into_owned();
    assert_eq!(second.status.code(), Some(32), "{said}");
    assert!(
        said.contains("vol: ext4 is on it; --force overwrites it"),
        "{said}"
    );
    let label = crate::image::run("e2label", &[text(&store.join("vol"))]);
    assert_eq!(String::from_utf8_lossy(&label.stdout).trim(), "first");

    assert_eq!(
        fuse_fs(&["mkfs", "vol", "--force"], &store).status.code(),
        Some(0)
    );
    assert_eq!(
        fuse_fs(&["mkfs", "vol@snap"], &store).status.code(),
        Some(32)
    );
    assert_eq!(
        fuse_fs(&["mkfs", "vol", "-L", "seventeen bytes!!"], &store)
            .status
            .code(),
        Some(1)
    );
}
