//! The registry's file while no server uses it: looked at, or made anew from a state.
//!
//! redb repairs a file that was not closed when it opens it, so what is looked at is a copy.

use super::store::{LOG, META, Store, StoreError, bytes_of, value_of};
use super::{TypeConfig, raft_id};
use crate::control::registry::{Machine, RegistryState};
use crate::id::{NodeNo, Revision};
use openraft::{
    BasicNode, CommittedLeaderId, Entry, LogId, Membership, SnapshotMeta, StoredMembership, Vote,
};
use redb::{Database, ReadableDatabase, ReadableTable};
use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// What a sound file holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileSummary {
    /// Revision of the snapshot in the file; later changes are in the log.
    pub snapshot_revision: Revision,
    pub log_entries: u64,
}

/// Looks at a copy of a file: every checksum, every value. It is changed by that.
///
/// # Errors
/// What is wrong, in words.
pub fn check_copy(path: &Path, me: NodeNo) -> Result<FileSummary, String> {
    let checked = catch_unwind(AssertUnwindSafe(|| check_values(path, me)));
    let panicked = |_| Err("it is damaged in a way that its reader does not survive".to_owned());
    checked.unwrap_or_else(panicked)
}

fn check_values(path: &Path, me: NodeNo) -> Result<FileSummary, String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let mut database = Database::open(path).map_err(|e| words(&e))?;
    match database.check_integrity() {
        Ok(true) => {}
        Ok(false) => return Err("a checksum in it does not match".to_owned()),
        Err(error) => return Err(error.to_string()),
    }
    let snapshot_revision = check_meta(&database, me).map_err(|e| words(&e))?;
    let log_entries = check_log(&database).map_err(|e| words(&e))?;
    Ok(FileSummary {
        snapshot_revision,
        log_entries,
    })
}

fn check_meta(database: &Database, me: NodeNo) -> Result<Revision, StoreError> {
    let transaction = database.begin_read()?;
    let table = transaction.open_table(META)?;
    let bytes = |key: &str| -> Result<_, StoreError> {
        Ok(table.get(key)?.map(|value| value.value().to_vec()))
    };
    let format = bytes("format")?.and_then(|bytes| bytes.try_into().ok());
    match format.map(u32::from_le_bytes) {
        Some(1) => {}
        Some(newer) if newer > 1 => return Err(StoreError::Newer(newer)),
        _ => return Err(StoreError::NoField("format")),
    }
    let node = bytes("node")?.and_then(|bytes| bytes.try_into().ok());
    let found = NodeNo(u16::from_le_bytes(node.ok_or(StoreError::NoField("node"))?));
    if found != me {
        return Err(StoreError::OtherNode { found, wanted: me });
    }
    if let Some(vote) = bytes("vote")? {
        value_of::<Vote<u64>>("vote", &vote)?;
    }
    if let Some(meta) = bytes("snapshot_meta")? {
        value_of::<SnapshotMeta<u64, BasicNode>>("snapshot_meta", &meta)?;
    }
    let snapshot = bytes("snapshot")?;
    let machine = snapshot.map(|bytes| value_of::<Machine>("snapshot", &bytes));
    Ok(machine
        .transpose()?
        .map_or(Revision(0), |machine| machine.state().revision()))
}

/// Every entry decodes, and none is missing in between.
fn check_log(database: &Database) -> Result<u64, StoreError> {
    let transaction = database.begin_read()?;
    let table = transaction.open_table(LOG)?;
    let (mut count, mut next) = (0, None);
    for item in table.iter()? {
        let (index, value) = item?;
        let index = index.value();
        let key = format!("log entry {index}");
        value_of::<Entry<TypeConfig>>(&key, value.value())?;
        if next.is_some_and(|next| next != index) {
            return Err(StoreError::Redb(format!(
                "log entry {} is missing",
                index - 1
            )));
        }
        (count, next) = (count + 1, Some(index + 1));
    }
    Ok(count)
}

/// Makes the file of node `me` for a group that begins with `state`. The files of all voters, made
/// with the same arguments, are those of one group: it is as if they all had installed the same
/// snapshot, and they elect a leader among themselves.
///
/// # Errors
/// The file cannot be written, or exists.
pub fn seed(
    path: &Path,
    me: NodeNo,
    state: RegistryState,
    voters: &BTreeMap<NodeNo, String>,
) -> Result<(), StoreError> {
    if path.exists() {
        let text = format!("{} exists already", path.display());
        return Err(StoreError::Redb(text));
    }
    // Behind every index that a log of the state's revisions can have had; node 0 is nobody's.
    let last = LogId::new(CommittedLeaderId::new(1, 0), state.revision().0.max(1));
    let node = |(number, address): (&NodeNo, &String)| (raft_id(*number), BasicNode::new(address));
    let nodes: BTreeMap<u64, BasicNode> = voters.iter().map(node).collect();
    let ids: BTreeSet<u64> = nodes.keys().copied().collect();
    let meta = SnapshotMeta {
        last_log_id: Some(last),
        last_membership: StoredMembership::new(Some(last), Membership::new(vec![ids], nodes)),
        snapshot_id: last.to_string(),
    };
    let store = Store::open(path, me)?;
    let values = [
        ("snapshot_meta", bytes_of("snapshot_meta", &meta)?),
        ("snapshot", bytes_of("snapshot", &Machine::restored(state))?),
        ("purged", bytes_of("purged", &last)?),
        ("vote", bytes_of("vote", &Vote::<u64>::new(1, 0))?),
    ];
    store.write(|transaction| {
        let mut table = transaction.open_table(META)?;
        for (key, bytes) in &values {
            table.insert(*key, bytes.as_slice())?;
        }
        Ok(())
    })?;
    store.close();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seeded() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.redb");
        let state = RegistryState::restored(Revision(7), BTreeMap::new());
        let voters = BTreeMap::from([(NodeNo(2), "127.0.0.1:1".to_owned())]);
        seed(&path, NodeNo(2), state.clone(), &voters).unwrap();
        assert!(
            seed(&path, NodeNo(2), state, &voters).is_err(),
            "never over another"
        );
        (dir, path)
    }

    #[test]
    fn a_seeded_file_is_sound_and_of_its_node() {
        let (_dir, path) = seeded();
        let summary = check_copy(&path, NodeNo(2)).unwrap();
        assert_eq!(summary.snapshot_revision, Revision(7));
        let other = check_copy(&path, NodeNo(3)).unwrap_err();
        assert!(other.contains("belongs to node 2"), "{other}");
    }

    /// A byte of each part of the file in turn: an answer, no panic; what is in use is found.
    #[test]
    fn damage_gives_an_answer() {
        let (dir, path) = seeded();
        let whole = std::fs::read(&path).unwrap();
        let mut found = 0;
        for at in (0..whole.len()).step_by(whole.len() / 97) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x40;
            let copy = dir.path().join("copy");
            std::fs::write(&copy, &bytes[..whole.len() - at % 3 * 512]).unwrap();
            found += u32::from(check_copy(&copy, NodeNo(2)).is_err());
        }
        assert!(found > 0);
        std::fs::write(&path, b"").unwrap();
        assert!(check_copy(&path, NodeNo(2)).is_err());
    }
}
