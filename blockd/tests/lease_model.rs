//! Every order of what can happen to a lease, within bounds: two contenders, a writer without a
//! lease, two owners; lost, late and repeated writes, coordinators that die or give up, expiry at any
//! moment, restarts with an old copy of the registry. Never two writers; each planted fault is found.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use blockd::control::registry::{
    LeaseEnd, LeaseHolder, LeaseRecord, LeaseState, NodeRecord, Outcome, RegistryState,
    Transaction, UniqueId, VolumeSpec, change, lease,
};
use blockd::data::fence::{Fence, FenceGate, Writers};
use blockd::id::{LeaseEpoch, NodeNo, VolumeId};
use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

const VOLUME: VolumeId = VolumeId(1);
const OWNERS: usize = 2;
const PLAIN: LeaseEpoch = LeaseEpoch(0);

/// What is built in wrongly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fault {
    None,
    /// An owner confirms while earlier changes are being executed.
    NoDrain,
    /// An owner forgets at a restart what it has confirmed.
    NoFile,
    /// An owner confirms what its copy of the registry does not have.
    StaleConfirm,
    /// A lease is given when one owner has confirmed it.
    OneOwner,
    /// A volume is opened without a word to its owners.
    OpenAtOnce,
    /// An owner admits any epoch.
    AnyEpoch,
    /// A coordinator withdraws what a later attempt was given.
    WithdrawAll,
}

/// How much may happen.
#[derive(Clone, Debug, Hash)]
struct Budget {
    commits: u8,
    writes: u8,
    repeats: u8,
    restarts: u8,
}

#[derive(Clone, Debug, Hash)]
struct Owner {
    /// Which of the registry's versions it has.
    seen: usize,
    gate: FenceGate,
    file: LeaseEpoch,
    /// Changes that it executes: the epoch of the requester and that of their admission.
    executing: Vec<(LeaseEpoch, LeaseEpoch)>,
}

/// An acquire, or an opening, on its way to the owners.
#[derive(Clone, Debug, Hash)]
struct Round {
    record: LeaseRecord,
    confirmed: [bool; OWNERS],
    /// The contender that waits for it; `None`: an opening, or a contender that gave up.
    waits: Option<usize>,
}

#[derive(Clone, Debug)]
struct Model {
    fault: Fault,
    budget: Budget,
    registry: RegistryState,
    /// What it has had of the lease.
    versions: Vec<LeaseRecord>,
    owners: Vec<Owner>,
    rounds: Vec<Round>,
    /// The epoch that each contender believes to hold.
    holds: [Option<LeaseEpoch>; 2],
    /// Writes under way: the owner and the epoch.
    network: Vec<(usize, LeaseEpoch)>,
    attempts: u64,
    /// The newest epoch that a contender was told to hold.
    granted: LeaseEpoch,
    last_applied: LeaseEpoch,
    /// Epochs after whose writes another writer's were applied.
    superseded: Vec<LeaseEpoch>,
    violation: Option<&'static str>,
}

fn registry() -> RegistryState {
    let mut state = RegistryState::default();
    let mut commit = |build: &dyn Fn(&RegistryState) -> Transaction| {
        let transaction = build(&state);
        assert!(matches!(
            state.apply(&transaction),
            Ok(Outcome::Committed(_))
        ));
    };
    commit(&|state| change::define_cluster(state, "c", UniqueId(1)).unwrap());
    commit(&|state| {
        let node = NodeRecord {
            number: NodeNo(1),
            name: "n1".to_owned(),
            unique_id: UniqueId(1),
            peer_address: String::new(),
            nbd_address: String::new(),
            registry_server: true,
            site: String::new(),
        };
        change::define_node(state, node).unwrap()
    });
    commit(&|state| {
        let spec = VolumeSpec {
            name: "v".to_owned(),
            size_bytes: 4 << 20,
            page_blocks: 8192,
            servers: vec![NodeNo(1)],
            format: None,
            created_unix_s: 0,
        };
        change::create_volume(state, &spec).unwrap().0
    });
    state
}

fn fence(record: &LeaseRecord, fault: Fault) -> Fence {
    Fence {
        epoch: record.epoch,
        writers: match record.state {
            LeaseState::Held(_) if fault == Fault::AnyEpoch => Writers::All,
            LeaseState::Free => Writers::All,
            LeaseState::Held(_) => Writers::Holder,
            LeaseState::Closed(..) => Writers::Nobody,
        },
        text: "leased".into(),
    }
}

impl Model {
    fn new(fault: Fault, budget: Budget) -> Self {
        let registry = registry();
        let owner = Owner {
            seen: 0,
            gate: FenceGate::default(),
            file: PLAIN,
            executing: vec![],
        };
        Self {
            fault,
            budget,
            versions: vec![registry.lease(VOLUME)],
            registry,
            owners: vec![owner; OWNERS],
            rounds: vec![],
            holds: [None; 2],
            network: vec![],
            attempts: 0,
            granted: PLAIN,
            last_applied: PLAIN,
            superseded: vec![],
            violation: None,
        }
    }

