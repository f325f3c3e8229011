//! Metadata contexts and BLOCK_STATUS.

use super::{Row, SCRATCH, SIZE, Target, alive};
use crate::nbd_raw::wire::{
    EINVAL, LIST_META, READ, REP_ACK, REQ_ONE, SET_META, STATUS, UNKNOWN, ZEROES,
};
use crate::nbd_raw::{Mode, RawNbd, meta_payload};

const BASE: &str = "base:allocation";
const HOLE: u64 = 1;
const ZERO: u64 = 2;
const CHUNKED: [Mode; 2] = [Mode::Structured, Mode::Extended];

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row::new("A.1 LIST_META", "no query lists all, with id 0", list_all),
        Row::new(
            "A.1 LIST_META",
            "by namespace, unknown ones ignored",
            list_queries,
        ),
        Row::new(
            "A.1 SET_META",
            "`base:` selects nothing",
            namespace_selects_nothing,
        ),
        Row::new(
            "A.1 SET_META",
            "replaces the set before, also when it fails",
            replaces,
        ),
        Row::new(
            "A.1 SET_META",
            "counts for the export that was named",
            other_export,
        ),
        Row::new(
            "A.1 SET_META",
            "the same query twice gives one context",
            duplicates,
        ),
        Row::new(
            "A.3 BLOCK_STATUS",
            "each context that is listed can be used",
            every_context,
        ),
        Row::new(
            "A.3 BLOCK_STATUS",
            "one chunk a context, ids as told",
            all_contexts,
        ),
        Row::new(
            "A.3 BLOCK_STATUS",
            "base:allocation tells the truth",
            allocation_is_true,
        ),
        Row::new(
            "A.3 BLOCK_STATUS",
            "length 0 keeps the connection",
            length_zero,
        ),
        Row::new("A.3 BLOCK_STATUS", "out of range", out_of_range),
        Row::new(
            "A.3 BLOCK_STATUS",
            "a walk by extents ends at the size",
            walk,
        ),
        Row::new("A.3 BLOCK_STATUS", "inapplicable flags", inapplicable),
    ]
}

fn structured(target: &Target) -> RawNbd {
    let mut raw = RawNbd::greeted(&target.export, 3);
    raw.agree(Mode::Structured);
    raw
}

fn listed(target: &Target) -> Vec<String> {
    let mut raw = structured(target);
    let found = raw.contexts(LIST_META, &target.export.export, &[]);
    found.into_iter().map(|(_, name)| name).collect()
}

fn list_all(target: &Target) {
    let mut raw = structured(target);
    let found = raw.contexts(LIST_META, &target.export.export, &[]);
    assert!(found.iter().all(|(id, _)| *id == 0), "{found:?}");
    assert!(found.iter().any(|(_, name)| name == BASE), "{found:?}");
    let valid = |(_, name): &(u32, String)| {
        name.split_once(':')
            .is_some_and(|(_, leaf)| !leaf.is_empty())
    };
    assert!(found.iter().all(valid), "{found:?}");
}

fn list_queries(target: &Target) {
    let export = &target.export.export;
    let mut raw = structured(target);
    let all = listed(target);
    let of = |space: &str| all.iter().filter(|name| name.starts_with(space)).count();
    let cases: [(&[&str], usize); 7] = [
        (&["base:"], 1),
        (&[BASE], 1),
        (&["qemu:"], of("qemu:")),
        (&["qemu:dirty-bitmap:"], of("qemu:dirty-bitmap:")),
        (&["no-such-space:"], 0),
        (&["base:no-such-leaf", "x-vendor:thing"], 0),
        (&["no-such-space:leaf", BASE], 1),
    ];
    for (queries, count) in cases {
        let found = raw.contexts(LIST_META, export, queries);
        assert_eq!(found.len(), count, "{queries:?} of {all:?}: {found:?}");
    }
    raw.go(export);
    alive(&mut raw);
}

fn namespace_selects_nothing(target: &Target) {
    let export = &target.export.export;
    for queries in [&["base:"][..], &["qemu:dirty-bitmap:"], &["qemu:"], &[]] {
        let mut raw = structured(target);
        assert_eq!(raw.contexts(SET_META, export, queries), [], "{queries:?}");
        raw.go(export);
        assert_eq!(raw.ask(STATUS, 0, 0, 4096).errno, EINVAL);
        alive(&mut raw);
    }
}

fn replaces(target: &Target) {
    let export = &target.export.export;
    let bad = b"\0\0\0\0\xff\xff\xff\xff".to_vec();
    let nothing = meta_payload(export.as_bytes(), &[b"no-such-space:leaf"]);
    for second in [bad, nothing] {
        let mut raw = structured(target);
        assert_eq!(raw.contexts(SET_META, export, &[BASE]).len(), 1);
        raw.option(SET_META, &second);
        raw.go(export);
        assert_eq!(raw.ask(STATUS, 0, 0, 4096).errno, EINVAL);
        alive(&mut raw);
    }
}

fn other_export(target: &Target) {
    let other = &target.large.export;
    if other == &target.export.export {
        return;
    }
    let mut raw = structured(target);
    // A server of one export does not know the other one.
    let kind = raw.option(
        SET_META,
        &meta_payload(other.as_bytes(), &[BASE.as_bytes()]),
    );
    assert!(kind == REP_ACK || kind == UNKNOWN, "{kind:#x}");
    raw.go(&target.export.export);
    assert_eq!(raw.ask(STATUS, 0, 0, 4096).errno, EINVAL);
    alive(&mut raw);
}

