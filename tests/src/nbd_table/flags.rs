//! Transmission flags: what is offered, and that what is offered works.

use super::{PATTERN_AT, Row, SCRATCH, Target, alive};
use crate::nbd_raw::wire::{
    CACHE, DF, EINVAL, ENOTSUP, EPERM, FAST_ZERO, FLUSH, FUA, INFO, NO_HOLE, READ, STATUS, TRIM,
    ZEROES,
};
use crate::nbd_raw::{Endpoint, Mode, RawNbd};

const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 1 << 1;
const SEND_FLUSH: u16 = 1 << 2;
const SEND_FUA: u16 = 1 << 3;
const ROTATIONAL: u16 = 1 << 4;
const SEND_TRIM: u16 = 1 << 5;
const SEND_ZEROES: u16 = 1 << 6;
const SEND_DF: u16 = 1 << 7;
const MULTI_CONN: u16 = 1 << 8;
const RESIZE: u16 = 1 << 9;
const SEND_CACHE: u16 = 1 << 10;
const SEND_FAST_ZERO: u16 = 1 << 11;
const STATUS_PAYLOAD: u16 = 1 << 12;

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row::new(
            "A.2 transmission flags",
            "of a writable export",
            writable_flags,
        ),
        Row::new(
            "A.2 READ_ONLY",
            "flags of a read-only export",
            read_only_flags,
        ),
        Row::new(
            "A.2 READ_ONLY",
            "EPERM for what writes, the rest works",
            read_only,
        ),
        Row::new("A.2 SEND_FUA", "accepted on every command", fua_everywhere),
        Row::new("A.2 SEND_TRIM", "succeeds, neighbours stay", trim),
        Row::new(
            "A.2 SEND_WRITE_ZEROES",
            "reads back zero, with NO_HOLE, too",
            zeroes,
        ),
        Row::new("A.2 SEND_DF", "one chunk of 64 KiB over data and holes", df),
        Row::new(
            "A.2 SEND_DF",
            "EINVAL when it was not offered",
            df_unoffered,
        ),
        Row::new(
            "A.2 CAN_MULTI_CONN",
            "one connection sees and flushes another's",
            multi_conn,
        ),
        Row::new("A.2 SEND_CACHE", "succeeds, unknown flags do not", cache),
        Row::new(
            "A.2 SEND_FAST_ZERO",
            "zeroes or ENOTSUP, never slow data",
            fast_zero,
        ),
        Row::new(
            "A.2 BLOCK_STATUS_PAYLOAD",
            "only with extended headers",
            status_payload,
        ),
    ]
}

/// What is said with GO in a mode.
fn flags_of(endpoint: &Endpoint, mode: Mode) -> u16 {
    let mut raw = RawNbd::greeted(endpoint, 3);
    raw.agree(mode);
    raw.facts(INFO, &endpoint.export, &[]).flags
}

fn writable_flags(target: &Target) {
    for mode in Mode::ALL {
        let flags = flags_of(&target.export, mode);
        let always = HAS_FLAGS | SEND_FLUSH | SEND_FUA | SEND_TRIM | SEND_ZEROES;
        let wanted = always | MULTI_CONN | SEND_CACHE | SEND_FAST_ZERO;
        assert_eq!(flags & wanted, wanted, "{mode:?}: {flags:#b}");
        assert_eq!(
            flags & (READ_ONLY | RESIZE | ROTATIONAL),
            0,
            "{mode:?}: {flags:#b}"
        );
        assert_eq!(
            flags & SEND_DF != 0,
            mode != Mode::Simple,
            "{mode:?}: {flags:#b}"
        );
        assert_eq!(flags >> 13, 0, "flags that do not exist: {flags:#b}");
    }
}

fn read_only_flags(target: &Target) {
    let flags = flags_of(&target.read_only, Mode::Structured);
    let wanted = HAS_FLAGS | READ_ONLY | MULTI_CONN | SEND_DF;
    assert_eq!(flags & wanted, wanted, "{flags:#b}");
    assert!(flags & SEND_FAST_ZERO == 0 || flags & SEND_ZEROES != 0);
}

