//! What is mounted where, from `/proc/self/mountinfo`: never asks a filesystem, so it never hangs.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// One line of `/proc/self/mountinfo`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    pub dir: PathBuf,
    pub filesystem: String,
    pub source: String,
    /// Minor device number; of a FUSE mount, the number of its connection.
    pub minor: u32,
}

/// The topmost mount on exactly `dir`, if there is one.
///
/// # Errors
/// `/proc` cannot be read.
pub fn mounted_at(dir: &Path) -> io::Result<Option<MountEntry>> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    let lines = table.split(|byte| *byte == b'\n');
    Ok(lines.rev().filter_map(parse).find(|entry| entry.dir == dir))
}

/// `ID PARENT MAJOR:MINOR ROOT DIR OPTIONS [FIELDS] - FILESYSTEM SOURCE OPTIONS`
fn parse(line: &[u8]) -> Option<MountEntry> {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-")?;
    let device = std::str::from_utf8(fields.get(2)?).ok()?;
    Some(MountEntry {
        dir: PathBuf::from(OsString::from_vec(unescape(fields.get(4)?))),
        filesystem: String::from_utf8_lossy(fields.get(dash + 1)?).into_owned(),
        source: String::from_utf8_lossy(&unescape(fields.get(dash + 2)?)).into_owned(),
        minor: device.split_once(':')?.1.parse().ok()?,
    })
}

/// The kernel writes space, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).filter(|_| *first == b'\\');
        let code = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                out.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            None => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

/// `dir` without symbolic links, without touching the last component, which may be a dead mount.
///
/// # Errors
/// The parent directory does not exist.
pub fn absolute(dir: &Path) -> io::Result<PathBuf> {
    let dir = std::path::absolute(dir)?;
    match (dir.parent(), dir.file_name()) {
        (Some(parent), Some(name)) if !dir.as_os_str().as_bytes().ends_with(b"..") => {
            Ok(parent.canonicalize()?.join(name))
        }
        _ => dir.canonicalize(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_with_its_escapes() {
        let line =
            br"36 35 0:98 / /mnt/a\040b rw,noatime shared:1 - fuse.blockd blockd rw,user_id=0";
        let entry = parse(line).unwrap();
        assert_eq!(entry.dir, Path::new("/mnt/a b"));
        assert_eq!(
            (entry.filesystem.as_str(), entry.source.as_str()),
            ("fuse.blockd", "blockd")
        );
        assert_eq!(entry.minor, 98);
    }

    #[test]
    fn broken_lines_are_no_mounts() {
        for line in [
            "",
            "36 35",
            "36 35 0:98 / /mnt - ",
            "1 2 x / /mnt rw - a b c",
        ] {
            assert_eq!(parse(line.as_bytes()), None, "{line:?}");
        }
        assert_eq!(unescape(br"a\04"), br"a\04");
    }

    #[test]
    fn the_root_is_mounted_and_a_new_directory_is_not() {
        assert!(mounted_at(Path::new("/")).unwrap().is_some());
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(mounted_at(dir.path()).unwrap(), None);
    }

    #[test]
    fn a_directory_that_does_not_answer_is_not_touched() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap();
        assert_eq!(
            absolute(&dir.path().join("missing/")).unwrap(),
            real.join("missing")
        );
        assert!(absolute(&dir.path().join("a/b")).is_err());
    }
}
