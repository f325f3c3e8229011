//! Snapshots whose coordinator or participant dies at each step of the procedure (S003-35).

use super::chains::{Load, PAGE, PAGE_BLOCKS};
use super::snapshot_kills::{listed, start_snapshot, writes_go_through};
use blockd::admin::HoldsInfo;
use blockd::control::snapshot::Procedure;
use blockd_tests::Cluster;

/// `v` has a part on each of the three servers, `w` on the second one.
const PARTS: u32 = 4;
const COMMITTED: &str = "snapshot-committed";

/// S003-35: the coordinator dies behind the k-th `ready`, behind the k-th `taken`, for each k, and
/// behind the commit; a participant right before and right after it takes its part. The
/// snapshot exists whole if it was committed, else nothing of it does; no hold remains.
#[test]
fn a_death_at_any_step_of_a_hold_leaves_nothing_partial() {
    let each = |what: &'static str| (1..=PARTS).map(move |k| format!("snapshot-{what}-{k}"));
    let steps = each("ready").chain(each("taken"));
    die_at(Procedure::Hold, Load::start, steps);
}

/// As above, by `barrier`: behind the last of each.
#[test]
fn a_death_at_a_step_of_a_barrier_leaves_nothing_partial() {
    die_at(Procedure::Barrier, Load::start, last_of_each());
}

/// As above, by `stamp`.
#[test]
fn a_death_at_a_step_of_a_snapshot_by_stamps_leaves_nothing_partial() {
    let start = Load::start_each_through_one;
    die_at(Procedure::Stamp, start, last_of_each());
}

fn last_of_each() -> impl Iterator<Item = String> {
    ["ready", "taken"]
        .into_iter()
        .map(|what| format!("snapshot-{what}-{PARTS}"))
}

/// The coordinator is the first server, the participant that dies is the second one.
fn die_at(
    procedure: Procedure,
    start: fn(&Cluster, [&'static str; 2]) -> Load,
    steps: impl Iterator<Item = String>,
) {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 64 * PAGE, PAGE_BLOCKS, &[]);
    cluster.create_on("w", 64 * PAGE, PAGE_BLOCKS, &[2]);
    let load = start(&cluster, ["v", "w"]);
    let coordinator = steps.chain([COMMITTED.to_owned()]).map(|step| (step, 0));
    let participant = ["snapshot-taking", "snapshot-took"].map(|step| (step.to_owned(), 1));
    for (step, dies) in coordinator.chain(participant) {
        let server = &mut cluster.servers[dies];
        server.kill();
        server.environment = vec![("BLOCKD_CRASH_AT".to_owned(), step.clone())];
        server.start();
        cluster.wait_writable();
        let before = load.marks();
        let taking = start_snapshot(&cluster, 0, &step, procedure);
        cluster.servers[dies].wait_end();
        let answered_well = taking.join().unwrap();
        cluster.servers[dies].environment.clear();
        cluster.servers[dies].start();
        cluster.wait_writable();
        writes_go_through(&cluster, 0);
        load.await_spans();
        load.check_running();
        let exists = listed(&cluster).contains(&step);
        assert_eq!(
            exists,
            answered_well || step == COMMITTED,
            "{procedure}, {step}"
        );
        if exists {
            load.check(&cluster, 2, &step, &before, &load.marks());
        }
    }
    load.finish();
    cluster
        .snapshot_by(0, &["v@last", "w@last"], procedure)
        .unwrap();
    assert_eq!(cluster.holds_at(1), HoldsInfo::default());
}
