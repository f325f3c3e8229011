use super::super::change::{define_cluster, define_node};
use super::super::nodes::{DrainRecord, drain_node, forget_node, next_number};
use super::super::{NodeRecord, Outcome, UniqueId, VolumeSpec, change};
use super::*;
use std::collections::HashSet;

const VOLUME: VolumeId = VolumeId(1);
const PAGES: u32 = 3;

fn commit(state: &mut RegistryState, transaction: &Transaction) -> bool {
    matches!(state.apply(transaction), Ok(Outcome::Committed(_)))
}

fn cluster() -> RegistryState {
    let mut state = RegistryState::default();
    let cluster = define_cluster(&state, "c", UniqueId(1)).unwrap();
    assert!(commit(&mut state, &cluster));
    for number in 1..=2 {
        let node = NodeRecord {
            number: NodeNo(number),
            name: format!("n{number}"),
            unique_id: UniqueId(u128::from(number)),
            peer_address: String::new(),
            nbd_address: String::new(),
            registry_server: true,
            site: String::new(),
        };
        let node = define_node(&state, node).unwrap();
        assert!(commit(&mut state, &node));
    }
    let spec = VolumeSpec {
        name: "v".to_owned(),
        size_bytes: u64::from(PAGES) * 4096,
        page_blocks: 8,
        servers: vec![NodeNo(1)],
        format: None,
        created_unix_s: 0,
    };
    let (created, _) = change::create_volume(&state, &spec).unwrap();
    assert!(commit(&mut state, &created));
    let spec = MoveSpec {
        wanted: vec![RouteRun {
            first_page: 0,
            page_count: PAGES,
            owner: NodeNo(2),
        }],
        reason: "test".to_owned(),
        rate_bytes: 1,
        now_unix_ms: 0,
    };
    let (planned, _) = plan_move(&state, VOLUME, &spec).unwrap();
    assert!(commit(&mut state, &planned));
    state
}

/// Every transaction that a server may propose in this state, right or late.
fn proposals(state: &RegistryState) -> Vec<Transaction> {
    let record = state.page_move(VOLUME).unwrap();
    let volume = state.volume(VOLUME).unwrap();
    let mut all = Vec::new();
    let mut add = |built: Result<(Transaction, MoveRecord), ChangeError>| {
        all.extend(built.ok().map(|(transaction, _)| transaction));
    };
    for page_count in 1..=PAGES {
        for first_page in 0..PAGES {
            let batch = MoveBatch {
                first_page,
                page_count,
                from: NodeNo(1),
                to: NodeNo(2),
            };
            add(begin_batch(state, VOLUME, batch));
            add(adopt_batch(state, VOLUME, batch));
            add(drop_batch(state, VOLUME, batch));
        }
    }
    for attempt in record.attempt.saturating_sub(1)..=record.attempt + 1 {
        for epoch in [volume.epoch.0 - 1, volume.epoch.0] {
            let spec = FlipSpec {
                attempt,
                epoch: Epoch(epoch),
                snapshots: vec![],
                over_pending: false,
                verifier: 7,
                bytes: 0,
            };
            add(flip_batch(state, VOLUME, &spec));
        }
        add(release_batch(state, VOLUME, attempt));
        add(fail_move(state, VOLUME, attempt, "full"));
    }
    for wish in [MoveWish::Run, MoveWish::Pause, MoveWish::Cancel] {
        add(wish_move(state, VOLUME, wish));
    }
    add(finish_move(state, VOLUME));
    all.retain(|transaction| !transaction.changes.is_empty());
    all
}

/// What must hold in every state (S003-19, X-01, X-02).
fn check(before: &RegistryState, after: &RegistryState) {
    let (old, new) = (
        before.volume(VOLUME).unwrap(),
        after.volume(VOLUME).unwrap(),
    );
    let (was, is) = (
        before.page_move(VOLUME).unwrap(),
        after.page_move(VOLUME).unwrap(),
    );
    routes::check(&new.routes, PAGES).unwrap();
    let moved = old.routes != new.routes;
    assert_eq!(
        moved,
        old.epoch != new.epoch,
        "owners change with the epoch"
    );
    if moved {
        let MovePhase::Copying(batch) = was.phase else {
            panic!("a flip from {:?}", was.phase);
        };
        assert_eq!(is.phase, MovePhase::Flipped(batch, new.epoch));
        assert_eq!(is.given, [(batch.from, 7)]);
    }
    match (&was.phase, &is.phase) {
        (MovePhase::Flipped(one, _), MovePhase::Dropping(other)) => assert_eq!(one, other),
        (MovePhase::Flipped(..), MovePhase::Flipped(..)) => {}
        (MovePhase::Flipped(..), other) => panic!("flipped, then {other:?}: never adopted"),
        (MovePhase::Copying(_), MovePhase::Dropping(_)) => panic!("dropped before the flip"),
        _ => {}
    }
    assert!(is.attempt >= was.attempt);
    if let MovePhase::Flipped(batch, _) | MovePhase::Dropping(batch) = is.phase {
        let mut pages = batch.first_page..batch.end();
        assert!(pages.all(|page| routes::owner(&new.routes, page) == Some(batch.to)));
    }
    let rests = is.is_over() || is.phase == MovePhase::Paused;
    let duties = [1, 2].map(|node| duty(after, is, NodeNo(node)));
    let busy = duties.iter().filter(|duty| **duty != Duty::Nothing).count();
    assert_eq!(busy, usize::from(!rests), "{:?}: {duties:?}", is.phase);
}

