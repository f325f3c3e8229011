//! The router: who owns this page, at which epoch? (S003-03 to S003-07)
//!
//! A [`RoutingTable`] is immutable and identical on every server for one (volume, epoch); `node`
//! publishes a new one when the registry has changed. Clients use the same code, so that they go
//! straight to the owner. Nothing here does IO, waits, or knows a clock.

use crate::id::{BLOCK_BYTES, Epoch, NodeNo, PageNo, RouteRun, VolumeId};

/// Where the pages of one volume are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RoutingTable {
    pub volume: VolumeId,
    pub epoch: Epoch,
    pub size_bytes: u64,
    page_bytes: u64,
    /// Sorted and without gaps from page 0 on.
    runs: Vec<RouteRun>,
    owners: Vec<NodeNo>,
}

/// The share of a request that lies in one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    pub owner: NodeNo,
    pub page: PageNo,
    pub offset_bytes: u32,
    pub len_bytes: u32,
    /// Bytes of the request before this part.
    pub at_bytes: u64,
}

/// Why runs are no routing table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("routing table of volume {volume} has a gap or overlap at page {page}")]
pub struct BadTable {
    pub volume: VolumeId,
    pub page: u64,
}

impl RoutingTable {
    /// Builds the table from the runs of the registry.
    ///
    /// # Errors
    /// [`BadTable`] unless the runs cover pages 0 to the last exactly once, in order.
    pub fn new(
        volume: VolumeId,
        epoch: Epoch,
        size_bytes: u64,
        page_blocks: u32,
        runs: Vec<RouteRun>,
    ) -> Result<Self, BadTable> {
        let page_bytes = u64::from(page_blocks) * BLOCK_BYTES;
        let mut next = 0;
        for run in &runs {
            if u64::from(run.first_page) != next || run.page_count == 0 {
                return Err(BadTable { volume, page: next });
            }
            next += u64::from(run.page_count);
        }
        if page_bytes == 0 || next < size_bytes.div_ceil(page_bytes.max(1)) {
            return Err(BadTable { volume, page: next });
        }
        let mut owners: Vec<NodeNo> = runs.iter().map(|run| run.owner).collect();
        owners.sort_unstable();
        owners.dedup();
        Ok(Self {
            volume,
            epoch,
            size_bytes,
            page_bytes,
            runs,
            owners,
        })
    }

    /// A table without pages: every request is outside it.
    #[must_use]
    pub fn empty(volume: VolumeId) -> Self {
        Self {
            volume,
            epoch: Epoch(0),
            size_bytes: 0,
            page_bytes: BLOCK_BYTES,
            runs: vec![],
            owners: vec![],
        }
    }

    /// The servers that own at least one page (S003-23), in order of their numbers.
    #[must_use]
    pub fn owners(&self) -> &[NodeNo] {
        &self.owners
    }

    #[must_use]
    pub fn runs(&self) -> &[RouteRun] {
        &self.runs
    }

    /// The owner of a page, or `None` beyond the volume.
    #[must_use]
    pub fn owner(&self, page: PageNo) -> Option<NodeNo> {
        self.run_of(u64::from(page.0)).map(|run| run.owner)
    }

    fn run_of(&self, page: u64) -> Option<&RouteRun> {
        let after = self
            .runs
            .partition_point(|run| u64::from(run.first_page) <= page);
        let run = self.runs.get(after.checked_sub(1)?)?;
        (page < u64::from(run.first_page) + u64::from(run.page_count)).then_some(run)
    }

