//! What is looked at all the time: every hold ends at its deadline (promise 8), and a revision of the
//! registry is the same state everywhere.

use crate::trace;
use crate::world::{SERVERS, World};
use blockd::control::registry::RegistryState;
use blockd::id::{Revision, TicketId, VolumeId};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::sleep;

/// Time between two looks.
const PERIOD: Duration = Duration::from_secs(2);
/// Looks at which a hold that is overdue is found: a server that was paused needs a moment.
const LOOKS: u32 = 3;

/// Looks at the holds of all servers until the run ends.
pub(crate) async fn holds(world: Rc<World>) {
    let mut seen: BTreeMap<(usize, VolumeId, TicketId), u32> = BTreeMap::new();
    loop {
        sleep(PERIOD).await;
        let overdue = overdue(&world);
        seen = overdue
            .map(|hold| (hold, seen.get(&hold).copied().unwrap_or_default() + 1))
            .collect();
        for ((server, volume, ticket), _) in seen.iter().filter(|(_, looks)| **looks == LOOKS) {
            trace::problem(format!(
                "server {server} holds volume {volume} for {ticket:?} beyond its deadline"
            ));
        }
    }
}

fn overdue(world: &World) -> impl Iterator<Item = (usize, VolumeId, TicketId)> {
    let awake = (0..SERVERS).filter(|host| !world.is_paused(*host));
    awake.flat_map(|host| {
        let holds = world.server(host).map(|server| server.overdue_holds());
        let holds = holds.into_iter().flatten();
        holds.map(move |(volume, ticket)| (host, volume, ticket))
    })
}

/// Time between two looks at the registries, in which some transactions are agreed on.
const REGISTRY_PERIOD: Duration = Duration::from_millis(70);
/// States that are kept to be compared with what slower servers come to.
const STATES_KEPT: usize = 256;

/// Looks at the registry states of all servers until the run ends.
pub(crate) async fn registries(world: Rc<World>) {
    let mut states = States::default();
    loop {
        sleep(REGISTRY_PERIOD).await;
        for host in 0..SERVERS {
            let state = world.server(host).and_then(|server| server.registry());
            if let Some(text) = state.and_then(|state| states.see(&state)) {
                trace::problem(format!("server {host}: {text}"));
            }
        }
    }
}

/// The states of late, each seen at some server.
#[derive(Default)]
struct States(BTreeMap<Revision, Arc<RegistryState>>);

impl States {
    /// What is wrong with a state, after those that were seen before.
    fn see(&mut self, state: &Arc<RegistryState>) -> Option<String> {
        let revision = state.revision();
        let known = self.0.entry(revision).or_insert_with(|| Arc::clone(state));
        let differs = known != state;
        if self.0.len() > STATES_KEPT {
            self.0.pop_first();
        }
        differs.then(|| format!("revision {revision} of the registry is not what it was elsewhere"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockd::control::registry::{Key, Object};

    fn state(revision: u64, volume: u64) -> Arc<RegistryState> {
        let named = (
            Key::VolumeName("v".to_owned()),
            Object::VolumeName(VolumeId(volume)),
        );
        Arc::new(RegistryState::restored(Revision(revision), [named].into()))
    }

    #[test]
    fn two_states_of_one_revision_are_told() {
        let mut states = States::default();
        assert_eq!(states.see(&state(4, 1)), None);
        assert_eq!(states.see(&state(4, 1)), None);
        assert_eq!(states.see(&state(5, 2)), None);
        assert!(
            states
                .see(&state(4, 2))
                .is_some_and(|text| text.contains("revision 4"))
        );
        for revision in 6..6 + STATES_KEPT as u64 {
            assert_eq!(states.see(&state(revision, revision)), None);
        }
        assert_eq!(states.0.len(), STATES_KEPT);
    }
}
