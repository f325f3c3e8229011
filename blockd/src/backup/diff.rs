//! What changed between two views of a volume, as ranges exact to 4 KiB.

use crate::client::{ClientError, Since, Volume};
use crate::id::{BLOCK_BYTES, LayerRun};
use futures_util::stream::{self, BoxStream, StreamExt};
use std::collections::VecDeque;

/// Bytes of a volume that one question covers, and the pages where they are small; one page where
/// they are large. The runs of so much, [`WINDOWS_IN_FLIGHT`] times, are in memory.
const WINDOW_BYTES: u64 = 256 << 20;
const WINDOW_PAGES: u64 = 1024;
const WINDOWS_IN_FLIGHT: usize = 4;

/// A range that may differ from the older view; neighbours of one kind are one range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Changed {
    pub offset_bytes: u64,
    pub len_bytes: u64,
    /// Reads as zeros now, and takes no space.
    pub zero: bool,
}

impl Changed {
    #[must_use]
    pub fn end(&self) -> u64 {
        self.offset_bytes + self.len_bytes
    }

    fn continues(&self, next: &Self) -> bool {
        self.end() == next.offset_bytes && self.zero == next.zero
    }
}

/// The changed ranges of a volume or snapshot, in order.
pub struct Changes<'a> {
    windows: BoxStream<'a, Result<Vec<LayerRun>, ClientError>>,
    ready: VecDeque<Changed>,
    /// Up to here the windows have been looked at, in bytes.
    at: u64,
    full: bool,
}

impl<'a> Changes<'a> {
    /// What may differ from `since`; without it, what has data. From byte `start` to `end`.
    #[must_use]
    pub fn between(volume: &'a Volume, since: Option<Since>, start: u64, end: u64) -> Self {
        let page_bytes = u64::from(volume.info().volume.page_blocks) * BLOCK_BYTES;
        let window = WINDOW_BYTES.min(WINDOW_PAGES * page_bytes).max(page_bytes);
        let offsets = (start..end).step_by(usize::try_from(window).unwrap_or(usize::MAX));
        let windows = stream::iter(offsets)
            .map(move |offset| volume.layers(offset, window.min(end - offset), since))
            .buffered(WINDOWS_IN_FLIGHT);
        Self {
            windows: windows.boxed(),
            ready: VecDeque::new(),
            at: start,
            full: since.is_none(),
        }
    }

    /// As [`Self::between`], of the whole volume.
    #[must_use]
    pub fn new(volume: &'a Volume, since: Option<Since>) -> Self {
        Self::between(volume, since, 0, volume.size_bytes())
    }

    /// The next range; `None` behind the last one.
    ///
    /// # Errors
    /// [`ClientError`] of the servers.
    pub async fn next(&mut self) -> Result<Option<Changed>, ClientError> {
        // The last range may go on in the next window.
        while self.ready.len() < 2 {
            match self.windows.next().await {
                Some(runs) => self.take_in(runs?),
                None => break,
            }
        }
        Ok(self.ready.pop_front())
    }

    /// Everything before this byte has been looked at; grows while the ranges come.
    #[must_use]
    pub fn looked_at_bytes(&self) -> u64 {
        self.at
    }

    fn take_in(&mut self, runs: Vec<LayerRun>) {
        for run in runs {
            let next = Changed {
                offset_bytes: self.at,
                len_bytes: run.len_bytes,
                zero: run.hole,
            };
            self.at += run.len_bytes;
            match self.ready.back_mut() {
                _ if !(run.changed || self.full) || (self.full && run.hole) => {}
                Some(last) if last.continues(&next) => last.len_bytes += next.len_bytes,
                _ => self.ready.push_back(next),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::stream;

    fn changes(full: bool, windows: Vec<Vec<LayerRun>>) -> Vec<(u64, u64, bool)> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .build()
            .unwrap();
        let mut changes = Changes {
            windows: stream::iter(windows.into_iter().map(Ok)).boxed(),
            ready: VecDeque::new(),
            at: 0,
            full,
        };
        let mut found = Vec::new();
        while let Some(range) = runtime.block_on(changes.next()).unwrap() {
            found.push((range.offset_bytes, range.len_bytes, range.zero));
        }
        found
    }

    #[test]
    fn ranges_go_on_over_windows_and_unchanged_ones_are_left_out() {
        let run = |len_bytes, hole, changed| LayerRun {
            len_bytes,
            depth: 1,
            hole,
            changed,
        };
        let windows = vec![
            vec![run(10, false, false), run(10, false, true)],
            vec![run(20, false, true)],
            vec![
                run(5, true, true),
                run(5, true, false),
                run(10, false, true),
            ],
            vec![run(20, true, false)],
        ];
        assert_eq!(
            changes(false, windows.clone()),
            [(10, 30, false), (40, 5, true), (50, 10, false)]
        );
        assert_eq!(changes(true, windows), [(0, 40, false), (50, 10, false)]);
        assert_eq!(changes(false, Vec::new()), []);
    }
}
