//! What a server holds on to, for tests that wait until nothing is left.

use super::Server;
use super::sweep::unfinished;
use crate::control::registry::RegistryState;
use crate::data::page_store::StoreUsage;
use crate::id::{TicketId, VolumeId};
use std::sync::Arc;

/// One look at a server.
#[derive(Clone, Debug, Default)]
pub struct Inspection {
    /// Volumes whose writes are held.
    pub held: usize,
    /// Writes and spans that passed the gate and have not ended.
    pub executing: usize,
    /// Snapshot records that are neither committed nor gone, in this server's copy of the registry.
    pub unfinished_snapshots: usize,
    /// Moves of pages under way, in this server's copy of the registry.
    pub moves: usize,
    /// Whether changes of the registry are possible.
    pub has_leader: bool,
    pub usage: StoreUsage,
}

impl Server {
    /// Looks.
    #[must_use]
    pub fn inspect(&self) -> Inspection {
        let mut found = Inspection {
            usage: self.node.store.usage(),
            ..Inspection::default()
        };
        let Some(member) = self.node.member() else {
            return found;
        };
        let state = member.registry.state();
        for record in state.volumes() {
            if let Some(volume) = member.owner().volume(record.id) {
                found.held += usize::from(volume.cut.is_held());
                found.executing += volume.cut.all_executing() as usize;
            }
        }
        found.unfinished_snapshots = unfinished(&state).count();
        found.moves = state
            .page_moves()
            .filter(|moving| !moving.is_over())
            .count();
        found.has_leader = member.registry.status().leader.is_some();
        found
    }

    /// The registry's state as this server has it, if it is a member of a cluster.
    #[must_use]
    pub fn registry(&self) -> Option<Arc<RegistryState>> {
        Some(self.node.member()?.registry.state())
    }

    /// Holds of snapshots that should have ended by now.
    #[must_use]
    pub fn overdue_holds(&self) -> Vec<(VolumeId, TicketId)> {
        let Some(member) = self.node.member() else {
            return Vec::new();
        };
        let holds = member.participant.holds(&member).into_iter();
        let overdue = holds.filter(|hold| hold.left_ms == Some(0));
        overdue.map(|hold| (hold.volume, hold.ticket)).collect()
    }
}
