//! Replies to requests as bytes: simple replies and chunks, with compact or extended headers.

use bytes::Bytes;

use crate::error::{ExportError, NbdErrno};
use crate::export::{Extent, ReadPart, ReadReply};
use crate::limits;
use crate::option::cut_text;
use crate::output::Output;
use crate::request::{Command, Headers, Request};
use crate::wire::{self, chunk, command};

/// What a request gave.
#[derive(Debug)]
pub(crate) enum Outcome {
    Done,
    Read(ReadReply),
    /// Ids of metadata contexts with the status of the range in each.
    Status(Vec<(u32, Vec<Extent>)>),
}

/// Appends the reply to a request and ends it; `held_bytes` are free when it is sent.
pub(crate) fn put_reply(
    out: &mut Output,
    request: &Request,
    command: Command,
    headers: Headers,
    outcome: Result<Outcome, ExportError>,
    held_bytes: u64,
) {
    match outcome {
        Ok(Outcome::Done) if headers == Headers::Extended => {
            put_chunk_head(out, request, headers, chunk::DONE, chunk::NONE, 0);
        }
        Ok(Outcome::Done) => put_simple(out, request.cookie, 0),
        Ok(Outcome::Read(reply)) => put_read(out, request, command, headers, reply),
        Ok(Outcome::Status(answers)) => put_status(out, request, headers, &answers),
        Err(error) => put_error(out, request, headers, &error),
    }
    out.end_reply(held_bytes);
}

/// Appends an error: with its text and place when the client understands chunks.
fn put_error(out: &mut Output, request: &Request, headers: Headers, error: &ExportError) {
    if !headers.has_chunks() {
        return put_simple(out, request.cookie, error.errno.code());
    }
    let text = cut_text(&error.message, limits::ERROR_TEXT_BYTES).as_bytes();
    let offset = error.offset.filter(|offset| may_tell(request, *offset));
    let (kind, len_bytes) = match offset {
        Some(_) => (chunk::ERROR_OFFSET, 14 + text.len()),
        None => (chunk::ERROR, 6 + text.len()),
    };
    put_chunk_head(out, request, headers, chunk::DONE, kind, len_bytes as u32);
    out.put_small(&error.errno.code().to_be_bytes());
    out.put_small(&(text.len() as u16).to_be_bytes());
    out.put_small(text);
    if let Some(offset) = offset {
        out.put_small(&offset.to_be_bytes());
    }
}

/// ERROR_OFFSET answers reads, writes and trims, and only with an offset within the request. libnbd 1.14 closes the connection when
/// the request's end wraps.
fn may_tell(request: &Request, offset: u64) -> bool {
    let has_place = matches!(request.kind, command::READ | command::WRITE | command::TRIM);
    let end = request.offset.checked_add(request.len_bytes);
    has_place && end.is_some_and(|end| (request.offset..end).contains(&offset))
}

