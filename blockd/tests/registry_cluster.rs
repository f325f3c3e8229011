//! Three registry servers in one process over a network in memory: forwarding, loss of the leader,
//! partition, lost answers, snapshots to a server that lags, restart of all.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use blockd::control::registry::{
    Key, NodeRecord, Object, Outcome, RegistryState, Transaction, UniqueId, change,
};
use blockd::id::{NodeNo, Revision, VolumeId};
use blockd::node::registry::{
    Phase, RaftTransport, Registry, RegistryError, RegistryOptions, UpdateError,
};
use futures_util::FutureExt;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);

fn options() -> RegistryOptions {
    RegistryOptions {
        heartbeat: Duration::from_millis(100),
        election_min: Duration::from_millis(500),
        election_max: Duration::from_millis(1000),
        deadline: Duration::from_secs(10),
        entries_per_snapshot: 1000,
    }
}

#[derive(Default)]
struct Net {
    up: Mutex<BTreeMap<String, Registry>>,
    cut: Mutex<BTreeSet<String>>,
    /// How many of the next answers to requests of this server are lost.
    lose_answers: Mutex<Option<(String, u32)>>,
    lost: AtomicU32,
}

impl Net {
    fn reach(&self, from: &str, to: &str) -> Option<Registry> {
        let cut = self.cut.lock().unwrap();
        let blocked = cut.contains(from) || cut.contains(to);
        (!blocked)
            .then(|| self.up.lock().unwrap().get(to).cloned())
            .flatten()
    }

    fn loses(&self, from: &str) -> bool {
        let mut lose = self.lose_answers.lock().unwrap();
        let Some((_, left)) = lose.as_mut().filter(|(who, left)| who == from && *left > 0) else {
            return false;
        };
        *left -= 1;
        self.lost.fetch_add(1, Ordering::SeqCst);
        true
    }
}

fn transport(net: &Arc<Net>, from: NodeNo) -> RaftTransport {
    let (net, from) = (Arc::clone(net), address(from));
    Arc::new(move |to, bytes| {
        let (net, from) = (Arc::clone(&net), from.clone());
        async move {
            let refused = || io::Error::from(io::ErrorKind::ConnectionRefused);
            let peer = net.reach(&from, &to).ok_or_else(refused)?;
            let answer = peer.handle_rpc(bytes).await;
            if net.loses(&from) || net.reach(&from, &to).is_none() {
                return Err(io::Error::from(io::ErrorKind::ConnectionReset));
            }
            Ok(answer)
        }
        .boxed()
    })
}

fn address(node: NodeNo) -> String {
    format!("node{node}:1")
}

struct Cluster {
    net: Arc<Net>,
    dirs: Vec<TempDir>,
    nodes: BTreeMap<NodeNo, Registry>,
    options: RegistryOptions,
}

impl Cluster {
    /// Servers 1 to `size`; server 1 makes the group, the others ask it to let them in.
    async fn new(size: u16, options: RegistryOptions) -> Self {
        let dirs = (0..size).map(|_| tempfile::tempdir().unwrap()).collect();
        let mut cluster = Self {
            net: Arc::default(),
            dirs,
            nodes: BTreeMap::new(),
            options,
        };
        for node in (1..=size).map(NodeNo) {
            cluster.start(node).await;
        }
        cluster.at(1).initialize().await.unwrap();
        for node in (2..=size).map(NodeNo) {
            cluster.at(1).add_voter(node, address(node)).await.unwrap();
        }
        cluster.wait_writable().await;
        cluster
    }

    async fn start(&mut self, node: NodeNo) {
        let dir = self.dirs[usize::from(node.0) - 1].path();
        let transport = transport(&self.net, node);
        let opened = Registry::open(dir, node, address(node), transport, self.options.clone());
        let registry = opened.await.unwrap();
        self.net
            .up
            .lock()
            .unwrap()
            .insert(address(node), registry.clone());
        self.nodes.insert(node, registry);
    }

