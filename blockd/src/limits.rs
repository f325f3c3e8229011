//! Every limit of the system, with its unit and reason, and the relations between them.

/// Requests of one peer connection that may wait at once: several clients behind one server at a
/// queue depth of 32 each.
pub const PEER_REQUESTS_IN_FLIGHT: usize = 1024;
/// Bytes of payload in the waiting requests of one peer connection, before it is read no further:
/// a few of the largest requests.
pub const PEER_WAITING_BYTES: usize = 256 << 20;
/// Milliseconds that a span outlives its connection: a requester that lives is back before, and one that
/// is dead holds snapshots up no longer.
pub const SPAN_GRACE_MS: u64 = 2_000;
/// Milliseconds after which a span that its requester does not end is ended by the owner.
pub const SPAN_MAX_MS: u64 = 60_000;
/// Milliseconds that opening a volume waits for an owner that does not answer.
pub const OPEN_PROBE_MS: u64 = 1_000;
/// Bytes of replies that a peer may leave untaken before it is read no further.
pub const PEER_OUTPUT_BYTES: usize = 16 << 20;
/// Bytes reserved for one receive: many headers and small payloads at once.
pub const PEER_RECEIVE_BYTES: usize = 128 << 10;
/// Milliseconds without a byte from a peer that owes answers, after which it counts as lost.
/// Longer than the slowest fdatasync seen on a busy disk.
pub const PEER_STALL_MS: u64 = 30_000;
/// Milliseconds for which a peer's machine may leave what it was sent unacknowledged, after which the
/// path counts as cut: several retransmissions, and little beside a hold.
pub const PEER_UNACKED_MS: u32 = 5_000;
/// Milliseconds that a path to a server gets before the next one is tried beside it.
pub const PATH_HEAD_START_MS: u64 = 200;
/// Milliseconds between looks whether a server that was reached by another path is reached by the first
/// one again.
pub const PATH_LOOK_MS: u64 = 10_000;
/// Milliseconds between tries to publish the addresses of a server.
pub const ADDRESSES_RETRY_MS: u64 = 1_000;
/// Addresses of one node: more adapters than machines have.
pub const NODE_ADDRESSES_MAX: usize = 32;
/// Milliseconds for connecting and for the hello of either side.
pub const PEER_HELLO_MS: u64 = 5_000;
/// Connections a server keeps open on its peer port; the rest is refused.
pub const PEER_CONNECTIONS: usize = 4096;

/// Bytes of the body of an HTTP request: the longest command is far shorter.
pub const HTTP_BODY_BYTES_MAX: usize = 1 << 20;
/// Connections that each HTTP socket serves at a time; further ones wait in the kernel.
pub const HTTP_CONNECTIONS: usize = 128;
/// Milliseconds that an HTTP client has for the head of its request, and again for its body.
pub const HTTP_REQUEST_MS: u64 = 10_000;
/// Milliseconds that an HTTP connection lasts at the most: one request, its work and its answer.
pub const HTTP_CONNECTION_MS: u64 = 600_000;
/// Bytes of the audit log, after which it begins anew and the former one is kept.
pub const AUDIT_BYTES_MAX: u64 = 16 << 20;
/// Bytes of a request that the audit log tells; of a longer one it has the beginning.
pub const AUDIT_REQUEST_BYTES_MAX: usize = 4096;
/// Lines that may wait for the disk before further ones are lost.
pub const AUDIT_LINES_WAITING: usize = 1024;

/// Milliseconds that a forwarded request waits for a restarting owner or for a newer routing
/// table, before the entry answers an error.
pub const FORWARD_DEADLINE_MS: u64 = 30_000;
/// Milliseconds between two tries of a forwarded request.
pub const FORWARD_RETRY_MS: u64 = 20;

