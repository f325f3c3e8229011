//! What the filesystem found, as answers of FUSE.

use super::attributes::{file_attr, file_type, unknown};
use super::files::{Files, Found, Line};
use super::node_id::NodeId;
use crate::ext4::inode::{self, Kind};
use fuser::{
    FileHandle, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyCreate, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEntry,
};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

/// How long the kernel may believe what it was told: nobody else changes it.
const FOR_EVER: Duration = Duration::from_secs(10 * 365 * 86_400);
/// A snapshot can be deleted by others.
const SNAPSHOTS_TTL: Duration = Duration::from_secs(1);

pub(super) fn entry(reply: ReplyEntry, found: &Found) {
    let attr = file_attr(found, found.id.number());
    let generation = Generation(u64::from(found.attr.generation));
    reply.entry_with_ttls(&attr_ttl(found), &ttl(found.id), &attr, generation);
}

/// The number 0 stands for "no such name", which the kernel remembers.
pub(super) fn looked_up(reply: ReplyEntry, found: Option<Found>) {
    match found {
        Some(found) => entry(reply, &found),
        None => reply.entry(&FOR_EVER, &unknown(Kind::Regular), Generation(0)),
    }
}

/// How many blocks a file has is known when its data has left memory.
fn attr_ttl(found: &Found) -> Duration {
    match found.attr.settled {
        true => ttl(found.id),
        false => Duration::ZERO,
    }
}

fn ttl(id: NodeId) -> Duration {
    match id {
        NodeId::Snapshots | NodeId::Frozen(_, inode::ROOT) => SNAPSHOTS_TTL,
        NodeId::Main(_) | NodeId::Frozen(..) => FOR_EVER,
    }
}

pub(super) fn created(reply: ReplyCreate, found: &Found, how: FopenFlags) {
    let attr = file_attr(found, found.id.number());
    let generation = Generation(u64::from(found.attr.generation));
    reply.created(&FOR_EVER, &attr, generation, FileHandle(0), how);
}

pub(super) fn attr(reply: ReplyAttr, found: &Found) {
    reply.attr(&attr_ttl(found), &file_attr(found, found.id.shown()));
}

/// As many lines as there is room for.
pub(super) fn names(mut reply: ReplyDirectory, lines: Vec<Line>) {
    for line in lines {
        let (ino, name) = (INodeNo(line.id.shown()), OsStr::from_bytes(&line.name));
        if reply.add(ino, line.next, file_type(line.kind), name) {
            break;
        }
    }
    reply.ok();
}

/// Adds a line with the attributes of its file; whether it no longer fits. A file that cannot be read
/// has the number 0, with which its name is shown all the same.
pub(super) fn add_plus(
    reply: &mut ReplyDirectoryPlus,
    line: &Line,
    found: Option<&Found>,
    files: &Files,
) -> bool {
    let itself = matches!(line.name.as_slice(), b"." | b"..");
    let (attr, generation) = match found {
        Some(found) if itself => (file_attr(found, found.id.shown()), 0),
        Some(found) => (file_attr(found, found.id.number()), found.attr.generation),
        None => (unknown(line.kind), 0),
    };
    let (name, ttl) = (OsStr::from_bytes(&line.name), ttl(line.id));
    let generation = Generation(u64::from(generation));
    let full = reply.add(attr.ino, line.next, name, &ttl, &attr, generation);
    if !full && !itself && found.is_some() {
        files.learn(line.id);
    }
    full
}
