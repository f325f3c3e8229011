//! The pure registry: transactions, executed once, and the changes that the product makes.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use blockd::control::registry::{
    ChangeError, Command, Key, LeaseEnd, LeaseHolder, LeaseRecord, LeaseState, Machine, Mark,
    NameError, NodeRecord, Object, Outcome, Refusal, RegistryState, RouteError, SnapshotState,
    Transaction, UniqueId, VolumeSpec, change, lease, marks, routes,
};
use blockd::id::{Epoch, LeaseEpoch, NodeNo, Revision, SnapshotId, TicketId, VolumeId};
use blockd::limits::{REGISTRY_OUTCOMES_KEPT, TRANSACTION_STEPS_MAX};
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

fn node(number: u16) -> NodeRecord {
    NodeRecord {
        number: NodeNo(number),
        name: format!("n{number}"),
        unique_id: UniqueId(u128::from(number)),
        peer_address: format!("10.0.0.{number}:7000"),
        nbd_address: format!("10.0.0.{number}:10809"),
        registry_server: true,
        site: "a".to_owned(),
    }
}

fn spec(name: &str) -> VolumeSpec {
    VolumeSpec {
        name: name.to_owned(),
        size_bytes: 4 * GIB,
        page_blocks: 8192,
        servers: vec![NodeNo(1), NodeNo(2), NodeNo(3)],
        format: None,
        created_unix_s: 1,
    }
}

fn commit(state: &mut RegistryState, transaction: &Transaction) {
    let outcome = state.apply(transaction);
    assert!(matches!(outcome, Ok(Outcome::Committed(_))), "{outcome:?}");
}

/// A cluster of three nodes with the volume `vm1`.
fn cluster() -> (RegistryState, VolumeId) {
    let mut state = RegistryState::default();
    let defined = change::define_cluster(&state, "c1", UniqueId(1)).unwrap();
    commit(&mut state, &defined);
    for number in 1..=3 {
        let defined = change::define_node(&state, node(number)).unwrap();
        commit(&mut state, &defined);
    }
    let (created, volume) = change::create_volume(&state, &spec("vm1")).unwrap();
    commit(&mut state, &created);
    (state, volume.id)
}

#[test]
fn a_volume_is_created_once_under_a_new_id() {
    let (mut state, id) = cluster();
    let volume = state.volume_by_name("vm1").unwrap().clone();
    assert_eq!(
        (volume.id, volume.epoch, volume.page_count()),
        (id, Epoch(1), 1024)
    );
    assert_eq!(routes::owners(&volume.routes).len(), 3);
    let taken = change::create_volume(&state, &spec("vm1"));
    assert_eq!(
        taken.unwrap_err(),
        ChangeError::VolumeExists("vm1".to_owned())
    );
    let deleted = change::delete_volume(&state, id).unwrap();
    commit(&mut state, &deleted);
    assert!(state.volume_by_name("vm1").is_none() && state.volumes().next().is_none());
    let (created, again) = change::create_volume(&state, &spec("vm1")).unwrap();
    commit(&mut state, &created);
    assert_ne!(again.id, id, "an id is never used again");
}

#[test]
fn what_is_no_volume_is_refused() {
    let (state, _) = cluster();
    let cases = [
        (
            VolumeSpec {
                name: "a@b".to_owned(),
                ..spec("")
            },
            ChangeError::Name(NameError::BadCharacter('@')),
        ),
        (
            VolumeSpec {
                size_bytes: 0,
                ..spec("x")
            },
            ChangeError::Route(RouteError::PageCount(0)),
        ),
        (
            VolumeSpec {
                size_bytes: u64::MAX,
                ..spec("x")
            },
            ChangeError::Route(RouteError::PageCount(1 << 42)),
        ),
        (
            VolumeSpec {
                page_blocks: 3,
                ..spec("x")
            },
            ChangeError::Route(RouteError::PageBlocks(3)),
        ),
        (
            VolumeSpec {
                page_blocks: 0,
                ..spec("x")
            },
            ChangeError::Route(RouteError::PageBlocks(0)),
        ),
        (
            VolumeSpec {
                servers: vec![],
                ..spec("x")
            },
            ChangeError::Route(RouteError::NoServers),
        ),
        (
            VolumeSpec {
                servers: vec![NodeNo(9)],
                ..spec("x")
            },
            ChangeError::NoNode(NodeNo(9)),
        ),
    ];
    for (spec, want) in cases {
        assert_eq!(
            change::create_volume(&state, &spec).unwrap_err(),
            want,
            "{spec:?}"
        );
    }
}

