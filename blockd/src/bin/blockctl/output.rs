//! What goes to stdout: tables for people, the reply's value as JSON for programs.

use crate::details;
use crate::failure::Failure;
use crate::holds::holds_text;
use crate::lease::leases_text;
use crate::moves::{drains_text, moves_text};
use crate::network::{networks_text, orders_text};
use crate::settings::settings_text;
use crate::size::{human_age, human_bytes};
use blockd::admin::{
    AdminReply, ClusterStatus, NodeInfo, RouteInfo, SnapshotInfo, VersionInfo, VolumeInfo, json,
};
use blockd::id::{BLOCK_BYTES, NodeNo};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

/// Writes text and a newline to stdout; a reader that went away is no failure.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    let written = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    match written {
        Err(source) if source.kind() != ErrorKind::BrokenPipe => Err(Failure::File {
            what: "writing",
            path: PathBuf::from("stdout"),
            source,
        }),
        _ => Ok(()),
    }
}

/// The value inside a reply; the version of this program stands beside that of the server.
pub(crate) fn reply_json(reply: &AdminReply) -> Value {
    let mut value = json::reply(reply);
    if let AdminReply::Version(_) = reply {
        value["blockctl"] = env!("CARGO_PKG_VERSION").into();
    }
    value
}

/// The reply as people read it, without a newline at the end.
pub(crate) fn reply_text(reply: &AdminReply) -> String {
    match reply {
        AdminReply::Done => "done".to_owned(),
        AdminReply::Cluster(cluster) => cluster_text(cluster),
        AdminReply::Node(node) => nodes_text(std::slice::from_ref(node)),
        AdminReply::Nodes(nodes) => nodes_text(nodes),
        AdminReply::Volume(volume) => volume_text(volume, now_unix_ms()),
        AdminReply::Volumes(volumes) => volumes_text(volumes, now_unix_ms()),
        AdminReply::Snapshots(snapshots) => snapshots_text(snapshots, now_unix_ms()),
        AdminReply::Route(route) => route_text(route),
        AdminReply::Version(version) => version_text(version),
        AdminReply::Leases(leases) => leases_text(leases, now_unix_ms()),
        AdminReply::Lease(lease) | AdminReply::LeaseConflict(lease) => lease.to_string(),
        AdminReply::Settings(settings) => settings_text(settings),
        AdminReply::Holds(holds) => holds_text(holds),
        AdminReply::Moves(moves) => moves_text(moves, now_unix_ms()),
        AdminReply::Drains(drains) => drains_text(drains),
        AdminReply::VolumeDetails(volume) => details::volume_text(volume, now_unix_ms()),
        AdminReply::RolledBack(rollback) => details::rollback_text(rollback),
        AdminReply::Networks(networks) => networks_text(networks),
        AdminReply::ServiceOrder(orders) => orders_text(orders),
        AdminReply::SnapshotDetails(snapshots) => details::snapshots_text(snapshots, now_unix_ms()),
        AdminReply::Open(_)
        | AdminReply::Identity(_)
        | AdminReply::Refused(_)
        | AdminReply::ScrubStep(_)
        | AdminReply::Scrub(_)
        | AdminReply::Given(_) => reply_json(reply).to_string(),
    }
}

fn version_text(version: &VersionInfo) -> String {
    let node = match version.node {
        NodeNo(0) => "no node of a cluster".to_owned(),
        number => format!("node {number}"),
    };
    format!(
        "blockctl {}\nblockd   {} ({node}, protocol {})",
        env!("CARGO_PKG_VERSION"),
        version.server,
        version.protocol
    )
}

fn cluster_text(cluster: &ClusterStatus) -> String {
    let phase = match cluster.phase {
        2 => "2 (writable)".to_owned(),
        1 => "1 (readable, not confirmed by a majority)".to_owned(),
        other => other.to_string(),
    };
    let leader = cluster
        .leader
        .map_or_else(|| "none".to_owned(), |node| node.to_string());
    let facts = facts(&[
        ("cluster", cluster.name.clone()),
        ("id", cluster.id.clone()),
        ("phase", phase),
        ("leader", leader),
        ("answered by", cluster.answered_by.to_string()),
        ("revision", cluster.revision.to_string()),
        ("volumes", cluster.volume_count.to_string()),
        ("snapshots", cluster.snapshot_count.to_string()),
    ]);
    format!("{facts}\n\n{}", nodes_text(&cluster.nodes))
}

fn nodes_text(nodes: &[NodeInfo]) -> String {
    let rows = nodes.iter().map(|node| {
        vec![
            node.number.to_string(),
            node.name.clone(),
            node.peer_address.clone(),
            node.nbd_address.clone(),
            yes(node.registry_server),
            if node.reachable { "up" } else { "DOWN" }.to_owned(),
            bytes_or_unknown(node.allocated_bytes),
            bytes_or_unknown(node.free_bytes),
        ]
    });
    let header = [
        "NODE",
        "NAME",
        "PEER",
        "NBD",
        "REGISTRY",
        "STATE",
        "ALLOCATED",
        "FREE",
    ];
    table(&header, &[6, 7], rows)
}

