//! Snapshots that leave the cluster and come back: changes, streams, archives.
//!
//! | file | what it is |
//! |---|---|
//! | `diff` | what changed between two views of a volume, as ranges |
//! | `rbd` | the RBD diff format, v1 and v2: records from and to bytes |
//! | `export`, `import` | a snapshot to a stream, and a stream to a volume |
//! | `page_map` | pages and checksums of a snapshot, without its data |
//! | `archive/` | snapshots as objects in a directory or a bucket |
//!
//! Everything here stands on `crate::client` and reads snapshots through their copy-on-write image,
//! so writes go on meanwhile (S003-32). Memory is bounded by [`PIECE_BYTES`] and
//! [`PIECES_IN_FLIGHT`], whatever the size of the volume.

mod archive;
mod base;
mod diff;
mod error;
mod export;
mod import;
mod page_map;
mod rbd;

pub use archive::{ArchiveStore, Archived, Manifest, Restored, Verified, archive, restore, verify};
pub use diff::{Changed, Changes};
pub use error::BackupError;
pub use export::{Exported, export};
pub use import::{ImportTarget, Imported, import};
pub use page_map::{PageMap, page_map};
pub use rbd::{DiffFormat, Head, Reader, Record, StreamError, StreamErrorKind, check_file};

/// Bytes of one read or write of a volume's data.
pub const PIECE_BYTES: u64 = 1 << 20;
/// Reads or writes of one piece that wait at once.
pub const PIECES_IN_FLIGHT: usize = 8;

/// A range cut into pieces that end at multiples of [`PIECE_BYTES`].
fn pieces(offset_bytes: u64, len_bytes: u64) -> impl Iterator<Item = (u64, u32)> {
    let (mut at, end) = (offset_bytes, offset_bytes.saturating_add(len_bytes));
    std::iter::from_fn(move || {
        let start = at;
        at = end.min((start / PIECE_BYTES + 1).saturating_mul(PIECE_BYTES));
        let len = u32::try_from(at - start).ok()?;
        (start < end).then_some((start, len))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_at_multiples_of_a_mebibyte() {
        let mib = 1u64 << 20;
        let cut: Vec<_> = pieces(mib - 4096, 4096 + mib + 1).collect();
        assert_eq!(cut, [(mib - 4096, 4096), (mib, 1 << 20), (2 * mib, 1)]);
        assert_eq!(pieces(5, 0).count(), 0);
        assert_eq!(pieces(u64::MAX - 1, 5).last(), Some((u64::MAX - 1, 1)));
    }
}
