//! Extended headers: payloads by flag, 64-bit lengths, BLOCK_STATUS of some contexts.

use super::{LARGE, Row, SCRATCH, SIZE, Target, alive};
use crate::nbd_raw::wire::{
    CACHE, EINVAL, ENOSPC, EOVERFLOW, EXPORT_NAME, FAST_ZERO, FLUSH, LIST_META, NO_HOLE,
    PAYLOAD_LEN, READ, REQ_ONE, SET_META, STATUS, TRIM, WRITE, ZEROES,
};
use crate::nbd_raw::{Mode, RawNbd};
use std::io::Write;

const BASE: &str = "base:allocation";
const FIVE_GIB: u64 = 5 << 30;

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row::new(
            "EXT EXPORT_NAME",
            "closed after EXTENDED_HEADERS",
            no_export_name,
        ),
        Row::new(
            "EXT contexts",
            "need no STRUCTURED_REPLY",
            contexts_without_sr,
        ),
        Row::new(
            "EXT PAYLOAD_LEN",
            "EINVAL where no payload belongs, consumed",
            payload_consumed,
        ),
        Row::new(
            "EXT PAYLOAD_LEN",
            "larger than any maximum: closed",
            endless_payload,
        ),
        Row::new(
            "EXT WRITE without PAYLOAD_LEN",
            "EINVAL and in step, or closed",
            bare_write,
        ),
        Row::new("EXT 64-bit lengths", "out of range", huge_out_of_range),
        Row::new("EXT 64-bit lengths", "READ is refused, in step", huge_read),
        Row::new(
            "EXT 64-bit lengths",
            "zeroes, trim, cache of 5 GiB",
            huge_effects,
        ),
        Row::new("EXT 64-bit lengths", "BLOCK_STATUS of 16 GiB", huge_status),
        Row::new(
            "EXT BLOCK_STATUS payload",
            "only the contexts asked for",
            some_contexts,
        ),
        Row::new(
            "EXT BLOCK_STATUS payload",
            "bad ids and lengths: EINVAL, consumed",
            bad_ids,
        ),
        Row::new(
            "EXT BLOCK_STATUS payload",
            "without contexts: EINVAL, consumed",
            no_contexts,
        ),
        Row::new("EXT FLUSH", "with 64-bit length", huge_flush),
    ]
}

fn no_export_name(target: &Target) {
    let mut raw = RawNbd::greeted(&target.export, 3);
    raw.agree(Mode::Extended);
    raw.send_option(EXPORT_NAME, target.export.export.as_bytes());
    assert!(raw.is_closed());
}

fn contexts_without_sr(target: &Target) {
    let export = &target.export.export;
    let mut raw = RawNbd::greeted(&target.export, 3);
    raw.agree(Mode::Extended);
    assert!(!raw.contexts(LIST_META, export, &[]).is_empty());
    assert_eq!(raw.contexts(SET_META, export, &[BASE]).len(), 1);
    raw.go(export);
    assert_eq!(raw.ask(STATUS, 0, 0, 4096).errno, 0);
    alive(&mut raw);
}

fn payload_consumed(target: &Target) {
    let mut raw = RawNbd::opened(&target.export, Mode::Extended);
    for kind in [READ, FLUSH, TRIM, CACHE, ZEROES, 8, 99] {
        for len_bytes in [1, 512, 70_000, 1 << 20] {
            let payload = vec![0x33; len_bytes];
            let len_bytes = len_bytes as u64;
            let sent = raw.try_send_exactly(kind, PAYLOAD_LEN, SCRATCH, len_bytes, &payload);
            let reply = raw.reply(&sent.unwrap());
            assert_eq!(reply.errno, EINVAL, "command {kind}, {len_bytes} bytes");
            alive(&mut raw);
        }
    }
}

fn endless_payload(target: &Target) {
    for (kind, len_bytes) in [
        (WRITE, 1 << 32),
        (WRITE, 1 << 40),
        (WRITE, u64::MAX),
        (READ, 1 << 40),
        (STATUS, u64::MAX),
        (99, 1 << 63),
    ] {
        let mut raw = RawNbd::opened(&target.export, Mode::Extended);
        let sent = raw.try_send_exactly(kind, PAYLOAD_LEN, 0, len_bytes, b"");
        assert!(
            sent.is_err() || raw.is_closed(),
            "command {kind}, {len_bytes} bytes"
        );
    }
}

