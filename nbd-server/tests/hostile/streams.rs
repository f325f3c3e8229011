//! Streams of clients: valid ones, damaged ones, and noise, at once and in pieces.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index;

use crate::fuzz::referee::{Mode, judge};
use crate::fuzz::session::{NAME, SIZE, run};

/// An option on the wire.
pub(crate) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let len_bytes = data.len() as u32;
    let head = [number.to_be_bytes(), len_bytes.to_be_bytes()].concat();
    [b"IHAVEOPT", &head[..], data].concat()
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat()
}

fn info(name: &str, items: &[u16]) -> Vec<u8> {
    let items_bytes = items.iter().flat_map(|item| item.to_be_bytes());
    let count = (items.len() as u16).to_be_bytes();
    string(name)
        .into_iter()
        .chain(count)
        .chain(items_bytes)
        .collect()
}

fn meta(name: &str, queries: &[String]) -> Vec<u8> {
    let count = (queries.len() as u32).to_be_bytes();
    let queries = queries.iter().flat_map(|query| string(query));
    string(name)
        .into_iter()
        .chain(count)
        .chain(queries)
        .collect()
}

/// From the client's flags to GO, in a mode.
pub(crate) fn opening(mode: Mode) -> Vec<u8> {
    let agree = match mode {
        Mode::Simple => vec![],
        Mode::Structured => option(8, b""),
        Mode::Extended => option(11, b""),
    };
    let contexts = ["base:allocation", "qemu:dirty-bitmap:b"].map(str::to_owned);
    let contexts = match mode {
        Mode::Simple => vec![],
        _ => option(10, &meta(NAME, &contexts)),
    };
    let go = option(7, &info(NAME, &[]));
    [&b"\0\0\0\x03"[..], &agree, &contexts, &go].concat()
}

/// A request on the wire.
pub(crate) fn request(
    mode: Mode,
    (kind, flags): (u16, u16),
    cookie: u64,
    offset: u64,
    len_or_data: Result<u64, &[u8]>,
) -> Vec<u8> {
    let is_extended = mode == Mode::Extended;
    let magic: u32 = if is_extended {
        0x21e4_1c71
    } else {
        0x2560_9513
    };
    let payload_len = if is_extended && len_or_data.is_err() {
        32
    } else {
        0
    };
    let len_bytes = len_or_data.unwrap_or_else(|data| data.len() as u64);
    let len = match is_extended {
        true => len_bytes.to_be_bytes().to_vec(),
        false => (len_bytes as u32).to_be_bytes().to_vec(),
    };
    let numbers = [cookie.to_be_bytes(), offset.to_be_bytes()].concat();
    let head = [(flags | payload_len).to_be_bytes(), kind.to_be_bytes()].concat();
    let data = len_or_data.err().unwrap_or_default();
    [&magic.to_be_bytes()[..], &head, &numbers, &len, data].concat()
}

pub(crate) fn modes() -> impl Strategy<Value = Mode> {
    prop_oneof![
        Just(Mode::Simple),
        Just(Mode::Structured),
        Just(Mode::Extended)
    ]
}

fn names() -> impl Strategy<Value = String> {
    prop_oneof![3 => Just(NAME.to_owned()), 1 => "[a-z\\PC]{0,9}"]
}

fn queries() -> impl Strategy<Value = Vec<String>> {
    let known = prop_oneof![
        Just("base:".to_owned()),
        Just("base:allocation".to_owned()),
        Just("qemu:".to_owned()),
        Just("qemu:dirty-bitmap:b".to_owned()),
        "[a-z]{0,5}:?[a-z]{0,5}",
    ];
    vec(known, 0..5)
}

/// Options that a client may send before GO; those that change the mode are not among them.
fn options() -> impl Strategy<Value = Vec<u8>> {
    let one = prop_oneof![
        Just(option(3, b"")),
        (names(), vec(0u16..6, 0..5)).prop_map(|(name, items)| option(6, &info(&name, &items))),
        (names(), queries()).prop_map(|(name, queries)| option(9, &meta(&name, &queries))),
        (names(), queries()).prop_map(|(name, queries)| option(10, &meta(&name, &queries))),
        (12u32.., vec(any::<u8>(), 0..300)).prop_map(|(number, data)| option(number, &data)),
        (3u32..11, vec(any::<u8>(), 1..40)).prop_map(|(number, data)| option(number, &data)),
        Just(option(5, b"")),
    ];
    vec(one, 0..6).prop_map(|all| all.concat())
}