fn duplicates(target: &Target) {
    let export = &target.export.export;
    let mut raw = structured(target);
    let found = raw.contexts(SET_META, export, &[BASE, "x:y", BASE]);
    assert_eq!(found.len(), 1, "{found:?}");
    raw.go(export);
    let status = raw.ask(STATUS, 0, 0, 4096).status;
    assert_eq!(
        status.iter().map(|(id, _)| *id).collect::<Vec<_>>(),
        [found[0].0]
    );
}

fn every_context(target: &Target) {
    for context in listed(target) {
        for mode in CHUNKED {
            let (mut raw, ids) = RawNbd::opened_with(&target.export, mode, &[&context]);
            let reply = raw.ask(STATUS, 0, 0, SIZE);
            let found: Vec<u32> = reply.status.iter().map(|(id, _)| *id).collect();
            assert_eq!((reply.errno, found), (0, ids), "{context}: {}", reply.text);
            let one = raw.ask(STATUS, REQ_ONE, 0, 4096).status;
            assert_eq!(one[0].1.len(), 1);
            alive(&mut raw);
        }
    }
}

fn all_contexts(target: &Target) {
    let names = listed(target);
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for mode in CHUNKED {
        let (mut raw, mut ids) = RawNbd::opened_with(&target.export, mode, &names);
        assert_eq!(ids.len(), names.len());
        ids.sort_unstable();
        let mut found: Vec<u32> = vec![];
        for flags in [0, REQ_ONE] {
            let reply = raw.ask(STATUS, flags, SCRATCH, 1 << 20);
            found = reply.status.iter().map(|(id, _)| *id).collect();
            found.sort_unstable();
            assert_eq!((reply.errno, &found), (0, &ids), "{}", reply.text);
        }
        found.dedup();
        assert_eq!(found.len(), names.len(), "ids differ");
        alive(&mut raw);
    }
}

fn allocation_is_true(target: &Target) {
    const MIB: u64 = 1 << 20;
    for mode in CHUNKED {
        let mut raw = RawNbd::opened_with(&target.export, mode, &[BASE]).0;
        assert_eq!(raw.ask(ZEROES, 0, SCRATCH, 8 * MIB).errno, 0);
        assert_eq!(raw.write(0, SCRATCH + 2 * MIB, &vec![1; 1 << 20]), 0);
        assert_eq!(raw.write(0, SCRATCH + 5 * MIB, &vec![1; 1 << 20]), 0);
        let status = raw.ask(STATUS, 0, SCRATCH, 8 * MIB).status.remove(0).1;
        let data = raw.ask(READ, 0, SCRATCH, 8 * MIB).data;
        let mut at = 0;
        let mut zero_bytes = 0;
        for (len, status) in status {
            let end = (at + usize::try_from(len).unwrap()).min(data.len());
            assert_eq!(status & !(HOLE | ZERO), 0, "unknown status bits");
            let is_zero = data[at..end].iter().all(|byte| *byte == 0);
            assert!(status & ZERO == 0 || is_zero, "ZERO over data at {at}");
            zero_bytes += if status & ZERO == 0 { 0 } else { end - at };
            at = end;
        }
        assert_eq!(zero_bytes, 6 << 20, "what was zeroed is known as zero");
    }
}

fn length_zero(target: &Target) {
    for mode in CHUNKED {
        let mut raw = RawNbd::opened_with(&target.export, mode, &[BASE]).0;
        assert_eq!(raw.ask(STATUS, 0, 0, 0).errno, EINVAL);
        alive(&mut raw);
    }
}

fn out_of_range(target: &Target) {
    for mode in CHUNKED {
        let mut raw = RawNbd::opened_with(&target.export, mode, &[BASE]).0;
        for (offset, len_bytes) in [
            (SIZE - 511, 512),
            (SIZE, 1),
            (1 << 63, 512),
            (u64::MAX - 511, 512),
            (0, u64::from(u32::MAX)),
        ] {
            assert_eq!(
                raw.ask(STATUS, 0, offset, len_bytes).errno,
                EINVAL,
                "{offset}"
            );
        }
        alive(&mut raw);
    }
}

fn walk(target: &Target) {
    for mode in CHUNKED {
        for flags in [0, REQ_ONE] {
            let mut raw = RawNbd::opened_with(&target.export, mode, &[BASE]).0;
            let (mut at, mut turns) = (0, 0);
            while at < SIZE {
                let reply = raw.ask(STATUS, flags, at, SIZE - at);
                assert_eq!(reply.errno, 0, "{}", reply.text);
                let total: u64 = reply.status[0].1.iter().map(|(len, _)| len).sum();
                at += total;
                turns += 1;
                assert!(total > 0 && at <= SIZE && turns < 100_000, "at {at}");
            }
        }
    }
}

fn inapplicable(target: &Target) {
    let mut raw = RawNbd::opened_with(&target.export, Mode::Structured, &[BASE]).0;
    for flags in [2, 4, 16, 32, 1 << 14] {
        assert_eq!(raw.ask(STATUS, flags, 0, 4096).errno, EINVAL, "{flags:#x}");
    }
    alive(&mut raw);
}
