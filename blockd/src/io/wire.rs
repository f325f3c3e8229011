//! The peer protocol: one frame format for requests and replies between servers, and between
//! `blockd::client` and servers.
//!
//! A frame is a header of 64 bytes, little-endian, followed by `payload_len` bytes of payload.
//!
//! ```text
//! offset size field          meaning
//!      0    2 magic          0x4b42 ("BK")
//!      2    1 version        1, or 2 with a stamp; what both sides speak is agreed in the hello
//!      3    1 kind           see `Kind`; bit 7 set in a reply
//!      4    2 flags          see `flags`
//!      6    2 status         0 in requests; see `Status` in replies
//!      8    8 request_id     chosen by the requester, unique on its connection while unanswered
//!     16    8 volume         volume id
//!     24    8 aux            hello: none; write/zero/span: span id; ticket of a snapshot step;
//!                            extents with `LAYERS`: id of the snapshot to compare with, or 0;
//!                            replies of an owner: its write verifier
//!     32    4 snapshot       snapshot id, 0 is the volume itself; write, zero and span begin: lease
//!                            epoch of the requester, 0 holds none
//!     36    4 epoch          routing epoch of the requester; in a stale reply, of the answerer
//!     40    4 page           page number
//!     44    4 offset_bytes   offset in the page
//!     48    4 len_bytes      length of the range that is read, written or zeroed
//!     52    4 payload_len    bytes that follow the header, at most MAX_PAYLOAD_BYTES
//!     56    4 payload_crc    CRC32 (IEEE) of the payload, from entry to exit
//!     60    4 header_crc     CRC32 (IEEE) of bytes 0 to 59
//! ```
//!
//! The header of version 2 is 72 bytes: it has at 60 the stamp of its sender's hybrid logical clock (8
//! bytes, not 0), and at 68 the CRC32 of bytes 0 to 67. A request has it if both sides speak version
//! 2, a reply if its request had it.
//!
//! The header comes first and has its own checksum, so that a lying length is found before a
//! buffer is taken for it. A read reply with flag `RUNS` has in front of its data a run list: u32
//! count, then `count` x u32 where bit 31 says "hole" and the rest is the length in bytes; only
//! runs that are not holes have data. An extents reply has such a list and no data; with flag
//! `LAYERS`, asked for by the same flag, it has u32 count, then `count` x (u32 length in bytes, u32
//! layer): bit 31 of the layer says "hole", bit 30 "changed", the rest is the depth. Control messages carry postcard in the payload. Replies of
//! an error status carry a UTF-8 text.
//!
//! Version history: 2 carries stamps (U-07). 1, the first; kind `Lease` and status `Leased` were added to it, and `LAYERS`: who
//! does not know that flag answers without it.

use crate::id::{Epoch, LayerRun, LeaseEpoch, PageNo, SnapshotId, Stamp, VolumeId};
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes of the fixed header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of the header with a stamp.
pub const STAMPED_HEADER_BYTES: usize = 72;
/// The protocol versions that this code speaks, from the oldest to the newest.
pub const MIN_VERSION: u8 = 1;
pub const VERSION: u8 = 2;
/// The first one with stamps.
pub const STAMPED_VERSION: u8 = 2;
/// Largest payload of one frame: a 64 MiB request part plus its run list.
pub const MAX_PAYLOAD_BYTES: u32 = (64 << 20) + (1 << 20);
const MAGIC: u16 = 0x4b42;
const REPLY_BIT: u8 = 0x80;
const HOLE_BIT: u32 = 1 << 31;
const CHANGED_BIT: u32 = 1 << 30;
/// Largest depth of a layer on the wire; deeper ones are said to have this one.
const DEPTH_MAX: u32 = CHANGED_BIT - 1;

