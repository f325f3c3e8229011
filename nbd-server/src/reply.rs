//! Replies to requests as bytes: simple replies and structured chunks.

use bytes::Bytes;

use crate::error::{ExportError, NbdErrno};
use crate::export::{Extent, ReadPart, ReadReply};
use crate::limits;
use crate::option::cut_text;
use crate::output::Output;
use crate::request::{Agreement, Command, Request};
use crate::wire::{self, chunk};

/// What a request gave.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done,
    Read(ReadReply),
    Status(Vec<Extent>),
}

/// Appends the reply to a request and ends it; `held_bytes` are free when it is sent.
pub(crate) fn put_reply(
    out: &mut Output,
    request: &Request,
    command: Command,
    agreed: Agreement,
    outcome: Result<Outcome, ExportError>,
    held_bytes: u64,
) {
    match outcome {
        Ok(Outcome::Done) => put_simple(out, request.cookie, 0),
        Ok(Outcome::Read(reply)) => put_read(out, request, command, agreed, reply),
        Ok(Outcome::Status(extents)) => put_status(out, request, command, &extents),
        Err(error) => put_error(out, request, agreed, &error),
    }
    out.end_reply(held_bytes);
}

/// Appends an error: with its text when the client understands chunks.
fn put_error(out: &mut Output, request: &Request, agreed: Agreement, error: &ExportError) {
    if !agreed.structured {
        return put_simple(out, request.cookie, error.errno.code());
    }
    let text = cut_text(&error.message, limits::ERROR_TEXT_BYTES).as_bytes();
    put_chunk_head(
        out,
        request,
        chunk::DONE,
        chunk::ERROR,
        6 + text.len() as u32,
    );
    out.put_small(&error.errno.code().to_be_bytes());
    out.put_small(&(text.len() as u16).to_be_bytes());
    out.put_small(text);
}

