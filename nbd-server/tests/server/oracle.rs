//! Edge semantics over a raw socket: the "recommended" column of the table of edge cases, one row after the other.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::support::TestServer;

const SIZE: u64 = 128 << 20;
const UNSUP: u32 = 0x8000_0001;
const INVALID: u32 = 0x8000_0003;
const UNKNOWN: u32 = 0x8000_0006;
const ACK: u32 = 1;
const EPERM_FREE: u32 = 0;
const EINVAL: u32 = 22;
const ENOSPC: u32 = 28;

fn server() -> TestServer {
    TestServer::memory("128MiB", &["--name", "vol1"])
}

/// A client that says anything.
struct Raw(UnixStream);

impl Raw {
    fn greeted(server: &TestServer, flags: u32) -> Self {
        let stream = UnixStream::connect(server.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        let mut raw = Self(stream);
        assert_eq!(raw.take(18), b"NBDMAGICIHAVEOPT\0\x03");
        raw.0.write_all(&flags.to_be_bytes()).unwrap();
        raw
    }

    fn opened(server: &TestServer, structured: bool) -> Self {
        let mut raw = Self::greeted(server, 3);
        if structured {
            assert_eq!(raw.option(8, b""), ACK);
        }
        assert_eq!(raw.option(7, &go(b"vol1", &[])), ACK);
        raw
    }

    fn take(&mut self, len_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn is_closed(&mut self) -> bool {
        // Closing with unread bytes shows as a reset.
        matches!(self.0.read(&mut [0]), Ok(0))
            || self.0.take_error().is_ok_and(|error| error.is_some())
    }

    fn send_option(&mut self, option: u32, data: &[u8]) {
        let head = [
            b"IHAVEOPT",
            &option.to_be_bytes()[..],
            &(data.len() as u32).to_be_bytes(),
        ]
        .concat();
        self.0.write_all(&[&head, data].concat()).unwrap();
    }

    /// Type and payload of the next option reply.
    fn option_reply(&mut self, option: u32) -> (u32, Vec<u8>) {
        let head = self.take(20);
        assert_eq!(head[..8], 0x0003_e889_0455_65a9u64.to_be_bytes());
        assert_eq!(head[8..12], option.to_be_bytes());
        let len_bytes = u32::from_be_bytes(head[16..].try_into().unwrap());
        (
            u32::from_be_bytes(head[12..16].try_into().unwrap()),
            self.take(len_bytes as usize),
        )
    }

    /// Sends an option; the last reply to it, and those before.
    fn option_replies(&mut self, option: u32, data: &[u8]) -> (u32, Vec<Vec<u8>>) {
        self.send_option(option, data);
        let mut before = Vec::new();
        loop {
            match self.option_reply(option) {
                (kind, _) if kind == ACK || kind >= 1 << 31 => return (kind, before),
                (_, payload) => before.push(payload),
            }
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> u32 {
        self.option_replies(option, data).0
    }

    fn send(&mut self, kind: u16, flags: u16, offset: u64, len_bytes: u32, payload: &[u8]) {
        let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(b"cookie!!");
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&len_bytes.to_be_bytes());
        bytes.extend_from_slice(payload);
        self.0.write_all(&bytes).unwrap();
    }

    /// Error number of the next simple reply.
    fn simple(&mut self) -> u32 {
        let head = self.take(16);
        assert_eq!(head[..4], 0x6744_6698u32.to_be_bytes());
        assert_eq!(&head[8..], b"cookie!!");
        u32::from_be_bytes(head[4..8].try_into().unwrap())
    }

    fn simple_of(
        &mut self,
        kind: u16,
        flags: u16,
        offset: u64,
        len_bytes: u32,
        payload: &[u8],
    ) -> u32 {
        self.send(kind, flags, offset, len_bytes, payload);
        self.simple()
    }

    fn assert_alive(&mut self) {
        self.send(0, 0, 0, 1, b"");
        assert_eq!(self.simple(), 0);
        self.take(1);
    }
}

fn go(name: &[u8], items: &[u16]) -> Vec<u8> {
    let items: Vec<u8> = items.iter().flat_map(|item| item.to_be_bytes()).collect();
    [
        &(name.len() as u32).to_be_bytes(),
        name,
        &((items.len() / 2) as u16).to_be_bytes(),
        &items,
    ]
    .concat()
}

fn meta(name: &[u8], queries: &[&[u8]]) -> Vec<u8> {
    let mut data = [
        &(name.len() as u32).to_be_bytes(),
        name,
        &(queries.len() as u32).to_be_bytes(),
    ]
    .concat();
    queries
        .iter()
        .for_each(|query| data.extend([&(query.len() as u32).to_be_bytes(), *query].concat()));
    data
}

#[test]
fn options_are_refused_in_step() {
    let server = server();
    let mut raw = Raw::greeted(&server, 3);
    let junk = vec![0x41; 1 << 20];
    let rows: Vec<(&str, u32, Vec<u8>, u32)> = vec![
        ("unknown, 4 bytes", 77, b"abcd".to_vec(), UNSUP),
        ("unknown, 100 KB", 77, junk[..100_000].to_vec(), UNSUP),
        ("unknown, 1 MiB", 77, junk, UNSUP),
        ("STARTTLS", 5, vec![], UNSUP),
        ("EXTENDED_HEADERS with data", 11, b"x".to_vec(), INVALID),
        ("PEEK", 4, vec![], UNSUP),
        ("LIST with data", 3, b"x".to_vec(), INVALID),
        ("STRUCTURED_REPLY with data", 8, b"x".to_vec(), INVALID),
        (
            "SET_META without STRUCTURED_REPLY",
            10,
            meta(b"vol1", &[b"base:allocation"]),
            INVALID,
        ),
        ("STRUCTURED_REPLY", 8, vec![], ACK),
        ("STRUCTURED_REPLY again", 8, vec![], ACK),
        ("GO, empty", 7, vec![], INVALID),
        (
            "GO, name length too large",
            7,
            b"\0\0\xff\xffvol1\0\0".to_vec(),
            INVALID,
        ),
        (
            "GO, name length 2^32-1",
            7,
            b"\xff\xff\xff\xffvol1\0\0".to_vec(),
            INVALID,
        ),
        (
            "GO, too many items",
            7,
            b"\0\0\0\x04vol1\0\x09\0\x03".to_vec(),
            INVALID,
        ),
        (
            "GO, trailing junk",
            7,
            [go(b"vol1", &[]), b"junk".to_vec()].concat(),
            INVALID,
        ),
        ("INFO, empty", 6, vec![], INVALID),
        ("INFO, unknown name", 6, go(b"other", &[]), UNKNOWN),
        ("GO, name of 4096", 7, go(&[b'n'; 4096], &[]), UNKNOWN),
        ("GO, name of 4097", 7, go(&[b'n'; 4097], &[]), INVALID),
        ("GO, NUL in name", 7, go(b"vol\0", &[]), INVALID),
        ("GO, name not UTF-8", 7, go(b"vol\xff", &[]), INVALID),
        ("SET_META, no colon", 10, meta(b"vol1", &[b"base"]), ACK),
        (
            "SET_META, query cut",
            10,
            b"\0\0\0\x04vol1\0\0\0\x01\0\0\0\x10base".to_vec(),
            INVALID,
        ),
        (
            "SET_META, 2^32-1 queries",
            10,
            b"\0\0\0\x04vol1\xff\xff\xff\xff".to_vec(),
            INVALID,
        ),
        ("LIST", 3, vec![], ACK),
    ];
    for (what, option, data, expected) in rows {
        assert_eq!(raw.option(option, &data), expected, "{what}");
    }
    assert_eq!(raw.option(7, &go(b"vol1", &[])), ACK);
    raw.send(3, 0, 0, 0, b"");
    assert_eq!(raw.simple(), 0);
}

#[test]
fn info_and_go_say_the_same() {
    let server = server();
    let mut raw = Raw::greeted(&server, 3);
    let (info, first) = raw.option_replies(6, &go(b"vol1", &[1, 2, 3, 99]));
    let (open, second) = raw.option_replies(7, &go(b"vol1", &[1, 2, 3, 99]));
    assert_eq!((info, open), (ACK, ACK));
    assert_eq!(first, second);
    assert_eq!(first[0][..10], [&[0, 0][..], &SIZE.to_be_bytes()].concat());
    assert_eq!(first.len(), 4, "EXPORT, NAME, DESCRIPTION, BLOCK_SIZE");
}

#[test]
fn contexts_are_listed_selected_and_replaced() {
    let server = server();
    let mut raw = Raw::greeted(&server, 3);
    raw.option(8, b"");
    for (queries, found) in [
        (&[][..], 1),
        (&[&b"base:"[..]][..], 1),
        (&[&b"qemu:"[..]][..], 0),
        (&[&b"base:allocation"[..]][..], 1),
    ] {
        let (end, contexts) = raw.option_replies(9, &meta(b"vol1", queries));
        assert_eq!((end, contexts.len()), (ACK, found), "{queries:?}");
    }
    assert_eq!(
        raw.option_replies(10, &meta(b"vol1", &[b"base:allocation"]))
            .1,
        [b"\0\0\0\x01base:allocation".to_vec()]
    );
    assert_eq!(
        raw.option_replies(10, &meta(b"vol1", &[b"base:"])).1.len(),
        0,
        "`base:` selects nothing and replaces what was selected"
    );
    assert_eq!(raw.option(7, &go(b"vol1", &[])), ACK);
    raw.send(7, 0, 0, 4096, b"");
    assert_eq!(
        raw.take(20)[6..8],
        [0x80, 0x01],
        "BLOCK_STATUS without a selected context must be an error chunk"
    );
}

#[test]
fn broken_handshakes_are_closed() {
    let server = server();
    assert!(
        Raw::greeted(&server, 1 << 7).is_closed(),
        "client flag bit 7"
    );
    let mut raw = Raw::greeted(&server, 0);
    raw.send_option(3, b"");
    assert!(raw.is_closed(), "LIST without fixed newstyle");
    let mut raw = Raw::greeted(&server, 3);
    raw.0.write_all(b"IHAVENOT\0\0\0\x03\0\0\0\0").unwrap();
    assert!(raw.is_closed(), "bad option magic");
    let mut raw = Raw::greeted(&server, 3);
    raw.0
        .write_all(b"IHAVEOPT\0\0\0\x4d\xff\xff\xff\xff")
        .unwrap();
    assert!(raw.is_closed(), "option of 2^32-1 bytes");
    let mut raw = Raw::greeted(&server, 3);
    raw.send_option(1, b"other");
    assert!(raw.is_closed(), "EXPORT_NAME of an unknown name");
    let mut raw = Raw::greeted(&server, 3);
    assert_eq!(raw.option(2, b"ignored"), ACK);
    assert!(raw.is_closed(), "ABORT");
}

#[test]
fn export_name_with_and_without_padding() {
    let server = server();
    for (flags, padding) in [(0, 124), (1, 124), (3, 0)] {
        let mut raw = Raw::greeted(&server, flags);
        raw.send_option(1, b"vol1");
        assert_eq!(raw.take(10)[..8], SIZE.to_be_bytes());
        assert_eq!(raw.take(padding), vec![0; padding]);
        raw.assert_alive();
    }
}

#[test]
fn requests_get_the_recommended_answer_and_the_connection_lives() {
    let server = server();
    let mut raw = Raw::opened(&server, false);
    let wrap = u64::MAX - 511;
    let (read, write, flush, trim, cache, zero, status) = (0, 1, 3, 4, 5, 6, 7);
    let rows: [(&str, u16, u16, u64, u32, u32); 44] = [
        ("read of nothing", read, 0, 0, 0, 0),
        ("write of nothing", write, 0, 0, 0, 0),
        ("trim of nothing", trim, 0, 0, 0, 0),
        ("zeroes of nothing", zero, 0, 0, 0, 0),
        ("read past the end", read, 0, SIZE - 1, 512, EINVAL),
        ("read at the end", read, 0, SIZE, 512, EINVAL),
        ("read at 2^63", read, 0, 1 << 63, 512, EINVAL),
        ("read that wraps", read, 0, wrap, 512, EINVAL),
        ("read of 65 MiB", read, 0, 0, 65 << 20, EINVAL),
        ("read of 2^32-1", read, 0, 0, u32::MAX, EINVAL),
        ("write past the end", write, 0, SIZE - 1, 512, ENOSPC),
        ("write at the end", write, 0, SIZE, 512, ENOSPC),
        ("write at 2^63", write, 0, 1 << 63, 512, ENOSPC),
        ("write that wraps", write, 0, wrap, 512, ENOSPC),
        (
            "large write past the end",
            write,
            0,
            SIZE - 1,
            1 << 20,
            ENOSPC,
        ),
        ("write of 65 MiB", write, 0, 0, 65 << 20, EINVAL),
        ("zeroes past the end", zero, 0, SIZE - 1, 512, ENOSPC),
        ("zeroes that wrap", zero, 0, wrap, 512, ENOSPC),
        ("zeroes of 2^32-1", zero, 0, 0, u32::MAX, ENOSPC),
        ("trim past the end", trim, 0, SIZE - 1, 512, EINVAL),
        ("trim that wraps", trim, 0, wrap, 512, EINVAL),
        ("trim of 2^32-1", trim, 0, 0, u32::MAX, EINVAL),
        ("cache past the end", cache, 0, SIZE, 512, EINVAL),
        ("cache", cache, 0, 0, 4096, 0),
        ("flush with offset and length", flush, 0, 4096, 4096, 0),
        ("flush with FUA", flush, 1, 0, 0, 0),
        ("trim with FUA", trim, 1, 0, 4096, 0),
        ("write with FUA", write, 1, 0, 4096, 0),
        ("zeroes with FUA", zero, 1, 0, 4096, 0),
        ("zeroes with NO_HOLE", zero, 2, 0, 4096, 0),
        ("zeroes with FAST_ZERO", zero, 16, 0, 4096, 0),
        ("trim of 48 MiB", trim, 0, 0, 48 << 20, 0),
        ("zeroes of 48 MiB", zero, 0, 0, 48 << 20, 0),
        ("read with DF but without chunks", read, 4, 0, 512, EINVAL),
        ("read with an unknown flag", read, 1 << 14, 0, 512, EINVAL),
        (
            "write with an unknown flag",
            write,
            1 << 14,
            0,
            70_000,
            EINVAL,
        ),
        ("write with NO_HOLE", write, 2, 0, 512, EINVAL),
        ("block status without context", status, 0, 0, 512, EINVAL),
        ("RESIZE", 8, 0, 4096, 0, EINVAL),
        ("unknown request", 99, 0, 0, 512, EINVAL),
        ("write with FAST_ZERO", write, 16, 0, 512, EINVAL),
        ("unknown request 65535", u16::MAX, 0, 0, 0, EINVAL),
        ("write of 33 MiB", write, 0, 0, 33 << 20, 0),
        ("write of 1 byte", write, 0, 4097, 1, EPERM_FREE),
    ];
    for (what, kind, flags, offset, len_bytes, expected) in rows {
        let payload = vec![0x11; if kind == write { len_bytes as usize } else { 0 }];
        assert_eq!(
            raw.simple_of(kind, flags, offset, len_bytes, &payload),
            expected,
            "{what}"
        );
    }
    raw.assert_alive();
}

#[test]
fn reads_of_any_size_are_exact_in_both_reply_forms() {
    let server = server();
    let mut raw = Raw::opened(&server, false);
    assert_eq!(raw.simple_of(1, 0, 65_530, 12, b"0123456789ab"), 0);
    for (offset, len_bytes, flags) in [
        (65_530, 12, 0),
        (65_533, 1, 0),
        (65_530, 12, 1),
        (0, 33 << 20, 0),
    ] {
        raw.send(0, flags, offset, len_bytes, b"");
        assert_eq!(raw.simple(), 0);
        let data = raw.take(len_bytes as usize);
        let at = 65_530usize.saturating_sub(offset as usize);
        let from = (offset as usize).saturating_sub(65_530);
        let expected = &b"0123456789ab"[from..12.min(from + len_bytes as usize)];
        assert_eq!(&data[at..at + expected.len()], expected);
        assert_eq!(
            data.iter().filter(|byte| **byte != 0).count(),
            expected.len()
        );
    }
    let mut raw = Raw::opened(&server, true);
    raw.send(0, 0, SIZE, 512, b"");
    let head = raw.take(20);
    assert_eq!(
        head[..8],
        *b"\x66\x8e\x33\xef\0\x01\x80\x02",
        "an error after STRUCTURED_REPLY must be a chunk"
    );
    let text = raw.take(u32::from_be_bytes(head[16..].try_into().unwrap()) as usize);
    assert!(
        text[..4] == EINVAL.to_be_bytes()
            && String::from_utf8_lossy(&text[6..]).contains("past the end")
    );
    raw.send(0, 0, 0, 0, b"");
    assert_eq!(raw.take(20)[..8], *b"\x66\x8e\x33\xef\0\x01\0\0");
}

#[test]
fn broken_requests_are_closed() {
    let server = server();
    let mut raw = Raw::opened(&server, false);
    raw.0.write_all(&[0; 28]).unwrap();
    assert!(raw.is_closed(), "bad request magic");
    let mut raw = Raw::opened(&server, false);
    raw.send(1, 0, 0, u32::MAX, b"");
    assert!(raw.is_closed(), "write of 2^32-1 bytes");
}

#[test]
fn goodbye_is_answered_after_everything_before_it() {
    let server = server();
    let mut raw = Raw::opened(&server, false);
    for index in 0..8u8 {
        raw.send(1, 0, u64::from(index) * 4096, 4096, &[index + 1; 4096]);
    }
    raw.send(2, 0, 0, 0, b"");
    for _ in 0..8 {
        assert_eq!(raw.simple(), 0);
    }
    assert!(raw.is_closed());
    let mut raw = Raw::opened(&server, false);
    raw.send(0, 0, 0, 8 * 4096, b"");
    assert_eq!(raw.simple(), 0);
    let data = raw.take(8 * 4096);
    assert!((0..8).all(|index| {
        data[index * 4096..][..4096]
            .iter()
            .all(|byte| usize::from(*byte) == index + 1)
    }));
}

#[test]
fn half_a_payload_is_never_applied() {
    let server = server();
    for len_bytes in [4096u32, 1 << 20] {
        let mut raw = Raw::opened(&server, false);
        assert_eq!(
            raw.simple_of(1, 0, 0, len_bytes, &vec![1; len_bytes as usize]),
            0
        );
        raw.send(1, 0, 0, len_bytes, &vec![2; len_bytes as usize - 1]);
        drop(raw);
        let mut raw = Raw::opened(&server, false);
        raw.send(0, 0, 0, len_bytes, b"");
        assert_eq!(raw.simple(), 0);
        assert!(raw.take(len_bytes as usize).iter().all(|byte| *byte == 1));
    }
}

#[test]
fn idle_handshakes_do_not_stop_others_and_end_at_their_deadline() {
    let server = server();
    let mut idle: Vec<Raw> = (0..200).map(|_| Raw::greeted(&server, 3)).collect();
    Raw::opened(&server, false).assert_alive();
    idle[0]
        .0
        .set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    assert!(idle[0].is_closed());
    Raw::opened(&server, false).assert_alive();
}

#[test]
fn announced_payloads_that_never_come_cost_no_memory() {
    let server = server();
    let before_kib = server.resident_kib().0;
    let mut stalled: Vec<Raw> = (0..50).map(|_| Raw::opened(&server, false)).collect();
    for raw in &mut stalled {
        raw.send(1, 0, 0, 64 << 20, &[1; 1000]);
    }
    let mut readers: Vec<Raw> = (0..20).map(|_| Raw::opened(&server, false)).collect();
    for raw in &mut readers {
        (0..400).for_each(|_| raw.send(3, 0, 0, 0, b""));
    }
    for raw in &mut readers {
        (0..400).for_each(|_| assert_eq!(raw.simple(), 0));
    }
    let after_kib = server.resident_kib().1;
    assert!(
        after_kib - before_kib < 64 << 10,
        "from {before_kib} to {after_kib} KiB"
    );
}
