//! The exclusive writer lease of an open volume.
//!
//! A [`Lease`] belongs to the [`Volume`] that acquired it and to its clones: their changes carry its
//! epoch, and the owners execute no others. It is renewed in the background, and lost only on
//! evidence: a renewal or a change that was refused. A registry that does not answer is none, as
//! without it nobody else can become a writer. After a loss the changes of the volume still carry
//! the old epoch, and fail; the volume has to be opened again.

use super::volume::{Shared, Volume};
use super::{ClientError, failed_lease};
use crate::admin::{AdminErrorKind, AdminReply, AdminRequest, LeaseInfo};
use crate::control::registry::LeaseHolder;
use crate::id::{LeaseEpoch, VolumeId};
use crate::io::host::{hostname, random_u64, unix_ms};
use crate::limits::REGISTRY_TEXT_BYTES_MAX;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};

/// Time between two tries to acquire a lease that another one holds, or to renew one.
const PAUSE: Duration = Duration::from_millis(500);

/// Who acquires a lease, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HolderText {
    pub host: String,
    pub pid: u32,
    /// As in "attach /dev/nbd0"; at most 255 bytes.
    pub purpose: String,
}

impl HolderText {
    /// This process on this host.
    #[must_use]
    pub fn this_process(purpose: &str) -> Self {
        Self {
            host: hostname(),
            pid: std::process::id(),
            purpose: purpose.to_owned(),
        }
    }

    fn holder(self, id: u64, ttl: Duration) -> LeaseHolder {
        LeaseHolder {
            id,
            attempt: 0,
            host: shortened(self.host),
            pid: self.pid,
            purpose: shortened(self.purpose),
            ttl_ms: u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX),
            since_unix_ms: unix_ms(),
        }
    }
}

fn shortened(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(REGISTRY_TEXT_BYTES_MAX));
    text
}

/// What an open volume knows of its lease.
#[derive(Debug, Default)]
pub(super) struct LeaseMark {
    /// 0: none. Stays after a loss.
    epoch: AtomicU32,
    /// Why it was lost.
    lost: watch::Sender<Option<String>>,
}

impl LeaseMark {
    pub(super) fn epoch(&self) -> LeaseEpoch {
        LeaseEpoch(self.epoch.load(Ordering::Relaxed))
    }

    fn set(&self, epoch: LeaseEpoch) {
        self.epoch.store(epoch.0, Ordering::Relaxed);
    }

    /// An owner or the registry says that the lease is not this volume's any more.
    pub(super) fn lose(&self, reason: &str) {
        if self.epoch() == LeaseEpoch(0) {
            return;
        }
        self.lost.send_if_modified(|lost| {
            let first = lost.is_none();
            lost.get_or_insert_with(|| reason.to_owned());
            first
        });
    }
}

/// An exclusive writer lease. Dropped, it is released in the background; if the process ends
/// first, it expires.
#[must_use = "a lease that is dropped is released"]
pub struct Lease {
    held: Option<Held>,
    info: LeaseInfo,
}

struct Held {
    volume: Volume,
    renewing: JoinHandle<()>,
}

impl Volume {
    /// Becomes the only writer of the volume. Until then its own operations wait; changes of all
    /// others are refused from now on.
    ///
    /// `ttl` (2 s to 600 s) is how long the lease outlives a holder that dies.
    ///
    /// # Errors
    /// [`ClientError::Leased`] if another one is; [`ClientError::Refused`] if not all servers that
    /// own pages of the volume agree, or this volume has a lease already.
    pub async fn acquire_exclusive(
        &self,
        holder: HolderText,
        ttl: Duration,
    ) -> Result<Lease, ClientError> {
        self.wait_exclusive(holder, ttl, Duration::ZERO).await
    }

    /// As [`Self::acquire_exclusive`], but waits so long for another holder to end.
    ///
    /// # Errors
    /// As [`Self::acquire_exclusive`].
    pub async fn wait_exclusive(
        &self,
        holder: HolderText,
        ttl: Duration,
        patience: Duration,
    ) -> Result<Lease, ClientError> {
        if self.is_read_only() {
            let text = "a snapshot is never written and needs no lease";
            return Err(failed_lease(AdminErrorKind::Invalid, text));
        }
        let id = random_u64().map_err(|e| failed_lease(AdminErrorKind::Internal, e.to_string()))?;
        let holder = holder.holder(id, ttl);
        let deadline = Instant::now() + patience;
        loop {
            match self.try_acquire(&holder, ttl).await {
                Err(ClientError::Leased(_)) if Instant::now() + PAUSE < deadline => {
                    sleep(PAUSE).await;
                }
                ended => return ended,
            }
        }
    }

