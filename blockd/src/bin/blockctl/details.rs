//! What `volume show` and `snapshot list` say beside the facts of every list.

use crate::output::{ago, bytes_or_unknown, facts_of, table, yes};
use crate::size::human_bytes;
use blockd::admin::{RollbackInfo, SnapshotDetails, VolumeDetails};

pub(crate) fn volume_text(volume: &VolumeDetails, now_ms: u64) -> String {
    let mut facts = facts_of(&volume.info, now_ms);
    if volume.offline {
        facts.push(("state", "off-line".to_owned()));
    }
    if let Some(origin) = &volume.origin {
        facts.push(("origin", origin.clone()));
    }
    if let Some(flatten) = &volume.flatten {
        let (done, total) = (flatten.pages_done, flatten.pages_total);
        facts.push(("flattening", format!("{done} of {total} pages")));
    }
    if !volume.clones.is_empty() {
        facts.push(("clones", volume.clones.join(", ")));
    }
    facts.push(("copied up", bytes_or_unknown(volume.copied_up_bytes)));
    crate::output::facts(&facts)
}

pub(crate) fn snapshots_text(snapshots: &[SnapshotDetails], now_ms: u64) -> String {
    let rows = snapshots.iter().map(|snapshot| {
        let info = &snapshot.info;
        vec![
            format!("{}@{}", info.volume, info.name),
            human_bytes(info.size_bytes),
            bytes_or_unknown(snapshot.used_bytes),
            bytes_or_unknown(info.referenced_bytes),
            bytes_or_unknown(info.unique_bytes),
            ago(info.created_unix_ms, now_ms),
            yes(snapshot.protected),
            yes(snapshot.offline),
            match snapshot.clones.is_empty() {
                true => "-".to_owned(),
                false => snapshot.clones.join(","),
            },
        ]
    });
    let header = [
        "SNAPSHOT",
        "SIZE",
        "USED",
        "REFERENCED",
        "UNIQUE",
        "CREATED",
        "PROTECTED",
        "OFF-LINE",
        "CLONES",
    ];
    table(&header, &[1, 2, 3, 4], rows)
}

pub(crate) fn rollback_text(rollback: &RollbackInfo) -> String {
    let RollbackInfo {
        volume,
        snapshot,
        safety,
        size_bytes,
        snapshot_size_bytes,
        unheard,
        ..
    } = rollback;
    let mut text = format!(
        "volume {volume} is what {volume}@{snapshot} is; what it was before is {volume}@{safety}"
    );
    if snapshot_size_bytes < size_bytes {
        let end = human_bytes(*snapshot_size_bytes);
        let size = human_bytes(*size_bytes);
        text += &format!("\nit keeps its size of {size}; behind {end} it reads as zeros");
    }
    if !unheard.is_empty() {
        let nodes: Vec<String> = unheard.iter().map(ToString::to_string).collect();
        let nodes = nodes.join(", ");
        text += &format!("\nnode {nodes} did not answer; it follows before it serves the volume");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockd::admin::{SnapshotInfo, json};
    use blockd::id::SnapshotId;
    use serde_json::Value;

    fn snapshot(used_bytes: Option<u64>) -> SnapshotDetails {
        SnapshotDetails {
            info: SnapshotInfo {
                volume: "demo".to_owned(),
                name: "monday".to_owned(),
                id: SnapshotId(1),
                size_bytes: 4 << 30,
                created_unix_ms: 0,
                referenced_bytes: Some(3 << 20),
                unique_bytes: used_bytes.map(|_| 1 << 20),
            },
            used_bytes,
            protected: true,
            offline: false,
            clones: vec!["test".to_owned(), "more".to_owned()],
        }
    }

    /// A snapshot is listed with what it uses, references and has alone, and with its age.
    #[test]
    fn snapshots_are_listed_with_their_space_and_age() {
        let day_ms = 24 * 3600 * 1000;
        let text = snapshots_text(&[snapshot(Some(2 << 20)), snapshot(None)], 2 * day_ms);
        let expected = [
            "SNAPSHOT      SIZE   USED  REFERENCED  UNIQUE  CREATED  PROTECTED  OFF-LINE  CLONES",
            "demo@monday  4 GiB  2 MiB       3 MiB   1 MiB  2 d ago  yes        -         test,more",
            "demo@monday  4 GiB      ?       3 MiB       ?  2 d ago  yes        -         test,more",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
        assert_eq!(json::snapshot(&snapshot(None))["used_bytes"], Value::Null);
        let json = json::snapshot(&snapshot(Some(5)));
        assert_eq!(json["used_bytes"], 5);
        assert_eq!(json["unique_bytes"], 1 << 20);
    }
}
