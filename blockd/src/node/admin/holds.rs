//! What keeps requests waiting, on all servers.

use super::Answer;
use crate::admin::{AdminReply, HoldInfo, HoldsInfo};
use crate::id::{NodeNo, VolumeId};
use crate::io::link::decode_control;
use crate::io::wire::{Frame, Kind};
use crate::limits::OPEN_PROBE_MS;
use crate::node::Member;
use futures_util::future::join_all;
use std::time::Duration;
use tokio::time::timeout;

pub(super) async fn list(member: &Member) -> Answer {
    let state = member.registry.state();
    let nodes: Vec<NodeNo> = state.nodes().map(|node| node.number).collect();
    let asked = join_all(nodes.iter().map(|node| ask(member, *node))).await;
    let mut all = HoldsInfo::default();
    for (node, holds) in nodes.into_iter().zip(asked) {
        let Some(holds) = holds else {
            all.unreachable.push(node);
            continue;
        };
        all.holds.extend(holds.into_iter().map(|hold| {
            let volume = state.volume(hold.volume);
            let name = volume.map_or_else(|| hold.volume.to_string(), |v| v.name.clone());
            (name, hold)
        }));
    }
    Ok(AdminReply::Holds(all))
}

async fn ask(member: &Member, node: NodeNo) -> Option<Vec<HoldInfo>> {
    let request = Frame::request(Kind::Holds, VolumeId(0));
    let limit = Duration::from_millis(OPEN_PROBE_MS);
    let reply = timeout(limit, member.call(node, request))
        .await
        .ok()?
        .ok()?;
    decode_control(reply.payload).ok()
}
