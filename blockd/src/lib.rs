//! `blockd`: partitioned block volumes layered across peer servers.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod control;
pub mod id;
pub mod io;
pub mod limits;
pub mod node;
