//! kill -9 of a registry server: what it acknowledged is there when it starts again.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use blockd::control::registry::{Key, NodeRecord, Object, Outcome, Transaction, UniqueId};
use blockd::id::NodeNo;
use blockd::node::registry::{RaftTransport, Registry, RegistryOptions};
use futures_util::FutureExt;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

const DIRECTORY: &str = "BLOCKD_TEST_REGISTRY_DIRECTORY";

async fn open(dir: &Path) -> Registry {
    let nobody: RaftTransport =
        Arc::new(|_, _| async { Err(std::io::ErrorKind::ConnectionRefused.into()) }.boxed());
    let address = "alone:1".to_owned();
    let options = RegistryOptions {
        entries_per_snapshot: 30,
        ..RegistryOptions::default()
    };
    let registry = Registry::open(dir, NodeNo(1), address, nobody, options)
        .await
        .unwrap();
    registry.initialize().await.unwrap();
    registry
}

fn put(number: u16) -> Transaction {
    let record = NodeRecord {
        number: NodeNo(number),
        name: format!("n{number}"),
        unique_id: UniqueId(u128::from(number)),
        peer_address: String::new(),
        nbd_address: String::new(),
        registry_server: false,
        site: String::new(),
    };
    Transaction::new().put(Key::Node(NodeNo(number)), Object::Node(record))
}

/// Not a test by itself: the process that the other test kills.
#[tokio::test]
async fn child_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(DIRECTORY) else {
        return;
    };
    let registry = open(Path::new(&dir)).await;
    let first = registry.barrier().await.unwrap().revision().0;
    for number in u16::try_from(first).unwrap() + 1.. {
        let outcome = registry.propose(put(number)).await.unwrap();
        assert!(matches!(outcome, Outcome::Committed(_)));
        // The test harness captures println.
        writeln!(std::io::stderr(), "acknowledged {number}").unwrap();
    }
}

fn run_and_kill(dir: &Path, acknowledgements: usize) -> u16 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child_writes_until_it_is_killed", "--nocapture"])
        .env(DIRECTORY, dir)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stderr.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let mut numbers = lines.filter_map(|l| l.strip_prefix("acknowledged ")?.parse::<u16>().ok());
    let reached = numbers.nth(acknowledgements - 1);
    child.kill().unwrap();
    child.wait().unwrap();
    numbers
        .last()
        .or(reached)
        .expect("the child acknowledged too little")
}

#[tokio::test]
async fn what_was_acknowledged_survives_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    for round in 0..4 {
        let path = dir.path().to_owned();
        let last = tokio::task::spawn_blocking(move || run_and_kill(&path, 17 + 8 * round));
        let last = last.await.unwrap();
        let registry = open(dir.path()).await;
        let state = registry.barrier().await.unwrap();
        let missing = (1..=last).find(|n| state.node(NodeNo(*n)).is_none());
        assert_eq!(missing, None, "round {round}: {last} were acknowledged");
        registry.shutdown().await;
    }
}
