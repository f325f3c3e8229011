//! Is the server alive, and may clients be sent to it: for supervisors and load balancers.

use super::Shared;
use super::failure::Failure;
use crate::node::Node;
use crate::node::registry::Phase;
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde_json::{Value, json};
use std::rc::Rc;

type Answer = Result<(StatusCode, Json<Value>), Failure>;

/// The process answers, and its store takes writes: if not, a restart is called for.
pub(super) async fn alive(State(face): State<Shared>) -> Answer {
    let trouble = face.reactor.run(async |node| failed(&node)).await?;
    Ok(verdict(trouble))
}

/// It serves every volume, and changes are possible.
pub(super) async fn ready(State(face): State<Shared>) -> Answer {
    let trouble = face.reactor.run(async |node| unready(&node)).await?;
    Ok(verdict(trouble))
}

fn verdict(trouble: Option<String>) -> (StatusCode, Json<Value>) {
    let status = match trouble {
        None => StatusCode::OK,
        Some(_) => StatusCode::SERVICE_UNAVAILABLE,
    };
    (
        status,
        Json(json!({"ok": trouble.is_none(), "reason": trouble})),
    )
}

fn failed(node: &Node) -> Option<String> {
    node.store.failure().map(|error| error.to_string())
}

fn unready(node: &Rc<Node>) -> Option<String> {
    if let Some(failed) = failed(node) {
        return Some(failed);
    }
    let Some(member) = node.member() else {
        return Some(node.why_no_member().to_owned());
    };
    if member.registry.status().phase != Phase::Writable {
        return Some("the registry has no leader: are most of its servers up?".to_owned());
    }
    let waits =
        "changes over several pages were under way before the start, of volumes not known yet";
    (!member.owner().has_resumed()).then(|| waits.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_is_told_with_503() {
        let (status, Json(body)) = verdict(Some("the disk failed".to_owned()));
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE);
        assert_eq!(body, json!({"ok": false, "reason": "the disk failed"}));
        assert_eq!(verdict(None).0, StatusCode::OK);
    }
}
