//! The lease epochs that this server has confirmed as an owner: `STATE/leases`.
//!
//! ```text
//! line 1   "blockd-leases" SP format version (decimal) SP CRC32 of the rest (8 hex digits) LF
//! rest     one line for each volume that ever was leased: volume id SP lease epoch LF, decimal
//! ```
//!
//! It is read before the first change is served. The registry's own file is not enough: after a
//! restart it may show an older state until the leader is heard. The file is replaced by writing
//! `leases.new`, fdatasync, rename, and fsync of the directory; no file means no lease.

use crate::id::{LeaseEpoch, VolumeId};
use crate::io::state_dir::StateDir;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

const MAGIC: &str = "blockd-leases";
const FORMAT: u32 = 1;

/// Why the file cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LeaseFileError {
    #[error("cannot {action} {path}: {source}")]
    Io {
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{path} is of format {found}, this blockd reads {FORMAT}: use a newer blockd")]
    Newer { path: PathBuf, found: u32 },
    #[error(
        "{path} is damaged ({reason}): restore it from a copy; without it this server may let a \
         fenced writer write"
    )]
    Damaged { path: PathBuf, reason: String },
}

/// The file and what is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LeaseFile {
    epochs: HashMap<VolumeId, LeaseEpoch>,
}

impl LeaseFile {
    /// Reads the file of a state directory.
    ///
    /// # Errors
    /// [`LeaseFileError`].
    pub(crate) fn open(state: &dyn StateDir) -> Result<Self, LeaseFileError> {
        let path = state.path().join("leases");
        let text = state.read("leases").map_err(failed("read", &path))?;
        let epochs = text.map_or(Ok(HashMap::new()), |text| parse(&path, &text))?;
        Ok(Self { epochs })
    }

    pub(crate) fn epochs(&self) -> &HashMap<VolumeId, LeaseEpoch> {
        &self.epochs
    }

    /// Notes what was confirmed of a volume, and forgets volumes that are gone. True if that is
    /// news to the file.
    pub(crate) fn confirm(
        &mut self,
        volume: VolumeId,
        epoch: LeaseEpoch,
        exists: impl Fn(VolumeId) -> bool,
    ) -> bool {
        let known = self.epochs.len();
        self.epochs.retain(|volume, _| exists(*volume));
        let gone = known - self.epochs.len();
        let newer = self
            .epochs
            .get(&volume)
            .is_none_or(|confirmed| *confirmed < epoch);
        if newer {
            self.epochs.insert(volume, epoch);
        }
        newer || gone > 0
    }

    /// Replaces the file; durable when it returns.
    ///
    /// # Errors
    /// [`LeaseFileError::Io`].
    pub(crate) fn save(&self, state: &dyn StateDir) -> Result<(), LeaseFileError> {
        let body = self.body();
        let crc = crc32fast::hash(body.as_bytes());
        let text = format!("{MAGIC} {FORMAT} {crc:08x}\n{body}");
        let path = state.path().join("leases");
        state
            .replace("leases", &text)
            .map_err(failed("write", &path))
    }

    fn body(&self) -> String {
        let mut lines: Vec<_> = self.epochs.iter().collect();
        lines.sort_unstable();
        lines
            .iter()
            .fold(String::new(), |mut body, (volume, epoch)| {
                let _ = writeln!(body, "{volume} {epoch}");
                body
            })
    }
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> LeaseFileError {
    let path = path.to_owned();
    move |source| LeaseFileError::Io {
        action,
        path,
        source,
    }
}

fn parse(path: &Path, text: &str) -> Result<HashMap<VolumeId, LeaseEpoch>, LeaseFileError> {
    let damaged = |reason: &str| LeaseFileError::Damaged {
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
        return Err(LeaseFileError::Newer { path, found });
    }
    if u32::from_str_radix(crc, 16) != Ok(crc32fast::hash(body.as_bytes())) {
        return Err(damaged("checksum mismatch"));
    }
    let lines = body.lines().map(|line| {
        let (volume, epoch) = line.split_once(' ')?;
        Some((
            VolumeId(volume.parse().ok()?),
            LeaseEpoch(epoch.parse().ok()?),
        ))
    });
    let epochs: Option<HashMap<_, _>> = lines.collect();
    epochs.ok_or_else(|| damaged("a line that is no volume and epoch"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::state_dir::Directory;

    #[test]
    fn what_was_confirmed_is_read_back_and_never_goes_back() {
        let temporary = tempfile::tempdir().unwrap();
        let dir = Directory(temporary.path().to_owned());
        let mut file = LeaseFile::open(&dir).unwrap();
        assert!(file.epochs().is_empty());
        assert!(file.confirm(VolumeId(7), LeaseEpoch(5), |_| true));
        assert!(file.confirm(VolumeId(3), LeaseEpoch(1), |_| true));
        assert!(!file.confirm(VolumeId(7), LeaseEpoch(4), |_| true));
        file.save(&dir).unwrap();
        assert_eq!(LeaseFile::open(&dir).unwrap(), file);
        assert_eq!(file.epochs()[&VolumeId(7)], LeaseEpoch(5));
        assert!(file.confirm(VolumeId(7), LeaseEpoch(6), |volume| volume != VolumeId(3)));
        assert_eq!(file.epochs().len(), 1);
    }

    /// The golden file of format 1: later versions must read it.
    #[test]
    fn format_1_is_read() {
        let text = "blockd-leases 1 331ed392\n3 1\n7 5\n";
        let epochs = parse(Path::new("leases"), text).unwrap();
        assert_eq!(epochs.len(), 2);
        assert_eq!(epochs[&VolumeId(7)], LeaseEpoch(5));
    }

    #[test]
    fn newer_and_damaged_files_are_refused_with_the_reason() {
        let parse = |text| parse(Path::new("leases"), text).unwrap_err();
        assert!(matches!(
            parse("blockd-leases 2 0\n"),
            LeaseFileError::Newer { found: 2, .. }
        ));
        let no_epoch = format!("blockd-leases 1 {:08x}\n3\n", crc32fast::hash(b"3\n"));
        for text in [
            "",
            "x",
            "blockd-leases 1 00000001\n",
            "other 1 0\n",
            &no_epoch,
        ] {
            let error = parse(text);
            assert!(matches!(error, LeaseFileError::Damaged { .. }), "{text}");
        }
    }
}