    async fn stop(&mut self, node: NodeNo) {
        self.net.up.lock().unwrap().remove(&address(node));
        self.nodes.remove(&node).unwrap().shutdown().await;
    }

    fn at(&self, node: u16) -> &Registry {
        &self.nodes[&NodeNo(node)]
    }

    fn cut(&self, node: NodeNo) {
        self.net.cut.lock().unwrap().insert(address(node));
    }

    fn heal(&self) {
        self.net.cut.lock().unwrap().clear();
    }

    /// Every running server that is not cut off names the same leader.
    async fn wait_writable(&self) -> NodeNo {
        let mut leader = NodeNo(0);
        for (node, registry) in &self.nodes {
            if !self.net.cut.lock().unwrap().contains(&address(*node)) {
                let status = registry
                    .wait_status(PATIENCE, |s| s.phase == Phase::Writable)
                    .await;
                leader = status.unwrap().leader.unwrap();
            }
        }
        leader
    }

    async fn follower(&self) -> NodeNo {
        let leader = self.wait_writable().await;
        *self.nodes.keys().find(|node| **node != leader).unwrap()
    }

    async fn wait_everywhere(&self, revision: Revision) {
        for registry in self.nodes.values() {
            let mut watch = registry.watch();
            let seen = watch.wait_for(|state| state.revision() >= revision);
            tokio::time::timeout(PATIENCE, seen).await.unwrap().unwrap();
        }
        let states: Vec<_> = self.nodes.values().map(Registry::state).collect();
        assert!(
            states.windows(2).all(|pair| pair[0] == pair[1]),
            "servers differ"
        );
    }
}

fn define() -> Transaction {
    change::define_cluster(&RegistryState::default(), "c1", UniqueId(7)).unwrap()
}

fn node_record(number: u16, name: &str) -> (Key, Object) {
    let record = NodeRecord {
        number: NodeNo(number),
        name: name.to_owned(),
        unique_id: UniqueId(u128::from(number)),
        peer_address: address(NodeNo(number)),
        nbd_address: String::new(),
        registry_server: true,
        site: "a".to_owned(),
    };
    (Key::Node(NodeNo(number)), Object::Node(record))
}

/// Creates the node record `number`; a second execution would be a conflict.
fn create(number: u16) -> Transaction {
    let (key, object) = node_record(number, &format!("n{number}"));
    Transaction::new()
        .expect(key.clone(), Revision(0))
        .put(key, object)
}

async fn committed(registry: &Registry, transaction: Transaction) -> Revision {
    match registry.propose(transaction).await.unwrap() {
        Outcome::Committed(revision) => revision,
        conflict => panic!("{conflict:?}"),
    }
}

#[tokio::test]
async fn one_server_commits_conflicts_and_keeps_it_over_a_restart() {
    let mut cluster = Cluster::new(1, options()).await;
    assert_eq!(committed(cluster.at(1), define()).await, Revision(1));
    let again = cluster.at(1).propose(define()).await.unwrap();
    assert_eq!(
        again,
        Outcome::Conflict {
            key: Key::Cluster,
            found: Revision(1)
        }
    );
    let before = cluster.at(1).barrier().await.unwrap();
    assert_eq!(before.cluster().unwrap().name, "c1");
    cluster.at(1).initialize().await.unwrap();
    cluster.stop(NodeNo(1)).await;
    cluster.start(NodeNo(1)).await;
    assert_eq!(cluster.at(1).barrier().await.unwrap(), before);
    let status = cluster.at(1).status();
    assert_eq!(
        (status.leader, status.voters),
        (Some(NodeNo(1)), vec![NodeNo(1)])
    );
}

