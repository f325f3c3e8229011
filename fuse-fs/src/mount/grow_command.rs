//! `grow`: asks a mount to let its filesystem fill the volume, over an ioctl of its directory.

use crate::error::FuseFsError;
use indicatif::HumanBytes;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::ioctl::{Getter, ioctl, opcode};
use serde::{Deserialize, Serialize};
use std::io::{self, Write as _};
use std::path::Path;

/// Bytes of an answer: JSON, and zeros behind it.
pub(super) const ANSWER_BYTES: usize = 1024;
/// The ioctl `_IOR('B', 1, char[1024])`.
pub(super) const GROW: u32 = opcode::read::<[u8; ANSWER_BYTES]>(b'B', 1) as u32;

const NOT_OURS: &str = "no directory on which `fuse-fs mount` has mounted its own ext4; with --kernel use \
    resize2fs on the loop device";

/// What a mount answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Answer {
    Grown {
        bytes_before: u64,
        bytes: u64,
        volume_bytes: u64,
    },
    Refused {
        reason: String,
    },
}

impl Answer {
    /// What the ioctl gives back.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = serde_json::to_vec(self).unwrap_or_default();
        bytes.resize(ANSWER_BYTES, 0);
        bytes
    }

    fn parse(bytes: &[u8]) -> io::Result<Self> {
        let end = bytes.iter().position(|byte| *byte == 0);
        let text = &bytes[..end.unwrap_or(bytes.len())];
        serde_json::from_slice(text).map_err(io::Error::other)
    }
}

/// Lets the filesystem mounted on `dir` fill its volume, and prints how large it is.
///
/// # Errors
/// [`FuseFsError::Grow`] if it cannot, or none of ours is there.
pub fn run(dir: &Path, json: bool) -> Result<(), FuseFsError> {
    let failed = |reason: String| FuseFsError::Grow {
        dir: dir.to_owned(),
        reason,
    };
    let bytes = match ask(dir) {
        Ok(bytes) => bytes,
        Err(Errno::NOTTY | Errno::NOSYS | Errno::OPNOTSUPP) => {
            return Err(failed(NOT_OURS.to_owned()));
        }
        Err(error) => return Err(failed(io::Error::from(error).to_string())),
    };
    let answer = Answer::parse(&bytes).map_err(|error| failed(error.to_string()))?;
    if let Answer::Refused { reason } = answer {
        return Err(failed(reason));
    }
    let text = match json {
        true => serde_json::to_string(&answer).unwrap_or_default(),
        false => sentence(&answer),
    };
    let printed = writeln!(io::stdout(), "{text}");
    printed.map_err(|error| failed(error.to_string()))
}

fn ask(dir: &Path) -> Result<[u8; ANSWER_BYTES], Errno> {
    let opened = rustix::fs::open(
        dir,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    // SAFETY: the opcode tells the kernel the size of what it fills, and any bytes are a value of it.
    unsafe {
        ioctl(
            opened,
            Getter::<{ GROW as rustix::ioctl::Opcode }, [u8; ANSWER_BYTES]>::new(),
        )
    }
}

fn sentence(answer: &Answer) -> String {
    match answer {
        Answer::Grown {
            bytes_before,
            bytes,
            volume_bytes,
        } if bytes == bytes_before => {
            let (size, volume) = (HumanBytes(*bytes), HumanBytes(*volume_bytes));
            format!("the filesystem has {size} already; the volume has {volume}")
        }
        Answer::Grown {
            bytes_before,
            bytes,
            volume_bytes,
        } => format!(
            "the filesystem has grown from {} to {}; the volume has {}",
            HumanBytes(*bytes_before),
            HumanBytes(*bytes),
            HumanBytes(*volume_bytes)
        ),
        Answer::Refused { reason } => reason.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_comes_back_from_its_bytes() {
        let grown = Answer::Grown {
            bytes_before: 1 << 30,
            bytes: 2 << 30,
            volume_bytes: 2 << 30,
        };
        assert_eq!(grown.bytes().len(), ANSWER_BYTES);
        assert_eq!(Answer::parse(&grown.bytes()).unwrap(), grown);
        assert_eq!(
            sentence(&grown),
            "the filesystem has grown from 1.00 GiB to 2.00 GiB; the volume has 2.00 GiB"
        );
        assert!(Answer::parse(&[0; ANSWER_BYTES]).is_err());
    }
}