/// Milliseconds without a renewal after which a lease may expire: bounds that a holder may choose
/// from. Shorter ones would expire by a busy disk or an election.
pub const LEASE_TTL_MIN_MS: u64 = 2_000;
pub const LEASE_TTL_MAX_MS: u64 = 600_000;
/// Milliseconds that the owners of a volume have to confirm a lease epoch.
pub const LEASE_CONFIRM_MS: u64 = 5_000;
/// Milliseconds that the registry's leader adds to the time to live of a lease: for the messages,
/// and for the confirmations that go before the first renewal.
pub const LEASE_MARGIN_MS: u64 = 5_000;
/// Milliseconds between two looks of the registry's leader at the leases.
pub const LEASE_TICK_MS: u64 = 500;

/// Milliseconds after which a snapshot that is still pending belongs to a dead coordinator.
pub const SNAPSHOT_PENDING_MAX_MS: u64 = 60_000;

/// Bytes that a scrub reads at once: a few milliseconds of a disk.
pub const SCRUB_PIECE_BYTES: u64 = 1 << 20;
/// Milliseconds of one step of a scrub, after which whoever asked hears of it.
pub const SCRUB_STEP_MS: u64 = 1_000;
/// Bytes a second that a scrub reads at the least: a piece is read whole.
pub const SCRUB_RATE_MIN_BYTES: u64 = SCRUB_PIECE_BYTES;
/// Damaged ranges after which a step of a scrub ends.
pub const SCRUB_DAMAGE_MAX: usize = 1_000;

/// Milliseconds from a change of the registry to the facts beside the store: a burst is one write.
pub const FACTS_DELAY_MS: u64 = 1_000;
/// Milliseconds between two looks of the registry's leader at the schedules of snapshots.
pub const SCHEDULE_TICK_MS: u64 = 1_000;
/// Seconds after which a scheduled snapshot that failed is tried again.
pub const SCHEDULE_RETRY_S: u64 = 30;
/// Rules of one volume, and snapshots that a rule keeps.
pub const SCHEDULE_RULES_MAX: usize = 8;
pub const SCHEDULE_KEEP_MAX: u32 = 1000;
/// Pages that change their owner together, at the most: thin ones cost nothing.
pub const MOVE_BATCH_PAGES: u32 = 1 << 16;
/// Bytes of data after which a batch of moving pages ends: those of a second at the move's rate, so
/// that a batch that must be copied again is little; but enough that its few steps through the
/// registry are a small part of its time.
pub const MOVE_BATCH_MIN_BYTES: u64 = 32 << 20;
pub const MOVE_BATCH_MAX_BYTES: u64 = 512 << 20;
/// The same of a move without a rate while no client asks: its speed is not known before.
pub const MOVE_BATCH_IDLE_BYTES: u64 = 256 << 20;
/// Bytes a second of a move without a rate while clients ask one of its two servers for pages, and
/// milliseconds for which a server counts as asked after a request.
pub const MOVE_BUSY_RATE_BYTES: u64 = 32 << 20;
pub const MOVE_BUSY_MS: u64 = 100;
/// Bytes of data in one message of moving pages, and messages that wait for an answer.
pub const MOVE_FRAME_BYTES: usize = 128 << 10;
pub const MOVE_FRAMES_IN_FLIGHT: usize = 24;
/// Chunks of moving pages that are read ahead of the message that is being filled.
pub const MOVE_READS_AHEAD: usize = 4;
/// Bytes of moving pages after which the new owner is told to make them durable.
pub const MOVE_UNSETTLED_BYTES: usize = 64 << 20;
/// Chunks that may be left to copy when changes are held: 16 MiB.
pub const MOVE_TAIL_CHUNKS: usize = 256;
/// Milliseconds for which changes are held before the flip is proposed.
pub const MOVE_HOLD_MAX_MS: u64 = 500;
/// Tries to hand a batch over before it is copied again.
pub const MOVE_TURNS_MAX: u32 = 50;
/// Milliseconds that the new owner waits for its own part of a snapshot that the source has taken.
pub const MOVE_SNAPSHOT_WAIT_MS: u64 = 100;
/// A rate below this is refused.
pub const MOVE_RATE_MIN_BYTES: u64 = 1 << 20;
/// Milliseconds over which the load of servers is sampled before they are evened out.
pub const LOAD_SAMPLE_MS: u64 = 1_000;
/// Milliseconds between two looks at the moves, before a step that failed is tried again, and before
/// one that something else overtook is.
pub const MOVE_TICK_MS: u64 = 500;
pub const MOVE_RETRY_MS: u64 = 1_000;
pub const MOVE_AGAIN_MS: u64 = 50;
/// Milliseconds after which a drained node's volume whose move failed is planned again.
pub const DRAIN_RETRY_MS: u64 = 10_000;

