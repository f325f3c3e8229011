//! `GET /metrics`: the server as Prometheus sees it, and the count of HTTP requests.
//!
//! Values are taken at the scrape. What is of the whole cluster (sizes, snapshots, moves, leases) is
//! that of this server's copy of the registry; what a volume has and did is this server's part.

use super::Shared;
use super::failure::Failure;
use super::look::{Look, MemberLook, VolumeLook};
use super::text::{CONTENT_TYPE, Labels, Page, one};
use crate::control::registry::{MovePhase, MoveRecord, SnapshotState, VolumeRecord};
use crate::data::traffic::Count;
use crate::io::host::resident_bytes;
use crate::io::wire;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Answers by method, path (with its variables, not their values) and status.
#[derive(Default)]
pub(super) struct Requests(Mutex<BTreeMap<(String, String, u16), u64>>);

impl Requests {
    fn note(&self, method: &Method, path: Option<MatchedPath>, status: u16) {
        let path = path.as_ref().map_or("other", MatchedPath::as_str);
        let key = (known(method).to_owned(), path.to_owned(), status);
        *self.lock().entry(key).or_default() += 1;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<(String, String, u16), u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Methods are words of the client: few of them are told apart.
fn known(method: &Method) -> &str {
    let methods = [Method::GET, Method::HEAD, Method::POST, Method::DELETE];
    if methods.contains(method) {
        method.as_str()
    } else {
        "other"
    }
}

/// Counts a request by its answer.
pub(super) async fn count(
    State(face): State<Shared>,
    path: Option<MatchedPath>,
    request: Request,
    next: Next,
) -> Response {
    let method = request.method().clone();
    let response = next.run(request).await;
    let status = response.status().as_u16();
    face.requests.note(&method, path, status);
    response
}

/// Answers a scrape.
pub(super) async fn answer(State(face): State<Shared>) -> Result<Response, Failure> {
    let look = face.reactor.run(async |node| Look::at(&node)).await?;
    let mut page = Page::default();
    tell_server(&mut page, &look);
    if let Some(member) = &look.member {
        tell_cluster(&mut page, member);
        tell_volumes(&mut page, member);
        tell_traffic(&mut page, member);
        tell_work(&mut page, member);
    }
    tell_requests(&mut page, &face.requests);
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], page.into_text()).into_response())
}

fn tell_server(page: &mut Page, look: &Look) {
    let protocol = wire::VERSION.to_string();
    let build = vec![
        ("version", env!("CARGO_PKG_VERSION")),
        ("protocol", protocol.as_str()),
    ];
    page.gauge("blockd_build_info", "The program.", [(build, 1.0)]);
    let store = &look.store;
    #[rustfmt::skip]
    let gauges = [
        ("blockd_member", "1: belongs to a cluster.", u64::from(look.member.is_some())),
        ("blockd_store_failed", "1: no writes until a restart, after a failed write or sync.", u64::from(look.has_failed)),
        ("blockd_store_free_bytes", "Free bytes of the file system of the state directory.", look.free_bytes),
        ("blockd_store_allocated_bytes", "Data bytes of all volumes here.", store.allocated_bytes),
        ("blockd_store_log_bytes", "Size of the log.", store.log_bytes),
        ("blockd_store_log_used_bytes", "Bytes of the log that are needed.", store.log_used_bytes),
        ("blockd_store_slots", "Chunk slots of the slab, used or free.", store.slots_total),
        ("blockd_store_slots_used", "Chunk slots in use.", store.slots_used),
        ("process_resident_memory_bytes", "Resident memory of the process.", resident_bytes()),
    ];
    for (name, help, value) in gauges {
        page.gauge(name, help, one(value));
    }
}

fn tell_cluster(page: &mut Page, member: &MemberLook) {
    let number = member.number.to_string();
    let node = vec![
        ("cluster", member.cluster.as_str()),
        ("node", number.as_str()),
        ("name", member.name.as_str()),
    ];
    page.gauge("blockd_node_info", "This node.", [(node, 1.0)]);
    let registry = &member.registry;
    let leader = registry.leader.unwrap_or_default();
    #[rustfmt::skip]
    let gauges = [
        ("blockd_registry_phase", "1: readable, 2: writable.", registry.phase as u64),
        ("blockd_registry_leader", "Number of the leading node; 0: none is known.", leader.0.into()),
        ("blockd_registry_term", "Election term.", registry.term),
        ("blockd_registry_revision", "Revision of this node's copy.", member.state.revision().0),
        ("blockd_registry_voters", "Nodes that vote.", registry.voters.len() as u64),
        ("blockd_nodes", "Nodes of the cluster.", member.state.nodes().count() as u64),
        ("blockd_volumes", "Volumes of the cluster.", member.state.volumes().count() as u64),
    ];
    for (name, help, value) in gauges {
        page.gauge(name, help, one(value));
    }
}

