//! What an implementor provides: [`Exports`] (the names) and [`Export`] (one opened export).
//!
//! The server checks everything that a client may get wrong (range, flags, read-only, length) before it calls an export, so that
//! every `offset + len` is at most the size returned by `info()` for that request, and `len` is never 0. Many requests of one
//! connection run concurrently and may complete in any order; a request that is ready at its first poll costs no allocation.
//! A future is dropped when the server is stopped by force, and when its client is gone without a goodbye: the client may have sent
//! the request again over another connection, and it must not be executed behind that: an export that works elsewhere (on a
//! helper thread) and cannot be stopped lets that end before it makes later changes. After DISC every started request runs to its end.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;

use crate::error::{ExportError, OpenError};
use crate::peer::Peer;

/// What a client may know of an export. Read anew for every request, so it must be cheap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes; may change while clients are connected (clients notice when they reconnect).
    pub size_bytes: u64,
    /// Writes, trims and zeroes are refused with EPERM.
    pub read_only: bool,
    /// A flush on one connection covers the completed writes of all connections.
    pub can_multi_conn: bool,
    /// A hint that seeks are slow.
    pub rotational: bool,
    /// Preferred request size and alignment in bytes: a power of 2, 512 or more.
    pub preferred_block_bytes: u32,
    /// Zeroes with `ZeroFlags::fast` are understood: done without writing data, or refused with `NbdErrno::NotSup` at once.
    pub fast_zero: bool,
}

impl ExportInfo {
    /// Writable, multi-connection, not rotational, 4096-byte blocks preferred, no fast zeroes.
    pub const fn new(size_bytes: u64) -> Self {
        Self {
            size_bytes,
            read_only: false,
            can_multi_conn: true,
            rotational: false,
            preferred_block_bytes: 4096,
            fast_zero: false,
        }
    }
}

/// A run of bytes in the answer to a read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadPart {
    /// These bytes; they go to the socket without another copy.
    Data(Bytes),
    /// So many bytes that read as zeroes; sent as a hole to clients that understand it.
    Hole(u32),
}

impl ReadPart {
    /// Length in bytes.
    pub fn len_bytes(&self) -> u64 {
        match self {
            Self::Data(data) => data.len() as u64,
            Self::Hole(len_bytes) => u64::from(*len_bytes),
        }
    }
}

/// The answer to a read: parts in order that together cover the range exactly (anything else is answered EIO).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReadReply {
    /// The usual case, without an allocation for a list.
    One(ReadPart),
    /// Several parts; neighbouring data parts leave as one chunk.
    Parts(Vec<ReadPart>),
}

impl ReadReply {
    /// The parts in order.
    pub fn parts(&self) -> &[ReadPart] {
        match self {
            Self::One(part) => std::slice::from_ref(part),
            Self::Parts(parts) => parts,
        }
    }
}

impl From<Bytes> for ReadReply {
    fn from(data: Bytes) -> Self {
        Self::One(ReadPart::Data(data))
    }
}

/// What a metadata context tells about ranges of an export.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum MetaContext {
    /// `base:allocation` (NBD protocol): `Extent::HOLE` and `Extent::ZERO`.
    Allocation,
    /// `qemu:allocation-depth` (QEMU, docs/interop/nbd.rst): 0 unallocated, 1 in the export itself, 2 in what it is based on, and so on.
    AllocationDepth,
    /// `qemu:dirty-bitmap:NAME` (same source): `Extent::DIRTY` where the export differs from what NAME stands for.
    DirtyBitmap(Arc<str>),
}

impl fmt::Display for MetaContext {
    /// The name on the wire.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allocation => f.write_str("base:allocation"),
            Self::AllocationDepth => f.write_str("qemu:allocation-depth"),
            Self::DirtyBitmap(name) => write!(f, "qemu:dirty-bitmap:{name}"),
        }
    }
}

/// A run of equal status in one metadata context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes; never 0.
    pub len: u64,
    /// Status: bits of the constants below, or the depth.
    pub flags: u32,
}