fn read_only(target: &Target) {
    for mode in Mode::ALL {
        let mut raw = RawNbd::opened(&target.read_only, mode);
        for len_bytes in [1, 512, 70_000, 1 << 20] {
            assert_eq!(raw.write(0, 0, &vec![1; len_bytes]), EPERM, "{mode:?}");
        }
        for kind in [TRIM, ZEROES] {
            for flags in [0, FUA] {
                assert_eq!(
                    raw.ask(kind, flags, 0, 4096).errno,
                    EPERM,
                    "{mode:?} {kind}"
                );
            }
        }
        assert_eq!(raw.read(0, 4096), vec![0; 4096]);
        assert_eq!(raw.ask(FLUSH, 0, 0, 0).errno, 0);
        assert_eq!(raw.ask(CACHE, 0, 0, 4096).errno, 0);
    }
}

fn fua_everywhere(target: &Target) {
    for mode in Mode::ALL {
        let mut raw = RawNbd::opened(&target.export, mode);
        assert_eq!(raw.write(FUA, SCRATCH, &[3; 4096]), 0);
        assert_eq!(raw.ask(READ, FUA, SCRATCH, 4096).data, [3; 4096]);
        for (kind, len_bytes) in [(FLUSH, 0), (CACHE, 4096), (TRIM, 4096), (ZEROES, 4096)] {
            let errno = raw.ask(
                kind,
                FUA,
                if len_bytes > 0 { SCRATCH } else { 0 },
                len_bytes,
            );
            assert_eq!(errno.errno, 0, "{mode:?}: command {kind}");
        }
        assert_eq!(raw.ask(ZEROES, FUA | NO_HOLE, SCRATCH, 4096).errno, 0);
        assert_eq!(raw.read(SCRATCH, 4096), [0; 4096]);
    }
    let mut raw = RawNbd::opened_with(&target.export, Mode::Structured, &["base:allocation"]).0;
    assert_eq!(raw.ask(STATUS, FUA, 0, 4096).errno, 0);
}

fn trim(target: &Target) {
    let mut raw = RawNbd::opened(&target.export, Mode::Simple);
    for (start, len_bytes) in [(0, 8192), (1, 8190), (4096, 4096), (4097, 3), (100, 1)] {
        assert_eq!(raw.write(0, SCRATCH, &[9; 8192]), 0);
        assert_eq!(raw.ask(TRIM, 0, SCRATCH + start, len_bytes).errno, 0);
        let data = raw.read(SCRATCH, 8192);
        let (start, end) = (start as usize, (start + len_bytes) as usize);
        let kept = data[..start].iter().chain(&data[end..]);
        assert!(kept.copied().all(|byte| byte == 9), "TRIM took too much");
    }
}

fn zeroes(target: &Target) {
    for mode in Mode::ALL {
        let mut raw = RawNbd::opened(&target.export, mode);
        for flags in [0, NO_HOLE, FUA, NO_HOLE | FUA] {
            for (start, len_bytes) in [(0, 200_000), (1, 199_998), (4095, 4098), (65_535, 2)] {
                assert_eq!(raw.write(0, SCRATCH, &vec![9; 200_000]), 0);
                assert_eq!(raw.ask(ZEROES, flags, SCRATCH + start, len_bytes).errno, 0);
                let (start, end) = (start as usize, (start + len_bytes) as usize);
                let data = raw.read(SCRATCH, 200_000);
                assert!(data[start..end].iter().all(|byte| *byte == 0));
                let kept = data[..start].iter().chain(&data[end..]);
                assert!(kept.copied().all(|byte| byte == 9), "zeroes took too much");
            }
        }
        alive(&mut raw);
    }
}

