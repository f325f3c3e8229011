//! `blockd check`: the files of a state directory that no server uses, against themselves and each
//! other. Nothing is opened for writing.

use super::facts;
use super::identity::Identity;
use super::lease_file::LeaseFile;
use crate::data::page_store::{
    CheckOptions, CheckProgress, Finding, Findings, StoreImage, StoreSummary, check_store,
};
use crate::id::NodeNo;
use crate::io::disk::FileDisk;
use crate::io::raft::offline::check_copy;
use crate::io::state_dir::Directory;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Why nothing could be checked.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error("cannot open {path}: {source}")]
    Open { path: PathBuf, source: io::Error },
    #[error("{path} is in use: stop the server that uses it first")]
    InUse { path: PathBuf },
}

/// What was found in a state directory.
pub struct StateCheck {
    pub findings: Findings,
    pub store: StoreSummary,
    /// What the store holds, if a server would start on it.
    pub(crate) image: Option<StoreImage>,
    pub(crate) identity: Option<Identity>,
    /// Keeps the store from being used while this lives.
    pub(crate) disk: Option<FileDisk>,
}

/// Checks a state directory.
///
/// # Errors
/// [`CheckError`], if it cannot be looked at; damage is no error.
pub fn check_state(
    state: &Path,
    options: CheckOptions,
    progress: &mut dyn FnMut(CheckProgress),
) -> Result<StateCheck, CheckError> {
    let open_error = |source| CheckError::Open {
        path: state.to_owned(),
        source,
    };
    fs::read_dir(state).map_err(open_error)?;
    let mut check = StateCheck {
        findings: Findings::default(),
        store: StoreSummary::default(),
        image: None,
        identity: None,
        disk: None,
    };
    check.store_files(state, options, progress)?;
    check.identity_file(state);
    check.claims(state);
    check.leases(state);
    check.registry(state);
    check.facts(state);
    Ok(check)
}

impl StateCheck {
    fn damage(&mut self, file: &str, what: impl Into<String>, consequence: &str, action: &str) {
        self.findings
            .add(Finding::damage(file, what).so(consequence, action));
    }

    fn note(&mut self, file: &str, what: impl Into<String>, consequence: &str) {
        self.findings
            .add(Finding::note(file, what).so(consequence, "nothing"));
    }

    fn store_files(
        &mut self,
        state: &Path,
        options: CheckOptions,
        progress: &mut dyn FnMut(CheckProgress),
    ) -> Result<(), CheckError> {
        let path = state.join("store");
        let disk = match FileDisk::open_read_only(&path) {
            Ok(disk) => disk,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(CheckError::InUse { path });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.missing_files(&path, &error);
                return Ok(());
            }
            Err(source) => return Err(CheckError::Open { path, source }),
        };
        let outcome = check_store(&disk, options, progress);
        outcome
            .findings
            .listed
            .into_iter()
            .for_each(|f| self.findings.add(f));
        self.findings.unlisted += outcome.findings.unlisted;
        (self.store, self.image) = (outcome.summary, outcome.image);
        self.disk = Some(disk);
        Ok(())
    }

    fn missing_files(&mut self, path: &Path, error: &io::Error) {
        let is_used = fs::read_dir(path).is_ok_and(|mut files| files.next().is_some());
        match is_used {
            false => self.note("store", "there is no store", "none: the next start makes one"),
            true => self.damage(
                "store",
                error.to_string(),
                "the server makes the file anew, and refuses to start or serves nothing of what it held",
                "put the file back from a copy of this server's store",
            ),
        }
    }

    fn identity_file(&mut self, state: &Path) {
        match Identity::read(&Directory(state.to_owned())) {
            Ok(Some(identity)) => self.identity = Some(identity),
            Ok(None) if self.image.is_none() => {
                self.note(
                    "node",
                    "the server has no identity",
                    "none: the next start makes one",
                );
            }
            Ok(None) => self.damage(
                "node",
                "the identity is missing",
                "the server takes a new one, and refuses the store as another server's",
                "restore the file from a copy; it has no data",
            ),
            Err(error) => self.damage(
                "node",
                error.to_string(),
                "the server does not start",
                "restore the file from a copy; it has no data",
            ),
        }
    }

    fn claims(&mut self, state: &Path) {
        let Some(identity) = self.identity.clone() else {
            return;
        };
        self.claim(state, "store", &format!("server {}", identity.unique_id));
        if let Some(cluster) = &identity.cluster {
            self.claim(state, "registry", &format!("cluster {}", cluster.id));
        }
    }

    fn claim(&mut self, state: &Path, directory: &str, owner: &str) {
        let file = format!("{directory}/belongs-to");
        let text = match fs::read(state.join(&file)) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).trim().to_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(error) => error.to_string(),
        };
        if text != owner {
            let found: String = text.chars().take(64).collect();
            self.damage(
                &file,
                format!("it belongs to {found:?}, not to {owner}"),
                "the server does not start: it would serve what is another one's",
                "put this server's own directory back",
            );
        }
    }

    fn leases(&mut self, state: &Path) {
        if let Err(error) = LeaseFile::open(&Directory(state.to_owned())) {
            self.damage(
                "leases",
                error.to_string(),
                "the server does not start: it may let a fenced writer write",
                "restore the file from a copy; if there is none, and no attachment of before runs any more, delete it",
            );
        }
    }

    fn registry(&mut self, state: &Path) {
        let member = self
            .identity
            .as_ref()
            .and_then(|identity| identity.cluster.as_ref());
        let Some(number) = member.map(|member| member.number) else {
            return;
        };
        let file = "registry/registry.redb";
        if !state.join(file).exists() {
            return self.damage(
                file,
                "the registry of this server is missing",
                "the server serves nothing until it is given one again",
                "if a majority of the other servers has theirs, start this one and define it again; else see `blockd recover`",
            );
        }
        if let Err(reason) = check_registry(&state.join(file), number) {
            self.damage(
                file,
                reason,
                "the server does not start, or starts with a registry that is wrong",
                "move the directory `registry` away; if a majority of the other servers has theirs, start this one and define it again, else see `blockd recover`",
            );
        }
    }

    fn facts(&mut self, state: &Path) {
        let member = self
            .identity
            .as_ref()
            .and_then(|identity| identity.cluster.clone());
        let consequence = "`blockd recover` would not know names and sizes from this server";
        match facts::read(&Directory(state.to_owned())) {
            Err(error) => self.damage(
                "facts",
                error.to_string(),
                consequence,
                "nothing: a running server writes it anew",
            ),
            Ok(None) if member.is_some() => {
                self.note("facts", "there are no facts yet", consequence);
            }
            Ok(Some(facts)) if member.is_some_and(|member| member.id != facts.head.cluster_id) => {
                self.damage(
                    "facts",
                    format!("they are of another cluster, {}", facts.head.cluster_id),
                    consequence,
                    "nothing: a running server writes them anew",
                )
            }
            Ok(_) => {}
        }
    }
}

/// Looks at a copy of the registry's file, as its reader may repair it.
fn check_registry(path: &Path, number: NodeNo) -> Result<(), String> {
    let copied = || -> io::Result<tempfile::TempDir> {
        let directory = tempfile::Builder::new().prefix("blockd-check").tempdir()?;
        fs::copy(path, directory.path().join("registry.redb"))?;
        Ok(directory)
    };
    let directory = copied().map_err(|error| format!("it cannot be copied to be read: {error}"))?;
    check_copy(&directory.path().join("registry.redb"), number).map(drop)
}
