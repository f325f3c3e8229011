//! What ends a connection, what is answered before, and what a broken one leaves behind.

use super::{PATTERN_AT, Row, SCRATCH, Target, alive, pattern};
use crate::nbd_raw::wire::{DISC, EINVAL, FLUSH, READ, WRITE};
use crate::nbd_raw::{Asked, Mode, RawNbd};
use std::io::Write;

pub(super) fn rows() -> Vec<Row> {
    vec![
        Row::new("A.4 bad request magic", "closed, in every mode", bad_magic),
        Row::new("A.4 write 2^32-1 header only", "closed", endless_write),
        Row::new(
            "A.4 write 65 MiB",
            "EINVAL and in step, or closed",
            large_write,
        ),
        Row::new(
            "A.4 write x8 + DISC pipelined",
            "8 replies, then close, data kept",
            goodbye,
        ),
        Row::new(
            "A.3 DISC",
            "no reply; offset and length do not matter",
            disc,
        ),
        Row::new(
            "A.4 half-sent write then close",
            "nothing of it is applied",
            half_write,
        ),
        Row::new(
            "A.3 replies",
            "128 requests in one segment, one reply each",
            many_at_once,
        ),
        Row::new(
            "A.3 replies",
            "requests cut into single bytes",
            single_bytes,
        ),
        Row::new(
            "A.3 errors",
            "64 errors in a row, then still in step",
            many_errors,
        ),
        Row::new("A.3 cookie", "any value comes back", cookies),
    ]
}

fn bad_magic(target: &Target) {
    for mode in Mode::ALL {
        let mut garbage = vec![
            vec![0; 32],
            vec![0xff; 32],
            b"GET / HTTP/1.1\r\nHost: localhost\r\n".to_vec(),
        ];
        let other = match mode {
            Mode::Extended => Mode::Simple,
            _ => Mode::Extended,
        };
        let asked = Asked {
            kind: FLUSH,
            flags: 0,
            cookie: 1,
            offset: 0,
            len_bytes: 0,
        };
        garbage.push([asked.bytes(other), vec![0; 4]].concat());
        for bytes in garbage {
            let mut raw = RawNbd::opened(&target.export, mode);
            raw.stream.write_all(&bytes).unwrap();
            assert!(raw.is_closed(), "{mode:?}: {bytes:?}");
        }
    }
}

fn endless_write(target: &Target) {
    for mode in Mode::ALL {
        let mut raw = RawNbd::opened(&target.export, mode);
        let sent = raw.try_send(WRITE, 0, 0, u64::from(u32::MAX), b"");
        assert!(sent.is_err() || raw.is_closed(), "{mode:?}");
    }
}

fn large_write(target: &Target) {
    for mode in Mode::ALL {
        let mut raw = RawNbd::opened(&target.export, mode);
        let data = vec![0x22; 65 << 20];
        let Ok(asked) = raw.try_send(WRITE, 0, 0, data.len() as u64, &data) else {
            continue;
        };
        let mut first = [0; 1];
        match std::io::Read::read(&mut raw.stream, &mut first) {
            Ok(1) => {}
            _ => continue,
        }
        // The rest of the reply, behind the byte that told reply from close.
        let rest = std::mem::replace(&mut raw.stream, Box::new(std::io::Cursor::new(vec![])));
        raw.stream = Box::new(Pushed(Some(first[0]), rest));
        assert_eq!(raw.reply(&asked).errno, EINVAL, "{mode:?}");
        alive(&mut raw);
    }
}

/// A stream with one byte put back.
#[derive(Debug)]
struct Pushed(Option<u8>, Box<dyn crate::nbd_raw::Stream>);

impl std::io::Read for Pushed {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match (self.0.take(), buffer.first_mut()) {
            (Some(byte), Some(first)) => {
                *first = byte;
                Ok(1)
            }
            _ => self.1.read(buffer),
        }
    }
}

impl Write for Pushed {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        self.1.write(buffer)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.1.flush()
    }
}

fn goodbye(target: &Target) {
    for mode in Mode::ALL {
        let mut raw = RawNbd::opened(&target.export, mode);
        let mut asked = vec![];
        for index in 0..8 {
            let at = SCRATCH + u64::from(index) * 4096;
            asked.push(
                raw.try_send(WRITE, 0, at, 4096, &[index + 1; 4096])
                    .unwrap(),
            );
        }
        raw.send(DISC, 0, 0, 0);
        answered(&mut raw, asked);
        assert!(raw.is_closed(), "{mode:?}");
        let data = RawNbd::opened(&target.export, mode).read(SCRATCH, 8 * 4096);
        let kept =
            |(index, part): (usize, &[u8])| part.iter().all(|byte| usize::from(*byte) == index + 1);
        assert!(data.chunks(4096).enumerate().all(kept), "{mode:?}");
    }
}

