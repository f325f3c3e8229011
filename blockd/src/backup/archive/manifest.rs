//! The manifest of an archived snapshot: what it is, what it rests on, and its parts.
//!
//! ```text
//! offset  bytes
//!      0      8  "BLKDARCH"
//!      8      4  version, 1, little-endian
//!     12      4  CRC32 of the body, little-endian
//!     16      8  bytes of the body, little-endian
//!     24         body: [`Manifest`] in postcard
//! ```

use crate::id::{SnapshotId, VolumeId};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use std::fmt::Write as _;
use std::ops::Range;

const MAGIC: &[u8; 8] = b"BLKDARCH";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 24;

/// Why bytes are no manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("it does not begin as one")]
    Magic,
    #[error("it is of version {0}, which this version of blockctl cannot read")]
    Version(u32),
    #[error("it is cut off or has more than it should")]
    Length,
    #[error("its checksum is wrong")]
    Checksum,
    #[error("it contradicts itself")]
    Content,
}

/// A part of an archived snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The bytes of the volume from here to `end` are those of the snapshot it rests on, but for what
    /// the part has.
    pub start: u64,
    pub end: u64,
    /// Bytes of the object.
    pub len_bytes: u64,
    pub sha256: [u8; 32],
}

impl Part {
    pub(super) fn of(range: Range<u64>, object: &Bytes) -> Self {
        Self {
            start: range.start,
            end: range.end,
            len_bytes: object.len() as u64,
            sha256: sha256(object),
        }
    }

    /// Where it lies below the archive.
    pub(super) fn path(&self, dir: &str) -> String {
        let Self { start, end, .. } = self;
        let mut path = format!("{dir}/{start:016x}-{end:016x}-");
        for byte in self.sha256 {
            let _ = write!(path, "{byte:02x}");
        }
        path
    }

    /// From the last component of a path; `None` for what no archive wrote.
    pub(super) fn parse(name: &str, len_bytes: u64) -> Option<Self> {
        let mut fields = name.split('-');
        let mut number = || u64::from_str_radix(fields.next()?, 16).ok();
        let (start, end) = (number()?, number()?);
        let digits = fields.next()?;
        let mut sha256 = [0; 32];
        if digits.len() != 64 || !digits.is_ascii() || fields.next().is_some() || start >= end {
            return None;
        }
        for (at, byte) in sha256.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).ok()?;
        }
        Some(Self {
            start,
            end,
            len_bytes,
            sha256,
        })
    }
}

/// SHA-256 of an object.
pub(super) fn sha256(object: &[u8]) -> [u8; 32] {
    let digest = ring::digest::digest(&ring::digest::SHA256, object);
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest.as_ref());
    bytes
}

/// An archived snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Unique id of the cluster, and id and name of the volume there.
    pub cluster: String,
    pub volume_id: VolumeId,
    pub volume: String,
    pub snapshot: String,
    pub snapshot_id: SnapshotId,
    /// The archived snapshot on which this one rests; `None`: on nothing.
    pub from: Option<(SnapshotId, String)>,
    pub size_bytes: u64,
    pub page_blocks: u32,
    /// Filesystem that was made on the volume, if known.
    pub format: Option<String>,
    pub created_unix_ms: u64,
    /// In order, without overlap.
    pub parts: Vec<Part>,
}

