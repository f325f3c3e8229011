//! Whether an archive is whole: every object is there and is what its manifest says.

use super::PARTS_IN_FLIGHT;
use super::manifest::{Manifest, Part};
use super::restore::{changes_of, part_failed};
use super::store::ArchiveStore;
use crate::backup::error::BackupError;
use futures_util::stream::{self, StreamExt};
use std::pin::pin;

/// Problems that are listed; more are counted.
const PROBLEMS_LISTED: usize = 1000;

/// What a verification has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    pub snapshots: u64,
    pub parts: u64,
    pub read_bytes: u64,
    pub problem_count: u64,
    /// The first problems, each naming its object.
    pub problems: Vec<String>,
}

impl Verified {
    fn note(&mut self, error: &BackupError) {
        self.problem_count += 1;
        if self.problems.len() < PROBLEMS_LISTED {
            self.problems.push(error.to_string());
        }
    }
}

/// Reads all of the archive. `progress` gets bytes: read, and in all.
///
/// # Errors
/// The store cannot be read at all; what is missing or damaged is in the result.
pub async fn verify(
    store: &ArchiveStore,
    progress: impl Fn(u64, u64),
) -> Result<Verified, BackupError> {
    let known = store.snapshots().await?;
    let mut verified = Verified::default();
    let mut manifests = Vec::new();
    for (id, name) in &known {
        match store.manifest(*id, name).await {
            Ok(manifest) => manifests.push(manifest),
            Err(error @ BackupError::Damaged(_)) => verified.note(&error),
            Err(error) => return Err(error),
        }
    }
    let total = manifests.iter().map(Manifest::stored_bytes).sum();
    for manifest in &manifests {
        verified.snapshots += 1;
        if let Some((id, name)) = manifest.from.as_ref().filter(|from| !known.contains(from)) {
            let snapshot = &manifest.snapshot;
            verified.note(&BackupError::Damaged(format!(
                "{snapshot} rests on {name} (snapshot {id}), whose manifest is missing"
            )));
        }
        verify_parts(store, manifest, &mut verified, |done| progress(done, total)).await?;
    }
    Ok(verified)
}

async fn verify_parts(
    store: &ArchiveStore,
    manifest: &Manifest,
    verified: &mut Verified,
    progress: impl Fn(u64),
) -> Result<(), BackupError> {
    let dir = manifest.dir();
    let checks = stream::iter(&manifest.parts).map(|part| check(store, &dir, part));
    let mut checks = pin!(checks.buffered(PARTS_IN_FLIGHT));
    while let Some(checked) = checks.next().await {
        verified.parts += 1;
        match checked {
            Ok(bytes) => verified.read_bytes += bytes,
            Err(error @ BackupError::Damaged(_)) => verified.note(&error),
            Err(error) => return Err(error),
        }
        progress(verified.read_bytes);
    }
    Ok(())
}

async fn check(store: &ArchiveStore, dir: &str, part: &Part) -> Result<u64, BackupError> {
    let object = store.part(dir, part).await?;
    changes_of(part, &object).map_err(|error| part_failed(dir, part, &error))?;
    Ok(part.len_bytes)
}