/// QEMU 10 forgets the flag and sends the payload: it is carried out or refused, and nothing of it
/// is taken for a request.
fn bare_write(target: &Target) {
    let mut raw = RawNbd::opened(&target.export, Mode::Extended);
    for len_bytes in [512, 70_000] {
        assert_eq!(raw.ask(ZEROES, 0, SCRATCH, 1 << 20).errno, 0);
        let payload = vec![0x77; len_bytes];
        let asked = raw.try_send_exactly(WRITE, 0, SCRATCH, len_bytes as u64, &payload);
        let errno = raw.reply(&asked.unwrap()).errno;
        assert!(errno == 0 || errno == EINVAL, "{errno}");
        let written = if errno == 0 { 0x77 } else { 0 };
        let data = raw.read(SCRATCH, len_bytes as u64);
        assert!(data.iter().all(|byte| *byte == written));
        alive(&mut raw);
    }
}

fn huge_out_of_range(target: &Target) {
    let mut raw = RawNbd::opened_with(&target.export, Mode::Extended, &[BASE]).0;
    for len_bytes in [SIZE + 1, 1 << 32, (1 << 32) + 512, 1 << 63, u64::MAX] {
        for (kind, flags, errno) in [
            (TRIM, 0, EINVAL),
            (CACHE, 0, EINVAL),
            (ZEROES, 0, ENOSPC),
            (ZEROES, NO_HOLE, ENOSPC),
            (ZEROES, FAST_ZERO, ENOSPC),
            (STATUS, 0, EINVAL),
            (STATUS, REQ_ONE, EINVAL),
        ] {
            let reply = raw.ask(kind, flags, 512, len_bytes);
            assert_eq!(
                reply.errno, errno,
                "command {kind}, {len_bytes} bytes: {}",
                reply.text
            );
        }
        alive(&mut raw);
    }
}

fn huge_read(target: &Target) {
    let mut raw = RawNbd::opened(&target.large, Mode::Extended);
    for len_bytes in [
        65 << 20,
        1 << 32,
        (1 << 32) + 512,
        FIVE_GIB,
        LARGE,
        1 << 63,
        u64::MAX,
    ] {
        let errno = raw.ask(READ, 0, 0, len_bytes).errno;
        assert!(
            errno == EINVAL || errno == EOVERFLOW,
            "{len_bytes} bytes: {errno}"
        );
    }
    assert_eq!(raw.read(LARGE - 512, 512), [0; 512]);
}

fn huge_effects(target: &Target) {
    let mut raw = RawNbd::opened(&target.large, Mode::Extended);
    for at in [0, 1 << 32, FIVE_GIB - 4096, FIVE_GIB] {
        assert_eq!(raw.write(0, at, &[4; 4096]), 0);
    }
    assert_eq!(raw.ask(CACHE, 0, 0, FIVE_GIB).errno, 0);
    assert_eq!(raw.ask(ZEROES, 0, 0, FIVE_GIB).errno, 0);
    for at in [0, 1 << 32, FIVE_GIB - 4096] {
        assert_eq!(raw.read(at, 4096), [0; 4096], "at {at}");
    }
    assert_eq!(raw.read(FIVE_GIB, 4096), [4; 4096], "zeroes took too much");
    assert_eq!(raw.ask(TRIM, 0, 4096, FIVE_GIB).errno, 0);
    assert_eq!(raw.ask(TRIM, 0, 0, LARGE).errno, 0);
    assert_eq!(raw.ask(FLUSH, 0, 0, 0).errno, 0);
}

