//! Options with a wrong or odd payload: the reply type, and the handshake goes on.

use super::{Row, opens};
use crate::nbd_raw::wire::{
    EXT_HEADER_REQD, EXTENDED_HEADERS, GO, INFO, INVALID, LIST, LIST_META, PEEK, POLICY, REP_ACK,
    SET_META, STARTTLS, STRUCTURED_REPLY, TOO_BIG, UNKNOWN, UNSUP,
};
use crate::nbd_raw::{Mode, RawNbd, info_payload, meta_payload};

/// What was agreed on before, the option, its payload, the reply types that are right.
struct Case {
    row: &'static str,
    case: &'static str,
    before: Mode,
    option: u32,
    data: Vec<u8>,
    right: &'static [u32],
}

fn case(
    row: &'static str,
    case: &'static str,
    option: u32,
    data: impl Into<Vec<u8>>,
    right: &'static [u32],
) -> Case {
    Case {
        row,
        case,
        before: Mode::Simple,
        option,
        data: data.into(),
        right,
    }
}

fn after(before: Mode, case: Case) -> Case {
    Case { before, ..case }
}

pub(super) fn rows() -> Vec<Row> {
    let cases = [unknown(), info(), payloads(), contexts(), repeated()];
    cases.into_iter().flatten().map(row).collect()
}

fn row(case: Case) -> Row {
    Row::new(case.row, case.case, move |target| {
        let mut raw = RawNbd::greeted(&target.export, 3);
        raw.agree(case.before);
        let kind = raw.option(case.option, &case.data);
        assert!(case.right.contains(&kind), "{}: {kind:#x}", case.case);
        if case.option == EXTENDED_HEADERS && kind == REP_ACK {
            raw.mode = Mode::Extended;
        }
        if case.option == STRUCTURED_REPLY && kind == REP_ACK {
            raw.mode = Mode::Structured;
        }
        opens(&mut raw, target);
    })
}

fn unknown() -> Vec<Case> {
    let row = "A.4 unknown option";
    vec![
        case(row, "no payload", 77, [], &[UNSUP]),
        case(row, "4 bytes", 77, *b"abcd", &[UNSUP]),
        case(row, "100 KB", 77, vec![0x41; 100_000], &[UNSUP]),
        case(row, "1 MiB", 77, vec![0x41; 1 << 20], &[UNSUP]),
        case(
            row,
            "a payload that looks like options",
            78,
            b"IHAVEOPT".repeat(64),
            &[UNSUP],
        ),
        case(row, "number 0", 0, [], &[UNSUP]),
        case(row, "number 2^32-1", u32::MAX, [], &[UNSUP]),
        case("A.1 PEEK", "withdrawn", PEEK, [], &[UNSUP]),
    ]
}

fn info() -> Vec<Case> {
    let row = "A.4 GO and INFO payload";
    let mut cases = vec![];
    for option in [GO, INFO] {
        cases.extend([
            case(row, "empty", option, [], &[INVALID]),
            case(row, "3 bytes", option, *b"\0\0\0", &[INVALID]),
            case(
                row,
                "name length of 65535",
                option,
                *b"\0\0\xff\xffvol1\0\0",
                &[INVALID],
            ),
            case(
                row,
                "name length of 2^32-1",
                option,
                *b"\xff\xff\xff\xffvol1\0\0",
                &[INVALID],
            ),
            case(
                row,
                "name ends with the payload",
                option,
                *b"\0\0\0\x04vol1",
                &[INVALID],
            ),
            case(
                row,
                "one byte for the count",
                option,
                *b"\0\0\0\x04vol1\0",
                &[INVALID],
            ),
            case(
                row,
                "more items than bytes",
                option,
                *b"\0\0\0\x04vol1\0\x09\0\x03",
                &[INVALID],
            ),
            case(
                row,
                "fewer items than bytes",
                option,
                *b"\0\0\0\x04vol1\0\0\0\x03",
                &[INVALID],
            ),
            case(
                row,
                "half an item",
                option,
                *b"\0\0\0\x04vol1\0\x01\0",
                &[INVALID],
            ),
            case(
                row,
                "65535 items and none there",
                option,
                *b"\0\0\0\0\xff\xff",
                &[INVALID],
            ),
            case(
                "A.4 name of 4097",
                "GO, INFO",
                option,
                name(&[b'n'; 4097]),
                &[INVALID, TOO_BIG],
            ),
            case(
                "A.4 name of 65000",
                "GO, INFO",
                option,
                name(&[b'n'; 65000]),
                &[INVALID, TOO_BIG],
            ),
            case(
                "A.4 name with NUL",
                "at the end",
                option,
                name(b"vol\0"),
                &[INVALID],
            ),
            case(
                "A.4 name with NUL",
                "alone",
                option,
                name(b"\0"),
                &[INVALID],
            ),
            case(
                "A.4 name not UTF-8",
                "GO, INFO",
                option,
                name(b"vol\xff\xfe"),
                &[INVALID],
            ),
            case(
                "A.4 name not UTF-8",
                "half a character",
                option,
                name(b"vol\xc3"),
                &[INVALID],
            ),
        ]);
    }
    cases
}

