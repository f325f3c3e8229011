//! Parser of requests and the rules of admission: pure functions over bytes.
//!
//! [`admit`] decides everything that can be decided without the data: what to execute, what to refuse with which number and text,
//! and how many payload bytes follow, so that a refusal never leaves the stream out of step.

use std::borrow::Cow;

use crate::error::{ExportError, NbdErrno};
use crate::export::{ExportInfo, ZeroFlags};
use crate::limits;
use crate::wire::{self, command, flag};

/// A request as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    pub(crate) flags: u16,
    pub(crate) kind: u16,
    pub(crate) cookie: u64,
    pub(crate) offset: u64,
    pub(crate) len_bytes: u32,
}

/// What the handshake agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Agreement {
    /// Structured replies.
    pub(crate) structured: bool,
    /// base:allocation is selected for this export.
    pub(crate) allocation: bool,
}

/// A checked request, ready to execute (WRITE: as soon as its payload is there).
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
    Status {
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

/// The request, or `None` when the magic is wrong (the stream is out of sync).
pub(crate) fn parse(bytes: &[u8; wire::REQUEST_BYTES]) -> Option<Request> {
    let (magic, rest) = wire::take_u32(bytes)?;
    let (flags, rest) = wire::take_u16(rest)?;
    let (kind, rest) = wire::take_u16(rest)?;
    let (cookie, rest) = wire::take_u64(rest)?;
    let (offset, rest) = wire::take_u64(rest)?;
    let (len_bytes, _) = wire::take_u32(rest)?;
    (magic == wire::REQUEST_MAGIC).then_some(Request {
        flags,
        kind,
        cookie,
        offset,
        len_bytes,
    })
}

impl Request {
    /// Bytes of payload that follow the request.
    pub(crate) fn payload_bytes(&self) -> u32 {
        if self.kind == command::WRITE {
            self.len_bytes
        } else {
            0
        }
    }

    fn has(&self, bit: u16) -> bool {
        self.flags & bit != 0
    }
}

/// Decides what to do with a request for an export of this size and mode.
pub(crate) fn admit(request: &Request, export: &ExportInfo, agreed: Agreement) -> Verdict {
    if request.payload_bytes() > limits::DRAIN_BYTES {
        return Verdict::Hopeless;
    }
    if request.kind == command::DISC {
        return Verdict::Goodbye;
    }
    match check(request, export, agreed) {
        Ok(command) => Verdict::Run(command),
        Err(error) => Verdict::Refuse(error),
    }
}

fn refusal(errno: NbdErrno, text: impl Into<Cow<'static, str>>) -> ExportError {
    ExportError::new(errno, text)
}

fn check(
    request: &Request,
    export: &ExportInfo,
    agreed: Agreement,
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
    if matches!(command, Command::Flush) {
        return Ok(command);
    }
    check_range(request, command, export)?;
    match (request.len_bytes, command) {
        (0, Command::Status { .. }) => Err(refusal(NbdErrno::Inval, "block status of 0 bytes")),
        (0, Command::Read { .. }) | (1.., _) => Ok(command),
        (0, _) => Ok(Command::Nothing),
    }
}

/// The command of a request type, if it may be used on this connection.
fn classify(request: &Request, agreed: Agreement) -> Result<Command, ExportError> {
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
        command::BLOCK_STATUS if agreed.allocation => Ok(Command::Status {
            one: request.has(flag::REQ_ONE),
        }),
        command::BLOCK_STATUS => Err(refusal(
            NbdErrno::Inval,
            "block status without a negotiated metadata context",
        )),
        kind => Err(refusal(
            NbdErrno::Inval,
            format!("request type {kind} is unknown"),
        )),
    }
}

/// FUA is legal everywhere; any other flag only where it means something and was advertised.
fn check_flags(
    request: &Request,
    export: &ExportInfo,
    agreed: Agreement,
) -> Result<(), ExportError> {
    let legal = match request.kind {
        command::READ if agreed.structured => flag::DF,
        command::WRITE_ZEROES if export.fast_zero && !export.read_only => {
            flag::NO_HOLE | flag::FAST_ZERO
        }
        command::WRITE_ZEROES => flag::NO_HOLE,
        command::BLOCK_STATUS => flag::REQ_ONE,
        _ => 0,
    };
    match request.flags & !(legal | flag::FUA) {
        0 => Ok(()),
        bad => Err(refusal(
            NbdErrno::Inval,
            format!("flags {bad:#x} are unknown or do not apply to this request"),
        )),
    }
}