/// Milliseconds between two sweeps of what the registry does not have.
pub const SWEEP_INTERVAL_MS: u64 = 10_000;

/// Clones of clones: each costs a read of what none of them has written a lookup more.
pub const CLONE_DEPTH_MAX: u32 = 8;
/// Bytes a second that a server copies up at the most while it flattens a clone.
pub const FLATTEN_BYTES_PER_S: u64 = 128 << 20;
/// Milliseconds that the owners of a volume have to carry out a rollback before its command ends.
pub const LINEAGE_CONFIRM_MS: u64 = 5_000;
/// Milliseconds before a rollback or clone is tried again in a store that could not do it.
pub const LINEAGE_RETRY_MS: u64 = 20;

/// Bytes of unflushed writes that the client library keeps for a replay, before it flushes.
pub const CLIENT_REPLAY_BYTES: usize = 64 << 20;
/// Bytes of a TRIM or WRITE_ZEROES that are one span; a longer one is cut. 1024 pages of the
/// default size: little memory, and done long before `SPAN_MAX_MS`.
pub const ZERO_SPAN_BYTES: u64 = 4 << 30;
/// Pages of a TRIM or WRITE_ZEROES that are one span, where they are small.
pub const ZERO_SPAN_PAGES: u64 = 1024;
/// Parts of one span that are sent before other requests get a turn.
pub const SPAN_TURN_PARTS: usize = 64;
/// Bytes of pages that one span zeroes before other requests get a turn: each 64 KiB is a lookup.
pub const SPAN_TURN_ZERO_BYTES: u64 = 256 << 20;
/// The same where the zeros are written out.
pub const SPAN_TURN_WRITTEN_ZERO_BYTES: u64 = 16 << 20;
/// Bytes of one part of a request: the largest NBD request that is accepted.
pub const REQUEST_PART_BYTES: u32 = 64 << 20;

/// Bytes of a volume of which one NBD block status tells at the most, so that a question costs little
/// memory and few peer requests: 64 pages of the default size.
pub const STATUS_BYTES_MAX: u64 = 256 << 20;
/// Pages of which one NBD block status tells at the most, where they are small.
pub const STATUS_PAGES_MAX: u64 = 1024;