fn offsets() -> impl Strategy<Value = u64> {
    prop_oneof![6 => 0..SIZE, 1 => SIZE - 2..SIZE + 2, 1 => any::<u64>()]
}

/// Requests, right and wrong ones, that leave the stream in step.
fn requests(mode: Mode) -> impl Strategy<Value = Vec<u8>> {
    let flags =
        prop_oneof![3 => Just(0u16), 1 => 0u16..32, 1 => any::<u16>().prop_map(|f| f & !32)];
    let kinds = prop_oneof![8 => 0u16..8, 1 => any::<u16>()];
    let lens = prop_oneof![4 => 0usize..5000, 1 => 60_000usize..140_000];
    let one = (kinds, flags, any::<u64>(), offsets(), lens, any::<bool>());
    let one = one.prop_map(move |(kind, flags, cookie, offset, len, payload)| {
        let data = vec![cookie as u8 | 1; len];
        let has_payload = kind == 1 || mode == Mode::Extended && payload && len > 0;
        let body = if has_payload {
            Err(&data[..])
        } else {
            Ok(len as u64)
        };
        // A goodbye in the middle would end most streams early.
        let kind = if kind == 2 { 3 } else { kind };
        request(mode, (kind, flags), cookie, offset, body)
    });
    vec(one, 0..25).prop_map(|all| all.concat())
}

/// A client from its flags to its goodbye.
fn sessions() -> impl Strategy<Value = Vec<u8>> {
    let parts = modes().prop_flat_map(|mode| (Just(mode), options(), requests(mode)));
    parts.prop_map(|(mode, options, requests)| {
        let opening = opening(mode);
        let (flags, opening) = opening.split_at(4);
        let goodbye = request(mode, (2, 0), 0, 0, Ok(0));
        [flags, &options, opening, &requests, &goodbye].concat()
    })
}

fn pieces() -> impl Strategy<Value = Vec<usize>> {
    vec(prop_oneof![2 => 1usize..40, 1 => 1usize..9000], 1..6)
}

/// Changes of single bytes.
fn damage() -> impl Strategy<Value = Vec<(Index, u8)>> {
    vec((any::<Index>(), any::<u8>()), 1..6)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn valid_sessions_are_answered_whatever_the_pieces(sent in sessions(), pieces in pieces()) {
        let whole = run(&sent, &[]);
        judge(&sent, &whole);
        whole.ended.unwrap();
        let cut = run(&sent, &pieces);
        prop_assert!(cut.said == whole.said, "the pieces change the answers");
        prop_assert!(cut.disk == whole.disk);
    }

    #[test]
    fn damaged_sessions_are_answered_as_far_as_they_make_sense(
        mut sent in sessions(), damage in damage(), pieces in pieces(), end in any::<Index>(),
    ) {
        for (at, byte) in damage {
            let at = at.index(sent.len());
            sent[at] = byte;
        }
        sent.truncate(end.index(sent.len()) + 1);
        let whole = run(&sent, &[]);
        judge(&sent, &whole);
        // A client that is gone without a goodbye gets no more of what waits to be sent.
        prop_assert!(whole.said.starts_with(&run(&sent, &pieces).said), "the pieces change the answers");
    }

    #[test]
    fn noise_is_refused(sent in vec(any::<u8>(), 0..3000), pieces in pieces(), mode in modes(), stage in 0..3) {
        let prefix = match stage {
            0 => vec![],
            1 => b"\0\0\0\x03IHAVEOPT".to_vec(),
            _ => opening(mode),
        };
        let sent = [prefix, sent].concat();
        let whole = run(&sent, &[]);
        judge(&sent, &whole);
        prop_assert!(whole.said.starts_with(&run(&sent, &pieces).said), "the pieces change the answers");
    }
}
