//! Every limit of the server: its unit, its reason, and how it relates to the others.

use std::time::Duration;

/// Largest request size in bytes that is advertised (INFO_BLOCK_SIZE): what every known client accepts as maximum.
pub const ADVERTISED_PAYLOAD_BYTES: u32 = 32 << 20;
/// Largest READ or WRITE in bytes that is served: requests up to 50 MB were seen from clients that ignore the advertised maximum.
pub const PAYLOAD_BYTES: u32 = 64 << 20;
/// Largest payload in bytes of a refused WRITE that is read and dropped to stay in sync; beyond this the connection is closed.
pub const DRAIN_BYTES: u32 = 128 << 20;
/// Smallest block size in bytes that is advertised: any range is served.
pub const MIN_BLOCK_BYTES: u32 = 1;

/// Longest export name or context query in bytes (protocol, "String": MUST support no more than 4096).
pub const NAME_BYTES: usize = 4096;
/// Largest option payload in bytes that is looked at: a name and some hundred context queries.
pub const OPTION_BYTES: u32 = 64 << 10;
/// Largest option payload in bytes that is read and dropped to stay in sync; beyond this the connection is closed.
pub const OPTION_DRAIN_BYTES: u32 = 1 << 20;
/// Options of one handshake: no client needs more than a dozen and a few per name it asks about.
pub const OPTIONS_MAX: u32 = 1024;
/// Longest human text in bytes in an error reply (protocol maximum 4096; a line is enough).
pub const ERROR_TEXT_BYTES: usize = 512;
/// Extents of one metadata context in a BLOCK_STATUS reply (protocol maximum 2^20): 32 or 64 KiB of reply.
pub const EXTENTS_MAX: usize = 4096;
/// Metadata contexts that one connection may select; listed are all.
pub const CONTEXTS_MAX: usize = 64;

/// Receive buffer of one connection in bytes: 62 requests of 4 KiB writes per receive.
pub const RECEIVE_BYTES: usize = 256 << 10;
/// A WRITE payload of at most so many bytes is copied out of the receive buffer; a larger one is received into its own buffer.
pub const SMALL_PAYLOAD_BYTES: u32 = 64 << 10;
/// Requests of one connection that are not yet answered: the queue depth of the Linux client.
pub const IN_FLIGHT_MAX: u32 = 128;
/// Payload bytes of one connection that are held at a time (write payloads until done, read replies until sent).
pub const CONNECTION_PAYLOAD_BYTES: u64 = 64 << 20;
/// Of these, bytes that a connection has without asking the shared budget: small requests go on while others hold all of it.
pub const CONNECTION_OWN_BYTES: u64 = 256 << 10;
/// Payload bytes of all connections that share a budget, beyond their own.
pub const SHARED_PAYLOAD_BYTES: u64 = 256 << 20;
/// Slices in one vectored write: enough for 32 replies with header and payload.
pub const WRITE_SLICES: usize = 64;

/// Reply bytes that are sent before further requests are executed: they are still in the processor's cache.
pub const SEND_BYTES: usize = 256 << 10;

/// Connections of one server, handshakes included: 256 MiB of receive buffers.
pub const CONNECTIONS_MAX: usize = 1024;
/// Connections from one address, so that one client does not keep all others out.
pub const CONNECTIONS_PER_ADDRESS_MAX: usize = 512;
/// One in so many connections is kept for unix sockets, if the server listens on one: others cannot keep local programs out.
pub const LOCAL_SHARE: usize = 16;
/// Pending connections in the kernel: a burst of clients that reconnect at once.
pub const LISTEN_BACKLOG: u32 = 1024;
/// Time for the whole handshake.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// How long a connection may hold payload bytes of the budget and move less than its share of them while others wait.
pub const STALL_DEADLINE: Duration = Duration::from_secs(30);
/// That share, one in so many: others wait for at most so many deadlines (8 minutes), and a client that holds all it may keeps its
/// connection with 1.2 Mbit/s.
pub const STALL_SHARE: u64 = 16;
/// Silence on a TCP connection after which the kernel asks whether the peer still lives.
pub const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// How long a draining server lets a handshake go on (to be told so), and waits for a client to close after it has closed itself.
pub const DRAIN_GRACE: Duration = Duration::from_secs(1);
/// How long a stopping server waits for requests in flight before it drops them.
pub const DRAIN_DEADLINE: Duration = Duration::from_secs(30);

const _: () = assert!(
    DRAIN_GRACE.as_nanos() < DRAIN_DEADLINE.as_nanos(),
    "a connection must end before it is dropped"
);
const _: () = assert!(
    ADVERTISED_PAYLOAD_BYTES <= PAYLOAD_BYTES,
    "what is advertised must be accepted"
);
const _: () = assert!(
    PAYLOAD_BYTES < DRAIN_BYTES,
    "a payload that is slightly too large must be drained, not cut"
);
const _: () = assert!(
    PAYLOAD_BYTES as u64 <= CONNECTION_PAYLOAD_BYTES,
    "the largest request must fit one connection"
);
const _: () = assert!(
    SMALL_PAYLOAD_BYTES as u64 <= CONNECTION_OWN_BYTES,
    "a small request never waits for others"
);
const _: () = assert!(
    CONNECTION_PAYLOAD_BYTES * 2 <= SHARED_PAYLOAD_BYTES,
    "one connection must not hold everything"
);
const _: () = assert!(
    SMALL_PAYLOAD_BYTES as usize * 2 <= RECEIVE_BYTES,
    "a small payload must fit behind a partial one"
);
const _: () = assert!(
    OPTION_BYTES as usize > NAME_BYTES * 2,
    "a name and a query must fit an option"
);
const _: () = assert!(
    OPTION_BYTES <= OPTION_DRAIN_BYTES,
    "an option that is looked at is also in sync"
);
const _: () = assert!(
    CONNECTIONS_PER_ADDRESS_MAX < CONNECTIONS_MAX,
    "one address must not take everything"
);
const _: () = assert!(
    EXTENTS_MAX <= 1 << 20 && ERROR_TEXT_BYTES <= 4096,
    "protocol maxima"
);
const _: () = assert!(
    CONTEXTS_MAX <= u64::BITS as usize,
    "a subset of the selected contexts is a u64"
);
const _: () = assert!(
    (CONTEXTS_MAX * (EXTENTS_MAX + 1) * 16) as u64 <= CONNECTION_PAYLOAD_BYTES,
    "the largest BLOCK_STATUS reply must fit one connection"
);
