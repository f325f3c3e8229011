//! The harness of the system tests: real servers on loopback addresses, real clients, oracles.
//!
//! A [`Cluster`] starts servers from the binaries beside the test's own (`cargo build --workspace`
//! makes them), on addresses that no other test uses and in temporary directories. Dropping it,
//! also in a panic, stops every process by its pid. The oracles ([`Register`], [`Chain`], [`Sharers`]) know
//! only the promises of the design and none of the code that they judge.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod address;
mod attachment;
mod chain;
mod cluster;
mod guest;
mod http;
mod lan;
mod linear;
mod mount;
mod nbd;
pub mod nbd_raw;
mod nbd_server;
pub mod nbd_table;
mod peer;
mod program;
mod proxy;
mod random;
mod register;
mod s3;
mod server;

pub use address::AddressBlock;
pub use attachment::Attachments;
pub use chain::{Chain, Progress, Tag};
pub use cluster::{Cluster, ClusterOptions, MIB};
pub use guest::{Guest, GuestJob};
pub use http::{Http, HttpAnswer};
pub use lan::Lan;
pub use linear::{Shared, Sharers, check_shared};
pub use mount::{FuseMount, Tmpfs};
pub use nbd::{NbdConnection, NbdError, Reply};
pub use nbd_server::{NbdServer, Usage};
pub use peer::Peer;
pub use program::{Ran, binary, run, try_run};
pub use proxy::{Delay, Network, Passed};
pub use random::Random;
pub use register::{Content, Register};
pub use s3::S3Server;
pub use server::Server;