/// Every request gets its reply, in any order; nothing else comes.
fn answered(raw: &mut RawNbd, mut asked: Vec<Asked>) {
    while !asked.is_empty() {
        // The cookie is at the same place in all forms of replies without payload.
        let mut head = raw.take(16);
        let cookie = u64::from_be_bytes(head[8..].try_into().unwrap());
        let index = asked.iter().position(|asked| asked.cookie == cookie);
        let asked = asked.remove(index.expect("a reply to nothing"));
        let rest_bytes = match (raw.mode, head[0]) {
            (Mode::Extended, _) => 16,
            (_, 0x66) => 4,
            _ => 0,
        };
        head.extend(raw.take(rest_bytes));
        let mut one = RawReply(head);
        assert_eq!(one.errno(raw.mode, &asked), 0);
    }
}

/// The bytes of one reply without payload.
struct RawReply(Vec<u8>);

impl RawReply {
    fn errno(&mut self, mode: Mode, asked: &Asked) -> u32 {
        let bytes = std::mem::take(&mut self.0);
        let stream: Box<dyn crate::nbd_raw::Stream> = Box::new(std::io::Cursor::new(bytes));
        crate::nbd_raw::receive(stream, mode, asked).errno
    }
}

fn disc(target: &Target) {
    for mode in Mode::ALL {
        for (flags, offset, len_bytes) in [(0, 0, 0), (0, 4096, 512), (1 << 14, u64::MAX, 1)] {
            let mut raw = RawNbd::opened(&target.export, mode);
            raw.send(DISC, flags, offset, len_bytes);
            assert!(raw.is_closed(), "{mode:?}");
        }
    }
}

fn half_write(target: &Target) {
    for mode in Mode::ALL {
        for len_bytes in [2, 4096, 65_536, 65_537, 1 << 20] {
            let mut raw = RawNbd::opened(&target.export, mode);
            assert_eq!(raw.write(0, SCRATCH, &vec![1; len_bytes]), 0);
            let cut = vec![2; len_bytes - 1];
            raw.try_send(WRITE, 0, SCRATCH, len_bytes as u64, &cut)
                .unwrap();
            drop(raw);
            let mut raw = RawNbd::opened(&target.export, mode);
            let data = raw.read(SCRATCH, len_bytes as u64);
            assert!(
                data.iter().all(|byte| *byte == 1),
                "{mode:?}, {len_bytes} bytes"
            );
        }
    }
}

fn many_at_once(target: &Target) {
    for mode in Mode::ALL {
        let mut raw = RawNbd::opened(&target.export, mode);
        let mut segment = vec![];
        let asked: Vec<Asked> = (0..128)
            .map(|index| Asked {
                kind: FLUSH,
                flags: 0,
                cookie: 0xffff_0000_0000_0000 + index,
                offset: 0,
                len_bytes: 0,
            })
            .collect();
        asked
            .iter()
            .for_each(|asked| segment.extend(asked.bytes(mode)));
        raw.stream.write_all(&segment).unwrap();
        answered(&mut raw, asked);
        alive(&mut raw);
    }
}

fn single_bytes(target: &Target) {
    for mode in Mode::ALL {
        let mut raw = RawNbd::opened(&target.export, mode);
        let asked = Asked {
            kind: READ,
            flags: 0,
            cookie: 77,
            offset: PATTERN_AT,
            len_bytes: 512,
        };
        for byte in asked.bytes(mode) {
            raw.stream.write_all(&[byte]).unwrap();
        }
        assert!(raw.reply(&asked).data == pattern()[..512]);
        alive(&mut raw);
    }
}

fn many_errors(target: &Target) {
    for mode in Mode::ALL {
        let mut raw = RawNbd::opened(&target.export, mode);
        for round in 0..64 {
            let payload = vec![0; round * 1024];
            let sent = raw.try_send(WRITE, 1 << 14, SCRATCH, payload.len() as u64, &payload);
            assert_eq!(raw.reply(&sent.unwrap()).errno, EINVAL);
            assert_eq!(raw.ask(READ, 0, u64::MAX, 512).errno, EINVAL);
        }
        alive(&mut raw);
    }
}

fn cookies(target: &Target) {
    for mode in Mode::ALL {
        let mut raw = RawNbd::opened(&target.export, mode);
        for cookie in [0, 1, u64::MAX, 0x6744_6698_668e_33ef, 0x2560_9513 << 32] {
            let asked = Asked {
                kind: READ,
                flags: 0,
                cookie,
                offset: PATTERN_AT,
                len_bytes: 64,
            };
            raw.stream.write_all(&asked.bytes(mode)).unwrap();
            assert!(raw.reply(&asked).data == pattern()[..64]);
        }
    }
}
