//! Commands as data: type, flags, range and the error numbers that are right, in every mode.

use super::{Row, SCRATCH, SIZE, alive};
use crate::nbd_raw::wire::{
    CACHE, DF, EINVAL, ENOSPC, EOVERFLOW, FAST_ZERO, FLUSH, FUA, NO_HOLE, PAYLOAD_LEN, READ,
    REQ_ONE, RESIZE, STATUS, TRIM, WRITE, ZEROES,
};
use crate::nbd_raw::{Mode, RawNbd};

const MIB: u64 = 1 << 20;
const MAX: u64 = u32::MAX as u64;
const OK: &[u32] = &[0];
const BAD: &[u32] = &[EINVAL];
const SPACE: &[u32] = &[ENOSPC];

/// The last offsets of a range of 512 bytes that wraps around 2^64.
const WRAPS: u64 = u64::MAX - 511;

struct Case {
    row: &'static str,
    case: &'static str,
    kind: u16,
    flags: u16,
    offset: u64,
    len_bytes: u64,
    right: &'static [u32],
}

const fn case(
    row: &'static str,
    case: &'static str,
    request: (u16, u16, u64, u64),
    right: &'static [u32],
) -> Case {
    let (kind, flags, offset, len_bytes) = request;
    Case {
        row,
        case,
        kind,
        flags,
        offset,
        len_bytes,
        right,
    }
}

/// Every case is run in these modes.
const ALL: &[Mode] = &Mode::ALL;
const SIMPLE: &[Mode] = &[Mode::Simple];
const COMPACT: &[Mode] = &[Mode::Simple, Mode::Structured];

pub(super) fn rows() -> Vec<Row> {
    let tables: [(&[Mode], &[Case]); 6] = [
        (ALL, NOTHING),
        (ALL, RANGES),
        (ALL, FLAGS),
        (ALL, SIZES),
        (SIMPLE, UNNEGOTIATED),
        (COMPACT, UNOFFERED_HEADERS),
    ];
    let rows = tables.iter().flat_map(|(modes, cases)| {
        let each = |case| modes.iter().map(move |mode| row(case, *mode));
        cases.iter().flat_map(each)
    });
    rows.chain([exact_reads()]).collect()
}

fn row(case: &'static Case, mode: Mode) -> Row {
    let name = format!("{}, {mode:?}", case.case);
    Row::new(case.row, &name.clone(), move |target| {
        let mut raw = RawNbd::opened(&target.export, mode);
        let payload_bytes = if case.kind == WRITE {
            case.len_bytes
        } else {
            0
        };
        let payload = vec![0x11; usize::try_from(payload_bytes).unwrap()];
        let sent = raw.try_send(case.kind, case.flags, case.offset, case.len_bytes, &payload);
        let reply = raw.reply(&sent.unwrap());
        let right = case.right.contains(&reply.errno);
        assert!(right, "{name}: errno {} {}", reply.errno, reply.text);
        alive(&mut raw);
    })
}

/// Length 0 is unspecified; the friendliest answer is to do nothing. READ may refuse: libnbd's own
/// test expects that.
const NOTHING: &[Case] = &[
    case("A.3 length 0", "read", (READ, 0, 0, 0), &[0, EINVAL]),
    case(
        "A.3 length 0",
        "read at the end",
        (READ, 0, SIZE, 0),
        &[0, EINVAL],
    ),
    case("A.3 length 0", "write", (WRITE, 0, 0, 0), OK),
    case(
        "A.3 length 0",
        "write at the end",
        (WRITE, 0, SIZE, 0),
        &[0, ENOSPC],
    ),
    case(
        "A.3 length 0",
        "write behind the end",
        (WRITE, 0, SIZE + 1, 0),
        &[0, ENOSPC],
    ),
    case("A.3 length 0", "trim", (TRIM, 0, 0, 0), OK),
    case("A.3 length 0", "zeroes", (ZEROES, 0, 0, 0), OK),
    case("A.3 length 0", "cache", (CACHE, 0, 0, 0), OK),
    case("A.3 length 0", "unknown command", (99, 0, 0, 0), BAD),
];

