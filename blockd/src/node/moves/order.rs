//! What the source of moving pages says to their new owner.

use crate::data::error::DataError;
use crate::data::page_store::{History, MovedChunk};
use crate::id::{SnapshotId, VolumeId};
use crate::io::link::{decode_control, encode_control};
use crate::io::wire::{Frame, Kind, Payload};
use bytes::{Buf, Bytes};
use serde::{Deserialize, Serialize};

/// The payload of `Kind::Move`; the attempt is in `aux`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum MoveOrder {
    /// Get ready for these pages: drop what is left of them here, and know snapshots and rollbacks.
    Begin {
        first_page: u32,
        page_count: u32,
        /// Of the volume on the source.
        history: History,
    },
    /// Make durable what has come; more comes.
    Settle,
    /// That was all: take nothing more, know the snapshots, make all durable.
    Seal { snapshots: Vec<SnapshotId> },
}

/// What stands in front of the data in the payload of `Kind::MoveData`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct MovedData {
    /// Of the source, oldest first.
    pub(super) snapshots: Vec<SnapshotId>,
    pub(super) chunks: Vec<MovedChunk>,
}

impl MoveOrder {
    pub(super) fn frame(&self, volume: VolumeId, attempt: u64) -> Frame {
        let mut request = Frame::request(Kind::Move, volume);
        request.aux = attempt;
        request.payload = encode_control(self);
        request
    }
}

impl MovedData {
    /// The frame that carries `data`, one piece for each chunk.
    pub(super) fn frame(&self, volume: VolumeId, attempt: u64, data: Vec<Bytes>) -> Frame {
        let head = encode_control(self).into_bytes();
        let len = u32::try_from(head.len()).unwrap_or(u32::MAX);
        let mut request = Frame::request(Kind::MoveData, volume);
        request.aux = attempt;
        let front = [Bytes::copy_from_slice(&len.to_le_bytes()), head];
        request.payload = Payload(front.into_iter().chain(data).collect());
        request
    }

    /// Reads the head; gives it with the data behind it.
    pub(super) fn decode(payload: Payload) -> Result<(Self, Bytes), DataError> {
        let malformed = || DataError::Malformed("unreadable data of moving pages");
        let mut bytes = payload.into_bytes();
        let len = bytes.try_get_u32_le().map_err(|_| malformed())? as usize;
        if bytes.len() < len {
            return Err(malformed());
        }
        let head = bytes.split_to(len);
        let head: Self = decode_control(head.into()).map_err(|_| malformed())?;
        let sizes = head.chunks.iter().flat_map(|chunk| &chunk.versions);
        let wanted: usize = sizes
            .map(crate::data::page_store::MovedVersion::data_bytes)
            .sum();
        match wanted == bytes.len() {
            true => Ok((head, bytes)),
            false => Err(malformed()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::page_store::{EraPlace, MovedVersion};
    use crate::id::PageNo;

    #[test]
    fn moved_data_is_read_back_and_anything_else_is_refused() {
        let version = MovedVersion {
            place: EraPlace {
                after: Some(SnapshotId(3)),
                ..EraPlace::default()
            },
            present: 0b11,
            zero: 0b10,
            copied: 0,
            crcs: vec![7],
        };
        let chunk = MovedChunk {
            page: PageNo(4),
            chunk: 1,
            is_first: true,
            versions: vec![version],
        };
        let sent = MovedData {
            snapshots: vec![SnapshotId(3)],
            chunks: vec![chunk],
        };
        let frame = sent.frame(VolumeId(1), 9, vec![vec![5; 4096].into()]);
        let (head, data) = MovedData::decode(frame.payload.clone()).unwrap();
        assert_eq!((head, data.len(), frame.aux), (sent, 4096, 9));
        let bytes = frame.payload.into_bytes();
        for cut in [0, 3, 5, 20, bytes.len() - 1] {
            assert!(
                MovedData::decode(bytes.slice(..cut).into()).is_err(),
                "{cut}"
            );
        }
    }
}
