//! The path of a byte, top to bottom: volume, router, forward or owner, page store.

pub mod cut;
pub mod error;
pub mod fence;
pub mod forward;
mod interrupted;
pub mod lineage;
pub mod moving;
pub mod owner;
pub mod page_store;
pub mod router;
pub mod span;
pub mod traffic;
pub mod volume;
