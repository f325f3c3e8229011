//! The only code that touches sockets, files and time.

pub mod disk;
pub mod sim_disk;
