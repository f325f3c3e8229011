//! Every server shows the same, whoever owns the pages and whoever dies (S003-10, X-11, checker C1).

use super::chains::{PAGE, PAGE_BLOCKS};
use blockd_tests::{Cluster, Sharers, check_shared};

/// Blocks that six clients read and write through three servers are one register each, while each server
/// in turn is killed, and while their pages move to each in turn.
#[test]
fn shared_blocks_are_registers_through_every_server() {
    let mut cluster = Cluster::three();
    cluster.create_on("v", 12 * PAGE, PAGE_BLOCKS, &[]);
    let offsets: Vec<u64> = (0..4).map(|index| index * 3 * PAGE + PAGE - 4096).collect();
    let sharers = Sharers::start(&cluster, "v", &offsets, 2);
    for server in [1, 2, 3, 1] {
        cluster.blockctl(&format!("page move v all --to {server}"));
        let victim = server - 1;
        cluster.servers[victim].kill();
        cluster.servers[victim].start();
        cluster.wait_writable();
    }
    cluster.blockctl("volume rebalance v");
    let history = sharers.finish();
    check_shared(&history).unwrap();
    let (writes, lost) = history.iter().fold((0, 0), |(writes, lost), operation| {
        let is_lost = operation.ended_ns.is_none();
        (
            writes + usize::from(operation.is_write),
            lost + usize::from(is_lost),
        )
    });
    eprintln!(
        "{} operations, {writes} writes, {lost} of unknown outcome",
        history.len()
    );
    assert!(writes > 1000 && lost > 0, "{writes} writes, {lost} lost");
}
