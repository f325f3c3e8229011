//! What is looked at all the time: every hold ends at its deadline (promise 8).

use crate::trace;
use crate::world::{SERVERS, World};
use blockd::id::{TicketId, VolumeId};
use std::collections::BTreeMap;
use std::rc::Rc;
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
