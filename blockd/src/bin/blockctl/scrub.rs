//! `blockctl volume scrub`: every checksum of a volume, on all its servers.

use crate::args::{Cli, Scrub};
use crate::command::connect;
use crate::failure::Failure;
use crate::interrupt::Interrupt;
use crate::output::{ago, now_unix_ms, print};
use crate::progress;
use crate::session::Session;
use crate::size::human_bytes;
use blockd::admin::{
    AdminErrorKind, AdminReply, AdminRequest, NodeInfo, ScrubStep, SnapshotInfo, VolumeInfo,
};
use blockd::control::registry::ScrubRecord;
use blockd::data::page_store::DamagedRange;
use blockd::id::{BLOCK_BYTES, NodeNo, ScrubPosition};
use futures_util::future::join_all;
use indicatif::ProgressBar;
use serde_json::{Value, json};
use std::cell::RefCell;
use std::fmt::Write as _;

/// What a scrub of one volume came to.
struct Outcome {
    volume: VolumeInfo,
    verified_bytes: u64,
    damaged: Vec<(NodeNo, DamagedRange)>,
    /// Where it goes on, of nodes that are not done.
    paused_at: Vec<(NodeNo, ScrubPosition)>,
    /// Nodes that own pages and were not reached, with the reason.
    failed: Vec<(NodeNo, String)>,
    snapshots: Vec<SnapshotInfo>,
}

/// Scrubs the volumes named, or all; fails if damage was found or a server was not reached.
pub(crate) async fn run(cli: &Cli, args: &Scrub) -> Result<(), Failure> {
    let session = connect(cli).await?;
    let mut interrupt = Interrupt::listen()?;
    let mut outcomes = Vec::new();
    let mut interrupted = false;
    for volume in volumes(&session, args).await? {
        let (outcome, stopped) = scrub(&session, args, volume, &mut interrupt).await?;
        outcomes.push(outcome);
        interrupted = stopped;
        if stopped {
            break;
        }
    }
    report(cli, args, &outcomes)?;
    ended(&outcomes, interrupted)
}

fn ended(outcomes: &[Outcome], interrupted: bool) -> Result<(), Failure> {
    let damaged: usize = outcomes.iter().map(|outcome| outcome.damaged.len()).sum();
    let failed = outcomes.iter().flat_map(|outcome| &outcome.failed).next();
    match (damaged, failed) {
        (0, _) if interrupted => Err(Failure::Interrupted),
        (0, None) => Ok(()),
        (0, Some((node, reason))) => Err(Failure::Refused {
            kind: AdminErrorKind::Unavailable,
            message: format!("not all was verified: node {node}: {reason}"),
        }),
        (count, _) => Err(Failure::VolumeIo(format!("{count} ranges are damaged"))),
    }
}

async fn volumes(session: &Session, args: &Scrub) -> Result<Vec<VolumeInfo>, Failure> {
    let AdminReply::Volumes(all) = session.ask(AdminRequest::VolumeList).await? else {
        return Err(Failure::UnexpectedReply { what: "volumes" });
    };
    if args.all {
        return Ok(all);
    }
    let find = |name: &String| {
        let found = all.iter().find(|volume| volume.name == *name).cloned();
        found.ok_or_else(|| Failure::Refused {
            kind: AdminErrorKind::NotFound,
            message: format!("there is no volume {name:?}"),
        })
    };
    args.volumes.iter().map(find).collect()
}

/// Scrubs a volume on all nodes at once; true if it was interrupted.
async fn scrub(
    session: &Session,
    args: &Scrub,
    volume: VolumeInfo,
    interrupt: &mut Interrupt,
) -> Result<(Outcome, bool), Failure> {
    let started_unix_ms = now_unix_ms();
    let starts = starts(session, args, &volume).await?;
    let bar = progress::bytes("verifying");
    bar.set_length(volume.allocated_bytes.unwrap_or(0));
    let state = RefCell::new(Outcome {
        snapshots: snapshots(session, &volume).await?,
        paused_at: starts.clone(),
        volume,
        verified_bytes: 0,
        damaged: Vec::new(),
        failed: Vec::new(),
    });
    let nodes = starts
        .into_iter()
        .map(|(node, from)| walk(session, args, node, from, &state, &bar));
    let stopped = tokio::select! {
        _ = join_all(nodes) => false,
        () = interrupt.wait() => true,
    };
    bar.finish_and_clear();
    let outcome = state.into_inner();
    keep(session, &outcome, started_unix_ms).await?;
    Ok((outcome, stopped))
}

