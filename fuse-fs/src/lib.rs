//! Volumes and snapshots of blockd as files, and mounted with the kernel's filesystems.
//!
//! From the program down to the byte:
//!
//! | module | what |
//! |---|---|
//! | [`cli`] | the command `fuse-fs`: arguments, exit codes, one function per subcommand |
//! | [`helper`] | how mount(8) calls it |
//! | [`kernel_mount`], [`umount`] | `mount --kernel` and its reverse, step by step |
//! | [`loopdev`], [`superblock`], [`mountinfo`], [`state_file`] | what these need from the host |
//! | [`check_command`], [`mkfs_command`], [`ext4_source`] | `check` and `mkfs` on a volume or a file |
//! | [`mount`] | our own ext4 as a mounted filesystem |
//! | [`ext4`] | our own ext4: made, checked, read and written |
//! | [`daemon`] | the process that serves a mount: background, signals, deadlines by fork |
//! | [`adapter`] | FUSE requests to operations of the view |
//! | [`view`], [`open_file`] | the operations: names to volumes, bytes of one open volume |
//! | [`overlay`] | memory over a snapshot, where the kernel replays its journal |
//! | [`volumes`] | the tree `/volumes/NAME`, `/snapshots/NAME@SNAP` as pure data |
//! | [`backend`] | the seam: [`client_backend`] in the product, a double in the tests |

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod adapter;
pub mod backend;
pub mod check_command;
pub mod cli;
pub mod client_backend;
pub mod daemon;
pub mod error;
pub mod ext4;
pub mod ext4_source;
pub mod helper;
pub mod kernel_mount;
pub mod loopdev;
pub mod mkfs_command;
pub mod mount;
pub mod mountinfo;
pub mod open_file;
pub mod overlay;
pub mod state_file;
pub mod superblock;
pub mod umount;
pub mod view;
pub mod volumes;
