//! Histories of a small cluster, the facts of its servers at any age, and what a plan makes of them.

use super::*;
use crate::control::registry::change::{
    VolumeSpec, create_volume, define_cluster, define_node, delete_volume, resize_volume,
};
use crate::control::registry::routes::owner;
use crate::control::registry::{LeaseHolder, Outcome, VolumeRecord};
use crate::id::RouteRun;
use proptest::prelude::*;

const NODES: u16 = 3;
const PAGE_BYTES: u64 = 8192 * 512;
const OLD: u128 = 0xc1;

/// The truth: the registry, and what every store has.
struct World {
    registry: RegistryState,
    facts: Vec<Option<Facts>>,
    /// (node, volume, page) to epoch and content.
    pages: BTreeMap<(NodeNo, VolumeId, u32), (Epoch, u32)>,
    leases: Vec<(VolumeId, LeaseEpoch)>,
    content: u32,
    /// Something changed after every copy of the facts.
    facts_are_current: bool,
}

impl World {
    fn new() -> Self {
        let mut world = Self {
            registry: RegistryState::default(),
            facts: vec![None; NODES.into()],
            pages: BTreeMap::new(),
            leases: Vec::new(),
            content: 0,
            facts_are_current: false,
        };
        world.commit(define_cluster(&world.registry, "c", UniqueId(OLD)).unwrap());
        for number in (1..=NODES).map(NodeNo) {
            world.commit(define_node(&world.registry, node_of(&server(number))).unwrap());
        }
        (0..NODES).for_each(|node| world.save_facts(node));
        world
    }

    fn commit(&mut self, transaction: Transaction) {
        let outcome = self.registry.apply(&transaction).unwrap();
        assert!(matches!(outcome, Outcome::Committed(_)));
        self.facts_are_current = false;
    }

    fn save_facts(&mut self, node: u16) {
        let objects = self
            .registry
            .objects()
            .map(|(key, revision, object)| StoredObject {
                revision,
                key: key.clone(),
                object: object.clone(),
            });
        let server = server(NodeNo(node + 1));
        let head = FactsHead {
            cluster_name: server.cluster_name,
            cluster_id: server.cluster_id,
            node: server.node,
            unique_id: server.unique_id,
            revision: self.registry.revision(),
            written_unix_ms: 0,
        };
        let objects = objects.collect();
        self.facts[usize::from(node)] = Some(Facts {
            head,
            objects,
            unknown: 0,
        });
        self.facts_are_current = true;
    }

    fn volume(&self, pick: u8) -> Option<VolumeRecord> {
        let count = self.registry.volumes().count();
        self.registry
            .volumes()
            .nth(usize::from(pick) % count.max(1))
            .cloned()
    }

    fn step(&mut self, (action, pick, page): (u8, u8, u8)) {
        let volume = self.volume(pick);
        match (action % 8, volume) {
            (0, _) if self.registry.volumes().count() < 4 => {
                let spec = VolumeSpec {
                    name: format!("v{}", self.registry.revision()),
                    size_bytes: (1 + u64::from(page) % 5) * PAGE_BYTES,
                    page_blocks: 8192,
                    servers: (1..=NODES).map(NodeNo).collect(),
                    format: None,
                    created_unix_s: 0,
                };
                self.commit(create_volume(&self.registry, &spec).unwrap().0);
            }
            (1, Some(volume)) => {
                let size = (1 + u64::from(page) % 7) * PAGE_BYTES;
                if size > volume.size_bytes {
                    self.pages
                        .retain(|(_, id, n), _| *id != volume.id || *n < volume.page_count());
                }
                let servers: Vec<NodeNo> = (1..=NODES).map(NodeNo).collect();
                self.commit(
                    resize_volume(&self.registry, volume.id, size, &servers)
                        .unwrap()
                        .0,
                );
            }
            (2, Some(volume)) if page % 4 == 0 => {
                self.commit(delete_volume(&self.registry, volume.id).unwrap());
            }
            (3, Some(volume)) => self.move_page(&volume, page),
            (4, _) => self.save_facts(u16::from(page) % NODES),
            (5, Some(volume)) => {
                self.leases.push((volume.id, LeaseEpoch(u32::from(page))));
            }
            (_, Some(volume)) => {
                let page = u32::from(page) % volume.page_count();
                let node = owner(&volume.routes, page).unwrap();
                self.content += 1;
                self.pages
                    .insert((node, volume.id, page), (volume.epoch, self.content));
            }
            _ => {}
        }
    }

