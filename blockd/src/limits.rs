//! Every limit of the system, with its unit and reason, and the relations between them.

/// Requests of one peer connection that may wait at once: several clients behind one server at a
/// queue depth of 32 each.
pub const PEER_REQUESTS_IN_FLIGHT: usize = 1024;
/// Bytes of replies that a peer may leave untaken before it is read no further.
pub const PEER_OUTPUT_BYTES: usize = 16 << 20;
/// Bytes reserved for one receive: many headers and small payloads at once.
pub const PEER_RECEIVE_BYTES: usize = 128 << 10;
/// Milliseconds without a byte from a peer that owes answers, after which it counts as lost.
/// Longer than the slowest fdatasync seen on a busy disk.
pub const PEER_STALL_MS: u64 = 30_000;
/// Milliseconds for connecting and for the hello of either side.
pub const PEER_HELLO_MS: u64 = 5_000;
/// Connections a server keeps open on its peer port; the rest is refused.
pub const PEER_CONNECTIONS: usize = 4096;

/// Milliseconds that a forwarded request waits for a restarting owner or for a newer routing
/// table, before the entry answers an error.
pub const FORWARD_DEADLINE_MS: u64 = 30_000;
/// Milliseconds between two tries of a forwarded request.
pub const FORWARD_RETRY_MS: u64 = 20;

/// Milliseconds for which a snapshot may hold the writes of a volume (S003-28, U-08).
pub const HOLD_MAX_MS: u64 = 500;
/// Milliseconds after which a snapshot that is still pending belongs to a dead coordinator.
pub const SNAPSHOT_PENDING_MAX_MS: u64 = 60_000;

/// Bytes of unflushed writes that the client library keeps for a replay, before it flushes.
pub const CLIENT_REPLAY_BYTES: usize = 64 << 20;
/// Bytes of one part of a client request.
pub const REQUEST_PART_BYTES: u32 = 32 << 20;

/// Largest volume in bytes: 2^32 pages of the default size, less than 2^63 for `off_t` users.
pub const VOLUME_MAX_BYTES: u64 = 1 << 53;
/// Bytes of a page at most: 2^20 blocks (S003-02).
pub const PAGE_MAX_BLOCKS: u32 = 1 << 20;
/// Pages of a volume at most: page numbers are 32 bits.
pub const VOLUME_MAX_PAGES: u64 = u32::MAX as u64;

const _: () = assert!(FORWARD_DEADLINE_MS > HOLD_MAX_MS, "a hold must not fail a forwarded write");
const _: () = assert!(SNAPSHOT_PENDING_MAX_MS > 4 * HOLD_MAX_MS);
const _: () = assert!(REQUEST_PART_BYTES < crate::io::wire::MAX_PAYLOAD_BYTES);
