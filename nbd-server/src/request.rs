//! Parser of requests and the rules of admission: pure functions over bytes.
//!
//! [`admit`] decides everything that can be decided without the data: what to execute, what to refuse with which number and text,
//! and how many payload bytes follow, so that a refusal never leaves the stream out of step.

use std::borrow::Cow;
use std::sync::Arc;

use crate::error::{ExportError, NbdErrno};
use crate::export::{ExportInfo, MetaContext, ZeroFlags};
use crate::limits;
use crate::wire::{self, command, flag};

/// A request as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    /// Bytes of the export that it is about; of BLOCK_STATUS with a payload only after [`narrow`].
    pub(crate) len_bytes: u64,
    /// Bytes of payload that follow it.
    pub(crate) payload_bytes: u64,
}

/// How requests and replies look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Headers {
    /// Requests of 28 bytes, simple replies.
    #[default]
    Simple,
    /// Requests of 28 bytes; what has data or a text is answered in chunks (STRUCTURED_REPLY).
    Structured,
    /// Requests of 32 bytes; everything is answered in chunks (EXTENDED_HEADERS).
    Extended,
}

impl Headers {
    /// Length of a request in bytes.
    pub(crate) fn request_bytes(self) -> usize {
        match self {
            Self::Simple | Self::Structured => wire::REQUEST_BYTES,
            Self::Extended => wire::EXTENDED_REQUEST_BYTES,
        }
    }

    /// Whether the client understands chunks.
    pub(crate) fn has_chunks(self) -> bool {
        self != Self::Simple
    }
}

/// What the handshake agreed on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Agreement {
    pub(crate) headers: Headers,
    /// The metadata contexts selected for this export, at most `limits::CONTEXTS_MAX`; the id of each is its index plus 1.
    pub(crate) contexts: Arc<[MetaContext]>,
}

impl Agreement {
    /// Every selected context, as in [`Command::Status`].
    fn all_contexts(&self) -> u64 {
        (0..self.contexts.len()).fold(0, |set, index| set | 1 << index)
    }
}

/// A checked request, ready to execute (with a payload: as soon as that is there).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Read {
        df: bool,
    },
    Write {
        fua: bool,
    },
    Flush,
    Trim {
        fua: bool,
    },
    Zero(ZeroFlags),
    Cache,
    /// The contexts whose bit is set: bit 0 is the first of the agreement.
    Status {
        one: bool,
        contexts: u64,
    },
    /// The payload says of which contexts and how many bytes; [`narrow`] makes it a `Status`.
    StatusOf {
        one: bool,
    },
    /// Nothing to do: a length of 0.
    Nothing,
}

/// What to do with a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Execute it.
    Run(Command),
    /// Drop its payload, then answer the error.
    Refuse(ExportError),
    /// The client says goodbye.
    Goodbye,
    /// The payload is too large to be skipped: close the connection.
    Hopeless,
}

/// The request in so many bytes as it has, or `None` when the magic is wrong (the stream is out of sync).
pub(crate) fn parse(bytes: &[u8], headers: Headers) -> Option<Request> {
    let (magic, rest) = wire::take_u32(bytes)?;
    let (flags, rest) = wire::take_u16(rest)?;
    let (kind, rest) = wire::take_u16(rest)?;
    let (cookie, rest) = wire::take_u64(rest)?;
    let (offset, rest) = wire::take_u64(rest)?;
    let (expected, has_flag, len_bytes) = match headers {
        Headers::Extended => {
            let has_flag = flags & flag::PAYLOAD_LEN != 0;
            let len_bytes = wire::take_u64(rest)?.0;
            (wire::EXTENDED_REQUEST_MAGIC, has_flag, len_bytes)
        }
        Headers::Simple | Headers::Structured => {
            let len_bytes = wire::take_u32(rest)?.0;
            (wire::REQUEST_MAGIC, false, u64::from(len_bytes))
        }
    };
    // QEMU 10 forgets the flag on writes and sends their payload all the same.
    let has_payload = has_flag || kind == command::WRITE;
    (magic == expected).then_some(Request {
        flags,
        kind,
        cookie,
        offset,
        len_bytes,
        payload_bytes: if has_payload { len_bytes } else { 0 },
    })
}