fn volume_text(volume: &VolumeInfo, now_ms: u64) -> String {
    facts(&facts_of(volume, now_ms))
}

/// What every volume has, one fact a line.
pub(crate) fn facts_of(volume: &VolumeInfo, now_ms: u64) -> Vec<(&'static str, String)> {
    let page_bytes = u64::from(volume.page_blocks) * BLOCK_BYTES;
    vec![
        ("volume", volume.name.clone()),
        ("id", volume.id.to_string()),
        (
            "size",
            format!(
                "{} ({} bytes)",
                human_bytes(volume.size_bytes),
                volume.size_bytes
            ),
        ),
        (
            "page",
            format!(
                "{} ({} blocks)",
                human_bytes(page_bytes),
                volume.page_blocks
            ),
        ),
        ("owners", node_list(&volume.owners)),
        ("epoch", volume.epoch.to_string()),
        ("allocated", bytes_or_unknown(volume.allocated_bytes)),
        ("filesystem", format_or_none(volume)),
        ("snapshots", volume.snapshot_count.to_string()),
        (
            "created",
            ago(volume.created_unix_s.saturating_mul(1000), now_ms),
        ),
    ]
}

fn volumes_text(volumes: &[VolumeInfo], now_ms: u64) -> String {
    let rows = volumes.iter().map(|volume| {
        vec![
            volume.name.clone(),
            human_bytes(volume.size_bytes),
            bytes_or_unknown(volume.allocated_bytes),
            node_list(&volume.owners),
            format_or_none(volume),
            volume.snapshot_count.to_string(),
            ago(volume.created_unix_s.saturating_mul(1000), now_ms),
        ]
    });
    let header = [
        "VOLUME",
        "SIZE",
        "ALLOCATED",
        "OWNERS",
        "FS",
        "SNAPSHOTS",
        "CREATED",
    ];
    table(&header, &[1, 2, 5], rows)
}

/// What was just taken; what snapshots hold is counted for `snapshot list` only.
fn snapshots_text(snapshots: &[SnapshotInfo], now_ms: u64) -> String {
    let rows = snapshots.iter().map(|snapshot| {
        vec![
            format!("{}@{}", snapshot.volume, snapshot.name),
            human_bytes(snapshot.size_bytes),
            ago(snapshot.created_unix_ms, now_ms),
        ]
    });
    table(&["SNAPSHOT", "SIZE", "CREATED"], &[1], rows)
}

/// Pages per owner first, then the runs: a spread volume has many of them.
fn route_text(route: &RouteInfo) -> String {
    let mut pages_of = BTreeMap::<NodeNo, u64>::new();
    for run in &route.runs {
        *pages_of.entry(run.owner).or_default() += u64::from(run.page_count);
    }
    let mut owners = String::new();
    for (owner, pages) in &pages_of {
        let separator = if owners.is_empty() { "" } else { ", " };
        let _ = write!(owners, "{separator}node {owner}: {pages}");
    }
    let facts = facts(&[
        ("volume", route.volume.clone()),
        ("epoch", route.epoch.to_string()),
        ("pages", route.page_count.to_string()),
        ("page blocks", route.page_blocks.to_string()),
        ("table crc", format!("{:08x}", route.table_crc)),
        ("owners", owners),
    ]);
    let rows = route.runs.iter().map(|run| {
        vec![
            run.first_page.to_string(),
            run.page_count.to_string(),
            run.owner.to_string(),
        ]
    });
    let runs = table(&["FIRST PAGE", "PAGES", "OWNER"], &[0, 1, 2], rows);
    format!("{facts}\n\n{runs}")
}

/// Names to the left, values to the right, one a line.
pub(crate) fn facts(facts: &[(&str, String)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = facts
        .iter()
        .map(|(name, value)| format!("{name:width$}  {value}").trim_end().to_owned());
    lines.collect::<Vec<_>>().join("\n")
}

/// A table without lines; the columns in `right` hold numbers.
pub(crate) fn table(
    header: &[&str],
    right: &[usize],
    rows: impl Iterator<Item = Vec<String>>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.to_vec());
    table.add_rows(rows);
    for index in 0..header.len() {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, 2));
            if right.contains(&index) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    table.trim_fmt()
}

pub(crate) fn bytes_or_unknown(bytes: Option<u64>) -> String {
    bytes.map_or_else(|| "?".to_owned(), human_bytes)
}

fn format_or_none(volume: &VolumeInfo) -> String {
    volume.format.clone().unwrap_or_else(|| "-".to_owned())
}

fn node_list(nodes: &[NodeNo]) -> String {
    let numbers = nodes.iter().map(NodeNo::to_string);
    numbers.collect::<Vec<_>>().join(",")
}

pub(crate) fn yes(flag: bool) -> String {
    if flag { "yes" } else { "-" }.to_owned()
}

