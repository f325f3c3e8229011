//! The only code that touches sockets, files and time.

pub mod raft;
