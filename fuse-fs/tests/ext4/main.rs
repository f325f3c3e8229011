//! Our ext4 against e2fsprogs and the kernel: images made and filled by them, judged by both.
//!
//! They need root and loop devices, and fail where these are missing. `FUSE_FS_EXT4_ROUNDS` makes the random
//! tests longer.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod clean;
mod command;
mod crash;
mod crowd;
mod damage;
mod data;
mod hostile;
mod image;
mod journal;
mod kernel_side;
mod late;
mod losses;
mod mkfs;
mod operations;
mod our_side;
mod recorder;
mod resize;
mod shadow;
mod systematic;
mod trim;
mod write;
