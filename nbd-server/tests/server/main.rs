//! The built program under real clients; the table of the protocol's rules is in the crate `blockd-tests`.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod clients;
mod pki;
mod support;
mod tls;
mod tls_clients;