#[test]
fn two_changes_from_one_reading_are_a_conflict() {
    let (mut state, id) = cluster();
    let (first, _) = change::create_volume(&state, &spec("a")).unwrap();
    let (second, _) = change::create_volume(&state, &spec("b")).unwrap();
    commit(&mut state, &first);
    let before = state.clone();
    let conflict = Outcome::Conflict {
        key: Key::Cluster,
        found: state.revision(),
    };
    assert_eq!(state.apply(&second), Ok(conflict));
    assert_eq!(state, before, "all or nothing");
    let (resized, _) = change::resize_volume(&state, id, 8 * GIB, &[NodeNo(1)]).unwrap();
    let renamed = change::rename_volume(&state, id, "vm2").unwrap();
    commit(&mut state, &resized);
    assert!(matches!(
        state.apply(&renamed),
        Ok(Outcome::Conflict { .. })
    ));
    assert_eq!(state.volume(id).unwrap().epoch, Epoch(2));
}

#[test]
fn a_snapshot_is_visible_only_after_its_commit() {
    let (mut state, id) = cluster();
    let wanted = [(id, "daily".to_owned())];
    let (begun, records) = change::begin_snapshots(&state, &wanted, TicketId(5), 9).unwrap();
    commit(&mut state, &begun);
    let pending = state.snapshot_by_name(id, "daily").unwrap();
    assert_eq!(
        (pending.state, pending.id),
        (SnapshotState::Pending, SnapshotId(1))
    );
    assert_eq!(pending.owners, [NodeNo(1), NodeNo(2), NodeNo(3)]);
    assert!(
        change::begin_snapshots(&state, &wanted, TicketId(6), 9).is_err(),
        "the name is taken"
    );
    assert!(change::delete_volume(&state, id).is_err());
    let committed = change::commit_snapshots(&state, &records).unwrap();
    let aborted = change::abort_snapshots(&state, &records);
    commit(&mut state, &committed);
    assert!(
        matches!(state.apply(&aborted), Ok(Outcome::Conflict { .. })),
        "decided once"
    );
    assert_eq!(
        change::abort_snapshots(&state, &records),
        Transaction::default()
    );
    let deleted = change::delete_snapshot(&state, id, SnapshotId(1)).unwrap();
    commit(&mut state, &deleted);
    assert!(state.snapshot_by_name(id, "daily").is_none());
    let forgotten = change::forget_snapshot(&state, id, SnapshotId(1)).unwrap();
    commit(&mut state, &forgotten);
    assert_eq!(state.snapshots(id).count(), 0);
    let (_, next) = change::begin_snapshots(&state, &wanted, TicketId(7), 9).unwrap();
    assert_eq!(next[0].id, SnapshotId(2), "an id is never used again");
}

