//! Numbers and layouts of the NBD protocol (newstyle); all integers are big-endian.
//!
//! ```text
//! greeting         "NBDMAGIC" "IHAVEOPT" u16 server flags                      -> client: u32 client flags
//! option           "IHAVEOPT" u32 option, u32 len, data[len]                   16 bytes + data
//! option reply     u64 0x3e889045565a9, u32 option, u32 type, u32 len, data    20 bytes + data
//! EXPORT_NAME ack  u64 size, u16 flags (, 124 zeroes unless NO_ZEROES)         no option reply header
//! INFO, GO         u32 name_len, name, u16 n, n x u16 info
//! *_META_CONTEXT   u32 name_len, name, u32 n, n x (u32 query_len, query)
//! REP_INFO         u16 0 EXPORT, u64 size, u16 flags | u16 1 NAME, name | u16 2 DESCRIPTION, text
//!                  | u16 3 BLOCK_SIZE, u32 min, u32 preferred, u32 max
//! REP_META_CONTEXT u32 id, name
//! REP_SERVER       u32 name_len, name, description
//!
//! request          u32 0x25609513, u16 flags, u16 type, u64 cookie, u64 offset, u32 len (, data)   28 bytes
//! simple reply     u32 0x67446698, u32 error, u64 cookie (, data)                                  16 bytes
//! chunk            u32 0x668e33ef, u16 flags, u16 type, u64 cookie, u32 len, data                  20 bytes
//!   OFFSET_DATA    u64 offset, data          OFFSET_HOLE  u64 offset, u32 len
//!   BLOCK_STATUS   u32 context, n x (u32 len, u32 flags)
//!   ERROR          u32 error, u16 text_len, text           ERROR_OFFSET  u32 error, u16 text_len, text, u64 offset
//!
//! after EXTENDED_HEADERS (experimental extension of the protocol; QEMU 8.2, libnbd 1.18):
//! request          u32 0x21e41c71, u16 flags, u16 type, u64 cookie, u64 offset, u64 len (, data)   32 bytes
//!                  with flag PAYLOAD_LEN (and with WRITE) len bytes of data follow, else none do and len counts bytes of the export
//! chunk            u32 0x6e8a278c, u16 flags, u16 type, u64 cookie, u64 offset, u64 len, data      32 bytes
//!                  offset is the request's
//!   BLOCK_STATUS_EXT  u32 context, u32 n, n x (u64 len, u64 flags)
//! BLOCK_STATUS payload  u64 len, n x u32 context
//! ```

pub(crate) const GREETING_MAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
pub(crate) const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
pub(crate) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub(crate) const REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const CHUNK_MAGIC: u32 = 0x668e_33ef;
pub(crate) const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
pub(crate) const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

pub(crate) const OPTION_HEADER_BYTES: usize = 16;
pub(crate) const REQUEST_BYTES: usize = 28;
pub(crate) const EXTENDED_REQUEST_BYTES: usize = 32;
pub(crate) const SIMPLE_REPLY_BYTES: usize = 16;
pub(crate) const CHUNK_BYTES: usize = 20;
pub(crate) const EXTENDED_CHUNK_BYTES: usize = 32;
pub(crate) const EXPORT_NAME_PADDING_BYTES: usize = 124;

/// Handshake flags; the client's have the same numbers.
pub(crate) const FIXED_NEWSTYLE: u16 = 1;
pub(crate) const NO_ZEROES: u16 = 2;

pub(crate) mod option {
    //! Options of the handshake.
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
    pub(crate) const EXTENDED_HEADERS: u32 = 11;
}

pub(crate) mod reply {
    //! Types of option replies.
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    pub(crate) const ERR_UNSUP: u32 = 0x8000_0001;
    pub(crate) const ERR_POLICY: u32 = 0x8000_0002;
    pub(crate) const ERR_INVALID: u32 = 0x8000_0003;
    pub(crate) const ERR_TLS_REQD: u32 = 0x8000_0005;
    pub(crate) const ERR_UNKNOWN: u32 = 0x8000_0006;
    pub(crate) const ERR_SHUTDOWN: u32 = 0x8000_0007;
    pub(crate) const ERR_TOO_BIG: u32 = 0x8000_0009;
    pub(crate) const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

pub(crate) mod info {
    //! Items of INFO and GO.
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const DESCRIPTION: u16 = 2;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

pub(crate) mod transmission {
    //! Flags of an export.
    pub(crate) const HAS_FLAGS: u16 = 1;
    pub(crate) const READ_ONLY: u16 = 1 << 1;
    pub(crate) const SEND_FLUSH: u16 = 1 << 2;
    pub(crate) const SEND_FUA: u16 = 1 << 3;
    pub(crate) const ROTATIONAL: u16 = 1 << 4;
    pub(crate) const SEND_TRIM: u16 = 1 << 5;
    pub(crate) const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub(crate) const SEND_DF: u16 = 1 << 7;
    pub(crate) const CAN_MULTI_CONN: u16 = 1 << 8;
    pub(crate) const SEND_CACHE: u16 = 1 << 10;
    pub(crate) const SEND_FAST_ZERO: u16 = 1 << 11;
    pub(crate) const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

pub(crate) mod command {
    //! Types of requests.
    pub(crate) const READ: u16 = 0;
    pub(crate) const WRITE: u16 = 1;
    pub(crate) const DISC: u16 = 2;
    pub(crate) const FLUSH: u16 = 3;
    pub(crate) const TRIM: u16 = 4;
    pub(crate) const CACHE: u16 = 5;
    pub(crate) const WRITE_ZEROES: u16 = 6;
    pub(crate) const BLOCK_STATUS: u16 = 7;
}

pub(crate) mod flag {
    //! Flags of requests.
    pub(crate) const FUA: u16 = 1;
    pub(crate) const NO_HOLE: u16 = 1 << 1;
    pub(crate) const DF: u16 = 1 << 2;
    pub(crate) const REQ_ONE: u16 = 1 << 3;
    pub(crate) const FAST_ZERO: u16 = 1 << 4;
    pub(crate) const PAYLOAD_LEN: u16 = 1 << 5;
}

pub(crate) mod chunk {
    //! Types and flags of reply chunks.
    pub(crate) const DONE: u16 = 1;
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    pub(crate) const BLOCK_STATUS_EXT: u16 = 6;
    pub(crate) const ERROR: u16 = 0x8001;
    pub(crate) const ERROR_OFFSET: u16 = 0x8002;
}

/// The big-endian integer of `N` bytes at the front, and what follows; `None` if the bytes do not suffice.
pub(crate) fn take<const N: usize>(bytes: &[u8]) -> Option<([u8; N], &[u8])> {
    bytes
        .split_first_chunk::<N>()
        .map(|(head, rest)| (*head, rest))
}

/// The u16 at the front, and what follows.
pub(crate) fn take_u16(bytes: &[u8]) -> Option<(u16, &[u8])> {
    take(bytes).map(|(head, rest)| (u16::from_be_bytes(head), rest))
}

/// The u32 at the front, and what follows.
pub(crate) fn take_u32(bytes: &[u8]) -> Option<(u32, &[u8])> {
    take(bytes).map(|(head, rest)| (u32::from_be_bytes(head), rest))
}

/// The u64 at the front, and what follows.
pub(crate) fn take_u64(bytes: &[u8]) -> Option<(u64, &[u8])> {
    take(bytes).map(|(head, rest)| (u64::from_be_bytes(head), rest))
}
