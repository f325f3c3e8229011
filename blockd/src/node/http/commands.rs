//! Administration: the request of a path is carried out, and its reply becomes JSON.

use super::failure::Failure;
use super::routes::Route;
use super::{Face, Shared};
use crate::admin::{AdminError, AdminErrorKind, AdminReply, AdminRequest, MoveInfo, json};
use crate::node::access::Caller;
use crate::node::admin::carry_out;
use axum::body::Bytes;
use axum::extract::{RawPathParams, State};
use axum::routing::{MethodRouter, on};
use axum::{Extension, Json};
use serde_json::{Value, json};
use tokio::time::Instant;

type Answer = Result<Json<Value>, Failure>;

/// What answers a route.
pub(super) fn of(route: &'static Route) -> MethodRouter<Shared> {
    let handler = async move |State(face): State<Shared>,
                              Extension(caller): Extension<Caller>,
                              variables: RawPathParams,
                              body: Bytes| {
        let variables = variables.iter().map(|(_, text)| text);
        let request = route.request(variables, &body)?;
        answer(&face, caller, request).await
    };
    on(route.method, handler)
}

/// Answers any request, which is the body.
pub(super) async fn any(
    State(face): State<Shared>,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Answer {
    let request = serde_json::from_slice(&body);
    let request = request.map_err(|error| Failure::bad_request(error.to_string()))?;
    answer(&face, caller, request).await
}

/// As `blockctl --json` does it: some verbs say more than the reply to one request.
async fn answer(face: &Face, caller: Caller, request: AdminRequest) -> Answer {
    let began = Instant::now();
    let reply = ask(face, caller.clone(), request.clone()).await?;
    let mut value = json::reply(&reply);
    match request {
        AdminRequest::VolumeDetails { name } => {
            value["scrub"] = scrub(face, caller.clone(), name.clone()).await?;
            value["move"] = moving(face, caller, name).await?;
        }
        AdminRequest::RouteShow { volume } => value["move"] = moving(face, caller, volume).await?,
        AdminRequest::SnapshotCreate { .. } | AdminRequest::SnapshotCreateBy { .. } => {
            let took_ms = (began.elapsed().as_secs_f64() * 1e6).round() / 1e3;
            value = json!({"took_ms": took_ms, "snapshots": value});
        }
        _ => {}
    }
    Ok(Json(value))
}

async fn ask(face: &Face, caller: Caller, request: AdminRequest) -> Result<AdminReply, Failure> {
    let carried_out = async move |node| carry_out(&node, &caller, request).await;
    match face.reactor.run(carried_out).await?? {
        AdminReply::LeaseConflict(lease) => Err(Failure::from(AdminError {
            kind: AdminErrorKind::Conflict,
            message: lease.to_string(),
        })),
        reply => Ok(reply),
    }
}

async fn scrub(face: &Face, caller: Caller, volume: String) -> Result<Value, Failure> {
    match ask(face, caller, AdminRequest::ScrubShow { volume }).await? {
        AdminReply::Scrub(last) => Ok(json::scrub(last.as_ref())),
        _ => Ok(Value::Null),
    }
}

async fn moving(face: &Face, caller: Caller, volume: String) -> Result<Value, Failure> {
    let volume = Some(volume);
    match ask(face, caller, AdminRequest::MoveList { volume }).await? {
        AdminReply::Moves(moves) => {
            let found = moves.iter().find(|one| MoveInfo::is_on(one));
            Ok(found.map_or(Value::Null, json::page_move))
        }
        _ => Ok(Value::Null),
    }
}
