//! Pages whose ownership this server may be handing over: `STATE/handover`.
//!
//! ```text
//! line 1   "blockd-handover" SP format version (decimal) SP CRC32 of the rest (8 hex digits) LF
//! rest     one line for each volume: volume id SP first page SP number of pages LF, decimal
//! ```
//!
//! It is written before a batch begins to move, and read before the first request is served: after
//! a restart this server's copy of the registry may be older than the hand-over, so nothing of these
//! pages is answered before a majority has said whose they are. No file means no page.

use crate::id::VolumeId;
use crate::io::state_dir::StateDir;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

const NAME: &str = "handover";
const MAGIC: &str = "blockd-handover";
const FORMAT: u32 = 1;

/// Why the file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum HandoverFileError {
    #[error("cannot {action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is of format {found}, this blockd reads {FORMAT}: use a newer blockd")]
    Newer { path: PathBuf, found: u32 },
    #[error(
        "{path} is damaged ({reason}): remove it once `blockctl move list` shows no move away from \
         this server"
    )]
    Damaged { path: PathBuf, reason: String },
}

/// Reads the file of a state directory.
///
/// # Errors
/// [`HandoverFileError`].
pub(crate) fn read(
    state: &dyn StateDir,
) -> Result<BTreeMap<VolumeId, Range<u32>>, HandoverFileError> {
    let path = state.path().join(NAME);
    let text = state.read(NAME).map_err(|source| HandoverFileError::Io {
        action: "read",
        path: path.clone(),
        source,
    })?;
    text.map_or(Ok(BTreeMap::new()), |text| parse(&path, &text))
}

/// Replaces the file; durable when it returns.
///
/// # Errors
/// [`HandoverFileError::Io`].
pub(crate) fn write(
    state: &dyn StateDir,
    pages: &BTreeMap<VolumeId, Range<u32>>,
) -> Result<(), HandoverFileError> {
    let body = pages
        .iter()
        .fold(String::new(), |mut body, (volume, pages)| {
            let _ = writeln!(body, "{volume} {} {}", pages.start, pages.len());
            body
        });
    let crc = crc32fast::hash(body.as_bytes());
    let text = format!("{MAGIC} {FORMAT} {crc:08x}\n{body}");
    state
        .replace(NAME, &text)
        .map_err(|source| HandoverFileError::Io {
            action: "write",
            path: state.path().join(NAME),
            source,
        })
}

fn parse(path: &Path, text: &str) -> Result<BTreeMap<VolumeId, Range<u32>>, HandoverFileError> {
    let damaged = |reason: &str| HandoverFileError::Damaged {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    let (head, body) = text.split_once('\n').ok_or_else(|| damaged("no header"))?;
    let fields: Vec<&str> = head.split(' ').collect();
    let [MAGIC, format, crc] = fields[..] else {
        return Err(damaged("no header"));
    };
    let found: u32 = format.parse().map_err(|_| damaged("no format version"))?;
    if found > FORMAT {
        let path = path.to_owned();
        return Err(HandoverFileError::Newer { path, found });
    }
    if u32::from_str_radix(crc, 16) != Ok(crc32fast::hash(body.as_bytes())) {
        return Err(damaged("checksum mismatch"));
    }
    let line = |line: &str| {
        let mut numbers = line.split(' ').map(str::parse::<u64>);
        let mut next = || numbers.next()?.ok();
        let (volume, first, count) = (next()?, next()?, next()?);
        let (first, end) = (
            u32::try_from(first).ok()?,
            u32::try_from(first + count).ok()?,
        );
        Some((VolumeId(volume), first..end))
    };
    let pages: Option<BTreeMap<_, _>> = body.lines().map(line).collect();
    pages.ok_or_else(|| damaged("a line that is no range of pages"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::state_dir::Directory;

    #[test]
    fn what_is_handed_over_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let state = Directory(dir.path().to_owned());
        assert!(read(&state).unwrap().is_empty());
        let pages = BTreeMap::from([(VolumeId(3), 4..9), (VolumeId(7), 0..1)]);
        write(&state, &pages).unwrap();
        assert_eq!(read(&state).unwrap(), pages);
    }

    /// The golden file of format 1: later versions must read it.
    #[test]
    fn format_1_is_read_and_others_are_refused() {
        let parse = |text| parse(Path::new("handover"), text);
        let crc = crc32fast::hash(b"3 4 5\n");
        assert_eq!(crc, 0xf70d_f91a);
        let pages = parse("blockd-handover 1 f70df91a\n3 4 5\n").unwrap();
        assert_eq!(pages[&VolumeId(3)], 4..9);
        assert!(matches!(
            parse("blockd-handover 2 0\n"),
            Err(HandoverFileError::Newer { found: 2, .. })
        ));
        for text in [
            "",
            "x",
            "blockd-handover 1 00000001\n3 4 5\n",
            "other 1 0\n",
        ] {
            let error = parse(text).unwrap_err();
            assert!(matches!(error, HandoverFileError::Damaged { .. }), "{text}");
        }
    }
}
