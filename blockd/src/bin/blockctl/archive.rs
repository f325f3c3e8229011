//! `blockctl snapshot archive`, `restore`, `archives` and `archive-verify`: snapshots in a directory
//! or a bucket.

use crate::args::{Cli, parse_snapshot};
use crate::backup::{half_done, unless_interrupted};
use crate::command::connect;
use crate::failure::Failure;
use crate::output::{ago, facts, now_unix_ms, print, table};
use crate::progress;
use crate::size::human_bytes;
use blockd::admin::SnapshotName;
use blockd::backup::{self, ArchiveStore, Archived, Manifest, Restored, Verified};
use clap::Args;
use serde_json::{Value, json};

#[derive(Debug, Args)]
pub(crate) struct Archive {
    #[arg(value_name = "VOL@SNAP", value_parser = parse_snapshot)]
    target: SnapshotName,
    /// file:///DIR or s3://BUCKET/PREFIX, for this volume alone
    url: String,
    /// Only what changed since this archived snapshot; the newest possible one if not given
    #[arg(long, value_name = "SNAP")]
    from: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The place of the archive
    url: String,
    /// The volume that is made
    #[arg(value_name = "NEW_VOL")]
    volume: String,
    /// The archived snapshot; the newest one if not given
    #[arg(long, value_name = "SNAP")]
    at: Option<String>,
}

pub(crate) async fn archive(cli: &Cli, args: &Archive) -> Result<(), Failure> {
    let session = connect(cli).await?;
    let SnapshotName { volume, snapshot } = &args.target;
    let opened = session
        .client()
        .open(&format!("{volume}@{snapshot}"))
        .await?;
    let store = ArchiveStore::open(&args.url, true)?;
    let bar = progress::bytes("archiving");
    bar.set_length(opened.size_bytes());
    let archived = unless_interrupted(async {
        let progress = |done| bar.set_position(done);
        let from = args.from.as_deref();
        Ok(backup::archive(session.client(), &opened, from, &store, progress).await?)
    })
    .await?;
    bar.finish_and_clear();
    match cli.json {
        true => print(&archived_json(&archived).to_string()),
        false => print(&archived_text(&archived)),
    }
}

fn archived_json(archived: &Archived) -> Value {
    let mut value = manifest_json(&archived.manifest);
    value["sent_parts"] = json!(archived.sent_parts);
    value["sent_bytes"] = json!(archived.sent_bytes);
    value
}

fn archived_text(archived: &Archived) -> String {
    let manifest = &archived.manifest;
    facts(&[
        (
            "snapshot",
            format!("{}@{}", manifest.volume, manifest.snapshot),
        ),
        ("from", from_of(manifest)),
        ("parts", manifest.parts.len().to_string()),
        ("stored", human_bytes(manifest.stored_bytes())),
        (
            "sent now",
            format!(
                "{} in {} parts",
                human_bytes(archived.sent_bytes),
                archived.sent_parts
            ),
        ),
    ])
}

fn from_of(manifest: &Manifest) -> String {
    let from = manifest.from.as_ref();
    from.map_or_else(|| "-".to_owned(), |(_, name)| name.clone())
}

fn manifest_json(manifest: &Manifest) -> Value {
    json!({
        "volume": manifest.volume,
        "snapshot": manifest.snapshot,
        "from": manifest.from.as_ref().map(|(_, name)| name),
        "size_bytes": manifest.size_bytes,
        "created_unix_ms": manifest.created_unix_ms,
        "parts": manifest.parts.len(),
        "stored_bytes": manifest.stored_bytes(),
    })
}

pub(crate) async fn restore(cli: &Cli, args: &Restore) -> Result<(), Failure> {
    let session = connect(cli).await?;
    let store = ArchiveStore::open(&args.url, false)?;
    let bar = progress::bytes("restoring");
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let at = args.at.as_deref();
    let restore = backup::restore(session.client(), &store, &args.volume, at, progress);
    let restored = unless_interrupted(async { Ok(restore.await?) }).await;
    let restored = restored.map_err(|failure| half_done(&args.volume, failure))?;
    bar.finish_and_clear();
    let Restored {
        snapshot,
        size_bytes,
        snapshots,
        read_bytes,
    } = &restored;
    match cli.json {
        true => print(
            &json!({
                "volume": args.volume,
                "snapshot": snapshot,
                "size_bytes": size_bytes,
                "snapshots_read": snapshots,
                "read_bytes": read_bytes,
            })
            .to_string(),
        ),
        false => print(&facts(&[
            ("volume", args.volume.clone()),
            ("snapshot", snapshot.clone()),
            ("size", human_bytes(*size_bytes)),
            (
                "read",
                format!(
                    "{} of {snapshots} archived snapshots",
                    human_bytes(*read_bytes)
                ),
            ),
        ])),
    }
}

pub(crate) async fn archives(cli: &Cli, url: &str) -> Result<(), Failure> {
    let store = ArchiveStore::open(url, false)?;
    let mut manifests = Vec::new();
    for (id, name) in store.snapshots().await? {
        manifests.push(store.manifest(id, &name).await?);
    }
    if cli.json {
        let list: Value = manifests.iter().map(manifest_json).collect();
        return print(&list.to_string());
    }
    let now_ms = now_unix_ms();
    let rows = manifests.iter().map(|manifest| {
        vec![
            format!("{}@{}", manifest.volume, manifest.snapshot),
            from_of(manifest),
            human_bytes(manifest.size_bytes),
            human_bytes(manifest.stored_bytes()),
            ago(manifest.created_unix_ms, now_ms),
        ]
    });
    let header = ["SNAPSHOT", "FROM", "SIZE", "STORED", "CREATED"];
    print(&table(&header, &[2, 3], rows))
}

/// Prints what was found, and fails if that is not all.
pub(crate) async fn verify(cli: &Cli, url: &str) -> Result<(), Failure> {
    let store = ArchiveStore::open(url, false)?;
    let bar = progress::bytes("verifying");
    let progress = |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    };
    let verified = backup::verify(&store, progress).await?;
    bar.finish_and_clear();
    match cli.json {
        true => print(&verified_json(&verified).to_string())?,
        false => print(&verified_text(&verified))?,
    }
    match verified.problem_count {
        0 => Ok(()),
        count => Err(Failure::Stream(format!(
            "archive {url}: {count} objects or manifests are missing or damaged"
        ))),
    }
}

fn verified_json(verified: &Verified) -> Value {
    json!({
        "snapshots": verified.snapshots,
        "parts": verified.parts,
        "read_bytes": verified.read_bytes,
        "problem_count": verified.problem_count,
        "problems": verified.problems,
    })
}

fn verified_text(verified: &Verified) -> String {
    let mut lines = verified.problems.clone();
    lines.push(format!(
        "{} snapshots, {} parts, {} read: {} problems",
        verified.snapshots,
        verified.parts,
        human_bytes(verified.read_bytes),
        verified.problem_count
    ));
    lines.join("\n")
}
