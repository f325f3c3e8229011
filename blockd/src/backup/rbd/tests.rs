//! Tests of the RBD diff format: golden bytes, and hostile streams.

use super::*;
use proptest::prelude::*;

fn head() -> Head {
    Head {
        from: Some("a".to_owned()),
        to: Some("bc".to_owned()),
        size_bytes: Some(1 << 20),
    }
}

fn stream(format: DiffFormat) -> Vec<u8> {
    let mut out = encode_head(format, &head());
    let data = Record::Data {
        offset_bytes: 4096,
        len_bytes: 3,
    };
    out.extend(encode_record(format, data));
    out.extend(b"xyz");
    let zero = Record::Zero {
        offset_bytes: 8192,
        len_bytes: 4096,
    };
    out.extend(encode_record(format, zero));
    out.extend(encode_record(format, Record::End));
    out
}

type Body = Vec<(Record, Vec<u8>)>;

fn read_all(bytes: &[u8]) -> Result<(Head, Body), StreamError> {
    let (mut reader, head) = Reader::open(bytes)?;
    let mut body = Vec::new();
    loop {
        let record = reader.record()?;
        let mut data = Vec::new();
        while let Some(piece) = reader.data()? {
            assert!(piece.len() as u64 <= PIECE_BYTES);
            data.extend_from_slice(&piece);
        }
        if record == Record::End {
            return Ok((head, body));
        }
        body.push((record, data));
    }
}

/// S003-31: the documented bytes, written out by hand from Ceph's document.
#[test]
fn both_versions_are_the_documented_bytes() {
    let mut v1 = b"rbd diff v1\n".to_vec();
    v1.extend(b"f\x01\0\0\0a");
    v1.extend(b"t\x02\0\0\0bc");
    v1.extend(b"s\0\0\x10\0\0\0\0\0");
    v1.extend(b"w\0\x10\0\0\0\0\0\0\x03\0\0\0\0\0\0\0xyz");
    v1.extend(b"z\0\x20\0\0\0\0\0\0\0\x10\0\0\0\0\0\0e");
    assert_eq!(stream(DiffFormat::V1), v1);
    let mut v2 = b"rbd diff v2\n".to_vec();
    v2.extend(b"f\x05\0\0\0\0\0\0\0\x01\0\0\0a");
    v2.extend(b"t\x06\0\0\0\0\0\0\0\x02\0\0\0bc");
    v2.extend(b"s\x08\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0");
    v2.extend(b"w\x13\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\x03\0\0\0\0\0\0\0xyz");
    v2.extend(b"z\x10\0\0\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\x10\0\0\0\0\0\0e");
    assert_eq!(stream(DiffFormat::V2), v2);
}

#[test]
fn what_is_written_is_read_back() {
    for format in [DiffFormat::V1, DiffFormat::V2] {
        let (read, body) = read_all(&stream(format)).unwrap();
        assert_eq!(read, head());
        assert_eq!(body.len(), 2);
        assert_eq!(body[0].1, b"xyz");
        assert!(matches!(
            body[1].0,
            Record::Zero {
                offset_bytes: 8192,
                ..
            }
        ));
    }
}

/// A stream that ends before its end record is an error at the byte where it ends, wherever that is.
#[test]
fn every_truncation_is_noticed() {
    for format in [DiffFormat::V1, DiffFormat::V2] {
        let whole = stream(format);
        for len in 0..whole.len() {
            let error = read_all(&whole[..len]).unwrap_err();
            assert_eq!(error.at_bytes, len as u64, "{error}");
            let wanted = match len < BANNER_BYTES {
                true => matches!(error.kind, StreamErrorKind::Banner),
                false => matches!(error.kind, StreamErrorKind::Truncated),
            };
            assert!(wanted, "{len}: {error}");
            let mut file = file_of(&whole[..len]);
            let checked = check_file(&mut file).unwrap_err();
            assert_eq!(checked.to_string(), error.to_string());
        }
    }
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, bytes).unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    file
}

