//! `blockd`: partitioned block volumes layered across peer servers.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod admin;
pub mod client;
pub mod control;
pub mod data;
pub mod id;
pub mod io;
pub mod limits;
pub mod node;