/// Bits of the `flags` field.
pub mod flags {
    /// WRITE and ZERO: answer only when durable.
    pub const FUA: u16 = 1;
    /// WRITE and ZERO: a part of the span named in `aux`, begun before with `SpanBegin`.
    pub const SPAN: u16 = 2;
    /// ZERO: keep the range allocated.
    pub const KEEP_ALLOCATED: u16 = 4;
    /// Read reply: the payload begins with a run list.
    pub const RUNS: u16 = 8;
    /// Read reply: the whole range is a hole and there is no payload.
    pub const ALL_HOLE: u16 = 16;
    /// EXTENTS: tell layers and what changed. In the reply: the list is one of layers.
    pub const LAYERS: u16 = 32;
    /// Reply to a message of a move: clients ask this server for pages.
    pub const ASKED: u16 = 64;
}

macro_rules! wire_enum {
    ($(#[$doc:meta])* $name:ident: $repr:ty { $($(#[$vdoc:meta])* $variant:ident = $value:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr($repr)]
        pub enum $name { $($(#[$vdoc])* $variant = $value,)* }

        impl $name {
            fn from_wire(value: $repr) -> Option<Self> {
                match value { $($value => Some(Self::$variant),)* _ => None }
            }
        }
    };
}

wire_enum! {
    /// What a frame asks for.
    Kind: u8 {
        /// First frame of a connection: versions, cluster, who is there. Payload `Hello`.
        Hello = 1,
        Read = 2,
        Write = 3,
        Zero = 4,
        /// All writes of the volume acknowledged by this owner become durable.
        Flush = 5,
        /// Allocation, or with `LAYERS` the layers, of a range.
        Extents = 6,
        /// Announces a write whose parts lie on several owners (S003-33).
        SpanBegin = 7,
        /// The span is over: every part was answered, or none will be sent. Not answered.
        SpanEnd = 8,
        /// Snapshot procedure. Payload `Order`, reply payload `Answer`.
        Snapshot = 9,
        /// Forget a snapshot of a volume on this owner.
        SnapshotDrop = 10,
        /// Forget a volume, or with `len_bytes` 1 its pages from `page` on.
        VolumeDrop = 11,
        /// Space used by a volume or snapshot, or by the store. Reply payload `Usage`.
        Usage = 12,
        /// A registry message, opaque to this layer.
        Registry = 13,
        /// Payload `AdminRequest`, reply payload `AdminReply`.
        Admin = 14,
        /// What keeps requests waiting on this server. Reply payload: a list of `HoldInfo`.
        Holds = 15,
        /// Pages that move to this server: what the source tells. Payload `MoveOrder`.
        Move = 25,
        /// Data of moving pages, for the attempt in `aux`. Payload: u32 length of a postcard
        /// `MovedData`, that, and the data of its versions one behind the other.
        MoveData = 26,
        /// Requests for each volume since the start of the server. Reply payload: pairs.
        Load = 27,
        /// Why the last step of a move of the volume failed. Reply payload: a text or none.
        MoveTrouble = 28,
        /// Exclusive writer lease of a volume. Payload `LeaseOrder`.
        Lease = 20,
        /// Verify what is stored of a volume, for about a second. Payload `ScrubOrder`, reply
        /// payload `ScrubStep`.
        Scrub = 30,
        /// Be at the routing epoch of the request, with what came with it, before the answer. Reply
        /// payload `LineageStatus`.
        Lineage = 21,
        /// Space of all snapshots of a volume. Reply payload: a list of (snapshot, bytes that it
        /// shows, bytes that only it holds).
        SnapshotUsages = 22,
    }
}

wire_enum! {
    /// How a request ended.
    Status: u16 {
        Ok = 0,
        /// Not the owner at the epoch of the request; `epoch` says the answerer's.
        Stale = 1,
        NoSpace = 2,
        /// Checksum mismatch or failed store.
        Damaged = 3,
        ReadOnly = 4,
        OutOfRange = 5,
        /// The volume or snapshot does not exist.
        Gone = 6,
        WrongCluster = 7,
        BadVersion = 8,
        /// A snapshot holds the writes of the volume; cancel the span and try again.
        Held = 9,
        Malformed = 10,
        /// The server cannot serve this now (not yet a member, shutting down).
        Unavailable = 11,
        /// Another one holds the exclusive lease of the volume; the text names it.
        Leased = 12,
    }
}

/// One frame: a request, or with `reply` set its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub kind: Kind,
    pub reply: bool,
    pub flags: u16,
    pub status: Status,
    pub request_id: u64,
    pub volume: VolumeId,
    pub aux: u64,
    pub snapshot: SnapshotId,
    pub epoch: Epoch,
    pub page: PageNo,
    pub offset_bytes: u32,
    pub len_bytes: u32,
    /// The sender's clock; 0 is none.
    pub stamp: Stamp,
    pub payload: Payload,
}

/// The payload in the pieces in which it lies in memory; sent with one vectored write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Payload(pub Vec<Bytes>);

impl Payload {
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The payload as one buffer; copies only if it is in several pieces.
    #[must_use]
    pub fn into_bytes(mut self) -> Bytes {
        if self.0.len() == 1 {
            return self.0.remove(0);
        }
        let mut all = BytesMut::with_capacity(self.len());
        self.0.iter().for_each(|piece| all.extend_from_slice(piece));
        all.freeze()
    }

    fn crc(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        self.0.iter().for_each(|piece| hasher.update(piece));
        hasher.finalize()
    }
}

impl From<Bytes> for Payload {
    fn from(bytes: Bytes) -> Self {
        Self(if bytes.is_empty() {
            vec![]
        } else {
            vec![bytes]
        })
    }
}

/// Why bytes are no frame. The connection cannot go on after any of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    #[error("not a blockd peer frame: magic {0:#06x}, expected 0x4b42")]
    Magic(u16),
    #[error("peer frame of version {0}, this server speaks {MIN_VERSION} to {VERSION}")]
    Version(u8),
    #[error("peer frame header with a wrong checksum")]
    HeaderCrc,
    #[error("peer frame payload with a wrong checksum")]
    PayloadCrc,
    #[error("peer frame of unknown kind {0} or status {1}")]
    Unknown(u8, u16),
    #[error("peer frame with a payload of {0} bytes, the limit is {MAX_PAYLOAD_BYTES}")]
    TooLong(u32),
    #[error("malformed run list in a reply")]
    Runs,
}

impl Frame {
    /// A request with everything zero but its kind and volume.
    #[must_use]
    pub fn request(kind: Kind, volume: VolumeId) -> Self {
        Self {
            kind,
            reply: false,
            flags: 0,
            status: Status::Ok,
            request_id: 0,
            volume,
            aux: 0,
            snapshot: SnapshotId(0),
            epoch: Epoch(0),
            page: PageNo(0),
            offset_bytes: 0,
            len_bytes: 0,
            stamp: Stamp(0),
            payload: Payload::default(),
        }
    }

    /// An answer to `self` with the same request id.
    #[must_use]
    pub fn answer(&self, status: Status, payload: Payload) -> Self {
        Self {
            reply: true,
            status,
            request_id: self.request_id,
            payload,
            ..Self::request(self.kind, self.volume)
        }
    }

    /// An error answer with a text for people.
    #[must_use]
    pub fn refuse(&self, status: Status, text: impl Into<String>) -> Self {
        self.answer(status, Bytes::from(text.into()).into())
    }

    /// The lease epoch under which a change is asked for.
    #[must_use]
    pub fn lease(&self) -> LeaseEpoch {
        LeaseEpoch(self.snapshot.0)
    }

    /// Asks for a change under this lease epoch.
    pub fn set_lease(&mut self, lease: LeaseEpoch) {
        self.snapshot = SnapshotId(lease.0);
    }

    /// Appends the header to `out`; the payload is to follow piece by piece.
    pub fn encode_header(&self, out: &mut BytesMut) {
        let start = out.len();
        out.put_u16_le(MAGIC);
        let is_stamped = self.stamp != Stamp(0);
        out.put_u8(if is_stamped {
            STAMPED_VERSION
        } else {
            MIN_VERSION
        });
        out.put_u8(self.kind as u8 | if self.reply { REPLY_BIT } else { 0 });
        out.put_u16_le(self.flags);
        out.put_u16_le(self.status as u16);
        out.put_u64_le(self.request_id);
        out.put_u64_le(self.volume.0);
        out.put_u64_le(self.aux);
        out.put_u32_le(self.snapshot.0);
        out.put_u32_le(self.epoch.0);
        out.put_u32_le(self.page.0);
        out.put_u32_le(self.offset_bytes);
        out.put_u32_le(self.len_bytes);
        out.put_u32_le(u32::try_from(self.payload.len()).unwrap_or(u32::MAX));
        out.put_u32_le(self.payload.crc());
        if is_stamped {
            out.put_u64_le(self.stamp.0);
        }
        let crc = crc32fast::hash(&out[start..]);
        out.put_u32_le(crc);
    }

    /// The text of an error answer, made safe to print.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload.clone().into_bytes()).into_owned()
    }
}

/// Takes one frame off the front of `buffer`, or says how many bytes it needs in all.
///
/// # Errors
/// [`WireError`] as soon as the bytes cannot become a frame; nothing is allocated before the
/// header's checksum was found right.
pub fn decode(buffer: &mut BytesMut) -> Result<Decoded, WireError> {
    if buffer.len() < HEADER_BYTES {
        return check_prefix(buffer).map(|()| Decoded::Needs(HEADER_BYTES));
    }
    let header_bytes = header_bytes(buffer)?;
    if buffer.len() < header_bytes {
        return Ok(Decoded::Needs(header_bytes));
    }
    let payload_len = check_header(&buffer[..header_bytes])?;
    let total = header_bytes + payload_len as usize;
    if buffer.len() < total {
        return Ok(Decoded::Needs(total));
    }
    let mut header = buffer.split_to(header_bytes);
    let payload = buffer.split_to(payload_len as usize).freeze();
    let frame = parse_header(&mut header, payload)?;
    Ok(Decoded::Frame(Box::new(frame)))
}

/// Result of [`decode`].
#[derive(Debug, PartialEq, Eq)]
pub enum Decoded {
    Frame(Box<Frame>),
    /// The buffer must hold this many bytes before the next try.
    Needs(usize),
}

fn check_prefix(bytes: &[u8]) -> Result<(), WireError> {
    match bytes {
        [a, b, ..] if u16::from_le_bytes([*a, *b]) != MAGIC => {
            Err(WireError::Magic(u16::from_le_bytes([*a, *b])))
        }
        _ => Ok(()),
    }
}

/// `bytes` are as many as the shortest header has.
fn header_bytes(bytes: &[u8]) -> Result<usize, WireError> {
    check_prefix(bytes)?;
    match bytes[2] {
        MIN_VERSION => Ok(HEADER_BYTES),
        STAMPED_VERSION => Ok(STAMPED_HEADER_BYTES),
        other => Err(WireError::Version(other)),
    }
}

fn check_header(header: &[u8]) -> Result<u32, WireError> {
    let word = |at: usize| {
        u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
    };
    let checked = header.len() - 4;
    if crc32fast::hash(&header[..checked]) != word(checked) {
        return Err(WireError::HeaderCrc);
    }
    match word(52) {
        len if len > MAX_PAYLOAD_BYTES => Err(WireError::TooLong(len)),
        len => Ok(len),
    }
}

fn parse_header(header: &mut BytesMut, payload: Bytes) -> Result<Frame, WireError> {
    let is_stamped = header.len() == STAMPED_HEADER_BYTES;
    header.advance(3);
    let kind_bits = header.get_u8();
    let frame_flags = header.get_u16_le();
    let status_bits = header.get_u16_le();
    let unknown = WireError::Unknown(kind_bits & !REPLY_BIT, status_bits);
    let mut frame = Frame {
        kind: Kind::from_wire(kind_bits & !REPLY_BIT).ok_or(unknown)?,
        reply: kind_bits & REPLY_BIT != 0,
        flags: frame_flags,
        status: Status::from_wire(status_bits).ok_or(unknown)?,
        request_id: header.get_u64_le(),
        volume: VolumeId(header.get_u64_le()),
        aux: header.get_u64_le(),
        snapshot: SnapshotId(header.get_u32_le()),
        epoch: Epoch(header.get_u32_le()),
        page: PageNo(header.get_u32_le()),
        offset_bytes: header.get_u32_le(),
        len_bytes: header.get_u32_le(),
        stamp: Stamp(0),
        payload: payload.into(),
    };
    header.advance(4);
    if frame.payload.crc() != header.get_u32_le() {
        return Err(WireError::PayloadCrc);
    }
    if is_stamped {
        frame.stamp = Stamp(header.get_u64_le());
    }
    Ok(frame)
}

/// A piece of a range: data, or a hole of that many bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Run {
    Data(Bytes),
    Hole(u32),
}

