//! Attachments: a volume as `/dev/nbdX` or as a unix socket of this host, which outlives the servers' deaths.
//!
//! Each attachment is a process of its own. It is a client of the group (`crate::client`) on one
//! side, which waits for servers and repeats what they did not answer, and an NBD server on the
//! other: for the kernel over a socketpair, for QEMU and libnbd over a socket in the file system.
//!
//! ```text
//! daemon       one attachment from its start to its detach       daemon.rs
//! leg          the volume as an NBD export                        leg.rs
//! place        the socket or device that it is found at           place.rs
//! proxy        the kernel's device on it                          proxy.rs
//! exclusive    the writer lease                               exclusive.rs
//! direct       the kernel's device on the servers' sockets       direct.rs
//! record       what is attached here, and who serves it           record.rs
//! control      status, move and detach of a running daemon        control.rs, status.rs
//! names        /dev/blockd/VOL                                    names.rs
//! process      memory lock, OOM score, readiness                  process.rs
//! ```

mod control;
mod daemon;
mod direct;
mod error;
mod exclusive;
mod leg;
mod names;
mod place;
mod process;
mod proxy;
mod record;
mod status;

pub use control::{ControlReply, ControlRequest, ask};
pub use daemon::{key_of, open, run};
pub use error::{AttachError, AttachErrorKind};
pub use process::Ready;
pub use proxy::{detach_unserved, name_of};
pub use record::{Ha, Record, Spec, StateDir, VolumeKey};
pub use status::{Counts, LastError, ServerStatus, State, Status};
