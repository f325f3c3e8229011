//! Archives: snapshots of one volume as objects in a directory or an S3 bucket (S003-31, S003-17).
//!
//! ```text
//! PREFIX/manifests/ID-NAME                               one for each archived snapshot, written last
//! PREFIX/data/CLUSTER-VOLUME/ID-FROM/START-END-SHA256    a part of it
//! ```
//!
//! A part is an RBD diff (v1, see `super::rbd`) of the bytes START to END of the volume, against the
//! snapshot FROM or, with `full`, against nothing; so it can be read without blockd. What a part is
//! and covers stands in its name: an archive that was broken off goes on behind what is there. Only a
//! manifest says which parts belong to a snapshot, so there is never half of one.

mod manifest;
mod restore;
mod store;
mod verify;

pub use manifest::Manifest;
use manifest::Part;
pub use restore::{Restored, restore};
pub use store::ArchiveStore;
pub use verify::{Verified, verify};

use super::diff::Changes;
use super::error::BackupError;
use super::export::{Piece, read_changes, since};
use super::rbd::{DiffFormat, Head, Record, encode_head, encode_record};
use crate::admin::{AdminReply, AdminRequest, SnapshotInfo};
use crate::client::{Client, Since, Volume};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::{FuturesUnordered, StreamExt, TryStreamExt};
use std::ops::Range;
use std::pin::pin;

/// Bytes of a part that is begun no further. So much times [`PARTS_IN_FLIGHT`] is in memory.
const PART_BYTES: usize = 16 << 20;
/// Parts that are sent or fetched at once.
const PARTS_IN_FLIGHT: usize = 4;

/// What an archive run has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Archived {
    pub manifest: Manifest,
    /// Parts and bytes sent by this run; the others were there.
    pub sent_parts: u64,
    pub sent_bytes: u64,
}

/// Archives the snapshot `volume`: what changed since `from`, or since the newest older snapshot that
/// both the archive and the volume have, or all of it. `progress` gets the bytes of the volume that
/// are done.
///
/// # Errors
/// The archive is of another volume or has not `from`; the servers; the store. A new run goes on.
pub async fn archive(
    client: &Client,
    volume: &Volume,
    from: Option<&str>,
    store: &ArchiveStore,
    progress: impl Fn(u64),
) -> Result<Archived, BackupError> {
    let known = store.snapshots().await?;
    let snapshots = snapshots_of(client, volume).await?;
    let mut manifest = begin(client, volume, &snapshots)?;
    if let Some((id, name)) = known.last() {
        check_owner(&store.manifest(*id, name).await?, &manifest, store)?;
    }
    if known.contains(&(manifest.snapshot_id, manifest.snapshot.clone())) {
        let (id, name) = (manifest.snapshot_id, &manifest.snapshot);
        return Ok(Archived {
            manifest: store.manifest(id, name).await?,
            sent_parts: 0,
            sent_bytes: 0,
        });
    }
    manifest.from = choose_base(from, &known, &snapshots, &manifest)?;
    let base = manifest.from.as_ref().map(|(_, name)| name.as_str());
    let since = since(volume, base).await?;
    let mut sending = Sending {
        store,
        dir: manifest.dir(),
        running: FuturesUnordered::new(),
        parts: store.parts(&manifest.dir()).await?,
        sent_parts: 0,
        sent_bytes: 0,
    };
    for gap in gaps(&sending.parts, manifest.size_bytes) {
        send_gap(volume, since, gap, &mut sending, &progress).await?;
    }
    sending.finish().await?;
    manifest.parts = sending.parts;
    manifest.parts.sort_by_key(|part| part.start);
    store.put_manifest(&manifest).await?;
    Ok(Archived {
        manifest,
        sent_parts: sending.sent_parts,
        sent_bytes: sending.sent_bytes,
    })
}

async fn snapshots_of(client: &Client, volume: &Volume) -> Result<Vec<SnapshotInfo>, BackupError> {
    let name = volume.info().volume.name;
    let list = AdminRequest::SnapshotList { volume: Some(name) };
    match client.admin(list).await? {
        AdminReply::Snapshots(snapshots) => Ok(snapshots),
        _ => BackupError::refused("the servers did not list the snapshots".to_owned()),
    }
}

/// What is known of the snapshot before its parts.
fn begin(
    client: &Client,
    volume: &Volume,
    snapshots: &[SnapshotInfo],
) -> Result<Manifest, BackupError> {
    let info = volume.info();
    let found = snapshots.iter().find(|s| Some(s.id) == info.snapshot);
    let (Some(snapshot), Some(cluster)) = (found, client.cluster_id()) else {
        return BackupError::refused(format!("{} is no snapshot", volume.name()));
    };
    Ok(Manifest {
        cluster,
        volume_id: info.volume.id,
        volume: info.volume.name,
        snapshot: snapshot.name.clone(),
        snapshot_id: snapshot.id,
        from: None,
        size_bytes: info.size_bytes,
        page_blocks: info.volume.page_blocks,
        format: info.volume.format,
        created_unix_ms: snapshot.created_unix_ms,
        parts: Vec::new(),
    })
}

