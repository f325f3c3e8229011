//! A snapshot from an archive to a new volume.

use super::manifest::{Manifest, Part};
use super::store::ArchiveStore;
use super::{PARTS_IN_FLIGHT, SnapshotKey};
use crate::admin::{AdminRequest, VolumeCreate};
use crate::backup::error::BackupError;
use crate::backup::import::{ChangesInOrder, delete_again, take_snapshot};
use crate::backup::rbd::{Reader, Record, StreamError};
use crate::client::{Client, Volume};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use std::pin::pin;

/// What a restore has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    pub snapshot: String,
    pub size_bytes: u64,
    /// Archived snapshots that went into it, and the bytes read of them.
    pub snapshots: u64,
    pub read_bytes: u64,
}

/// Makes the volume `name` of the newest archived snapshot, or of `at`, and takes the snapshot of it
/// anew. `progress` gets bytes of the archive: done, and in all.
///
/// # Errors
/// Something of the archive is missing or damaged, named in the error; the servers. The volume is
/// deleted again.
pub async fn restore(
    client: &Client,
    store: &ArchiveStore,
    name: &str,
    at: Option<&str>,
    progress: impl Fn(u64, u64),
) -> Result<Restored, BackupError> {
    let chain = chain(store, at).await?;
    let Some(last) = chain.last() else {
        return BackupError::refused(format!("archive {} has no snapshots", store.url()));
    };
    let largest = chain.iter().map(|manifest| manifest.size_bytes).max();
    let create = AdminRequest::VolumeCreate(VolumeCreate {
        name: name.to_owned(),
        size_bytes: largest.unwrap_or(last.size_bytes),
        servers: Vec::new(),
        page_blocks: last.page_blocks,
        format: last.format.clone(),
    });
    client.admin(create).await?;
    match fill(client, store, name, &chain, last, progress).await {
        Ok(restored) => Ok(restored),
        Err(error) => Err(BackupError::Partly {
            source: Box::new(error),
            aftermath: delete_again(client, name).await,
        }),
    }
}

/// The snapshot and those on which it rests, the oldest first.
pub(super) async fn chain(
    store: &ArchiveStore,
    at: Option<&str>,
) -> Result<Vec<Manifest>, BackupError> {
    let known = store.snapshots().await?;
    let wanted = match at {
        None => known.last(),
        Some(at) => known.iter().rev().find(|(_, name)| name == at),
    };
    let mut next: Option<SnapshotKey> = match (wanted, at) {
        (Some(found), _) => Some(found.clone()),
        (None, None) => None,
        (None, Some(at)) => {
            let text = format!("archive {} has no snapshot {at}", store.url());
            return BackupError::refused(text);
        }
    };
    let mut chain = Vec::new();
    while let Some((id, name)) = next {
        let manifest = store.manifest(id, &name).await?;
        // Ids fall along the chain, so it ends.
        next = manifest.from.clone();
        chain.push(manifest);
    }
    chain.reverse();
    Ok(chain)
}

async fn fill(
    client: &Client,
    store: &ArchiveStore,
    name: &str,
    chain: &[Manifest],
    last: &Manifest,
    progress: impl Fn(u64, u64),
) -> Result<Restored, BackupError> {
    let volume = client.open(name).await?;
    let total = chain.iter().map(Manifest::stored_bytes).sum();
    let mut read_bytes = 0;
    for manifest in chain {
        // What the size has cut off reads as zeros if the volume grows again.
        let behind = volume.size_bytes() - manifest.size_bytes;
        if read_bytes > 0 && behind > 0 {
            volume.zero(manifest.size_bytes, behind, false).await?;
        }
        apply(&volume, store, manifest, |bytes| {
            read_bytes += bytes;
            progress(read_bytes, total);
        })
        .await?;
    }
    if volume.size_bytes() != last.size_bytes {
        let resize = AdminRequest::VolumeResize {
            name: name.to_owned(),
            size_bytes: last.size_bytes,
            allow_shrink: true,
        };
        client.admin(resize).await?;
    }
    volume.flush().await?;
    take_snapshot(client, name, &last.snapshot).await?;
    Ok(Restored {
        snapshot: last.snapshot.clone(),
        size_bytes: last.size_bytes,
        snapshots: chain.len() as u64,
        read_bytes,
    })
}

async fn apply(
    volume: &Volume,
    store: &ArchiveStore,
    manifest: &Manifest,
    mut progress: impl FnMut(u64),
) -> Result<(), BackupError> {
    let dir = manifest.dir();
    let fetched = stream::iter(&manifest.parts).map(|part| {
        let dir = &dir;
        async move { Ok::<_, BackupError>((part, store.part(dir, part).await?)) }
    });
    let mut fetched = pin!(fetched.buffered(PARTS_IN_FLIGHT));
    let mut changes = ChangesInOrder::new(volume);
    while let Some((part, object)) = fetched.try_next().await? {
        for change in changes_of(part, &object).map_err(|error| part_failed(&dir, part, &error))? {
            match change {
                (offset, Ok(data)) => changes.data(offset, data, 0).await?,
                (offset, Err(len)) => changes.zero(offset, len, 0).await?,
            }
        }
        progress(part.len_bytes);
    }
    Ok(changes.finish().await?)
}

pub(super) fn part_failed(dir: &str, part: &Part, error: &StreamError) -> BackupError {
    BackupError::Damaged(format!(
        "object {} of the archive is damaged: {error}",
        part.path(dir)
    ))
}

/// Offsets, each with its data or with the length of its zeros.
type PartChanges = Vec<(u64, Result<Bytes, u64>)>;

/// What a part changes; all of it lies in the part's range.
pub(super) fn changes_of(part: &Part, object: &Bytes) -> Result<PartChanges, StreamError> {
    let (mut reader, _) = Reader::open(&object[..])?;
    let mut changes = Vec::new();
    loop {
        match reader.record()? {
            Record::End => return Ok(changes),
            Record::Zero {
                offset_bytes,
                len_bytes,
            } => {
                reader.check_between(part.start, part.end, offset_bytes, len_bytes)?;
                changes.push((offset_bytes, Err(len_bytes)));
            }
            Record::Data {
                offset_bytes,
                len_bytes,
            } => {
                reader.check_between(part.start, part.end, offset_bytes, len_bytes)?;
                let mut at = offset_bytes;
                while let Some(data) = reader.data()? {
                    let next = at + data.len() as u64;
                    changes.push((at, Ok(data)));
                    at = next;
                }
            }
        }
    }
}
