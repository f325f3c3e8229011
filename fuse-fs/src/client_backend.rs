//! The product's backend: `blockd::client`, which treats the servers as one.

use crate::backend::{
    Answer, Backend, BackendError, ConnectOptions, Extent, Listing, OpenTarget, Space, TargetInfo,
    TargetName, WriterLease,
};
use blockd::admin::{
    AdminErrorKind, AdminReply, AdminRequest, OpenInfo, SnapshotInfo, SnapshotName, VolumeInfo,
};
use blockd::client::{Client, ClientError, ClientOptions, HolderText, Lease, Volume};
use bytes::Bytes;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::timeout;

/// Administrative requests touch no data; one that takes longer would stall an `ls`.
const ADMIN_DEADLINE: Duration = Duration::from_secs(15);
/// What is allocated must be asked of every owner: a `stat` does without while one does not answer.
const ALLOCATED_DEADLINE: Duration = Duration::from_secs(1);

/// How long the lease of a mount outlives its host.
const LEASE_TTL: Duration = Duration::from_secs(15);

/// Reaches the servers of the group.
#[must_use]
pub fn connect(options: ConnectOptions) -> Answer<'static, Arc<dyn Backend>> {
    Box::pin(async move {
        let client_options = ClientOptions {
            io_deadline: options.io_deadline,
            admin_deadline: ADMIN_DEADLINE,
        };
        let client = Client::connect(&options.servers, client_options)
            .await
            .map_err(failed)?;
        Ok(Arc::new(Servers { client }) as Arc<dyn Backend>)
    })
}

struct Servers {
    client: Client,
}

struct OpenVolume {
    volume: Volume,
}

/// The errno for a failure of the client library.
fn failed(error: ClientError) -> BackendError {
    let errno = match &error {
        ClientError::Unreachable { .. } => libc::EIO,
        ClientError::Io { reason, .. } => reason.errno(),
        ClientError::Leased(_) => libc::EBUSY,
        ClientError::Fenced { .. } => libc::EPERM,
        ClientError::Refused(refused) => match refused.kind {
            AdminErrorKind::NotFound => libc::ENOENT,
            AdminErrorKind::Invalid => libc::EINVAL,
            AdminErrorKind::Exists => libc::EEXIST,
            AdminErrorKind::Conflict => libc::EBUSY,
            AdminErrorKind::Forbidden => libc::EACCES,
            AdminErrorKind::Unavailable | AdminErrorKind::Internal => libc::EIO,
        },
    };
    BackendError::new(errno, error.to_string())
}

fn unexpected(what: &str) -> BackendError {
    BackendError::new(
        libc::EPROTO,
        format!("{what}: the server gave an answer to another question"),
    )
}

fn volume_info(volume: &VolumeInfo) -> TargetInfo {
    TargetInfo {
        name: TargetName {
            volume: volume.name.clone(),
            snapshot: None,
        },
        volume_id: volume.id,
        snapshot_id: None,
        size_bytes: volume.size_bytes,
        epoch: volume.epoch,
        allocated_bytes: volume.allocated_bytes,
        created_unix_s: volume.created_unix_s,
    }
}

/// What an open tells of `name`, which is not how much of it is allocated.
fn open_info(name: &TargetName, open: &OpenInfo) -> TargetInfo {
    TargetInfo {
        name: name.clone(),
        snapshot_id: open.snapshot,
        size_bytes: open.size_bytes,
        allocated_bytes: None,
        ..volume_info(&open.volume)
    }
}

fn snapshot_info(snapshot: SnapshotInfo, volume: &VolumeInfo) -> TargetInfo {
    TargetInfo {
        name: TargetName {
            volume: snapshot.volume,
            snapshot: Some(snapshot.name),
        },
        volume_id: volume.id,
        snapshot_id: Some(snapshot.id),
        size_bytes: snapshot.size_bytes,
        epoch: volume.epoch,
        allocated_bytes: snapshot.referenced_bytes,
        created_unix_s: snapshot.created_unix_ms / 1000,
    }
}

impl Servers {
    async fn admin(&self, request: AdminRequest) -> Result<AdminReply, BackendError> {
        self.client.admin(request).await.map_err(failed)
    }

    async fn volumes(&self) -> Result<Vec<VolumeInfo>, BackendError> {
        match self.admin(AdminRequest::VolumeList).await? {
            AdminReply::Volumes(volumes) => Ok(volumes),
            _ => Err(unexpected("volume list")),
        }
    }

    /// Of a volume; of a snapshot only a list of all of them tells.
    async fn allocated_bytes(&self, name: &TargetName) -> Option<u64> {
        if name.snapshot.is_some() {
            return None;
        }
        let request = AdminRequest::VolumeShow {
            name: name.volume.clone(),
        };
        match timeout(ALLOCATED_DEADLINE, self.admin(request)).await {
            Ok(Ok(AdminReply::Volume(volume))) => volume.allocated_bytes,
            _ => None,
        }
    }

    /// A snapshot whose volume was deleted between the two requests is left out.
    async fn snapshots(&self) -> Result<Vec<TargetInfo>, BackendError> {
        let AdminReply::Snapshots(snapshots) = self
            .admin(AdminRequest::SnapshotList { volume: None })
            .await?
        else {
            return Err(unexpected("snapshot list"));
        };
        let volumes = self.volumes().await?;
        let by_name: HashMap<_, _> = volumes
            .iter()
            .map(|volume| (volume.name.as_str(), volume))
            .collect();
        let info = |snapshot: SnapshotInfo| {
            let volume = by_name.get(snapshot.volume.as_str())?;
            Some(snapshot_info(snapshot, volume))
        };
        Ok(snapshots.into_iter().filter_map(info).collect())
    }
}

