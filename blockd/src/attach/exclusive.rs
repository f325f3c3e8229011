//! `--exclusive`: the writer lease that the attachment holds.

use super::error::AttachError;
use super::record::Record;
use crate::admin::{AdminRequest, LeaseInfo};
use crate::client::{Client, ClientError, HolderText, Lease, Volume};
use crate::control::registry::LeaseState;
use crate::io::host::hostname;
use std::time::Duration;

/// How long the lease outlives a host that dies.
const TTL: Duration = Duration::from_secs(10);

/// Becomes the only writer. `before` is the record of a daemon that died on this host: its lease
/// ends at once, as the lock of the attachment proves that it is gone.
///
/// # Errors
/// Another one holds the lease; the error names it.
pub(super) async fn acquire(
    client: &Client,
    volume: &Volume,
    before: Option<&Record>,
) -> Result<Lease, AttachError> {
    let holder = HolderText::this_process("blockctl attach");
    match volume.acquire_exclusive(holder.clone(), TTL).await {
        Err(ClientError::Leased(info)) if before.is_some_and(|dead| is_held_by(dead, &info)) => {
            tracing::warn!("ending the lease of the daemon that died: {info}");
            let volume_name = info.volume.clone();
            client
                .admin(AdminRequest::LeaseBreak {
                    volume: volume_name,
                })
                .await?;
            Ok(volume.wait_exclusive(holder, TTL, TTL).await?)
        }
        acquired => Ok(acquired?),
    }
}

fn is_held_by(dead: &Record, info: &LeaseInfo) -> bool {
    match &info.state {
        LeaseState::Held(holder) | LeaseState::Closed(holder, _) => {
            holder.pid == dead.pid && holder.host == hostname()
        }
        LeaseState::Free => false,
    }
}

/// Returns when the lease is lost: why. Without a lease, never.
pub(super) async fn lost(lease: Option<&Lease>) -> String {
    match lease {
        Some(lease) => lease.lost().await,
        None => std::future::pending().await,
    }
}