impl Run {
    #[must_use]
    pub fn len_bytes(&self) -> u32 {
        match self {
            Self::Data(data) => u32::try_from(data.len()).unwrap_or(u32::MAX),
            Self::Hole(len) => *len,
        }
    }
}

/// The payload and flags of a read reply for `runs`.
#[must_use]
pub fn encode_runs(runs: Vec<Run>) -> (u16, Payload) {
    if runs.iter().all(|run| matches!(run, Run::Hole(_))) {
        return (flags::ALL_HOLE, Payload::default());
    }
    if let [Run::Data(data)] = runs.as_slice() {
        return (0, data.clone().into());
    }
    let mut list = BytesMut::with_capacity(4 + 4 * runs.len());
    list.put_u32_le(u32::try_from(runs.len()).unwrap_or(u32::MAX));
    for run in &runs {
        let hole = if matches!(run, Run::Hole(_)) {
            HOLE_BIT
        } else {
            0
        };
        list.put_u32_le(run.len_bytes() | hole);
    }
    let mut pieces = vec![list.freeze()];
    pieces.extend(runs.into_iter().filter_map(|run| match run {
        Run::Data(data) => Some(data),
        Run::Hole(_) => None,
    }));
    (flags::RUNS, Payload(pieces))
}

/// The inverse of [`encode_runs`] for a range of `len_bytes`; the runs cover it exactly.
///
/// # Errors
/// [`WireError::Runs`] if the payload does not describe exactly that range.
pub fn decode_runs(reply: Frame, len_bytes: u32) -> Result<Vec<Run>, WireError> {
    if reply.flags & flags::ALL_HOLE != 0 {
        return Ok(vec![Run::Hole(len_bytes)]);
    }
    let with_list = reply.flags & flags::RUNS != 0;
    let payload = reply.payload.into_bytes();
    if !with_list {
        return match payload.len() == len_bytes as usize {
            true => Ok(vec![Run::Data(payload)]),
            false => Err(WireError::Runs),
        };
    }
    let (runs, rest) = split_runs(payload)?;
    let covered: u64 = runs.iter().map(|run| u64::from(run.len_bytes())).sum();
    match rest.is_empty() && covered == u64::from(len_bytes) {
        true => Ok(runs),
        false => Err(WireError::Runs),
    }
}

