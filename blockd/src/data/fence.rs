//! The fence of a volume at an owner: whose changes are executed under its exclusive writer lease.
//!
//! The lease itself is a fact of the registry; its copy here may be behind. Two things make up for
//! that. An owner *confirms* a lease epoch only when its copy has it, no change that was admitted
//! under another one is still being executed, and the epoch is in a file. And it executes no change
//! while its copy is older than what it has confirmed: so a restart, after which the copy may be
//! older, brings nothing back. As nobody holds a lease, and no volume is opened to everybody, before
//! all owners have confirmed, the writers of two lease epochs are never executed at the same time,
//! on whatever owners.

use super::error::DataError;
use crate::id::LeaseEpoch;
use std::rc::Rc;

/// Who may change the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Writers {
    /// Everybody who holds no lease.
    All,
    /// Whoever has the epoch of the fence.
    Holder,
    Nobody,
}

/// What the registry's copy says of the lease of a volume.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Fence {
    pub epoch: LeaseEpoch,
    pub writers: Writers,
    /// Why others are refused; names the holder.
    pub text: Rc<str>,
}

impl Default for Fence {
    fn default() -> Self {
        Self {
            epoch: LeaseEpoch(0),
            writers: Writers::All,
            text: "".into(),
        }
    }
}

/// The fence, with the changes that it has let through.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct FenceGate {
    fence: Fence,
    /// The newest epoch that was confirmed.
    confirmed: LeaseEpoch,
    /// Changes that are being executed.
    executing: u32,
    /// Those of them that were admitted under an earlier epoch.
    earlier: u32,
}

impl FenceGate {
    #[must_use]
    pub fn new(confirmed: LeaseEpoch) -> Self {
        Self {
            confirmed,
            ..Self::default()
        }
    }

    /// Takes over what the registry's copy says.
    pub fn publish(&mut self, fence: Fence) {
        if fence.epoch != self.fence.epoch {
            self.earlier = self.executing;
        }
        self.fence = fence;
    }

    /// Whether the registry's copy is older than what was confirmed before a restart.
    #[must_use]
    pub fn is_behind(&self, lease: LeaseEpoch) -> bool {
        self.fence.epoch < self.confirmed.max(lease)
    }

    /// Whether a change of a requester with this lease epoch is executed.
    ///
    /// # Errors
    /// [`DataError::Leased`]; or [`DataError::Unavailable`] while the copy is behind.
    pub fn check(&self, lease: LeaseEpoch) -> Result<(), DataError> {
        if self.is_behind(lease) {
            let text = "this server has not heard yet who may write the volume";
            return Err(DataError::Unavailable(text.to_owned()));
        }
        let admitted = match self.fence.writers {
            Writers::All => lease == LeaseEpoch(0),
            Writers::Holder => lease == self.fence.epoch,
            Writers::Nobody => false,
        };
        match (admitted, self.fence.writers) {
            (true, _) => Ok(()),
            (false, Writers::All) => Err(DataError::Leased(format!(
                "the lease of epoch {lease} is over"
            ))),
            (false, _) => Err(DataError::Leased(self.fence.text.as_ref().to_owned())),
        }
    }

    /// Begins to execute a change; gives the epoch with which it must be ended.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn begin(&mut self, lease: LeaseEpoch) -> Result<LeaseEpoch, DataError> {
        self.check(lease)?;
        self.executing += 1;
        Ok(self.fence.epoch)
    }

    /// A change that began at this epoch is executed. True if it was the last of an earlier epoch.
    pub fn end(&mut self, began: LeaseEpoch) -> bool {
        self.executing -= 1;
        let earlier = began != self.fence.epoch;
        self.earlier -= u32::from(earlier);
        earlier && self.earlier == 0
    }

    /// The epoch that can be confirmed: no change of an earlier one is being executed.
    #[must_use]
    pub fn drained(&self) -> Option<LeaseEpoch> {
        (self.earlier == 0).then_some(self.fence.epoch)
    }

    /// The epoch was confirmed, durably.
    pub fn confirm(&mut self, epoch: LeaseEpoch) {
        self.confirmed = self.confirmed.max(epoch);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fence(epoch: u32, writers: Writers) -> Fence {
        Fence {
            epoch: LeaseEpoch(epoch),
            writers,
            text: "leased to h1".into(),
        }
    }

    fn gate(epoch: u32, writers: Writers) -> FenceGate {
        let mut gate = FenceGate::default();
        gate.publish(fence(epoch, writers));
        gate
    }

    #[test]
    fn only_the_writers_of_the_epoch_are_admitted() {
        let refused = |gate: &FenceGate, lease| {
            matches!(gate.check(LeaseEpoch(lease)), Err(DataError::Leased(_)))
        };
        let free = gate(4, Writers::All);
        assert_eq!(free.check(LeaseEpoch(0)), Ok(()));
        assert!(refused(&free, 4) && refused(&free, 3));
        let held = gate(4, Writers::Holder);
        assert_eq!(held.check(LeaseEpoch(4)), Ok(()));
        assert!(refused(&held, 0) && refused(&held, 3));
        let closed = gate(4, Writers::Nobody);
        assert!(refused(&closed, 0) && refused(&closed, 3) && refused(&closed, 4));
        assert_eq!(
            closed.check(LeaseEpoch(0)),
            Err(DataError::Leased("leased to h1".to_owned()))
        );
    }

    #[test]
    fn a_copy_behind_what_was_confirmed_admits_nothing() {
        let mut gate = FenceGate::new(LeaseEpoch(5));
        gate.publish(fence(3, Writers::Holder));
        for lease in [0, 3, 5] {
            let refused = gate.check(LeaseEpoch(lease));
            assert!(matches!(refused, Err(DataError::Unavailable(_))), "{lease}");
        }
        gate.publish(fence(5, Writers::All));
        assert_eq!(gate.check(LeaseEpoch(0)), Ok(()));
        let newer = gate.check(LeaseEpoch(6));
        assert!(matches!(newer, Err(DataError::Unavailable(_))), "{newer:?}");
    }

    #[test]
    fn an_epoch_is_drained_when_the_changes_of_all_earlier_ones_have_ended() {
        let mut gate = gate(0, Writers::All);
        let (first, second) = (
            gate.begin(LeaseEpoch(0)).unwrap(),
            gate.begin(LeaseEpoch(0)).unwrap(),
        );
        assert_eq!(gate.drained(), Some(LeaseEpoch(0)));
        gate.publish(fence(1, Writers::Holder));
        let own = gate.begin(LeaseEpoch(1)).unwrap();
        assert_eq!(gate.drained(), None);
        assert!(!gate.end(first));
        gate.publish(fence(2, Writers::Nobody));
        assert!(!gate.end(own));
        assert_eq!(gate.drained(), None);
        assert!(gate.end(second));
        assert_eq!(gate.drained(), Some(LeaseEpoch(2)));
    }
}