/// S001-06, S003-20: a snapshot is renamed, protected and off-line by keys of their own, which go
/// with it; whichever of protect and delete comes second is refused.
#[test]
fn marks_of_a_snapshot_come_and_go_with_it() {
    let (mut state, id) = cluster();
    let wanted = [(id, "s".to_owned()), (id, "s".to_owned())];
    let (begun, records) = change::begin_snapshots(&state, &wanted[..1], TicketId(5), 9).unwrap();
    commit(&mut state, &begun);
    let first = SnapshotId(1);
    let mark = Some(Mark { since_unix_ms: 7 });
    assert!(
        marks::protect_snapshot(&state, id, first, mark).is_err(),
        "pending"
    );
    let committed = change::commit_snapshots(&state, &records).unwrap();
    commit(&mut state, &committed);
    let late = change::delete_snapshot(&state, id, first).unwrap();
    let protected = marks::protect_snapshot(&state, id, first, mark).unwrap();
    commit(&mut state, &protected);
    assert!(matches!(state.apply(&late), Ok(Outcome::Conflict { .. })));
    let refused = change::delete_snapshot(&state, id, first).unwrap_err();
    assert_eq!(refused, ChangeError::Protected("vm1".into(), "s".into()));
    let renamed = marks::rename_snapshot(&state, id, first, "t").unwrap();
    commit(&mut state, &renamed);
    assert!(state.snapshot_by_name(id, "s").is_none());
    assert_eq!(state.snapshot_by_name(id, "t").unwrap().id, first);
    assert!(marks::rename_snapshot(&state, id, first, "t").is_err());
    for target in [None, Some(first)] {
        let offline = marks::set_offline(&state, id, target, mark).unwrap();
        commit(&mut state, &offline);
        assert!(state.is_offline(id, target));
    }
    let unprotected = marks::protect_snapshot(&state, id, first, None).unwrap();
    commit(&mut state, &unprotected);
    let deleted = change::delete_snapshot(&state, id, first).unwrap();
    commit(&mut state, &deleted);
    assert!(!state.is_offline(id, Some(first)) && state.is_offline(id, None));
    let forgotten = change::forget_snapshot(&state, id, first).unwrap();
    commit(&mut state, &forgotten);
    let deleted = change::delete_volume(&state, id).unwrap();
    commit(&mut state, &deleted);
    let marks = state
        .objects()
        .filter(|(_, _, o)| matches!(o, Object::Mark(_)));
    assert_eq!(marks.count(), 0);
}

/// S003-34, U-10: the outcome is bound to the epoch of the prepare.
#[test]
fn a_snapshot_over_a_change_of_the_routes_does_not_commit() {
    let (mut state, id) = cluster();
    let wanted = [(id, "s".to_owned())];
    let (begun, records) = change::begin_snapshots(&state, &wanted, TicketId(5), 9).unwrap();
    commit(&mut state, &begun);
    let late = change::commit_snapshots(&state, &records).unwrap();
    let (resized, _) = change::resize_volume(&state, id, 8 * GIB, &[NodeNo(1)]).unwrap();
    commit(&mut state, &resized);
    assert!(matches!(state.apply(&late), Ok(Outcome::Conflict { .. })));
    let refused = change::commit_snapshots(&state, &records).unwrap_err();
    assert_eq!(refused, ChangeError::EpochChanged(id, Epoch(2)));
    let aborted = change::abort_snapshots(&state, &records);
    commit(&mut state, &aborted);
    assert_eq!(state.snapshots(id).count(), 0);
    assert!(state.snapshot_by_name(id, "s").is_none());
}

#[test]
fn a_node_keeps_its_number() {
    let (mut state, _) = cluster();
    let moved = NodeRecord {
        peer_address: "10.0.0.9:1".to_owned(),
        ..node(2)
    };
    let changed = change::define_node(&state, moved).unwrap();
    commit(&mut state, &changed);
    assert_eq!(state.node(NodeNo(2)).unwrap().peer_address, "10.0.0.9:1");
    let other = NodeRecord {
        unique_id: UniqueId(99),
        ..node(2)
    };
    assert_eq!(
        change::define_node(&state, other).unwrap_err(),
        ChangeError::NodeTaken(NodeNo(2))
    );
    let second = NodeRecord {
        number: NodeNo(4),
        ..node(3)
    };
    assert!(change::define_node(&state, second).is_err());
    assert_eq!(
        state.nodes().map(|n| n.number.0).collect::<Vec<_>>(),
        [1, 2, 3]
    );
}