fn tell_volumes(page: &mut Page, member: &MemberLook) {
    let state = &member.state;
    let records = |value: fn(&VolumeRecord) -> u64| {
        let volumes = state.volumes();
        volumes.map(move |record| (vec![("volume", record.name.as_str())], value(record) as f64))
    };
    page.gauge(
        "blockd_volume_size_bytes",
        "Size of the volume.",
        records(|record| record.size_bytes),
    );
    let snapshots = state.volumes().map(|record| {
        let all = state.snapshots(record.id);
        let committed = all.filter(|snapshot| snapshot.state == SnapshotState::Committed);
        (
            vec![("volume", record.name.as_str())],
            committed.count() as f64,
        )
    });
    page.gauge(
        "blockd_volume_snapshots",
        "Snapshots of the volume.",
        snapshots,
    );
    page.gauge(
        "blockd_volume_allocated_bytes",
        "Data bytes of the volume and its snapshots on this node.",
        of_volumes(member, |volume| volume.allocated_bytes),
    );
}

/// A value of each volume, by its name.
fn of_volumes(
    member: &MemberLook,
    value: fn(&VolumeLook) -> u64,
) -> impl Iterator<Item = (Labels<'_>, f64)> {
    member.volumes.iter().filter_map(move |volume| {
        let name = member.state.volume(volume.id)?.name.as_str();
        Some((vec![("volume", name)], value(volume) as f64))
    })
}

fn tell_traffic(page: &mut Page, member: &MemberLook) {
    let of_kinds = |value: fn(&Count) -> u64| {
        member.volumes.iter().flat_map(move |volume| {
            let name = member
                .state
                .volume(volume.id)
                .map(|record| record.name.as_str());
            let kinds = [
                ("read", &volume.reads),
                ("write", &volume.writes),
                ("zero", &volume.zeroes),
            ];
            let labels = move |kind| vec![("volume", name.unwrap_or_default()), ("kind", kind)];
            kinds.map(|(kind, count)| (labels(kind), value(count) as f64))
        })
    };
    page.counter(
        "blockd_volume_requests_total",
        "Requests for pages of this node that its store executed, by kind.",
        of_kinds(|count| count.requests),
    );
    page.counter(
        "blockd_volume_bytes_total",
        "Bytes of these requests.",
        of_kinds(|count| count.bytes),
    );
    page.counter(
        "blockd_volume_errors_total",
        "Those that failed.",
        of_kinds(|count| count.errors),
    );
}

fn tell_work(page: &mut Page, member: &MemberLook) {
    let state = &member.state;
    let holds = member.hold_ages_ms.len() as u64;
    page.gauge(
        "blockd_holds",
        "What keeps requests of clients waiting on this node.",
        one(holds),
    );
    let oldest = member.hold_ages_ms.iter().max().copied().unwrap_or(0);
    let oldest = [(Vec::new(), oldest as f64 / 1000.0)];
    page.gauge(
        "blockd_holds_oldest_seconds",
        "Age of the oldest one.",
        oldest,
    );
    let moves = |value: fn(&MoveRecord) -> u64| {
        state.page_moves().filter_map(move |record| {
            let name = state.volume(record.volume)?.name.as_str();
            let labels = vec![("volume", name), ("state", phase(&record.phase))];
            Some((labels, value(record) as f64))
        })
    };
    page.gauge(
        "blockd_move_pages",
        "Pages of the newest move of a volume.",
        moves(|record| record.total_pages),
    );
    page.gauge(
        "blockd_move_pages_moved",
        "Pages of it that have moved.",
        moves(|record| record.moved_pages),
    );
    page.gauge(
        "blockd_move_moved_bytes",
        "Bytes that it has copied.",
        moves(|record| record.moved_bytes),
    );
    let leases = state.leases().filter_map(|record| {
        let name = state.volume(record.volume)?.name.as_str();
        let held = record.holder().is_some();
        Some((vec![("volume", name)], f64::from(u8::from(held))))
    });
    page.gauge(
        "blockd_volume_leased",
        "1: one writer has the volume, 0: had it.",
        leases,
    );
}

fn phase(phase: &MovePhase) -> &'static str {
    match phase {
        MovePhase::Planned => "planned",
        MovePhase::Copying(_) => "copying",
        MovePhase::Flipped(..) => "flipped",
        MovePhase::Dropping(_) => "dropping",
        MovePhase::Paused => "paused",
        MovePhase::Done => "done",
        MovePhase::Cancelled => "cancelled",
        MovePhase::Failed(_) => "failed",
    }
}

fn tell_requests(page: &mut Page, requests: &Requests) {
    let counts: Vec<_> = requests.lock().clone().into_iter().collect();
    let statuses: Vec<String> = counts
        .iter()
        .map(|((.., status), _)| status.to_string())
        .collect();
    let samples = counts
        .iter()
        .zip(&statuses)
        .map(|(((method, path, _), count), status)| {
            let labels = vec![
                ("method", method.as_str()),
                ("path", path.as_str()),
                ("status", status.as_str()),
            ];
            (labels, *count as f64)
        });
    page.counter(
        "blockd_http_requests_total",
        "HTTP requests answered.",
        samples,
    );
}
