//! ext4 on an asynchronous block device: no FUSE, no kernel, no other code.
//!
//! From the commands down to the byte:
//!
//! | module | what |
//! |---|---|
//! | [`namespace`] | the operations on names and attributes |
//! | [`filesystem`] | a mounted filesystem: open, sync, close |
//! | [`handle`], [`transaction`], [`commit`] | operations, the transaction they share, its way to the disk |
//! | [`read`], [`mod@write`], [`writeback`] | data of files: from memory, to memory, to the disk |
//! | [`truncate`], [`fallocate`], [`trim`], [`statfs`] | sizes and space |
//! | [`mapping`], [`extent_tree`], [`indirect`], [`deletion`] | finding, adding and giving up blocks of a file |
//! | [`inode_cell`], [`raw_inode`], [`orphans`], [`orphan_file`], [`time`] | inodes while they are in use |
//! | [`groups`], [`block_space`], [`inode_space`], [`bitmap`] | which blocks and inodes are given away |
//! | [`cache`], [`measures`] | blocks of metadata in memory; how often they were there, what commits took |
//! | [`resize`] | grows a mounted filesystem |
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
pub mod bitmap;
pub mod block_space;
pub mod bytes;
pub mod cache;
pub mod check;
pub mod commit;
pub mod crc;
pub mod deletion;
pub mod device;
pub mod dir;
pub mod error;
pub mod extent;
pub mod extent_tree;
pub mod fallocate;
pub mod features;
pub mod file_data;
pub mod filesystem;
pub mod group;
pub mod groups;
pub mod growth;
pub mod handle;
pub mod hash;
pub mod htree;
pub mod image;
pub mod indirect;
pub mod inode;
pub mod inode_cell;
pub mod inode_space;
pub mod journal;
pub mod leaf;
pub mod map;
pub mod mapping;
pub mod measures;
pub mod mkfs;
pub mod namespace;
pub mod orphan_file;
pub mod orphans;
pub mod raw_inode;
pub mod read;
pub mod resize;
pub mod statfs;
pub mod superblock;
pub mod time;
pub mod transaction;
pub mod trim;
pub mod truncate;
pub mod write;
pub mod writeback;
pub mod xattr;
pub mod xattr_set;