impl Request {
    fn has(&self, bit: u16) -> bool {
        self.flags & bit != 0
    }
}

/// Decides what to do with a request for an export of this size and mode.
pub(crate) fn admit(request: &Request, export: &ExportInfo, agreed: &Agreement) -> Verdict {
    if request.kind == command::DISC {
        return Verdict::Goodbye;
    }
    if request.payload_bytes > u64::from(limits::DRAIN_BYTES) {
        return Verdict::Hopeless;
    }
    match check(request, export, agreed) {
        Ok(command) => Verdict::Run(command),
        Err(error) => Verdict::Refuse(error),
    }
}

fn refusal(errno: NbdErrno, text: impl Into<Cow<'static, str>>) -> ExportError {
    ExportError::new(errno, text)
}

fn invalid(text: impl Into<Cow<'static, str>>) -> ExportError {
    refusal(NbdErrno::Inval, text)
}

fn check(
    request: &Request,
    export: &ExportInfo,
    agreed: &Agreement,
) -> Result<Command, ExportError> {
    let command = classify(request, agreed)?;
    check_flags(request, export, agreed)?;
    let writes = matches!(
        command,
        Command::Write { .. } | Command::Trim { .. } | Command::Zero(_)
    );
    if writes && export.read_only {
        return Err(refusal(NbdErrno::Perm, "the export is read-only"));
    }
    if matches!(command, Command::Flush | Command::StatusOf { .. }) {
        return Ok(command);
    }
    check_range(request, command, export)?;
    match (request.len_bytes, command) {
        (0, Command::Status { .. }) => Err(invalid("block status of 0 bytes")),
        (0, Command::Read { .. }) | (1.., _) => Ok(command),
        (0, _) => Ok(Command::Nothing),
    }
}

/// The command of a request type, if it may be used on this connection.
fn classify(request: &Request, agreed: &Agreement) -> Result<Command, ExportError> {
    let fua = request.has(flag::FUA);
    match request.kind {
        command::READ => Ok(Command::Read {
            df: request.has(flag::DF),
        }),
        command::WRITE => Ok(Command::Write { fua }),
        command::FLUSH => Ok(Command::Flush),
        command::TRIM => Ok(Command::Trim { fua }),
        command::CACHE => Ok(Command::Cache),
        command::WRITE_ZEROES => Ok(Command::Zero(ZeroFlags {
            no_hole: request.has(flag::NO_HOLE),
            fua,
            fast: request.has(flag::FAST_ZERO),
        })),
        command::BLOCK_STATUS => classify_status(request, agreed),
        kind => Err(invalid(format!("request type {kind} is unknown"))),
    }
}

fn classify_status(request: &Request, agreed: &Agreement) -> Result<Command, ExportError> {
    let one = request.has(flag::REQ_ONE);
    let most_bytes = 8 + 4 * agreed.contexts.len() as u64;
    if agreed.contexts.is_empty() {
        return Err(invalid(
            "block status without a negotiated metadata context",
        ));
    }
    if request.payload_bytes == 0 {
        let contexts = agreed.all_contexts();
        return Ok(Command::Status { one, contexts });
    }
    if !request.payload_bytes.is_multiple_of(4)
        || !(12..=most_bytes).contains(&request.payload_bytes)
    {
        return Err(invalid(format!(
            "the payload of a block status has 8 bytes and 4 for each context, here 12 to {most_bytes}"
        )));
    }
    Ok(Command::StatusOf { one })
}

