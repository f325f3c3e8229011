//! The place that sees data, control and io together.

pub mod registry;
