//! `fuse-fs mkfs`: makes the ext4 that Debian 12's mke2fs makes by default, writing only what is not zero.
//!
//! | module | what |
//! |---|---|
//! | [`plan`] | sizes, and a place for everything; pure |
//! | [`space`] | the blocks that are given away |
//! | `encode` | the bytes |

mod encode;
pub mod plan;
pub mod space;

use crate::ext4::device::Device;
use crate::ext4::error::Ext4Error;
use crate::ext4::superblock;
use bytes::Bytes;
use futures_util::stream::{self, TryStreamExt};
use plan::{Identity, Plan};
use std::io;

/// Writes in flight, and bytes of one.
const WRITES_AT_ONCE: usize = 16;
const MAX_WRITE_BYTES: usize = 1 << 20;

/// What was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    pub block_bytes: u32,
    pub blocks: u64,
    pub inodes: u32,
    pub journal_blocks: u64,
    pub written_bytes: u64,
}

/// Makes a filesystem that fills `device`. What was on it is gone. The superblock is written last, behind a
/// flush: if it is interrupted there is no filesystem, and never half of one.
///
/// # Errors
/// [`Ext4Error::Size`], or what the device reports.
pub async fn make(device: &dyn Device, identity: &Identity) -> Result<Made, Ext4Error> {
    let mut plan = Plan::new(device.size_bytes(), identity)?;
    let size_bytes = device.size_bytes();
    device
        .zero(0, size_bytes)
        .await
        .map_err(failed(0, size_bytes))?;
    device.flush().await.map_err(failed(0, size_bytes))?;
    let mut written_bytes = superblock::SIZE_BYTES as u64;
    let mut writes = Vec::new();
    for (offset, bytes) in plan.pieces(identity) {
        written_bytes += bytes.len() as u64;
        let chunks = bytes.chunks(MAX_WRITE_BYTES).map(Bytes::copy_from_slice);
        writes.extend((offset..).step_by(MAX_WRITE_BYTES).zip(chunks));
    }
    let writes = stream::iter(writes.into_iter().map(Ok));
    writes
        .try_for_each_concurrent(WRITES_AT_ONCE, |(offset, bytes)| {
            write(device, offset, bytes)
        })
        .await?;
    device.flush().await.map_err(failed(0, size_bytes))?;
    let first = plan.superblock_bytes(0, identity);
    write(device, superblock::OFFSET_BYTES, first.into()).await?;
    device.flush().await.map_err(failed(0, size_bytes))?;
    Ok(Made {
        block_bytes: plan.superblock.block_bytes,
        blocks: plan.superblock.blocks_count,
        inodes: plan.superblock.inodes_count,
        journal_blocks: plan.journal.iter().map(|run| run.blocks).sum(),
        written_bytes,
    })
}

async fn write(device: &dyn Device, offset: u64, bytes: Bytes) -> Result<(), Ext4Error> {
    let len_bytes = bytes.len() as u64;
    device
        .write(offset, bytes)
        .await
        .map_err(failed(offset, len_bytes))
}

fn failed(offset_bytes: u64, len_bytes: u64) -> impl Fn(io::Error) -> Ext4Error {
    move |source| Ext4Error::Write {
        offset_bytes,
        len_bytes,
        source,
    }
}
