//! The addresses of this server, which it discovers and publishes itself (S004-90, S004-92, S004-106).
//!
//! At each start, and when the server becomes a member: an adapter that was added or taken out
//! meanwhile needs no word to the cluster. Addresses in no known subnetwork define one (S004-105).

use super::{Member, Node};
use crate::control::registry::networks::publish_addresses;
use crate::control::registry::{AddressRecord, RegistryState};
use crate::io::host::{self, mask_bits};
use crate::limits::ADDRESSES_RETRY_MS;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use tokio::time::sleep;

/// Keeps the registry's addresses of this server those that it has.
pub(super) async fn run(node: Rc<Node>) {
    let retry = Duration::from_millis(ADDRESSES_RETRY_MS);
    let member = loop {
        match node.member() {
            Some(member) => break member,
            None => sleep(retry).await,
        }
    };
    let adapters = node.config.adapters.iter();
    let wanted = adapters.map(|at| (*at, mask_bits(at.ip()))).collect();
    let mut states = member.registry.watch();
    loop {
        states.borrow_and_update();
        if let Err(error) = publish(&member, &wanted).await {
            tracing::warn!(%error, "the addresses of this server are not published yet");
            sleep(retry).await;
        } else if states.changed().await.is_err() {
            return;
        }
    }
}

async fn publish(member: &Member, wanted: &BTreeMap<SocketAddr, u8>) -> Result<(), String> {
    let me = member.number();
    let state = member.registry.state();
    if state.node(me).is_none() {
        // The definition comes with a later state.
        return Ok(());
    }
    let ours = |record: &&AddressRecord| record.node == me;
    let known = state.addresses().filter(ours);
    let known: BTreeMap<_, _> = known.map(|r| (r.address, r.mask_bits)).collect();
    if known == *wanted {
        return Ok(());
    }
    let first_id = host::random_u128().map_err(|error| error.to_string())?;
    let build = |state: &RegistryState| publish_addresses(state, me, wanted, first_id);
    let published = member.registry.update(build).await;
    published.map_err(|error| error.to_string())
}