fn name(name: &[u8]) -> Vec<u8> {
    info_payload(name, &[])
}

fn payloads() -> Vec<Case> {
    vec![
        case("A.1 LIST", "with a payload", LIST, *b"x", &[INVALID]),
        case(
            "A.1 LIST",
            "with 100 KB",
            LIST,
            vec![0; 100_000],
            &[INVALID],
        ),
        case(
            "A.1 STRUCTURED_REPLY",
            "with a payload",
            STRUCTURED_REPLY,
            *b"x",
            &[INVALID],
        ),
        case(
            "EXT EXTENDED_HEADERS",
            "with a payload",
            EXTENDED_HEADERS,
            *b"x",
            &[INVALID],
        ),
        case(
            "A.1 STARTTLS",
            "not configured",
            STARTTLS,
            [],
            &[UNSUP, POLICY],
        ),
        case(
            "A.1 STARTTLS",
            "with a payload",
            STARTTLS,
            *b"x",
            &[INVALID, UNSUP, POLICY],
        ),
    ]
}

fn contexts() -> Vec<Case> {
    let row = "A.1 LIST_META and SET_META";
    let mut cases = vec![];
    for option in [LIST_META, SET_META] {
        let bad = [
            ("empty", vec![]),
            ("3 bytes", b"\0\0\0".to_vec()),
            (
                "name length of 2^32-1",
                b"\xff\xff\xff\xffvol1\0\0\0\0".to_vec(),
            ),
            ("no count", b"\0\0\0\0".to_vec()),
            ("query cut", b"\0\0\0\0\0\0\0\x01\0\0\0\x10base".to_vec()),
            (
                "query length of 2^32-1",
                b"\0\0\0\0\0\0\0\x01\xff\xff\xff\xffbase".to_vec(),
            ),
            ("2^32-1 queries", b"\0\0\0\0\xff\xff\xff\xff".to_vec()),
            ("bytes behind the last query", b"\0\0\0\0\0\0\0\0x".to_vec()),
        ];
        let bad = bad.map(|(what, data)| case(row, what, option, data, &[INVALID]));
        cases.extend(bad.map(|case| after(Mode::Structured, case)));
        let long = [b"base:".to_vec(), vec![b'x'; 4092]].concat();
        let long = meta_payload(b"", &[&long]);
        let long = case(row, "query of 4097", option, long, &[INVALID, TOO_BIG]);
        cases.push(after(Mode::Structured, long));
        let unknown = meta_payload(b"no such export", &[b"base:allocation"]);
        let unknown = case(
            "A.1 SET_META",
            "unknown export",
            option,
            unknown,
            &[UNKNOWN, REP_ACK],
        );
        cases.push(after(Mode::Structured, unknown));
    }
    let query = meta_payload(b"", &[b"base:allocation"]);
    let needs = &[INVALID, EXT_HEADER_REQD];
    cases.push(case("A.4 SET_META without SR", "", SET_META, query, needs));
    let no_colon = meta_payload(b"vol1", &[b"base"]);
    let no_colon = case(
        "A.4 SET_META no colon",
        "",
        SET_META,
        no_colon,
        &[REP_ACK, INVALID],
    );
    cases.push(after(Mode::Structured, no_colon));
    cases
}

fn repeated() -> Vec<Case> {
    let twice = case(
        "A.4 SR twice",
        "",
        STRUCTURED_REPLY,
        [],
        &[REP_ACK, INVALID],
    );
    let after_extended = case(
        "EXT STRUCTURED_REPLY",
        "after EXTENDED_HEADERS",
        STRUCTURED_REPLY,
        [],
        &[EXT_HEADER_REQD],
    );
    let both = case(
        "EXT EXTENDED_HEADERS",
        "after SR",
        EXTENDED_HEADERS,
        [],
        &[REP_ACK],
    );
    let again = case(
        "EXT EXTENDED_HEADERS",
        "twice",
        EXTENDED_HEADERS,
        [],
        &[REP_ACK, INVALID],
    );
    vec![
        after(Mode::Structured, twice),
        after(Mode::Extended, after_extended),
        after(Mode::Structured, both),
        after(Mode::Extended, again),
    ]
}
