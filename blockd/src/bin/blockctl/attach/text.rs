//! What `attach`, `detach` and `attachment` print for people.

use crate::output::{facts, table};
use crate::size::{human_age, human_bytes};
use blockd::attach::{Ha, State, Status};
use std::time::{SystemTime, UNIX_EPOCH};

/// Where it is, and nothing else: for scripts.
pub(super) fn place(status: &Status) -> String {
    let path = status.device.as_ref().or(status.socket.as_ref());
    path.map_or_else(|| status.volume.clone(), |path| path.display().to_string())
}

pub(super) fn moved(status: &Status) -> String {
    let first = status.servers.first();
    let first = first.map_or("nobody", |server| server.address.as_str());
    let owners: Vec<&str> = status
        .owners
        .iter()
        .map(|owner| owner.address.as_str())
        .collect();
    format!(
        "{first} is asked first; the data comes from the owners of its pages, as before: {}",
        owners.join(", ")
    )
}

pub(super) fn list(all: &[Status]) -> String {
    let rows = all.iter().map(|status| {
        let server = status.servers.iter().find(|server| server.in_use);
        vec![
            status.volume.clone(),
            place(status),
            state(status.state).to_owned(),
            server.map_or_else(|| "-".to_owned(), |server| server.address.clone()),
            status.counts.requests_in_flight.to_string(),
            status.counts.reconnects.to_string(),
            stall(status),
            human_bytes(status.counts.read_bytes),
            human_bytes(status.counts.written_bytes),
        ]
    });
    let header = [
        "VOLUME",
        "AT",
        "STATE",
        "SERVER",
        "IN FLIGHT",
        "RECONNECTS",
        "LONGEST",
        "READ",
        "WRITTEN",
    ];
    table(&header, &[4, 5, 6, 7, 8], rows)
}

pub(super) fn status(status: &Status) -> String {
    let counts = &status.counts;
    let yes = |is: bool| if is { "yes" } else { "no" }.to_owned();
    let mut lines = vec![
        ("volume", status.volume.clone()),
        ("at", place(status)),
        ("state", state(status.state).to_owned()),
        ("size", human_bytes(status.size_bytes)),
        ("read-only", yes(status.read_only)),
        ("exclusive", yes(status.exclusive)),
        ("mode", mode(status)),
        ("dead timeout", format!("{} s", status.dead_timeout_s)),
        ("backend", status.backend.clone()),
        ("pid", status.pid.to_string()),
        (
            "attached for",
            human_age(now_s().saturating_sub(status.attached_unix_ms / 1000)),
        ),
        ("in flight", counts.requests_in_flight.to_string()),
        ("requests", counts.requests.to_string()),
        ("read", human_bytes(counts.read_bytes)),
        ("written", human_bytes(counts.written_bytes)),
        ("longest stall", stall(status)),
        ("reconnects", counts.reconnects.to_string()),
        ("moves", counts.moves.to_string()),
        ("errors", counts.errors.to_string()),
    ];
    if let Some(link) = &status.link {
        lines.insert(2, ("link", link.display().to_string()));
    }
    if let Some(error) = &counts.last_error {
        let age = human_age(now_s().saturating_sub(error.unix_ms / 1000));
        lines.push(("last error", format!("{} ({age} ago)", error.message)));
    }
    format!("{}\n\n{}", facts(&lines), servers(status))
}

fn servers(status: &Status) -> String {
    let asked = status.servers.iter().map(|server| {
        let role = if server.in_use {
            "asked first"
        } else {
            "asked if others fail"
        };
        vec![server.address.clone(), role.to_owned(), String::new()]
    });
    let owners = status.owners.iter().map(|owner| {
        let role = format!("owns pages (node {})", owner.node);
        let is = match (owner.connected, owner.connections) {
            (true, _) => "connected",
            (false, 0) => "not used yet",
            (false, _) => "away",
        };
        vec![owner.address.clone(), role, is.to_owned()]
    });
    table(&["SERVER", "ROLE", "STATE"], &[], asked.chain(owners))
}

fn mode(status: &Status) -> String {
    let ha = match status.ha {
        Ha::Proxy => "proxy",
        Ha::Direct => "direct",
    };
    match status.socket {
        Some(_) => "socket".to_owned(),
        None => format!("{ha}, {} connections", status.connections),
    }
}

fn state(state: State) -> &'static str {
    match state {
        State::Serving => "serving",
        State::Waiting => "waiting for a server",
        State::Unserved => "no daemon: attach again",
    }
}

fn stall(status: &Status) -> String {
    format!("{} ms", status.counts.longest_stall_ms)
}

fn now_s() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |since| since.as_secs())
}