/// Every node, from the beginning or from where it was paused.
async fn starts(
    session: &Session,
    args: &Scrub,
    volume: &VolumeInfo,
) -> Result<Vec<(NodeNo, ScrubPosition)>, Failure> {
    if args.resume
        && let Some(last) = last(session, &volume.name).await
        && !last.paused_at.is_empty()
    {
        return Ok(last.paused_at);
    }
    let AdminReply::Nodes(nodes) = session.ask(AdminRequest::NodeList).await? else {
        return Err(Failure::UnexpectedReply { what: "nodes" });
    };
    // A node that owns no page may still have old ones; it need not be reached.
    let counts = |node: &NodeInfo| node.reachable || volume.owners.contains(&node.number);
    let nodes = nodes.into_iter().filter(counts);
    Ok(nodes
        .map(|node| (node.number, ScrubPosition::default()))
        .collect())
}

/// The last scrub of a volume; `None` too if the servers are too old to tell.
pub(crate) async fn last(session: &Session, volume: &str) -> Option<ScrubRecord> {
    let volume = volume.to_owned();
    match session.ask(AdminRequest::ScrubShow { volume }).await {
        Ok(AdminReply::Scrub(record)) => record,
        _ => None,
    }
}

/// A line of `volume show`.
pub(crate) fn last_text(last: Option<&ScrubRecord>) -> String {
    let text = last.map_or_else(
        || "never".to_owned(),
        |record| {
            let paused = match record.paused_at.is_empty() {
                true => "",
                false => " (not complete)",
            };
            format!(
                "{}: {} verified, {} damaged{paused}",
                ago(record.ended_unix_ms, now_unix_ms()),
                human_bytes(record.verified_bytes),
                human_bytes(record.damaged_bytes)
            )
        },
    );
    format!("last scrub  {text}")
}

async fn snapshots(session: &Session, volume: &VolumeInfo) -> Result<Vec<SnapshotInfo>, Failure> {
    let volume = Some(volume.name.clone());
    match session.ask(AdminRequest::SnapshotList { volume }).await? {
        AdminReply::Snapshots(snapshots) => Ok(snapshots),
        _ => Err(Failure::UnexpectedReply { what: "snapshots" }),
    }
}

/// Steps through one node.
async fn walk(
    session: &Session,
    args: &Scrub,
    node: NodeNo,
    from: ScrubPosition,
    state: &RefCell<Outcome>,
    bar: &ProgressBar,
) {
    let mut at = Some(from);
    while let Some(from) = at {
        let request = AdminRequest::ScrubStep {
            volume: state.borrow().volume.id,
            node,
            from,
            rate_bytes: args.rate,
        };
        let step = match session.ask(request).await {
            Ok(AdminReply::ScrubStep(step)) => step,
            Ok(_) => return state.borrow_mut().fail(node, "an unexpected reply"),
            Err(failure) => return state.borrow_mut().fail(node, &failure.to_string()),
        };
        bar.inc(step.verified_bytes);
        at = state.borrow_mut().take(node, step);
    }
}

impl Outcome {
    fn fail(&mut self, node: NodeNo, reason: &str) {
        self.failed.push((node, reason.to_owned()));
    }

    /// Takes up a step; gives where to go on.
    fn take(&mut self, node: NodeNo, step: ScrubStep) -> Option<ScrubPosition> {
        self.verified_bytes += step.verified_bytes;
        for range in step.damaged {
            match self.damaged.last_mut() {
                Some((last_node, last)) if *last_node == node && last.goes_on_in(&range) => {
                    last.len_bytes += range.len_bytes;
                }
                _ => self.damaged.push((node, range)),
            }
        }
        self.paused_at.retain(|(paused, _)| *paused != node);
        self.paused_at.extend(step.next.map(|next| (node, next)));
        step.next
    }