#[test]
fn a_checked_file_is_at_its_start_again_and_has_nothing_beyond_its_volume() {
    let mut file = file_of(&stream(DiffFormat::V1));
    check_file(&mut file).unwrap();
    assert_eq!(file.stream_position().unwrap(), 0);
    let mut beyond = b"rbd diff v1\ns\0\x10\0\0\0\0\0\0".to_vec();
    beyond.extend(b"z\0\0\0\0\0\0\0\0\x01\x10\0\0\0\0\0\0e");
    let error = check_file(&mut file_of(&beyond)).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("beyond the end of the volume, 4096"),
        "{error}"
    );
}

#[test]
fn unknown_records_are_passed_over_in_v2_only() {
    let with = |format: DiffFormat| {
        let mut bytes = encode_head(format, &head());
        bytes.extend(b"p\x01\0\0\0\0\0\0\0\x01");
        bytes.extend(encode_record(format, Record::End));
        bytes
    };
    assert_eq!(read_all(&with(DiffFormat::V2)).unwrap().0, head());
    let error = read_all(&with(DiffFormat::V1)).unwrap_err();
    assert!(
        matches!(error.kind, StreamErrorKind::Unknown('p')),
        "{error}"
    );
}

#[test]
fn hostile_streams_are_refused_and_cost_no_memory() {
    let v1 = |rest: &[u8]| [&b"rbd diff v1\n"[..], rest].concat();
    let v2 = |rest: &[u8]| [&b"rbd diff v2\n"[..], rest].concat();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (b"rbd image v2\n".to_vec(), "no RBD diff"),
        (v1(b"f\xff\xff\xff\xff"), "4294967295 bytes"),
        (v1(b"t\x01\0\0\0\xff"), "UTF-8"),
        (v1(b"f\x01\0\0\0af\x01\0\0\0a"), "'f' comes twice"),
        (v1(b"s\0\0\0\0\0\0\0\0s\0\0\0\0\0\0\0\0"), "'s' comes twice"),
        (
            v1(b"z\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0f"),
            "behind the first data",
        ),
        (
            v1(b"w\0\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff"),
            "incomplete",
        ),
        (v1(b"ee"), "behind the end record"),
        (v2(b"s\x09\0\0\0\0\0\0\0"), "'s' says that it has 9 bytes"),
        (v2(b"t\xff\xff\xff\xff\xff\xff\xff\xff"), "cannot be"),
        (v2(b"w\0\0\0\0\0\0\0\0"), "'w' says that it has 0 bytes"),
        (v2(b"x\xff\xff\xff\xff\xff\xff\xff\xff"), "incomplete"),
    ];
    for (bytes, words) in cases {
        let error = read_all(&bytes).unwrap_err().to_string();
        assert!(error.contains(words), "no {words:?} in {error}");
    }
}

proptest! {
    /// Any bytes behind a banner end in a result, and what was damaged is never read as if it were whole
    /// and longer.
    #[test]
    fn any_bytes_end_in_a_result(
        v2 in any::<bool>(),
        bytes in proptest::collection::vec(prop_oneof![Just(b'w'), Just(b'z'), Just(b'e'), Just(0), any::<u8>()], 0..200),
    ) {
        let format = if v2 { DiffFormat::V2 } else { DiffFormat::V1 };
        let stream = [&format.banner()[..], &bytes].concat();
        if let Ok((_, body)) = read_all(&stream) {
            let data: usize = body.iter().map(|(_, data)| data.len()).sum();
            prop_assert!(data <= bytes.len());
        }
    }

    #[test]
    fn one_changed_byte_never_panics(v2 in any::<bool>(), at in 0usize..120, byte in any::<u8>()) {
        let mut bytes = stream(if v2 { DiffFormat::V2 } else { DiffFormat::V1 });
        let at = at % bytes.len();
        bytes[at] = byte;
        let _ = read_all(&bytes);
    }
}