    /// As a move does it: the new owner's copy is of the epoch that makes it the owner.
    fn move_page(&mut self, volume: &VolumeRecord, page: u8) {
        let page = u32::from(page) % volume.page_count();
        let from = owner(&volume.routes, page).unwrap();
        let to = NodeNo(from.0 % NODES + 1);
        let mut owners = crate::control::registry::routes::flat(&volume.routes);
        owners[page as usize] = to;
        let routes = owners.iter().zip(0..).map(|(owner, first_page)| RouteRun {
            first_page,
            page_count: 1,
            owner: *owner,
        });
        let epoch = Epoch(volume.epoch.0 + 1);
        let record = VolumeRecord {
            epoch,
            routes: routes.collect(),
            ..volume.clone()
        };
        let key = Key::Volume(volume.id);
        self.commit(Transaction::new().put(key, Object::Volume(record)));
        if let Some((_, content)) = self.pages.remove(&(from, volume.id, page)) {
            self.pages.insert((to, volume.id, page), (epoch, content));
        }
    }

    fn exports(&self) -> Vec<ServerExport> {
        let export = |node: u16| {
            let number = NodeNo(node + 1);
            let mut volumes: BTreeMap<VolumeId, Vec<PageFact>> = BTreeMap::new();
            for ((holder, volume, page), (epoch, digest)) in &self.pages {
                if *holder == number {
                    let fact = (PageNo(*page), *epoch, *digest, 4096).into();
                    volumes.entry(*volume).or_default().push(fact);
                }
            }
            let volumes = volumes.into_iter().map(|(volume, pages)| VolumeFact {
                volume,
                snapshots: Vec::new(),
                pages,
            });
            ServerExport {
                server: ServerFact {
                    leases: self.leases.clone(),
                    ..server(number)
                },
                facts: self.facts[usize::from(node)].clone(),
                volumes: volumes.collect(),
            }
        };
        (0..NODES).map(export).collect()
    }
}

fn server(node: NodeNo) -> ServerFact {
    ServerFact {
        node,
        unique_id: format!("{:032x}", 0xa0 + u128::from(node.0)),
        node_name: format!("n{node}"),
        peer_address: format!("127.0.0.{node}:10808"),
        cluster_name: "c".to_owned(),
        cluster_id: UniqueId(OLD).to_string(),
        has_registry: false,
        leases: Vec::new(),
    }
}

fn run(steps: &[(u8, u8, u8)]) -> World {
    let mut world = World::new();
    steps.iter().for_each(|step| world.step(*step));
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever the age of the facts: all data of the present is with its owner, or a doubt says
    /// that something is not known; and nothing of the old cluster is admitted.
    #[test]
    fn what_was_stored_stays_with_who_has_it(
        steps in proptest::collection::vec((any::<u8>(), any::<u8>(), any::<u8>()), 1..60)
    ) {
        let world = run(&steps);
        let plan = plan(&world.exports(), UniqueId(7)).unwrap();
        let state = plan.state();
        for ((node, volume, page), (epoch, _)) in &world.pages {
            let Some(truth) = world.registry.volume(*volume) else { continue };
            if truth.page_count() <= *page { continue }
            let planned = state.volume(*volume);
            let planned = planned.ok_or_else(|| TestCaseError::fail(format!("volume {volume} is lost: {plan:?}")))?;
            prop_assert_eq!(owner(&planned.routes, *page), Some(*node), "volume {} page {}: {:?}", volume, page, plan);
            prop_assert!(*epoch < planned.epoch);
            prop_assert!(truth.epoch < planned.epoch, "{:?}", plan);
            prop_assert!(truth.id < state.cluster().unwrap().next_volume);
        }
        for (volume, epoch) in &world.leases {
            prop_assert!(state.volume(*volume).is_none() || *epoch < state.lease(*volume).epoch);
        }
        prop_assert_eq!(state.cluster().unwrap().id, UniqueId(7));
        if world.facts_are_current {
            prop_assert_eq!(plan.doubts(), 0, "{:?}", plan);
            for truth in world.registry.volumes() {
                let planned = state.volume(truth.id).unwrap().clone();
                let (routes, same) = (planned.routes.clone(), VolumeRecord { epoch: truth.epoch, next_snapshot: truth.next_snapshot, routes: truth.routes.clone(), ..planned });
                prop_assert_eq!(&same, truth);
                for page in 0..truth.page_count() {
                    prop_assert_eq!(owner(&routes, page), owner(&truth.routes, page));
                }
            }
        }
    }

    /// A server whose store is gone is never passed over in silence.
    #[test]
    fn a_missing_server_is_a_doubt(
        steps in proptest::collection::vec((any::<u8>(), any::<u8>(), any::<u8>()), 1..40), gone in 0_usize..3
    ) {
        let world = run(&steps);
        let mut exports = world.exports();
        exports.remove(gone);
        let plan = plan(&exports, UniqueId(7)).unwrap();
        prop_assert!(plan.remarks.iter().any(|r| r.doubt && r.text.contains("is not given")), "{:?}", plan);
        prop_assert_eq!(plan.nodes.len(), 2);
    }
}