/// Characters (all ASCII, so bytes) of the name of a cluster, node, volume or snapshot. Short
/// enough for an NBD export name `VOL@SNAP` (4096 bytes) and a file name (255 bytes).
pub const NAME_CHARS_MAX: usize = 128;
/// Bytes of any other text in a registry object: addresses, site and format names.
pub const REGISTRY_TEXT_BYTES_MAX: usize = 255;
/// Blocks of a page (S003-02): a power of two from 1 to this.
pub const PAGE_BLOCKS_MAX: u32 = 1 << 20;
/// Pages of a volume; 64 TiB with pages of 4 MiB. The flat table costs 2 bytes a page.
pub const VOLUME_PAGES_MAX: u32 = 1 << 24;
/// Runs that a freshly spread routing table has at the most, so that a volume record stays small.
pub const ROUTE_RUNS_TARGET: u32 = 1024;
/// Runs of a routing table after any number of resizes; 8 bytes or so each in the registry.
pub const ROUTE_RUNS_MAX: usize = 8192;
/// Servers that hold pages of one volume.
pub const VOLUME_OWNERS_MAX: usize = 1024;
/// Expectations and changes of one registry transaction, each.
pub const TRANSACTION_STEPS_MAX: usize = 1024;
/// Bytes of one encoded registry transaction; several of them fit one message.
pub const TRANSACTION_BYTES_MAX: usize = 1 << 20;
/// Bytes of one message between registry servers.
pub const REGISTRY_MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Bytes of a registry snapshot in one message.
pub const REGISTRY_SNAPSHOT_CHUNK_BYTES: u64 = 1 << 20;
/// Bytes of a whole registry snapshot, the bound of what a receiver buffers.
pub const REGISTRY_SNAPSHOT_BYTES_MAX: usize = 256 << 20;
/// Outcomes of transactions that the registry remembers, so that a repeated proposal is executed once.
pub const REGISTRY_OUTCOMES_KEPT: usize = 4096;
/// Times that a registry update is built again after a conflict.
pub const REGISTRY_UPDATE_TRIES: u32 = 32;
/// Decided tickets that a participant of the snapshot procedure remembers.
pub const SNAPSHOT_TICKETS_KEPT: usize = 64;
/// Milliseconds for which a snapshot may hold the writes of a volume, unless the operator says otherwise (S003-28).
pub const SNAPSHOT_HOLD_MAX_MS: u64 = 500;
/// Milliseconds for which the completions of writes are parked while a `barrier` goes round, in its
/// first and second try; a third one gets the time of a hold.
pub const SNAPSHOT_PARK_MAX_MS: [u64; 2] = [50, 200];
/// Milliseconds for which a participant holds writes at the most, whatever the coordinator asks;
/// well below the 30 s after which Linux calls a block request lost.
pub const SNAPSHOT_HOLD_CAP_MS: u64 = 10_000;
/// Milliseconds that the coordinator waits for `taken` after `take`. Nothing is held any more:
/// the owners sync their logs.
pub const SNAPSHOT_TAKEN_MS: u64 = 15_000;
/// Milliseconds that the coordinator of an aborted snapshot waits for the participants.
pub const SNAPSHOT_RELEASE_MS: u64 = 2_000;
/// Milliseconds before an aborted snapshot is tried again: a restarting server is back by then.
pub const SNAPSHOT_RETRY_MS: u64 = 300;

const _: () = assert!(
    FORWARD_DEADLINE_MS > SNAPSHOT_HOLD_MAX_MS,
    "a hold must not fail a forwarded write"
);
const _: () = assert!(SNAPSHOT_PENDING_MAX_MS > 4 * SNAPSHOT_HOLD_MAX_MS);
const _: () = assert!(LEASE_MARGIN_MS >= LEASE_CONFIRM_MS && LEASE_TTL_MIN_MS > 2 * LEASE_TICK_MS);
const _: () = assert!(REQUEST_PART_BYTES < crate::io::wire::MAX_PAYLOAD_BYTES);
const _: () = assert!(ROUTE_RUNS_TARGET as usize <= ROUTE_RUNS_MAX);
const _: () = assert!(NAME_CHARS_MAX <= REGISTRY_TEXT_BYTES_MAX);
const _: () = assert!(2 * TRANSACTION_BYTES_MAX <= REGISTRY_MESSAGE_BYTES_MAX);
const _: () = assert!(2 * REGISTRY_SNAPSHOT_CHUNK_BYTES <= REGISTRY_MESSAGE_BYTES_MAX as u64);
const _: () = assert!(SNAPSHOT_HOLD_MAX_MS <= SNAPSHOT_HOLD_CAP_MS);
const _: () = assert!(SNAPSHOT_PENDING_MAX_MS > SNAPSHOT_TAKEN_MS + SNAPSHOT_HOLD_CAP_MS);
const _: () = assert!(
    SPAN_MAX_MS > FORWARD_DEADLINE_MS,
    "a span outlives the tries of its requester"
);
