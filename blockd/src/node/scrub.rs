//! Scrub on the server: a step of it, at a bounded rate and in small pieces, so that requests of
//! clients are served between them.

use super::admin::{no_volume, refused};
use super::registry::UpdateError;
use super::{Member, Node};
use crate::admin::{AdminError, AdminErrorKind, AdminReply, ScrubStep};
use crate::control::registry::scrub::keep_scrub;
use crate::control::registry::{RegistryState, ScrubRecord};
use crate::data::error::DataError;
use crate::id::{NodeNo, ScrubPosition, VolumeId};
use crate::io::link::{decode_control, encode_control};
use crate::io::wire::{Frame, Kind, Payload};
use crate::limits::{SCRUB_DAMAGE_MAX, SCRUB_PIECE_BYTES, SCRUB_RATE_MIN_BYTES, SCRUB_STEP_MS};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// Payload of `Kind::Scrub`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ScrubOrder {
    from: ScrubPosition,
    /// Bytes a second at the most.
    rate_bytes: u64,
}

/// Carries out a step; one at a time, whoever asks.
pub(super) async fn answer(
    node: &Node,
    member: &Member,
    request: &Frame,
) -> Result<Payload, DataError> {
    let order: ScrubOrder = decode_control(request.payload.clone())
        .map_err(|_| DataError::Malformed("the order of a scrub cannot be decoded"))?;
    let _one_at_a_time = node.scrubbing.lock().await;
    Ok(encode_control(&step(member, request.volume, order).await?))
}

async fn step(
    member: &Member,
    volume: VolumeId,
    order: ScrubOrder,
) -> Result<ScrubStep, DataError> {
    let rate = order.rate_bytes.max(SCRUB_RATE_MIN_BYTES);
    let end = Instant::now() + Duration::from_millis(SCRUB_STEP_MS);
    let mut step = ScrubStep::default();
    let mut at = order.from;
    loop {
        let began = Instant::now();
        let piece = member
            .owner()
            .store
            .scrub(volume, at, SCRUB_PIECE_BYTES)
            .await?;
        step.verified_bytes += piece.bytes;
        step.damaged.extend(piece.damaged);
        step.next = piece.next;
        let Some(next) = piece.next else {
            return Ok(step);
        };
        let due = Duration::from_millis(piece.bytes.saturating_mul(1000) / rate);
        sleep_until(began + due).await;
        if Instant::now() >= end || SCRUB_DAMAGE_MAX <= step.damaged.len() {
            return Ok(step);
        }
        at = next;
    }
}

/// Has a node carry out a step.
pub(super) async fn order(
    member: &Member,
    volume: VolumeId,
    node: NodeNo,
    from: ScrubPosition,
    rate_bytes: u64,
) -> Result<AdminReply, AdminError> {
    if rate_bytes < SCRUB_RATE_MIN_BYTES {
        let text = format!("a rate of {rate_bytes} bytes a second: give 1MiB at the least");
        return Err(refused(AdminErrorKind::Invalid, text));
    }
    let mut request = Frame::request(Kind::Scrub, volume);
    request.payload = encode_control(&ScrubOrder { from, rate_bytes });
    let reply = member.call(node, request).await?;
    let step: ScrubStep = decode_control(reply.payload).map_err(|_| {
        let text = format!("node {node} answered something unreadable");
        refused(AdminErrorKind::Internal, text)
    })?;
    Ok(AdminReply::ScrubStep(step))
}

/// Keeps the outcome of a scrub in the registry.
pub(super) async fn keep(member: &Member, record: &ScrubRecord) -> Result<AdminReply, AdminError> {
    let build = |state: &RegistryState| Ok::<_, Infallible>((keep_scrub(state, record), ()));
    match member.registry.update(build).await {
        Ok(()) => Ok(AdminReply::Done),
        Err(UpdateError::Registry(error)) => Err(error.into()),
        Err(UpdateError::Refused(never)) => match never {},
    }
}

/// The last scrub of a volume.
pub(super) fn show(member: &Member, name: &str) -> Result<AdminReply, AdminError> {
    let state = member.registry.state();
    let volume = state.volume_by_name(name).ok_or_else(|| no_volume(name))?;
    Ok(AdminReply::Scrub(state.scrub(volume.id).cloned()))
}
