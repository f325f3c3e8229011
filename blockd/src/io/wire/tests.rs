use super::*;
use proptest::prelude::*;

fn encode(frame: &Frame) -> BytesMut {
    let mut out = BytesMut::new();
    frame.encode_header(&mut out);
    frame
        .payload
        .0
        .iter()
        .for_each(|piece| out.extend_from_slice(piece));
    out
}

fn sample() -> Frame {
    Frame {
        flags: flags::FUA | flags::SPAN,
        request_id: 0x0102_0304_0506_0708,
        aux: 0x1112_1314_1516_1718,
        snapshot: SnapshotId(0x2122_2324),
        epoch: Epoch(0x3132_3334),
        page: PageNo(0x4142_4344),
        offset_bytes: 0x0020_0000,
        len_bytes: 4,
        payload: Bytes::from_static(b"data").into(),
        ..Frame::request(Kind::Write, VolumeId(0x5152_5354_5556_5758))
    }
}

/// The golden message of version 1: later versions must read it.
#[test]
fn a_write_request_is_these_bytes() {
    let hex: String = encode(&sample())
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let golden = concat!(
        "424b",
        "01",
        "03",
        "0300",
        "0000",
        "0807060504030201",
        "5857565554535251",
        "1817161514131211",
        "24232221",
        "34333231",
        "44434241",
        "00002000",
        "04000000",
        "04000000",
        "63f3f3ad",
        "ff2d1412",
        "64617461",
    );
    assert_eq!(hex, golden);
}

/// The golden message of version 2, and that of version 1 read by its side.
#[test]
fn a_stamped_request_is_these_bytes() {
    let stamped = Frame {
        stamp: Stamp(0x6162_6364_6566_6768),
        ..sample()
    };
    let bytes = encode(&stamped);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(hex.starts_with("424b02030300"), "{hex}");
    assert_eq!(&hex[120..136], "6867666564636261");
    assert_eq!(&hex[136..144], "446295e4");
    for frame in [stamped, sample()] {
        let mut bytes = encode(&frame);
        assert_eq!(decode(&mut bytes), Ok(Decoded::Frame(Box::new(frame))));
    }
}

fn layers() -> Vec<LayerRun> {
    let run = |len_bytes, depth, hole, changed| LayerRun {
        len_bytes,
        depth,
        hole,
        changed,
    };
    vec![
        run(4096, 0, true, false),
        run(65_536, 1, false, true),
        run(512, 3, true, true),
    ]
}

/// The golden messages of `LAYERS`: what is asked and what is answered.
#[test]
fn a_question_for_layers_and_its_answer_are_these_bytes() {
    let hex = |frame: &Frame| -> String {
        let bytes = encode(frame);
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    };
    let mut request = Frame::request(Kind::Extents, VolumeId(7));
    (request.flags, request.aux) = (flags::LAYERS, 0x11);
    (request.snapshot, request.epoch, request.page) = (SnapshotId(0x12), Epoch(5), PageNo(9));
    (request.offset_bytes, request.len_bytes) = (4096, 70_144);
    let golden = concat!(
        "424b01062000000000000000000000000700000000000000",
        "1100000000000000",
        "12000000050000000900000000100000001201000000000000000000",
        "a5c1c902",
    );
    assert_eq!(hex(&request), golden);
    let mut reply = request.answer(Status::Ok, encode_layers(&layers()));
    reply.flags = flags::LAYERS;
    let golden = concat!(
        "424b01862000000000000000000000000700000000000000",
        "00000000000000000000000000000000000000000000000000000000",
        "1c00000003ef26ff04b9d8b5",
        "03000000",
        "0010000000000080",
        "0000010001000040",
        "00020000030000c0",
    );
    assert_eq!(hex(&reply), golden);
    assert_eq!(decode_layers(reply, 70_144), Ok(layers()));
}

#[test]
fn malformed_lists_of_layers_are_refused() {
    let reply = |words: &[u32], tail: &[u8]| {
        let mut payload = BytesMut::new();
        words.iter().for_each(|word| payload.put_u32_le(*word));
        payload.extend_from_slice(tail);
        sample().answer(Status::Ok, payload.freeze().into())
    };
    assert!(decode_layers(reply(&[2, 4, 1, 3, 0], b""), 7).is_ok());
    for (words, tail, len) in [
        (&[2, 4, 1, 3, 0][..], &b""[..], 8),
        (&[2, 4, 1, 3], b"", 7),
        (&[2, 4, 1, 3, 0], b"abc", 7),
        (&[3, 4, 1, 3, 0], b"", 7),
        (&[u32::MAX], b"", 0),
        (&[], b"abc", 0),
    ] {
        assert_eq!(decode_layers(reply(words, tail), len), Err(WireError::Runs));
    }
}

#[test]
fn what_was_encoded_is_decoded() {
    let mut reply = sample().refuse(Status::Stale, "text");
    reply.epoch = Epoch(9);
    for frame in [sample(), reply, Frame::request(Kind::Flush, VolumeId(0))] {
        let mut bytes = encode(&frame);
        bytes.extend_from_slice(b"next");
        let decoded = decode(&mut bytes).unwrap();
        assert_eq!(decoded, Decoded::Frame(Box::new(frame)));
        assert_eq!(&bytes[..], b"next");
    }
}

#[test]
fn a_short_buffer_says_what_it_needs() {
    let whole = encode(&sample());
    for len in 0..whole.len() {
        let mut part = BytesMut::from(&whole[..len]);
        let needs = if len < HEADER_BYTES {
            HEADER_BYTES
        } else {
            whole.len()
        };
        assert_eq!(decode(&mut part), Ok(Decoded::Needs(needs)), "{len}");
    }
}