impl Manifest {
    /// Bytes of all parts.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.len_bytes).sum()
    }

    /// The directory of its parts below the archive.
    pub(super) fn dir(&self) -> String {
        let from = self.from.as_ref();
        let from = from.map_or_else(|| "full".to_owned(), |(id, _)| id.to_string());
        let Self {
            cluster,
            volume_id,
            snapshot_id,
            ..
        } = self;
        format!("data/{cluster}-{volume_id}/{snapshot_id}-{from}")
    }

    pub(super) fn encode(&self) -> Result<Bytes, postcard::Error> {
        let body = postcard::to_allocvec(self)?;
        let mut out = MAGIC.to_vec();
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&crc32fast::hash(&body).to_le_bytes());
        out.extend_from_slice(&(body.len() as u64).to_le_bytes());
        out.extend_from_slice(&body);
        Ok(Bytes::from(out))
    }

    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let number = |at: usize| {
            let field = bytes
                .get(at..at + 4)
                .and_then(|field| field.try_into().ok());
            field.map(u32::from_le_bytes).ok_or(ManifestError::Length)
        };
        if bytes.get(..8) != Some(MAGIC) {
            return Err(ManifestError::Magic);
        }
        if number(8)? != VERSION {
            return Err(ManifestError::Version(number(8)?));
        }
        let body = bytes.get(HEAD_BYTES..).ok_or(ManifestError::Length)?;
        let len = u64::from(number(16)?) | u64::from(number(20)?) << 32;
        if len != body.len() as u64 {
            return Err(ManifestError::Length);
        }
        if crc32fast::hash(body) != number(12)? {
            return Err(ManifestError::Checksum);
        }
        let manifest: Self = postcard::from_bytes(body).map_err(|_| ManifestError::Content)?;
        match manifest.is_sound() {
            true => Ok(manifest),
            false => Err(ManifestError::Content),
        }
    }

    fn is_sound(&self) -> bool {
        let mut at = 0;
        let in_order = self.parts.iter().all(|part| {
            let follows = at <= part.start && part.start < part.end;
            at = part.end;
            follows
        });
        let older = |from: &(SnapshotId, String)| from.0 < self.snapshot_id;
        in_order && at <= self.size_bytes && self.from.as_ref().is_none_or(older)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest() -> Manifest {
        let part = |range| Part::of(range, &Bytes::from_static(b"part"));
        Manifest {
            cluster: "00000000000000000000000000c0ffee".to_owned(),
            volume_id: VolumeId(7),
            volume: "data".to_owned(),
            snapshot: "tuesday".to_owned(),
            snapshot_id: SnapshotId(3),
            from: Some((SnapshotId(2), "monday".to_owned())),
            size_bytes: 1 << 30,
            page_blocks: 8192,
            format: Some("ext4".to_owned()),
            created_unix_ms: 1_795_266_661_999,
            parts: vec![part(0..4096), part(8192..1 << 30)],
        }
    }

    /// Later versions must read the golden file.
    #[test]
    fn the_format_is_the_golden_file() {
        let golden = include_bytes!("../../../tests/golden/archive-manifest-v1.bin");
        assert_eq!(manifest().encode().unwrap()[..], golden[..]);
        assert_eq!(Manifest::decode(golden), Ok(manifest()));
    }

    #[test]
    fn damage_is_noticed() {
        let whole = manifest().encode().unwrap();
        for at in 0..whole.len() {
            assert!(Manifest::decode(&whole[..at]).is_err(), "cut at {at}");
            let mut flipped = whole.to_vec();
            flipped[at] ^= 0x10;
            assert!(Manifest::decode(&flipped).is_err(), "flipped at {at}");
        }
        let mut overlapping = manifest();
        overlapping.parts[0].end = 8193;
        let encoded = overlapping.encode().unwrap();
        assert_eq!(Manifest::decode(&encoded), Err(ManifestError::Content));
        let mut circular = manifest();
        circular.from = Some((SnapshotId(3), "tuesday".to_owned()));
        let encoded = circular.encode().unwrap();
        assert_eq!(Manifest::decode(&encoded), Err(ManifestError::Content));
    }

    #[test]
    fn the_name_of_a_part_says_what_it_is() {
        let part = &manifest().parts[1];
        let path = part.path(&manifest().dir());
        let (dir, name) = path.rsplit_once('/').unwrap();
        assert_eq!(dir, "data/00000000000000000000000000c0ffee-7/3-2");
        assert_eq!(Part::parse(name, 4).as_ref(), Some(part));
        for other in [
            "",
            "x",
            "0-1-2",
            "2-1-",
            &name[..name.len() - 1],
            &format!("{name}-"),
        ] {
            assert_eq!(Part::parse(other, 4), None, "{other}");
        }
    }
}
