//! Real mounts over the double: the view as files, loop devices on it, the kernel's filesystems.
//!
//! They need root, /dev/fuse and loop devices, and fail where these are missing.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod bench;
mod faults;
mod kernel;
mod own;
mod own_write;
mod shadow;
mod view;
