//! `blockd`: partitioned block volumes layered across peer servers.
//!
//! A volume is cut into pages; every server has the routing table and forwards what it does not
//! own, so that a client sees the group as one server with several addresses. `DESIGN.md` beside
//! this crate says what is promised and what each promise rests on.
//!
//! | module | what it is |
//! |---|---|
//! | [`id`], [`limits`] | ids and units as types; every limit with its reason |
//! | [`data`] | the path of a byte: volume, router, forward, owner, page store |
//! | [`control`] | agreed facts and decisions as pure state machines: registry, snapshot |
//! | [`io`] | sockets, frames, disk, time, consensus log: the only code that touches them |
//! | [`node`] | one server: the only place that sees the three above together |
//! | [`client`] | a volume for programs on other hosts: direct to the owner, retry, replay |
//! | [`attach`] | a volume as `/dev/nbdX` or as a unix socket of this host |
//! | [`backup`] | snapshots to streams and archives, and back |
//! | [`admin`] | what `blockctl` asks and what a server answers |
//!
//! Directions: `data` and `control` do not know each other; both know `id` and `limits`; `node` and
//! `client` stand on top. `scripts/tidy.py` checks it.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod admin;
pub mod attach;
pub mod backup;
pub mod client;
pub mod control;
pub mod data;
pub mod id;
pub mod io;
pub mod limits;
pub mod node;
pub mod planted;
