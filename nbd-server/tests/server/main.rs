//! The built program under real clients and under a client that says anything.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod clients;
mod oracle;
mod pki;
mod support;
mod tls;