impl Backend for Servers {
    fn list(&self, listing: Listing) -> Answer<'_, Vec<TargetInfo>> {
        Box::pin(async move {
            match listing {
                Listing::Volumes => Ok(self.volumes().await?.iter().map(volume_info).collect()),
                Listing::Snapshots => self.snapshots().await,
            }
        })
    }

    fn find<'a>(&'a self, name: &'a TargetName) -> Answer<'a, TargetInfo> {
        Box::pin(async move {
            let request = AdminRequest::Open {
                volume: name.volume.clone(),
                snapshot: name.snapshot.clone(),
            };
            match self.admin(request).await? {
                AdminReply::Open(open) => Ok(TargetInfo {
                    allocated_bytes: self.allocated_bytes(name).await,
                    ..open_info(name, &open)
                }),
                _ => Err(unexpected("open")),
            }
        })
    }

    fn open<'a>(&'a self, name: &'a TargetName) -> Answer<'a, Arc<dyn OpenTarget>> {
        Box::pin(async move {
            let volume = self.client.open(&name.to_string()).await.map_err(failed)?;
            Ok(Arc::new(OpenVolume { volume }) as Arc<dyn OpenTarget>)
        })
    }

    fn grow<'a>(&'a self, volume: &'a str, size_bytes: u64) -> Answer<'a, ()> {
        Box::pin(async move {
            let name = volume.to_owned();
            let allow_shrink = false;
            let request = AdminRequest::VolumeResize {
                name,
                size_bytes,
                allow_shrink,
            };
            self.admin(request).await.map(|_| ())
        })
    }

    fn snapshot<'a>(&'a self, name: &'a TargetName) -> Answer<'a, ()> {
        Box::pin(async move {
            let target = SnapshotName {
                volume: name.volume.clone(),
                snapshot: name.snapshot.clone().unwrap_or_default(),
            };
            let targets = vec![target];
            let request = AdminRequest::SnapshotCreate { targets };
            self.admin(request).await.map(|_| ())
        })
    }

    fn space(&self) -> Answer<'_, Space> {
        Box::pin(async move {
            let AdminReply::Nodes(nodes) = self.admin(AdminRequest::NodeList).await? else {
                return Err(unexpected("node list"));
            };
            Ok(Space {
                allocated_bytes: nodes.iter().filter_map(|node| node.allocated_bytes).sum(),
                free_bytes: nodes.iter().filter_map(|node| node.free_bytes).sum(),
            })
        })
    }
}

impl OpenTarget for OpenVolume {
    fn size_bytes(&self) -> u64 {
        self.volume.size_bytes()
    }

    fn is_read_only(&self) -> bool {
        self.volume.is_read_only()
    }

    fn read(&self, offset_bytes: u64, len_bytes: u32) -> Answer<'_, Bytes> {
        Box::pin(async move {
            self.volume
                .read(offset_bytes, len_bytes)
                .await
                .map_err(failed)
        })
    }

    fn write(&self, offset_bytes: u64, data: Bytes) -> Answer<'_, ()> {
        Box::pin(async move { self.volume.write(offset_bytes, data).await.map_err(failed) })
    }

    fn zero(&self, offset_bytes: u64, len_bytes: u64, keep_allocated: bool) -> Answer<'_, ()> {
        Box::pin(async move {
            let zeroed = self
                .volume
                .zero(offset_bytes, len_bytes, keep_allocated)
                .await;
            zeroed.map_err(failed)
        })
    }

    fn flush(&self) -> Answer<'_, ()> {
        Box::pin(async move { self.volume.flush().await.map_err(failed) })
    }

    fn extents(&self, offset_bytes: u64, len_bytes: u64) -> Answer<'_, Vec<Extent>> {
        Box::pin(async move {
            let extents = self
                .volume
                .extents(offset_bytes, len_bytes)
                .await
                .map_err(failed)?;
            let own = |extent: blockd::client::Extent| Extent {
                len_bytes: extent.len_bytes,
                hole: extent.hole,
            };
            Ok(extents.into_iter().map(own).collect())
        })
    }

    fn refresh(&self) -> Answer<'_, ()> {
        Box::pin(async move { self.volume.refresh().await.map_err(failed) })
    }

    fn acquire(&self, purpose: &str, wait: Duration) -> Answer<'_, Box<dyn WriterLease>> {
        let holder = HolderText::this_process(purpose);
        Box::pin(async move {
            let lease = self.volume.wait_exclusive(holder, LEASE_TTL, wait).await;
            let lease = Held(lease.map_err(failed)?);
            Ok(Box::new(lease) as Box<dyn WriterLease>)
        })
    }
}

struct Held(Lease);

impl WriterLease for Held {
    fn lost(&self) -> Pin<Box<dyn Future<Output = String> + Send + '_>> {
        Box::pin(self.0.lost())
    }

    fn release(self: Box<Self>) -> Answer<'static, ()> {
        Box::pin(async move { self.0.release().await.map_err(failed) })
    }
}