    /// Nothing of this volume is in flight while its epoch changes.
    async fn try_acquire(&self, holder: &LeaseHolder, ttl: Duration) -> Result<Lease, ClientError> {
        let _order = self.shared.order.write().await;
        let mark = &self.shared.lease;
        if mark.epoch() != LeaseEpoch(0) {
            let text = "this volume was opened and leased already: open it again";
            return Err(failed_lease(AdminErrorKind::Conflict, text));
        }
        let request = AdminRequest::LeaseAcquire {
            volume: self.volume_id(),
            holder: holder.clone(),
        };
        let info = match self.ask_twice(request).await? {
            AdminReply::Lease(info) => info,
            AdminReply::LeaseConflict(info) => return Err(ClientError::Leased(Box::new(info))),
            _ => return Err(self.shared.client.unexpected()),
        };
        mark.set(info.epoch);
        let renewing = renew(Arc::clone(&self.shared), self.volume_id(), info.epoch, ttl);
        let held = Held {
            volume: self.clone(),
            renewing: tokio::spawn(renewing),
        };
        Ok(Lease {
            held: Some(held),
            info,
        })
    }

    /// Lease requests may be repeated: the holder's id and the epoch tell which lease is meant.
    async fn ask_twice(&self, request: AdminRequest) -> Result<AdminReply, ClientError> {
        match self.shared.client.admin(request.clone()).await {
            Err(ClientError::Unreachable { .. }) => self.shared.client.admin(request).await,
            answered => answered,
        }
    }

    fn volume_id(&self) -> VolumeId {
        self.opened().table.volume
    }

    /// Ends the lease once nothing of this volume is in flight.
    async fn release_lease(&self, epoch: LeaseEpoch) -> Result<(), ClientError> {
        let _order = self.shared.order.write().await;
        let request = AdminRequest::LeaseRelease {
            volume: self.volume_id(),
            epoch,
        };
        self.ask_twice(request).await?;
        if self.shared.lease.lost.borrow().is_none() {
            self.shared.lease.set(LeaseEpoch(0));
        }
        Ok(())
    }
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Lease").field(&self.info).finish()
    }
}

impl Lease {
    /// What the servers know of it.
    #[must_use]
    pub fn info(&self) -> &LeaseInfo {
        &self.info
    }

    /// Why it was lost, if it was.
    #[must_use]
    pub fn why_lost(&self) -> Option<String> {
        let mark = &self.held.as_ref()?.volume.shared.lease;
        mark.lost.borrow().clone()
    }

    /// Waits until the lease is lost; says why.
    pub async fn lost(&self) -> String {
        let Some(held) = &self.held else {
            return std::future::pending().await;
        };
        let mut lost = held.volume.shared.lease.lost.subscribe();
        let found = lost.wait_for(Option::is_some).await;
        match found.ok().and_then(|reason| reason.clone()) {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }

    /// Lets others write again. Changes of the volume that are still under way end first; it does
    /// not flush. If an owner is not reached the volume stays closed to all writers until it is.
    ///
    /// # Errors
    /// [`ClientError`]: no server was reached; the lease expires.
    pub async fn release(mut self) -> Result<(), ClientError> {
        let Some(held) = self.held.take() else {
            return Ok(());
        };
        held.renewing.abort();
        held.volume.release_lease(self.info.epoch).await
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let Some(held) = self.held.take() else {
            return;
        };
        held.renewing.abort();
        let epoch = self.info.epoch;
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                if let Err(error) = held.volume.release_lease(epoch).await {
                    tracing::warn!(%error, "lease not released: it expires");
                }
            });
        }
    }
}

/// Renews the lease until it is lost.
async fn renew(volume: Arc<Shared>, id: VolumeId, epoch: LeaseEpoch, ttl: Duration) {
    let mut pause = ttl / 3;
    loop {
        sleep(pause).await;
        let renewal = AdminRequest::LeaseRenew { volume: id, epoch };
        // A server that falls silent has its share of this, so that the others are asked in time.
        pause = match volume.client.admin_within(ttl / 4, renewal).await {
            Ok(_) => ttl / 3,
            Err(ClientError::Refused(refusal)) if refusal.kind == AdminErrorKind::Conflict => {
                return volume.lease.lose(&refusal.message);
            }
            Err(error) => {
                tracing::debug!(%error, "lease not renewed yet");
                PAUSE.min(ttl / 3)
            }
        };
    }
}