    fn newest(&self) -> &LeaseRecord {
        self.versions.last().unwrap()
    }

    /// Executes a transaction of the registry.
    fn commit(&mut self, transaction: &Transaction) {
        let outcome = self.registry.apply(transaction);
        assert!(matches!(outcome, Ok(Outcome::Committed(_))), "{outcome:?}");
        self.versions.push(self.registry.lease(VOLUME));
        self.budget.commits -= 1;
    }

    fn sync(&mut self, owner: usize, version: usize) {
        let fence = fence(&self.versions[version], self.fault);
        let owner = &mut self.owners[owner];
        owner.seen = version;
        owner.gate.publish(fence);
    }

    /// Every state that one step leads to.
    fn steps(&self) -> Vec<Self> {
        let mut next = Vec::new();
        if self.budget.commits > 0 {
            self.registry_steps(&mut next);
        }
        self.round_steps(&mut next);
        self.writer_steps(&mut next);
        self.owner_steps(&mut next);
        next
    }

    fn registry_steps(&self, next: &mut Vec<Self>) {
        let state = &self.registry;
        for contender in 0..2 {
            let waits = self.rounds.iter().any(|r| r.waits == Some(contender));
            let holder = LeaseHolder {
                id: contender as u64,
                attempt: self.attempts,
                host: String::new(),
                pid: 0,
                purpose: String::new(),
                ttl_ms: 0,
                since_unix_ms: 0,
            };
            if waits || self.holds[contender].is_some() {
                continue;
            }
            if let Ok((transaction, record)) = lease::acquire(state, VOLUME, &holder) {
                let mut model = self.clone();
                model.commit(&transaction);
                model.attempts += 1;
                model.rounds.push(Round {
                    record,
                    confirmed: [false; OWNERS],
                    waits: Some(contender),
                });
                next.push(model);
            }
        }
        let epoch = self.newest().epoch;
        if let Ok((transaction, closed)) = lease::close(state, VOLUME, epoch, LeaseEnd::Expired) {
            let mut model = self.clone();
            model.commit(&transaction);
            model.rounds.push(Round {
                record: closed,
                confirmed: [false; OWNERS],
                waits: None,
            });
            next.push(model);
        }
    }

    fn round_steps(&self, next: &mut Vec<Self>) {
        for (index, round) in self.rounds.iter().enumerate() {
            for owner in 0..OWNERS {
                if !round.confirmed[owner] {
                    next.extend(self.confirm(index, owner));
                }
            }
            self.end_round(index, next);
            if round.waits.is_some() {
                let mut model = self.clone();
                model.rounds[index].waits = None;
                next.push(model);
            }
        }
    }

    fn confirm(&self, index: usize, owner: usize) -> Option<Self> {
        let mut model = self.clone();
        if self.fault != Fault::StaleConfirm {
            model.sync(owner, self.versions.len() - 1);
        }
        let wanted = self.rounds[index].record.epoch;
        let confirming = &mut model.owners[owner];
        let drained = match self.fault {
            Fault::NoDrain | Fault::StaleConfirm => Some(wanted),
            _ => confirming.gate.drained(),
        };
        let drained = drained?;
        confirming.file = confirming.file.max(drained);
        if self.fault != Fault::StaleConfirm {
            confirming.gate.confirm(drained);
        }
        model.rounds[index].confirmed[owner] = true;
        Some(model)
    }

    /// What a coordinator does when its round is complete, or cannot be completed.
    fn end_round(&self, index: usize, next: &mut Vec<Self>) {
        let round = &self.rounds[index];
        let confirmed = round
            .confirmed
            .iter()
            .filter(|confirmed| **confirmed)
            .count();
        let opening = matches!(round.record.state, LeaseState::Closed(..));
        let wanted = match self.fault {
            Fault::OneOwner if !opening => 1,
            Fault::OpenAtOnce if opening => 0,
            _ => OWNERS,
        };
        let mut model = self.clone();
        model.rounds.remove(index);
        let state = &self.registry;
        if confirmed >= wanted && opening {
            if let Ok(transaction) = lease::open(state, VOLUME, round.record.epoch)
                && self.budget.commits > 0
            {
                model.commit(&transaction);
                next.push(model);
            }
        } else if confirmed >= wanted {
            if let Some(contender) = round.waits {
                model.holds[contender] = Some(round.record.epoch);
                model.granted = model.granted.max(round.record.epoch);
                next.push(model);
            }
        } else if !opening && self.budget.commits > 0 {
            let given_back = match self.fault {
                Fault::WithdrawAll => self.newest().holder().map(|_| self.newest()),
                _ => Some(&round.record),
            };
            if let Some(Ok(transaction)) = given_back.map(|record| lease::withdraw(state, record)) {
                model.commit(&transaction);
                next.push(model);
            }
        }
    }