fn put_simple(out: &mut Output, cookie: u64, error: u32) {
    let mut head = [0; wire::SIMPLE_REPLY_BYTES];
    head[..4].copy_from_slice(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
    head[4..8].copy_from_slice(&error.to_be_bytes());
    head[8..].copy_from_slice(&cookie.to_be_bytes());
    out.put_small(&head);
}

fn put_chunk_head(
    out: &mut Output,
    request: &Request,
    headers: Headers,
    flags: u16,
    kind: u16,
    len_bytes: u32,
) {
    let is_extended = headers == Headers::Extended;
    let magic = match is_extended {
        true => wire::EXTENDED_CHUNK_MAGIC,
        false => wire::CHUNK_MAGIC,
    };
    let mut head = [0; wire::EXTENDED_CHUNK_BYTES];
    head[..4].copy_from_slice(&magic.to_be_bytes());
    head[4..6].copy_from_slice(&flags.to_be_bytes());
    head[6..8].copy_from_slice(&kind.to_be_bytes());
    head[8..16].copy_from_slice(&request.cookie.to_be_bytes());
    if is_extended {
        head[16..24].copy_from_slice(&request.offset.to_be_bytes());
        head[24..].copy_from_slice(&u64::from(len_bytes).to_be_bytes());
        return out.put_small(&head);
    }
    head[16..20].copy_from_slice(&len_bytes.to_be_bytes());
    out.put_small(&head[..wire::CHUNK_BYTES]);
}

/// Appends the data of a READ. An export that does not answer the whole range exactly has a bug; passing it on would put the stream
/// out of step.
fn put_read(
    out: &mut Output,
    request: &Request,
    command: Command,
    headers: Headers,
    reply: ReadReply,
) {
    let len_bytes: u64 = reply.parts().iter().map(ReadPart::len_bytes).sum();
    if len_bytes != request.len_bytes {
        let error = ExportError::new(
            NbdErrno::Io,
            "the export answered a read with a wrong length",
        );
        return put_error(out, request, headers, &error);
    }
    if !headers.has_chunks() {
        put_simple(out, request.cookie, 0);
        return put_plain(out, reply);
    }
    let chunks = Chunks { request, headers };
    match reply {
        _ if len_bytes == 0 => put_chunk_head(out, request, headers, chunk::DONE, chunk::NONE, 0),
        ReadReply::One(ReadPart::Data(data)) => {
            chunks.put_data_head(out, chunk::DONE, request.offset, len_bytes as u32);
            out.put_data(data);
        }
        reply if command == (Command::Read { df: true }) => {
            chunks.put_data_head(out, chunk::DONE, request.offset, len_bytes as u32);
            put_plain(out, reply);
        }
        ReadReply::One(ReadPart::Hole(len_bytes)) => {
            chunks.put_hole(out, chunk::DONE, request.offset, len_bytes);
        }
        ReadReply::Parts(parts) => chunks.put_parts(out, parts),
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

/// The content chunks of one READ.
struct Chunks<'a> {
    request: &'a Request,
    headers: Headers,
}

impl Chunks<'_> {
    /// One chunk per run of data and per run of holes.
    fn put_parts(&self, out: &mut Output, mut parts: Vec<ReadPart>) {
        parts.retain(|part| part.len_bytes() > 0);
        let mut rest = parts.into_iter();
        let mut offset = self.request.offset;
        while let Some(first) = rest.as_slice().first() {
            let is_hole = matches!(first, ReadPart::Hole(_));
            let same = |part: &&ReadPart| matches!(part, ReadPart::Hole(_)) == is_hole;
            let run = rest.as_slice().iter().take_while(same).count();
            let len_bytes: u64 = rest.as_slice()[..run].iter().map(ReadPart::len_bytes).sum();
            let flags = if run == rest.len() { chunk::DONE } else { 0 };
            let run = rest.by_ref().take(run);
            if is_hole {
                run.for_each(drop);
                self.put_hole(out, flags, offset, len_bytes as u32);
            } else {
                self.put_data_head(out, flags, offset, len_bytes as u32);
                run.for_each(|part| put_part(out, part));
            }
            offset += len_bytes;
        }
    }

    fn put_data_head(&self, out: &mut Output, flags: u16, offset: u64, len_bytes: u32) {
        let (request, headers) = (self.request, self.headers);
        put_chunk_head(
            out,
            request,
            headers,
            flags,
            chunk::OFFSET_DATA,
            len_bytes + 8,
        );
        out.put_small(&offset.to_be_bytes());
    }

    fn put_hole(&self, out: &mut Output, flags: u16, offset: u64, len_bytes: u32) {
        let (request, headers) = (self.request, self.headers);
        put_chunk_head(out, request, headers, flags, chunk::OFFSET_HOLE, 12);
        out.put_small(&offset.to_be_bytes());
        out.put_small(&len_bytes.to_be_bytes());
    }
}

/// Appends one chunk per metadata context. An answer without any extent is a bug of the export: the client would ask for ever.
fn put_status(
    out: &mut Output,
    request: &Request,
    headers: Headers,
    answers: &[(u32, Vec<Extent>)],
) {
    if answers.iter().any(|(_, extents)| extents.is_empty()) {
        let error = ExportError::io("the export answered a block status with nothing");
        return put_error(out, request, headers, &error);
    }
    for (index, (id, extents)) in answers.iter().enumerate() {
        let (kind, payload) = match headers {
            Headers::Extended => (chunk::BLOCK_STATUS_EXT, wide_extents(*id, extents)),
            _ => (chunk::BLOCK_STATUS, compact_extents(*id, extents)),
        };
        let is_last = index + 1 == answers.len();
        let flags = if is_last { chunk::DONE } else { 0 };
        put_chunk_head(out, request, headers, flags, kind, payload.len() as u32);
        out.put_data(Bytes::from(payload));
    }
}

/// Payload of BLOCK_STATUS; with compact headers no request, and so no extent, is longer than a u32.
fn compact_extents(id: u32, extents: &[Extent]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(4 + extents.len() * 8);
    payload.extend_from_slice(&id.to_be_bytes());
    for Extent { len, flags } in extents {
        payload.extend_from_slice(&(*len as u32).to_be_bytes());
        payload.extend_from_slice(&flags.to_be_bytes());
    }
    payload
}

/// Payload of BLOCK_STATUS_EXT.
fn wide_extents(id: u32, extents: &[Extent]) -> Vec<u8> {
    let mut payload = Vec::with_capacity(8 + extents.len() * 16);
    payload.extend_from_slice(&id.to_be_bytes());
    payload.extend_from_slice(&(extents.len() as u32).to_be_bytes());
    for Extent { len, flags } in extents {
        payload.extend_from_slice(&len.to_be_bytes());
        payload.extend_from_slice(&u64::from(*flags).to_be_bytes());
    }
    payload
}

/// Equal neighbours merged, cut to the range, none of length 0 (a client would loop).
pub(crate) fn merge_extents(extents: &[Extent], len_bytes: u64, count_max: usize) -> Vec<Extent> {
    let mut merged: Vec<Extent> = Vec::new();
    let mut left_bytes = len_bytes;
    for Extent { len, flags } in extents.iter().copied() {
        let len = len.min(left_bytes);
        let is_full = merged.len() == count_max;
        match merged.last_mut() {
            _ if len == 0 => {}
            Some(last) if last.flags == flags => last.len += len,
            _ if is_full => break,
            _ => merged.push(Extent { len, flags }),
        }
        left_bytes -= len;
    }
    merged
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Headers = Headers::Simple;
    const CHUNKS: Headers = Headers::Structured;
    const WIDE: Headers = Headers::Extended;

    fn reply(
        headers: Headers,
        command: Command,
        len_bytes: u64,
        outcome: Result<Outcome, ExportError>,
    ) -> Vec<u8> {
        let request = Request {
            flags: 0,
            kind: 0,
            cookie: 0x0102_0304_0506_0708,
            offset: 0x1000,
            len_bytes,
            payload_bytes: 0,
        };
        let mut out = Output::default();
        put_reply(&mut out, &request, command, headers, outcome, 0);
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

    fn status(one: bool) -> Command {
        Command::Status { one, contexts: 3 }
    }

    fn extents(runs: &[(u64, bool)]) -> Vec<Extent> {
        let extent = |(len, hole): &(u64, bool)| Extent::allocation(*len, *hole, *hole);
        runs.iter().map(extent).collect()
    }

    #[test]
    fn golden_block_status() {
        let extents = extents(&[(0x200, false), (0x200, false), (0x1_0000_0000, true)]);
        let answer = |id, max| Outcome::Status(vec![(id, merge_extents(&extents, 0x1000, max))]);
        let head = b"\x66\x8e\x33\xef\0\x01\0\x05";
        let all = reply(CHUNKS, status(false), 0x1000, Ok(answer(1, 9)));
        let runs = b"\0\0\0\x14\0\0\0\x01\0\0\x04\0\0\0\0\0\0\0\x0c\0\0\0\0\x03";
        assert_eq!(all, [&head[..], COOKIE, runs].concat());
        let one = reply(CHUNKS, status(true), 0x1000, Ok(answer(9, 1)));
        let run = b"\0\0\0\x0c\0\0\0\x09\0\0\x04\0\0\0\0\0";
        assert_eq!(one, [&head[..], COOKIE, run].concat());
        let none = reply(
            CHUNKS,
            status(true),
            0x1000,
            Ok(Outcome::Status(vec![(1, vec![])])),
        );
        assert_eq!(none[..8], *b"\x66\x8e\x33\xef\0\x01\x80\x01");
    }

    #[test]
    fn golden_block_status_of_two_contexts_with_extended_headers() {
        let answers = Outcome::Status(vec![
            (1, extents(&[(0x1_0000_0000, true), (0x800, false)])),
            (2, extents(&[(0x1_0000_0800, false)])),
        ]);
        let all = reply(WIDE, status(false), 0x1_0000_0800, Ok(answers));
        let head = |flags| {
            [
                &b"\x6e\x8a\x27\x8c\0"[..],
                &[flags, 0, 6],
                COOKIE,
                b"\0\0\0\0\0\0\x10\0",
            ]
            .concat()
        };
        let expected = [
            &head(0)[..],
            b"\0\0\0\0\0\0\0\x28\0\0\0\x01\0\0\0\x02",
            b"\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\x03",
            b"\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\0\0",
            &head(1),
            b"\0\0\0\0\0\0\0\x18\0\0\0\x02\0\0\0\x01",
            b"\0\0\0\x01\0\0\x08\0\0\0\0\0\0\0\0\0",
        ];
        assert_eq!(all, expected.concat());
    }

    #[test]
    fn golden_extended_chunks() {
        let head = |flags, high, low| {
            let offset = b"\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0";
            [
                &b"\x6e\x8a\x27\x8c\0"[..],
                &[flags, high, low],
                COOKIE,
                offset,
            ]
            .concat()
        };
        let done = reply(WIDE, Command::Flush, 0, Ok(Outcome::Done));
        assert_eq!(done, [&head(1, 0, 0)[..], b"\0"].concat());
        let failed = reply(WIDE, Command::Flush, 0, Err(ExportError::io("bad")));
        let text = b"\x09\0\0\0\x05\0\x03bad";
        assert_eq!(failed, [&head(1, 0x80, 1)[..], text].concat());
        let read = reply(WIDE, READ, 8, Ok(parts()));
        let expected = [
            &head(0, 0, 1)[..],
            b"\x0c\0\0\0\0\0\0\x10\0abcd",
            &head(0, 0, 2),
            b"\x0c\0\0\0\0\0\0\x10\x04\0\0\0\x03",
            &head(1, 0, 1),
            b"\x09\0\0\0\0\0\0\x10\x07e",
        ];
        assert_eq!(read, expected.concat());
    }

    #[test]
    fn golden_error_with_its_place() {
        let head = b"\x66\x8e\x33\xef\0\x01\x80";
        let failed = reply(CHUNKS, READ, 8, Err(ExportError::io("bad").at(0x1007)));
        let place = b"\x02\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\x11\0\0\0\x05\0\x03bad\0\0\0\0\0\0\x10\x07";
        assert_eq!(failed, [&head[..], place].concat());
        for offset in [0xfff, 0x1008] {
            let failed = reply(CHUNKS, READ, 8, Err(ExportError::io("bad").at(offset)));
            assert_eq!(failed[7], 1, "a place outside of the request is not told");
        }
    }

    proptest! {
        #[test]
        fn merged_extents_are_never_empty_and_never_too_long(
            raw in proptest::collection::vec((1u64.., 0u32..4), 1..50), len_bytes in 1u64.., max in 1usize..60,
        ) {
            let extents: Vec<Extent> = raw.into_iter().map(|(len, flags)| Extent { len: (len >> 58) + 1, flags }).collect();
            let merged = merge_extents(&extents, len_bytes, max);
            let total: u64 = merged.iter().map(|extent| extent.len).sum();
            prop_assert!(!merged.is_empty() && merged.len() <= max);
            prop_assert!(merged.iter().all(|extent| extent.len > 0) && total <= len_bytes);
            prop_assert!(merged.windows(2).all(|pair| pair[0].flags != pair[1].flags));
        }
    }
}