#[tokio::test]
async fn every_server_forwards_and_reads_what_was_answered_elsewhere() {
    let cluster = Cluster::new(3, options()).await;
    assert_eq!(
        cluster.at(2).status().voters,
        [NodeNo(1), NodeNo(2), NodeNo(3)]
    );
    committed(cluster.at(2), define()).await;
    for number in 1..=12 {
        let (writer, reader) = (number % 3 + 1, (number + 1) % 3 + 1);
        let revision = committed(cluster.at(writer), create(number)).await;
        assert!(
            cluster.at(writer).state().revision() >= revision,
            "own writes are read"
        );
        let state = cluster.at(reader).barrier().await.unwrap();
        assert!(
            state.node(NodeNo(number)).is_some(),
            "node {number} is missing at {reader}"
        );
    }
    let conflict = cluster.at(3).propose(create(1)).await.unwrap();
    assert!(matches!(
        conflict,
        Outcome::Conflict {
            key: Key::Node(NodeNo(1)),
            ..
        }
    ));
    cluster
        .at(3)
        .add_voter(NodeNo(2), address(NodeNo(2)))
        .await
        .unwrap();
    cluster.wait_everywhere(Revision(13)).await;
}

#[tokio::test]
async fn updates_of_one_object_from_all_servers_all_count() {
    const EACH: u64 = 8;
    let cluster = Cluster::new(3, options()).await;
    committed(cluster.at(1), define()).await;
    let bump = |registry: Registry| async move {
        for _ in 0..EACH {
            let bumped = registry.update(|state| {
                let mut record = state.cluster().ok_or("no cluster")?.clone();
                record.next_volume = VolumeId(record.next_volume.0 + 1);
                let transaction = Transaction::new()
                    .expect(Key::Cluster, state.revision_of(&Key::Cluster))
                    .put(Key::Cluster, Object::Cluster(record));
                Ok::<_, &str>((transaction, ()))
            });
            bumped.await.unwrap();
        }
    };
    let nodes = cluster.nodes.values().cloned();
    futures_util::future::join_all(nodes.map(bump)).await;
    let state = cluster.at(1).barrier().await.unwrap();
    assert_eq!(state.cluster().unwrap().next_volume, VolumeId(1 + 3 * EACH));
    let refused = cluster
        .at(2)
        .update(|_| Err::<(Transaction, ()), _>("no"))
        .await;
    assert!(matches!(refused, Err(UpdateError::Refused("no"))));
}

#[tokio::test]
async fn the_loss_of_the_leader_is_survived_and_it_catches_up() {
    let mut cluster = Cluster::new(3, options()).await;
    committed(cluster.at(1), define()).await;
    let old = cluster.wait_writable().await;
    cluster.stop(old).await;
    let other = *cluster.nodes.keys().next().unwrap();
    let revision = committed(cluster.at(other.0), create(1)).await;
    assert_ne!(cluster.wait_writable().await, old);
    cluster.start(old).await;
    cluster.wait_everywhere(revision).await;
    committed(cluster.at(old.0), create(2)).await;
}

#[tokio::test]
async fn a_leader_that_is_cut_off_neither_writes_nor_confirms() {
    let mut cluster = Cluster::new(3, options()).await;
    committed(cluster.at(1), define()).await;
    let alone = cluster.wait_writable().await;
    cluster.cut(alone);
    let cut_off = cluster.at(alone.0).clone();
    let lost = tokio::spawn({
        let cut_off = cut_off.clone();
        async move { cut_off.propose(create(1)).await }
    });
    let readable = cut_off
        .wait_status(PATIENCE, |s| s.phase == Phase::Readable)
        .await
        .unwrap();
    assert_eq!(readable.leader, None);
    assert!(matches!(
        cut_off.barrier().await,
        Err(RegistryError::NoLeader(_))
    ));
    assert!(matches!(
        lost.await.unwrap(),
        Err(RegistryError::UnknownOutcome(_))
    ));
    assert!(cut_off.state().cluster().is_some(), "phase 1 is readable");

    let other = *cluster.nodes.keys().find(|node| **node != alone).unwrap();
    let revision = committed(cluster.at(other.0), create(2)).await;
    cluster.heal();
    cluster.wait_everywhere(revision).await;
    let state = cut_off.barrier().await.unwrap();
    assert!(state.node(NodeNo(1)).is_none() && state.node(NodeNo(2)).is_some());
    cluster.stop(alone).await;
}