    fn writer_steps(&self, next: &mut Vec<Self>) {
        let writers = self.holds.iter().flatten().copied().chain([PLAIN]);
        for lease in writers.filter(|_| self.budget.writes > 0) {
            for owner in 0..OWNERS {
                let mut model = self.clone();
                model.budget.writes -= 1;
                model.network.push((owner, lease));
                model.network.sort_unstable();
                next.push(model);
            }
        }
        for (index, (owner, lease)) in self.network.iter().enumerate() {
            let mut model = self.clone();
            model.network.remove(index);
            let admission = match self.fault {
                Fault::AnyEpoch => PLAIN,
                _ => *lease,
            };
            if let Ok(began) = model.owners[*owner].gate.begin(admission) {
                model.owners[*owner].executing.push((*lease, began));
                if self.budget.repeats > 0 {
                    let mut repeats = model.clone();
                    repeats.budget.repeats -= 1;
                    repeats.network.push((*owner, *lease));
                    repeats.network.sort_unstable();
                    next.push(repeats);
                }
                next.push(model);
            }
        }
    }

    fn owner_steps(&self, next: &mut Vec<Self>) {
        for (index, owner) in self.owners.iter().enumerate() {
            if owner.seen + 1 < self.versions.len() {
                let mut model = self.clone();
                model.sync(index, owner.seen + 1);
                next.push(model);
            }
            for at in 0..owner.executing.len() {
                let mut model = self.clone();
                let (lease, began) = model.owners[index].executing.remove(at);
                model.owners[index].gate.end(began);
                model.apply(lease);
                next.push(model);
            }
            for version in (0..=owner.seen).filter(|_| self.budget.restarts > 0) {
                let mut model = self.clone();
                model.budget.restarts -= 1;
                let confirmed = match self.fault {
                    Fault::NoFile => PLAIN,
                    _ => owner.file,
                };
                model.owners[index].executing.clear();
                model.owners[index].gate = FenceGate::new(confirmed);
                model.sync(index, version);
                next.push(model);
            }
        }
    }

    /// A write reaches the volume: it must not be one of two writers.
    fn apply(&mut self, lease: LeaseEpoch) {
        let newest = self.newest();
        let held_by_another =
            newest.holder().is_some() && newest.epoch == self.granted && newest.epoch != lease;
        if held_by_another {
            self.violation = Some("a write while another one holds the lease");
        } else if lease != PLAIN && lease < self.granted {
            self.violation = Some("a write of an older lease than the one that was given");
        } else if self.superseded.contains(&lease) {
            self.violation = Some("a write of a lease after another writer's");
        }
        if lease != self.last_applied && self.last_applied != PLAIN {
            self.superseded.push(self.last_applied);
        }
        self.last_applied = lease;
    }

    /// All that tells this state from another one.
    fn key(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.budget, &self.versions, &self.owners, &self.rounds).hash(&mut hasher);
        (self.holds, &self.network, self.attempts, self.granted).hash(&mut hasher);
        (self.last_applied, &self.superseded).hash(&mut hasher);
        hasher.finish()
    }
}

/// Looks at every state within the budget: the first violation, and how many states there are.
fn explore(fault: Fault, budget: Budget) -> (Option<&'static str>, usize) {
    let first = Model::new(fault, budget);
    let mut seen = HashSet::from([first.key()]);
    let mut open = vec![first];
    while let Some(model) = open.pop() {
        for next in model.steps() {
            if next.violation.is_some() {
                return (next.violation, seen.len());
            }
            if seen.insert(next.key()) {
                open.push(next);
            }
        }
    }
    (None, seen.len())
}

const fn budget(commits: u8, writes: u8, repeats: u8, restarts: u8) -> Budget {
    Budget {
        commits,
        writes,
        repeats,
        restarts,
    }
}

/// What never comes, a message that is lost or a coordinator that dies, is among the orders in which
/// it has not come yet.
#[test]
fn there_are_never_two_writers() {
    for budget in [budget(3, 2, 0, 1), budget(3, 3, 0, 0), budget(2, 2, 1, 1)] {
        let (violation, states) = explore(Fault::None, budget.clone());
        eprintln!("{budget:?}: {states} states");
        assert_eq!(violation, None, "{budget:?}");
        assert!(states > 10_000, "{budget:?}: nothing was explored");
    }
}

#[test]
fn each_planted_fault_is_found() {
    for (fault, budget) in [
        (Fault::NoDrain, budget(1, 2, 0, 0)),
        (Fault::NoFile, budget(1, 2, 0, 1)),
        (Fault::StaleConfirm, budget(1, 2, 0, 0)),
        (Fault::OneOwner, budget(1, 2, 0, 0)),
        (Fault::OpenAtOnce, budget(3, 3, 0, 0)),
        (Fault::AnyEpoch, budget(1, 2, 0, 0)),
        (Fault::WithdrawAll, budget(3, 3, 0, 0)),
    ] {
        let (violation, states) = explore(fault, budget);
        eprintln!("{fault:?}: {violation:?} after {states} states");
        assert!(violation.is_some(), "{fault:?} is not found");
    }
}