fn split_runs(mut payload: Bytes) -> Result<(Vec<Run>, Bytes), WireError> {
    let words = read_words(&mut payload)?;
    let mut runs = Vec::with_capacity(words.len());
    for word in words {
        let len = word & !HOLE_BIT;
        if word & HOLE_BIT != 0 {
            runs.push(Run::Hole(len));
        } else if payload.len() >= len as usize {
            runs.push(Run::Data(payload.split_to(len as usize)));
        } else {
            return Err(WireError::Runs);
        }
    }
    Ok((runs, payload))
}

fn read_words(payload: &mut Bytes) -> Result<Vec<u32>, WireError> {
    if payload.len() < 4 {
        return Err(WireError::Runs);
    }
    let count = payload.get_u32_le() as usize;
    if payload.len() / 4 < count {
        return Err(WireError::Runs);
    }
    Ok((0..count).map(|_| payload.get_u32_le()).collect())
}

/// The payload of an extents reply: `(len_bytes, allocated)` in order.
#[must_use]
pub fn encode_extents(extents: &[(u32, bool)]) -> Payload {
    let mut list = BytesMut::with_capacity(4 + 4 * extents.len());
    list.put_u32_le(u32::try_from(extents.len()).unwrap_or(u32::MAX));
    for (len, allocated) in extents {
        list.put_u32_le(len | if *allocated { 0 } else { HOLE_BIT });
    }
    list.freeze().into()
}

