//! The path of a byte, top to bottom.

pub mod page_store;
