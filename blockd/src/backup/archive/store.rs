//! The place of an archive: a directory or a prefix of an S3 bucket.

use super::manifest::{Manifest, Part, sha256};
use crate::backup::error::BackupError;
use crate::id::SnapshotId;
use bytes::Bytes;
use futures_util::stream::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{Error, ObjectStore, ObjectStoreExt};
use std::sync::Arc;

/// Bytes of an object that are read at all: a manifest of 64 TiB full of data has 130 MB.
const OBJECT_BYTES_MAX: u64 = 1 << 30;

/// An archive that may be read and added to.
pub struct ArchiveStore {
    store: Arc<dyn ObjectStore>,
    prefix: String,
    url: String,
}

impl ArchiveStore {
    /// `file:///DIR` or `s3://BUCKET/PREFIX`; of S3 the environment gives credentials, region and
    /// endpoint (`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`,
    /// `AWS_ALLOW_HTTP`, ...). `make`: a directory that is not there is made.
    ///
    /// # Errors
    /// The URL is none of these, or the directory is not there.
    pub fn open(url: &str, make: bool) -> Result<Self, BackupError> {
        if let Some(dir) = url
            .strip_prefix("file://")
            .filter(|dir| dir.starts_with('/'))
        {
            return Self::directory(url, dir, make);
        }
        let place = url.strip_prefix("s3://");
        match place.map(|place| place.split_once('/').unwrap_or((place, ""))) {
            Some((bucket, prefix)) if !bucket.is_empty() => Self::bucket(url, bucket, prefix),
            _ => BackupError::refused(format!(
                "{url:?} is no place of an archive: write file:///DIR or s3://BUCKET/PREFIX"
            )),
        }
    }

    fn directory(url: &str, dir: &str, make: bool) -> Result<Self, BackupError> {
        if make {
            std::fs::create_dir_all(dir).map_err(|source| BackupError::Io {
                what: "making the directory of the archive",
                source,
            })?;
        }
        let store = LocalFileSystem::new_with_prefix(dir).map_err(|error| failed(url, &error))?;
        Ok(Self {
            store: Arc::new(store.with_fsync(true)),
            prefix: String::new(),
            url: url.to_owned(),
        })
    }

    fn bucket(url: &str, bucket: &str, prefix: &str) -> Result<Self, BackupError> {
        // A second call finds the first one's provider: no failure.
        let _installed = rustls::crypto::ring::default_provider().install_default();
        let store = AmazonS3Builder::from_env().with_bucket_name(bucket).build();
        Ok(Self {
            store: Arc::new(store.map_err(|error| failed(url, &error))?),
            prefix: prefix.trim_matches('/').to_owned(),
            url: url.to_owned(),
        })
    }

    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    fn path(&self, name: &str) -> Path {
        Path::from(format!("{}/{name}", self.prefix))
    }

    pub(super) async fn put(&self, name: &str, object: Bytes) -> Result<(), BackupError> {
        let put = self.store.put(&self.path(name), object.into()).await;
        put.map(drop).map_err(|error| failed(&self.url, &error))
    }

    async fn get(&self, name: &str) -> Result<Bytes, BackupError> {
        let damaged = |why: &str| {
            let text = format!("object {name} of archive {} {why}", self.url);
            BackupError::Damaged(text)
        };
        let found = match self.store.get(&self.path(name)).await {
            Err(Error::NotFound { .. }) => return Err(damaged("is missing")),
            found => found.map_err(|error| failed(&self.url, &error))?,
        };
        if found.meta.size > OBJECT_BYTES_MAX {
            return Err(damaged("is larger than any that an archive has"));
        }
        let bytes = found.bytes().await;
        bytes.map_err(|error| failed(&self.url, &error))
    }

    /// A part whose bytes are those that the manifest vouches for.
    pub(super) async fn part(&self, dir: &str, part: &Part) -> Result<Bytes, BackupError> {
        let name = part.path(dir);
        let object = self.get(&name).await?;
        if object.len() as u64 == part.len_bytes && sha256(&object) == part.sha256 {
            return Ok(object);
        }
        Err(BackupError::Damaged(format!(
            "object {name} of archive {} is damaged: its SHA-256 is another",
            self.url
        )))
    }

    /// Names and sizes of the objects in a directory below the archive, sorted.
    async fn list(&self, dir: &str) -> Result<Vec<(String, u64)>, BackupError> {
        let dir = self.path(dir);
        let listed = self.store.list(Some(&dir)).try_collect::<Vec<_>>().await;
        let listed = listed.map_err(|error| failed(&self.url, &error))?;
        let name = |path: &Path| path.filename().unwrap_or_default().to_owned();
        let mut names: Vec<_> = listed
            .iter()
            .map(|meta| (name(&meta.location), meta.size))
            .collect();
        names.sort();
        Ok(names)
    }

    /// The parts that are there, without those that overlap an earlier one.
    pub(super) async fn parts(&self, dir: &str) -> Result<Vec<Part>, BackupError> {
        let listed = self.list(dir).await?;
        let mut parts: Vec<Part> = Vec::new();
        for part in listed
            .iter()
            .filter_map(|(name, size)| Part::parse(name, *size))
        {
            if parts.last().is_none_or(|last| last.end <= part.start) {
                parts.push(part);
            }
        }
        Ok(parts)
    }

    /// The archived snapshots, oldest first.
    ///
    /// # Errors
    /// The store.
    pub async fn snapshots(&self) -> Result<Vec<(SnapshotId, String)>, BackupError> {
        let listed = self.list("manifests").await?;
        let snapshot = |(name, _): &(String, u64)| {
            let (id, name) = name.split_once('-')?;
            Some((SnapshotId(id.parse().ok()?), name.to_owned()))
        };
        Ok(listed.iter().filter_map(snapshot).collect())
    }

    /// The manifest of an archived snapshot.
    ///
    /// # Errors
    /// It is missing or damaged, or the store.
    pub async fn manifest(&self, id: SnapshotId, name: &str) -> Result<Manifest, BackupError> {
        let object = manifest_name(id, name);
        let bytes = self.get(&object).await?;
        let manifest = Manifest::decode(&bytes).map_err(|error| error.to_string());
        let manifest = manifest.and_then(|found| {
            match (found.snapshot_id, found.snapshot.as_str()) == (id, name) {
                true => Ok(found),
                false => Err("it is that of another snapshot".to_owned()),
            }
        });
        manifest.map_err(|why| {
            BackupError::Damaged(format!(
                "object {object} of archive {} is no manifest: {why}",
                self.url
            ))
        })
    }

    pub(super) async fn put_manifest(&self, manifest: &Manifest) -> Result<(), BackupError> {
        let object = manifest.encode().map_err(|error| BackupError::Io {
            what: "encoding the manifest",
            source: std::io::Error::other(error),
        })?;
        let name = manifest_name(manifest.snapshot_id, &manifest.snapshot);
        self.put(&name, object).await
    }
}

/// Sorted by id.
fn manifest_name(id: SnapshotId, name: &str) -> String {
    format!("manifests/{:010}-{name}", id.0)
}

fn failed(url: &str, error: &Error) -> BackupError {
    let mut text = format!("archive {url}: {error}");
    let mut source = std::error::Error::source(error);
    while let Some(reason) = source {
        let reason_text = reason.to_string();
        if !text.contains(&reason_text) {
            text = format!("{text}: {reason_text}");
        }
        source = reason.source();
    }
    BackupError::Archive(text)
}
