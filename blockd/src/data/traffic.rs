//! What an owner executed of a volume since its start: counted for metrics, never reset.

use std::cell::Cell;

/// Requests of one kind.
#[derive(Debug, Default)]
pub struct Counter {
    requests: Cell<u64>,
    bytes: Cell<u64>,
    errors: Cell<u64>,
}

/// Requests of all kinds that the store executed.
#[derive(Debug, Default)]
pub struct Traffic {
    pub reads: Counter,
    pub writes: Counter,
    pub zeroes: Counter,
}

/// What a [`Counter`] has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub requests: u64,
    pub bytes: u64,
    pub errors: u64,
}

impl Counter {
    /// Counts a request by how it ended, and hands that back.
    pub(super) fn count<T, E>(&self, len_bytes: u32, ended: Result<T, E>) -> Result<T, E> {
        let add = |to: &Cell<u64>, more: u64| to.set(to.get().wrapping_add(more));
        add(&self.requests, 1);
        match ended {
            Ok(_) => add(&self.bytes, len_bytes.into()),
            Err(_) => add(&self.errors, 1),
        }
        ended
    }

    /// So far.
    #[must_use]
    pub fn get(&self) -> Count {
        Count {
            requests: self.requests.get(),
            bytes: self.bytes.get(),
            errors: self.errors.get(),
        }
    }
}