/// A header whose checksum is right but whose length lies costs no memory.
#[test]
fn a_lying_length_is_refused_before_its_payload_is_awaited() {
    let mut bytes = encode(&sample());
    bytes[52..56].copy_from_slice(&(MAX_PAYLOAD_BYTES + 1).to_le_bytes());
    let crc = crc32fast::hash(&bytes[..60]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(
        decode(&mut bytes),
        Err(WireError::TooLong(MAX_PAYLOAD_BYTES + 1))
    );
}

#[test]
fn each_damage_has_its_error() {
    let damaged = |at: usize, value: u8, seal: bool| {
        let mut bytes = encode(&sample());
        bytes[at] = value;
        if seal {
            let crc = crc32fast::hash(&bytes[..60]);
            bytes[60..64].copy_from_slice(&crc.to_le_bytes());
        }
        decode(&mut bytes).unwrap_err()
    };
    assert_eq!(damaged(0, 0, false), WireError::Magic(0x4b00));
    assert_eq!(damaged(2, 9, false), WireError::Version(9));
    assert_eq!(damaged(20, 9, false), WireError::HeaderCrc);
    assert_eq!(damaged(3, 99, true), WireError::Unknown(99, 0));
    assert_eq!(damaged(6, 99, true), WireError::Unknown(3, 99));
    assert_eq!(damaged(64, b'D', false), WireError::PayloadCrc);
}

#[test]
fn malformed_run_lists_are_refused() {
    let reply = |list: &[u32], data: &'static [u8]| {
        let mut payload = BytesMut::new();
        list.iter().for_each(|word| payload.put_u32_le(*word));
        payload.extend_from_slice(data);
        let mut frame = sample().answer(Status::Ok, payload.freeze().into());
        frame.flags = flags::RUNS;
        frame
    };
    let hole = |len: u32| len | HOLE_BIT;
    assert!(decode_runs(reply(&[2, hole(4), 3], b"abc"), 7).is_ok());
    for (list, data, len) in [
        (&[2, hole(4), 3][..], &b"ab"[..], 7),
        (&[2, hole(4), 3], b"abcd", 7),
        (&[2, hole(4), 3], b"abc", 8),
        (&[9, hole(4)], b"", 4),
        (&[u32::MAX], b"", 4),
        (&[], b"", 0),
    ] {
        assert_eq!(decode_runs(reply(list, data), len), Err(WireError::Runs));
    }
}

fn runs() -> impl Strategy<Value = Vec<Run>> {
    let data = prop::collection::vec(any::<u8>(), 1..50).prop_map(|v| Run::Data(v.into()));
    prop::collection::vec(prop_oneof![data, (1u32..100).prop_map(Run::Hole)], 1..8)
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _: Result<_, _> = decode(&mut BytesMut::from(&bytes[..]));
        if bytes.len() >= HEADER_BYTES {
            bytes[..4].copy_from_slice(&[0x42, 0x4b, 1, 3]);
            let crc = crc32fast::hash(&bytes[..60]);
            bytes[60..64].copy_from_slice(&crc.to_le_bytes());
            let _: Result<_, _> = decode(&mut BytesMut::from(&bytes[..]));
        }
    }

    #[test]
    fn runs_survive_the_wire(runs in runs()) {
        let len = runs.iter().map(Run::len_bytes).sum();
        let (frame_flags, payload) = encode_runs(runs.clone());
        let mut reply = sample().answer(Status::Ok, payload);
        reply.flags = frame_flags;
        let Ok(Decoded::Frame(reply)) = decode(&mut encode(&reply)) else { panic!() };
        let flat = |runs: Vec<Run>| -> Vec<u8> {
            runs.into_iter().flat_map(|run| match run {
                Run::Data(data) => data.to_vec(),
                Run::Hole(len) => vec![0; len as usize],
            }).collect()
        };
        prop_assert_eq!(flat(decode_runs(*reply, len).unwrap()), flat(runs));
    }

    #[test]
    fn arbitrary_lists_of_layers_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..60), len in 0u32..9999) {
        let reply = sample().answer(Status::Ok, Bytes::from(bytes).into());
        if let Ok(layers) = decode_layers(reply, len) {
            prop_assert_eq!(layers.iter().map(|run| run.len_bytes).sum::<u64>(), u64::from(len));
        }
    }

    #[test]
    fn layers_survive_the_wire(runs in prop::collection::vec((1u64..9999, 0..DEPTH_MAX, any::<bool>(), any::<bool>()), 1..9)) {
        let run = |(len_bytes, depth, hole, changed)| LayerRun { len_bytes, depth, hole, changed };
        let layers: Vec<LayerRun> = runs.into_iter().map(run).collect();
        let len: u64 = layers.iter().map(|run| run.len_bytes).sum();
        let reply = sample().answer(Status::Ok, encode_layers(&layers));
        prop_assert_eq!(decode_layers(reply, u32::try_from(len).unwrap()).unwrap(), layers);
    }

    #[test]
    fn extents_survive_the_wire(extents in prop::collection::vec((1u32..9999, any::<bool>()), 1..9)) {
        let len = extents.iter().map(|(len, _)| len).sum();
        let reply = sample().answer(Status::Ok, encode_extents(&extents));
        prop_assert_eq!(decode_extents(reply, len).unwrap(), extents);
    }
}