fn df(target: &Target) {
    for mode in [Mode::Structured, Mode::Extended] {
        let mut raw = RawNbd::opened(&target.export, mode);
        assert_eq!(raw.ask(ZEROES, 0, SCRATCH, 1 << 20).errno, 0);
        for at in (0..1 << 20).step_by(96 << 10) {
            assert_eq!(raw.write(0, SCRATCH + at, &[5; 4096]), 0);
        }
        let (whole, base) = (raw.read(SCRATCH, 1 << 20), SCRATCH);
        for (at, len_bytes) in [
            (0, 65_536),
            (4096, 65_536),
            (50_000, 65_000),
            (90 << 10, 65_536),
        ] {
            let reply = raw.ask(READ, DF, base + at, len_bytes);
            assert_eq!((reply.errno, reply.content.len()), (0, 1), "{}", reply.text);
            assert!(reply.data == whole[at as usize..(at + len_bytes) as usize]);
        }
        // More than 64 KiB in one chunk is not promised.
        let reply = raw.ask(READ, DF, SCRATCH, 1 << 20);
        assert!(reply.errno == 0 || reply.errno == crate::nbd_raw::wire::EOVERFLOW);
        alive(&mut raw);
    }
}

fn df_unoffered(target: &Target) {
    let mut raw = RawNbd::opened(&target.export, Mode::Simple);
    assert_eq!(raw.ask(READ, DF, PATTERN_AT, 512).errno, EINVAL);
    alive(&mut raw);
}

fn multi_conn(target: &Target) {
    let mut writers: Vec<RawNbd> = (0..4)
        .map(|_| RawNbd::opened(&target.export, Mode::Simple))
        .collect();
    let mut judge = RawNbd::opened(&target.export, Mode::Structured);
    for (round, writer) in writers.iter_mut().enumerate() {
        let data = vec![round as u8 + 1; 4096];
        assert_eq!(writer.write(0, SCRATCH, &data), 0);
        assert_eq!(judge.ask(FLUSH, 0, 0, 0).errno, 0);
        assert_eq!(judge.read(SCRATCH, 4096), data);
    }
}

fn cache(target: &Target) {
    let mut raw = RawNbd::opened(&target.export, Mode::Structured);
    assert_eq!(raw.ask(CACHE, 0, PATTERN_AT, 4096).errno, 0);
    assert_eq!(raw.ask(CACHE, 0, 0, super::SIZE).errno, 0);
    for flags in [NO_HOLE, DF, FAST_ZERO, 1 << 14] {
        assert_eq!(raw.ask(CACHE, flags, 0, 4096).errno, EINVAL, "{flags:#x}");
    }
    alive(&mut raw);
}

fn fast_zero(target: &Target) {
    for mode in Mode::ALL {
        let is_offered = flags_of(&target.export, mode) & SEND_FAST_ZERO != 0;
        let mut raw = RawNbd::opened(&target.export, mode);
        assert_eq!(raw.write(0, SCRATCH, &[8; 65_536]), 0);
        for flags in [FAST_ZERO, FAST_ZERO | NO_HOLE, FAST_ZERO | FUA] {
            let errno = raw.ask(ZEROES, flags, SCRATCH, 65_536).errno;
            match is_offered {
                true => assert!(errno == 0 || errno == ENOTSUP, "{mode:?}: {errno}"),
                false => assert_eq!(errno, EINVAL, "{mode:?}"),
            }
            let kept = if errno == 0 { 0 } else { 8 };
            assert!(raw.read(SCRATCH, 65_536).iter().all(|byte| *byte == kept));
            assert_eq!(raw.write(0, SCRATCH, &[8; 65_536]), 0);
        }
        alive(&mut raw);
    }
}

fn status_payload(target: &Target) {
    for mode in [Mode::Simple, Mode::Structured] {
        assert_eq!(
            flags_of(&target.export, mode) & STATUS_PAYLOAD,
            0,
            "{mode:?}"
        );
    }
    let mut raw = RawNbd::greeted(&target.export, 3);
    raw.agree(Mode::Extended);
    let export = &target.export.export;
    raw.contexts(crate::nbd_raw::wire::SET_META, export, &["base:allocation"]);
    let flags = raw.go(export).flags;
    assert_ne!(flags & STATUS_PAYLOAD, 0, "{flags:#b}");
}