#[test]
fn a_malformed_transaction_is_refused_and_changes_nothing() {
    let (mut state, id) = cluster();
    let before = state.clone();
    let mut gap = state.volume(id).unwrap().clone();
    gap.routes.remove(1);
    let long = Key::VolumeName("x".repeat(1000));
    let steps = (0..=TRANSACTION_STEPS_MAX)
        .map(|_| (Key::Cluster, None))
        .collect();
    let cases = [
        Transaction::new().put(Key::Volume(id), Object::Volume(gap)),
        Transaction::new().put(Key::Cluster, Object::VolumeName(id)),
        Transaction::new().put(Key::Node(NodeNo(2)), Object::Node(node(1))),
        Transaction::new().put(Key::Node(NodeNo(0)), Object::Node(node(0))),
        Transaction::new().expect(long, Revision(0)),
        Transaction {
            expect: vec![],
            changes: steps,
        },
    ];
    for transaction in cases {
        let refused: Result<Outcome, Refusal> = state.apply(&transaction);
        assert!(refused.is_err(), "{transaction:?}");
    }
    assert_eq!(state, before);
}

#[test]
fn a_repeated_command_gives_its_first_outcome() {
    let put = |number: u16| {
        let key = Key::Node(NodeNo(number));
        Transaction::new()
            .expect(key.clone(), Revision(0))
            .put(key, Object::Node(node(number)))
    };
    let mut machine = Machine::default();
    let command = Command {
        id: 1,
        transaction: put(1),
    };
    assert_eq!(
        machine.execute(&command),
        Ok(Outcome::Committed(Revision(1)))
    );
    assert_eq!(
        machine.execute(&command),
        Ok(Outcome::Committed(Revision(1)))
    );
    assert_eq!(machine.state().revision(), Revision(1));
    let other = Command {
        id: 2,
        ..command.clone()
    };
    assert!(matches!(
        machine.execute(&other),
        Ok(Outcome::Conflict { .. })
    ));
    for id in 0..REGISTRY_OUTCOMES_KEPT as u128 {
        machine
            .execute(&Command {
                id: 10 + id,
                transaction: Transaction::new(),
            })
            .unwrap();
    }
    assert!(
        matches!(machine.execute(&command), Ok(Outcome::Conflict { .. })),
        "memory is bounded"
    );
}

#[test]
fn a_unique_id_is_32_hex_digits() {
    let text = serde_json::to_string(&UniqueId(0xab)).unwrap();
    assert_eq!(text, "\"000000000000000000000000000000ab\"");
    assert_eq!(
        serde_json::from_str::<UniqueId>(&text).unwrap(),
        UniqueId(0xab)
    );
    for bad in [
        "\"ab\"",
        "\"+00000000000000000000000000000ab\"",
        "\"\"",
        "7",
    ] {
        assert!(serde_json::from_str::<UniqueId>(bad).is_err(), "{bad}");
    }
}

proptest! {
    /// nothing changes but by a compare-and-set transaction with a revision of its own. Against
    /// a model: a map from key to (revision, name).
    #[test]
    fn transactions_are_atomic_compare_and_set(
        steps in proptest::collection::vec((1_u16..5, 0_u64..12, 1_u16..5, any::<bool>()), 1..60)
    ) {
        let mut state = RegistryState::default();
        let mut model = std::collections::BTreeMap::<u16, u64>::new();
        let mut revision = 0;
        for (read, want, write, remove) in steps {
            let change = (!remove).then(|| Object::Node(node(write)));
            let transaction = Transaction {
                expect: vec![(Key::Node(NodeNo(read)), Revision(want))],
                changes: vec![(Key::Node(NodeNo(write)), change)],
            };
            let found = model.get(&read).copied().unwrap_or(0);
            let outcome = state.apply(&transaction).unwrap();
            if found == want {
                revision += 1;
                if remove { model.remove(&write); } else { model.insert(write, revision); }
                prop_assert_eq!(outcome, Outcome::Committed(Revision(revision)));
            } else {
                let key = Key::Node(NodeNo(read));
                prop_assert_eq!(outcome, Outcome::Conflict { key, found: Revision(found) });
            }
            let held: Vec<_> = state.nodes().map(|n| n.number.0).collect();
            prop_assert_eq!(held, model.keys().copied().collect::<Vec<_>>());
        }
    }
}

