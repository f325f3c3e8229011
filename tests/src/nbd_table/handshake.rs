//! The handshake: greeting, names, lists, what INFO and GO say, and what ends it.

use super::{Row, SIZE, Target, alive, opens};
use crate::nbd_raw::wire::{
    ABORT, EXPORT_NAME, GO, INFO, INVALID, LIST, REP_ACK, REP_SERVER, STRUCTURED_REPLY, TOO_BIG,
    UNKNOWN,
};
use crate::nbd_raw::{Mode, RawNbd, info_payload, option_head};
use std::io::Write;

pub(super) fn rows() -> Vec<Row> {
    let mut rows = vec![
        Row::new(
            "A.1 greeting",
            "client flags 0, 1 and 3 are accepted",
            flags_accepted,
        ),
        Row::new(
            "A.1 EXPORT_NAME",
            "size, flags, 124 zeroes unless NO_ZEROES",
            export_name,
        ),
        Row::new(
            "A.1 EXPORT_NAME",
            "after STRUCTURED_REPLY",
            export_name_structured,
        ),
        Row::new(
            "A.1 EXPORT_NAME",
            "what it can not open is closed",
            export_name_closes,
        ),
        Row::new(
            "A.1 ABORT",
            "ACK, the payload is ignored, then close",
            abort,
        ),
        Row::new("A.1 ABORT", "the client is gone already", abort_and_gone),
        Row::new("A.1 LIST", "SERVER for each export, then ACK", list),
        Row::new(
            "A.1 INFO and GO",
            "EXPORT always, in front of what was asked",
            info_items,
        ),
        Row::new("A.4 INFO then GO same data", "", info_then_go),
        Row::new("A.1 INFO and GO", "block sizes are legal", block_sizes),
        Row::new(
            "A.1 INFO and GO",
            "no zero padding behind GO, ever",
            go_has_no_padding,
        ),
        Row::new("A.4 name of 4096", "UNKNOWN and in step", long_name),
        Row::new("A.1 GO", "UNKNOWN and in step", unknown_name),
        Row::new("A.1 options", "100 in a row", many_options),
        Row::new("A.1 options", "several in one segment", pipelined_options),
        Row::new("A.1 options", "cut into single bytes", single_bytes),
    ];
    for flags in [1 << 7, 1 << 2 | 3, 1 << 16 | 3, u32::MAX, 1 << 31] {
        let case = format!("{flags:#x}");
        rows.push(Row::new("A.4 unknown client flag", &case, move |target| {
            let mut raw = RawNbd::greeted(&target.export, flags);
            // The connection may be closed already.
            let _ = raw.try_send_option(LIST, b"");
            assert!(raw.is_closed());
        }));
    }
    let broken: [(&str, &[u8]); 5] = [
        ("A.4 bad option magic", b"IHAVENOT\0\0\0\x03\0\0\0\0"),
        ("A.4 bad option magic: zeroes", &[0; 16]),
        (
            "A.4 option length 2^32-1",
            b"IHAVEOPT\0\0\0\x4d\xff\xff\xff\xff",
        ),
        (
            "A.4 option length 2^32-1: GO",
            b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff",
        ),
        (
            "A.4 option length 2^31: EXPORT_NAME",
            b"IHAVEOPT\0\0\0\x01\x80\0\0\0",
        ),
    ];
    rows.extend(broken.map(|(row, bytes)| {
        Row::new(row, "closed", move |target| {
            let mut raw = RawNbd::greeted(&target.export, 3);
            raw.stream.write_all(bytes).unwrap();
            assert!(raw.is_closed());
        })
    }));
    rows
}