fn put_simple(out: &mut Output, cookie: u64, error: u32) {
    let mut head = [0; wire::SIMPLE_REPLY_BYTES];
    head[..4].copy_from_slice(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
    head[4..8].copy_from_slice(&error.to_be_bytes());
    head[8..].copy_from_slice(&cookie.to_be_bytes());
    out.put_small(&head);
}

fn put_chunk_head(out: &mut Output, request: &Request, flags: u16, kind: u16, len_bytes: u32) {
    let mut head = [0; 20];
    head[..4].copy_from_slice(&wire::CHUNK_MAGIC.to_be_bytes());
    head[4..6].copy_from_slice(&flags.to_be_bytes());
    head[6..8].copy_from_slice(&kind.to_be_bytes());
    head[8..16].copy_from_slice(&request.cookie.to_be_bytes());
    head[16..].copy_from_slice(&len_bytes.to_be_bytes());
    out.put_small(&head);
}

/// Appends the data of a READ. An export that does not answer the whole range exactly has a bug; passing it on would put the stream
/// out of step.
fn put_read(
    out: &mut Output,
    request: &Request,
    command: Command,
    agreed: Agreement,
    reply: ReadReply,
) {
    let len_bytes: u64 = reply.parts().iter().map(ReadPart::len_bytes).sum();
    if len_bytes != u64::from(request.len_bytes) {
        return put_error(
            out,
            request,
            agreed,
            &ExportError::new(
                NbdErrno::Io,
                "the export answered a read with a wrong length",
            ),
        );
    }
    if !agreed.structured {
        put_simple(out, request.cookie, 0);
        return put_plain(out, reply);
    }
    match reply {
        _ if request.len_bytes == 0 => put_chunk_head(out, request, chunk::DONE, chunk::NONE, 0),
        ReadReply::One(ReadPart::Data(data)) => {
            put_data_head(out, request, chunk::DONE, request.offset, request.len_bytes);
            out.put_data(data);
        }
        reply if command == (Command::Read { df: true }) => {
            put_data_head(out, request, chunk::DONE, request.offset, request.len_bytes);
            put_plain(out, reply);
        }
        ReadReply::One(ReadPart::Hole(len_bytes)) => {
            put_hole(out, request, chunk::DONE, request.offset, len_bytes)
        }
        ReadReply::Parts(parts) => put_chunks(out, request, parts),
    }
}

/// Appends all bytes, holes as zeroes.
fn put_plain(out: &mut Output, reply: ReadReply) {
    match reply {
        ReadReply::One(part) => put_part(out, part),
        ReadReply::Parts(parts) => parts.into_iter().for_each(|part| put_part(out, part)),
    }
}

fn put_part(out: &mut Output, part: ReadPart) {
    match part {
        ReadPart::Data(data) => out.put_data(data),
        ReadPart::Hole(len_bytes) => out.put_zeroes(len_bytes),
    }
}

/// One chunk per run of data and per run of holes.
fn put_chunks(out: &mut Output, request: &Request, parts: Vec<ReadPart>) {
    let mut parts = parts;
    parts.retain(|part| part.len_bytes() > 0);
    let mut rest = parts.into_iter();
    let mut offset = request.offset;
    while let Some(first) = rest.as_slice().first() {
        let is_hole = matches!(first, ReadPart::Hole(_));
        let same = |part: &&ReadPart| matches!(part, ReadPart::Hole(_)) == is_hole;
        let run = rest.as_slice().iter().take_while(same).count();
        let len_bytes: u64 = rest.as_slice()[..run].iter().map(ReadPart::len_bytes).sum();
        let flags = if run == rest.len() { chunk::DONE } else { 0 };
        let run = rest.by_ref().take(run);
        if is_hole {
            run.for_each(drop);
            put_hole(out, request, flags, offset, len_bytes as u32);
        } else {
            put_data_head(out, request, flags, offset, len_bytes as u32);
            run.for_each(|part| put_part(out, part));
        }
        offset += len_bytes;
    }
}

fn put_data_head(out: &mut Output, request: &Request, flags: u16, offset: u64, len_bytes: u32) {
    put_chunk_head(out, request, flags, chunk::OFFSET_DATA, len_bytes + 8);
    out.put_small(&offset.to_be_bytes());
}

fn put_hole(out: &mut Output, request: &Request, flags: u16, offset: u64, len_bytes: u32) {
    put_chunk_head(out, request, flags, chunk::OFFSET_HOLE, 12);
    out.put_small(&offset.to_be_bytes());
    out.put_small(&len_bytes.to_be_bytes());
}

fn put_status(out: &mut Output, request: &Request, command: Command, extents: &[Extent]) {
    let one = command == Command::Status { one: true };
    let merged = merge_extents(
        extents,
        request.len_bytes,
        if one { 1 } else { limits::EXTENTS_MAX },
    );
    let mut payload = Vec::with_capacity(4 + merged.len() * 8);
    payload.extend_from_slice(&wire::ALLOCATION_ID.to_be_bytes());
    for (len_bytes, status) in merged {
        payload.extend_from_slice(&len_bytes.to_be_bytes());
        payload.extend_from_slice(&status.to_be_bytes());
    }
    put_chunk_head(
        out,
        request,
        chunk::DONE,
        chunk::BLOCK_STATUS,
        payload.len() as u32,
    );
    out.put_data(Bytes::from(payload));
}

/// Extents as (length, status): equal neighbours merged, cut to the range, never empty and never of length 0 (a client would loop).
/// No answer at all counts as status 0, which is always safe.
fn merge_extents(extents: &[Extent], len_bytes: u32, count_max: usize) -> Vec<(u32, u32)> {
    let mut merged: Vec<(u32, u32)> = Vec::new();
    let mut left_bytes = len_bytes;
    for extent in extents {
        let step = u32::try_from(extent.len)
            .unwrap_or(u32::MAX)
            .min(left_bytes);
        let status = extent.flags;
        let is_full = merged.len() == count_max;
        match merged.last_mut() {
            _ if step == 0 => {}
            Some(last) if last.1 == status => last.0 += step,
            _ if is_full => break,
            _ => merged.push((step, status)),
        }
        left_bytes -= step;
    }
    if merged.is_empty() {
        merged.push((len_bytes, 0));
    }
    merged
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Agreement = Agreement {
        structured: false,
        allocation: false,
    };
    const CHUNKS: Agreement = Agreement {
        structured: true,
        allocation: true,
    };

    fn reply(
        agreed: Agreement,
        command: Command,
        len_bytes: u32,
        outcome: Result<Outcome, ExportError>,
    ) -> Vec<u8> {
        let request = Request {
            flags: 0,
            kind: 0,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            len_bytes,
        };
        let mut out = Output::default();
        put_reply(&mut out, &request, command, agreed, outcome, 0);
        out.to_vec()
    }

    fn parts() -> Outcome {
        let data = |text: &'static [u8]| ReadPart::Data(Bytes::from_static(text));
        Outcome::Read(ReadReply::Parts(vec![
            data(b"ab"),
            data(b"cd"),
            ReadPart::Hole(3),
            ReadPart::Hole(0),
            data(b"e"),
        ]))
    }

    const READ: Command = Command::Read { df: false };
    const COOKIE: &[u8] = b"\x01\x02\x03\x04\x05\x06\x07\x08";

    #[test]
    fn golden_simple_replies() {
        let done = reply(PLAIN, Command::Flush, 0, Ok(Outcome::Done));
        assert_eq!(done, [b"\x67\x44\x66\x98\0\0\0\0", COOKIE].concat());
        let failed = reply(PLAIN, READ, 8, Err(ExportError::io("broken")));
        assert_eq!(failed, [b"\x67\x44\x66\x98\0\0\0\x05", COOKIE].concat());
        let read = reply(PLAIN, READ, 8, Ok(parts()));
        assert_eq!(
            read,
            [b"\x67\x44\x66\x98\0\0\0\0", COOKIE, b"abcd\0\0\0e"].concat()
        );
    }

    #[test]
    fn golden_chunks() {
        let magic = b"\x66\x8e\x33\xef";
        let read = reply(CHUNKS, READ, 8, Ok(parts()));
        let expected = [
            &[
                magic,
                &b"\0\0\0\x01"[..],
                COOKIE,
                b"\0\0\0\x0c\0\0\0\0\0\0\x10\0abcd",
            ]
            .concat()[..],
            &[
                magic,
                &b"\0\0\0\x02"[..],
                COOKIE,
                b"\0\0\0\x0c\0\0\0\0\0\0\x10\x04\0\0\0\x03",
            ]
            .concat()[..],
            &[
                magic,
                &b"\0\x01\0\x01"[..],
                COOKIE,
                b"\0\0\0\x09\0\0\0\0\0\0\x10\x07e",
            ]
            .concat()[..],
        ];
        assert_eq!(read, expected.concat());
        let unbroken = reply(CHUNKS, Command::Read { df: true }, 8, Ok(parts()));
        assert_eq!(
            unbroken,
            [
                magic,
                &b"\0\x01\0\x01"[..],
                COOKIE,
                b"\0\0\0\x10\0\0\0\0\0\0\x10\0abcd\0\0\0e"
            ]
            .concat()
        );
        let failed = reply(CHUNKS, READ, 8, Err(ExportError::io("bad")));
        assert_eq!(
            failed,
            [
                magic,
                &b"\0\x01\x80\x01"[..],
                COOKIE,
                b"\0\0\0\x09\0\0\0\x05\0\x03bad"
            ]
            .concat()
        );
        let nothing = reply(CHUNKS, READ, 0, Ok(Outcome::Read(Bytes::new().into())));
        assert_eq!(
            nothing,
            [magic, &b"\0\x01\0\0"[..], COOKIE, b"\0\0\0\0"].concat()
        );
    }

    #[test]
    fn a_read_of_wrong_length_becomes_an_error() {
        let short = reply(PLAIN, READ, 9, Ok(parts()));
        assert_eq!(short, [b"\x67\x44\x66\x98\0\0\0\x05", COOKIE].concat());
    }

    #[test]
    fn golden_block_status() {
        let extent = |len, hole| Extent::allocation(len, hole, hole);
        let extents = vec![
            extent(0x200, false),
            extent(0x200, false),
            extent(0x1_0000_0000, true),
        ];
        let all = reply(
            CHUNKS,
            Command::Status { one: false },
            0x1000,
            Ok(Outcome::Status(extents.clone())),
        );
        let head = b"\x66\x8e\x33\xef\0\x01\0\x05";
        let expected = [
            head,
            COOKIE,
            b"\0\0\0\x14\0\0\0\x01\0\0\x04\0\0\0\0\0\0\0\x0c\0\0\0\0\x03",
        ]
        .concat();
        assert_eq!(all, expected);
        let one = reply(
            CHUNKS,
            Command::Status { one: true },
            0x1000,
            Ok(Outcome::Status(extents)),
        );
        assert_eq!(
            one,
            [head, COOKIE, b"\0\0\0\x0c\0\0\0\x01\0\0\x04\0\0\0\0\0"].concat()
        );
    }

    proptest! {
        #[test]
        fn merged_extents_are_never_empty_and_never_too_long(
            raw in proptest::collection::vec((any::<u64>(), 0u32..4), 0..50), len_bytes in 1u32.., max in 1usize..60,
        ) {
            let extents: Vec<Extent> = raw.into_iter().map(|(len, flags)| Extent { len: len >> 34, flags }).collect();
            let merged = merge_extents(&extents, len_bytes, max);
            let total: u64 = merged.iter().map(|(len, _)| u64::from(*len)).sum();
            prop_assert!(!merged.is_empty() && merged.len() <= max);
            prop_assert!(merged.iter().all(|(len, _)| *len > 0) && total <= u64::from(len_bytes));
            prop_assert!(merged.windows(2).all(|pair| pair[0].1 != pair[1].1));
        }
    }
}