/// An archive is of one volume.
fn check_owner(
    there: &Manifest,
    wanted: &Manifest,
    store: &ArchiveStore,
) -> Result<(), BackupError> {
    if (&there.cluster, there.volume_id) == (&wanted.cluster, wanted.volume_id) {
        return Ok(());
    }
    BackupError::refused(format!(
        "{} is the archive of volume {} ({} of cluster {}): give {} another place",
        store.url(),
        there.volume,
        there.volume_id,
        there.cluster,
        wanted.volume
    ))
}

type SnapshotKey = (crate::id::SnapshotId, String);

fn choose_base(
    from: Option<&str>,
    archived: &[SnapshotKey],
    snapshots: &[SnapshotInfo],
    manifest: &Manifest,
) -> Result<Option<SnapshotKey>, BackupError> {
    let in_both = archived.iter().rev().filter(|(id, _)| {
        let there = snapshots.iter().any(|snapshot| snapshot.id == *id);
        there && *id < manifest.snapshot_id
    });
    let mut in_both = in_both.cloned();
    let Some(from) = from else {
        return Ok(in_both.next());
    };
    match in_both.find(|(_, name)| name == from) {
        Some(base) => Ok(Some(base)),
        None => BackupError::refused(format!(
            "{from} is not an older snapshot that both the volume and the archive have: archive it \
             first, or leave --from out"
        )),
    }
}

/// The ranges of the volume that no part covers.
fn gaps(parts: &[Part], size_bytes: u64) -> Vec<Range<u64>> {
    let mut at = 0;
    let mut gaps = Vec::new();
    for part in parts {
        gaps.push(at..part.start);
        at = part.end;
    }
    gaps.push(at..size_bytes);
    gaps.retain(|gap| gap.start < gap.end);
    gaps
}

/// Parts on their way to the store.
struct Sending<'a> {
    store: &'a ArchiveStore,
    dir: String,
    running: FuturesUnordered<BoxFuture<'a, Result<Part, BackupError>>>,
    /// Those that are there.
    parts: Vec<Part>,
    sent_parts: u64,
    sent_bytes: u64,
}

impl Sending<'_> {
    async fn send(&mut self, part: Building, end: u64) -> Result<(), BackupError> {
        while self.running.len() >= PARTS_IN_FLIGHT {
            self.one_is_there().await?;
        }
        let (start, object) = part.finish();
        let sent = Part::of(start..end, &object);
        let (store, name) = (self.store, sent.path(&self.dir));
        self.running.push(Box::pin(async move {
            store.put(&name, object).await?;
            Ok(sent)
        }));
        Ok(())
    }

    async fn one_is_there(&mut self) -> Result<bool, BackupError> {
        let Some(part) = self.running.next().await else {
            return Ok(false);
        };
        let part = part?;
        self.sent_parts += 1;
        self.sent_bytes += part.len_bytes;
        self.parts.push(part);
        Ok(true)
    }

    async fn finish(&mut self) -> Result<(), BackupError> {
        while self.one_is_there().await? {}
        Ok(())
    }
}

/// A part whose stream is being written.
struct Building {
    start: u64,
    stream: Vec<u8>,
    empty: bool,
}

impl Building {
    fn begin(start: u64, size_bytes: u64) -> Self {
        let head = Head {
            size_bytes: Some(size_bytes),
            ..Head::default()
        };
        Self {
            start,
            stream: encode_head(DiffFormat::V1, &head),
            empty: true,
        }
    }

    fn add(&mut self, piece: Piece) {
        self.empty = false;
        for bytes in piece.encode(DiffFormat::V1) {
            self.stream.extend_from_slice(&bytes);
        }
    }

    fn finish(mut self) -> (u64, Bytes) {
        self.stream
            .extend(encode_record(DiffFormat::V1, Record::End));
        (self.start, Bytes::from(self.stream))
    }
}

async fn send_gap(
    volume: &Volume,
    since: Option<Since>,
    gap: Range<u64>,
    sending: &mut Sending<'_>,
    progress: &impl Fn(u64),
) -> Result<(), BackupError> {
    let changes = Changes::between(volume, since, gap.start, gap.end);
    let mut reads = pin!(read_changes(volume, changes));
    let mut part = Building::begin(gap.start, volume.size_bytes());
    while let Some(piece) = reads.try_next().await? {
        let end = piece.end();
        part.add(piece);
        if part.stream.len() >= PART_BYTES {
            let next = Building::begin(end, volume.size_bytes());
            sending
                .send(std::mem::replace(&mut part, next), end)
                .await?;
        }
        progress(end);
    }
    if !part.empty {
        sending.send(part, gap.end).await?;
    }
    progress(gap.end);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_goes_on_in_the_gaps() {
        let part = |range: Range<u64>| Part::of(range, &Bytes::new());
        let gaps = |parts: &[Part]| -> Vec<(u64, u64)> {
            let gaps = gaps(parts, 10).into_iter();
            gaps.map(|gap| (gap.start, gap.end)).collect()
        };
        assert_eq!(gaps(&[]), [(0, 10)]);
        assert_eq!(gaps(&[part(0..4), part(4..6)]), [(6, 10)]);
        assert_eq!(gaps(&[part(2..4), part(8..10)]), [(0, 2), (4, 8)]);
        assert!(gaps(&[part(0..10)]).is_empty());
    }
}