fn flags_accepted(target: &Target) {
    for flags in [1, 3] {
        let mut raw = RawNbd::greeted(&target.export, flags);
        opens(&mut raw, target);
    }
    // Without fixed newstyle only EXPORT_NAME may follow.
    let mut raw = RawNbd::greeted(&target.export, 0);
    raw.send_option(LIST, b"");
    let mut reply = [0; 20];
    match std::io::Read::read_exact(&mut raw.stream, &mut reply) {
        Ok(()) => assert_eq!(reply[12..16], INVALID.to_be_bytes()),
        Err(_) => assert!(raw.is_closed()),
    }
}

fn export_name(target: &Target) {
    for (flags, padding_bytes) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let mut raw = RawNbd::greeted(&target.export, flags);
        raw.send_option(EXPORT_NAME, target.export.export.as_bytes());
        let head = raw.take(10);
        assert_eq!(head[..8], SIZE.to_be_bytes(), "client flags {flags}");
        assert_eq!(head[9] & 0x80, 0, "DF is offered without chunks");
        assert_eq!(raw.take(padding_bytes), vec![0; padding_bytes]);
        alive(&mut raw);
    }
}

fn export_name_structured(target: &Target) {
    let mut raw = RawNbd::greeted(&target.export, 3);
    raw.agree(Mode::Structured);
    raw.send_option(EXPORT_NAME, target.export.export.as_bytes());
    let head = raw.take(10);
    assert_eq!(head[9] & 0x80, 0x80, "DF must be offered");
    alive(&mut raw);
}

fn export_name_closes(target: &Target) {
    let mut names = vec![vec![b'n'; 4097], b"vol\0".to_vec(), b"vol\xff".to_vec()];
    if target.has_names {
        names.extend([b"no such export".to_vec(), vec![b'n'; 4096]]);
    }
    for name in names {
        let mut raw = RawNbd::greeted(&target.export, 3);
        raw.send_option(EXPORT_NAME, &name);
        assert!(raw.is_closed(), "a name of {} bytes", name.len());
    }
}

fn abort(target: &Target) {
    for payload in [vec![], b"goodbye".to_vec(), vec![7; 10_000]] {
        let mut raw = RawNbd::greeted(&target.export, 3);
        assert_eq!(raw.option(ABORT, &payload), REP_ACK);
        assert!(raw.is_closed());
    }
}

fn abort_and_gone(target: &Target) {
    let mut raw = RawNbd::greeted(&target.export, 3);
    raw.send_option(ABORT, b"");
    drop(raw);
    alive(&mut RawNbd::opened(&target.export, Mode::Simple));
}

fn list(target: &Target) {
    let mut raw = RawNbd::greeted(&target.export, 3);
    let replies = raw.option_replies(LIST, b"");
    let (last, servers) = replies.split_last().unwrap();
    assert_eq!((last.kind, last.data.len()), (REP_ACK, 0));
    let names: Vec<&str> = servers
        .iter()
        .map(|server| {
            assert_eq!(server.kind, REP_SERVER);
            let (len, rest) = server.data.split_at(4);
            let len_bytes = u32::from_be_bytes(len.try_into().unwrap());
            let (name, description) = rest.split_at(len_bytes as usize);
            assert!(!description.is_empty(), "a description for humans");
            std::str::from_utf8(description).unwrap();
            std::str::from_utf8(name).unwrap()
        })
        .collect();
    assert!(!target.has_names || names.contains(&target.export.export.as_str()));
    opens(&mut raw, target);
}

fn info_items(target: &Target) {
    let (export, mut raw) = (&target.export.export, RawNbd::greeted(&target.export, 3));
    let nothing = raw.facts(INFO, export, &[]);
    assert_eq!(nothing.size_bytes, SIZE);
    let all = raw.facts(INFO, export, &[1, 2, 3]);
    assert_eq!((all.size_bytes, all.flags), (SIZE, nothing.flags));
    assert_eq!(all.name.as_ref(), Some(export));
    assert!(all.block_bytes.is_some());
    assert!(all.description.is_some_and(|text| !text.is_empty()));
    let odd = raw.facts(INFO, export, &[3, 3, 3, 0, 99, u16::MAX, 1 << 15, 1]);
    assert_eq!((odd.size_bytes, odd.flags), (SIZE, nothing.flags));
    assert!(odd.name.is_some() && odd.block_bytes.is_some());
    opens(&mut raw, target);
}

