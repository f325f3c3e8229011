//! `--exclusive`: the writer lease that the attachment holds.

use super::error::{AttachError, AttachErrorKind};
use super::record::Record;
use crate::admin::{AdminRequest, LeaseInfo};
use crate::client::{Client, ClientError, HolderText, Lease, Volume};
use crate::control::registry::LeaseState;
use crate::io::host::hostname;
use std::time::Duration;
use tokio::time::timeout;

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
            // By its epoch: a lease that somebody else has acquired meanwhile stays.
            let (volume_id, epoch) = (info.volume_id, info.epoch);
            let release = AdminRequest::LeaseRelease {
                volume: volume_id,
                epoch,
            };
            client.admin(release).await?;
            Ok(volume.wait_exclusive(holder, TTL, TTL).await?)
        }
        acquired => Ok(acquired?),
    }
}

/// Becomes the only writer again after a daemon that died: only if nobody else was meanwhile, as what the kernel has cached of the
/// device would be written over what the other one wrote.
///
/// # Errors
/// As [`acquire`]; or the owners do not answer; or somebody else may have written.
pub(super) async fn acquire_again(
    client: &Client,
    volume: &Volume,
    dead: &Record,
) -> Result<Lease, AttachError> {
    // Every owner must confirm a lease; one that is given up for want of an answer would count as somebody else's.
    let answers = timeout(dead.spec.open_timeout, volume.flush()).await;
    let no_answer = |_| {
        let text = "the owners of the volume do not all answer, so they cannot confirm a lease";
        AttachError::new(AttachErrorKind::Unreachable, text)
    };
    answers.map_err(no_answer)??;
    let lease = acquire(client, volume, Some(dead)).await?;
    let (now, then) = (lease.info().epoch, dead.lease_epoch);
    // The end of the dead daemon's lease is one epoch, this lease the next.
    if then.is_some_and(|then| now.0 <= then.0 + 2) {
        return Ok(lease);
    }
    let _ = lease.release().await;
    Err(AttachError::new(
        AttachErrorKind::Conflict,
        "somebody else may have written the volume since its daemon died: what this host still has \
         cached must not go over it; give it up with detach --force, then attach it again",
    ))
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
