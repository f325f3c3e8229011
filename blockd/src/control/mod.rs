//! The control plane: pure state machines. Nothing here does IO or reads a clock.

pub mod balance;
pub mod calendar;
pub mod lease;
pub mod network;
pub mod recovery;
pub mod registry;
pub mod schedule;
pub mod snapshot;
