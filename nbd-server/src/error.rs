//! Errors as a client may see them: only the error numbers that NBD allows, each with a text for humans.

use std::borrow::Cow;

use thiserror::Error;

/// The error numbers that may appear in a reply (NBD protocol, "Error values"); any other number on the wire is a bug.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum NbdErrno {
    /// The export is read-only or the client may not do this.
    Perm = 1,
    /// The data could not be read or written.
    Io = 5,
    /// The server is out of memory; prefer waiting to answering this.
    NoMem = 12,
    /// The request is malformed or out of range.
    Inval = 22,
    /// No space left, or a write past the end of the export.
    NoSpc = 28,
    /// The reply would not fit (only for READ with DF).
    Overflow = 75,
    /// Not supported (only for WRITE_ZEROES with FAST_ZERO).
    NotSup = 95,
    /// The server is going down. The library never answers this by itself: nbd.ko and QEMU make an IO error of it (see `Shutdown`).
    Shutdown = 108,
}

impl NbdErrno {
    /// The number on the wire.
    pub const fn code(self) -> u32 {
        self as u32
    }
}

/// Why one request failed: the number for the program and the text for the human (sent in structured error replies).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message} ({errno:?})")]
pub struct ExportError {
    /// Number for the reply.
    pub errno: NbdErrno,
    /// UTF-8 text for the reply; cut to `limits::ERROR_TEXT_BYTES` on the wire.
    pub message: Cow<'static, str>,
    /// Where in the export it happened, if that is known; within the range of the request.
    pub offset: Option<u64>,
}

impl ExportError {
    /// An error with its text.
    pub fn new(errno: NbdErrno, message: impl Into<Cow<'static, str>>) -> Self {
        Self {
            errno,
            message: message.into(),
            offset: None,
        }
    }

    /// The same error, known to be at this offset.
    pub fn at(self, offset: u64) -> Self {
        Self {
            offset: Some(offset),
            ..self
        }
    }

    /// `Io` with its text.
    pub fn io(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(NbdErrno::Io, message)
    }
}

impl From<std::io::Error> for ExportError {
    fn from(error: std::io::Error) -> Self {
        let errno = match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES | libc::EROFS) => NbdErrno::Perm,
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => NbdErrno::NoSpc,
            Some(libc::EINVAL) => NbdErrno::Inval,
            _ => NbdErrno::Io,
        };
        Self::new(errno, error.to_string())
    }
}

/// Why an export was not opened; the text goes to the client.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum OpenError {
    /// There is no export of this name.
    #[error("{0}")]
    Unknown(Cow<'static, str>),
    /// The export exists but this client may not have it (now).
    #[error("{0}")]
    Policy(Cow<'static, str>),
    /// The server is draining and opens nothing new.
    #[error("{0}")]
    Shutdown(Cow<'static, str>),
}
