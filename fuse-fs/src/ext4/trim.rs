//! Free space is given back to the volume: `FITRIM`, which fstrim(8) asks for.
//!
//! What is given back is claimed meanwhile, so nobody's data is in it; no more than half of what is free at a
//! time, so nobody finds the filesystem full.

use crate::ext4::error::{Ext4Error, FsError, Refusal};
use crate::ext4::filesystem::Filesystem;
use std::ops::Range;

/// Given back by one request to the device.
const STEP_BYTES: u64 = 64 << 20;

impl Filesystem {
    /// Gives the runs of at least `least_bytes` of free space within `bytes` of the filesystem back to the volume;
    /// how many bytes these are.
    ///
    /// # Errors
    /// As the kernel's ext4: [`Refusal::Invalid`] for less than a block, a run longer than a group, or a range
    /// behind the end; [`FsError::ReadOnly`]; the device's.
    pub async fn trim(&self, bytes: Range<u64>, least_bytes: u64) -> Result<u64, FsError> {
        if self.is_read_only() {
            return Err(FsError::ReadOnly);
        }
        let superblock = self.superblock();
        let block_bytes = u64::from(superblock.block_bytes);
        let (start, end) = (bytes.start / block_bytes, bytes.end / block_bytes);
        let least = (least_bytes / block_bytes).max(1);
        let too_long = least > u64::from(superblock.blocks_per_group);
        if too_long || start >= end || start >= superblock.blocks_count {
            return Err(Refusal::Invalid.into());
        }
        let first = start.max(u64::from(superblock.first_data_block));
        let blocks = first..end.min(superblock.blocks_count).max(first);
        // What was freed a moment ago is free when that is durable.
        self.sync().await?;
        let mut trimmed = 0;
        for (group, bits) in self.groups().parts(blocks) {
            self.groups().load_blocks(group).await?;
            trimmed += self.trim_group(group, bits, least as u32).await?;
        }
        Ok(trimmed * block_bytes)
    }

    /// How many blocks were given back.
    async fn trim_group(&self, group: u32, bits: Range<u32>, least: u32) -> Result<u64, FsError> {
        let (mut left, mut trimmed) = (bits, 0);
        while let Some(run) = self.groups().free_run(group, left.clone(), least) {
            left.start = run.end;
            trimmed += self.trim_run(group, run).await?;
        }
        Ok(trimmed)
    }

    async fn trim_run(&self, group: u32, mut run: Range<u32>) -> Result<u64, FsError> {
        let most = STEP_BYTES / u64::from(self.superblock().block_bytes);
        let mut trimmed = 0;
        while !run.is_empty() {
            let half = self.groups().available() / 2;
            let step = most.min(half).min(run.len() as u64);
            if step == 0 || self.groups().promise(step, 0).is_err() {
                break;
            }
            let bits = run.start..run.start + step as u32;
            run.start = bits.end;
            match self.groups().claim_exactly(group, bits) {
                Some(blocks) => {
                    let given_back = self.give_to_volume(blocks.clone()).await;
                    self.groups().release_blocks(blocks);
                    given_back?;
                    trimmed += step;
                }
                None => self.groups().give_back(step),
            }
        }
        Ok(trimmed)
    }

    async fn give_to_volume(&self, blocks: Range<u64>) -> Result<(), FsError> {
        let block_bytes = u64::from(self.superblock().block_bytes);
        let offset_bytes = blocks.start * block_bytes;
        let len_bytes = (blocks.end - blocks.start) * block_bytes;
        let zeroed = self.device().zero(offset_bytes, len_bytes).await;
        zeroed.map_err(|source| {
            let write = Ext4Error::Write {
                offset_bytes,
                len_bytes,
                source,
            };
            write.into()
        })
    }
}
