//! Text files with a header that vouches for the rest: facts, exports and plans.
//!
//! ```text
//! line 1   MAGIC SP format version (decimal) SP CRC32 of the rest (8 hex digits) LF
//! rest     the body
//! ```

use std::io;
use std::path::{Path, PathBuf};

/// A kind of file.
pub(crate) struct TextFormat {
    pub(crate) magic: &'static str,
    pub(crate) format: u32,
}

/// Why a file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    #[error("cannot {action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is of format {found}, this blockd reads {format}: use a newer blockd")]
    Newer {
        path: PathBuf,
        found: u32,
        format: u32,
    },
    #[error("{path} is damaged or no {magic} file ({reason})")]
    Damaged {
        path: PathBuf,
        magic: &'static str,
        reason: String,
    },
}

impl TextFormat {
    /// Header and body.
    pub(crate) fn encode(&self, body: &str) -> String {
        let crc = crc32fast::hash(body.as_bytes());
        format!("{} {} {crc:08x}\n{body}", self.magic, self.format)
    }

    /// The body of a text.
    pub(crate) fn decode<'a>(&self, path: &Path, text: &'a str) -> Result<&'a str, TextError> {
        let damaged = |reason: &str| self.damaged(path, reason);
        let (head, body) = text.split_once('\n').ok_or_else(|| damaged("no header"))?;
        let fields: Vec<&str> = head.split(' ').collect();
        let [magic, format, crc] = fields[..] else {
            return Err(damaged("no header"));
        };
        if magic != self.magic {
            return Err(damaged("no header"));
        }
        let found: u32 = format.parse().map_err(|_| damaged("no format version"))?;
        if found > self.format {
            return Err(TextError::Newer {
                path: path.to_owned(),
                found,
                format: self.format,
            });
        }
        if u32::from_str_radix(crc, 16) != Ok(crc32fast::hash(body.as_bytes())) {
            return Err(damaged("checksum mismatch"));
        }
        Ok(body)
    }

    pub(crate) fn damaged(&self, path: &Path, reason: &str) -> TextError {
        TextError::Damaged {
            path: path.to_owned(),
            magic: self.magic,
            reason: reason.to_owned(),
        }
    }
}

/// An error of the file system about a file.
pub(crate) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> TextError {
    let path = path.to_owned();
    move |source| TextError::Io {
        action,
        path,
        source,
    }
}