/// A clock of the server that is ahead of ours reads as `0 s ago`.
pub(crate) fn ago(then_unix_ms: u64, now_unix_ms: u64) -> String {
    format!(
        "{} ago",
        human_age(now_unix_ms.saturating_sub(then_unix_ms) / 1000)
    )
}

pub(crate) fn now_unix_ms() -> u64 {
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH);
    since_epoch.map_or(0, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockd::id::{Epoch, Revision, RouteRun, SnapshotId, VolumeId};
    use serde_json::json;

    fn volume(name: &str) -> VolumeInfo {
        VolumeInfo {
            id: VolumeId(7),
            name: name.to_owned(),
            size_bytes: 4 << 30,
            page_blocks: 8192,
            epoch: Epoch(3),
            format: Some("ext4".to_owned()),
            created_unix_s: 1_000,
            owners: vec![NodeNo(1), NodeNo(2)],
            allocated_bytes: None,
            snapshot_count: 2,
        }
    }

    fn node(number: u16, reachable: bool) -> NodeInfo {
        NodeInfo {
            number: NodeNo(number),
            name: format!("s{number}"),
            unique_id: "u".to_owned(),
            peer_address: format!("127.0.0.{number}:10808"),
            nbd_address: format!("127.0.0.{number}:10809"),
            registry_server: true,
            reachable,
            allocated_bytes: Some(1 << 20),
            free_bytes: None,
        }
    }

    #[test]
    fn volumes_are_a_table_without_lines() {
        let text = volumes_text(&[volume("demo"), volume("b")], 61_000_000);
        assert_eq!(
            text,
            "VOLUME   SIZE  ALLOCATED  OWNERS  FS    SNAPSHOTS  CREATED\n\
             demo    4 GiB          ?  1,2     ext4          2  16 h ago\n\
             b       4 GiB          ?  1,2     ext4          2  16 h ago"
        );
    }

    #[test]
    fn an_empty_list_is_its_header() {
        assert_eq!(snapshots_text(&[], 0), "SNAPSHOT  SIZE  CREATED");
    }

    #[test]
    fn one_volume_is_a_list_of_facts() {
        let text = volume_text(&volume("demo"), 1_005_000);
        assert!(text.starts_with("volume      demo\n"), "{text}");
        assert!(
            text.contains("\nsize        4 GiB (4294967296 bytes)\n"),
            "{text}"
        );
        assert!(
            text.contains("\npage        4 MiB (8192 blocks)\n"),
            "{text}"
        );
        assert!(text.ends_with("created     5 s ago"), "{text}");
    }

    #[test]
    fn a_node_that_is_down_stands_out() {
        let cluster = ClusterStatus {
            name: "quickstart".to_owned(),
            id: "c0ffee".to_owned(),
            answered_by: NodeNo(1),
            phase: 2,
            leader: None,
            revision: Revision(9),
            nodes: vec![node(1, true), node(2, false)],
            volume_count: 1,
            snapshot_count: 0,
        };
        let text = reply_text(&AdminReply::Cluster(cluster));
        assert!(text.contains("phase        2 (writable)\n"), "{text}");
        assert!(text.contains("leader       none\n"), "{text}");
        let down = text.lines().last().unwrap();
        assert!(down.contains("127.0.0.2:10809  yes       DOWN"), "{down}");
    }

    #[test]
    fn routes_count_pages_per_owner() {
        let run = |first_page, page_count, owner| RouteRun {
            first_page,
            page_count,
            owner: NodeNo(owner),
        };
        let text = route_text(&RouteInfo {
            volume: "demo".to_owned(),
            epoch: Epoch(1),
            page_blocks: 8192,
            page_count: 10,
            runs: vec![run(0, 4, 1), run(4, 3, 2), run(7, 3, 1)],
            table_crc: 0xabc,
        });
        assert!(
            text.contains("owners       node 1: 7, node 2: 3\n"),
            "{text}"
        );
        assert!(text.contains("table crc    00000abc\n"), "{text}");
        assert!(text.ends_with("         7      3      1"), "{text}");
    }

    #[test]
    fn json_is_the_value_of_the_reply() {
        assert_eq!(reply_json(&AdminReply::Done), json!({"done": true}));
        assert_eq!(reply_json(&AdminReply::Volumes(Vec::new())), json!([]));
        let volume = reply_json(&AdminReply::Volume(volume("demo")));
        assert_eq!(volume["size_bytes"], 4_294_967_296u64);
        assert_eq!(volume["owners"], json!([1, 2]));
        assert_eq!(volume["allocated_bytes"], Value::Null);
        let snapshots = reply_json(&AdminReply::Snapshots(vec![SnapshotInfo {
            volume: "demo".to_owned(),
            name: "first".to_owned(),
            id: SnapshotId(1),
            size_bytes: 512,
            created_unix_ms: 5,
            referenced_bytes: Some(1),
            unique_bytes: Some(0),
        }]));
        assert_eq!(snapshots[0]["created_unix_ms"], 5);
    }
}
