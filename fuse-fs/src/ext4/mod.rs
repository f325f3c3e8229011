//! ext4 on an asynchronous block device: no FUSE, no kernel, no other code.
//!
//! From the commands down to the byte:
//!
//! | module | what |
//! |---|---|
//! | [`check`] | whether a filesystem is consistent |
//! | [`mkfs`] | makes a filesystem |
//! | [`image`] | a filesystem with its journal replayed in memory |
//! | [`journal`] | jbd2: layout and replay |
//! | [`map`], [`extent`] | from an inode to the blocks of its file |
//! | [`dir`], [`leaf`] | blocks of directories: read, made, changed |
//! | [`htree`], [`growth`], [`hash`] | the index of a directory: read, made, grown |
//! | [`inode`] | inodes |
//! | [`xattr`], [`xattr_set`], [`acl`] | extended attributes: read, changed; those that are access control lists |
//! | [`superblock`], [`features`], [`group`] | what the filesystem is, and where its parts lie |
//! | [`crc`], [`bytes`], [`error`] | checksums, numbers, findings |
//! | [`device`] | the seam below |

pub mod acl;
pub mod bytes;
pub mod check;
pub mod crc;
pub mod device;
pub mod dir;
pub mod error;
pub mod extent;
pub mod features;
pub mod group;
pub mod growth;
pub mod hash;
pub mod htree;
pub mod image;
pub mod inode;
pub mod journal;
pub mod leaf;
pub mod map;
pub mod mkfs;
pub mod superblock;
pub mod xattr;
pub mod xattr_set;
