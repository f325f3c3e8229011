//! A volume or snapshot mounted with our own ext4, over FUSE.
//!
//! | module | what |
//! |---|---|
//! | [`serve`] | from the command to the end of the mount |
//! | [`options`] | the options of mount(8) |
//! | [`session`] | the connection with the kernel |
//! | [`adapter`], [`answer`] | FUSE requests, and how they get their answers |
//! | [`requests`], [`replies`], [`attributes`] | what is asked, and what is answered, in the form of FUSE |
//! | [`kernel_cache`] | data that the kernel has not written |
//! | [`files`], [`change`] | the operations |
//! | [`node_id`], [`references`] | the numbers of files, and which of them the kernel knows |
//! | [`snapshots`] | `.snapshot` |
//! | [`timely`] | deadlines of the device |
//! | [`tuning`], [`awake`] | what the kernel must be told besides |
//! | [`stats`], [`stats_command`] | counts and latencies |
//! | [`grow_command`] | growth, as it is asked for |

pub mod adapter;
pub mod answer;
pub mod attributes;
pub mod awake;
pub mod change;
pub mod files;
pub mod grow_command;
pub mod kernel_cache;
pub mod node_id;
pub mod options;
pub mod references;
pub mod replies;
pub mod requests;
pub mod serve;
pub mod session;
pub mod snapshots;
pub mod stats;
pub mod stats_command;
pub mod timely;
pub mod tuning;
