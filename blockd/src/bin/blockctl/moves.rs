//! Moving pages: `page move`, `move ...`, `volume rebalance`, `node drain`; and what is moving, in
//! `volume show` and `route show`.

use crate::args::Cli;
use crate::command::{connect, print_reply};
use crate::failure::Failure;
use crate::output::{ago, print, reply_json, reply_text, table};
use crate::progress;
use crate::session::Session;
use crate::size::{human_bytes, parse_volume_size};
use blockd::admin::json::page_move;
use blockd::admin::{AdminErrorKind, AdminReply, AdminRequest, DrainInfo, MoveInfo};
use blockd::control::registry::{MovePhase, MoveWish};
use blockd::id::NodeNo;
use clap::{Args, Subcommand};
use indicatif::ProgressBar;
use serde_json::Value;
use std::time::Duration;
use tokio::time::sleep;

/// Time between two looks at a move that is waited for.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, Args)]
pub(crate) struct MoveOptions {
    /// Copy so much a second at the most; without, as fast as it goes while nobody asks the two
    /// servers for pages, and at 32 MiB a second while somebody does
    #[arg(long, value_name = "SIZE", value_parser = parse_volume_size)]
    rate: Option<u64>,
    /// Return at once; `move list` and `node drain --list` show how far it is
    #[arg(long)]
    no_wait: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PageVerb {
    /// Move pages of a volume to a node, while clients go on
    Move {
        #[arg(value_name = "VOL")]
        volume: String,
        /// 0-99, 7 or all; `route show` counts them
        #[arg(value_name = "RANGE", value_parser = parse_pages)]
        pages: Pages,
        /// The node that gets them
        #[arg(long, value_name = "NODE", value_parser = parse_number)]
        to: NodeNo,
        #[command(flatten)]
        options: MoveOptions,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum MoveVerb {
    /// Moves under way, and the last one of each volume
    List {
        #[arg(value_name = "VOL")]
        volume: Option<String>,
    },
    /// Stop after the batch that is changing its owner now
    Pause {
        #[arg(value_name = "VOL")]
        volume: String,
    },
    /// Go on with a move that was paused, or has failed
    Resume {
        #[arg(value_name = "VOL")]
        volume: String,
    },
    /// Stop for good; pages that have moved stay where they are
    Cancel {
        #[arg(value_name = "VOL")]
        volume: String,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Rebalance {
    #[arg(value_name = "VOL", required_unless_present = "all")]
    volume: Option<String>,
    /// All volumes together
    #[arg(long, conflicts_with = "volume")]
    all: bool,
    #[command(flatten)]
    options: MoveOptions,
}

#[derive(Debug, Args)]
pub(crate) struct Drain {
    #[arg(value_name = "NODE", value_parser = parse_number, required_unless_present = "list")]
    node: Option<NodeNo>,
    /// Only show which nodes are drained, and how far that is
    #[arg(long, conflicts_with = "node")]
    list: bool,
    #[command(flatten)]
    options: MoveOptions,
}

/// First page and number of pages; `None`: all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pages(Option<(u32, u32)>);

fn parse_pages(text: &str) -> Result<Pages, String> {
    if text == "all" {
        return Ok(Pages(None));
    }
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    match (first.parse::<u32>(), last.parse::<u32>()) {
        (Ok(first), Ok(last)) if first <= last && last < u32::MAX => {
            Ok(Pages(Some((first, last - first + 1))))
        }
        _ => Err("pages are written 0-99, 7 or all; `blockctl route show VOL` counts them".into()),
    }
}

pub(crate) fn parse_number(text: &str) -> Result<NodeNo, String> {
    match text.parse::<u16>() {
        Ok(number) if number > 0 => Ok(NodeNo(number)),
        _ => Err("a node number is a whole number from 1 on; see `blockctl node list`".into()),
    }
}

pub(crate) async fn page(cli: &Cli, verb: &PageVerb) -> Result<(), Failure> {
    let PageVerb::Move {
        volume,
        pages,
        to,
        options,
    } = verb;
    let request = AdminRequest::PageMove {
        volume: volume.clone(),
        pages: pages.0,
        to: *to,
        rate_bytes: options.rate.unwrap_or(0),
    };
    start(cli, request, options).await
}

pub(crate) async fn rebalance(cli: &Cli, args: &Rebalance) -> Result<(), Failure> {
    let request = AdminRequest::VolumeRebalance {
        volume: args.volume.clone(),
        rate_bytes: args.options.rate.unwrap_or(0),
    };
    start(cli, request, &args.options).await
}

pub(crate) async fn moves(cli: &Cli, verb: &MoveVerb) -> Result<(), Failure> {
    let (volume, wish) = match verb {
        MoveVerb::List { volume } => {
            let volume = volume.clone();
            let reply = connect(cli)
                .await?
                .ask(AdminRequest::MoveList { volume })
                .await?;
            return print_reply(cli, &reply);
        }
        MoveVerb::Pause { volume } => (volume, MoveWish::Pause),
        MoveVerb::Resume { volume } => (volume, MoveWish::Run),
        MoveVerb::Cancel { volume } => (volume, MoveWish::Cancel),
    };
    let volume = volume.clone();
    let request = AdminRequest::MoveWish { volume, wish };
    print_reply(cli, &connect(cli).await?.ask(request).await?)
}

/// Starts moves, and waits for their end unless told not to.
async fn start(cli: &Cli, request: AdminRequest, options: &MoveOptions) -> Result<(), Failure> {
    let session = connect(cli).await?;
    let mut moves = moves_of(session.ask(request).await?)?;
    if moves.is_empty() && !cli.json {
        return print("nothing to move: the servers are even");
    }
    if !options.no_wait {
        let bar = progress::count("moving pages", moves.iter().map(|m| m.pages_total).sum());
        let waited = wait(&session, &mut moves, &bar).await;
        bar.finish_and_clear();
        waited?;
    }
    print_reply(cli, &AdminReply::Moves(moves.clone()))?;
    moves.iter().try_for_each(succeeded)
}

async fn wait(session: &Session, moves: &mut [MoveInfo], bar: &ProgressBar) -> Result<(), Failure> {
    let begun: Vec<u64> = moves.iter().map(|one| one.started_unix_ms).collect();
    loop {
        let listed = session.ask(AdminRequest::MoveList { volume: None }).await;
        let now = moves_of(listed?)?;
        for (one, begun) in moves.iter_mut().zip(&begun) {
            let found = now.iter().find(|now| now.volume == one.volume);
            match found.filter(|now| now.started_unix_ms == *begun) {
                Some(now) => *one = now.clone(),
                None => one.phase = MovePhase::Failed("the volume or its move is gone".into()),
            }
        }
        bar.set_position(moves.iter().map(|one| one.pages_moved).sum());
        if moves.iter().all(is_over) {
            return Ok(());
        }
        sleep(LOOK).await;
    }
}

fn is_over(one: &MoveInfo) -> bool {
    let rests = matches!(
        one.phase,
        MovePhase::Done | MovePhase::Cancelled | MovePhase::Failed(_)
    );
    rests || one.phase == MovePhase::Paused
}

fn succeeded(one: &MoveInfo) -> Result<(), Failure> {
    match &one.phase {
        MovePhase::Failed(why) => Err(Failure::Refused {
            kind: AdminErrorKind::Conflict,
            message: format!(
                "pages of volume {} were not moved: {why}\n  `blockctl move resume {}` tries again",
                one.volume, one.volume
            ),
        }),
        _ => Ok(()),
    }
}

fn moves_of(reply: AdminReply) -> Result<Vec<MoveInfo>, Failure> {
    match reply {
        AdminReply::Moves(moves) => Ok(moves),
        _ => Err(Failure::UnexpectedReply {
            what: "a list of moves",
        }),
    }
}

pub(crate) async fn drain(cli: &Cli, args: &Drain) -> Result<(), Failure> {
    let session = connect(cli).await?;
    let Some(node) = args.node else {
        return print_reply(cli, &session.ask(AdminRequest::DrainList).await?);
    };
    let request = AdminRequest::NodeDrain {
        node,
        drain: true,
        rate_bytes: args.options.rate.unwrap_or(0),
    };
    let mut drains = drains_of(session.ask(request).await?)?;
    if !args.options.no_wait {
        let left = |drains: &[DrainInfo]| -> Option<u64> {
            let found = drains.iter().find(|drain| drain.node == node)?;
            (!found.volumes_left.is_empty()).then_some(found.pages_left)
        };
        let total = left(&drains).unwrap_or(0);
        let bar = progress::count("moving pages away", total);
        while let Some(pages) = left(&drains) {
            bar.set_position(total.saturating_sub(pages));
            sleep(LOOK).await;
            drains = drains_of(session.ask(AdminRequest::DrainList).await?)?;
        }
        bar.finish_and_clear();
    }
    print_reply(cli, &AdminReply::Drains(drains))
}

pub(crate) async fn undrain(cli: &Cli, node: NodeNo) -> Result<(), Failure> {
    let request = AdminRequest::NodeDrain {
        node,
        drain: false,
        rate_bytes: 0,
    };
    print_reply(cli, &connect(cli).await?.ask(request).await?)
}

fn drains_of(reply: AdminReply) -> Result<Vec<DrainInfo>, Failure> {
    match reply {
        AdminReply::Drains(drains) => Ok(drains),
        _ => Err(Failure::UnexpectedReply {
            what: "a list of drained nodes",
        }),
    }
}

/// The move of a volume's pages that is not over, if there is one.
pub(crate) async fn moving(session: &Session, volume: &str) -> Option<MoveInfo> {
    let volume = Some(volume.to_owned());
    // An older server knows no moves.
    let moves = session.ask(AdminRequest::MoveList { volume }).await.ok()?;
    moves_of(moves).ok()?.into_iter().find(MoveInfo::is_on)
}

pub(crate) fn moving_text(moving: Option<&MoveInfo>) -> String {
    moving.map_or_else(String::new, |one| format!("\nmoving: {}", sentence(one)))
}

/// The routing table of a volume, with the move of its pages.
pub(crate) async fn show_route(cli: &Cli, volume: &str) -> Result<(), Failure> {
    let session = connect(cli).await?;
    let request = AdminRequest::RouteShow {
        volume: volume.to_owned(),
    };
    let reply = session.ask(request).await?;
    let moving = moving(&session, volume).await;
    if !cli.json {
        let text = reply_text(&reply);
        return print(&format!("{text}{}", moving_text(moving.as_ref())));
    }
    let mut json = reply_json(&reply);
    json["move"] = moving.as_ref().map_or(Value::Null, page_move);
    print(&json.to_string())
}

fn sentence(one: &MoveInfo) -> String {
    format!(
        "{}, {} of {} pages, {}",
        one.reason,
        one.pages_moved,
        one.pages_total,
        state(one)
    )
}

/// The phase in a word, with what follows it.
fn state(one: &MoveInfo) -> String {
    let now = match &one.phase {
        MovePhase::Planned => "planned".to_owned(),
        MovePhase::Copying(batch) => format!("copying to node {}", batch.to),
        MovePhase::Flipped(batch, _) => format!("flipped to node {}", batch.to),
        MovePhase::Dropping(batch) => format!("dropping from node {}", batch.from),
        MovePhase::Paused => "paused".to_owned(),
        MovePhase::Done => "done".to_owned(),
        MovePhase::Cancelled => "cancelled".to_owned(),
        MovePhase::Failed(why) => format!("FAILED: {why}"),
    };
    let now = match &one.trouble {
        Some(trouble) if !is_over(one) => format!("{now}, waits: {trouble}"),
        _ => now,
    };
    match one.wish {
        MoveWish::Pause if !is_over(one) => format!("{now}, then paused"),
        MoveWish::Cancel if !is_over(one) => format!("{now}, then cancelled"),
        _ => now,
    }
}

/// `auto`: by what clients leave.
fn rate_text(rate_bytes: Option<u64>) -> String {
    rate_bytes.map_or("auto".to_owned(), |rate| format!("{}/s", human_bytes(rate)))
}

pub(crate) fn moves_text(moves: &[MoveInfo], now_ms: u64) -> String {
    let rows = moves.iter().map(|one| {
        vec![
            one.volume.clone(),
            one.reason.clone(),
            format!("{}/{}", one.pages_moved, one.pages_total),
            human_bytes(one.bytes_moved),
            rate_text(one.rate_bytes),
            ago(one.started_unix_ms, now_ms),
            state(one),
        ]
    });
    let header = [
        "VOLUME", "REASON", "PAGES", "MOVED", "RATE", "BEGAN", "STATE",
    ];
    table(&header, &[2, 3, 4], rows)
}

pub(crate) fn drains_text(drains: &[DrainInfo]) -> String {
    if drains.is_empty() {
        return "no node is drained".to_owned();
    }
    let line = |drain: &DrainInfo| {
        let node = drain.node;
        if drain.volumes_left.is_empty() {
            return format!("node {node} owns nothing: it may be stopped");
        }
        let (pages, volumes) = (drain.pages_left, drain.volumes_left.join(", "));
        let trouble = drain.trouble.as_ref().map(|why| format!("\n  {why}"));
        format!(
            "node {node} has {pages} pages left, of {volumes}{}",
            trouble.unwrap_or_default()
        )
    };
    drains.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_pages() {
        assert_eq!(parse_pages("all"), Ok(Pages(None)));
        assert_eq!(parse_pages("7"), Ok(Pages(Some((7, 1)))));
        assert_eq!(parse_pages("0-99"), Ok(Pages(Some((0, 100)))));
        for bad in ["", "9-3", "a", "-1", "1-2-3", "4294967295", "1-"] {
            assert!(parse_pages(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_drained_node_that_owns_nothing_says_so() {
        let mut drain = DrainInfo {
            node: NodeNo(2),
            since_unix_ms: 0,
            rate_bytes: None,
            pages_left: 3,
            volumes_left: vec!["v".to_owned()],
            trouble: Some("volume v: node 3: no space".to_owned()),
        };
        let text = drains_text(std::slice::from_ref(&drain));
        assert!(
            text.contains("3 pages left, of v") && text.contains("no space"),
            "{text}"
        );
        drain.volumes_left.clear();
        assert!(drains_text(&[drain]).contains("owns nothing"));
        assert_eq!(drains_text(&[]), "no node is drained");
    }
}