    /// Cuts a range into the parts that lie in one page each, in order.
    ///
    /// The range must lie in the volume; what lies outside gives no part.
    pub fn parts(&self, offset_bytes: u64, len_bytes: u64) -> impl Iterator<Item = Part> + '_ {
        let end = offset_bytes.saturating_add(len_bytes).min(self.size_bytes);
        let mut at = offset_bytes;
        std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let page = at / self.page_bytes;
            let in_page = at % self.page_bytes;
            let len = (self.page_bytes - in_page).min(end - at);
            let part = Part {
                owner: self.run_of(page)?.owner,
                page: PageNo(u32::try_from(page).ok()?),
                offset_bytes: u32::try_from(in_page).ok()?,
                len_bytes: u32::try_from(len).ok()?,
                at_bytes: at - offset_bytes,
            };
            at += len;
            Some(part)
        })
    }

    /// Whether a range touches more than one page: a write of it must be announced to the owners to
    /// be all-or-nothing in a snapshot (S003-33).
    #[must_use]
    pub fn spans_pages(&self, offset_bytes: u64, len_bytes: u64) -> bool {
        offset_bytes % self.page_bytes + len_bytes > self.page_bytes
    }

    /// Bytes of a page; at most 512 MiB, so that it fits the 32 bits of an offset.
    #[must_use]
    pub fn page_bytes(&self) -> u32 {
        u32::try_from(self.page_bytes).unwrap_or(u32::MAX)
    }

    /// Whether a range lies in one page of this volume.
    #[must_use]
    pub fn holds(&self, offset_bytes: u32, len_bytes: u32) -> bool {
        u64::from(offset_bytes) + u64::from(len_bytes) <= self.page_bytes
    }

    /// CRC32 over the runs: equal on all servers for one (volume, epoch) (S003-06).
    #[must_use]
    pub fn crc(&self) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        for run in &self.runs {
            hasher.update(&run.first_page.to_le_bytes());
            hasher.update(&run.page_count.to_le_bytes());
            hasher.update(&run.owner.0.to_le_bytes());
        }
        hasher.finalize()
    }
}

/// What an owner says to a request of `asked` when its own table is at `own`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EpochVerdict {
    Serve,
    /// The requester is behind: `stale(own epoch)` (S003-18).
    Stale,
    /// This server is behind and must catch up before it serves (S003-06).
    CatchUp,
}

/// Compares the epoch of a request with the one of this server's table.
#[must_use]
pub fn judge_epoch(own: Epoch, asked: Epoch) -> EpochVerdict {
    match asked.cmp(&own) {
        std::cmp::Ordering::Equal => EpochVerdict::Serve,
        std::cmp::Ordering::Less => EpochVerdict::Stale,
        std::cmp::Ordering::Greater => EpochVerdict::CatchUp,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> RoutingTable {
        let run = |first_page, page_count, owner| RouteRun {
            first_page,
            page_count,
            owner: NodeNo(owner),
        };
        let runs = vec![run(0, 2, 1), run(2, 1, 2), run(3, 1, 1)];
        RoutingTable::new(VolumeId(3), Epoch(1), 16 << 20, 8192, runs).unwrap()
    }

    #[test]
    fn a_request_is_cut_at_page_boundaries() {
        let table = table();
        let parts: Vec<_> = table.parts((8 << 20) - 512, 1024).collect();
        assert_eq!(parts.len(), 2);
        assert_eq!((parts[0].owner, parts[0].page), (NodeNo(1), PageNo(1)));
        assert_eq!((parts[1].owner, parts[1].page), (NodeNo(2), PageNo(2)));
        assert_eq!((parts[1].offset_bytes, parts[1].len_bytes), (0, 512));
        assert_eq!(parts[1].at_bytes, 512);
    }

    #[test]
    fn only_ranges_over_several_pages_span() {
        let table = table();
        assert!(!table.spans_pages(4 << 20, 4 << 20));
        assert!(table.spans_pages((8 << 20) - 512, 1024));
        assert!(table.spans_pages(4 << 20, 12 << 20));
        assert_eq!(table.owners(), [NodeNo(1), NodeNo(2)]);
    }

    #[test]
    fn gaps_overlaps_and_short_tables_are_refused() {
        let run = |first_page, page_count| RouteRun {
            first_page,
            page_count,
            owner: NodeNo(1),
        };
        for runs in [
            vec![],
            vec![run(1, 4)],
            vec![run(0, 2), run(3, 1)],
            vec![run(0, 2), run(1, 3)],
            vec![run(0, 3)],
            vec![run(0, 0), run(0, 4)],
        ] {
            let size_bytes = 16 << 20;
            assert!(RoutingTable::new(VolumeId(1), Epoch(1), size_bytes, 8192, runs).is_err());
        }
    }

    #[test]
    fn pages_beyond_the_table_have_no_owner() {
        assert_eq!(table().owner(PageNo(3)), Some(NodeNo(1)));
        assert_eq!(table().owner(PageNo(4)), None);
    }

    #[test]
    fn an_older_epoch_is_stale_and_a_newer_one_waits() {
        assert_eq!(judge_epoch(Epoch(3), Epoch(2)), EpochVerdict::Stale);
        assert_eq!(judge_epoch(Epoch(3), Epoch(3)), EpochVerdict::Serve);
        assert_eq!(judge_epoch(Epoch(3), Epoch(4)), EpochVerdict::CatchUp);
    }
}