/// FUA is legal everywhere; any other flag only where it means something and was advertised.
fn check_flags(
    request: &Request,
    export: &ExportInfo,
    agreed: &Agreement,
) -> Result<(), ExportError> {
    let payload = match agreed.headers {
        Headers::Extended => flag::PAYLOAD_LEN,
        Headers::Simple | Headers::Structured => 0,
    };
    let legal = match request.kind {
        command::READ if agreed.headers.has_chunks() => flag::DF,
        command::WRITE => payload,
        command::WRITE_ZEROES if export.fast_zero && !export.read_only => {
            flag::NO_HOLE | flag::FAST_ZERO
        }
        command::WRITE_ZEROES => flag::NO_HOLE,
        command::BLOCK_STATUS => flag::REQ_ONE | payload,
        _ => 0,
    };
    match request.flags & !(legal | flag::FUA) {
        0 => Ok(()),
        bad => Err(invalid(format!(
            "flags {bad:#x} are unknown or do not apply to this request"
        ))),
    }
}

/// Size and range; past the end is ENOSPC for what would need space and EINVAL for the rest.
fn check_range(
    request: &Request,
    command: Command,
    export: &ExportInfo,
) -> Result<(), ExportError> {
    let moves_data = matches!(command, Command::Read { .. } | Command::Write { .. });
    if moves_data && request.len_bytes > u64::from(limits::PAYLOAD_BYTES) {
        return Err(too_large(command));
    }
    let end = request.offset.checked_add(request.len_bytes);
    if end.is_some_and(|end| end <= export.size_bytes) {
        return Ok(());
    }
    let needs_space = matches!(command, Command::Write { .. } | Command::Zero(_));
    let errno = if needs_space {
        NbdErrno::NoSpc
    } else {
        NbdErrno::Inval
    };
    let text = format!(
        "the request runs past the end of the export ({} bytes)",
        export.size_bytes
    );
    Err(refusal(errno, text).at(export.size_bytes.max(request.offset)))
}

/// EOVERFLOW says that the same read in several chunks might do; here only smaller ones do.
fn too_large(command: Command) -> ExportError {
    let errno = match command {
        Command::Read { df: true } => NbdErrno::Overflow,
        _ => NbdErrno::Inval,
    };
    refusal(
        errno,
        format!("the request is larger than {} bytes", limits::PAYLOAD_BYTES),
    )
}

