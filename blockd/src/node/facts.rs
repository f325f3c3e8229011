//! The facts of the registry beside the store: `STATE/facts`, from which `blockd recover` rebuilds
//! the registry when all copies of it are lost.
//!
//! ```text
//! line 1   "blockd-facts" SP format version (decimal) SP CRC32 of the rest (8 hex digits) LF
//! line 2   JSON: cluster_name, cluster_id, node, unique_id, revision, written_unix_ms
//! rest     JSON, a line for each object of the registry: revision, key, object
//! ```
//! They are the whole state at one revision, of the objects as they are, so that new kinds of
//! objects are kept without a change here. The file is replaced as a whole, within a second or so of
//! a change and never in the way of a request; it may be older than the registry.

use super::identity::Membership;
use super::text_file::{TextError, TextFormat, failed};
use crate::control::recovery::{Facts, FactsHead, StoredObject};
use crate::control::registry::{Key, Object, RegistryState};
use crate::id::Revision;
use crate::io::host::unix_ms;
use crate::io::state_dir::StateDir;
use crate::limits::FACTS_DELAY_MS;
use serde::Serialize;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

pub(crate) const FORMAT: TextFormat = TextFormat {
    magic: "blockd-facts",
    format: 1,
};
/// Part of the time that writing may take, where the file is large.
const WRITE_SHARE: u32 = 20;

/// An object by reference, for writing.
#[derive(Serialize)]
struct Line<'a> {
    revision: Revision,
    key: &'a Key,
    object: &'a Object,
}

/// The file of one state directory.
#[derive(Clone)]
pub(crate) struct FactsFile {
    state: Arc<dyn StateDir>,
    head: FactsHead,
    /// Revision that the file has; found out once.
    kept: Arc<OnceLock<AtomicU64>>,
}

impl FactsFile {
    /// The file that this member writes.
    pub(crate) fn new(state: Arc<dyn StateDir>, unique_id: &str, membership: &Membership) -> Self {
        Self {
            state,
            kept: Arc::default(),
            head: FactsHead {
                cluster_name: membership.name.clone(),
                cluster_id: membership.id.clone(),
                node: membership.number,
                unique_id: unique_id.to_owned(),
                revision: Revision(0),
                written_unix_ms: 0,
            },
        }
    }

    /// Replaces the file unless it has this state or a newer one: at a start the registry may show
    /// an old state first.
    ///
    /// # Errors
    /// [`TextError`].
    pub(crate) fn save(&self, registry: &RegistryState) -> Result<(), TextError> {
        let revision = registry.revision().0;
        let kept = self
            .kept
            .get_or_init(|| AtomicU64::new(self.kept_revision()));
        if registry.cluster().is_none() || revision <= kept.load(Ordering::Relaxed) {
            return Ok(());
        }
        let head = FactsHead {
            revision: registry.revision(),
            written_unix_ms: unix_ms(),
            ..self.head.clone()
        };
        let text = FORMAT.encode(&body(&head, registry));
        let written = self.state.replace("facts", &text);
        written.map_err(failed("write", &self.state.path().join("facts")))?;
        kept.store(revision, Ordering::Relaxed);
        Ok(())
    }

    /// Of the file of this cluster; 0 if there is none.
    fn kept_revision(&self) -> u64 {
        let ours = |facts: &Facts| facts.head.cluster_id == self.head.cluster_id;
        let kept = read(&*self.state).ok().flatten().filter(ours);
        kept.map_or(0, |facts| facts.head.revision.0)
    }

    /// Writes the facts after each change, for ever.
    pub(crate) async fn follow(self, mut states: watch::Receiver<Arc<RegistryState>>) {
        let mut pause = Duration::from_millis(FACTS_DELAY_MS);
        loop {
            sleep(pause).await;
            let (file, state) = (self.clone(), states.borrow_and_update().clone());
            let began = Instant::now();
            match self.state.device().run(move || file.save(&state)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "facts for a recovery are not written"),
                Err(_) => return,
            }
            pause = Duration::from_millis(FACTS_DELAY_MS).max(began.elapsed() * WRITE_SHARE);
            if states.changed().await.is_err() {
                return;
            }
        }
    }
}

fn body(head: &FactsHead, registry: &RegistryState) -> String {
    let mut body = serde_json::to_string(head).unwrap_or_default() + "\n";
    for (key, revision, object) in registry.objects() {
        let line = Line {
            revision,
            key,
            object,
        };
        let _ = writeln!(body, "{}", serde_json::to_string(&line).unwrap_or_default());
    }
    body
}