/// Size and range; past the end is ENOSPC for what would need space and EINVAL for the rest.
fn check_range(
    request: &Request,
    command: Command,
    export: &ExportInfo,
) -> Result<(), ExportError> {
    let moves_data = matches!(command, Command::Read { .. } | Command::Write { .. });
    if moves_data && request.len_bytes > limits::PAYLOAD_BYTES {
        return Err(refusal(
            NbdErrno::Inval,
            format!("the request is larger than {} bytes", limits::PAYLOAD_BYTES),
        ));
    }
    let end = request.offset.checked_add(u64::from(request.len_bytes));
    if end.is_some_and(|end| end <= export.size_bytes) {
        return Ok(());
    }
    let needs_space = matches!(command, Command::Write { .. } | Command::Zero(_));
    let errno = if needs_space {
        NbdErrno::NoSpc
    } else {
        NbdErrno::Inval
    };
    Err(refusal(
        errno,
        format!(
            "the request runs past the end of the export ({} bytes)",
            export.size_bytes
        ),
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 30;
    const ALL: Agreement = Agreement {
        structured: true,
        allocation: true,
    };
    const BARE: Agreement = Agreement {
        structured: false,
        allocation: false,
    };

    fn request(kind: u16, flags: u16, offset: u64, len_bytes: u32) -> Request {
        Request {
            flags,
            kind,
            cookie: 7,
            offset,
            len_bytes,
        }
    }

    fn errno(request: Request, agreed: Agreement) -> Option<NbdErrno> {
        match admit(&request, &ExportInfo::new(SIZE), agreed) {
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
        };
        assert_eq!(parse(&bytes), Some(parsed));
        let mut wrong = bytes;
        wrong[0] ^= 1;
        assert_eq!(parse(&wrong), None);
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
        let verdict = admit(&request(6, flag::FAST_ZERO, 0, 512), &export, ALL);
        let fast = ZeroFlags {
            fast: true,
            ..ZeroFlags::default()
        };
        assert_eq!(verdict, Verdict::Run(Command::Zero(fast)));
        let verdict = admit(&request(1, flag::FAST_ZERO, 0, 512), &export, ALL);
        assert!(matches!(verdict, Verdict::Refuse(error) if error.errno == NbdErrno::Inval));
    }

    #[test]
    fn sizes_above_the_limit_are_refused_and_huge_payloads_end_the_connection() {
        let big = ExportInfo::new(1 << 40);
        for kind in [0, 1] {
            let fits = admit(&request(kind, 0, 0, limits::PAYLOAD_BYTES), &big, ALL);
            assert!(matches!(fits, Verdict::Run(_)));
            let above = admit(&request(kind, 0, 0, limits::PAYLOAD_BYTES + 1), &big, ALL);
            assert!(matches!(above, Verdict::Refuse(error) if error.errno == NbdErrno::Inval));
        }
        assert_eq!(
            admit(&request(1, 0, 0, u32::MAX), &big, ALL),
            Verdict::Hopeless
        );
        assert!(matches!(
            admit(&request(0, 0, 0, u32::MAX), &big, ALL),
            Verdict::Refuse(_)
        ));
        assert!(matches!(
            admit(&request(6, 0, 0, u32::MAX), &big, ALL),
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
            let verdict = admit(&request(kind, 0, 0, 512), &export, ALL);
            assert!(matches!(verdict, Verdict::Refuse(error) if error.errno == NbdErrno::Perm));
        }
        for kind in [0, 3, 5, 7] {
            assert!(matches!(
                admit(&request(kind, 0, 0, 512), &export, ALL),
                Verdict::Run(_)
            ));
        }
    }

    #[test]
    fn length_zero_is_nothing_to_do() {
        for kind in [1, 4, 5, 6] {
            let verdict = admit(&request(kind, 0, 0, 0), &ExportInfo::new(SIZE), ALL);
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
            structured: bool, allocation: bool, read_only: bool,
        ) {
            let export = ExportInfo { read_only, ..ExportInfo::new(size_bytes) };
            let asked = request(kind, flags, offset, len_bytes);
            if let Verdict::Run(command) = admit(&asked, &export, Agreement { structured, allocation }) {
                let end = offset.checked_add(u64::from(len_bytes));
                prop_assert!(command == Command::Flush || end.is_some_and(|end| end <= size_bytes));
                let moves_data = matches!(command, Command::Read { .. } | Command::Write { .. });
                prop_assert!(!moves_data || len_bytes <= limits::PAYLOAD_BYTES);
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in any::<[u8; 28]>()) {
            if let Some(request) = parse(&bytes) {
                admit(&request, &ExportInfo::new(SIZE), ALL);
            }
        }
    }
}