#[test]
fn servers_of_two_clusters_and_the_same_server_twice_are_refused() {
    let world = run(&[(0, 0, 3)]);
    let mut exports = world.exports();
    exports.push(exports[0].clone());
    assert_eq!(
        plan(&exports, UniqueId(1)),
        Err(PlanError::Twice(NodeNo(1)))
    );
    exports[1].server.cluster_id = "other".to_owned();
    assert!(matches!(
        plan(&exports, UniqueId(1)),
        Err(PlanError::TwoClusters(..))
    ));
    assert_eq!(plan(&[], UniqueId(1)), Err(PlanError::NoServers));
}

#[test]
fn without_facts_volumes_are_guessed_and_doubted() {
    let mut world = run(&[(0, 0, 4), (7, 0, 0), (7, 0, 3)]);
    world.facts = vec![None; NODES.into()];
    let plan = plan(&world.exports(), UniqueId(1)).unwrap();
    assert!(plan.doubts() >= 2, "{plan:?}");
    let state = plan.state();
    let volume = state.volume_by_name("recovered-1").unwrap();
    assert_eq!(
        (volume.page_blocks, volume.size_bytes),
        (8192, 4 * PAGE_BYTES)
    );
    assert_eq!(state.nodes().count(), usize::from(NODES));
}

/// A holder of before is refused, whatever its lease epoch, and nobody is kept out.
#[test]
fn leases_are_free_at_a_higher_epoch() {
    let mut world = run(&[(0, 0, 1), (7, 0, 0)]);
    let volume = world.volume(0).unwrap().id;
    let holder = LeaseHolder {
        id: 1,
        attempt: 1,
        host: "h".to_owned(),
        pid: 1,
        purpose: "p".to_owned(),
        ttl_ms: 1,
        since_unix_ms: 0,
    };
    let held = LeaseRecord {
        volume,
        epoch: LeaseEpoch(3),
        state: LeaseState::Held(holder),
    };
    world.commit(Transaction::new().put(Key::Lease(volume), Object::Lease(held)));
    world.save_facts(0);
    world.leases = vec![(volume, LeaseEpoch(5))];
    let state = plan(&world.exports(), UniqueId(1)).unwrap().state();
    let lease = state.lease(volume);
    assert_eq!(lease.state, LeaseState::Free);
    assert!(LeaseEpoch(5 + 100) < lease.epoch);
}

#[test]
fn a_page_fact_is_a_short_list_in_json() {
    let fact: PageFact = (PageNo(3), Epoch(2), 77, 4096).into();
    let text = serde_json::to_string(&fact).unwrap();
    assert_eq!(text, "[3,2,77,4096]");
    assert_eq!(serde_json::from_str::<PageFact>(&text).unwrap(), fact);
}
