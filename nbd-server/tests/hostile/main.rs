//! Clients that send anything, in any pieces, and leave at any point: nothing panics, nothing hangs,
//! each request gets one reply, and data is what was written.
#![allow(clippy::unwrap_used, clippy::expect_used, unreachable_pub)]

#[path = "../../fuzz/src/lib.rs"]
mod fuzz;
mod seeds;
mod slow;
mod streams;