/// Reads the payload of a BLOCK_STATUS: the request with its length in the export, and the contexts it asks for.
pub(crate) fn narrow(
    request: &Request,
    one: bool,
    payload: &[u8],
    export: &ExportInfo,
    agreed: &Agreement,
) -> Result<(Request, Command), ExportError> {
    let (len_bytes, ids) =
        wire::take_u64(payload).ok_or_else(|| invalid("the payload is too short"))?;
    let mut contexts = 0u64;
    for id in ids.chunks_exact(4) {
        let id = wire::take_u32(id).map_or(0, |(id, _)| id);
        let index = id.wrapping_sub(1) as usize;
        let bit = agreed.contexts.get(index).map_or(0, |_| 1 << index);
        if bit == 0 || contexts & bit != 0 {
            return Err(invalid(format!(
                "context id {id} was not negotiated or appears twice"
            )));
        }
        contexts |= bit;
    }
    let request = Request {
        len_bytes,
        ..*request
    };
    let command = Command::Status { one, contexts };
    check_range(&request, command, export)?;
    match len_bytes {
        0 => Err(invalid("block status of 0 bytes")),
        _ => Ok((request, command)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 30;
    const BARE: Headers = Headers::Simple;
    const ALL: Headers = Headers::Structured;
    const WIDE: Headers = Headers::Extended;

    /// Two contexts where chunks are understood.
    fn agreed(headers: Headers) -> Agreement {
        let contexts = [MetaContext::Allocation, MetaContext::AllocationDepth];
        let count = if headers.has_chunks() { 2 } else { 0 };
        Agreement {
            headers,
            contexts: contexts[..count].into(),
        }
    }

    fn request(kind: u16, flags: u16, offset: u64, len_bytes: u32) -> Request {
        let len_bytes = u64::from(len_bytes);
        Request {
            flags,
            kind,
            cookie: 7,
            offset,
            len_bytes,
            payload_bytes: if kind == command::WRITE { len_bytes } else { 0 },
        }
    }

    fn judge(request: &Request, export: &ExportInfo, headers: Headers) -> Verdict {
        admit(request, export, &agreed(headers))
    }

    fn errno(request: Request, headers: Headers) -> Option<NbdErrno> {
        match judge(&request, &ExportInfo::new(SIZE), headers) {
            Verdict::Refuse(error) => Some(error.errno),
            Verdict::Run(_) => None,
            other => panic!("{request:?} gave {other:?}"),
        }
    }

    #[test]
    fn golden_request() {
        let bytes = *b"\x25\x60\x95\x13\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\x10\0\0\0\0\x02\0";
        let parsed = Request {
            flags: 1,
            kind: 1,
            cookie: 0x0102_0304_0506_0708,
            offset: 1 << 20,
            len_bytes: 512,
            payload_bytes: 512,
        };
        assert_eq!(parse(&bytes, ALL), Some(parsed));
        let mut wrong = bytes;
        wrong[0] ^= 1;
        assert_eq!(parse(&wrong, ALL), None);
        assert_eq!(parse(&bytes[..27], ALL), None);
    }

    #[test]
    fn golden_extended_request() {
        let bytes = *b"\x21\xe4\x1c\x71\0\x02\0\x06\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\x10\0\0\0\0\0\x01\0\0\x02\0";
        let parsed = Request {
            flags: 2,
            kind: 6,
            cookie: 0x0102_0304_0506_0708,
            offset: 1 << 20,
            len_bytes: 0x1_0000_0200,
            payload_bytes: 0,
        };
        assert_eq!(parse(&bytes, WIDE), Some(parsed));
        let mut with_payload = bytes;
        with_payload[5] |= 0x20;
        let with_payload = parse(&with_payload, WIDE).unwrap();
        assert_eq!(with_payload.payload_bytes, 0x1_0000_0200);
        assert_eq!(parse(&bytes, ALL), None, "the magic of other headers");
    }

    #[test]
    fn extended_requests_have_64_bit_lengths_and_say_what_has_a_payload() {
        let big = ExportInfo::new(1 << 50);
        let wide = |kind, flags, len_bytes, payload_bytes| Request {
            len_bytes,
            payload_bytes,
            ..request(kind, flags, 0, 0)
        };
        let run = |request: Request| judge(&request, &big, WIDE);
        for kind in [4, 5, 6, 7] {
            let verdict = run(wide(kind, 0, 1 << 40, 0));
            assert!(matches!(verdict, Verdict::Run(_)), "type {kind}");
        }
        let inval = |verdict: Verdict| matches!(verdict, Verdict::Refuse(error) if error.errno == NbdErrno::Inval);
        let payload = flag::PAYLOAD_LEN;
        assert!(matches!(run(wide(1, payload, 512, 512)), Verdict::Run(_)));
        let quirk = b"\x21\xe4\x1c\x71\0\0\0\x01cookie!!\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x02\0";
        let quirk = parse(quirk, WIDE).unwrap();
        assert!(quirk.payload_bytes == 512 && matches!(run(quirk), Verdict::Run(_)));
        assert!(inval(run(wide(0, 0, 1 << 40, 0))), "read of 1 TiB");
        for kind in [0, 3, 4, 5, 6, 8] {
            assert!(inval(run(wide(kind, payload, 512, 512))), "type {kind}");
        }
        assert_eq!(run(wide(1, payload, 1 << 40, 1 << 40)), Verdict::Hopeless);
        assert_eq!(run(wide(2, payload, 1 << 40, 1 << 40)), Verdict::Goodbye);
        let compact = wide(1, payload, 512, 512);
        assert!(
            inval(judge(&compact, &big, ALL)),
            "PAYLOAD_LEN unadvertised"
        );
        for (payload_bytes, fits) in [(8, false), (12, true), (14, false), (16, true), (20, false)]
        {
            let verdict = run(wide(7, payload, payload_bytes, payload_bytes));
            let runs = verdict == Verdict::Run(Command::StatusOf { one: false });
            assert!(runs == fits && (fits || inval(verdict)), "{payload_bytes}");
        }
    }

    #[test]
    fn a_block_status_payload_selects_contexts_and_its_length() {
        let export = ExportInfo::new(SIZE);
        let asked = request(7, flag::PAYLOAD_LEN, 4096, 12);
        let read = |len_bytes: u64, ids: &[u32]| {
            let ids = ids.iter().flat_map(|id| id.to_be_bytes());
            let payload: Vec<u8> = len_bytes.to_be_bytes().into_iter().chain(ids).collect();
            narrow(&asked, true, &payload, &export, &agreed(WIDE))
        };
        let second = Command::Status {
            one: true,
            contexts: 2,
        };
        let (narrowed, command) = read(8192, &[2]).unwrap();
        assert_eq!((narrowed.len_bytes, command), (8192, second));
        assert!(matches!(
            read(1, &[2, 1]),
            Ok((_, Command::Status { contexts: 3, .. }))
        ));
        let bad: [(u64, &[u32]); 7] = [
            (0, &[1]),
            (SIZE, &[1]),
            (u64::MAX, &[1]),
            (512, &[0]),
            (512, &[3]),
            (512, &[u32::MAX]),
            (512, &[1, 1]),
        ];
        for (len_bytes, ids) in bad {
            let error = read(len_bytes, ids).unwrap_err();
            assert_eq!(error.errno, NbdErrno::Inval, "{len_bytes} {ids:?}");
        }
    }

    #[test]
    fn an_error_of_the_range_tells_where_it_begins() {
        let told = |offset, len_bytes| match judge(
            &request(0, 0, offset, len_bytes),
            &ExportInfo::new(SIZE),
            ALL,
        ) {
            Verdict::Refuse(error) => error.offset,
            _ => None,
        };
        assert_eq!(told(SIZE - 512, 1024), Some(SIZE));
        assert_eq!(told(SIZE + 512, 1024), Some(SIZE + 512));
        assert_eq!(told(0, 512), None);
    }

    #[test]
    fn out_of_range_is_enospc_for_writes_and_einval_for_the_rest() {
        use NbdErrno::{Inval, NoSpc};
        let kinds = [
            (0, Inval),
            (1, NoSpc),
            (4, Inval),
            (5, Inval),
            (6, NoSpc),
            (7, Inval),
        ];
        for (kind, expected) in kinds {
            for offset in [SIZE, SIZE - 511, 1 << 63, u64::MAX - 511, u64::MAX] {
                assert_eq!(
                    errno(request(kind, 0, offset, 512), ALL),
                    Some(expected),
                    "type {kind} at {offset}"
                );
            }
            assert_eq!(
                errno(request(kind, 0, SIZE - 512, 512), ALL),
                None,
                "type {kind}, the last block"
            );
        }
    }

    #[test]
    fn flags_are_accepted_only_where_they_apply() {
        for kind in [0, 1, 3, 4, 5, 6, 7] {
            assert_eq!(
                errno(request(kind, flag::FUA, 0, 512), ALL),
                None,
                "FUA on type {kind}"
            );
            for bit in [1 << 4, 1 << 5, 1 << 15] {
                assert_eq!(
                    errno(request(kind, bit, 0, 512), ALL),
                    Some(NbdErrno::Inval),
                    "flag {bit} on type {kind}"
                );
            }
        }
        assert_eq!(errno(request(0, flag::DF, 0, 512), ALL), None);
        assert_eq!(
            errno(request(0, flag::DF, 0, 512), BARE),
            Some(NbdErrno::Inval)
        );
        assert_eq!(errno(request(6, flag::NO_HOLE, 0, 512), BARE), None);
        assert_eq!(
            errno(request(1, flag::NO_HOLE, 0, 512), ALL),
            Some(NbdErrno::Inval)
        );
        assert_eq!(errno(request(7, flag::REQ_ONE, 0, 512), ALL), None);
        assert_eq!(errno(request(7, 0, 0, 512), BARE), Some(NbdErrno::Inval));
        assert_eq!(errno(request(8, 0, 0, 512), ALL), Some(NbdErrno::Inval));
    }

    #[test]
    fn fast_zero_is_accepted_only_where_it_is_advertised() {
        let export = ExportInfo {
            fast_zero: true,
            ..ExportInfo::new(SIZE)
        };
        let verdict = judge(&request(6, flag::FAST_ZERO, 0, 512), &export, ALL);
        let fast = ZeroFlags {
            fast: true,
            ..ZeroFlags::default()
        };
        assert_eq!(verdict, Verdict::Run(Command::Zero(fast)));
        let verdict = judge(&request(1, flag::FAST_ZERO, 0, 512), &export, ALL);
        assert!(matches!(verdict, Verdict::Refuse(error) if error.errno == NbdErrno::Inval));
    }

    #[test]
    fn sizes_above_the_limit_are_refused_and_huge_payloads_end_the_connection() {
        let big = ExportInfo::new(1 << 40);
        for kind in [0, 1] {
            let fits = judge(&request(kind, 0, 0, limits::PAYLOAD_BYTES), &big, ALL);
            assert!(matches!(fits, Verdict::Run(_)));
            let above = judge(&request(kind, 0, 0, limits::PAYLOAD_BYTES + 1), &big, ALL);
            assert!(matches!(above, Verdict::Refuse(error) if error.errno == NbdErrno::Inval));
        }
        assert_eq!(
            judge(&request(1, 0, 0, u32::MAX), &big, ALL),
            Verdict::Hopeless
        );
        assert!(matches!(
            judge(&request(0, 0, 0, u32::MAX), &big, ALL),
            Verdict::Refuse(_)
        ));
        assert!(matches!(
            judge(&request(6, 0, 0, u32::MAX), &big, ALL),
            Verdict::Run(_)
        ));
    }

    #[test]
    fn read_only_refuses_what_writes_and_nothing_else() {
        let export = ExportInfo {
            read_only: true,
            ..ExportInfo::new(SIZE)
        };
        for kind in [1, 4, 6] {
            let verdict = judge(&request(kind, 0, 0, 512), &export, ALL);
            assert!(matches!(verdict, Verdict::Refuse(error) if error.errno == NbdErrno::Perm));
        }
        for kind in [0, 3, 5, 7] {
            assert!(matches!(
                judge(&request(kind, 0, 0, 512), &export, ALL),
                Verdict::Run(_)
            ));
        }
    }

    #[test]
    fn length_zero_is_nothing_to_do() {
        for kind in [1, 4, 5, 6] {
            let verdict = judge(&request(kind, 0, 0, 0), &ExportInfo::new(SIZE), ALL);
            assert_eq!(verdict, Verdict::Run(Command::Nothing), "type {kind}");
        }
        assert_eq!(errno(request(7, 0, 0, 0), ALL), Some(NbdErrno::Inval));
        assert_eq!(
            errno(request(0, 0, SIZE + 1, 0), ALL),
            Some(NbdErrno::Inval)
        );
    }

    proptest! {
        #[test]
        fn an_admitted_request_is_always_within_the_export(
            kind in 0u16..10, flags in 0u16..64, offset in any::<u64>(), len_bytes in any::<u32>(), size_bytes in any::<u64>(),
            read_only: bool, headers in prop_oneof![Just(BARE), Just(ALL), Just(WIDE)],
        ) {
            let export = ExportInfo { read_only, ..ExportInfo::new(size_bytes) };
            let asked = request(kind, flags, offset, len_bytes);
            if let Verdict::Run(command) = judge(&asked, &export, headers) {
                let end = offset.checked_add(u64::from(len_bytes));
                prop_assert!(command == Command::Flush || end.is_some_and(|end| end <= size_bytes));
                let moves_data = matches!(command, Command::Read { .. } | Command::Write { .. });
                prop_assert!(!moves_data || len_bytes <= limits::PAYLOAD_BYTES);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in any::<[u8; 32]>(), payload in proptest::collection::vec(any::<u8>(), 0..40)) {
            for headers in [ALL, WIDE] {
                if let Some(request) = parse(&bytes, headers) {
                    judge(&request, &ExportInfo::new(SIZE), headers);
                }
            }
            let asked = request(7, 0, 0, 0);
            let _ = narrow(&asked, false, &payload, &ExportInfo::new(SIZE), &agreed(WIDE));
        }
    }
}