/// Every order of every transaction that any server may propose, also ones built in an earlier state
/// and executed late: one owner a page, owners change with the epoch by a flip of the attempt
/// alone, nothing is dropped before it was adopted, and exactly one server has the next step.
#[test]
fn every_order_of_steps_keeps_one_owner_a_page() {
    let first = cluster();
    let key = |state: &RegistryState, late: &[Transaction]| {
        let record = state.page_move(VOLUME).unwrap();
        let routes = &state.volume(VOLUME).unwrap().routes;
        format!(
            "{:?} {:?} {:?} {}",
            record.phase,
            record.wish,
            routes,
            late.len()
        )
    };
    let (mut seen, mut open) = (HashSet::new(), vec![(first, Vec::<Transaction>::new(), 0)]);
    let (mut steps, mut conflicts) = (0, 0);
    while let Some((state, late, depth)) = open.pop() {
        if depth > 14 || !seen.insert(key(&state, &late)) {
            continue;
        }
        for transaction in late.iter().cloned().chain(proposals(&state)) {
            let mut after = state.clone();
            steps += 1;
            if !commit(&mut after, &transaction) {
                conflicts += 1;
                continue;
            }
            check(&state, &after);
            // A proposal that is still under way when others are executed.
            let mut late = late.clone();
            late.retain(|one| *one != transaction);
            if late.is_empty() {
                late.extend(proposals(&state).into_iter().take(3));
            }
            open.push((after, late, depth + 1));
        }
    }
    assert!(
        seen.len() > 40 && conflicts > 40,
        "{} states, {steps} steps, {conflicts} conflicts",
        seen.len()
    );
}

/// A server that dies for good between flip and drop is forgotten, and the move ends with it.
#[test]
fn a_source_that_is_forgotten_ends_its_move() {
    let node = NodeNo(1);
    for is_adopted_before in [false, true] {
        let mut state = cluster();
        let batch = MoveBatch {
            first_page: 0,
            page_count: PAGES,
            from: node,
            to: NodeNo(2),
        };
        let refused = forget_node(&state, node).unwrap_err();
        assert_eq!(refused, ChangeError::NotDrained(node));
        let drain = DrainRecord {
            node,
            rate_bytes: 1,
            since_unix_ms: 0,
        };
        let drained = drain_node(&state, &drain).unwrap().0;
        assert!(commit(&mut state, &drained));
        let begun = begin_batch(&state, VOLUME, batch).unwrap().0;
        assert!(commit(&mut state, &begun));
        let refused = forget_node(&state, node).unwrap_err();
        assert!(matches!(refused, ChangeError::Owns(..)), "{refused}");
        let spec = FlipSpec {
            attempt: 1,
            epoch: Epoch(1),
            snapshots: vec![],
            over_pending: false,
            verifier: 7,
            bytes: 0,
        };
        let flipped = flip_batch(&state, VOLUME, &spec).unwrap().0;
        assert!(commit(&mut state, &flipped));
        let late = forget_node(&state, node).unwrap().0;
        let adopted = adopt_batch(&state, VOLUME, batch).unwrap().0;
        if is_adopted_before {
            assert!(commit(&mut state, &adopted));
            assert!(!commit(&mut state, &late), "built before");
            let forgotten = forget_node(&state, node).unwrap().0;
            assert!(commit(&mut state, &forgotten));
        } else {
            assert!(commit(&mut state, &late));
            let adopted = adopt_batch(&state, VOLUME, batch).unwrap().0;
            assert!(commit(&mut state, &adopted));
        }
        let record = state.page_move(VOLUME).unwrap();
        assert_eq!(record.phase, MovePhase::Done);
        assert!(state.node(node).is_none());
        assert_eq!(next_number(&state), NodeNo(3), "no number is used twice");
        assert_eq!(forget_node(&state, node), Err(ChangeError::NoNode(node)));
    }
}
