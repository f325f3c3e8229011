//! `--metadata-only`: the page map of a snapshot with its checksums, without its data (S003-30).

use crate::args::Cli;
use crate::backup::{Out, unless_interrupted};
use crate::command::connect;
use crate::failure::Failure;
use crate::output::{print, table};
use crate::progress;
use crate::session::Session;
use crate::size::human_bytes;
use blockd::admin::{AdminReply, AdminRequest, SnapshotInfo, SnapshotName};
use blockd::backup::{self, PageMap};
use blockd::client::Volume;
use serde_json::{Value, json};
use std::path::Path;

/// Takes the snapshots that are requested, writes its page maps one behind the other into `file`, and
/// deletes the snapshots again.
pub(crate) async fn create(cli: &Cli, request: AdminRequest, file: &Path) -> Result<(), Failure> {
    let out = Out::create(file)?;
    let session = connect(cli).await?;
    let AdminReply::Snapshots(taken) = session.ask(request).await? else {
        return Err(Failure::UnexpectedReply { what: "a snapshot" });
    };
    let name = |SnapshotInfo { volume, name, .. }| SnapshotName {
        volume,
        snapshot: name,
    };
    let targets: Vec<SnapshotName> = taken.into_iter().map(name).collect();
    let written = write_all(&session, &targets, &out).await;
    let deleted = delete_all(&session, &targets).await;
    let maps = written?;
    deleted?;
    out.keep()?;
    show(cli, file, &targets.iter().zip(maps).collect::<Vec<_>>())
}

async fn write_all(
    session: &Session,
    targets: &[SnapshotName],
    out: &Out<'_>,
) -> Result<Vec<PageMap>, Failure> {
    let mut maps = Vec::new();
    for SnapshotName { volume, snapshot } in targets {
        let opened = session
            .client()
            .open(&format!("{volume}@{snapshot}"))
            .await?;
        maps.push(write(&opened, out).await?);
    }
    Ok(maps)
}

async fn delete_all(session: &Session, targets: &[SnapshotName]) -> Result<(), Failure> {
    for target in targets {
        let target = target.clone();
        session.ask(AdminRequest::SnapshotDelete { target }).await?;
    }
    Ok(())
}

/// Writes the page map of an open snapshot.
pub(crate) async fn write(volume: &Volume, out: &Out<'_>) -> Result<PageMap, Failure> {
    let bar = progress::bytes("reading");
    bar.set_length(volume.size_bytes());
    let (writer, progress) = (out.writer()?, |done| bar.set_position(done));
    let map = backup::page_map(volume, writer, progress);
    let map = unless_interrupted(async { Ok(map.await?) }).await?;
    bar.finish_and_clear();
    Ok(map)
}

/// What was written; nothing if it went to stdout.
pub(crate) fn show(
    cli: &Cli,
    file: &Path,
    maps: &[(&SnapshotName, PageMap)],
) -> Result<(), Failure> {
    if file.as_os_str() == "-" {
        return Ok(());
    }
    if cli.json {
        let list = maps.iter().map(|(SnapshotName { volume, snapshot }, map)| {
            json!({
                "volume": volume,
                "snapshot": snapshot,
                "page_count": map.page_count,
                "map_bytes": map.map_bytes,
            })
        });
        return print(&list.collect::<Value>().to_string());
    }
    let rows = maps.iter().map(|(SnapshotName { volume, snapshot }, map)| {
        vec![
            format!("{volume}@{snapshot}"),
            map.page_count.to_string(),
            human_bytes(map.map_bytes),
        ]
    });
    print(&table(&["SNAPSHOT", "PAGES", "MAP"], &[1, 2], rows))
}