/// The facts of a state directory; `None` if it has none.
///
/// # Errors
/// [`TextError`].
pub(crate) fn read(state: &dyn StateDir) -> Result<Option<Facts>, TextError> {
    let path = state.path().join("facts");
    let text = state.read("facts").map_err(failed("read", &path))?;
    text.map(|text| parse(&path, FORMAT.decode(&path, &text)?))
        .transpose()
}

/// The facts of a body.
pub(crate) fn parse(path: &Path, body: &str) -> Result<Facts, TextError> {
    let (head, lines) = body.split_once('\n').unwrap_or((body, ""));
    let head = serde_json::from_str(head).map_err(|e| FORMAT.damaged(path, &e.to_string()))?;
    let (mut objects, mut unknown) = (Vec::new(), 0);
    for line in lines.lines() {
        match serde_json::from_str::<StoredObject>(line) {
            Ok(object) => objects.push(object),
            Err(_) => unknown += 1,
        }
    }
    Ok(Facts {
        head,
        objects,
        unknown,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::registry::{ClusterRecord, UniqueId, VolumeRecord};
    use crate::id::{Epoch, NodeNo, RouteRun, SnapshotId, VolumeId};
    use crate::io::state_dir::Directory;
    use std::collections::BTreeMap;

    fn state(revision: u64) -> RegistryState {
        let cluster = ClusterRecord {
            name: "c".to_owned(),
            id: UniqueId(0xf),
            next_volume: VolumeId(4),
        };
        let run = RouteRun {
            first_page: 0,
            page_count: 2,
            owner: NodeNo(1),
        };
        let volume = VolumeRecord {
            id: VolumeId(3),
            name: "v".to_owned(),
            size_bytes: 8 << 20,
            page_blocks: 8192,
            epoch: Epoch(2),
            routes: vec![run],
            format: None,
            created_unix_s: 5,
            next_snapshot: SnapshotId(1),
        };
        let objects = BTreeMap::from([
            (Key::Cluster, Object::Cluster(cluster)),
            (Key::Volume(VolumeId(3)), Object::Volume(volume)),
        ]);
        RegistryState::restored(Revision(revision), objects)
    }

    fn file(dir: &Directory) -> FactsFile {
        let membership = Membership {
            name: "c".to_owned(),
            id: format!("{:032x}", 0xf),
            number: NodeNo(1),
            node_name: "n1".to_owned(),
            address: "127.0.0.1:10808".to_owned(),
            registry_made: true,
        };
        FactsFile::new(Arc::new(dir.clone()), "00ff", &membership)
    }

    #[test]
    fn a_state_is_read_back_and_never_replaced_by_an_older_one() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = Directory(temporary.path().to_owned());
        assert_eq!(read(&dir).unwrap(), None);
        file(&dir).save(&state(7)).unwrap();
        file(&dir).save(&state(6)).unwrap();
        let facts = read(&dir).unwrap().unwrap();
        assert_eq!((facts.head.revision, facts.unknown), (Revision(7), 0));
        let objects: BTreeMap<_, _> = facts
            .objects
            .into_iter()
            .map(|o| (o.key, o.object))
            .collect();
        assert_eq!(RegistryState::restored(Revision(7), objects), state(7));
        let none = RegistryState::default();
        file(&dir).save(&none).unwrap();
        assert_eq!(read(&dir).unwrap().unwrap().head.revision, Revision(7));
    }

    /// The golden file of format 1: later versions must read it.
    #[test]
    fn format_1_is_read_and_written() {
        let golden = include_str!("../../tests/golden/facts-v1.txt");
        let body = FORMAT.decode(Path::new("facts"), golden).unwrap();
        let facts = parse(Path::new("facts"), body).unwrap();
        assert_eq!((facts.objects.len(), facts.unknown), (2, 1));
        assert_eq!(facts.objects[1].key, Key::Volume(VolumeId(3)));
        let written = super::body(&facts.head, &state(7));
        assert!(body.starts_with(&written), "{written}");
    }

    #[test]
    fn newer_and_damaged_files_are_refused_with_the_reason() {
        let path = Path::new("facts");
        let decode = |text: &str| FORMAT.decode(path, text).map(str::to_owned).unwrap_err();
        assert!(matches!(
            decode("blockd-facts 2 0\n"),
            TextError::Newer { found: 2, .. }
        ));
        for text in ["", "x", "blockd-facts 1 00000001\n", "other 1 0\n"] {
            assert!(matches!(decode(text), TextError::Damaged { .. }), "{text}");
        }
        assert!(parse(path, "{}").is_err());
    }
}
