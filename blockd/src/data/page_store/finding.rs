//! What a check found: where, what follows from it, and what to do.

use crate::id::{PageNo, SnapshotId, VolumeId};
use serde::{Deserialize, Serialize};

/// Findings that a report lists; further ones are counted only, so that a ruined disk costs no
/// unbounded memory.
const LISTED_MAX: usize = 1000;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing is lost and nothing has to be done: what a crash leaves behind looks the same.
    Note,
    /// Something is lost, or the server will not start.
    Damage,
}

/// Where in a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Place {
    pub volume: VolumeId,
    pub page: Option<PageNo>,
    /// Chunk of 64 KiB in the page.
    pub chunk: Option<u16>,
}

impl Place {
    #[must_use]
    pub fn volume(volume: VolumeId) -> Place {
        Place {
            volume,
            ..Place::default()
        }
    }
}

/// One thing that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub severity: Severity,
    pub what: String,
    /// Path below the directory that was checked.
    pub file: String,
    pub offset_bytes: Option<u64>,
    pub place: Option<Place>,
    pub consequence: String,
    pub action: String,
}

impl Finding {
    #[must_use]
    pub fn damage(file: &str, what: impl Into<String>) -> Finding {
        Finding {
            severity: Severity::Damage,
            what: what.into(),
            file: file.to_owned(),
            offset_bytes: None,
            place: None,
            consequence: String::new(),
            action: String::new(),
        }
    }

    #[must_use]
    pub fn note(file: &str, what: impl Into<String>) -> Finding {
        Finding {
            severity: Severity::Note,
            ..Finding::damage(file, what)
        }
    }

    #[must_use]
    pub fn offset(mut self, bytes: u64) -> Finding {
        self.offset_bytes = Some(bytes);
        self
    }

    #[must_use]
    pub fn place(mut self, place: Place) -> Finding {
        self.place = Some(place);
        self
    }

    /// What follows from it, and what to do about it.
    #[must_use]
    pub fn so(mut self, consequence: impl Into<String>, action: impl Into<String>) -> Finding {
        (self.consequence, self.action) = (consequence.into(), action.into());
        self
    }
}

/// A bounded list of findings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    pub listed: Vec<Finding>,
    /// Damage that is not listed any more.
    pub unlisted: u64,
}

impl Findings {
    pub fn add(&mut self, finding: Finding) {
        if self.listed.len() < LISTED_MAX {
            self.listed.push(finding);
        } else if finding.severity == Severity::Damage {
            self.unlisted += 1;
        }
    }

    /// Things that are damaged, listed or not.
    #[must_use]
    pub fn damage_count(&self) -> u64 {
        let damage = |finding: &&Finding| finding.severity == Severity::Damage;
        self.listed.iter().filter(damage).count() as u64 + self.unlisted
    }
}

/// Stored bytes that do not have their checksum, or cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DamagedRange {
    pub volume: VolumeId,
    pub page: PageNo,
    /// In the page.
    pub offset_bytes: u32,
    pub len_bytes: u32,
    /// Whether the volume itself shows it.
    pub head: bool,
    /// Snapshots that show it.
    pub snapshots: Vec<SnapshotId>,
    /// File of the store, and the place in it.
    pub file: String,
    pub file_offset_bytes: u64,
}

impl DamagedRange {
    /// Whether the other range goes on where this one ends, and is seen by the same views.
    #[must_use]
    pub fn goes_on_in(&self, next: &DamagedRange) -> bool {
        let same = |r: &DamagedRange| (r.volume, r.page, r.head, r.snapshots.clone());
        same(self) == same(next)
            && self.offset_bytes + self.len_bytes == next.offset_bytes
            && self.file == next.file
            && self.file_offset_bytes + u64::from(self.len_bytes) == next.file_offset_bytes
    }

    /// The views that show it, for people.
    #[must_use]
    pub fn views(&self) -> String {
        let snapshots = self.snapshots.iter().map(|id| format!("snapshot {id}"));
        let views: Vec<String> = self
            .head
            .then(|| "the volume itself".to_owned())
            .into_iter()
            .chain(snapshots)
            .collect();
        match views.is_empty() {
            true => "nobody".to_owned(),
            false => views.join(", "),
        }
    }
}
