//! Compare-and-set transactions: the only way to change the registry.

use super::name::NameError;
use super::object::{Key, Object};
use super::routes::RouteError;
use crate::id::Revision;
use crate::limits::{NAME_CHARS_MAX, REGISTRY_TEXT_BYTES_MAX, TRANSACTION_STEPS_MAX};
use serde::{Deserialize, Serialize};

/// All of it or nothing: if every expectation holds, every change is made.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Transaction {
    /// The revision that last changed an object; `Revision(0)`: there is no such object.
    pub expect: Vec<(Key, Revision)>,
    /// New objects; `None` removes. A later change of the same key wins.
    pub changes: Vec<(Key, Option<Object>)>,
}

/// What became of a transaction.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Outcome {
    /// Done; every changed object has this revision.
    Committed(Revision),
    /// Nothing was changed.
    Conflict {
        /// The first expectation that did not hold.
        key: Key,
        /// Its revision; 0 if there is no such object.
        found: Revision,
    },
}

/// Why a transaction can never be executed, whatever the state.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error, Serialize, Deserialize)]
pub enum Refusal {
    /// Too many expectations or changes.
    #[error("the transaction has {0} steps: make it {TRANSACTION_STEPS_MAX} at the most")]
    TooManySteps(usize),
    /// Too many bytes once encoded.
    #[error("the transaction has {0} bytes: split it")]
    TooLarge(usize),
    /// Object and key do not belong together.
    #[error("the object given for {0} is of another kind or has another id")]
    WrongObject(Key),
    /// A name in a key or an object.
    #[error(transparent)]
    Name(#[from] NameError),
    /// A routing table.
    #[error(transparent)]
    Route(#[from] RouteError),
    /// A text field over its limit.
    #[error("{0} is too long: give {REGISTRY_TEXT_BYTES_MAX} bytes at the most")]
    TextTooLong(String),
    /// Node numbers start at 1.
    #[error("node number 0 means no node: number nodes from 1")]
    NodeZero,
    /// Owners of a snapshot over the limit.
    #[error("a snapshot on {0} servers is over the limit")]
    TooManyOwners(usize),
}

impl Transaction {
    /// An empty transaction, to be filled by [`Self::expect`], [`Self::put`] and [`Self::remove`].
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the expectation that `key` was last changed by `revision` (0: is absent).
    #[must_use]
    pub fn expect(mut self, key: Key, revision: Revision) -> Self {
        self.expect.push((key, revision));
        self
    }

    /// Adds a new object.
    #[must_use]
    pub fn put(mut self, key: Key, object: Object) -> Self {
        self.changes.push((key, Some(object)));
        self
    }

    /// Adds a removal.
    #[must_use]
    pub fn remove(mut self, key: Key) -> Self {
        self.changes.push((key, None));
        self
    }

    /// Checks everything that does not depend on the state of the registry.
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self) -> Result<(), Refusal> {
        let steps = self.expect.len().max(self.changes.len());
        if steps > TRANSACTION_STEPS_MAX {
            return Err(Refusal::TooManySteps(steps));
        }
        let keys = self.expect.iter().map(|(key, _)| key);
        keys.chain(self.changes.iter().map(|(key, _)| key))
            .try_for_each(check_key)?;
        let objects = self
            .changes
            .iter()
            .filter_map(|(key, object)| Some((key, object.as_ref()?)));
        objects
            .into_iter()
            .try_for_each(|(key, object)| object.check(key))
    }
}

fn check_key(key: &Key) -> Result<(), Refusal> {
    match key {
        Key::VolumeName(name) | Key::SnapshotName(_, name) | Key::Network(name)
            if name.len() > NAME_CHARS_MAX =>
        {
            Err(NameError::TooLong(name.len()).into())
        }
        _ => Ok(()),
    }
}
