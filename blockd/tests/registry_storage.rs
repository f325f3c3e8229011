//! openraft's own storage suite on the redb log and state machine, and the file's identity checks.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use blockd::id::NodeNo;
use blockd::io::raft::{LogStore, StateMachine, Store, StoreError, TypeConfig};
use openraft::testing::{StoreBuilder, Suite};
use openraft::{AnyError, StorageError, StorageIOError};
use redb::ReadableDatabase;
use std::sync::Arc;
use tempfile::TempDir;

struct Builder;

impl StoreBuilder<TypeConfig, LogStore, StateMachine, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateMachine), StorageError<u64>> {
        let failed = |e: String| StorageIOError::write(AnyError::error(e));
        let dir = tempfile::tempdir().map_err(|e| failed(e.to_string()))?;
        let store = Store::open(&dir.path().join("registry.redb"), NodeNo(1));
        let store = store.map_err(|e| failed(e.to_string()))?;
        let machine = StateMachine::open(Arc::clone(&store)).map_err(|e| failed(e.to_string()))?;
        Ok((dir, LogStore::new(store), machine.0))
    }
}

#[test]
fn the_storage_suite_of_openraft_passes() {
    Suite::test_all(Builder).unwrap();
}

const META: redb::TableDefinition<'_, &str, &[u8]> = redb::TableDefinition::new("meta");

#[test]
fn a_file_of_another_node_or_a_newer_format_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.redb");
    Store::open(&path, NodeNo(1)).unwrap().close();
    let other = Store::open(&path, NodeNo(2)).err().unwrap();
    assert!(
        matches!(
            other,
            StoreError::OtherNode {
                found: NodeNo(1),
                wanted: NodeNo(2)
            }
        ),
        "{other}"
    );
    for (format, newer) in [(2_u32, true), (u32::MAX, true), (0, false)] {
        set_field(&path, "format", &format.to_le_bytes());
        let error = Store::open(&path, NodeNo(1)).err().unwrap();
        assert_eq!(
            matches!(error, StoreError::Newer(found) if found == format),
            newer,
            "{error}"
        );
    }
    set_field(&path, "format", b"x");
    let error = Store::open(&path, NodeNo(1)).err().unwrap();
    assert!(matches!(error, StoreError::NoField("format")), "{error}");
}

#[test]
fn a_newer_or_damaged_snapshot_is_refused_with_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.redb");
    Store::open(&path, NodeNo(1)).unwrap().close();
    for (bytes, expected) in [([9_u8, 0, 0], "version 9"), ([1, 255, 255], "damaged")] {
        set_field(&path, "snapshot_meta", &bytes);
        set_field(&path, "snapshot", &bytes);
        let store = Store::open(&path, NodeNo(1)).unwrap();
        let error = StateMachine::open(Arc::clone(&store))
            .err()
            .unwrap()
            .to_string();
        assert!(
            error.contains("snapshot_meta") && error.contains(expected),
            "{error}"
        );
        store.close();
    }
}

#[test]
fn garbage_is_no_registry_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.redb");
    std::fs::write(&path, vec![0xa5_u8; 70_000]).unwrap();
    assert!(Store::open(&path, NodeNo(1)).is_err());
}

fn set_field(path: &std::path::Path, key: &str, value: &[u8]) {
    let database = redb::Database::open(path).unwrap();
    let transaction = database.begin_write().unwrap();
    transaction
        .open_table(META)
        .unwrap()
        .insert(key, value)
        .unwrap();
    transaction.commit().unwrap();
    let read = database.begin_read().unwrap();
    assert_eq!(
        read.open_table(META)
            .unwrap()
            .get(key)
            .unwrap()
            .unwrap()
            .value(),
        value
    );
}
