//! The only code that touches sockets, files and time. It knows bytes and messages, no policy.

pub mod disk;
pub mod framed;
pub mod host;
pub mod link;
pub mod raft;
pub mod sim_disk;
pub mod wire;