/// The inverse of [`encode_extents`] for a range of `len_bytes`.
///
/// # Errors
/// [`WireError::Runs`] if the list does not cover exactly that range.
pub fn decode_extents(reply: Frame, len_bytes: u32) -> Result<Vec<(u32, bool)>, WireError> {
    let mut payload = reply.payload.into_bytes();
    let words = read_words(&mut payload)?;
    let extents: Vec<_> = words
        .into_iter()
        .map(|word| (word & !HOLE_BIT, word & HOLE_BIT == 0))
        .collect();
    let covered: u64 = extents.iter().map(|(len, _)| u64::from(*len)).sum();
    match covered == u64::from(len_bytes) {
        true => Ok(extents),
        false => Err(WireError::Runs),
    }
}

/// The payload of an extents reply with `LAYERS`; the runs are those of one page.
#[must_use]
pub fn encode_layers(layers: &[LayerRun]) -> Payload {
    let mut list = BytesMut::with_capacity(4 + 8 * layers.len());
    list.put_u32_le(u32::try_from(layers.len()).unwrap_or(u32::MAX));
    for run in layers {
        let hole = if run.hole { HOLE_BIT } else { 0 };
        let changed = if run.changed { CHANGED_BIT } else { 0 };
        list.put_u32_le(u32::try_from(run.len_bytes).unwrap_or(u32::MAX));
        list.put_u32_le(run.depth.min(DEPTH_MAX) | hole | changed);
    }
    list.freeze().into()
}

/// The inverse of [`encode_layers`] for a range of `len_bytes`.
///
/// # Errors
/// [`WireError::Runs`] if the list does not cover exactly that range.
pub fn decode_layers(reply: Frame, len_bytes: u32) -> Result<Vec<LayerRun>, WireError> {
    let mut payload = reply.payload.into_bytes();
    if payload.len() < 4 || payload.get_u32_le() as usize != payload.len() / 8 {
        return Err(WireError::Runs);
    }
    let layers: Vec<LayerRun> = payload.chunks_exact(8).map(layer_run).collect();
    let covered: u64 = layers.iter().map(|run| run.len_bytes).sum();
    match payload.len().is_multiple_of(8) && covered == u64::from(len_bytes) {
        true => Ok(layers),
        false => Err(WireError::Runs),
    }
}

fn layer_run(mut bytes: &[u8]) -> LayerRun {
    let (len_bytes, layer) = (u64::from(bytes.get_u32_le()), bytes.get_u32_le());
    LayerRun {
        len_bytes,
        depth: layer & DEPTH_MAX,
        hole: layer & HOLE_BIT != 0,
        changed: layer & CHANGED_BIT != 0,
    }
}

#[cfg(test)]
mod tests;
