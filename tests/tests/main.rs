//! The system tests: real `blockd` processes under real clients. One binary, a module a subject.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "system/nbd_clients.rs"]
mod nbd_clients;
#[path = "system/routing.rs"]
mod routing;