fn holder(id: u64) -> LeaseHolder {
    LeaseHolder {
        id,
        attempt: 8,
        host: "h1".to_owned(),
        pid: 42,
        purpose: "p".to_owned(),
        ttl_ms: 2_000,
        since_unix_ms: 5,
    }
}

/// The life of a lease: one holder at a time, a new epoch at each turn, and nothing that would take
/// data from under the holder.
#[test]
fn a_lease_has_one_holder_and_a_new_epoch_at_each_turn() {
    let (mut state, id) = cluster();
    assert_eq!(state.lease(id).state, LeaseState::Free);
    let (acquired, first) = lease::acquire(&state, id, &holder(7)).unwrap();
    let (late, _) = lease::acquire(&state, id, &holder(9)).unwrap();
    commit(&mut state, &acquired);
    assert!(matches!(state.apply(&late), Ok(Outcome::Conflict { .. })));
    assert_eq!(state.lease(id), first);
    let refused = lease::acquire(&state, id, &holder(9))
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("vm1") && refused.contains("h1 (process 42, p)"),
        "{refused}"
    );
    let leased = |error| matches!(error, Err(ChangeError::Leased(..)));
    assert!(leased(change::delete_volume(&state, id).map(drop)));
    assert!(leased(
        change::resize_volume(&state, id, GIB, &[]).map(drop)
    ));
    let (again, same) = lease::acquire(&state, id, &holder(7)).unwrap();
    commit(&mut state, &again);
    assert_eq!(same.epoch, LeaseEpoch(1));
    let (closing, closed) = lease::close(&state, id, same.epoch, LeaseEnd::Broken).unwrap();
    assert!(
        lease::open(&state, id, closed.epoch).is_err(),
        "not closed yet"
    );
    commit(&mut state, &closing);
    assert_eq!(closed.epoch, LeaseEpoch(2));
    assert!(lease::close(&state, id, same.epoch, LeaseEnd::Expired).is_err());
    assert!(lease::withdraw(&state, &same).is_err());
    let opening = lease::open(&state, id, closed.epoch).unwrap();
    commit(&mut state, &opening);
    let (acquired, third) = lease::acquire(&state, id, &holder(9)).unwrap();
    commit(&mut state, &acquired);
    assert_eq!(third.epoch, LeaseEpoch(3));
    let withdrawn = lease::withdraw(&state, &third).unwrap();
    commit(&mut state, &withdrawn);
    let deleted = change::delete_volume(&state, id).unwrap();
    commit(&mut state, &deleted);
    assert_eq!(state.leases().count(), 0);
}

/// Golden bytes: what the registry had before it knew leases, and a lease.
#[test]
fn commands_are_these_bytes() {
    let name = Key::SnapshotName(VolumeId(1), "s".to_owned());
    let named = Transaction::new()
        .expect(name.clone(), Revision(2))
        .put(name, Object::SnapshotName(SnapshotId(3)));
    let record = LeaseRecord {
        volume: VolumeId(1),
        epoch: LeaseEpoch(2),
        state: LeaseState::Held(holder(7)),
    };
    let leased = Transaction::new().put(Key::Lease(VolumeId(1)), Object::Lease(record));
    let golden: [(Transaction, &[u8]); 2] = [
        (
            named,
            b"\x01\x01\x05\x01\x01s\x02\x01\x05\x01\x01s\x01\x05\x03",
        ),
        (
            leased,
            b"\x01\x00\x01\x06\x01\x01\x06\x01\x02\x01\x07\x08\x02h1\x2a\x01p\xd0\x0f\x05",
        ),
    ];
    for (transaction, bytes) in golden {
        let command = Command { id: 1, transaction };
        assert_eq!(postcard::to_stdvec(&command).unwrap(), bytes);
        assert_eq!(postcard::from_bytes::<Command>(bytes).unwrap(), command);
    }
}
