//! The checkers. They know the promises (design section 2) and the history, nothing of the program.

mod intervals;
mod register;
mod snapshot;

use crate::history::History;
use intervals::{Intervals, Owners};

/// All violations of a history; `owners(volume, block)` are the nodes that may have ordered the writes
/// there, each from a moment on.
pub(crate) fn all(history: &History, owners: Owners<'_>) -> Vec<String> {
    let ops = history.ops.borrow();
    let losses = history.losses.borrow();
    let starts = history.starts.borrow();
    let entries = history.entries.borrow();
    let intervals = Intervals::new(&ops, &losses, &starts, &entries, owners);
    let mut found = register::check(&intervals);
    for snap in history.snaps.borrow().iter() {
        found.extend(snapshot::check(&intervals, snap));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::{Loss, NEVER, Snap, Tag, What};
    use blockd::control::registry::settings::Procedure;
    use std::rc::Rc;

    /// A history of one volume with one block a page, all on node 0.
    #[derive(Default)]
    struct Story(History);

    impl Story {
        fn call(&self, client: usize, what: What, first: u32, blocks: u32) -> usize {
            self.0.invoke(client, 0, what, first, blocks)
        }

        fn write(&self, client: usize, first: u32, blocks: u32) -> Tag {
            let op = self.call(client, What::Write, first, blocks);
            self.0.answer(op, None);
            op as Tag + 1
        }

        fn read(&self, first: u32, shown: &[Tag]) {
            let blocks = shown.len() as u32;
            let op = self.call(9, What::Read(Vec::new()), first, blocks);
            self.0.answer(op, Some(shown.to_vec()));
        }

        fn flush(&self, client: usize) {
            let op = self.call(client, What::Flush, 0, 0);
            self.0.answer(op, None);
        }

        fn lose_power(&self) {
            let at = self.0.now();
            self.0.losses.borrow_mut().push(Loss { node: 0, at });
        }

        fn snapshot(&self, called: u64, shown: &[(u32, Tag)]) {
            self.0.snaps.borrow_mut().push(Snap {
                name: "s".to_owned(),
                volumes: vec![0],
                invoked: called,
                answered: self.0.now(),
                taken: true,
                shown: shown
                    .iter()
                    .map(|(block, tag)| ((0, *block), *tag))
                    .collect(),
                ..Snap::default()
            });
        }

        fn violations(&self) -> usize {
            all(&self.0, &|_, _| vec![(0, 0)]).len()
        }
    }

    #[test]
    fn an_old_value_is_seen_after_a_newer_one() {
        let story = Story::default();
        let (old, new) = (story.write(1, 0, 1), story.write(2, 0, 1));
        story.read(0, &[new]);
        assert_eq!(story.violations(), 0);
        story.read(0, &[old]);
        assert_eq!(story.violations(), 1);
    }

    #[test]
    fn two_reads_disagree_about_writes_that_have_ended() {
        let story = Story::default();
        let (one, other) = (
            story.call(1, What::Write, 0, 1),
            story.call(2, What::Write, 0, 1),
        );
        story.0.answer(one, None);
        story.0.answer(other, None);
        story.read(0, &[one as Tag + 1]);
        assert_eq!(story.violations(), 0);
        story.read(0, &[other as Tag + 1]);
        assert_eq!(story.violations(), 1);
    }

    #[test]
    fn a_write_that_failed_may_come_at_any_time() {
        let story = Story::default();
        let lost = story.call(1, What::Write, 0, 1) as Tag + 1;
        let new = story.write(2, 0, 1);
        story.read(0, &[new]);
        story.read(0, &[lost]);
        assert_eq!(story.violations(), 0);
    }

    #[test]
    fn only_what_was_flushed_survives_power_loss() {
        let story = Story::default();
        let old = story.write(1, 0, 1);
        story.flush(1);
        story.write(1, 0, 1);
        story.lose_power();
        story.read(0, &[old]);
        assert_eq!(story.violations(), 0, "it was not flushed");
        let story = Story::default();
        let old = story.write(1, 0, 1);
        let new = story.write(1, 0, 1);
        story.flush(1);
        story.lose_power();
        story.read(0, &[new]);
        assert_eq!(story.violations(), 0);
        story.read(0, &[old]);
        assert_eq!(story.violations(), 1, "a flushed write is gone");
    }

    #[test]
    fn a_flush_after_power_loss_answers_for_what_its_client_wrote_before() {
        let story = Story::default();
        let old = story.write(1, 0, 1);
        story.flush(1);
        let new = story.write(1, 0, 1);
        story.lose_power();
        story.read(0, &[old]);
        story.flush(1);
        story.read(0, &[new]);
        assert_eq!(story.violations(), 0);
        story.read(0, &[old]);
        assert_eq!(story.violations(), 1);
        let story = Story::default();
        let old = story.write(2, 0, 1);
        story.flush(2);
        story.write(1, 0, 1);
        story.lose_power();
        story.flush(2);
        story.read(0, &[old]);
        assert_eq!(story.violations(), 0, "its own client has not flushed");
        story.flush(1);
        story.read(0, &[old]);
        assert_eq!(story.violations(), 1);
    }

    #[test]
    fn what_went_through_one_server_is_lost_or_flushed() {
        let story = Story::default();
        let client = story.0.enter(1);
        let old = story.write(client, 0, 1);
        story.flush(client);
        let new = story.write(client, 0, 1);
        story.lose_power();
        story.read(0, &[old]);
        assert_eq!(story.violations(), 0, "it was not flushed");
        let other = story.0.enter(1);
        story.flush(other);
        story.read(0, &[old]);
        assert_eq!(story.violations(), 0, "the flush of another connection");
        story.read(0, &[new]);
        assert_eq!(story.violations(), 1, "nobody sends it again");
        let story = Story::default();
        let client = story.0.enter(1);
        let old = story.write(9, 0, 1);
        story.flush(9);
        story.write(client, 0, 1);
        story.lose_power();
        story.flush(client);
        story.read(0, &[old]);
        assert_eq!(story.violations(), 1, "the flush should have told the loss");
    }

    #[test]
    fn a_flush_under_way_may_have_covered_what_was_written_meanwhile() {
        let story = Story::default();
        let flush = story.call(1, What::Flush, 0, 0);
        story.write(1, 0, 1);
        story.0.answer(flush, None);
        let new = story.write(2, 0, 1);
        story.flush(2);
        story.lose_power();
        story.flush(1);
        story.read(0, &[new]);
        assert_eq!(story.violations(), 0, "nothing is sent again");
    }

    #[test]
    fn a_flush_does_not_answer_for_what_was_not_answered() {
        let story = Story::default();
        let new = story.call(1, What::Write, 0, 1);
        story.lose_power();
        story.flush(1);
        story.read(0, &[0]);
        story.0.answer(new, None);
        story.read(0, &[new as Tag + 1]);
        assert_eq!(story.violations(), 0);
        story.flush(1);
        story.read(0, &[0]);
        assert_eq!(story.violations(), 1);
    }

    #[test]
    fn changes_that_were_lost_come_back_in_their_order() {
        let story = Story::default();
        let (old, new) = (story.write(1, 0, 1), story.write(1, 0, 1));
        story.lose_power();
        story.read(0, &[old]);
        assert_eq!(story.violations(), 0, "the second one is still to come");
        story.flush(1);
        story.read(0, &[new]);
        assert_eq!(story.violations(), 0);
        story.read(0, &[old]);
        assert!(story.violations() > 0);
        let story = Story::default();
        let old = story.write(1, 0, 1);
        story.write(1, 0, 1);
        story.lose_power();
        story.flush(1);
        story.snapshot(story.0.now(), &[(0, old)]);
        assert!(story.violations() > 0);
    }

    #[test]
    fn a_snapshot_lacks_what_was_known_before_something_in_it_was_called() {
        let story = Story::default();
        let called = story.0.now();
        let first = story.write(1, 0, 1);
        let second = story.write(2, 1, 1);
        story.snapshot(called, &[(0, first), (1, second)]);
        story.snapshot(called, &[(0, first), (1, 0)]);
        story.snapshot(called, &[(0, 0), (1, 0)]);
        assert_eq!(story.violations(), 0);
        story.snapshot(called, &[(0, 0), (1, second)]);
        assert_eq!(story.violations(), 1);
    }

    #[test]
    fn a_hidden_channel_counts_and_so_does_the_command() {
        let story = Story::default();
        let called = story.0.now();
        let first = story.call(1, What::Write, 0, 1);
        story.read(0, &[first as Tag + 1]);
        let second = story.write(2, 1, 1);
        story.0.answer(first, None);
        story.snapshot(called, &[(0, 0), (1, second)]);
        assert_eq!(story.violations(), 1, "it was read before");
        let story = Story::default();
        story.write(1, 0, 1);
        let called = story.0.now();
        story.snapshot(called, &[(0, 0)]);
        assert_eq!(
            story.violations(),
            1,
            "it was acknowledged before the command"
        );
    }

    /// As U-07 has it: a stock client that writes through two servers is not covered by `stamp`.
    #[test]
    fn stamps_follow_clients_and_servers_and_no_hidden_channel() {
        let lacks_the_first = |clients: [usize; 2], owners: Owners<'_>| {
            let story = Story::default();
            let called = story.0.now();
            story.write(clients[0], 0, 1);
            let second = story.write(clients[1], 1, 1);
            story.snapshot(called, &[(0, 0), (1, second)]);
            story.0.snaps.borrow_mut()[0].procedure = Procedure::Stamp;
            all(&story.0, owners).len()
        };
        let two = |_, block: u32| vec![(0, block as usize)];
        assert_eq!(lacks_the_first([1, 2], &two), 0);
        assert_eq!(
            lacks_the_first([1, 1], &two),
            1,
            "the client carries the clock"
        );
        assert_eq!(
            lacks_the_first([1, 2], &|_, _| vec![(0, 0)]),
            1,
            "the server has it"
        );
    }

    #[test]
    fn a_rollback_brings_back_what_was_written_over_and_flushed() {
        let story = Story::default();
        let old = story.write(1, 0, 1);
        let new = story.write(1, 0, 1);
        story.flush(1);
        let rollback = story.call(2, What::Become(Rc::new([old])), 0, 1);
        story.read(0, &[new]);
        story.read(0, &[old]);
        story.0.answer(rollback, None);
        story.lose_power();
        story.read(0, &[old]);
        assert_eq!(story.violations(), 0);
        story.read(0, &[new]);
        assert_eq!(story.violations(), 1, "it was undone");
        let story = Story::default();
        let old = story.write(1, 0, 1);
        let rollback = story.call(2, What::Become(Rc::new([old])), 0, 1);
        story.0.answer(rollback, None);
        story.write(1, 0, 1);
        story.flush(1);
        story.read(0, &[old]);
        assert_eq!(story.violations(), 1, "it was written over after that");
    }

    #[test]
    fn a_request_over_several_blocks_is_whole_or_not_at_all() {
        let story = Story::default();
        let called = story.0.now();
        let both = story.write(1, 0, 2);
        story.snapshot(called, &[(0, both), (1, both)]);
        assert_eq!(story.violations(), 0);
        story.snapshot(called, &[(0, both), (1, 0)]);
        assert!(story.violations() > 0);
        assert_ne!(both, NEVER as Tag);
    }
}