#[tokio::test]
async fn a_proposal_whose_answer_is_lost_is_executed_once() {
    let cluster = Cluster::new(3, options()).await;
    committed(cluster.at(1), define()).await;
    let follower = cluster.follower().await;
    // A follower sends nothing but proposals and reads.
    *cluster.net.lose_answers.lock().unwrap() = Some((address(follower), 2));
    let outcome = cluster.at(follower.0).propose(create(1)).await.unwrap();
    assert!(
        matches!(outcome, Outcome::Committed(_)),
        "executed twice: {outcome:?}"
    );
    assert_eq!(cluster.net.lost.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_server_that_lags_behind_the_log_gets_a_snapshot() {
    let few = RegistryOptions {
        entries_per_snapshot: 20,
        ..options()
    };
    let mut cluster = Cluster::new(3, few).await;
    committed(cluster.at(1), define()).await;
    let behind = cluster.follower().await;
    cluster.stop(behind).await;
    let writer = *cluster.nodes.keys().next().unwrap();
    let mut revision = Revision(0);
    for number in 1..=120 {
        revision = committed(cluster.at(writer.0), create(number)).await;
    }
    cluster.start(behind).await;
    cluster.wait_everywhere(revision).await;
    cluster.stop(behind).await;
    cluster.start(behind).await;
    assert!(
        cluster.at(behind.0).state().revision() > Revision(20),
        "the snapshot is on disk"
    );
    cluster.wait_everywhere(revision).await;
}

#[tokio::test]
async fn all_servers_restart_with_what_was_committed() {
    let mut cluster = Cluster::new(3, options()).await;
    committed(cluster.at(1), define()).await;
    let revision = committed(cluster.at(2), create(1)).await;
    for node in [1, 2, 3].map(NodeNo) {
        cluster.stop(node).await;
    }
    for node in [1, 2, 3].map(NodeNo) {
        cluster.start(node).await;
    }
    let state = cluster.at(3).barrier().await.unwrap();
    assert_eq!(state.revision(), revision);
    committed(cluster.at(1), create(2)).await;
}

#[tokio::test]
async fn a_server_alone_says_that_it_has_no_leader() {
    let quick = RegistryOptions {
        deadline: Duration::from_millis(300),
        ..options()
    };
    let dir = tempfile::tempdir().unwrap();
    let transport = transport(&Arc::default(), NodeNo(2));
    let registry = Registry::open(dir.path(), NodeNo(2), address(NodeNo(2)), transport, quick);
    let registry = registry.await.unwrap();
    assert!(matches!(
        registry.propose(define()).await,
        Err(RegistryError::NoLeader(_))
    ));
    assert!(matches!(
        registry.barrier().await,
        Err(RegistryError::NoLeader(_))
    ));
    assert_eq!(registry.status().phase, Phase::Readable);
    let (key, _) = node_record(1, "x");
    let bad = Transaction::new()
        .put(Key::Cluster, node_record(1, "x").1)
        .remove(key);
    assert!(matches!(
        registry.propose(bad).await,
        Err(RegistryError::Refused(_))
    ));
    registry.shutdown().await;
    assert!(matches!(
        registry.propose(define()).await,
        Err(RegistryError::Stopped(_))
    ));
}

#[tokio::test]
async fn garbage_gets_an_answer_and_changes_nothing() {
    let cluster = Cluster::new(1, options()).await;
    let revision = committed(cluster.at(1), define()).await;
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for length in 0..400_usize {
        let mut message = vec![0_u8; length];
        for byte in &mut message {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = u8::try_from(seed >> 56).unwrap();
        }
        if length % 2 == 0 && length > 1 {
            // A good version, but the message is for node 99, whatever follows.
            message[..2].copy_from_slice(&[1, 99]);
        }
        assert!(!cluster.at(1).handle_rpc(message).await.is_empty());
    }
    let huge = vec![1_u8; blockd::limits::REGISTRY_MESSAGE_BYTES_MAX + 1];
    assert!(!cluster.at(1).handle_rpc(huge).await.is_empty());
    assert_eq!(cluster.at(1).barrier().await.unwrap().revision(), revision);
}