const RANGES: &[Case] = &[
    case("A.4 read past end", "by 1", (READ, 0, SIZE - 511, 512), BAD),
    case("A.4 read at end", "", (READ, 0, SIZE, 512), BAD),
    case("A.4 read at 2^63", "", (READ, 0, 1 << 63, 512), BAD),
    case("A.4 read that wraps", "", (READ, 0, WRAPS, 512), BAD),
    case(
        "A.4 read that wraps",
        "from 2^64-1",
        (READ, 0, u64::MAX, 1),
        BAD,
    ),
    case(
        "A.4 write past end",
        "by 1",
        (WRITE, 0, SIZE - 511, 512),
        SPACE,
    ),
    case(
        "A.4 write past end",
        "1 MiB",
        (WRITE, 0, SIZE - 1, MIB),
        SPACE,
    ),
    case(
        "A.4 write past end",
        "65536",
        (WRITE, 0, SIZE, 65536),
        SPACE,
    ),
    case(
        "A.4 write past end",
        "65537",
        (WRITE, 0, SIZE, 65537),
        SPACE,
    ),
    case("A.4 write at 2^63", "", (WRITE, 0, 1 << 63, 512), SPACE),
    case("A.4 write that wraps", "", (WRITE, 0, WRAPS, 512), SPACE),
    case(
        "A.4 zeroes past end",
        "by 1",
        (ZEROES, 0, SIZE - 511, 512),
        SPACE,
    ),
    case(
        "A.4 zeroes past end",
        "NO_HOLE",
        (ZEROES, NO_HOLE, SIZE, 512),
        SPACE,
    ),
    case("A.4 zeroes that wrap", "", (ZEROES, 0, WRAPS, 512), SPACE),
    case("A.4 zeroes of 2^32-1", "", (ZEROES, 0, 0, MAX), SPACE),
    case("A.4 trim past end", "by 1", (TRIM, 0, SIZE - 511, 512), BAD),
    case("A.4 trim past end", "wraps", (TRIM, 0, WRAPS, 512), BAD),
    case("A.4 trim of 2^32-1", "", (TRIM, 0, 0, MAX), BAD),
    case("A.3 cache out of range", "", (CACHE, 0, SIZE, 512), BAD),
    case(
        "A.3 cache out of range",
        "wraps",
        (CACHE, 0, WRAPS, 512),
        BAD,
    ),
    case("A.3 last byte", "read", (READ, 0, SIZE - 1, 1), OK),
    case("A.3 last byte", "write", (WRITE, 0, SIZE - 1, 1), OK),
    case("A.3 last byte", "zeroes", (ZEROES, 0, SIZE - 1, 1), OK),
    case("A.3 last byte", "trim", (TRIM, 0, SIZE - 1, 1), OK),
    case(
        "A.4 flush with offset and length",
        "",
        (FLUSH, 0, 4096, 4096),
        &[0, EINVAL],
    ),
    case(
        "A.4 flush with offset and length",
        "past end",
        (FLUSH, 0, SIZE, 1),
        &[0, EINVAL],
    ),
];

const FLAGS: &[Case] = &[
    case("A.4 unknown flag", "read", (READ, 1 << 14, 0, 512), BAD),
    case(
        "A.4 unknown flag",
        "write 512",
        (WRITE, 1 << 14, SCRATCH, 512),
        BAD,
    ),
    case(
        "A.4 unknown flag",
        "write 70000",
        (WRITE, 1 << 15, SCRATCH, 70_000),
        BAD,
    ),
    case(
        "A.4 unknown flag",
        "write 1 MiB",
        (WRITE, 1 << 6, SCRATCH, MIB),
        BAD,
    ),
    case(
        "A.4 unknown flag",
        "trim",
        (TRIM, 1 << 14, SCRATCH, 512),
        BAD,
    ),
    case(
        "A.4 unknown flag",
        "zeroes",
        (ZEROES, 1 << 14, SCRATCH, 512),
        BAD,
    ),
    case("A.4 unknown flag", "flush", (FLUSH, 1 << 14, 0, 0), BAD),
    case(
        "A.3 inapplicable flag",
        "NO_HOLE on write",
        (WRITE, NO_HOLE, SCRATCH, 512),
        BAD,
    ),
    case(
        "A.3 inapplicable flag",
        "NO_HOLE on read",
        (READ, NO_HOLE, 0, 512),
        BAD,
    ),
    case(
        "A.3 inapplicable flag",
        "DF on write",
        (WRITE, DF, SCRATCH, 512),
        BAD,
    ),
    case(
        "A.3 inapplicable flag",
        "REQ_ONE on read",
        (READ, REQ_ONE, 0, 512),
        BAD,
    ),
    case(
        "A.3 inapplicable flag",
        "FAST_ZERO on trim",
        (TRIM, FAST_ZERO, SCRATCH, 512),
        BAD,
    ),
    case(
        "A.3 inapplicable flag",
        "FAST_ZERO on write",
        (WRITE, FAST_ZERO, SCRATCH, 512),
        BAD,
    ),
    case("A.4 unknown command", "99", (99, 0, 0, 512), BAD),
    case("A.4 unknown command", "65535", (u16::MAX, 0, 0, 512), BAD),
    case("A.4 unknown command", "9 with FUA", (9, FUA, 0, 512), BAD),
    case("A.4 RESIZE", "", (RESIZE, 0, 4096, 0), BAD),
    case(
        "A.4 BLOCK_STATUS un-negotiated",
        "",
        (STATUS, 0, 0, 512),
        BAD,
    ),
    case(
        "A.4 BLOCK_STATUS un-negotiated",
        "REQ_ONE",
        (STATUS, REQ_ONE, 0, 512),
        BAD,
    ),
];