fn info_then_go(target: &Target) {
    for mode in Mode::ALL {
        let mut raw = RawNbd::greeted(&target.export, 3);
        raw.agree(mode);
        let payload = info_payload(target.export.export.as_bytes(), &[1, 2, 3, 99]);
        let info = raw.option_replies(INFO, &payload);
        let go = raw.option_replies(GO, &payload);
        assert_eq!(info, go, "{mode:?}");
        alive(&mut raw);
    }
}

fn block_sizes(target: &Target) {
    for endpoint in [&target.export, &target.read_only, &target.large] {
        let mut raw = RawNbd::greeted(endpoint, 3);
        let facts = raw.facts(INFO, &endpoint.export, &[3]);
        let [min, preferred, max] = facts.block_bytes.unwrap();
        assert!(min.is_power_of_two() && (1..=65536).contains(&min));
        assert!(preferred.is_power_of_two() && preferred >= min.max(512));
        assert!((4096..=65536).contains(&preferred), "preferred {preferred}");
        assert!(max >= preferred && max == 32 << 20, "maximum {max}");
        assert_eq!(facts.size_bytes % u64::from(min), 0);
    }
}

fn go_has_no_padding(target: &Target) {
    for flags in [1, 3] {
        let mut raw = RawNbd::greeted(&target.export, flags);
        opens(&mut raw, target);
    }
}

fn long_name(target: &Target) {
    for option in [INFO, GO] {
        let mut raw = RawNbd::greeted(&target.export, 3);
        let kind = raw.option(option, &info_payload(&[b'n'; 4096], &[]));
        assert!(
            [UNKNOWN, TOO_BIG].contains(&kind) || !target.has_names,
            "{kind:#x}"
        );
        if kind != REP_ACK {
            opens(&mut raw, target);
        }
    }
}

fn unknown_name(target: &Target) {
    if !target.has_names {
        return;
    }
    let mut raw = RawNbd::greeted(&target.export, 3);
    for name in ["absent", "ABSENT@absent", "a@b@c", "@", "../etc/passwd"] {
        assert_eq!(
            raw.option(GO, &info_payload(name.as_bytes(), &[])),
            UNKNOWN,
            "{name}"
        );
    }
    opens(&mut raw, target);
}

fn many_options(target: &Target) {
    let mut raw = RawNbd::greeted(&target.export, 3);
    for _ in 0..50 {
        raw.facts(INFO, &target.export.export, &[3]);
        assert_eq!(raw.option(LIST, b""), REP_ACK);
    }
    opens(&mut raw, target);
}

fn pipelined_options(target: &Target) {
    let mut raw = RawNbd::greeted(&target.export, 3);
    let name = info_payload(target.export.export.as_bytes(), &[]);
    let info = [option_head(INFO, u32::try_from(name.len()).unwrap()), name].concat();
    let structured = option_head(STRUCTURED_REPLY, 0);
    raw.stream
        .write_all(&[&info[..], &structured, &info].concat())
        .unwrap();
    for option in [INFO, STRUCTURED_REPLY, INFO] {
        while !raw.option_reply(option).is_final() {}
    }
    raw.mode = Mode::Structured;
    opens(&mut raw, target);
}

fn single_bytes(target: &Target) {
    let mut raw = RawNbd::greeted(&target.export, 3);
    let payload = info_payload(target.export.export.as_bytes(), &[3]);
    let head = option_head(GO, u32::try_from(payload.len()).unwrap());
    for byte in [head, payload].concat() {
        raw.stream.write_all(&[byte]).unwrap();
    }
    while !raw.option_reply(GO).is_final() {}
    alive(&mut raw);
}
