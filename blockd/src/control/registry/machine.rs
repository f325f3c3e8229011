//! The state machine that every registry server runs: the state and the outcomes of late.

use super::state::RegistryState;
use super::transaction::{Outcome, Refusal, Transaction};
use crate::limits::REGISTRY_OUTCOMES_KEPT;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// What the transaction with this id came to.
type Decided = (u128, Result<Outcome, Refusal>);

/// A transaction with an id of its own, so that a proposal that is repeated because its answer
/// was lost is executed once.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Command {
    /// The same for every repetition, different for every proposal.
    pub id: u128,
    /// What to do.
    pub transaction: Transaction,
}

/// State of the registry with the outcomes of the last commands.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    state: RegistryState,
    decided: VecDeque<Decided>,
}

impl Machine {
    /// The state after all commands so far.
    #[must_use]
    pub fn state(&self) -> &RegistryState {
        &self.state
    }

    /// A machine that begins with a state.
    #[must_use]
    pub fn restored(state: RegistryState) -> Self {
        Self {
            state,
            decided: VecDeque::new(),
        }
    }

    /// Executes a command, or repeats the outcome if it was executed of late.
    ///
    /// # Errors
    /// The transaction is malformed.
    pub fn execute(&mut self, command: &Command) -> Result<Outcome, Refusal> {
        if let Some((_, outcome)) = self.decided.iter().rev().find(|(id, _)| *id == command.id) {
            return outcome.clone();
        }
        let outcome = self.state.apply(&command.transaction);
        if self.decided.len() >= REGISTRY_OUTCOMES_KEPT {
            self.decided.pop_front();
        }
        self.decided.push_back((command.id, outcome.clone()));
        outcome
    }
}
