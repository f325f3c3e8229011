//! The only code that touches sockets, files and time. It knows bytes and messages, no policy.

pub mod device;
pub mod disk;
pub mod environment;
pub mod framed;
pub mod hlc;
pub mod host;
pub mod link;
pub mod net;
pub mod raft;
pub mod sim_disk;
pub mod state_dir;
pub mod wire;