impl Extent {
    /// `base:allocation`: nothing is allocated here; its absence promises that a write gets no ENOSPC.
    pub const HOLE: u32 = 1;
    /// `base:allocation`: reads as zeroes.
    pub const ZERO: u32 = 2;
    /// `qemu:dirty-bitmap`: differs.
    pub const DIRTY: u32 = 1;

    /// A run in `base:allocation`.
    pub const fn allocation(len: u64, hole: bool, zero: bool) -> Self {
        let hole = if hole { Self::HOLE } else { 0 };
        let flags = hole | if zero { Self::ZERO } else { 0 };
        Self { len, flags }
    }
}

/// How to write zeroes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ZeroFlags {
    /// Leave the range allocated (NO_HOLE).
    pub no_hole: bool,
    /// Durable before the reply.
    pub fua: bool,
    /// Refuse with `NbdErrno::NotSup` rather than be slow as a write (FAST_ZERO); set only if `ExportInfo::fast_zero`.
    pub fast: bool,
}

/// One opened export as one connection sees it. A clone is made per request, so cloning must be cheap (`Rc`, `Arc`).
///
/// No method needs a `Send` future; where the implementor's futures are `Send`, so is `serve_connection`'s.
pub trait Export: Clone + 'static {
    /// Size and flags, now.
    fn info(&self) -> ExportInfo;

    /// A line for humans, sent with INFO and GO; empty for none.
    fn description(&self) -> String {
        String::new()
    }

    /// Reads `len` bytes at `offset`.
    fn read(&self, offset: u64, len: u32) -> impl Future<Output = Result<ReadReply, ExportError>>;

    /// Writes all of `data` at `offset`; with `fua` the data and what makes it readable are durable before the answer.
    fn write(
        &self,
        offset: u64,
        data: Bytes,
        fua: bool,
    ) -> impl Future<Output = Result<(), ExportError>>;

    /// Makes every write answered before this call durable, whatever connection it came through (if `can_multi_conn`).
    fn flush(&self) -> impl Future<Output = Result<(), ExportError>>;

    /// Gives the range back; its contents are undefined afterwards.
    fn trim(
        &self,
        offset: u64,
        len: u64,
        fua: bool,
    ) -> impl Future<Output = Result<(), ExportError>>;

    /// Makes the range read as zeroes.
    fn write_zeroes(
        &self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> impl Future<Output = Result<(), ExportError>>;

    /// A hint that the range will be read soon.
    fn cache(&self, offset: u64, len: u64) -> impl Future<Output = Result<(), ExportError>>;

    /// The metadata contexts that a client may select; asked during the handshake.
    fn contexts(&self) -> Vec<MetaContext> {
        vec![MetaContext::Allocation]
    }

    /// Status in one of `contexts()` from `offset` on, in order and without gaps, for `len` bytes or fewer (at least one extent). What
    /// runs over is cut; neighbours of equal status are merged; at most `limits::EXTENTS_MAX` are sent, so it is useless to return more.
    fn block_status(
        &self,
        context: &MetaContext,
        offset: u64,
        len: u64,
    ) -> impl Future<Output = Result<Vec<Extent>, ExportError>>;
}

/// A line of the export list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportEntry {
    /// Name to open it by.
    pub name: String,
    /// A line for humans; empty for none.
    pub description: String,
}

/// The exports of a server. One clone per connection.
pub trait Exports: Clone + 'static {
    /// What `open` gives.
    type Export: Export;

    /// The names that this client may see. An error refuses the list (ERR_POLICY, ERR_SHUTDOWN).
    fn list(&self, peer: &Peer) -> impl Future<Output = Result<Vec<ExportEntry>, OpenError>>;

    /// Opens an export; the empty name asks for the default one. Called when a client names it (INFO, GO, EXPORT_NAME and the options
    /// of metadata contexts), never before.
    fn open(
        &self,
        name: &str,
        peer: &Peer,
    ) -> impl Future<Output = Result<Self::Export, OpenError>>;
}