const SIZES: &[Case] = &[
    case("A.4 unaligned", "read 1", (READ, 0, 4097, 1), OK),
    case(
        "A.4 unaligned",
        "write 1",
        (WRITE, 0, SCRATCH + 4097, 1),
        OK,
    ),
    case(
        "A.4 unaligned",
        "write 513",
        (WRITE, 0, SCRATCH + 511, 513),
        OK,
    ),
    case("A.4 read 33 MiB", "", (READ, 0, 0, 33 * MIB), OK),
    case("A.4 read 64 MiB", "", (READ, 0, 0, 64 * MIB), OK),
    case(
        "A.4 read 65 MiB",
        "",
        (READ, 0, 0, 65 * MIB),
        &[EINVAL, EOVERFLOW],
    ),
    case(
        "A.4 read 2^32-1",
        "",
        (READ, 0, 0, MAX),
        &[EINVAL, EOVERFLOW],
    ),
    case("A.4 write 33 MiB", "", (WRITE, 0, 0, 33 * MIB), OK),
    case("A.4 trim 48 MiB", "", (TRIM, 0, 0, 48 * MIB), OK),
    case("A.4 zeroes 48 MiB", "", (ZEROES, 0, 0, 48 * MIB), OK),
    case(
        "A.4 zeroes 48 MiB",
        "NO_HOLE",
        (ZEROES, NO_HOLE, 0, 48 * MIB),
        OK,
    ),
    case("A.3 cache", "48 MiB", (CACHE, 0, 0, 48 * MIB), OK),
];

const UNNEGOTIATED: &[Case] = &[case("A.4 DF without SR", "", (READ, DF, 0, 512), BAD)];

const UNOFFERED_HEADERS: &[Case] = &[
    case(
        "EXT PAYLOAD_LEN without the headers",
        "read",
        (READ, PAYLOAD_LEN, 0, 512),
        BAD,
    ),
    case(
        "EXT PAYLOAD_LEN without the headers",
        "write",
        (WRITE, PAYLOAD_LEN, SCRATCH, 512),
        BAD,
    ),
    case(
        "EXT PAYLOAD_LEN without the headers",
        "status",
        (STATUS, PAYLOAD_LEN, 0, 512),
        BAD,
    ),
];

/// Data is exact whatever the boundaries, and a hole and its data do not mix.
fn exact_reads() -> Row {
    Row::new(
        "A.3 READ",
        "exact at odd boundaries, in every mode",
        |target| {
            let mut raw = RawNbd::opened(&target.export, Mode::Simple);
            assert_eq!(raw.ask(ZEROES, 0, SCRATCH, 2 * MIB).errno, 0);
            assert_eq!(raw.write(0, SCRATCH + 65_530, b"0123456789ab"), 0);
            assert_eq!(raw.write(FUA, SCRATCH + MIB - 1, &[7; 4099]), 0);
            let mut whole = vec![0; 2 << 20];
            whole[65_530..65_542].copy_from_slice(b"0123456789ab");
            whole[(1 << 20) - 1..(1 << 20) + 4098].fill(7);
            for mode in Mode::ALL {
                let mut raw = RawNbd::opened(&target.export, mode);
                let ranges = [
                    (65_530, 12),
                    (65_533, 1),
                    (0, 2 << 20),
                    (65_541, 983_100),
                    (1, 65_530),
                ];
                for (at, len_bytes) in ranges {
                    let data = raw.read(SCRATCH + at as u64, len_bytes as u64);
                    assert!(
                        data == whole[at..at + len_bytes],
                        "{mode:?}: {len_bytes} at {at}"
                    );
                }
            }
        },
    )
}