fn huge_status(target: &Target) {
    let mut raw = RawNbd::opened_with(&target.large, Mode::Extended, &[BASE]).0;
    assert_eq!(raw.ask(ZEROES, 0, 0, LARGE).errno, 0);
    assert_eq!(raw.write(0, FIVE_GIB, &[4; 65_536]), 0);
    let (mut at, mut turns, mut data_bytes) = (0, 0, 0);
    while at < LARGE {
        let reply = raw.ask(STATUS, 0, at, LARGE - at);
        assert_eq!(reply.errno, 0, "{}", reply.text);
        for (len, status) in &reply.status[0].1 {
            data_bytes += if *status == 0 { *len } else { 0 };
            at += len;
        }
        turns += 1;
        assert!(turns < 10_000, "at {at}");
    }
    assert_eq!(at, LARGE);
    assert!(
        (65_536..4 << 20).contains(&data_bytes),
        "{data_bytes} bytes of data"
    );
    assert_eq!(raw.ask(ZEROES, 0, FIVE_GIB, 65_536).errno, 0);
}

/// Payload of BLOCK_STATUS: a length of 64 bits, then ids.
fn status_payload(len_bytes: u64, ids: &[u32]) -> Vec<u8> {
    let mut payload = len_bytes.to_be_bytes().to_vec();
    payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
    payload
}

fn status_of(raw: &mut RawNbd, flags: u16, payload: &[u8]) -> crate::nbd_raw::Reply {
    let (flags, len_bytes) = (flags | PAYLOAD_LEN, payload.len() as u64);
    let asked = raw.try_send_exactly(STATUS, flags, SCRATCH, len_bytes, payload);
    raw.reply(&asked.unwrap())
}

fn some_contexts(target: &Target) {
    let mut raw = RawNbd::greeted(&target.export, 3);
    raw.agree(Mode::Extended);
    let names = raw.contexts(LIST_META, &target.export.export, &[]);
    let names: Vec<&str> = names.iter().map(|(_, name)| name.as_str()).collect();
    let (mut raw, ids) = RawNbd::opened_with(&target.export, Mode::Extended, &names);
    for id in &ids {
        for flags in [0, REQ_ONE] {
            let reply = status_of(&mut raw, flags, &status_payload(1 << 20, &[*id]));
            assert_eq!(reply.errno, 0, "{}", reply.text);
            let found: Vec<u32> = reply.status.iter().map(|(id, _)| *id).collect();
            assert_eq!(found, [*id]);
            let total: u64 = reply.status[0].1.iter().map(|(len, _)| len).sum();
            assert!(flags == 0 || total <= 1 << 20);
        }
    }
    let mut found: Vec<u32> = status_of(&mut raw, 0, &status_payload(1 << 20, &ids))
        .status
        .iter()
        .map(|(id, _)| *id)
        .collect();
    let mut ids = ids;
    found.sort_unstable();
    ids.sort_unstable();
    assert_eq!(found, ids);
    alive(&mut raw);
}

fn bad_ids(target: &Target) {
    let (mut raw, ids) = RawNbd::opened_with(&target.export, Mode::Extended, &[BASE]);
    let (id, unknown) = (ids[0], ids[0] ^ 0x5a5a_0000);
    let cases = [
        status_payload(4096, &[unknown]),
        status_payload(4096, &[id, unknown]),
        status_payload(4096, &[id, id]),
        status_payload(SIZE, &[id]),
        status_payload(u64::MAX, &[id]),
        status_payload(4096, &vec![id; 20_000]),
        status_payload(4096, &vec![id; 300_000]),
        [status_payload(4096, &[id]), vec![0]].concat(),
        vec![0; 7],
        vec![0; 1],
    ];
    for payload in cases {
        let reply = status_of(&mut raw, 0, &payload);
        assert_eq!(reply.errno, EINVAL, "a payload of {} bytes", payload.len());
        alive(&mut raw);
    }
}

fn no_contexts(target: &Target) {
    let mut raw = RawNbd::opened(&target.export, Mode::Extended);
    assert_eq!(
        status_of(&mut raw, 0, &status_payload(4096, &[1])).errno,
        EINVAL
    );
    alive(&mut raw);
}

fn huge_flush(target: &Target) {
    let mut raw = RawNbd::opened(&target.export, Mode::Extended);
    let errno = raw.ask(FLUSH, 0, 0, u64::MAX).errno;
    assert!(errno == 0 || errno == EINVAL);
    raw.stream.flush().unwrap();
    alive(&mut raw);
}