    fn damaged_bytes(&self) -> u64 {
        self.damaged
            .iter()
            .map(|(_, range)| u64::from(range.len_bytes))
            .sum()
    }

    /// The names under which users see a range.
    fn views(&self, range: &DamagedRange) -> Vec<String> {
        let name = &self.volume.name;
        let of = |id| {
            self.snapshots
                .iter()
                .find(move |snapshot| snapshot.id == id)
        };
        let snapshots = range.snapshots.iter().map(|id| match of(*id) {
            Some(snapshot) => format!("{name}@{}", snapshot.name),
            None => format!("{name}@(snapshot {id})"),
        });
        range
            .head
            .then(|| name.clone())
            .into_iter()
            .chain(snapshots)
            .collect()
    }

    fn volume_offset(&self, range: &DamagedRange) -> u64 {
        let page_bytes = u64::from(self.volume.page_blocks) * BLOCK_BYTES;
        u64::from(range.page.0) * page_bytes + u64::from(range.offset_bytes)
    }
}

async fn keep(session: &Session, outcome: &Outcome, started_unix_ms: u64) -> Result<(), Failure> {
    let record = ScrubRecord {
        volume: outcome.volume.id,
        started_unix_ms,
        ended_unix_ms: now_unix_ms(),
        verified_bytes: outcome.verified_bytes,
        damaged_bytes: outcome.damaged_bytes(),
        paused_at: outcome.paused_at.clone(),
    };
    session.ask(AdminRequest::ScrubKeep(record)).await.map(drop)
}

fn report(cli: &Cli, args: &Scrub, outcomes: &[Outcome]) -> Result<(), Failure> {
    let values: Vec<Value> = outcomes.iter().map(to_json).collect();
    match (
        cli.json,
        args.all || args.volumes.len() != 1,
        values.first(),
    ) {
        (true, false, Some(value)) => print(&value.to_string()),
        (true, ..) => print(&json!(values).to_string()),
        (false, ..) => print(outcomes.iter().map(to_text).collect::<String>().trim_end()),
    }
}

fn to_json(outcome: &Outcome) -> Value {
    let range = |(node, range): &(NodeNo, DamagedRange)| {
        json!({
            "node": node,
            "page": range.page,
            "page_offset_bytes": range.offset_bytes,
            "offset_bytes": outcome.volume_offset(range),
            "len_bytes": range.len_bytes,
            "seen_by": outcome.views(range),
            "file": range.file,
            "file_offset_bytes": range.file_offset_bytes,
        })
    };
    let nodes = |nodes: &mut dyn Iterator<Item = NodeNo>| nodes.collect::<Vec<_>>();
    json!({
        "volume": outcome.volume.name,
        "complete": outcome.paused_at.is_empty(),
        "verified_bytes": outcome.verified_bytes,
        "damaged_bytes": outcome.damaged_bytes(),
        "damaged": outcome.damaged.iter().map(range).collect::<Vec<_>>(),
        "paused_on": nodes(&mut outcome.paused_at.iter().map(|(node, _)| *node)),
        "failed_on": nodes(&mut outcome.failed.iter().map(|(node, _)| *node)),
    })
}

fn to_text(outcome: &Outcome) -> String {
    let mut text = String::new();
    for (node, range) in &outcome.damaged {
        let _ = writeln!(
            text,
            "DAMAGE: {} bytes at {} of volume {} (page {}, offset {}) on node {node} ({} at {}), \
             seen by {}",
            range.len_bytes,
            outcome.volume_offset(range),
            outcome.volume.name,
            range.page,
            range.offset_bytes,
            range.file,
            range.file_offset_bytes,
            outcome.views(range).join(", ")
        );
    }
    for (node, reason) in &outcome.failed {
        let _ = writeln!(text, "not verified on node {node}: {reason}");
    }
    let rest = match outcome.paused_at.is_empty() {
        true => "",
        false => ", not complete: go on with --resume",
    };
    let _ = writeln!(
        text,
        "volume {}: {} verified, {} damaged{rest}",
        outcome.volume.name,
        human_bytes(outcome.verified_bytes),
        human_bytes(outcome.damaged_bytes())
    );
    text
}
