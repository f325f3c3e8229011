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
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write};
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
    state: PathBuf,
    epochs: HashMap<VolumeId, LeaseEpoch>,
}

impl LeaseFile {
    /// Reads the file of a state directory.
    ///
    /// # Errors
    /// [`LeaseFileError`].
    pub(crate) fn open(state: &Path) -> Result<Self, LeaseFileError> {
        let path = state.join("leases");
        let epochs = match fs::read_to_string(&path) {
            Ok(text) => parse(&path, &text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => HashMap::new(),
            Err(error) => return Err(failed("read", &path)(error)),
        };
        let state = state.to_owned();
        Ok(Self { state, epochs })
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
    pub(crate) fn save(&self) -> Result<(), LeaseFileError> {
        let (path, new) = (self.state.join("leases"), self.state.join("leases.new"));
        let body = self.body();
        let crc = crc32fast::hash(body.as_bytes());
        let mut file = File::create(&new).map_err(failed("create", &new))?;
        write!(file, "{MAGIC} {FORMAT} {crc:08x}\n{body}").map_err(failed("write", &new))?;
        file.sync_data().map_err(failed("sync", &new))?;
        fs::rename(&new, &path).map_err(failed("replace", &path))?;
        let directory = File::open(&self.state).map_err(failed("open", &self.state))?;
        directory.sync_all().map_err(failed("sync", &self.state))
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

    #[test]
    fn what_was_confirmed_is_read_back_and_never_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = LeaseFile::open(dir.path()).unwrap();
        assert!(file.epochs().is_empty());
        assert!(file.confirm(VolumeId(7), LeaseEpoch(5), |_| true));
        assert!(file.confirm(VolumeId(3), LeaseEpoch(1), |_| true));
        assert!(!file.confirm(VolumeId(7), LeaseEpoch(4), |_| true));
        file.save().unwrap();
        assert_eq!(LeaseFile::open(dir.path()).unwrap(), file);
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
